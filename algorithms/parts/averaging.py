"""FedAvg along any local direction."""

from collections.abc import Callable
from typing import Any, Unpack

import fedjax_core as fc


def averaging(
    direction: Callable[..., Any],
    client_optimizer: fc.ClientOptimizer,
    *,
    server_lr: fc.Scalar,
    **local: Unpack[fc.LocalOptions],
) -> fc.Algorithm:
    """x <- x + server_lr sum_S w_i (y_i - x), where y_i has come from x along `direction(y, batch, x, ())`.

    Args:
      direction: as for `fedjax_core.local_descent`.
      client_optimizer: as for every method.
      server_lr: 1 replaces the model by the average.
      **local: see `LocalOptions`.
    """
    fc.checks.scalar("server_lr", server_lr, low=0)
    clients = fc.local_training(**local)

    def update(state: fc.ModelState, cohort: fc.Cohort, key: fc.Key):
        program = fc.local_descent(fc.optimizer_at(client_optimizer, state.round), direction)
        results = clients.run(program, state.params, cohort, key)
        return state._replace(params=fc.add_scaled(state.params, server_lr, results.aggregate)), results

    return fc.federated(fc.ModelState, update)
