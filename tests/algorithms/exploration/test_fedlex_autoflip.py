"""FedLEx and AutoFLIP: the spec's figures, traces of independent NumPy programs, the exploration that they share."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import algorithms
import models
from algorithms.exploration.autoflip import export, keep
from algorithms.parts.exploration import Map, to_unit
from fedjax_core import ClientTable, reference
from tests.problems import (
    FULL,
    PART,
    Q3_A,
    Q3_B,
    Q3_START,
    assert_trees_close,
    q3_population,
    quadratic_loss,
    softmax_loss,
    softmax_params,
    softmax_population,
)

KEY = jax.random.key(0)
SGD = optax.sgd(0.1)
STEPS = {"batch_size": 1, "num_steps": 2, "order": "sequential"}
THREE = {"explore_epochs": 3, "patience": 3}
PAPER_G = np.array([2 / 3, 1 / 3])


def fedlex(lr=0.1, **settings):
    optimizer = settings.pop("optimizer", optax.sgd(lr))
    return algorithms.fedlex(quadratic_loss, optimizer, **{"momentum": 0.0, **STEPS, **THREE, **settings})


def plainly(function, *args):
    """The result of a function through the plain loop, which compiles nothing."""
    # Nor the branches of a conditional, which would be compiled anew in every step.
    with jax.disable_jit(), reference.plain_loop():
        return function(*args)


def explored(algorithm, ids=(0, 1, 2), start=Q3_START):
    return plainly(
        algorithm.events["explore"].run, algorithm.init(jnp.asarray(start)), q3_population().cohort(list(ids)), KEY
    )


def run(algorithm, cohorts, state=None):
    """States and metrics of every round."""
    population = q3_population()
    state = algorithm.init(jnp.asarray(Q3_START)) if state is None else state
    states, rows = [], []
    for ids in cohorts:
        state, metrics = plainly(algorithm.round, state, population.cohort(list(ids)), KEY)
        states.append(state)
        rows.append(metrics)
    return states, rows


def deviations():
    """D_i of Q3 after three steps, by the closed form."""
    found = []
    for a, b in zip(Q3_A, Q3_B, strict=True):
        end = b + np.linalg.matrix_power(np.eye(2) - 0.1 * a, 3) @ (Q3_START - b)
        found.append((Q3_START - end) ** 2)
    return np.array(found)


def guided(algorithm, guidance, start=Q3_START):
    """The state with this guidance G."""
    state = algorithm.init(jnp.asarray(start))
    return state._replace(maps=state.maps._replace(mean=jnp.asarray(guidance), explorers=jnp.int32(3)))


def remembered(algorithm, known):
    """The state in which the server keeps the maps of these of the three clients."""
    state = algorithm.init(jnp.asarray(Q3_START))
    rows = Map(jnp.asarray(deviations() * np.array(known)[:, None]), jnp.array(known))
    return state._replace(maps=state.maps._replace(explorers=jnp.int32(sum(known)), clients=ClientTable(rows)))


@pytest.mark.quick
def test_golden_maps():
    """The paper scales each map and averages, released code averages and scales."""
    expected = [(0, 0.238144), (0.73081127, 0.00223256), (0.431649, 0.18307702)]
    np.testing.assert_allclose(deviations(), expected, atol=1e-8)
    state = explored(fedlex())
    np.testing.assert_allclose(state.maps.mean, PAPER_G, atol=1e-12)
    assert state.maps.explorers == 3
    np.testing.assert_allclose(to_unit(jnp.asarray(deviations().mean(0))), (1, 0), atol=1e-12)


@pytest.mark.quick
@pytest.mark.parametrize("mode", ["step", "gradient"])
def test_golden_trace_fedlex(mode):
    algorithm = fedlex(mode=mode)
    states, rows = run(algorithm, FULL, guided(algorithm, PAPER_G))
    expected = [(0.73481481, 0.92527778), (0.53631855, 0.85890911), (0.38795286, 0.79958284)]
    np.testing.assert_allclose([s.params for s in states], expected, rtol=0, atol=1e-7)
    assert [float(m.extra.guidance) for m in rows] == pytest.approx([0.5] * 3)
    assert all((m.bytes_down, m.bytes_up) == (32, 16) for m in rows)


def test_golden_trace_fedlex_with_momentum_on_whole_updates():
    algorithm = fedlex(mode="final_delta", momentum=0.6, server_lr=0.8)
    states, rows = run(algorithm, PART, guided(algorithm, PAPER_G))
    x, v = Q3_START, np.zeros(2)
    for state, ids in zip(states, PART, strict=True):
        moves = [(np.linalg.matrix_power(np.eye(2) - 0.1 * Q3_A[i], 2) - np.eye(2)) @ (x - Q3_B[i]) for i in ids]
        v = 0.6 * v + 0.4 * PAPER_G * np.mean(moves, 0)
        x = x + 0.8 * v
        np.testing.assert_allclose(state.params, x, rtol=0, atol=1e-7)
    assert rows[0].bytes_down == 16  # the server scales


def test_maps_of_the_participants_guide_the_next_round():
    algorithm = fedlex(num_maps=3)
    states, rows = run(algorithm, [[0, 1], [1], [1, 2]], remembered(algorithm, [True, False, True]))
    scaled = np.array([(0, 1), (1, 0)])  # of clients 0 and 2; client 1 has not explored
    for state, mean in zip(states, (scaled[0], scaled[0], scaled[1]), strict=True):
        np.testing.assert_allclose(state.maps.mean, mean, atol=1e-12)
    assert [float(m.extra.guidance) for m in rows] == [1.0, 0.5, 0.5]
    plain, _ = run(algorithms.fedavg(quadratic_loss, optax.sgd(0.1), **STEPS), [[0, 1]])
    np.testing.assert_allclose(states[0].params, plain[0].params, rtol=1e-12)


@pytest.mark.parametrize("mode", ["step", "gradient", "final_delta"])
def test_without_an_exploration_it_is_fedavg_with_server_momentum(mode):
    got, rows = run(fedlex(mode=mode, momentum=0.5, server_lr=0.7), PART)
    server = {"momentum": 0.5, "server_lr": 0.7, "dampening": True}
    expected, _ = run(algorithms.fedavgm(quadratic_loss, optax.sgd(0.1), **server, **STEPS), PART)
    np.testing.assert_allclose([s.params for s in got], [s.params for s in expected], rtol=1e-12)
    assert rows[0].extra.explorers == 0


@pytest.mark.parametrize("mode", ["step", "gradient", "final_delta"])
def test_guidance_of_zero_freezes_and_a_constant_scales_the_rate(mode):
    algorithm = fedlex(mode=mode)
    states, _ = run(algorithm, FULL, guided(algorithm, (0.0, 0.5)))
    assert all(state.params[0] == 1 for state in states)
    if mode != "final_delta":
        slow = run(fedlex(0.04), FULL)[0]
        got = run(algorithm, FULL, guided(algorithm, (0.4, 0.4)))[0]
        np.testing.assert_allclose([s.params for s in got], [s.params for s in slow], rtol=1e-12)


def test_adam_undoes_the_scale_of_gradients_but_not_that_of_steps():
    def end(mode, guidance):
        algorithm = fedlex(mode=mode, optimizer=optax.adam(0.1, eps=1e-12), num_steps=5)
        return np.asarray(run(algorithm, [[1]], guided(algorithm, guidance, (1.0, 1.5)))[0][0].params)

    plain = end("gradient", (1.0, 1.0))
    np.testing.assert_allclose(end("gradient", (0.01, 0.3)), plain, atol=1e-7)
    assert np.all(np.abs(end("step", (0.01, 0.3)) - plain) > 0.1)


def test_only_the_shape_of_a_map_counts():
    rng = np.random.default_rng(0)
    tree = {"a": rng.random((3, 2)), "b": rng.random(4), "c": np.full(3, 0.2), "d": np.zeros(())}
    scaled = to_unit(jax.tree.map(jnp.asarray, tree))
    for name in ("a", "b"):
        np.testing.assert_allclose((scaled[name].min(), scaled[name].max()), (0, 1), rtol=1e-12)
        np.testing.assert_array_equal(np.argsort(scaled[name], axis=None), np.argsort(tree[name], axis=None))
    np.testing.assert_array_equal(scaled["c"], 1)
    np.testing.assert_array_equal(scaled["d"], 1)
    for factor in (1e-9, 1e9):
        assert_trees_close(to_unit(optax.tree.scale(factor, tree)), scaled, rtol=1e-9)


def epochs_explored(patience):
    """How far a client comes whose loss falls in its first epochs and rises after that, one step of 0.25 an epoch."""

    def loss_fn(params, batch, key):
        loss = jnp.maximum(1.0 - params, 0.5) + jnp.maximum(params - 0.9, 0.0) * 2
        return jnp.where(jnp.arange(1) < 1, jax.lax.stop_gradient(loss) - (params - jax.lax.stop_gradient(params)), 0)

    algorithm = algorithms.fedlex(
        loss_fn,
        optax.sgd(0.25),
        batch_size=4,
        order="sequential",
        explore_epochs=6,
        patience=patience,
        num_maps=3,
    )
    state = explored(algorithm, (0,), 0.0)
    return round(float(jnp.sqrt(state.maps.clients.rows.deviation[0])) / 0.25)


def test_patience():
    """The losses of the epochs are 1, .75, .5, .5, .7, 1.2, ...: the third is the last to set a minimum."""
    assert [epochs_explored(patience) for patience in (1, 2, 40)] == [4, 5, 6]


@cache
def of_softmax():
    """`explore(share, ids) -> Maps` of ten clients, two of them empty: compiled, for five slots, and as it is."""
    population = softmax_population((1, 5, 0, 3, 2, 1, 2, 1, 2, 0))

    def explore(share, ids):
        once = {"batch_size": 2, "explore_epochs": 3, "patience": 1, "order": "sequential"}
        algorithm = algorithms.fedlex(softmax_loss, optax.sgd(2.0), explorers=share, num_maps=10, **once)
        return algorithm.events["explore"].run(algorithm.init(softmax_params()), population.cohort(ids), KEY).maps

    return jax.jit(explore), explore


def test_the_compiled_exploration_is_that_of_a_plain_loop():
    """Unequal clients, an empty one and an empty slot; a rate at which some stop early. Without participants nothing
    changes."""
    compiled, plain = of_softmax()
    got = compiled(1.0, np.array([0, 1, 2, 3, -1]))
    assert_trees_close(got, plainly(plain, 1.0, jnp.array([3, 2, 1, 0])), rtol=1e-11, atol=1e-13)
    assert got.explorers == 3
    empty = compiled(1.0, np.array([2, 9, -1, -1, -1]))
    assert empty.explorers == 0
    assert all(np.all(leaf == 1) for leaf in jax.tree.leaves(empty.mean))
    assert not empty.clients.rows.known.any()


def test_a_share_of_the_population_explores():
    """In any cohort the same clients; a share of 0 is one client, if it is there and has examples."""
    compiled, _ = of_softmax()

    def who(share, *cohorts):
        return sum(np.asarray(compiled(share, np.array(ids)).clients.rows.known) for ids in cohorts)

    halves, others = ([0, 1, 2, 3, 4], [5, 6, 7, 8, 9]), ([9, 0, 3, -1, 5], [1, 2, 4, 6, 7], [8, -1, -1, -1, -1])
    np.testing.assert_array_equal(who(1.0, *halves), [1, 1, 0, 1, 1, 1, 1, 1, 1, 0])
    for share, count in ((0.5, 5), (0.3, 3), (0.0, 1)):
        some = who(share, *halves)
        np.testing.assert_array_equal(who(share, *others), some)
        assert count - 2 <= some.sum() <= count
        assert some.max() <= 1


def autoflip(optimizer=SGD, **settings):
    settings = {"momentum": 0.0, "threshold": 0.5, **STEPS, **THREE, **settings}
    return algorithms.autoflip(quadratic_loss, optimizer, **settings)


@pytest.mark.quick
def test_golden_trace_autoflip():
    """Q3's second coordinate moves less and is pruned: what is left is training of the first, with the second at 0."""
    algorithm = autoflip(momentum=0.6, server_lr=0.8)
    state = explored(algorithm)
    np.testing.assert_allclose(state.maps.mean, deviations().mean(0), atol=1e-12)
    np.testing.assert_array_equal(state.mask, [True, False])
    np.testing.assert_array_equal(state.params, [1, 0])
    states, rows = run(algorithm, PART, state)
    x, v = 1.0, 0.0
    for state, ids in zip(states, PART, strict=True):
        moves = []
        for i in ids:
            y = x
            for _ in range(2):
                y = y - 0.1 * (Q3_A[i, 0, 0] * (y - Q3_B[i, 0]) - Q3_A[i, 0, 1] * Q3_B[i, 1])
            moves.append(y - x)
        v = 0.6 * v + 0.4 * np.mean(moves)
        x = x + 0.8 * v
        np.testing.assert_allclose(state.params, (x, 0), rtol=0, atol=1e-7)
        assert state.params[1] == 0
    for m in rows:
        assert (m.bytes_up, m.bytes_down) == (8, 8)
        assert (m.extra.dense_bytes, m.extra.mask_bytes, m.extra.density, m.extra.explorers) == (16, 2 / 8, 0.5, 3)


def test_without_an_exploration_nothing_is_pruned():
    got, rows = run(autoflip(momentum=0.5, server_lr=0.7), PART)
    server = {"momentum": 0.5, "server_lr": 0.7, "dampening": True}
    expected, _ = run(algorithms.fedavgm(quadratic_loss, SGD, **server, **STEPS), PART)
    np.testing.assert_allclose([s.params for s in got], [s.params for s in expected], rtol=1e-12)
    assert (rows[0].bytes_up, rows[0].extra.explorers) == (16, 0)


def test_pruned_parameters_stay_0_on_clients_whatever_the_optimizer():
    """A loss that a client would not survive if the pruned parameter were not 0 in every step."""

    def loss_fn(params, batch, key):
        return quadratic_loss(params, batch, key) + jnp.where(params[1] == 0, 0, jnp.nan)

    optimizer = optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(0.1, weight_decay=0.1))
    algorithm = algorithms.autoflip(loss_fn, optimizer, batch_size=1, num_steps=3, order="sequential")
    state = algorithm.init(jnp.array([1.0, 0.0]))._replace(mask=jnp.array([True, False]))
    states, rows = run(algorithm, PART, state)
    assert all(np.isfinite(m.loss) for m in rows)
    assert all(s.params[1] == 0 and s.velocity[1] == 0 for s in states)


@pytest.mark.quick
def test_golden_mask():
    mask = keep({"a": jnp.array([0.0, 0.2]), "b": jnp.array([0.5, 1.0])}, 0.5, None)  # the quantile is .35
    np.testing.assert_array_equal(mask["a"], [False, False])
    np.testing.assert_array_equal(mask["b"], [True, True])


def test_the_share_that_is_pruned_is_the_threshold():
    rng = np.random.default_rng(0)
    guidance = {"a": jnp.asarray(rng.random((40, 5))), "b": jnp.asarray(rng.random(100))}
    for threshold in (0.0, 0.1, 0.3, 0.9):
        kept = sum(int(leaf.sum()) for leaf in jax.tree.leaves(keep(guidance, threshold, None)))
        assert abs(kept - 300 * (1 - threshold)) <= 1
        assert kept < 300  # the smallest is pruned even at 0


def test_whole_units_are_pruned_but_not_those_of_the_output():
    guidance = {
        "dense": {"kernel": jnp.array([[0.9, 0.9, 0.1, 0.0], [0.9, 0.0, 0.1, 0.0]]), "bias": jnp.full(4, 0.8)},
        "head": {"kernel": jnp.full((4, 2), 0.05), "bias": jnp.array([0.7, 0.01])},
        "scale": jnp.array([0.9, 0.3]),
    }
    # Of 24 entries the median is .05. The mean over the weights of the units is .9, .45, .1 and 0.
    mask = keep(guidance, 0.5, "head")
    np.testing.assert_array_equal(mask["dense"]["kernel"], [[1, 1, 1, 0], [1, 0, 1, 0]])
    np.testing.assert_array_equal(mask["dense"]["bias"], [1, 1, 1, 0])
    np.testing.assert_array_equal(mask["head"]["kernel"], np.zeros((4, 2)))
    np.testing.assert_array_equal(mask["head"]["bias"], [1, 0])
    np.testing.assert_array_equal(mask["scale"], [1, 1])
    np.testing.assert_array_equal(keep(guidance, 0.5, None)["dense"]["bias"], [1, 1, 1, 1])
    # A convolution [height, width, inputs, units], nested, whose second unit has a low mean but one large weight.
    filters = jnp.stack([jnp.full((2, 2, 1), 0.9), jnp.zeros((2, 2, 1)).at[0, 0, 0].set(1.0)], -1)
    block = {"block": {"conv": {"kernel": filters, "bias": jnp.array([0.9, 0.9])}}, "rest": jnp.full(20, 0.3)}
    mask = keep(block, 0.4, "block/head")
    np.testing.assert_array_equal(mask["block"]["conv"]["bias"], [1, 0])
    assert not mask["block"]["conv"]["kernel"][..., 1].any()
    assert mask["block"]["conv"]["kernel"][..., 0].all()


def test_masks_of_the_participants_prune_on_and_regrow_only_if_asked():
    """Client 0 moves along the second coordinate, client 1 along the first; together the first moves more."""
    for regrow, expected in ((False, [[False, False], [False, False]]), (True, [[False, True], [True, False]])):
        algorithm = autoflip(num_maps=3, regrow=regrow)
        start = remembered(algorithm, [True] * 3)._replace(mask=jnp.array([True, False]))
        states, rows = run(algorithm, [[0], [1]], start)
        np.testing.assert_array_equal([s.mask for s in states], expected)
        assert all(np.all(np.asarray(s.params)[~np.asarray(s.mask)] == 0) for s in states)
        assert [int(m.bytes_up) for m in rows] == [8, 8 if regrow else 0]


def prune_units(params, dead):
    """The model with these units of its layers at 0, and some single weights besides."""
    for name, units in dead.items():
        params[name]["kernel"][..., units] = 0
        params[name]["bias"][units] = 0
    params["head"]["kernel"][::3] = 0
    return params


def random_params(model):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), jax.eval_shape(model.init, KEY))


def test_the_exported_perceptron_is_smaller_and_gives_the_same():
    model = models.mlp((3, 2, 1), 3, hidden=(7, 5))
    params = prune_units(random_params(model), {"dense_0": [0, 3, 6], "dense_1": [1]})
    small = export(params, ["dense_0", "dense_1", "head"])
    assert [small[name]["kernel"].shape for name in ("dense_0", "dense_1", "head")] == [(6, 4), (4, 4), (4, 3)]
    x = np.random.default_rng(1).normal(size=(4, 3, 2, 1))
    smaller = models.mlp((3, 2, 1), 3, hidden=(4, 4))
    np.testing.assert_allclose(smaller.apply(small, x), model.apply(params, x), atol=1e-6)
    assert models.num_parameters(small) == models.num_parameters(jax.eval_shape(smaller.init, KEY))
    assert models.num_parameters(small) < models.num_parameters(params)


def test_the_exported_convolutional_network_is_smaller_and_gives_the_same():
    """The dense layer takes 2 x 2 pixels of the second convolution. One unit of the first stays, though it is 0."""
    model = models.cnn((8, 8, 1), 3, channels=(4, 5), hidden=6)
    params = prune_units(random_params(model), {"conv_0": [0, 1, 2, 3], "conv_1": [0, 4], "dense": [2]})
    small = export(params, ["conv_0", "conv_1", "dense", "head"])
    x = np.random.default_rng(1).normal(size=(4, 8, 8, 1))
    smaller = models.cnn((8, 8, 1), 3, channels=(1, 3), hidden=5)
    assert jax.tree.map(jnp.shape, small) == jax.tree.map(jnp.shape, jax.eval_shape(smaller.init, KEY))
    np.testing.assert_allclose(smaller.apply(small, x), model.apply(params, x), atol=1e-6)


def test_export_names_layers_that_do_not_follow_each_other():
    params = random_params(models.mlp((3, 2, 1), 3, hidden=(7, 5)))
    with pytest.raises(ValueError, match=r"head has 5 inputs, which is no multiple of the 7 units of dense_0"):
        export(params, ["dense_0", "head"])
