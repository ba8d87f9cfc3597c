"""Data sets prepared on disk: those of tensorflow-datasets, read without tensorflow, and three packed ones.

They are looked for in one folder: `data_dir`, or that of the environment variable FEDJAX_CORE_DATA, or where
tensorflow-datasets prepares (TFDS_DATA_DIR, ~/tensorflow_datasets). It is a data_dir of tensorflow-datasets, or holds
one as `tfds/` beside `shakespeare/`, `har/` and `usps/`. Nothing is downloaded. What has been read is kept by
`pipelines.data.cache`, and the next time only mapped into memory.

A set read from disk takes, besides its own options, `data_dir`, `cache_dir` and `verify`
(`pipelines.data.cache.fetch`).
"""

import contextlib
import gzip
import hashlib
import io
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike
from PIL import Image

from fedjax_core import checks
from pipelines.common.names import pick
from pipelines.data import cache, text
from pipelines.data.dataset import Dataset, Normalization, check, normalization
from pipelines.data.sources import from_texts, held_out, read_npz

VARIABLE = "FEDJAX_CORE_DATA"
TEXT_OPTIONS = frozenset({"sequence_length", "vocabulary"})

_BLOCK = 1000  # records read at once; one at a time takes ten times as long
_HAR_TEST_SUBJECTS = (2, 4, 9, 10, 12, 13, 18, 20, 24)  # as UCI numbers them, from 1
_HAR_WINDOW = 128
_USPS_WHITE = 2000
_NAME = re.compile(r"[A-Za-z]\w*(/[\w.-]+)?")


def shakespeare(
    *,
    data_dir: str | Path | None = None,
    cache_dir: str | Path | None = None,
    verify: bool | None = None,
    sequence_length: int = text.SEQUENCE_LENGTH,
    vocabulary: str = "characters",
    min_length: int | None = None,
) -> Dataset:
    """Shakespeare's plays by speaking role: windows of text whose next characters are to be predicted.

    A group is a role of a play, "hamlet/HAMLET". The last tenth of the text of each role with at least two windows is
    its test part; shorter ones only train. Roles of less than one whole window are left out, unless `min_length` says
    otherwise. No window reaches from one part or role into another; the end of the last one is padded.

    Args:
      data_dir: holds `shakespeare/shakespeare_roles.jsonl.gz`: a JSON object a line with "client", the name of the
        role, and "speeches", a list of texts.
      cache_dir: see `pipelines.data.cache`.
      verify: likewise.
      sequence_length: positions of a window.
      vocabulary: "characters" (those of the training text and one for all others), "bytes", or the path of a vocabulary
        file of the package tokenizers.
      min_length: fewest characters of a role, or None for sequence_length + 1.
    """
    checks.positive_int("sequence_length", sequence_length, "a window has at least one position")
    shortest = sequence_length + 1 if min_length is None else min_length
    checks.positive_int("min_length", shortest, "a role needs two characters for one prediction")
    file = _file("shakespeare", data_dir, "shakespeare_roles.jsonl.gz")

    def read() -> Dataset:
        roles = {name: spoken for name, spoken in _speeches(file).items() if len(spoken) >= max(shortest, 2)}
        if not roles:
            raise ValueError(f"no role of {file} has {max(shortest, 2)} characters: lower min_length")
        tails = [len(spoken) // 10 if len(spoken) > sequence_length + 1 else 0 for spoken in roles.values()]
        train_texts = [spoken[: len(spoken) - tail] for spoken, tail in zip(roles.values(), tails, strict=True)]
        test_texts = [spoken[len(spoken) - tail :] for spoken, tail in zip(roles.values(), tails, strict=True)]
        words = text.vocabulary(vocabulary, "".join(train_texts))
        train, groups = text.all_windows(train_texts, words.encode, sequence_length)
        test, test_groups = text.all_windows(test_texts, words.encode, sequence_length)
        return Dataset(
            "shakespeare",
            train,
            test,
            words.size,
            groups=groups,
            test_groups=test_groups,
            group_names=tuple(roles),
            pad_id=text.PAD_LABEL,
            vocabulary_size=words.size,
        )

    options = {"sequence_length": sequence_length, "vocabulary": text.identity(vocabulary), "min_length": shortest}
    return _packed("shakespeare", file, options, read, cache_dir, verify)


def har(
    *,
    data_dir: str | Path | None = None,
    cache_dir: str | Path | None = None,
    verify: bool | None = None,
) -> Dataset:
    """Human activity from a phone's sensors, by subject: windows of 128 steps x 6 channels, 6 classes.

    Channels are acceleration x, y, z in g and angular velocity x, y, z in rad/s, at 50 Hz; classes are walking,
    upstairs, downstairs, sitting, standing, laying. A group is one of the 30 subjects. The test part is the published
    one, all 2,947 windows of nine subjects, of whom the 7,352 training windows hold none. Neighboring windows of a
    subject overlap by half: to split a subject's windows, cut them by position and leave one out in between; at random,
    the test would be half seen in training.

    Args:
      data_dir: holds `har/har.npz` with signal int16[6, steps] in thousandths, start int32[n] of each window, label and
        subject uint8[n], both from 0.
      cache_dir: see `pipelines.data.cache`.
      verify: likewise.
    """
    file = _file("har", data_dir, "har.npz")

    def read() -> Dataset:
        stored = read_npz(file, ("signal", "start", "label", "subject"))
        steps = stored["start"][:, None] + np.arange(_HAR_WINDOW)
        x = (stored["signal"].T[steps] * 0.001).astype(np.float32)
        y, subject = stored["label"].astype(np.int32), stored["subject"].astype(np.int32)
        out = np.isin(subject + 1, _HAR_TEST_SUBJECTS)
        return Dataset(
            "har",
            {"x": x[~out], "y": y[~out]},
            {"x": x[out], "y": y[out]},
            6,
            groups=subject[~out],
            test_groups=subject[out],
            group_names=tuple(f"subject {number}" for number in range(1, 31)),
        )

    return _packed("har", file, {}, read, cache_dir, verify)


def usps(
    *,
    data_dir: str | Path | None = None,
    cache_dir: str | Path | None = None,
    verify: bool | None = None,
) -> Dataset:
    """Digits from envelopes: 16x16 gray pixels, 10 classes; 7,291 images to train on and 2,007 to test on.

    The other domain of `mnist+usps`. The 2,001 levels of gray of the file are rounded to 256.

    Args:
      data_dir: holds `usps/usps.npz` with train_images uint16[7291, 16, 16] of 0 to 2000, train_labels, test_images and
        test_labels.
      cache_dir: see `pipelines.data.cache`.
      verify: likewise.
    """
    file = _file("usps", data_dir, "usps.npz")

    def read() -> Dataset:
        stored = read_npz(file, ("train_images", "train_labels", "test_images", "test_labels"))

        def part(which: str) -> dict[str, np.ndarray]:
            gray = np.rint(stored[f"{which}_images"] * (255 / _USPS_WHITE)).astype(np.uint8)
            return {"x": gray[..., None], "y": stored[f"{which}_labels"].astype(np.int32)}

        return Dataset("usps", part("train"), part("test"), 10)

    return _packed("usps", file, {}, read, cache_dir, verify)


def tfds(
    name: str,
    *,
    data_dir: str | Path | None = None,
    cache_dir: str | Path | None = None,
    verify: bool | None = None,
    input_key: str | None = None,
    label_key: str | None = None,
    sequence_length: int | None = None,
    vocabulary: str | None = None,
) -> Dataset:
    """A data set of tensorflow-datasets, prepared as array_record: `fashion_mnist`, `glue/sst2`, `tiny_shakespeare`.

    What it is for is told by its features: an image or numbers with a class label are classified; so are rows of
    tokens, for a text with a class label; and a text alone gives windows for next-token prediction. Images stay uint8.

    The parts are the splits train and test. Where test is missing or has no labels (all -1, as in glue/sst2) it is
    validation, and where that is missing too a fifth of train is held out.

    Texts to classify are cut after `sequence_length` tokens, or filled up at the end with a token that is kept for
    this: the last one, vocabulary_size - 1.

    Args:
      name: as tensorflow-datasets has it, "name" or "name/config".
      data_dir: holds `<name>/<version>`; of several versions the highest is read.
      cache_dir: see `pipelines.data.cache`.
      verify: likewise.
      input_key: feature to learn from; needed where the features leave a choice.
      label_key: feature to predict, likewise.
      sequence_length: for text: positions of a window or row, 80 unless given.
      vocabulary: for text: as for `shakespeare`, or "words", those of the training text that it has twice.

    Raises:
      ValueError: if the set is not there, with what to put where; or if its features do not fit.
    """
    folder = _prepared_folder(name, data_dir)
    kinds, inputs, label = _features(name, folder, input_key, label_key)
    options: dict[str, Any] = {"input_key": inputs, "label_key": label}
    length = text.SEQUENCE_LENGTH if sequence_length is None else sequence_length
    words = vocabulary or "characters"
    if kinds[inputs] == "Text":
        options |= {"sequence_length": length, "vocabulary": text.identity(words)}
        if label is not None:
            options["pad_token"] = "last"
    elif sequence_length is not None or vocabulary is not None:
        raise ValueError(f"{name} is no text: leave out sequence_length and vocabulary, which are for text")
    elif label is None:
        raise ValueError(f"{name} has no class label to predict from {inputs!r}: {_choice(kinds)}")

    def fill(new: cache.Allocate) -> dict[str, Any]:
        import tensorflow_datasets  # slow to import, and not needed for what is kept already

        builder = tensorflow_datasets.builder_from_directory(str(folder))
        images = [key for key, kind in kinds.items() if kind == "Image"]
        if kinds[inputs] == "Text":
            return _store(new, _read_text(name, builder, inputs, label, images, length, words))
        return _read_numbers(name, builder, inputs, label, images, new)

    return _cached(name, folder.name, options, _fingerprint(folder), fill, cache_dir, verify)


def described(name: str, data_dir: str | Path | None = None) -> str:
    """What a prepared set of tensorflow-datasets says of itself: a paragraph, its features and its splits.

    Raises:
      ValueError: if it is not there, with what to put where.
    """
    folder = _prepared_folder(name, data_dir)
    try:
        about = json.loads((folder / "dataset_info.json").read_text())
        features = json.loads((folder / "features.json").read_text())["featuresDict"]["features"]
        splits = [(str(each["name"]), sum(map(int, each["shardLengths"]))) for each in about["splits"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"what describes {folder} cannot be read ({error}): copy or prepare it again") from error
    kinds = [f"{key} ({features[key]['pythonClassName'].split('.')[-1]})" for key in sorted(features)]
    said = " ".join(str(about.get("description", "")).split()) or "A data set of tensorflow-datasets."
    return (
        f"{said}\n\nFeatures: {', '.join(kinds)}.\n"
        f"Splits: {', '.join(f'{split} ({count:,} examples)' for split, count in splits)}.\nPrepared in {folder}."
    )


def is_text(name: str, data_dir: str | Path | None = None) -> bool:
    """Whether a prepared set of tensorflow-datasets is text, if no other input is chosen."""
    kinds, inputs, _ = _features(name, _prepared_folder(name, data_dir), None, None)
    return kinds[inputs] == "Text"


def available(data_dir: str | Path | None = None) -> list[str]:
    """Names of the sets of tensorflow-datasets that are prepared in the folder."""
    folder = tfds_folder(data_dir)
    found = [*folder.glob("*/*/dataset_info.json"), *folder.glob("*/*/*/dataset_info.json")]
    return sorted({path.parent.parent.relative_to(folder).as_posix() for path in found})


def _root(data_dir: str | Path | None) -> Path:
    chosen = data_dir or os.environ.get(VARIABLE)
    if chosen is None:
        # os.path leaves "~" as it is where there is no home directory.
        return Path(os.path.expanduser(os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets"))).absolute()
    root = Path(os.path.expanduser(chosen)).absolute()
    if not os.path.isdir(root):  # a name that is too long is no folder
        said = f"data_dir={str(data_dir)!r}" if data_dir else f"environment variable {VARIABLE}={chosen!r}"
        raise ValueError(f"{said} is not a folder: name the one that holds the prepared data")
    return root


def tfds_folder(data_dir: str | Path | None = None) -> Path:
    """Where sets of tensorflow-datasets are looked for."""
    root = _root(data_dir)
    return root / "tfds" if (root / "tfds").is_dir() else root


def _elsewhere(root: Path) -> str:
    return (
        f"; if it is in another folder than {root}, name that with data_dir (--data-dir) or the environment variable "
        f"{VARIABLE}"
    )


def _file(name: str, data_dir: str | Path | None, file: str) -> Path:
    root = _root(data_dir)
    path = root / name / file
    if not path.is_file():
        raise ValueError(
            f"{name} is not there and is not downloaded: put {file} at {path} (`fedjax-core list {name}` says what it "
            f"holds){_elsewhere(root)}"
        )
    return path


def _prepared_folder(name: str, data_dir: str | Path | None) -> Path:
    """The folder <name>/<version> of a prepared set."""
    folder = tfds_folder(data_dir)
    place = folder / name
    versions = [path.parent for path in place.glob("*/dataset_info.json")] if _NAME.fullmatch(name) else []
    if versions:
        return max(versions, key=lambda path: [int(part) for part in re.findall(r"\d+", path.name)])
    configs = [known for known in available(data_dir) if known.startswith(f"{name}/")]
    if configs:
        raise ValueError(f"data set {name!r} has several variants: take {' or '.join(configs)}")
    raise ValueError(
        f"data set {name!r} is not prepared in {folder} and is not downloaded: put it at {place}/<version>. On a "
        "machine with network and the packages tensorflow and importlib_resources it is made by"
        ' `python -c "import tensorflow_datasets as tfds; '
        f"tfds.builder('{name}', data_dir='DATA').download_and_prepare(file_format='array_record')\"` as "
        f"DATA/{name}/<version>, to be copied{_elsewhere(folder)}"
    )


def _fingerprint(folder: Path) -> str:
    """Of a prepared folder: what its descriptions say, and the names and sizes of its records."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        if path.suffix in (".json", ".txt"):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _packed(
    name: str,
    file: Path,
    options: dict[str, Any],
    read: Callable[[], Dataset],
    cache_dir: str | Path | None,
    verify: bool | None,
) -> Dataset:
    """A set that is one file, small enough to be made in memory first."""
    source = hashlib.sha256(file.read_bytes()).hexdigest()
    return _cached(name, source[:8], options, source, lambda new: _store(new, read()), cache_dir, verify)


def _cached(
    name: str,
    version: str,
    options: dict[str, Any],
    source: str,
    fill: Callable[[cache.Allocate], dict[str, Any]],
    cache_dir: str | Path | None,
    verify: bool | None,
) -> Dataset:
    """The data set that `fill(allocate) -> info` makes, from the cache if it is there; checked before it gets there."""

    def build(allocate: cache.Allocate) -> dict[str, Any]:
        arrays: dict[str, np.ndarray] = {}

        def new(array: str, shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
            arrays[array] = allocate(array, shape, dtype)
            return arrays[array]

        info = fill(new)
        x = arrays["train_x"]
        if x.dtype == np.uint8 and len(x):
            info["normalization"] = normalization(x)
        check(_assembled(name, arrays, info))
        return info

    kept = cache.fetch(name, version, options, source, build, cache_dir=cache_dir, verify=verify)
    return _assembled(name, kept.arrays, kept.info)


def _store(new: cache.Allocate, dataset: Dataset) -> dict[str, Any]:
    """Copies the arrays of a data set to where they are kept, and returns the rest of it."""
    arrays = {f"{part}_{leaf}": getattr(dataset, part)[leaf] for part in ("train", "test") for leaf in ("x", "y")}
    arrays |= {part: getattr(dataset, part) for part in ("groups", "test_groups")}
    for array, values in arrays.items():
        if values is not None:
            new(array, values.shape, values.dtype)[...] = values
    kept = ("num_classes", "group_names", "pad_id", "vocabulary_size", "pad_token")
    return {key: getattr(dataset, key) for key in kept}


def _assembled(name: str, arrays: dict[str, np.ndarray], info: dict[str, Any]) -> Dataset:
    """The data set of what was kept; JSON has made lists of its tuples."""
    statistics = info.get("normalization")
    return Dataset(
        name,
        {"x": arrays["train_x"], "y": arrays["train_y"]},
        {"x": arrays["test_x"], "y": arrays["test_y"]},
        info["num_classes"],
        groups=arrays.get("groups"),
        test_groups=arrays.get("test_groups"),
        group_names=tuple(info.get("group_names", ())),
        normalization=statistics and Normalization(*map(tuple, statistics)),
        pad_id=info.get("pad_id"),
        vocabulary_size=info.get("vocabulary_size"),
        pad_token=info.get("pad_token"),
    )


def _speeches(file: Path) -> dict[str, str]:
    """Name of each role to all it says."""
    roles: dict[str, str] = {}
    try:
        with gzip.open(file, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                role = json.loads(line)
                name, spoken = role["client"], "\n".join(role["speeches"])
                if name in roles:
                    raise ValueError(f"role {name!r} is there twice, again in line {number}")
                roles[name] = spoken
    except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file} cannot be read ({error}): it must be a gzip file with a JSON object a line, with a name as "
            '"client" and a list of texts as "speeches"'
        ) from error
    return roles


class _Records(NamedTuple):
    """Some records of a split, which `place` names."""

    source: Any
    rows: np.ndarray
    place: str

    def blocks(self, *keys: str) -> Iterator[list[list[Any]]]:
        """The values of each feature, block by block."""
        for start in range(0, len(self.rows), _BLOCK):
            with _damage_told(self.place):
                block = self.source.__getitems__(self.rows[start : start + _BLOCK].tolist())
            columns = [[record[key] for record in block] for key in keys]
            if any(value is None for column in columns for value in column):
                raise ValueError(f"{self.place} has empty records, as a file cut short has: copy or prepare it again")
            yield columns

    def columns(self, *keys: str) -> list[list[Any]]:
        """All values of each feature."""
        blocks = list(self.blocks(*keys))
        return [[value for block in blocks for value in block[i]] for i in range(len(keys))]


def _features(
    name: str, folder: Path, input_key: str | None, label_key: str | None
) -> tuple[dict[str, str], str, str | None]:
    """The types of a set's features, which one to learn from, and which to predict if any.

    These are the ones asked for, else those that the set's author says are for this, else what the types leave.
    """
    try:
        about = [json.loads((folder / file).read_text()) for file in ("features.json", "dataset_info.json")]
    except (OSError, ValueError) as error:
        raise ValueError(f"what describes {folder} cannot be read ({error}): copy or prepare it again") from error
    features = about[0].get("featuresDict", {}).get("features", {})
    kinds = {key: features[key]["pythonClassName"].split(".")[-1] for key in sorted(features)}
    for key in (input_key, label_key):
        if key is not None:
            pick(f"feature of {name}", key, kinds)
    if input_key is None and label_key is None:
        supervised = about[1].get("supervisedKeys", {}).get("tuple", {}).get("items", [])
        declared = [key["featureKey"] for key in supervised if key.get("featureKey") in kinds]
        if len(declared) == len(supervised) == 2:
            input_key, label_key = declared
            if input_key == label_key:  # how a text to be continued is declared
                return kinds, input_key, None
    of_type = {kind: [key for key in kinds if kinds[key] == kind] for kind in ("Image", "Text", "ClassLabel")}
    inputs = [input_key] if input_key else of_type["Image"] or of_type["Text"]
    labels = [label_key] if label_key else of_type["ClassLabel"]
    if len(inputs) != 1 or len(labels) > 1:
        raise ValueError(f"{name} leaves a choice of what to learn: {_choice(kinds)}")
    if labels and kinds[labels[0]] != "ClassLabel":
        raise ValueError(f"feature {labels[0]!r} of {name} is no class label: {_choice(kinds)}")
    return kinds, inputs[0], labels[0] if labels else None


def _choice(kinds: dict[str, str]) -> str:
    listing = ", ".join(f"{key} ({kind})" for key, kind in kinds.items())
    return f"it has the features {listing}; name an image, numbers or a text as input_key and a ClassLabel as label_key"


def _read_numbers(
    name: str, builder: Any, input_key: str, label_key: Any, images: Sequence[str], new: cache.Allocate
) -> dict[str, Any]:
    """Reads images or other numbers into new arrays and returns the rest of the data set."""
    feature = builder.info.features[input_key]
    shape, dtype = feature.shape, np.dtype(feature.np_dtype)
    if None in shape or not ((dtype == np.uint8 and len(shape) == 3) or np.issubdtype(dtype, np.floating)):
        raise ValueError(
            f"feature {input_key!r} of {name} is {dtype}{list(shape)}: images uint8[H, W, C] and floats, of one size "
            "for all examples, can be read"
        )
    # tensorflow-datasets decodes images too, but looks for another decoder at every one, which takes a third longer.
    encoded = dtype == np.uint8 and input_key in images
    parts = _parts(name, builder, label_key, images if encoded else ())
    for part, records in zip(("train", "test"), parts, strict=True):
        x = new(f"{part}_x", (len(records.rows), *shape), np.uint8 if dtype == np.uint8 else np.float32)
        y = new(f"{part}_y", (len(records.rows),), np.int32)
        done = 0
        for values, labels in records.blocks(input_key, label_key):
            rows = slice(done, done + len(labels))
            y[rows] = labels
            x[rows] = [_pixels(value, shape) for value in values] if encoded else values
            done = rows.stop
    return {"num_classes": builder.info.features[label_key].num_classes}


def _read_text(
    name: str,
    builder: Any,
    input_key: str,
    label_key: str | None,
    images: Sequence[str],
    length: int,
    vocabulary: str,
) -> Dataset:
    """Windows of texts without labels, and padded rows of texts with them."""
    parts = _parts(name, builder, label_key, images)
    columns = [part.columns(*filter(None, (input_key, label_key))) for part in parts]
    texts = [[value.decode() for value in column[0]] for column in columns]
    if label_key is None:
        return from_texts(texts[0], texts[1], sequence_length=length, vocabulary=vocabulary, name=name)
    return from_texts(
        texts[0],
        texts[1],
        labels=(columns[0][1], columns[1][1]),
        num_classes=builder.info.features[label_key].num_classes,
        sequence_length=length,
        vocabulary=vocabulary,
        name=name,
    )


def _parts(name: str, builder: Any, label_key: str | None, encoded: Sequence[str]) -> tuple[_Records, _Records]:
    """The records to train and to test on, with the features `encoded` as they are in the file."""
    from tensorflow_datasets import decode

    splits = builder.info.splits
    decoders = {key: decode.SkipDecoding() for key in encoded}
    if "train" not in splits:
        raise ValueError(f"{name} has the splits {', '.join(splits) or 'none'}: one called train is needed")

    def everything(split: str) -> _Records:
        place = f"the split {split} of {builder.data_dir}"
        with _damage_told(place):
            source = builder.as_data_source(split=split, decoders=decoders)
            return _Records(source, np.arange(len(source)), place)

    train = everything("train")
    for split in ("test", "validation"):
        if split in splits:
            test = everything(split)
            if label_key is None or max(next(test.blocks(label_key), [[0]])[0]) >= 0:
                return train, test
    labels = np.zeros(len(train.rows), np.int32) if label_key is None else np.asarray(train.columns(label_key)[0])
    out = held_out(labels)
    return train._replace(rows=train.rows[~out]), train._replace(rows=train.rows[out])


@contextlib.contextmanager
def _damage_told(place: str) -> Iterator[None]:
    try:
        yield
    except NotImplementedError as error:
        raise ValueError(
            f"{place} was not prepared as array_record, and other formats need tensorflow: prepare it again with "
            "download_and_prepare(file_format='array_record')"
        ) from error
    except (RuntimeError, TypeError) as error:  # what array_record raises for missing, damaged and truncated files
        raise ValueError(f"{place} cannot be read ({error}): copy or prepare it again") from error


def _pixels(encoded: bytes, shape: tuple[int, ...]) -> np.ndarray:
    with Image.open(io.BytesIO(encoded)) as image:
        mode = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}[shape[-1]]
        return np.asarray(image if image.mode == mode else image.convert(mode)).reshape(shape)
