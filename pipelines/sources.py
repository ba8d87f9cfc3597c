"""Data sets from what is in memory or in one file: arrays, a data frame, a .npz file, several data sets as domains.

Everything here ends in `pipelines.dataset.check`. Where there is no test part a fixed fifth is held out, the same on
every machine.
"""

import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipelines.dataset import Dataset, check, normalization
from pipelines.names import pick
from pipelines.text import PAD_LABEL

_SPLIT_SEED = 20_240
_TEST_SHARE = 0.2


def from_arrays(
    x: Any,
    y: Any,
    *,
    test: tuple[Any, Any] | None = None,
    groups: Any = None,
    test_groups: Any = None,
    num_classes: int | None = None,
    name: str = "arrays",
) -> Dataset:
    """A data set of arrays, checked.

    What the inputs are is told by their type: uint8[n, H, W, C] (or [n, H, W]) are images and get their statistics as
    `normalization`, other integers [n, T] are tokens, and floats of any shape become float32.

    Args:
      x: inputs [n, ...].
      y: labels int[n]; or int[n, T] for sequences of tokens, where -1 marks padding.
      test: (x, y) of the test part, or None to hold a fifth out: of every class, or of every group if there are any.
      groups: natural client of each example, numbers or names [n]; sorted, they become 0, 1, ...
      test_groups: likewise for the test part, where that is given.
      num_classes: number of classes, or None for one more than the largest label (or token, for sequences).
      name: of the data set.

    Raises:
      ValueError: if the arrays are of a type or shape that none of this fits, or fail `pipelines.dataset.check`.
    """
    x, y = _inputs(x, f"{name}.train['x']"), _targets(y, f"{name}.train['y']")
    if test is None and test_groups is not None:
        raise ValueError("test_groups goes with a test part, got test=None: give test=(x, y) too, or leave it out")
    ids, test_ids, names = _numbered(groups, test_groups, name)
    if ids is not None and ids.shape != y.shape[:1]:
        raise ValueError(f"{name} has groups {list(ids.shape)} for labels {list(y.shape)}: give one group per example")
    if test is None:
        if len(x) != len(y):
            raise ValueError(f"{name} has {len(x)} inputs and {len(y)} labels: give one label per input")
        out = held_out(y, ids)
        test_x, test_y = x[out], y[out]
        x, y = x[~out], y[~out]
        if ids is not None:
            ids, test_ids = ids[~out], ids[out]
    else:
        test_x, test_y = _inputs(test[0], f"{name}.test['x']"), _targets(test[1], f"{name}.test['y']")
    tokens = x.ndim == 2 and x.dtype == np.int32
    largest_token = max(x.max(initial=0), test_x.max(initial=0)) if tokens else 0
    largest = max(y.max(initial=0), test_y.max(initial=0), largest_token if y.ndim > 1 else 0)
    num_classes = int(largest) + 1 if num_classes is None else num_classes
    vocabulary_size = (num_classes if y.ndim > 1 else int(largest_token) + 1) if tokens else None
    return check(
        Dataset(
            name,
            {"x": x, "y": y},
            {"x": test_x, "y": test_y},
            num_classes,
            groups=ids,
            test_groups=test_ids,
            group_names=names,
            normalization=normalization(x) if x.dtype == np.uint8 and len(x) else None,
            pad_id=PAD_LABEL if y.ndim > 1 and PAD_LABEL in (y.min(initial=0), test_y.min(initial=0)) else None,
            vocabulary_size=vocabulary_size,
        )
    )


def from_npz(path: str | Path) -> Dataset:
    """A data set of a .npz file with the arrays x and y, and optionally test_x, test_y, groups and test_groups.

    They mean what the arguments of `from_arrays` mean. The data set is called after the file.

    Raises:
      ValueError: if the file is not there or damaged, lacks an array or has one of another name, or fails
        `from_arrays`.
    """
    arrays = read_npz(path, ("x", "y"), ("test_x", "test_y", "groups", "test_groups"))
    if ("test_x" in arrays) != ("test_y" in arrays):
        raise ValueError(f"{path} has only one of test_x and test_y: give both, or neither to have a fifth held out")
    return from_arrays(
        arrays["x"],
        arrays["y"],
        test=(arrays["test_x"], arrays["test_y"]) if "test_x" in arrays else None,
        groups=arrays.get("groups"),
        test_groups=arrays.get("test_groups"),
        name=Path(path).stem,
    )


def from_frame(frame: Any, *, label: str, group: str | None = None, name: str = "frame") -> Dataset:
    """A data set of a table: a pandas or polars data frame, or anything else with `columns` and `frame[column]`.

    A fifth is held out, of every class or of every group. Columns of numbers are brought to zero mean and unit variance
    by the statistics of the training part; a column of text becomes one input per category that it has, in sorted
    order, 0 or 1.

    Args:
      frame: the table.
      label: column of the classes, whole numbers or text; sorted, they become 0, 1, ...
      group: column of the natural clients, likewise; or None.
      name: of the data set.

    Raises:
      ValueError: if a column is not there, twice there, or neither all numbers nor all text; or there are none left.
    """
    columns = [str(column) for column in frame.columns]
    twice = sorted({column for column in columns if columns.count(column) > 1})
    if twice:
        raise ValueError(f"{name} has several columns called {twice[0]!r}: give each a name of its own")
    pick(f"column of {name}", label, columns)
    if group is not None:
        pick(f"column of {name}", group, columns)
    values = {column: _column(frame[original], column) for column, original in zip(columns, frame.columns, strict=True)}
    if np.issubdtype(values[label].dtype, np.floating):
        raise ValueError(
            f"label column {label!r} holds {values[label].dtype} numbers: classes are whole numbers or text"
        )
    y = np.unique(values[label], return_inverse=True)[1].astype(np.int32)
    ids, _, names = _numbered(None if group is None else values[group], None, name)
    inputs = [column for name, column in values.items() if name not in (label, group)]
    if not inputs:
        raise ValueError(f"{name} has no column left to learn from besides {label!r}: give at least one input column")
    out = held_out(y, ids)
    x = np.concatenate([_encoded(column, ~out) for column in inputs], axis=1)
    dataset = from_arrays(x[~out], y[~out], test=(x[out], y[out]), num_classes=int(y.max()) + 1, name=name)
    if ids is None:
        return dataset
    return check(dataset._replace(groups=ids[~out], test_groups=ids[out], group_names=names))


def join(parts: Sequence[Dataset]) -> Dataset:
    """Several data sets of the same classes as the domains of one: `groups` says from which each example is.

    Images are brought to the largest height and width (bilinear) and, where some are in color, from one gray channel to
    three equal ones; the statistics are those of all training images. Other inputs must agree as they are.

    Raises:
      ValueError: if two have the same name, or differ in classes or in kind or shape of input, or hold tokens, of
        which two data sets have different vocabularies.
    """
    first, names = parts[0], tuple(part.name for part in parts)
    joined = "+".join(names)
    if len(set(names)) < len(names):
        raise ValueError(f"{joined} names one domain twice: name each once")
    for part in parts:
        if part.vocabulary_size is not None:
            raise ValueError(
                f"{part.name} holds tokens, and those of two data sets mean different things: join no text"
            )
        if part.num_classes != first.num_classes:
            raise ValueError(
                f"{first.name} has {first.num_classes} classes and {part.name} {part.num_classes}: domains of one task "
                "share its classes, join others"
            )
        if part.train["x"].dtype != first.train["x"].dtype or len(part.input_shape) != len(first.input_shape):
            raise ValueError(
                f"inputs of {first.name} are {first.train['x'].dtype}{list(first.input_shape)} and those of "
                f"{part.name} {part.train['x'].dtype}{list(part.input_shape)}: join data sets with inputs of one kind"
            )
    images = first.normalization is not None
    if images:
        height, width, channels = (max(part.input_shape[axis] for part in parts) for axis in range(3))
        converted = [
            {k: {**p, "x": _reshaped(p["x"], (height, width, channels), part.name)} for k, p in _parts(part)}
            for part in parts
        ]
    else:
        for part in parts:
            if part.input_shape != first.input_shape:
                raise ValueError(
                    f"inputs of {first.name} are {list(first.input_shape)} and those of {part.name} "
                    f"{list(part.input_shape)}: bring them to the same shape, only images are resized"
                )
        converted = [dict(_parts(part)) for part in parts]

    def together(which: str) -> tuple[dict[str, np.ndarray], np.ndarray]:
        arrays = {leaf: np.concatenate([part[which][leaf] for part in converted]) for leaf in ("x", "y")}
        domain = np.repeat(np.arange(len(parts), dtype=np.int32), [len(part[which]["y"]) for part in converted])
        return arrays, domain

    train, groups = together("train")
    test, test_groups = together("test")
    return check(
        Dataset(
            joined,
            train,
            test,
            first.num_classes,
            groups=groups,
            test_groups=test_groups,
            group_names=names,
            normalization=normalization(train["x"]) if images else None,
        )
    )


def held_out(y: np.ndarray, groups: np.ndarray | None = None) -> np.ndarray:
    """Which examples to hold out for testing where nobody has said so: bool[n].

    The same fifth of every class; or, where there are groups, of every group, and within it of every class as far as
    that comes out. A group of fewer than three examples holds out none. Sequences have no class, and count as one.

    Args:
      y: labels int[n], or int[n, T].
      groups: int[n], or None.
    """
    rng = np.random.Generator(np.random.PCG64(_SPLIT_SEED))
    labels = y if y.ndim == 1 else np.zeros(len(y), np.int32)
    out = np.zeros(len(y), bool)
    for members in _pieces(np.arange(len(y)), groups):
        # Cutting the order by class at equal distances gives every class its share and the total exactly.
        order = np.concatenate([rng.permutation(piece) for piece in _pieces(members, labels)])
        count = round(_TEST_SHARE * len(members))
        out[order[(np.arange(count) * len(members)) // max(count, 1)]] = True
    return out


def standardized(x: np.ndarray, training: np.ndarray) -> np.ndarray:
    """x [n, d] as float32 with zero mean and unit variance by the training rows, all that a federation would know.

    Args:
      x: float64[n, d].
      training: bool[n], the training rows.
    """
    mean, std = x[training].mean(axis=0), x[training].std(axis=0)
    return ((x - mean) / np.where(std > 0, std, 1)).astype(np.float32)


def read_npz(path: str | Path, required: Sequence[str], optional: Sequence[str] = ()) -> dict[str, np.ndarray]:
    """The arrays of a .npz file.

    Raises:
      ValueError: if the file is not there or damaged, holds Python objects, lacks an array or has one of another name.
    """
    if not Path(path).is_file():
        raise ValueError(f"there is no file {path}: check the path")
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {key: stored[key] for key in stored.files}
    except (OSError, ValueError, EOFError, AttributeError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(
            f"{path} cannot be read as a .npz file of plain arrays ({error}): write it with numpy.savez, without "
            "arrays of Python objects"
        ) from error
    for key in arrays:
        pick(f"array in {path}", key, [*required, *optional])
    for key in required:
        if key not in arrays:
            raise ValueError(f"{path} has no array {key!r}, got {sorted(arrays)}: it needs {', '.join(required)}")
    return arrays


def _inputs(values: Any, where: str) -> np.ndarray:
    x = np.asarray(values)
    if x.ndim >= 1 and np.issubdtype(x.dtype, np.floating):
        with np.errstate(over="ignore"):  # what is too large becomes infinite, which is told with its place
            return x.astype(np.float32, copy=False)
    if x.dtype == np.uint8 and x.ndim in (3, 4):
        return x if x.ndim == 4 else x[..., None]
    if x.ndim == 2 and np.issubdtype(x.dtype, np.integer):
        return x.astype(np.int32, copy=False)
    raise ValueError(
        f"{where} is {x.dtype}{list(x.shape)}: give floats [n, ...], images uint8[n, H, W, C], or tokens int[n, T]"
    )


def _targets(values: Any, where: str) -> np.ndarray:
    y = np.asarray(values)
    if y.ndim not in (1, 2) or not np.issubdtype(y.dtype, np.integer):
        raise ValueError(
            f"{where} is {y.dtype}{list(y.shape)}: give integer labels [n], or [n, T] for sequences; numbers that are "
            "classes can be converted with astype('int32')"
        )
    if y.size and not -(2**31) <= int(y.min()) <= int(y.max()) < 2**31:
        raise ValueError(f"{where} holds {int(y.max())}, which is no class: number the classes from 0")
    return y.astype(np.int32, copy=False)


def _numbered(groups: Any, test_groups: Any, name: str) -> tuple[np.ndarray | None, np.ndarray | None, tuple[str, ...]]:
    """Groups of both parts as int32, numbered in sorted order, and their names."""
    if groups is None:
        if test_groups is not None:
            raise ValueError(f"{name} has test_groups but no groups: give both or neither")
        return None, None, ()
    values = [np.asarray(part) for part in (groups, test_groups) if part is not None]
    for i, part in enumerate(values):
        if part.dtype == object and all(isinstance(value, str) for value in part.reshape(-1)):
            values[i] = part = part.astype(np.str_)
        if part.ndim != 1 or not (np.issubdtype(part.dtype, np.integer) or part.dtype.kind == "U"):
            raise ValueError(
                f"the groups of {name} are {part.dtype}{list(part.shape)}: give one whole number or name per example"
            )
    if len({part.dtype.kind == "U" for part in values}) > 1:
        raise ValueError(f"groups of {name} are {values[0].dtype} and test_groups {values[1].dtype}: name both alike")
    known, ids = np.unique(np.concatenate(values), return_inverse=True)
    ids = ids.astype(np.int32)
    names = tuple(map(str, known.tolist()))
    return ids[: len(values[0])], ids[len(values[0]) :] if test_groups is not None else None, names


def _column(values: Any, name: str) -> np.ndarray:
    """A column of a table as numbers or as text."""
    column = np.asarray(values)
    bad: Any = []
    if column.dtype == object:
        bad = [i for i, value in enumerate(column.tolist()) if not isinstance(value, str)]
        column = column if bad else column.astype(np.str_)
    elif np.issubdtype(column.dtype, np.floating):
        bad = np.flatnonzero(~np.isfinite(column))
    if len(bad):
        raise ValueError(
            f"column {name!r} holds {column[bad[0]]!r} at row {bad[0]}: fill in or drop what is missing, and make a "
            "column all numbers or all text"
        )
    if column.dtype.kind not in "biufU":
        raise ValueError(f"column {name!r} is {column.dtype}: make it numbers or text, or leave it out")
    return column.astype(np.int32) if column.dtype == bool else column


def _encoded(column: np.ndarray, training: np.ndarray) -> np.ndarray:
    """A column as inputs float32[n, d]: standardized numbers, or one input per category."""
    if column.dtype.kind != "U":
        return standardized(column.astype(np.float64)[:, None], training)
    categories, category = np.unique(column, return_inverse=True)
    return (category[:, None] == np.arange(len(categories))).astype(np.float32)


def _pieces(members: np.ndarray, keys: np.ndarray | None) -> list[np.ndarray]:
    """`members` apart by their key, in the order of the keys; with the same key they keep their order."""
    if keys is None or not len(members):
        return [members]
    ordered = members[np.argsort(keys[members], kind="stable")]
    return np.split(ordered, np.flatnonzero(np.diff(keys[ordered])) + 1)


def _parts(dataset: Dataset) -> tuple[tuple[str, dict[str, np.ndarray]], ...]:
    return ("train", dataset.train), ("test", dataset.test)


def _reshaped(images: np.ndarray, shape: tuple[int, ...], name: str) -> np.ndarray:
    """Images uint8[n, h, w, c] as uint8[n, H, W, C]."""
    height, width, channels = shape
    if images.shape[-1] not in (1, channels):
        raise ValueError(
            f"images of {name} have {images.shape[-1]} channels and others {channels}: only gray ones can be repeated"
        )
    if images.shape[1:3] != (height, width):
        resized = np.empty((len(images), height, width, images.shape[-1]), np.uint8)
        for i, c in np.ndindex(len(images), images.shape[-1]):
            plane = Image.fromarray(np.ascontiguousarray(images[i, :, :, c]))
            resized[i, :, :, c] = np.asarray(plane.resize((width, height), Image.Resampling.BILINEAR))
        images = resized
    return np.broadcast_to(images, (*images.shape[:-1], channels))
