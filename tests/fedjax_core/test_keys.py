"""Keys derived from keys are those of jax.random."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_core import keys

IMPLEMENTATIONS = ("threefry2x32", "rbg", "unsafe_rbg")
DATA = np.asarray([0, 1, 2, 77, 2**31 - 1], np.int32)


def same(a, b):
    np.testing.assert_array_equal(jax.random.key_data(a), jax.random.key_data(b))
    assert jax.random.key_impl(a) == jax.random.key_impl(b)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_derive_is_fold_in(impl):
    key = jax.random.key(3, impl=impl)
    for number in DATA:
        same(keys.derive(key, number), jax.random.fold_in(key, number))
    several = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.asarray(DATA))
    same(keys.derive(key, DATA), several)
    same(jax.jit(keys.derive)(key, DATA), several)
    same(jax.vmap(keys.derive, (None, 0))(key, DATA), several)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS[:2])  # a vmap of the third over keys draws other numbers
def test_keys_and_numbers_broadcast(impl):
    several = jax.random.split(jax.random.key(4, impl=impl), 3)
    want = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))(several, jnp.asarray(DATA))
    same(keys.derive(several[:, None], DATA), want)


def test_split_is_that_of_jax_for_its_default_keys():
    key = jax.random.key(5)
    for num in (1, 2, 3, 8):
        same(keys.split(key, num), jax.random.split(key, num))
    several = jax.random.split(key, 4)
    same(keys.split(several, 3), jax.vmap(lambda key: jax.random.split(key, 3))(several))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_split_keys_differ(impl):
    data = np.asarray(jax.random.key_data(keys.split(jax.random.key(5, impl=impl), 64)))
    assert len(np.unique(data, axis=0)) == 64


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_words_are_bits(impl):
    several = jax.random.split(jax.random.key(6, impl=impl), 4)
    got = keys.words(several)
    assert got.dtype == jnp.uint32
    for key, row in zip(several, got, strict=True):
        np.testing.assert_array_equal(keys.words(key), jax.random.bits(key, (2,), jnp.uint32))
        if impl == "threefry2x32":  # a vmap of the others draws other numbers
            np.testing.assert_array_equal(row, jax.random.bits(key, (2,), jnp.uint32))
