"""The documentation: a page for every method with the rule of its card, code that fits, links that lead somewhere."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import algorithms

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
METHODS = sorted(path for path in (DOCS / "methods").glob("*.md") if path.stem != "index")
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md")), ROOT / "examples" / "README.md"]


@pytest.fixture
def cards(monkeypatch):
    monkeypatch.syspath_prepend(str(DOCS))
    import cards

    return cards


def test_every_method_has_a_page_with_the_rule_of_its_card(cards):
    shown = [name for path in METHODS for name in re.findall(r"<!-- card: (\w+) -->", path.read_text())]
    assert sorted(shown) == sorted(algorithms.__all__)
    old = [path.name for path in METHODS if cards.renewed(path.read_text()) != path.read_text()]
    assert old == [], "run `python docs/build.py --write`: these cards are not those of the docstrings"
    listed = (DOCS / "methods" / "index.md").read_text().split("\n")
    assert {path.stem for path in METHODS} <= set(listed), "enter the page in docs/methods/index.md"


def test_a_changed_card_is_noticed(cards):
    page = (DOCS / "methods" / "fedavg.md").read_text()
    changed = page.replace("y <- y - lr g_i(y)", "y <- y - g_i(y)", 1)
    assert changed != page
    assert cards.renewed(changed) == page


def test_the_tables_of_choices_are_those_of_the_configurations(monkeypatch):
    monkeypatch.syspath_prepend(str(DOCS))
    import choices

    page = (DOCS / "configuration.md").read_text()
    assert choices.renewed(page) == page, "run `python docs/build.py --write`: choices have changed"
    assert set(re.findall(r"<!-- choices: (\w+) -->", page)) == set(choices.KINDS)
    assert choices.renewed(page.replace("Number of rounds", "Rounds")) == page


def test_code_is_no_wider_than_a_page():
    wide = []
    for path in PAGES:
        fenced = False
        for number, line in enumerate(path.read_text().split("\n"), 1):
            fenced ^= line.lstrip().startswith("```")
            if (fenced or line.startswith("    ")) and len(line) > 88:
                wide.append(f"{path.relative_to(ROOT)}:{number}: {len(line)} columns")
    assert wide == [], "what pages show fits into 88 columns"


def test_links_between_pages_lead_to_files():
    broken = [
        f"{path.relative_to(ROOT)}: {target}"
        for path in PAGES
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text())
        if "://" not in target and not target.startswith("mailto:") and not (path.parent / target).exists()
    ]
    assert broken == []


def test_the_site_is_built_without_a_warning(tmp_path):
    missing = [name for name in ("sphinx", "furo", "myst_parser") if find_spec(name) is None]
    assert not missing, "install what the site is built with: pip install --editable '.[docs]'"
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, str(DOCS / "build.py"), "--out", str(tmp_path / "site")],
        env={**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    site = tmp_path / "site"
    assert "local_descent" in (site / "reference" / "core.html").read_text()
    notebook = (site / "notebooks" / "first_federation.html").read_text()
    assert "test accuracy" in notebook
    assert "data:image/png;base64," in notebook
    assert list((site / "_downloads").rglob("first_federation.ipynb"))
