"""How clusters of clients are found, against scipy, scikit-learn and all possibilities."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.cluster import hierarchy
from scipy.spatial import distance
from sklearn.cluster import AffinityPropagation
from sklearn.metrics import adjusted_rand_score

from algorithms.parts import clusters as parts

N = 9
ALL = np.ones(N, bool)
linkage = jax.jit(parts.complete_linkage)
medoids = jax.jit(parts.medoids, static_argnums=2)
affinity = jax.jit(parts.affinity)


def drawn(seed, n=N):
    """Cosine distances of random vectors."""
    vectors = np.random.default_rng(seed).normal(size=(n, 4))
    return np.asarray(parts.cosine_distances(jnp.asarray(vectors @ vectors.T)))


def same_partition(one, other):
    return adjusted_rand_score(np.asarray(one), np.asarray(other)) == 1


def test_cosine_distances():
    vectors = np.array([[1.0, 0, 0], [0, 2, 0], [-3, 0, 0], [1, 1, 0], [0, 0, 0]])
    found = parts.cosine_distances(jnp.asarray(vectors @ vectors.T))
    diagonal = 1 - np.sqrt(0.5)
    expected = [
        [0, 1, 2, diagonal, 1],
        [1, 0, 1, diagonal, 1],
        [2, 1, 0, 2 - diagonal, 1],
        [diagonal, diagonal, 2 - diagonal, 0, 1],
        [1, 1, 1, 1, 0],
    ]
    np.testing.assert_allclose(found, expected, atol=1e-15)
    huge = vectors * np.array([1e-150, 1e140, 1, 7, 1])[:, None]  # whose squares are, and whose products' are not
    np.testing.assert_allclose(parts.cosine_distances(jnp.asarray(huge @ huge.T)), expected, atol=1e-14)
    spoiled = parts.cosine_distances(jnp.asarray(vectors @ vectors.T).at[1].set(jnp.nan).at[:, 1].set(jnp.inf))
    np.testing.assert_array_equal(spoiled[1], [2, 0, 2, 2, 2])
    np.testing.assert_array_equal(spoiled[:, 1], [2, 0, 2, 2, 2])


def test_the_gram_matrix_is_that_of_whole_models_and_leaves_absent_slots_out():
    rng = np.random.default_rng(0)
    tree = {"w": rng.normal(size=(4, 3, 2)), "b": rng.normal(size=(4, 5))}
    tree["b"][2] = np.nan
    flat = np.concatenate([tree["b"], tree["w"].reshape(4, -1)], 1)
    taking = np.array([True, True, False, True])
    flat[2] = 0
    np.testing.assert_allclose(
        parts.gram(jax.tree.map(jnp.asarray, tree), jnp.asarray(taking)), flat @ flat.T, rtol=1e-13, atol=1e-15
    )


@pytest.mark.parametrize("seed", range(4))
def test_complete_linkage_is_that_of_scipy(seed):
    distances = drawn(seed)
    tree = hierarchy.linkage(distance.squareform(distances, checks=False), "complete")
    for wanted in (1, 2, 3, 5, N):
        found = linkage(distances, ALL, wanted, parents=np.zeros(N, np.int32))
        assert same_partition(found, hierarchy.fcluster(tree, wanted, "maxclust"))
        assert np.all(found <= np.arange(N)), "groups are named by their first slots"
        np.testing.assert_array_equal(found[found], found)


def test_parent_clusters_are_split_apart_and_those_that_are_absent_are_left_alone():
    distances, parents = drawn(11), np.array([0, 1, 0, 2, 1, 0, 1, 0, 1], np.int32)
    taking = np.array([1, 1, 1, 1, 1, 1, 1, 0, 1], bool)
    found = np.asarray(linkage(distances, taking, np.array([2, 9, 2]), parents=parents))
    ones = np.flatnonzero((parents == 0) & taking)
    alone = linkage(distances[np.ix_(ones, ones)], np.ones(3, bool), 2, parents=np.zeros(3, np.int32))
    np.testing.assert_array_equal(found[ones], ones[np.asarray(alone)])
    others = np.setdiff1d(np.arange(N), ones)
    np.testing.assert_array_equal(found[others], others)


def test_groups_that_there_are_already_are_joined_by_their_farthest_members():
    distances = drawn(5)
    begun = np.array([0, 0, 2, 2, 4, 4, 6, 6, 6], np.int32)
    found = linkage(distances, ALL, 3, parents=np.zeros(N, np.int32), begun=begun)
    far = {(a, b): distances[np.ix_(begun == a, begun == b)].max() for a, b in itertools.combinations((0, 2, 4, 6), 2)}
    first, second = min(far, key=far.get)
    np.testing.assert_array_equal(found, np.where(begun == second, first, begun))


@pytest.mark.parametrize("seed", range(3))
def test_medoids_are_as_good_as_the_best_of_all_that_there_are(seed):
    """On three groups of vectors; and each slot has the nearest."""
    rng = np.random.default_rng(seed)
    vectors = np.repeat(rng.normal(size=(3, 4)), 3, 0) + 0.3 * rng.normal(size=(N, 4))
    distances = np.asarray(parts.cosine_distances(jnp.asarray(vectors @ vectors.T)))
    found = np.asarray(medoids(distances, ALL, 3))
    cost = distances[np.arange(N), found].sum()
    least = min(distances[:, list(chosen)].min(1).sum() for chosen in itertools.combinations(range(N), 3))
    assert cost == pytest.approx(least, rel=1e-12)
    np.testing.assert_array_equal(distances[np.arange(N), found], distances[:, np.unique(found)].min(1))


def test_medoids_of_fewer_slots_than_clusters_are_the_slots():
    taking = np.arange(N) < 2
    np.testing.assert_array_equal(medoids(drawn(0), taking, 4), np.arange(N))


@pytest.mark.parametrize("seed", range(3))
def test_affinity_propagation_is_that_of_scikit_learn(seed):
    rng = np.random.default_rng(seed)
    vectors = np.repeat(rng.normal(size=(3, 6)), 4, 0) + 0.2 * rng.normal(size=(12, 6))
    distances = np.asarray(parts.cosine_distances(jnp.asarray(vectors @ vectors.T)))
    found = affinity(distances, np.ones(12, bool))
    other = ~np.eye(12, dtype=bool)
    theirs = AffinityPropagation(affinity="precomputed", preference=-np.median(distances[other]), random_state=0)
    assert same_partition(found, theirs.fit_predict(-distances))


def test_affinity_propagation_leaves_absent_slots_out():
    rng = np.random.default_rng(0)
    vectors = np.repeat(rng.normal(size=(3, 6)), 4, 0) + 0.2 * rng.normal(size=(12, 6))
    distances = np.asarray(parts.cosine_distances(jnp.asarray(vectors @ vectors.T)))
    taking = np.arange(12) % 4 != 1
    rows = np.flatnonzero(taking)
    whole, alone = affinity(distances, taking), affinity(distances[np.ix_(rows, rows)], np.ones(9, bool))
    assert same_partition(np.asarray(whole)[rows], alone)
    np.testing.assert_array_equal(np.asarray(whole)[~taking], np.flatnonzero(~taking))
    np.testing.assert_array_equal(affinity(distances, np.zeros(12, bool)), np.arange(12))


def test_clusters_are_numbered_by_their_first_slots():
    taking = np.array([False, True, True, True, True])
    first = parts.first_slots(jnp.array([7, -1, 3, -1, 7]), jnp.asarray(taking))
    np.testing.assert_array_equal(first, [0, 1, 2, 1, 4])
    np.testing.assert_array_equal(parts.numbered(first, jnp.asarray(taking)), [0, 0, 1, 0, 2])


def test_models_move_by_the_means_of_their_clients():
    rng = np.random.default_rng(0)
    models, d = {"w": rng.normal(size=(3, 2))}, {"w": rng.normal(size=(70, 2))}  # more than plain sums are for
    weights, clusters = rng.uniform(0, 2, 70) * (rng.uniform(size=70) > 0.2), rng.integers(0, 2, 70)
    found = parts.moved(*jax.tree.map(jnp.asarray, (models, d, weights, clusters)), 0.5)["w"]
    for j in range(2):
        mean = np.average(d["w"][clusters == j], axis=0, weights=weights[clusters == j])
        np.testing.assert_allclose(found[j], models["w"][j] + 0.5 * mean, rtol=1e-13)
    np.testing.assert_array_equal(found[2], models["w"][2])
