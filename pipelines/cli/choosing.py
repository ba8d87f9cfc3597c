"""What a command line and a configuration file choose together."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines.common.names import pick
from pipelines.common.own import short
from pipelines.configuration import config_file, methods
from pipelines.configuration.config import CLIENT_SETTINGS, FEDERATION_FIELDS, Config
from pipelines.configuration.options import fields_of


def choices(
    typed: Mapping[str, Any], config_path: Path | None, kind: type[Config] = Config, *, personal: bool = False
) -> dict[str, Any]:
    """The choices of a run that are not left at their defaults: those that are given, then those of a file.

    Args:
      typed: what is given on the command line, by name.
      config_path: a file, or None.
      kind: of configuration.
      personal: whether personal models are evaluated, beside those that clients are compared with.

    Raises:
      ValueError: if the file cannot be read, something is named that there is not, or what is asked for excludes
        personal models.
    """
    filed = {} if config_path is None else config_file.read(config_path, kind)
    found = beside(typed, filed)
    if found.get("federation") is not None:
        found |= _saved_federation(found)
    found.setdefault("methods", kind().methods)
    if personal:
        found |= _personal(found)
    for name in found["methods"]:
        methods.check_runs(name, found.get("model", ""))
    for name, flag in (("settings", "--set"), ("grid", "--grid")):
        if name not in found:
            continue
        of_methods = parse_settings(typed.get(name, ()), found["methods"], flag)
        for method, own in _of_file(name, filed, found["methods"]).items():
            of_methods[method] = own | of_methods.get(method, {})
        found[name] = of_methods
    return found


_VIEWS = ("global", "personal")


def _personal(chosen: Mapping[str, Any]) -> dict[str, Any]:
    """The views of personal models, and the methods with the baselines that they are compared with."""
    asked = tuple(chosen.get("evaluate", ()))
    if asked and not set(_VIEWS) <= set(asked):
        raise ValueError(
            f"--personal evaluates the views {' and '.join(_VIEWS)}, and --evaluate names {', '.join(asked)}: leave "
            "one of the two out"
        )
    if chosen.get("models"):
        raise ValueError(
            f"--personal runs {' and '.join(methods.BASELINES)} too, which have one model for all, and --models names "
            f"{', '.join(chosen['models'])}: give --evaluate {','.join(_VIEWS)} instead"
        )
    missing = [name for name in methods.BASELINES if name not in chosen["methods"]]
    return {"evaluate": asked or _VIEWS, "methods": (*missing, *chosen["methods"])}


def beside(typed: Mapping[str, Any], filed: Mapping[str, Any]) -> dict[str, Any]:
    """What is given, and what a file says beside; one of epochs and steps does away with the other."""
    work = {"epochs", "steps"}
    if typed.keys() & work:
        filed = {name: value for name, value in filed.items() if name not in work}
    another = filed.get("federation") is None and typed.keys() & set(FEDERATION_FIELDS)
    if "federation" in typed or another:  # than that which the file pins
        filed = {name: value for name, value in filed.items() if name != "federation_digest"}
    found = {**filed, **typed}
    return found | {"epochs": found.get("epochs")} if found.get("steps") is not None else found


def _of_file(what: str, filed: Mapping[str, Any], chosen: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What a file says of the methods of this run; those of other methods of the file are left out."""
    said = dict(filed.get(what, {}))
    found: dict[str, dict[str, Any]] = {}
    for name, value in said.pop("", {}).items():
        for method in _having(name, chosen):
            found.setdefault(method, {})[name] = value
    for method, own in said.items():
        called = [each for each in chosen if short(each) == method]
        name = called[0] if method not in chosen and len(called) == 1 else method
        pick(f"method in {what}", name, list(dict.fromkeys([*chosen, *(filed.get("methods") or ())])))
        if name in chosen:
            found[name] = found.get(name, {}) | own
    return found


def _saved_federation(found: Mapping[str, Any]) -> dict[str, Any]:
    """What a saved federation says of the choices; what was asked for beside must agree."""
    from pipelines.federation import federations

    fields, digest = federations.read(found["federation"])
    for name in found.keys() & fields:
        if found[name] != fields[name]:
            flag = fields_of(Config)[name].flags[0]
            raise ValueError(
                f"{flag} {found[name]} and --federation {found['federation']}, which was made with {fields[name]}: "
                f"leave {flag} out, or make another federation"
            )
    return {**fields, "federation_digest": digest}


def parse_settings(
    pairs: Sequence[str], chosen: Sequence[str], flag: str = "--set"
) -> dict[str, dict[str, methods.Value]]:
    """Reads `[METHOD.]NAME=VALUE` pairs; a pair without a method goes to every chosen method that has the name.

    A method of the user's own, `module:name`, may be called by its name alone.

    Raises:
      ValueError: if a pair is malformed, the method is not among the chosen, or nothing has the name.
    """
    settings: dict[str, dict[str, methods.Value]] = {}
    own: dict[str, dict[str, methods.Value]] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.strip():
            raise ValueError(f"{flag} {pair!r} is not of the form NAME=VALUE or METHOD.NAME=VALUE")
        method, dot, name = key.strip().rpartition(".")
        if dot:
            called = [each for each in chosen if short(each) == method]
            method = called[0] if method not in chosen and len(called) == 1 else method
            pick("method among those of this run", method, chosen)
            own.setdefault(method, {})[name] = value
            continue
        for each in _having(name, chosen):
            settings.setdefault(each, {})[name] = value
    # What is said of one method goes before what is said of all, wherever it stands.
    return {m: {**settings.get(m, {}), **own.get(m, {})} for m in chosen if m in settings or m in own}


def _having(name: str, chosen: Sequence[str]) -> list[str]:
    """The methods that have a hyper-parameter of that name.

    Raises:
      ValueError: if there is none, with the nearest name.
    """
    having = [m for m in chosen if name in CLIENT_SETTINGS or name in methods.describe(m).hyperparameters]
    if not having:
        known = {n for m in chosen for n in methods.describe(m).hyperparameters} | set(CLIENT_SETTINGS)
        pick(f"hyper-parameter of {', '.join(chosen)}", name, sorted(known))
    return having
