"""What personal methods are compared with: training alone, and the global model tuned to a client's examples."""

from typing import Unpack

import jax.numpy as jnp
import optax

import fedjax_core as fc
from algorithms.averaging.fedavg import fedavg
from algorithms.parts import personal as parts


def local_only(
    loss_fn: fc.LossFn,
    client_optimizer: fc.ClientOptimizer,
    *,
    num_clients: fc.NumClients,
    **local: Unpack[fc.LocalOptions],
) -> fc.Algorithm:
    """Local: every client trains a model alone, and nothing is sent.

    Client, from y = v_i:  y <- y - lr g_i(y), K times;  v_i <- y.

    Down: nothing. Up: nothing.

    Args:
      loss_fn: `loss_fn(params, batch, key) -> float[B]`.
      client_optimizer: optax optimizer, started anew in every round, or a function of the round, or of the round and
        the client's id, giving one.
      num_clients: size of the population.
      **local: batch_size, num_epochs or num_steps, order, weights (of the loss), plan; see `LocalOptions`.

    The global model stays as it began. The view "personal" has each client's own.

    Differences: none. Clients train in the rounds in which they take part, as they do under the methods that this is
    compared with.

    Paper: none; the baseline "local" of papers on personal models.
    """
    return parts.trained_jointly(
        loss_fn,
        client_optimizer,
        lambda params: fc.partition(params, lambda path, leaf: True),
        num_clients,
        1.0,
        fc.local_training(**local),
    )


def fedavg_ft(
    loss_fn: fc.LossFn,
    client_optimizer: fc.ClientOptimizer,
    *,
    tuning_epochs: int = 1,
    tuning_optimizer: optax.GradientTransformation | None = None,
    server_lr: fc.Scalar = 1.0,
    **local: Unpack[fc.LocalOptions],
) -> fc.Algorithm:
    """FedAvg-FT: FedAvg, and every client tunes the global model to its own examples before it predicts.

    Client, from y = x:  y <- y - lr g_i(y), K times.
    Server:              x <- x + server_lr sum_S w_i (y_i - x).
    A client predicts with y after tuning_epochs epochs y <- y - lr g_i(y) from y = x.

    Down: x (1P). Up: y_i - x (1P).

    Args:
      loss_fn: `loss_fn(params, batch, key) -> float[B]`.
      client_optimizer: optax optimizer, started anew in every round, or a function of the round, or of the round and
        the client's id, giving one.
      tuning_epochs: epochs before a client predicts.
      tuning_optimizer: of tuning; the client optimizer of the first round unless given.
      server_lr: 1 replaces the model by the average.
      **local: batch_size, num_epochs or num_steps, order, weights, plan; see `LocalOptions`.

    The view "global" is FedAvg's model, "personal" the tuned one.

    Differences: none.

    Paper: Cheng, Chadha, Duchi, "Fine-tuning is Fine in Federated Learning", 2021 (there FTFA); the baseline of papers
    on personal models.
    """
    fc.checks.positive_int("tuning_epochs", tuning_epochs, "clients tune for at least one epoch")
    algorithm = fedavg(loss_fn, client_optimizer, server_lr=server_lr, **local)
    optimizer = tuning_optimizer or fc.optimizer_at(client_optimizer, jnp.int32(0))
    work = fc.local_training(**local).work._replace(num_epochs=tuning_epochs, num_steps=None)
    return algorithm._replace(views={"personal": parts.tuned(loss_fn, optimizer, work)})
