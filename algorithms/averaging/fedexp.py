"""FedExP."""

from collections.abc import Callable
from typing import NamedTuple, Unpack

import jax.numpy as jnp
import optax

import fedjax_core as fc


class FedExPState(NamedTuple):
    """Global model x, the one before it, and the number of rounds done."""

    params: fc.Params
    previous: fc.Params
    round: fc.Counter = 0


class FedExPMetrics(NamedTuple):
    """The server step size of the round."""

    server_lr: fc.Array


def fedexp(
    loss_fn: fc.LossFn,
    client_optimizer: fc.ClientOptimizer,
    *,
    eps: fc.Scalar | Callable[[fc.Counter], fc.Scalar] = 1e-3,
    **local: Unpack[fc.LocalOptions],
) -> fc.Algorithm:
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
        fc.checks.scalar("eps", eps, low=0)
    clients = fc.local_training(**local)
    gradient = fc.value_and_grad(loss_fn)
    # The server takes the norm of each upload as it comes; nothing more is sent.
    with_norms = fc.mapped(lambda delta: (delta, fc.sums.norm(delta, squared=True)), fc.weighted_mean())

    def init(params: fc.Params) -> FedExPState:
        return FedExPState(params, params)

    def update(state: FedExPState, cohort: fc.Cohort, key: fc.Key):
        program = fc.local_descent(fc.optimizer_at(client_optimizer, state.round), gradient)
        results = clients.run(program, state.params, cohort, key, aggregator=with_norms)
        mean, mean_square = results.aggregate
        guard = eps(state.round) if callable(eps) else eps
        denominator = 2 * (fc.sums.norm(mean, squared=True) + guard)
        ratio = mean_square / jnp.where(denominator > 0, denominator, 1)
        step = jnp.maximum(1, jnp.where(denominator > 0, ratio, 0))
        state = FedExPState(fc.add_scaled(state.params, step, mean), previous=state.params)
        return state, results, FedExPMetrics(step)

    def params(state: FedExPState) -> fc.Params:
        return optax.tree.scale(0.5, optax.tree.add(state.params, state.previous))

    return fc.federated(init, update, params)
