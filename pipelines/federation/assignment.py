"""Who holds which examples: one flat array of rows and the boundaries between clients.

Letters: n examples of a data set's training part, m of them assigned, N clients.
"""

import json
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, overload

import numpy as np

from fedjax_core.population import check_offsets, offsets_of
from fedjax_core.types import ArrayLike
from pipelines.common import files

_FORMAT = 1


@dataclass(frozen=True, eq=False)
class Assignment(Sequence[np.ndarray]):
    """The rows that each client holds; `assignment[i]` are those of client i.

    Equal assignments are those that give the same rows to the same clients. The arrays are read-only.

    Attributes:
      rows: int64[m], rows of a data set's training part, grouped by client and ascending within a client.
      offsets: int64[N + 1]; client i holds rows[offsets[i] : offsets[i + 1]].

    Raises:
      ValueError: unless rows are integers of at least 0, ascending within every client, and the offsets cover them.
    """

    rows: np.ndarray
    offsets: np.ndarray

    def __post_init__(self) -> None:
        rows = _integers("rows", self.rows)
        offsets = check_offsets(self.offsets, len(rows))
        if rows.size and rows.min() < 0:
            raise ValueError(f"rows holds {rows.min()}: rows are numbered from 0, leave out what no client holds")
        # Between the last row of a client and the first of the next one, any step is right.
        falls = np.diff(rows) <= 0
        falls[offsets[(offsets > 0) & (offsets < len(rows))] - 1] = False
        if falls.any():
            at = int(np.flatnonzero(falls)[0])
            client = int(np.searchsorted(offsets, at, side="right")) - 1
            raise ValueError(
                f"rows of client {client} hold {rows[at]} before {rows[at + 1]}: rows ascend within a client and none "
                "is there twice; Assignment.from_parts sorts them"
            )
        for name, array in (("rows", rows), ("offsets", offsets)):
            view = array.astype(np.int64, copy=False).view()
            view.flags.writeable = False
            object.__setattr__(self, name, view)

    @classmethod
    def from_parts(cls, parts: Iterable[Any]) -> "Assignment":
        """The assignment of int[n_i] rows to each client i, in any order.

        Raises:
          ValueError: if there is no client, rows are no integers, or a client has a row twice.
        """
        arrays = [np.asarray(part) for part in parts]
        if not arrays:
            raise ValueError("parts is empty: an assignment has at least one client")
        arrays = [array if array.size else np.zeros(0, np.int64) for array in arrays]
        rows = _integers("parts", np.concatenate(arrays))
        sizes = np.asarray([len(array) for array in arrays], np.int64)
        order = np.lexsort((rows, np.repeat(np.arange(len(sizes)), sizes)))
        return cls(rows[order], offsets_of(sizes))

    @classmethod
    def from_owner(cls, owner: ArrayLike, num_clients: int) -> "Assignment":
        """The assignment that gives row i to client owner[i].

        Args:
          owner: int[n], -1 for a row that no client holds.
          num_clients: N; clients that own nothing are there too, without examples.

        Raises:
          ValueError: if an owner is not in -1..N-1.
        """
        owner = _integers("owner", owner)
        outside = owner[(owner < -1) | (owner >= num_clients)]
        if outside.size:
            raise ValueError(
                f"owner holds {outside[0]}, but clients are numbered 0 to {num_clients - 1}: use such a number, or -1 "
                "for a row that no client holds"
            )
        rows = np.flatnonzero(owner >= 0)
        owner = owner[rows]
        sizes = np.bincount(owner, minlength=num_clients)
        for shift in range(0, int(num_clients - 1).bit_length(), 16):  # numpy sorts 16 bits by radix, in linear time
            digit = (owner >> shift).astype(np.uint16)
            order = np.argsort(digit, kind="stable")
            rows, owner = rows[order], owner[order]
        return cls(rows, offsets_of(sizes))

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, index: slice) -> "Assignment": ...
    def __getitem__(self, index: int | slice) -> "np.ndarray | Assignment":
        if isinstance(index, slice):
            return self.select(np.arange(len(self))[index])
        client = range(len(self))[index]  # negative numbers, and an IndexError that ends a loop
        return self.rows[self.offsets[client] : self.offsets[client + 1]]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Assignment):
            return NotImplemented
        return np.array_equal(self.offsets, other.offsets) and np.array_equal(self.rows, other.rows)

    @property
    def num_clients(self) -> int:
        """Number of clients N."""
        return len(self)

    @property
    def sizes(self) -> np.ndarray:
        """int64[N], number of examples of each client."""
        return np.diff(self.offsets)

    @property
    def clients(self) -> np.ndarray:
        """int64[m], the client that holds each entry of `rows`."""
        return np.repeat(np.arange(len(self)), self.sizes)

    def select(self, ids: ArrayLike) -> "Assignment":
        """The assignment of clients `ids`, int[C], alone: they become clients 0 to C - 1 in that order.

        Raises:
          ValueError: if there is no id, or one is not in 0..N-1.
        """
        ids = _integers("ids", ids)
        if not ids.size:
            raise ValueError("ids is empty: an assignment has at least one client")
        outside = ids[(ids < 0) | (ids >= len(self))]
        if outside.size:
            raise ValueError(f"ids holds {outside[0]}, but clients are numbered 0 to {len(self) - 1}: use such numbers")
        offsets = offsets_of(self.sizes[ids])
        # Where a client's rows begin here, less where they begin in the result, added to every position of the result.
        shift = np.repeat(self.offsets[ids] - offsets[:-1], np.diff(offsets))
        return Assignment(self.rows[np.arange(offsets[-1]) + shift], offsets)

    def within(self, rows: Any) -> "Assignment":
        """The same clients with row i read as rows[i]: an assignment of a subset, as one of the whole data set.

        `partition.dirichlet(labels[rows], N, alpha=0.3).within(rows)` divides those rows alone.

        Args:
          rows: int[m], ascending rows of the data set.

        Raises:
          ValueError: if this assignment has a row beyond the end of `rows`, or `rows` does not ascend.
        """
        rows = _integers("rows", rows)
        if self.rows.size and self.rows.max() >= len(rows):
            raise ValueError(
                f"the assignment holds row {self.rows.max()} of a subset of {len(rows)} rows: partition labels[rows] "
                "with the same rows"
            )
        if (np.diff(rows) <= 0).any():
            raise ValueError("rows must ascend without repetition: pass numpy.unique(rows) and partition in that order")
        return Assignment(rows[self.rows], self.offsets)

    def digest(self) -> str:
        """The sha256, in hex, of N, the offsets and the rows as little-endian 64-bit integers."""
        content = np.concatenate([[len(self)], self.offsets, self.rows]).astype("<i8")
        return sha256(content.tobytes()).hexdigest()

    def save(self, path: str | Path, **provenance: Any) -> None:
        """Saves the assignment as a numpy archive that is complete or absent.

        Args:
          path: the file.
          provenance: JSON values that say how the assignment was made; `provenance(path)` reads them.

        Raises:
          ValueError: if the provenance is not JSON.
        """
        try:
            text = json.dumps(provenance, sort_keys=True, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"provenance must be JSON values ({error}): pass strings, numbers and lists") from None
        header = json.dumps({"format": _FORMAT, "sha256": self.digest()})

        def write(temporary: Path) -> None:
            with temporary.open("wb") as file:  # given a name, numpy would add a suffix to it
                np.savez(file, rows=self.rows, offsets=self.offsets, header=header, provenance=text)

        files.write(Path(path), write)

    @classmethod
    def load(cls, path: str | Path) -> "Assignment":
        """Loads what `save` wrote.

        Raises:
          FileNotFoundError: if there is no such file.
          ValueError: if the file is damaged, is no assignment, or does not have the digest it was saved with.
        """
        rows, offsets, digest, _ = _read(path)
        try:
            assignment = cls(rows, offsets)
        except ValueError as error:
            raise ValueError(f"{path} is no assignment ({error}): make it again") from None
        if assignment.digest() != digest:
            raise ValueError(f"{path} is not what was saved, its sha256 differs: make it again, or restore a copy")
        return assignment


def provenance(path: str | Path) -> dict[str, Any]:
    """What `Assignment.save` was told about how the assignment was made; raises as `Assignment.load` does."""
    return _read(path)[3]


def _read(path: str | Path) -> tuple[np.ndarray, np.ndarray, str, dict[str, Any]]:
    """(rows, offsets, digest, provenance) of a file, as far as it can be read."""
    unreadable = (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile, zlib.error)
    try:
        with np.load(path, allow_pickle=False) as archive:
            header = json.loads(str(archive["header"]))
            version, digest = header["format"], header["sha256"]
            stored = archive["rows"], archive["offsets"], digest, json.loads(str(archive["provenance"]))
    except FileNotFoundError:
        raise
    except unreadable as error:
        raise ValueError(
            f"{path} cannot be read as an assignment ({error}): make it again, or restore a copy"
        ) from None
    if version != _FORMAT:
        raise ValueError(
            f"{path} has format {version}, this version reads {_FORMAT}: use the version of the library that wrote it"
        )
    return stored


def _integers(name: str, values: Any) -> np.ndarray:
    array = np.asarray(values)
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(
            f"{name} must be a 1-d array of integers, got {array.dtype}{list(array.shape)}: pass row numbers"
        )
    return array
