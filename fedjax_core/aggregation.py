"""From the clients' uploads to one result, without ever holding all uploads.

An aggregator is a map, a sum and a finish: each upload is lifted to a summand, summands are added as clients
finish (over lanes, devices and hosts alike), and the total is finished on the server.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_core import checks, sums
from fedjax_core.population import Cohort
from fedjax_core.types import Array, PyTree, Weights


class Aggregator(NamedTuple):
    """A streaming aggregation.

    Attributes:
      lift: `lift(upload, weight) -> summand`, any pytree; linear in nothing, applied once per participant.
      finish: `finish(total) -> result`, where total is the sum of the summands (zeros if no client took part), in their
        dtypes. However many there are, the sum is as good as its dtype: it is taken in float32 at least.
      mean_of: if the result is the weighted mean of a function of the uploads, this function, so that another rule can
        take the place of the mean (`fedjax_core.messages`); else None. Sums, and means that not all clients have a part
        in (`segment_mean`, `elementwise_mean`), have None: no rule for one mean over all can take their place.
    """

    lift: Callable[[PyTree, Array], PyTree]
    finish: Callable[[PyTree], PyTree]
    mean_of: Callable[[PyTree], PyTree] | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Widened:
    """Uploads times their weight, in the dtypes to sum in, and the dtypes that the result is to have."""

    values: list[Array]
    weight: PyTree
    treedef: jax.tree_util.PyTreeDef = field(metadata={"static": True})
    dtypes: tuple[np.dtype, ...] = field(metadata={"static": True})

    @classmethod
    def lift(cls, upload: PyTree, weight: Array, counted: PyTree) -> "_Widened":
        leaves, treedef = jax.tree.flatten(upload)
        dtypes = tuple(sums.mean_dtype(jnp.result_type(leaf)) for leaf in leaves)
        wide = [sums.widen(leaf) for leaf in leaves]
        return cls([weight.astype(leaf.dtype) * leaf for leaf in wide], counted, treedef, dtypes)

    def narrowed(self, divisor: Array | None = None, finish: Callable[[PyTree], PyTree] | None = None) -> PyTree:
        values = self.values if divisor is None else [leaf / divisor.astype(leaf.dtype) for leaf in self.values]
        if finish is not None:
            values = jax.tree.leaves(finish(jax.tree.unflatten(self.treedef, values)))
        return jax.tree.unflatten(
            self.treedef, [leaf.astype(dtype) for leaf, dtype in zip(values, self.dtypes, strict=True)]
        )


def weighted_sum(finish: Callable[[PyTree], PyTree] | None = None) -> Aggregator:
    """Sum of weight times upload, in the dtypes of the upload; integers are summed as floats.

    Args:
      finish: `finish(total) -> total` of the same structure and shapes, before it is cast to the dtypes of the upload.
    """
    return Aggregator(
        lambda upload, weight: _Widened.lift(upload, weight, ()), lambda total: total.narrowed(finish=finish)
    )


def bounded_sum(
    bound: Callable[[PyTree], tuple[PyTree, PyTree]], finish: Callable[[PyTree], PyTree] | None = None
) -> Aggregator:
    """Sum of what a bound leaves of each upload, in which every participant counts once, whatever the weights.

    Args:
      bound: `bound(upload) -> (upload, told)`, of the same structure and shapes, in the dtypes that sums are taken in:
        nothing is rounded between the bound and the sum. told, any pytree of numbers, is added up beside it.
      finish: as in `weighted_sum`.

    The result is (the sum in the dtypes of the uploads, the sum of what was told).
    """

    def lift(upload: PyTree, weight: Array) -> _Widened:
        wide = _Widened.lift(upload, jnp.ones(()), ())
        values, told = bound(jax.tree.unflatten(wide.treedef, wide.values))
        return replace(wide, values=jax.tree.leaves(values), weight=told)

    return Aggregator(lift, lambda total: (total.narrowed(finish=finish), total.weight))


def weighted_mean() -> Aggregator:
    """Sum of weight times upload, divided by the sum of the weights; zeros if no client took part.

    In the dtypes of the upload; the mean of integers is a float.
    """

    def finish(total: _Widened) -> PyTree:
        return total.narrowed(jnp.where(total.weight > 0, total.weight, 1))

    return Aggregator(lambda upload, weight: _Widened.lift(upload, weight, weight), finish, itself)


def itself(upload: PyTree) -> PyTree:
    """The upload: of an aggregator that has this as its `mean_of`, the result is the mean of what clients send."""
    return upload


class PartialMeans(NamedTuple):
    """Means that not all clients have a part in.

    Attributes:
      mean: the means; zeros where the weight is 0.
      weight: sum of the weights behind each mean, by which it is known whether anybody has a part in it.
    """

    mean: PyTree
    weight: PyTree


def segment_mean(num_segments: int) -> Aggregator:
    """A mean over the clients of each segment: of each cluster, architecture or region.

    Uploads are pairs (index, value): index int[], the client's segment from 0 on (any other has a part in no mean), and
    value any pytree. The result is `PartialMeans(mean, weight)`, leaves [num_segments, ...] in the dtypes of the value,
    and float[num_segments]. A client adds to `num_segments` running sums, and no more than those are ever held.
    """
    checks.positive_int("num_segments", num_segments, "there is at least one segment")

    def lift(upload: tuple[Array, PyTree], weight: Array) -> _Widened:
        index, value = _pair(upload, "segment_mean(k)", "(index, value)")
        if jnp.shape(index) != () or not jnp.issubdtype(jnp.result_type(index), jnp.integer):
            raise ValueError(
                f"segment_mean(k) needs uploads (index, value) with the index int[] of a client's segment, got "
                f"{jnp.result_type(index)}{list(jnp.shape(index))}: upload one integer, as jnp.argmin gives it"
            )
        own = jnp.arange(num_segments) == index

        def placed(leaf: Array) -> Array:  # where and not a product: one segment's NaN is not another's
            return jnp.where(own.reshape(-1, *[1] * leaf.ndim), leaf, 0)

        lifted = _Widened.lift(value, weight, jnp.where(own, weight, 0))
        return replace(lifted, values=[placed(leaf) for leaf in lifted.values])

    def finish(total: _Widened) -> PartialMeans:
        divided = total.narrowed(finish=lambda tree: jax.tree.map(lambda leaf: _over(leaf, total.weight), tree))
        return PartialMeans(divided, total.weight)

    return Aggregator(lift, finish)


def elementwise_mean() -> Aggregator:
    """A mean in which each entry has weights of its own: of the holders of a class, of sub-models, by information.

    Uploads are pairs (values, weights): values any pytree, and weights of the same structure or of the upper part of
    it, each leaf numbers of at least 0, or bool, of the shape of the leading axes of the values below it: for
    prototypes [classes, d] the counts [classes]. A value whose weight is 0 may be NaN; a negative weight makes the
    entry's mean NaN. An entry's weight is times that of the client. The result is `PartialMeans(mean, weight)`, with
    the structures of values and weights.
    """

    def lift(upload: tuple[PyTree, PyTree], weight: Array) -> _Widened:
        values, weights = _pair(upload, "elementwise_mean()", "(values, weights)")
        # What is negative may cancel with others: then it must not go by unseen.
        weights = jax.tree.map(lambda own: jnp.where(own < 0, jnp.nan, sums.widen(own)), weights)
        lifted = _Widened.lift(values, weight, jax.tree.map(lambda own: weight * sums.widen(own), weights))
        own = jax.tree.leaves(jax.tree.map(lambda own, below: jax.tree.map(lambda _: own, below), weights, values))
        return replace(lifted, values=[_times(*each) for each in zip(lifted.values, own, strict=True)])

    def finish(total: _Widened) -> PartialMeans:
        def means(tree: PyTree) -> PyTree:
            return jax.tree.map(
                lambda weight, below: jax.tree.map(lambda leaf: _over(leaf, weight), below), total.weight, tree
            )

        return PartialMeans(total.narrowed(finish=means), total.weight)

    return Aggregator(lift, finish)


def _pair(upload: PyTree, name: str, wanted: str) -> tuple[Any, Any]:
    """Both parts of an upload that is a pair."""
    if not isinstance(upload, tuple) or len(upload) != 2:
        raise ValueError(f"{name} needs uploads {wanted}, got {type(upload).__name__}: upload a pair")
    return upload[0], upload[1]


def _times(value: Array, weight: Array) -> Array:
    """Weight times value; 0 where the weight is 0, whatever the value."""
    shape = jnp.shape(weight)
    if value.shape[: len(shape)] != shape:
        raise ValueError(
            f"elementwise_mean() has weights of shape {list(shape)} for values of shape {list(value.shape)}: give a "
            "weight for each entry along the leading axes of the values"
        )
    across = sums.across(jnp.asarray(weight), value).astype(value.dtype)
    return jnp.where(across != 0, across * value, 0)


def _over(total: Array, weight: Array) -> Array:
    """Total over weight along the leading axes; 0 where the weight is 0."""
    across = sums.across(weight, total).astype(total.dtype)
    return jnp.where(across != 0, total / jnp.where(across != 0, across, 1), 0)


def integer_sum() -> Aggregator:
    """Sum of the participants' uploads of integers, as integers: votes, counts, masked or encoded numbers.

    It is exact, and modulo 2^b where it passes what the b bits of its dtype hold. Every participant counts once,
    whatever the weights.

    Raises (the functions that are returned):
      TypeError: if something else than integers is uploaded.
    """

    def lift(upload: PyTree, weight: Array) -> PyTree:
        for leaf in jax.tree.leaves(upload):
            if not jnp.issubdtype(jnp.result_type(leaf), jnp.integer):
                raise TypeError(
                    f"integer_sum adds up integers, but the upload has a leaf of {jnp.result_type(leaf)}: round it to "
                    "integers, or take weighted_sum"
                )
        return upload

    return Aggregator(lift, lambda total: total)


class Stacked(NamedTuple):
    """An aggregation that needs all uploads at once: a server's memory of each client, a rule that compares them.

    Attributes:
      finish: `finish(uploads, weights) -> result`, uploads with leaves [C, ...], zeros in slots that took no part, and
        weights float[C], 0 there.
    """

    finish: Callable[[PyTree, Array], PyTree]


def stacked(rule: Callable[[PyTree, Array], PyTree] = lambda uploads, weights: uploads) -> Stacked:
    """`rule(uploads, weights)` of all uploads, leaves [C, ...]; the uploads themselves unless given.

    A weight is 0 in slots that took no part, so that a rule needs no mask: a client whose weight is 0 counts in no
    aggregate. A rule draws nothing; one that is to draw is made in the round, around the round's key.
    """
    checks.function("rule", rule, "rule(uploads, weights) -> result")
    return Stacked(rule)


def mapped(function: Callable[[PyTree], PyTree], aggregator: Aggregator) -> Aggregator:
    """Aggregates `function(upload)`, computed on the server, instead of the upload."""
    inner = aggregator.mean_of
    mean_of = None if inner is None else lambda upload: inner(function(upload))
    return Aggregator(lambda upload, weight: aggregator.lift(function(upload), weight), aggregator.finish, mean_of)


def client_weights(weights: Weights, cohort: Cohort) -> Array:
    """float[C], relative weight N p_i of each slot's client in the population; 0 where no client takes part.

    The p_i sum to 1 over the population of N clients, so the weights average 1: a weighted mean over the cohort
    divides by their sum, a population-weighted sum over the cohort by N.

    Args:
      weights: "uniform" (p_i = 1 / N), "examples" (p_i proportional to the number of examples), or
        float[num_clients] of any non-negative numbers (p_i proportional to them).
      cohort: the cohort.

    Raises:
      ValueError: for another string, an array that is not one-dimensional or of another population, has a negative,
        infinite or NaN entry, or nothing but zeros.
    """
    check_weights(weights)
    mask = cohort.mask
    dtype = jnp.result_type(float)
    if isinstance(weights, str):
        if weights == "uniform":
            return mask.astype(dtype)
        total = jnp.maximum(cohort.num_examples, 1).astype(dtype)
        return cohort.sizes.astype(dtype) * cohort.num_clients.astype(dtype) / total
    cohort.check_per_client("weights", weights)
    if checks.is_concrete(weights):
        on_host = np.asarray(weights, np.float64)
        weights = on_host / on_host.max()  # before they become float32, in which they may be 0 or infinite
    values = jnp.asarray(weights, dtype)
    # In proportion to the largest, so that the sum can neither overflow nor vanish. Divided in two steps:
    # compilers multiply by the reciprocal instead, which is flushed to 0 for numbers near the largest float.
    values = values * jnp.where(jnp.max(values) > 2.0**64, 2.0**-64, 1).astype(dtype)
    largest = jnp.max(values)
    values = values / jnp.where(largest > 0, largest, 1)
    values = jnp.where(values < 0, jnp.nan, values)  # of tracers, which no check sees
    mean = sums.total(values) / values.shape[0]
    return jnp.where(mask, values[jnp.maximum(cohort.ids, 0)] / jnp.where(mean > 0, mean, 1), 0)


def check_weights(weights: Weights) -> None:
    """Raises ValueError for weights of clients that are neither a known word nor float[num_clients] of at least 0."""
    if isinstance(weights, str):
        checks.one_of("weights", weights, ("uniform", "examples"))
        return
    values = weights if isinstance(weights, jax.Array) else np.asarray(weights)
    if (
        values.ndim != 1
        or values.shape[0] == 0
        or not (jnp.issubdtype(values.dtype, np.floating) or jnp.issubdtype(values.dtype, np.integer))
    ):
        raise ValueError(
            f"weights must be 'uniform', 'examples' or an array [num_clients], got shape "
            f"{values.shape} of {values.dtype}: pass one weight per client"
        )
    if not checks.is_concrete(weights):
        return
    on_host = np.asarray(values, np.float64)
    good = (on_host >= 0) & np.isfinite(on_host)
    if not good.all():
        raise ValueError(
            f"weights must be finite and at least 0, got {on_host[~good][0]:g} for client {int(np.argmin(good))}: pass "
            "non-negative weights"
        )
    lost = (on_host > 0) & (on_host < on_host.max() * float(jnp.finfo(jnp.result_type(float)).tiny))
    if lost.any():
        raise ValueError(
            f"weights holds {on_host[lost][0]:g} for client {int(np.argmax(lost))} beside {on_host.max():g}, in the "
            "precision of averages no more than 0: pass weights that are closer together, or 0"
        )
    if not (on_host > 0).any():
        raise ValueError("weights are 0 for every client, which leaves no mean: give some client a positive weight")
