"""FedGELA against a plain loop, its worked example, and what absent classes have to do with it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import algorithms
import fedjax_core as fc
from algorithms.parts import classifiers
from fedjax_core import reference
from tests.algorithms.personalization import heads, plain
from tests.algorithms.personalization.heads import COUNTS, FREE, LOCAL, MODEL, SGD, TASK, labelled, run
from tests.algorithms.personalization.plain import POPULATION, SIZES
from tests.problems import assert_trees_close, assert_trees_equal

KEY = jax.random.key(7)
M3 = np.asarray(classifiers.etf_of(jnp.eye(3)))


def make(**settings):
    return algorithms.fedgela(TASK, SGD, **({"temperature": 0.5} | LOCAL | settings))


METHOD = make()


def step(y, own, batch, counts, temperature=0.5, unit=False):
    z = heads.represent(y, batch["x"])
    size = np.linalg.norm(z, axis=1, keepdims=True) if unit else 1.0
    by_class = y["kernel"] * (len(counts) * counts / counts.sum()) / temperature
    loss, error = heads.cross_entropy(z / size @ by_class, batch["y"])
    back = error @ by_class.T
    if unit:
        back = (back - z / size * (z / size * back).sum(1, keepdims=True)) / size
    return loss, {"body": heads.of_body(z, batch["x"], back)}, {}


@pytest.mark.parametrize("unit", [False, True])
def test_rounds_are_those_of_a_plain_loop(unit):
    method = make(unit_features=unit)
    state, losses = run(method, key=KEY)
    start = method.init(MODEL, KEY)

    def one(*arguments):
        return step(*arguments, unit=unit)

    x, _, expected = heads.plain_rounds(heads.flat(start.params), [{}] * len(SIZES), one)
    assert_trees_close(heads.flat(state.params), x, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(losses, expected, rtol=1e-10)
    assert_trees_equal(state.params["head"], start.params["head"])


def test_the_head_is_the_frame_and_stays_at_home():
    state = METHOD.init(MODEL, KEY)
    kernel = np.asarray(state.params["head"]["kernel"])
    np.testing.assert_allclose(kernel.T @ kernel, 1.5 * (np.eye(3) - 1 / 3), atol=1e-14)
    np.testing.assert_array_equal(state.params["head"]["bias"], 0)
    assert_trees_equal(METHOD.init(MODEL), METHOD.init(MODEL, jax.random.key(0)))
    _, metrics = heads.compiled(METHOD)(state, POPULATION.cohort([0, 3, -1, 5]), KEY)
    assert metrics.bytes_up == metrics.bytes_down == fc.num_bytes(MODEL["body"])


def after(h, counts, y, temperature=1.0, M=M3, lr=1.0):
    """(loss, gradient of h) of one step of the method on an example of class y, from clients' class counts.

    The other examples of the client are there to be counted: a batch is the first example.
    """
    rest = np.repeat(np.arange(3), np.asarray(counts) - np.eye(3, dtype=int)[y])
    population = labelled(np.concatenate([[y], rest]))
    local = {"batch_size": 1, "num_steps": 1, "order": "sequential"}
    method = algorithms.fedgela(FREE, optax.sgd(lr), temperature=temperature, **local)
    model = {"h": jnp.asarray(h, float), "head": {"kernel": jnp.asarray(M), "bias": jnp.zeros(3)}}
    with reference.plain_loop():  # nothing is compiled
        state, metrics = method.round(fc.ModelState(model, jnp.int32(0)), population.cohort([0]), KEY)
    return float(metrics.loss), (np.asarray(h) - np.asarray(state.params["h"])) / lr


def test_the_worked_example():
    h, counts = (1.0, 0, 0), (3, 1, 0)
    loss, gradient = after(h, counts, 0)
    assert loss == pytest.approx(0.24415542, abs=1e-8)
    np.testing.assert_allclose(gradient, (-0.42610943, 0.25524541, 0.17086402), atol=1e-8)
    assert after(h, counts, 1)[0] == pytest.approx(2.38745895, abs=1e-8)
    assert after(h, counts, 0, temperature=0.2)[0] == pytest.approx(0.00012467, abs=1e-8)
    assert after(h, counts, 1, temperature=0.2)[0] == pytest.approx(10.71664230, abs=1e-8)
    assert after(h, (1, 1, 1), 0)[0] == pytest.approx(0.46226458, abs=1e-8), "a balanced client has the global loss"


def test_an_absent_class_gives_no_gradient():
    """Another vector of a class that is not there leaves it bit for bit; it lies among those of classes that are."""
    h, counts = (0.3, -0.7, 0.2), (3, 1, 0)
    loss, gradient = after(h, counts, 1)
    other = M3.copy()
    other[:, 2] = (5.0, -2.0, 1.0)
    again, same = after(h, counts, 1, M=other)
    assert again == loss
    np.testing.assert_array_equal(same, gradient)
    inside = M3[:, :2] @ np.linalg.lstsq(M3[:, :2], gradient, rcond=None)[0]
    np.testing.assert_allclose(inside, gradient, atol=1e-14)


def test_temperature_divides_the_frame():
    np.testing.assert_allclose(
        after((1.0, 0.5, 0), (3, 1, 0), 1, temperature=0.4)[1],
        after((1.0, 0.5, 0), (3, 1, 0), 1, M=M3 / 0.4)[1],
        rtol=1e-13,
    )


def test_a_rotation_of_frame_and_features_changes_no_score():
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    h = np.array([0.3, -0.7, 0.2])
    loss, gradient = after(h, (3, 1, 0), 0)
    turned, other = after(rotation @ h, (3, 1, 0), 0, M=rotation @ M3)
    assert turned == pytest.approx(loss, rel=1e-13)
    np.testing.assert_allclose(other, rotation @ gradient, rtol=1e-12, atol=1e-14)


def test_a_client_of_one_class():
    values = []
    for h in ((0.1, 0, 0), (0.5, 0, 0), (1.0, 0, 0)):
        score = 3 * h[0] * M3[0, 0] / 2.0
        values.append(after(h, (4, 0, 0), 0, temperature=2.0)[0])
        assert values[-1] == pytest.approx(-np.log(np.exp(score) / (np.exp(score) + 2)), rel=1e-12)
    assert values[0] > values[1] > values[2]


def test_balanced_clients_train_as_fedavg_under_a_fixed_frame():
    x = np.random.default_rng(0).normal(size=(12, 5))
    population = fc.Population.from_sizes({"x": x, "y": np.tile(np.arange(3, dtype=np.int32), 4)}, [6, 6])
    state, losses = run(make(temperature=1.0), ([0, 1],) * 2, population, key=KEY)
    start = METHOD.init(MODEL, KEY).params

    def body_only(params, batch, key):
        return TASK({**params, "head": jax.lax.stop_gradient(start["head"])}, batch, key)

    expected, others = run(algorithms.fedavg(body_only, SGD, **LOCAL), ([0, 1],) * 2, population, start)
    np.testing.assert_allclose(state.params["body"], expected.params["body"], rtol=1e-12)
    np.testing.assert_allclose(losses, others, rtol=1e-12)


def test_scores_of_all_sum_to_zero():
    state, _ = run(METHOD, key=KEY)
    scores = np.asarray(TASK.outputs(METHOD.params(state), POPULATION.examples))
    np.testing.assert_allclose(scores.sum(1), 0, atol=1e-13)
    assert (scores.max(1) >= 0).all()


def test_a_client_predicts_with_its_shares_after_training():
    state, _ = run(METHOD, key=KEY)
    found = fc.evaluate_view(lambda p, b: TASK(p, b), METHOD.personal, state, POPULATION, adapt_on=POPULATION, key=KEY)
    for i, size in enumerate(SIZES):
        if not size:
            continue
        y, examples = heads.flat(state.params), plain.client(POPULATION, i)
        for batch in plain.batches(examples, 2, epochs=2):
            y = {k: v - 0.1 * step(y, {}, batch, COUNTS[i])[1].get(k, 0) for k, v in y.items()}
        scores = heads.represent(y, examples["x"]) @ y["kernel"] * (3 * COUNTS[i] / size)
        np.testing.assert_array_equal(scores[:, COUNTS[i] == 0], 0)
        assert found[i] == pytest.approx(heads.cross_entropy(scores, examples["y"])[0], rel=1e-10)


def test_a_client_without_training_examples_predicts_as_all():
    nobody = fc.Population.from_sizes(jax.tree.map(lambda leaf: leaf[:1], POPULATION.examples), [1, *[0] * 5])
    state = METHOD.init(MODEL, KEY)
    found = fc.evaluate_view(lambda p, b: TASK(p, b), METHOD.personal, state, POPULATION, adapt_on=nobody, key=KEY)
    expected = fc.evaluate_clients(lambda p, b: TASK(p, b), METHOD.params(state), POPULATION)
    np.testing.assert_allclose(found[1:], expected[1:], rtol=1e-12)


@pytest.mark.parametrize("rule", ["average", "personal"])
def test_a_model_with_statistics(rule):
    """The features that the frame is applied to are normalized, as in the released code."""
    import models

    task = models.task(models.cnn_bn((4, 4, 1), 3, channels=(2,), hidden=4))
    rng = np.random.default_rng(0)
    examples = {"x": rng.normal(size=(8, 4, 4, 1)), "y": np.arange(8, dtype=np.int32) % 3}
    population = fc.Population.from_sizes(examples, [4, 4])
    method = algorithms.fedgela(task, SGD, batch_size=4)
    method = fc.with_statistics(method, rule, num_clients=2 if rule == "personal" else None)
    state = method.init(task.init(KEY))
    new, metrics = jax.jit(method.round)(state, population.cohort([0, 1]), KEY)
    assert np.isfinite(metrics.loss)
    before, now = (jax.tree.leaves(method.params(s).statistics) for s in (state, new))
    assert all(np.abs(a - b).max() > 0 for a, b in zip(before, now, strict=True))
    found = fc.evaluate_view(task, method.personal, new, population, adapt_on=population, key=KEY)
    assert np.isfinite(found["loss"]).all()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: make(temperature=0.0), "temperature must lie in"),
        (lambda: make(server_lr=-1.0), "server_lr must lie in"),
        (
            lambda: METHOD.init({**MODEL, "head": {"kernel": jnp.zeros((2, 3)), "bias": jnp.zeros(3)}}),
            "a frame of 3 classes needs as many features, got 2",
        ),
    ],
)
def test_what_does_not_fit_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
