"""What all figures share: style, colors, and files that are the same for the same numbers."""

from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from pipelines import files

# Okabe and Ito's colors, which color-blind readers tell apart; black is left for axes.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
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
}


def style() -> Any:
    """A context in which figures are made."""
    return matplotlib.rc_context(_STYLE)


def write(path: Path, figure: Figure) -> None:
    """Writes a figure as a PNG file that is whole or not there."""
    files.write(path, partial(_draw, figure))


def _draw(figure: Figure, path: Path) -> None:
    # Without the software's version in it, the picture is the same file for the same numbers.
    figure.savefig(path, format="png", dpi=150, metadata={"Software": None})
