"""Files that are written as one: complete or absent."""

import contextlib
import errno
import json
import os
import warnings
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

from pipelines.common.names import shortened

TEMPORARY_SUFFIX = ".unfinished"
_LONGEST_NAME = 255  # bytes, of the usual file systems
_ROOM = 200  # bytes that names of files in a run directory may add to a path
_LONGEST_PATH = 4096 - _ROOM
COPIES = "checkpoints"
"""Folder of a run directory in which its record is kept a second time."""
LOCK = ".lock"
"""File in that folder which the process that is at work holds."""


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
def explain_os_errors(out: Path, saved: str | Callable[[], str] = "") -> Iterator[None]:
    """Turns what the system says of a file into the sentence of `unwritable`; `saved`, what is saved, or what says so.

    An `Unwritable` from within stays as it is.
    """
    try:
        yield
    except OSError as error:
        raise unwritable(out, error, saved if isinstance(saved, str) else saved()) from error


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


def check_empty(out: Path) -> None:
    """Finds out, without making anything, whether `out` is an empty directory or can be made one.

    Raises:
      ValueError: if it is neither.
    """
    check_directory(out)
    if out.is_dir() and any(out.iterdir()):
        raise ValueError(f"--out {shortened(str(out))} is not empty: choose a new or an empty directory")


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
    """Whether `write_record` has been called for a path, even if the record is lost.

    A copy is none: the folder that it is in is no run directory.
    """
    if path.parent.name == COPIES and os.path.lexists(path.parent.parent / path.name):
        return False
    return os.path.lexists(path) or (path.parent / COPIES / path.name).exists()


def _is_empty(path: Path) -> bool:
    """Whether there is nothing at a path but folders of a run that was killed as it was made."""
    if path.name != COPIES or not path.is_dir():
        return False
    return all(each.name == LOCK or each.name.endswith(TEMPORARY_SUFFIX) for each in path.iterdir())


def write_record(path: Path, content: dict[str, Any]) -> None:
    """Writes the JSON object that says what a run is, with a digest of itself, and a copy beside the checkpoints."""
    content = {name: value for name, value in content.items() if name != "sha256"}
    text = json.dumps({**content, "sha256": _digest(content)}, indent=2) + "\n"
    copy = path.parent / COPIES / path.name
    copy.parent.mkdir(exist_ok=True)
    # The copy first, so that where there is a record there is a copy of it, or of what it is about to become.
    for target in (copy, path):
        write(target, lambda temporary: _write_to_disk(temporary, text))


def read_record(path: Path, check: Callable[[Any], object] = lambda config: None) -> dict[str, Any]:
    """What `write_record` wrote; from the copy where the record is damaged, which is written again then.

    Whoever edits a record by hand does not know its digest. So what is under "config" is taken as it is now, unless
    it is a single bit away from the copy or `check(config)` raises an error; all else comes from the copy. Records of
    before there were digests, which have no copy, are taken as they are.

    Raises:
      ValueError: if both are damaged, or it was never there.
    """
    copy = path.parent / COPIES / path.name
    found = _content(path)
    if isinstance(found, dict) and (_is_whole(found) or ("sha256" not in found and not os.path.lexists(copy))):
        return _without_digest(found)
    kept = _content(copy) if os.path.lexists(copy) else "there is no copy of it"
    if isinstance(found, dict):
        found = found if isinstance(kept, dict) and _is_edited(path, found, kept, check) else _DAMAGE
    if not (isinstance(kept, dict) and _is_whole(kept)):
        kept = kept if isinstance(kept, str) else _DAMAGE
        raise ValueError(
            f"{path} cannot be read ({found if isinstance(found, str) else _DAMAGE}), nor its copy {copy} ({kept}): "
            "put one of them back from a backup, or choose another --out"
        )
    kept = _without_digest(kept)
    if isinstance(found, dict):
        warnings.warn(
            f"{path} was edited by hand: its configuration is taken as it is now ({_edits(found, kept)}), and all "
            f"else from its copy {copy}",
            RecordWarning,
            stacklevel=2,
        )
        return {**kept, "config": found["config"]}
    warnings.warn(f"{path} is damaged ({found}): it is taken from its copy {copy}", RecordWarning, stacklevel=2)
    if not path.is_dir():
        with contextlib.suppress(OSError):
            write_text(path, copy.read_text(encoding="utf-8"))
    return kept


def kept_config(path: Path) -> Any:
    """The configuration in the copy of a record; None where there is no copy, or it is damaged."""
    copy = path.parent / COPIES / path.name
    kept = _content(copy) if os.path.lexists(copy) else None
    return kept.get("config") if isinstance(kept, dict) and _is_whole(kept) else None


def is_kept(path: Path) -> bool:
    """Whether a record and its copy are there, whole and the same."""
    found, kept = (_content(each) for each in (path, path.parent / COPIES / path.name))
    return isinstance(found, dict) and _is_whole(found) and found == kept


class RecordWarning(UserWarning):
    """What says what a run is was damaged, and its copy is used."""


_DAMAGE = "it is not what was written, its sha256 differs"


def _content(path: Path) -> dict[str, Any] | str:
    """The content of a record with its digest, or why it cannot be read."""
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        return error.strerror or str(error)
    except (ValueError, RecursionError) as error:  # also where bytes are no text
        return str(error)
    return content if isinstance(content, dict) else "it is no JSON object"


def _without_digest(content: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in content.items() if name != "sha256"}


def _is_whole(content: dict[str, Any]) -> bool:
    return content.get("sha256") == _digest(_without_digest(content))


def _is_edited(path: Path, found: dict[str, Any], kept: dict[str, Any], check: Callable[[Any], object]) -> bool:
    """Whether the configuration of a record, whose digest does not fit, can be what somebody wanted it to be."""
    if "config" not in found or found["config"] == kept.get("config"):
        return False
    if _is_one_bit_apart(path, path.parent / COPIES / path.name):
        return False
    try:
        check(found["config"])
    except Exception:  # whatever the user's own method or model says of it
        return False
    return True


def _edits(found: dict[str, Any], kept: dict[str, Any]) -> str:
    """What was edited, in words."""
    now, then = found["config"], kept["config"]
    if not (isinstance(now, dict) and isinstance(then, dict)):
        return "all of it"
    return ", ".join(_changes(now, then))


def _changes(now: dict[str, Any], then: dict[str, Any]) -> list[str]:
    """Every value that differs, of tables in tables too, in words."""
    found = []
    for name in {**then, **now}:
        value, was = now.get(name), then.get(name)
        if isinstance(value, dict) and isinstance(was, dict):
            found += _changes(value, was)
        elif value != was:
            found.append(f"{name} {value!r}, which was {was!r}")
    return found


def _is_one_bit_apart(path: Path, copy: Path) -> bool:
    text, kept = path.read_bytes(), copy.read_bytes()
    return len(kept) == len(text) and sum((a ^ b).bit_count() for a, b in zip(text, kept, strict=True)) == 1


def _digest(content: dict[str, Any]) -> str:
    return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _write_to_disk(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
