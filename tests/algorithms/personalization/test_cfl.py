"""Clustered federated learning against a program of NumPy and scipy, and its invariants."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.cluster import hierarchy
from scipy.spatial import distance

import algorithms
import fedjax_core as fc
from tests.algorithms.personalization.plain import POPULATION, SIZES
from tests.problems import assert_trees_close, rounds, softmax_loss, softmax_params

KEY = jax.random.key(0)
LR = 0.5

# Clients whose update is the same in every round.
UPDATES = np.array([[1.0, 0.0], [0.9, 0.1], [-1.0, 0.2], [-0.8, -0.1]])
STEADY = fc.Population.from_clients([{"u": u[None]} for u in UPDATES])

# Clients that come to rest at points of their own: a tree of pairs.
POINTS = np.array([[a + b + c for c in (-0.5, 0.5)] for a in (-6.0, 6.0) for b in (-2.0, 2.0)]).ravel()
POINTS = np.stack([POINTS, np.arange(8) / 10], 1)[[0, 4, 2, 6, 1, 5, 3, 7]]
RESTING = fc.Population.from_clients([{"b": point[None]} for point in POINTS])


def steady_loss(params, batch, key):
    return -batch["u"] @ params


def resting_loss(params, batch, key):
    return 0.5 * jnp.sum(jnp.square(params - batch["b"]), axis=1)


def of_steady(**settings):
    settings = {"num_clients": 4, "num_models": 2, "eps1": 0.4, "eps2": 1.0, "wait": 0, **settings}
    return algorithms.cfl(steady_loss, optax.sgd(1.0), batch_size=1, num_steps=1, **settings)


def of_resting(**settings):
    settings = {"num_clients": 8, "num_models": 8, "eps1": 0.05, "eps2": 0.3, "wait": 2, **settings}
    return algorithms.cfl(resting_loss, optax.sgd(LR), batch_size=1, num_steps=1, **settings)


RESTING_ROUND = jax.jit(of_resting().round)


def by_hand(points, num_rounds, k, eps1, eps2, wait):
    """(clusters, models of every client, number of clusters waiting) after each round, in NumPy and scipy."""
    models, clusters, told = [np.zeros(2)], np.zeros(len(points), int), []
    for t in range(num_rounds):
        d = LR * (points - np.array([models[c] for c in clusters]))
        waiting = 0
        for c in range(len(models)):
            own = np.flatnonzero(clusters == c)
            norms = np.linalg.norm(d[own], axis=1)
            if t >= wait and np.linalg.norm(d[own].mean(0)) < eps1 and norms.max() > eps2 and len(own) > 2:
                if len(models) == k:
                    waiting += 1
                    continue
                tree = hierarchy.linkage(distance.pdist(d[own], "cosine"), "complete")
                halves = hierarchy.fcluster(tree, 2, "maxclust")
                clusters[own[halves != halves[0]]] = len(models)
                models.append(models[c])
        models = [x + d[clusters == c].mean(0) for c, x in enumerate(models)]
        told.append((clusters.copy(), np.array([models[c] for c in clusters]), waiting))
    return told


def test_golden_split():
    """|mean| is 0.05590170 and the longest update 1.01980390: split for eps2 of 1, and not of 1.6."""

    @jax.jit
    @jax.vmap
    def after(eps1, eps2):
        method = of_steady(eps1=eps1, eps2=eps2)
        return method.round(method.init(jnp.zeros(2)), STEADY.cohort([0, 1, 2, 3]), KEY)

    eps1 = jnp.array([0.4, 0.4, 0.0559018, 0.0559016, 0.4, 0.4])
    eps2 = jnp.array([1.0, 1.6, 1.0, 1.0, 1.0198038, 1.0198040])
    state, metrics = after(eps1, eps2)
    np.testing.assert_array_equal(metrics.extra.splits, [1, 0, 1, 0, 1, 0])
    np.testing.assert_array_equal(metrics.extra.clusters, [2, 1, 2, 1, 2, 1])
    np.testing.assert_array_equal(state.clusters.rows[0], [0, 0, 1, 1])
    np.testing.assert_array_equal(state.members[0], [2, 2])
    np.testing.assert_allclose(state.params[0], [[0.95, 0.05], [-0.9, 0.05]], rtol=1e-15)
    np.testing.assert_array_equal(state.clusters.rows[1], np.zeros(4))
    np.testing.assert_allclose(state.params[1], [[0.025, 0.05], [0, 0]], rtol=1e-13, atol=1e-17)
    assert metrics.bytes_down.tolist() == metrics.bytes_up.tolist() == [16.0] * 6  # one model each way


def test_what_splits_a_cluster_is_a_direction_and_when_it_does_is_a_length():
    """Updates twice as long: the same halves, at another threshold."""
    method = of_steady(eps2=1.6)
    twice = fc.Population.from_clients([{"u": 2 * u[None]} for u in UPDATES])
    round = jax.jit(method.round)
    (_, short), _ = rounds(round, method.init(jnp.zeros(2)), STEADY, [[0, 1, 2, 3]])
    (_, long), _ = rounds(round, method.init(jnp.zeros(2)), twice, [[0, 1, 2, 3]])
    np.testing.assert_array_equal(short.clusters.rows, [0, 0, 0, 0])
    np.testing.assert_array_equal(long.clusters.rows, [0, 0, 1, 1])


def test_rounds_are_those_of_a_plain_program_and_splits_only_refine():
    method = of_resting()
    states, metrics = rounds(RESTING_ROUND, method.init(jnp.zeros(2)), RESTING, [np.arange(8)] * 24)
    expected = by_hand(POINTS, 24, 8, 0.05, 0.3, 2)
    for state, (clusters, own, _), before in zip(states[1:], expected, states[:-1], strict=True):
        found = np.asarray(state.clusters.rows)
        np.testing.assert_array_equal(found[:, None] == found, clusters[:, None] == clusters)
        np.testing.assert_allclose(method.client_params(state, np.arange(8)), own, rtol=1e-11, atol=1e-13)
        old = np.asarray(before.clusters.rows)
        assert np.all((found[:, None] != found) | (old[:, None] == old)), "who is together was together"
        np.testing.assert_array_equal(state.members, np.bincount(found, minlength=8))
    assert [int(info.extra.clusters) for info in metrics][-1] == 4, "the pairs: two clients are not split"
    assert sum(int(info.extra.splits) for info in metrics) == 3
    assert max(int(info.extra.splits) for info in metrics) == 2, "two clusters in one round"


@pytest.mark.parametrize("k", [2, 3])
def test_with_all_models_taken_clusters_stay_whole_and_are_counted(k):
    method = of_resting(num_models=k)
    states, metrics = rounds(jax.jit(method.round), method.init(jnp.zeros(2)), RESTING, [np.arange(8)] * 24)
    expected = by_hand(POINTS, 24, k, 0.05, 0.3, 2)
    assert [int(info.extra.waiting) for info in metrics] == [waiting for _, _, waiting in expected]
    assert int(metrics[-1].extra.waiting) == 4 - k
    for state, (_, own, _) in zip(states[1:], expected, strict=True):
        np.testing.assert_allclose(method.client_params(state, np.arange(8)), own, rtol=1e-11, atol=1e-13)


def test_a_cluster_that_is_not_all_there_is_trained_and_not_split():
    method = of_resting()
    begun = method.init(jnp.zeros(2))
    states, _ = rounds(RESTING_ROUND, begun, RESTING, [[0, 1, 2, 3, 4, 5, 6, -1]] * 12)
    np.testing.assert_array_equal(states[-1].members, [8, 0, 0, 0, 0, 0, 0, 0])
    np.testing.assert_allclose(states[-1].params[0], POINTS[:7].mean(0), rtol=1e-2)
    # Once there are two clusters, one may be split while clients of the other are away.
    states, metrics = rounds(RESTING_ROUND, begun, RESTING, [np.arange(8)] * 24)
    at = next(t for t, info in enumerate(metrics) if info.extra.splits == 2)
    rows = np.asarray(states[at].clusters.rows)
    ids = np.where(np.arange(8) == np.flatnonzero(rows == 1)[0], -1, np.arange(8))
    (_, after), (info,) = rounds(RESTING_ROUND, states[at], RESTING, [ids])
    assert int(info.extra.splits) == 1
    np.testing.assert_array_equal(np.asarray(after.clusters.rows)[rows == 1], 1)


def test_after_a_split_nothing_gets_from_one_cluster_to_another():
    method = of_resting()
    states, metrics = rounds(RESTING_ROUND, method.init(jnp.zeros(2)), RESTING, [np.arange(8)] * 24)
    at = next(t for t, info in enumerate(metrics) if info.extra.splits)
    mine = np.asarray(states[at + 1].clusters.rows) == 0
    moved = np.where(mine[:, None], POINTS, POINTS * [1.5, -3] + 2)
    other = fc.Population.from_clients([{"b": point[None]} for point in moved])
    one, _ = rounds(RESTING_ROUND, states[at + 1], RESTING, [np.arange(8)] * 8)
    two, _ = rounds(RESTING_ROUND, states[at + 1], other, [np.arange(8)] * 8)
    own = [method.client_params(state[-1], np.flatnonzero(mine)) for state in (one, two)]
    np.testing.assert_array_equal(*own)
    theirs = [method.client_params(state[-1], np.flatnonzero(~mine)) for state in (one, two)]
    assert not np.array_equal(*theirs)


def test_what_is_not_finite_stays_in_its_cluster():
    method = of_resting()
    states, metrics = rounds(RESTING_ROUND, method.init(jnp.zeros(2)), RESTING, [np.arange(8)] * 24)
    at = next(t for t, info in enumerate(metrics) if info.extra.splits)
    rows = np.asarray(states[at + 1].clusters.rows)
    spoiled = np.where((np.arange(8) == np.flatnonzero(rows == 1)[0])[:, None], np.inf, POINTS)
    other = fc.Population.from_flat({"b": spoiled}, np.arange(9, dtype=np.int32), check_finite=False)
    usual, _ = rounds(RESTING_ROUND, states[at + 1], RESTING, [np.arange(8)] * 12)
    one, _ = rounds(RESTING_ROUND, states[at + 1], other, [np.arange(8)] * 12)
    mine, theirs = (np.asarray(state[-1].clusters.rows) for state in (one, usual))
    assert len(set(mine[rows == 0])) == len(set(theirs[rows == 0])) > 1
    np.testing.assert_array_equal(mine[rows == 1], 1)


def test_the_order_of_the_cohort_does_not_matter_where_clients_are_equally_near():
    """Four directions at right angles: all pairs are as near, and the first are joined."""
    square = fc.Population.from_clients([{"u": np.array([u])} for u in ([1.0, 0], [0, 1.0], [-1.0, 0], [0, -1.0])])
    method = of_steady(eps2=0.5)
    round = jax.jit(method.round)
    found = [
        rounds(round, method.init(jnp.zeros(2)), square, [ids])[0][-1].clusters.rows
        for ids in ([0, 1, 2, 3], [3, 1, 0, 2])
    ]
    np.testing.assert_array_equal(found[0], [0, 0, 1, 1])
    np.testing.assert_array_equal(*found)


def test_without_a_split_it_is_fedavg():
    local = {"batch_size": 2, "num_epochs": 2}
    some, every = [[0, 3, -1, 5], [1, 0, 4, 2], [5, 4, 3, 1]], [np.arange(len(SIZES))] * 3
    for k, settings, cohorts in ((1, {"eps1": 1e6, "eps2": 0.0, "wait": 0}, every), (3, {}, some)):
        method = algorithms.cfl(softmax_loss, optax.sgd(0.1), num_clients=len(SIZES), num_models=k, **settings, **local)
        states, metrics = rounds(jax.jit(method.round), method.init(softmax_params()), POPULATION, cohorts)
        assert [int(info.extra.waiting) for info in metrics] == [k == 1] * 3  # for a model that is not there
        average = algorithms.fedavg(softmax_loss, optax.sgd(0.1), **local)
        expected, _ = rounds(jax.jit(average.round), average.init(softmax_params()), POPULATION, cohorts)
        assert_trees_close(method.params(states[-1]), expected[-1].params, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_models": 0}, "num_models must be an integer of at least 1"),
        ({"eps1": -1.0}, "eps1 must lie in"),
        ({"eps2": -1.0}, "eps2 must lie in"),
        ({"wait": -1}, "wait must be an integer of at least 0"),
        ({"server_lr": -1.0}, "server_lr must lie in"),
        ({"num_clients": 0}, "num_clients must be an integer of at least 1"),
    ],
)
def test_what_does_not_fit_is_named(settings, words):
    with pytest.raises(ValueError, match=words):
        of_steady(**settings)
