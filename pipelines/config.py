"""What a run is: every choice that can change a number, as plain values that survive JSON."""

import dataclasses
import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

from fedjax_core import checks
from pipelines import methods
from pipelines.methods import Value
from pipelines.names import pick

CLIENT_SETTINGS: Mapping[str, Value] = {"client_lr": 0.2, "client_momentum": 0.0, "client_lr_decay": 1.0}
"""Options of the clients' optimizer that `settings` may give per method, beside the method's own."""


@dataclass(frozen=True)
class Config:
    """Configuration of a run. Equal configurations give equal numbers.

    Attributes:
      dataset: name of the data set (`pipelines.data.DATASETS`).
      clients: number of clients.
      partition: who holds which examples (`pipelines.partition.PARTITIONS`).
      alpha: concentration of the Dirichlet partition.
      min_size: fewest examples of a client, for the Dirichlet partition.
      shards_per_client: for the shards partition.
      partition_seed: seed of the partition; all seeds of the run share the partition.
      methods: methods to run, one after the other.
      settings: method -> name -> value: hyper-parameters, and `CLIENT_SETTINGS` for one method alone.
      model: name of the model (`pipelines.setup.MODELS`).
      hidden: widths of the hidden layers of the mlp.
      sampler: who takes part (`pipelines.setup.SAMPLERS`).
      cohort_size: clients a round, for the samplers uniform, weighted and cyclic.
      participation: probability of a client to take part, for bernoulli and periodic.
      period: rounds, for periodic.
      turn_on: probability of an absent client to come back, for markov.
      turn_off: probability of a present client to leave, for markov.
      rounds: number of rounds.
      eval_every: rounds between evaluations, and the rounds of one compiled call.
      checkpoint_every: rounds between checkpoints, a multiple of eval_every.
      seeds: number of seeds, run at once.
      first_seed: the seeds are first_seed, first_seed + 1, ...
      batch_size: examples of a local step.
      epochs: local epochs, or None if steps is given.
      steps: local steps, or None if epochs is given.
      order: "shuffled", "replacement" or "sequential".
      weights: "uniform" or "examples".
      client_optimizer: "sgd", "adam" or "adamw".
      client_lr: learning rate of the clients.
      client_momentum: momentum of the clients (sgd only).
      client_lr_decay: factor on the clients' learning rate after every round.
      lanes: clients trained at the same time, or None for the backend's default.
      mesh: number of devices, or None for one without a mesh.
      x64: double precision.
      target: test accuracy for which the rounds are counted.
    """

    dataset: str = "digits"
    clients: int = 50
    partition: str = "dirichlet"
    alpha: float = 0.3
    min_size: int = 5
    shards_per_client: int = 2
    partition_seed: int = 0
    methods: tuple[str, ...] = ("fedavg", "scaffold", "fedadam")
    settings: Mapping[str, Mapping[str, Value]] = field(default_factory=dict)
    model: str = "mlp"
    hidden: tuple[int, ...] = (100,)
    sampler: str = "uniform"
    cohort_size: int = 10
    participation: float = 0.2
    period: int = 10
    turn_on: float = 0.1
    turn_off: float = 0.4
    rounds: int = 200
    eval_every: int = 5
    checkpoint_every: int = 25
    seeds: int = 5
    first_seed: int = 0
    batch_size: int = 10
    epochs: int | None = 5
    steps: int | None = None
    order: str = "shuffled"
    weights: str = "uniform"
    client_optimizer: str = "sgd"
    client_lr: float = 0.2
    client_momentum: float = 0.0
    client_lr_decay: float = 1.0
    lanes: int | None = None
    mesh: int | None = None
    x64: bool = False
    target: float = 0.95

    def __post_init__(self) -> None:
        for name, fix in _COUNTS.items():
            value = getattr(self, name)
            if value is not None or name not in _OPTIONAL:
                checks.positive_int(name, value, fix)
        if (self.epochs is None) == (self.steps is None):
            raise ValueError(
                f"epochs={self.epochs} and steps={self.steps}: local work is counted in one or the other, give one"
            )
        for name in ("participation", "turn_on", "turn_off", "target"):
            checks.scalar(name, getattr(self, name), low=0, high=1)
        checks.scalar("alpha", self.alpha, low=0, low_open=True)
        if self.checkpoint_every % self.eval_every:
            nearest = -(-self.checkpoint_every // self.eval_every) * self.eval_every
            raise ValueError(
                f"checkpoint_every={self.checkpoint_every} is no multiple of eval_every={self.eval_every}: checkpoints "
                f"are made at evaluations, take {nearest}"
            )
        if not self.methods:
            raise ValueError("methods is empty: name at least one, see `fedjax-core list`")
        for name in self.methods:
            methods.describe(name)
        if len(set(self.methods)) < len(self.methods):
            raise ValueError(f"methods={list(self.methods)} names one twice: name each once")
        for method in self.settings:
            pick("method in settings (of this run)", method, self.methods)
        read = {m: {k: _setting(m, k, v) for k, v in chosen.items()} for m, chosen in self.settings.items()}
        object.__setattr__(self, "settings", {m: dict(sorted(chosen.items())) for m, chosen in sorted(read.items())})
        for method in self.methods:
            client = self.client_settings(method)
            checks.scalar("client_lr", client["client_lr"], low=0)
            checks.scalar("client_momentum", client["client_momentum"], low=0, high=1, high_open=True)
            checks.scalar("client_lr_decay", client["client_lr_decay"], low=0, high=1, low_open=True)

    def client_settings(self, method: str) -> dict[str, Any]:
        """The options of the clients' optimizer for one method, by the names of `CLIENT_SETTINGS`."""
        own = self.settings.get(method, {})
        return {name: own.get(name, getattr(self, name)) for name in CLIENT_SETTINGS}

    def method_settings(self, method: str) -> dict[str, Value]:
        """The method's own hyper-parameters that this run sets."""
        return {k: v for k, v in self.settings.get(method, {}).items() if k not in CLIENT_SETTINGS}

    def to_json(self) -> str:
        """The configuration as JSON text."""
        return json.dumps(dataclasses.asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> "Config":
        """Reads what `to_json` wrote; fields that are missing have their defaults.

        Raises:
          ValueError: if the text is no JSON object, or has a field that there is not.
        """
        values = json.loads(text)
        if not isinstance(values, dict):
            raise ValueError(f"a configuration is a JSON object, got {type(values).__name__}: see Config.to_json")
        names = [f.name for f in dataclasses.fields(cls)]
        for name in values:
            pick("field of a configuration", name, names)
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**fields)

    def differences(self, other: "Config") -> dict[str, tuple[Any, Any]]:
        """Fields that differ: name to (here, there)."""
        pairs = {f.name: (getattr(self, f.name), getattr(other, f.name)) for f in dataclasses.fields(self)}
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}

    def command(self, out: str) -> str:
        """The command line that runs this configuration in the directory `out`."""
        words = ["fedjax-core", "train"]
        for name, (value, _) in self.differences(Config()).items():
            flag = "--" + name.replace("_", "-")
            if value is None:  # --steps says that there are no epochs
                continue
            if name == "methods":
                words += [w for method in value for w in ("--method", method)]
            elif name == "settings":
                words += [
                    w for m, chosen in value.items() for k, v in chosen.items() for w in ("--set", f"{m}.{k}={v}")
                ]
            elif name == "hidden":
                words += [flag, ",".join(map(str, value))]
            elif name == "x64":
                words += [flag]
            else:
                words += [flag, str(value)]
        return shlex.join([*words, "--out", out])

    def slug(self) -> str:
        """A short readable name, the same for the same configuration and for no other."""
        digest = sha256(json.dumps(dataclasses.asdict(self), sort_keys=True).encode()).hexdigest()[:8]
        skew = f"{self.alpha:g}" if self.partition == "dirichlet" else ""
        return f"{self.dataset}-{self.clients}-{self.partition}{skew}-{self.model}-{digest}"


_COUNTS = {
    "clients": "a federation has at least one client",
    "shards_per_client": "a client gets at least one shard",
    "cohort_size": "a round needs at least one client",
    "period": "a period is a number of rounds",
    "rounds": "run at least one round",
    "eval_every": "1 evaluates after every round",
    "checkpoint_every": "take a multiple of eval_every",
    "seeds": "run at least one seed",
    "batch_size": "each local step needs at least one example",
    "epochs": "to leave clients out, sample fewer",
    "steps": "to leave clients out, sample fewer",
    "lanes": "1 trains one client after another",
    "mesh": "a mesh has at least one device",
}
_OPTIONAL = ("epochs", "steps", "lanes", "mesh")


def _setting(method: str, name: str, value: Value) -> Value:
    if name in CLIENT_SETTINGS:
        return methods.read(f"{method}.{name}", value, CLIENT_SETTINGS[name])
    known = [*methods.describe(method).hyperparameters, *CLIENT_SETTINGS]
    return methods.parse(method, pick(f"hyper-parameter of {method}", name, known), value)
