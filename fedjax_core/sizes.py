"""What arrays weigh, in memory and on the wire."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_core import checks
from fedjax_core.types import PyTree


class Message(NamedTuple):
    """What is sent, where its size is not that of its arrays: sparse, packed or quantised.

    An envelope: `for_each_client` counts what it says and opens it. Whoever is at the other end (an aggregator, a
    decoder, a client's program) gets the payload in its place.

    Attributes:
      payload: any pytree of arrays.
      bytes: its true size in bytes, a number of at least 0; it may be traced, and what clients upload may be of another
        size for each. In what goes down to the clients it may also be float[C], of one size for each.
    """

    payload: PyTree
    bytes: Any


def num_bytes(shapes: PyTree) -> int:
    """Bytes of arrays, or of whatever has their shapes and dtypes; keys count as their data."""

    def count(leaf: Any) -> int:
        dtype = jnp.result_type(leaf)
        if jnp.issubdtype(dtype, jax.dtypes.prng_key):
            return num_bytes(jax.eval_shape(jax.random.key_data, leaf))
        return math.prod(jnp.shape(leaf)) * np.dtype(dtype).itemsize

    return sum(count(leaf) for leaf in jax.tree.leaves(shapes))


def sent_bytes(tree: PyTree) -> Any:
    """Bytes of a tree on the wire: what its messages say, and of all other arrays shape times itemsize.

    Returns:
      A float; an array where a message says a traced number, or one for each client.
    """

    def stated(size: Any) -> Any:
        if isinstance(size, jax.Array):
            return size.astype(jnp.result_type(float))
        return np.asarray(size, float) if np.ndim(size) else float(size)

    leaves = jax.tree.leaves(tree, is_leaf=_is_message)
    plain = num_bytes([leaf for leaf in leaves if not _is_message(leaf)])
    return sum((stated(leaf.bytes) for leaf in leaves if _is_message(leaf)), float(plain))


def opened(tree: PyTree) -> PyTree:
    """The tree with the payloads in the place of messages."""
    return jax.tree.map(lambda leaf: opened(leaf.payload) if _is_message(leaf) else leaf, tree, is_leaf=_is_message)


def has_message(tree: PyTree) -> bool:
    """Whether there is a message in the tree."""
    return any(map(_is_message, jax.tree.leaves(tree, is_leaf=_is_message)))


def check_messages(name: str, tree: PyTree, count: int | None = None) -> None:
    """Raises ValueError unless the messages in a tree say sizes that can be.

    Args:
      name: of the tree, in the error.
      tree: any pytree.
      count: number of slots, C, where a message may say a size for each.
    """
    one = "a number" if count is None else f"a number, or float[{count}] with one for each slot,"
    for leaf in filter(_is_message, jax.tree.leaves(tree, is_leaf=_is_message)):
        size = leaf.bytes
        shapes = ((),) if count is None else ((), (count,))
        if not _is_number(size) or jnp.shape(size) not in shapes or not _is_possible(size):
            raise ValueError(
                f"{name} has a Message of bytes={size!r:.80}: state its size as {one} of at least 0 (num_bytes counts "
                "those of arrays)"
            )


def _is_number(size: Any) -> bool:
    if isinstance(size, bool) or not isinstance(size, jax.Array | np.ndarray | np.generic | int | float):
        return False
    dtype = jnp.result_type(size)
    return jnp.issubdtype(dtype, np.floating) or jnp.issubdtype(dtype, np.integer)


def _is_possible(size: Any) -> bool:
    return not checks.is_concrete(size) or bool(np.all(np.isfinite(size) & (np.asarray(size) >= 0)))


def _is_message(value: Any) -> bool:
    return isinstance(value, Message)
