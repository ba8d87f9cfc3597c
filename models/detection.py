"""Detection of what is not normal by a score, such as the error of an autoencoder that was trained on what is."""

from typing import NamedTuple

import jax.numpy as jnp

from fedjax_core import Array, checks


class Detection(NamedTuple):
    """How good a detection is, float[] each; 0 where there is nothing to divide by.

    Attributes:
      precision: share of what was found that is not normal.
      recall: share of what is not normal that was found.
      f1: 2 precision recall / (precision + recall).
    """

    precision: Array
    recall: Array
    f1: Array


def threshold(scores: Array, *, z: float | Array | None = None, quantile: float | Array | None = None) -> Array:
    """What a score has to be above to be found, from scores of normal examples that nothing was trained on.

    Args:
      scores: float[n].
      z: so many standard deviations above their mean; 3 unless one of the two is given.
      quantile: this share of them is to be at most the threshold, in [0, 1].

    Raises:
      ValueError: if both are given, there are no scores, or the quantile is no share.
    """
    if z is not None and quantile is not None:
        raise ValueError(f"z={z!r} and quantile={quantile!r} are both given: a threshold is by one of them, drop one")
    if jnp.ndim(scores) != 1 or not len(scores):
        raise ValueError(f"scores must be float[n] of at least one example, got shape {list(jnp.shape(scores))}")
    if quantile is not None:
        checks.scalar("quantile", quantile, low=0, high=1)
        return jnp.quantile(scores, quantile)
    return jnp.mean(scores) + (3.0 if z is None else z) * jnp.std(scores)


def detection(scores: Array, anomalous: Array, limit: float | Array) -> Detection:
    """Precision, recall and F1 of finding those with a score above the limit.

    Args:
      scores: float[n].
      anomalous: bool[n], whether an example is not normal.
      limit: for example that of `threshold`.

    Raises:
      ValueError: if there is not one of each.
    """
    if jnp.shape(scores) != jnp.shape(anomalous) or jnp.ndim(scores) != 1:
        raise ValueError(
            f"scores and anomalous must be arrays of one entry for each example, got shapes {list(jnp.shape(scores))} "
            f"and {list(jnp.shape(anomalous))}"
        )
    found, anomalous = scores > limit, jnp.asarray(anomalous, bool)
    hits = jnp.sum(found & anomalous)
    precision, recall = (hits / jnp.maximum(jnp.sum(of), 1) for of in (found, anomalous))
    both = precision + recall
    return Detection(precision, recall, jnp.where(both > 0, 2 * precision * recall / jnp.where(both > 0, both, 1), 0))
