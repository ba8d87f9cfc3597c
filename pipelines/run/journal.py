"""What grows during a run, written once: every save appends what is new, and a checkpoint says how far it counts.

A journal is one file of records, each with a sha256 over all that came before it and its own arrays. What stands behind
the place that a checkpoint names was written by a process that was killed before it had saved, or belongs to a
checkpoint that is damaged; the next append writes over it. There are two files, because all checkpoints of a run need
it: a record that is damaged in one is read from the other.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

NAMES = ("journal-1", "journal-2")
_LENGTH, _DIGEST = 8, 32


class Mark(NamedTuple):
    """How far a journal counts.

    Attributes:
      length: bytes.
      digest: sha256 of all records up to there, in hex; empty at the start.
    """

    length: int = 0
    digest: str = ""


START = Mark()


class Damaged(Exception):  # noqa: N818 (named for what happened)
    """The journal is not what was written, in both files."""


def append(folder: Path, mark: Mark, arrays: Mapping[str, np.ndarray]) -> Mark:
    """Writes arrays behind a mark and returns the new one; what stood behind it before is gone.

    Raises:
      Damaged: if both files are shorter than the mark.
    """
    described, buffers = {}, []
    for name, array in arrays.items():
        described[name] = [array.dtype.str, list(array.shape)]
        buffers.append(np.ascontiguousarray(array).tobytes())
    header = json.dumps(described).encode() + b"\n"
    payload = b"".join([header, *buffers])
    digest = _digest(mark.digest, payload)
    record = len(payload).to_bytes(_LENGTH, "little") + bytes.fromhex(digest) + payload
    folder.mkdir(exist_ok=True)
    paths = [folder / name for name in NAMES]
    for path, other in zip(paths, reversed(paths), strict=True):
        with path.open("r+b" if path.exists() else "w+b") as file:
            if os.fstat(file.fileno()).st_size < mark.length:
                file.seek(0)
                file.write(_start(other, mark.length))
            file.truncate(mark.length)
            file.seek(mark.length)
            file.write(record)
            file.flush()
            os.fsync(file.fileno())
    return Mark(mark.length + len(record), digest)


def _start(path: Path, length: int) -> bytes:
    content = _content(path, length)
    if len(content) < length:
        raise Damaged(f"{' and '.join(NAMES)} are shorter than what was written")
    return content


def _content(path: Path, length: int) -> bytes:
    """The first bytes of a file, fewer if it has no more."""
    try:
        with path.open("rb") as file:
            return file.read(length)
    except OSError:
        return b""


def read(folder: Path, mark: Mark) -> dict[str, np.ndarray]:
    """The arrays up to a mark, those of one name joined along their second axis.

    Raises:
      Damaged: if a record is damaged in both.
    """
    contents = [_content(folder / name, mark.length) for name in NAMES]
    parts: dict[str, list[np.ndarray]] = {}
    start, digest = 0, ""
    while start < mark.length:
        for content in contents:
            payload = _record(content, start, digest)
            if payload is not None:
                break
        else:
            raise Damaged(f"{' and '.join(NAMES)} are not what was written, from byte {start} on")
        digest = _digest(digest, payload)
        start += _LENGTH + _DIGEST + len(payload)
        header, _, rest = payload.partition(b"\n")
        at = 0
        for name, (dtype, shape) in json.loads(header).items():
            array = np.frombuffer(rest, dtype, count=int(np.prod(shape)), offset=at).reshape(shape)
            at += array.nbytes
            parts.setdefault(name, []).append(array)
    if (start, digest) != mark:
        raise Damaged(f"{' and '.join(NAMES)} do not end where the checkpoint says")
    return {name: np.concatenate(found, axis=1) for name, found in parts.items()}


def _record(content: bytes, start: int, before: str) -> bytes | None:
    """The payload of the record at a place, None if there is no sound one."""
    head = start + _LENGTH + _DIGEST
    length = int.from_bytes(content[start : start + _LENGTH], "little")
    payload = content[head : head + length]
    if len(payload) != length or len(content) < head:
        return None
    return payload if content[start + _LENGTH : head].hex() == _digest(before, payload) else None


def _digest(before: str, payload: bytes) -> str:
    return hashlib.sha256(bytes.fromhex(before) + payload).hexdigest()


def mark_of(value: Any) -> Mark:
    """The mark that a JSON value stands for."""
    length, digest = value
    return Mark(int(length), str(digest))
