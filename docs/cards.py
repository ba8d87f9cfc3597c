"""The cards of the methods, which are the docstrings of their factories, as text for the pages.

Between `<!-- card: fedavg -->` and `<!-- end of card -->` a page repeats the update rule of the docstring;
`python docs/build.py --write` brings that up to date, and a test compares.
"""

import inspect
import re
from collections.abc import Callable
from itertools import pairwise

import algorithms

WIDTH = 88
LABEL = re.compile(r" *([A-Za-z][^:;]*: {2,})?")
SECTION = re.compile(r"(Args|Returns|Raises|Yields|Attributes):$")


def is_aligned(paragraph: str) -> bool:
    """Whether a paragraph is set in columns, as update rules are, and must keep its lines."""
    return bool(re.search(r"\S {2,}\S|^ +\S", paragraph, flags=re.M))


def wrapped(paragraph: str) -> str:
    """An aligned paragraph with long lines broken after a statement if that will do.

    They go on below where their content began. A statement that goes on in the next line is joined before.
    """
    lines: list[str] = []
    for line in _joined(paragraph.split("\n")):
        label = LABEL.match(line)
        indent = " " * (len(label.group()) if label and len(label.group()) < 40 else 4)
        statements = re.split(r"(?<=;)  (?=\S)", line)
        rows = [statements[0]]
        for statement in statements[1:]:
            if len(f"{rows[-1]}  {statement}") <= WIDTH:
                rows[-1] += f"  {statement}"
            else:
                rows.append(indent + statement)
        for row in rows:
            lines += _broken(row, indent)
    return "\n".join(lines)


def _joined(lines: list[str]) -> list[str]:
    """The lines, with those that go on with an unfinished statement put behind it."""
    out = [lines[0]]
    for before, line in pairwise(lines):
        # The source breaks a statement only where it has come to the end of the line.
        broken = len(before) > 100 and not before.endswith((";", ".", ":", ","))
        label = LABEL.match(line.lstrip())
        if broken and label and not label.group():
            out[-1] += " " + line.strip()
        else:
            out.append(line)
    return out


def _broken(row: str, indent: str) -> list[str]:
    """A row in pieces of at most `WIDTH`, broken outside of brackets where that is possible."""
    depth, places = 0, []
    for at, letter in enumerate(row):
        depth += (letter in "([{") - (letter in ")]}")
        if letter == " " and len(indent) < at <= WIDTH and row[at + 1 :].strip():
            places.append((depth, at))
    if len(row) <= WIDTH or not places:
        return [row]
    usable = [(deep, at) for deep, at in places if at > WIDTH // 2] or places
    _, at = min(usable, key=lambda place: (place[0], -place[1]))
    return [row[:at].rstrip(), *_broken(indent + row[at:].strip(), indent)]


def rule(name: str) -> str:
    """The update rule on the card of a factory, as Markdown: what is set in columns before the arguments."""
    rules = []
    for paragraph in (inspect.getdoc(getattr(algorithms, name)) or "").split("\n\n")[
        1:
    ]:
        if SECTION.match(paragraph.split("\n", 1)[0]):
            break
        if is_aligned(paragraph):
            rules.append(wrapped(paragraph))
    return "```text\n" + "\n\n".join(rules) + "\n```"


def renewed(page: str) -> str:
    """A page with the cards as they are now."""
    return filled(page, "card", rule)


def filled(page: str, kind: str, made: Callable[[str], str]) -> str:
    """A page with `made(NAME)` between every `<!-- kind: NAME -->` and `<!-- end of kind -->`."""
    return re.sub(
        rf"<!-- {kind}: (\w+) -->\n.*?<!-- end of {kind} -->",
        lambda found: (
            f"<!-- {kind}: {found[1]} -->\n\n{made(found[1])}\n\n<!-- end of {kind} -->"
        ),
        page,
        flags=re.S,
    )
