"""Files that are whole or not there."""

import contextlib
import errno
import json
import os
import warnings
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

from pipelines.names import shortened

TEMPORARY_SUFFIX = ".unfinished"
_LONGEST_NAME = 255  # bytes, of the usual file systems
_ROOM = 200  # bytes that names of files in a run directory may add to a path
_LONGEST_PATH = 4096 - _ROOM
COPIES = "checkpoints"
"""Folder of a run directory in which its record is kept a second time."""


class Unwritable(Exception):  # noqa: N818 (named for what happened)
    """A run directory cannot be written to: its disk is full, read-only, or belongs to somebody else."""


def unwritable(out: Path, error: OSError, saved: str = "") -> Unwritable:
    """The error that says what happened, what is saved and how to go on."""
    number = error.errno or 0
    advice = _ADVICE.get(number, "see what is wrong with the disk")
    what = error.strerror or str(error)
    where = f" at {error.filename}" if error.filename else ""
    return Unwritable(
        f"cannot write in {out} ({what}{where}). {saved or 'What was saved before is whole'}: {advice}, and give the "
        "same command again to go on from there"
    )


@contextlib.contextmanager
def told(out: Path) -> Iterator[None]:
    """Turns what the system says of a file into the sentence of `unwritable`."""
    try:
        yield
    except OSError as error:
        raise unwritable(out, error) from error


_ADVICE = {
    errno.ENOSPC: "make room on that disk (space, or inodes: many small files use them up)",
    errno.EDQUOT: "make room within your quota on that disk",
    errno.EROFS: "mount it writable, or copy the directory to where you can write",
    errno.EACCES: "get permission to write there, or copy the directory to where you may",
    errno.EPERM: "get permission to write there, or copy the directory to where you may",
    errno.EISDIR: "move the directory that stands in the place of a file away",
    errno.ENOTDIR: "move the file that stands in the place of a directory away",
    errno.EEXIST: "move the file that stands in the place of a directory away",
    errno.EMFILE: "allow more open files (ulimit -n)",
}


def check_directory(out: Path) -> None:
    """Finds out, without making anything, whether `out` can be a directory that is written to.

    A directory that is there already is taken as it is.

    Raises:
      ValueError: if it is a file or lies below one, the name is too long or no name, or nothing can be written there.
    """
    shown = f"--out {shortened(str(out))}"
    try:
        path = Path(os.path.abspath(out))
        encoded = [os.fsencode(part) for part in path.parts]
    except ValueError as error:  # NUL, or half a character
        raise ValueError(f"{shown} is no name of a directory ({error}): choose another") from None
    if b"\0" in b"".join(encoded):
        raise ValueError(f"{shown} is no name of a directory, NUL is in it: choose another")
    longest = max(map(len, encoded))
    if longest > _LONGEST_NAME or sum(len(part) + 1 for part in encoded) > _LONGEST_PATH:
        raise ValueError(
            f"{shown} is too long: a name has at most {_LONGEST_NAME} bytes, and the whole path {_LONGEST_PATH}"
        )
    try:
        there = next(each for each in (path, *path.parents) if os.path.lexists(each))
        if not there.is_dir():
            what = "is a file" if there == path else f"lies below {there}, which is a file"
            raise ValueError(f"{shown} {what}: choose a directory")
        if there != path and not os.access(there, os.W_OK | os.X_OK):
            raise ValueError(f"{shown} cannot be made, {there} cannot be written to: choose a directory elsewhere")
    except OSError as error:
        raise ValueError(f"{shown} cannot be looked at ({error.strerror}): choose a directory elsewhere") from None


def make_directory(out: Path) -> None:
    """Makes a directory, with those above it, unless it is there.

    Raises:
      ValueError: if it cannot be made.
    """
    check_directory(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"--out {shortened(str(out))} cannot be made ({error.strerror}): choose a directory elsewhere"
        ) from None


def run_directory(out: Path, marker: str = "config.json") -> bool:
    """Makes the directory of a run, if need be, and says whether it has the file that is in every run's.

    Raises:
      ValueError: if it is a file, or holds something else.
    """
    make_directory(out)
    if has_record(out / marker):
        return True
    if any(not path.name.endswith(TEMPORARY_SUFFIX) and not _is_empty(path) for path in out.iterdir()):
        raise ValueError(f"{out} holds files but no run (no {marker}): choose an empty or a new directory for --out")
    return False


def write_text(path: Path, text: str) -> None:
    """Writes a text file under a temporary name and renames it, so that no reader and no crash sees half of it."""
    write(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write(path: Path, writer: Callable[[Path], object]) -> None:
    """Calls `writer(temporary path)` and renames what it wrote to `path`."""
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    writer(temporary)
    temporary.replace(path)


def append_text(path: Path, text: str) -> None:
    """Appends to a text file; a reader may see it without its last line."""
    with path.open("a", encoding="utf-8") as file:
        file.write(text)


def has_record(path: Path) -> bool:
    """Whether `write_record` has been called for a path, even if the record is lost."""
    return os.path.lexists(path) or (path.parent / COPIES / path.name).exists()


def _is_empty(path: Path) -> bool:
    """Whether there is nothing at a path but folders of a run that was killed as it was made."""
    return (
        path.name == COPIES and path.is_dir() and all(each.name.endswith(TEMPORARY_SUFFIX) for each in path.iterdir())
    )


def write_record(path: Path, content: dict[str, Any]) -> None:
    """Writes the JSON object that says what a run is, with a digest of itself, and a copy beside the checkpoints."""
    content = {name: value for name, value in content.items() if name != "sha256"}
    text = json.dumps({**content, "sha256": _digest(content)}, indent=2) + "\n"
    copy = path.parent / COPIES / path.name
    copy.parent.mkdir(exist_ok=True)
    # The copy first, so that where there is a record there is a copy of it, or of what it is about to become.
    for target in (copy, path):
        write(target, lambda temporary: _write_to_disk(temporary, text))


def read_record(path: Path) -> dict[str, Any]:
    """What `write_record` wrote; from the copy where the record is damaged, which is written again then.

    Records of before there were digests are taken as they are.

    Raises:
      ValueError: if both are damaged, or it was never there.
    """
    copy = path.parent / COPIES / path.name
    found = _sound(path)
    if isinstance(found, dict):
        return found
    kept = _sound(copy) if copy.exists() else "there is no copy of it"
    if isinstance(kept, dict):
        warnings.warn(f"{path} is damaged ({found}): it is taken from its copy {copy}", RecordWarning, stacklevel=2)
        if not path.is_dir():
            with contextlib.suppress(OSError):
                write_text(path, copy.read_text(encoding="utf-8"))
        return kept
    raise ValueError(
        f"{path} cannot be read ({found}), nor its copy {copy} ({kept}): put one of them back from a backup, or choose "
        "another --out"
    )


class RecordWarning(UserWarning):
    """What says what a run is was damaged, and its copy is used."""


def _sound(path: Path) -> dict[str, Any] | str:
    """The content of a record, or what is wrong with it."""
    try:
        text = path.read_bytes()
        content = json.loads(text)
    except OSError as error:
        return error.strerror or str(error)
    except ValueError as error:  # also where bytes are no text
        return str(error)
    if not isinstance(content, dict):
        return "it is no JSON object"
    digest = content.pop("sha256", None)
    # Whoever edits the file by hand does not know the digest; that is no damage, unless it is a single bit.
    if digest != _digest(content) and _is_one_bit_apart(text, path.parent / COPIES / path.name):
        return "one bit of it is not what was written"
    return content


def _is_one_bit_apart(text: bytes, copy: Path) -> bool:
    try:
        kept = copy.read_bytes()
    except OSError:
        return False
    if len(kept) != len(text):
        return False
    return sum((a ^ b).bit_count() for a, b in zip(text, kept, strict=True)) == 1


def _digest(content: dict[str, Any]) -> str:
    return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _write_to_disk(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
