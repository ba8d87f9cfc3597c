"""What a release consists of: one version everywhere, a section of the changelog, a whole source distribution."""

import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path

import pytest

import fedjax_core

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_version_is_the_same_everywhere():
    version = PROJECT["version"]
    assert fedjax_core.__version__ in (version, "0+source")  # the second: the tree is on the path, not installed
    assert f"version: {version}\n" in (ROOT / "CITATION.cff").read_text()
    headings = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), flags=re.M)
    assert headings[0] == "[Unreleased]"
    assert re.fullmatch(rf"\[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d", headings[1])


def test_the_source_distribution_has_the_packages_and_no_orphan_tests(tmp_path):
    pytest.importorskip("setuptools", "77", reason="builds a source distribution, which takes setuptools 77 or newer")
    packages = ("fedjax_core", "algorithms", "models", "pipelines")
    tree = tmp_path / "tree"
    for name in (*packages, "tests"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, tree)
    build = "import sys, setuptools.build_meta as build; build.build_sdist(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, str(tmp_path)], cwd=tree, check=True, capture_output=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        files = {name.partition("/")[2] for name in opened.getnames()}
    assert not [name for name in files if name.startswith("tests")]
    for name in packages:
        expected = {path.relative_to(tree).as_posix() for path in (tree / name).rglob("*.py")}
        assert expected <= files, expected - files
        assert f"{name}/py.typed" in files
