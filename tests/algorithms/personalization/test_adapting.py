"""Per-FedAvg and fine-tuned FedAvg against plain loops, and their invariants."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import algorithms
import fedjax_core as fc
import models
from algorithms.personalization.per_fedavg import parts_of
from tests.algorithms.personalization import plain
from tests.algorithms.personalization.plain import HELD_OUT, POPULATION, SIZES
from tests.problems import assert_trees_close, assert_trees_equal, softmax_loss, softmax_params

COHORTS = ([0, 3, -1, 5], [1, 0, 4, 2])
LOCAL = {"batch_size": 4, "num_epochs": 2, "order": "sequential"}
KEY = jax.random.key(3)

# f_0 = 0.5 (x - 1)^2 and f_1 = 1.5 (x + 1)^2.
TWO = fc.Population.from_clients(
    [{"a": np.array([1.0]), "b": np.array([1.0])}, {"a": np.array([3.0]), "b": -np.ones(1)}]
)


def curved_loss(params, batch, key):
    return 0.5 * batch["a"] * jnp.square(params - batch["b"])


def run(method, cohorts=COHORTS):
    state, round = method.init(softmax_params()), jax.jit(method.round)
    for t, ids in enumerate(cohorts):
        state, _ = round(state, POPULATION.cohort(ids), jax.random.key(t))
    return state


@pytest.mark.parametrize(
    ("form", "delta", "local", "mean"),
    [
        ("FO", 1e-3, (0.045, -0.105), -0.03),
        ("HF", 1e-3, (0.0405, -0.0735), -0.0165),
        ("HF-difference", 1e-3, (0.0405, -0.0735), -0.0165),
        ("HF-difference", 7.0, (0.0405, -0.0735), -0.0165),  # of a quadratic any difference is exact
    ],
)
def test_golden_trace(form, delta, local, mean):
    settings = {"inner_lr": 0.1, "form": form, "delta": delta, "batch_size": 1, "num_steps": 1}
    method = algorithms.per_fedavg(curved_loss, optax.sgd(0.05), **settings)
    round = jax.jit(method.round)
    for ids, expected in (([0, -1], local[0]), ([1, -1], local[1]), ([0, 1], mean)):
        state, _ = round(method.init(jnp.zeros(())), TWO.cohort(ids), KEY)
        assert float(method.params(state)) == pytest.approx(expected, abs=1e-12 if form == "HF-difference" else 1e-14)


@pytest.mark.parametrize(("form", "count"), [("FO", 2), ("HF", 3)])
def test_rounds_are_those_of_a_plain_loop(form, count):
    """Examples of a batch are dealt out one by one."""
    state = run(algorithms.per_fedavg(softmax_loss, optax.sgd(0.3), inner_lr=0.2, form=form, **LOCAL))
    x = plain.start()
    for ids in COHORTS:
        ends = []
        for i in (i for i in ids if i >= 0 and SIZES[i]):
            y = x
            for batch in plain.batches(plain.client(POPULATION, i), 4, epochs=2):
                rows = list(range(len(batch["y"])))
                dealt = [{k: v[rows[n::count] or rows[::count]] for k, v in batch.items()} for n in range(count)]
                z = plain.stepped(y, plain.loss_and_gradient(y, dealt[0])[1], 0.2)
                d = plain.loss_and_gradient(z, dealt[1])[1]
                if form == "HF":
                    d = plain.stepped(d, plain.hessian_times(y, dealt[2], d), 0.2)
                y = plain.stepped(y, d, 0.3)
            ends.append(y)
        x = plain.mean(ends)
    assert_trees_close(state.params, x, rtol=1e-11, atol=1e-13)


def test_differences_of_gradients_lead_to_the_product_with_the_hessian():
    def after(form, delta):
        settings = {"inner_lr": 0.2, "form": form, "delta": delta}
        return run(algorithms.per_fedavg(softmax_loss, optax.sgd(0.3), **settings, **LOCAL)).params["w"]

    exact, near, far = (
        after(form, delta) for form, delta in (("HF", 1e-3), ("HF-difference", 1e-4), ("HF-difference", 1.0))
    )
    np.testing.assert_allclose(near, exact, rtol=1e-6, atol=1e-8)
    assert np.max(np.abs(far - exact)) > 100 * np.max(np.abs(near - exact))


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("per_fedavg", {"form": "HF"}),
        ("per_fedavg", {"form": "HF-difference"}),
        ("pfedme", {"num_clients": 2}),
        ("fedagain", {"num_clients": 2}),
    ],
)
def test_they_train_models_with_running_statistics(name, settings):
    """By those of the first gradient of a step."""
    task = models.task(models.cnn_bn((4, 4, 1), 3, channels=(2,), hidden=2))
    examples = {"x": np.ones((5, 4, 4, 1), np.float32), "y": np.zeros(5, np.int32)}
    population = fc.Population.from_sizes(examples, [2, 3])
    method = getattr(algorithms, name)(task, optax.sgd(0.1), batch_size=2, **settings)
    method = fc.with_statistics(method, "average")
    state = method.init(task.init(KEY))
    new, _ = jax.eval_shape(method.round, state, population.cohort([0, 1]), KEY)
    assert jax.tree.structure(new) == jax.tree.structure(state)


def test_parts_of_a_batch_are_dealt_out():
    def dealt(real, count, size=5):
        mask = jnp.arange(size) < real
        batch = fc.Batch(
            {"n": jnp.where(mask, jnp.arange(size), 0)}, mask, KEY, jnp.int32(0), jnp.int32(0), jnp.int32(9)
        )
        return [part.examples["n"][part.mask].tolist() for part in parts_of(batch, count)]

    assert dealt(5, 2) == [[0, 2, 4], [1, 3]]
    assert dealt(5, 3) == [[0, 3], [1, 4], [2]]
    assert dealt(2, 3) == [[0], [1], [0]]
    assert dealt(1, 2) == [[0], [0]]
    assert dealt(1, 3, size=1) == [[0], [0], [0]]


def test_without_inner_steps_it_is_fedavg():
    """On one example a batch, which is all of its parts."""
    one = {"batch_size": 1, "num_epochs": 2, "order": "sequential"}
    expected = run(algorithms.fedavg(softmax_loss, optax.sgd(0.1), **one))
    for form in ("FO", "HF"):
        state = run(algorithms.per_fedavg(softmax_loss, optax.sgd(0.1), inner_lr=0.0, form=form, **one))
        assert_trees_close(state.params, expected.params, rtol=1e-13, atol=1e-15)


def adapted_by_hand(params, steps, lr):
    """Each client's model after plain descent on the batches of 4 that `steps` takes from those of an epoch."""
    models = []
    for i in range(len(SIZES)):
        y = jax.tree.map(np.asarray, params)
        for batch in steps(plain.batches(plain.client(POPULATION, i), 4)):
            y = plain.stepped(y, plain.loss_and_gradient(y, batch)[1], lr)
        models.append(y)
    return models


@pytest.mark.parametrize(
    ("method", "steps", "lr"),
    [
        (
            algorithms.per_fedavg(softmax_loss, optax.sgd(0.3), inner_lr=0.2, adapt_steps=3, **LOCAL),
            lambda epoch: (epoch * 3)[:3],
            0.2,
        ),
        (
            algorithms.fedavg_ft(softmax_loss, optax.sgd(0.1), tuning_epochs=2, **LOCAL),
            lambda epoch: epoch * 2,
            0.1,
        ),
        (
            algorithms.fedavg_ft(softmax_loss, optax.sgd(0.1), tuning_optimizer=optax.sgd(0.5), **LOCAL),
            lambda epoch: epoch,
            0.5,
        ),
    ],
    ids=["per_fedavg", "fedavg_ft", "fedavg_ft with an optimizer of its own"],
)
def test_clients_predict_after_adapting(method, steps, lr):
    """A client without training examples predicts with the global model."""
    state = run(method)
    metric = lambda params, batch: softmax_loss(params, batch, None)  # noqa: E731
    found = fc.evaluate_view(metric, method.personal, state, HELD_OUT, adapt_on=POPULATION, key=KEY)
    for i, model in enumerate(adapted_by_hand(method.params(state), steps, lr)):
        assert found[i] == pytest.approx(plain.loss(model, plain.client(HELD_OUT, i)), rel=1e-11)
    globally = fc.evaluate_view(metric, method.views["global"], state, HELD_OUT)
    assert globally[2] == found[2]
    assert globally[0] != found[0]


def test_fine_tuning_leaves_fedavg_as_it_is():
    assert_trees_equal(
        run(algorithms.fedavg_ft(softmax_loss, optax.sgd(0.1), **LOCAL)),
        run(algorithms.fedavg(softmax_loss, optax.sgd(0.1), **LOCAL)),
    )


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: algorithms.per_fedavg(softmax_loss, optax.sgd(0.1), inner_lr=-1.0), "inner_lr must lie in"),
        (lambda: algorithms.per_fedavg(softmax_loss, optax.sgd(0.1), form="second"), "form must be"),
        (lambda: algorithms.per_fedavg(softmax_loss, optax.sgd(0.1), delta=0.0), "delta must lie in"),
        (lambda: algorithms.per_fedavg(softmax_loss, optax.sgd(0.1), adapt_steps=0), "adapt_steps must be an integer"),
        (
            lambda: algorithms.fedavg_ft(softmax_loss, optax.sgd(0.1), tuning_epochs=0),
            "tuning_epochs must be an integer",
        ),
    ],
)
def test_what_does_not_fit_is_named(make, words):
    with pytest.raises(ValueError, match=words):
        make()
