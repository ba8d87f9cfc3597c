"""Data sets decoded once and kept on disk as flat arrays, which are mapped into memory and not read.

There is a folder per name, version and options. It holds one .npy file per array and `manifest.json`, written last,
with the dtype, shape, size and sha256 of every file, a fingerprint of the source, and what was learned on the way.

* A build writes into a folder of its own, which is renamed when it is complete: one step for the file system. Of two
  processes that build at once the later one takes what the earlier one has put there.
* What a killed process left is removed by the next build in the same cache.
* Nothing is trusted without its manifest. Sizes are compared at every load. Checksums are compared too where all
  files together are below 64 MiB, where a file's modification time is not the recorded one (a copy, or a change), and
  on request; so damage below the file system, in a large data set, is found on request only.
* What is damaged is named in a `CacheWarning` and built again; what came from another source is built again silently.
* Where nothing can be written, the arrays are built in memory, with a `CacheWarning`.
"""

import contextlib
import hashlib
import json
import mmap
import os
import secrets
import shutil
import socket
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike

VERIFY_BELOW = 64 * 2**20
"""Total size in bytes below which checksums are compared at every load."""

_FORMAT = 1
_BUILDING = ".building-"

Allocate = Callable[[str, tuple[int, ...], Any], np.ndarray]
"""`allocate(name, shape, dtype)` gives a new writable array that will be kept under that name."""


class CacheWarning(UserWarning):
    """Cached data was damaged, or could not be kept."""


class Entry(NamedTuple):
    """What a build made.

    Attributes:
      arrays: name to array; read-only memory maps where they come from disk.
      info: JSON values.
    """

    arrays: dict[str, np.ndarray]
    info: dict[str, Any]


class _CannotWriteError(Exception):
    pass


def fetch(
    name: str,
    version: str,
    options: Mapping[str, Any],
    source: str,
    build: Callable[[Allocate], dict[str, Any]],
    *,
    cache_dir: str | Path | None = None,
    verify: bool | None = None,
) -> Entry:
    """Returns the arrays of a data set from the cache, after building them if they are not there.

    Args:
      name: of the data set.
      version: of the data set.
      options: JSON values that the arrays depend on besides.
      source: fingerprint of what the arrays are built from; kept ones of another source are not used.
      build: `build(allocate) -> info` makes the arrays with `allocate`, fills them and returns JSON values to keep
        beside. What it raises is passed on, and then nothing is kept.
      cache_dir: where to keep them, or None for the user's cache folder.
      verify: whether to compare checksums, or None for the rule given above.
    """
    try:
        folder = user_folder("data") if cache_dir is None else Path(cache_dir).expanduser().absolute()
    except OSError as error:
        return _in_memory("the user's cache folder", error, build)
    key = hashlib.sha256(json.dumps([name, version, options], sort_keys=True).encode()).hexdigest()[:12]
    path = folder / f"{name.replace('/', '-')}-{version}-{key}"
    kept = _read(path, source, verify)
    if isinstance(kept, Entry):
        return kept
    if kept:
        warnings.warn(f"cached data {path} is damaged ({kept}): building it again", CacheWarning, stacklevel=2)
    try:
        return _build(path, source, build)
    except _CannotWriteError as error:
        return _in_memory(folder, error.__cause__, build)


def _in_memory(folder: Path | str, error: BaseException | None, build: Callable[[Allocate], dict[str, Any]]) -> Entry:
    """Builds the arrays in memory, and says why."""
    warnings.warn(
        f"cannot keep decoded data in {folder} ({error}): building it in memory, as every start will until the cache "
        "can be written; choose its place with cache_dir or XDG_CACHE_HOME",
        CacheWarning,
        stacklevel=3,
    )
    arrays: dict[str, np.ndarray] = {}

    def allocate(array: str, shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
        arrays[array] = np.empty(shape, dtype)
        return arrays[array]

    info = build(allocate)
    return Entry(arrays, info)


def kept_digest(array: np.ndarray) -> str | None:
    """The sha256 of the .npy file that an array is the mapped whole of, if the file is one of the cache; else None."""
    if not isinstance(array, np.memmap) or not isinstance(array.base, mmap.mmap) or array.filename is None:
        return None
    file = Path(array.filename)
    try:
        manifest = json.loads((file.parent / "manifest.json").read_text())
        digest = manifest.pop("sha256")
        wanted = manifest["files"][file.stem]
        described = [wanted["dtype"], wanted["shape"], wanted["mtime_ns"]]
        if digest != _text_digest(manifest):
            return None
        now = [str(array.dtype), list(array.shape), file.stat().st_mtime_ns]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return str(wanted["sha256"]) if described == now else None


def user_folder(name: str) -> Path:
    """The folder `name` in this library's part of the user's cache folder.

    Raises:
      OSError: if nothing says where that is: no XDG_CACHE_HOME, and a user without a home directory.
    """
    base = os.environ.get("XDG_CACHE_HOME") or (os.environ.get("LOCALAPPDATA") if os.name == "nt" else None)
    try:
        return (Path(base) if base else Path.home() / ".cache") / "fedjax-core" / name
    except RuntimeError:
        raise FileNotFoundError("this user has no home directory, set HOME or XDG_CACHE_HOME") from None


def _build(path: Path, source: str, build: Callable[[Allocate], dict[str, Any]]) -> Entry:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path.parent)
        temporary = _new_folder(path.parent)
    except OSError as error:
        raise _CannotWriteError from error
    maps: dict[str, np.memmap] = {}

    def allocate(array: str, shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
        try:
            maps[array] = np.lib.format.open_memmap(temporary / f"{array}.npy", "w+", dtype, shape)
            if hasattr(os, "posix_fallocate"):
                # A full disk is an error here; on the first write to a hole in the file it would kill the process.
                with (temporary / f"{array}.npy").open("r+b") as file:
                    os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
        except OSError as error:
            raise _CannotWriteError from error
        return maps[array]

    try:
        info = build(allocate)
        try:
            for array in maps.values():
                array.flush()
            content = {
                "format": _FORMAT,
                "source": source,
                "info": info,
                "files": {array: _described(temporary / f"{array}.npy", maps[array]) for array in maps},
            }
            (temporary / "manifest.json").write_text(json.dumps({"sha256": _text_digest(content), **content}, indent=1))
            _publish(temporary, path, source)
            kept = _read(path, source, verify=False)
        except OSError as error:
            raise _CannotWriteError from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    # The arrays live on in the removed folder's maps if another process has replaced or damaged ours since.
    return kept if isinstance(kept, Entry) else Entry(dict(maps), info)


def _publish(temporary: Path, path: Path, source: str) -> None:
    """Renames a complete folder, unless another process has put a sound one there meanwhile."""
    while True:
        try:
            temporary.rename(path)
            return
        except OSError:
            if not path.exists():
                raise
        if isinstance(_read(path, source, verify=True), Entry):
            return
        _discard(path)


def _read(path: Path, source: str, verify: bool | None) -> Entry | str:
    """What is kept in a folder; or what is wrong with it, an empty string if it is not there or is out of date."""
    if not path.exists():
        return ""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        digest = manifest.pop("sha256")
        if manifest["format"] != _FORMAT or manifest["source"] != source:
            return ""
        if digest != _text_digest(manifest):
            return "manifest.json is not what was written, its sha256 differs"
    except FileNotFoundError:
        return "manifest.json is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "manifest.json cannot be read"
    files = {array: (path / f"{array}.npy", wanted) for array, wanted in manifest["files"].items()}
    try:
        stats = {array: file.stat() for array, (file, _) in files.items()}
        for array, (file, wanted) in files.items():
            if stats[array].st_size != wanted["bytes"]:
                return f"{file.name} has {stats[array].st_size} bytes and not {wanted['bytes']}"
        if verify is None:
            small = sum(stat.st_size for stat in stats.values()) < VERIFY_BELOW
            touched = any(stats[array].st_mtime_ns != wanted["mtime_ns"] for array, (_, wanted) in files.items())
            verify = small or touched
        for file, wanted in files.values():
            if verify and _digest(file) != wanted["sha256"]:
                return f"{file.name} is not what was written, its sha256 differs"
        arrays = {array: np.load(file, mmap_mode="r") for array, (file, _) in files.items()}
        for array, (file, wanted) in files.items():
            if [str(arrays[array].dtype), list(arrays[array].shape)] != [wanted["dtype"], wanted["shape"]]:
                return f"{file.name} has another dtype or shape than was written"
    except OSError as error:
        return f"{Path(str(error.filename)).name} is missing or cannot be read"
    except ValueError as error:
        return f"it cannot be mapped: {error}"
    return Entry(arrays, manifest["info"])


def _described(file: Path, array: np.ndarray) -> dict[str, Any]:
    stat = file.stat()
    return {
        "dtype": str(array.dtype),
        "shape": list(array.shape),
        "bytes": stat.st_size,
        "mtime_ns": stat.st_mtime_ns,
        "sha256": _digest(file),
    }


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _text_digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _new_folder(folder: Path) -> Path:
    temporary = folder / f"{_BUILDING}{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
    temporary.mkdir()
    return temporary


def _remove_leftovers(folder: Path) -> None:
    """Removes what dead processes of this machine left; those of another machine may be alive."""
    for leftover in folder.glob(f"{_BUILDING}{socket.gethostname()}-*"):
        pid = leftover.name.split("-")[-2]
        if pid.isdigit() and not _alive(int(pid)):
            shutil.rmtree(leftover, ignore_errors=True)


def _alive(pid: int) -> bool:
    if os.name == "nt":  # where os.kill(pid, 0) ends the process
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _discard(path: Path) -> None:
    """Removes a folder in one step for the file system, so that no process finds half of it."""
    aside = _new_folder(path.parent)
    with contextlib.suppress(FileNotFoundError):  # another process has removed it
        path.rename(aside / path.name)
    shutil.rmtree(aside, ignore_errors=True)
