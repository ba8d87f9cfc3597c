"""Sums and means that many summands, or a short float type, do not spoil.

A sum in the type of what comes in is lost where that type is short: 256 + 1 is 256 in bfloat16, and 70,000 is infinity
in float16. And a running sum of a million equal numbers, one after the other, is wrong by a percent even in float32. So
sums here are taken in float32 at least, in blocks, and running sums carry what rounding has taken off them.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from fedjax_core.types import Array, PyTree

FEW = 64
"""So many summands may be added one after the other: they cost at most six of the 24 bits of a float32."""
_BLOCK = 128
_STEEP = 120
"""Powers of two to scale by, up and down, that are normal numbers of every dtype to sum in."""


def accumulator(dtype: DTypeLike) -> np.dtype:
    """The dtype to sum in: float32 for float16 and bfloat16, the default float for integers and bool, else the same."""
    if jnp.issubdtype(dtype, jnp.inexact):
        return jnp.promote_types(dtype, jnp.float32)
    return jnp.result_type(float)


def mean_dtype(dtype: DTypeLike) -> np.dtype:
    """The dtype of a mean: that of floats themselves, the default float for integers and bool."""
    return jnp.dtype(dtype) if jnp.issubdtype(dtype, jnp.inexact) else jnp.result_type(float)


def widen(tree: PyTree) -> PyTree:
    """Every leaf in the dtype to sum it in."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, accumulator(jnp.result_type(leaf))), tree)


def wide_zeros(like: PyTree) -> PyTree:
    """Zeros of the shapes of `like`, in the dtypes to sum in: where a total over rounds or clients begins."""
    return jax.tree.map(lambda leaf: jnp.zeros(jnp.shape(leaf), accumulator(jnp.result_type(leaf))), like)


def cast_like(tree: PyTree, like: PyTree) -> PyTree:
    """Every leaf in the dtype of the leaf of `like`: what a total is for the models that it came from."""
    return jax.tree.map(lambda leaf, own: leaf.astype(jnp.result_type(own)), tree, like)


def total(values: Array) -> Array:
    """Sum over the first axis, [...] of [n, ...], in the dtype to sum in: in blocks and blocks of blocks."""
    values = widen(values)
    while values.shape[0] > _BLOCK:
        padding = [(0, -values.shape[0] % _BLOCK)] + [(0, 0)] * (values.ndim - 1)
        values = jnp.sum(jnp.pad(values, padding).reshape(-1, _BLOCK, *values.shape[1:]), axis=1)
    return jnp.sum(values, axis=0)


def in_order(rows: PyTree, summand: Callable[[PyTree], PyTree]) -> PyTree:
    """Sum of `summand(row)` over the rows of leaves [n, ...], one after the other as a device adds up its clients.

    Summands are arrays of any shapes, of which one row's are held at a time.
    """
    few = jax.tree.leaves(rows)[0].shape[0] <= FEW

    def first(leaf: jax.ShapeDtypeStruct) -> Running:
        dtype = accumulator(leaf.dtype) if jnp.issubdtype(leaf.dtype, jnp.inexact) else leaf.dtype
        return start(leaf.shape, dtype, few=few)

    def step(so_far: list[Running], row: PyTree) -> tuple[list[Running], None]:
        return [add(*each) for each in zip(so_far, jax.tree.leaves(summand(row)), strict=True)], None

    shapes = jax.eval_shape(summand, jax.eval_shape(lambda rows: jax.tree.map(lambda leaf: leaf[0], rows), rows))
    leaves, treedef = jax.tree.flatten(shapes)
    totals, _ = jax.lax.scan(step, [first(leaf) for leaf in leaves], rows)
    return jax.tree.unflatten(treedef, [value(total) for total in totals])


def across(values: Array, leaf: Array) -> Array:
    """Values [C], or of several axes, with axes behind on which they go with a leaf [C, ...] entry by entry."""
    return values.reshape(*values.shape, *[1] * (leaf.ndim - values.ndim))


def shares(weights: Array) -> Array:
    """Weights over their sum, float[C]; zeros if it is 0."""
    total = jnp.sum(weights)
    return weights / jnp.where(total > 0, total, 1)


def weighted(weights: Array, rows: PyTree) -> PyTree:
    """sum_i weights[i] rows[i], in the dtype to sum in: leaves [C, ...] become [...]; weights float[C]."""

    def one(leaf: Array) -> Array:
        leaf = widen(leaf)
        return total(across(weights.astype(leaf.dtype), leaf) * leaf)

    return jax.tree.map(one, rows)


def norm(tree: PyTree, *, squared: bool = False) -> Array:
    """Euclidean norm of a pytree (or its square), float32 at least.

    The norm is right wherever it can be held itself: entries are squared after division by a power of two near the
    largest, which rounds nothing. The square can only be held where it is no larger than the dtype goes: in float32 for
    norms up to 1.8e19.
    """
    leaves = [leaf for leaf in jax.tree.leaves(widen(tree)) if leaf.size]
    if not leaves:
        return jnp.zeros(())
    if squared:
        return _sum([jnp.sum(jnp.square(leaf)) for leaf in leaves])
    largest = functools.reduce(jnp.maximum, [jnp.max(jnp.abs(leaf)) for leaf in leaves])
    _, exponent = jnp.frexp(jax.lax.stop_gradient(largest))
    exponent = jnp.clip(jnp.where(jnp.isfinite(largest), exponent, 0), -_STEEP, _STEEP)
    down, up = (jnp.ldexp(jnp.ones((), largest.dtype), e) for e in (-exponent, exponent))
    return up * jnp.sqrt(_sum([jnp.sum(jnp.square(down.astype(leaf.dtype) * leaf)) for leaf in leaves]))


def _sum(summands: list[Array]) -> Array:
    return functools.reduce(jnp.add, summands)


class Running(NamedTuple):
    """A sum to which summands are added one by one.

    Attributes:
      high: the sum, [...], of a dtype that is its own `accumulator` (or integers).
      low: what rounding has taken off it, [...]; None for a plain sum, of few summands or of integers.
    """

    high: Array
    low: Array | None


def start(shape: tuple[int, ...], dtype: DTypeLike, *, few: bool = False) -> Running:
    """Nothing yet. With `few`, at most `FEW` summands will come, and a plain sum does."""
    zeros = jnp.zeros(shape, dtype)
    return Running(zeros, None if few or not jnp.issubdtype(dtype, jnp.inexact) else zeros)


def add(total: Running, summand: Array) -> Running:
    """One summand more. The error stays within a few roundings of the summands, however many there are."""
    summand = summand.astype(total.high.dtype)
    if total.low is None:
        return Running(total.high + summand, None)
    # Knuth's sum with its error, which goes into the next summand: 7 additions, whatever is larger.
    summand = summand + total.low
    high = total.high + summand
    taken = high - total.high
    low = (total.high - (high - taken)) + (summand - taken)
    # An infinite sum stays infinite: without this it would be NaN.
    return Running(high, jnp.where(jnp.isnan(low), 0, low))


def value(total: Running) -> Array:
    """The sum so far."""
    return total.high if total.low is None else total.high + total.low


def start_tree(like: PyTree) -> PyTree:
    """A `Running` for each leaf of `like`, in the dtype to sum it in."""
    return jax.tree.map(lambda leaf: start(jnp.shape(leaf), accumulator(jnp.result_type(leaf))), like)


def add_tree(totals: PyTree, summands: PyTree) -> PyTree:
    """Adds a pytree of summands to the `Running` of each leaf."""
    return jax.tree.map(add, totals, summands, is_leaf=_is_running)


def mean_tree(totals: PyTree, count: Array, like: PyTree) -> PyTree:
    """Each total divided by `count` (1 where that is 0), in the dtypes of `like`."""
    count = jnp.maximum(count, 1)

    def mean(total: Running, leaf: Array) -> Array:
        return (value(total) / count.astype(total.high.dtype)).astype(jnp.result_type(leaf))

    return jax.tree.map(mean, totals, like, is_leaf=_is_running)


def _is_running(node: PyTree) -> bool:
    return isinstance(node, Running)


def of_segments(values: Array, offsets: Array) -> Array:
    """Sums over consecutive rows: [N, ...] of values [n, ...], sum i over rows offsets[i] to offsets[i + 1].

    Rows are added up in blocks and the blocks in blocks of blocks, so that no sum has many summands. A NaN stays in its
    segment.

    Args:
      values: [n, ...].
      offsets: int[N + 1], not decreasing, from 0 to n.
    """
    count = offsets.shape[0] - 1
    for _ in range(max(math.ceil(math.log(max(values.shape[0], 1), _BLOCK)), 1) - 1):
        rows = jnp.arange(values.shape[0], dtype=offsets.dtype)
        segment = jnp.searchsorted(offsets, rows, side="right") - 1
        blocks = jnp.concatenate([jnp.zeros(1, offsets.dtype), jnp.cumsum(-(-jnp.diff(offsets) // _BLOCK))])
        block = blocks[segment] + (rows - offsets[segment]) // _BLOCK
        num_blocks = values.shape[0] // _BLOCK + count  # that many at most
        values = jax.ops.segment_sum(values, block, num_blocks, indices_are_sorted=True)
        offsets = blocks.astype(offsets.dtype)
    rows = jnp.arange(values.shape[0], dtype=offsets.dtype)
    segment = jnp.searchsorted(offsets, rows, side="right") - 1
    return jax.ops.segment_sum(values, segment, count, indices_are_sorted=True)
