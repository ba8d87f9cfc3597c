"""Notebooks from scripts in the percent format, which editors open as notebooks and reviewers read as code.

`notebooks/NAME.py` is what people write: `# %%` begins a cell of code, `# %% [markdown]` one of text.
`notebooks/NAME.ipynb` is made of it by `python docs/build.py --notebooks`, with what the cells have printed and drawn.
A test runs the cells again and compares. No kernel is started: what is not on show here (magics, widgets, the value of
a last expression) is not supported.
"""

import base64
import contextlib
import io
import json
import re
import sys
import types
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent / "notebooks"
_METADATA = {
    "kernelspec": {
        "display_name": "Python 3",
        "language": "python",
        "name": "python3",
    },
    "language_info": {"name": "python"},
}


def scripts() -> list[Path]:
    """All notebooks, as scripts."""
    return sorted(FOLDER.glob("*.py"))


def cells(script: str) -> list[dict[str, Any]]:
    """The cells of a script as a notebook has them, without outputs."""
    _, *parts = re.split(r"^# %%(.*)\n", script, flags=re.M)
    found: list[dict[str, Any]] = []
    for kind, text in zip(parts[::2], parts[1::2], strict=True):
        cell: dict[str, Any] = {"id": f"cell-{len(found)}", "metadata": {}}
        if kind.strip() == "[markdown]":
            text = re.sub(r"^# ?", "", text, flags=re.M)
            cell["cell_type"] = "markdown"
        else:
            cell |= {"cell_type": "code", "execution_count": None, "outputs": []}
        found.append(cell | {"source": text.strip("\n").splitlines(keepends=True)})
    return found


def executed(script: str, name: str = "notebook") -> dict[str, Any]:
    """The notebook of a script, with the outputs of its cells: what was printed, then the figures.

    An exception of a cell is raised.
    """
    import matplotlib

    matplotlib.use("Agg")
    # A module that can be imported, as a notebook's `__main__` can, so that what is defined in it can be pickled.
    module = sys.modules["notebook_cells"] = types.ModuleType("notebook_cells")
    found, count = cells(script), 0
    for cell in found:
        if cell["cell_type"] != "code":
            continue
        count += 1
        printed = io.StringIO()
        code = compile("".join(cell["source"]), f"{name}, cell {count}", "exec")
        with contextlib.redirect_stdout(printed):
            exec(code, module.__dict__)
        text = printed.getvalue().splitlines(keepends=True)
        stream = {"output_type": "stream", "name": "stdout", "text": text}
        cell["execution_count"] = count
        cell["outputs"] = [*([stream] if text else []), *_figures()]
    return {"cells": found, "metadata": _METADATA, "nbformat": 4, "nbformat_minor": 5}


def _figures() -> list[dict[str, Any]]:
    """The figures that a cell has left open, as PNG; they are closed.

    What a figure was named (`plt.subplots(num="...")`) describes it to who cannot see it.
    """
    import matplotlib.pyplot as plt

    outputs = []
    for number in plt.get_fignums():
        file = io.BytesIO()
        options: dict[str, Any] = {"metadata": {"Software": None}, "dpi": 100}
        figure = plt.figure(number)
        figure.savefig(file, format="png", **options)
        image = base64.b64encode(file.getvalue()).decode()
        data = {"image/png": image, "text/plain": [figure.get_label()]}
        outputs.append({"output_type": "display_data", "metadata": {}, "data": data})
    plt.close("all")
    return outputs


def write(script: Path) -> None:
    """Runs a script and writes its notebook beside it."""
    notebook = executed(script.read_text(), script.name)
    path = script.with_suffix(".ipynb")
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")


def as_markdown(notebook: dict[str, Any], path: str) -> str:
    """A notebook as a page: text, code, and the outputs that are stored in it."""
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            if output["output_type"] == "stream":
                text = "".join(output["text"]).rstrip("\n")
                parts.append(f"```{{code-block}} text\n:class: output\n\n{text}\n```")
            else:
                data = output["data"]
                alt = "".join(data["text/plain"])
                parts.append(f"![{alt}](data:image/png;base64,{data['image/png']})")
    heading, rest = parts[0].split("\n", 1)
    file = f"{{download}}`{path} <{path}>`"
    about = f"*This page is the notebook* {file}*, with what it has printed and drawn.*"
    return "\n\n".join([heading, about, rest, *parts[1:]]) + "\n"
