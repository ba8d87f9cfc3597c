"""FedPer, FedRep and LG-FedAvg against plain loops, and what they come to at their limits."""

import chex
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

# Two clients with f_k = 0.5 (h_k th - b_k)^2 from th = 1, h = 0.5.
TWO = fc.Population.from_clients([{"b": np.array([1.0])}, {"b": np.array([-2.0])}])
START = {"th": jnp.asarray(1.0), "h": jnp.asarray(0.5)}
SGD = optax.sgd(0.1)
ONE = {"batch_size": 1, "num_clients": 2}

COHORTS = ([0, 3, -1, 5], [1, 0, 4, 2])
LOCAL = {"batch_size": 2, "num_epochs": 2, "order": "sequential", "num_clients": len(SIZES)}


def product_loss(params, batch, key):
    return 0.5 * jnp.square(params["h"] * params["th"] - batch["b"])


@pytest.mark.parametrize(
    ("method", "own", "shared", "rounds"),
    [
        (
            algorithms.fedper(product_loss, SGD, personal="h", **ONE),
            "h",
            "th",
            [((0.55, 0.25), 0.95), ((0.5953625, 0.0374375), 0.9351625)],
        ),
        (
            algorithms.fedrep(product_loss, SGD, personal="h", head_epochs=2, **ONE),
            "h",
            "th",
            [((0.595, 0.025), 1.0095175), ((0.67151908, -0.36306647), 1.04998503)],
        ),
        (
            algorithms.lg_fedavg(product_loss, SGD, shared="h", **ONE),
            "th",
            "h",
            [((1.025, 0.875), 0.4), ((1.0486, 0.781), 0.327425)],
        ),
    ],
    ids=["fedper", "fedrep", "lg_fedavg"],
)
def test_golden_traces(method, own, shared, rounds):
    state, round = method.init(START), jax.jit(method.round)
    for t, (rows, value) in enumerate(rounds):
        state, metrics = round(state, TWO.cohort([0, 1]), jax.random.key(t))
        np.testing.assert_allclose(state.personal.rows[own], rows, atol=1e-7)
        assert method.params(state)[shared] == pytest.approx(value, abs=1e-7)
        assert method.params(state)[own] == START[own]
        assert (metrics.bytes_up, metrics.bytes_down) == (8, 8), "only the shared part travels"
    stacked = method.client_params(state, [1, 0])
    np.testing.assert_array_equal(stacked[own], state.personal.rows[own][::-1])
    np.testing.assert_array_equal(stacked[shared], np.full(2, state.params[shared]))


def plain_rounds(phases, personal, cohorts=COHORTS, lr=0.1):
    """Rounds by loops: `phases` are (epochs, which parts move), the parts "w" and "b" of the softmax problem."""
    x = plain.start()
    rows = {i: {k: x[k] for k in personal} for i in range(len(SIZES))}
    losses = []
    for ids in cohorts:
        ends, means = [], []
        for i in (i for i in ids if i >= 0 and SIZES[i]):
            y, seen, counts = {**x, **rows[i]}, [], []
            for epochs, moving in phases:
                for batch in plain.batches(plain.client(POPULATION, i), 2, epochs):
                    value, g = plain.loss_and_gradient(y, batch)
                    y = plain.stepped(y, g, lr, moving)
                    seen.append(value)
                    counts.append(len(batch["y"]))
            rows[i] = {k: y[k] for k in personal}
            ends.append(y)
            means.append(np.average(seen, weights=counts))
        x = {k: v if k in personal else plain.mean(ends)[k] for k, v in x.items()}
        losses.append(np.mean(means))
    return x, rows, losses


def run(method, cohorts=COHORTS):
    state, losses, round = method.init(softmax_params()), [], jax.jit(method.round)
    for t, ids in enumerate(cohorts):
        state, metrics = round(state, POPULATION.cohort(ids), jax.random.key(t))
        losses.append(float(metrics.loss))
    return state, losses


@pytest.mark.parametrize(
    ("name", "settings", "personal", "phases"),
    [
        ("fedper", {"personal": "b"}, "b", [(2, "wb")]),
        ("lg_fedavg", {"shared": "w"}, "b", [(2, "wb")]),
        ("lg_fedavg", {"shared": "b"}, "w", [(2, "wb")]),
        ("fedrep", {"personal": "b", "head_epochs": 3}, "b", [(3, "b"), (2, "w")]),
        ("fedrep", {"personal": "b", "head_epochs": 0}, "b", [(2, "w")]),
    ],
)
def test_rounds_are_those_of_a_plain_loop(name, settings, personal, phases):
    state, losses = run(getattr(algorithms, name)(softmax_loss, SGD, **settings, **LOCAL))
    x, rows, expected = plain_rounds(phases, personal)
    assert_trees_close(state.params, x, rtol=1e-11, atol=1e-13)
    for i, row in rows.items():
        for key in personal:
            np.testing.assert_allclose(state.personal.rows[key][i], row[key], rtol=1e-11, atol=1e-13)
    np.testing.assert_allclose(losses, expected, rtol=1e-11)


def test_nothing_personal_is_fedavg_and_all_of_it_is_training_alone():
    plain = {k: v for k, v in LOCAL.items() if k != "num_clients"}
    expected, losses = run(algorithms.fedavg(softmax_loss, SGD, **plain))
    alone, _ = run(algorithms.local_only(softmax_loss, SGD, **LOCAL))
    for everything, nothing in (
        (algorithms.fedper(softmax_loss, SGD, personal=["w", "b"], **LOCAL), {"personal": ()}),
        (algorithms.lg_fedavg(softmax_loss, SGD, shared=(), **LOCAL), {"shared": ["w", "b"]}),
    ):
        name = "fedper" if "personal" in nothing else "lg_fedavg"
        state, ours = run(getattr(algorithms, name)(softmax_loss, SGD, **nothing, **LOCAL))
        assert_trees_equal(state.params, expected.params)
        assert ours == losses
        assert_trees_equal(run(everything)[0], alone)
    assert_trees_equal(alone.params, softmax_params())
    _, rows, _ = plain_rounds([(2, "wb")], "wb")
    for i, row in rows.items():
        for key in "wb":
            np.testing.assert_allclose(alone.personal.rows[key][i], row[key], rtol=1e-11, atol=1e-13)


def test_fedper_and_lg_fedavg_cut_a_model_into_the_same_parts():
    per = run(algorithms.fedper(softmax_loss, SGD, personal="b", **LOCAL))[0]
    lg = run(algorithms.lg_fedavg(softmax_loss, SGD, shared="w", **LOCAL))[0]
    assert_trees_equal(per, lg)


def test_parts_may_be_chosen_by_a_function_or_an_expression():
    import re

    one, two, three = (
        run(algorithms.fedper(softmax_loss, SGD, personal=where, **LOCAL))[0]
        for where in ("b", re.compile("b|c"), lambda path, leaf: leaf.ndim == 1)
    )
    assert_trees_equal(one, two)
    assert_trees_equal(one, three)


@pytest.mark.parametrize("name", ["fedper", "fedrep"])
def test_clients_predict_with_their_own_head(name):
    method = getattr(algorithms, name)(softmax_loss, SGD, personal="b", **LOCAL)
    state, _ = run(method)
    found = fc.evaluate_view(lambda p, batch: softmax_loss(p, batch, None), method.personal, state, POPULATION)
    for i, size in enumerate(SIZES):
        if size:
            own = {"w": state.params["w"], "b": state.personal.rows["b"][i]}
            expected = plain.loss(jax.tree.map(np.asarray, own), plain.client(POPULATION, i))
            assert found[i] == pytest.approx(expected, rel=1e-12)
    chex.assert_trees_all_equal(method.views["personal"].shared(state)["w"], state.params["w"])


def test_all_clients_fit_their_heads_after_the_last_round():
    method = algorithms.fedrep(softmax_loss, SGD, personal="b", head_epochs=3, **LOCAL)
    state, _ = run(method)
    after = fc.run_events(method, "after", state, POPULATION.cohort(np.arange(len(SIZES))), jax.random.key(9))
    assert_trees_equal(after.params, state.params)
    for i in range(len(SIZES)):
        model = {"w": np.asarray(state.params["w"]), "b": np.asarray(state.personal.rows["b"][i])}
        for batch in plain.batches(plain.client(POPULATION, i), 2, epochs=3):
            model = plain.stepped(model, plain.loss_and_gradient(model, batch)[1], 0.1, moving="b")
        np.testing.assert_allclose(after.personal.rows["b"][i], model["b"], rtol=1e-11, atol=1e-13)
    assert not algorithms.fedrep(softmax_loss, SGD, personal="b", head_epochs=0, **LOCAL).events


def test_heads_may_have_an_optimizer_of_their_own():
    method = algorithms.fedrep(softmax_loss, SGD, personal="b", head_optimizer=optax.sgd(0.0), **LOCAL)
    still = run(method)[0]
    assert_trees_equal(still.personal.rows["b"], jnp.zeros((len(SIZES), 3)))
    left = run(algorithms.fedrep(softmax_loss, SGD, personal="b", head_epochs=0, **LOCAL))[0]
    assert_trees_close(still.params, left.params, rtol=1e-13)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: algorithms.fedper(softmax_loss, SGD, num_clients=0), "num_clients must be an integer of at least 1"),
        (lambda: algorithms.fedrep(softmax_loss, SGD, num_clients=2, head_epochs=-1), "head_epochs must be"),
        (lambda: algorithms.fedrep(softmax_loss, SGD, num_clients=2, server_lr=-1.0), "server_lr must lie in"),
        (lambda: algorithms.lg_fedavg(softmax_loss, SGD, num_clients=2).init(softmax_params()), "'head' is no path"),
        (
            lambda: algorithms.fedper(softmax_loss, SGD, num_clients=2, personal="c").init(softmax_params()),
            "'c' is no path of the tree",
        ),
    ],
)
def test_what_does_not_fit_is_named(make, words):
    with pytest.raises(ValueError, match=words):
        make()
