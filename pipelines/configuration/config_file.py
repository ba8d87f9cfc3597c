"""A configuration in a file that people write: TOML, YAML or JSON.

    rounds = 500
    methods = ["fedavg", "fedprox"]

    [data]
    dataset = "fashion_mnist"

    [federation]
    clients = 100

    [settings.fedprox]
    mu = 0.01

A name is that of a choice of the configuration or of its option on the command line, with - or _, in the table of its
section or at the top. What is left out has its default, and options of the command line go before what the file says.
A run's own `config.json` is such a file too.
"""

import json
import tomllib
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from pipelines.common import files
from pipelines.configuration.config import Config
from pipelines.configuration.options import Configuration, Field, canonical, fields_of, flattened

RECORDS = ("config.json", "study.json")
"""Files of run directories that hold a configuration."""

_FORMATS = {".toml": "TOML", ".yaml": "YAML", ".yml": "YAML", ".json": "JSON"}


def read(path: str | Path, kind: type[Configuration] = Config) -> dict[str, Any]:
    """The choices that a file gives, by name, each of its type; settings as method to name to value.

    Args:
      path: a file that ends in .toml, .yaml, .yml or .json; or the directory of a run.
      kind: of configuration.

    Raises:
      ValueError: if it is not there, is of another kind, cannot be read, has a name that is no choice (with the
        nearest), or a value of another type than the choice.
    """
    path = Path(path)
    if path.is_dir():
        path = next((path / name for name in RECORDS if (path / name).exists()), path / RECORDS[0])
    content = _content(path)
    if isinstance(content.get("config"), Mapping):  # as a run has it, beside the versions
        content = dict(content["config"])
    fields = fields_of(kind)
    found: dict[str, Any] = {}
    for key, value in _listed(path, kind, content):
        name = canonical(f"option in {path}", key.replace("-", "_"), kind)
        if name in found:
            raise ValueError(f"{path} gives {name} twice, as {key!r} too: give it once")
        found[name] = _of_type(f"{name} in {path}", fields[name], value)
    return found


def _listed(path: Path, kind: type[Configuration], content: Mapping[Any, Any]) -> list[tuple[str, Any]]:
    try:
        return list(flattened(kind, kind.of_before({str(key): value for key, value in content.items()})).items())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def text(config: Configuration, format: str = "TOML") -> str:
    """A configuration as the text of such a file, every choice with its value.

    Args:
      config: the configuration.
      format: "TOML", "YAML" or "JSON".
    """
    values = json.loads(config.to_json())
    if format == "JSON":
        return json.dumps(values, indent=2) + "\n"
    if format == "YAML":
        return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    for field in fields_of(type(config)).values():
        inner = values
        for each in field.path[:-1]:
            inner = inner[each]
        if inner[field.path[-1]] is None and field.option.none:
            inner[field.path[-1]] = field.option.none
    return "\n".join(_tables(values, ())).lstrip("\n") + "\n"


def _tables(values: Mapping[str, Any], path: tuple[str, ...]) -> list[str]:
    """Lines of a table and then of the tables in it."""
    own = {name: value for name, value in values.items() if not isinstance(value, Mapping)}
    lines = [f"{_key(name)} = {_toml(value)}" for name, value in own.items() if value is not None]
    if path and (lines or not values):
        lines = ["", f"[{'.'.join(map(_key, path))}]", *lines]
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            lines += _tables(value, (*path, name))
    return lines


def _key(name: str) -> str:
    return name if name.replace("_", "").isalnum() and name.isascii() else json.dumps(name, ensure_ascii=False)


def write(path: str | Path, config: Configuration) -> None:
    """Writes a configuration to a file, in the format that the end of its name says.

    Raises:
      ValueError: if it says none, or the file cannot be written.
    """
    path = Path(path)
    format = _format(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_text(path, text(config, format))
    except OSError as error:
        raise ValueError(f"{path} cannot be written ({error.strerror or error}): choose another place") from None


def _format(path: Path) -> str:
    if path.suffix.lower() not in _FORMATS:
        raise ValueError(f"{path} is of no kind that a configuration can be: let its name end in .toml, .yaml or .json")
    return _FORMATS[path.suffix.lower()]


def _content(path: Path) -> dict[Any, Any]:
    format = _format(path)
    try:
        raw = path.read_text(encoding="utf-8")
        if format == "TOML":
            content: Any = tomllib.loads(raw)
        else:
            content = yaml.safe_load(raw) if format == "YAML" else json.loads(raw)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror or error}): check the path") from None
    except (ValueError, yaml.YAMLError, RecursionError) as error:  # all three formats' errors are of these
        raise ValueError(f"{path} is no {format}: {' '.join(str(error).split())}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {type(content).__name__}, not names and values: write for example clients: 100")
    return content


def _of_type(where: str, field: Field, value: Any) -> Any:
    """A value as the type of its choice."""
    if field.name in ("settings", "grid"):
        return _settings(where, value, lists=field.name == "grid")
    optional = field.kind is not field.type
    if optional and (value is None or (field.option.none and str(value).lower() == field.option.none)):
        return None
    kind, items = typing.get_origin(field.kind) or field.kind, typing.get_args(field.kind)
    if kind is tuple and items[0] is str:
        listed = [part.strip() for part in value.split(",")] if isinstance(value, str) else value
        if isinstance(listed, list) and (listed or not field.default) and all(isinstance(each, str) for each in listed):
            return tuple(listed)
        raise ValueError(f"{where} is {value!r}: write a list of names")
    if kind is tuple:
        parts = value.split(",") if isinstance(value, str) else value if isinstance(value, list) else [value]
        return tuple(_number(where, part, items[0]) for part in parts)
    if kind is bool:
        if isinstance(value, bool):
            return value
        raise ValueError(f"{where} is {value!r}: write true or false")
    if kind in (int, float):
        return _number(where, value, kind)
    if isinstance(value, str):
        return value
    raise ValueError(f"{where} is {value!r}: write a text in quotes")


def _settings(where: str, value: Any, *, lists: bool) -> dict[str, dict[str, Any]]:
    """Method to name to value, or a list of them; "" to what is said of all methods."""
    if isinstance(value, list):
        if not all(isinstance(each, str) and "=" in each for each in value):
            raise ValueError(f"{where} is {value!r}: write METHOD.NAME=VALUE, or a table for each method")
        value = {key.strip(): said.strip() for key, _, said in (each.partition("=") for each in value)}
    if not isinstance(value, Mapping):
        raise ValueError(f"{where} is {value!r}: write a table for each method")
    found: dict[str, dict[str, Any]] = {}
    for key, chosen in value.items():
        if isinstance(chosen, Mapping):
            found.setdefault(str(key), {}).update(chosen)
        else:
            method, _, own = str(key).rpartition(".")
            found.setdefault(method, {})[own] = chosen
    for method, chosen in found.items():
        for own, number in chosen.items():
            each = number if lists and isinstance(number, list) else [number]
            if not all(isinstance(one, bool | int | float | str) for one in each):
                raise ValueError(f"{where} has {method}.{own}={number!r}: write a number, true or false, or a text")
    return found


def _number(where: str, value: Any, kind: type) -> Any:
    noun = "a whole number" if kind is int else "a number"
    try:
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise ValueError
        number = float(value) if kind is float else int(value)
        if kind is int and number != float(value):
            raise ValueError
    except (ValueError, OverflowError):
        raise ValueError(f"{where} is {value!r}: write {noun}") from None
    return number


def _toml(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return repr(value) if isinstance(value, float) else json.dumps(value, ensure_ascii=False)
