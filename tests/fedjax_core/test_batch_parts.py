"""Parts of a batch that are all padding are not computed, and the numbers stay those of whole batches."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import algorithms
from fedjax_core import Plan, Population, client_mesh, place, replicated
from tests.problems import assert_trees_close, softmax_loss, softmax_params, softmax_population

SIZES = (1, 9, 4, 0, 13, 6)  # last batches of 1, 1, 4, 5 and 6 of 8
KEY = jax.random.key(4)
MODEL = softmax_params(dim=40, classes=16)


def masked(params, batch, key, mask):
    """A loss that looks at the whole batch, and is told which of its rows are examples."""
    out = batch["x"] @ params["w"]
    mean = jnp.sum(jnp.where(mask[:, None], out, 0), axis=0) / jnp.sum(mask)
    return jnp.sum((out - mean - params["b"]) ** 2, axis=-1)


def with_dropout(params, batch, key):
    kept = jax.random.bernoulli(key, 0.5, batch["x"].shape)
    return softmax_loss(params, {**batch, "x": jnp.where(kept, batch["x"], 0)}, key)


def trained(loss_fn, plan, order="shuffled", num_steps=None):
    method = algorithms.scaffold(
        loss_fn,
        optax.sgd(0.1, 0.9),
        num_clients=len(SIZES),
        batch_size=8,
        num_epochs=None if num_steps else 2,
        num_steps=num_steps,
        order=order,
        plan=plan,
    )
    clients, state = softmax_population(SIZES, dim=40, classes=16), method.init(MODEL)
    ids = jnp.array([4, 0, -1, 1, 5, 3, 2])
    if plan is not None and plan.mesh is not None:
        state, clients = place((state, clients), replicated(plan.mesh))
    return jax.jit(lambda state, clients: method.round(state, clients.cohort(ids), KEY))(state, clients)


@pytest.mark.parametrize("loss_fn", [softmax_loss, masked, with_dropout])
def test_numbers_are_those_of_whole_batches(loss_fn):
    assert_trees_close(trained(loss_fn, Plan(batch_parts=4)), trained(loss_fn, None), rtol=1e-12, atol=1e-13)


def test_in_every_plan():
    """Of more lanes, several devices, and batches that are always full."""
    usual = trained(softmax_loss, None)
    for plan in (Plan(3, batch_parts=2), Plan(mesh=client_mesh(2), batch_parts=2)):
        assert_trees_close(trained(softmax_loss, plan), usual, rtol=1e-12, atol=1e-13)
    full = partial(trained, softmax_loss, order="replacement", num_steps=3)
    assert_trees_close(full(Plan(batch_parts=8)), full(None), rtol=1e-12, atol=1e-13)


def test_only_parts_with_examples_are_computed():
    """Seen by a host callback in the loss, which is called for rows that are computed and no others."""
    rows = []

    def loss_fn(params, batch, key):
        jax.debug.callback(lambda x: rows.append(len(x)), batch["x"])
        return batch["x"] @ params

    clients = Population.from_clients([{"x": np.ones((n, 3))} for n in (1, 9, 4, 13)])
    method = algorithms.fedavg(loss_fn, optax.sgd(0.1), batch_size=8, num_epochs=1, plan=Plan(lanes=1, batch_parts=4))
    jax.block_until_ready(
        jax.jit(method.round)(method.init(jnp.zeros(3)), clients.cohort(jnp.arange(4)), jax.random.key(0))
    )
    jax.effects_barrier()
    assert sorted(rows) == [2, 2, 4, 6, 8, 8]


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (lambda: Plan(batch_parts=0), "batch_parts must be"),
        (lambda: Plan(batch_parts=3), r"batch_size=8 cannot be cut into batch_parts=3 equal parts: take a divisor"),
    ],
)
def test_parts_that_cannot_be(plan, message):
    with pytest.raises(ValueError, match=message):
        trained(softmax_loss, plan())
