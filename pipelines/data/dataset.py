"""What a data set is: arrays split once and for all, and what every one of them must satisfy."""

from typing import Any, NamedTuple, TypeVar

import jax.numpy as jnp
import numpy as np

import models
from fedjax_core import checks

AnyModel = TypeVar("AnyModel", bound=tuple[Any, ...])
"""A `models.Model` or a `models.StatisticsModel`."""

_BLOCK = 2**22  # values looked at together, so that a memory map larger than the memory can be summed up


class Normalization(NamedTuple):
    """Statistics per channel of uint8 images, for inputs scaled to [0, 1]: a model sees (x / 255 - mean) / std.

    Attributes:
      mean: one value per channel.
      std: one value per channel, above 0.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]


class Dataset(NamedTuple):
    """A data set for classification or for next-token prediction, split once and for all.

    Arrays may be memory maps and may be read-only. Images are uint8 and stay so on the host.

    Attributes:
      name: its name.
      train: {"x": inputs [n, ...], "y": labels int32[n]}, or int32[n, T] for sequences.
      test: likewise, with m examples.
      num_classes: labels lie in [0, num_classes); for sequences the size of the vocabulary.
      groups: int32[n], the natural client (speaker, writer, subject) or the domain of each training example; or None.
      test_groups: int32[m], likewise for the test part; or None.
      group_names: name of each group; empty if `groups` is None or the groups have no names.
      normalization: what the model is to subtract and divide by, for uint8 images; otherwise None.
      pad_id: label of the padded positions of sequences, which count for nothing; None if there are none.
      vocabulary_size: for inputs that are tokens, int32[n, T], they lie in [0, vocabulary_size); otherwise None.
      pad_token: token that fills up the rows of a text to be classified, at the end; None if there is none.
    """

    name: str
    train: dict[str, np.ndarray]
    test: dict[str, np.ndarray]
    num_classes: int
    groups: np.ndarray | None = None
    test_groups: np.ndarray | None = None
    group_names: tuple[str, ...] = ()
    normalization: Normalization | None = None
    pad_id: int | None = None
    vocabulary_size: int | None = None
    pad_token: int | None = None

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input."""
        return tuple(self.train["x"].shape[1:])

    @property
    def is_sequence(self) -> bool:
        """Whether every example has a label per position instead of one."""
        return self.train["y"].ndim > 1


def check(dataset: Dataset) -> Dataset:
    """Returns the data set after checking both parts.

    Raises:
      ValueError: if x or y is missing, they differ in length, a part is empty, the parts differ in the shape or dtype
        of an example, a label is no integer in [0, num_classes) (nor `pad_id`), an input is NaN or infinite, a token
        is outside the vocabulary, there is not one group per example, or the statistics do not fit the channels.
    """
    for part, examples, groups in (
        ("train", dataset.train, dataset.groups),
        ("test", dataset.test, dataset.test_groups),
    ):
        where = f"{dataset.name}.{part}"
        missing = {"x", "y"} - set(examples)
        if missing:
            raise ValueError(f"{where} has no {min(missing)!r}, got {sorted(examples)}: give inputs x and labels y")
        if checks.leading_axis(examples, where) == 0:
            raise ValueError(f"{where} has no examples: a data set needs at least one to train on and one to test on")
        labels = examples["y"]
        if dataset.pad_id is not None:
            labels = labels[labels != dataset.pad_id]
        checks.labels(labels, dataset.num_classes, f"{where}['y']")
        checks.finite(examples, where)
        if dataset.vocabulary_size is not None:
            checks.labels(examples["x"], dataset.vocabulary_size, f"{where}['x']")
        if groups is not None:
            _check_groups(where, groups, len(examples["y"]), dataset.group_names)
    first = {name: leaf[:0] for name, leaf in dataset.train.items()}
    checks.same_structure(
        f"{dataset.name}.test", {k: v[:0] for k, v in dataset.test.items()}, first, f"{dataset.name}.train"
    )
    if dataset.normalization is not None:
        _check_normalization(dataset, dataset.normalization)
    return dataset


def fits_single(values: np.ndarray, where: str) -> None:
    """Raises ValueError if a finite number would become infinite in single precision, and says which and where.

    Args:
      values: array of any shape; one that is not wider than single precision fits.
      where: what it is, for the message.
    """
    if values.dtype.kind != "f" or values.dtype.itemsize <= 4 or not values.size:
        return
    most = float(np.finfo(np.float32).max)
    for start in range(0, len(values), max(1, _BLOCK // max(1, values[0].size))):
        block = values[start : start + max(1, _BLOCK // max(1, values[0].size))]
        beyond = np.isfinite(block) & (np.abs(block) > most)
        if beyond.any():
            first = np.argwhere(beyond)[0]
            index = (start + int(first[0]), *(int(i) for i in first[1:]))
            raise ValueError(
                f"{where} holds {block[tuple(first)]:g} at index {index}, which is finite but beyond single precision, "
                f"in which inputs are kept (largest {most:g}): scale the inputs, for example to unit variance"
            )


def normalization(images: np.ndarray) -> Normalization:
    """The statistics per channel of images uint8[n, H, W, C], exact and in bounded memory.

    A channel that never changes has standard deviation 1, so that it becomes 0 instead of NaN.
    """
    channels = images.shape[-1]
    counts = np.zeros((channels, 256), np.int64)
    rows = max(1, _BLOCK // max(1, images[0].size))
    for start in range(0, len(images), rows):
        flat = images[start : start + rows].reshape(-1, channels)
        counts += np.stack([np.bincount(flat[:, c], minlength=256) for c in range(channels)])
    values = np.arange(256) / 255
    shares = counts / counts.sum(axis=1, keepdims=True)
    mean = shares @ values
    std = np.sqrt(np.sum(shares * np.square(values - mean[:, None]), axis=1))
    constant = np.count_nonzero(counts, axis=1) == 1
    return Normalization(tuple(mean.tolist()), tuple(np.where(constant, 1, std).tolist()))


def normalized(model: AnyModel, statistics: Normalization | None) -> AnyModel:
    """The model of uint8 images, from one of normalized floats; without statistics the model itself."""
    if statistics is None:
        return model

    def scaled(x: Any) -> Any:
        dtype = jnp.result_type(float)
        mean, std = jnp.asarray(statistics.mean, dtype), jnp.asarray(statistics.std, dtype)
        return (jnp.asarray(x, dtype) / 255 - mean) / std

    return models.map_inputs(model, scaled)


def _check_groups(where: str, groups: np.ndarray, total: int, names: tuple[str, ...]) -> None:
    if np.shape(groups) != (total,) or not np.issubdtype(np.asarray(groups).dtype, np.integer):
        raise ValueError(
            f"the groups of {where} must be int[{total}], one per example, got {np.asarray(groups).dtype}"
            f"{list(np.shape(groups))}: number the groups from 0"
        )
    high = len(names) or np.inf
    outside = np.flatnonzero((groups < 0) | (groups >= high))
    if outside.size:
        raise ValueError(
            f"the groups of {where} must lie in [0, {high}), got {groups[outside[0]]} at position {outside[0]}: number "
            "the groups from 0, and name each or none in group_names"
        )


def _check_normalization(dataset: Dataset, statistics: Normalization) -> None:
    x = dataset.train["x"]
    if x.dtype != np.uint8 or x.ndim != 4:
        raise ValueError(
            f"{dataset.name} has a normalization, but its inputs are {x.dtype}{list(dataset.input_shape)} and not "
            "images uint8[H, W, C]: scale other inputs yourself and leave it out"
        )
    lengths = {len(statistics.mean), len(statistics.std)}
    if lengths != {x.shape[-1]} or not min(statistics.std) > 0:
        raise ValueError(
            f"the normalization of {dataset.name} must hold a mean and a std above 0 for each of its {x.shape[-1]} "
            f"channels, got {statistics}: take pipelines.data.datasets.normalization(images)"
        )
