"""FedETF against a plain loop, the values of its risk in closed form, and what a client makes of it at the end."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import algorithms
import fedjax_core as fc
from algorithms.parts import classifiers
from tests.algorithms.personalization import heads, plain
from tests.algorithms.personalization.heads import CLASSES, COUNTS, LOCAL, MODEL, SGD, TASK, run
from tests.algorithms.personalization.plain import POPULATION, SIZES
from tests.problems import assert_trees_close, assert_trees_equal

KEY = jax.random.key(7)
TUNING = {"alternations": 2, "alternation_epochs": 1}


def make(**settings):
    return algorithms.fedetf(TASK, SGD, **(TUNING | LOCAL | settings))


METHOD = make()
M3 = np.asarray(classifiers.etf_of(jnp.eye(3)))


def unit_scores(y, z, M):
    u = z @ y["kernel"] + y["bias"]
    size = np.linalg.norm(u, axis=1, keepdims=True)
    return u / size, size, y["scale"] * (u / size) @ M


def gradients(y, z, error, M):
    """Of scale, projection and M, and what goes back to the representation, from the error of the scores."""
    f, size, _ = unit_scores(y, z, M)
    of_f = y["scale"] * error @ M.T
    of_u = (of_f - f * (f * of_f).sum(1, keepdims=True)) / size
    own = {"scale": (error * (f @ M)).sum(), **heads.of_head(z, of_u)}
    return own, of_u @ y["kernel"].T, y["scale"] * f.T @ error


def step(M):
    def one(y, own, batch, counts):
        z = heads.represent(y, batch["x"])
        loss, error = heads.cross_entropy(heads.balanced(unit_scores(y, z, M)[2], counts), batch["y"])
        g, back, _ = gradients(y, z, error, M)
        return loss, g | {"body": heads.of_body(z, batch["x"], back)}, {}

    return one


def model_of(params):
    return {**heads.flat(params.model), "scale": np.asarray(params.scale)}


def test_rounds_are_those_of_a_plain_loop():
    state, losses = run(METHOD, key=KEY)
    start = METHOD.init(MODEL, KEY)
    x, _, expected = heads.plain_rounds(model_of(start.params), [{}] * len(SIZES), step(np.asarray(start.etf)))
    assert_trees_close(model_of(state.params), x, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(losses, expected, rtol=1e-10)
    assert_trees_equal(state.etf, start.etf)
    assert start.params.scale == 1


def test_a_client_trains_and_then_alternates_before_it_predicts():
    state, _ = run(METHOD, key=KEY)
    found = fc.evaluate_view(lambda p, b: TASK(p, b), METHOD.personal, state, POPULATION, adapt_on=POPULATION, key=KEY)
    for i, size in enumerate(SIZES):
        if not size:
            continue
        y, M, examples = model_of(state.params), np.asarray(state.etf), plain.client(POPULATION, i)
        for batch in plain.batches(examples, 2, epochs=2):
            _, g, _ = step(M)(y, {}, batch, COUNTS[i])
            y = {k: y[k] - 0.1 * g[k] for k in y}
        for on_M in (True, False) * 2:
            for batch in plain.batches(examples, 2):
                z = heads.represent(y, batch["x"])
                _, error = heads.cross_entropy(unit_scores(y, z, M)[2], batch["y"])
                g, _, of_M = gradients(y, z, error, M)
                if on_M:
                    M = M - 0.1 * of_M
                else:
                    y = y | {k: y[k] - 0.05 * g[k] for k in ("kernel", "bias")}
        z = heads.represent(y, examples["x"])
        scores = y["scale"] * (z @ y["kernel"] + y["bias"]) @ M
        assert found[i] == pytest.approx(heads.cross_entropy(scores, examples["y"])[0], rel=1e-9)


def risk(u, M, scale, counts, y=0):
    """Through the method: the loss of a step on one example whose projection is u, at a rate of 0."""
    model = {"h": jnp.asarray(u, float), "head": {"kernel": jnp.eye(3), "bias": jnp.zeros(3)}}
    method = algorithms.fedetf(heads.FREE, optax.sgd(0.0), batch_size=64, num_steps=1, order="sequential")
    state = method.init(model)
    state = state._replace(params=state.params._replace(scale=jnp.asarray(scale, float)), etf=jnp.asarray(M))
    labels = np.repeat(np.arange(3), counts)
    population = heads.labelled(labels)
    _, metrics = jax.jit(method.round)(state, population.cohort([0]), KEY)
    scores = scale * (np.asarray(u) / np.linalg.norm(u)) @ M + np.log(counts)
    expected = np.log(np.exp(scores).sum()) - scores[labels].mean()
    assert metrics.loss == pytest.approx(expected, rel=1e-12), "the mean over the client's classes"
    return np.log(np.exp(scores).sum()) - scores[y]


def test_values_in_closed_form():
    assert risk((2, 0, 0), M3, 1.0, (10, 5, 1)) == pytest.approx(0.16237357, abs=1e-8)
    assert risk((5, 0, 0), M3, 1.0, (10, 5, 1)) == pytest.approx(0.16237357, abs=1e-8), "the length of u is nothing"
    assert risk((2, 0, 0), M3, 1.0, (1, 1, 1)) == pytest.approx(0.46226458, abs=1e-8)
    for scale, expected in ((1.0, 0.36898114), (5.0, 0.00110556)):
        assert risk(M3[:, 0], M3, scale, (1, 1, 1)) == pytest.approx(expected, abs=1e-8)
        assert expected == pytest.approx(np.log(1 + 2 * np.exp(-scale * 3 / 2)), abs=1e-8)


def test_a_projection_of_zero_has_equal_scores():
    method = algorithms.fedetf(heads.FREE, SGD, batch_size=3)
    model = {"h": jnp.zeros(3), "head": {"kernel": jnp.eye(3), "bias": jnp.zeros(3)}}
    state, metrics = jax.jit(method.round)(method.init(model), heads.labelled([0, 1, 2]).cohort([0]), KEY)
    assert metrics.loss == pytest.approx(np.log(3), rel=1e-12)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))


def test_the_global_model_predicts_as_its_unit_scores():
    state, _ = run(METHOD, key=KEY)
    y, M = model_of(state.params), np.asarray(state.etf)
    examples = jax.tree.map(np.asarray, POPULATION.examples)
    _, size, scores = unit_scores(y, heads.represent(y, examples["x"]), M)
    outputs = np.asarray(TASK.outputs(METHOD.params(state), examples))
    np.testing.assert_allclose(outputs, size * scores, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(outputs.sum(1), 0, atol=1e-12)


def test_without_alternations_a_client_predicts_with_what_it_has_trained():
    method = make(alternations=0)
    state = method.init(MODEL, KEY)
    found = fc.evaluate_view(lambda p, b: TASK(p, b), method.personal, state, POPULATION, adapt_on=POPULATION, key=KEY)
    y, M, examples = model_of(state.params), np.asarray(state.etf), plain.client(POPULATION, 0)
    for batch in plain.batches(examples, 2, epochs=2):
        _, g, _ = step(M)(y, {}, batch, COUNTS[0])
        y = {k: y[k] - 0.1 * g[k] for k in y}
    scores = y["scale"] * (heads.represent(y, examples["x"]) @ y["kernel"] + y["bias"]) @ M
    assert found[0] == pytest.approx(heads.cross_entropy(scores, examples["y"])[0], rel=1e-10)


def test_the_frame_is_drawn_once_and_costs_nothing():
    state = METHOD.init(MODEL, KEY)
    assert state.etf.shape == (CLASSES, CLASSES)
    assert np.abs(state.etf - METHOD.init(MODEL).etf).max() > 0.1
    assert_trees_equal(METHOD.init(MODEL), METHOD.init(MODEL, jax.random.key(0)))
    _, metrics = heads.compiled(METHOD)(state, POPULATION.cohort([0, 3, -1, 5]), KEY)
    assert metrics.bytes_up == metrics.bytes_down == fc.num_bytes(state.params)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"alternations": -1}, "alternations must be an integer of at least 1"),
        ({"alternation_epochs": 0}, "alternation_epochs must be an integer of at least 1"),
        ({"etf_lr": -0.1}, "etf_lr must lie in"),
        ({"projection_lr": -0.1}, "projection_lr must lie in"),
    ],
)
def test_what_does_not_fit_is_named(settings, words):
    with pytest.raises(ValueError, match=words):
        make(**settings)
