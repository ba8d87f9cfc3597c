"""Everything there is to choose from on the command line, by kind: for `fedjax-core list` and for shell completion."""

import functools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType

from pipelines.common import cards, own
from pipelines.common.names import likeness, shortened
from pipelines.configuration import methods

PLANS: Mapping[str, str] = MappingProxyType(
    {
        "sequential": "One client after another on one device: --lanes 1 --mesh 1.",
        "lanes": "Several clients at once on a device, each lane fed clients back to back: --lanes N.",
        "mesh": "The cohort spread over devices, or the cores of a processor: --mesh N.",
        "model_parallel": "The model of one client spread over devices of the mesh: --mesh N --model-parallel M.",
        "staged": "Examples and client state in host memory, each cohort brought to the device: --staged.",
        "processes": "The devices of several machines as one mesh: --processes.",
    }
)
"""How a run uses the hardware, which changes no number but for last bits; the fastest unless told otherwise."""

_SHORT_KINDS = {"optimizer": "client optimizer", "skew": "feature skew", "algorithm": "method"}


def kinds(data_dir: str | Path | None = None) -> dict[str, dict[str, Callable[[], str]]]:
    """Kind to name to a function that gives the whole description.

    Args:
      data_dir: folder of prepared data, or None for the usual one.
    """
    import models
    from fedjax_core import samplers
    from pipelines.data import datasets, prepared
    from pipelines.experiment import setup
    from pipelines.federation import federations, skew

    def card(thing: object) -> Callable[[], str]:
        return lambda: cards.text(thing)

    try:
        there = [name for name in prepared.available(data_dir) if name not in datasets.DATASETS]
    except ValueError:  # the environment variable names no folder
        there = []
    return {
        "method": {name: functools.partial(_card_of_method, name) for name in methods.all_names()},
        "model": {name: card(getattr(models, name)) for name in setup.MODELS},
        "data set": {
            **{name: card(found) for name, found in datasets.DATASETS.items()},
            **{name: functools.partial(prepared.described, name, data_dir) for name in there},
        },
        "partition": {name: card(found) for name, found in federations.PARTITIONS.items()},
        "feature skew": {name: card(found) for name, found in skew.SKEWS.items()},
        "sampler": {name: card(getattr(samplers, name)) for name in setup.SAMPLERS},
        "client optimizer": {name: functools.partial(_of_optax, name) for name in setup.OPTIMIZERS},
        "plan": {name: functools.partial(str, text) for name, text in PLANS.items()},
    }


def kind_called(name: str, there: Iterable[str]) -> str | None:
    """The kind that a word means, "data set" for "datasets", "Data-Set" or "data_sets"; None if it means none.

    Args:
      name: what the user typed.
      there: the kinds.
    """
    plain = _plain(name)
    words = {_plain(kind): kind for kind in there} | _SHORT_KINDS
    return words.get(plain) or words.get(plain.removesuffix("s"))


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())


def described(name: str, data_dir: str | Path | None = None) -> str:
    """The whole description of what is called `name`, whatever kind it is of.

    Raises:
      ValueError: if nothing is called so, with the nearest name and its kind; for a data set that is not prepared, with
        what to put where.
    """
    there = kinds(data_dir)
    if own.is_own(name):
        found = own.function("method, model or data set", name)
        return cards.text(found) or f"{name} has no docstring."
    for entries in there.values():
        if name in entries:
            return entries[name]()
    typed = name[:100]
    import tensorflow_datasets  # slow to import

    from pipelines.data import prepared

    elsewhere = tensorflow_datasets.list_builders(with_community_datasets=False)
    if name.split("/")[0] in elsewhere:
        near = sorted((other for other in elsewhere if other != name), key=lambda other: -likeness(name, other))[:3]
        try:
            return prepared.described(name, data_dir)
        except ValueError as error:
            raise ValueError(f"{error}; data sets with names like it are {', '.join(near)}") from None
    candidates = [(kind, each) for kind, entries in there.items() for each in entries]
    candidates += [("heading", f"{kind}s") for kind in there]
    # What is here goes before what would have to be fetched.
    scores = {(kind, each): 0.1 + likeness(typed, each) for kind, each in candidates}
    scores |= {("data set", each): likeness(typed, each) for each in elsewhere if ("data set", each) not in scores}
    kind, near_by = max(scores, key=lambda pair: scores[pair])
    guess = f"did you mean {near_by!r}? That is a {kind}; " if scores[kind, near_by] >= 0.5 else ""
    raise ValueError(f"unknown name {shortened(name)!r}: {guess}`fedjax-core list` shows everything there is")


def first_paragraph(text: str) -> str:
    """The first paragraph in one line."""
    return " ".join(text.split("\n\n")[0].split())


def _card_of_method(name: str) -> str:
    return methods.describe(name).card


def _of_optax(name: str) -> str:
    import optax

    return first_paragraph(cards.text(getattr(optax, name)))
