"""One-shot clustering: its temperature, the round in which it clusters, a plain program, and its invariants."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.cluster import hierarchy
from scipy.spatial import distance

import algorithms
import fedjax_core as fc
from algorithms.parts import clusters as parts
from algorithms.personalization.ocfl import temperature
from tests.algorithms.personalization.plain import POPULATION, SIZES
from tests.problems import assert_trees_close, rounds, softmax_loss, softmax_params

KEY = jax.random.key(0)
LR = 0.1

# Clients whose update is the same in every round.
UPDATES = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
STEADY = fc.Population.from_clients([{"u": u[None]} for u in UPDATES])
EVERYBODY = [0, 1, 2, 3]

# Three kinds of clients. Each has a steep direction of its own, in which all have their optimum at 0, a flat one in
# which all have it at 3, and two in which the kinds differ: updates grow alike before they part.
RNG = np.random.default_rng(0)
KINDS = np.array([0, 1, 2, 1, 0, 2, 2, 0, 1])
OPTIMA = np.zeros((9, 6))
OPTIMA[:, 3] = 3
OPTIMA[:, 4:] = np.array([[1, 0], [-0.5, 0.9], [-0.5, -0.9]])[KINDS] + 0.02 * RNG.normal(size=(9, 2))
CURVATURES = np.where(np.arange(6) < 3, 0.1, 0.5) + np.where(np.arange(6) == KINDS[:, None], 3.9, 0)
CLIENTS = [
    {"a": np.repeat(a[None], 3, 0), "b": np.repeat(b[None], 3, 0)} for a, b in zip(CURVATURES, OPTIMA, strict=True)
]
DRIFTING = fc.Population.from_clients(CLIENTS)
START = np.array([1.0, 1.0, 1.0, 0.0, 0.0, 0.0])
ALL = np.arange(9)


def steady_loss(params, batch, key):
    return -batch["u"] @ params


def drifting_loss(params, batch, key):
    return 0.5 * jnp.sum(batch["a"] * jnp.square(params - batch["b"]), axis=1)


def of_steady(**settings):
    settings = {"num_clients": 4, "num_models": 2, **settings}
    return algorithms.ocfl(steady_loss, optax.sgd(1.0), batch_size=1, num_steps=1, **settings)


def of_drifting(**settings):
    settings = {"num_clients": 9, "num_models": 3, **settings}
    return algorithms.ocfl(drifting_loss, optax.sgd(LR), batch_size=1, num_epochs=1, **settings)


DRIFTING_ROUND = jax.jit(of_drifting().round)


def temperature_of(vectors, p=2.0, taking=None):
    vectors = jnp.asarray(vectors, float)
    G = parts.cosine_distances(vectors @ vectors.T)
    return float(temperature(G, jnp.ones(len(vectors), bool) if taking is None else taking, p))


@pytest.mark.parametrize(
    ("vectors", "expected"),
    [
        ([[1, 2], [2, 4], [0.5, 1]], 0),
        ([[1, 0], [-3, 0]], 1),
        ([[1, 0], [0, 7]], 0.5),
        ([[1, 0], [1, 0], [0, 1], [0, 1]], 0.40824829),
        ([[1, 0], [1, 1], [0, 2]], 0.31245971),
        (np.repeat(np.eye(3), 5, 0), 0.42257713),
        ([[1, 0]], 0),
        ([[0, 0], [1, 0], [2, 0]], np.sqrt(4 / 6) / 2),  # a client that does not move has cosine 0 with the others
    ],
)
def test_golden_temperatures(vectors, expected):
    assert temperature_of(vectors) == pytest.approx(expected, abs=5e-9)


def test_the_temperature_is_half_a_root_mean_square_of_distances_of_directions():
    rng = np.random.default_rng(1)
    d = rng.normal(size=(7, 5))
    found = temperature_of(d)
    G = distance.squareform(distance.pdist(d, "cosine"))
    other = ~np.eye(7, dtype=bool)
    assert found == pytest.approx(np.sqrt(np.mean(G[other] ** 2)) / 2, rel=1e-12)
    assert temperature_of(d, 3.0) == pytest.approx(np.sum(G[other] ** 3) ** (1 / 3) / (42 * 8) ** (1 / 3), rel=1e-12)
    assert temperature_of((d * rng.uniform(0.1, 9, (7, 1)))[::-1]) == pytest.approx(found, rel=1e-12)
    for n1, n2 in ((1, 4), (3, 2), (5, 5)):
        n, groups = n1 + n2, np.repeat(np.eye(2), (n1, n2), 0)
        assert temperature_of(groups) == pytest.approx(np.sqrt(2 * n1 * n2 / (n * (n - 1))) / 2, rel=1e-12)
    taking = jnp.arange(7) != 2
    assert temperature_of(d, taking=taking) == pytest.approx(temperature_of(np.delete(d, 2, 0)), rel=1e-12)
    assert 0 <= found <= 1


def test_a_counter_that_all_clients_add_to_alike_hides_what_they_differ_in():
    """Which is why distances are of parameters alone."""
    d = np.random.default_rng(2).normal(size=(6, 5))
    counted = np.concatenate([d, np.full((6, 1), 1e4)], 1)
    assert temperature_of(d) > 0.3
    assert temperature_of(counted) < 1e-6


def test_clusters_are_made_when_the_temperature_rises_and_not_when_it_stays():
    method = of_steady()
    round = jax.jit(method.round)
    states, metrics = rounds(round, method.init(jnp.zeros(2)), STEADY, [EVERYBODY] * 3)
    for state, info in zip(states[1:], metrics, strict=True):
        assert float(info.extra.temperature) == float(state.temperature) == pytest.approx(0.40824829, abs=5e-9)
        assert int(info.extra.clusters) == 1
        np.testing.assert_array_equal(state.clusters.rows, [0, 0, 0, 0])
    np.testing.assert_array_equal(method.params(states[3]), [1.5, 1.5])
    # 0.4, 0.3, 0.35: made at the third value.
    for before, makes in ((0.41, False), (float(states[1].temperature), False), (0.4, True)):
        state, info = round(states[3]._replace(temperature=jnp.asarray(before)), STEADY.cohort(EVERYBODY), KEY)
        assert int(info.extra.clusters) == 1 + makes
        assert int(state.clustered) == 4 * makes
    np.testing.assert_array_equal(state.clusters.rows, [0, 0, 1, 1])
    np.testing.assert_array_equal(state.members, [2, 2])
    np.testing.assert_array_equal(state.params, [[2.5, 1.5], [1.5, 2.5]])  # both began with the model that there was


def by_hand(optima, num_rounds, k=3):
    """(clusters, models of every client, temperature) after each round, in NumPy and scipy."""
    models, clusters = np.array([START]), np.zeros(len(optima), int)
    last, made, told = np.inf, False, []
    for _ in range(num_rounds):
        own = models[clusters]
        d = ((1 - LR * CURVATURES) ** 3 - 1) * (own - optima)
        if not made:
            G = distance.pdist(d, "cosine")
            now = np.sqrt(np.mean(G**2)) / 2
            if now > last:
                found = hierarchy.fcluster(hierarchy.linkage(G, "complete"), k, "maxclust")
                clusters, made = np.unique(found, return_inverse=True)[1], True
                models = np.repeat(models, k, 0)
            last = now
        models = np.array([x + d[clusters == c].mean(0) for c, x in enumerate(models)])
        told.append((clusters.copy(), models[clusters], last))
    return told


def test_rounds_are_those_of_a_plain_program():
    """It finds the three kinds, in the round that its rule says."""
    method = of_drifting()
    states, metrics = rounds(DRIFTING_ROUND, method.init(jnp.asarray(START)), DRIFTING, [ALL] * 12)
    expected = by_hand(OPTIMA, 12)
    for state, info, (clusters, own, T) in zip(states[1:], metrics, expected, strict=True):
        found = np.asarray(state.clusters.rows)
        np.testing.assert_array_equal(found[:, None] == found, clusters[:, None] == clusters)
        np.testing.assert_allclose(method.client_params(state, ALL), own, rtol=1e-11, atol=1e-13)
        assert float(info.extra.temperature) == pytest.approx(T, rel=1e-10)
    made = int(states[-1].clustered)
    temperatures = [T for _, _, T in expected[:made]]
    assert made == 6
    assert np.all(np.diff(temperatures[:-1]) <= 0)
    assert temperatures[-1] > temperatures[-2]
    np.testing.assert_array_equal(found[:, None] == found, KINDS[:, None] == KINDS)
    np.testing.assert_array_equal(found[:3], [0, 1, 2])  # numbered by their first clients


@pytest.mark.parametrize("clusterer", ["medoids", "affinity"])
def test_other_clusterers_find_the_kinds_too(clusterer):
    method = of_drifting(clusterer=clusterer)
    states, _ = rounds(jax.jit(method.round), method.init(jnp.asarray(START)), DRIFTING, [ALL] * 12)
    np.testing.assert_array_equal(states[-1].clusters.rows, KINDS)


def test_a_clusterer_may_be_a_function_and_what_is_too_much_for_the_models_is_joined():
    """Nine clusters of one, of which complete linkage makes three; and with a model for each they stay."""
    alone = lambda G, taking: -jnp.arange(9)  # noqa: E731
    for k in (3, 9):
        method = of_drifting(clusterer=alone, num_models=k)
        states, _ = rounds(jax.jit(method.round), method.init(jnp.asarray(START)), DRIFTING, [ALL] * 12)
        np.testing.assert_array_equal(states[-1].clusters.rows, KINDS if k == 3 else ALL)
    # A client alone in its cluster goes on by itself from the model that there was.
    made = int(states[-1].clustered)
    factor = (1 - LR * CURVATURES) ** (3 * (12 - made + 1))
    before = np.asarray(states[made - 1].params[0])
    np.testing.assert_allclose(states[-1].params, OPTIMA + factor * (before - OPTIMA), rtol=1e-11)


def test_nothing_is_measured_or_made_in_rounds_of_some_clients():
    method = of_drifting()
    some = np.where(ALL == 4, -1, ALL)
    states, metrics = rounds(DRIFTING_ROUND, method.init(jnp.asarray(START)), DRIFTING, [some] * 12)
    assert float(states[-1].temperature) == 2
    assert int(states[-1].clustered) == 0
    assert [int(info.extra.clusters) for info in metrics] == [1] * 12
    states, _ = rounds(DRIFTING_ROUND, method.init(jnp.asarray(START)), DRIFTING, [ALL] * 12)
    absent = np.where(KINDS == 1, -1, ALL)
    (_, after), _ = rounds(DRIFTING_ROUND, states[-1], DRIFTING, [absent])
    np.testing.assert_array_equal(after.params[1], states[-1].params[1])
    np.testing.assert_array_equal(after.clusters.rows, states[-1].clusters.rows)


def test_once_there_are_clusters_nothing_gets_from_one_to_another():
    method = of_drifting()
    states, _ = rounds(DRIFTING_ROUND, method.init(jnp.asarray(START)), DRIFTING, [ALL] * 12)
    moved = [{**part, "b": part["b"] * (1 - 2 * (kind == 1))} for part, kind in zip(CLIENTS, KINDS, strict=True)]
    one, _ = rounds(DRIFTING_ROUND, states[-1], DRIFTING, [ALL] * 5)
    two, _ = rounds(DRIFTING_ROUND, states[-1], fc.Population.from_clients(moved), [ALL] * 5)
    for c in (0, 2):
        np.testing.assert_array_equal(one[-1].params[c], two[-1].params[c])
    assert not np.array_equal(one[-1].params[1], two[-1].params[1])
    np.testing.assert_array_equal(two[-1].clusters.rows, states[-1].clusters.rows)


def test_it_is_fedavg_before_and_with_one_cluster_after():
    """Of clients one of whom has no examples, and is drawn like the others."""
    assert 0 in SIZES
    ids, population = np.arange(len(SIZES)), POPULATION
    local = {"batch_size": 2, "num_epochs": 2}
    one = lambda G, taking: jnp.zeros(len(ids), int)  # noqa: E731
    method = algorithms.ocfl(softmax_loss, optax.sgd(0.1), num_clients=len(ids), num_models=3, clusterer=one, **local)
    average = algorithms.fedavg(softmax_loss, optax.sgd(0.1), **local)
    cohorts = [np.arange(len(ids))] * 6
    states, _ = rounds(jax.jit(method.round), method.init(softmax_params()), population, cohorts)
    expected, _ = rounds(jax.jit(average.round), average.init(softmax_params()), population, cohorts)
    for state, other in zip(states, expected, strict=True):
        assert_trees_close(method.params(state), other.params, rtol=1e-13, atol=1e-15)
    assert 1 < int(states[-1].clustered) < 6


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_models": 0}, "num_models must be an integer of at least 1"),
        ({"clusterer": lambda distances: distances}, "clusterer is called with .distances, taking."),
        ({"clusterer": "hdbscan"}, "clusterer must be one of 'linkage', 'medoids', 'affinity'"),
        ({"p": 0.5}, "p must lie in"),
        ({"server_lr": -1.0}, "server_lr must lie in"),
        ({"num_clients": 0}, "num_clients must be an integer of at least 1"),
    ],
)
def test_what_does_not_fit_is_named(settings, words):
    with pytest.raises((TypeError, ValueError), match=words):
        of_steady(**settings)


def test_a_clusterer_that_gives_no_number_for_each_slot_is_named():
    method = of_steady(clusterer=lambda G, taking: G)
    with pytest.raises(ValueError, match=r"clusterer must return int\[4\], a number for each slot, got"):
        method.round(method.init(jnp.zeros(2)), STEADY.cohort(EVERYBODY), KEY)
