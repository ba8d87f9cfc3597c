"""Tables as LaTeX, to be read by a paper's `\\input`; they need the package booktabs."""

from collections.abc import Collection, Sequence

_SPECIAL = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **{letter: "\\" + letter for letter in "&%$#_"},
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "±": r"$\pm$",
    "–": "--",
    "\n": " ",
}


def escaped(text: str) -> str:
    """Text that LaTeX prints as it is."""
    return "".join(_SPECIAL.get(letter, letter) for letter in text)


def table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    comment: str = "",
    bold: Collection[tuple[int, int]] = (),
) -> str:
    """A `tabular` with rules above, below and between header and rows; the first column is on the left.

    Args:
      header: names of the columns, plain text.
      rows: cells, plain text; every row as long as the header.
      comment: goes before the table, in LaTeX comments.
      bold: (row, column) of the cells that are set in bold.

    Raises:
      ValueError: if a row is not as long as the header.
    """
    for row in rows:
        if len(row) != len(header):
            raise ValueError(f"a row has {len(row)} cells and the header {len(header)}: give as many of both")
    comments = [f"% {line}" for line in comment.splitlines()]

    def shown(row: int, column: int, cell: str) -> str:
        return rf"\textbf{{{escaped(cell)}}}" if (row, column) in bold else escaped(cell)

    lines = [" & ".join(map(escaped, header)) + r" \\"]
    lines += [" & ".join(shown(r, c, cell) for c, cell in enumerate(row)) + r" \\" for r, row in enumerate(rows)]
    return "\n".join(
        [
            *comments,
            r"% needs \usepackage{booktabs}",
            rf"\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}",
            r"\toprule",
            lines[0],
            r"\midrule",
            *lines[1:],
            r"\bottomrule",
            r"\end{tabular}",
            "",
        ]
    )
