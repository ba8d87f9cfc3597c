"""FedSpeed."""

from typing import NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax

import fedjax_core as fc


class FedSpeedState(NamedTuple):
    """Global model x, mean of the corrections of all clients, every client's correction h_i, and the number of rounds
    done.

    The mean is () if the server averages over the cohort alone.
    """

    params: fc.Params
    correction: fc.Params
    client_corrections: fc.ClientTable
    round: fc.Counter = 0


def fedspeed(
    loss_fn: fc.LossFn,
    client_optimizer: fc.ClientOptimizer,
    *,
    num_clients: fc.NumClients,
    lam: fc.Scalar = 10.0,
    rho: fc.Scalar = 0.1,
    alpha: fc.Scalar = 1.0,
    normalize: bool = True,
    corrections: str = "all",
    **local: Unpack[fc.LocalOptions],
) -> fc.Algorithm:
    """FedSpeed: a proximal term whose bias is corrected, and gradients from a little further uphill.

    Client, from y = x:  g = g_i(y);  q = (1 - alpha) g + alpha g_i(y + rho g / ||g||), both on one batch;
                         y <- y - lr (q - h_i + (y - x) / lam), K times;  h_i <- h_i - (y_i - x) / lam.
    Server:              x <- mean_S y_i - lam h,  h = (1 / N) sum of the h_i of all clients (corrections="all"), or
                         x <- mean_S (y_i - lam h_i) (corrections="cohort").

    Down: x (1P). Up: y_i - x, from which the server follows h, or y_i - lam h_i - x for corrections="cohort" (1P). Two
    gradients per step.

    Args:
      loss_fn: `loss_fn(params, batch, key) -> float[B]`.
      client_optimizer: optax optimizer, started anew in every round, or a function of the round, or of the round and
        the client's id, giving one.
      num_clients: size of the population, N.
      lam: the proximal term is ||y - x||^2 / (2 lam), above 0; large is weak.
      rho: length of the step uphill (over all parameters together).
      alpha: share of the gradient from uphill, in [0, 1]; 0 makes this FedDyn with its alpha = 1 / lam.
      normalize: divide by ||g||; without it the step uphill is rho g.
      corrections: whose h_i the server takes off: those of "all" clients or of the "cohort".
      **local: batch_size, num_epochs or num_steps, order, weights, plan; see `LocalOptions`. All averages have the
        same weights.

    Differences: the paper averages the corrections of the cohort and steps uphill by rho g; released code averages
    over all clients and normalizes, as is the default here. With everyone taking part the two averages agree. With
    few, the h_i of a cohort, which tend to the gradients at the optimum, do not cancel, and the paper's form stalls.
    Released code also clips the gradient, with a part of the proximal term in it.

    Paper: Sun, Shen, Huang, Ding, Tao, "FedSpeed: Larger Local Interval, Less Communication Round, and Higher
    Generalization Accuracy", 2023, algorithm 1.
    """
    fc.checks.positive_int("num_clients", num_clients, "the size of the population")
    fc.checks.scalar("lam", lam, low=0, low_open=True)
    fc.checks.scalar("rho", rho, low=0)
    fc.checks.scalar("alpha", alpha, low=0, high=1)
    fc.checks.one_of("corrections", corrections, ("all", "cohort"))
    clients = fc.local_training(**local)
    gradient = fc.value_and_grad(loss_fn)

    def init(params: fc.Params) -> FedSpeedState:
        # In float32 at least, as every sum over rounds: steps of a bfloat16 model are soon lost in the rounding of h.
        zeros = fc.sums.wide_zeros(params)
        return FedSpeedState(params, zeros if corrections == "all" else (), fc.client_table(num_clients, zeros))

    def direction(y, batch, x, h_i):
        loss, g = gradient(y, batch)
        norm = fc.sums.norm(g)
        uphill = fc.add_scaled(y, rho / jnp.where(norm > 0, norm, 1) if normalize else rho, g)
        q = jax.tree.map(lambda g, u: (1 - alpha) * g + alpha * u, g, gradient(uphill, batch)[1])
        return loss, jax.tree.map(lambda q, h, y, x: (q - h + (y - x) / lam).astype(q.dtype), q, h_i, y, x)

    def upload(done, x):
        delta = optax.tree.sub(done.params, x)
        h_i = optax.tree.add_scale(done.own, -1 / lam, delta)
        return delta if corrections == "all" else optax.tree.add_scale(delta, -lam, fc.sums.cast_like(h_i, x)), h_i

    def update(state: FedSpeedState, cohort: fc.Cohort, key: fc.Key):
        program = fc.local_descent(fc.optimizer_at(client_optimizer, state.round), direction, upload=upload)
        own = fc.gather(state.client_corrections, cohort)
        results = clients.run(program, state.params, cohort, key, client_inputs=own)
        params, mean = optax.tree.add(state.params, results.aggregate), state.correction
        if corrections == "all":
            share = jnp.sum(results.weights) / num_clients
            mean = fc.add_scaled(mean, -share / lam, results.aggregate)
            params = fc.add_scaled(params, -lam, mean)
        return FedSpeedState(params, mean, fc.scatter(state.client_corrections, cohort, results.outputs)), results

    return fc.federated(init, update)
