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
    rows = jnp.asarray(leaf).reshape(leaf.shape[0], -1)
    size, number, left = blocks(rows.shape[1])

    def step(i: fc.Array, rows: fc.Array) -> fc.Array:
        block = jax.lax.dynamic_slice_in_dim(rows, i * size, size, axis=1)
        return jax.lax.dynamic_update_slice_in_dim(rows, change(block), i * size, axis=1)

    rows = jax.lax.fori_loop(0, number, step, rows) if number else rows
    rows = rows.at[:, -left:].set(change(rows[:, -left:])) if left else rows
    return rows.reshape(leaf.shape)


def added(leaf: fc.Array, total: fc.Array, summand: Callable[[fc.Array], fc.Array]) -> fc.Array:
    """total plus the sum of `summand([C, n])` of all blocks of columns of [C, ...]."""
    rows = leaf.reshape(leaf.shape[0], -1)
    size, number, left = blocks(rows.shape[1])

    def step(i: fc.Array, total: fc.Array) -> fc.Array:
        return total + summand(jax.lax.dynamic_slice_in_dim(rows, i * size, size, axis=1))

    total = jax.lax.fori_loop(0, number, step, total) if number else total
    return total + summand(rows[:, -left:]) if left else total


def reduced(leaf: fc.Array, reduce: Callable[[fc.Array], fc.Array]) -> fc.Array:
    """[...] out of `reduce([C, n]) -> [n]` of each block of columns of [C, ...]."""
    rows = jnp.asarray(leaf).reshape(leaf.shape[0], -1)
    size, number, left = blocks(rows.shape[1])

    def step(i: fc.Array, found: fc.Array) -> fc.Array:
        block = jax.lax.dynamic_slice_in_dim(rows, i * size, size, axis=1)
        return jax.lax.dynamic_update_slice_in_dim(found, reduce(block), i * size, axis=0)

    found = jnp.zeros(rows.shape[1], jax.eval_shape(reduce, rows[:, :1]).dtype)
    found = jax.lax.fori_loop(0, number, step, found) if number else found
    found = found.at[-left:].set(reduce(rows[:, -left:])) if left else found
    return found.reshape(leaf.shape[1:])
