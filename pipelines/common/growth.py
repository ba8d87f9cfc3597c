"""What may change between a run and the one that is asked for in its directory: it may grow, and nothing else.

One rule for each field that may change; all other fields must be equal. Runs, studies and runs over several tasks share
the rules and the words of the refusal.
"""

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

Rule = Callable[[Any, Any], str]
"""`rule(here, there)`: what is wrong with the value asked for, beside that of the run; "" if nothing is."""


def at_least(here: Any, there: Any) -> str:
    """A number that may be raised."""
    return "" if here >= there else "it can be raised and not lowered"


def contains(here: Sequence[Any], there: Sequence[Any]) -> str:
    """A list that may be extended, in any order."""
    missing = [str(each) for each in there if each not in here]
    return f"what is there stays: name {', '.join(missing)} too" if missing else ""


def free(here: Any, there: Any) -> str:
    """A value that changes no number of the run: how it is reported or saved, or where its data lies."""
    return ""


def same_for(methods: Sequence[str]) -> Rule:
    """Settings, method to name to value, that must be the same for these methods; others may join with their own."""

    def rule(here: Mapping[str, Any], there: Mapping[str, Any]) -> str:
        changed = [m for m in methods if dict(here.get(m, {})) != dict(there.get(m, {}))]
        return f"those of {', '.join(changed)} are fixed" if changed else ""

    return rule


def digest(values: Mapping[str, Any], rules: Collection[str] = ()) -> str:
    """Eight letters that are the same for what can share a directory: of JSON values but those that may change."""
    pinned = {name: value for name, value in values.items() if name not in rules}
    return sha256(json.dumps(pinned, sort_keys=True).encode()).hexdigest()[:8]


def check(
    out: Path, here: Mapping[str, Any], there: Mapping[str, Any], rules: Mapping[str, Rule], noun: str, can: str
) -> None:
    """Checks that what is asked for is the run of a directory, or a larger one.

    Args:
      out: the directory.
      here: what is asked for, by field.
      there: what the directory holds; a field that is missing there is not compared.
      rules: of the fields that may change.
      noun: what differs: "configuration", "study".
      can: what may grow or change, for the error.

    Raises:
      ValueError: with every field that differs and its two values.
    """
    lines = []
    for name, value in here.items():
        if name not in there or value == there[name]:
            continue
        reason = rules[name](value, there[name]) if name in rules else ""
        if reason or name not in rules:
            lines.append(f"  {name}: {value!r} here, {there[name]!r} there" + (f" ({reason})" if reason else ""))
    if lines:
        listing = "\n".join(lines)
        raise ValueError(
            f"{out} holds a run of another {noun}:\n{listing}\nchoose another --out, or run with that {noun}: a "
            f"finished or stopped one can be given {can}, and nothing else"
        )
