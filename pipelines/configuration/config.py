"""What a run is: every choice that can change a number, as plain values that survive JSON."""

import dataclasses
import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

from fedjax_core import checks
from pipelines.common import growth, own
from pipelines.common.names import pick
from pipelines.configuration import methods
from pipelines.configuration.methods import Value

CLIENT_SETTINGS: Mapping[str, Value] = {"client_lr": 0.2, "client_momentum": 0.0, "client_lr_decay": 1.0}
"""Options of the clients' optimizer that `settings` may give per method, beside the method's own."""


@dataclass(frozen=True)
class Config:
    """Configuration of a run. Equal configurations give equal numbers.

    Attributes:
      dataset: name of the data set (`pipelines.data.datasets.load`). It, methods and the model may be a user's own,
        named `module:name` (`pipelines.common.own`).
      data_dir: folder of prepared data, or None for the usual one. A place: another one does not make another run.
      sequence_length: positions of an example, for data sets of text.
      vocabulary: "characters", "bytes" or a file, for data sets of text.
      clients: number of clients; None takes all there are, for the natural partition.
      partition: who holds which examples (`pipelines.federation.federations.PARTITIONS`).
      alpha: concentration, for the partitions dirichlet, partial_classes, clusters and embedding.
      min_size: fewest examples of a client, for those and for lognormal, power_law and natural.
      shards_per_client: for the shards partition.
      classes_per_client: for the classes and partial_classes partitions.
      sigma: standard deviation of the logarithm of the sizes, for the lognormal partition.
      exponent: of the sizes, for the power_law partition.
      clusters: number of clusters, for the embedding partition.
      imbalance: largest over smallest class of the training examples (`pipelines.federation.splits.long_tail`); 1 takes
        them all.
      feature_skew: what clients do to their inputs (`pipelines.federation.skew.SKEWS`), or "none".
      severity: of the feature skew.
      validation_share: share of each client's examples kept for validation.
      test_share: share of each client's examples kept to test it.
      split_by: "random" or "position", how those are taken.
      gap: examples dropped between the parts of a client, with split_by position.
      new_clients: number of clients that take no part in training and are tested at the end.
      partition_seed: seed of all of the above; all seeds of the run share the federation.
      federation: directory of a saved federation to use instead (`pipelines.federation.federations.load`). A place,
        like data_dir.
      federation_digest: its digest, which tells federations apart; None without one.
      staged: keep the examples and the clients' state in host memory and bring each cohort to the device
        (`fedjax_core.staging`); the numbers are the same.
      methods: methods to run, one after the other.
      settings: method -> name -> value: hyper-parameters, and `CLIENT_SETTINGS` for one method alone.
      model: name of the model (`pipelines.experiment.setup.MODELS`).
      hidden: widths of the hidden layers of the mlp.
      sampler: who takes part (`pipelines.experiment.setup.SAMPLERS`).
      cohort_size: clients a round, for the samplers uniform, weighted and cyclic.
      participation: probability of a client to take part, for bernoulli and periodic.
      period: rounds, for periodic.
      turn_on: probability of an absent client to come back, for markov.
      turn_off: probability of a present client to leave, for markov.
      rounds: number of rounds.
      eval_every: rounds between evaluations, and the rounds of one compiled call.
      checkpoint_every: rounds between checkpoints, a multiple of eval_every; the smallest from 25 on unless given.
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
      lanes: clients trained at the same time, or None for the backend's default. Like the next four it says how the
        machine is used: another one is the same run, but for its last bits.
      mesh: number of devices, or None for one without a mesh.
      model_parallel: devices that share the model of one client, a divisor of `mesh`.
      convolution: "auto", "dots" or "native" (`models.convolution`).
      memory: GiB that one device may use; None for what it has.
      x64: double precision.
      patience: evaluations without improvement on the validation examples after which a seed stops, or None.
      stop_at: accuracy on the validation examples at which a seed stops, or None.
      keep_best: keep the model that is best on the validation examples; with either of those two it is kept anyway.
      best_by: "accuracy" or "loss", which says what is better.
      clients_over_time: measure every client at every evaluation, and write clients.parquet at the end.
      target: test accuracy for which the rounds are counted.
      attack_radius: largest change of an input in an attack under which the test accuracy is measured too; 0 for none.
    """

    dataset: str = "digits"
    data_dir: str | None = None
    sequence_length: int = 80
    vocabulary: str = "characters"
    clients: int | None = 50
    partition: str = "dirichlet"
    alpha: float = 0.3
    min_size: int = 5
    shards_per_client: int = 2
    classes_per_client: int = 2
    sigma: float = 0.8
    exponent: float = 1.0
    clusters: int = 10
    imbalance: float = 1.0
    feature_skew: str = "none"
    severity: float = 1.0
    validation_share: float = 0.0
    test_share: float = 0.0
    split_by: str = "random"
    gap: int = 0
    new_clients: int = 0
    partition_seed: int = 0
    federation: str | None = None
    federation_digest: str | None = None
    staged: bool = False
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
    checkpoint_every: int = None  # type: ignore[assignment]  # until it is known what it has to be a multiple of
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
    model_parallel: int = 1
    convolution: Literal["auto", "dots", "native"] = "auto"
    memory: float | None = None
    x64: bool = False
    patience: int | None = None
    stop_at: float | None = None
    keep_best: bool = False
    best_by: Literal["accuracy", "loss"] = "accuracy"
    clients_over_time: bool = False
    target: float = 0.95
    attack_radius: float = 0.0

    def __post_init__(self) -> None:
        for name in ("methods", "hidden"):  # lists, as they come from JSON, are the same choice
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        _check_kinds(self)
        if self.checkpoint_every is None:
            every = count("eval_every", self.eval_every, _COUNTS["eval_every"])
            object.__setattr__(self, "checkpoint_every", -(-_CHECKPOINT_EVERY // every) * every)
        for name, fix in _COUNTS.items():
            value = getattr(self, name)
            if value is not None or name not in _OPTIONAL:
                count(name, value, fix)
        for i, width in enumerate(self.hidden):
            count(f"hidden[{i}]", width, "each hidden layer has at least one unit")
        for name, fix in _NUMBERS.items():
            at_least_zero(name, getattr(self, name), fix)
        seeds = f"seeds={self.seeds} of them from first_seed={self.first_seed!r}"
        if type(self.first_seed) is not int or not -LIMIT <= self.first_seed <= LIMIT - self.seeds + 1:
            raise ValueError(
                f"first_seed must be an integer from {-LIMIT} to {LIMIT}, and so the last one, got {seeds}: a seed "
                "has 32 bits, take a smaller one"
            )
        if (self.epochs is None) == (self.steps is None):
            raise ValueError(
                f"epochs={self.epochs} and steps={self.steps}: local work is counted in one or the other, give one"
            )
        for name in ("participation", "turn_on", "turn_off", "target"):
            checks.scalar(name, getattr(self, name), low=0, high=1)
        for name in _FINITE:
            finite(name, getattr(self, name))
        checks.one_of("best_by", self.best_by, ("accuracy", "loss"))
        checks.one_of("split_by", self.split_by, ("random", "position"))
        checks.one_of("order", self.order, ("shuffled", "replacement", "sequential"))
        checks.one_of("weights", self.weights, ("uniform", "examples"))
        if self.stop_at is not None:
            checks.scalar("stop_at", self.stop_at, low=0, high=1)
        if self.validates and not self.validation_share:
            asked = {"patience": self.patience, "stop_at": self.stop_at, "keep_best": self.keep_best or None}
            said = " and ".join(f"{name}={value}" for name, value in asked.items() if value is not None)
            raise ValueError(
                f"{said} with validation_share=0: stopping and the best model go by examples that clients keep back, "
                "never by test examples; give validation_share, for example 0.1"
            )
        checks.scalar("alpha", self.alpha, low=0, low_open=True)
        checks.scalar("imbalance", self.imbalance, low=1)
        checks.one_of("convolution", self.convolution, ("auto", "dots", "native"))
        if self.memory is not None:
            checks.scalar("memory", self.memory, low=0, low_open=True)
        if (self.mesh or 1) % self.model_parallel:
            raise ValueError(
                f"model_parallel={self.model_parallel} does not divide mesh={self.mesh or 1}: a mesh has "
                "model_parallel devices for every client that is trained at a time"
            )
        checks.scalar("severity", self.severity, low=0)
        checks.scalar("attack_radius", self.attack_radius, low=0)
        for name in ("validation_share", "test_share"):
            checks.scalar(name, getattr(self, name), low=0, high=1, high_open=True)
        if self.clients is None and self.partition != "natural":
            raise ValueError(
                f"clients=None (all) with partition={self.partition!r}: only natural clients can be counted, give a "
                "number, or partition natural"
            )
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
        if len(set(map(methods.folder, self.methods))) < len(self.methods):
            raise ValueError(f"methods={list(self.methods)} names one twice: name each once")
        for method in self.settings:
            pick("method in settings (of this run)", method, self.methods)
        read = {m: {k: _setting(m, k, v) for k, v in chosen.items()} for m, chosen in self.settings.items()}
        object.__setattr__(self, "settings", {m: dict(sorted(chosen.items())) for m, chosen in sorted(read.items())})
        for method in self.methods:
            client = self.client_settings(method)
            checks.scalar("client_lr", finite("client_lr", client["client_lr"]), low=0)
            checks.scalar("client_momentum", client["client_momentum"], low=0, high=1, high_open=True)
            checks.scalar("client_lr_decay", client["client_lr_decay"], low=0, high=1, low_open=True)

    @property
    def validates(self) -> bool:
        """Whether the models are scored on the validation examples at every evaluation (`pipelines.results.early`)."""
        return self.patience is not None or self.stop_at is not None or self.keep_best

    def client_settings(self, method: str) -> dict[str, Any]:
        """The options of the clients' optimizer for one method, by the names of `CLIENT_SETTINGS`."""
        own = self.settings.get(method, {})
        return {name: own.get(name, getattr(self, name)) for name in CLIENT_SETTINGS}

    def method_settings(self, method: str) -> dict[str, Value]:
        """The method's own hyper-parameters that this run sets."""
        return {k: v for k, v in self.settings.get(method, {}).items() if k not in CLIENT_SETTINGS}

    def sources(self) -> dict[str, dict[str, str]]:
        """Of each method, model and data set of the user's own, the file it is in and its sha256 (`own.sources`)."""
        return own.sources([*self.methods, self.model, *self.dataset.split("+")])

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

    def check_grown_from(self, there: "Config", out: Path) -> None:
        """Checks that this is the run `there` of the directory `out`, or that run with more of it.

        Raises:
          ValueError: with every field that makes another run (`pipelines.common.growth`).
        """
        names = [f.name for f in dataclasses.fields(self)]
        rules = {
            **dict.fromkeys((*_PLACES, *MACHINE_FIELDS, *REPORT_FIELDS), growth.free),
            "rounds": growth.at_least,
            "seeds": growth.at_least,
            "methods": growth.contains,
            "settings": growth.same_for(there.methods),
        }
        here, before = ({name: getattr(config, name) for name in names} for config in (self, there))
        can = f"more rounds, seeds and methods, and another {', '.join(REPORT_FIELDS)}"
        growth.check(out, here, before, rules, "configuration", can)

    def with_methods_of(self, there: "Config") -> "Config":
        """This configuration with the methods of a run that it is to join, first those, with their settings."""
        added = tuple(name for name in self.methods if name not in there.methods)
        own = {m: chosen for m, chosen in there.settings.items() if m not in self.methods}
        return dataclasses.replace(self, methods=(*there.methods, *added), settings={**own, **self.settings})

    def differences(self, other: "Config") -> dict[str, tuple[Any, Any]]:
        """Fields that differ and make another run: name to (here, there)."""
        return self._differences(other, (*_PLACES, *MACHINE_FIELDS))

    def _differences(self, other: "Config", but: tuple[str, ...]) -> dict[str, tuple[Any, Any]]:
        names = [f.name for f in dataclasses.fields(self) if f.name not in but]
        pairs = {name: (getattr(self, name), getattr(other, name)) for name in names}
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}

    def command(self, out: str) -> str:
        """The command line that runs this configuration in the directory `out`."""
        words = ["fedjax-core", "train"]
        for place in _PLACES:
            if getattr(self, place) is not None:
                words += ["--" + place.replace("_", "-"), getattr(self, place)]
        for name, (value, _) in self._differences(Config(), _PLACES).items():
            flag = "--" + name.replace("_", "-")
            if name == "federation_digest" or (self.federation is not None and name in FEDERATION_FIELDS):
                continue  # the saved federation says it
            if name == "clients" and value is None:
                value = "all"
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
            elif isinstance(value, bool):
                words += [flag]
            else:
                words += [flag, str(value)]
        return shlex.join([*words, "--out", out])

    def slug(self) -> str:
        """A short readable name, the same for the same configuration and for no other."""
        but = (*_PLACES, *MACHINE_FIELDS)
        values = {name: value for name, value in dataclasses.asdict(self).items() if name not in but}
        digest = sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]
        return f"{self.federation_slug()}-{own.file_name(self.model)}-{digest}"

    def federation_slug(self) -> str:
        """The readable part of that which says what the federation is."""
        skew = f"{self.alpha:g}" if self.partition == "dirichlet" else ""
        return f"{own.file_name(self.dataset)}-{'all' if self.clients is None else self.clients}-{self.partition}{skew}"

    def federation_fields(self) -> dict[str, Any]:
        """The fields that say what the federation is."""
        return {name: getattr(self, name) for name in FEDERATION_FIELDS}


FEDERATION_FIELDS = (
    "dataset",
    "sequence_length",
    "vocabulary",
    "clients",
    "partition",
    "alpha",
    "min_size",
    "shards_per_client",
    "classes_per_client",
    "sigma",
    "exponent",
    "clusters",
    "imbalance",
    "feature_skew",
    "severity",
    "validation_share",
    "test_share",
    "split_by",
    "gap",
    "new_clients",
    "partition_seed",
)
"""The fields of `Config` that say what the federation is."""

MACHINE_FIELDS = ("lanes", "mesh", "model_parallel", "convolution", "memory")
"""The fields of `Config` that say how the machine is used."""

REPORT_FIELDS = ("target", "checkpoint_every")
"""The fields of `Config` that change no number of a run: another value may be given to one that is there."""

_PLACES = ("data_dir", "federation")
_CHECKPOINT_EVERY = 25
_COUNTS = {
    "sequence_length": "a window has at least one position",
    "clients": "a federation has at least one client",
    "shards_per_client": "a client gets at least one shard",
    "classes_per_client": "a client holds at least one class",
    "clusters": "take at least one",
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
    "patience": "1 stops at the first evaluation without improvement",
    "model_parallel": "1 keeps every model whole on one device",
}
_OPTIONAL = ("clients", "epochs", "steps", "lanes", "mesh", "patience")
_NUMBERS = {
    "min_size": "0 lets clients have no examples",
    "gap": "0 leaves it out",
    "new_clients": "0 leaves it out",
    "partition_seed": "every other number is another federation",
}
_FINITE = (
    "alpha",
    "sigma",
    "exponent",
    "imbalance",
    "severity",
    "attack_radius",
    "client_lr",
)

MOST_DEVICES = 128
"""Devices for which cores may stand in; XLA ends a process in which thousands of them wait for each other."""

LIMIT = 2**31 - 1
"""The largest number of anything that is counted: devices count clients, examples, steps and rounds in 32 bits."""


def count(name: str, value: Any, fix: str) -> int:
    """Returns `value` as an int from 1 to `LIMIT`, or raises ValueError that ends with `fix`."""
    if checks.positive_int(name, value, fix) > LIMIT:
        raise ValueError(f"{name} must be at most {LIMIT}, got {value}: devices count in 32 bits, take a smaller one")
    return int(value)


def at_least_zero(name: str, value: Any, fix: str) -> int:
    """Returns `value` as an int from 0 to `LIMIT`, or raises ValueError that ends with `fix`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{name} must be an integer of at least 0, got {value!r}: {fix}")
    return value if value == 0 else count(name, value, fix)


def finite(name: str, value: Any) -> float:
    """Returns a number, or raises ValueError if it is none, NaN or infinite."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} must be a number, got {value!r}: write it as one")
    if not abs(value) <= _LARGEST:
        raise ValueError(f"{name} must be finite in single precision, got {value!r}: take another number")
    return value


_LARGEST = float.fromhex("0x1.fffffep127")
"""The largest number of single precision."""


def _check_kinds(config: Config) -> None:
    """Raises ValueError for a field that is not of the kind its default is of, where no other check would say so."""
    for each in dataclasses.fields(config):
        value, default = getattr(config, each.name), each.default
        optional = value is None and (default is None or each.name in _OPTIONAL)
        kind = str if each.name in _TEXTS else type(default)
        if kind in (str, bool, tuple) and not optional and not isinstance(value, kind):
            noun = {str: "a text", bool: "True or False", tuple: "a tuple"}[kind]
            raise ValueError(f"{each.name} must be {noun}, got {value!r}: write it as one")
        if isinstance(value, str) and "\0" in value:
            raise ValueError(f"{each.name} must not hold the character NUL, got {value!r}: leave it out")


_TEXTS = ("data_dir", "federation", "federation_digest")


def _setting(method: str, name: str, value: Value) -> Value:
    if name in CLIENT_SETTINGS:
        read = methods.read(f"{method}.{name}", value, CLIENT_SETTINGS[name])
    else:
        known = [*methods.describe(method).hyperparameters, *CLIENT_SETTINGS]
        read = methods.parse(method, pick(f"hyper-parameter of {method}", name, known), value)
    if isinstance(read, int) and abs(read) > LIMIT:
        raise ValueError(f"{method}.{name} must be within -{LIMIT} and {LIMIT}, got {read}: devices count in 32 bits")
    # NaN is not even equal to itself, so a run that was begun with it could not go on.
    return read if isinstance(read, int | str) else finite(f"{method}.{name}", read)
