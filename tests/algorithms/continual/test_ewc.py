"""EWC: traces of an independent program, the Fisher information, and what the penalties add up to."""

from functools import cache

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import algorithms
from fedjax_core import Plan, reference
from tests.problems import (
    FULL,
    Q3_A,
    Q3_B,
    Q3_START,
    assert_trees_close,
    assert_trees_equal,
    q3_population,
    quadratic_loss,
    softmax_loss,
    softmax_params,
    softmax_population,
)

KEY = jax.random.key(2)
SIZES = (3, 1, 0, 5)


def make(loss=softmax_loss, lr=0.1, **settings):
    return algorithms.ewc(loss, optax.sgd(lr), **({"batch_size": 2, "lam": 0.5} | settings))


@cache
def jitted():
    method = make()
    return method, jax.jit(method.round), jax.jit(method.events["end_task"].run)


def everyone(population):
    return population.cohort(np.arange(population.num_clients))


def ended(end_task, state, seeds=(1, 2), ids=(0, 1, 2, 3)):
    """The state after the ends of some tasks, the model moved in between."""
    for seed in seeds:
        state = end_task(state, softmax_population(SIZES, seed=seed).cohort(np.asarray(ids)), KEY)
        state = state._replace(params=jax.tree.map(lambda leaf: leaf * 1.1 + 0.01, state.params))
    return state


@pytest.mark.quick
def test_golden_trace():
    """Q3, two local steps of 0.1 a round: a round, the end of a task, two rounds at lam = 0.5, another end, a round.

    The independent program keeps the penalty of every task, with its own F_t and x_t.
    """
    method = make(quadratic_loss, batch_size=1, num_steps=2)
    round_fn, end_task = jax.jit(method.round), jax.jit(method.events["end_task"].run)
    state, x, penalties = method.init(jnp.asarray(Q3_START)), np.array(Q3_START), []
    for event in ("round", "end", "round", "round", "end", "round"):
        cohort = q3_population().cohort(FULL[0])
        if event == "end":
            state = end_task(state, cohort, KEY)
            gradients = np.einsum("nij,nj->ni", Q3_A, x - Q3_B)
            penalties.append(((gradients**2).mean(0), x))
            continue
        state, _ = round_fn(state, cohort, KEY)
        ends = []
        for A, b in zip(Q3_A, Q3_B, strict=True):
            y = x
            for _ in range(2):
                y = y - 0.1 * (A @ (y - b) + 0.5 * sum((F * (y - x_t) for F, x_t in penalties), np.zeros(2)))
            ends.append(y)
        x = np.mean(ends, 0)
        np.testing.assert_allclose(state.params, x, rtol=0, atol=1e-12)
    np.testing.assert_allclose(state.params, [0.29321257, 0.49048403], rtol=0, atol=1e-7)
    np.testing.assert_allclose(state.importance, sum(F for F, _ in penalties), rtol=1e-12)
    assert (state.task, state.round) == (2, 4)


def test_without_an_ended_task_it_is_fedavg():
    method, round_fn, _ = jitted()
    fedavg = algorithms.fedavg(softmax_loss, optax.sgd(0.1), batch_size=2)
    population = softmax_population(SIZES)
    state, metrics = round_fn(method.init(softmax_params()), everyone(population), KEY)
    expected, _ = jax.jit(fedavg.round)(fedavg.init(softmax_params()), everyone(population), KEY)
    assert_trees_equal(state.params, expected.params)
    assert (metrics.bytes_down, metrics.bytes_up) == (8 * 3 * 18, 8 * 18)


@pytest.mark.parametrize("weights", ["uniform", "examples"])
def test_importance_is_the_mean_squared_gradient_of_single_examples(weights):
    params, population = softmax_params(), softmax_population(SIZES)
    state = jax.jit(make(weights=weights).events["end_task"].run)(make().init(params), everyone(population), KEY)
    means, sizes = [], []
    for i in range(len(SIZES)):
        x, y = (np.asarray(population.client(i)[name]) for name in "xy")
        if len(x):
            p = np.asarray(jax.nn.softmax(x @ np.asarray(params["w"])))
            error = p - np.eye(3)[y]
            means.append({"w": (np.einsum("ni,nk->nik", x, error) ** 2).mean(0), "b": (error**2).mean(0)})
            sizes.append(len(x))
    w = np.ones(3) / 3 if weights == "uniform" else np.array(sizes) / sum(sizes)
    expected = jax.tree.map(lambda *leaves: sum(w_i * leaf for w_i, leaf in zip(w, leaves, strict=True)), *means)
    assert_trees_close(state.importance, expected, 1e-10)
    assert_trees_close(state.center, params, 1e-12)


def test_the_penalties_of_all_tasks_add_up_to_the_one_that_is_kept():
    """Their gradients do, everywhere: sum_t F_t (y - x_t) = F (y - c)."""
    method, _, end_task = jitted()
    state, before, parts = method.init(softmax_params()), method.init(softmax_params()).importance, []
    for seed in (1, 2, 3):
        x = state.params
        state = ended(end_task, state, seeds=[seed])
        parts.append((optax.tree.sub(state.importance, before), x))
        before = state.importance
    y = softmax_params(seed=9)
    each = [jax.tree.map(lambda F, y, x: F * (y - x), F, y, x) for F, x in parts]
    once = jax.tree.map(lambda F, y, c: F * (y - c), state.importance, y, state.center)
    assert_trees_close(once, jax.tree.map(lambda *leaves: sum(leaves), *each), 1e-9, 1e-12)


def test_a_strong_penalty_holds_what_matters_and_leaves_the_rest():
    """A parameter with importance F goes to the penalty's center, one without where FedAvg takes it."""
    method = make(quadratic_loss, lr=0.02, lam=10.0, batch_size=1, num_steps=5)
    state = method.init(jnp.zeros(2))._replace(importance=jnp.array([4.0, 0.0]), center=jnp.array([3.0, 3.0]))
    round_fn = jax.jit(method.round)
    for t in range(200):
        state, _ = round_fn(state, q3_population().cohort(FULL[0]), jax.random.fold_in(KEY, t))
    assert abs(state.params[0] - 3) < 0.2
    assert abs(state.params[1] - 3) > 2


def test_no_client_at_the_end_of_a_task_changes_nothing():
    method, _, end_task = jitted()
    state = ended(end_task, method.init(softmax_params()))
    population = softmax_population(SIZES, seed=5)
    for before in (method.init(softmax_params()), state):
        after = end_task(before, population.cohort(np.array([-1, 2, -1, -1])), KEY)
        assert_trees_equal(after._replace(task=before.task), before)
        assert after.task == before.task + 1
        chex.assert_tree_all_finite(after)


def test_every_plan_ends_a_task_like_a_plain_loop():
    mesh = jax.make_mesh((2,), ("clients",), devices=jax.devices()[:2])
    method, _, end_task = jitted()

    def end(end_task):
        return ended(end_task, method.init(softmax_params()), seeds=[1], ids=(3, -1, 0, 2))

    alone, on_mesh = end(end_task), end(jax.jit(make(plan=Plan(lanes=4, mesh=mesh)).events["end_task"].run))
    with reference.plain_loop():
        plain = end(method.events["end_task"].run)
    assert_trees_close(alone, plain, 1e-11, 1e-13)
    assert_trees_close(on_mesh, plain, 1e-11, 1e-13)


def test_ended_tasks_vmap_over_seeds_and_floats_like_a_loop():
    def run(lam, lr, key):
        method = make(lam=lam, server_lr=lr)
        state = ended(method.events["end_task"].run, method.init(softmax_params()), seeds=[1])
        return method.round(state, everyone(softmax_population(SIZES)), key)

    lam, lr, keys = jnp.array([0.5, 2.0]), jnp.array([1.0, 0.5]), jax.random.split(KEY, 2)
    together = jax.jit(jax.vmap(run))(lam, lr, keys)
    one_by_one = jax.jit(run)
    for m in range(2):
        expected = one_by_one(lam[m], lr[m], keys[m])
        assert_trees_close(jax.tree.map(lambda leaf, m=m: leaf[m], together), expected, 1e-11, 1e-12)


def test_float32_stays_float32():
    method, round_fn, end_task = jitted()
    first = method.init(softmax_params(dtype=np.float32))
    population = softmax_population(SIZES, dtype=np.float32)
    state, _ = round_fn(end_task(first, everyone(population), KEY), everyone(population), KEY)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, first)
