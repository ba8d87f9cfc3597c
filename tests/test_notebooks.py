"""The notebooks of the documentation: stored as their scripts say, and what their cells print is still true."""

import base64
import json
import re
from pathlib import Path

import jax
import pytest

DOCS = Path(__file__).resolve().parent.parent / "docs"
NAMES = sorted(path.stem for path in (DOCS / "notebooks").glob("*.py"))
HOW = "run `python docs/build.py --notebooks`"


@pytest.fixture
def percent(monkeypatch):
    monkeypatch.syspath_prepend(str(DOCS))
    import percent

    return percent


def stored(name):
    return json.loads((DOCS / "notebooks" / f"{name}.ipynb").read_text())


def outputs(notebook, kind):
    """What the cells have put out, with the cell's number."""
    return [
        (cell["execution_count"], output)
        for cell in notebook["cells"]
        for output in cell.get("outputs", ())
        if output["output_type"] == kind
    ]


def printed(notebook):
    return "".join("".join(output["text"]) for _, output in outputs(notebook, "stream"))


def differences(now, before):
    """What differs in two printed texts: words, percentages by more than 1.5 points, other numbers by more than 5 %.

    Times, numbers of seconds, are not compared.
    """
    number = r"-?\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?"
    texts = [re.sub(rf"{number} s\b", "? s", text) for text in (now, before)]
    words = [re.sub(rf"\s*{number}", " #", text) for text in texts]
    if words[0] != words[1]:
        return [words]
    found = [re.findall(rf"({number})(%?)", text) for text in texts]
    return [
        (a, b)
        for (a, percent), (b, _) in zip(*found, strict=True)
        if abs(float(a.replace(",", "")) - float(b.replace(",", "")))
        > (1.5 if percent else 0.05 * abs(float(b.replace(",", ""))))
    ]


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_stored_as_its_script_says(percent, name):
    def written(cell):
        return {key: value for key, value in cell.items() if key not in ("outputs", "execution_count")}

    notebook = stored(name)
    script = (DOCS / "notebooks" / f"{name}.py").read_text()
    assert [written(cell) for cell in notebook["cells"]] == [written(cell) for cell in percent.cells(script)], HOW
    assert notebook["nbformat"] == 4
    figures = [output["data"] for _, output in outputs(notebook, "display_data")]
    assert figures
    for data in figures:
        assert base64.b64decode(data["image/png"]).startswith(b"\x89PNG")
        assert "".join(data["text/plain"]), "give the figure a name: plt.subplots(num=...)"


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs_to_what_is_stored(percent, name):
    script = (DOCS / "notebooks" / f"{name}.py").read_text()
    with jax.enable_x64(False):
        now = percent.executed(script, name)
    before = stored(name)
    assert differences(printed(now), printed(before)) == [], f"where that is right, {HOW}"
    count = [[cell for cell, _ in outputs(notebook, "display_data")] for notebook in (now, before)]
    assert count[0] == count[1]


def test_differences_are_found():
    assert differences("10 rounds in 0.5 s: 97.1%, 1,234", "10 rounds in 12.5 s: 96.0%, 1,230") == []
    assert differences("accuracy  97.1%", "accuracy 95.0%") == [("97.1", "95.0")]
    assert differences("loss 0.11", "loss 0.10") == [("0.11", "0.10")]
    assert differences("loss 0.1", "cost 0.1")


def test_a_cell_that_fails_is_an_error(percent):
    with pytest.raises(ZeroDivisionError) as error:
        percent.executed("# %%\nx = 1\n\n# %% [markdown]\n# Text.\n\n# %%\nprint(x / 0)\n", "here")
    assert "here, cell 2" in str(error.traceback[-1])
    done = percent.executed("# %%\nx = 2\nprint(x)\n\n# %% [markdown]\n# Text\n# of two lines.\n")
    assert [cell["cell_type"] for cell in done["cells"]] == ["code", "markdown"]
    assert printed(done) == "2\n"
    assert "".join(done["cells"][1]["source"]) == "Text\nof two lines."
