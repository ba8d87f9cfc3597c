"""Configuration of sphinx, and how the docstrings, which are plain text, become pages."""

import json
import os
import re
import sys
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path[:0] = [
    str(Path(__file__).resolve().parent.parent),
    str(Path(__file__).resolve().parent),
]

from myst_parser.parsers.sphinx_ import MystParser  # noqa: E402

import cards  # noqa: E402
import fedjax_core  # noqa: E402
import percent  # noqa: E402

project = "fedjax-core"
author = "The fedjax-core authors"
release = version = fedjax_core.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc"]
source_suffix = {".md": "markdown", ".ipynb": "notebook"}
html_theme = "furo"
html_title = f"fedjax-core {release}"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
html_show_copyright = html_show_sphinx = False
exclude_patterns = [
    "README.md",
    "default_run",
]  # the report is linked from the README alone
myst_heading_anchors = 4
autodoc_typehints = "none"  # the docstrings give shapes, which the types do not
autodoc_member_order = "bysource"
add_module_names = False
python_maximum_signature_line_length = 80
toc_object_entries_show_parents = "hide"


def _text(line: str) -> str:
    """A line of a docstring as reStructuredText: `x` is code, and every other character means itself."""
    parts = re.split(r"(`+[^`]+`+)", line)
    return "".join(
        f"``{part.strip('`')}``"
        if part.startswith("`")
        else re.sub(r"([\\*_|`])", r"\\\1", part)
        for part in parts
    )


def _entries(lines: list[str]) -> list[str]:
    """The entries of a section, `name: what it is` with the rest further in, as a list of definitions."""
    found: list[str] = []
    for line in lines:
        name = re.match(r"  (\S[^:]*): +(.*)", line)
        if name:
            found += ["", f"  ``{name[1].replace('`', '')}``", f"    {_text(name[2])}"]
        elif line.startswith("    "):
            found.append(f"    {_text(line.strip())}")
        else:
            begins = not found or found[-1].startswith("    ")
            found += [*([""] if begins else []), f"  {_text(line.strip())}"]
    return found


def docstring(lines: list[str]) -> list[str]:
    """A docstring as reStructuredText: update rules and code keep their lines, sections become lists."""
    out: list[str] = []
    for paragraph in "\n".join(lines).strip("\n").split("\n\n"):
        first, *rest = paragraph.split("\n")
        if cards.SECTION.match(first):
            out += [f"**{first[:-1]}**", *_entries(rest), ""]
        elif cards.is_aligned(paragraph):
            out += [
                "::",
                "",
                *(f"  {line}" for line in cards.wrapped(paragraph).split("\n")),
                "",
            ]
        else:
            out += [*(_text(line) for line in paragraph.split("\n")), ""]
    return out


def _process(app, what, name, obj, options, lines):
    lines[:] = docstring(lines)


def _skip(app, what, name, obj, skip, options):
    """Fields of a NamedTuple say nothing but their number; the class's docstring describes them."""
    return True if type(obj).__name__ == "_tuplegetter" else None


class Notebook(MystParser):
    """Notebooks as pages, with the outputs that are stored in them; nothing is run."""

    supported = ("notebook",)

    def parse(self, inputstring, document):
        """Parses the text of a notebook."""
        name = Path(document["source"]).name
        super().parse(percent.as_markdown(json.loads(inputstring), name), document)


def setup(app):
    """Connects what is above."""
    app.add_source_parser(Notebook)
    app.connect("autodoc-process-docstring", _process)
    app.connect("autodoc-skip-member", _skip)
