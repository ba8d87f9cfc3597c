"""Subsets and splits of assignments: long tails, new clients, validation and test parts of clients, dealt examples.

Letters: n examples of a data set's training part, N clients, K classes.
"""

from typing import NamedTuple

import numpy as np

from fedjax_core import checks
from fedjax_core.types import ArrayLike
from pipelines.federation.assignment import Assignment

_ROUNDING = 1e-9
# One seed serves the partition and every split of a federation: each split has a stream of its own, or the clients held
# out would be chosen by the very permutation that divided the examples.
_LONG_TAIL, _HOLD_OUT, _SPLIT, _PUBLIC, _DEAL = 1, 2, 3, 4, 0xDEA1


class HoldOut(NamedTuple):
    """A federation and the clients that join it later.

    Attributes:
      kept: the assignment of those that train.
      new: the assignment of those that do not.
      kept_ids: int64[N - number], their numbers before, ascending.
      new_ids: int64[number], likewise.
    """

    kept: Assignment
    new: Assignment
    kept_ids: np.ndarray
    new_ids: np.ndarray


class ClientSplit(NamedTuple):
    """Three assignments to the same clients, of different rows of the same arrays.

    Attributes:
      train: at least one row of every client that has any.
      validation: may leave a client without rows.
      test: likewise.
    """

    train: Assignment
    validation: Assignment
    test: Assignment


def hold_out_rows(rows: np.ndarray, share: float, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(rows held out at random, the others), int64 each and ascending.

    Args:
      rows: int64[n], ascending.
      share: of the rows that are held out, above 0 and below 1; their number is rounded.
      seed: of the choice.

    Raises:
      ValueError: if none would be held out, or none left.
    """
    checks.scalar("share", share, low=0, high=1, low_open=True, high_open=True)
    number = round(share * len(rows))
    if not 0 < number < len(rows):
        raise ValueError(
            f"a share of {share:g} of {len(rows)} examples holds out {number} and leaves {len(rows) - number}: take "
            "another share, by which both have some"
        )
    held = np.zeros(len(rows), bool)
    held[np.random.default_rng([seed, _PUBLIC]).choice(len(rows), number, replace=False)] = True
    return rows[held], rows[~held]


def long_tail(labels: ArrayLike, factor: float, *, seed: int = 0) -> np.ndarray:
    """Rows of a subset in which class k of K has n_max factor**(-k / (K - 1)) examples, rounded down.

    From n_max for the first class to n_max / factor for the last one, where n_max is as large as the examples allow:
    the size of a class if all have the same. (Cui et al., "Class-Balanced Loss Based on Effective Number of Samples",
    2019; Cao et al., "Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss", 2019.)

    Partition the subset and read the result as rows of the whole:
    `partition.dirichlet(labels[rows], N, alpha=0.3).within(rows)`.

    Args:
      labels: int[n], with at least two classes.
      factor: the imbalance, largest over smallest class, at least 1.
      seed: of the choice of examples.

    Returns:
      int64[m], ascending.

    Raises:
      ValueError: if labels are not int[n] of two classes, the factor is below 1, or the last class would be empty.
    """
    array = np.asarray(labels)
    if labels is None or array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        got = "None" if labels is None else f"{array.dtype}{list(array.shape)}"
        raise ValueError(f"labels must be integers [n], got {got}: a long tail goes by the class of an example")
    checks.scalar("factor", factor, low=1, high_open=True)
    found, member, sizes = np.unique(array, return_inverse=True, return_counts=True)
    if len(found) < 2:
        raise ValueError(f"labels hold {len(found)} class(es): a long tail needs at least 2")
    profile = float(factor) ** (-np.arange(len(found)) / (len(found) - 1))
    wanted = np.floor((sizes / profile).min() * profile + _ROUNDING).astype(np.int64)
    if wanted.min() < 1:
        raise ValueError(
            f"factor={factor:g} leaves class {found[-1]} without examples, as the first one has {wanted[0]}: take a "
            "smaller factor"
        )
    shuffled = np.random.default_rng([seed, _LONG_TAIL]).permutation(len(array))
    by_class = shuffled[np.argsort(member[shuffled], kind="stable")]
    place = np.arange(len(array)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return np.sort(by_class[place < np.repeat(wanted, sizes)])


def hold_out_clients(assignment: Assignment, number: int, *, seed: int = 0) -> HoldOut:
    """Takes `number` clients, chosen at random, out of a federation, to be met after training.

    Raises:
      ValueError: if the number is not an integer in 1..N-1.
    """
    checks.positive_int("number", number, "hold at least one client out")
    if number >= len(assignment):
        raise ValueError(
            f"number={number} of {len(assignment)} clients leaves none to train: hold out at most {len(assignment) - 1}"
        )
    order = np.random.default_rng([seed, _HOLD_OUT]).permutation(len(assignment))
    new_ids, kept_ids = np.sort(order[:number]), np.sort(order[number:])
    return HoldOut(assignment.select(kept_ids), assignment.select(new_ids), kept_ids, new_ids)


def split_clients(
    assignment: Assignment,
    shares: tuple[float, float],
    *,
    by: str = "random",
    labels: ArrayLike | None = None,
    gap: int = 0,
    seed: int = 0,
) -> ClientSplit:
    """Splits every client's examples into training, validation and test.

    A part has its share of the client's examples, rounded to the nearest number. Every client keeps at least one
    example to train on: one that has too few gives up validation first, then test.

    Args:
      assignment: who holds which rows.
      shares: of validation and of test, each at least 0, together below 1; 0 leaves a part empty.
      by: "random", or "position" for rows in the order of time (of a recording, of a text): the test part is the end of
        a client's rows, and validation comes before it.
      labels: int[n], to give every part its share of each of a client's classes, up to rounding (random only).
      gap: rows that are dropped before validation and before test (position only); windows that overlap by half need 1.
      seed: of the random split.

    Raises:
      ValueError: if shares are not two numbers as above, or labels or gap come with the wrong `by`.
    """
    checks.one_of("by", by, ("random", "position"))
    if isinstance(gap, bool) or not isinstance(gap, int) or gap < 0:
        raise ValueError(f"gap must be an integer of at least 0, got {gap!r}: 0 drops nothing")
    if len(shares) != 2 or not all(0 <= share < 1 for share in shares) or sum(shares) >= 1:
        raise ValueError(
            f"shares must be (validation, test), each at least 0 and together below 1, got {shares!r}: for instance "
            "(0.1, 0.2)"
        )
    if by == "random" and gap:
        raise ValueError(f"gap={gap} means nothing to a random split: take by='position', or leave the gap out")
    if by == "position" and labels is not None:
        raise ValueError("labels mean nothing to a split by position: take by='random', or leave the labels out")
    sizes = assignment.sizes
    spare = np.maximum(sizes - 1, 0)
    test = np.minimum(_round(shares[1] * sizes), np.maximum(spare - gap, 0))
    spare = spare - test - gap * (test > 0)
    validation = np.minimum(_round(shares[0] * sizes), np.maximum(spare - gap, 0))
    if by == "position":
        from_end = np.repeat(assignment.offsets[1:], sizes) - 1 - np.arange(len(assignment.rows))
        test_gap = np.where(test > 0, gap, 0)
        validation_gap = np.where(validation > 0, gap, 0)
        ends = np.cumsum([test, test_gap, validation, validation_gap], axis=0)
        behind = [from_end < end for end in np.repeat(ends, sizes, axis=1)]
        return ClientSplit(
            _part(assignment, ~behind[3]), _part(assignment, behind[2] & ~behind[1]), _part(assignment, behind[0])
        )
    rng = np.random.default_rng([seed, _SPLIT])
    clients = assignment.clients
    classes = np.zeros(len(clients)) if labels is None else _labels_of(labels, assignment)
    order = np.lexsort((rng.random(len(clients)), classes, clients))
    is_test = np.zeros(len(clients), bool)
    is_test[order] = _every(sizes, test, rng)
    rest = order[~is_test[order]]
    is_validation = np.zeros(len(clients), bool)
    is_validation[rest] = _every(sizes - test, validation, rng)
    return ClientSplit(
        _part(assignment, ~is_test & ~is_validation), _part(assignment, is_validation), _part(assignment, is_test)
    )


def deal(held: Assignment, strata: ArrayLike, others: ArrayLike, *, seed: int = 0) -> Assignment:
    """Deals other examples out to the same clients, those of each stratum in the shares in which clients hold it.

    What clients are tested on, if it is to be as much their own as what they train on. A share that is no whole number
    is rounded up or down by chance, so that small clients are not left out together. An example goes to one client, or
    to none where no client holds its stratum.

    Args:
      held: who holds which rows.
      strata: int[n], a number of at least 0 for each of the rows that may be held: its class, or its domain and class.
      others: int[m], likewise for each of the others.
      seed: of the deal.

    Returns:
      The assignment of the others.
    """
    strata, others = np.asarray(strata), np.asarray(others)
    clients, found = held.clients, strata[held.rows]
    owner = np.full(len(others), -1)
    for stratum in np.unique(others):
        counts = np.bincount(clients[found == stratum], minlength=len(held))
        rng = np.random.default_rng([seed, _DEAL, int(stratum)])
        rows = rng.permutation(np.flatnonzero(others == stratum))
        order = rng.permutation(len(held))
        ends = np.cumsum(counts[order])
        if ends[-1]:
            at = (np.arange(len(rows)) + rng.random()) * (ends[-1] / len(rows))
            owner[rows] = order[np.searchsorted(ends, at, side="right")]
    return Assignment.from_owner(owner, len(held))


def _round(values: np.ndarray) -> np.ndarray:
    return np.floor(values + 0.5).astype(np.int64)


def _every(sizes: np.ndarray, take: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """bool[m], take[i] of the sizes[i] places of each client, at equal distances from a random start.

    Of any run of places that share a class, this takes the same share up to one.
    """
    start = rng.integers(0, np.maximum(sizes, 1))
    place = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    size, each, first = (np.repeat(values, sizes) for values in (sizes, take, start))
    return ((place + 1) * each + first) // size > (place * each + first) // size


def _part(assignment: Assignment, chosen: np.ndarray) -> Assignment:
    """The chosen entries of an assignment's rows, bool[m], with the same clients."""
    before = np.concatenate([[0], np.cumsum(chosen)])
    return Assignment(assignment.rows[chosen], before[assignment.offsets])


def _labels_of(labels: ArrayLike, assignment: Assignment) -> np.ndarray:
    array = np.asarray(labels)
    total = int(assignment.rows.max(initial=-1)) + 1
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer) or len(array) < total:
        raise ValueError(
            f"labels must be integers [n] with a class for each of at least {total} rows, got {array.dtype}"
            f"{list(array.shape)}: pass those of the whole training part"
        )
    return array[assignment.rows]
