"""The previous global direction in every local step, beside a fresh gradient of any kind."""

from collections.abc import Callable
from typing import NamedTuple, Unpack

import jax
import optax

import fedjax_core as fc
from algorithms.parts import unequal_work


class DirectionState(NamedTuple):
    """Global model x, the server's direction D in the units of a gradient (uphill), and the number of rounds done."""

    params: fc.Params
    direction: fc.Params
    round: fc.Counter = 0


def with_global_direction(
    gradient: Callable[..., tuple[fc.Array, fc.Params]],
    client_optimizer: fc.ClientOptimizer,
    *,
    alpha: fc.Scalar,
    server_lr: fc.Scalar,
    aggregation: str,
    **local: Unpack[fc.LocalOptions],
) -> fc.Algorithm:
    """y <- y - lr (alpha g(y) + (1 - alpha) D), K times, where D is the mean of what clients have moved by, over lr K.

    Args:
      gradient: `gradient(y, batch) -> (loss, g)`.
      client_optimizer: as for `algorithms.fedcm`, and so are the others.
      alpha: weight of the fresh gradient, in (0, 1].
      server_lr: 1 replaces the model by the average.
      aggregation: one of `unequal_work.RULES`.
      **local: see `LocalOptions`.
    """
    fc.checks.scalar("alpha", alpha, low=0, high=1, low_open=True)
    fc.checks.scalar("server_lr", server_lr, low=0)
    fc.checks.one_of("aggregation", aggregation, unequal_work.RULES)
    clients = fc.local_training(**local)

    def init(params: fc.Params) -> DirectionState:
        return DirectionState(params, optax.tree.zeros_like(params))

    def direction(y, batch, shared, _):
        _, D = shared
        loss, g = gradient(y, batch)
        return loss, jax.tree.map(lambda g, d: alpha * g + (1 - alpha) * d, g, D)

    def update(state: DirectionState, cohort: fc.Cohort, key: fc.Key):
        program = fc.local_descent(
            fc.measured(fc.optimizer_at(client_optimizer, state.round)),
            direction,
            start=fc.first_part,
            upload=unequal_work.upload(aggregation),
        )
        results = clients.run(program, (state.params, state.direction), cohort, key)
        decrease, D, _ = unequal_work.mean(results.aggregate, aggregation)
        return DirectionState(fc.add_scaled(state.params, -server_lr, decrease), D), results

    return fc.federated(init, update)
