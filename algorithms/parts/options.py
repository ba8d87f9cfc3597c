"""Options that a factory takes together, as a NamedTuple whose defaults are its argument's default.

`fzoos(..., queries=FZooSQueries(survey=20))`. A sweep, a command line or a configuration that names every option alone
goes through these two functions.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any


def option_tuples(factory: Callable[..., Any]) -> dict[str, Any]:
    """The arguments of a factory that are such tuples, with their defaults."""
    parameters = inspect.signature(factory).parameters.values()
    return {p.name: p.default for p in parameters if isinstance(p.default, tuple) and hasattr(p.default, "_fields")}


def grouped(factory: Callable[..., Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """`settings` as the arguments of a factory: those that are fields of a tuple are in it, the others as they are."""
    arguments = dict(settings)
    for name, default in option_tuples(factory).items():
        chosen = {field: arguments.pop(field) for field in default._fields if field in arguments}
        if chosen:
            arguments[name] = arguments.get(name, default)._replace(**chosen)
    return arguments
