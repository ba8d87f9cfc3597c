"""The permutation computed one element at a time: exact for every size, and as random as it needs to be."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedjax_core import shuffle

permute_all = jax.jit(
    lambda seed, size, capacity: shuffle.permute(seed, jnp.minimum(jnp.arange(capacity), size - 1), size),
    static_argnums=2,
)


@given(size=st.integers(1, 300), seed=st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_every_size_gives_a_permutation(size, seed):
    out = permute_all(shuffle.seed(jax.random.key(seed)), size, 300)
    assert sorted(np.asarray(out[:size])) == list(range(size))


def test_a_large_size_stays_in_range_without_repeats():
    size = 2**31 - 1
    out = shuffle.permute(shuffle.seed(jax.random.key(0)), jnp.arange(5000), jnp.int32(size))
    assert len(np.unique(out)) == 5000
    assert out.min() >= 0
    assert out.max() < size
    # Uniform over the range: mean and spread of 5000 uniform draws, to five standard errors.
    unit = np.asarray(out, np.float64) / size
    assert abs(unit.mean() - 0.5) < 5 / math.sqrt(12 * 5000)
    assert abs(unit.std() - 1 / math.sqrt(12)) < 0.02


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_all_permutations_of_few_elements_are_equally_likely(size):
    draws = 24_000
    seeds = jax.vmap(shuffle.seed)(jax.random.split(jax.random.key(1), draws))
    out = np.asarray(jax.jit(jax.vmap(lambda s: shuffle.permute(s, jnp.arange(size), jnp.int32(size))))(seeds))
    counts = {p: 0 for p in itertools.permutations(range(size))}
    for row in out:
        counts[tuple(int(v) for v in row)] += 1
    expected = draws / len(counts)
    chi2 = sum((c - expected) ** 2 / expected for c in counts.values())
    freedom = len(counts) - 1
    assert chi2 < freedom + 5 * math.sqrt(2 * freedom)


def test_pairs_of_positions_are_independent():
    size, draws = 37, 20_000
    seeds = jax.vmap(shuffle.seed)(jax.random.split(jax.random.key(2), draws))
    out = np.asarray(jax.jit(jax.vmap(lambda s: shuffle.permute(s, jnp.array([0, 1, 20]), jnp.int32(size))))(seeds))
    for a, b in ((0, 1), (0, 2), (1, 2)):
        table = np.zeros((size, size))
        np.add.at(table, (out[:, a], out[:, b]), 1)
        assert np.trace(table) == 0
        off = table[~np.eye(size, dtype=bool)]
        expected = draws / len(off)
        chi2 = ((off - expected) ** 2 / expected).sum()
        assert abs(chi2 - len(off)) < 5 * math.sqrt(2 * len(off))


def test_seeds_differ_and_repeat():
    first = permute_all(shuffle.seed(jax.random.key(1)), 50, 50)
    np.testing.assert_array_equal(first, permute_all(shuffle.seed(jax.random.key(1)), 50, 50))
    assert not np.array_equal(first, permute_all(shuffle.seed(jax.random.key(2)), 50, 50))


@pytest.mark.quick
def test_a_gather_by_permuted_index_compiles_in_reasonable_size():
    """Fused into a gather without care, the rounds of the shuffle become an expression of exponential size."""
    table = jnp.arange(8)

    def lookup(seed):
        index = shuffle.permute(seed, jnp.arange(3), jnp.int32(7))
        return table[index + 1] - table[index]

    seeds = jax.vmap(shuffle.seed)(jax.random.split(jax.random.key(0), 2))
    compiled = jax.jit(jax.vmap(lookup)).lower(seeds).compile()
    np.testing.assert_array_equal(compiled(seeds), np.ones((2, 3)))
