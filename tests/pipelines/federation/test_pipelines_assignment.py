import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.federation import assignment
from pipelines.federation.assignment import Assignment

SMALL = Assignment.from_parts([[4, 1], [], [0, 7, 3]])


def test_it_reads_as_a_sequence_of_rows():
    assert len(SMALL) == SMALL.num_clients == 3
    assert [part.tolist() for part in SMALL] == [[1, 4], [], [0, 3, 7]]
    assert SMALL[-1].tolist() == [0, 3, 7]
    assert SMALL[1:] == Assignment.from_parts([[], [0, 3, 7]])
    assert SMALL.sizes.tolist() == [2, 0, 3]
    assert SMALL.clients.tolist() == [0, 0, 2, 2, 2]
    assert (SMALL.rows.dtype, SMALL.offsets.dtype) == (np.int64, np.int64)
    with pytest.raises(IndexError):
        SMALL[3]


def test_equal_means_the_same_rows_for_the_same_clients():
    assert Assignment.from_parts([np.asarray([1, 4], np.int32), [], [3, 0, 7]]) == SMALL
    assert Assignment.from_parts([[1, 4], [0, 3, 7]]) != SMALL
    assert Assignment.from_parts([[1, 5], [], [0, 3, 7]]) != SMALL
    assert SMALL != [[1, 4], [], [0, 3, 7]]


def test_it_cannot_be_changed_and_does_not_freeze_what_it_was_made_of():
    rows = np.asarray([2, 5])
    made = Assignment(rows, [0, 1, 2])
    with pytest.raises(ValueError, match="read-only"):
        made.rows[0] = 1
    with pytest.raises(ValueError, match="read-only"):
        made[1][:] = 1
    rows[0] = 2
    assert rows.flags.writeable


@settings(deadline=None, max_examples=50)
@given(owner=st.lists(st.integers(-1, 6), max_size=60))
def test_from_owner_agrees_with_a_loop(owner):
    made = Assignment.from_owner(np.asarray(owner, np.int64), 7)
    expected = [[row for row, client in enumerate(owner) if client == i] for i in range(7)]
    assert [part.tolist() for part in made] == expected
    assert made == Assignment.from_parts(expected)


def test_from_owner_sorts_more_clients_than_sixteen_bits():
    owner = np.random.default_rng(0).integers(-1, 200_000, 100_000)
    made = Assignment.from_owner(owner, 200_000)
    order = np.argsort(owner, kind="stable")
    np.testing.assert_array_equal(made.rows, order[owner[order] >= 0])
    np.testing.assert_array_equal(made.sizes, np.bincount(owner[owner >= 0], minlength=200_000))


def test_select_renumbers_the_clients():
    assert SMALL.select([2, 0]) == Assignment.from_parts([[0, 3, 7], [1, 4]])
    assert SMALL.select(np.arange(3)) == SMALL


def test_within_reads_rows_of_a_subset_as_rows_of_the_whole():
    whole = np.asarray([10, 20, 30, 40])
    assert Assignment.from_parts([[3, 0], [1]]).within(whole) == Assignment.from_parts([[10, 40], [20]])


# Of 3 clients, the offsets 0 2 2 5 and the rows 1 4 0 3 7 as little-endian 64-bit integers.
DIGEST = "ef6f4c09d938d1e0e52bb760205127a195993bec0863151f6e0cb050b951c7ce"


def test_the_digest_is_the_same_everywhere():
    assert SMALL.digest() == DIGEST
    assert Assignment(SMALL.rows.astype(">i4"), SMALL.offsets.astype(np.uint8)).digest() == DIGEST


def test_the_digest_tells_assignments_apart():
    others = [[[1, 4], [0, 3, 7]], [[1, 4], [0], [3, 7]], [[], [1, 4], [0, 3, 7]], [[1, 4], [], [0, 3, 8]]]
    assert len({DIGEST, *(Assignment.from_parts(parts).digest() for parts in others)}) == 5


def test_saved_and_loaded(tmp_path):
    path = tmp_path / "clients.npz"
    SMALL.save(path, partition="dirichlet", alpha=0.3, ids=[1, 2])
    assert Assignment.load(path) == SMALL
    assert Assignment.load(path).digest() == DIGEST
    assert assignment.provenance(path) == {"partition": "dirichlet", "alpha": 0.3, "ids": [1, 2]}
    assert [file.name for file in tmp_path.iterdir()] == ["clients.npz"]
    SMALL.save(tmp_path / "no_suffix")
    assert Assignment.load(tmp_path / "no_suffix") == SMALL


def test_saving_again_gives_the_same_bytes(tmp_path):
    SMALL.save(tmp_path / "a", b=1, a=2)
    SMALL.save(tmp_path / "b", a=2, b=1)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_save_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "clients.npz"
    SMALL.save(path)

    def full(file, **arrays):
        file.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match="no space"):
        SMALL.select([0]).save(path)
    assert Assignment.load(path) == SMALL


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_refused(tmp_path, share):
    path = tmp_path / "clients.npz"
    SMALL.save(path, partition="iid")
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=r"clients\.npz cannot be read as an assignment"):
        Assignment.load(path)


def test_a_flipped_bit_of_the_content_is_refused(tmp_path):
    path = tmp_path / "clients.npz"
    SMALL.save(path, partition="iid")
    content = bytearray(path.read_bytes())
    for part in (
        SMALL.rows.tobytes(),
        SMALL.offsets.tobytes(),
        "sha256".encode("utf-32-le"),
        "iid".encode("utf-32-le"),
    ):
        damaged = content.copy()
        damaged[content.index(part)] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"clients\.npz cannot be read as an assignment"):
            Assignment.load(path)


def rewrite(path, **changes):
    with np.load(path) as archive:
        np.savez(path, **{**archive, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": np.asarray([1, 4, 0, 3, 8])}, "not what was saved, its sha256 differs"),
        ({"offsets": np.asarray([0, 2, 3, 5])}, "not what was saved, its sha256 differs"),
        ({"rows": np.asarray([4, 1, 0, 3, 7])}, "is no assignment .*client 0 hold 4 before 1"),
        ({"rows": np.asarray([0.5] * 5)}, "is no assignment"),
        ({"header": json.dumps({"format": 2, "sha256": ""})}, "has format 2, this version reads 1"),
        ({"header": "nothing"}, "cannot be read"),
        ({"header": "[]"}, "cannot be read"),
        ({"provenance": "{"}, "cannot be read"),
    ],
)
def test_a_file_of_another_content_is_refused(tmp_path, changes, message):
    path = tmp_path / "clients.npz"
    SMALL.save(path)
    rewrite(path, **changes)
    with pytest.raises(ValueError, match=message):
        Assignment.load(path)


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "text").write_text("clients")
    np.save(tmp_path / "array.npy", np.arange(3))
    np.savez(tmp_path / "arrays.npz", x=np.arange(3))
    for name in ("text", "array.npy", "arrays.npz"):
        with pytest.raises(ValueError, match=f"{name} cannot be read as an assignment"):
            Assignment.load(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        Assignment.load(tmp_path / "missing.npz")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Assignment([0, 1], [0, 1]), "offsets run from 0 to 1 but the examples have rows 0 to 2"),
        (lambda: Assignment([0, 1, 1], [0, 1, 3]), "client 1 hold 1 before 1"),
        (lambda: Assignment([3, 9, 2, 1], [0, 0, 2, 4]), "client 2 hold 2 before 1"),
        (lambda: Assignment([-1, 1], [0, 2]), "rows holds -1"),
        (lambda: Assignment([0.0, 1.0], [0, 2]), r"rows must be a 1-d array of integers, got float64\[2\]"),
        (lambda: Assignment.from_parts([]), "parts is empty"),
        (lambda: Assignment.from_parts([[1, 2, 1]]), "client 0 hold 1 before 1"),
        (lambda: Assignment.from_parts([[0.5]]), "parts must be a 1-d array of integers"),
        (lambda: Assignment.from_owner([0, 3], 3), "owner holds 3, but clients are numbered 0 to 2"),
        (lambda: Assignment.from_owner([0, -2], 3), "owner holds -2"),
        (lambda: SMALL.select([0, 3]), "ids holds 3, but clients are numbered 0 to 2"),
        (lambda: SMALL.select(np.zeros(0, int)), "ids is empty"),
        (lambda: SMALL[5:], "ids is empty"),
        (lambda: SMALL.within([1, 2, 3]), "holds row 7 of a subset of 3 rows"),
        (lambda: SMALL.within([8, 7, 6, 5, 4, 3, 2, 1]), "rows must ascend"),
        (lambda: SMALL.save("nowhere", x=np.arange(2)), "provenance must be JSON values"),
        (lambda: SMALL.save("nowhere", x=float("nan")), "provenance must be JSON values"),
    ],
)
def test_what_is_no_assignment_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
