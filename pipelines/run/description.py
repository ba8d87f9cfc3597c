"""What a run directory says of its data, so that a finished run can be used where the data is not.

Shapes, dtypes, classes, statistics of images and numbers of examples and clients: what a model and the state of a
method are built from. No example is in it.
"""

from typing import Any

import numpy as np

from pipelines.data.dataset import Dataset, Normalization
from pipelines.federation.assignment import Assignment
from pipelines.federation.federations import PUBLIC, Federation, Part

_ARRAYS = ("train", "test", "groups", "test_groups", "group_names")

Description = dict[str, Any]
"""JSON values: "examples", name to [dtype, shape of one]; "sizes", part to number of examples; "clients"; the other
fields of `Dataset`."""


def described(experiment: Any) -> Description:
    """The description of an experiment's data (`pipelines.experiment.setup.Experiment`)."""
    return of_federation(experiment.federation)


def of_federation(federation: Federation) -> Description:
    """The description of a federation and its data set."""
    dataset = federation.dataset
    plain = {name: getattr(dataset, name) for name in Dataset._fields if name not in _ARRAYS}
    if dataset.normalization is not None:
        plain["normalization"] = [list(map(float, values)) for values in dataset.normalization]
    return {
        "examples": {name: _one(leaf) for name, leaf in dataset.train.items()},
        "sizes": {"train": len(dataset.train["y"]), "test": len(dataset.test["y"]), **_public(federation)},
        "clients": federation.num_clients,
        **plain,
    }


def without_data(description: Description) -> Federation:
    """A federation of that shape, of as many clients, with one example of zeros in each part.

    Models and methods built from it are those of the real one; there is nothing in it to train on or to test on.
    """
    fields = {name: description[name] for name in Dataset._fields if name in description}
    if fields.get("normalization") is not None:
        fields["normalization"] = Normalization(*map(tuple, fields["normalization"]))
    zeros = {name: np.zeros((1, *shape), np.dtype(dtype)) for name, (dtype, shape) in description["examples"].items()}
    first = Assignment.from_owner(np.zeros(1, np.int64), description["clients"])
    parts = {"train": Part("train", first)}
    if PUBLIC in description["sizes"]:
        parts[PUBLIC] = Part("train", Assignment.from_owner(np.zeros(1, np.int64), 1))
    return Federation(Dataset(train=zeros, test=dict(zeros), **fields), parts)


def _public(federation: Federation) -> dict[str, int]:
    """The number of examples that the server holds, if it holds any."""
    found = federation.public_inputs
    return {} if found is None else {PUBLIC: len(found["x"])}


def misfit(dataset: Dataset, description: Description) -> str:
    """Says why a model of the described data cannot be applied to a data set; an empty string if it can."""
    theirs = {name: _one(leaf) for name, leaf in dataset.train.items()}
    for name, (dtype, shape) in description["examples"].items():
        if name not in theirs:
            return f"it has no {name!r}"
        there, at = theirs[name], "inputs" if name == "x" else "labels" if name == "y" else name
        if there[1] != shape:
            return f"its {at} have shape {there[1]} and those of the run {shape}"
        if np.dtype(there[0]).kind != np.dtype(dtype).kind:
            return f"its {at} are {there[0]} and those of the run {dtype}"
    if dataset.num_classes > description["num_classes"]:
        return f"it has {dataset.num_classes} classes and the run {description['num_classes']}"
    if (dataset.vocabulary_size or 0) > (description.get("vocabulary_size") or 0):
        return f"it has a vocabulary of {dataset.vocabulary_size} and the run {description['vocabulary_size']}"
    return ""


def _one(leaf: Any) -> list[Any]:
    return [str(np.asarray(leaf[:0]).dtype), list(map(int, leaf.shape[1:]))]
