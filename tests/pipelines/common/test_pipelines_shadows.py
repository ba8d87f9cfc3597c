"""A user's file of the name of a package that `pipelines` needs is named before anything dies inside the library."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import pipelines

ROOT = Path(pipelines.__file__).resolve().parent.parent


def run(folder, *arguments):
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize(
    ("written", "code", "shadowing"),
    [
        ("models.py", "import pipelines", "models.py"),
        ("algorithms.py", "from pipelines import Config", "algorithms.py"),
        ("models/__init__.py", "import pipelines.run.train", "models"),
        ("models.py", "import models, pipelines", "models.py"),  # already imported
        ("fedjax_core.py", "from pipelines.run import train", "fedjax_core.py"),
    ],
)
def test_a_file_beside_the_script_that_shadows_a_package_is_named(tmp_path, written, code, shadowing):
    (tmp_path / written).parent.mkdir(exist_ok=True)
    (tmp_path / written).write_text("class Net: pass")
    (tmp_path / "script.py").write_text(code)
    done = run(tmp_path, "script.py")
    last = done.stderr.strip().splitlines()[-1]
    name = written.split("/")[0].removesuffix(".py")
    assert last.startswith(f"ImportError: {tmp_path.resolve() / shadowing} shadows fedjax-core's package {name!r}")
    assert str(ROOT / name) in last
    assert "rename it, or run the script from another folder" in last


def test_what_shadows_nothing_that_is_needed_is_left_alone(tmp_path):
    """Methods do not import `models`, and the command looks into the current directory last."""
    for name in ("models", "algorithms", "pipelines"):
        (tmp_path / f"{name}.py").write_text("raise AssertionError")
    (tmp_path / "models.py").write_text("Net = 1")
    (tmp_path / "algorithms.py").unlink()
    (tmp_path / "script.py").write_text("import algorithms, models; print(algorithms.fedavg.__name__, models.Net)")
    assert run(tmp_path, "script.py").stdout.split() == ["fedavg", "1"]


def test_the_command_works_beside_files_of_these_names(tmp_path):
    for name in ("models", "algorithms", "fedjax_core"):
        (tmp_path / f"{name}.py").write_text("raise AssertionError")
    done = run(tmp_path, "-m", "pipelines", "list", "models")
    assert done.returncode == 0, done.stderr
    assert "logistic_regression" in done.stdout


def test_a_pipelines_of_ones_own_is_named_by_python(tmp_path):
    (tmp_path / "pipelines.py").write_text("")
    (tmp_path / "script.py").write_text("from pipelines import Config")
    assert (
        f"cannot import name 'Config' from 'pipelines' ({tmp_path / 'pipelines.py'})"
        in run(tmp_path, "script.py").stderr
    )
