"""Every choice of a run over several tasks, and the options of the command line that make it."""

import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import click

from fedjax_core import checks
from pipelines.common import cards
from pipelines.common.names import pick
from pipelines.configuration.config import LIMIT, at_least_zero, count, finite
from pipelines.run.run_directory import command_line

SCENARIOS = ("permuted", "split")
SAVE_EVERY = 50
METHODS = ("fot", "fedavg", "ewc", "fedprox", "joint")


@dataclass(frozen=True)
class Continual:
    """Every choice that can change a number; the defaults make a run of seconds.

    Attributes:
      scenario: "permuted" or "split".
      dataset: name of a data set of images with labels.
      data_dir: folder of prepared data, or None for that of the environment variable FEDJAX_CORE_DATA.
      tasks: number of tasks.
      rounds: rounds on each task.
      clients: number of clients, each with examples of every task.
      cohort_size: clients a round.
      partition: "iid", or "shards" of sorted labels, two for each client; drawn anew for each task.
      methods: what to compare: fot, fedavg, ewc, fedprox, joint.
      model: "mlp" or "cnn".
      hidden: mlp: widths of the hidden layers.
      dropout: mlp: rate after each of them; none of all unless given.
      start: "normal", weights with variance 1 / fan in, as flax has them, or "uniform", a third of that, as PyTorch.
      batch_size: examples of a local step.
      epochs: local epochs.
      client_lr: learning rate of the clients' SGD.
      weight_decay: of the same.
      energy: fot: share of the inputs' energy to keep.
      energy_step: fot: added to it at the end of every task.
      rule: fot: "norm" or "squared".
      oversampling: fot: columns of a sketch over the width of its layer.
      lam: ewc: weight of the penalty.
      mu: fedprox: weight of the penalty.
      seed: of the permutations or classes of tasks, of the partitions, and of the run.
    """

    scenario: str = "permuted"
    dataset: str = "digits"
    data_dir: str | None = None
    tasks: int = 3
    rounds: int = 30
    clients: int = 20
    cohort_size: int = 10
    partition: str = "iid"
    methods: tuple[str, ...] = ("fot", "fedavg")
    model: str = "mlp"
    hidden: tuple[int, ...] = (100, 100)
    dropout: tuple[float, ...] | None = None
    start: str = "normal"
    batch_size: int = 16
    epochs: int = 1
    client_lr: float = 0.1
    weight_decay: float = 1e-5
    energy: float = 0.95
    energy_step: float = 0.0
    rule: str = "norm"
    oversampling: int = 1
    lam: float = 10.0
    mu: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises ValueError for what is wrong whatever the data."""
        pick("scenario", self.scenario, SCENARIOS)
        pick("partition", self.partition, ("iid", "shards"))
        pick("model", self.model, ("mlp", "cnn"))
        pick("start", self.start, ("normal", "uniform"))
        for name in self.methods:
            pick("method", name, METHODS)
        if not self.methods:
            raise ValueError(f"methods is empty: choose among {', '.join(METHODS)}")
        if len(set(self.methods)) < len(self.methods):
            raise ValueError(f"methods={list(self.methods)} names one twice: name each once")
        for name in ("tasks", "rounds", "clients", "cohort_size", "batch_size", "epochs", "oversampling"):
            count(name, getattr(self, name), "count at least one")
        for i, width in enumerate(self.hidden):
            count(f"hidden[{i}]", width, "each hidden layer has at least one unit")
        for name in ("client_lr", "weight_decay", "energy", "energy_step", "lam", "mu"):
            finite(name, getattr(self, name))
        for name in ("client_lr", "weight_decay"):
            checks.scalar(name, getattr(self, name), low=0)
        at_least_zero("seed", self.seed, "every other number is another run")
        if self.tasks * self.rounds > LIMIT:
            raise ValueError(
                f"tasks={self.tasks} of rounds={self.rounds} are more than {LIMIT} rounds in all: devices count in 32 "
                "bits, take fewer"
            )


def options(command: Any) -> Any:
    """Gives a click command an option for every field of `Continual`, with its docstring as help; lists by commas."""
    text = cards.text(Continual).partition("Attributes:")[2]
    about = {name: " ".join(words.split()) for name, words in re.findall(r"^  (\w+): (.*(?:\n    .*)*)", text, re.M)}
    for field in reversed(fields(Continual)):
        default: Any = ",".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
        kind: Any = type(default) if isinstance(default, int | float) else str
        flag = "--" + field.name.replace("_", "-")
        shown = {"help": about.get(field.name), "default": default, "show_default": default is not None}
        command = click.option(flag, type=kind, metavar=kind.__name__.upper(), **shown)(command)
    return command


def from_options(values: dict[str, Any]) -> Continual:
    """The configuration of these options.

    Raises:
      ValueError: if a list cannot be read, or something is wrong with the configuration.
    """
    read = {"methods": str, "hidden": int, "dropout": float}

    def listed(name: str, text: Any) -> Any:
        try:
            return tuple(read[name](part.strip()) for part in text.split(",") if part.strip())
        except ValueError:
            flag = "--" + name
            raise ValueError(f"{flag} {text} is no list of numbers: write for example 200,200 or 0.2,0.5") from None

    return Continual(**{k: listed(k, v) if k in read and v is not None else v for k, v in values.items()})


def command(config: Continual, save_every: int, out: Path) -> str:
    """The command line that runs a configuration in the directory `out`."""
    usual = asdict(Continual()) | {"save_every": SAVE_EVERY}
    return command_line(["continual"], asdict(config) | {"save_every": save_every}, usual, out)


def check(content: Any) -> Continual:
    """The configuration that JSON values say.

    Raises:
      ValueError, TypeError or AttributeError: if it is none.
    """
    values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in content.items()}
    return Continual(**values)
