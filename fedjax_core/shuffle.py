"""A random permutation that can be read one element at a time.

Shuffling a client's examples inside a compiled round meets two obstacles: the number of examples is not known at
compile time, and a sort of the longest client's length for every client is slow. `permute` needs neither a sort
nor a table: it computes where position i goes with integer arithmetic alone, for any length given at run time.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_core import keys
from fedjax_core.types import Array, Key

NUM_SWAPS = 24
"""Rounds of swap-or-not. Tests check permutations of up to 5 elements and pair statistics of larger ones."""


def seed(key: Key) -> Array:
    """Seed of a permutation, uint32[2]."""
    return keys.words(key)


@partial(jax.jit, inline=True)  # traced once for all rounds and methods, and no call in the compiled program
def permute(seed: Array, index: Array, size: Array) -> Array:
    """Image of `index` under a pseudo-random permutation of 0..size-1.

    Swap-or-not shuffle (Hoang, Morris, Rogaway, "An Enciphering Scheme Based on a Card Shuffle", 2012): round r
    pairs x with K_r - x mod size and swaps the two if a hash of the pair says so, so every round is a permutation
    of exactly 0..size-1, whatever the size.

    Args:
      seed: uint32[2].
      index: int32[...], each in [0, size).
      size: int32[], at least 1, may be traced.

    Returns:
      int32[...], each in [0, size).
    """
    # Hidden from the compiler: for a size known to be 1 the processor's, of jaxlib 0.10, fails on what it simplifies.
    size = jax.lax.optimization_barrier(jnp.maximum(size, 1).astype(jnp.uint32))
    rounds = jnp.arange(NUM_SWAPS, dtype=jnp.uint32)
    offsets = _mix(_mix(rounds * np.uint32(0x9E3779B9) + seed[0]) ^ seed[1]) % size
    tweaks = _mix(_mix(rounds * np.uint32(0x85EBCA6B) + seed[1]) + seed[0])
    x = index.astype(jnp.uint32)
    for r in range(NUM_SWAPS):
        partner = jnp.where(x <= offsets[r], offsets[r] - x, offsets[r] + (size - x))
        swap = _mix(jnp.maximum(x, partner) ^ tweaks[r]) >> 31
        x = jnp.where(swap == 1, partner, x)
        if r % 4 == 3:
            # Each round reads x several times. A compiler that fuses all rounds into a consumer by copying the
            # expression, as XLA does with a gather, would build one of exponential size.
            x = jax.lax.optimization_barrier(x)
    return x.astype(jnp.int32)


def _mix(x: Array) -> Array:
    """A bijective 32-bit hash (finalizer of the murmur family): every input bit affects every output bit."""
    x = x ^ (x >> 16)
    x = x * np.uint32(0x7FEB352D)
    x = x ^ (x >> 15)
    x = x * np.uint32(0x846CA68B)
    return x ^ (x >> 16)
