"""The cards of the methods, which are the docstrings of their factories, as text for the pages.

Between `<!-- card: fedavg -->` and `<!-- end of card -->` a page repeats the update rule of the docstring;
`python docs/build.py --write` brings that up to date, and a test compares.
"""

import inspect
import re
import textwrap

import algorithms

WIDTH = 88
SECTION = re.compile(r"(Args|Returns|Raises|Yields|Attributes):$")
CARD = re.compile(r"<!-- card: (\w+) -->\n.*?<!-- end of card -->", flags=re.S)


def is_aligned(paragraph: str) -> bool:
    """Whether a paragraph is set in columns, as update rules are, and must keep its lines."""
    return bool(re.search(r"\S {2,}\S|^ +\S", paragraph, flags=re.M))


def wrapped(paragraph: str) -> str:
    """An aligned paragraph with long lines broken after a statement if that will do.

    They go on below where their content began.
    """
    lines = []
    for line in paragraph.split("\n"):
        label = re.match(r" *([A-Z][^:]*: +)?", line)
        indent = " " * (len(label.group()) if label and len(label.group()) < 40 else 4)
        statements = re.split(r"(?<=;)  (?=\S)", line)
        rows = [statements[0]]
        for statement in statements[1:]:
            if len(f"{rows[-1]}  {statement}") <= WIDTH:
                rows[-1] += f"  {statement}"
            else:
                rows.append(indent + statement)
        for row in rows:
            lines += textwrap.wrap(
                row, WIDTH, subsequent_indent=indent, break_long_words=False
            ) or [row]
    return "\n".join(lines)


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
    return CARD.sub(
        lambda found: (
            f"<!-- card: {found[1]} -->\n\n{rule(found[1])}\n\n<!-- end of card -->"
        ),
        page,
    )
