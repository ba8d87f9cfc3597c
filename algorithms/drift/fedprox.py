"""FedProx."""

from typing import Unpack

import jax

import fedjax_core as fc
from algorithms.parts.averaging import averaging


def fedprox(
    loss_fn: fc.LossFn,
    client_optimizer: fc.ClientOptimizer,
    *,
    mu: fc.Scalar = 0.1,
    server_lr: fc.Scalar = 1.0,
    **local: Unpack[fc.LocalOptions],
) -> fc.Algorithm:
    """FedProx: a quadratic penalty keeps local models near the global one.

    Client, from y = x:  y <- y - lr (g_i(y) + mu (y - x)), K times.
    Server:              x <- x + server_lr sum_S w_i (y_i - x).

    Down: x (1P). Up: y_i - x (1P).

    Args:
      loss_fn: `loss_fn(params, batch, key) -> float[B]`.
      client_optimizer: optax optimizer, started anew in every round, or a function of the round, or of the round and
        the client's id, giving one.
      mu: weight of the penalty (mu / 2) ||y - x||^2; 0 is FedAvg.
      server_lr: 1 replaces the model by the average.
      **local: batch_size, num_epochs or num_steps (an array lets stragglers stop early), order, weights, plan; see
        `LocalOptions`.

    Differences: the paper draws clients in proportion to their size and averages plainly; released code draws
    uniformly and weighs by size. Both can be had through the sampler and `weights`.

    Paper: Li, Sahu, Zaheer, Sanjabi, Talwalkar, Smith, "Federated Optimization in Heterogeneous Networks", 2020,
    algorithm 2.
    """
    fc.checks.scalar("mu", mu, low=0)
    gradient = fc.value_and_grad(loss_fn)

    def direction(y, batch, x, _):
        loss, g = gradient(y, batch)
        return loss, jax.tree.map(lambda g, y, x: g + mu * (y - x), g, y, x)

    return averaging(direction, client_optimizer, server_lr=server_lr, **local)
