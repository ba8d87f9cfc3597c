"""FedGAMMA and FedSMOO, SAM made consistent over clients: traces of an independent program, limits and identities."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import algorithms
from fedjax_core import Population, reference, samplers, simulate
from tests.problems import FULL, PART, Q3_A, Q3_B, Q3_START, q3_population, quadratic_loss

STEPS = {"batch_size": 1, "num_steps": 2}
ONE = {"batch_size": 1, "num_steps": 1}
KEY = jax.random.key(0)


def make(name, lr=0.1, loss=quadratic_loss, **settings):
    return getattr(algorithms, name)(loss, optax.sgd(lr), num_clients=3, **settings)


def run(algorithm, cohorts):
    """States after every round and the last metrics, through the plain loop, which compiles nothing."""
    state, states = algorithm.init(jnp.asarray(Q3_START)), []
    with reference.plain_loop():
        for ids in cohorts:
            state, metrics = algorithm.round(state, q3_population().cohort(ids), KEY)
            states.append(state)
    return states, metrics


@pytest.mark.quick
@pytest.mark.parametrize(
    ("algorithm", "cohorts", "expected"),
    [
        (
            make("fedgamma", rho=0.1, **STEPS),
            FULL,
            [(0.59377986, 0.77206459), (0.33445359, 0.60165240), (0.17869041, 0.47767380)],
        ),
        (
            make("fedgamma", rho=0.1, **STEPS),
            PART,
            [(0.66732050, 0.80684961), (0.32216293, 0.57076958), (0.16798278, 0.44908136)],
        ),
        (
            make("fedsmoo", lam=2.0, rho=0.1, **STEPS),
            FULL,
            [(0.21087162, 0.55670430), (-0.30718359, 0.17090732), (-0.45136363, -0.06873560)],
        ),
        (
            make("fedsmoo", lam=2.0, rho=0.1, **STEPS),
            PART,
            [(0.46096457, 0.68747989), (-0.28128795, 0.43930295), (-0.34368212, -0.02711485)],
        ),
    ],
    ids=["fedgamma full", "fedgamma part", "fedsmoo full", "fedsmoo part"],
)
def test_golden_trace(algorithm, cohorts, expected):
    states, _ = run(algorithm, cohorts)
    np.testing.assert_allclose([s.params for s in states], expected, rtol=0, atol=1e-7)


def test_server_side_of_the_traces():
    states, _ = run(make("fedgamma", rho=0.1, **STEPS), PART)
    np.testing.assert_allclose(states[-1].control, (1.02065686, 0.73947572), atol=1e-7)
    states, _ = run(make("fedsmoo", lam=2.0, rho=0.1, **STEPS), PART)
    np.testing.assert_allclose(states[-1].perturbation, (-0.06249169, 0.07806913), atol=1e-7)


def test_without_a_perturbation_they_are_scaffold_and_feddyn():
    for name, settings, parent, its in (
        ("fedgamma", {"server_lr": 0.5}, "scaffold", {"server_lr": 0.5}),
        ("fedsmoo", {"lam": 2.0}, "feddyn", {"alpha": 0.5}),
    ):
        states, _ = run(make(name, rho=0.0, **settings, **STEPS), PART)
        expected, _ = run(make(parent, **its, **STEPS), PART)
        np.testing.assert_allclose([s.params for s in states], [s.params for s in expected], rtol=1e-12)


@pytest.mark.parametrize("weights", ["uniform", np.array([1.0, 5.0, 2.0])])
def test_server_keeps_the_mean_of_the_clients(weights):
    p = None if isinstance(weights, str) else weights
    state = run(make("fedgamma", weights=weights, **STEPS), PART)[0][-1]
    np.testing.assert_allclose(state.control, np.average(state.client_controls.rows, axis=0, weights=p), rtol=1e-12)
    state = run(make("fedsmoo", weights=weights, **STEPS), PART)[0][-1]
    h, _ = state.client_duals.rows
    np.testing.assert_allclose(state.dual, np.average(h, axis=0, weights=p), rtol=1e-12)


def test_fedgamma_reaches_the_minimum_of_what_its_clients_descend_on():
    """There the gradients from uphill cancel over the clients, each control is its client's, and c is 0."""
    cohorts = np.array([[t % 3, (t + 1) % 3] for t in range(900)])
    simulation = jax.jit(simulate(make("fedgamma", rho=0.1, **STEPS), samplers.schedule(cohorts), len(cohorts)))
    state, _ = simulation(jnp.asarray(Q3_START), q3_population(), KEY)
    g = np.einsum("nij,nj->ni", Q3_A, state.params - Q3_B)
    q = g + 0.1 * np.einsum("nij,nj->ni", Q3_A, g / np.linalg.norm(g, axis=1, keepdims=True))
    np.testing.assert_allclose(q.mean(0), 0, atol=1e-10)
    np.testing.assert_allclose(state.client_controls.rows, q, atol=1e-9)
    np.testing.assert_allclose(state.control, 0, atol=1e-10)


def test_first_step_of_fedsmoo_is_that_of_fedspeed():
    """Its duals of the perturbations are 0 until then."""
    states, _ = run(make("fedsmoo", lam=2.0, **ONE), FULL[:1])
    expected, _ = run(make("fedspeed", lam=2.0, **ONE), FULL[:1])
    np.testing.assert_allclose(states[0].params, expected[0].params, rtol=1e-12)


def test_perturbations_of_fedsmoo_have_radius_rho():
    states, _ = run(make("fedsmoo", rho=0.3, **ONE), PART)
    for state in states:
        np.testing.assert_allclose(np.linalg.norm(state.perturbation), 0.3, rtol=1e-12)
    (_, old), (_, new) = (state.client_duals.rows for state in states[1:])
    for i in PART[2]:  # mu_i grew by s_i - s, with the s of the round before
        np.testing.assert_allclose(np.linalg.norm(new[i] - old[i] + states[1].perturbation), 0.3, rtol=1e-12)


def test_perturbation_of_fedsmoo_turns_uphill_for_all_clients_together():
    """On linear losses with gradients c_i: each s_i alone would point along c_i, s along their mean."""
    c = np.array([[1.0, 0.0], [0.0, 2.0], [-3.0, 1.0]])
    population = Population.from_clients([{"c": c[i : i + 1]} for i in range(3)])
    algorithm = make("fedsmoo", loss=lambda params, batch, key: batch["c"] @ params, rho=0.1, **STEPS)
    state, _ = jax.jit(simulate(algorithm, samplers.full(3), 100))(jnp.asarray(Q3_START), population, KEY)
    uphill = c.mean(0) / np.linalg.norm(c.mean(0))
    assert state.perturbation @ uphill / 0.1 > 0.99
    assert max(c @ uphill / np.linalg.norm(c, axis=1)) < 0.99


def test_bytes_down_and_up():
    for name in ("fedgamma", "fedsmoo"):
        _, metrics = run(make(name, **STEPS), FULL[:1])
        assert (metrics.bytes_down, metrics.bytes_up) == (32, 32)  # 2P
