"""Files that are whole or not there."""

from collections.abc import Callable
from pathlib import Path

TEMPORARY_SUFFIX = ".unfinished"


def write_text(path: Path, text: str) -> None:
    """Writes a text file under a temporary name and renames it, so that no reader and no crash sees half of it."""
    write(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write(path: Path, writer: Callable[[Path], object]) -> None:
    """Calls `writer(temporary path)` and renames what it wrote to `path`."""
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    writer(temporary)
    temporary.replace(path)
