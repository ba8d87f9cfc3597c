"""FedAU, FedAvg with known probabilities and MIFA: traces, the paper's recursion, and where each converges to."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import algorithms
from algorithms.parts.participation import interval_table, inverse_probabilities, mean_interval
from fedjax_core import Population, reference, samplers, simulate
from tests.problems import FULL, PART, Q3_A, Q3_B, Q3_OPTIMUM, Q3_START, q3_population, quadratic_loss

STEPS = {"batch_size": 1, "num_steps": 2}
N = {"num_clients": 3}
KEY = jax.random.key(0)


def make(name, lr=0.1, **settings):
    return getattr(algorithms, name)(quadratic_loss, optax.sgd(lr), **(STEPS | settings))


def run(algorithm, cohorts, population=None):
    """States before the first and after every round, and the last metrics, through the plain loop."""
    states = [algorithm.init(jnp.asarray(Q3_START))]
    with reference.plain_loop():
        for ids in cohorts:
            state, metrics = algorithm.round(states[-1], (population or q3_population()).cohort(ids), KEY)
            states.append(state)
    return states, metrics


def same_models(a, b, cohorts, population=None):
    models = [[s.params for s in run(x, cohorts, population)[0]] for x in (a, b)]
    np.testing.assert_allclose(*models, rtol=1e-12)


@pytest.mark.quick
def test_golden_trace():
    states, _ = run(make("fedau", cutoff=1000, **N), [[0, 1], [0, 2], [0, 1], [1, 2], [0]])
    np.testing.assert_allclose(
        [s.params for s in states[1:]],
        [
            (0.79000000, 0.88583333),
            (0.66900000, 0.68574375),
            (0.52831143, 0.63830718),
            (0.13337182, 0.52952268),
            (0.18825827, 0.46597996),
        ],
        rtol=0,
        atol=1e-7,
    )
    weights = [mean_interval(s.intervals.rows, s.round, 1000)[0] for s in states[:-1]]
    expected = [(1, 1, 1), (1, 1, 1), (1, 1, 2), (1, 1.5, 2), (1, 4 / 3, 2)]
    np.testing.assert_allclose(weights, expected, rtol=1e-12)


def weights_of(present, cutoff):
    """The weights before every round, float[rounds + 1, clients], of clients that are present as bool[rounds, clients].

    Row t uses the rounds before t.
    """

    def round(intervals, now):
        t, present = now
        weight, new = mean_interval(intervals, t, cutoff)
        return jax.tree.map(lambda old, new: jnp.where(present, new, old), intervals, new), weight

    present = jnp.asarray(np.concatenate([present, present[:1]]))
    start = interval_table(present.shape[1]).rows
    return np.asarray(jax.lax.scan(round, start, (jnp.arange(len(present), dtype=jnp.int32), present))[1])


def weights_of_the_paper(present, cutoff):
    """The same by the recursion of the paper, which goes over all clients in every round."""
    weight, count, since = np.ones(present.shape[1]), np.zeros(present.shape[1]), np.zeros(present.shape[1])
    rows = [weight]
    for t, now in enumerate(present, start=1):
        since = since + 1
        ends = now | (since == cutoff)
        mean = np.where(count == 0, since, (count * weight + since) / (count + 1))
        weight, count, since = np.where(ends, mean, weight), count + ends, np.where(ends, 0, since)
        np.testing.assert_allclose(np.where(count > 0, count * weight, 0) + since, t)
        rows.append(weight)
    return np.stack(rows)


@pytest.mark.parametrize("cutoff", [1, 2, 7, 50, 10**6])
def test_two_integers_of_participants_give_the_papers_recursion_over_all_clients(cutoff):
    rng = np.random.default_rng(cutoff)
    present = rng.random((120, 12)) < np.linspace(0, 1, 12) ** 2  # the first never, the last always
    np.testing.assert_allclose(weights_of(present, cutoff), weights_of_the_paper(present, cutoff), rtol=1e-12)


def test_regular_participation():
    rounds, m = 40, 4
    t = np.arange(rounds)
    present = np.stack([t % m == 0, t % m == m - 1, np.ones(rounds, bool)], axis=1)
    weights = weights_of(present, 50)
    seen = [int(present[:t, 0].sum()) for t in range(1, rounds + 1)]
    np.testing.assert_allclose(weights[1:, 0], [(1 + m * (n - 1)) / n for n in seen], rtol=1e-12)
    np.testing.assert_allclose(weights[m:, 1], m)
    np.testing.assert_allclose(weights[:, 2], 1)


@pytest.mark.parametrize(("cutoff", "expected"), [(20, (1 - 0.93**20) / 0.07), (10**6, 1 / 0.07)])
def test_weights_approach_the_inverse_probability(cutoff, expected):
    weights = weights_of(np.random.default_rng(0).random((2000, 400)) < 0.07, cutoff)[-1]
    # Five standard errors, and the last intervals, which are not over.
    assert abs(weights.mean() - expected) < 5 * weights.std() / 20 + expected**2 / 2000


def test_with_everyone_they_are_all_fedavg():
    for name, settings in (("fedau", N), ("fedavg_ipw", {}), ("mifa", N)):
        same_models(make(name, server_lr=0.7, **settings), make("fedavg", server_lr=0.7), FULL)


@pytest.mark.parametrize("weights", ["examples", np.array([1.0, 5.0, 2.0])])
def test_with_everyone_and_weights_too(weights):
    for name, settings in (("fedau", N), ("fedavg_ipw", {}), ("mifa", N)):
        same_models(
            make(name, weights=weights, **settings), make("fedavg", weights=weights), FULL, q3_population((1, 2, 4))
        )


def test_a_cutoff_of_one_is_the_average_over_all():
    same_models(make("fedau", cutoff=1, **N), make("fedavg_ipw"), PART)
    same_models(make("fedavg_ipw", server_lr=1.5), make("fedavg"), PART)  # two of three take part


def test_inverse_probabilities_in_double_precision():
    population = Population.from_sizes({"x": np.zeros(7)}, np.ones(7, int))
    cohort = population.cohort([4, -1, 0, 6])
    np.testing.assert_allclose(inverse_probabilities("uniform", cohort), 7 / 3, rtol=1e-15)
    rates = np.arange(1, 8) / 7
    np.testing.assert_allclose(inverse_probabilities(rates, cohort)[np.array([0, 2, 3])], [7 / 5, 7, 1], rtol=1e-15)


def test_known_probabilities_divide():
    rates = np.array([1.0, 0.5, 0.25])
    states, _ = run(make("fedavg_ipw", probabilities=rates, num_steps=1), PART)
    for ids, before, after in zip(PART, states, states[1:], strict=False):
        g = np.einsum("nij,nj->ni", Q3_A, before.params - Q3_B)
        np.testing.assert_allclose(after.params, before.params - 0.1 / 3 * np.sum((g / rates[:, None])[ids], axis=0))


def test_mifa_moves_by_the_mean_of_the_last_updates():
    h = np.zeros((3, 2))
    states, _ = run(make("mifa", num_steps=1, **N), PART)
    for ids, before, after in zip(PART, states, states[1:], strict=False):
        h[ids] = -0.1 * np.einsum("nij,nj->ni", Q3_A, before.params - Q3_B)[ids]
        np.testing.assert_allclose(after.params, before.params + h.mean(0), rtol=1e-12)


def test_only_fedavg_goes_to_a_wrong_point():
    """Client 0 always takes part, client 1 every second and client 2 every fourth round, with small steps."""
    t = np.arange(6000)
    cohorts = np.where(np.stack([t >= 0, t % 2 == 1, t % 4 == 2], axis=1), np.arange(3), -1)

    def optimum(weights):
        return np.linalg.solve(np.einsum("n,nij->ij", weights, Q3_A), np.einsum("n,nij,nj->i", weights, Q3_A, Q3_B))

    @partial(jax.jit, static_argnames="name")
    def limit(name, **settings):
        algorithm = make(name, lr=0.003, num_steps=1, **settings, **({} if "fedavg" in name else N))
        state, _ = simulate(algorithm, samplers.schedule(cohorts), len(t))(jnp.asarray(Q3_START), q3_population(), KEY)
        return state.params

    np.testing.assert_allclose(optimum(np.ones(3)), Q3_OPTIMUM)
    rates = np.array([1.0, 0.5, 0.25])
    for name, settings in (("fedau", {}), ("mifa", {}), ("fedavg_ipw", {"probabilities": rates})):
        np.testing.assert_allclose(limit(name, **settings), Q3_OPTIMUM, atol=0.02)
    # Its cohorts {0}, {0, 1}, {0, 2}, {0, 1} give the clients the weights 1 + 3/2, 2/2 and 1/2.
    np.testing.assert_allclose(limit("fedavg"), optimum([2.5, 1.0, 0.5]), atol=0.02)
    np.testing.assert_allclose(limit("fedavg_ipw", probabilities=np.ones(3)), optimum(rates), atol=0.02)
    assert np.linalg.norm(optimum([2.5, 1.0, 0.5]) - Q3_OPTIMUM) > 0.1
    assert np.linalg.norm(optimum(rates) - Q3_OPTIMUM) > 0.1


@pytest.mark.parametrize(("name", "settings"), [("fedau", N), ("fedavg_ipw", {}), ("mifa", N)])
def test_one_model_goes_down_and_one_up(name, settings):
    _, metrics = run(make(name, **settings), PART[:1])
    assert (metrics.bytes_down, metrics.bytes_up) == (16, 16)
