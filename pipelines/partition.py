"""Who holds which examples: pure functions of (labels, number of clients, seed).

Each returns an assignment: one index array per client, int64[n_i], in which every example appears exactly once.
Adding a partition is writing such a function and entering it in `PARTITIONS`; its keyword arguments are taken from
the fields of the same name of `pipelines.config.Config`.

Letters: n examples, N clients, K classes.
"""

import heapq
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fedjax_core import Population, checks
from pipelines.data import Dataset

Assignment = list[np.ndarray]

_REDRAWS = 50


def iid(labels: Any, num_clients: int, *, seed: int = 0) -> Assignment:
    """A random split into parts whose sizes differ by at most one.

    Args:
      labels: anything with one row per example; only its length matters.
      num_clients: number of parts.
      seed: of the split.

    Raises:
      ValueError: if there are more clients than examples.
    """
    total = len(labels)
    _check_counts(total, num_clients, 1)
    return [np.sort(part) for part in np.array_split(np.random.default_rng(seed).permutation(total), num_clients)]


def dirichlet(labels: Any, num_clients: int, *, alpha: float, min_size: int = 1, seed: int = 0) -> Assignment:
    """Label skew: the examples of each class are dealt out in proportions drawn from Dirichlet(alpha).

    A small alpha gives every class to few clients, a large one approaches an even split. (Hsu, Qi, Brown, "Measuring
    the Effects of Non-Identical Data Distribution for Federated Visual Classification", 2019; the proportions are
    drawn per class, as in Yurochkin et al., 2019.)

    A draw that leaves a client below `min_size` is repeated, at most 50 times; then the clients that lack examples
    are given random ones of the client that has most, which bends the proportions as little as possible.

    Args:
      labels: int[n].
      num_clients: N.
      alpha: concentration, above 0.
      min_size: fewest examples of a client.
      seed: of the split.

    Raises:
      ValueError: if labels are not int[n], alpha is not above 0, or N min_size exceeds n.
    """
    labels = _check_labels(labels)
    checks.scalar("alpha", alpha, low=0, low_open=True)
    if isinstance(min_size, bool) or not isinstance(min_size, int) or min_size < 0:
        raise ValueError(f"min_size must be an integer of at least 0, got {min_size!r}: 1 rules out empty clients")
    _check_counts(len(labels), num_clients, min_size)
    rng = np.random.default_rng(seed)
    classes = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    best: Assignment = []
    smallest = -1
    for _ in range(_REDRAWS):
        parts: list[list[np.ndarray]] = [[] for _ in range(num_clients)]
        for members in classes:
            shares = rng.dirichlet(np.full(num_clients, alpha))
            cuts = np.floor(np.cumsum(shares)[:-1] * len(members) + 0.5).astype(np.int64)
            for part, piece in zip(parts, np.split(rng.permutation(members), cuts), strict=True):
                part.append(piece)
        drawn = [np.concatenate(part) for part in parts]
        size = min(len(part) for part in drawn)
        if size > smallest:
            best, smallest = drawn, size
        if smallest >= min_size:
            break
    return [np.sort(part) for part in _top_up(best, min_size, rng)]


def shards(labels: Any, num_clients: int, *, shards_per_client: int = 2, seed: int = 0) -> Assignment:
    """The examples sorted by label are cut into N shards_per_client equal shards; every client gets as many at random.

    With 2 shards most clients see two classes (McMahan et al., 2017).

    Args:
      labels: int[n].
      num_clients: N.
      shards_per_client: shards of each client.
      seed: of the split.

    Raises:
      ValueError: if labels are not int[n], or there are more shards than examples.
    """
    labels = _check_labels(labels)
    checks.positive_int("shards_per_client", shards_per_client, "a client gets at least one shard")
    _check_counts(len(labels), num_clients, shards_per_client)
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(len(labels))
    by_label = shuffled[np.argsort(labels[shuffled], kind="stable")]
    pieces = np.array_split(by_label, num_clients * shards_per_client)
    order = rng.permutation(len(pieces)).reshape(num_clients, shards_per_client)
    return [np.sort(np.concatenate([pieces[i] for i in row])) for row in order]


PARTITIONS: dict[str, Callable[..., Assignment]] = {"iid": iid, "dirichlet": dirichlet, "shards": shards}


def federate(dataset: Dataset, assignment: Sequence[Any]) -> Population:
    """The training examples of a data set, grouped by client.

    Args:
      dataset: the data set.
      assignment: int[n_i] for each client, rows of the training part. An example may be left out.

    Raises:
      ValueError: if an index is out of range or is given twice.
    """
    total = len(dataset.train["y"])
    parts = [np.asarray(part, np.int64).reshape(-1) for part in assignment]
    order = np.concatenate([np.zeros(0, np.int64), *parts])
    outside = order[(order < 0) | (order >= total)]
    if outside.size:
        raise ValueError(
            f"assignment holds index {outside[0]}, but {dataset.name} has training examples 0 to {total - 1}: use those"
        )
    repeated = np.flatnonzero(np.bincount(order, minlength=total) > 1)
    if repeated.size:
        raise ValueError(f"assignment holds example {repeated[0]} more than once: give each example to one client")
    examples = {name: leaf[order] for name, leaf in dataset.train.items()}
    return Population.from_sizes(examples, np.asarray([len(part) for part in parts], np.int64))


def _top_up(parts: Assignment, min_size: int, rng: np.random.Generator) -> Assignment:
    """Moves single examples from the largest part to those below `min_size`; there are enough, as was checked."""
    pool = [list(rng.permutation(part)) for part in parts]
    largest = [(-len(part), i) for i, part in enumerate(pool)]
    heapq.heapify(largest)
    for part in pool:
        while len(part) < min_size:
            size, giver = heapq.heappop(largest)
            if -size != len(pool[giver]):  # out of date: this one has received or given since
                heapq.heappush(largest, (-len(pool[giver]), giver))
                continue
            part.append(pool[giver].pop())
            heapq.heappush(largest, (-len(pool[giver]), giver))
    return [np.asarray(part, np.int64) for part in pool]


def _check_labels(labels: Any) -> np.ndarray:
    array = np.asarray(labels)
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(
            f"labels must be integers [n], got {array.dtype}{list(array.shape)}: this split goes by the class of an "
            "example, use iid for anything else"
        )
    return array


def _check_counts(total: int, num_clients: int, at_least: int) -> None:
    checks.positive_int("num_clients", num_clients, "a federation has at least one client")
    if num_clients * max(at_least, 1) > total and at_least > 0:
        raise ValueError(
            f"num_clients={num_clients} with at least {at_least} examples each need {num_clients * at_least}, but "
            f"there are {total}: ask for at most {total // at_least} clients, or for fewer examples each"
        )
