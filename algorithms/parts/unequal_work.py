"""What clients with unequal local work do to a model that also follows a direction in the units of a gradient."""

from collections.abc import Callable
from typing import Any

import jax
import optax

import fedjax_core as fc

RULES = ("mean", "normalized")
"""FedAvg's rule, the mean of what clients have moved; and FedNova's, the mean per unit of work times the mean work."""


def upload(rule: str) -> Callable[[fc.Descent, Any], tuple[Any, Any]]:
    """For `fedjax_core.local_descent` with a `fedjax_core.measured` optimizer, from a model that is sent first.

    A client uploads its decrease x - y_i ("mean"), or what that is in the units of a gradient; and its length.
    """

    def final(done: fc.Descent, shared: fc.PyTree):
        decrease, length = optax.tree.sub(shared[0], done.params), done.opt_state.length
        return (decrease if rule == "mean" else fc.per_length(decrease, length), length), ()

    return final


def mean(uploads: tuple[fc.Params, fc.Array], rule: str) -> tuple[fc.Params, fc.Params, fc.Array]:
    """From the mean of such uploads: the model's decrease, that in the units of a gradient (D), and the length between.

    The decrease is length times D.
    """
    uploaded, length = uploads
    if rule == "mean":
        return uploaded, fc.per_length(uploaded, length), length
    return jax.tree.map(lambda d: length.astype(d.dtype) * d, uploaded), uploaded, length
