"""Data sets from what is in memory or in one file: arrays, a data frame, Hugging Face `datasets`, a .npz file, several
data sets as domains.

Everything here ends in `pipelines.data.dataset.check`. Where there is no test part a fixed fifth is held out, the same
on every machine.
"""

import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fedjax_core.types import ArrayLike
from pipelines.common.names import pick
from pipelines.data import text
from pipelines.data.dataset import Dataset, check, fits_single, normalization
from pipelines.data.text import PAD_LABEL, SEQUENCE_LENGTH

_PARTS = ("x", "y", "test_x", "test_y", "groups", "test_groups")
_OTHER_NAMES = {"x_train": "x", "y_train": "y", "x_test": "test_x", "y_test": "test_y"}
_LABELS = ("label", "labels", "target", "class", "y")
_SPLIT_SEED = 20_240
_TEST_SHARE = 0.2


def from_arrays(
    x: Any,
    y: Any,
    *,
    test: tuple[Any, Any] | None = None,
    groups: ArrayLike | None = None,
    test_groups: ArrayLike | None = None,
    num_classes: int | None = None,
    name: str = "arrays",
) -> Dataset:
    """A data set of arrays, checked.

    What the inputs are is told by their type and shape: integers [n, H, W, C] (or [n, H, W]) from 0 to 255, of whatever
    width, are images: they become uint8 and get their statistics as `normalization`. Integers [n, T] are tokens. Floats
    of any shape become float32 and reach a model as they are, images of floats too.

    Args:
      x: inputs [n, ...]. In tokens to be classified -1 marks padding, at the end of a row; it becomes a token of its
        own, `pad_token`.
      y: labels int[n]; or int[n, T] for sequences of tokens, where -1 marks padding.
      test: (x, y) of the test part, or None to hold a fifth out: of every class, or of every group if there are any.
      groups: natural client of each example, numbers or names [n]; sorted, they become 0, 1, ...
      test_groups: likewise for the test part, where that is given.
      num_classes: number of classes, or None for one more than the largest label (or token, for sequences).
      name: of the data set.

    Raises:
      ValueError: if the arrays are of a type or shape that none of this fits, or fail `pipelines.data.dataset.check`.
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
    pad_token = None
    ends = tokens and y.ndim == 1 and min(x.min(initial=0), test_x.min(initial=0)) == -1
    if ends and _padded(x) and _padded(test_x):
        pad_token = int(max(x.max(initial=0), test_x.max(initial=0))) + 1
        x, test_x = (np.where(part == -1, np.int32(pad_token), part) for part in (x, test_x))
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
            pad_token=pad_token,
        )
    )


def from_any(
    made: Any, *, name: str = "data", sequence_length: int = SEQUENCE_LENGTH, vocabulary: str = "characters"
) -> Dataset:
    """A data set of whatever kind of thing a user's function returns.

    Args:
      made: a `Dataset`; arrays as (x, y), as ((x, y), (test_x, test_y)) or by name, with the names of `from_npz`; an
        object of Hugging Face `datasets` (`from_huggingface`); or a data frame whose classes are in a column called
        label, labels, target, class or y (`from_frame`).
      name: of the data set.
      sequence_length: of texts.
      vocabulary: of texts.

    Raises:
      ValueError: if it is none of them, or as those do.
    """
    if isinstance(made, Dataset):
        return check(made)
    if _is_huggingface(made):
        return from_huggingface(made, name=name, sequence_length=sequence_length, vocabulary=vocabulary)
    if isinstance(made, Mapping):
        return _from_named(made, name, name)
    if hasattr(made, "collect_schema") and not hasattr(made, "height"):
        raise ValueError(f"{name} is a lazy frame, which holds no data yet: return frame.collect()")
    if hasattr(made, "columns") and hasattr(made, "__getitem__"):
        columns = [str(column) for column in made.columns]
        label = [column for column in columns if column.lower() in _LABELS]
        if len(label) != 1:
            raise ValueError(
                f"{name} is a data frame with the columns {', '.join(columns)}: return "
                "sources.from_frame(frame, label=COLUMN) to say which holds the classes"
            )
        return from_frame(made, label=label[0], name=name)
    if isinstance(made, tuple | list) and len(made) == 2:
        first, second = made
        if all(isinstance(part, tuple | list) and len(part) == 2 for part in made):
            return from_arrays(*first, test=tuple(second), name=name)
        return from_arrays(first, second, name=name)
    if isinstance(made, tuple) and len(made) == 4:
        raise ValueError(f"{name} is a tuple of four: return ((x, y), (test_x, test_y))")
    raise ValueError(
        f"{name} is {type(made).__name__}: return a pipelines.data.datasets.Dataset, arrays as (x, y) or "
        "{'x': ..., 'y': ..., 'x_test': ..., 'y_test': ...}, a data frame, or a Dataset or DatasetDict of Hugging Face"
    )


def from_texts(
    texts: Sequence[str],
    test_texts: Sequence[str],
    *,
    labels: tuple[Any, Any] | None = None,
    num_classes: int | None = None,
    sequence_length: int = SEQUENCE_LENGTH,
    vocabulary: str = "characters",
    name: str = "texts",
) -> Dataset:
    """A data set of texts: rows of tokens with a class each, or windows whose next tokens are to be predicted.

    Rows are cut after `sequence_length` tokens, or filled up at the end with a token that is kept for this,
    `pad_token`, the last of the vocabulary.

    Args:
      texts: n texts to train on.
      test_texts: m texts.
      labels: int[n] and int[m], the classes; None for windows.
      num_classes: number of classes, or None for one more than the largest label.
      sequence_length: positions of a row or window.
      vocabulary: "characters" (those of the training texts and one for all others), "words" (those that are there
        twice, likewise), "bytes", or the path of a vocabulary file of the package tokenizers.
      name: of the data set.

    Raises:
      ValueError: if there is no text, the vocabulary cannot be had, or as `pipelines.data.dataset.check`.
    """
    spoken = text.vocabulary(vocabulary, (" " if vocabulary == "words" else "").join(texts))
    if labels is None:
        train, test = (text.all_windows(part, spoken.encode, sequence_length)[0] for part in (texts, test_texts))
        return check(Dataset(name, train, test, spoken.size, pad_id=PAD_LABEL, vocabulary_size=spoken.size))
    y, test_y = (_targets(part, f"the labels of {name}") for part in labels)
    classes = int(max(y.max(initial=0), test_y.max(initial=0))) + 1 if num_classes is None else num_classes
    train, test = (
        {"x": text.padded([spoken.encode(each) for each in part], sequence_length, pad=spoken.size), "y": target}
        for part, target in ((texts, y), (test_texts, test_y))
    )
    return check(Dataset(name, train, test, classes, vocabulary_size=spoken.size + 1, pad_token=spoken.size))


def from_huggingface(
    data: Any,
    *,
    input: str | None = None,
    label: str | None = None,
    group: str | None = None,
    sequence_length: int = SEQUENCE_LENGTH,
    vocabulary: str = "characters",
    name: str = "huggingface",
) -> Dataset:
    """A data set of a `Dataset` or `DatasetDict` of the package datasets, whatever features it has.

    Images (all of one size) stay uint8; other arrays and lists of numbers of one length are inputs as they are, and
    lists of whole numbers are tokens, cut or filled up to `sequence_length`; text becomes tokens as in `from_texts`;
    and if there is nothing but single numbers, all of them together are the input, brought to zero mean and unit
    variance.

    The parts are the splits train and test. Where test is missing or has no labels (all -1) it is validation, and where
    that is missing too a fifth is held out.

    Args:
      data: the data; one that is streamed has to be taken into memory first.
      input: feature to learn from; needed where the features leave a choice.
      label: feature to predict, likewise; text without one gives windows for next-token prediction.
      group: feature that says whose each example is, for natural clients; or None.
      sequence_length: positions of a row or window of text.
      vocabulary: of text; see `from_texts`.
      name: of the data set.

    Raises:
      ValueError: if the features leave a choice or do not fit, a split is missing, images are of several sizes, or as
        `from_arrays`.
    """
    train, test = _huggingface_splits(data, name)
    kinds = {key: _feature_kind(feature) for key, feature in train.features.items()}
    for key in (input, label, group):
        if key is not None:
            pick(f"feature of {name}", key, kinds)
    inputs, label = _huggingface_choice(kinds, input, label, group, name)
    kind = kinds[inputs[0]]
    if test is not None and label is not None and np.all(np.asarray(test[:1][label]) == -1):
        test = _huggingface_splits(data, name, unlabeled="test")[1]
    classes = None if label is None else getattr(train.features[label], "num_classes", None)
    read = [key for key in (*inputs, label, group) if key is not None]
    columns = [{key: _feature_values(part, key) for key in read} for part in (train, test) if part is not None]
    if label is not None:
        numbered = _classes([part[label] for part in columns], label, name, classes)
        columns = [{**part, label: list(y)} for part, y in zip(columns, numbered, strict=True)]
    if len(columns) == 1:
        y = np.zeros(len(train), np.int32) if label is None else np.asarray(columns[0][label])
        out = held_out(y, None if group is None else _numbered(columns[0][group], None, name)[0])
        columns = [{k: [c[i] for i in np.flatnonzero(of)] for k, c in columns[0].items()} for of in (~out, out)]
    first, second = columns
    ys = None if label is None else (np.asarray(first[label], np.int32), np.asarray(second[label], np.int32))
    groups, test_groups = (None, None) if group is None else (first[group], second[group])
    if kind == "text":
        if group is not None and label is None:
            raise ValueError(f"{name} is text without a label, whose windows have no group: leave out group={group!r}")
        dataset = from_texts(
            first[inputs[0]],
            second[inputs[0]],
            labels=ys,
            num_classes=classes,
            sequence_length=sequence_length,
            vocabulary=vocabulary,
            name=name,
        )
        ids, test_ids, names = _numbered(groups, test_groups, name)
        return check(dataset._replace(groups=ids, test_groups=test_ids, group_names=names))
    if ys is None:
        raise ValueError(f"{name} has the features {_listing(kinds)} and no class: say which to predict with label=")
    if kind == "number":
        xs = [np.stack([np.asarray(part[key], np.float64) for key in inputs], axis=1) for part in columns]
        both = standardized(np.concatenate(xs), np.arange(sum(map(len, xs))) < len(xs[0]))
        xs = [both[: len(xs[0])], both[len(xs[0]) :]]
    else:
        xs = [_stacked(part[inputs[0]], inputs[0], name, sequence_length) for part in columns]
    return from_arrays(
        xs[0],
        ys[0],
        test=(xs[1], ys[1]),
        groups=groups,
        test_groups=test_groups,
        num_classes=classes,
        name=name,
    )


def from_npz(path: str | Path) -> Dataset:
    """A data set of a .npz file with the arrays x and y, and optionally test_x, test_y, groups and test_groups.

    They mean what the arguments of `from_arrays` mean; x_train, y_train, x_test and y_test are understood too. The data
    set is called after the file.

    Raises:
      ValueError: if the file is not there or damaged, lacks an array or has one of another name, or fails
        `from_arrays`.
    """
    arrays = read_npz(path, (), (*_PARTS, *_OTHER_NAMES))
    return _from_named(arrays, Path(path).stem, str(path))


def from_frame(frame: Any, *, label: str, group: str | None = None, name: str = "frame") -> Dataset:
    """A data set of a table: a pandas or polars data frame, or anything else with `columns` and `frame[column]`.

    A fifth is held out, of every class or of every group. Columns of numbers are brought to zero mean and unit variance
    by the statistics of the training part; a column of text becomes one input per category that it has, in sorted
    order, 0 or 1. A single column of lists or arrays of one length is taken as in `from_arrays`.

    Args:
      frame: the table.
      label: column of the classes, whole numbers or text; sorted, they become 0, 1, ...
      group: column of the natural clients, likewise; or None.
      name: of the data set.

    Raises:
      ValueError: if a column is not there, twice there, or neither all numbers nor all text; or there are none left.
    """
    if hasattr(frame, "collect_schema") and not hasattr(frame, "height"):
        raise ValueError(f"{name} is a lazy frame, which holds no data yet: give frame.collect()")
    columns = [str(column) for column in frame.columns]
    twice = sorted({column for column in columns if columns.count(column) > 1})
    if twice:
        raise ValueError(f"{name} has several columns called {twice[0]!r}: give each a name of its own")
    pick(f"column of {name}", label, columns)
    if group is not None:
        pick(f"column of {name}", group, columns)
    values = {column: _column(frame[original], column) for column, original in zip(columns, frame.columns, strict=True)}
    if np.issubdtype(values[label].dtype, np.floating) or values[label].ndim > 1:
        raise ValueError(
            f"label column {label!r} holds {values[label].dtype} numbers: classes are whole numbers or text"
        )
    y = np.unique(values[label], return_inverse=True)[1].astype(np.int32)
    ids, _, names = _numbered(None if group is None else values[group], None, name)
    inputs = [column for name, column in values.items() if name not in (label, group)]
    if not inputs:
        raise ValueError(f"{name} has no column left to learn from besides {label!r}: give at least one input column")
    out = held_out(y, ids)
    if len(inputs) == 1 and inputs[0].ndim > 1:
        x = inputs[0]
    elif all(column.ndim == 1 for column in inputs):
        x = np.concatenate([_encoded(column, ~out) for column in inputs], axis=1)
    else:
        raise ValueError(f"{name} has a column of lists beside others: take one column of lists, or columns of numbers")
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
    """Which examples to hold out for testing where the source does not say so: bool[n].

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
    largest = np.abs(x[training]).max(axis=0, initial=0)
    # Squares of such numbers overflow or vanish, and with them the deviation.
    far = (largest > 1e100) | ((largest > 0) & (largest < 1e-100))
    x = x / np.where(far, largest, 1)
    mean, std = x[training].mean(axis=0), x[training].std(axis=0)
    scaled = (x - mean) / np.where(std > 0, std, 1)
    fits_single(scaled, "what is standardized")
    return scaled.astype(np.float32)


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


def _from_named(arrays: Mapping[Any, Any], name: str, where: str) -> Dataset:
    """A data set of arrays by name; `where` they are from is for messages."""
    for key in arrays:
        pick(f"array in {where}", key, [*_PARTS, *_OTHER_NAMES])
    named = {_OTHER_NAMES.get(key, key): value for key, value in arrays.items()}
    if len(named) < len(arrays):
        raise ValueError(f"{where} has an array under two names, got {sorted(arrays)}: give each once")
    for key in ("x", "y"):
        if key not in named:
            raise ValueError(f"{where} has no array {key!r}, got {sorted(arrays)}: it needs x, y")
    if ("test_x" in named) != ("test_y" in named):
        raise ValueError(f"{where} has only one of test_x and test_y: give both, or neither to have a fifth held out")
    return from_arrays(
        named["x"],
        named["y"],
        test=(named["test_x"], named["test_y"]) if "test_x" in named else None,
        groups=named.get("groups"),
        test_groups=named.get("test_groups"),
        name=name,
    )


def _is_huggingface(made: Any) -> bool:
    """Whether it is a `Dataset` or `DatasetDict` of the package datasets, which need not be there."""
    if isinstance(made, Mapping):
        return bool(made) and all(_is_huggingface(split) for split in made.values())
    return hasattr(made, "features") and hasattr(made, "column_names")


def _huggingface_splits(data: Any, name: str, unlabeled: str = "") -> tuple[Any, Any]:
    """(what to train on, what to test on or None); the split `unlabeled` does not count."""
    splits = dict(data) if isinstance(data, Mapping) else {"train": data}
    if len(splits) == 1:
        splits = {"train": next(iter(splits.values()))}
    if "train" not in splits:
        raise ValueError(f"{name} has the splits {', '.join(splits)}: one called train is needed")
    for split in splits.values():
        if not hasattr(split, "__len__"):
            raise ValueError(f"{name} is streamed: take it into memory first, with load_dataset(streaming=False)")
    if not len(splits["train"]):
        raise ValueError(f"{name} has no examples to train on: give at least one")
    tests = [splits[s] for s in ("test", "validation") if s in splits and s != unlabeled and len(splits[s])]
    return splits["train"], tests[0] if tests else None


def _huggingface_choice(
    kinds: Mapping[str, str], input: str | None, label: str | None, group: str | None, name: str
) -> tuple[list[str], str | None]:
    """Which features to learn from, and which to predict if any: those asked for, else what the types leave."""
    if label is None:
        labels = [key for key, kind in kinds.items() if kind == "class" and key not in (input, group)]
        labels = labels or [key for key in kinds if key.lower() in _LABELS and key not in (input, group)]
        if len(labels) > 1:
            raise ValueError(f"{name} has the features {_listing(kinds)}: say which to predict with label=")
        label = labels[0] if labels else None
    if input is not None:
        return [input], label
    rest = [key for key in kinds if key not in (label, group)]
    for kind in ("image", "text", "array", "number"):
        found = [key for key in rest if kinds[key] == kind]
        if len(found) == 1 or (found and kind == "number"):
            return found, label
        if found:
            break
    raise ValueError(f"{name} has the features {_listing(kinds)}: say which to learn from with input=")


def _listing(kinds: Mapping[str, str]) -> str:
    return ", ".join(f"{key} ({kind})" for key, kind in kinds.items())


def _feature_kind(feature: Any) -> str:
    """What a feature of Hugging Face holds: class, image, text, number, array, or its type where that is none."""
    called = type(feature).__name__
    if called in ("ClassLabel", "Image"):
        return {"ClassLabel": "class", "Image": "image"}[called]
    if called in ("Sequence", "List", "LargeList") or isinstance(feature, list):
        inner = feature[0] if isinstance(feature, list) else feature.feature
        return "array" if _feature_kind(inner) in ("number", "array", "class") else f"list of {_feature_kind(inner)}"
    if called.startswith("Array") and called.endswith("D"):
        return "array"
    dtype = str(getattr(feature, "dtype", called))
    if dtype in ("string", "large_string"):
        return "text"
    return "number" if dtype.startswith(("int", "uint", "float", "bool")) else dtype


def _feature_values(split: Any, key: str) -> list[Any]:
    """All values of a feature, images as arrays, block by block so that few are decoded twice over."""
    values: list[Any] = []
    for start in range(0, len(split), 1000):
        for value in split[start : start + 1000][key]:
            if value is None:
                raise ValueError(f"feature {key!r} has nothing at row {len(values)}: fill in or drop what is missing")
            values.append(np.asarray(value) if isinstance(value, Image.Image) else value)
    return values


def _classes(columns: list[list[Any]], key: str, name: str, num_classes: int | None) -> list[np.ndarray]:
    """The labels of each part: as they are where their number is known, else numbered in sorted order."""
    parts = [_column(np.asarray(column), key) for column in columns]
    if any(part.ndim != 1 or np.issubdtype(part.dtype, np.floating) for part in parts):
        raise ValueError(f"feature {key!r} of {name} is no class of each example: say which is with label=")
    if num_classes is not None:
        return [part.astype(np.int32) for part in parts]
    numbered = np.unique(np.concatenate(parts), return_inverse=True)[1].astype(np.int32)
    return np.split(numbered, np.cumsum([len(part) for part in parts])[:-1])


def _stacked(values: list[Any], key: str, name: str, length: int) -> np.ndarray:
    """Arrays or lists of numbers as one array; rows of tokens are cut or filled up with -1 to `length`."""
    arrays = [np.asarray(value) for value in values]
    if all(array.ndim == 1 and np.issubdtype(array.dtype, np.integer) for array in arrays):
        longest = max((len(array) for array in arrays), default=0)
        return text.padded(arrays, min(length, max(longest, 1)), pad=-1)
    shapes = sorted({array.shape for array in arrays})
    if len(shapes) > 1:
        raise ValueError(
            f"feature {key!r} of {name} has examples of shapes {list(shapes[0])} and {list(shapes[-1])}: bring all to "
            "one, images for instance with data.map and PIL.Image.resize"
        )
    return np.stack(arrays)


def _inputs(values: Any, where: str) -> np.ndarray:
    x = np.asarray(values)
    if x.ndim in (3, 4) and np.issubdtype(x.dtype, np.integer) and x.dtype != np.uint8:
        if x.min(initial=0) < 0 or x.max(initial=0) > 255:
            raise ValueError(
                f"{where} is {x.dtype}{list(x.shape)} with values from {x.min()} to {x.max()}: whole numbers of that "
                "shape are images, from 0 to 255; scale others to floats, for example to [0, 1]"
            )
        x = x.astype(np.uint8)
    if x.ndim >= 1 and np.issubdtype(x.dtype, np.floating):
        fits_single(x, where)
        return x.astype(np.float32, copy=False)
    if x.dtype == np.uint8 and x.ndim in (3, 4):
        return x if x.ndim == 4 else x[..., None]
    if x.ndim == 2 and np.issubdtype(x.dtype, np.integer):
        if x.size and not -(2**31) <= int(x.min()) <= int(x.max()) < 2**31:
            raise ValueError(
                f"{where} is {x.dtype}{list(x.shape)} and holds {int(x.max()) if x.max() >= 2**31 else int(x.min())}: "
                "whole numbers of that shape are tokens, numbered from 0; scale measurements to floats"
            )
        return x.astype(np.int32, copy=False)
    raise ValueError(
        f"{where} is {x.dtype}{list(x.shape)}: give floats [n, ...], images uint8[n, H, W, C], or tokens int[n, T]"
    )


def _padded(tokens: np.ndarray) -> bool:
    """Whether -1 stands at the ends of rows only."""
    real = tokens != -1
    return bool((real[:, :-1] >= real[:, 1:]).all())


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


def _numbered(
    groups: ArrayLike | None, test_groups: ArrayLike | None, name: str
) -> tuple[np.ndarray | None, np.ndarray | None, tuple[str, ...]]:
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
    if column.dtype == object and all(isinstance(value, list | np.ndarray) for value in column.tolist()):
        rows = [np.asarray(value) for value in column.tolist()]
        if len({row.shape for row in rows}) > 1:
            raise ValueError(f"column {name!r} holds lists of several lengths: bring them to one")
        column = np.stack(rows)
    if column.dtype == object:
        bad = [i for i, value in enumerate(column.tolist()) if not isinstance(value, str)]
        column = column if bad else column.astype(np.str_)
    elif np.issubdtype(column.dtype, np.floating):
        bad = np.flatnonzero(~np.isfinite(column).reshape(len(column), -1).all(axis=1))
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
