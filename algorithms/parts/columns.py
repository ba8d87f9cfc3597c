"""Uploads of many clients, [C, ...], a block of columns at a time: no more than a block is held beside them."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

import fedjax_core as fc

SMALLEST = 1024
"""Columns that are worth a block."""
MOST = 16
"""Blocks of a leaf; each is a step of a loop, which costs a device a few microseconds."""


def blocks(width: int) -> tuple[int, int, int]:
    """(columns of a block, number of such blocks, columns that are left)."""
    size = max(SMALLEST, -(-width // MOST))
    return size, *divmod(width, size)


def changed(leaf: fc.Array, change: Callable[[fc.Array], fc.Array]) -> fc.Array:
    """`change([C, n]) -> [C, n]` in the place of each block of columns of [C, ...]."""

    def step(rows: fc.Array, at: fc.Array | int, width: int) -> fc.Array:
        block = jax.lax.dynamic_slice_in_dim(rows, at, width, axis=1)
        return jax.lax.dynamic_update_slice_in_dim(rows, change(block), at, axis=1)

    rows = _rows(leaf)
    return _fold(rows.shape[1], rows, step).reshape(leaf.shape)


def added(leaf: fc.Array, total: fc.Array, summand: Callable[[fc.Array], fc.Array]) -> fc.Array:
    """total plus the sum of `summand([C, n])` of all blocks of columns of [C, ...]."""
    rows = _rows(leaf)

    def step(total: fc.Array, at: fc.Array | int, width: int) -> fc.Array:
        return total + summand(jax.lax.dynamic_slice_in_dim(rows, at, width, axis=1))

    return _fold(rows.shape[1], total, step)


def reduced(leaf: fc.Array, reduce: Callable[[fc.Array], fc.Array]) -> fc.Array:
    """[...] out of `reduce([C, n]) -> [n]` of each block of columns of [C, ...]."""
    rows = _rows(leaf)

    def step(found: fc.Array, at: fc.Array | int, width: int) -> fc.Array:
        block = jax.lax.dynamic_slice_in_dim(rows, at, width, axis=1)
        return jax.lax.dynamic_update_slice_in_dim(found, reduce(block), at, axis=0)

    first = jnp.zeros(rows.shape[1], jax.eval_shape(reduce, rows[:, :1]).dtype)
    return _fold(rows.shape[1], first, step).reshape(leaf.shape[1:])


def _rows(leaf: fc.Array) -> fc.Array:
    return jnp.asarray(leaf).reshape(leaf.shape[0], -1)


def _fold(width: int, first: fc.Array, step: Callable[[fc.Array, fc.Array | int, int], fc.Array]) -> fc.Array:
    """`step(so_far, at, columns)` for one block of columns after the other, which begins at `at`."""
    size, number, left = blocks(width)
    found = jax.lax.fori_loop(0, number, lambda i, found: step(found, i * size, size), first) if number else first
    return step(found, number * size, left) if left else found
