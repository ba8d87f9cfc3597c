"""Tasks in the place of loss and metric functions."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import algorithms
from fedjax_core import Task, Weighted, as_task, evaluate, evaluate_clients, evaluate_personal, masks, testing

PROBLEM = testing.classification()


def right(params, batch):
    return {"right": jnp.argmax(batch["x"] @ params["w"] + params["b"], 1) == batch["y"]}


PLAIN = as_task(PROBLEM.loss_fn, right, lambda key: PROBLEM.params)


def test_a_plain_function_as_a_task_gives_the_same_program():
    """Rounds of a task are those of the function, equation by equation but for names."""

    def traced(loss_fn):
        method = algorithms.fedavg(loss_fn, optax.sgd(0.1), batch_size=4)
        cohort = PROBLEM.population.cohort([0, 1, 2])
        return jax.make_jaxpr(method.round)(method.init(PROBLEM.params), cohort, jax.random.key(0))

    assert str(traced(PLAIN)) == str(traced(PROBLEM.loss_fn))
    assert as_task(PLAIN) is PLAIN


def test_evaluations_take_a_task():
    population, params = PROBLEM.population, PLAIN.init(jax.random.key(0))
    assert float(evaluate(PLAIN, params, population.examples)["right"]) == float(
        evaluate(right, params, population.examples)["right"]
    )
    ids = jnp.arange(3)
    many = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), params)
    for by_task, by_function in (
        (evaluate_clients(PLAIN, params, population), evaluate_clients(right, params, population)),
        (evaluate_personal(PLAIN, many, population, ids), evaluate_personal(right, many, population, ids)),
    ):
        np.testing.assert_array_equal(by_task["right"], by_function["right"])
    alone = as_task(PROBLEM.loss_fn)
    np.testing.assert_allclose(
        evaluate(alone, params, population.examples)["loss"],
        PROBLEM.loss_fn(params, population.examples, None).mean(),
        rtol=1e-6,
    )


def windows():
    """A task on windows of tokens, float[B, T], whose values are both outputs and metric, counted by tokens."""

    def forward(params, examples, *, key, mask):
        seen.append(mask)
        return examples["x"] * params["w"], ()

    def loss(outputs, examples, mask):
        # Looks at the whole batch: the mean of the real rows.
        mean = jnp.sum(jnp.where(mask[:, None], outputs, 0)) / jnp.maximum(mask.sum(), 1)
        return jnp.sum(outputs, 1) - mean

    def metrics(outputs, examples, mask):
        tokens = (examples["x"] >= 0).sum(1)
        value = jnp.where(examples["x"] >= 0, outputs, 0).sum(1) / jnp.maximum(tokens, 1)
        return {"value": Weighted(value, tokens), "long": tokens > 1, "tokens": tokens}

    seen = []
    return Task(lambda key: {"w": jnp.ones(())}, forward, loss, metrics), seen


def test_metrics_count_tokens_and_may_be_bool_or_integer():
    task, _ = windows()
    x = np.array([[1.0, 2.0, 3.0], [5.0, -1.0, -1.0], [-1.0, -1.0, -1.0]])
    found = evaluate(task, {"w": jnp.ones(())}, {"x": x}, batch_size=2)
    assert float(found["value"]) == pytest.approx((1 + 2 + 3 + 5) / 4)
    assert float(found["long"]) == pytest.approx(1 / 3)
    assert float(found["tokens"]) == pytest.approx(4 / 3)


def test_the_mask_reaches_the_forward_pass_and_the_loss():
    task, seen = windows()
    mask = jnp.array([True, False])
    values = masks.call(task, {"w": 2.0}, {"x": jnp.array([[1.0], [7.0]])}, jax.random.key(0), mask=mask)
    assert seen[-1] is mask
    np.testing.assert_array_equal(values, [0.0, 12.0])  # the mean is that of the first row
    task({"w": 2.0}, {"x": jnp.ones((3, 1))})
    assert seen[-1].tolist() == [True] * 3


BAD = {
    "no function": (lambda: as_task("loss"), "loss_fn must be a function"),
    "no metric": (lambda: as_task(PROBLEM.loss_fn, 3), "metric_fn must be a function"),
    "metrics of a task": (lambda: as_task(PLAIN, right), r"dataclasses\.replace"),
    "no init": (lambda: as_task(PROBLEM.loss_fn).init(jax.random.key(0)), "give as_task one"),
    "no groups": (lambda: PLAIN.paths("norm"), "does not know which of its parameters are 'norm'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    make, message = BAD[case]
    with pytest.raises((TypeError, ValueError), match=message):
        make()
