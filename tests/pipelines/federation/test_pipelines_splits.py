import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.federation import partition, splits
from pipelines.federation.assignment import Assignment

# The sizes of CIFAR-10-LT with an imbalance of 100, as Cao et al. publish them.
CIFAR10_LT = [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]


def test_long_tail_has_the_sizes_of_the_paper():
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 5000))
    rows = splits.long_tail(labels, 100)
    assert np.bincount(labels[rows]).tolist() == CIFAR10_LT
    assert (np.diff(rows) > 0).all()
    np.testing.assert_array_equal(splits.long_tail(labels, 100), rows)
    assert (splits.long_tail(labels, 100, seed=1)[:100] != rows[:100]).any()


def test_a_tail_half_as_long():
    labels = np.arange(50_000) % 10
    sizes = [5000, 3237, 2096, 1357, 878, 568, 368, 238, 154, 100]
    np.testing.assert_array_equal(np.bincount(labels[splits.long_tail(labels, 50)]), sizes)


def test_others_are_dealt_out_in_the_shares_in_which_clients_hold_their_strata():
    rng = np.random.default_rng(0)
    strata, others = rng.integers(0, 4, 900), np.append(rng.integers(0, 4, 301), [7, 7])
    held = partition.dirichlet(strata, 6, alpha=0.5)
    dealt = splits.deal(held, strata, others, seed=3)
    assert len(dealt) == 6
    np.testing.assert_array_equal(np.sort(dealt.rows), np.arange(301))  # nobody holds stratum 7
    counts = [
        [np.bincount(kind[rows], minlength=8)[:4] for rows in each] for kind, each in ((strata, held), (others, dealt))
    ]
    own, found = map(np.asarray, counts)
    assert np.abs(found - own * found.sum(0) / own.sum(0)).max() < 1
    assert splits.deal(held, strata, others, seed=3) == dealt
    assert splits.deal(held, strata, others, seed=4) != dealt


def test_long_tail_chooses_at_random_within_a_class():
    labels = np.repeat([0, 1], 1000)
    chosen = np.concatenate([splits.long_tail(labels, 10, seed=seed)[1000:] for seed in range(50)])
    # 5,000 rows of 1000..1999: the mean of each half of them is known to 3 %.
    assert abs((chosen < 1500).mean() - 0.5) < 4.5 * np.sqrt(0.25 / 5000)
    assert len(np.unique(chosen)) > 900


def test_long_tail_of_unequal_classes_is_as_large_as_they_allow():
    labels = np.repeat([3, 5, 9], [100, 20, 50])
    rows = splits.long_tail(labels, 4)  # 40, 20, 10: the middle class is short
    assert np.bincount(labels[rows])[[3, 5, 9]].tolist() == [40, 20, 10]
    assert len(splits.long_tail(np.arange(90) % 3, 1)) == 90


def test_long_tail_is_partitioned_as_rows_of_the_whole():
    labels = np.random.default_rng(1).integers(0, 4, 2000)
    rows = splits.long_tail(labels, 20)
    parts = partition.dirichlet(labels[rows], 8, alpha=0.5).within(rows)
    np.testing.assert_array_equal(np.sort(parts.rows), rows)


def test_hold_out_takes_whole_clients():
    parts = partition.dirichlet(np.arange(300) % 5, 12, alpha=0.5)
    kept, new, kept_ids, new_ids = splits.hold_out_clients(parts, 4, seed=3)
    assert sorted([*kept_ids, *new_ids]) == list(range(12))
    assert kept == parts.select(kept_ids)
    assert new == parts.select(new_ids)
    assert len(new) == 4
    choices = {tuple(splits.hold_out_clients(parts, 1, seed=seed).new_ids) for seed in range(100)}
    assert len(choices) == 12
    again = splits.hold_out_clients(parts, 4, seed=3)
    assert again.new_ids.tolist() == new_ids.tolist()


def test_one_seed_for_all_does_not_tie_the_splits_together():
    # power_law draws its ranks first: a hold-out of the same stream would know them.
    ranks, first = [], []
    for seed in range(400):
        sizes = partition.power_law(range(200), 10, exponent=1.0, seed=seed).sizes
        new_id = splits.hold_out_clients(assignment_of([1] * 10), 1, seed=seed).new_ids[0]
        ranks.append((sizes > sizes[0]).sum())
        first.append(new_id)
    assert abs(np.corrcoef(ranks, first)[0, 1]) < 4.5 / np.sqrt(400)


SIZES = st.lists(st.integers(0, 40), min_size=1, max_size=8)
SHARES = st.sampled_from([(0.0, 0.0), (0.1, 0.2), (0.25, 0.25), (0.0, 0.5), (0.5, 0.0), (0.3, 0.69)])


def assignment_of(sizes, seed=0):
    owner = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(sizes)), sizes))
    return Assignment.from_owner(owner, len(sizes))


@settings(deadline=None, max_examples=60)
@given(sizes=SIZES, shares=SHARES, labeled=st.booleans(), seed=st.integers(0, 1000))
def test_a_random_split_of_clients(sizes, shares, labeled, seed):
    parts = assignment_of(sizes, seed)
    labels = np.random.default_rng(seed).integers(0, 3, len(parts.rows)) if labeled else None
    split = splits.split_clients(parts, shares, seed=seed, labels=labels)
    for i, rows in enumerate(parts):
        pieces = [part[i] for part in split]
        assert sorted(np.concatenate(pieces).tolist()) == rows.tolist()
        train, validation, test = map(len, pieces)
        assert train >= 1 or len(rows) == 0
        wanted_validation, wanted_test = (int(share * len(rows) + 0.5) for share in shares)
        if wanted_validation + wanted_test < len(rows):
            assert (validation, test) == (wanted_validation, wanted_test)
        else:
            assert (validation, test) <= (wanted_validation, wanted_test)
    assert splits.split_clients(parts, shares, seed=seed, labels=labels) == split


def test_a_random_split_takes_every_row_equally_often():
    parts = Assignment.from_parts([range(10), range(10, 13)])
    times = np.zeros((3, 13))
    for seed in range(600):
        for k, part in enumerate(splits.split_clients(parts, (0.2, 0.3), seed=seed)):
            times[k, part.rows] += 1
    # Of the first client's ten rows five train, two validate, three test; of the second client's three one each.
    for k, share in enumerate((0.5, 0.2, 0.3)):
        assert np.abs(times[k, :10] / 600 - share).max() < 4.5 * np.sqrt(share * (1 - share) / 600)
        assert np.abs(times[k, 10:] / 600 - 1 / 3).max() < 4.5 * np.sqrt(2 / 9 / 600)


def test_a_stratified_split_gives_every_class_its_share():
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], [200, 100, 20]))
    parts = Assignment.from_parts([np.arange(0, 160), np.arange(160, 320)])
    for seed in range(5):
        split = splits.split_clients(parts, (0.1, 0.2), labels=labels, seed=seed)
        for i in range(2):
            whole = np.bincount(labels[parts[i]], minlength=3)
            test = np.bincount(labels[split.test[i]], minlength=3)
            validation = np.bincount(labels[split.validation[i]], minlength=3)
            assert np.abs(test - 0.2 * whole).max() < 1
            assert np.abs(validation - 0.1 * whole).max() < 2


def test_a_stratified_split_does_not_favor_a_class():
    labels = np.arange(8)  # one of each, and two of them to test on
    times = sum(
        np.bincount(
            splits.split_clients(Assignment([*range(8)], [0, 8]), (0, 0.25), labels=labels, seed=s).test.rows,
            minlength=8,
        )
        for s in range(600)
    )
    assert np.abs(times / 600 - 0.25).max() < 4.5 * np.sqrt(3 / 16 / 600)


def test_a_split_by_position_cuts_the_end():
    parts = Assignment.from_parts([range(0, 20, 2), [21, 23], [25], []])
    train, validation, test = splits.split_clients(parts, (0.2, 0.3), by="position")
    assert [part.tolist() for part in train] == [[0, 2, 4, 6, 8], [21], [25], []]
    assert [part.tolist() for part in validation] == [[10, 12], [], [], []]
    assert [part.tolist() for part in test] == [[14, 16, 18], [23], [], []]
    assert splits.split_clients(parts, (0.2, 0.3), by="position", seed=5) == (train, validation, test)


def test_a_gap_is_dropped_before_each_part():
    parts = Assignment.from_parts([range(10), range(10, 14), [14, 15]])
    train, validation, test = splits.split_clients(parts, (0.2, 0.3), by="position", gap=1)
    assert [part.tolist() for part in train] == [[0, 1, 2], [10, 11], [14, 15]]
    assert [part.tolist() for part in validation] == [[4, 5], [], []]  # of 4 rows, test and its gap leave too few
    assert [part.tolist() for part in test] == [[7, 8, 9], [13], []]


@settings(deadline=None, max_examples=60)
@given(sizes=SIZES, shares=SHARES, gap=st.integers(0, 4))
def test_a_split_by_position_keeps_the_order_and_the_gaps(sizes, shares, gap):
    parts = assignment_of(sizes)
    split = splits.split_clients(parts, shares, by="position", gap=gap)
    for i, rows in enumerate(parts):
        place = {row: at for at, row in enumerate(rows.tolist())}
        pieces = [[place[row] for row in part[i].tolist()] for part in split]
        train, validation, test = pieces
        assert train == list(range(len(train)))
        assert len(train) >= 1 or len(rows) == 0
        filled = [piece for piece in pieces if piece]
        for before, after in itertools.pairwise(filled):
            assert after[0] - before[-1] == gap + 1
            assert after == list(range(after[0], after[-1] + 1))
        if filled:
            assert filled[-1][-1] == len(rows) - 1
        assert len(test) <= int(shares[1] * len(rows) + 0.5)
        assert len(validation) <= int(shares[0] * len(rows) + 0.5)


PARTS = Assignment.from_parts([range(10), range(10, 20)])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: splits.long_tail(np.arange(30) % 3, 0.5), r"factor must lie in \[1, inf\), got 0.5"),
        (lambda: splits.long_tail(np.arange(30) % 3, 11), "factor=11 leaves class 2 without examples.* has 10"),
        (lambda: splits.long_tail(np.zeros(30, int), 2), "needs at least 2"),
        (lambda: splits.long_tail(None, 2), "labels must be integers .n., got None"),
        (lambda: splits.long_tail(np.zeros((3, 2), int), 2), r"got int64\[3, 2\]"),
        (lambda: splits.hold_out_clients(PARTS, 0), "number must be an integer of at least 1, got 0"),
        (lambda: splits.hold_out_clients(PARTS, 2), "number=2 of 2 clients leaves none to train: hold out at most 1"),
        (lambda: splits.split_clients(PARTS, (0.5, 0.5)), r"together below 1, got \(0.5, 0.5\)"),
        (lambda: splits.split_clients(PARTS, (-0.1, 0.5)), "each at least 0"),
        (lambda: splits.split_clients(PARTS, (0.1,)), r"shares must be \(validation, test\)"),
        (lambda: splits.split_clients(PARTS, (0.1, 0.1), by="time"), "by must be one of 'random', 'position'"),
        (lambda: splits.split_clients(PARTS, (0.1, 0.1), gap=1), "gap=1 means nothing to a random split"),
        (
            lambda: splits.split_clients(PARTS, (0.1, 0.1), by="position", gap=-1),
            "gap must be an integer of at least 0",
        ),
        (
            lambda: splits.split_clients(PARTS, (0.1, 0.1), by="position", labels=np.zeros(20, int)),
            "labels mean nothing to a split by position",
        ),
        (lambda: splits.split_clients(PARTS, (0.1, 0.1), labels=np.zeros(19, int)), "at least 20 rows, got int64.19"),
        (lambda: splits.split_clients(PARTS, (0.1, 0.1), labels=np.zeros(20)), "got float64"),
    ],
)
def test_what_cannot_be_split_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
