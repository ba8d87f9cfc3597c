"""Runs every example as a newcomer would, with a few rounds only."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = sorted(path.name for path in (ROOT / "examples").glob("*.py"))

# What the last line of an example looks like.
LAST_LINE = {
    "quickstart.py": r"round +2 +training loss \d+\.\d+ +test accuracy \d+\.\d%",
    "sweep_seeds_and_rates.py": r" +1\.00 +\d+\.\d+ +\d+\.\d% \+- \d+\.\d%",
    "write_your_own_method.py": r"bound 0\.1: \d+% of the uploads shortened, last training loss \d+\.\d+ .*",
}


def run_example(name: str, folder: Path) -> str:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / name)],
        cwd=folder,  # an example must not depend on the folder it is started from, nor leave files in the project
        env={**os.environ, "PYTHONPATH": path, "FEDJAX_CORE_EXAMPLE_ROUNDS": "2"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"{name} failed:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.quick if name == "quickstart.py" else ()) for name in EXAMPLES],
)
def test_example_runs(name: str, tmp_path: Path):
    output = run_example(name, tmp_path)
    assert name in LAST_LINE, f"add the last line of examples/{name} to LAST_LINE"
    last = output.rstrip("\n").split("\n")[-1]
    assert re.fullmatch(LAST_LINE[name], last), f"{name} ended with {last!r}"


def test_the_readme_lists_every_example():
    readme = (ROOT / "examples" / "README.md").read_text()
    assert [name for name in EXAMPLES if name not in readme] == []
