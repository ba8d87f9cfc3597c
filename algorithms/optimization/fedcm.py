"""FedCM."""

from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax

from algorithms.optimization.fedavg import Gradient, plain_gradient
from fedjax_core import (
    Algorithm,
    Array,
    Batch,
    ClientOptimizer,
    ClientProgram,
    Cohort,
    Key,
    Length,
    LocalOptions,
    LossFn,
    Metrics,
    Params,
    Scalar,
    checks,
    descend,
    global_algorithm,
    local_training,
    move,
    optimizer_at,
    per_length,
    round_metrics,
)


class FedCMState(NamedTuple):
    """Global model x, the server's direction D in the units of a gradient (uphill), and the number of rounds done."""

    params: Params
    direction: Params
    round: Array


def fedcm(
    loss_fn: LossFn,
    client_optimizer: ClientOptimizer,
    *,
    alpha: Scalar = 0.1,
    server_lr: Scalar = 1.0,
    aggregation: str = "mean",
    **local: Unpack[LocalOptions],
) -> Algorithm:
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
    return client_momentum(
        plain_gradient(loss_fn), client_optimizer, alpha=alpha, server_lr=server_lr, aggregation=aggregation, **local
    )


def client_momentum(
    gradient: Gradient,
    client_optimizer: ClientOptimizer,
    *,
    alpha: Scalar,
    server_lr: Scalar,
    aggregation: str,
    **local: Unpack[LocalOptions],
) -> Algorithm:
    """FedCM with any local gradient."""
    checks.scalar("alpha", alpha, low=0, high=1, low_open=True)
    checks.scalar("server_lr", server_lr, low=0)
    checks.one_of("aggregation", aggregation, AGGREGATIONS)
    clients = local_training(**local)

    def init(params: Params) -> FedCMState:
        return FedCMState(params, optax.tree.zeros_like(params), jnp.int32(0))

    def round(state: FedCMState, cohort: Cohort, key: Key) -> tuple[FedCMState, Metrics]:
        optimizer = optimizer_at(client_optimizer, state.round)

        def client_init(shared: Any, client_input: Any, key: Key) -> Any:
            x, _ = shared
            return x, optimizer.init(x), Length.start(optimizer)

        def client_step(shared: Any, carry: Any, batch: Batch) -> Any:
            x, direction = shared
            y, opt_state, length = carry
            loss, g = gradient(x, y, batch)
            v = jax.tree.map(lambda g, d: alpha * g + (1 - alpha) * d, g, direction)
            y, opt_state = descend(optimizer, y, opt_state, v)
            return (y, opt_state, length.extend(optimizer)), loss

        def client_final(shared: Any, carry: Any) -> Any:
            x, _ = shared
            y, _, length = carry
            return local_work_done(optax.tree.sub(x, y), length, aggregation), ()

        program = ClientProgram(client_init, client_step, client_final)
        results = clients.run(program, (state.params, state.direction), (), cohort, key)
        decrease, direction, _ = mean_work_done(results.aggregate, aggregation)
        params = move(state.params, -server_lr, decrease)
        direction = optax.tree.where(cohort.num_participants > 0, direction, state.direction)
        metrics = round_metrics(results, cohort, state.params, params)
        return FedCMState(params, direction, state.round + 1), metrics

    return global_algorithm(init, round)


AGGREGATIONS = ("mean", "normalized")
"""What clients with unequal work do to the model: FedAvg's rule and FedNova's."""


def local_work_done(decrease: Params, length: Length, aggregation: str) -> tuple[Params, Array]:
    """What a client uploads of its decrease x - y_i: that, or what it is in the units of a gradient; and its length."""
    return decrease if aggregation == "mean" else length.normalize(decrease), -length.z


def mean_work_done(mean: tuple[Params, Array], aggregation: str) -> tuple[Params, Params, Array]:
    """From the mean of such uploads: the model's decrease, that in the units of a gradient (D), and the length between.

    The decrease is length times D.
    """
    uploaded, length = mean
    if aggregation == "mean":
        return uploaded, per_length(uploaded, length), length
    return jax.tree.map(lambda d: length.astype(d.dtype) * d, uploaded), uploaded, length
