"""What all figures share: style, colors, axes that say what is there, and files that are the same for the same numbers.

Every figure is written twice: a PNG file for the screen and a PDF file, whose lines and letters stay sharp in print.
In an HTML page it is an SVG, which is as sharp.
"""

import io
import textwrap
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import Formatter

from pipelines.common import files

# Okabe and Ito's colors, which color-blind readers tell apart; black is left for axes.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
LINES: tuple[Any, ...] = (
    *("-", "--", ":", "-.", (0, (1, 4)), (0, (6, 1, 1, 1, 1, 1)), (0, (8, 4)), (0, (3, 1))),
    *((0, (10, 2, 2, 2)), (0, (2, 6)), (0, (12, 6)), (0, (5, 1, 1, 1, 1, 1, 1, 1))),
)
"""Line styles, so that colors can be used again."""
_STYLE: Any = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "pdf.fonttype": 42,  # letters as letters, which publishers ask for
    "svg.hashsalt": "fedjax-core",  # names inside of it are drawn at random otherwise
}


class Percent(Formatter):
    """Labels shares as percentages, with as many decimals as the ticks of the axis need: 77.5 % is never "78 %"."""

    def __init__(self) -> None:
        self._decimals = 0

    def set_locs(self, locs: Any) -> None:
        """Takes the places of all ticks."""
        values = [100 * float(place) for place in locs]
        self._decimals = next((d for d in range(10) if all(abs(round(v, d) - v) < 1e-9 for v in values)), 10)

    def __call__(self, x: float, pos: int | None = None) -> str:
        """The label of one tick."""
        text = f"{100 * x:.{self._decimals}f}"
        return f"{text.removeprefix('-') if float(text) == 0 else text} %"


def style() -> Any:
    """A context in which figures are made."""
    return matplotlib.rc_context(_STYLE)


def look(index: int) -> dict[str, Any]:
    """Color and line style of the line with that number."""
    return {"color": COLORS[index % len(COLORS)], "linestyle": LINES[index // len(COLORS) % len(LINES)]}


def title(figure: Figure, text: str) -> None:
    """A small title of the whole figure, in as many lines as it needs."""
    figure.suptitle(textwrap.fill(text, int(15 * figure.get_size_inches()[0])), fontsize=9)


def legend_below(figure: Figure, *axes: Axes, columns: int = 6) -> None:
    """One legend for all these axes below them, where it covers no line; the figure grows by its rows."""
    found: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    if not found:
        return
    columns = min(columns, len(found))
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + 0.22 * -(-len(found) // columns))
    figure.legend(list(found.values()), list(found), loc="outside lower center", ncols=columns)


def legend_above(axis: Axes, title: str, *, fontsize: float = 8) -> None:
    """Title on the left and legend on the right, both above the axes, where they cover nothing."""
    axis.set_title(title, loc="left")
    axis.legend(
        loc="lower right",
        bbox_to_anchor=(1, 1),
        borderaxespad=0.3,
        borderpad=0,
        ncols=4,
        fontsize=fontsize,
        handlelength=1.2,
        columnspacing=1,
    )


def write(path: Path, figure: Figure) -> None:
    """Writes a figure as a PNG file and, beside it, as a PDF file, each of which is complete or absent."""
    files.write(path, partial(_draw_png, figure))
    files.write(path.with_suffix(".pdf"), partial(_draw_pdf, figure))


def svg(figure: Figure) -> bytes:
    """A figure as SVG, whose letters are drawn, so that they look alike wherever it is shown."""
    content = io.BytesIO()
    with style():
        figure.savefig(content, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return content.getvalue()


# Without the software's version and the date in it, a file is the same for the same numbers.


def _draw_png(figure: Figure, path: Path) -> None:
    figure.savefig(path, format="png", dpi=150, metadata={"Software": None})


def _draw_pdf(figure: Figure, path: Path) -> None:
    nothing = dict.fromkeys(("Creator", "Producer", "CreationDate"))
    with matplotlib.rc_context({"pdf.fonttype": 42}):
        figure.savefig(path, format="pdf", metadata=nothing)
