"""MOON: traces of an independent NumPy program, and the properties of the contrast."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import algorithms
from fedjax_core import Population, clients, reference
from tests.problems import FULL, PART, Q3_A, Q3_B, Q3_START, assert_trees_close, q3_population, quadratic_loss

STEPS = {"batch_size": 1, "num_steps": 2}
KEY = jax.random.key(0)


def q3_features(params, batch, key):
    """z = A_i (y - b_i)."""
    return jnp.einsum("bij,bj->bi", batch["A"], params - batch["b"])


def make(features=q3_features, loss_fn=quadratic_loss, lr=0.1, **settings):
    return algorithms.moon(loss_fn, optax.sgd(lr), features=features, num_clients=3, **{**STEPS, **settings})


def run(algorithm, cohorts, population=None, start=Q3_START):
    """States and metrics of every round, through the plain loop, which compiles nothing."""
    population = population or q3_population()
    state, states, rows = algorithm.init(jnp.asarray(start)), [], []
    with reference.plain_loop():
        for ids in cohorts:
            state, metrics = algorithm.round(state, population.cohort(ids), KEY)
            states.append(state)
            rows.append(metrics)
    return states, rows


def trace_by_hand(cohorts, mu, temperature, server_lr):
    """The global models of Q3 with z = A_i (y - b_i), from the derivative of the cosine written out."""

    def cosine(z, u):
        return z @ u / np.sqrt((z @ z) * (u @ u))

    def cosine_slope(z, u):
        return u / np.sqrt((z @ z) * (u @ u)) - cosine(z, u) * z / (z @ z)

    x, previous, models = Q3_START, [Q3_START] * 3, []
    for ids in cohorts:
        total = 0
        for i in ids:
            a, b, y = Q3_A[i], Q3_B[i], x
            for _ in range(2):
                z, z_g, z_p = (a @ (point - b) for point in (y, x, previous[i]))
                e_g, e_p = (np.exp(cosine(z, u) / temperature) for u in (z_g, z_p))
                p = e_g / (e_g + e_p)
                slope = (1 - p) / temperature * (cosine_slope(z, z_p) - cosine_slope(z, z_g))
                y = y - 0.1 * (a @ (y - b) + mu * a.T @ slope)
            previous[i] = y
            total = total + y
        x = x + server_lr * (total / len(ids) - x)
        models.append(x)
    return models


@pytest.mark.quick
@pytest.mark.parametrize("cohorts", [FULL, PART])
def test_golden_trace(cohorts):
    settings = {"mu": 3.0, "temperature": 0.4, "server_lr": 0.8}
    states, _ = run(make(**settings), cohorts)
    np.testing.assert_allclose([s.params for s in states], trace_by_hand(cohorts, **settings), rtol=0, atol=1e-7)


@pytest.mark.parametrize("cohorts", [FULL, PART])
def test_without_the_contrast_it_is_fedavg(cohorts):
    states, rows = run(make(mu=0.0, server_lr=0.5), cohorts)
    expected, metrics = run(algorithms.fedavg(quadratic_loss, optax.sgd(0.1), server_lr=0.5, **STEPS), cohorts)
    assert_trees_close([s.params for s in states], [s.params for s in expected], rtol=1e-12)
    assert_trees_close(rows, metrics, rtol=1e-12)


def contrast(z, previous, start, temperature=0.5, scale=1.0):
    """l_con of one example with the features `z(y)` at the global model `start`, and the step that it makes.

    The client has been at `previous` before, and the loss is 0 but for mu l_con with mu = 1.
    """
    algorithm = make(
        lambda params, batch, key: scale * z(params)[None],
        lambda params, batch, key: 0.0 * jnp.sum(params) * jnp.ones(1),
        lr=1.0,
        temperature=temperature,
        mu=1.0,
        num_steps=1,
    )
    population = Population.from_clients([{"x": np.zeros((1, 1))}] * 3)
    state = algorithm.init(jnp.asarray(start))
    state = state._replace(client_models=clients.client_table(3, jnp.asarray(previous)))
    with reference.plain_loop():
        after, metrics = algorithm.round(state, population.cohort([0]), KEY)
    return float(metrics.loss), np.asarray(after.params) - start


def test_value_of_the_contrast():
    """At y = x it is log(1 + e^((cos(z, z_p) - 1) / T)): the global model's cosine is 1 there."""
    angle = np.array([0.6, 0.8])
    for temperature in (0.1, 0.5, 2.0):
        value, _ = contrast(lambda y: y, angle, np.array([1.0, 0.0]), temperature)
        np.testing.assert_allclose(value, np.log1p(np.exp((0.6 - 1) / temperature)), rtol=1e-12)
        assert np.log1p(np.exp(-2 / temperature)) <= value <= np.log(2)


def test_three_different_representations():
    """z = (1, 0), z_g = (.6, .8), z_p = (0, 1) at T = 0.5: the second of two steps, of which the first goes from z_g
    to z on the loss alone."""

    def loss_fn(params, batch, key):
        return jnp.where(batch["x"][:, 0] == 0, params @ jnp.array([-0.4, 0.8]), 0.0)

    algorithm = algorithms.moon(
        loss_fn,
        optax.sgd(1.0),
        features=lambda params, batch, key: params[None] * (batch["x"] > 0),
        num_clients=1,
        temperature=0.5,
        batch_size=1,
        order="sequential",
    )
    population = Population.from_clients([{"x": np.array([[0.0], [1.0]])}])
    state = algorithm.init(jnp.array([0.6, 0.8]))
    state = state._replace(client_models=clients.client_table(1, jnp.array([0.0, 1.0])))
    _, metrics = algorithm.round(state, population.cohort([0]), KEY)
    first = 0.6 * -0.4 + 0.8 * 0.8 + np.log(2)  # all representations are zeros, all cosines 0
    np.testing.assert_allclose(2 * metrics.loss - first, 0.26328247, atol=1e-8)


def test_a_previous_model_that_looks_like_the_global_one_has_no_pull():
    """Whatever the parameters, if the representations agree: here they leave out the last parameter."""
    value, step = contrast(lambda y: y[:2], np.array([0.6, 0.8, 5.0]), np.array([0.6, 0.8, -1.0]))
    np.testing.assert_allclose(value, np.log(2), rtol=1e-12)
    np.testing.assert_allclose(step, 0, atol=1e-15)


def test_the_pull_is_away_from_the_previous_representation():
    """Its slope in cos(z, z_p) is (1 - p) / T; in cos(z, z_g) it is at a maximum, so it has no part in the step."""
    value, step = contrast(lambda y: y, np.array([0.6, 0.8]), np.array([1.0, 0.0]))
    p = np.exp(-value)
    np.testing.assert_allclose(step, [0, -(1 - p) / 0.5 * 0.8], atol=1e-12)


def test_the_length_of_the_representations_does_not_matter():
    start, previous = np.array([1.0, 0.5]), np.array([-0.3, 2.0])
    value, step = contrast(jnp.sin, previous, start)
    for scale in (1e-6, 1e6):
        scaled_value, scaled_step = contrast(jnp.sin, previous, start, scale=scale)
        np.testing.assert_allclose(scaled_value, value, rtol=1e-12)
        np.testing.assert_allclose(scaled_step, step, rtol=1e-9)


def test_representations_of_zeros_give_no_pull_and_no_nan():
    value, step = contrast(lambda y: 0.0 * y, np.array([0.6, 0.8]), np.array([1.0, 0.0]))
    np.testing.assert_allclose(value, np.log(2), rtol=1e-12)
    np.testing.assert_array_equal(step, 0)


def test_clients_remember_their_own_last_model():
    algorithm = make(mu=3.0)
    states, _ = run(algorithm, PART)
    alone, _ = run(make(mu=3.0), PART[:1, :1])  # client 0 in the first round, by itself
    np.testing.assert_allclose(states[0].client_models.rows[0], alone[0].params, rtol=1e-12)
    np.testing.assert_array_equal(states[0].client_models.rows[2], Q3_START)
    np.testing.assert_array_equal(states[1].client_models.rows[0], states[0].client_models.rows[0])


def test_bytes_down_and_up():
    _, rows = run(make(), FULL[:1])
    assert (rows[0].bytes_down, rows[0].bytes_up) == (16, 16)
