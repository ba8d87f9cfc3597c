import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import data, partition

SPLITS = {
    "iid": partition.iid,
    "dirichlet": lambda labels, n, seed: partition.dirichlet(labels, n, alpha=0.3, seed=seed),
    "shards": partition.shards,
}
LABELS = st.lists(st.integers(0, 4), min_size=20, max_size=120).map(lambda values: np.asarray(values, np.int32))


def check_is_a_partition(parts, total, clients):
    assert len(parts) == clients
    assert sorted(np.concatenate(parts).tolist()) == list(range(total))
    assert all(np.issubdtype(part.dtype, np.integer) for part in parts)


def test_every_partition_is_tested():
    assert set(SPLITS) == set(partition.PARTITIONS)


@settings(deadline=None, max_examples=30)
@given(labels=LABELS, clients=st.integers(1, 10), seed=st.integers(0, 2**31), name=st.sampled_from(sorted(SPLITS)))
def test_every_example_has_one_owner_and_the_seed_decides(labels, clients, seed, name):
    parts = SPLITS[name](labels, clients, seed=seed)
    check_is_a_partition(parts, len(labels), clients)
    assert min(map(len, parts)) >= 1
    again = SPLITS[name](labels, clients, seed=seed)
    assert [p.tolist() for p in parts] == [p.tolist() for p in again]


@pytest.mark.parametrize("name", sorted(SPLITS))
def test_seeds_differ(name):
    labels = np.arange(60) % 3
    first, second = (SPLITS[name](labels, 5, seed=seed) for seed in (0, 1))
    assert [p.tolist() for p in first] != [p.tolist() for p in second]


def test_iid_sizes_differ_by_at_most_one():
    sizes = [len(part) for part in partition.iid(np.zeros(23, int), 5)]
    assert sorted(sizes) == [4, 4, 5, 5, 5]


@settings(deadline=None, max_examples=30)
@given(labels=LABELS, alpha=st.sampled_from([1e-4, 0.01, 1.0, 1e4]), seed=st.integers(0, 1000), data=st.data())
def test_dirichlet_keeps_the_smallest_size_it_promises(labels, alpha, seed, data):
    clients = data.draw(st.integers(1, 8))
    min_size = data.draw(st.integers(0, len(labels) // clients))  # up to every client at the same size
    parts = partition.dirichlet(labels, clients, alpha=alpha, min_size=min_size, seed=seed)
    check_is_a_partition(parts, len(labels), clients)
    assert min(map(len, parts)) >= min_size


def shares(parts, labels, classes):
    counts = np.asarray([np.bincount(labels[part], minlength=classes) for part in parts], float)
    return counts / counts.sum(axis=1, keepdims=True)


def test_a_small_alpha_is_more_skewed():
    labels = np.arange(5000) % 10
    skew = {}
    for alpha in (0.05, 0.5, 1e4):
        parts = partition.dirichlet(labels, 10, alpha=alpha, min_size=10)
        skew[alpha] = np.abs(shares(parts, labels, 10) - 0.1).mean()
    assert skew[0.05] > 1.5 * skew[0.5] > 5 * skew[1e4]
    assert skew[1e4] < 0.01


def test_shards_bound_the_classes_of_a_client():
    labels = np.arange(1000) % 10  # 100 of each: 20 shards of 50 hold one class each
    parts = partition.shards(labels, 10, shards_per_client=2)
    assert [len(part) for part in parts] == [100] * 10
    assert max(len(np.unique(labels[part])) for part in parts) == 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda y: partition.iid(y, 31), "num_clients=31 with at least 1 examples each need 31, but there are 30"),
        (lambda y: partition.iid(y, 0), "num_clients must be an integer of at least 1, got 0"),
        (lambda y: partition.dirichlet(y, 7, alpha=0.1, min_size=5), "at most 6 clients"),
        (lambda y: partition.dirichlet(y, 3, alpha=0.0), r"alpha must lie in \(0, inf\], got 0"),
        (
            lambda y: partition.dirichlet(y, 3, alpha=1.0, min_size=-1),
            "min_size must be an integer of at least 0, got -1",
        ),
        (lambda y: partition.dirichlet(y[:, None], 3, alpha=1.0), "use iid for anything else"),
        (lambda y: partition.dirichlet(y / 2, 3, alpha=1.0), "labels must be integers"),
        (lambda y: partition.shards(y, 10, shards_per_client=4), "need 40, but there are 30"),
        (lambda y: partition.shards(y, 10, shards_per_client=0), "shards_per_client must be an integer of at least 1"),
    ],
)
def test_what_cannot_be_met_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(np.arange(30) % 3)


def test_federate_groups_the_examples_by_client():
    dataset = data.load("iris")
    parts = partition.dirichlet(dataset.train["y"], 5, alpha=0.3)
    population = partition.federate(dataset, parts)
    assert population.sizes.tolist() == [len(part) for part in parts]
    for i, part in enumerate(parts):
        np.testing.assert_array_equal(population.client(i)["x"], dataset.train["x"][part])
        np.testing.assert_array_equal(population.client(i)["y"], dataset.train["y"][part])


@pytest.mark.parametrize(
    ("assignment", "message"),
    [([[0, 1], [1]], "example 1 more than once"), ([[0], [120]], "index 120"), ([[-1], [0]], "index -1")],
)
def test_federate_refuses_a_wrong_assignment(assignment, message):
    with pytest.raises(ValueError, match=message):
        partition.federate(data.load("iris"), assignment)


def test_federate_takes_clients_without_examples():
    population = partition.federate(data.load("iris"), [[], [3, 4], []])
    assert population.sizes.tolist() == [0, 2, 0]
