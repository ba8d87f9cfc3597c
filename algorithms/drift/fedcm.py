"""FedCM."""

from typing import Unpack

import fedjax_core as fc
from algorithms.parts.global_direction import with_global_direction


def fedcm(
    loss_fn: fc.LossFn,
    client_optimizer: fc.ClientOptimizer,
    *,
    alpha: fc.Scalar = 0.1,
    server_lr: fc.Scalar = 1.0,
    aggregation: str = "mean",
    **local: Unpack[fc.LocalOptions],
) -> fc.Algorithm:
    """FedCM: the previous global direction enters every local step.

    Client, from y = x:  y <- y - lr (alpha g_i(y) + (1 - alpha) D), K times.
    Server:              D <- mean_S (x - y_i) / (lr K);  x <- x - server_lr (lr K) D.

    With unequal work lr K is mean_S lr K_i, so that D is the mean of all gradients of the round, each counted once; or
    with aggregation="normalized" D is mean_S (x - y_i) / (lr K_i), so that each client counts once.

    Down: x, D (2P). Up: x - y_i and lr K_i (1P + 1; the scalar is known where all do the same work).

    Args:
      loss_fn: `loss_fn(params, batch, key) -> float[B]`.
      client_optimizer: optax optimizer, linear in small gradients (SGD, maybe with momentum, clipping, weight decay),
        started anew in every round, or a function of the round, or of the round and the client's id, giving one.
      alpha: weight of the fresh gradient, in (0, 1]; 1 is FedAvg (or FedNova, with aggregation="normalized").
      server_lr: 1 replaces the model by the average; the paper's server step is server_lr lr K.
      aggregation: "mean" or "normalized", for clients with unequal work; the same for equal work.
      **local: batch_size, num_epochs or num_steps, order, weights, plan; see `LocalOptions`.

    Differences: none for equal work; the paper has no other. The authors' code, which clips gradients, makes D from
    the averaged model's step, as is the default here. What enters D is what the optimizer has made of the gradients:
    clipped, and with its weight decay.

    Paper: Xu, Wang, Wang, Yao, "FedCM: Federated Learning with Client-level Momentum", 2021, algorithm 1.
    """
    return with_global_direction(
        fc.value_and_grad(loss_fn),
        client_optimizer,
        alpha=alpha,
        server_lr=server_lr,
        aggregation=aggregation,
        **local,
    )
