"""FedGAMMA."""

from typing import Unpack

import fedjax_core as fc
from algorithms.drift.scaffold import ScaffoldState
from algorithms.parts import controls
from algorithms.parts.sharpness import sam_gradient


def fedgamma(
    loss_fn: fc.LossFn,
    client_optimizer: fc.ClientOptimizer,
    *,
    num_clients: fc.NumClients,
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
        return ScaffoldState(params, *controls.start(params, num_clients))

    def direction(y, batch, shared, c_i):
        _, c = shared
        loss, q = gradient(y, batch)
        return loss, controls.corrected(q, c, c_i), q

    def update(state: ScaffoldState, cohort: fc.Cohort, key: fc.Key):
        optimizer = fc.optimizer_at(client_optimizer, state.round)
        program = fc.local_descent(optimizer, direction, start=fc.first_part, upload=controls.upload, with_mean=True)
        shared = state.params, fc.sums.cast_like(state.control, state.params)
        results = clients.run(program, shared, cohort, key, client_inputs=fc.gather(state.client_controls, cohort))
        delta, change = results.aggregate
        params = fc.add_scaled(state.params, server_lr, delta)
        control, client_controls = controls.updated(state, change, results, cohort, num_clients)
        return ScaffoldState(params, control, client_controls), results

    return fc.federated(init, update)
