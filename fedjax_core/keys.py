"""Keys derived from keys: `jax.random.fold_in`, bit for bit, in a form that is quick for a few keys.

On a processor `jax.random` hashes in a loop of five iterations, each of a few calls. A round derives keys a handful of
times, and for a model of ten parameters those loops took more than half of it. Written out, a hash is one call.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from fedjax_core.types import Array, Key

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


def derive(key: Key, data: ArrayLike) -> Key:
    """`jax.random.fold_in(key, data)` for keys and integers of any shapes that broadcast against each other."""
    data = jnp.asarray(data).astype(jnp.uint32)
    if not _is_threefry(key):
        shape = jnp.broadcast_shapes(key.shape, data.shape)
        fold: Callable[[Key, Array], Key] = jax.random.fold_in
        for _ in shape:
            fold = jax.vmap(fold)
        return fold(jnp.broadcast_to(key, shape), jnp.broadcast_to(data, shape))
    words = _hash(jax.random.key_data(key), data)
    return jax.random.wrap_key_data(words, impl="threefry2x32")


def split(key: Key, num: int = 2) -> Key:
    """Keys [..., num] for every key: `derive` with 0 to num - 1. For JAX's default keys it is `jax.random.split`."""
    return derive(key[..., None], jnp.arange(num))


def words(key: Key) -> Array:
    """`jax.random.bits(key, (2,))` for keys of any shape, uint32[..., 2]."""
    if not _is_threefry(key):
        bits: Callable[[Key], Array] = partial(jax.random.bits, shape=(2,), dtype=jnp.uint32)
        for _ in key.shape:
            bits = jax.vmap(bits)
        return bits(key)
    hashed = _hash(jax.random.key_data(key)[..., None, :], jnp.arange(2, dtype=jnp.uint32))
    return hashed[..., 0] ^ hashed[..., 1]


def _is_threefry(key: Key) -> bool:
    return str(jax.random.key_impl(key)) == "threefry2x32"


def _hash(key: Array, count: Array) -> Array:
    """Threefry-2x32 of 20 rounds (Salmon, Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", 2011).

    Args:
      key: uint32[..., 2].
      count: uint32[...], the second word of what is hashed; the first is 0.

    Returns:
      uint32[..., 2].
    """
    schedule = (key[..., 0], key[..., 1], key[..., 0] ^ key[..., 1] ^ np.uint32(0x1BD11BDA))
    left, right = schedule[0] + jnp.zeros_like(count), schedule[1] + count
    for group in range(5):
        for rotation in _ROTATIONS[group % 2]:
            left = left + right
            right = (right << np.uint32(rotation) | right >> np.uint32(32 - rotation)) ^ left
        left = left + schedule[(group + 1) % 3]
        right = right + schedule[(group + 2) % 3] + np.uint32(group + 1)
    # One expression for both words is one call; and no consumer shall copy it.
    both = jnp.where(jnp.arange(2) == 0, left[..., None], right[..., None])
    return jax.lax.optimization_barrier(both)
