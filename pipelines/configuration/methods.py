"""The methods of `algorithms`, described by looking at them, and built from names and settings.

Nothing is registered: a factory exported by `algorithms` that asks for a loss, or for what stands in its place, is a
method. What it asks for, whatever the names and places of its arguments, is what it declares (`fedjax_core.needs`). Its
keyword-only arguments with numbers, booleans or strings as defaults are its hyper-parameters, and its docstring is its
card. A method of a user's own is such a factory too, named `module:name` (`pipelines.common.own`).
"""

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import algorithms
from algorithms.parts.options import grouped, option_tuples
from fedjax_core import Algorithm, ClientOptimizer, LocalOptions, LossFn, local_options, needs, values_suffice
from pipelines.common import cards, own
from pipelines.common.names import pick

Value = bool | int | float | str

_MOST_UNKNOWNS = 1000


def advice(name: str, parameters: int) -> str:
    """What to know before a method is run on a model with that many parameters; an empty string if nothing."""
    if parameters <= _MOST_UNKNOWNS or not values_suffice(describe(name).factory):
        return ""
    return (
        f"{name} is given values of the loss and no gradients, far fewer than the model's {parameters:,} parameters, "
        "so it learns slowly if at all: take a small model, such as --dataset iris --model logistic_regression "
        "--clients 6 --min-size 2 --cohort-size 3 --batch-size 100, or see `fedjax-core zeroth-order`"
    )


BASELINES = ("local_only", "fedavg")
"""What personal models are compared with: every client by itself, and one model for all."""

_LEARNS = ("loss", "task", "tasks", "adapter loss", "split")
"""What a method is about; every method asks for one of these."""

_NOT_IN_RUNS = {"split": "a model in three pieces"}
"""What runs of the command line do not have."""

_OF_OWN_MODELS = {"adapter loss": "low-rank parts of a frozen model"}
"""What only a model of a user's own can have."""

_WORDS = {
    **_NOT_IN_RUNS,
    **_OF_OWN_MODELS,
    "public": "public data (--public-share)",
    "num_clients": "state of every client",
    "features": "features of the model",
    "logits": "logits of the model",
    "inputs": "inputs of its layers",
    "layers": "widths of its layers",
    "task": "features of the model and a head that is a dense layer",
    "tasks": "a model for each group of clients (--models)",
    "groups": "the groups of clients",
    "num_classes": "the number of classes",
}
"""What factories ask for besides a loss and an optimizer, in words."""


class Method(NamedTuple):
    """What can be said about a method without running it.

    Attributes:
      name: its name in `algorithms`.
      title: first line of its docstring.
      paper: last paragraph of its docstring, without "Paper:".
      card: the whole docstring, and those of its option tuples.
      hyperparameters: name to default; None for one of a user's own method that has none, and so has to be set.
      needs: what the factory asks for, argument name to what it is (`fedjax_core.needs`).
      local: which options of local work mean something to it (`fedjax_core.local_options`).
      factory: the factory.
    """

    name: str
    title: str
    paper: str
    card: str
    hyperparameters: dict[str, Value | None]
    needs: dict[str, str]
    local: tuple[str, ...]
    factory: Callable[..., Algorithm]


def all_names() -> list[str]:
    """Names of all methods, sorted, those that the command line cannot run among them (`why_not`)."""
    return sorted(name for name in algorithms.__all__ if _is_method(getattr(algorithms, name)))


def names() -> list[str]:
    """Names of the methods that the command line can run with models of this package, sorted."""
    return [name for name in all_names() if not why_not(name)]


def why_not(name: str, model: str = "") -> str:
    """Why the command line cannot run a method, and what can, in a sentence; an empty string if it can.

    Args:
      name: of the method.
      model: name of the run's model; that of a user's own may have what those of this package do not.

    Raises:
      ValueError: as `describe`.
    """
    asked = describe(name).needs.values()
    lacks = [words for what, words in _NOT_IN_RUNS.items() if what in asked]
    if lacks:
        where = "" if own.is_own(name) else ", as its page in docs/methods shows"
        return f"{name} needs {lacks[0]}, which runs of the command line do not have: run it in Python{where}"
    lacks = [words for what, words in _OF_OWN_MODELS.items() if what in asked and not own.is_own(model)]
    if lacks:
        return (
            f"{name} needs {lacks[0]}, which only a model of your own can have: give --model module:function, as "
            "docs/methods/fedlora.md shows"
        )
    return ""


def asks_in_words(method: Method) -> str:
    """What a method asks for besides a loss and an optimizer, in words; an empty string if nothing."""
    found = [_WORDS.get(what, what) for what in method.needs.values() if what not in ("loss", "client optimizer")]
    if values_suffice(method.factory):
        found.insert(0, "values of the loss and no gradients")
    if not _counts_work(method.local):
        found.append("no local epochs or steps")
    return ", ".join(found)


def describe(name: str) -> Method:
    """Describes one method.

    Raises:
      ValueError: if the name is unknown, with the nearest match; or, of the form `module:name`, names nothing that is a
        method.
    """
    if own.is_own(name):
        return _describe_own(name)
    factory = getattr(algorithms, pick("method", name, all_names()))
    card = cards.text(factory)
    paragraphs = [" ".join(block.split()) for block in card.split("\n\n")]
    paper = paragraphs[-1].removeprefix("Paper:").strip() if paragraphs[-1].startswith("Paper:") else ""
    keyword_only = [p for p in inspect.signature(factory).parameters.values() if p.kind is p.KEYWORD_ONLY]
    defaults = [(p.name, p.default) for p in keyword_only]
    for argument, options in option_tuples(factory).items():  # each by its own name
        defaults += options._asdict().items()
        card += f"\n\nOptions `{argument}`: {cards.text(type(options))}"
    hyperparameters: dict[str, Value | None] = {
        name: default for name, default in defaults if isinstance(default, bool | int | float | str)
    }
    return Method(name, paragraphs[0], paper, card, hyperparameters, needs(factory), local_options(factory), factory)


def check_runs(name: str, model: str = "") -> None:
    """Raises ValueError if there is no such method (`describe`), or it cannot be run with that model (`why_not`)."""
    if said := why_not(name, model):
        raise ValueError(said)


def paper_name(name: str) -> str:
    """A method's name as papers write it, "SCAFFOLD-M-VR" for "scaffold_m_vr": what its card's first line begins with.

    It is the name itself where the card has no such line.

    Raises:
      ValueError: if there is no such method, with the nearest match.
    """
    title, colon, _ = describe(name).title.partition(": ")
    return title if colon else name


def looks_own(name: str) -> bool:
    """Whether a name of the form `module:name` is that of a function that asks for a loss, or what stands in its place.

    Raises:
      ValueError: as `pipelines.common.own.function`.
    """
    return own.is_own(name) and _learns(own.function("name", name))


def parse(method: str, hyperparameter: str, value: Value) -> Value:
    """Returns a hyper-parameter's value with the type of its default; a string is read as that type.

    Raises:
      ValueError: if the method has no such hyper-parameter (with the nearest match) or the value does not fit.
    """
    defaults = describe(method).hyperparameters
    default = defaults[pick(f"hyper-parameter of {method}", hyperparameter, defaults)]
    return read(f"{method}.{hyperparameter}", value, default)


def read(name: str, value: Value, default: Value | None) -> Value:
    """Returns `value`, or what the string `value` says, as the type of `default`; for None as what it looks like.

    Raises:
      ValueError: if it cannot be read as that type.
    """
    text = str(value).strip()
    if default is None:
        return _guessed(value)
    if isinstance(default, bool):
        words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
        if text.lower() not in words:
            raise ValueError(f"{name} is on or off, got {value!r}: write true or false")
        return words[text.lower()]
    if isinstance(default, str):
        return text
    kind: type[int] | type[float] = int if isinstance(default, int) else float
    try:
        return kind(text)
    except ValueError:
        noun = "an integer" if kind is int else "a number"
        raise ValueError(f"{name} must be {noun} like its default {default}, got {value!r}") from None


def settings_of(name: str, settings: Mapping[str, Value]) -> dict[str, Value]:
    """All hyper-parameters a run of the method uses: the factory's defaults, then `settings` (checked)."""
    defaults = {key: value for key, value in describe(name).hyperparameters.items() if value is not None}
    return defaults | {key: parse(name, key, value) for key, value in settings.items()}


def build(
    name: str,
    loss_fn: LossFn,
    client_optimizer: ClientOptimizer,
    *,
    num_clients: int,
    settings: Mapping[str, Value],
    local: Mapping[str, Any],
    model_functions: Mapping[str, Any],
) -> Algorithm:
    """Builds a method.

    Args:
      name: its name; of one that runs (`check_runs`).
      loss_fn: `loss_fn(params, batch, key) -> float[B]`.
      client_optimizer: optax optimizer, or a function of the round that gives one.
      num_clients: size of the population, for the methods that keep state for every client.
      settings: hyper-parameters by name; the others are the factory's defaults.
      local: the options of local work (`fedjax_core.LocalOptions`), of which those are left out that are None or mean
        nothing to the method; and arguments that stand in the place of settings.
      model_functions: what else there is of data and model, by what a factory calls it (`fedjax_core.needs`): functions
        of the model besides its loss, the widths of its layers, tasks and groups of clients.

    Raises:
      ValueError: for an unknown method or hyper-parameter, or a value that the method refuses.
    """
    method = describe(name)
    options = {key: value for key, value in local.items() if value is not None}
    if own.is_own(name):
        _check_taken(method, options)
    without = LocalOptions.__annotations__.keys() - method.local
    options = {key: value for key, value in options.items() if key not in without}
    brought = {
        "loss": loss_fn,
        "adapter loss": loss_fn,
        "client optimizer": client_optimizer,
        "num_clients": num_clients,
        "public": unlabelled,
        **model_functions,
    }
    options |= {argument: brought[what] for argument, what in method.needs.items() if what in brought}
    # What was not asked for is not passed on, so that the factory's defaults stay the factory's.
    asked = {key: parse(name, key, value) for key, value in settings.items()}
    for key, default in method.hyperparameters.items():
        if default is None and key not in asked and key not in options:
            raise ValueError(
                f"{name} needs {key}, which has no default: give it with --set {own.short(name)}.{key}=..."
            )
    with own.explain_errors("method", name):
        arguments = grouped(method.factory, {**asked, **options})
        parameters = inspect.signature(method.factory).parameters.values()
        first = [arguments.pop(p.name) for p in parameters if p.kind is p.POSITIONAL_ONLY]
        built = method.factory(*first, **arguments)
    for part in ("init", "round", "params") if own.is_own(name) else ():
        if not callable(getattr(built, part, None)):
            raise ValueError(
                f"method {name!r} returned {type(built).__name__} without a function {part!r}: return a "
                "fedjax_core.Algorithm, for example global_algorithm(init, round)"
            )
    return built if isinstance(built, Algorithm) else Algorithm(built.init, built.round, built.params)


UNLABELLED = "unlabelled"
"""Where a run's population has the examples of the server, in its public data."""


def unlabelled(public: Mapping[str, Any]) -> Any:
    """The examples of the server, leaves [M, ...], of a run's public data."""
    return public[UNLABELLED]


def asks_for(name: str, what: str) -> bool:
    """Whether the method's factory asks for something, "layers" for instance; see `fedjax_core.needs`."""
    return what in describe(name).needs.values()


def takes_local_work(name: str) -> bool:
    """Whether epochs, steps and order mean something to the method."""
    return _counts_work(describe(name).local)


def _counts_work(local: tuple[str, ...]) -> bool:
    return bool({"num_epochs", "num_steps"} & set(local))


def folder(name: str) -> str:
    """The name of the method's folder in a run directory."""
    return own.file_name(name)


def _describe_own(name: str) -> Method:
    factory = own.function("method", name)
    parameters = own.signature("method", name)
    asked = needs(factory)
    if not _learns(factory):  # by their places, whatever their names
        positional = [p for p in parameters[:2] if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        if len(positional) < 2 or inspect.isclass(factory):
            raise ValueError(
                f"method {name!r} takes ({', '.join(map(str, parameters))}): a method is made by a function "
                "(loss_fn, client_optimizer, *, its own options, **local) that returns a fedjax_core.Algorithm"
            )
        asked = {positional[0].name: "loss", positional[1].name: "client optimizer"} | asked
    hyperparameters: dict[str, Value | None] = {}
    for p in parameters:
        if p.name in asked or p.name in LocalOptions.__annotations__ or p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL):
            continue
        if p.default is p.empty:
            hyperparameters[p.name] = None
        elif isinstance(p.default, bool | int | float | str):
            hyperparameters[p.name] = p.default
    card = cards.text(factory) or f"{own.short(name)}: a method of your own."
    paragraphs = [" ".join(block.split()) for block in card.split("\n\n")]
    paper = paragraphs[-1].removeprefix("Paper:").strip() if paragraphs[-1].startswith("Paper:") else ""
    return Method(name, paragraphs[0], paper, card, hyperparameters, asked, local_options(factory), factory)


def _check_taken(method: Method, options: Mapping[str, Any]) -> None:
    """Raises ValueError if a user's own method does not take an option that this run does not leave at its default."""
    name, taken = method.name, set(method.local)
    # How the hardware is used changes no number, so a method may leave it at the default.
    defaults = {"order": "shuffled", "weights": "uniform"}
    work = ("num_epochs", "num_steps")
    for key, value in options.items():
        without_work = key in work and not taken & set(work)
        if key not in taken and key != "plan" and not without_work and defaults.get(key) != value:
            raise ValueError(
                f"method {name!r} takes no argument {key!r}, and this run has {key}={value!r}: add **local to its "
                "arguments, and hand it on to local_training(**local)"
            )


def _guessed(value: Value) -> Value:
    if not isinstance(value, str):
        return value
    text = value.strip()
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            number = kind(text)
        except ValueError:
            continue
        return number if math.isfinite(number) else text
    return text


def _is_method(value: Any) -> bool:
    return inspect.isfunction(value) and _learns(value)


def _learns(factory: Callable[..., Any]) -> bool:
    return bool({*_LEARNS} & set(needs(factory).values()))
