"""Rounds of several passes: what their merged results say, and that methods count by them."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import algorithms
import fedjax_core as fc
from tests.problems import assert_trees_close, softmax_loss, softmax_params, softmax_population

POPULATION = softmax_population((3, 5, 0, 8, 2, 6))
COHORT = POPULATION.cohort([1, -1, 3, 2, 0])
KEY = jax.random.key(0)


def descent(lr, sent=3):
    """Clients that descend, report the loss of each step, and send some numbers."""
    gradient = jax.value_and_grad(lambda y, batch: jnp.mean((y - batch.examples["x"].sum(-1)) ** 2))

    def step(shared, carry, batch):
        y, losses = carry
        loss, g = gradient(y, batch)
        return (y - lr * g, losses.at[batch.step].set(loss)), loss

    return fc.ClientProgram(
        lambda shared, own, key: (own, jnp.full(16, jnp.nan)), step, lambda shared, carry: (jnp.zeros(sent), carry)
    )


@cache
def phases():
    return both(COHORT, COHORT)


@partial(jax.jit, static_argnames="weights")
def both(first, cohort, weights="uniform"):
    """Two passes, the second from where the first has ended."""
    options = {"weights": weights}
    one = fc.for_each_client(
        descent(0.1), jnp.zeros(4), first, KEY, jnp.zeros(5), work=fc.local_work(2, num_epochs=2), **options
    )
    shared = fc.Message(jnp.zeros(4), 0), jnp.zeros(1)
    other = fc.for_each_client(
        descent(0.2), shared, cohort, KEY, one.outputs[0], work=fc.local_work(3, num_steps=1), **options
    )
    return one, other


def test_the_loss_is_the_mean_over_the_steps_of_all_phases():
    passes = phases()
    merged = fc.merge_phases(*passes)
    np.testing.assert_array_equal(merged.steps, [6 + 1, 0, 8 + 1, 0, 4 + 1])
    for slot in (0, 2, 4):
        seen = [each.outputs[1][slot][: each.steps[slot]] for each in passes]
        one, other = (float(each.loss[slot]) for each in passes)
        assert min(map(jnp.min, seen)) <= min(one, other) <= max(one, other) <= max(map(jnp.max, seen))
        expected = (len(seen[0]) * one + len(seen[1]) * other) / merged.steps[slot]
        np.testing.assert_allclose(merged.loss[slot], expected, rtol=1e-14)
    np.testing.assert_array_equal(merged.loss[jnp.array([1, 3])], 0)
    np.testing.assert_array_equal(merged.weights, passes[0].weights)
    assert merged.executed_steps == passes[0].executed_steps + passes[1].executed_steps


def test_bytes_add_up_and_what_clients_have_already_adds_none():
    merged = fc.merge_phases(*phases())
    took_part = np.array([1, 0, 1, 0, 1])
    np.testing.assert_array_equal(merged.bytes_up, 2 * 3 * 8 * took_part)
    np.testing.assert_array_equal(merged.bytes_down, (4 + 1) * 8 * took_part)
    assert len(merged.aggregate) == len(merged.outputs) == 2


def test_of_other_passes_only_bytes_count():
    one, other = phases()
    merged = fc.merge_phases(other, bytes_of=[one])
    for field in ("loss", "steps", "weights"):
        np.testing.assert_array_equal(getattr(merged, field), getattr(other, field))
    np.testing.assert_array_equal(merged.bytes_up, one.bytes_up + other.bytes_up)
    np.testing.assert_array_equal(merged.bytes_down, one.bytes_down + other.bytes_down)
    assert_trees_close(merged.outputs, (other.outputs, one.outputs), rtol=0, atol=0)


def test_phases_merge_in_any_grouping():
    passes = [*phases(), phases()[0]]
    at_once, pairwise = fc.merge_phases(*passes), fc.merge_phases(fc.merge_phases(*passes[:2]), passes[2])
    fields = ("loss", "steps", "weights", "bytes_up", "bytes_down", "executed_steps")
    for field in fields:
        np.testing.assert_allclose(getattr(at_once, field), getattr(pairwise, field), rtol=1e-14)
    one = fc.merge_phases(passes[0])
    for field in fields:
        np.testing.assert_array_equal(getattr(one, field), getattr(passes[0], field))


def test_clients_of_one_phase_alone_count_by_it():
    """Half of the clients take part in the first phase and the others in the second."""
    chosen = jnp.array([True, False, False, False, True])
    passes = both(COHORT.only(chosen), COHORT.only(~chosen), weights="examples")
    merged = fc.merge_phases(*passes)
    np.testing.assert_array_equal(merged.weights, np.array([5, 0, 8, 0, 3]) / 4)  # over the mean size
    np.testing.assert_array_equal(merged.steps, [6, 0, 1, 0, 4])
    for field, one in (("loss", passes[0]), ("bytes_up", passes[0])):
        np.testing.assert_array_equal(getattr(merged, field)[chosen], getattr(one, field)[chosen])
        np.testing.assert_array_equal(getattr(merged, field)[~chosen], getattr(passes[1], field)[~chosen])
    metrics = fc.round_metrics(merged, COHORT, (), ())
    assert metrics.participants == 3
    np.testing.assert_allclose(metrics.loss, np.average(merged.loss, weights=[5, 0, 8, 0, 3]), rtol=1e-14)


def test_a_loss_of_no_steps_may_be_anything():
    one, other = phases()
    nothing = one._replace(steps=jnp.zeros_like(one.steps), loss=jnp.where(one.steps > 0, jnp.nan, 0))
    for merged in (fc.merge_phases(nothing, other), fc.merge_phases(other, nothing)):
        np.testing.assert_array_equal(merged.loss, other.loss)


def test_a_cohort_without_participants():
    nobody = POPULATION.cohort([-1] * 5)
    merged = fc.merge_phases(*both(nobody, nobody))
    metrics = fc.round_metrics(merged, nobody, jnp.zeros(2), jnp.zeros(2))
    assert np.isnan(metrics.loss)
    assert (metrics.bytes_up, metrics.bytes_down, metrics.participants, merged.steps.sum()) == (0, 0, 0, 0)


SIZE = 8 * (5 * 3 + 3)
"""Of the model, in bytes."""


@pytest.mark.parametrize(
    ("make", "up", "down"),
    [
        (lambda **o: algorithms.fedrep(num_clients=6, personal="b", head_epochs=2, **o), 120, 120),
        (lambda **o: algorithms.scaffold(num_clients=6, option="I", **o), 2 * SIZE, 2 * SIZE),
        (lambda **o: algorithms.ifca(num_clients=6, num_models=3, **o), SIZE + 4, 3 * SIZE),
    ],
)
def test_methods_of_several_passes_count_what_goes_down_once(make, up, down):
    method = make(loss_fn=softmax_loss, client_optimizer=optax.sgd(0.1), batch_size=8, order="sequential")
    _, metrics = jax.jit(method.round)(method.init(softmax_params(), KEY), COHORT, KEY)
    assert (metrics.bytes_up, metrics.bytes_down) == (up, down)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda one, other: fc.merge_phases(), ValueError, "there are no phases: pass the results of"),
        (lambda one, other: fc.merge_phases([one, other]), TypeError, r"phases\[0\] must be ClientResults, got list"),
        (lambda one, other: fc.merge_phases(one, other.loss), TypeError, r"phases\[1\] must be ClientResults"),
        (lambda one, other: fc.merge_phases(one, bytes_of=[()]), TypeError, r"bytes_of\[0\] must be ClientResults"),
        (lambda one, other: fc.merge_phases(one, bytes_of=other), TypeError, r"bytes_of must be a list"),
        (
            lambda one, other: fc.merge_phases(one, other._replace(steps=other.steps[:2])),
            ValueError,
            r"phases\[1\] is of a cohort of 2 slots, and phases\[0\] of 5: .*cohort.only",
        ),
    ],
)
def test_bad_input(call, error, match):
    with pytest.raises(error, match=match):
        call(*phases())
