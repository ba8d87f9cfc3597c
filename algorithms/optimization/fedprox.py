"""FedProx."""

from typing import Unpack

import jax

from algorithms.optimization.fedavg import averaging
from fedjax_core import (
    Algorithm,
    Array,
    Batch,
    ClientOptimizer,
    LocalOptions,
    LossFn,
    Params,
    Scalar,
    checks,
    value_and_grad,
)


def fedprox(
    loss_fn: LossFn,
    client_optimizer: ClientOptimizer,
    *,
    mu: Scalar = 0.1,
    server_lr: Scalar = 1.0,
    **local: Unpack[LocalOptions],
) -> Algorithm:
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
    checks.scalar("mu", mu, low=0)
    gradient = value_and_grad(loss_fn)

    def proximal(x: Params, y: Params, batch: Batch) -> tuple[Array, Params]:
        loss, g = gradient(y, batch)
        return loss, jax.tree.map(lambda g, y, x: g + mu * (y - x), g, y, x)

    return averaging(proximal, client_optimizer, server_lr=server_lr, **local)
