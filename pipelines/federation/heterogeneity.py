"""How unlike the clients of a federation are, and what about a split would spoil a study.

Divergences and entropies are in nats. Letters: n examples of a data set's training part, N clients, K classes.
"""

from collections.abc import Mapping
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np

from fedjax_core import checks
from fedjax_core.types import ArrayLike
from pipelines.data.datasets import Dataset
from pipelines.federation.assignment import Assignment

_EXACT_CLIENTS = 500
_SAMPLED_PAIRS = 100_000
_AT_ONCE = 4_000_000
_QUANTILES = (0, 0.25, 0.5, 0.75, 1)


class PairDivergence(NamedTuple):
    """Jensen-Shannon divergences of pairs of clients.

    Attributes:
      mean: over the pairs, 0 if there is none.
      largest: likewise, at most log 2.
      pairs: how many pairs were compared.
      exact: whether these are all pairs; otherwise they are drawn at random.
    """

    mean: float
    largest: float
    pairs: int
    exact: bool


class Leakage(NamedTuple):
    """Test examples whose input is, byte for byte, that of a training example.

    Attributes:
      examples: how many there are.
      same_client: those of which the client that is tested on it trains on it too.
      other_client: those of which another client trains on it. An example may count as both.
    """

    examples: int
    same_client: int
    other_client: int


def label_counts(assignment: Assignment, labels: ArrayLike, num_classes: int) -> np.ndarray:
    """How often each client has each class, int64[N, K].

    Args:
      assignment: who holds which rows.
      labels: int[n], or int[n, T] for sequences, where every position counts and -1 is padding.
      num_classes: K.

    Raises:
      ValueError: if labels are no integers below K, or the assignment has rows beyond them.
    """
    array = np.asarray(labels)
    if labels is None or array.ndim not in (1, 2) or not np.issubdtype(array.dtype, np.integer):
        got = "None" if labels is None else f"{array.dtype}{list(array.shape)}"
        raise ValueError(f"labels must be integers [n] or [n, T], got {got}: these measures go by the class")
    _check_rows(assignment, len(array))
    held = (array[:, None] if array.ndim == 1 else array)[assignment.rows]
    counted = held >= 0 if array.ndim == 2 else np.ones(held.shape, bool)
    checks.labels(held[counted], num_classes)
    cell = assignment.clients[:, None] * num_classes + held
    counts = np.bincount(cell[counted], minlength=len(assignment) * num_classes)
    return counts.reshape(len(assignment), num_classes)


def label_entropy(counts: np.ndarray) -> np.ndarray:
    """Entropy of the label distribution of each client that has examples, float[<= N]: from 0 to log K.

    Args:
      counts: int[N, K], as of `label_counts`.
    """
    return _entropy(_shares(counts))


def size_gini(sizes: np.ndarray) -> float:
    """Gini coefficient of int[N] sizes: 0 if all are the same, (N - 1) / N if one client has everything."""
    ascending = np.sort(np.asarray(sizes, float))
    num = len(ascending)
    return float(((2 * np.arange(1, num + 1) - num - 1) * ascending).sum() / (num * max(ascending.sum(), 1)))


def effective_clients(sizes: np.ndarray) -> float:
    """Effective number of clients (sum n_i)**2 / sum n_i**2: N if all int[N] sizes are the same, 1 if one has all."""
    weights = np.asarray(sizes, float)
    return float(weights.sum() ** 2 / max((weights**2).sum(), 1))


def pair_divergence(counts: np.ndarray, *, seed: int = 0) -> PairDivergence:
    """Jensen-Shannon divergence of the label distributions of two clients, over all pairs that have examples.

    Exact for up to 500 clients with examples; for more, over 100,000 random pairs of different clients.

    Args:
      counts: int[N, K], as of `label_counts`.
      seed: of the random pairs.
    """
    shares = _shares(counts)
    num = len(shares)
    exact = num <= _EXACT_CLIENTS
    if exact:
        first, second = np.triu_indices(num, 1)
    else:
        rng = np.random.default_rng(seed)
        first = rng.integers(0, num, _SAMPLED_PAIRS)
        second = (first + rng.integers(1, num, _SAMPLED_PAIRS)) % num
    if not first.size:
        return PairDivergence(0.0, 0.0, 0, True)
    step = max(1, _AT_ONCE // shares.shape[1])
    values = np.concatenate(
        [
            _jensen_shannon(shares[first[at : at + step]], shares[second[at : at + step]])
            for at in range(0, len(first), step)
        ]
    )
    return PairDivergence(float(values.mean()), float(values.max()), len(values), exact)


def global_divergence(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How far the label distribution of each client that has examples is from that of all examples together.

    Args:
      counts: int[N, K], as of `label_counts`.

    Returns:
      (total variation distances, Jensen-Shannon divergences), float[<= N] each.
    """
    shares = _shares(counts)
    mix = _shares(counts.sum(axis=0, keepdims=True))
    return np.abs(shares - mix).sum(axis=1) / 2, _jensen_shannon(shares, mix)


def measure(assignment: Assignment, labels: ArrayLike, num_classes: int) -> dict[str, float]:
    """The measures of one assignment, by name; clients without examples count for the sizes alone.

    Args:
      assignment: who holds which rows.
      labels: int[n], or int[n, T] for sequences, where every position counts and -1 is padding.
      num_classes: K.

    Returns:
      Numbers of clients and of examples; the sizes' minimum, quartiles, maximum, Gini coefficient and effective number
      of clients; means of the clients' number of classes, label entropy (also as a share of log K), total variation
      and Jensen-Shannon divergence from all examples; and mean and maximum of the Jensen-Shannon divergence of two
      clients, with the number of pairs that were compared.

    Raises:
      ValueError: if labels are no integers below K, or no client has an example.
    """
    counts = label_counts(assignment, labels, num_classes)
    if not counts.any():
        raise ValueError("the assignment holds no examples: there is nothing to measure")
    sizes = assignment.sizes
    quantiles = dict(zip(("min", "q25", "median", "q75", "max"), np.quantile(sizes, _QUANTILES).tolist(), strict=True))
    entropy = label_entropy(counts)
    total_variation, divergence = global_divergence(counts)
    pairs = pair_divergence(counts)
    return {
        "clients": len(assignment),
        "examples": len(assignment.rows),
        **{f"size {name}": value for name, value in quantiles.items()},
        "size gini": size_gini(sizes),
        "effective clients": effective_clients(sizes),
        "classes per client": float((counts[counts.any(axis=1)] > 0).sum(axis=1).mean()),
        "label entropy": float(entropy.mean()),
        "label entropy / log K": float(entropy.mean() / np.log(num_classes)) if num_classes > 1 else 0.0,
        "TV from all": float(total_variation.mean()),
        "JS from all": float(divergence.mean()),
        "JS of pairs": pairs.mean,
        "JS of pairs, max": pairs.largest,
        "pairs compared": pairs.pairs,
    }


def compare(assignments: Mapping[str, Assignment], labels: ArrayLike, num_classes: int) -> list[dict[str, Any]]:
    """The measures of several assignments of the same examples: a row for each, with its name first (`measure`)."""
    return [{"partition": name, **measure(a, labels, num_classes)} for name, a in assignments.items()]


def to_markdown(rows: list[dict[str, Any]]) -> str:
    """A table of rows with the same keys; numbers have four significant digits.

    Raises:
      ValueError: if there is no row, or two rows differ in their keys.
    """
    if not rows:
        raise ValueError("rows is empty: pass at least one")
    names = list(rows[0])
    for row in rows:
        if list(row) != names:
            raise ValueError(f"rows have the keys {names} and {list(row)}: a table needs the same in each")

    lines = [names, ["---" if isinstance(rows[0][name], str) else "---:" for name in names]]
    lines += [[shown(row[name]).replace("|", "\\|") for name in names] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def shown(value: Any) -> str:
    """A value of a table as text; numbers have four significant digits."""
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)


def leakage(dataset: Dataset, assignment: Assignment, test_assignment: Assignment | None = None) -> Leakage:
    """Counts test examples whose input is in the training part of a federation too.

    Inputs are compared by 64 bits of a hash of their bytes: among a million, a false match has a chance below 1e-7.

    Args:
      dataset: the data set.
      assignment: who trains on which rows of `dataset.train`.
      test_assignment: who is tested on which rows of `dataset.test`, the same clients; None if all rows test the global
        model. For a part that `splits.split_clients` gives, pass `dataset._replace(test=dataset.train)`.

    Raises:
      ValueError: if an assignment has rows that the data set has not, or the two differ in their number of clients.
    """
    rows = np.arange(len(dataset.test["x"]))
    tested = np.full(len(rows), -1)
    if test_assignment is not None:
        if len(test_assignment) != len(assignment):
            raise ValueError(
                f"test_assignment has {len(test_assignment)} clients and assignment {len(assignment)}: give every "
                "client its own test rows, an empty array for none"
            )
        _check_rows(test_assignment, len(dataset.test["x"]), "test")
        rows, tested = test_assignment.rows, test_assignment.clients
    _check_rows(assignment, len(dataset.train["x"]))
    seen = _hashes(dataset.train["x"], assignment.rows)
    found, inputs = np.unique(np.concatenate([seen, _hashes(dataset.test["x"], rows)]), return_inverse=True)
    train_inputs, test_inputs = np.split(inputs, [len(seen)])
    num_clients = len(assignment)
    holdings = np.unique(train_inputs * num_clients + assignment.clients)
    holders = np.bincount(holdings // num_clients, minlength=len(found))[test_inputs]
    own = np.isin(test_inputs * num_clients + tested, holdings) & (tested >= 0)
    return Leakage(int((holders > 0).sum()), int(own.sum()), int((holders > own).sum()))


def warnings(
    dataset: Dataset,
    assignment: Assignment,
    *,
    test_assignment: Assignment | None = None,
    batch_size: int = 1,
) -> list[str]:
    """What about a federation would spoil a study, in plain sentences; none if nothing does.

    Clients that hold no examples, one class alone, less than a batch, or more than half of everything; test examples
    that are trained on (`leakage`); classes that are trained on and not tested, or the other way round. What concerns
    classes is left out for sequences, whose labels are tokens.

    Args:
      dataset: the data set.
      assignment: who trains on which rows of `dataset.train`.
      test_assignment: who is tested on which rows of `dataset.test`, as in `leakage`.
      batch_size: examples of a local step.

    Raises:
      ValueError: as in `leakage`, or if the batch size is below 1.
    """
    checks.positive_int("batch_size", batch_size, "each local step needs at least one example")
    leak = leakage(dataset, assignment, test_assignment)
    sizes, num_clients = assignment.sizes, len(assignment)
    total = len(assignment.rows)
    tested = np.arange(len(dataset.test["x"])) if test_assignment is None else test_assignment.rows
    found = []

    def of_clients(chosen: np.ndarray, what: str) -> None:
        if chosen.any():
            count = int(chosen.sum())
            found.append(f"{count:,} of {num_clients:,} clients ({count / num_clients:.0%}) {what}")

    of_clients(sizes == 0, "hold no examples: they train nothing when they are sampled.")
    of_clients(
        (sizes > 0) & (sizes < batch_size),
        f"hold fewer examples than a batch of {batch_size}: their only step is a small one.",
    )
    if num_clients > 2 and 2 * sizes.max() > total:
        found.append(
            f"Client {sizes.argmax()} holds {sizes.max() / total:.0%} of all {total:,} training examples: weighted by "
            "examples, the global model is mostly its own."
        )
    if not dataset.is_sequence:
        counts = label_counts(assignment, dataset.train["y"], dataset.num_classes)
        of_clients((counts > 0).sum(axis=1) == 1, "hold one class alone: a constant answer is perfect for them.")
        in_train = counts.any(axis=0)
        in_test = np.bincount(dataset.test["y"][tested], minlength=dataset.num_classes) > 0
        for missing, where, what in (
            (~in_train & in_test, "training", "the test measures what no client could learn"),
            (in_train & ~in_test, "test", "what is learned of them is not measured"),
            (~in_train & ~in_test, "training or test", "the model has outputs for nothing"),
        ):
            if missing.any():
                names = ", ".join(map(str, np.flatnonzero(missing)))
                found.append(f"No {where} example has a label of {names}: {what}.")
    if leak.examples:
        whose = (
            f" ({leak.same_client:,} by the client that is tested on them, {leak.other_client:,} by another client)"
            if test_assignment is not None
            else ""
        )
        found.append(
            f"{leak.examples:,} of {len(tested):,} test examples are trained on, their inputs equal byte for byte"
            f"{whose}: the test rewards memory."
        )
    return found


def _shares(counts: np.ndarray) -> np.ndarray:
    """Label distributions of the clients that have examples, float[<= N, K]."""
    held = counts[counts.any(axis=1)]
    return held / held.sum(axis=1, keepdims=True)


def _entropy(shares: np.ndarray) -> np.ndarray:
    return -(shares * np.log(np.where(shares > 0, shares, 1))).sum(axis=-1)


def _jensen_shannon(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    # Rounding can take the difference of the entropies below 0.
    return np.maximum(_entropy((first + second) / 2) - (_entropy(first) + _entropy(second)) / 2, 0)


def _hashes(x: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """uint64[m], a hash of the bytes of each of the rows, read a block at a time as x may be a file."""
    digests = []
    step = max(1, _AT_ONCE // max(1, x[:1].nbytes))
    for at in range(0, len(rows), step):
        block = x[rows[at : at + step]]
        digests += [blake2b(row.tobytes(), digest_size=8).digest() for row in block]
    return np.frombuffer(b"".join(digests), np.uint64)


def _check_rows(assignment: Assignment, total: int, part: str = "training") -> None:
    largest = int(assignment.rows.max(initial=-1))
    if largest >= total:
        raise ValueError(
            f"assignment holds row {largest}, but there are {part} examples 0 to {total - 1}: it belongs to other data"
        )
