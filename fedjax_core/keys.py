"""Random keys: which a user may pass, and keys derived from keys.

`derive` is `jax.random.fold_in`, bit for bit, in a form that is quick for a few keys. On a processor
`jax.random` hashes in a loop of five iterations, each of a few calls. A round derives keys a handful of times, and for
a model of ten parameters those loops took more than half of it. Written out, a hash is one call.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from fedjax_core.types import Array, Key

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


def typed(key: Key, name: str = "key") -> Key:
    """Keys of any shape as keys of the kind threefry2x32, which is the only kind that this library draws from.

    Under `vmap`, keys of the kinds "rbg" and "unsafe_rbg" draw from the first key of the batch: a client's numbers
    would depend on the clients and the seeds beside it. Such a key becomes a threefry key: that of the same seed
    if it is `jax.random.key(seed)` or was split or folded from one. So does a key as old code makes it, an array
    uint32[..., 2] (or [..., 4], of those kinds).

    Raises:
      TypeError: if `key` holds no random keys.
      ValueError: if they are of a kind that is none of these.
    """
    is_array = isinstance(key, jax.Array | np.ndarray)
    if not (is_array and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)):
        shape = jnp.shape(key) if is_array else ()
        if not (is_array and key.dtype == jnp.uint32 and shape and shape[-1] in (2, 4)):
            got = f"{key.dtype}{list(shape)}" if is_array else f"{type(key).__name__} {key!r:.60}"
            raise TypeError(f"{name} must be a random key, got {got}: pass jax.random.key(seed)")
        data = jnp.asarray(key)
    elif (kind := str(jax.random.key_impl(key))) == "threefry2x32":
        return key
    elif kind in ("rbg", "unsafe_rbg"):
        data = jax.random.key_data(key)
    else:
        raise ValueError(
            f"{name} is of the kind {kind!r}, and this library draws from threefry keys: pass jax.random.key(seed, "
            'impl="threefry2x32")'
        )
    if data.shape[-1] == 4:
        # Both halves of the data are the threefry key of the seed; where they are not alike both count.
        first, second = data[..., :2], data[..., 2:]
        data = first ^ ((first ^ second) * np.uint32(0x9E3779B9))
    return jax.random.wrap_key_data(data, impl="threefry2x32")


def one(key: Key, name: str = "key") -> Key:
    """`typed(key)`, checked to be a single key.

    Raises:
      ValueError: for an array of keys.
    """
    key = typed(key, name)
    if key.shape != ():
        raise ValueError(
            f"{name} must be one random key, got an array of keys of shape {list(key.shape)}: pass one of them, or use "
            "jax.vmap to run once for each"
        )
    return key


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


@partial(jax.jit, inline=True)  # traced once for all rounds and methods, and no call in the compiled program
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
