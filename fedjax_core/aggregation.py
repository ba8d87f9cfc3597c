"""From the clients' uploads to one result, without ever holding all uploads.

An aggregator is a map, a sum and a finish: each upload is lifted to a summand, summands are added as clients
finish (over lanes, devices and hosts alike), and the total is finished on the server.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_core import checks
from fedjax_core.population import Cohort
from fedjax_core.types import Array, PyTree


class Aggregator(NamedTuple):
    """A streaming aggregation.

    Attributes:
      lift: `lift(upload, weight) -> summand`, any pytree; linear in nothing, applied once per participant.
      finish: `finish(total) -> result`, where total is the sum of the summands (zeros if nobody took part).
    """

    lift: Callable[[PyTree, Array], PyTree]
    finish: Callable[[PyTree], PyTree]


def weighted_sum() -> Aggregator:
    """Sum of weight times upload."""
    return Aggregator(
        lambda upload, weight: jax.tree.map(lambda u: weight.astype(u.dtype) * u, upload), lambda total: total
    )


def weighted_mean() -> Aggregator:
    """Sum of weight times upload, divided by the sum of the weights; zeros if nobody took part."""

    def lift(upload: PyTree, weight: Array) -> PyTree:
        return jax.tree.map(lambda u: weight.astype(u.dtype) * u, upload), weight

    def finish(total: PyTree) -> PyTree:
        summed, weight = total
        divisor = jnp.where(weight > 0, weight, 1)
        return jax.tree.map(lambda s: s / divisor.astype(s.dtype), summed)

    return Aggregator(lift, finish)


def mapped(function: Callable[[PyTree], PyTree], aggregator: Aggregator) -> Aggregator:
    """Aggregates `function(upload)`, computed on the server, instead of the upload."""
    return Aggregator(lambda upload, weight: aggregator.lift(function(upload), weight), aggregator.finish)


def client_weights(weights: Any, cohort: Cohort) -> Array:
    """float[C], relative weight N p_i of each slot's client in the population; 0 where nobody takes part.

    The p_i sum to 1 over the population of N clients, so the weights average 1: a weighted mean over the cohort
    divides by their sum, a population-weighted sum over the cohort by N.

    Args:
      weights: "uniform" (p_i = 1 / N), "examples" (p_i proportional to the number of examples), or
        float[num_clients] of any non-negative numbers (p_i proportional to them).
      cohort: the cohort.

    Raises:
      ValueError: for another string, or an array that is negative or not one-dimensional.
    """
    mask = cohort.mask
    dtype = jnp.result_type(float)
    if isinstance(weights, str):
        if checks.one_of("weights", weights, ("uniform", "examples")) == "uniform":
            return mask.astype(dtype)
        total = jnp.maximum(cohort.num_examples, 1).astype(dtype)
        return cohort.sizes.astype(dtype) * cohort.num_clients.astype(dtype) / total
    if jnp.ndim(weights) != 1:
        raise ValueError(
            f"weights must be 'uniform', 'examples' or an array [num_clients], got shape "
            f"{jnp.shape(weights)}: pass one weight per client"
        )
    if checks.is_concrete(weights) and not (np.asarray(weights) >= 0).all():
        raise ValueError(f"weights must be at least 0, got {np.min(weights)}: pass non-negative weights")
    values = jnp.asarray(weights, dtype)
    mean = jnp.mean(values)
    return jnp.where(mask, values[jnp.maximum(cohort.ids, 0)] / jnp.where(mean > 0, mean, 1), 0)
