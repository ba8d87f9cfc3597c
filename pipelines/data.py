"""Data sets: a name to arrays, checked.

A data set is a function without arguments that returns a `Dataset`; adding one is writing it and entering it in
`DATASETS`. The ones here are carried by scikit-learn, so that nothing is downloaded.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from fedjax_core import checks
from pipelines.names import pick

_SPLIT_SEED = 20_240
_TEST_SHARE = 0.2


class Dataset(NamedTuple):
    """A data set for classification, split once and for all.

    Attributes:
      name: its name.
      train: {"x": inputs [n, ...], "y": labels int32[n]}, or int32[n, T] for sequences.
      test: likewise.
      num_classes: labels lie in [0, num_classes); for sequences the size of the vocabulary.
    """

    name: str
    train: dict[str, np.ndarray]
    test: dict[str, np.ndarray]
    num_classes: int

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input."""
        return tuple(self.train["x"].shape[1:])

    @property
    def is_sequence(self) -> bool:
        """Whether every example has a label per position instead of one."""
        return self.train["y"].ndim > 1


def load(name: str) -> Dataset:
    """Returns the data set `name`, checked.

    Raises:
      ValueError: if the name is unknown (with the nearest match), a label is out of range or a value not finite.
    """
    return check(DATASETS[pick("data set", name, DATASETS)]())


def check(dataset: Dataset) -> Dataset:
    """Returns the data set after checking both parts.

    Raises:
      ValueError: if x and y differ in length, a part is empty, the parts differ in the shape or dtype of an example,
        a label is no integer in [0, num_classes), or an input is NaN or infinite.
    """
    for part, examples in (("train", dataset.train), ("test", dataset.test)):
        where = f"{dataset.name}.{part}"
        if checks.leading_axis(examples, where) == 0:
            raise ValueError(f"{where} has no examples: a data set needs at least one to train on and one to test on")
        checks.labels(examples["y"], dataset.num_classes, f"{where}['y']")
        checks.finite(examples, where)
    first = {name: leaf[:0] for name, leaf in dataset.train.items()}
    checks.same_structure(
        f"{dataset.name}.test", {k: v[:0] for k, v in dataset.test.items()}, first, f"{dataset.name}.train"
    )
    return dataset


def digits() -> Dataset:
    """Handwritten digits, 8x8 gray pixels in [0, 1] and 10 classes: 1,438 to train on and 359 to test on."""
    x, y = _sklearn("digits")
    return _split("digits", (x / 16).reshape(-1, 8, 8, 1).astype(np.float32), y)


def breast_cancer() -> Dataset:
    """Breast cancer Wisconsin: 30 measurements of cell nuclei, 2 classes; 455 and 114 examples."""
    return _standardized("breast_cancer")


def wine() -> Dataset:
    """Wine: 13 chemical measurements, 3 cultivars; 142 and 36 examples."""
    return _standardized("wine")


def iris() -> Dataset:
    """Iris: 4 measurements of a flower, 3 species; 120 and 30 examples."""
    return _standardized("iris")


DATASETS: dict[str, Callable[[], Dataset]] = {
    "digits": digits,
    "breast_cancer": breast_cancer,
    "wine": wine,
    "iris": iris,
}


def _sklearn(name: str) -> tuple[np.ndarray, np.ndarray]:
    import sklearn.datasets  # slow to import, and only needed here

    x, y = getattr(sklearn.datasets, f"load_{name}")(return_X_y=True)
    return x, y.astype(np.int32)


def _split(name: str, x: np.ndarray, y: np.ndarray) -> Dataset:
    """A fixed stratified split: the same fifth of every class is held out, on every machine."""
    rng = np.random.Generator(np.random.PCG64(_SPLIT_SEED))
    num_classes = int(y.max()) + 1
    held_out = np.zeros(len(y), bool)
    # Cutting the order by class at equal distances gives every class its share and the total exactly.
    order = np.concatenate([rng.permutation(np.flatnonzero(y == k)) for k in range(num_classes)])
    num_test = round(_TEST_SHARE * len(y))
    held_out[order[(np.arange(num_test) * len(y)) // num_test]] = True
    train = {"x": x[~held_out], "y": y[~held_out]}
    test = {"x": x[held_out], "y": y[held_out]}
    return Dataset(name, train, test, num_classes)


def _standardized(name: str) -> Dataset:
    """Zero mean and unit variance by the statistics of the training part, which is all a federation would know."""
    raw = _split(name, *_sklearn(name))
    mean, std = raw.train["x"].mean(axis=0), raw.train["x"].std(axis=0)
    std = np.where(std > 0, std, 1)

    def scale(part: dict[str, Any]) -> dict[str, np.ndarray]:
        return {"x": ((part["x"] - mean) / std).astype(np.float32), "y": part["y"]}

    return raw._replace(train=scale(raw.train), test=scale(raw.test))
