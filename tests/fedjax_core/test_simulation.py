"""Simulations: seeds in one compile, a run in parts, and the population as an argument."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import algorithms
from fedjax_core import continue_rounds, samplers, simulate
from tests.problems import assert_trees_close, assert_trees_equal, softmax_loss, softmax_params, softmax_population

SAMPLER = samplers.uniform(6, 3)
ALGORITHM = algorithms.fedavg(softmax_loss, optax.sgd(0.1), batch_size=4)
POPULATION = softmax_population((5, 3, 8, 1, 2, 9))
KEY = jax.random.key(0)


@pytest.mark.quick
def test_a_run_in_two_parts_is_the_run_in_one():
    whole, metrics = jax.jit(simulate(ALGORITHM, SAMPLER, 4))(softmax_params(), POPULATION, KEY)
    part = jax.jit(continue_rounds(ALGORITHM, SAMPLER, 2))
    state, first = part(ALGORITHM.init(softmax_params()), POPULATION, KEY)
    state, second = part(state, POPULATION, KEY)
    assert_trees_equal(state, whole)
    assert_trees_equal(jax.tree.map(lambda *leaves: jnp.concatenate(leaves), first, second), metrics)
    assert state.round == 4
    assert metrics.loss.shape == (4,)


@pytest.mark.quick
def test_seeds_vmap_like_a_loop():
    keys = jax.random.split(KEY, 3)
    run = simulate(ALGORITHM, SAMPLER, 3)
    together = jax.jit(jax.vmap(run, (None, None, 0)))(softmax_params(), POPULATION, keys)
    alone = jax.jit(run)
    for s in range(3):
        one = jax.tree.map(lambda leaf, s=s: leaf[s], together)
        assert_trees_close(one, alone(softmax_params(), POPULATION, keys[s]), rtol=1e-12, atol=1e-14)
    w = np.asarray(together[0].params["w"])
    assert not np.array_equal(w[0], w[1])


def test_vmap_over_cohort_sizes_worth_of_schedules():
    """A batched sampler input: which clients take part may differ between members."""
    schedules = jnp.array([[[0, 1, -1], [2, -1, -1]], [[5, 4, 3], [0, 1, 2]]])

    def run(rows, key):
        sampler = lambda key, t: rows[jnp.minimum(t, 1)]  # noqa: E731
        return simulate(ALGORITHM, sampler, 2)(softmax_params(), POPULATION, key)

    together = jax.jit(jax.vmap(run, (0, None)))(schedules, KEY)
    np.testing.assert_array_equal(together[1].participants, [[2, 1], [3, 3]])
    for s in range(2):
        assert_trees_close(jax.tree.map(lambda leaf, s=s: leaf[s], together), run(schedules[s], KEY), 1e-12, 1e-14)
