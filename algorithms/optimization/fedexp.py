"""FedExP."""

from collections.abc import Callable
from typing import NamedTuple, Unpack

import jax.numpy as jnp
import optax

from algorithms.optimization.fedavg import displacement_program, plain_gradient
from fedjax_core import (
    Algorithm,
    Array,
    ClientOptimizer,
    Cohort,
    Key,
    LocalOptions,
    LossFn,
    Metrics,
    Params,
    Scalar,
    checks,
    global_algorithm,
    local_training,
    mapped,
    move,
    optimizer_at,
    round_metrics,
    sums,
    weighted_mean,
)


class FedExPState(NamedTuple):
    """Global model x, the one before it, and the number of rounds done."""

    params: Params
    previous: Params
    round: Array


class FedExPMetrics(NamedTuple):
    """The server step size of the round."""

    server_lr: Array


def fedexp(
    loss_fn: LossFn,
    client_optimizer: ClientOptimizer,
    *,
    eps: Scalar | Callable[[Array], Scalar] = 1e-3,
    **local: Unpack[LocalOptions],
) -> Algorithm:
    """FedExP: the server extrapolates further the more the clients disagree.

    Client, from y = x:  y <- y - lr g_i(y), K times;  delta_i = y_i - x.
    Server:              D = mean_S delta_i;  step = max(1, mean_S ||delta_i||^2 / (2 (||D||^2 + eps)));
                         x <- x + step D.

    `params` gives the mean of the last two server models, which the paper reports; `state.params` is x.

    Down: x (1P). Up: delta_i (1P).

    Args:
      loss_fn: `loss_fn(params, batch, key) -> float[B]`.
      client_optimizer: optax optimizer, started anew in every round, or a function of the round, or of the round and
        the client's id, giving one.
      eps: guards the division, above 0; a number or a function of the round (the authors let it decay with the
        square of the learning rate).
      **local: batch_size, num_epochs or num_steps, order, weights, plan; see `LocalOptions`.

    Differences: the authors' code multiplies eps by the number of participants; the paper's rule is used here.

    Paper: Jhunjhunwala, Wang, Joshi, "FedExP: Speeding Up Federated Averaging via Extrapolation", 2023, algorithm 1.
    """
    if not callable(eps):
        checks.scalar("eps", eps, low=0)
    clients = local_training(**local)

    def init(params: Params) -> FedExPState:
        return FedExPState(params, params, jnp.int32(0))

    def round(state: FedExPState, cohort: Cohort, key: Key) -> tuple[FedExPState, Metrics]:
        program = displacement_program(plain_gradient(loss_fn), optimizer_at(client_optimizer, state.round))
        # The server takes the norm of each upload as it comes; nothing more is sent.
        aggregator = mapped(lambda delta: (delta, sums.norm(delta, squared=True)), weighted_mean())
        results = clients.run(program, state.params, (), cohort, key, aggregator=aggregator)
        mean, mean_square = results.aggregate
        guard = eps(state.round) if callable(eps) else eps
        denominator = 2 * (sums.norm(mean, squared=True) + guard)
        ratio = mean_square / jnp.where(denominator > 0, denominator, 1)
        step = jnp.maximum(1, jnp.where(denominator > 0, ratio, 0))
        params = move(state.params, step, mean)
        previous = optax.tree.where(cohort.num_participants > 0, state.params, state.previous)
        metrics = round_metrics(results, cohort, state.params, params, FedExPMetrics(step))
        return FedExPState(params, previous, state.round + 1), metrics

    def params(state: FedExPState) -> Params:
        return optax.tree.scale(0.5, optax.tree.add(state.params, state.previous))

    return global_algorithm(init, round, params)
