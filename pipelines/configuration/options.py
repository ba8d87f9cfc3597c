"""Choices declared once, as fields of dataclasses: checks, options, files, commands and documentation are made of them.

    @dataclass(frozen=True)
    class Local(Section):
        heading = "Local training"
        batch_size: int = count(10, "Examples of a local step.", fix="each step needs at least one")
        client_lr: float = number(0.2, "Learning rate of the clients.", low=0, flags=("--lr", "--client-lr"))

    @dataclass(frozen=True)
    class Config(Configuration):
        local: Local = field(default_factory=Local)
        rounds: int = count(200, "Number of rounds.", fix="run at least one")

A field has a default, the text that the help shows, and a check. Every choice has a name of its own in the whole of a
configuration, so that a command line, a flat file or `Config(client_lr=0.1)` need not say which section it is in.
"""

import dataclasses
import functools
import json
import shlex
import typing
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any, ClassVar, Literal, NamedTuple, Self

from fedjax_core import checks
from pipelines.common import growth
from pipelines.common.names import pick

Check = Callable[[str, Any], Any]
"""`check(name, value)` returns the value as it is kept, or raises ValueError that names it."""

Role = Literal["result", "machine", "place", "report"]
"""What a choice can change: "result", the numbers of a run; "machine", their last bits, for it says how the hardware is
used; "place", nothing, it says where something lies; "report", nothing but what is written about the numbers."""

LIMIT = checks.LARGEST_INT
"""The largest number of anything that is counted: devices count clients, examples, steps and rounds in 32 bits."""


@dataclass(frozen=True)
class Option:
    """What is declared with a field.

    Attributes:
      help: the text about it.
      check: of a value.
      flags: options of the command line, the first of which is shown; by the field's name unless given.
      hidden: whether it is no option of the command line.
      name: name in flat files and of the option, the field's own unless given.
      metavar: what stands for the value in the help.
      completes: kinds of things whose names a shell completes.
      none: the word for None, where it has one.
      shown: what the help says of the default, unless it is the default.
      role: see `Role`.
      heading: heading of the help, that of the section unless given.
      parse: the value of a text, where its type does not say it.
    """

    help: str
    check: Check
    flags: tuple[str, ...] = ()
    hidden: bool = False
    name: str = ""
    metavar: str = ""
    completes: tuple[str, ...] = ()
    none: str = ""
    shown: str = ""
    role: Role = "result"
    heading: str = ""
    parse: Callable[[str], Any] | None = None


def declared(default: Any, check: Check, help: str, **option: Any) -> Any:
    """A field that is an option, see `Option`; its default, or what makes it."""
    metadata = {"option": Option(help, check, **option)}
    if callable(default):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


# The kinds of choices.


def count(default: int | None, help: str, *, fix: str, optional: bool = False, **option: Any) -> Any:
    """An integer from 1 to `LIMIT`; None if that is the default or it is optional."""

    def check(name: str, value: Any) -> int | None:
        return None if value is None and (optional or default is None) else checks.positive_int(name, value, fix)

    return declared(default, check, help, **{"metavar": "N"} | option)


def natural(default: int, help: str, *, fix: str, **option: Any) -> Any:
    """An integer from 0 to `LIMIT`."""

    def check(name: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ValueError(f"{name} must be an integer of at least 0, got {value!r}: {fix}")
        return value if value == 0 else checks.positive_int(name, value, fix)

    return declared(default, check, help, **{"metavar": "N"} | option)


def number(
    default: float | None,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    low_open: bool = False,
    high_open: bool = False,
    **option: Any,
) -> Any:
    """A number that single precision can hold, in an interval if ends are given; None if that is the default."""
    ends: dict[str, Any] = {name: end for name, end in (("low", low), ("high", high)) if end is not None}

    def check(name: str, value: Any) -> float | None:
        if value is None and default is None:
            return None
        checks.scalar(name, finite(name, value), low_open=low_open, high_open=high_open, **ends)
        return float(value)

    return declared(default, check, help, **{"metavar": "X"} | option)


def text(default: str | None, help: str, **option: Any) -> Any:
    """A text; None if that is the default."""

    def check(name: str, value: Any) -> str | None:
        return None if value is None and default is None else written(name, value)

    return declared(default, check, help, **{"metavar": "NAME"} | option)


def choice(default: str, choices: tuple[str, ...], help: str, **option: Any) -> Any:
    """One of some names."""
    return declared(
        default, lambda name, value: pick(name, written(name, value), choices), help, metavar="NAME", **option
    )


def switch(help: str, **option: Any) -> Any:
    """On or off, off by default."""

    def check(name: str, value: Any) -> bool:
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be True or False, got {value!r}: write it as one")
        return value

    return declared(False, check, help, **option)


def names(default: tuple[str, ...], kind: str, help: str, *, may_be_empty: bool = False, **option: Any) -> Any:
    """A list of names, none twice and at least one unless told; on the command line the option is given for each."""

    def check(name: str, value: Any) -> tuple[str, ...]:
        found = _tuple(name, value)
        if not found and not may_be_empty:
            raise ValueError(f"{name} is empty: name at least one {kind}")
        for each in found:
            written(name, each)
        if len(set(found)) < len(found):
            raise ValueError(f"{name}={list(found)} names one twice: name each once")
        return found

    return declared(default, check, help, parse=_split, **{"metavar": "NAME"} | option)


def widths(default: tuple[int, ...], help: str, *, fix: str, **option: Any) -> Any:
    """A list of integers of at least 1, separated by commas on the command line."""

    def check(name: str, value: Any) -> tuple[int, ...]:
        return tuple(checks.positive_int(f"{name}[{i}]", each, fix) for i, each in enumerate(_tuple(name, value)))

    return declared(default, check, help, parse=functools.partial(_list, int), **{"metavar": "N,N,..."} | option)


def numbers(default: tuple[float, ...] | None, help: str, **option: Any) -> Any:
    """A list of numbers, separated by commas on the command line; None if that is the default."""

    def check(name: str, value: Any) -> tuple[float, ...] | None:
        if value is None and default is None:
            return None
        return tuple(float(finite(f"{name}[{i}]", each)) for i, each in enumerate(_tuple(name, value)))

    return declared(default, check, help, parse=functools.partial(_list, float), **{"metavar": "X,X,..."} | option)


def finite(name: str, value: Any) -> float:
    """Returns a number, or raises ValueError if it is none, NaN or infinite."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} must be a number, got {value!r}: write it as one")
    if not abs(value) <= _LARGEST:
        raise ValueError(f"{name} must be finite in single precision, got {value!r}: take another number")
    return value


_LARGEST = float.fromhex("0x1.fffffep127")
"""The largest number of single precision."""


def written(name: str, value: Any) -> str:
    """Returns a text, or raises ValueError if it is none or has the character NUL."""
    if not isinstance(value, str):
        raise ValueError(f"{name} must be a text, got {value!r}: write it as one")
    if "\0" in value:
        raise ValueError(f"{name} must not hold the character NUL, got {value!r}: leave it out")
    return value


def _tuple(name: str, value: Any) -> tuple[Any, ...]:
    if not isinstance(value, tuple | list):
        raise ValueError(f"{name} must be a tuple, got {value!r}: write it as one")
    return tuple(value)


def _split(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _list(kind: type, text: str) -> tuple[Any, ...]:
    try:
        return tuple(kind(part) for part in text.split(",")) if text.strip() else ()
    except ValueError:
        example = "200,200" if kind is int else "0.2,0.5"
        noun = "sizes" if kind is int else "numbers"
        raise ValueError(f"{text!r} is no list of {noun}: write for example {example}") from None


# What is made of them.


class Field(NamedTuple):
    """A choice of a configuration.

    Attributes:
      name: its own name in the whole configuration.
      path: names of attributes that lead to it.
      type: its type.
      default: its default.
      option: what is declared with it.
      heading: heading of the help it stands under.
    """

    name: str
    path: tuple[str, ...]
    type: Any
    default: Any
    option: Option
    heading: str

    @property
    def flags(self) -> tuple[str, ...]:
        """Options of the command line."""
        return self.option.flags or ("--" + self.name.replace("_", "-"),)

    @property
    def kind(self) -> Any:
        """The type, without None and the names that a text may be."""
        kind = typing.get_args(self.type)[0] if isinstance(self.type, UnionType) else self.type
        return str if typing.get_origin(kind) is Literal else kind

    @property
    def is_repeated(self) -> bool:
        """Whether the option is given once for each of several values."""
        return typing.get_args(self.kind)[:1] == (str,)


@dataclass(frozen=True)
class Section:
    """Choices that belong together: a frozen dataclass whose fields are declared by the functions of this module."""

    heading: ClassVar[str] = ""

    def __post_init__(self) -> None:
        """Checks every choice by its own check.

        Raises:
          ValueError: with the name of the first that is wrong.
          TypeError: if a section is something else.
        """
        types = typing.get_type_hints(type(self))
        for each in dataclasses.fields(self):
            option: Option | None = each.metadata.get("option")
            value = getattr(self, each.name)
            if option is None:
                _check_section(each.name, value, types[each.name])
            else:
                object.__setattr__(self, each.name, option.check(option.name or each.name, value))


def _check_section(name: str, value: Any, kind: type[Section]) -> None:
    if not isinstance(value, kind):
        raise TypeError(
            f"{name} must be a {kind.__name__}, got {value!r:.80}: pass {name}={kind.__name__}(...), or its choices by "
            "their names"
        )


def fields_of(kind: type[Section]) -> Mapping[str, Field]:
    """The choices of a configuration and its sections by name, in the order of the help."""
    if kind not in _FIELDS:
        _FIELDS[kind] = {field.name: field for field in _fields(kind, (), kind.heading)}
    return _FIELDS[kind]


_FIELDS: dict[type[Section], Mapping[str, Field]] = {}


def _fields(kind: type[Section], path: tuple[str, ...], heading: str, usual: Section | None = None) -> Iterator[Field]:
    """The choices of a section; their defaults are those of `usual`, if the whole has other ones than the section."""
    types = typing.get_type_hints(kind)
    for each in dataclasses.fields(kind):
        option: Option | None = each.metadata.get("option")
        if option is None:
            section = each.default_factory() if callable(each.default_factory) else None
            yield from _fields(types[each.name], (*path, each.name), types[each.name].heading, section)
        else:
            own, default = option.heading or heading, each.default if usual is None else getattr(usual, each.name)
            yield Field(option.name or each.name, (*path, each.name), types[each.name], default, option, own)


@dataclass(frozen=True, init=False)
class Configuration(Section):
    """A section with sections, as a whole: what a command runs.

    Attributes:
      command_name: words of the command.
    """

    command_name: ClassVar[str] = ""

    def __init__(self, **choices: Any) -> None:
        """Any choice by its name, whatever section it is in, or sections as a whole; the others have their defaults.

        Raises:
          ValueError: if there is no choice of a name, with the nearest that there is, or something is wrong with one.
          TypeError: if a section is something else.
        """
        parts = self._parts(choices.items())
        for each in dataclasses.fields(self):
            usual = each.default_factory() if callable(each.default_factory) else each.default
            object.__setattr__(self, each.name, parts.get(each.name, usual))
        self.__post_init__()

    def replace(self, **choices: Any) -> Self:
        """This configuration with other choices, by their names.

        Raises:
          ValueError: as the constructor.
          TypeError: likewise.
        """
        own = [(each.name, getattr(self, each.name)) for each in dataclasses.fields(self)]
        return type(self)(**self._parts([*own, *choices.items()]))

    @classmethod
    def _parts(cls, choices: Iterable[tuple[str, Any]]) -> dict[str, Any]:
        """Name to value of the fields that these choices make, sections among them; later ones go before earlier.

        Raises:
          ValueError: if there is no choice of a name.
          TypeError: if a section is something else.
        """
        fields, sections, types = fields_of(cls), _sections(cls), typing.get_type_hints(cls)
        found: dict[str, Any] = {}
        within: dict[str, dict[str, Any]] = {}
        for name, value in choices:
            if name in sections and (isinstance(value, Section) or name not in fields):
                _check_section(name, value, types[name])
                found[name], within[name] = value, {}
                continue
            *path, last = fields[canonical("choice of a configuration", name, cls)].path
            (within.setdefault(path[0], {}) if path else found)[last] = value
        usual: Any = {each.name: each.default_factory for each in dataclasses.fields(cls)}
        for name, own in within.items():
            found[name] = dataclasses.replace(found[name] if name in found else usual[name](), **own)
        return found

    @classmethod
    def of_before(cls, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """The values of a file under the names that choices have now; for those that have been renamed."""
        return values

    def flat(self) -> dict[str, Any]:
        """Name to value of every choice."""
        return {name: functools.reduce(getattr, field.path, self) for name, field in fields_of(type(self)).items()}

    def to_json(self) -> str:
        """The configuration as JSON text, an object for every section."""
        return json.dumps(dataclasses.asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Reads what `to_json` wrote; choices that are missing have their defaults.

        Raises:
          ValueError: if the text is no JSON object, or has a choice that there is not.
        """
        return cls.from_values(json.loads(text))

    @classmethod
    def from_values(cls, values: Any) -> Self:
        """The configuration of JSON values: with sections, or flat, as they were written before there were sections.

        Raises:
          ValueError: if they are none.
        """
        if not isinstance(values, Mapping):
            raise ValueError(f"a configuration is a JSON object, got {type(values).__name__}: see Config.to_json")
        return cls(**flattened(cls, cls.of_before(values)))

    def words(self, but: Collection[str] = ()) -> list[str]:
        """The options of the command line that make this configuration of the default one."""
        found = []
        fields, usual = fields_of(type(self)), type(self)().flat()
        for name, value in self.flat().items():
            if name not in but and value != usual[name] and not fields[name].option.hidden:
                found += _words(fields[name], value)
        return found

    def command(self, out: str | Path) -> str:
        """The command line that runs this configuration in the directory `out`."""
        return shlex.join(["fedjax-core", *self.command_name.split(), *self.words(), "--out", str(out)])

    def with_role(self, *roles: Role) -> dict[str, Any]:
        """The choices of these roles, name to value."""
        flat = self.flat()
        return {name: flat[name] for name in named(type(self), *roles)}


def named(kind: type[Section], *roles: Role) -> tuple[str, ...]:
    """Names of the choices of some roles."""
    return tuple(name for name, field in fields_of(kind).items() if field.option.role in roles)


def check_grown(
    here: Configuration, there: Configuration, out: Path, rules: Mapping[str, growth.Rule], noun: str, can: str
) -> None:
    """Checks that `here` is the run `there` of the directory `out`, or that run with more of it.

    Args:
      here: what is asked for.
      there: what the directory holds.
      out: the directory.
      rules: of the choices that may grow; those that change no number may always change.
      noun: see `pipelines.common.growth.check`.
      can: likewise.

    Raises:
      ValueError: with every choice that makes another run.
    """
    free = dict.fromkeys(named(type(here), "place", "machine", "report"), growth.free)
    growth.check(out, here.flat(), there.flat(), {**free, **rules}, noun, can)


def canonical(noun: str, name: str, kind: type[Section], section: str | None = None) -> str:
    """The name of a choice that may be called by it, by its field's name in a section, or by its option.

    Args:
      noun: what is being named, for the message.
      name: what it is called.
      kind: the configuration.
      section: where it stands, if it stands in one.

    Raises:
      ValueError: if there is none, with the nearest.
    """
    fields = {n: f for n, f in fields_of(kind).items() if section is None or f.path[0] == section}
    called = {flag.removeprefix("--").replace("-", "_"): n for n, f in fields.items() for flag in f.flags}
    called |= {f.path[-1]: n for n, f in fields.items()} | {n: n for n in fields}
    if name in called:
        return called[name]
    if name in _sections(kind):
        raise ValueError(f"{noun} {name!r} is a section: give it a table of choices")
    return called[pick(noun, name, fields)]


def flattened(kind: type[Section], values: Mapping[str, Any]) -> dict[str, Any]:
    """Name to value of what may have a table for each section, or be flat, or both.

    Raises:
      ValueError: if a choice is given twice, or there is none of a name in a section.
    """
    sections = _sections(kind)
    found: dict[str, Any] = {}
    for key, value in values.items():
        own: dict[str, Any] = {key: value}
        if key in sections and isinstance(value, Mapping):
            own = {
                canonical(f"choice of [{key}]", str(name).replace("-", "_"), kind, key): inner
                for name, inner in value.items()
            }
        for name, inner in own.items():
            if name in found:
                raise ValueError(f"{name} is given twice: give it once")
            found[name] = inner
    return found


def _sections(kind: type[Section]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(field.path[0] for field in fields_of(kind).values() if len(field.path) > 1))


def _words(field: Field, value: Any) -> list[str]:
    flag = field.flags[0]
    value = field.option.none if value is None and field.option.none else value
    if isinstance(value, bool):
        return [flag] if value else []
    if isinstance(value, tuple):
        if field.is_repeated:
            return [word for each in value for word in (flag, each)]
        return [flag, ",".join(map(str, value))]
    return [] if value is None else [flag, str(value)]
