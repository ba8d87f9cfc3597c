"""FedRoD against a plain loop, and what its two heads have to do with each other."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import algorithms
import fedjax_core as fc
from tests.algorithms.personalization import heads
from tests.algorithms.personalization.heads import COUNTS, LOCAL, MODEL, SGD, TASK, run
from tests.algorithms.personalization.plain import POPULATION, SIZES
from tests.problems import assert_trees_close, assert_trees_equal

NAMES = {"num_clients": len(SIZES)}


def make(**settings):
    return algorithms.fedrod(TASK, SGD, **(NAMES | LOCAL | settings))


METHOD = make()


def step(y, own, batch, counts):
    z = heads.represent(y, batch["x"])
    generic = z @ y["kernel"] + y["bias"]
    l_g, error = heads.cross_entropy(heads.balanced(generic, counts), batch["y"])
    l_p, own_error = heads.cross_entropy(generic + z @ own["kernel"] + own["bias"], batch["y"])
    body = heads.of_body(z, batch["x"], error @ y["kernel"].T)
    return l_g + l_p, {"body": body, **heads.of_head(z, error)}, heads.of_head(z, own_error)


@pytest.mark.parametrize("zero_start", [False, True])
def test_rounds_are_those_of_a_plain_loop(zero_start):
    state, losses = run(make(zero_start=zero_start))
    x = heads.flat(MODEL)
    own = {k: 0 * x[k] if zero_start else x[k] for k in ("kernel", "bias")}
    x, rows, expected = heads.plain_rounds(x, [own] * len(SIZES), step)
    assert_trees_close(heads.flat(state.params), x, rtol=1e-11, atol=1e-13)
    np.testing.assert_allclose(losses, expected, rtol=1e-11)
    found = state.personal.rows["head"]
    for key in ("kernel", "bias"):
        np.testing.assert_allclose(found[key], [row[key] for row in rows], rtol=1e-11, atol=1e-13)


def test_a_client_that_holds_all_classes_equally_often_takes_plain_steps():
    """Its generic part is then FedAvg's."""
    x = np.random.default_rng(0).normal(size=(6, 5))
    population = fc.Population.from_clients([{"x": x, "y": np.array([0, 1, 2, 0, 1, 2], np.int32)}])
    cohorts = ([0], [0])
    state, _ = run(algorithms.fedrod(TASK, SGD, num_clients=1, **LOCAL), cohorts, population)
    expected, _ = run(algorithms.fedavg(TASK, SGD, **LOCAL), cohorts, population)
    assert_trees_close(state.params, expected.params, rtol=1e-12)


def test_the_own_heads_move_nothing_of_the_model():
    """dl_p / dtheta = dl_p / dG = 0: other own heads leave the model as it is, bit for bit."""
    expected, _ = run(METHOD)
    state = METHOD.init(MODEL)
    rows = jax.tree.map(lambda leaf: 3 * leaf + 1, state.personal.rows)
    state = state._replace(personal=state.personal._replace(rows=rows))
    for t, ids in enumerate(heads.COHORTS):
        state, _ = heads.compiled(METHOD)(state, POPULATION.cohort(ids), jax.random.key(t))
    assert_trees_equal(state.params, expected.params)
    assert np.abs(state.personal.rows["head"]["bias"] - expected.personal.rows["head"]["bias"]).max() > 0.1


def test_own_heads_of_zero_predict_as_the_generic_one():
    method = make(zero_start=True)
    state = method.init(MODEL)
    stacked = method.client_params(state, np.arange(len(SIZES)))
    assert_trees_equal(stacked, fc.global_client_params(MODEL, np.arange(len(SIZES))))
    doubled = METHOD.client_params(METHOD.init(MODEL), [1])
    np.testing.assert_array_equal(doubled["head"]["kernel"][0], 2 * MODEL["head"]["kernel"])


def test_a_client_predicts_with_both_heads():
    state, _ = run(METHOD)
    found = fc.evaluate_view(TASK, METHOD.personal, state, POPULATION)["accuracy"]
    for i, size in enumerate(SIZES):
        if not size:
            continue
        examples = POPULATION.client(i)
        z = TASK.features(state.params, examples)
        own = {**state.params, "head": jax.tree.map(lambda leaf, i=i: leaf[i], state.personal.rows["head"])}
        scores = TASK.head(state.params, z) + TASK.head(own, z)
        assert found[i] == pytest.approx(float(np.mean(np.argmax(scores, 1) == examples["y"])), rel=1e-6)


def test_absent_classes_get_no_gradient_of_the_generic_risk():
    lonely = next(i for i, counts in enumerate(COUNTS) if (counts == 0).any() and counts.any())
    absent = np.flatnonzero(COUNTS[lonely] == 0)
    state, _ = run(METHOD, ([lonely],))
    np.testing.assert_array_equal(state.params["head"]["bias"][absent], MODEL["head"]["bias"][absent])
    assert np.all(state.personal.rows["head"]["bias"][lonely][absent] < MODEL["head"]["bias"][absent])


def test_bytes_are_those_of_the_model():
    state = METHOD.init(MODEL)
    _, metrics = heads.compiled(METHOD)(state, POPULATION.cohort([0, 3, -1, 5]), jax.random.key(0))
    assert metrics.bytes_up == metrics.bytes_down == fc.num_bytes(MODEL)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: algorithms.fedrod(heads.loss, SGD, num_clients=3), TypeError, "task must be a Task with features"),
        (lambda: make(num_clients=0), ValueError, "num_clients must be an integer of at least 1"),
        (lambda: make(server_lr=-1.0), ValueError, "server_lr must lie in"),
        (
            lambda: make().init({**MODEL, "head": {"kernel": jnp.zeros((3, 4)), "bias": jnp.zeros(3)}}),
            ValueError,
            "head must be one dense layer",
        ),
    ],
)
def test_what_does_not_fit_is_named(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_a_model_with_statistics_keeps_them_up_to_date():
    """And rounds are one pass over the body for each step: what the heads get is what the risk is of."""
    import models

    task = models.task(models.cnn_bn((8, 8, 1), 3, channels=(2,), hidden=4))
    rng = np.random.default_rng(0)
    examples = {"x": rng.normal(size=(8, 8, 8, 1)), "y": np.arange(8, dtype=np.int32) % 3}
    population = fc.Population.from_sizes(examples, [4, 4])
    method = algorithms.fedrod(task, optax.sgd(0.1), num_clients=2, batch_size=4)
    method = fc.with_statistics(method, "average")
    state = method.init(task.init(jax.random.key(0)))
    new, metrics = jax.jit(method.round)(state, population.cohort([0, 1]), jax.random.key(0))
    assert np.isfinite(metrics.loss)
    # Clients get statistics once, although a pass counts their classes before.
    begun = task.init(jax.random.key(0))
    assert metrics.bytes_down == metrics.bytes_up == fc.num_bytes(begun)
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), new.statistics, state.statistics)
    assert min(jax.tree.leaves(moved)) > 0
