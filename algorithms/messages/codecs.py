"""Codecs: what clients upload, made smaller."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

import fedjax_core as fc
from algorithms.parts.selection import largest
from fedjax_core import messages
from fedjax_core.messages import Part, Pass


class CodecInfo(NamedTuple):
    """How far what is decoded is from what was to be sent.

    Attributes:
      error: float[], mean over the participants of ||decoded - upload||^2 / ||upload||^2, 0 where nothing is uploaded.
    """

    error: fc.Array


def top_k(share: float = 0.01, *, feedback: bool = True) -> Part:
    """Top-k with error feedback: of all entries of an upload the k of largest size are sent, and the rest is kept.

    p_i = e_i + upload_i;  m_i = the k largest entries of p_i;  e_i <- p_i - m_i

    Up: k values and their places, k (4 + ceil(log2 d) / 8) bytes for the d entries of the float leaves with axes; what
    else there is goes as it is. A codec around it codes the values. Clients keep e_i, d numbers. Without feedback e_i
    stays 0, and what is not sent is lost.

    Args:
      share: k / d, in (0, 1]; k is rounded up.
      feedback: whether clients keep what they did not send.

    Paper: Stich, Cordonnier, Jaggi, "Sparsified SGD with Memory", 2018; Karimireddy et al., "Error Feedback Fixes
    SignSGD", 2019.
    """
    fc.checks.scalar("share", share, low=0, low_open=True, high=1)
    if not fc.checks.is_concrete(share):
        raise TypeError("share is traced, and says how many entries are sent, a size of arrays: pass a Python number")

    def count(d: int) -> int:
        return max(1, math.ceil(share * d - 1e-6))  # 0.07 * 100 is 7, whatever the precision

    def encode(x: fc.Array, key: Any) -> fc.Message:
        return kept_largest(x, count(x.size))

    return _codec("top_k", encode, spread, feedback=feedback)


def stochastic_rounding(bits: int = 8, *, chunk: int = 512) -> Part:
    """Uniform stochastic quantisation, unbiased: every chunk of entries is rounded up or down on a grid of its own.

    lo, hi = min, max of the chunk;  D = (hi - lo) / (2^bits - 1);  q = floor((x - lo) / D + u), u ~ U[0, 1);
    decoded: lo + q D

    Up: d bits / 8 + 8 bytes a chunk, for the d entries of the float leaves with axes; what else there is goes as it is.
    No codec around it finds anything more to code.

    Args:
      bits: of an entry, 1 to 16.
      chunk: entries that share a grid.

    Paper: Konecny et al., "Federated Learning: Strategies for Improving Communication Efficiency", 2016; Suresh et al.,
    "Distributed Mean Estimation with Limited Communication", 2017.
    """
    fc.checks.positive_int("chunk", chunk, "512 is usual")
    if isinstance(bits, bool) or not isinstance(bits, int | np.integer) or not 1 <= bits <= 16:
        raise ValueError(f"bits must be an integer from 1 to 16, got {bits!r}: 8 is usual")
    bits, chunk = int(bits), int(chunk)
    levels = 2**bits - 1

    def encode(x: fc.Array, key: fc.Key) -> fc.Message:
        length = -(-x.size // chunk)
        rows = jnp.pad(x, (0, length * chunk - x.size), mode="edge").reshape(length, chunk)
        low, high = jnp.min(rows, axis=1, keepdims=True), jnp.max(rows, axis=1, keepdims=True)
        step = (high - low) / levels
        scaled = (rows - low) / jnp.where(step > 0, step, 1)
        rounded = jnp.floor(scaled + jax.random.uniform(key, rows.shape, jnp.float32))
        codes = jnp.clip(rounded, 0, levels).astype(jnp.uint16)
        # Their bits: what is a float may be coded once more, and a grid is not to be.
        grids = [jax.lax.bitcast_convert_type(of_rows, _BITS[low.dtype.itemsize]) for of_rows in (low, step)]
        return fc.Message((codes, *grids), x.size * bits / 8 + 8 * length)

    def decode(message: Any, d: int) -> fc.Array:
        codes, *grids = message
        dtype = jnp.dtype(f"float{8 * grids[0].dtype.itemsize}")
        low, step = (jax.lax.bitcast_convert_type(of_rows, dtype) for of_rows in grids)
        return (low + codes.astype(dtype) * step).reshape(-1)[:d]

    return _codec("stochastic_rounding", encode, decode, feedback=False)


_BITS = {4: jnp.uint32, 8: jnp.uint64}


def kept_largest(x: fc.Array, k: int) -> fc.Message:
    """The k entries of largest size of x, [d], with their places; of equal ones those that come first."""
    places = jnp.flatnonzero(largest(jnp.abs(x), k), size=k).astype(jnp.int32)
    of_places = k * max(1, (x.size - 1).bit_length()) / 8
    return fc.Message((x[places], fc.Message(places, of_places)), 4 * k + of_places)


def spread(payload: Any, d: int) -> fc.Array:
    """The entries at their places in [d], zeros elsewhere."""
    values, places = payload
    return jnp.zeros(d, values.dtype).at[places].set(values, unique_indices=True)


def _codec(
    name: str,
    encode: Callable[[fc.Array, Any], fc.Message],
    decode: Callable[[Any, int], fc.Array],
    *,
    feedback: bool,
) -> Part:
    """A part that encodes the float leaves with axes of an upload, [d] together, and decodes them on the server.

    `decode(payload, d) -> [d]`, of the message that `encode([d], key)` makes.
    """

    def init(upload: fc.PyTree, num_clients: int) -> Any:
        if not feedback or not any(map(_is_coded, jax.tree.leaves(upload))):
            return ()
        flat, _ = _flattened(jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), upload))
        return fc.client_table(num_clients, flat)

    def around(state: Any, asked: Pass, key: fc.Key) -> Any:
        like = asked.upload()
        d = sum(leaf.size for leaf in jax.tree.leaves(like) if _is_coded(leaf))
        if not d and asked.decode is not None:
            raise TypeError(
                f"{name} stands around a codec that leaves no floats to code: put it nearer to the clients, "
                f"with_part(with_part(method, messages.{name}(...)), other)"
            )
        if not d:  # numbers and integers alone: they go as they are
            return asked.run(), state, CodecInfo(jnp.zeros(()))
        rows = fc.gather(state, asked.cohort) if feedback else ()

        def change(upload: fc.PyTree, row: Any, key: fc.Key) -> Any:
            x, others = _flattened(fc.sizes.opened(upload))
            wanted = x + row if feedback else x
            message = encode(wanted, key)
            lost = wanted - decode(fc.sizes.opened(message), d)
            error = jnp.sum(jnp.square(lost)) / jnp.maximum(jnp.sum(jnp.square(wanted)), jnp.finfo(x.dtype).tiny)
            return (message, fc.Message(others, _bytes_beside(upload))), (lost if feedback else (), error)

        def decoded(sent: fc.PyTree) -> fc.PyTree:
            payload, others = sent
            return _restored(like, decode(payload, d), others)

        changed, taken = messages.before_sending(asked.decoded(decoded), change, rows, key, envelopes=True)
        results, (rows, errors) = taken(changed.run())
        state = fc.scatter(state, asked.cohort, rows) if feedback else ()
        return results, state, CodecInfo(fc.mean_over_participants(errors, asked.cohort))

    return Part(around, init, name)


def _bytes_beside(upload: fc.PyTree) -> Any:
    """Bytes of what is not coded of an upload: as messages state them where all of their payload is not."""

    def is_message(node: Any) -> bool:
        return isinstance(node, fc.Message)

    def size(node: Any) -> Any:
        if not is_message(node):
            return 0 if _is_coded(node) else fc.num_bytes(node)
        is_opened = any(map(_is_coded, jax.tree.leaves(fc.sizes.opened(node))))
        return _bytes_beside(node.payload) if is_opened else fc.sizes.sent_bytes(node)

    return sum((size(node) for node in jax.tree.leaves(upload, is_leaf=is_message)), 0.0)


def _flattened(upload: fc.PyTree) -> tuple[fc.Array, list[Any]]:
    """(the float leaves with axes as one array [d], the other leaves)."""
    leaves = jax.tree.leaves(upload)
    coded = [leaf for leaf in leaves if _is_coded(leaf)]
    flat, _ = ravel_pytree(fc.sums.widen(coded))
    return flat, [leaf for leaf in leaves if not _is_coded(leaf)]


def _restored(like: fc.PyTree, flat: fc.Array, others: list[Any]) -> fc.PyTree:
    leaves, remaining, at = [], iter(others), 0
    for leaf in jax.tree.leaves(like):
        if _is_coded(leaf):
            leaves.append(flat[at : at + leaf.size].reshape(leaf.shape).astype(leaf.dtype))
            at += leaf.size
        else:
            leaves.append(next(remaining))
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _is_coded(leaf: Any) -> bool:
    return len(leaf.shape) > 0 and jnp.issubdtype(leaf.dtype, jnp.floating)
