"""FedSpeed: traces of an independent program, and what it is at special values."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import algorithms
from fedjax_core import reference, samplers, simulate
from tests.problems import FULL, PART, Q3_A, Q3_B, Q3_OPTIMUM, Q3_START, q3_population, quadratic_loss

STEPS = {"batch_size": 1, "num_steps": 2}
ONE = {"batch_size": 1, "num_steps": 1}
KEY = jax.random.key(0)
PAPER = {"normalize": False, "corrections": "cohort"}
IN_TURN = np.array([[t % 3, (t + 1) % 3] for t in range(900)])


def make(name="fedspeed", lr=0.1, **settings):
    return getattr(algorithms, name)(quadratic_loss, optax.sgd(lr), num_clients=3, **settings)


def run(algorithm, cohorts):
    """States after every round and the last metrics, through the plain loop, which compiles nothing."""
    state, states = algorithm.init(jnp.asarray(Q3_START)), []
    with reference.plain_loop():
        for ids in cohorts:
            state, metrics = algorithm.round(state, q3_population().cohort(ids), KEY)
            states.append(state)
    return states, metrics


def limit(algorithm, cohorts):
    simulation = jax.jit(simulate(algorithm, samplers.schedule(cohorts), len(cohorts)))
    return simulation(jnp.asarray(Q3_START), q3_population(), KEY)[0]


def gradients(x):
    """The clients' gradients at x, [3, 2]."""
    return np.einsum("nij,nj->ni", Q3_A, np.asarray(x) - Q3_B)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("settings", "cohorts", "expected"),
    [
        (PAPER, FULL, [(0.11705833, 0.52392500), (-0.38356531, 0.13801962), (-0.47516746, -0.09117114)]),
        (PAPER, PART, [(0.28398750, 0.58474375), (-0.56519052, 0.47640895), (0.02255364, -0.24023205)]),
        ({}, PART, [(0.46095084, 0.68745769), (-0.28224315, 0.43854613), (-0.34485308, -0.03094222)]),
    ],
    ids=["paper full", "paper part", "code part"],
)
def test_golden_trace(settings, cohorts, expected):
    states, _ = run(make(lam=2.0, rho=0.1, **settings, **STEPS), cohorts)
    np.testing.assert_allclose([s.params for s in states], expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("off", [{"rho": 0.0}, {"alpha": 0.0}])
def test_without_the_step_uphill_it_is_feddyn(off):
    states, _ = run(make(lam=2.0, **off, **STEPS), PART)
    expected, _ = run(make("feddyn", alpha=0.5, **STEPS), PART)
    np.testing.assert_allclose([s.params for s in states], [s.params for s in expected], rtol=1e-12)
    np.testing.assert_allclose(
        states[-1].client_corrections.rows, -0.5 * expected[-1].client_shifts.rows, rtol=1e-12, atol=1e-15
    )


def test_with_everyone_the_two_averages_agree():
    states, _ = run(make(lam=2.0, **STEPS), FULL)
    expected, _ = run(make(lam=2.0, corrections="cohort", **STEPS), FULL)
    np.testing.assert_allclose([s.params for s in states], [s.params for s in expected], rtol=1e-12)


@pytest.mark.parametrize("weights", ["uniform", np.array([1.0, 5.0, 2.0])])
def test_server_keeps_the_mean_of_the_corrections(weights):
    states, _ = run(make(lam=2.0, weights=weights, **STEPS), PART)
    p = None if isinstance(weights, str) else weights
    mean = np.average(states[-1].client_corrections.rows, axis=0, weights=p)
    np.testing.assert_allclose(states[-1].correction, mean, rtol=1e-12)


def test_corrections_are_averages_of_gradients():
    """For one step a share lr / lam of the new gradient (from uphill, in the paper's form) and the rest of the old."""
    states, _ = run(make(lam=2.0, rho=0.3, normalize=False, **ONE), PART)
    for i in PART[2]:
        g = gradients(states[1].params)[i]
        q = g + 0.3 * Q3_A[i] @ g
        old, new = (state.client_corrections.rows[i] for state in states[1:])
        np.testing.assert_allclose(new, 0.95 * old + 0.05 * q, rtol=1e-12)


def test_one_step_as_long_as_the_proximal_term_is_optimistic_gradient_descent():
    states, _ = run(make(lr=0.1, lam=0.1, rho=0.0, **ONE), FULL)
    x, previous = Q3_START, np.zeros(2)
    for state in states:
        g = gradients(x).mean(0)
        x, previous = x - 0.1 * (2 * g - previous), g
        np.testing.assert_allclose(state.params, x, rtol=1e-12)


def test_it_reaches_the_optimum_with_partial_participation_and_the_paper_form_stalls():
    common = {"lam": 2.0, "rho": 0.0, **STEPS}
    state = limit(make(**common), IN_TURN)
    np.testing.assert_allclose(state.params, Q3_OPTIMUM, atol=1e-10)
    np.testing.assert_allclose(state.client_corrections.rows, gradients(Q3_OPTIMUM), atol=1e-9)
    stalled = limit(make(corrections="cohort", **common), IN_TURN)
    assert np.linalg.norm(stalled.params - Q3_OPTIMUM) > 0.1


def test_raw_step_uphill_moves_the_limit_to_where_it_is_flatter():
    """There q = (I + rho A_i) g_i, so the limit solves sum_i (I + rho A_i) A_i (x - b_i) = 0, under any weights."""
    p = np.array([1.0, 5.0, 2.0])
    state = limit(make(lam=2.0, rho=0.1, normalize=False, weights=p, **STEPS), np.tile([0, 1, 2], (1500, 1)))
    steeper = p[:, None, None] * (np.eye(2) + 0.1 * Q3_A) @ Q3_A
    expected = np.linalg.solve(steeper.sum(0), np.einsum("nij,nj->i", steeper, Q3_B))
    np.testing.assert_allclose(state.params, expected, atol=1e-9)


@pytest.mark.parametrize("corrections", ["all", "cohort"])
def test_bytes_down_and_up(corrections):
    _, metrics = run(make(corrections=corrections, **STEPS), FULL[:1])
    assert (metrics.bytes_down, metrics.bytes_up) == (16, 16)
