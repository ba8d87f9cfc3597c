"""What a run is: every choice that can change a number, as plain values that survive JSON."""

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pipelines.common import growth, own
from pipelines.common.names import pick
from pipelines.configuration import methods
from pipelines.configuration.methods import Value
from pipelines.configuration.options import (
    LIMIT,
    Configuration,
    Section,
    check_grown,
    choice,
    count,
    declared,
    fields_of,
    finite,
    named,
    names,
    natural,
    number,
    switch,
    text,
    widths,
)

CLIENT_SETTINGS: Mapping[str, Value] = {
    "client_lr": 0.2,
    "client_momentum": 0.0,
    "client_lr_decay": 1.0,
    "client_weight_decay": 0.0,
}
"""Options of the clients' optimizer that `settings` may give per method, beside the method's own."""

MOST_DEVICES = 128
"""Devices for which cores may stand in; XLA ends a process in which thousands of them wait for each other."""

_CHECKPOINT_EVERY = 25


@dataclass(frozen=True)
class DataConfig(Section):
    """The examples."""

    heading: ClassVar[str] = "Data"

    dataset: str = text(
        "digits",
        "Data set, or several joined by + as domains; a .npz file; your own, as module:function.",
        completes=("data set",),
    )
    data_dir: str | None = text(None, "Prepared data.", metavar="DIR", shown="$FEDJAX_CORE_DATA", role="place")
    sequence_length: int = count(80, "Text: positions of an example.", fix="a window has at least one position")
    vocabulary: str = text("characters", "Text: characters, bytes or a file of tokenizers.")


@dataclass(frozen=True)
class FederationConfig(Section):
    """Who holds which examples. All seeds of a run share the federation.

    `directory` is that of a saved federation to use instead of all the others, and `digest` tells it from others
    (`pipelines.federation.federations`). Without a directory the digest, if there is one, pins what the others make.
    """

    heading: ClassVar[str] = "Clients"

    clients: int | None = count(
        50, "Number of clients; natural: or all.", fix="a federation has at least one client", optional=True, none="all"
    )
    partition: str = text(
        "dirichlet",
        "Who holds which examples: iid, dirichlet, shards, classes, partial_classes, lognormal, lognormal_classes, "
        "power_law, natural, domains, clusters or embedding; `fedjax-core list` says what they are.",
        completes=("partition",),
    )
    alpha: float = number(
        0.3,
        "dirichlet, partial_classes, clusters, embedding: small is more skewed.",
        low=0,
        low_open=True,
        metavar="A",
    )
    min_size: int = natural(
        5, "Fewest examples of a client, where it can be said.", fix="0 lets clients have no examples"
    )
    shards_per_client: int = count(2, "shards: shards of a client.", fix="a client gets at least one shard")
    classes_per_client: int = count(
        2, "classes, partial_classes, lognormal_classes: its classes.", fix="a client holds at least one class"
    )
    sigma: float = number(0.8, "lognormal, lognormal_classes: deviation of the logarithm of sizes.", metavar="S")
    exponent: float = number(1.0, "power_law: of the sizes.", metavar="A")
    clusters: int = count(10, "embedding: number of clusters.", fix="take at least one")
    public_share: float = number(
        0.0,
        "Share of the training examples that the server holds, without labels, for methods with public data.",
        low=0,
        high=1,
        high_open=True,
        metavar="P",
    )
    pool: bool = switch("The data set's own test examples join those that clients are given; needs --test-share.")
    imbalance: float = number(1.0, "Long tail: largest over smallest class.", low=1, metavar="F")
    feature_skew: str = text("none", "What clients do to their inputs, such as rotation.", completes=("feature skew",))
    severity: float = number(1.0, "Strength of the feature skew.", low=0, metavar="S")
    validation_share: float = number(
        0.0, "Share of a client's examples kept back.", low=0, high=1, high_open=True, metavar="P"
    )
    test_share: float = number(0.0, "Share kept to test it.", low=0, high=1, high_open=True, metavar="P")
    split_by: str = choice("random", ("random", "position"), "How they are taken: random or position.")
    gap: int = natural(0, "position: examples dropped between the parts.", fix="0 leaves it out")
    new_clients: int = natural(0, "Clients that take no part in training, tested at the end.", fix="0 leaves it out")
    partition_seed: int = natural(
        0, "Seed of all of this.", fix="every other number is another federation", metavar="SEED"
    )
    directory: str | None = text(
        None,
        "A federation saved by `fedjax-core federate`, instead of all that.",
        name="federation",
        metavar="DIR",
        role="place",
    )
    digest: str | None = text(None, "Digest that the federation must have.", name="federation_digest", metavar="SHA256")


@dataclass(frozen=True)
class ParticipationConfig(Section):
    """Who takes part in a round."""

    heading: ClassVar[str] = "Participation"

    sampler: str = text(
        "uniform",
        "Who takes part in a round: uniform, weighted (by size), full, bernoulli, cyclic, periodic or markov.",
        completes=("sampler",),
    )
    cohort_size: int = count(10, "uniform, weighted, cyclic: clients a round.", fix="a round needs at least one client")
    probability: float = number(
        0.2, "bernoulli, periodic: share of rounds.", low=0, high=1, name="participation", metavar="P"
    )
    period: int = count(10, "periodic: rounds of a period.", fix="a period is a number of rounds")
    turn_on: float = number(0.1, "markov: probability to come back.", low=0, high=1, metavar="P")
    turn_off: float = number(0.4, "markov: probability to leave.", low=0, high=1, metavar="P")


@dataclass(frozen=True)
class LocalConfig(Section):
    """What a client does in a round: local epochs or local steps of its optimizer."""

    heading: ClassVar[str] = "Local training"

    batch_size: int = count(10, "Examples of a local step.", fix="each local step needs at least one example")
    epochs: int | None = count(5, "Local epochs.", fix="to leave clients out, sample fewer", optional=True)
    steps: int | None = count(None, "Local steps, instead of epochs.", fix="to leave clients out, sample fewer")
    order: str = choice(
        "shuffled",
        ("shuffled", "replacement", "sequential"),
        "Order of examples: shuffled, replacement or sequential.",
    )
    weights: str = choice("uniform", ("uniform", "examples"), "Weights of clients in averages: uniform or examples.")
    statistics: str = choice(
        "average",
        ("average", "personal", "frozen"),
        "Running statistics of batch normalization: average, personal or frozen.",
    )
    client_optimizer: str = text("sgd", "sgd, adam or adamw.", completes=("client optimizer",))
    client_lr: float = number(0.2, "Learning rate of the clients.", low=0, flags=("--lr", "--client-lr"), metavar="LR")
    client_momentum: float = number(0.0, "Momentum of the clients (sgd).", low=0, high=1, high_open=True, metavar="M")
    client_lr_decay: float = number(
        1.0, "Factor on the learning rate after every round.", low=0, high=1, low_open=True, metavar="F"
    )
    client_weight_decay: float = number(
        0.0, "Weight decay of the clients, of their loss (adamw: of its own, 1e-4 where this is 0).", low=0, metavar="F"
    )

    def __post_init__(self) -> None:
        """Raises ValueError for what is wrong with these."""
        super().__post_init__()
        if (self.epochs is None) == (self.steps is None):
            raise ValueError(
                f"epochs={self.epochs} and steps={self.steps}: local work is counted in one or the other, give one"
            )


@dataclass(frozen=True)
class EvaluationConfig(Section):
    """When and how models are tested, and when a seed stops."""

    heading: ClassVar[str] = "Evaluation"

    eval_every: int = count(
        5, "Rounds between evaluations, and of one compiled call.", fix="1 evaluates after every round"
    )
    patience: int | None = count(
        None,
        "Stop a seed after N evaluations without improvement on the validation part; needs --validation-share.",
        fix="1 stops at the first evaluation without improvement",
    )
    stop_at: float | None = number(
        None, "Stop a seed at this accuracy on the validation part.", low=0, high=1, metavar="ACCURACY"
    )
    keep_best: bool = switch("Keep the model that is best on the validation part; --patience and --stop-at do so too.")
    best_by: str = choice("accuracy", ("accuracy", "loss"), "What is best there: accuracy or loss.")
    clients_over_time: bool = switch("Measure every client at every evaluation, and write clients.parquet at the end.")
    evaluate: tuple[str, ...] = names(
        (),
        "view",
        "Views to evaluate, such as global,personal: the model of all, and what each client would use on examples of "
        "its own. The first that the method is made for is the one that is plotted and decides.",
        may_be_empty=True,
        metavar="VIEW,VIEW",
        shown="those that each method has",
    )
    evaluate_clients: int | None = count(
        None,
        "Clients to test, drawn once, in views in which clients differ.",
        fix="test at least one client",
        shown="all",
    )
    attack_radius: float = number(
        0.0,
        "Largest change of an input in an attack under which test accuracy is measured too; 0 for none.",
        low=0,
        metavar="R",
    )

    @property
    def validates(self) -> bool:
        """Whether the models are scored on the validation examples at every evaluation (`pipelines.results.early`)."""
        return self.patience is not None or self.stop_at is not None or self.keep_best


@dataclass(frozen=True)
class ReportConfig(Section):
    """What changes no number of a run: other values may be given to one that is there."""

    heading: ClassVar[str] = "Report"

    target: float = number(
        0.95,
        "Test accuracy for which rounds are counted.",
        low=0,
        high=1,
        metavar="ACCURACY",
        role="report",
    )
    checkpoint_every: int = count(
        None,
        "Rounds between checkpoints, a multiple of --eval-every.",
        fix="take a multiple of eval_every",
        shown="25, or the next multiple",
        role="report",
    )


@dataclass(frozen=True)
class MachineConfig(Section):
    """How the hardware is used. Most of it changes nothing but last bits; `x64` changes more."""

    heading: ClassVar[str] = "Machine"

    mesh: int | None = count(
        None,
        "Devices to spread the cohort over; on the processor cores stand in for them.",
        fix="a mesh has at least one device",
        shown="all",
        role="machine",
    )
    lanes: int | None = count(
        None,
        "Clients trained at the same time.",
        fix="1 trains one client after another",
        shown="one a core on the processor, else tried out once",
        role="machine",
    )
    model_parallel: int = count(
        1,
        "Devices of the mesh that share a client's model.",
        fix="1 keeps every model whole on one device",
        role="machine",
    )
    convolution: Literal["auto", "dots", "native"] = choice(
        "auto", ("auto", "dots", "native"), "auto (tried out on a GPU), dots or native.", role="machine"
    )
    memory: float | None = number(
        None,
        "What one device may use.",
        low=0,
        low_open=True,
        metavar="GIB",
        shown="what it has",
        role="machine",
    )
    staged: bool = switch("Keep examples and client state in host memory; each cohort is brought to the device.")
    x64: bool = switch("Double precision.")

    def __post_init__(self) -> None:
        """Raises ValueError for what is wrong with these."""
        super().__post_init__()
        if (self.mesh or 1) % self.model_parallel:
            raise ValueError(
                f"model_parallel={self.model_parallel} does not divide mesh={self.mesh or 1}: a mesh has "
                "model_parallel devices for every client that is trained at a time"
            )


def _settings(name: str, value: Any) -> dict[str, dict[str, Value]]:
    if not isinstance(value, Mapping) or not all(isinstance(chosen, Mapping) for chosen in value.values()):
        raise ValueError(f"{name} must be method -> name -> value, got {value!r:.200}: write a table for each method")
    return {method: dict(chosen) for method, chosen in value.items()}


def _first_seed(name: str, value: Any) -> int:
    if type(value) is not int or not -LIMIT <= value <= LIMIT:
        raise ValueError(
            f"{name} must be an integer from {-LIMIT} to {LIMIT}, got {value!r}: a seed has 32 bits, take a smaller one"
        )
    return value


@dataclass(frozen=True, init=False)
class Config(Configuration):
    """Configuration of a run. Equal configurations give equal numbers.

    Config(dataset="iris", clients=6, cohort_size=3, rounds=20)
    Config(data=DataConfig(dataset="iris"), rounds=20)
    """

    heading: ClassVar[str] = "Methods and model"
    command_name: ClassVar[str] = "train"

    data: DataConfig = field(default_factory=DataConfig)
    federation: FederationConfig = field(default_factory=FederationConfig)
    methods: tuple[str, ...] = names(
        ("fedavg", "scaffold", "fedadam"),
        "method, see `fedjax-core list`",
        "Method to run, or your own as module:function; may be given several times.",
        flags=("--method",),
        completes=("method",),
        shown="fedavg, scaffold, fedadam",
    )
    settings: Mapping[str, Mapping[str, Value]] = declared(
        dict,
        _settings,
        "Hyper-parameter of one method, or of all that have it; also client_lr, client_momentum, "
        "client_lr_decay and client_weight_decay. May be given several times.",
        flags=("--set",),
        metavar="[METHOD.]NAME=VALUE",
    )
    model: str = text(
        "mlp",
        "Model; `fedjax-core list` shows them. Your own: module:function.",
        completes=("model",),
    )
    models: tuple[str, ...] = names(
        (),
        "model",
        "Models of clients that differ in architecture, such as mlp,cnn, instead of --model: client i has number i "
        "modulo their number.",
        may_be_empty=True,
        metavar="NAME,NAME",
        completes=("model",),
    )
    hidden: tuple[int, ...] = widths(
        (100,),
        "mlp: widths of the hidden layers; the last is that of features of all --models that can have it.",
        fix="each hidden layer has at least one unit",
    )
    participation: ParticipationConfig = field(default_factory=ParticipationConfig)
    local: LocalConfig = field(default_factory=LocalConfig)
    rounds: int = count(200, "Number of rounds.", fix="run at least one round", heading="Run")
    seeds: int = count(5, "Number of seeds, run at once.", fix="run at least one seed", heading="Run")
    first_seed: int = declared(0, _first_seed, "Seeds are counted from here.", metavar="SEED", heading="Run")
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    machine: MachineConfig = field(default_factory=MachineConfig)

    def __post_init__(self) -> None:
        """Raises ValueError for what is wrong with choices beside each other."""
        super().__post_init__()
        for name in self.methods:
            methods.check_runs(name, self.model)
        if self.first_seed > LIMIT - self.seeds + 1:
            raise ValueError(
                f"first_seed must be an integer from {-LIMIT} to {LIMIT}, and so the last one, got seeds={self.seeds} "
                f"of them from first_seed={self.first_seed!r}: a seed has 32 bits, take a smaller one"
            )
        _check_validation(self.evaluation, self.federation)
        _check_models(self.methods, self.models)
        for name in self.methods:
            if methods.asks_for(name, "public") and not self.federation.public_share:
                raise ValueError(
                    f"{name} needs public data and public_share={self.federation.public_share:g} leaves none: give "
                    "public_share, for example 0.1"
                )
        if self.federation.clients is None and self.federation.partition != "natural":
            raise ValueError(
                f"clients=None (all) with partition={self.federation.partition!r}: only natural clients can be "
                "counted, give a number, or partition natural"
            )
        object.__setattr__(self, "report", _with_checkpoints(self.report, self.evaluation.eval_every))
        if len(set(map(methods.folder, self.methods))) < len(self.methods):
            raise ValueError(f"methods={list(self.methods)} names one twice: name each once")
        for method in self.settings:
            pick("method in settings (of this run)", method, self.methods)
        read = {m: {k: read_setting(m, k, v) for k, v in chosen.items()} for m, chosen in self.settings.items()}
        object.__setattr__(self, "settings", {m: dict(sorted(chosen.items())) for m, chosen in sorted(read.items())})
        for method in self.methods:
            dataclasses.replace(self.local, **self.client_settings(method))  # checks them

    def __hash__(self) -> int:
        """That of the JSON text, as settings are dictionaries."""
        return hash(self.to_json())

    def replace(self, **choices: Any) -> Self:
        """This configuration with other choices, by their names.

        Steps take the place of epochs, and the other way round; rounds between checkpoints that no longer are a
        multiple of those between evaluations are chosen anew.

        Raises:
          ValueError: as the constructor.
          TypeError: likewise.
        """
        for one, other in (("steps", "epochs"), ("epochs", "steps")):
            if choices.get(one) is not None:
                choices.setdefault(other, None)
        every = choices.get("eval_every")
        if isinstance(every, int) and every > 0 and self.report.checkpoint_every % every:
            choices.setdefault("checkpoint_every", None)
        return super().replace(**choices)

    @property
    def all_models(self) -> tuple[str, ...]:
        """Names of the models of this run: one, or one for each group of clients."""
        return self.models or (self.model,)

    def client_settings(self, method: str) -> dict[str, Any]:
        """The options of the clients' optimizer for one method, by the names of `CLIENT_SETTINGS`."""
        own = self.settings.get(method, {})
        return {name: own.get(name, getattr(self.local, name)) for name in CLIENT_SETTINGS}

    def method_settings(self, method: str) -> dict[str, Value]:
        """The method's own hyper-parameters that this run sets."""
        return {k: v for k, v in self.settings.get(method, {}).items() if k not in CLIENT_SETTINGS}

    def sources(self) -> dict[str, dict[str, str]]:
        """Of each method, model and data set of the user's own, the file it is in and its sha256 (`own.sources`)."""
        return own.sources([*self.methods, *self.all_models, *self.data.dataset.split("+")])

    def check_grown_from(self, there: "Config", out: Path) -> None:
        """Checks that this is the run `there` of the directory `out`, or that run with more of it.

        Raises:
          ValueError: with every choice that makes another run (`pipelines.common.growth`).
        """
        rules = {
            "rounds": growth.at_least,
            "seeds": growth.at_least,
            "methods": growth.contains,
            "settings": growth.same_for(there.methods),
        }
        can = f"more rounds, seeds and methods, and another {', '.join(named(Config, 'report'))}"
        check_grown(self, there, out, rules, "configuration", can)

    def with_methods_of(self, there: "Config") -> "Config":
        """This configuration with the methods of a run that it is to join, first those, with their settings."""
        added = tuple(name for name in self.methods if name not in there.methods)
        own = {m: chosen for m, chosen in there.settings.items() if m not in self.methods}
        views = self.evaluation.evaluate or there.evaluation.evaluate
        return dataclasses.replace(
            self,
            methods=(*there.methods, *added),
            settings={**own, **self.settings},
            evaluation=dataclasses.replace(self.evaluation, evaluate=views),
        )

    def differences(self, other: "Config") -> dict[str, tuple[Any, Any]]:
        """Choices that differ and make another run: name to (here, there)."""
        here, there = self.flat(), other.flat()
        free = named(Config, "place", "machine")
        return {name: (here[name], there[name]) for name in here if here[name] != there[name] and name not in free}

    def words(self, but: Collection[str] = ()) -> list[str]:
        """The options of the command line that make this configuration of the default one."""
        saved = self.federation.directory is not None  # it says what the federation is
        settings = [
            word for m, chosen in self.settings.items() for k, v in chosen.items() for word in ("--set", f"{m}.{k}={v}")
        ]
        own = (*FEDERATION_FIELDS, "federation_digest") if saved else ()
        return [*super().words([*but, "settings", *own]), *settings]

    def slug(self) -> str:
        """A short readable name, the same for the same configuration and for no other."""
        # Choices that there were not always do not change the name of a run that leaves them alone.
        later = [name for name, usual in _LATER.items() if self.flat()[name] == usual]
        digest = growth.digest(self.flat(), [*named(Config, "place", "machine"), *later])
        return f"{self.federation_slug()}-{'-'.join(map(own.file_name, self.all_models))}-{digest}"

    def federation_slug(self) -> str:
        """The readable part of that which says what the federation is."""
        clients, partition = self.federation.clients, self.federation.partition
        skew = f"{self.federation.alpha:g}" if partition == "dirichlet" else ""
        return f"{own.file_name(self.data.dataset)}-{'all' if clients is None else clients}-{partition}{skew}"

    def federation_fields(self) -> dict[str, Any]:
        """The choices that say what the federation is."""
        return {name: value for name, value in self.flat().items() if name in FEDERATION_FIELDS}


_LATER: Mapping[str, Any] = {
    "evaluate": (),
    "evaluate_clients": None,
    "statistics": "average",
    "public_share": 0.0,
    "pool": False,
    "models": (),
    "client_weight_decay": 0.0,
}

FEDERATION_FIELDS = tuple(
    name
    for name, each in fields_of(Config).items()
    if each.path[0] in ("data", "federation") and each.option.role == "result" and name != "federation_digest"
)
"""Names of the choices that say what a federation is."""


def _check_models(chosen: Collection[str], of_groups: tuple[str, ...]) -> None:
    for name in chosen:
        in_groups = methods.asks_for(name, "tasks")
        if in_groups and len(of_groups) < 2:
            raise ValueError(
                f"{name} is for clients that differ in architecture, and models={list(of_groups)} names "
                f"{len(of_groups) or 'none'}: give two or more, for example --models mlp,cnn"
            )
        if of_groups and not in_groups:
            takers = [each for each in methods.names() if methods.asks_for(each, "tasks")]
            raise ValueError(
                f"models={list(of_groups)} are for clients that differ in architecture, and {name} has one model for "
                f"all: take {', '.join(takers)}, or --model in the place of --models"
            )


def _check_validation(evaluation: EvaluationConfig, federation: FederationConfig) -> None:
    if not evaluation.validates or federation.validation_share:
        return
    asked = {"patience": evaluation.patience, "stop_at": evaluation.stop_at, "keep_best": evaluation.keep_best or None}
    said = " and ".join(f"{name}={value}" for name, value in asked.items() if value is not None)
    raise ValueError(
        f"{said} with validation_share=0: stopping and the best model go by examples that clients keep back, never by "
        "test examples; give validation_share, for example 0.1"
    )


def _with_checkpoints(report: ReportConfig, eval_every: int) -> ReportConfig:
    """The report with a number of rounds between checkpoints that is a multiple of those between evaluations."""
    if report.checkpoint_every is None:  # left to us
        return dataclasses.replace(report, checkpoint_every=-(-_CHECKPOINT_EVERY // eval_every) * eval_every)
    if report.checkpoint_every % eval_every:
        raise ValueError(
            f"checkpoint_every={report.checkpoint_every} is no multiple of eval_every={eval_every}: checkpoints are "
            f"made at evaluations, take {-(-report.checkpoint_every // eval_every) * eval_every}"
        )
    return report


def read_setting(method: str, name: str, value: Value) -> Value:
    """A hyper-parameter of a method, or of the clients' optimizer, with the type of its default.

    Raises:
      ValueError: if there is none of that name, with the nearest, or the value does not fit.
    """
    if name in CLIENT_SETTINGS:
        read = methods.read(f"{method}.{name}", value, CLIENT_SETTINGS[name])
    else:
        known = [*methods.describe(method).hyperparameters, *CLIENT_SETTINGS]
        read = methods.parse(method, pick(f"hyper-parameter of {method}", name, known), value)
    if isinstance(read, int) and abs(read) > LIMIT:
        raise ValueError(f"{method}.{name} must be within -{LIMIT} and {LIMIT}, got {read}: devices count in 32 bits")
    # NaN is not even equal to itself, so a run that was begun with it could not go on.
    return read if isinstance(read, int | str) else finite(f"{method}.{name}", read)
