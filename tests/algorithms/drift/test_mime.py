"""Mime and MimeLite: traces of an independent program, and the centralized optimizers that they imitate."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import algorithms
from fedjax_core import Population, reference, samplers, simulate
from tests.problems import (
    FULL,
    PART,
    Q3_A,
    Q3_B,
    Q3_OPTIMUM,
    Q3_START,
    assert_trees_close,
    q3_population,
    quadratic_loss,
)

STEPS = {"batch_size": 1, "num_steps": 2}
ONE = {"batch_size": 1, "num_steps": 1}
KEY = jax.random.key(0)


def make(name, optimizer=None, **settings):
    return getattr(algorithms, name)(quadratic_loss, optimizer or optax.sgd(0.1), **settings)


def run(algorithm, cohorts, population=None):
    """States after every round and the last metrics, through the plain loop, which compiles nothing."""
    population = population or q3_population()
    state, states = algorithm.init(jnp.asarray(Q3_START)), []
    with reference.plain_loop():
        for ids in cohorts:
            state, metrics = algorithm.round(state, population.cohort(ids), KEY)
            states.append(state)
    return states, metrics


def gradient(x):
    return np.einsum("nij,nj->i", Q3_A, np.asarray(x) - Q3_B) / 3


@pytest.mark.quick
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mime", [(0.95711944, 0.97683889), (0.87742032, 0.93351066), (0.76788249, 0.87329845)]),
        ("mimelite", [(0.95720000, 0.97688333), (0.87757507, 0.93359734), (0.76809972, 0.87342329)]),
    ],
)
def test_golden_trace(name, expected):
    states, _ = run(make(name, momentum=0.9, **STEPS), FULL)
    np.testing.assert_allclose([s.params for s in states], expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "optimizer", "momentum"),
    [
        ("mime", optax.sgd(0.1), 0.9),
        ("mime", optax.adam(0.1), 0.0),
        ("mime", optax.adam(0.1), 0.5),
        ("mimelite", optax.sgd(0.1), 0.9),  # only where the update is linear in the gradient
    ],
)
def test_one_step_is_one_step_of_the_centralized_optimizer(name, optimizer, momentum):
    """With Adam too: its count of steps is part of the frozen state and grows by one a round."""
    states, _ = run(make(name, optimizer, momentum=momentum, **ONE), FULL)
    x, m, opt_state = jnp.asarray(Q3_START), 0.0, optimizer.init(jnp.asarray(Q3_START))
    for state in states:
        m = momentum * m + (1 - momentum) * gradient(x)
        update, opt_state = optimizer.update(m, opt_state, x)
        x = x + update
        np.testing.assert_allclose(state.params, x, rtol=1e-12)
    assert_trees_close(states[-1].opt_state[1], opt_state, rtol=1e-12)


@pytest.mark.parametrize("cohorts", [FULL, PART])
def test_correction_makes_clients_with_one_hessian_descend_along_the_cohort_gradient(cohorts):
    """g_i(y) - g_i(x) + c is then the cohort's gradient at y: K centralized steps with frozen momentum."""
    a, b = Q3_A[1], Q3_B
    population = Population.from_clients([{"A": a[None], "b": b[i : i + 1]} for i in range(3)])
    states, _ = run(make("mime", momentum=0.9, **STEPS), cohorts, population)
    x, m = Q3_START, np.zeros(2)
    for ids, state in zip(cohorts, states, strict=True):
        y = x
        for _ in range(2):
            y = y - 0.1 * (0.9 * m + 0.1 * (a @ (y - b[ids].mean(0))))
        m = 0.9 * m + 0.1 * (a @ (x - b[ids].mean(0)))
        x = y
        np.testing.assert_allclose(state.params, x, rtol=1e-12)


def test_mimelite_without_momentum_is_fedavg():
    common = {"server_lr": 0.5, **STEPS}
    states, _ = run(make("mimelite", momentum=0.0, **common), PART)
    expected, _ = run(make("fedavg", **common), PART)
    np.testing.assert_allclose(states[-1].params, expected[-1].params, rtol=1e-12)


def test_mime_reaches_the_optimum_and_mimelite_stalls():
    distances = {}
    for name in ("mime", "mimelite"):
        simulation = jax.jit(simulate(make(name, momentum=0.5, **STEPS), samplers.full(3), 400))
        state, _ = simulation(jnp.asarray(Q3_START), q3_population(), KEY)
        distances[name] = np.linalg.norm(state.params - Q3_OPTIMUM)
    assert distances["mime"] < 1e-12
    assert distances["mimelite"] > 1e-3


@pytest.mark.parametrize("name", ["mime", "mimelite"])
def test_weights_reach_both_the_gradient_and_the_displacement(name):
    """Two copies of a client are that client with twice the weight."""
    twice = Population.from_clients([q3_population().client(i) for i in (0, 1, 1)])
    states, _ = run(make(name, **STEPS), FULL, twice)
    weighted, _ = run(make(name, weights=np.array([1.0, 2.0, 0.0]), **STEPS), FULL)
    assert_trees_close(weighted[-1], states[-1], rtol=1e-12)


# P = 2: x, m, c for Mime, and the count of rounds in the state of the average.
@pytest.mark.parametrize(("name", "down"), [("mime", 6 * 8 + 4), ("mimelite", 4 * 8 + 4)])
def test_bytes_down_and_up(name, down):
    _, metrics = run(make(name, **STEPS), FULL[:1])
    assert (metrics.bytes_down, metrics.bytes_up) == (down, 4 * 8)
