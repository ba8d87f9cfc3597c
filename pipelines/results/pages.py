"""A report as a page: Markdown, its figures beside it, and one HTML file that has them inside.

The HTML is made of the Markdown, so that both say the same. It asks for nothing from anywhere: figures are vector
graphics in the file itself, and so is its style.
"""

import base64
import html
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt
from matplotlib.figure import Figure

from pipelines.common import figures, files

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 64rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2rem; }
table { border-collapse: collapse; display: block; overflow-x: auto; font-size: .9rem; margin: 1rem 0; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid #ddd; text-align: left; font-variant-numeric: tabular-nums; }
th { border-bottom: 2px solid #222; }
img { max-width: 100%; height: auto; }
pre { background: #f4f4f4; padding: .8rem; overflow-x: auto; }
"""


def write(out: Path, text: str, drawn: Mapping[str, Figure], name: str = "summary") -> None:
    """Writes a report: the text as Markdown and as HTML, and its figures as PNG and PDF files.

    Args:
      out: directory to write into, which exists.
      text: Markdown, which shows the figures by their names.
      drawn: name of a .png file to its figure.
      name: of the two files, without an ending.
    """
    for file, figure in drawn.items():
        figures.write(out / file, figure)
    files.write_text(out / f"{name}.md", text)
    files.write_text(out / f"{name}.html", as_html(text, drawn))


def as_html(text: str, drawn: Mapping[str, Figure]) -> str:
    """Markdown as a whole HTML page with its figures inside.

    Raises:
      ValueError: if the text shows a picture that is none of the figures.
    """
    # Text is shown as it is, also where it has the form of HTML: a name in it is somebody's own.
    reader = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens = reader.parse(text)
    title = next((tokens[i + 1].content for i, each in enumerate(tokens) if each.type == "heading_open"), "")
    for token in (child for each in tokens for child in each.children or []):
        if token.type == "image":
            token.attrs["src"] = _source(str(token.attrs["src"]), drawn)
    body = reader.renderer.render(tokens, reader.options, {})
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n{body}</body>\n</html>\n"
    )


def table(header: list[str], rows: list[list[str]], left: int = 1) -> list[str]:
    """The lines of a table in Markdown; the first `left` columns are on the left and the others on the right."""
    marks = ["---"] * left + ["--:"] * (len(header) - left)
    return ["| " + " | ".join(map(_cell, cells)) + " |" for cells in (header, marks, *rows)]


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _source(name: str, drawn: Mapping[str, Any]) -> str:
    if name not in drawn:
        raise ValueError(f"the text shows {name!r}, and the figures are {', '.join(drawn) or 'none'}: hand it over")
    return "data:image/svg+xml;base64," + base64.b64encode(figures.svg(drawn[name])).decode()
