"""Clients that leave examples out of a pass, by scores."""

from dataclasses import replace

import jax
import jax.numpy as jnp

import fedjax_core as fc


def pruned(cohort: fc.Cohort, scores: fc.Array, keep: fc.Scalar) -> fc.Cohort:
    """The cohort with the ceil(keep n) examples of the largest scores, float[total], of each client, in their order."""
    total = scores.shape[0]
    n = cohort.sizes
    # What is an integer but for rounding is not rounded up.
    size = jnp.where(cohort.mask, jnp.clip(jnp.ceil(keep * n - 1e-5).astype(n.dtype), 1, n), 0)
    place = jnp.arange(total, dtype=jnp.int32)
    first = jnp.where(cohort.mask, cohort.starts, total)

    def by_row(of_clients: fc.Array) -> fc.Array:
        return jnp.zeros(total, jnp.int32).at[first].set(of_clients, mode="drop")[start]

    # The first row of the participant that a row belongs to, or comes after.
    start = jax.lax.cummax(jnp.zeros(total, jnp.int32).at[first].set(cohort.starts, mode="drop"))
    outside = place - start >= by_row(n)
    by_score = jnp.lexsort((-scores, outside, start))
    stays = jnp.zeros(total, bool).at[by_score].set(place - start < by_row(size))
    count = jnp.cumsum(stays, dtype=jnp.int32)
    to = jnp.where(stays, start + count - 1 - (count - stays)[start], total)
    order = jnp.zeros(total, jnp.int32).at[to].set(place, mode="drop")
    return replace(cohort, sizes=size, examples=jax.tree.map(lambda leaf: leaf[order], cohort.examples))
