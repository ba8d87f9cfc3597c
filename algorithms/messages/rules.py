"""Aggregation rules that withstand some malicious clients, in the place of a method's weighted mean."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import fedjax_core as fc
from algorithms.parts import columns
from algorithms.parts.selection import order_statistic
from fedjax_core.messages import Part, Pass


def coordinate_median() -> Part:
    """Coordinate-wise median of the participants' uploads; of an even number the mean of the two in the middle.

    It needs more honest clients than malicious ones. Weights of clients do not count.

    Paper: Yin, Chen, Kannan, Bartlett, "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates",
    2018.
    """

    def rule(uploads: fc.PyTree, weights: fc.Array) -> fc.PyTree:
        n = jnp.sum(weights > 0)

        def one(rows: fc.Array) -> fc.Array:
            wide, middle = fc.sums.widen(rows), (jnp.maximum(n - 1, 0) // 2, n // 2)
            low, high = (order_statistic(wide, k, weights > 0) for k in middle)
            return jnp.where(n > 0, (low + high) / 2, 0).astype(rows.dtype)

        return jax.tree.map(lambda leaf: columns.reduced(leaf, one), uploads)

    return _rule("coordinate_median", rule)


def trimmed_mean(malicious: int) -> Part:
    """Coordinate-wise mean without the `malicious` largest and smallest values of each coordinate.

    Rounds with no more than twice as many participants keep the median's one or two values.

    Args:
      malicious: number b of values dropped at either end.

    Paper: Yin, Chen, Kannan, Bartlett, "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates",
    2018.
    """
    malicious = fc.checks.count("malicious", malicious, "count the malicious clients")

    def rule(uploads: fc.PyTree, weights: fc.Array) -> fc.PyTree:
        taking = weights > 0
        n = jnp.sum(taking)
        dropped = jnp.minimum(malicious, jnp.maximum(n - 1, 0) // 2)

        def one(rows: fc.Array) -> fc.Array:
            wide, there = fc.sums.widen(rows), taking[:, None]
            low, high = (order_statistic(wide, k, taking) for k in (dropped, jnp.maximum(n - 1 - dropped, 0)))
            between = fc.sums.total(jnp.where(there & (wide > low) & (wide < high), wide, 0))
            at_low = jnp.sum(there & (wide <= low), axis=0) - dropped
            at_high = n - dropped - jnp.sum(there & (wide < high), axis=0)
            total = jnp.where(low < high, between + at_low * low + at_high * high, (n - 2 * dropped) * low)
            return jnp.where(n > 0, total / jnp.maximum(n - 2 * dropped, 1), 0).astype(rows.dtype)

        return jax.tree.map(lambda leaf: columns.reduced(leaf, one), uploads)

    return _rule("trimmed_mean", rule)


def krum(malicious: int, *, selected: int = 1) -> Part:
    """Krum and Multi-Krum: the mean of the `selected` uploads that are nearest to their neighbours.

    score_i = sum of the n - f - 2 smallest ||x_i - x_j||^2 to others;  the m lowest scores, ties by the lowest slot

    Needs n > 2 f + 2 participants; with fewer the number of neighbours is 1. An upload that is not finite, or so far
    from the median that the square of it is not, is infinitely far from all others, and never chosen; where there is no
    other one, the result is 0.

    Args:
      malicious: f.
      selected: m; 1 is Krum. All, if there are no more.

    Paper: Blanchard, El Mhamdi, Guerraoui, Stainer, "Machine Learning with Adversaries: Byzantine Tolerant Gradient
    Descent", 2017.
    """
    malicious = fc.checks.count("malicious", malicious, "count the malicious clients")
    fc.checks.positive_int("selected", selected, "1 is Krum")

    def rule(uploads: fc.PyTree, weights: fc.Array) -> fc.PyTree:
        taking = weights > 0
        n, places = jnp.sum(taking), jnp.arange(taking.shape[0])
        distances = squared_distances(uploads, taking)
        others = taking[:, None] & taking[None] & ~jnp.eye(taking.shape[0], dtype=bool)
        ordered = jnp.sort(jnp.where(others, distances, jnp.inf), axis=1)
        # Behind the n - 1 others there is padding; an infinite distance to one of them counts.
        near = places < jnp.minimum(jnp.maximum(n - malicious - 2, 1), n - 1)
        scores = jnp.sum(jnp.where(near, ordered, 0), axis=1)
        usable = taking & jnp.isfinite(jnp.diagonal(distances))
        rank = jnp.argsort(jnp.lexsort((places, scores, ~usable)))
        chosen = (rank < selected) & usable
        share = chosen.astype(distances.dtype) / jnp.maximum(jnp.sum(chosen), 1)
        kept = jax.tree.map(lambda leaf: jnp.where(fc.sums.across(chosen, leaf), leaf, 0), uploads)
        return fc.sums.cast_like(fc.sums.weighted(share, kept), jax.tree.map(lambda leaf: leaf[0], uploads))

    return _rule("krum", rule)


def squared_distances(uploads: fc.PyTree, taking: fc.Array) -> fc.Array:
    """float[C, C], ||x_i - x_j||^2 of uploads with leaves [C, ...], from their Gram matrix about the median.

    About the mean the distances among honest uploads would drown in what a single malicious one moves it by. An upload
    that is not finite, or so far away that its square is not, has infinite distances, to itself too.

    Columns go through a loop in blocks: of what is centered no more than a block is held.
    """
    finite = taking & functools.reduce(
        jnp.logical_and,
        (columns.added(leaf, jnp.zeros(taking.shape), _not_finite) == 0 for leaf in jax.tree.leaves(uploads)),
    )
    n = jnp.sum(finite)

    def centered(rows: fc.Array) -> fc.Array:
        rows = fc.sums.widen(rows)
        center = order_statistic(rows, jnp.maximum(n - 1, 0) // 2, finite)
        return jnp.where(finite[:, None], rows - center, 0)

    def product(rows: fc.Array) -> fc.Array:
        rows = centered(rows)
        return jnp.matmul(rows, rows.T, precision="highest").astype(gram.dtype)

    gram = jnp.zeros((taking.shape[0],) * 2)
    for leaf in jax.tree.leaves(uploads):
        gram = columns.added(leaf, gram, product)
    squares = jnp.diagonal(gram)
    usable = jnp.isfinite(squares) & (finite | ~taking)
    found = jnp.maximum(squares[:, None] + squares[None] - 2 * gram, 0)
    return jnp.where(usable[:, None] & usable[None], found, jnp.inf)


def _not_finite(rows: fc.Array) -> fc.Array:
    """float[C], how many entries of [C, n] are not finite."""
    return jnp.sum(~jnp.isfinite(rows), axis=1, dtype=float)


def _rule(name: str, rule: Callable[[fc.PyTree, fc.Array], fc.PyTree]) -> Part:
    def around(state: Any, asked: Pass, key: fc.Key) -> tuple[fc.ClientResults, tuple[()], tuple[()]]:
        return asked.with_rule(rule, name).run(), (), ()

    return Part(around, name=name)
