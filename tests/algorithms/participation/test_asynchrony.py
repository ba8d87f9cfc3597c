"""FedFix, asynchronous FedAvg, FedBuff and anarchic averaging: traces of independent programs, identities, limits."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import algorithms
from fedjax_core import Population, reference, samplers, simulate
from tests.problems import FULL, Q3_A, Q3_B, Q3_OPTIMUM, Q3_START, q3_population, quadratic_loss

STEPS = {"batch_size": 1, "num_steps": 2}
N = {"num_clients": 3}
KEY = jax.random.key(0)
TIMES = np.array([2, 4, 6])


def make(name, lr=0.1, loss=quadratic_loss, **settings):
    return getattr(algorithms, name)(loss, optax.sgd(lr), **(STEPS | settings))


def one_round(algorithm, state, ids, population=None):
    """A round through the plain loop, which compiles nothing."""
    with reference.plain_loop():
        return algorithm.round(state, (population or q3_population()).cohort(ids), KEY)


def run(algorithm, cohorts, population=None):
    """States before the first and after every round."""
    states = [algorithm.init(jnp.asarray(Q3_START))]
    for ids in cohorts:
        states.append(one_round(algorithm, states[-1], ids, population)[0])
    return states


def same_models(a, b, cohorts, population=None):
    models = [[s.params for s in run(x, cohorts, population)] for x in (a, b)]
    np.testing.assert_allclose(*models, rtol=1e-12)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("rule", "probabilities", "expected"),
    [
        (
            {"buffer": 1},
            1 / TIMES / np.sum(1 / TIMES),
            [
                (1.00000000, 0.78000000),
                (1.00000000, 0.60840000),
                (0.23000000, 0.62978889),
                (0.23000000, 0.49594089),
                (-0.70500000, -0.04030911),
                (-0.61559444, -0.14941611),
                (-1.01068640, 0.03680727),
            ],
        ),
        (
            {"interval": 3},
            1 / np.ceil(TIMES / 3),
            [
                (1.00000000, 0.88000000),
                (0.24000000, 0.59106667),
                (0.28813333, 0.52013867),
                (0.03592444, 0.39515269),
            ],
        ),
        (
            {"buffer": 2},
            2 / 3,
            [
                (0.68500000, 0.82875000),
                (0.45992500, 0.53332500),
                (0.25981650, 0.47551869),
                (0.16973219, 0.47930325),
            ],
        ),
    ],
    ids=["asynchronous", "fixed interval", "buffer"],
)
def test_golden_trace(rule, probabilities, expected):
    cohorts = samplers.deliveries(TIMES, len(expected), **rule).cohorts
    states = run(make("fedfix", probabilities=probabilities, **N), cohorts)
    np.testing.assert_allclose([s.params for s in states[1:]], expected, rtol=0, atol=1e-7)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("afa_cd", [(0.85752083, 0.90787500), (0.73678859, 0.75304125), (0.48439909, 0.69410410)]),
        ("afa_cs", [(0.90501389, 0.93858333), (0.72803567, 0.83876833), (0.55984988, 0.73995367)]),
    ],
)
def test_anarchic_golden_trace(name, expected):
    """Each step with its own numbers of local steps; the versions of its spec are those of the last delivery."""
    state, models = make(name, **N).init(jnp.asarray(Q3_START)), []
    for ids, steps in (([0, 1], [1, 3, 1]), ([2, 0], [2, 1, 2]), ([1, 2], [1, 1, 2])):
        state, _ = one_round(make(name, num_steps=np.array(steps), **N), state, ids)
        models.append(state.params)
    np.testing.assert_allclose(models, expected, rtol=0, atol=1e-7)


def test_with_everyone_at_every_step_they_are_fedavg():
    cohorts = samplers.deliveries(TIMES, 3, interval=6).cohorts
    np.testing.assert_array_equal(cohorts, FULL)
    for settings in ({}, {"probabilities": 1.0}):
        same_models(make("fedfix", server_lr=0.7, **settings, **N), make("fedavg", server_lr=0.7), cohorts)
    for name in ("afa_cd", "afa_cs"):
        same_models(make(name, server_lr=2.0, **N), make("fedavg"), cohorts)  # two local steps


def test_anarchic_averaging_of_unequal_work_is_fednova():
    work = {"num_steps": np.array([1, 2, 6])}
    for name in ("afa_cd", "afa_cs"):
        same_models(make(name, server_lr=3.0, **work, **N), make("fednova", **work), FULL)


def ramps():
    """Linear losses, whose gradients are the same everywhere: population, loss and slopes."""
    slopes = np.array([[1.0, 0.0], [0.0, 2.0], [-3.0, 1.0]])
    population = Population.from_clients([{"c": slopes[i : i + 1]} for i in range(3)])
    return population, lambda params, batch, key: batch["c"] @ params, slopes


def test_on_linear_losses_staleness_does_not_matter():
    population, loss, slopes = ramps()
    cohorts = samplers.deliveries(TIMES, 4, interval=3).cohorts  # {0}, {0, 1, 2}, {0}, {0, 1, 2}
    rates = 1 / np.ceil(TIMES / 3)
    states = run(make("fedfix", loss=loss, probabilities=rates, **N), cohorts, population)
    # Over a whole number of windows everyone has delivered with its weight in the objective.
    np.testing.assert_allclose(states[-1].params, Q3_START - 0.2 * 4 * slopes.mean(0), rtol=1e-12)

    anarchic = {name: run(make(name, loss=loss, **N), [[0, 1], [2], [0]], population) for name in ("afa_cd", "afa_cs")}
    steps = {name: np.diff([s.params for s in states], axis=0) for name, states in anarchic.items()}
    means = [slopes[[0, 1]].mean(0), slopes[2], slopes[0]]
    np.testing.assert_allclose(steps["afa_cd"], -0.1 * np.array(means), rtol=1e-12)
    np.testing.assert_allclose(steps["afa_cs"][1:], np.tile(-0.1 * slopes.mean(0), (2, 1)), rtol=1e-12)


def test_clients_start_from_the_model_they_received():
    for name in ("fedfix", "afa_cd", "afa_cs"):
        states = run(make(name, **N), [[0, 1], [2], [1]])
        models = [s.params for s in states]
        np.testing.assert_array_equal(states[2].starts.rows, [models[1], models[1], models[2]])
        np.testing.assert_array_equal(states[3].starts.rows, [models[1], models[3], models[2]])


@pytest.mark.parametrize("weights", ["examples", np.array([1.0, 5.0, 2.0])])
def test_the_mean_of_the_contributions_is_that_of_the_table(weights):
    states = run(make("afa_cs", weights=weights, **N), [[0, 1], [2, 0], [1]], q3_population((1, 2, 4)))
    p = np.array([1.0, 2.0, 4.0]) if isinstance(weights, str) else weights
    for state in states[1:]:
        np.testing.assert_allclose(state.mean, np.average(state.updates.rows, axis=0, weights=p), rtol=1e-12)


def test_without_a_server_step_only_the_table_changes():
    states = run(make("afa_cs", server_lr=0.0, **N), [[0, 1], [2]])
    np.testing.assert_array_equal(states[-1].params, Q3_START)
    g = np.einsum("nij,nj->ni", Q3_A, Q3_START - Q3_B)
    second = g - 0.1 * np.einsum("nij,nj->ni", Q3_A, g)
    np.testing.assert_allclose(states[-1].updates.rows, -0.1 * (g + second) / 2, rtol=1e-12)


def test_the_shares_of_the_steps_decide_where_it_goes():
    """Asynchronous, one local step, small rates: with identical weights fast clients count for more."""
    delivered = samplers.deliveries(np.array([1, 4, 16]), 8000, buffer=1)

    @jax.jit
    def limit(probabilities):
        algorithm = make("fedfix", lr=0.002, num_steps=1, probabilities=probabilities, **N)
        state, _ = simulate(algorithm, samplers.schedule(delivered.cohorts), 8000)(
            jnp.asarray(Q3_START), q3_population(), KEY
        )
        return state.params

    def optimum(p):
        return np.linalg.solve(np.einsum("n,nij->ij", p, Q3_A), np.einsum("n,nij,nj->i", p, Q3_A, Q3_B))

    np.testing.assert_allclose(limit(delivered.shares), Q3_OPTIMUM, atol=0.05)
    np.testing.assert_allclose(limit(np.full(3, 1 / 3)), optimum(delivered.shares), atol=0.05)
    assert np.linalg.norm(optimum(delivered.shares) - Q3_OPTIMUM) > 0.2


@pytest.mark.parametrize("name", ["fedfix", "afa_cd", "afa_cs"])
def test_one_model_goes_down_and_one_up(name):
    _, metrics = one_round(make(name, **N), make(name, **N).init(jnp.asarray(Q3_START)), [0, 1])
    assert (metrics.bytes_down, metrics.bytes_up) == (16, 16)
