"""Files that are whole or not there."""

import os
from collections.abc import Callable
from pathlib import Path

from pipelines.names import shortened

TEMPORARY_SUFFIX = ".unfinished"
_LONGEST_NAME = 255  # bytes, of the usual file systems
_ROOM = 200  # bytes that names of files in a run directory may add to a path
_LONGEST_PATH = 4096 - _ROOM


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
    if (out / marker).exists():
        return True
    if any(not path.name.endswith(TEMPORARY_SUFFIX) for path in out.iterdir()):
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
