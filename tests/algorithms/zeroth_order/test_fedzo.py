"""FedZO, FedProx-ZO and SCAFFOLD-ZO: with as many directions as parameters their estimates are exact, so that traces of
an independent NumPy program with gradients hold; and queries are counted one by one."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import algorithms
from algorithms.zeroth_order.estimators import host_loss
from fedjax_core import Plan, Population, reference
from tests.problems import (
    FULL,
    PART,
    Q3_A,
    Q3_B,
    Q3_START,
    assert_trees_close,
    q3_population,
    quadratic_loss,
    softmax_loss,
    softmax_params,
    softmax_population,
)

STEPS = {"batch_size": 1, "num_steps": 2}
# Two directions in two dimensions: g = grad f_i / 2 up to mu, so that a rate of 0.2 stands for one of 0.1.
EXACT = {"num_directions": 2, "mu": 3e-8, **STEPS}


def run(algorithm, cohorts, population=None, params=Q3_START):
    """States and metrics of every round, through the plain loop."""
    population = population or q3_population()
    state, states, rows = algorithm.init(jax.tree.map(jnp.asarray, params)), [], []
    with reference.plain_loop():
        for t, ids in enumerate(cohorts):
            state, metrics = algorithm.round(state, population.cohort(np.asarray(ids)), jax.random.key(t))
            states.append(state)
            rows.append(metrics)
    return states, rows


def gradient(i, y):
    return Q3_A[i] @ (y - Q3_B[i])


def trace_by_hand(cohorts, correct, lr=0.1, after=lambda *_: None):
    """Models of Q3 after each round; `correct(t, i, x, y)` is added to half the gradient, at a rate of 2 lr."""
    x, models = Q3_START, []
    for t, ids in enumerate(cohorts):
        local, raw = [], []
        for i in ids:
            y, seen = x, []
            for _ in range(2):
                g = gradient(i, y) / 2
                y, seen = y - 2 * lr * (g + correct(t, i, x, y)), [*seen, g]
            local.append(y)
            raw.append(np.mean(seen, 0))
        x = np.mean(local, 0)
        after(ids, raw)
        models.append(x)
    return models


@pytest.mark.quick
def test_golden_trace_of_fedzo():
    """FedAvg's on Q3."""
    states, _ = run(algorithms.fedzo(quadratic_loss, optax.sgd(0.2), **EXACT), FULL)
    expected = [(0.62000000, 0.78833333), (0.37994722, 0.63294167), (0.22891581, 0.51776070)]
    np.testing.assert_allclose([s.params for s in states], expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("cohorts", [FULL, PART])
def test_golden_trace_of_fedprox_zo(cohorts):
    states, _ = run(algorithms.fedprox_zo(quadratic_loss, optax.sgd(0.2), proximal=0.3, **EXACT), cohorts)
    expected = trace_by_hand(cohorts, lambda t, i, x, y: 0.3 * (y - x) * (t > 0))
    np.testing.assert_allclose([s.params for s in states], expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("cohorts", "expected"),
    [
        (FULL, [(0.62000000, 0.78833333), (0.37335694, 0.62905972), (0.21976001, 0.51145930)]),
        (PART, [(0.68500000, 0.82875000), (0.36030521, 0.60559271), (0.20646776, 0.48947560)]),
    ],
)
def test_golden_trace_of_scaffold_zo_ii(cohorts, expected):
    """SCAFFOLD's on Q3; by hand too, as the controls are half of SCAFFOLD's."""
    states, _ = run(algorithms.scaffold_zo(quadratic_loss, optax.sgd(0.2), num_clients=3, **EXACT), cohorts)
    np.testing.assert_allclose([s.params for s in states], expected, rtol=0, atol=1e-7)
    controls = np.zeros((3, 2))

    def remember(ids, raw):
        controls[np.asarray(ids)] = raw

    by_hand = trace_by_hand(cohorts, lambda t, i, x, y: controls.mean(0) - controls[i], after=remember)
    np.testing.assert_allclose(by_hand, expected, rtol=0, atol=1e-7)
    np.testing.assert_allclose(states[-1].client_controls.rows, controls, rtol=0, atol=1e-7)
    np.testing.assert_allclose(states[-1].control, controls.mean(0), rtol=0, atol=1e-7)


@pytest.mark.parametrize("cohorts", [FULL, PART])
def test_golden_trace_of_scaffold_zo_i(cohorts):
    algorithm = algorithms.scaffold_zo(quadratic_loss, optax.sgd(0.2), num_clients=3, option="I", **EXACT)
    states, _ = run(algorithm, cohorts)

    def correct(t, i, x, y):
        return np.mean([gradient(j, x) for j in cohorts[t]], 0) / 2 - gradient(i, x) / 2

    np.testing.assert_allclose([s.params for s in states], trace_by_hand(cohorts, correct), rtol=0, atol=1e-7)


def test_without_the_pull_fedprox_zo_is_fedzo():
    settings = {"num_directions": 1, "mu": 0.1, **STEPS}
    states, _ = run(algorithms.fedprox_zo(quadratic_loss, optax.sgd(0.2), proximal=0.0, **settings), FULL)
    expected, _ = run(algorithms.fedzo(quadratic_loss, optax.sgd(0.2), **settings), FULL)
    assert_trees_close(states, expected, rtol=1e-12)


@pytest.mark.parametrize("option", ["I", "II"])
def test_corrected_clients_with_linear_functions_all_take_the_mean_direction(option):
    slopes = np.array([[1.0, -2.0], [3.0, 0.5], [-1.0, 4.0]])
    population = Population.from_clients([{"a": row[None]} for row in slopes])
    algorithm = algorithms.scaffold_zo(
        lambda x, batch, key: batch["a"] @ x, optax.sgd(0.2), num_clients=3, option=option, num_directions=2, **STEPS
    )
    states, _ = run(algorithm, [[0, 1, 2]], population)
    states, _ = run(
        algorithm._replace(init=lambda params: states[0]), [[1]] if option == "II" else [[0, 1, 2]], population
    )
    start = run(algorithm, [[0, 1, 2]], population)[0][0].params
    # Two steps of 0.2 along half the mean slope, also for a client that is alone in the cohort (its control is known).
    np.testing.assert_allclose(states[0].params, start - 0.2 * slopes.mean(0), rtol=1e-9)


def test_one_step_of_one_client_is_a_step_of_the_centralized_method():
    states, rows = run(algorithms.fedzo(quadratic_loss, optax.sgd(0.2), **EXACT | {"num_steps": 1}), [[1]])
    np.testing.assert_allclose(states[0].params, Q3_START - 0.1 * gradient(1, Q3_START), atol=1e-7)
    np.testing.assert_allclose(rows[0].loss, quadratic_loss(Q3_START, {"A": Q3_A[1:2], "b": Q3_B[1:2]}, None)[0])


FACTORIES = {
    "fedzo": algorithms.fedzo,
    "fedprox_zo": algorithms.fedprox_zo,
    "scaffold_zo I": partial(algorithms.scaffold_zo, num_clients=3, option="I"),
    "scaffold_zo II": partial(algorithms.scaffold_zo, num_clients=3),
}


@pytest.mark.parametrize("name", FACTORIES)
def test_every_query_is_counted_and_nothing_else(name):
    """By the function itself, which is not JAX: unequal numbers of steps, an empty slot, fewer parameters than q."""
    asked = []

    def values(queries):
        asked.extend(queries)
        return [np.sum((params - examples["x"]) ** 2, 1) for params, examples in queries]

    population = Population.from_clients([{"x": np.full((n, 2), 0.1 * n)} for n in (1, 3, 2)])
    algorithm = FACTORIES[name](
        host_loss(values), optax.sgd(0.1), num_directions=5, batch_size=1, num_epochs=2, plan=Plan(lanes=1)
    )
    round_fn, state = jax.jit(algorithm.round), algorithm.init(jnp.ones(2))
    for t, (ids, steps) in enumerate([([0, 1, 2], 2 + 6 + 4), ([2, -1, 0], 4 + 2)]):
        asked.clear()
        state, metrics = jax.block_until_ready(round_fn(state, population.cohort(np.array(ids)), jax.random.key(t)))
        estimates = steps + (int(metrics.participants) if name == "scaffold_zo I" else 0)
        assert metrics.extra.queries == 3 * estimates == len(asked)  # two directions and the point itself


def test_option_i_agrees_over_plans_with_a_plain_loop():
    """The shared test runs option II."""
    population, params = softmax_population((1, 9, 4)), softmax_params()
    make = partial(algorithms.scaffold_zo, softmax_loss, optax.sgd(0.1), num_clients=3, option="I", batch_size=4)
    states, rows = run(make(), [[0, 1, 2], [2, -1, 1]], population, params)
    algorithm = make(plan=Plan(lanes=2))
    state, round_fn = algorithm.init(params), jax.jit(algorithm.round)
    for t, ids in enumerate([[0, 1, 2], [2, -1, 1]]):
        state, metrics = round_fn(state, population.cohort(np.array(ids)), jax.random.key(t))
        assert_trees_close((state, metrics), (states[t], rows[t]), rtol=1e-12, atol=1e-13)


def test_bytes_down_and_up():
    _, rows = run(algorithms.fedzo(quadratic_loss, optax.sgd(0.1), **STEPS), FULL[:1])
    assert (rows[0].bytes_down, rows[0].bytes_up) == (16, 16)
    _, rows = run(algorithms.scaffold_zo(quadratic_loss, optax.sgd(0.1), num_clients=3, **STEPS), FULL[:1])
    assert (rows[0].bytes_down, rows[0].bytes_up) == (32, 32)
