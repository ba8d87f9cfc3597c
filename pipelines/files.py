"""Files that are whole or not there."""

from collections.abc import Callable
from pathlib import Path

TEMPORARY_SUFFIX = ".unfinished"


def refuse_file(out: Path) -> None:
    """Raises ValueError if `out` is a file and no directory."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file: choose a directory")


def run_directory(out: Path, marker: str = "config.json") -> bool:
    """Makes the directory of a run, if need be, and says whether it has the file that is in every run's.

    Raises:
      ValueError: if it is a file, or holds something else.
    """
    refuse_file(out)
    out.mkdir(parents=True, exist_ok=True)
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
