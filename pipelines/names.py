"""Names a user types: found, or answered with the nearest one there is."""

import difflib
from collections.abc import Iterable


def shortened(name: str, most: int = 80) -> str:
    """A name to be shown in a message; of one that is very long the beginning and the end."""
    return name if len(name) <= most else f"{name[: most - 20]}...{name[-17:]}"


def pick(kind: str, name: str, choices: Iterable[str]) -> str:
    """Returns `name` if it is one of `choices`.

    Args:
      kind: what is being named, for the message ("method", "data set").
      name: what the user typed.
      choices: the names there are.

    Raises:
      ValueError: otherwise, with the nearest choice and all of them.
    """
    known = list(choices)
    if name in known:
        return name
    near = difflib.get_close_matches(str(name)[:100].lower(), known, n=1, cutoff=0.4)
    guess = f"did you mean {near[0]!r}? " if near else ""
    shown = repr(shortened(name) if isinstance(name, str) else name)
    raise ValueError(f"unknown {kind} {shown}: {guess}there are {', '.join(known) or 'none'}")
