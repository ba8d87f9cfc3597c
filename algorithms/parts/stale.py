"""Clients that train from the global model of an earlier round, the last one that they have received."""

from collections.abc import Callable
from typing import Any

import optax

import fedjax_core as fc


def descent(optimizer: optax.GradientTransformation, direction: Callable[..., Any]) -> fc.ClientProgram:
    """Local descent from the client's own x_i; its input is (x_i, w_i), and it uploads w_i (y_i - x_i)."""

    def upload(done: fc.Descent, shared: fc.PyTree):
        start, w = done.own
        return fc.scale(w, optax.tree.sub(done.params, start)), ()

    return fc.local_descent(optimizer, direction, start=lambda shared, own: own[0], upload=upload)


def received(starts: fc.ClientTable, cohort: fc.Cohort, params: fc.Params) -> fc.ClientTable:
    """The table of the clients' x_i after the cohort has received the new global model."""
    return fc.scatter(starts, cohort, fc.global_client_params(params, cohort.ids))


def downloads(results: fc.ClientResults, cohort: fc.Cohort, params: fc.Params) -> fc.ClientResults:
    """Counts the new model as sent down, which those who have delivered receive after the server's step."""
    return results._replace(bytes_down=fc.bytes_for_each(cohort, params))
