"""Every choice of a sweep (`pipelines.studies.sweep`): those of a run, and the values of its hyper-parameters.

Sweep(methods=("fedavg", "fedprox"), grid={"": {"client_lr": "0.03,0.1,0.3"}, "fedprox": {"mu": "log:0.001:1:4"}})
"""

import dataclasses
import itertools
import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from pipelines.common import growth
from pipelines.common.names import pick
from pipelines.configuration import methods
from pipelines.configuration.config import (
    CLIENT_SETTINGS,
    Config,
    FederationConfig,
    LocalConfig,
    read_setting,
)
from pipelines.configuration.methods import Value
from pipelines.configuration.options import check_grown, count, declared, named

Grid = Mapping[str, Mapping[str, tuple[Value, ...]]]
"""Method to hyper-parameter to its values."""

MOST_TRIALS = 100_000
"""Of a method."""
MOST_VALUES = 1000
"""Of a hyper-parameter."""


def short(value: Value) -> str:
    """A value in few letters, as a command line takes it."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.6g}" if isinstance(value, float) else str(value)


class Setting(NamedTuple):
    """One point of a method's grid.

    Attributes:
      values: hyper-parameter to value.
      places: hyper-parameter to (which value of its grid, of how many), counted from 1.
    """

    values: Mapping[str, Value]
    places: Mapping[str, tuple[int, int]]

    def __hash__(self) -> int:
        """That of its values, as dictionaries have none."""
        return hash(tuple(self.values.items()))

    @property
    def name(self) -> str:
        """Eight letters that are the same for the same values."""
        return growth.digest(self.values)

    def __str__(self) -> str:
        return ", ".join(f"{name}={short(value)}" for name, value in self.values.items())

    def where(self) -> str:
        """The values, each with its place in the grid."""
        return ", ".join(
            f"{name}={self.values[name]!r} (value {place} of {of})" for name, (place, of) in self.places.items()
        )


def _grid(name: str, value: Any) -> dict[str, dict[str, tuple[Value, ...]]]:
    if not isinstance(value, Mapping) or not all(isinstance(own, Mapping) for own in value.values()):
        raise ValueError(f"{name} must be method -> name -> values, got {value!r:.200}: write a table for each method")
    return {
        method: {key: _values(f"{name} of {method + '.' if method else ''}{key}", given) for key, given in own.items()}
        for method, own in value.items()
    }


def _values(name: str, given: Any) -> tuple[Value, ...]:
    """The values that a list says, or a text: `0.1,0.3`, `lin:FROM:TO:HOW_MANY` or `log:FROM:TO:HOW_MANY`."""
    if isinstance(given, str):
        kind, colon, ends = given.partition(":")
        if colon and kind.strip() in ("lin", "log"):
            return _spaced(name, kind.strip(), ends)
        found: Sequence[Any] = [part.strip() for part in given.split(",") if part.strip()]
    elif isinstance(given, bool | int | float):
        found = [given]
    elif isinstance(given, tuple | list):
        found = given
    else:
        raise ValueError(f"{name} must be a list of values, got {given!r}: write for example 0.1,0.3,1")
    if len(found) > MOST_VALUES:
        raise ValueError(f"{name} has {len(found):,} values, more than {MOST_VALUES:,}: take fewer")
    if not found:
        raise ValueError(f"{name} is empty: give at least one value, for example 0.1,0.3,1")
    for each in found:
        if not isinstance(each, bool | int | float | str):
            raise ValueError(f"{name} holds {each!r}: values are numbers, true or false, or texts")
    return tuple(found)


def _spaced(name: str, kind: str, ends: str) -> tuple[Value, ...]:
    try:
        low, high, how_many = ends.split(":")
        first, last, number = float(low), float(high), int(how_many)
    except ValueError:
        usual = f"{kind}:FROM:TO:HOW_MANY, for example {kind}:0.01:1:5"
        raise ValueError(f"{name} is {kind}:{ends}: write {usual}") from None
    if not (math.isfinite(first) and math.isfinite(last)) or not 2 <= number <= MOST_VALUES or first == last:
        raise ValueError(f"{name} is {kind}:{ends}: give two different ends, and 2 to {MOST_VALUES:,} values")
    if kind == "log" and not (first > 0 and last > 0):
        raise ValueError(f"{name} is log:{ends}: both ends of a logarithmic grid are above 0, or take lin")
    shares = [i / (number - 1) for i in range(number)]
    if kind == "lin":
        return _rounded([first + (last - first) * share for share in shares])
    return _rounded([first * (last / first) ** share for share in shares])


def _rounded(values: Sequence[float]) -> tuple[float, ...]:
    """Values but for the ends in three digits, or six where these are not enough, so that they can be named."""
    for digits in (3, 6):
        found = (values[0], *(float(f"{value:.{digits}g}") for value in values[1:-1]), values[-1])
        if len(set(found)) == len(found):
            break
    return found


@dataclass(frozen=True, init=False)
class Sweep(Config):
    """Configuration of a sweep: that of a run whose hyper-parameters have several values.

    Equal configurations give equal numbers, whatever is trained at once.
    """

    command_name: ClassVar[str] = "sweep"

    federation: FederationConfig = field(default_factory=lambda: FederationConfig(validation_share=0.1))
    grid: Mapping[str, Mapping[str, tuple[Value, ...]]] = declared(
        lambda: {"": {"client_lr": (0.03, 0.1, 0.3, 1.0)}},
        _grid,
        "Values of a hyper-parameter of one method, or of all that have it: V,V,... or lin:FROM:TO:HOW_MANY or "
        "log:FROM:TO:HOW_MANY; client_lr, client_momentum, client_lr_decay and client_weight_decay too. May be given "
        "several times: all combinations are tried.",
        flags=("--grid",),
        metavar="[METHOD.]NAME=V,V,...",
        shown="client_lr=0.03,0.1,0.3,1",
        heading="Sweep",
    )
    halving: int | None = count(
        None,
        "Successive halving: train all settings for a part of the rounds, and only the best 1/N of them on for N times "
        "as long, until the best have all rounds.",
        fix="2 keeps half of them, 3 a third",
        heading="Sweep",
    )
    at_once: int | None = count(
        None,
        "Settings, times seeds, that are trained at once.",
        fix="1 trains one after the other",
        shown="what memory allows",
        role="machine",
        heading="Sweep",
    )

    def __post_init__(self) -> None:
        """Raises ValueError for what is wrong with choices beside each other."""
        super().__post_init__()
        grid = _for_methods(self.grid, self.methods, self.local)
        for method, axes in grid.items():
            for name in axes:
                if name in self.settings.get(method, {}):
                    raise ValueError(
                        f"{method}.{name} is set to {self.settings[method][name]!r} and has a grid too: give one of "
                        "them"
                    )
        if not grid:
            raise ValueError(
                "grid is empty: give at least one hyper-parameter its values, for example --grid client_lr=0.03,0.1,0.3"
            )
        object.__setattr__(self, "grid", grid)
        for method in self.methods:
            number = math.prod(len(values) for values in grid.get(method, {}).values())
            if number * self.seeds > MOST_TRIALS:
                raise ValueError(
                    f"the grid of {method} has {number:,} settings of {self.seeds} seeds, more than {MOST_TRIALS:,} "
                    "trials: take fewer values"
                )
        if self.halving == 1:
            raise ValueError("halving=1 keeps all settings: take 2 or more, or leave it out")
        if not self.federation.validation_share:
            raise ValueError(
                "validation_share=0 with a sweep: settings are judged by examples that clients keep back, never by "
                "test examples; give validation_share, for example 0.1"
            )
        for option, given in {
            "patience": self.evaluation.patience is not None,
            "stop_at": self.evaluation.stop_at is not None,
            "keep_best": self.evaluation.keep_best,
            "clients_over_time": self.evaluation.clients_over_time,
            "staged": self.machine.staged,
            "model_parallel": self.machine.model_parallel > 1,
        }.items():
            if given:
                raise ValueError(
                    f"{option} means nothing to a sweep, in which many models are trained at once to the end: leave it "
                    "out, and give it to `fedjax-core train` with the settings that are found best"
                )

    @property
    def all_seeds(self) -> range:
        """The seeds of every setting."""
        return range(self.first_seed, self.first_seed + self.seeds)

    def settings_of_grid(self, method: str) -> list[Setting]:
        """All settings of a method, the last hyper-parameter changing fastest; one without values if it has no grid."""
        axes = self.grid.get(method, {})
        found = []
        for chosen in itertools.product(*(enumerate(values, 1) for values in axes.values())):
            pairs = list(zip(axes, chosen, strict=True))
            found.append(
                Setting(
                    {name: value for name, (_, value) in pairs},
                    {name: (place, len(axes[name])) for name, (place, _) in pairs},
                )
            )
        return found

    def rungs(self, method: str) -> list[tuple[int, int]]:
        """(rounds, settings that go on beyond them) of each rung of successive halving; the last is (all rounds, 0).

        Without halving there is no other. Rounds are multiples of those between evaluations.
        """
        left, every, factor = len(self.settings_of_grid(method)), self.evaluation.eval_every, self.halving
        found: list[tuple[int, int]] = []
        if factor is not None:
            steps = 0
            while factor ** (steps + 1) <= left and self.rounds // factor ** (steps + 1) >= every:
                steps += 1
            for step in range(steps, 0, -1):
                left = -(-left // factor)
                end = round(self.rounds / factor**step / every) * every
                if (found[-1][0] if found else 0) < end < self.rounds:
                    found.append((end, left))
        return [*found, (self.rounds, 0)]

    def config_of(self, method: str, setting: Setting) -> Config:
        """The run of `fedjax-core train` with one method and setting."""
        own = {**self.settings.get(method, {}), **setting.values}
        names = {name: value for name, value in self.flat().items() if name not in _OWN}
        return Config(**{**names, "methods": (method,), "settings": {method: own} if own else {}})

    def words(self, but: Collection[str] = ()) -> list[str]:
        """The options of the command line that make this configuration of the default one."""
        grid = [
            word
            for method, axes in self.grid.items()
            for name, values in axes.items()
            for word in ("--grid", f"{method}.{name}={','.join(map(_word, values))}")
        ]
        return [*super().words([*but, "grid"]), *grid]

    def check_grown_from(self, there: Config, out: Path) -> None:
        """Checks that this is the sweep `there` of the directory `out`, or that sweep with more of it.

        Raises:
          ValueError: with every choice that makes another sweep.
        """
        rules: dict[str, growth.Rule] = {"settings": growth.same_for(there.methods), "methods": growth.contains}
        if self.halving is None:
            rules |= {"seeds": growth.at_least, "grid": _more_values}
        else:  # who goes on depends on all of them
            rules |= {"grid": growth.same_for(there.methods)}
        can = "more methods" if self.halving else "more methods, values and seeds"
        check_grown(self, there, out, rules, "sweep", can)

    def joined(self, there: "Sweep") -> "Sweep":
        """This sweep with the methods, values, settings and seeds of one that it is to join.

        Raises:
          ValueError: if a method has other hyper-parameters in its grid there.
        """
        own = dict(self.grid)
        for method, axes in there.grid.items():
            if method in own and list(own[method]) != list(axes):
                raise ValueError(
                    f"the grid of {method} is over {', '.join(own[method])} here and over {', '.join(axes)} in the "
                    "sweep that it is to join: give values of the same hyper-parameters, in this order, or another "
                    "--out"
                )
            here = own.get(method, {})
            own[method] = {name: _union(values, here.get(name, ())) for name, values in axes.items()}
        added = tuple(name for name in self.methods if name not in there.methods)
        settings = {m: chosen for m, chosen in there.settings.items() if m not in self.methods}
        return self.replace(
            methods=(*there.methods, *added),
            grid=own,
            settings={**settings, **self.settings},
            seeds=max(self.seeds, there.seeds),
        )

    def slug(self) -> str:
        """A short readable name, the same for more methods, values and seeds of a sweep and for no other."""
        but = {*named(Sweep, "place", "machine", "report"), "methods", "settings", "grid", "seeds"}
        digest = growth.digest(json.loads(json.dumps(self.flat())), but)
        return f"sweep-{self.federation_slug()}-{methods.folder(self.model)}-{digest}"


_OWN = ("grid", "halving", "at_once")


def _for_methods(
    grid: Mapping[str, Mapping[str, Any]], chosen: Sequence[str], local: LocalConfig
) -> dict[str, dict[str, tuple[Value, ...]]]:
    """The grid of every method: what is said of all goes to those that have it, what is said of one goes before."""
    for method in grid:
        if method:
            pick("method in grid (of this sweep)", method, chosen)
    having = {m: {*methods.describe(m).hyperparameters, *CLIENT_SETTINGS} for m in chosen}
    for name in grid.get("", {}):
        if not any(name in known for known in having.values()):
            pick(f"hyper-parameter in grid, of {', '.join(chosen)}", name, sorted(set().union(*having.values())))
    found = {}
    for method in chosen:
        shared = {name: values for name, values in grid.get("", {}).items() if name in having[method]}
        axes = {**shared, **grid.get(method, {})}
        read = {name: _read(method, name, values, local) for name, values in axes.items()}
        if read:
            found[method] = read
    return found


def _more_values(here: Grid, there: Grid) -> str:
    for method, axes in there.items():
        if list(here.get(method, {})) != list(axes):
            return f"that of {method} is over {', '.join(axes)}"
        for name, values in axes.items():
            if missing := [str(value) for value in values if value not in here[method][name]]:
                return f"what is there stays: give {method}.{name} {', '.join(missing)} too"
    return ""


def _read(method: str, name: str, values: Sequence[Any], local: LocalConfig) -> tuple[Value, ...]:
    read = []
    for place, value in enumerate(values, 1):
        try:
            each = read_setting(method, name, value)
            if name in CLIENT_SETTINGS:
                dataclasses.replace(local, **dict[str, Any]({name: each}))  # checks it
        except ValueError as error:
            raise ValueError(f"grid of {method}.{name}, value {place} of {len(values)}: {error}") from None
        if each in read:
            raise ValueError(f"grid of {method}.{name} names {each!r} twice: name each value once")
        read.append(each)
    return tuple(read)


def _union(there: Sequence[Value], here: Sequence[Value]) -> tuple[Value, ...]:
    """Both, numbers in order, so that neighbors on an axis are neighbors."""
    both = list(dict.fromkeys([*there, *here]))
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in both)
    return tuple(sorted(both)) if numbers else tuple(both)


def _word(value: Value) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
