"""Decompositions of matrices that stay quick, and end, when many are asked for at once on a processor."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.scipy import linalg

from fedjax_core.types import Array, PyTree


def one_at_a_time(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function of arrays, a batch of which (`jax.vmap`) is a loop on a processor and a batch elsewhere.

    On a processor a batch of triangular solves is a loop of XLA's own, many times slower than one call of LAPACK for
    each. And a batch of decompositions waits for threads of the pool that it runs in: two batches at a time, in a pool
    of two, wait for each other for ever (seen with jaxlib 0.10.2).
    """
    call = jax.custom_batching.custom_vmap(function)

    @call.def_vmap
    def many(axis_size: int, in_batched: list[bool], *args: Array) -> tuple[PyTree, PyTree]:
        args = tuple(
            array if batched else jnp.broadcast_to(array, (axis_size, *array.shape))
            for array, batched in zip(args, in_batched, strict=True)
        )

        def loop(*args: Array):
            return jax.lax.map(lambda each: call(*each), args)

        result = jax.lax.platform_dependent(*args, cpu=loop, default=jax.vmap(function))
        return result, jax.tree.map(lambda _: True, result)

    return call


cholesky = one_at_a_time(partial(jnp.linalg.cholesky, symmetrize_input=False))
"""Lower Cholesky factor, float[n, n], of a positive definite matrix, of which half is read; NaN where it has none."""

solve_lower = one_at_a_time(lambda factor, b: linalg.solve_triangular(factor, b, lower=True))
"""`solve_lower(factor, b)`: x with factor x = b, for a lower factor float[n, n] and b float[n] or [n, m]."""

cho_solve = one_at_a_time(lambda factor, b: linalg.cho_solve((factor, True), b))
"""`cho_solve(factor, b)`: x with factor factor' x = b, for a lower factor float[n, n] and b float[n] or [n, m]."""

eigh = one_at_a_time(lambda matrix: tuple(jnp.linalg.eigh(matrix)))
"""Eigenvalues float[n], the smallest first, and eigenvectors float[n, n] in columns, of a symmetric matrix."""

qr = one_at_a_time(lambda matrix: tuple(jnp.linalg.qr(matrix)))
"""Orthonormal columns float[n, k] and a triangle float[k, m] for a matrix float[n, m], k the smaller of the two."""

svd = one_at_a_time(lambda matrix: tuple(jnp.linalg.svd(matrix, full_matrices=False)))
"""Left vectors float[n, k], values float[k], the largest first, right vectors float[k, m] of a matrix float[n, m]."""
