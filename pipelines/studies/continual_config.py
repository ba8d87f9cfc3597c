"""Every choice of a run over several tasks."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from pipelines.common.names import pick
from pipelines.configuration.options import (
    LIMIT,
    Configuration,
    choice,
    count,
    names,
    natural,
    number,
    numbers,
    text,
    widths,
)

SCENARIOS = ("permuted", "split")
METHODS = ("fot", "fedavg", "ewc", "fedprox", "joint")


@dataclass(frozen=True, init=False)
class Continual(Configuration):
    """Configuration of a run over several tasks; the defaults make a run of seconds."""

    heading: ClassVar[str] = "Tasks"
    command_name: ClassVar[str] = "continual"

    scenario: str = choice(
        "permuted",
        SCENARIOS,
        "permuted: every task has the pixels in another order. split: every task has other classes and a head.",
    )
    dataset: str = text("digits", "Data set of images with labels.", completes=("data set",))
    data_dir: str | None = text(None, "Prepared data.", metavar="DIR", shown="$FEDJAX_CORE_DATA", role="place")
    tasks: int = count(3, "Number of tasks.", fix="take at least one")
    clients: int = count(
        20, "Number of clients, each with examples of every task.", fix="take at least one", heading="Clients"
    )
    partition: str = choice(
        "iid",
        ("iid", "shards"),
        "iid, or shards of sorted labels, two for each client; drawn anew for each task.",
        heading="Clients",
    )
    cohort_size: int = count(10, "Clients a round.", fix="take at least one", heading="Clients")
    methods: tuple[str, ...] = names(
        ("fot", "fedavg"),
        f"method of {', '.join(METHODS)}",
        "Method to run: fot, fedavg, ewc, fedprox or joint (all tasks at once); may be given several times.",
        flags=("--method",),
        heading="Methods and model",
    )
    model: str = choice("mlp", ("mlp", "cnn"), "mlp or cnn.", heading="Methods and model")
    hidden: tuple[int, ...] = widths(
        (100, 100),
        "mlp: widths of the hidden layers.",
        fix="each hidden layer has at least one unit",
        heading="Methods and model",
    )
    dropout: tuple[float, ...] | None = numbers(
        None, "mlp: rate after each of them.", shown="none", heading="Methods and model"
    )
    start: str = choice(
        "normal",
        ("normal", "uniform"),
        "First weights: normal, of variance 1 / fan in as flax has them, or uniform, a third of that, as PyTorch.",
        heading="Methods and model",
    )
    energy: float = number(0.95, "fot: share of the inputs' energy to keep.", heading="Methods and model")
    energy_step: float = number(0.0, "fot: added to it at the end of every task.", heading="Methods and model")
    rule: str = choice("norm", ("norm", "squared"), "fot: norm or squared.", heading="Methods and model")
    oversampling: int = count(
        1, "fot: columns of a sketch over the width of its layer.", fix="take at least one", heading="Methods and model"
    )
    lam: float = number(10.0, "ewc: weight of the penalty.", heading="Methods and model")
    mu: float = number(0.1, "fedprox: weight of the penalty.", heading="Methods and model")
    batch_size: int = count(16, "Examples of a local step.", fix="take at least one", heading="Local training")
    epochs: int = count(1, "Local epochs.", fix="take at least one", heading="Local training")
    client_lr: float = number(
        0.1,
        "Learning rate of the clients' SGD.",
        low=0,
        flags=("--lr", "--client-lr"),
        metavar="LR",
        heading="Local training",
    )
    weight_decay: float = number(1e-5, "Of the clients' SGD.", low=0, heading="Local training")
    rounds: int = count(30, "Rounds on each task.", fix="take at least one", heading="Run")
    seeds: int = count(
        1, "Number of seeds: of tasks, partitions, first weights and rounds.", fix="run at least one", heading="Run"
    )
    first_seed: int = natural(
        0, "Seeds are counted from here.", fix="every other number is another run", metavar="SEED", heading="Run"
    )
    checkpoint_every: int = count(
        50, "Rounds between checkpoints.", fix="1 saves after every round", role="report", heading="Run"
    )

    def __post_init__(self) -> None:
        """Raises ValueError for what is wrong whatever the data."""
        super().__post_init__()
        for name in self.methods:
            pick("method", name, METHODS)
        if self.tasks * self.rounds > LIMIT:
            raise ValueError(
                f"tasks={self.tasks} of rounds={self.rounds} are more than {LIMIT} rounds in all: devices count in 32 "
                "bits, take fewer"
            )
        if self.first_seed + self.seeds - 1 > LIMIT:
            raise ValueError(
                f"seeds={self.seeds} from first_seed={self.first_seed} go beyond {LIMIT}: a seed has 32 bits, take a "
                "smaller one"
            )

    @classmethod
    def of_before(cls, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """Knows the name of before there were several seeds."""
        return {"first_seed" if name == "seed" else name: value for name, value in values.items()}


def of_values(content: Any) -> Continual:
    """The configuration that JSON values say; those of before there were several seeds too.

    Raises:
      ValueError, TypeError or AttributeError: if it is none.
    """
    found: Continual = Continual.from_values(content)
    return found
