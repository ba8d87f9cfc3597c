"""The methods of `algorithms`, described by looking at them, and built from names and settings.

Nothing is registered: a factory exported by `algorithms` that asks for a loss (`fedjax_core.needs`) is a method, its
keyword-only arguments with numbers, booleans or strings as defaults are its hyper-parameters, and its docstring is its
card. A method of a user's own is such a factory too, named `module:name` (`pipelines.common.own`).
"""

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import algorithms
from algorithms.parts.options import grouped, option_tuples
from fedjax_core import Algorithm, ClientOptimizer, LocalOptions, LossFn, needs
from pipelines.common import cards, own
from pipelines.common.names import pick

Value = bool | int | float | str

_WITHOUT_GRADIENTS = ("fzoos", "fedzo", "fedprox_zo", "scaffold_zo")
_MOST_UNKNOWNS = 1000


def advice(name: str, parameters: int) -> str:
    """What to know before a method is run on a model with that many parameters; an empty string if nothing."""
    if name not in _WITHOUT_GRADIENTS or parameters <= _MOST_UNKNOWNS:
        return ""
    return (
        f"{name} is given values of the loss and no gradients, far fewer than the model's {parameters:,} parameters, "
        "so it learns slowly if at all: take a small model, such as --dataset iris --model logistic_regression "
        "--clients 6 --min-size 2 --cohort-size 3 --batch-size 100, or see `fedjax-core zeroth-order`"
    )


# They take one step on the full gradient, so a run's epochs, steps and order are not handed to them.
_SINGLE_STEP = ("fedsgd",)

_NOT_IN_RUNS = {
    "tasks": "a task for each architecture of its clients",
    "adapter loss": "adapters of a frozen model",
    "split": "a model in three pieces",
}
"""What the methods ask for that are not methods of the command line."""

_LOCAL = tuple(LocalOptions.__annotations__)


class Method(NamedTuple):
    """What can be said about a method without running it.

    Attributes:
      name: its name in `algorithms`.
      title: first line of its docstring.
      paper: last paragraph of its docstring, without "Paper:".
      card: the whole docstring, and those of its option tuples.
      hyperparameters: name to default; None for one of a user's own method that has none, and so has to be set.
      needs: what the factory asks for, argument name to what it is (`fedjax_core.needs`).
      factory: the factory.
    """

    name: str
    title: str
    paper: str
    card: str
    hyperparameters: dict[str, Value | None]
    needs: dict[str, str]
    factory: Callable[..., Algorithm]


def names() -> list[str]:
    """Names of all methods, sorted."""
    return sorted(name for name in algorithms.__all__ if _is_method(getattr(algorithms, name)))


def describe(name: str) -> Method:
    """Describes one method.

    Raises:
      ValueError: if the name is unknown, with the nearest match; or, of the form `module:name`, names nothing that is a
        method.
    """
    if own.is_own(name):
        return _describe_own(name)
    if name in algorithms.__all__ and name not in names():
        asked = needs(getattr(algorithms, name)).values()
        lacks = next((words for what, words in _NOT_IN_RUNS.items() if what in asked), "what no run has")
        raise ValueError(
            f"{name} needs {lacks}, and runs of the command line have one whole model: run it in Python, as its page "
            "in docs/methods shows"
        )
    factory = getattr(algorithms, pick("method", name, names()))
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
    return Method(name, paragraphs[0], paper, card, hyperparameters, needs(factory), factory)


def paper_name(name: str) -> str:
    """A method's name as papers write it, "SCAFFOLD-M-VR" for "scaffold_m_vr": what its card's first line begins with.

    It is the name itself where the card has no such line.

    Raises:
      ValueError: if there is no such method, with the nearest match.
    """
    title, colon, _ = describe(name).title.partition(": ")
    return title if colon else name


def looks_own(name: str) -> bool:
    """Whether a name of the form `module:name` is that of a function that asks for a loss.

    Raises:
      ValueError: as `pipelines.common.own.function`.
    """
    return own.is_own(name) and "loss" in needs(own.function("name", name)).values()


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
      name: its name.
      loss_fn: `loss_fn(params, batch, key) -> float[B]`.
      client_optimizer: optax optimizer, or a function of the round that gives one.
      num_clients: size of the population, for the methods that keep state for every client.
      settings: hyper-parameters by name; the others are the factory's defaults.
      local: the options every method takes (`fedjax_core.LocalOptions`); entries that are None are left out.
      model_functions: functions of the model besides its loss, by the name of the argument (`features`, `inputs`,
        `logits`), and the widths of its layers (`layers`), for the methods that have it.

    Raises:
      ValueError: for an unknown method or hyper-parameter, or a value that the method refuses.
    """
    method = describe(name)
    if asks_for(name, "public"):
        raise ValueError(
            f"{name} needs public data, which runs of the command line do not have: run it in Python, with "
            "population.with_public(examples)"
        )
    options = {key: value for key, value in local.items() if value is not None}
    if own.is_own(name):
        options = _taken(name, options)
    if name in _SINGLE_STEP:
        options = {k: v for k, v in options.items() if k not in ("num_epochs", "num_steps", "order")}
    brought = {
        "loss": loss_fn,
        "client optimizer": client_optimizer,
        "num_clients": num_clients,
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


def asks_for(name: str, what: str) -> bool:
    """Whether the method's factory asks for something, "layers" for instance; see `fedjax_core.needs`."""
    return what in describe(name).needs.values()


def takes_local_work(name: str) -> bool:
    """Whether epochs, steps and order mean something to the method."""
    if own.is_own(name):
        parameters = own.signature("method", name)
        return any(p.kind is p.VAR_KEYWORD or p.name in ("num_epochs", "num_steps") for p in parameters)
    return name not in _SINGLE_STEP


def folder(name: str) -> str:
    """The name of the method's folder in a run directory."""
    return own.file_name(name)


def _describe_own(name: str) -> Method:
    factory = own.function("method", name)
    parameters = own.signature("method", name)
    asked = needs(factory)
    if "loss" not in asked.values():  # by their places, whatever their names
        positional = [p for p in parameters[:2] if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        if len(positional) < 2 or inspect.isclass(factory):
            raise ValueError(
                f"method {name!r} takes ({', '.join(map(str, parameters))}): a method is made by a function "
                "(loss_fn, client_optimizer, *, its own options, **local) that returns a fedjax_core.Algorithm"
            )
        asked = {positional[0].name: "loss", positional[1].name: "client optimizer"} | asked
    hyperparameters: dict[str, Value | None] = {}
    for p in parameters:
        if p.name in asked or p.name in _LOCAL or p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL):
            continue
        if p.default is p.empty:
            hyperparameters[p.name] = None
        elif isinstance(p.default, bool | int | float | str):
            hyperparameters[p.name] = p.default
    card = cards.text(factory) or f"{own.short(name)}: a method of your own."
    paragraphs = [" ".join(block.split()) for block in card.split("\n\n")]
    paper = paragraphs[-1].removeprefix("Paper:").strip() if paragraphs[-1].startswith("Paper:") else ""
    return Method(name, paragraphs[0], paper, card, hyperparameters, asked, factory)


def _taken(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Of the options that every method takes, those that a user's own method takes.

    Raises:
      ValueError: if it does not take one that this run does not leave at its default.
    """
    parameters = own.signature("method", name)
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return options
    taken = {p.name for p in parameters}
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
    return {key: value for key, value in options.items() if key in taken}


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
    return inspect.isfunction(value) and "loss" in needs(value).values()
