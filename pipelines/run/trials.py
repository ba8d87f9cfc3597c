"""What a trial of a study has measured, in a file of its own that says whose it is and is whole or absent."""

import json
import os
import warnings
import zipfile
import zlib
from collections.abc import Mapping
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.common import files
from pipelines.run.checkpoint import CheckpointWarning, OtherRun

_OF = "of"
"""Name in a file of what its arrays are of, as JSON text."""

Arrays = dict[str, np.ndarray]


def load(path: Path, run: str, of: Mapping[str, Any], *, whole: bool = False) -> Arrays | None:
    """The arrays of a trial; None if they are not there or damaged, which a digest tells and a warning says.

    Args:
      path: the file.
      run: name of the study that is at work; empty for one of before there were names.
      of: what tells the trial from the others, JSON values by name.
      whole: raise an error for a damaged file, where nothing can be run again.

    Raises:
      ValueError: for a damaged file, where `whole` is given.
      OtherRun: if they are of another study, or of another trial.
    """
    if not os.path.lexists(path):
        return None
    try:
        with np.load(path) as stored:
            arrays = dict(stored)
        said = json.loads(str(arrays.pop(_OF))) if _OF in arrays else {}  # earlier versions did not say
        damage = "it is not what was written, its sha256 differs" if said and said["sha256"] != _digest(arrays) else ""
        whose, found = said.get("run", ""), {name: said.get(name, value) for name, value in of.items()}
    except (ValueError, KeyError, EOFError, OSError, TypeError, AttributeError) as error:
        damage = getattr(error, "strerror", None) or str(error) or type(error).__name__
    except (zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
        damage = str(error)
    if damage and whole:
        raise ValueError(
            f"{path} is damaged ({damage}): put it back, or give the command of the study again, which runs that trial "
            "again"
        )
    if damage:
        warnings.warn(f"{path} is damaged ({damage}): the trial is run again", CheckpointWarning, stacklevel=2)
        return None
    if run and whose and whose != run:
        raise OtherRun(
            f"{path} was written by another study ({whose}, and this one is {run}): put this study's own curves "
            "back, or remove that file to have the trial run again"
        )
    if found != dict(of):
        raise OtherRun(
            f"{path} is of {_described(found)}: put the curves of {_described(of)} back, or remove that file to have "
            "the trial run again"
        )
    return arrays


def save(path: Path, run: str, of: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Writes the arrays of a trial, see `load`."""
    said = json.dumps({"run": run, **of, "sha256": _digest(arrays)})
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write(path, partial(_write, arrays={**arrays, _OF: np.asarray(said)}))


def _described(of: Mapping[str, Any]) -> str:
    first, *others = of.items()
    return ", ".join([str(first[1]), *(f"{name} {value}" for name, value in others)])


def _digest(arrays: Mapping[str, np.ndarray]) -> str:
    hashed = sha256()
    for name, values in sorted(arrays.items()):
        hashed.update(f"{name} {values.dtype} {values.shape}".encode())
        hashed.update(np.ascontiguousarray(values).tobytes())
    return hashed.hexdigest()


def _write(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    with path.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
        file.flush()
        os.fsync(file.fileno())
