"""Ditto and APFL, whose clients keep whole models: golden traces, plain loops, limits."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import algorithms
import fedjax_core as fc
from tests.algorithms.personalization import plain
from tests.algorithms.personalization.plain import POPULATION, SIZES
from tests.problems import assert_trees_close, assert_trees_equal, softmax_loss, softmax_params

SGD = optax.sgd(0.1)
COHORTS = ([0, 3, -1, 5], [1, 0, 4, 2])
LOCAL = {"batch_size": 2, "num_epochs": 2, "order": "sequential"}
OWN = LOCAL | {"num_clients": len(SIZES)}

# f_0 = 0.5 (x - 1)^2 and f_1 = 1.5 (x + 1)^2.
TWO = fc.Population.from_clients([{"a": np.ones(1), "b": np.ones(1)}, {"a": np.full(1, 3.0), "b": -np.ones(1)}])


def curved_loss(params, batch, key):
    return 0.5 * batch["a"] * jnp.square(params - batch["b"])


def run(method, start=None, population=POPULATION, cohorts=COHORTS):
    states, round = [method.init(softmax_params() if start is None else start)], jax.jit(method.round)
    for t, ids in enumerate(cohorts):
        states.append(round(states[-1], population.cohort(ids), jax.random.key(t))[0])
    return states


def test_golden_trace_of_ditto():
    method = algorithms.ditto(curved_loss, SGD, lam=1.0, num_clients=2, batch_size=1, num_steps=2)
    _, first, second = run(method, jnp.zeros(()), TWO, [[0, 1]] * 2)
    np.testing.assert_allclose(first.personal.rows, [0.18, -0.48], atol=1e-14)
    np.testing.assert_allclose(second.personal.rows, [0.2664, -0.6784], atol=1e-14)
    np.testing.assert_allclose([first.params, second.params], [-0.16, -0.264], atol=1e-14)


def test_golden_trace_of_apfl():
    method = algorithms.apfl(curved_loss, SGD, num_clients=2, batch_size=1, num_steps=2)
    _, first, second = run(method, jnp.zeros(()), TWO, [[0, 1]] * 2)
    np.testing.assert_allclose(first.personal.rows.v, [0.09625, -0.26625], atol=1e-14)
    np.testing.assert_allclose(first.personal.rows.alpha, [0.495375, 0.465125], atol=1e-14)
    np.testing.assert_allclose(second.personal.rows.v, [0.19669308, -0.46561463], atol=1e-8)
    np.testing.assert_allclose(second.personal.rows.alpha, [0.53991972, 0.48388943], atol=1e-8)
    np.testing.assert_allclose([first.params, second.params], [-0.16, -0.264], atol=1e-14)


@pytest.mark.parametrize("name", ["ditto", "apfl"])
def test_rounds_are_those_of_a_plain_loop(name):
    settings = {"lam": 0.7} if name == "ditto" else {"alpha": 0.3}
    method = getattr(algorithms, name)(softmax_loss, SGD, **settings, **OWN)
    state = run(method)[-1]
    x = plain.start()
    own = {i: (x, 0.3) for i in range(len(SIZES))}
    for ids in COHORTS:
        ends = []
        for i in (i for i in ids if i >= 0 and SIZES[i]):
            y, (v, a) = x, own[i]
            for batch in plain.batches(plain.client(POPULATION, i), 2, epochs=2):
                g = plain.loss_and_gradient(y, batch)[1]
                if name == "ditto":
                    g_v = plain.loss_and_gradient(v, batch)[1]
                    v = {k: v[k] - 0.1 * (g_v[k] + 0.7 * (v[k] - x[k])) for k in v}
                else:
                    u = {k: a * v[k] + (1 - a) * y[k] for k in v}
                    g_u = plain.loss_and_gradient(u, batch)[1]
                    apart = sum(np.sum((v[k] - y[k]) * g_u[k]) for k in v)
                    v, a = plain.stepped(v, g_u, 0.1 * a), float(np.clip(a - 0.1 * apart, 0, 1))
                y = plain.stepped(y, g, 0.1)
            own[i] = v, a
            ends.append(y)
        x = plain.mean(ends)
    assert_trees_close(state.params, x, rtol=1e-11, atol=1e-13)
    stacked = method.client_params(state, np.arange(len(SIZES)))
    found = fc.evaluate_view(lambda p, batch: softmax_loss(p, batch, None), method.personal, state, POPULATION)
    for i, (v, a) in own.items():
        expected = v if name == "ditto" else {k: a * v[k] + (1 - a) * x[k] for k in v}
        assert_trees_close(jax.tree.map(lambda leaf, i=i: leaf[i], stacked), expected, rtol=1e-11, atol=1e-13)
        if SIZES[i]:
            assert found[i] == pytest.approx(plain.loss(expected, plain.client(POPULATION, i)), rel=1e-11)


def test_own_models_are_trained_alone_at_the_limits_and_the_global_one_is_fedavg():
    alone = run(algorithms.local_only(softmax_loss, SGD, **OWN))[-1].personal.rows
    average = run(algorithms.fedavg(softmax_loss, SGD, **LOCAL))[-1].params
    free = run(algorithms.ditto(softmax_loss, SGD, lam=0.0, **OWN))[-1]
    held = run(algorithms.ditto(softmax_loss, SGD, lam=5.0, **OWN))[-1]
    own = run(algorithms.apfl(softmax_loss, SGD, alpha=1.0, adaptive=False, **OWN))[-1]
    none = run(algorithms.apfl(softmax_loss, SGD, alpha=0.0, adaptive=False, **OWN))
    assert_trees_close(free.personal.rows, alone, rtol=1e-13, atol=1e-15)
    assert_trees_close(own.personal.rows.v, alone, rtol=1e-13, atol=1e-15)
    for state in (free, held, own, none[-1]):
        assert_trees_close(state.params, average, rtol=1e-13, atol=1e-15)
    assert_trees_equal(none[-1].personal, none[0].personal)


def test_ditto_comes_to_rest_between_its_own_optimum_and_the_global_model():
    """v* = (a b + lam x) / (a + lam) for f = a (v - b)^2 / 2, the nearer to x the larger lam is; lr lam < 1."""
    lam, x = jnp.array([1.0, 9.0, 99.0]), 5.0

    @jax.jit
    @jax.vmap
    def own(lam):
        method = algorithms.ditto(
            curved_loss, optax.sgd(0.9 / (3 + lam)), lam=lam, server_lr=0.0, num_clients=2, batch_size=1, num_steps=99
        )
        return method.round(method.init(jnp.asarray(x)), TWO.cohort([0, 1]), jax.random.key(0))[0].personal.rows

    rows = own(lam)
    np.testing.assert_allclose(rows[:, 0], (1 * 1 + lam * x) / (1 + lam), rtol=1e-12)
    np.testing.assert_allclose(rows[:, 1], (3 * -1 + lam * x) / (3 + lam), rtol=1e-12)
    assert np.all(np.abs(rows[-1] - x) < 0.2)


def test_shares_of_apfl_stay_between_0_and_1_and_none_predicts_with_the_global_model():
    """Where its own model is far better, and where it is far worse, than the global one."""
    method = algorithms.apfl(curved_loss, optax.sgd(0.5), num_clients=2, batch_size=1, num_steps=3)
    begun, round = method.init(jnp.asarray(9.0)), jax.jit(method.round)
    for v, share in (([1.0, -1.0], [1, 1]), ([50.0, 50.0], [0, 0])):
        rows = begun.personal.rows._replace(v=jnp.array(v))
        state = begun._replace(personal=begun.personal._replace(rows=rows))
        state, _ = round(state, TWO.cohort([0, 1]), jax.random.key(0))
        np.testing.assert_array_equal(state.personal.rows.alpha, share)
    predicted = method.client_params(state, np.arange(2))
    np.testing.assert_array_equal(predicted, np.full(2, method.params(state)))


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("ditto", {"lam": -1.0}, "lam must lie in"),
        ("ditto", {"num_clients": 0}, "num_clients must be an integer of at least 1"),
        ("apfl", {"alpha": 1.5}, "alpha must lie in"),
        ("apfl", {"num_clients": 0}, "num_clients must be an integer of at least 1"),
    ],
)
def test_what_does_not_fit_is_named(name, settings, words):
    with pytest.raises(ValueError, match=words):
        getattr(algorithms, name)(softmax_loss, SGD, **{"num_clients": 2, **settings})
