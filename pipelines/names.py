"""Names a user types: found, or answered with the nearest one there is."""

import difflib
from collections.abc import Iterable


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
    near = difflib.get_close_matches(str(name).lower(), known, n=1, cutoff=0.4)
    guess = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(f"unknown {kind} {name!r}: {guess}there are {', '.join(known) or 'none'}")
