"""Rankings: the ids of things from the least important to the most, as clients vote with them."""

import jax.numpy as jnp

import fedjax_core as fc


def ranking(importance: fc.Array) -> fc.Array:
    """int32[..., n], the ids 0 to n - 1 by ascending importance, [..., n]; of equals the smaller id comes first."""
    return jnp.argsort(importance, axis=-1, stable=True).astype(jnp.int32)


def listed(share: fc.Scalar, n: int) -> fc.Array | int:
    """Number of the n ids that the share of the most important ones is: n - floor((1 - share) n)."""
    # 0.2 * 10 is 2, whatever the precision.
    if fc.checks.is_concrete(share):
        return n - int((1 - float(share)) * n + 1e-6)
    return n - jnp.floor((1 - share) * n + 1e-6).astype(jnp.int32)


def first_left_out(ranked: fc.Array, count: int | fc.Array) -> fc.Array:
    """The ranking, int32[n], with -1 in the place of all but its last `count` ids."""
    return jnp.where(jnp.arange(ranked.shape[0]) >= ranked.shape[0] - count, ranked, -1)


def reputation(ranked: fc.Array) -> fc.Array:
    """uint32[n], the place of every id in a ranking, int32[n]: 0 for the least important and for what is left out."""
    n = ranked.shape[0]
    return jnp.zeros(n, jnp.uint32).at[_at(ranked)].set(jnp.arange(n, dtype=jnp.uint32), mode="drop")


def is_ranking(ranked: fc.Array, count: int | fc.Array) -> fc.Array:
    """bool[], whether it lists `count` different ids from 0 to n - 1, and nothing else but negative numbers."""
    seen = jnp.zeros(ranked.shape[0], jnp.int32).at[_at(ranked)].add(1, mode="drop")
    return (jnp.sum(seen == 1) == count) & (jnp.sum(ranked >= 0) == count)


def _at(ranked: fc.Array) -> fc.Array:
    """Indices of which those that name nothing are out of range: negative ones would count from the end."""
    return jnp.where(ranked < 0, ranked.shape[0], ranked)
