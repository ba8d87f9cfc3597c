"""Names a user types: found, or answered with the nearest one there is."""

import difflib
from collections.abc import Iterable

_LONG_ENOUGH = 3  # letters of which it says something that one name is part of another


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
    near = nearest(str(name)[:100], known)
    guess = f"did you mean {near!r}? " if near else ""
    shown = repr(shortened(name) if isinstance(name, str) else name)
    raise ValueError(f"unknown {kind} {shown}: {guess}there are {', '.join(known) or 'none'}")


def nearest(name: str, choices: Iterable[str], cutoff: float = 0.4) -> str | None:
    """The choice that is most like `name`, or None if none is; see `likeness`."""
    scores = {choice: likeness(name, choice) for choice in choices}
    best = max(scores, key=lambda choice: scores[choice], default=None)
    return best if best is not None and scores[best] >= cutoff else None


def likeness(name: str, choice: str) -> float:
    """From 0 to 1 for letters in common, and half more where one is part of the other."""
    a, b = str(name).lower(), str(choice).lower()
    part = min(len(a), len(b)) >= _LONG_ENOUGH and (a in b or b in a)
    return difflib.SequenceMatcher(None, a, b).ratio() + 0.5 * part
