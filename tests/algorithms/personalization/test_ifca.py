"""IFCA against plain loops, and its invariants."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import algorithms
import fedjax_core as fc
from tests.algorithms.personalization import plain
from tests.algorithms.personalization.plain import HELD_OUT, POPULATION, SIZES
from tests.problems import assert_trees_close, assert_trees_equal, softmax_loss, softmax_params

COHORTS = ([0, 3, -1, 5], [1, 0, 4, 2], [5, 4, 3, 1])
LOCAL = {"batch_size": 2, "num_epochs": 2, "order": "sequential", "num_clients": len(SIZES)}
SGD = optax.sgd(0.1)
KEY = jax.random.key(7)

# f_0 = 0.5 (x - 1)^2 and f_1 = 1.5 (x + 1)^2.
TWO = fc.Population.from_clients(
    [{"a": np.array([1.0]), "b": np.array([1.0])}, {"a": np.array([3.0]), "b": -np.ones(1)}]
)


def curved_loss(params, batch, key):
    return 0.5 * batch["a"] * jnp.square(params - batch["b"])


def models_of(state):
    return [{k: np.asarray(leaf)[j] for k, leaf in state.params.items()} for j in range(len(state.members))]


def run(method, state=None, cohorts=COHORTS):
    state, round = method.init(softmax_params(), KEY) if state is None else state, jax.jit(method.round)
    for t, ids in enumerate(cohorts):
        state, metrics = round(state, POPULATION.cohort(ids), jax.random.key(t))
    return state, metrics


def test_golden_choices_and_one_client_in_each_cluster_is_training_alone():
    method = algorithms.ifca(curved_loss, SGD, num_clients=2, batch_size=1, num_steps=2)
    state = method.init(jnp.zeros(()), KEY)._replace(params=jnp.array([1.0, -1.0]))
    round = jax.jit(method.round)
    new, _ = round(state, TWO.cohort([0, 1]), KEY)
    np.testing.assert_array_equal(new.choices.rows, [0, 1])
    np.testing.assert_array_equal(new.params, [1.0, -1.0])  # each is at its minimum

    state = state._replace(params=jnp.array([0.5, -0.5]))
    for t in range(2):
        state, metrics = round(state, TWO.cohort([0, 1]), jax.random.key(t))
    # Four steps each: the distance to the minimum shrinks by 1 - 0.1 a in each.
    np.testing.assert_allclose(state.params, [1 - 0.5 * 0.9**4, -1 + 0.5 * 0.7**4], rtol=1e-13)
    assert (metrics.bytes_up, metrics.bytes_down) == (8 + 4, 16)  # a model and the choice; both models
    np.testing.assert_array_equal(state.members, [1, 1])


@pytest.mark.parametrize("num_models", [2, 3])
def test_rounds_are_those_of_a_plain_loop(num_models):
    method = algorithms.ifca(softmax_loss, SGD, num_models=num_models, **LOCAL)
    state, round = method.init(softmax_params(), KEY), jax.jit(method.round)
    models = models_of(state)
    choices = [0] * len(SIZES)
    for t, ids in enumerate(COHORTS):
        ends = {}
        for i in (i for i in ids if i >= 0 and SIZES[i]):
            examples = plain.client(POPULATION, i)
            choices[i] = int(np.argmin([plain.loss(model, examples) for model in models]))
            y = models[choices[i]]
            for batch in plain.batches(examples, 2, epochs=2):
                y = plain.stepped(y, plain.loss_and_gradient(y, batch)[1], 0.1)
            ends.setdefault(choices[i], []).append(y)
        for j, ys in ends.items():
            models[j] = plain.mean(ys)
        state, _ = round(state, POPULATION.cohort(ids), jax.random.key(t))
        np.testing.assert_array_equal(state.choices.rows, choices)
        np.testing.assert_array_equal(state.members, [len(ends.get(j, ())) for j in range(num_models)])
        assert_trees_close(models_of(state), models, rtol=1e-11, atol=1e-13)
    assert len(set(choices)) > 1, "the problem is to have clusters"
    most = int(np.argmax([len(ends.get(j, ())) for j in range(num_models)]))
    assert_trees_close(method.params(state), models[most], rtol=1e-11, atol=1e-13)


def test_one_model_is_fedavg():
    state, _ = run(algorithms.ifca(softmax_loss, SGD, num_models=1, **LOCAL))
    plain = {k: v for k, v in LOCAL.items() if k != "num_clients"}
    expected, _ = run(algorithms.fedavg(softmax_loss, SGD, **plain))
    assert_trees_close(jax.tree.map(lambda leaf: leaf[0], state.params), expected.params, rtol=1e-14, atol=1e-16)


def test_models_in_another_order_are_chosen_in_that_order():
    method = algorithms.ifca(softmax_loss, SGD, num_models=3, **LOCAL)
    order = np.array([2, 0, 1])
    begun = method.init(softmax_params(), KEY)
    state, _ = run(method, begun, COHORTS[:1])
    other, _ = run(method, begun._replace(params=jax.tree.map(lambda leaf: leaf[order], begun.params)), COHORTS[:1])
    assert_trees_equal(other.params, jax.tree.map(lambda leaf: leaf[order], state.params))
    took_part = np.array([0, 3, 5])
    np.testing.assert_array_equal(order[np.asarray(other.choices.rows)[took_part]], state.choices.rows[took_part])


def test_a_model_that_nobody_chooses_stays_and_nan_is_chosen_by_nobody():
    method = algorithms.ifca(softmax_loss, SGD, num_models=3, **LOCAL)
    begun = method.init(softmax_params(), KEY)
    bad = jax.tree.map(lambda leaf: leaf.at[0].set(jnp.nan).at[1].set(100.0 * leaf[1] + 7), begun.params)
    state, _ = run(method, begun._replace(params=bad), COHORTS[:1])
    np.testing.assert_array_equal(state.choices.rows[np.array([0, 3, 5])], [2, 2, 2])
    for j in (0, 1):
        assert_trees_equal(*(jax.tree.map(lambda leaf, j=j: leaf[j], tree) for tree in (state.params, bad)))


def test_models_are_drawn_from_the_key():
    method = algorithms.ifca(softmax_loss, SGD, num_models=3, **LOCAL)
    with pytest.raises(ValueError, match=r"init\(params\) needs a key"):
        method.init(softmax_params())
    w = method.init(softmax_params(), KEY).params["w"]
    np.testing.assert_array_equal(w[0], softmax_params()["w"])
    for j in (1, 2):
        assert not np.array_equal(w[j], w[j - 1])
        np.testing.assert_array_equal(np.sort(w[j], axis=None), np.sort(w[0], axis=None))
    drawn = algorithms.ifca(
        softmax_loss,
        SGD,
        num_models=2,
        start=lambda key: {"w": jax.random.normal(key, (5, 3)), "b": jnp.ones(3)},
        **LOCAL,
    ).init(softmax_params(), KEY)
    np.testing.assert_array_equal(drawn.params["b"], [[0, 0, 0], [1, 1, 1]])


def test_clients_predict_with_the_model_that_their_training_examples_choose():
    method = algorithms.ifca(softmax_loss, SGD, num_models=3, **LOCAL)
    state, _ = run(method)
    found = fc.evaluate_view(
        lambda p, batch: softmax_loss(p, batch, None), method.personal, state, HELD_OUT, adapt_on=POPULATION, key=KEY
    )
    models = models_of(state)
    for i, size in enumerate(SIZES):
        best = int(np.argmin([plain.loss(m, plain.client(POPULATION, i)) for m in models])) if size else 0
        assert found[i] == pytest.approx(plain.loss(models[best], plain.client(HELD_OUT, i)), rel=1e-12)
    stacked = method.client_params(state, np.arange(len(SIZES)))
    assert_trees_equal(stacked, jax.tree.map(lambda leaf: leaf[state.choices.rows], state.params))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_models": 0}, "num_models must be an integer of at least 1"),
        ({"server_lr": -1.0}, "server_lr must lie in"),
        ({"num_clients": 0}, "num_clients must be an integer of at least 1"),
    ],
)
def test_what_does_not_fit_is_named(settings, words):
    with pytest.raises(ValueError, match=words):
        algorithms.ifca(softmax_loss, SGD, **{"num_clients": 2, **settings})
