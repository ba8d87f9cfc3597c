"""Who holds which examples: pure functions of what they read, the number of clients and a seed.

Each returns an `Assignment` in which every example appears exactly once, unless the function says what it leaves out.
The name of the first argument says what is read: `labels`, int[n], the class of each example, or `groups`, int[n], the
natural client or the domain that it comes from. Adding a partition is writing such a function and entering it in
`PARTITIONS`; its keyword arguments are taken from the fields of the same name of
`pipelines.configuration.config.Config`.

Letters: n examples, N clients, K classes.
"""

import heapq
from collections.abc import Callable, Sequence, Sized
from typing import Any

import numpy as np

from fedjax_core import Population, checks
from fedjax_core.types import ArrayLike
from pipelines.data.datasets import Dataset
from pipelines.federation.assignment import Assignment

_REDRAWS = 50
# Tries of `clusters`, and how many proportions are drawn in all and at once: about a second, and few megabytes.
_TRIES = 10_000
_DRAWN = 10_000_000
_AT_ONCE = 100_000
# A size below a whole number by this little is that number; with ten million clients it is still no example too many.
_ROUNDING = 1e-7


def iid(labels: Sized, num_clients: int, *, seed: int = 0) -> Assignment:
    """A random split into parts whose sizes differ by at most one.

    Args:
      labels: anything with one row per example; only its length matters.
      num_clients: number of parts.
      seed: of the split.

    Raises:
      ValueError: if there are more clients than examples.
    """
    total = _count(labels)
    _check_counts(total, num_clients, 1)
    return _in_turn(np.random.default_rng(seed).permutation(total), _even(total, num_clients))


def dirichlet(labels: ArrayLike, num_clients: int, *, alpha: float, min_size: int = 1, seed: int = 0) -> Assignment:
    """Label skew: the examples of each class are divided in proportions drawn from Dirichlet(alpha).

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
    checks.scalar("alpha", alpha, low=0, low_open=True, high_open=True)
    _check_counts(len(labels), num_clients, _check_min_size(min_size))
    rng = np.random.default_rng(seed)
    members = _members(labels)
    sizes, order, smallest = np.zeros((0, num_clients), np.int64), np.zeros(0, np.int64), -1
    for _ in range(_REDRAWS):
        drawn, shuffled = np.empty((len(members), num_clients), np.int64), []
        for k, rows in enumerate(members):
            shares = rng.dirichlet(np.full(num_clients, alpha))
            cuts = np.floor(np.cumsum(shares)[:-1] * len(rows) + 0.5).astype(np.int64)
            drawn[k] = np.diff(cuts, prepend=0, append=len(rows))
            shuffled.append(rng.permutation(rows))
        if drawn.sum(axis=0).min() > smallest:
            sizes, order, smallest = drawn, np.concatenate(shuffled), int(drawn.sum(axis=0).min())
        if smallest >= min_size:
            return _in_turn(order, sizes)
    by_client = order[np.argsort(_turns(sizes), kind="stable")]
    return _top_up(np.split(by_client, np.cumsum(sizes.sum(axis=0))[:-1]), min_size, rng)


def shards(labels: ArrayLike, num_clients: int, *, shards_per_client: int = 2, seed: int = 0) -> Assignment:
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
    num_shards = num_clients * shards_per_client
    holder = np.empty(num_shards, np.int64)
    holder[rng.permutation(num_shards)] = np.repeat(np.arange(num_clients), shards_per_client)
    owner = np.empty(len(labels), np.int64)
    owner[by_label] = np.repeat(holder, _even(len(labels), num_shards))
    return Assignment.from_owner(owner, num_clients)


def classes(labels: ArrayLike, num_clients: int, *, classes_per_client: int = 2, seed: int = 0) -> Assignment:
    """Label skew: every client holds exactly `classes_per_client` classes.

    The "pathological" split of FedPer and FedRep (Arivazhagan et al., 2019; Collins et al., 2021). Every class is held
    by as many clients as any other, up to one and as far as a class has an example for each of them, and is cut evenly
    among its holders. Which classes meet at a client is random.

    Args:
      labels: int[n].
      num_clients: N.
      classes_per_client: classes of each client, at most K.
      seed: of the split.

    Raises:
      ValueError: if labels are not int[n], there are fewer than `classes_per_client` classes, the clients together
        hold fewer classes than there are, or the classes have too few examples for that many holders.
    """
    labels = _check_labels(labels)
    members = _members(labels)
    _check_holders(len(members), num_clients, classes_per_client)
    rng = np.random.default_rng(seed)
    most = np.minimum([len(rows) for rows in members], num_clients)
    places = num_clients * classes_per_client
    if most.sum() < places:
        raise ValueError(
            f"num_clients={num_clients} with {classes_per_client} classes each need {places} holders of a class, but "
            f"the {len(labels)} examples allow {most.sum()}, with one example of each of their classes: ask for fewer "
            "clients, or for fewer classes each"
        )
    left = _level(most, places, rng)
    holds = np.zeros((num_clients, len(members)), bool)
    for client in rng.permutation(num_clients):
        # Those that most clients still have to take, ties at random: so none is left over that a client has already.
        taken = np.argsort(left + rng.random(len(left)))[-classes_per_client:]
        holds[client, taken] = True
        left[taken] -= 1
    order = [rng.permutation(rows) for rows in members]
    sizes = np.zeros((len(members), num_clients), np.int64)
    for k, rows in enumerate(members):
        holders = rng.permutation(np.flatnonzero(holds[:, k]))
        sizes[k, holders] = _even(len(rows), len(holders))
    return _in_turn(np.concatenate(order), sizes)


def partial_classes(
    labels: ArrayLike, num_clients: int, *, classes_per_client: int = 2, alpha: float, seed: int = 0
) -> Assignment:
    """Partially class-disjoint data: every client holds `classes_per_client` classes, in Dirichlet(alpha) amounts.

    Unlike in `classes`, a class may be held by many clients or by one: the classes are assigned once in order, so that
    each is held, and all further places at random without giving a client a class twice. (Fan et al., "Federated
    Learning with Bilateral Curation for Partially Class-Disjoint Data", 2023; N, `classes_per_client` and alpha are its
    rho, C and beta.) The examples of a class are divided among its holders in proportions drawn from Dirichlet(alpha),
    with at least one for each. The released code cuts them evenly, which a large alpha approaches.

    Args:
      labels: int[n].
      num_clients: N.
      classes_per_client: classes of each client, at most K.
      alpha: concentration, above 0.
      seed: of the split.

    Raises:
      ValueError: if labels are not int[n], alpha is not above 0, there are fewer than `classes_per_client` classes, the
        clients together hold fewer classes than there are, or a class has fewer examples than holders.
    """
    labels = _check_labels(labels)
    members = _members(labels)
    checks.scalar("alpha", alpha, low=0, low_open=True, high_open=True)
    _check_holders(len(members), num_clients, classes_per_client)
    rng = np.random.default_rng(seed)
    lots = rng.random((num_clients, len(members)))
    index = np.arange(len(members))
    lots[index // classes_per_client, index] = 1  # above every other lot
    holds = np.zeros(lots.shape, bool)
    np.put_along_axis(holds, np.argsort(lots, axis=1)[:, -classes_per_client:], True, axis=1)
    sizes = np.zeros((len(members), num_clients), np.int64)
    for k, rows in enumerate(members):
        holders = np.flatnonzero(holds[:, k])
        if len(holders) > len(rows):
            raise ValueError(
                f"class {labels[rows[0]]} has {len(rows)} examples for {len(holders)} clients that hold it: ask for "
                f"fewer than {num_clients} clients, or for fewer than {classes_per_client} classes each"
            )
        sizes[k, holders] = _apportion(rng.dirichlet(np.full(len(holders), alpha)), len(rows), 1)
    return _in_turn(np.concatenate([rng.permutation(rows) for rows in members]), sizes)


def lognormal(labels: Sized, num_clients: int, *, sigma: float, min_size: int = 1, seed: int = 0) -> Assignment:
    """Quantity skew: sizes in proportion to log-normal draws, examples at random.

    Args:
      labels: anything with one row per example; only its length matters.
      num_clients: N.
      sigma: standard deviation of the logarithm of a size, at least 0; 0 gives even sizes.
      min_size: fewest examples of a client; those drawn below it have it exactly, and the others share the rest.
      seed: of the split.

    Raises:
      ValueError: if sigma is below 0 or N min_size exceeds n.
    """
    total = _count(labels)
    checks.scalar("sigma", sigma, low=0, high_open=True)
    _check_counts(total, num_clients, _check_min_size(min_size))
    rng = np.random.default_rng(seed)
    logs = sigma * rng.standard_normal(num_clients)
    sizes = _apportion(np.exp(logs - logs.max()), total, min_size)
    return _in_turn(rng.permutation(total), sizes)


def lognormal_classes(
    labels: ArrayLike, num_clients: int, *, classes_per_client: int = 2, sigma: float, min_size: int = 1, seed: int = 0
) -> Assignment:
    """Label and quantity skew: client i holds the classes i, i + 1, ... modulo K, in log-normal amounts.

    The MNIST of FedProx's authors, which FedML and FLUTE took over, has 1,000 clients with 2 digits each, at least 5
    examples of either, and sigma 2: a few clients hold thousands of examples and most a dozen, which these papers call
    a power law. (Li et al., "Federated Optimization in Heterogeneous Networks", 2020; the release leaves out what does
    not fit a class any more, here every example is held.)

    Every holder of a class has `min_size` / `classes_per_client` of its examples, rounded up, and one at least; the
    others are divided in proportion to draws whose logarithms have the standard deviation sigma.

    Args:
      labels: int[n].
      num_clients: N.
      classes_per_client: classes of each client, at most K.
      sigma: standard deviation of the logarithm of an amount, at least 0; 0 gives even amounts.
      min_size: fewest examples of a client.
      seed: of the amounts, and of which examples of a class each holder has.

    Raises:
      ValueError: if labels are not int[n], sigma is below 0, there are fewer than `classes_per_client` classes, the
        clients together hold fewer classes than there are, or a class has too few examples for its holders.
    """
    labels = _check_labels(labels)
    members = _members(labels)
    checks.scalar("sigma", sigma, low=0, high_open=True)
    _check_holders(len(members), num_clients, classes_per_client)
    least = -(-_check_min_size(min_size) // classes_per_client)
    held = num_clients + classes_per_client - 1
    if held < len(members):
        raise ValueError(
            f"num_clients={num_clients} with {classes_per_client} classes in a row each hold {held} of {len(members)} "
            f"classes: ask for at least {len(members) - classes_per_client + 1} clients, or for more classes each"
        )
    rng = np.random.default_rng(seed)
    sizes = np.zeros((len(members), num_clients), np.int64)
    for k, rows in enumerate(members):
        holders = np.flatnonzero((k - np.arange(num_clients)) % len(members) < classes_per_client)
        if len(holders) * max(least, 1) > len(rows):
            raise ValueError(
                f"class {labels[rows[0]]} has {len(rows)} examples for {len(holders)} clients with at least "
                f"{max(least, 1)} each: ask for fewer than {num_clients} clients"
                + (", or for a lower min_size" if least > 1 else "")
            )
        logs = sigma * rng.standard_normal(len(holders))
        shared = len(rows) - max(least, 1) * len(holders)
        sizes[k, holders] = max(least, 1) + _apportion(np.exp(logs - logs.max()), shared, 0)
    return _in_turn(np.concatenate([rng.permutation(rows) for rows in members]), sizes)


def power_law(labels: Sized, num_clients: int, *, exponent: float, min_size: int = 1, seed: int = 0) -> Assignment:
    """Quantity skew: the r-th largest client has a size in proportion to r**-exponent, examples at random.

    Args:
      labels: anything with one row per example; only its length matters.
      num_clients: N; which of them is the r-th largest is random.
      exponent: at least 0; 0 gives even sizes.
      min_size: fewest examples of a client; those below it by rank have it exactly, and the others share the rest.
      seed: of the split.

    Raises:
      ValueError: if the exponent is below 0 or N min_size exceeds n.
    """
    total = _count(labels)
    checks.scalar("exponent", exponent, low=0, high_open=True)
    _check_counts(total, num_clients, _check_min_size(min_size))
    rng = np.random.default_rng(seed)
    ranks = 1.0 + rng.permutation(num_clients)
    return _in_turn(rng.permutation(total), _apportion(ranks**-exponent, total, min_size))


def natural(groups: ArrayLike, num_clients: int | None = None, *, min_size: int = 1, seed: int = 0) -> Assignment:
    """One client per group: a speaker, a writer, a subject.

    Groups below `min_size`, and those that are not chosen, are left out. The clients are in the order of their groups.

    Args:
      groups: int[n].
      num_clients: N, that many groups chosen at random, or None for all of them.
      min_size: fewest examples of a client.
      seed: of the choice.

    Raises:
      ValueError: if groups are not int[n], or fewer than N of them have `min_size` examples, saying how many there are.
    """
    groups = _check_groups(groups)
    _check_min_size(min_size)
    found, member, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    eligible = np.flatnonzero(sizes >= min_size)
    wanted = max(len(eligible), 1) if num_clients is None else num_clients
    checks.positive_int("num_clients", wanted, "a federation has at least one client, None takes every group")
    if wanted > len(eligible):
        raise ValueError(
            f"num_clients={num_clients} asks for {wanted} natural clients or more, but {len(eligible)} of {len(found)} "
            f"groups have min_size={min_size} examples: ask for fewer, or lower min_size"
        )
    chosen = np.sort(np.random.default_rng(seed).choice(eligible, wanted, replace=False))
    client = np.full(len(found), -1)
    client[chosen] = np.arange(wanted)
    return Assignment.from_owner(client[member], wanted)


def domains(groups: ArrayLike, num_clients: int, *, seed: int = 0) -> Assignment:
    """Every client lies inside one domain: each domain gets some of the clients, and is split at random.

    The domains have equally many clients, up to one and as far as a domain has an example for each; clients of one
    domain have sizes that differ by at most one. The clients are in the order of their domains.

    Args:
      groups: int[n], the domain of each example.
      num_clients: N, at least the number of domains.
      seed: of the split, and of which domains have one client more.

    Raises:
      ValueError: if groups are not int[n], there are fewer clients than domains, or more than examples.
    """
    groups = _check_groups(groups)
    members = _members(groups)
    _check_counts(len(groups), num_clients, 1)
    if num_clients < len(members):
        raise ValueError(
            f"num_clients={num_clients} leave some of the {len(members)} domains without a client: ask for at least "
            f"{len(members)}, or for fewer domains"
        )
    rng = np.random.default_rng(seed)
    clients = _level(np.asarray([len(rows) for rows in members]), num_clients, rng)
    sizes = np.concatenate([_even(len(rows), count) for rows, count in zip(members, clients, strict=True)])
    return _in_turn(np.concatenate([rng.permutation(rows) for rows in members]), sizes)


def clusters(labels: ArrayLike, num_clients: int, *, alpha: float, min_size: int = 1, seed: int = 0) -> Assignment:
    """Skew over clusters of any kind: every client mixes the clusters in proportions from Dirichlet(alpha p).

    With p the clusters' shares of all examples, each try draws N rows D_k of proportions, so that their mean is p,
    and solves D^T n = s for the clients' sizes n, where s are the clusters' sizes (`client_sizes`). It is accepted if
    no cluster is overdrawn, n sums to at most all examples, and every client has `min_size` of them. Client k then gets
    floor(n_k D_kc) random examples of cluster c. What is left is held by no client: fewer than N K examples lost to the
    rounding, and of a cluster that no client has drawn a part of, all.

    Clusters of embeddings give the embedding-based heterogeneity of "Redefining non-IID Data in Federated Learning for
    Computer Vision Tasks" (2025); class labels give its label-based baseline. Unlike `dirichlet`, alpha is the total
    concentration: the variance of D_kc is p_c (1 - p_c) / (alpha + 1). Relabelling the clusters changes nothing.
    Unlike the released code, which asks for n_k >= min_size, this counts a client's examples after rounding.

    Args:
      labels: int[n], the cluster of each example.
      num_clients: N, better well above the number of clusters: splits get rare where the two are close.
      alpha: total concentration, above 0.
      min_size: fewest examples of a client.
      seed: of the split.

    Raises:
      ValueError: if labels are not int[n], alpha is not above 0, N min_size exceeds n, or no split is accepted in
        10,000 tries (fewer where N K exceeds 1,000), saying how often each condition failed.
    """
    labels = _check_labels(labels)
    checks.scalar("alpha", alpha, low=0, low_open=True, high_open=True)
    _check_counts(len(labels), num_clients, _check_min_size(min_size))
    # In the order of first appearance, so that the names of the clusters do not matter.
    members = sorted(_members(labels), key=lambda rows: rows[0])
    cluster_sizes = np.asarray([len(rows) for rows in members])
    rng = np.random.default_rng(seed)
    taken = _accepted(cluster_sizes, num_clients, alpha, min_size, rng)
    owner = np.full(len(labels), -1)
    for rows, counts in zip(members, taken.T, strict=True):
        owner[rng.permutation(rows)[: counts.sum()]] = np.repeat(np.arange(num_clients), counts)
    return Assignment.from_owner(owner, num_clients)


def client_sizes(proportions: ArrayLike, cluster_sizes: ArrayLike) -> np.ndarray:
    """The clients' sizes that use the clusters up best: the minimum-norm least-squares solution n of D^T n = s.

    With as many independent rows in D as there are clusters the solution is exact, and the sizes sum to all examples.
    They may be negative.

    Args:
      proportions: D, float[..., N, K], each client's share of each cluster; rows sum to 1.
      cluster_sizes: s, int[K].

    Returns:
      n, float[..., N].
    """
    shares = np.asarray(proportions, float)
    # pinv(D^T) = D pinv(D^T D), where D^T D is [K, K] however many clients there are.
    inverse = np.linalg.pinv(shares.swapaxes(-1, -2) @ shares, rcond=1e-12, hermitian=True)
    weights = inverse @ np.asarray(cluster_sizes, float)
    return (shares @ weights[..., None])[..., 0]


PARTITIONS: dict[str, Callable[..., Assignment]] = {
    "iid": iid,
    "dirichlet": dirichlet,
    "shards": shards,
    "classes": classes,
    "partial_classes": partial_classes,
    "lognormal": lognormal,
    "lognormal_classes": lognormal_classes,
    "power_law": power_law,
    "natural": natural,
    "domains": domains,
    "clusters": clusters,
}


def federate(dataset: Dataset, assignment: Sequence[Any]) -> Population:
    """The training examples of a data set, grouped by client.

    Args:
      dataset: the data set.
      assignment: int[n_i] for each client, rows of the training part. An example may be left out.

    Raises:
      ValueError: if an index is out of range or is given twice.
    """
    total = len(dataset.train["y"])
    if isinstance(assignment, Assignment):
        order, sizes = assignment.rows, assignment.sizes
    else:
        parts = [np.asarray(part, np.int64).reshape(-1) for part in assignment]
        order = np.concatenate([np.zeros(0, np.int64), *parts])
        sizes = np.asarray([len(part) for part in parts], np.int64)
    outside = order[(order < 0) | (order >= total)]
    if outside.size:
        raise ValueError(
            f"assignment holds index {outside[0]}, but {dataset.name} has training examples 0 to {total - 1}: use those"
        )
    repeated = np.flatnonzero(np.bincount(order, minlength=total) > 1)
    if repeated.size:
        raise ValueError(f"assignment holds example {repeated[0]} more than once: give each example to one client")
    return Population.from_sizes({name: leaf[order] for name, leaf in dataset.train.items()}, sizes)


def _in_turn(order: np.ndarray, sizes: np.ndarray) -> Assignment:
    """Assigns the shuffled rows `order`, int[n], to clients in turn, as many each time as `sizes` says (`_turns`)."""
    owner = np.empty(len(order), np.int64)
    owner[order] = _turns(sizes)
    return Assignment.from_owner(owner, sizes.shape[-1])


def _turns(sizes: np.ndarray) -> np.ndarray:
    """int[n], whose turn it is: client i for sizes[i] examples, or for sizes[k, i] of them in round k."""
    num_clients = sizes.shape[-1]
    return np.repeat(np.tile(np.arange(num_clients), sizes.size // num_clients), sizes.ravel())


def _even(total: int, parts: int) -> np.ndarray:
    """int[parts] sizes that sum to `total`, the first ones larger by one where that is needed."""
    return total // parts + (np.arange(parts) < total % parts)


def _apportion(weights: np.ndarray, total: int, at_least: int) -> np.ndarray:
    """Whole sizes int[N] in proportion to `weights`, float[N] of at least 0, that sum to `total`.

    Those that would be below `at_least` have it exactly and the others share what is left; what rounding down leaves
    goes to the largest remainders (Hamilton's method).
    """
    order = np.argsort(weights, kind="stable")
    above = np.cumsum(weights[order][::-1])[::-1]  # the weight of this and all larger ones
    budget = total - at_least * np.arange(len(weights))  # what these share if all smaller ones have the least
    first = np.flatnonzero(weights[order] * budget >= at_least * above)[0]  # holds for the last one if for none before
    exact = np.full(len(weights), float(at_least))
    exact[order[first:]] = weights[order[first:]] / above[first] * budget[first]
    sizes = np.maximum(np.floor(exact).astype(np.int64), at_least)
    sizes[np.argsort(sizes - exact, kind="stable")[: total - sizes.sum()]] += 1
    return sizes


def _level(most: np.ndarray, total: int, rng: np.random.Generator) -> np.ndarray:
    """Whole shares int[K] of `total`, as even as the bounds `most`, int[K], allow; who has one more is random."""
    height, top = 0, total
    while height < top:  # the highest level that all reach or are bounded below, by halving
        middle = (height + top + 1) // 2
        height, top = (middle, top) if np.minimum(most, middle).sum() <= total else (height, middle - 1)
    shares = np.minimum(most, height)
    shares[rng.permutation(np.flatnonzero(most > height))[: total - shares.sum()]] += 1
    return shares


def _accepted(
    cluster_sizes: np.ndarray, num_clients: int, alpha: float, min_size: int, rng: np.random.Generator
) -> np.ndarray:
    """Examples of each cluster for each client, int[N, K], of the first accepted try."""
    total = int(cluster_sizes.sum())
    drawn_in_a_try = num_clients * len(cluster_sizes)
    tries = min(_TRIES, max(1, _DRAWN // drawn_in_a_try))
    block = max(1, _AT_ONCE // drawn_in_a_try)
    failures = np.zeros(3, np.int64)
    for start in range(0, tries, block):
        shares = rng.dirichlet(alpha * cluster_sizes / total, size=(min(block, tries - start), num_clients))
        sizes = np.floor(client_sizes(shares, cluster_sizes) + _ROUNDING)
        used = sizes[..., None] * shares
        counts = np.floor(used + _ROUNDING).astype(np.int64)
        failed = np.stack(
            [
                (counts.sum(axis=2) < min_size).any(axis=1),
                sizes.sum(axis=1) > total,
                (used.sum(axis=1) > cluster_sizes + 0.5).any(axis=1),  # in whole examples, not in the last digits
            ]
        )
        accepted = np.flatnonzero(~failed.any(axis=0))
        if accepted.size:
            return counts[accepted[0]]
        failures += failed.sum(axis=1)
    too_small, too_many, overdrawn = failures.tolist()
    fix = (
        "lower min_size or alpha, or ask for another number of clients"
        if too_small >= max(too_many, overdrawn)
        else f"ask for more clients than there are clusters ({len(cluster_sizes)})"
    )
    raise ValueError(
        f"no split into num_clients={num_clients} with alpha={alpha:g} was accepted in {tries} tries: a client had "
        f"fewer than min_size={min_size} examples in {too_small}, the clients had more than all {total} examples in "
        f"{too_many}, a cluster was overdrawn in {overdrawn}; {fix}"
    )


def _top_up(parts: list[np.ndarray], min_size: int, rng: np.random.Generator) -> Assignment:
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
    return Assignment.from_parts(pool)


def _members(labels: np.ndarray) -> list[np.ndarray]:
    """The rows of each class that occurs, ascending, in the order of the labels."""
    _, member, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    return np.split(np.argsort(member, kind="stable"), np.cumsum(sizes)[:-1])


def _count(labels: Sized | None) -> int:
    if labels is None:
        raise ValueError("labels is None: pass anything with one row per example")
    return len(labels)


def _check_labels(labels: ArrayLike) -> np.ndarray:
    return _integers("labels", labels, "goes by the class of an example, use iid for anything else")


def _check_groups(groups: ArrayLike) -> np.ndarray:
    return _integers(
        "groups",
        groups,
        "goes by the natural client or domain of an example, take a data set that has groups, or another partition",
    )


def _integers(name: str, values: Any, reason: str) -> np.ndarray:
    array = np.asarray(values)
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        got = "None" if values is None else f"{array.dtype}{list(array.shape)}"
        raise ValueError(f"{name} must be integers [n], got {got}: this split {reason}")
    return array


def _check_min_size(min_size: Any) -> int:
    if isinstance(min_size, bool) or not isinstance(min_size, int) or min_size < 0:
        raise ValueError(f"min_size must be an integer of at least 0, got {min_size!r}: 1 rules out empty clients")
    return min_size


def _check_holders(num_classes: int, num_clients: int, classes_per_client: int) -> None:
    checks.positive_int("num_clients", num_clients, "a federation has at least one client")
    checks.positive_int("classes_per_client", classes_per_client, "a client holds at least one class")
    if classes_per_client > num_classes:
        raise ValueError(
            f"classes_per_client={classes_per_client}, but there are {num_classes} classes: ask for at most that many"
        )
    if num_clients * classes_per_client < num_classes:
        raise ValueError(
            f"num_clients={num_clients} with {classes_per_client} classes each hold at most "
            f"{num_clients * classes_per_client} of {num_classes} classes: ask for at least "
            f"{-(-num_classes // classes_per_client)} clients, or for more classes each"
        )


def _check_counts(total: int, num_clients: int, at_least: int) -> None:
    checks.positive_int("num_clients", num_clients, "a federation has at least one client")
    if num_clients * max(at_least, 1) > total and at_least > 0:
        fewer = f"ask for at most {total // at_least} clients, or for fewer examples each"
        raise ValueError(
            f"num_clients={num_clients} with at least {at_least} examples each need {num_clients * at_least}, but "
            f"there are {total}: {fewer if total >= at_least else 'ask for fewer examples each'}"
        )
