import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models
from pipelines.data import datasets
from pipelines.data.dataset import Dataset, Normalization
from pipelines.federation import embedding, partition

pytestmark = pytest.mark.xdist_group("embeddings")  # in one process, which makes what they share once

CLIENTS = 25


def blobs(n=2000, clusters=10, d=6, seed=0):
    """Embeddings in well separated clusters of unequal sizes, and the cluster of each."""
    rng = np.random.default_rng(seed)
    ids = rng.choice(clusters, n, p=np.arange(1, clusters + 1) / np.arange(1, clusters + 1).sum())
    centers = 20 * rng.normal(size=(clusters, d))
    return (centers[ids] + rng.normal(size=(n, d))).astype(np.float32), ids


def inertia(embeddings, ids):
    """Sum of squared distances to the means of the clusters."""
    return sum(np.square(embeddings[ids == c] - embeddings[ids == c].mean(axis=0)).sum() for c in np.unique(ids))


def lloyd(embeddings, ids):
    """One iteration, by hand: means, then the nearest of them."""
    centers = np.stack([embeddings[ids == c].mean(axis=0) for c in np.unique(ids)])
    return np.argmin(np.square(embeddings[:, None] - centers).sum(axis=2), axis=1)


@pytest.fixture(scope="module")
def digits():
    return datasets.load("digits")


@pytest.fixture(scope="module")
def features(digits):
    return embedding.embed(digits, steps=300)


def accuracy_of_centroids(embeddings, labels):
    means = np.stack([embeddings[labels == c].mean(axis=0) for c in np.unique(labels)])
    return np.mean(np.argmin(np.square(embeddings[:, None] - means).sum(axis=2), axis=1) == labels)


def test_features_separate_the_classes_better_than_pixels(digits, features):
    labels = digits.train["y"]
    assert features.shape == (len(labels), 64)
    assert features.dtype == np.float32
    pixels = digits.train["x"].reshape(len(labels), -1)
    assert accuracy_of_centroids(features, labels) > 0.95 > accuracy_of_centroids(pixels, labels)


def test_features_are_the_same_on_every_run_and_the_seed_decides():
    iris = datasets.load("iris")
    first, again, other = (embedding.embed(iris, steps=20, seed=seed) for seed in (0, 0, 1))
    assert first.shape == (len(iris.train["y"]), 64)
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_features_are_those_of_the_model_that_is_given(digits):
    model = models.mlp((8, 8, 1), 10, hidden=(12,))
    params = model.init(jax.random.key(0))
    given = embedding.embed(digits, model=model, params=params)
    np.testing.assert_allclose(given, model.features(params, digits.train["x"]), rtol=1e-6)
    trained = embedding.embed(digits, model=model, steps=200)
    assert accuracy_of_centroids(trained, digits.train["y"]) > accuracy_of_centroids(given, digits.train["y"])


def test_images_reach_the_model_normalized():
    rng = np.random.default_rng(0)
    part = {"x": rng.integers(0, 256, (50, 8, 8, 3), dtype=np.uint8), "y": np.arange(50, dtype=np.int32) % 5}
    statistics = Normalization((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    images = Dataset("images", part, part, 5, normalization=statistics)
    model = models.mlp((8, 8, 3), 5, hidden=(12,))
    params = model.init(jax.random.key(0))
    seen = (part["x"] / 255 - np.asarray(statistics.mean)) / np.asarray(statistics.std)
    given = embedding.embed(images, model=model, params=params)
    np.testing.assert_allclose(given, model.features(params, jnp.asarray(seen)), rtol=1e-5, atol=1e-6)
    # A model trained here sees them so as well: the same as one trained on the normalized floats.
    floats = images._replace(train={**part, "x": seen}, test={**part, "x": seen}, normalization=None)
    options = {"model": model, "steps": 20, "batch_size": 8}
    np.testing.assert_allclose(embedding.embed(images, **options), embedding.embed(floats, **options), rtol=1e-4)


def test_features_of_sequences_are_means_over_what_is_no_padding():
    rng = np.random.default_rng(0)
    x = rng.integers(0, 7, (20, 6)).astype(np.int32)
    y = np.where(np.arange(6) < rng.integers(1, 7, 20)[:, None], np.roll(x, -1, axis=1), -1).astype(np.int32)
    text = Dataset("text", {"x": x, "y": y}, {"x": x, "y": y}, 7, pad_id=-1, vocabulary_size=7)
    model = models.char_lstm(7, hidden=5, num_layers=1)
    params = model.init(jax.random.key(0))
    positions = np.asarray(model.features(params, x))
    expected = [row[real].mean(axis=0) for row, real in zip(positions, y != -1, strict=True)]
    given = embedding.embed(text, model=model, params=params)
    np.testing.assert_allclose(given, expected, rtol=1e-5, atol=1e-7)
    assert np.isfinite(embedding.embed(text, model=model, steps=3)).all()


def test_kmeans_finds_clusters_that_there_are():
    embeddings, truth = blobs()
    ids = embedding.kmeans(embeddings)
    assert ids.dtype == np.int32
    assert sorted(set(ids)) == list(range(10))
    # Every cluster of ours is one of theirs.
    assert len(set(zip(ids.tolist(), truth.tolist(), strict=True))) == 10


def test_kmeans_is_where_lloyds_iterations_end(features):
    embeddings = features.astype(np.float64)
    ids = embedding.kmeans(embeddings)
    assert np.bincount(ids).min() > 0
    np.testing.assert_array_equal(lloyd(embeddings, ids), ids)
    # From elsewhere the iterations never make it worse, and hardly end at better ones.
    moved = np.where(np.random.default_rng(0).random(len(ids)) < 0.5, (ids + 1) % 10, ids)
    values = [inertia(embeddings, moved)]
    for _ in range(20):
        moved = lloyd(embeddings, moved)
        values.append(inertia(embeddings, moved))
    assert np.all(np.diff(values) <= 1e-9 * values[0])
    assert values[-1] < values[0]
    assert inertia(embeddings, ids) < 1.2 * values[-1]


def test_the_seed_decides_the_split():
    rng = np.random.default_rng(0)
    embeddings = rng.normal(size=(2000, 4)).astype(np.float32)  # without clusters, so that the start matters
    first, again, other = (embedding.embedding(embeddings, CLIENTS, alpha=1, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first != other
    assert not np.array_equal(embedding.kmeans(embeddings, seed=0), embedding.kmeans(embeddings, seed=1))


def test_the_split_is_that_of_the_clusters_whatever_their_names():
    embeddings, truth = blobs()
    split = embedding.embedding(embeddings, CLIENTS, alpha=2, min_size=10, seed=3)
    renamed = np.random.default_rng(0).permutation(10)[truth]
    assert split == partition.clusters(renamed, CLIENTS, alpha=2, min_size=10, seed=3)
    assert split.sizes.min() >= 10
    assert len(np.unique(split.rows)) == len(split.rows) > len(embeddings) - CLIENTS * 10


def test_where_embeddings_lie_does_not_matter_but_only_how_far_apart():
    embeddings, _ = blobs()
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(6, 6)))[0]
    split = embedding.embedding(embeddings, CLIENTS, alpha=2)
    assert split == embedding.embedding(5 * embeddings @ turn + 3, CLIENTS, alpha=2)


def test_one_cluster_is_iid():
    embeddings, truth = blobs()
    others = np.random.default_rng(1).normal(size=(2000, 2))
    split = embedding.embedding(embeddings, CLIENTS, alpha=0.01, clusters=1)
    assert split.sizes.tolist() == [80] * CLIENTS
    # Nothing of the embeddings is left in it.
    assert split == embedding.embedding(others, CLIENTS, alpha=0.01, clusters=1)
    shares = np.stack([np.bincount(truth[rows], minlength=10) / len(rows) for rows in split])
    p = np.bincount(truth) / len(truth)
    # Drawn without replacement: shares of 80 examples spread by sqrt(p (1 - p) / 80), here at most 4.5 of them.
    assert np.all(abs(shares - p) < 4.5 * np.sqrt(p * (1 - p) / 80))


def std_within_clients(embeddings, split):
    """Mean squared distance of examples to the mean of their client."""
    return sum(np.square(embeddings[rows] - embeddings[rows].mean(axis=0)).sum() for rows in split) / len(split.rows)


def test_clients_are_alike_inside_and_the_more_so_the_smaller_alpha(features, digits):
    values = [
        np.mean(
            [
                std_within_clients(features, embedding.embedding(features, CLIENTS, alpha=alpha, min_size=5, seed=seed))
                for seed in range(4)
            ]
        )
        for alpha in (0.5, 5, 1000)
    ]
    iid = std_within_clients(features, partition.iid(digits.train["y"], CLIENTS))
    assert values[0] < values[1] < values[2]
    assert values[0] < 0.6 * iid
    np.testing.assert_allclose(values[2], iid, rtol=0.1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: embedding.kmeans(None), r"embeddings must be floats \[n, d\], got None"),
        (lambda: embedding.kmeans(np.zeros((5, 2), int)), r"got int64\[5, 2\]"),
        (lambda: embedding.kmeans(np.zeros(5)), r"got float64\[5\]: take pipelines.federation.embedding.embed"),
        (lambda: embedding.kmeans(np.full((20, 2), np.nan)), r"embeddings holds 40 values that are NaN"),
        (lambda: embedding.kmeans(np.repeat(np.eye(3), 9, axis=0)), r"clusters=10, but there are 3 distinct"),
        (lambda: embedding.kmeans(np.zeros((0, 2))), r"clusters=10, but there are 0 distinct"),
        (lambda: embedding.kmeans(np.eye(3), 0), r"clusters must be an integer of at least 1"),
        (lambda: embedding.embedding(blobs()[0], CLIENTS, alpha=0), r"alpha must lie in \(0, inf\)"),
        (lambda: embedding.embed(datasets.load("iris"), params={}), r"params are given without a model"),
        (lambda: embedding.embed(datasets.load("iris"), steps=0), r"steps must be an integer of at least 1"),
        (lambda: embedding.embed(datasets.load("iris"), learning_rate=0.0), r"learning_rate must lie in \(0"),
        (
            lambda: embedding.embed(datasets.load("iris"), steps=30, learning_rate=1e30),
            r"iris are not finite: lower learning_rate=1e\+30",
        ),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_tokens_have_no_default_model():
    part = {"x": np.zeros((4, 6), np.int32), "y": np.zeros((4, 6), np.int32)}
    with pytest.raises(ValueError, match=r"text are tokens.*model=models.char_lstm"):
        embedding.embed(Dataset("text", part, part, 7, vocabulary_size=7))
