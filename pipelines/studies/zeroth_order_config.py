"""Every choice of a study of methods that have function values alone (`pipelines.studies.zeroth_order`)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from pipelines.common.names import pick
from pipelines.configuration.options import Configuration, choice, count, fields_of, names, number, text

ALL = ("fzoos", "fedzo", "fedprox_zo", "scaffold_zo", "fedavg", "scaffold")
"""Methods as they are chosen; of scaffold_zo both options are run."""

_FUNCTION_NAMES = ("quadratic", "ackley", "levy")
_SCORE_NAMES = ("precision", "recall", "f1", "jaccard")

_POSITIVE: dict[str, Any] = {"low": 0, "low_open": True}


@dataclass(frozen=True, init=False)
class Study(Configuration):
    """What is compared; a task is a study with choices of its own.

    Attributes:
      task: its name.
    """

    heading: ClassVar[str] = "Study"
    task: ClassVar[str] = ""

    methods: tuple[str, ...] = names(
        ALL,
        f"method of {', '.join(ALL)}",
        f"Method to run: {', '.join(ALL)}; may be given several times. fedavg and scaffold have true gradients, where "
        "there are some.",
        flags=("--method",),
        shown="all",
    )
    rounds: int = count(50, "Rounds of each method.", fix="take at least one")
    seeds: int = count(10, "Functions and starts drawn anew, a trial of each method.", fix="take at least one")
    steps: int = count(10, "Local steps of a round, T.", fix="take at least one")
    client_lr: float = number(
        0.01,
        "Learning rate of the clients' Adam, whose steps end at the faces of the box [0, 1]^d.",
        flags=("--lr", "--client-lr"),
        metavar="LR",
        **_POSITIVE,
    )
    directions: int = count(20, "Directions of a finite difference, q.", fix="take at least one", heading="Baselines")
    mu: float = number(0.01, "Length of a finite difference.", heading="Baselines", **_POSITIVE)
    radius: float = number(0.01, "Half-width of the boxes it queries in.", heading="FZooS", **_POSITIVE)
    noise: float = number(
        1e-6, "Variance that a surrogate allows a query; more for rough functions.", low=0, heading="FZooS"
    )
    neighbors: int = count(150, "Queries that a surrogate is given.", fix="take at least one", heading="FZooS")
    features: int = count(10000, "Random Fourier features, M.", fix="take at least one", heading="FZooS")
    lengthscale: float = number(
        1.0, "Of the features; longer than the way that a client goes in a round.", heading="FZooS", **_POSITIVE
    )
    correction_decay: float = number(
        1.0,
        "How fast corrections fade in a round; 0 keeps them, for very heterogeneous clients.",
        low=0,
        heading="FZooS",
    )
    capacity: int = count(1000, "Queries that a client remembers.", fix="take at least one", heading="FZooS")

    def __post_init__(self) -> None:
        """Raises ValueError for numbers that make no sense whatever the data."""
        super().__post_init__()
        for name in self.methods:
            pick("method", name, ALL)

    @classmethod
    def of_before(cls, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """Knows the names of before there were seeds, and the task, which is no choice.

        Raises:
          ValueError: if they are of a study of another task.
        """
        known = dict(values)
        task = known.pop("task", cls.task)
        if task != cls.task:
            raise ValueError(f"this is a study of the task {task!r}, and not {cls.task!r}: take the command of that")
        known |= known.pop("options", {})
        for name, before in (("seeds", "trials"), ("client_lr", "lr")):
            if before in known:
                known[name] = known.pop(before)
        return known

    def own(self) -> dict[str, Any]:
        """The choices of the task alone."""
        return {name: value for name, value in self.flat().items() if name not in fields_of(Study)}


_SIZE: dict[str, Any] = {"fix": "take at least one", "heading": "Task"}


@dataclass(frozen=True, init=False)
class Synthetic(Study):
    """Synthetic functions whose clients differ."""

    task: ClassVar[str] = "synthetic"
    command_name: ClassVar[str] = "zeroth-order synthetic"

    function: str = choice("quadratic", _FUNCTION_NAMES, "quadratic, ackley or levy.", heading="Task")
    dim: int = count(300, "Dimensions.", **_SIZE)
    clients: int = count(5, "Number of clients.", **_SIZE)
    heterogeneity: float = number(0.5, "How much clients differ.", heading="Task")


@dataclass(frozen=True, init=False)
class Attack(Study):
    """A black-box attack on the classifiers of all clients."""

    task: ClassVar[str] = "attack"
    command_name: ClassVar[str] = "zeroth-order attack"

    dataset: str = text("digits", "Images: digits, mnist or fashion_mnist.", completes=("data set",), heading="Task")
    data_dir: str | None = text(
        None, "Prepared data.", metavar="DIR", shown="$FEDJAX_CORE_DATA", role="place", heading="Task"
    )
    clients: int = count(10, "Number of clients.", **_SIZE)
    alpha: float = number(1.0, "Of the Dirichlet split; small is skewed.", heading="Task", **_POSITIVE)
    epsilon: float = number(0.3, "Largest change of a pixel in [0, 1].", heading="Task", **_POSITIVE)
    hidden: int = count(32, "Width of the classifiers' hidden layer.", **_SIZE)


@dataclass(frozen=True, init=False)
class Metric(Study):
    """A macro-averaged score of a perceptron as a function of its weights."""

    task: ClassVar[str] = "metric"
    command_name: ClassVar[str] = "zeroth-order metric"

    score: str = choice("f1", _SCORE_NAMES, "precision, recall, f1 or jaccard.", heading="Task")
    dataset: str = text("digits", "A data set that is taken as a table.", completes=("data set",), heading="Task")
    data_dir: str | None = text(
        None, "Prepared data.", metavar="DIR", shown="$FEDJAX_CORE_DATA", role="place", heading="Task"
    )
    clients: int = count(7, "Number of clients.", **_SIZE)
    alpha: float = number(10.0, "Of the Dirichlet split; small is skewed.", heading="Task", **_POSITIVE)
    pool: int = count(1, "Of images, means of squares of that many pixels.", **_SIZE)
    reach: float = number(0.2, "Largest shift of a weight.", heading="Task", **_POSITIVE)
    hidden: int = count(14, "Width of the perceptron's hidden layer.", **_SIZE)
    pretraining: int = count(3, "Rounds of FedAvg that it has had.", **_SIZE)


STUDIES: Mapping[str, type[Study]] = {kind.task: kind for kind in (Synthetic, Attack, Metric)}
"""Name of a task to its kind of study."""


def of_values(content: Any) -> Study:
    """The study that JSON values say; those of before studies were configurations too.

    Raises:
      ValueError, TypeError or AttributeError: if they say none.
    """
    kind: type[Study] = STUDIES[pick("task", content["task"], STUDIES)]
    return kind.from_values(content)
