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

    p_i = e_i + upload_i;  m_i = the k largest entries of p_i;  e_i <- p_i - m_i        (m_i decodes to itself)

    Up: k (4 + ceil(log2 d) / 8) bytes for the d entries of the leaves with axes; scalars go as they are. Clients keep
    e_i, d numbers. Without feedback e_i stays 0, and what is not sent is lost.

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

    def encode(x: fc.Array, key: Any) -> Any:
        return kept_largest(x, count(x.size))

    def size(d: int) -> float:
        return count(d) * (4 + max(1, (d - 1).bit_length()) / 8)

    return _codec("top_k", encode, lambda x: x, size, feedback=feedback)


def stochastic_rounding(bits: int = 8, *, chunk: int = 512) -> Part:
    """Uniform stochastic quantisation, unbiased: every chunk of entries is rounded up or down on a grid of its own.

    lo, hi = min, max of the chunk;  D = (hi - lo) / (2^bits - 1);  q = floor((x - lo) / D + u), u ~ U[0, 1);
    decoded: lo + q D

    Up: d bits / 8 + 8 bytes a chunk, for the d entries of the leaves with axes; scalars go as they are.

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

    def encode(x: fc.Array, key: fc.Key) -> Any:
        length = -(-x.size // chunk)
        rows = jnp.pad(x, (0, length * chunk - x.size), mode="edge").reshape(length, chunk)
        low, high = jnp.min(rows, axis=1, keepdims=True), jnp.max(rows, axis=1, keepdims=True)
        step = (high - low) / levels
        scaled = (rows - low) / jnp.where(step > 0, step, 1)
        rounded = jnp.floor(scaled + jax.random.uniform(key, rows.shape, jnp.float32))
        return jnp.clip(rounded, 0, levels).astype(jnp.uint16), low, step

    def size(d: int) -> float:
        return d * bits / 8 + 8 * -(-d // chunk)

    def decoder(message: Any) -> fc.Array:
        codes, low, step = message
        return (low + codes.astype(low.dtype) * step).reshape(-1)

    return _codec("stochastic_rounding", encode, decoder, size, feedback=False)


def kept_largest(x: fc.Array, k: int) -> fc.Array:
    """x, [d], with zeros in the place of all but the k entries of largest size; of equal ones those that come first."""
    return jnp.where(largest(jnp.abs(x), k), x, 0)


def _codec(
    name: str,
    encode: Callable[[fc.Array, Any], Any],
    decode: Callable[[Any], fc.Array],
    size: Callable[[int], float],
    *,
    feedback: bool,
) -> Part:
    """A part that encodes the leaves with axes of an upload, [d] together, and decodes them on the server."""

    def init(upload: fc.PyTree, num_clients: int) -> Any:
        if not feedback or not any(map(_is_coded, jax.tree.leaves(upload))):
            return ()
        flat, _ = _flattened(jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), upload))
        return fc.client_table(num_clients, flat)

    def around(state: Any, asked: Pass, key: fc.Key) -> Any:
        like = asked.upload()
        if not any(map(_is_coded, jax.tree.leaves(like))):  # numbers and integers alone: they go as they are
            return asked.run(), state, CodecInfo(jnp.zeros(()))
        rows = fc.gather(state, asked.cohort) if feedback else ()

        def change(upload: fc.PyTree, row: Any, key: fc.Key) -> Any:
            x, others = _flattened(upload)
            wanted = x + row if feedback else x
            message = encode(wanted, key)
            decoded = decode(message)[: x.size]
            lost = wanted - decoded
            error = jnp.sum(jnp.square(lost)) / jnp.maximum(jnp.sum(jnp.square(wanted)), jnp.finfo(x.dtype).tiny)
            sent = fc.Message((message, others), size(x.size) + fc.num_bytes(others))
            return sent, (lost if feedback else (), error)

        def decoded(sent: fc.PyTree) -> fc.PyTree:
            message, others = sent
            return _restored(like, decode(message), others)

        changed, taken = messages.before_sending(asked.decoded(decoded), change, rows, key)
        results, (rows, errors) = taken(changed.run())
        state = fc.scatter(state, asked.cohort, rows) if feedback else ()
        return results, state, CodecInfo(fc.mean_over_participants(errors, asked.cohort))

    return Part(around, init, name)


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
