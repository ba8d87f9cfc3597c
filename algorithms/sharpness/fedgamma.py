"""FedGAMMA."""

from typing import Unpack

import jax
import jax.numpy as jnp
import optax

import fedjax_core as fc
from algorithms.drift.scaffold import ScaffoldState
from algorithms.parts.sharpness import sam_gradient


def fedgamma(
    loss_fn: fc.LossFn,
    client_optimizer: fc.ClientOptimizer,
    *,
    num_clients: int,
    rho: fc.Scalar = 0.1,
    server_lr: fc.Scalar = 1.0,
    **local: Unpack[fc.LocalOptions],
) -> fc.Algorithm:
    """FedGAMMA: sharpness-aware local steps whose drift is cancelled by control variates.

    Client, from y = x:  g = g_i(y);  q = g_i(y + rho g / ||g||), both on one batch;
                         y <- y - lr (q + c - c_i), K times;  c_i+ = mean of the K gradients q.
    Server:              x <- x + server_lr sum_S w_i (y_i - x);  c <- c + (1 / N) sum_S (c_i+ - c_i).

    Down: x, c (2P). Up: y_i - x, c_i+ - c_i (2P). Two gradients per step.

    Args:
      loss_fn: `loss_fn(params, batch, key) -> float[B]`.
      client_optimizer: optax optimizer, started anew in every round, or a function of the round, or of the round and
        the client's id, giving one.
      num_clients: size of the population, N.
      rho: radius of the perturbation; the norm is over all parameters together. 0 is SCAFFOLD (option II).
      server_lr: 1 replaces the model by the average.
      **local: batch_size, num_epochs or num_steps, order, weights, plan; see `LocalOptions`. With weights other
        than uniform the control c is the mean of the c_i under the same weights.

    Differences: released code writes c_i+ as c_i - c + (x - y_i) / (K lr), which equals the mean of the q for plain SGD
    with a constant step, and clips the corrected gradient.

    Paper: Dai, Yang, Sun, Liu, Shen, Tao, "FedGAMMA: Federated Learning with Global Sharpness-Aware Minimization",
    2023, algorithm 1.
    """
    fc.checks.positive_int("num_clients", num_clients, "the size of the population")
    fc.checks.scalar("server_lr", server_lr, low=0)
    clients = fc.local_training(**local)
    gradient = sam_gradient(loss_fn, rho)

    def init(params: fc.Params) -> ScaffoldState:
        controls = fc.client_table(num_clients, optax.tree.zeros_like(params))
        return ScaffoldState(params, fc.sums.wide_zeros(params), controls)

    def direction(y, batch, shared, c_i):
        _, c = shared
        loss, g = gradient(y, batch)
        return loss, jax.tree.map(lambda g, c, c_i: g + (c - c_i), g, c, c_i), g

    def upload(done, shared):
        (x, _), c_i, c_i_new = shared, done.own, done.mean
        return (optax.tree.sub(done.params, x), optax.tree.sub(c_i_new, c_i)), c_i_new

    def update(state: ScaffoldState, cohort: fc.Cohort, key: fc.Key):
        optimizer = fc.optimizer_at(client_optimizer, state.round)
        program = fc.local_descent(optimizer, direction, start=fc.first_part, upload=upload, with_mean=True)
        shared = state.params, fc.sums.cast_like(state.control, state.params)
        results = clients.run(program, shared, fc.gather(state.client_controls, cohort), cohort, key)
        delta, change = results.aggregate
        params = fc.add_scaled(state.params, server_lr, delta)
        # The mean over the cohort of c_i+ - c_i, times (weight of the cohort) / N, is the sum over the cohort / N.
        control = fc.add_scaled(state.control, jnp.sum(results.weights) / num_clients, change)
        return ScaffoldState(params, control, fc.scatter(state.client_controls, cohort, results.outputs)), results

    return fc.federated(init, update)
