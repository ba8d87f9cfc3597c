"""FedAMD: traces of an independent program, anchors and miners, and the mean of the anchors' gradients."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import algorithms
from algorithms.participation.fedamd import draw_anchors
from fedjax_core import Population, reference, samplers, simulate
from tests.problems import (
    FULL,
    PART,
    Q3_A,
    Q3_B,
    Q3_OPTIMUM,
    Q3_START,
    q3_population,
    quadratic_loss,
    softmax_loss,
    softmax_params,
    softmax_population,
)

STEPS = {"batch_size": 1, "num_steps": 2}


def make(loss=quadratic_loss, num_clients=3, **settings):
    return algorithms.fedamd(loss, optax.sgd(0.1), num_clients=num_clients, **(STEPS | settings))


def run(algorithm, cohorts, population=None, keys=None, params=Q3_START):
    """States before the first and after every round, and every round's metrics, through the plain loop."""
    states, metrics = [algorithm.init(jax.tree.map(jnp.asarray, params))], []
    with reference.plain_loop():
        for t, ids in enumerate(cohorts):
            cohort = (population or q3_population()).cohort(ids)
            state, info = algorithm.round(states[-1], cohort, jax.random.key(t) if keys is None else keys[t])
            states.append(state)
            metrics.append(info)
    return states, metrics


@cache
def key_that_makes_anchors(ids, anchors):
    """A key of a round in which, with probability 0.5, the anchors among `ids` are these."""
    cohort = q3_population().cohort(np.asarray(ids))
    for seed in range(1000):
        drawn = draw_anchors(jax.random.split(jax.random.key(seed))[0], cohort, 0.5)
        if {i for i, is_anchor in zip(ids, drawn, strict=True) if is_anchor} == set(anchors):
            return jax.random.key(seed)
    raise AssertionError("no such key")


def gradients(x):
    """The clients' gradients at x, [3, 2]."""
    return np.einsum("nij,nj->ni", Q3_A, np.asarray(x) - Q3_B)


def mean_anchor(state):
    return np.asarray(state.total) / float(state.weight)


@pytest.mark.quick
def test_golden_trace():
    cohorts = [(0, 1, 2), (0, 1), (0, 1, 2)]
    keys = [key_that_makes_anchors(ids, anchors) for ids, anchors in zip(cohorts, ((0,), (1,), (2,)), strict=True)]
    states, metrics = run(make(probability=0.5), [np.array(ids) for ids in cohorts], keys=keys)
    np.testing.assert_allclose(
        [s.params for s in states[1:]],
        [(0.62375000, 0.78083333), (0.21208333, 0.57083333), (-0.13301094, 0.38481458)],
        rtol=0,
        atol=1e-7,
    )
    assert [int(m.extra.anchors) for m in metrics] == [1, 1, 1]
    assert [int(m.extra.newcomers) for m in metrics] == [3, 0, 0]


def test_each_participant_is_an_anchor_with_the_probability():
    cohort = q3_population().cohort([2, -1, 0, 1])
    drawn = jax.vmap(lambda key: draw_anchors(key, cohort, 0.3))(jax.random.split(jax.random.key(0), 4000))
    assert not drawn[:, 1].any()
    np.testing.assert_allclose(drawn.mean(0)[np.array([0, 2, 3])], 0.3, atol=0.03)
    np.testing.assert_allclose(np.cov(drawn[:, [0, 2, 3]].T), 0.21 * np.eye(3), atol=0.02)
    assert not draw_anchors(jax.random.key(0), cohort, 0.0).any()
    np.testing.assert_array_equal(draw_anchors(jax.random.key(0), cohort, 1.0), cohort.mask)


def test_anchors_alone_never_move_the_model_and_miners_alone_never_change_an_anchor():
    states, _ = run(make(probability=1.0), FULL)
    for state in states[1:]:
        np.testing.assert_array_equal(state.params, Q3_START)
        np.testing.assert_allclose(state.anchors.rows.gradient, gradients(Q3_START))
    states, _ = run(make(probability=0.0), FULL)
    for state in states[1:]:
        np.testing.assert_allclose(state.anchors.rows.gradient, gradients(Q3_START))
        np.testing.assert_allclose(mean_anchor(state), gradients(Q3_START).mean(0))


def test_clients_with_one_step_all_take_the_step_of_the_mean():
    states, _ = run(make(probability=0.0, num_steps=1, server_lr=0.7), [[0, 1, 2], [0], [1, 2]])
    step = 0.07 * gradients(Q3_START).mean(0)
    np.testing.assert_allclose([s.params for s in states], [Q3_START - t * step for t in range(4)], rtol=1e-12)


def test_in_sequence_every_miner_round_has_the_true_gradient():
    states, metrics = run(make(period=2), [[0, 1, 2]] * 6)
    assert [int(m.extra.anchors) for m in metrics] == [3, 0, 3, 0, 3, 0]
    for t in (1, 3, 5):  # before a miner round
        np.testing.assert_allclose(mean_anchor(states[t]), gradients(states[t].params).mean(0), rtol=1e-10)


@pytest.mark.parametrize("curvatures", ["equal", "equal data"])
def test_with_equal_curvatures_a_miner_descends_as_if_it_had_all_data(curvatures):
    b = Q3_B if curvatures == "equal" else np.repeat(Q3_B[:1], 3, axis=0)
    population = Population.from_clients([{"A": Q3_A[1:2], "b": b[i : i + 1]} for i in range(3)])
    states, _ = run(make(period=2, num_steps=3), [[0, 1, 2], [2]], population)
    y = Q3_START
    for _ in range(3):
        y = y - 0.1 * Q3_A[1] @ (y - b.mean(0))
    np.testing.assert_allclose(states[-1].params, y, rtol=1e-12)


@pytest.mark.parametrize("weights", ["uniform", "examples", np.array([1.0, 5.0, 2.0])])
def test_the_total_is_that_of_the_table(weights):
    """Newcomers in the first two rounds: the mean is over the clients that have joined."""
    states, metrics = run(make(probability=0.5, weights=weights), [*PART, *PART], q3_population((1, 2, 4)))
    p = {"uniform": np.ones(3), "examples": np.array([1.0, 2.0, 4.0])}
    p = p[weights] if isinstance(weights, str) else weights
    for state in states[1:]:
        rows = state.anchors.rows
        mean = np.average(rows.gradient, axis=0, weights=p * rows.known)
        np.testing.assert_allclose(mean_anchor(state), mean, rtol=1e-10)
    assert [int(m.extra.newcomers) for m in metrics] == [2, 1, 0, 0, 0, 0]
    np.testing.assert_allclose(states[-1].weight, 3, rtol=1e-12)


def test_an_anchor_is_the_gradient_of_all_examples_in_batches_of_three():
    population, params = softmax_population((5, 1, 8)), softmax_params()
    states, _ = run(make(softmax_loss, probability=1.0, batch_size=3), FULL[:1], population, params=params)
    for i in range(3):
        client = population.client(i)
        g = jax.grad(lambda p, client=client: jnp.mean(softmax_loss(p, client, None)))(params)
        np.testing.assert_allclose(states[-1].anchors.rows.gradient["w"][i], g["w"], rtol=1e-10, atol=1e-12)


def test_it_reaches_the_optimum_with_partial_participation():
    cohorts = np.array([[t % 3, (t + 1) % 3] for t in range(1500)])
    simulation = jax.jit(simulate(make(probability=0.4), samplers.schedule(cohorts), len(cohorts)))
    state, _ = simulation(jnp.asarray(Q3_START), q3_population(), jax.random.key(0))
    np.testing.assert_allclose(state.params, Q3_OPTIMUM, atol=1e-10)
    np.testing.assert_allclose(state.anchors.rows.gradient, gradients(Q3_OPTIMUM), atol=1e-9)


def test_bytes_are_counted_for_each_kind_of_participant():
    """P = 2. All are new in the first round: miners then send two models, anchors one."""
    kinds = set()
    for probability in (0.0, 0.5, 1.0):
        _, rows = run(make(probability=probability), [[0, 1, 2], [0, 1, 2]])
        for t, row in enumerate(rows):
            anchors = int(row.extra.anchors)
            kinds.add(anchors)
            assert row.bytes_down == pytest.approx(8 * 2 * (anchors + 2 * (3 - anchors)) / 3)
            assert row.bytes_up == pytest.approx(8 * 2 * (anchors + (3 - anchors) * (2 if t == 0 else 1)) / 3)
    assert len(kinds) > 2
    _, (row,) = run(make(), [[-1, -1]])
    assert (row.bytes_down, row.bytes_up) == (0, 0)
