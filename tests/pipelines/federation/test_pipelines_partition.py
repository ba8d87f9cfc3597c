import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.data import datasets
from pipelines.federation import partition
from pipelines.federation.assignment import Assignment

SPLITS = {
    "iid": partition.iid,
    "dirichlet": lambda labels, n, seed: partition.dirichlet(labels, n, alpha=0.3, seed=seed),
    "shards": partition.shards,
    "classes": partition.classes,
    "partial_classes": lambda labels, n, seed: partition.partial_classes(labels, n, alpha=0.5, seed=seed),
    "lognormal": lambda labels, n, seed: partition.lognormal(labels, n, sigma=1.0, seed=seed),
    "lognormal_classes": lambda labels, n, seed: partition.lognormal_classes(labels, n, sigma=1.0, seed=seed),
    "power_law": lambda labels, n, seed: partition.power_law(labels, n, exponent=1.0, seed=seed),
    "natural": partition.natural,
    "domains": partition.domains,
    "clusters": lambda labels, n, seed: partition.clusters(labels, n, alpha=1.0, seed=seed),
}
# These leave examples out, as they say.
SUBSETS = ("natural", "clusters")
# These can be asked for any number of clients up to the number of examples.
ANY_NUMBER = ("iid", "dirichlet", "shards", "lognormal", "power_law")
LABELS = st.lists(st.integers(0, 4), min_size=20, max_size=120).map(lambda values: np.asarray(values, np.int32))
DATA = Path(os.environ.get("FEDJAX_CORE_DATA", Path(__file__).resolve().parents[3].parent / "shared" / "data"))


def check_is_a_partition(parts, total, clients):
    assert isinstance(parts, Assignment)
    assert len(parts) == clients
    assert sorted(parts.rows.tolist()) == list(range(total))


def check_gives_rows_to_one_client(parts, total, clients):
    assert len(parts) == clients
    rows = parts.rows.tolist()
    assert len(rows) == len(set(rows))
    assert set(rows) <= set(range(total))


def counts_of(parts, labels):
    return np.asarray([np.bincount(labels[part], minlength=labels.max() + 1) for part in parts])


def test_every_partition_is_tested():
    assert set(SPLITS) == set(partition.PARTITIONS)


@settings(deadline=None, max_examples=30)
@given(labels=LABELS, clients=st.integers(1, 10), seed=st.integers(0, 2**31), name=st.sampled_from(ANY_NUMBER))
def test_every_example_has_one_owner_and_the_seed_decides(labels, clients, seed, name):
    parts = SPLITS[name](labels, clients, seed=seed)
    check_is_a_partition(parts, len(labels), clients)
    assert min(map(len, parts)) >= 1
    assert SPLITS[name](labels, clients, seed=seed) == parts


@pytest.mark.parametrize("clients", [12, 40])
@pytest.mark.parametrize("name", sorted(SPLITS))
def test_every_partition_on_the_same_labels(name, clients):
    labels = np.random.default_rng(3).permutation(np.repeat(np.arange(40 if name == "natural" else 6), 60))
    parts = SPLITS[name](labels, clients, seed=4)
    check = check_gives_rows_to_one_client if name in SUBSETS else check_is_a_partition
    check(parts, len(labels), clients)
    assert parts.sizes.min() >= 1
    assert SPLITS[name](labels, clients, seed=4) == parts
    assert SPLITS[name](list(labels), clients, seed=4) == parts


@pytest.mark.parametrize("name", sorted(SPLITS))
def test_seeds_differ(name):
    labels = np.arange(180) % (9 if name == "natural" else 3)
    assert SPLITS[name](labels, 6, seed=0) != SPLITS[name](labels, 6, seed=1)


@pytest.mark.parametrize(
    ("parts", "digest"),
    [
        (lambda y: partition.iid(y, 7), "af5254ed49cd58bc"),
        (lambda y: partition.shards(y, 7, shards_per_client=3, seed=2), "da9851a961667db3"),
        (lambda y: partition.dirichlet(y, 7, alpha=0.3, min_size=5, seed=1), "72fbfcc43bec3cb5"),
        (lambda y: partition.dirichlet(y, 20, alpha=0.05, min_size=8, seed=1), "76d56bc1b7db9fbc"),
    ],
)
def test_a_seed_gives_the_same_clients_for_ever(parts, digest):
    assert parts(np.arange(200) % 4).digest().startswith(digest)


# Sizes


def test_iid_sizes_differ_by_at_most_one():
    sizes = [len(part) for part in partition.iid(np.zeros(23, int), 5)]
    assert sorted(sizes) == [4, 4, 5, 5, 5]


def test_iid_takes_labels_of_any_kind():
    assert partition.iid(np.zeros((12, 3)), 4) == partition.iid(range(12), 4)


@settings(deadline=None, max_examples=60)
@given(
    weights=st.lists(st.floats(0, 1e6), min_size=1, max_size=30).filter(lambda w: max(w) > 1e-3),
    at_least=st.integers(0, 5),
    more=st.integers(0, 400),
)
def test_sizes_are_apportioned_with_a_floor(weights, at_least, more):
    weights = np.asarray(weights)
    total = at_least * len(weights) + more
    sizes = partition._apportion(weights, total, at_least)
    assert sizes.sum() == total
    assert sizes.min() >= at_least
    # The same by bisection: the factor at which sizes of at least `at_least` use everything up.
    low, high = 0.0, (total + 1) / weights.max()
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if np.maximum(weights * middle, at_least).sum() < total else (low, middle)
    assert np.abs(sizes - np.maximum(weights * high, at_least)).max() < 1 + 1e-6 * total
    ascending = sizes[np.argsort(weights, kind="stable")]
    assert (np.diff(ascending) >= -1).all()


def test_power_law_sizes_by_hand():
    sizes = partition.power_law(np.zeros(100), 4, exponent=1.0).sizes  # in proportion to 1, 1/2, 1/3, 1/4
    assert sorted(sizes.tolist()) == [12, 16, 24, 48]
    sizes = partition.power_law(np.zeros(100), 4, exponent=1.0, min_size=20).sizes  # two at 20 leave 60 for 1 and 1/2
    assert sorted(sizes.tolist()) == [20, 20, 20, 40]
    assert partition.power_law(np.zeros(100), 4, exponent=0.0).sizes.tolist() == [25] * 4
    largest = {int(partition.power_law(np.zeros(100), 4, exponent=1.0, seed=seed).sizes.argmax()) for seed in range(30)}
    assert largest == {0, 1, 2, 3}


@pytest.mark.parametrize("sigma", [0.3, 1.0])
def test_lognormal_sizes_have_the_spread_asked_for(sigma):
    logs = np.log(partition.lognormal(np.zeros(2_000_000, np.int8), 4000, sigma=sigma).sizes)
    # The standard deviation of 4,000 normal draws has a standard error of sigma / sqrt(8000).
    assert abs(logs.std() - sigma) < 4 * sigma / np.sqrt(8000)
    centered = (logs - logs.mean()) / logs.std()
    assert abs((centered**3).mean()) < 4 * np.sqrt(6 / 4000)
    assert abs((centered**4).mean() - 3) < 4 * np.sqrt(24 / 4000)


def test_lognormal_of_no_spread_is_even_and_the_smallest_size_is_kept():
    assert set(partition.lognormal(np.zeros(103), 10, sigma=0.0).sizes.tolist()) == {10, 11}
    sizes = partition.lognormal(np.zeros(1000), 50, sigma=3.0, min_size=7).sizes
    assert sizes.sum() == 1000
    assert sizes.min() == 7
    assert partition.lognormal(np.zeros(1000), 50, sigma=3.0, min_size=0).sizes.min() == 0


def test_lognormal_classes_are_in_a_row_and_their_amounts_have_the_spread_asked_for():
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 7000))
    parts = partition.lognormal_classes(labels, 1000, classes_per_client=2, sigma=2.0, min_size=10)
    counts = counts_of(parts, labels)
    assert counts.sum() == len(labels)
    held = (np.arange(10) - np.arange(1000)[:, None]) % 10 < 2
    np.testing.assert_array_equal(counts > 0, held)
    assert counts[held].min() == 5
    assert parts.sizes.min() >= 10
    # The larger half, where rounding is little: quantiles of a normal distribution with deviation 2.
    logs = np.log(np.maximum(counts[held] - 5, 0.5))
    found = np.quantile(logs, [0.6, 0.75, 0.9])
    np.testing.assert_allclose(np.diff(found), 2 * np.diff(scipy.stats.norm.ppf([0.6, 0.75, 0.9])), rtol=0.15)
    even = counts_of(partition.lognormal_classes(labels, 20, sigma=0.0), labels)
    assert set(even[even > 0].tolist()) == {1750}


@pytest.mark.parametrize("name", ["lognormal", "power_law"])
def test_quantity_skew_leaves_the_labels_alone(name):
    labels = np.arange(60_000) % 4
    parts = SPLITS[name](labels, 10, seed=5)
    shares = counts_of(parts, labels) / parts.sizes[:, None]
    # A share among m random examples has a standard error of sqrt(3 / 16 m).
    assert (np.abs(shares - 0.25) < 4.5 * np.sqrt(3 / 16 / parts.sizes[:, None])).all()


# Label skew


def dirichlet_by_loop(labels, num_clients, alpha, seed):
    """The first draw of the Dirichlet partition, one class and one client at a time."""
    rng = np.random.default_rng(seed)
    parts = [[] for _ in range(num_clients)]
    for label in sorted(set(labels.tolist())):
        rows = [row for row in range(len(labels)) if labels[row] == label]
        shares = rng.dirichlet([alpha] * num_clients)
        rows = rng.permutation(rows)
        start, share = 0, 0.0
        for client in range(num_clients):
            share += shares[client]
            stop = len(rows) if client == num_clients - 1 else int(np.floor(share * len(rows) + 0.5))
            parts[client] += rows[start:stop].tolist()
            start = stop
    return Assignment.from_parts(parts)


@settings(deadline=None, max_examples=30)
@given(labels=LABELS, clients=st.integers(1, 30), alpha=st.sampled_from([1e-3, 0.3, 50.0]), seed=st.integers(0, 1000))
def test_dirichlet_agrees_with_a_loop(labels, clients, alpha, seed):
    expected = dirichlet_by_loop(labels, clients, alpha, seed)
    assert partition.dirichlet(labels, clients, alpha=alpha, min_size=0, seed=seed) == expected


@settings(deadline=None, max_examples=30)
@given(labels=LABELS, alpha=st.sampled_from([1e-4, 0.01, 1.0, 1e4]), seed=st.integers(0, 1000), data=st.data())
def test_dirichlet_keeps_the_smallest_size_it_promises(labels, alpha, seed, data):
    clients = data.draw(st.integers(1, 8))
    min_size = data.draw(st.integers(0, len(labels) // clients))  # up to every client at the same size
    parts = partition.dirichlet(labels, clients, alpha=alpha, min_size=min_size, seed=seed)
    check_is_a_partition(parts, len(labels), clients)
    assert parts.sizes.min() >= min_size


def check_moments(draws, mean, variance):
    """Both within 4.5 standard errors of independent draws, float[m]."""
    count = len(draws)
    assert abs(draws.mean() - mean) < 4.5 * np.sqrt(variance / count)
    squares = (draws - mean) ** 2
    assert abs(squares.mean() - variance) < 4.5 * squares.std() / np.sqrt(count)


@pytest.mark.parametrize("alpha", [0.2, 1.0, 8.0])
def test_dirichlet_shares_have_the_mean_and_variance_of_the_distribution(alpha):
    labels = np.repeat(np.arange(40), 1000)
    draws = []
    for seed in range(20):
        counts = counts_of(partition.dirichlet(labels, 5, alpha=alpha, min_size=0, seed=seed), labels)
        draws.append(counts[2] / 1000)  # one client: the shares of two are not independent
    check_moments(np.concatenate(draws), 1 / 5, (1 / 5) * (4 / 5) / (5 * alpha + 1))


def test_a_small_alpha_is_more_skewed():
    labels = np.arange(5000) % 10
    skew = {}
    for alpha in (0.05, 0.5, 1e4):
        counts = counts_of(partition.dirichlet(labels, 10, alpha=alpha, min_size=10), labels)
        skew[alpha] = np.abs(counts / counts.sum(axis=1, keepdims=True) - 0.1).mean()
    assert skew[0.05] > 1.5 * skew[0.5] > 5 * skew[1e4]
    assert skew[1e4] < 0.01


def test_shards_bound_the_classes_of_a_client():
    labels = np.arange(1000) % 10  # 100 of each: 20 shards of 50 hold one class each
    parts = partition.shards(labels, 10, shards_per_client=2)
    assert [len(part) for part in parts] == [100] * 10
    assert max(len(np.unique(labels[part])) for part in parts) == 2


@settings(deadline=None, max_examples=40)
@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=8),
    clients=st.integers(1, 20),
    each=st.integers(1, 8),
    seed=st.integers(0, 1000),
)
def test_classes_gives_every_client_exactly_as_many_as_asked_for(sizes, clients, each, seed):
    labels = np.repeat(10 * np.arange(len(sizes)), sizes)
    holders_there_are = np.minimum(sizes, clients)
    possible = each <= len(sizes) <= clients * each <= holders_there_are.sum()
    if not possible:
        with pytest.raises(ValueError, match="ask for"):
            partition.classes(labels, clients, classes_per_client=each, seed=seed)
        return
    parts = partition.classes(labels, clients, classes_per_client=each, seed=seed)
    check_is_a_partition(parts, len(labels), clients)
    counts = counts_of(parts, labels)[:, ::10]
    assert ((counts > 0).sum(axis=1) == each).all()
    holders = (counts > 0).sum(axis=0)
    assert holders.min() >= 1
    free = holders[holders < holders_there_are]  # held by fewer clients than could hold them
    assert holders.max() - min(free, default=holders.max()) <= 1
    for k in range(len(sizes)):
        held = counts[counts[:, k] > 0, k]
        assert held.max() - held.min() <= 1


def test_which_classes_meet_at_a_client_is_random():
    labels = np.arange(4000) % 5
    counts = counts_of(partition.classes(labels, 400, seed=1), labels)
    meetings = (counts > 0).T.astype(int) @ (counts > 0)
    pairs = meetings[np.triu_indices(5, 1)]  # 400 pairs of classes over 10 kinds
    assert pairs.sum() == 400
    assert pairs.min() > 15


@settings(deadline=None, max_examples=40)
@given(
    clients=st.integers(1, 30),
    each=st.integers(1, 6),
    alpha=st.sampled_from([1e-3, 0.5, 1e3]),
    seed=st.integers(0, 1000),
)
def test_partial_classes_holds_a_subset_of_the_classes(clients, each, alpha, seed):
    labels = np.arange(240) % 6
    if clients * each < 6:
        with pytest.raises(ValueError, match="at least"):
            partition.partial_classes(labels, clients, classes_per_client=each, alpha=alpha)
        return
    parts = partition.partial_classes(labels, clients, classes_per_client=each, alpha=alpha, seed=seed)
    check_is_a_partition(parts, len(labels), clients)
    held = counts_of(parts, labels) > 0
    assert (held.sum(axis=1) == each).all()
    # Dealt out once in order: client i holds the next `each` classes.
    for label in range(6):
        assert held[label // each, label]


def test_partial_classes_amounts_follow_the_concentration():
    labels = np.zeros(200_000, int)
    counts = counts_of(partition.partial_classes(labels, 2000, classes_per_client=1, alpha=2.0, seed=3), labels)[:, 0]
    check_moments(counts / 200_000 * 2000, 1, (1 - 1 / 2000) / (2.0 + 1 / 2000))
    even = partition.partial_classes(labels, 2000, classes_per_client=1, alpha=1e9, seed=3)
    assert np.abs(even.sizes - 100).max() <= 1


# Natural clients and domains


def test_natural_clients_are_the_groups():
    groups = np.asarray([7, 3, 7, 7, 9, 3, 9, 9, 9, 5])
    every = partition.natural(groups)
    assert [part.tolist() for part in every] == [[1, 5], [9], [0, 2, 3], [4, 6, 7, 8]]
    assert [part.tolist() for part in partition.natural(groups, min_size=2)] == [[1, 5], [0, 2, 3], [4, 6, 7, 8]]
    choices = {tuple(groups[part[0]] for part in partition.natural(groups, 2, seed=seed)) for seed in range(60)}
    assert choices == {(3, 5), (3, 7), (3, 9), (5, 7), (5, 9), (7, 9)}
    assert partition.natural(groups, 4, seed=8) == every


def test_natural_clients_of_prepared_data():
    if not (DATA / "har").is_dir():
        pytest.skip("the prepared data is not there")
    with np.load(DATA / "har" / "har.npz") as archive:
        subjects = archive["subject"]
    parts = partition.natural(subjects, min_size=300)
    assert parts.sizes.tolist() == [size for size in np.bincount(subjects) if size >= 300]
    assert all(len(np.unique(subjects[part])) == 1 for part in parts)


@settings(deadline=None, max_examples=40)
@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=6), data=st.data(), seed=st.integers(0, 1000))
def test_domains_keeps_clients_inside_one_domain(sizes, data, seed):
    groups = np.random.default_rng(seed).permutation(np.repeat(3 * np.arange(len(sizes)), sizes))
    clients = data.draw(st.integers(len(sizes), sum(sizes)))
    parts = partition.domains(groups, clients, seed=seed)
    check_is_a_partition(parts, len(groups), clients)
    domain = np.asarray([groups[part[0]] // 3 for part in parts])
    assert (np.diff(domain) >= 0).all()
    assert all((groups[part] == groups[part[0]]).all() for part in parts)
    clients_of = np.bincount(domain, minlength=len(sizes))
    room = clients_of[clients_of < np.asarray(sizes)]
    assert clients_of.max() - min(room, default=clients_of.max()) <= 1
    for k in range(len(sizes)):
        inside = parts.sizes[domain == k]
        assert inside.max() - inside.min() <= 1


# Clusters


def test_the_clients_sizes_solve_the_system():
    shares = np.asarray([[0.8, 0.2], [0.3, 0.7]])
    np.testing.assert_allclose(partition.client_sizes(shares, [60, 40]), [60, 40], rtol=1e-12)
    shares = np.asarray([*shares, [0.5, 0.5]])
    sizes = partition.client_sizes(shares, [60, 40])
    np.testing.assert_allclose(sizes, [47.36842105, 21.05263158, 31.57894737], atol=1e-8)
    np.testing.assert_allclose(shares.T @ sizes, [60, 40], rtol=1e-12)
    np.testing.assert_allclose(sizes.sum(), 100, rtol=1e-12)


@pytest.mark.parametrize(("clients", "kinds"), [(3, 5), (5, 5), (30, 5), (40, 1)])
def test_the_clients_sizes_are_those_of_the_pseudo_inverse(clients, kinds):
    rng = np.random.default_rng(clients)
    shares = rng.dirichlet(np.ones(kinds), size=(6, clients))
    cluster_sizes = rng.integers(10, 100, kinds)
    sizes = partition.client_sizes(shares, cluster_sizes)
    for got, matrix in zip(sizes, shares, strict=True):
        np.testing.assert_allclose(got, np.linalg.pinv(matrix.T) @ cluster_sizes, rtol=1e-6)
    order = rng.permutation(kinds)
    np.testing.assert_allclose(partition.client_sizes(shares[..., order], cluster_sizes[order]), sizes, rtol=1e-6)


def accepted(shares, cluster_sizes, min_size=0):
    """What `clusters` assigns when every draw of proportions is `shares`."""
    shares = np.asarray(shares)
    drawn = SimpleNamespace(dirichlet=lambda alpha, size: np.broadcast_to(shares, (size[0], *shares.shape)))
    return partition._accepted(np.asarray(cluster_sizes), len(shares), 1.0, min_size, drawn).tolist()


def test_the_allocation_by_hand():
    assert accepted([[0.8, 0.2], [0.3, 0.7]], [60, 40]) == [[48, 12], [12, 28]]
    assert accepted([[0.8, 0.2], [0.3, 0.7]], [60, 40], min_size=40) == [[48, 12], [12, 28]]
    # 47, 21 and 31 examples, each row cut to whole ones.
    assert accepted([[0.8, 0.2], [0.3, 0.7], [0.5, 0.5]], [60, 40]) == [[37, 9], [6, 14], [15, 15]]


@pytest.mark.parametrize(
    ("shares", "min_size", "message"),
    [
        ([[0.8, 0.2], [0.3, 0.7]], 41, "fewer than min_size=41 examples in 10000, .* in 0, .* in 0; lower min_size"),
        ([[0.8, 0.2], [0.7, 0.3]], 0, "fewer than min_size=0 examples in 10000"),  # sizes of -100 and 200
        ([[0.9, 0.1]], 0, "in 0, .* in 0, a cluster was overdrawn in 10000; ask for more clients than .*2"),
    ],
)
def test_a_split_that_is_never_accepted(shares, min_size, message):
    with pytest.raises(ValueError, match=message):
        accepted(shares, [60, 40], min_size)


def test_cluster_proportions_have_the_mean_and_variance_of_the_distribution():
    labels = np.repeat(np.arange(3), [30_000, 50_000, 120_000])
    draws = []
    for seed in range(8):
        parts = partition.clusters(labels, 250, alpha=2.0, seed=seed)
        draws.append(counts_of(parts, labels) / parts.sizes[:, None])
    p = np.asarray([0.15, 0.25, 0.6])
    for k in range(3):
        check_moments(np.concatenate(draws)[:, k], p[k], p[k] * (1 - p[k]) / (2.0 + 1))


@settings(deadline=None, max_examples=30)
@given(
    sizes=st.lists(st.integers(150, 400), min_size=1, max_size=5),
    clients=st.integers(8, 25),
    alpha=st.sampled_from([0.3, 30.0]),
    seed=st.integers(0, 1000),
)
def test_clusters_uses_nothing_twice_and_little_is_lost(sizes, clients, alpha, seed):
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(sizes)), sizes))
    parts = partition.clusters(labels, clients, alpha=alpha, min_size=5, seed=seed)
    check_gives_rows_to_one_client(parts, len(labels), clients)
    assert parts.sizes.min() >= 5
    assert (counts_of(parts, labels).sum(axis=0) <= sizes).all()
    if alpha > 1:  # every cluster is drawn by somebody, so that the system has a solution
        assert len(labels) - len(parts.rows) < clients * len(sizes)


def test_the_names_of_clusters_do_not_matter():
    labels = np.random.default_rng(0).integers(0, 5, 2000)
    renamed = np.asarray([40, -3, 7, 0, 12])[labels]
    assert partition.clusters(renamed, 20, alpha=1.0) == partition.clusters(labels, 20, alpha=1.0)


def test_a_large_alpha_and_a_single_cluster_are_even_splits():
    labels = np.arange(6000) % 3
    for alpha in (1e6, 1e12, 1e15):
        parts = partition.clusters(labels, 12, alpha=alpha)
        assert np.abs(counts_of(parts, labels) / parts.sizes[:, None] - 1 / 3).max() < 0.005
    assert parts.sizes.min() >= 495  # the proportions are equal up to rounding, and so are the sizes
    assert parts.sizes.max() <= 500
    np.testing.assert_allclose(partition.client_sizes(np.full((12, 3), 1 / 3), [2000] * 3), [500] * 12, rtol=1e-12)
    for seed in range(3):
        assert partition.clusters(np.zeros(6003, int), 12, alpha=0.01, seed=seed).sizes.tolist() == [500] * 12


def test_a_smaller_alpha_gives_fewer_clusters_to_a_client():
    labels = np.arange(20_000) % 10
    held = []
    for alpha in (0.3, 3.0, 300.0):
        counts = counts_of(partition.clusters(labels, 50, alpha=alpha, min_size=20), labels)
        held.append((counts > 0.02 * counts.sum(axis=1, keepdims=True)).sum(axis=1).mean())
    assert held[0] < held[1] < held[2]
    assert held[2] > 9.9


def test_clusters_gives_up_in_bounded_time():
    labels = np.arange(2000) % 10
    with pytest.raises(ValueError, match="num_clients=10 with alpha=1 was accepted in 10000 tries"):
        partition.clusters(labels, 10, alpha=1.0, min_size=190)


# Wrong requests


Y = np.arange(30) % 3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: partition.iid(Y, 31), "num_clients=31 with at least 1 examples each need 31, but there are 30"),
        (lambda: partition.iid(Y, 0), "num_clients must be an integer of at least 1, got 0"),
        (lambda: partition.iid(None, 3), "labels is None"),
        (lambda: partition.dirichlet(Y, 7, alpha=0.1, min_size=5), "at most 6 clients"),
        (lambda: partition.dirichlet(Y, 3, alpha=0.0), r"alpha must lie in \(0, inf\), got 0"),
        (lambda: partition.dirichlet(Y, 3, alpha=np.inf), r"alpha must lie in \(0, inf\), got inf"),
        (
            lambda: partition.dirichlet(Y, 3, alpha=1.0, min_size=-1),
            "min_size must be an integer of at least 0, got -1",
        ),
        (lambda: partition.dirichlet(Y[:, None], 3, alpha=1.0), "use iid for anything else"),
        (lambda: partition.dirichlet(Y / 2, 3, alpha=1.0), "labels must be integers"),
        (lambda: partition.dirichlet(None, 3, alpha=1.0), "labels must be integers .n., got None"),
        (lambda: partition.shards(Y, 10, shards_per_client=4), "need 40, but there are 30"),
        (lambda: partition.shards(Y, 10, shards_per_client=0), "shards_per_client must be an integer of at least 1"),
        (lambda: partition.classes(Y, 5, classes_per_client=4), "classes_per_client=4, but there are 3 classes"),
        (lambda: partition.classes(Y, 1, classes_per_client=2), "hold at most 2 of 3 classes: ask for at least 2"),
        (lambda: partition.classes(Y, 16, classes_per_client=2), "need 32 holders of a class, but the 30 examples"),
        (lambda: partition.classes(None, 5), "labels must be integers .n., got None"),
        (lambda: partition.partial_classes(Y, 5, classes_per_client=4, alpha=1.0), "but there are 3 classes"),
        (lambda: partition.partial_classes(Y, 12, classes_per_client=3, alpha=1.0), "class 0 has 10 examples for 12"),
        (lambda: partition.partial_classes(Y, 5, alpha=-1.0), r"alpha must lie in \(0, inf\), got -1"),
        (lambda: partition.lognormal(Y, 5, sigma=-1.0), r"sigma must lie in \[0, inf\), got -1"),
        (lambda: partition.lognormal(Y, 31, sigma=1.0), "need 31, but there are 30"),
        (lambda: partition.lognormal_classes(Y, 5, sigma=-1.0), r"sigma must lie in \[0, inf\), got -1"),
        (
            lambda: partition.lognormal_classes(np.arange(30) % 6, 4, sigma=1.0),
            "hold 5 of 6 classes: ask for at least 5",
        ),
        (
            lambda: partition.lognormal_classes(np.arange(30) % 3, 9, sigma=1.0, min_size=4),
            "has 10 examples for 6 clients",
        ),
        (lambda: partition.lognormal(Y, 5, sigma=1.0, min_size=7), "ask for at most 4 clients"),
        (lambda: partition.power_law(Y, 5, exponent=np.inf), r"exponent must lie in \[0, inf\), got inf"),
        (lambda: partition.power_law(Y, 31, exponent=1.0), "need 31, but there are 30"),
        (lambda: partition.natural(None), "groups must be integers .n., got None: .* take a data set that has groups"),
        (lambda: partition.natural(Y, 4), "4 natural clients or more, but 3 of 3 groups have min_size=1"),
        (lambda: partition.natural(Y, min_size=11), "but 0 of 3 groups have min_size=11 examples: .* lower min_size"),
        (lambda: partition.natural(Y, 0), "num_clients must be an integer of at least 1, got 0"),
        (lambda: partition.domains(None, 3), "groups must be integers .n., got None"),
        (lambda: partition.domains(Y, 2), "num_clients=2 leave some of the 3 domains without a client"),
        (lambda: partition.domains(Y, 31), "need 31, but there are 30"),
        (lambda: partition.clusters(Y, 31, alpha=1.0), "need 31, but there are 30"),
        (lambda: partition.clusters(Y, 5, alpha=0.0), r"alpha must lie in \(0, inf\), got 0"),
        (lambda: partition.clusters(None, 5, alpha=1.0), "labels must be integers .n., got None"),
    ],
)
def test_what_cannot_be_met_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# Populations


def test_federate_groups_the_examples_by_client():
    dataset = datasets.load("iris")
    parts = partition.dirichlet(dataset.train["y"], 5, alpha=0.3)
    for given_as in (parts, list(parts)):
        population = partition.federate(dataset, given_as)
        assert population.sizes.tolist() == [len(part) for part in parts]
        for i, part in enumerate(parts):
            np.testing.assert_array_equal(population.client(i)["x"], dataset.train["x"][part])
            np.testing.assert_array_equal(population.client(i)["y"], dataset.train["y"][part])


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ([[0, 1], [1]], "example 1 more than once"),
        (Assignment.from_parts([[0, 1], [1]]), "example 1 more than once"),
        ([[0], [120]], "index 120"),
        (Assignment.from_parts([[0], [120]]), "index 120"),
        ([[-1], [0]], "index -1"),
    ],
)
def test_federate_refuses_a_wrong_assignment(assignment, message):
    with pytest.raises(ValueError, match=message):
        partition.federate(datasets.load("iris"), assignment)


def test_federate_takes_clients_without_examples():
    population = partition.federate(datasets.load("iris"), [[], [3, 4], []])
    assert population.sizes.tolist() == [0, 2, 0]
