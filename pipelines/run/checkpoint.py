"""Checkpoints that survive being killed: one folder per saved round, complete or absent.

A folder is written under a temporary name, brought to the disk and renamed when complete, which is one step for the
file system. It holds the state (orbax), arrays of any shape (`arrays.npz`), `manifest.json` with the sha256 of every
other file and the name of the run, and `manifest.sha256`. Nothing is trusted without its manifest, so what a power cut
or a bad disk did to a renamed folder is found too, and the one before is used. Metrics of every round are not written
anew each time: they are in a `pipelines.run.journal` beside the folders, and the manifest says how much of it counts.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from fedjax_core import checks
from fedjax_core.types import PyTree
from pipelines.common import processes
from pipelines.run import journal

_PREFIX = "round-"
_TEMPORARY = "unfinished-"
_FORMAT = 2
_FIRST_FORMAT = 1  # without a journal, a digest of the manifest and the name of the run; still read


class CheckpointWarning(UserWarning):
    """A checkpoint was found damaged and was passed over."""


class Saved(NamedTuple):
    """A restored checkpoint.

    Attributes:
      round: rounds done.
      state: pytree like the one that was saved; numpy arrays (on a mesh: see `restore_latest`), and typed keys where
        there were such.
      arrays: name to array, as saved, those of the journal among them.
      info: what the caller wrote down beside, JSON values.
      mark: how far the journal counts; give it to the next `save` that appends.
    """

    round: int
    state: PyTree
    arrays: dict[str, np.ndarray]
    info: dict[str, Any]
    mark: journal.Mark = journal.START


class OtherRun(ValueError):  # noqa: N818 (named for what happened)
    """A checkpoint is of another run."""


def save(
    folder: Path,
    round: int,
    state: PyTree,
    arrays: Mapping[str, np.ndarray],
    info: Mapping[str, Any] | None = None,
    *,
    keep: int = 3,
    mark: journal.Mark = journal.START,
    new: Mapping[str, np.ndarray] | None = None,
    run: str = "",
) -> journal.Mark:
    """Saves a checkpoint and removes all but the `keep` latest up to this round.

    With several processes, all of them call this, each writes its part of what is distributed over them, and the first
    one the rest; the folder must be one that they share.

    Args:
      folder: holds the checkpoints of one run of one method.
      round: rounds done.
      state: pytree of arrays; typed keys are saved as their data.
      arrays: numpy arrays by name.
      info: JSON values to keep beside.
      keep: how many to keep; two or more, or there is nothing to fall back on.
      mark: how far the journal counts, from the save before or from `restore_latest`.
      new: arrays with an axis 1 along which they grow, to append to the journal there.
      run: name of the run, which tells its checkpoints from those of other runs.

    Returns:
      How far the journal counts now.

    Raises:
      OSError: if it cannot be written; what was saved before is as it was.
    """
    temporary, final = folder / f"{_TEMPORARY}{round:08d}", folder / f"{_PREFIX}{round:08d}"

    def prepare() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(f"{_TEMPORARY}*"):
            _discard(leftover)
        temporary.mkdir()

    leaves = {name: _whole(leaf) for name, (leaf, _) in _flat(state).items()}
    # orbax refuses arrays without elements; there is nothing in them to save.
    filled = {name: leaf for name, leaf in leaves.items() if leaf.size}
    processes.first_does(prepare)
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            checkpointer.save((temporary / "state").resolve(), filled)
        processes.wait_for_all("checkpoint")
        if not processes.is_first():
            return mark
        np.savez(temporary / "arrays.npz", **arrays)  # type: ignore[arg-type]
        if new:
            mark = _append(folder, mark, new)
        manifest = {
            "format": _FORMAT,
            "run": run,
            "round": round,
            "leaves": {n: [kind, list(leaves[n].shape), str(leaves[n].dtype)] for n, (_, kind) in _flat(state).items()},
            "info": dict(info or {}),
            "journal": list(mark),
            "sha256": {str(p.relative_to(temporary).as_posix()): _digest(p) for p in _files(temporary)},
        }
        content = json.dumps(manifest, indent=1).encode()
        (temporary / "manifest.json").write_bytes(content)
        (temporary / "manifest.sha256").write_text(hashlib.sha256(content).hexdigest())
        _to_disk(temporary)
        if os.path.lexists(final):  # damaged, or we would have gone on from it
            _remove(final)
        temporary.rename(final)
        _to_disk(folder, itself=True)
    except Exception as error:
        with contextlib.suppress(OSError):  # the partial copy takes space, which may be what is missing
            shutil.rmtree(temporary)
        failure = _of_the_disk(error)
        if failure is None or failure is error:
            raise
        raise failure from error
    for old in [p for p in _folders(folder) if _round_of(p) <= round][:-keep]:
        _remove(old)
    return mark


def _append(folder: Path, mark: journal.Mark, new: Mapping[str, np.ndarray]) -> journal.Mark:
    try:
        return journal.append(_journal(folder), mark, new)
    except journal.Damaged as error:
        raise OSError(f"{folder}: {error} by this run, so another program has changed it") from None


def _journal(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.journal")


def _of_the_disk(error: BaseException) -> OSError | None:
    """The error of the operating system that is behind an error, if any: orbax and its writer wrap them."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError):
            return cause
        cause = cause.__cause__ or cause.__context__
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO, errno.EMFILE, errno.EFBIG):
        if os.strerror(number) in str(error):
            return OSError(number, os.strerror(number))
    return None


def restore_latest(
    folder: Path,
    expected: PyTree,
    expected_name: str = "the state of this run",
    wanted: Callable[[int], bool] = lambda round: True,
    *,
    run: str = "",
) -> Saved | None:
    """Restores the latest checkpoint that is whole, or returns None if there is none.

    A damaged one is named in a `CheckpointWarning` and the one before is tried.

    Args:
      folder: as for `save`.
      expected: pytree with the structure, shapes and dtypes of the saved state (arrays or `jax.ShapeDtypeStruct`).
        Where such a struct has a sharding the array is put there, and no process reads more than its part.
      expected_name: for the error.
      wanted: whether a checkpoint after that round is one to go on from.
      run: as for `save`; empty takes those of any run.

    Raises:
      ValueError: if a whole checkpoint holds a state of another structure, with the first leaf that differs.
      OtherRun: if it is of another run.
    """
    name = processes.first_does(lambda: _latest_whole(folder, wanted, run))
    return None if name is None else _restore(folder / name, expected, expected_name)


def measured(folder: Path, wanted: Callable[[int], bool] = lambda round: True, *, run: str = "") -> Saved | None:
    """The latest checkpoint without its state, which is None; None if there is none.

    Args:
      folder: as for `save`.
      wanted: as for `restore_latest`.
      run: as for `restore_latest`.

    Raises:
      ValueError: if it is damaged: an older one is another result, which whoever wants numbers did not ask for.
      OtherRun: if it is of another run.
    """
    found = [path for path in _folders(folder) if wanted(_round_of(path))]
    if not found:
        return None
    if damage := verify(found[-1], run):
        raise ValueError(
            f"checkpoint {found[-1]} is damaged ({damage}): put it back, or give the command of the run again, which "
            "goes on from the one before"
        )
    manifest = _manifest(found[-1])
    return Saved(int(manifest["round"]), None, _arrays(found[-1], manifest), manifest["info"])


def _latest_whole(folder: Path, wanted: Callable[[int], bool], run: str) -> str | None:
    """Name of the latest checkpoint that is whole and wanted."""
    for path in reversed(_folders(folder)):  # none where there is no folder
        if not wanted(_round_of(path)):
            continue
        damage = verify(path, run)
        if not damage:
            return path.name
        warnings.warn(f"checkpoint {path} is damaged ({damage}): using the one before", CheckpointWarning, stacklevel=3)
    return None


def latest_round(folder: Path) -> int:
    """The round of the latest checkpoint, whole or not; 0 if there is none."""
    return max(map(_round_of, _folders(folder)), default=0)


def verify(path: Path, run: str = "") -> str:
    """Says what is wrong with a checkpoint's folder; an empty string if nothing is.

    Raises:
      OtherRun: if it is of another run than `run`, unless that is empty.
    """
    if not path.is_dir():
        return "it is a file and no folder"
    manifest_path = path / "manifest.json"
    if not os.path.lexists(manifest_path):
        return "manifest.json is missing, so it was never finished"
    try:
        content = manifest_path.read_bytes()
        manifest = json.loads(content)
        first = manifest["format"] == _FIRST_FORMAT
        has_digest = not first or "journal" in manifest or os.path.lexists(path / "manifest.sha256")
        if has_digest and (path / "manifest.sha256").read_text() != hashlib.sha256(content).hexdigest():
            return "manifest.json is not what was written, its sha256 differs"
        if manifest["format"] not in (_FIRST_FORMAT, _FORMAT):
            return ""  # and `_restore` says of which version it is
        digests = dict(manifest["sha256"])
        int(manifest["round"]), dict(manifest["leaves"]), dict(manifest["info"])
        mark, written_by = journal.mark_of(manifest.get("journal", journal.START)), manifest.get("run", "")
    except (ValueError, KeyError, TypeError, OSError) as error:
        reason = f" ({error.strerror})" if isinstance(error, OSError) else ""
        name = Path(str(error.filename)).name if isinstance(error, OSError) else "manifest.json"
        return f"{name} cannot be read{reason}"
    if run and written_by and written_by != run:
        raise OtherRun(
            f"checkpoint {path} was written by another run ({written_by}, and this one is {run}): put this run's own "
            "checkpoints back, or remove that folder to go on from the one before it"
        )
    try:
        for name, digest in digests.items():
            if not (path / name).is_file():
                return f"{name} is missing"
            if _digest(path / name) != digest:
                return f"{name} is not what was written, its sha256 differs"
        if mark.length:
            journal.read(_journal(path.parent), mark)
    except journal.Damaged as error:
        return str(error)
    except OSError as error:
        return f"it cannot be read ({error.strerror})"
    return ""


def _restore(path: Path, expected: PyTree, expected_name: str) -> Saved:
    manifest = _manifest(path)
    wanted = _flat(expected)
    got = {n: jax.ShapeDtypeStruct(tuple(s), jnp.dtype(d)) for n, (_, s, d) in manifest["leaves"].items()}
    checks.same_structure(f"checkpoint {path.name}", got, {n: leaf for n, (leaf, _) in wanted.items()}, expected_name)
    for name, (_, kind) in wanted.items():
        saved_kind = manifest["leaves"][name][0]
        if saved_kind != kind:
            raise ValueError(
                f"checkpoint {path.name}[{name!r}] is {saved_kind} but {expected_name} has {kind} there: build both "
                "alike"
            )
    filled = [name for name, leaf in got.items() if np.prod(leaf.shape)]
    template = {name: np.zeros((), got[name].dtype) for name in filled}

    def how(name: str) -> ocp.RestoreArgs:
        leaf, kind = wanted[name]
        sharding = leaf.sharding if isinstance(leaf, jax.ShapeDtypeStruct) and kind == "array" else None
        if sharding is None:
            return ocp.RestoreArgs(restore_type=np.ndarray)
        return ocp.ArrayRestoreArgs(restore_type=jax.Array, sharding=sharding, global_shape=leaf.shape)

    restore_args = {name: how(name) for name in filled}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        loaded = checkpointer.restore((path / "state").resolve(), item=template, restore_args=restore_args)
    leaves = []
    for name, (_, kind) in wanted.items():
        leaf: Any = loaded[name] if name in loaded else np.zeros(got[name].shape, got[name].dtype)
        leaves.append(jax.random.wrap_key_data(leaf, impl=kind.split(":")[1]) if kind != "array" else leaf)
    state = jax.tree.unflatten(jax.tree.structure(expected), leaves)
    mark = journal.mark_of(manifest.get("journal", journal.START))
    return Saved(int(manifest["round"]), state, _arrays(path, manifest), manifest["info"], mark)


def _manifest(path: Path) -> dict[str, Any]:
    """What a whole checkpoint says of itself."""
    manifest: dict[str, Any] = json.loads((path / "manifest.json").read_text())
    if manifest["format"] not in (_FIRST_FORMAT, _FORMAT):
        raise ValueError(
            f"checkpoint {path} has format {manifest['format']}, this version reads {_FIRST_FORMAT} and {_FORMAT}: use "
            "the version of the library that wrote it"
        )
    return manifest


def _arrays(path: Path, manifest: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Its arrays, with those of the journal."""
    with np.load(path / "arrays.npz", allow_pickle=False) as stored:
        arrays = {name: stored[name] for name in stored.files}
    mark = journal.mark_of(manifest.get("journal", journal.START))
    return journal.read(_journal(path.parent), mark) | arrays if mark.length else arrays


def _whole(leaf: Any) -> Any:
    """The array as numpy's, or as it is where it is distributed over processes."""
    distributed = isinstance(leaf, jax.Array) and not leaf.is_fully_addressable and not leaf.is_fully_replicated
    return leaf if distributed else np.asarray(leaf)


def _flat(tree: PyTree) -> dict[str, tuple[Any, str]]:
    """Path of each leaf to the leaf (a key as its data) and what it is: "array" or "key:<implementation>"."""
    flat = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        kind = "array"
        if jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key):
            one = leaf if isinstance(leaf, jax.Array) else _key_like(leaf)
            kind = f"key:{jax.random.key_impl(one)}"
            leaf = jax.eval_shape(jax.random.key_data, leaf) if one is not leaf else jax.random.key_data(leaf)
        flat[jax.tree_util.keystr(path)] = (leaf, kind)
    return flat


def _key_like(struct: Any) -> Any:
    """A key of the implementation that a ShapeDtypeStruct of keys names, which only its dtype knows."""
    for impl in ("threefry2x32", "rbg", "unsafe_rbg"):
        key = jax.random.key(0, impl=impl)
        if key.dtype == struct.dtype:
            return key
    raise ValueError(f"keys of dtype {struct.dtype} cannot be restored: use one of JAX's own implementations")


def _folders(folder: Path) -> list[Path]:
    found = [p for p in folder.glob(f"{_PREFIX}*") if p.name.removeprefix(_PREFIX).isdigit()]
    return sorted(found, key=_round_of)


def _round_of(path: Path) -> int:
    return int(path.name.removeprefix(_PREFIX))


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file())


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _remove(path: Path) -> None:
    # Renamed first: a folder half removed must not pass for a checkpoint that was damaged.
    _discard(path.rename(path.with_name(_TEMPORARY + path.name)))


def _discard(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _to_disk(folder: Path, *, itself: bool = False) -> None:
    """Waits until files are on the disk: those of a folder and below it, or only the folder's own list of names."""
    if os.name == "nt":  # folders cannot be opened there
        return
    # The names of new files come to the disk with them, on the file systems that are usual.
    for path in [folder] if itself else [*_files(folder), folder]:
        number = os.open(path, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)
