"""Data sets: a name to arrays, checked.

A name is one of `DATASETS`, one of tensorflow-datasets that is prepared on this machine (`pipelines.data.prepared`),
the path of a .npz file, a function of the user's own as `module:name` (`pipelines.common.own`), or several of these
joined by "+" as domains (`pipelines.data.sources`). Nothing is downloaded.

A named data set is a function that returns a `Dataset`; adding one is writing it and entering it in `DATASETS`. Its
keyword arguments are its options.
"""

import difflib
import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.common import own
from pipelines.common.names import pick
from pipelines.data import prepared, sources, text
from pipelines.data.dataset import Dataset, Normalization, check, normalization, normalized

__all__ = ["DATASETS", "Dataset", "Normalization", "check", "load", "normalization", "normalized", "options"]

_PLACE = ("data_dir", "cache_dir", "verify")


def load(
    name: str,
    data_dir: str | Path | None = None,
    *,
    cache_dir: str | Path | None = None,
    verify: bool | None = None,
    **options: Any,
) -> Dataset:
    """Returns the data set `name`, checked.

    Args:
      name: what to load, as the module says: "digits", "fashion_mnist", "glue/sst2", "mine.npz", "my_data:load",
        "mnist+usps".
      data_dir: folder of prepared data, or None for that of the environment variable FEDJAX_CORE_DATA
        (`pipelines.data.prepared` says what it holds).
      cache_dir: where to keep what was decoded, or None for the user's cache folder (`pipelines.data.cache`).
      verify: whether to compare checksums of what was kept, or None for a rule (`pipelines.data.cache`).
      **options: options of the data set (`options` names them); of domains, each takes them.

    Raises:
      ValueError: if the name is unknown (with the nearest match) or the set not there (with what to put where), an
        option is not one of its own, a label is out of range or a value not finite.
    """
    place: dict[str, Any] = {"data_dir": data_dir, "cache_dir": cache_dir, "verify": verify}
    if _is_domains(name):
        return sources.join([load(part, **place, **options) for part in name.split("+")])
    read = _reader(name, data_dir)
    known = inspect.signature(read).parameters
    for option in options:
        pick(f"option of data set {name}", option, [key for key in known if key not in _PLACE])
    with own.explain_errors("data set", name):
        return check(read(**{key: value for key, value in place.items() if key in known}, **options))


def options(name: str, data_dir: str | Path | None = None) -> list[str]:
    """Names of the options that the data set `name` takes; of domains, those that each takes.

    Raises:
      ValueError: if the name is unknown.
    """
    if _is_domains(name):
        each = [options(part, data_dir) for part in name.split("+")]
        return [option for option in each[0] if all(option in others for others in each[1:])]
    known = [key for key in inspect.signature(_reader(name, data_dir)).parameters if key not in _PLACE]
    if (
        name in DATASETS
        or own.is_own(name)
        or prepared.TEXT_OPTIONS.isdisjoint(known)
        or prepared.is_text(name, data_dir)
    ):
        return known
    return [key for key in known if key not in prepared.TEXT_OPTIONS]


def digits() -> Dataset:
    """Handwritten digits, 8x8 gray pixels in [0, 1] and 10 classes: 1,438 to train on and 359 to test on."""
    x, y = _sklearn("digits")
    return sources.from_arrays((x / 16).reshape(-1, 8, 8, 1), y, name="digits")


def breast_cancer() -> Dataset:
    """Breast cancer Wisconsin: 30 measurements of cell nuclei, 2 classes; 455 and 114 examples."""
    return _standardized("breast_cancer")


def wine() -> Dataset:
    """Wine: 13 chemical measurements, 3 cultivars; 142 and 36 examples."""
    return _standardized("wine")


def iris() -> Dataset:
    """Iris: 4 measurements of a flower, 3 species; 120 and 30 examples."""
    return _standardized("iris")


DATASETS: dict[str, Callable[..., Dataset]] = {
    "digits": digits,
    "breast_cancer": breast_cancer,
    "wine": wine,
    "iris": iris,
    "shakespeare": prepared.shakespeare,
    "har": prepared.har,
    "usps": prepared.usps,
}
"""Name to the function that makes it, whose docstring describes it; the last three must be prepared on the machine."""


def _is_domains(name: str) -> bool:
    return "+" in name and not Path(name).is_file()


def _reader(name: str, data_dir: str | Path | None) -> Callable[..., Dataset]:
    """What makes a data set, with nothing but its options and `_PLACE` left to give."""
    if name in DATASETS:
        return DATASETS[name]
    if own.is_own(name):
        return _own_reader(name)
    if name.endswith(".npz"):
        return lambda: sources.from_npz(name)
    there = prepared.available(data_dir)
    if name.split("/")[0] not in {known.split("/")[0] for known in there}:
        import tensorflow_datasets  # slow to import

        elsewhere = tensorflow_datasets.list_builders(with_community_datasets=False)
        if name.split("/")[0] not in elsewhere:
            near = difflib.get_close_matches(name.lower(), elsewhere, n=1)
            try:
                pick("data set", name, list(dict.fromkeys([*DATASETS, *there, *near])))
            except ValueError as error:
                place = prepared.tfds_folder(data_dir)
                raise ValueError(f"{error}; those prepared by tensorflow-datasets are looked for in {place}") from None
    return functools.partial(prepared.tfds, name)


def _own_reader(name: str) -> Callable[..., Dataset]:
    """A function of the user's own, which need not take the places and the options of text; or what it has made."""
    found = own.find("data set", name)
    parameters = own.signature("data set", name) if callable(found) else []

    def read(**options: Any) -> Dataset:
        usual = {"sequence_length": text.SEQUENCE_LENGTH, "vocabulary": "characters"}
        options |= {key: value for key, value in usual.items() if options.get(key) is None}
        made = found(**own.arguments("data set", name, options)) if callable(found) else found
        return sources.from_any(made, name=own.short(name), **{key: options[key] for key in usual})

    keywords = [*_PLACE, *sorted(prepared.TEXT_OPTIONS), *(p.name for p in parameters if p.kind is not p.VAR_KEYWORD)]
    read.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=None) for key in dict.fromkeys(keywords)]
    )
    return read


def _sklearn(name: str) -> tuple[np.ndarray, np.ndarray]:
    import sklearn.datasets  # slow to import, and only needed here

    x, y = getattr(sklearn.datasets, f"load_{name}")(return_X_y=True)
    return x, y.astype(np.int32)


def _standardized(name: str) -> Dataset:
    x, y = _sklearn(name)
    out = sources.held_out(y)
    x = sources.standardized(x, ~out)
    return sources.from_arrays(x[~out], y[~out], test=(x[out], y[out]), name=name)
