"""How clients fare one by one: by domain, and whether a method makes them better off than alone, or than FedAvg.

Accuracies are compared that are on the same examples, a client's own test examples. In a view in which clients differ
each is tested on these anyway; the global model is where the federation has a test part of each client, and else on all
test examples in the client's mix of labels, which is another measure. So FedAvg's model stands beside personal ones
where clients have test parts, or where its view "personal" is evaluated, which is its global model on each client's own
examples.

Letters: S seeds, N clients.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from pipelines.configuration.methods import BASELINES
from pipelines.experiment.views import GLOBAL, PERSONAL
from pipelines.results.history import History, of_view
from pipelines.results.subject import Subject

ALONE, FEDAVG = BASELINES

WORDS: Mapping[str, str] = {ALONE: "better off than alone", FEDAVG: "better off than with FedAvg"}
"""What is said of a client that another method has done more for."""

NAMES: Mapping[str, str] = {ALONE: "alone", FEDAVG: "fedavg"}
"""The same in names of measures."""

_EQUAL = 1e-6  # accuracies are quotients of the same whole numbers, rounded to single precision


class Compared(NamedTuple):
    """How many clients a method has done more and less for than another.

    Attributes:
      better: int[S].
      worse: int[S]; all others are as well off.
      of: the number of clients that are tested in both.
    """

    better: np.ndarray
    worse: np.ndarray
    of: int


def own_accuracy(subject: Subject, history: History, view: str) -> np.ndarray | None:
    """float[S, N], the accuracy of each client on its own test examples; None where it was not measured on these."""
    name = of_view("client", view, "accuracy")
    if name not in history or (view == GLOBAL and "test" not in subject.parts):
        return None
    return history[name].astype(np.float64)


def references(subject: Subject, histories: Mapping[str, History]) -> dict[str, np.ndarray]:
    """Of `ALONE` and `FEDAVG` those of this run that can be compared with, with their `own_accuracy`."""
    found = {}
    for method in (ALONE, FEDAVG):
        history = histories.get(method, {})
        asked = (PERSONAL,) if method == ALONE else (PERSONAL, GLOBAL)  # where all are alone, one for all is nobody's
        there = [own_accuracy(subject, history, view) for view in asked]
        known = [values for values in there if values is not None]
        if known and len(histories) > 1:  # there is another method to be compared with it
            found[method] = known[0]
    return found


def others(subject: Subject, histories: Mapping[str, History], name: str, view: str) -> dict[str, Compared | None]:
    """Of each of `references` what a method has done beside it in a view; None where there is nothing to compare."""
    values = own_accuracy(subject, histories[name], view)
    found: dict[str, Compared | None] = {}
    for other, reference in references(subject, histories).items():
        itself = name == other and (other == FEDAVG or view == PERSONAL)
        found[other] = None if values is None or itself else compared(values, reference)
    return found


def compared(values: np.ndarray, reference: np.ndarray) -> Compared:
    """Clients by which of two float[S, N] is larger; of more seeds than both have the first, NaN entries left out."""
    seeds = min(len(values), len(reference))
    more = values[:seeds] - reference[:seeds]
    known = int((~np.isnan(more)).sum(axis=1).max(initial=0))
    return Compared((more > _EQUAL).sum(axis=1), (more < -_EQUAL).sum(axis=1), known)


def shown(found: Compared) -> str:
    """Clients that are better off, as a mean and standard deviation over seeds, "17.3 ± 0.6 of 20"."""
    if len(found.better) == 1:
        return f"{found.better[0]} of {found.of}"
    return f"{found.better.mean():.1f} ± {found.better.std(ddof=1):.1f} of {found.of}"


def by_domain(subject: Subject, values: np.ndarray) -> dict[str, np.ndarray]:
    """Domain to float[S], means over its clients of float[S, N]; NaN where none of them has a value."""
    found = {}
    for domain in dict.fromkeys(subject.domains):
        own = values[:, [each == domain for each in subject.domains]].astype(np.float64)
        known = ~np.isnan(own)
        with np.errstate(invalid="ignore"):
            found[domain] = np.where(known, own, 0).sum(axis=1) / known.sum(axis=1)
    return found
