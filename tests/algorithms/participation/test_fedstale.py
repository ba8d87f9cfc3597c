"""FedStale and FedVARP: traces of an independent program, their mean and variance over all cohorts, and limits."""

import dataclasses
import itertools
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import algorithms
from algorithms.parts.memory import remember
from fedjax_core import ClientTable, gather, reference
from tests.problems import (
    FULL,
    PART,
    Q3_A,
    Q3_B,
    Q3_START,
    assert_trees_close,
    assert_trees_equal,
    q3_population,
    quadratic_loss,
)

STEPS = {"batch_size": 1, "num_steps": 2}
N = {"num_clients": 3}
RATES = np.array([1.0, 0.5, 0.5])
KEY = jax.random.key(0)


def make(name, **settings):
    return getattr(algorithms, name)(quadratic_loss, optax.sgd(0.1), **settings, **STEPS)


def one_round(algorithm, state, cohort):
    """A round through the plain loop, which compiles nothing."""
    with reference.plain_loop():
        return algorithm.round(state, cohort, KEY)


def run(algorithm, cohorts, population=None):
    """States after every round, and the last metrics."""
    population = population or q3_population()
    state, states = algorithm.init(jnp.asarray(Q3_START)), []
    for ids in cohorts:
        state, metrics = one_round(algorithm, state, population.cohort(ids))
        states.append(state)
    return states, metrics


def same_models(a, b, cohorts):
    np.testing.assert_allclose(
        [s.params for s in run(a, cohorts)[0]], [s.params for s in run(b, cohorts)[0]], rtol=1e-12
    )


def displacements(x):
    """d_i of each client after two steps from x, [3, 2]."""
    y = np.repeat(np.asarray(x)[None], 3, axis=0)
    for _ in range(2):
        y = y - 0.1 * np.einsum("nij,nj->ni", Q3_A, y - Q3_B)
    return y - np.asarray(x)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("beta", "expected"),
    [
        (0.0, [(0.58000000, 0.89166667), (0.40940000, 0.59670833), (0.19041753, 0.62064879)]),
        (0.5, [(0.58000000, 0.89166667), (0.30440000, 0.59962500), (0.17262725, 0.57889462)]),
        (1.0, [(0.58000000, 0.89166667), (0.19940000, 0.60254167), (0.15483697, 0.53714046)]),
    ],
)
def test_golden_trace(beta, expected):
    algorithm = make("fedstale", beta=beta, probabilities=RATES, **N)
    states, _ = run(algorithm, [[0, 1], [0, 2], [0, 1]])
    np.testing.assert_allclose([s.params for s in states], expected, rtol=0, atol=1e-7)


def test_fedvarp_is_its_papers_formula():
    x, h = Q3_START, np.zeros((3, 2))
    states, _ = run(make("fedvarp", server_lr=0.7, **N), PART)
    for cohort, state in zip(PART, states, strict=True):
        d = displacements(x)
        x = x + 0.7 * (h.mean(0) + (d - h)[cohort].mean(0))
        h[cohort] = d[cohort]
        np.testing.assert_allclose(state.params, x, rtol=1e-12)
        np.testing.assert_allclose(state.updates.rows, h, rtol=1e-12)
    same_models(make("fedvarp", **N), make("fedstale", beta=1.0, probabilities=2 / 3, **N), PART)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_with_everyone_it_is_fedavg_for_every_beta(beta):
    for probabilities in ("uniform", 1.0):
        same_models(make("fedstale", beta=beta, probabilities=probabilities, **N), make("fedavg"), FULL)


def test_the_first_round_does_not_depend_on_beta():
    first = [run(make("fedstale", beta=b, probabilities=RATES, **N), [[0, 2]])[0][0].params for b in (0.0, 1.0)]
    np.testing.assert_array_equal(*first)


def test_without_stale_updates_it_weighs_by_inverse_probabilities():
    same_models(make("fedstale", beta=0.0, **N), make("fedavg"), PART)
    known = make("fedstale", beta=0.0, probabilities=RATES, **N)
    same_models(known, make("fedavg_ipw", probabilities=RATES), [[0, 1], [0, 2], [0]])
    estimated = make("fedstale", beta=0.0, probabilities="estimated", cutoff=2, **N)
    same_models(estimated, make("fedau", cutoff=2, **N), [[0], [0, 2], [0], [1, 2], [0, 1]])


@cache
def updates_of_all_cohorts(server_lr):
    """For betas 0, 0.4 and 1: the update in every possible cohort after two rounds, [8, 2], its chance, d and h."""

    @jax.jit
    def round(beta, state, ids):
        algorithm = make(
            "fedstale", beta=beta, probabilities=RATES, skip_empty=False, server_lr=server_lr(state.round), **N
        )
        return algorithm.round(state, q3_population().cohort(ids), KEY)[0]

    rows = {}
    for beta in (0.0, 0.4, 1.0):
        state = make("fedstale", **N).init(jnp.asarray(Q3_START))
        for ids in ([0, 1, 2], [0, -1, 2]):
            state = round(beta, state, np.asarray(ids))
        x, h = np.asarray(state.params), np.asarray(state.updates.rows)
        masks = list(itertools.product([0, 1], repeat=3))
        after = [round(beta, state, np.where(mask, np.arange(3), -1)) for mask in masks]
        chance = np.prod(np.where(masks, RATES, 1 - RATES), axis=1)
        rows[beta] = np.stack([s.params for s in after]) - x, chance, displacements(x), h
    return rows


def test_the_update_is_unbiased_with_the_variance_of_its_formula():
    for beta, (updates, chance, d, h) in updates_of_all_cohorts(lambda round: 1.0).items():
        mean = chance @ updates
        np.testing.assert_allclose(mean, d.mean(0), rtol=1e-12)
        variance = chance @ np.sum((updates - mean) ** 2, axis=1)
        formula = np.sum((1 / RATES - 1) * np.sum((d - beta * h) ** 2, axis=1)) / 9
        np.testing.assert_allclose(variance, formula, rtol=1e-11)
        assert variance > 0


def test_without_staleness_and_with_beta_one_every_cohort_gives_the_same_update():
    stands_still_at_first = lambda round: jnp.where(round < 2, 0.0, 1.0)  # noqa: E731
    updates, _, d, h = updates_of_all_cohorts(stands_still_at_first)[1.0]
    np.testing.assert_allclose(h, d, rtol=1e-12)
    np.testing.assert_allclose(updates, np.broadcast_to(d.mean(0), (8, 2)), rtol=1e-12)


@pytest.mark.parametrize("name", ["fedstale", "mifa"])
@pytest.mark.parametrize("weights", ["examples", np.array([1.0, 5.0, 2.0])])
def test_the_mean_is_that_of_the_table(name, weights):
    states, _ = run(make(name, weights=weights, **N), PART, q3_population((1, 2, 4)))
    p = np.array([1.0, 2.0, 4.0]) if isinstance(weights, str) else weights
    for state in states:
        np.testing.assert_allclose(state.mean, np.average(state.updates.rows, axis=0, weights=p), rtol=1e-12)


def test_a_round_without_participants_is_skipped_or_moves_by_the_stale_updates():
    empty = q3_population().cohort([-1, -1])
    for skip_empty, beta in ((True, 0.0), (False, 0.5)):
        algorithm = make("fedstale", skip_empty=skip_empty, **N)
        before = run(algorithm, PART)[0][-1]
        after, _ = one_round(algorithm, before, empty)
        np.testing.assert_allclose(after.params - before.params, beta * before.mean, atol=1e-15)
        assert_trees_equal((after.updates, after.mean), (before.updates, before.mean))


def test_remembering_looks_at_the_cohorts_rows_alone():
    table = ClientTable({"w": jnp.full((5, 2), jnp.nan).at[1].set(3.0)})
    cohort = dataclasses.replace(q3_population().cohort([2, -1]), rows=jnp.array([1, 1]), table_size=5)
    updates, mean = {"w": jnp.array([[5.0, 7.0], [9.0, 9.0]])}, {"w": jnp.array([1.0, 1.0])}
    table, mean = remember(table, mean, cohort, updates, jnp.array([0.25, 0.0]))
    np.testing.assert_allclose(mean["w"], [1 + 0.25 * 2, 1 + 0.25 * 4])
    np.testing.assert_array_equal(table.rows["w"][1], [5.0, 7.0])
    assert np.isnan(np.delete(table.rows["w"], 1, axis=0)).all()


@pytest.mark.parametrize(
    ("name", "settings"),
    [("fedstale", {"probabilities": "estimated"}), ("fedvarp", {}), ("mifa", {}), ("fedau", {})],
)
def test_a_round_needs_no_rows_but_its_cohorts(name, settings):
    algorithm, ids = make(name, **settings, **N), np.array([2, 0])
    whole, cohort = run(algorithm, PART)[0][-1], q3_population().cohort(ids)

    def cohorts_rows(state):
        is_table = lambda node: isinstance(node, ClientTable)  # noqa: E731
        keep = lambda node: ClientTable(gather(node, cohort)) if is_table(node) else node  # noqa: E731
        return jax.tree.map(keep, state, is_leaf=is_table)

    after, _ = one_round(algorithm, whole, cohort)
    staged, _ = one_round(algorithm, cohorts_rows(whole), dataclasses.replace(cohort, rows=jnp.arange(2), table_size=2))
    assert_trees_close(staged, cohorts_rows(after), rtol=1e-14)


@pytest.mark.parametrize(("name", "settings"), [("fedstale", N), ("fedvarp", N)])
def test_one_model_goes_down_and_one_up(name, settings):
    _, metrics = run(make(name, **settings), PART[:1])
    assert (metrics.bytes_down, metrics.bytes_up) == (16, 16)
