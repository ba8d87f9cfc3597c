"""The options of the command line, made of what configurations declare (`pipelines.configuration.options`)."""

import dataclasses
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource
from click.shell_completion import CompletionItem

from pipelines.cli import catalog
from pipelines.configuration import config_file
from pipelines.configuration.options import Configuration, Field, Section, fields_of

Decorator = Callable[[Any], Any]

_Kind = TypeVar("_Kind", bound=Configuration)


class Option(click.Option):
    """An option that knows under which heading of the help it stands."""

    def __init__(self, *args: Any, heading: str = "Other", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.heading = heading


class Command(click.Command):
    """A command whose help shows its options under headings, in the order they are declared."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes the options."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                groups.setdefault(getattr(parameter, "heading", "Other"), []).append(record)
        for heading, records in groups.items():
            with formatter.section(heading):
                formatter.write_dl(records, col_max=24)


def option(heading: str, *flags: str, **kwargs: Any) -> Decorator:
    """An option of a command alone, which is no choice of its configuration."""
    kwargs.setdefault("show_default", not kwargs.get("is_flag") and kwargs.get("default") is not None)
    return click.option(*flags, cls=Option, heading=heading, **kwargs)


def choices(kind: type[Section], only: Collection[str] | None = None) -> Decorator:
    """The options of all choices of a configuration, or of some of them."""
    fields = [field for name, field in fields_of(kind).items() if only is None or name in only]
    fields = [field for field in fields if not field.option.hidden]

    def decorate(command: Any) -> Any:
        for field in reversed(fields):
            command = _choice(field)(command)
        return command

    return decorate


def given(ctx: click.Context, kind: type[Section]) -> dict[str, Any]:
    """The choices that were given on the command line, by name."""
    found = {}
    for name, field in fields_of(kind).items():
        if name in ctx.params and ctx.get_parameter_source(name) is not ParameterSource.DEFAULT:
            value = ctx.params[name]
            parse = field.option.parse
            if field.is_repeated and parse is not None:  # several may be given at once too
                value = tuple(each for text in value for each in parse(text))
            found[name] = value
    return found


CONFIG = (
    option(
        "Configuration",
        "--config",
        "config_path",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="Options from a TOML, YAML or JSON file, or those of a run; what is given here goes before them.",
    ),
    option(
        "Configuration",
        "--write-config",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="Write all options to such a file, and stop.",
    ),
    option("Configuration", "--print-config", is_flag=True, help="Print them as TOML, and stop."),
)
"""Options that read and write a configuration."""

OUT = option(
    "Output", "--out", type=click.Path(path_type=Path), metavar="DIR", help="Directory.  [default: runs/<what is run>]"
)
QUIET = option("Output", "--quiet", is_flag=True, help="Print nothing but errors.")


def several(*decorators: Decorator) -> Decorator:
    """Options one after another, as they are to stand in the help."""

    def decorate(command: Any) -> Any:
        for each in reversed(decorators):
            command = each(command)
        return command

    return decorate


def study(kind: type[Section]) -> Decorator:
    """The options of a study: its choices, where from, where to, and how much is told."""
    return several(*CONFIG, choices(kind), OUT, QUIET)


def asked(ctx: click.Context, kind: type[_Kind], config_path: Path | None) -> _Kind:
    """The configuration of the options that are given and of a file, which they go before."""
    filed = {} if config_path is None else config_file.read(config_path, kind)
    return kind(**{**filed, **given(ctx, kind)})


def shown(config: Configuration, write_config: Path | None, print_config: bool) -> bool:
    """Writes and prints a configuration as far as that was asked for, and returns whether it was."""
    if write_config is not None:
        config_file.write(write_config, config)
    if print_config:
        click.echo(config_file.text(config), nl=False)
    return write_config is not None or print_config


def completing(*kinds: str) -> Callable[..., list[Any]]:
    """Completes names of the kinds, or of all kinds, in a shell; after a + the next one."""

    def complete(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[Any]:
        found = catalog.kinds(ctx.params.get("data_dir"))

        before, mark, begun = incomplete.rpartition("+")
        return [
            CompletionItem(before + mark + name, help=catalog.first_paragraph(card())[:80])
            for kind in kinds or found
            for name, card in found[kind].items()
            if name.startswith(begun)
        ]

    return complete


class _Parsed(click.ParamType):
    """What a choice makes of a text."""

    name = "value"

    def __init__(self, field: Field) -> None:
        self.field = field

    def convert(self, value: Any, parameter: Any, ctx: Any) -> Any:
        option = self.field.option
        if not isinstance(value, str):
            return value
        if option.none and value.strip().lower() == option.none:
            return None
        try:
            return self.field.kind(value) if option.parse is None else option.parse(value)
        except ValueError as error:
            said = str(error) if option.parse is not None else f"{value!r} is no number: write one"
            self.fail(f"{said}, or {option.none}" if option.none else said, parameter, ctx)


def _choice(field: Field) -> Decorator:
    kind, option, default = field.kind, field.option, default_of(field)
    settings: dict[str, Any] = {
        "help": option.help + (f"  [default: {default}]" if default else ""),
        "metavar": option.metavar or None,
    }
    if kind is bool:
        settings |= {"is_flag": True}
    elif field.is_repeated:
        settings |= {"multiple": True}
    elif option.parse is not None or option.none:
        settings |= {"type": _Parsed(field)}
    else:
        settings |= {"type": kind}
    if option.completes:
        settings["shell_complete"] = completing(*option.completes)
    return click.option(*field.flags, field.name, cls=Option, heading=field.heading, **settings)


def default_of(field: Field) -> str:
    """The default of a choice in words; an empty string for None and switches."""
    default = field.default
    if field.option.shown or default is None or isinstance(default, bool | dataclasses._MISSING_TYPE):
        return field.option.shown
    if isinstance(default, tuple):
        return (", " if field.is_repeated else ",").join(map(str, default))
    return str(default)
