"""What was run, in words and a few numbers: all that a report needs beside a configuration and what was measured.

It is kept in the record of a run, so that a report can be drawn again where neither the data nor the devices are.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Self

import jax

from fedjax_core import Variables
from pipelines.configuration.config import Config
from pipelines.experiment import views
from pipelines.experiment.setup import Experiment
from pipelines.federation import portrait


class Subject(NamedTuple):
    """What a report is about.

    Attributes:
      config: the configuration.
      title: data, clients and model in one line.
      lines: what was run, one line for each part of it.
      main: method to the view that stands for it, as far as it was evaluated.
      ending: methods that do something after their last round.
      parts: part of the federation to the examples that clients hold of it.
      tested_on_own: whether clients are tested on examples of their own.
      about_views: how the views in which clients differ are tested, in words.
      domains: name of the domain that each client is of; empty where clients do not come from domains.
    """

    config: Config
    title: str
    lines: list[str]
    main: dict[str, str]
    ending: list[str]
    parts: dict[str, int]
    tested_on_own: bool
    about_views: str
    domains: Sequence[str] = ()

    @property
    def seeds(self) -> list[int]:
        """The seeds of the run."""
        return list(range(self.config.first_seed, self.config.first_seed + self.config.seeds))

    def as_json(self) -> dict[str, Any]:
        """All but the configuration, as JSON values."""
        return {name: value for name, value in self._asdict().items() if name != "config"}

    @classmethod
    def of_json(cls, config: Config, values: Mapping[str, Any]) -> Self:
        """What `as_json` gave, with the configuration."""
        return cls(config, **values)


def of_experiment(experiment: Experiment) -> Subject:
    """What a report of an experiment is about."""
    config, federation = experiment.config, experiment.federation
    return Subject(
        config,
        f"{portrait.title(config, federation)}, {'/'.join(config.all_models)}",
        described(experiment),
        {name: views.evaluated(config, algorithm).main for name, algorithm in experiment.algorithms.items()},
        [name for name, algorithm in experiment.algorithms.items() if algorithm.events_at("after")],
        {name: len(part.assignment.rows) for name, part in federation.parts.items()},
        "test" in federation.parts or experiment.dataset.is_sequence,
        _about_views(experiment),
        federation.domains,
    )


def described(experiment: Experiment) -> list[str]:
    """What an experiment is, one line for each part of it."""
    config = experiment.config
    params = num_parameters(experiment)
    hidden = f" (hidden {', '.join(map(str, config.hidden))})" if "mlp" in config.all_models else ""
    several = f" in all, client i has number i modulo {len(config.models)}" if config.models else ""
    local = config.local
    work = counted(local.steps, "step") if local.steps is not None else counted(local.epochs, "epoch")
    seeds = ", ".join(map(str, experiment.seeds))
    return [
        *portrait.described(config, experiment.federation),
        f"model{'s' if config.models else ''}: {', '.join(config.all_models)}{hidden}, {params:,} parameters{several}",
        f"cohort: {cohort(config, experiment.federation.num_clients)}"
        + (", staged from host memory" if config.machine.staged else ""),
        f"local work: {work}, batches of {local.batch_size}, {local.client_optimizer}, clients weighted "
        f"{local.weights}",
        *([f"early stopping: {_stopping(config)}"] if config.evaluation.validates else []),
        f"rounds: {config.rounds}, evaluated every {config.evaluation.eval_every}, saved every "
        f"{config.report.checkpoint_every}; {counted(config.seeds, 'seed')} ({seeds}) at once"
        + (", double precision" if config.machine.x64 else ""),
    ]


def _stopping(config: Config) -> str:
    """When a seed stops, in words."""
    after = (
        [f"after {counted(config.evaluation.patience, 'evaluation')} without improvement"]
        if config.evaluation.patience
        else []
    )
    after += (
        [f"at a validation accuracy of {100 * config.evaluation.stop_at:g} %"]
        if config.evaluation.stop_at is not None
        else []
    )
    return f"{' or '.join(after) or 'never'}; the model with the best validation {config.evaluation.best_by} is kept"


def cohort(config: Config, num_clients: int) -> str:
    """Who takes part, in words."""
    c = config.participation
    turns = f"return with probability {c.turn_on:g}, leave with {c.turn_off:g}"
    words = {
        "full": f"all {num_clients} clients in every round",
        "bernoulli": f"each of {num_clients} clients with probability {c.probability:g} (bernoulli)",
        "periodic": f"each of {num_clients} clients in {c.probability:g} of every {c.period} rounds (periodic)",
        "markov": f"{num_clients} clients that {turns} (markov)",
    }
    return words.get(c.sampler, f"{c.cohort_size} of {num_clients} clients a round ({c.sampler})")


def num_parameters(experiment: Experiment) -> int:
    """Parameters of the model, without its statistics."""
    model = jax.eval_shape(experiment.model.init, jax.random.key(0))
    shapes = model.params if isinstance(model, Variables) else model
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


def counted(number: int | None, noun: str) -> str:
    """A number of things, "1 seed" or "2 seeds"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _about_views(experiment: Experiment) -> str:
    config, federation = experiment.config, experiment.federation
    dealt = (
        "test examples that are dealt out to clients in their mix of labels (--test-share keeps some of a client's own "
        "back instead)"
        if views.is_dealt(federation)
        else "its own test examples"
    )
    chosen = len(views.chosen_clients(config, federation.num_clients))
    whose = "" if chosen == federation.num_clients else f"; {chosen} of {federation.num_clients} clients are tested"
    return (
        f"That is so in the view global. In the others each client is tested by the model that it would use itself, on "
        f"{dealt}, and the test accuracy is the mean over clients{whose}. A method's first row, which the figures "
        "show, is the view that it is made for. "
    )
