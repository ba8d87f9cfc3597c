"""The k largest entries of an array, without sorting it."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

import fedjax_core as fc


def largest(x: fc.Array, k: int | fc.Array, *, ties: str = "first") -> fc.Array:
    """Which entries are among the k largest, bool of the shape of x, True exactly k times.

    The k-th largest is found bit by bit, for floats are in the order of their bits once those of negative ones are
    turned around: sorting takes twenty times as long on a processor.

    Args:
      x: floats of any shape.
      k: from 0 to the number of entries; it may be traced.
      ties: which of equal entries are taken, those that come "first" in x or those that come "last", as the end of a
        stable sort has them.
    """
    bits, _ = _in_order(x.reshape(-1))
    threshold = _highest(lambda tried: jnp.sum(bits >= tried) >= k, jnp.zeros((), bits.dtype))
    larger, equal = bits > threshold, bits == threshold
    place = jnp.cumsum(equal) if ties == "first" else jnp.cumsum(equal[::-1])[::-1]
    return (larger | (equal & (place <= k - jnp.sum(larger)))).reshape(x.shape)


def order_statistic(rows: fc.Array, k: fc.Array, taking: fc.Array) -> fc.Array:
    """[...], the k-th smallest of the rows of [C, ...] that take part, entry by entry, k counted from 0.

    Found bit by bit as well, which for a hundred rows takes a fifth of the time that sorting them does on a processor.

    Args:
      rows: floats.
      k: int32[], less than the number of those rows.
      taking: bool[C].
    """
    bits, floats = _in_order(rows)
    counted = fc.sums.across(taking, rows)

    def fits(tried: fc.Array) -> fc.Array:
        return jnp.sum(counted & (bits < tried), axis=0) <= k

    return floats(_highest(fits, jnp.zeros(rows.shape[1:], bits.dtype)))


def _in_order(x: fc.Array) -> tuple[fc.Array, Callable[[fc.Array], fc.Array]]:
    """Unsigned integers in the order of the floats x, and the function that makes floats of such integers again."""
    integer = {2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint64}[x.dtype.itemsize]
    top = integer(1) << integer(8 * x.dtype.itemsize - 1)
    bits = jax.lax.bitcast_convert_type(jnp.where(x == 0, 0, x), integer)  # -0 is 0

    def floats(ordered: fc.Array) -> fc.Array:
        return jax.lax.bitcast_convert_type(jnp.where(ordered >= top, ordered ^ top, ~ordered), x.dtype)

    return jnp.where(bits >= top, ~bits, bits | top), floats


def _highest(fits: Callable[[fc.Array], fc.Array], zeros: fc.Array) -> fc.Array:
    """The largest unsigned integers that fit, entry by entry, where all smaller ones do too; zeros where none does."""
    integer, width = zeros.dtype.type, 8 * zeros.dtype.itemsize

    def body(i: fc.Array, found: fc.Array) -> fc.Array:
        tried = found | (integer(1) << (integer(width - 1) - i.astype(integer)))
        return jnp.where(fits(tried), tried, found)

    return jax.lax.fori_loop(0, width, body, zeros)
