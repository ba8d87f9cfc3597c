import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon
from scipy.stats import entropy

from pipelines.data import datasets
from pipelines.data.datasets import Dataset
from pipelines.federation import heterogeneity, partition, splits
from pipelines.federation.assignment import Assignment

LABELS = np.asarray([0, 0, 1, 1, 2, 2, 2, 0])
PARTS = Assignment.from_parts([[0, 1], [2, 4], [], [3, 5, 6, 7]])
COUNTS = np.asarray([[2, 0, 0], [0, 1, 1], [0, 0, 0], [1, 1, 2]])
TABLES = st.lists(st.lists(st.integers(0, 5), min_size=4, max_size=4), min_size=1, max_size=8).map(np.asarray)


def test_label_counts():
    counts = heterogeneity.label_counts(PARTS, LABELS, 3)
    assert counts.tolist() == COUNTS.tolist()
    assert heterogeneity.label_counts(PARTS, LABELS, 5)[:, 3:].sum() == 0


def test_label_counts_of_sequences_leave_the_padding_out():
    labels = np.asarray([[0, 1, 2, -1], [2, 2, 2, 2], [1, -1, -1, -1]])
    counts = heterogeneity.label_counts(Assignment.from_parts([[0, 2], [1]]), labels, 3)
    assert counts.tolist() == [[1, 2, 1], [0, 0, 4]]


@settings(deadline=None, max_examples=50)
@given(counts=TABLES)
def test_measures_agree_with_loops_over_clients(counts):
    held = [row / row.sum() for row in counts if row.any()]
    np.testing.assert_allclose(heterogeneity.label_entropy(counts), [entropy(row) for row in held], atol=1e-12)
    pairs = [jensenshannon(held[i], held[j]) ** 2 for i in range(len(held)) for j in range(i)]
    pairs = np.nan_to_num(pairs)  # scipy takes the root of a rounding error below 0
    found = heterogeneity.pair_divergence(counts)
    assert (found.pairs, found.exact) == (len(pairs), True)
    np.testing.assert_allclose(found.mean, np.mean(pairs) if len(pairs) else 0, atol=1e-12)
    np.testing.assert_allclose(found.largest, max(pairs, default=0), atol=1e-12)
    if held:
        mix = counts.sum(axis=0) / counts.sum()
        total_variation, divergence = heterogeneity.global_divergence(counts)
        np.testing.assert_allclose(total_variation, [np.abs(row - mix).sum() / 2 for row in held], atol=1e-12)
        expected = np.nan_to_num([jensenshannon(row, mix) ** 2 for row in held])
        np.testing.assert_allclose(divergence, expected, atol=1e-12)


@settings(deadline=None, max_examples=50)
@given(sizes=st.lists(st.integers(0, 50), min_size=1, max_size=12).filter(any))
def test_measures_of_sizes_agree_with_loops(sizes):
    apart = sum(abs(a - b) for a in sizes for b in sizes)
    np.testing.assert_allclose(heterogeneity.size_gini(sizes), apart / (2 * len(sizes) * sum(sizes)), atol=1e-12)
    expected = sum(sizes) ** 2 / sum(size**2 for size in sizes)
    np.testing.assert_allclose(heterogeneity.effective_clients(sizes), expected)


def test_measures_by_hand():
    assert heterogeneity.size_gini([0, 0, 0, 8]) == 0.75
    assert heterogeneity.size_gini([2, 2, 2]) == 0
    assert heterogeneity.effective_clients([0, 0, 0, 8]) == 1
    assert heterogeneity.effective_clients([3, 3, 3]) == 3
    np.testing.assert_allclose(heterogeneity.label_entropy(COUNTS), [0, np.log(2), 1.5 * np.log(2)])
    # The first two clients share no class; the others are worked out as log 2 times bits.
    total_variation, divergence = heterogeneity.global_divergence(np.asarray([[4, 0], [0, 4]]))
    np.testing.assert_allclose(total_variation, [0.5, 0.5])
    np.testing.assert_allclose(divergence, [0.75 * np.log(4 / 3)] * 2)
    assert heterogeneity.pair_divergence(np.asarray([[4, 0], [0, 4]])) == (pytest.approx(np.log(2)),) * 2 + (1, True)
    assert heterogeneity.pair_divergence(np.asarray([[4, 0]])) == (0, 0, 0, True)


def test_many_clients_are_compared_by_sampled_pairs(monkeypatch):
    counts = np.random.default_rng(0).multinomial(20, [0.5, 0.3, 0.2], size=501)
    sampled = heterogeneity.pair_divergence(counts)
    assert (sampled.pairs, sampled.exact) == (100_000, False)
    assert heterogeneity.pair_divergence(counts) == sampled
    assert heterogeneity.pair_divergence(counts, seed=1).mean != sampled.mean
    exact = heterogeneity.pair_divergence(counts[:500])
    assert (exact.pairs, exact.exact) == (500 * 499 // 2, True)
    assert abs(sampled.mean / exact.mean - 1) < 0.02
    monkeypatch.setattr(heterogeneity, "_SAMPLED_PAIRS", 2000)
    apart = heterogeneity.pair_divergence(np.eye(600, dtype=int))  # no two clients share a class, but each with itself
    np.testing.assert_allclose([apart.mean, apart.largest], np.log(2))


def test_measures_of_an_assignment():
    row = heterogeneity.measure(PARTS, LABELS, 3)
    assert (row["clients"], row["examples"]) == (4, 8)
    assert [row[f"size {name}"] for name in ("min", "q25", "median", "q75", "max")] == [0, 1.5, 2, 2.5, 4]
    assert row["classes per client"] == 2
    np.testing.assert_allclose(row["label entropy"], 2.5 / 3 * np.log(2))
    np.testing.assert_allclose(row["label entropy / log K"], 2.5 / 3 * np.log(2) / np.log(3))
    assert row["pairs compared"] == 3
    assert row["effective clients"] == pytest.approx(64 / 24)


def test_the_comparison_orders_partitions_by_their_skew():
    labels = np.arange(6000) % 10
    rows = heterogeneity.compare(
        {
            "iid": partition.iid(labels, 30),
            "mild": partition.dirichlet(labels, 30, alpha=1.0),
            "strong": partition.dirichlet(labels, 30, alpha=0.1),
            "classes": partition.classes(labels, 30, classes_per_client=1),
        },
        labels,
        10,
    )
    assert [row["partition"] for row in rows] == ["iid", "mild", "strong", "classes"]
    for name, sign in (("label entropy", -1), ("JS of pairs", 1), ("TV from all", 1), ("JS from all", 1)):
        assert (np.diff([sign * row[name] for row in rows]) > 0).all(), name
    assert rows[-1]["classes per client"] == 1
    assert rows[-1]["TV from all"] == pytest.approx(0.9)


def test_the_table():
    table = heterogeneity.to_markdown(
        [{"partition": "a|b", "clients": 12345, "gini": 0.123456}, {"partition": "c", "clients": 2, "gini": 1234.5}]
    )
    assert table == (
        "| partition | clients | gini |\n| --- | ---: | ---: |\n| a\\|b | 12,345 | 0.1235 |\n| c | 2 | 1,234 |\n"
    )
    labels = np.arange(100) % 2
    rows = heterogeneity.compare({"iid": partition.iid(labels, 4), "shards": partition.shards(labels, 4)}, labels, 2)
    assert heterogeneity.to_markdown(rows).count("\n") == 4


def dataset(train_x, train_y, test_x, test_y, num_classes=3):
    train, test = {"x": train_x, "y": np.asarray(train_y)}, {"x": test_x, "y": np.asarray(test_y)}
    return Dataset("made", train, test, num_classes)


def images(*values):
    """uint8[n, 2, 2, 1], one gray value each, the last pixel apart."""
    x = np.zeros((len(values), 2, 2, 1), np.uint8)
    x[:, 1, 1, 0] = values
    return x


MADE = dataset(images(1, 2, 3, 4, 5, 6), [0, 1, 2, 0, 1, 2], images(7, 3, 8, 1, 1), [0, 1, 2, 0, 1])


def test_leakage_by_hand():
    parts = Assignment.from_parts([[0, 1], [2, 3], [5]])  # row 4 is with no client
    assert heterogeneity.leakage(MADE, parts) == (3, 0, 3)
    # Value 1 is trained on by client 0 and value 3 by client 1.
    tested = Assignment.from_parts([[0, 3], [1, 4], [2]])
    assert heterogeneity.leakage(MADE, parts, tested) == (3, 2, 1)
    assert heterogeneity.leakage(MADE, Assignment.from_parts([[1], [3], [4]]), tested) == (0, 0, 0)


def test_an_input_that_several_clients_hold_counts_once():
    made = dataset(images(1, 1, 1), [0, 0, 0], images(1, 2), [0, 1])
    parts, tested = Assignment.from_parts([[0, 1], [2]]), Assignment.from_parts([[0, 1], []])
    assert heterogeneity.leakage(made, parts, tested) == (1, 1, 1)
    assert heterogeneity.leakage(made, Assignment.from_parts([[0, 1, 2], []]), tested) == (1, 1, 0)


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.float32, np.float64])
def test_leakage_agrees_with_comparing_all_pairs(dtype):
    rng = np.random.default_rng(0)
    train, test = (rng.integers(0, 3, (count, 4)).astype(dtype) for count in (60, 40))
    made = dataset(train, np.zeros(60, int), test, np.zeros(40, int))
    parts, tested = partition.iid(range(60), 3), partition.iid(range(40), 3, seed=1)
    same = other = either = 0
    for client, rows in enumerate(tested):
        for row in rows:
            holders = {i for i, part in enumerate(parts) if (train[part] == test[row]).all(axis=1).any()}
            either += bool(holders)
            same += client in holders
            other += bool(holders - {client})
    assert 0 < same < either < 40
    assert heterogeneity.leakage(made, parts, tested) == (either, same, other)


def test_a_clean_federation_has_no_warnings():
    digits = datasets.load("digits")
    parts = partition.iid(digits.train["y"], 10)
    assert heterogeneity.warnings(digits, parts, batch_size=20) == []
    split = splits.split_clients(parts, (0.0, 0.2), labels=digits.train["y"])
    assert heterogeneity.warnings(digits._replace(test=digits.train), split.train, test_assignment=split.test) == []


def test_each_warning_is_given_for_its_reason():
    x = np.arange(40, dtype=np.float32).reshape(20, 2)
    y = np.asarray([0] * 12 + [1] * 8)
    made = dataset(x, y, x[:4] + 100, [0, 0, 2, 2], num_classes=5)
    found = heterogeneity.warnings(made, Assignment.from_parts([range(13), [13, 14, 15], [16], []]), batch_size=3)
    assert found == [
        "1 of 4 clients (25%) hold no examples: they train nothing when they are sampled.",
        "1 of 4 clients (25%) hold fewer examples than a batch of 3: their only step is a small one.",
        "Client 0 holds 76% of all 17 training examples: weighted by examples, the global model is mostly its own.",
        "2 of 4 clients (50%) hold one class alone: a constant answer is perfect for them.",
        "No training example has a label of 2: the test measures what no client could learn.",
        "No test example has a label of 1: what is learned of them is not measured.",
        "No training or test example has a label of 3, 4: the model has outputs for nothing.",
    ]


def test_leakage_is_warned_of():
    parts, tested = Assignment.from_parts([[0, 1, 2], [3, 4, 5]]), Assignment.from_parts([[0, 1, 2, 3], [4]])
    assert heterogeneity.warnings(MADE, parts) == [
        "3 of 5 test examples are trained on, their inputs equal byte for byte: the test rewards memory."
    ]
    assert heterogeneity.warnings(MADE, parts, test_assignment=tested) == [
        "3 of 5 test examples are trained on, their inputs equal byte for byte (2 by the client that is tested on "
        "them, 1 by another client): the test rewards memory."
    ]


def test_tokens_are_compared_and_their_labels_are_not_classes():
    tokens = np.asarray([[1, 2, 3], [2, 3, 4], [5, 6, 7]], np.int32)
    made = dataset(tokens, tokens + 1, tokens[1:2], tokens[1:2] + 1, num_classes=50)
    found = heterogeneity.warnings(made, Assignment.from_parts([[0], [1, 2]]))
    assert found == ["1 of 1 test examples are trained on, their inputs equal byte for byte: the test rewards memory."]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: heterogeneity.label_counts(PARTS, None, 3), "labels must be integers .n. or .n, T., got None"),
        (lambda: heterogeneity.label_counts(PARTS, LABELS / 2, 3), "got float64"),
        (lambda: heterogeneity.label_counts(PARTS, LABELS, 2), r"must lie in \[0, 2\), got 2"),
        (lambda: heterogeneity.label_counts(PARTS, LABELS - 1, 3), r"must lie in \[0, 3\), got -1"),
        (lambda: heterogeneity.label_counts(PARTS, LABELS[:5], 3), "row 7, but there are training examples 0 to 4"),
        (lambda: heterogeneity.measure(Assignment.from_parts([[], []]), LABELS, 3), "holds no examples"),
        (lambda: heterogeneity.to_markdown([]), "rows is empty"),
        (lambda: heterogeneity.to_markdown([{"a": 1}, {"b": 1}]), "a table needs the same in each"),
        (lambda: heterogeneity.leakage(MADE, PARTS), "row 7, but there are training examples 0 to 5"),
        (
            lambda: heterogeneity.leakage(MADE, Assignment.from_parts([[0]]), Assignment.from_parts([[5]])),
            "row 5, but there are test examples 0 to 4",
        ),
        (
            lambda: heterogeneity.leakage(MADE, Assignment.from_parts([[0]]), Assignment.from_parts([[0], [1]])),
            "test_assignment has 2 clients and assignment 1",
        ),
        (lambda: heterogeneity.warnings(MADE, PARTS, batch_size=0), "batch_size must be an integer of at least 1"),
    ],
)
def test_what_cannot_be_measured_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
