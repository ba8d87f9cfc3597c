"""Decompositions of one matrix and of several at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_core import linalg

RNG = np.random.default_rng(0)
WIDE = RNG.normal(size=(3, 4, 6)).astype(np.float32)
SYMMETRIC = WIDE @ WIDE.transpose(0, 2, 1) + np.eye(4, dtype=np.float32)
FACTORS = np.linalg.cholesky(SYMMETRIC)
VECTORS = RNG.normal(size=(3, 4)).astype(np.float32)
CASES = {
    "cholesky": (linalg.cholesky, (SYMMETRIC,), lambda matrix, factor: (factor @ factor.T, matrix)),
    "cho_solve": (linalg.cho_solve, (FACTORS, VECTORS), lambda factor, b, x: (factor @ factor.T @ x, b)),
    "solve_lower": (linalg.solve_lower, (FACTORS, VECTORS), lambda factor, b, x: (factor @ x, b)),
    "eigh": (linalg.eigh, (SYMMETRIC,), lambda matrix, values, vectors: (matrix @ vectors, vectors * values)),
    "qr": (linalg.qr, (WIDE,), lambda matrix, columns, triangle: (columns @ triangle, matrix)),
    "svd": (linalg.svd, (WIDE,), lambda matrix, left, values, right: (left * values @ right, matrix)),
}


@pytest.mark.parametrize("name", CASES)
def test_several_at_once_are_each_on_its_own(name):
    function, args, sides = CASES[name]
    together = jax.jit(jax.vmap(function))(*args)
    twice = jax.jit(jax.vmap(jax.vmap(function)))(*(arg[None] for arg in args))
    for i in range(3):
        own = function(*(jnp.asarray(arg[i]) for arg in args))
        for result in (
            jax.tree.map(lambda leaf, i=i: leaf[i], together),
            jax.tree.map(lambda leaf, i=i: leaf[0, i], twice),
        ):
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), result, own)
        left, right = sides(*(arg[i] for arg in args), *jax.tree.map(np.asarray, jax.tree.leaves(own)))
        np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-4)


def test_what_is_common_to_all_need_not_be_repeated():
    solve = jax.vmap(linalg.cho_solve, (None, 0))
    for b, x in zip(VECTORS, solve(FACTORS[0], VECTORS), strict=True):
        np.testing.assert_allclose(SYMMETRIC[0] @ x, b, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="elsewhere a batch is a batch")
def test_on_a_processor_a_batch_is_a_loop():
    """Batches of LAPACK's calls may wait for each other's threads for ever."""
    compiled = jax.jit(jax.vmap(linalg.cholesky)).lower(SYMMETRIC).compile().as_text()
    calls = [line for line in compiled.splitlines() if "potrf" in line and "custom-call" in line]
    assert calls
    assert all("f32[4,4]" in line and "f32[3,4,4]" not in line for line in calls)
