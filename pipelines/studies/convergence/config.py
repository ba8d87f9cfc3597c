"""Every choice of a study of convergence (`pipelines.studies.convergence.study`)."""

from dataclasses import dataclass
from typing import ClassVar

from algorithms import theory
from pipelines.common.names import pick
from pipelines.configuration.options import Configuration, count, names, natural, number

ALL = tuple(theory.ALL)
"""Methods that claims are entered for."""


@dataclass(frozen=True, init=False)
class Converge(Configuration):
    """What is measured. Settings and the values of constants are those of `study.DESIGNS`."""

    heading: ClassVar[str] = "Study"
    command_name: ClassVar[str] = "converge"

    methods: tuple[str, ...] = names(
        ALL,
        f"method of {', '.join(ALL)}",
        f"Method whose theory is measured: {', '.join(ALL)}; may be given several times.",
        flags=("--method",),
        shown="all",
    )
    rounds: int = count(4000, "Rounds of each run.", fix="take at least 64")
    seeds: int = count(6, "Problems drawn anew, over which intervals are taken.", fix="take at least 2")
    first_seed: int = natural(0, "Seeds are counted from here.", fix="0 is the first")
    dim: int = count(4, "Dimensions of the problems.", fix="take at least 2")
    tolerance: float = number(
        0.15,
        "How far an exponent may be from that of theory, which is that of the leading term.",
        low=0,
        low_open=True,
        role="report",
    )

    def __post_init__(self) -> None:
        """Raises ValueError for numbers that make no study."""
        super().__post_init__()
        for name in self.methods:
            pick("method", name, ALL)
        if self.rounds < 64:
            raise ValueError(f"rounds={self.rounds} are too few to see a rate or a plateau: take at least 64")
        if self.seeds < 2:
            raise ValueError("seeds=1 has no interval, and nothing could be decided: take at least 2")
        if self.dim < 2:
            raise ValueError("dim=1 has room for one eigenvalue alone, not for L and mu: take at least 2")
