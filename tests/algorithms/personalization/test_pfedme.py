"""pFedMe: golden traces, a plain loop, the proximal point, and limits."""

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

COHORTS = ([0, 3, -1, 5], [1, 0, 4, 2])
LOCAL = {"batch_size": 2, "num_epochs": 2, "order": "sequential", "num_clients": len(SIZES)}

# f_0 = 0.5 (x - 1)^2 and f_1 = 1.5 (x + 1)^2.
TWO = fc.Population.from_clients([{"a": np.ones(1), "b": np.ones(1)}, {"a": np.full(1, 3.0), "b": -np.ones(1)}])


def curved_loss(params, batch, key):
    return 0.5 * batch["a"] * jnp.square(params - batch["b"])


def of_two(lr=0.005, **settings):
    settings = {"inner_lr": 0.01, "mu": 0.0, "num_clients": 2, "batch_size": 1, "num_steps": 2, **settings}
    return algorithms.pfedme(curved_loss, optax.sgd(lr), **settings)


def run(method, start, population, cohorts):
    states, round = [method.init(start)], jax.jit(method.round)
    for t, ids in enumerate(cohorts):
        states.append(round(states[-1], population.cohort(ids), jax.random.key(t))[0])
    return states


def test_golden_trace():
    _, first, second = run(of_two(), jnp.zeros(()), TWO, [[0, 1]] * 2)
    np.testing.assert_allclose(first.personal.rows, [0.05305612, -0.14788333], atol=5e-9)
    np.testing.assert_allclose(second.personal.rows, [0.04743825, -0.15293863], atol=5e-9)
    np.testing.assert_allclose([first.params, second.params], [-0.00593263, -0.01179150], atol=5e-9)


def test_golden_local_models():
    for client, w in ((0, 0.00650181), (1, -0.01836707)):
        state = run(of_two(), jnp.zeros(()), TWO, [[client, -1]])[-1]
        assert float(state.params) == pytest.approx(w, abs=5e-9)


def test_golden_trace_without_a_warm_start():
    state = run(of_two(warm_start=False), jnp.zeros(()), TWO, [[0, 1]])[-1]
    np.testing.assert_allclose(state.personal.rows, [0.03898972, -0.11191751], atol=5e-9)
    assert float(state.params) == pytest.approx(-0.00511140, abs=5e-9)


@pytest.mark.parametrize("warm_start", [True, False])
def test_rounds_are_those_of_a_plain_loop(warm_start):
    settings = {"lam": 2.0, "inner_lr": 0.2, "inner_steps": 3, "mu": 0.05, "beta": 0.7, "warm_start": warm_start}
    method = algorithms.pfedme(softmax_loss, optax.sgd(0.1), **settings, **LOCAL)
    state = run(method, softmax_params(), POPULATION, COHORTS)[-1]
    x = plain.start()
    own = dict.fromkeys(range(len(SIZES)), x)
    for ids in COHORTS:
        ends = []
        for i in (i for i in ids if i >= 0 and SIZES[i]):
            w = theta = x
            for batch in plain.batches(plain.client(POPULATION, i), 2, epochs=2):
                theta = theta if warm_start else w
                for _ in range(3):
                    g = plain.loss_and_gradient(theta, batch)[1]
                    theta = {k: v - 0.2 * (g[k] + 2.0 * (v - w[k]) + 0.05 * v) for k, v in theta.items()}
                w = {k: v - 0.1 * 2.0 * (v - theta[k]) for k, v in w.items()}
            own[i] = theta
            ends.append(w)
        x = {k: 0.3 * v + 0.7 * plain.mean(ends)[k] for k, v in x.items()}
    assert_trees_close(state.params, x, rtol=1e-11, atol=1e-13)
    stacked = method.client_params(state, np.arange(len(SIZES)))
    found = fc.evaluate_view(lambda p, batch: softmax_loss(p, batch, None), method.personal, state, POPULATION)
    for i, theta in own.items():
        assert_trees_close(jax.tree.map(lambda leaf, i=i: leaf[i], stacked), theta, rtol=1e-11, atol=1e-13)
        if SIZES[i]:
            assert found[i] == pytest.approx(plain.loss(theta, plain.client(POPULATION, i)), rel=1e-11)


def test_enough_inner_steps_lead_to_the_proximal_point_and_the_gradient_of_the_envelope():
    """theta* = (a b + lam w) / (a + lam), and w moves by lr lam (w - theta*)."""
    x, lam, lr = 5.0, 15.0, 0.02
    method = of_two(lr, lam=lam, inner_lr=0.05, inner_steps=60, num_steps=1)
    theta = (np.array([1.0, 3.0]) * [1.0, -1.0] + lam * x) / (np.array([1.0, 3.0]) + lam)
    state = run(method, jnp.asarray(x), TWO, [[0, 1]])[-1]
    np.testing.assert_allclose(state.personal.rows, theta, rtol=1e-12)
    assert float(state.params) == pytest.approx(np.mean(x - lr * lam * (x - theta)), rel=1e-12)


def test_the_global_model_stays_without_a_pull_or_without_a_step_of_the_server():
    @jax.jit
    @jax.vmap
    def last(lam, beta):
        method = algorithms.pfedme(softmax_loss, optax.sgd(0.1), lam=lam, beta=beta, **LOCAL)
        return method.round(method.init(softmax_params()), POPULATION.cohort(COHORTS[0]), jax.random.key(0))[0]

    state = last(jnp.array([0.0, 15.0]), jnp.array([1.0, 0.0]))
    for member in range(2):
        assert_trees_equal(jax.tree.map(lambda leaf, m=member: leaf[m], state.params), softmax_params())
    assert not np.array_equal(state.personal.rows["w"][0], state.personal.rows["w"][1])


def test_without_a_pull_the_own_model_is_trained_alone_from_the_global_one():
    method = algorithms.pfedme(softmax_loss, optax.sgd(0.1), lam=0.0, mu=0.0, inner_lr=0.1, inner_steps=1, **LOCAL)
    state = run(method, softmax_params(), POPULATION, COHORTS[:1])[-1]
    alone = run(algorithms.local_only(softmax_loss, optax.sgd(0.1), **LOCAL), softmax_params(), POPULATION, COHORTS[:1])
    assert_trees_close(state.personal.rows, alone[-1].personal.rows, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lam": -1.0}, "lam must lie in"),
        ({"inner_lr": -1.0}, "inner_lr must lie in"),
        ({"inner_steps": 0}, "inner_steps must be an integer of at least 1"),
        ({"mu": -1.0}, "mu must lie in"),
        ({"beta": -1.0}, "beta must lie in"),
        ({"num_clients": 0}, "num_clients must be an integer of at least 1"),
    ],
)
def test_what_does_not_fit_is_named(settings, words):
    with pytest.raises(ValueError, match=words):
        of_two(**settings)
