"""Embedding-based heterogeneity: clients differ in what a model of the task sees in their data, not in their labels.

Three steps, each of use alone: `embed` gives the features of a model trained on the pool of all training data,
`kmeans` clusters them, and `pipelines.federation.partition.clusters` divides them among clients; `embedding` does the
last two.

Letters: n examples, d features, N clients.

Paper: "Redefining non-IID Data in Federated Learning for Computer Vision Tasks: Migrating from Labels to Embeddings for
Task-Specific Data Distributions", 2025 (https://arxiv.org/abs/2503.14553).
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import models
from fedjax_core import checks, convolutions, evaluate_examples
from fedjax_core.types import ArrayLike, Examples, Key, Params, PyTree
from pipelines.data.dataset import Dataset, normalized
from pipelines.federation import partition
from pipelines.federation.assignment import Assignment


def embed(
    dataset: Dataset,
    *,
    model: models.Model | None = None,
    params: Params = None,
    steps: int = 1000,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
    seed: int = 0,
) -> np.ndarray:
    """The features that a model of the task has of every training example.

    Without `params` the model is first trained on all training data, as in a data center, by Adam on batches drawn with
    replacement. The paper trains its networks for the task or takes pre-trained ones, and flattens the features; here
    those of a sequence are averaged over its positions, padding left out. Uint8 images reach the model normalized.

    The same on every run of one machine; another machine rounds differently, so save what was made of it
    (`Assignment.save`) to share a split.

    Args:
      dataset: the data set.
      model: a model of its inputs and classes. None is a small convolutional network for images, and a small
        multi-layer perceptron for other measurements.
      params: of the model, already trained.
      steps: number of training steps.
      batch_size: examples of a step.
      learning_rate: of Adam.
      seed: of the initial model and the batches.

    Returns:
      float32[n, d].

    Raises:
      ValueError: if params are given without their model, the inputs are tokens and no model is given, a number of
        steps or examples is below 1, the learning rate is not above 0, or the features are not finite.
    """
    if model is None and params is not None:
        raise ValueError("params are given without a model: pass the model they belong to as well")
    checks.positive_int("steps", steps, "train for at least one step, or pass params")
    checks.positive_int("batch_size", batch_size, "a step needs at least one example")
    checks.scalar("learning_rate", learning_rate, low=0, low_open=True)
    model = normalized(_default_model(dataset) if model is None else model, dataset.normalization)
    train = jax.tree.map(jnp.asarray, dataset.train)
    if params is None:
        params = _trained(model, dataset, train, steps, batch_size, learning_rate, seed)

    def features(params: Params, batch: Examples) -> jax.Array:
        values = model.features(params, batch["x"]).astype(jnp.float32)
        if not dataset.is_sequence:
            return values.reshape(len(values), -1)
        real = (batch["y"] != (-1 if dataset.pad_id is None else dataset.pad_id)).astype(values.dtype)
        return jnp.einsum("btd,bt->bd", values, real / jnp.maximum(real.sum(axis=1, keepdims=True), 1))

    values = np.asarray(jax.jit(partial(evaluate_examples, features))(params, train))
    if not np.isfinite(values).all():
        raise ValueError(
            f"the features of {dataset.name} are not finite: lower learning_rate={learning_rate:g}, or pass params of "
            "a model that works"
        )
    return values


def kmeans(embeddings: ArrayLike, clusters: int = 10, *, seed: int = 0) -> np.ndarray:
    """Clusters by k-means: k-means++ start, Lloyd's iterations until nothing changes (at most 300), Euclidean distance.

    Args:
      embeddings: float[n, d].
      clusters: number of clusters.
      seed: of the start.

    Returns:
      int32[n], the cluster of each row; every one of 0 to clusters - 1 occurs.

    Raises:
      ValueError: if embeddings are not finite floats [n, d], or have fewer than `clusters` distinct rows.
    """
    from sklearn.cluster import KMeans  # slow to import, and only needed here
    from threadpoolctl import threadpool_limits

    values = _check_embeddings(embeddings)
    checks.positive_int("clusters", clusters, "a cluster has at least one example")
    distinct = len(np.unique(values, axis=0)) if len(values) else 0
    if clusters > distinct:
        raise ValueError(
            f"clusters={clusters}, but there are {distinct} distinct embeddings: ask for at most that many clusters"
        )
    # More threads add up in another order, and a sum that is rounded otherwise may move an example to another client.
    with threadpool_limits(1):
        ids = KMeans(clusters, n_init=1, tol=0, random_state=seed).fit_predict(values)
    return ids.astype(np.int32)


def embedding(
    embeddings: ArrayLike, num_clients: int, *, alpha: float, min_size: int = 1, clusters: int = 10, seed: int = 0
) -> Assignment:
    """Embedding skew: every client mixes the k-means clusters of the embeddings in proportions from Dirichlet(alpha p).

    With p the clusters' shares of all examples. `pipelines.federation.partition.clusters` divides them among clients,
    and says what alpha (the total concentration) and min_size mean and which few examples are left out; on class labels
    it gives the label-based split to compare with. The paper uses 10 clusters and 25 clients of at least 128 examples.

    Args:
      embeddings: float[n, d], from `embed` or elsewhere.
      num_clients: N, better well above the number of clusters.
      alpha: total concentration, above 0.
      min_size: fewest examples of a client.
      clusters: number of clusters.
      seed: of the clusters and of the split.

    Raises:
      ValueError: as `kmeans` and `pipelines.federation.partition.clusters` do.
    """
    ids = kmeans(embeddings, clusters, seed=seed)
    return partition.clusters(ids, num_clients, alpha=alpha, min_size=min_size, seed=seed)


def _default_model(dataset: Dataset) -> models.Model:
    if np.issubdtype(dataset.train["x"].dtype, np.signedinteger):
        raise ValueError(
            f"the inputs of {dataset.name} are tokens, for which there is no default model: pass one, for example "
            "model=models.char_lstm(vocabulary size)"
        )
    shape = dataset.input_shape
    if len(shape) == 3 and min(shape[:2]) >= 4:
        return models.cnn(shape, dataset.num_classes, channels=(8, 16), hidden=64)
    return models.mlp(shape, dataset.num_classes, hidden=(64, 64))


def _trained(
    model: models.Model, dataset: Dataset, train: Any, steps: int, batch_size: int, learning_rate: float, seed: int
) -> Any:
    """Parameters of the model after Adam on random batches of the training examples."""
    if dataset.is_sequence:
        loss_fn = models.losses.sequence_cross_entropy(model, dataset.pad_id)
    else:
        loss_fn = models.losses.cross_entropy(model)
    optimizer = optax.adam(learning_rate)

    @jax.jit
    @convolutions.rewritten
    def run(params: Params, train: Any, rows: Any, keys: Key) -> Any:
        def step(carry: PyTree, drawn: Any) -> tuple[Any, None]:
            (params, opt_state), (rows, key) = carry, drawn
            batch = jax.tree.map(lambda leaf: leaf[rows], train)
            grads = jax.grad(lambda p: jnp.mean(loss_fn(p, batch, key)))(params)
            updates, opt_state = optimizer.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), None

        return jax.lax.scan(step, (params, optimizer.init(params)), (rows, keys))[0][0]

    init_key, steps_key = jax.random.split(jax.random.key(seed))
    rows = np.random.default_rng(seed).integers(0, len(dataset.train["y"]), (steps, batch_size))
    return run(model.init(init_key), train, rows, jax.random.split(steps_key, steps))


def _check_embeddings(embeddings: ArrayLike) -> np.ndarray:
    array = np.asarray(embeddings)
    if embeddings is None or array.ndim != 2 or not np.issubdtype(array.dtype, np.floating):
        got = "None" if embeddings is None else f"{array.dtype}{list(array.shape)}"
        raise ValueError(
            f"embeddings must be floats [n, d], got {got}: take "
            "pipelines.federation.embedding.embed(dataset), or flatten your own"
        )
    checks.finite(array, "embeddings")
    return array
