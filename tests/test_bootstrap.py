"""`bootstrap.py` without an installation: what it runs, with and without uv, and what it says where it cannot go on."""

import importlib.util
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def machine(monkeypatch):
    """The script where nothing is run: `ran` are its commands, `works` says which succeed, `uv` is that program."""
    spec = importlib.util.spec_from_file_location("bootstrap", ROOT / "bootstrap.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.ran, module.works, module.uv = [], lambda command: True, None

    def run(command):
        module.ran.append(command)
        if "venv" in command:
            python = module.program(Path(command[-1]), "python")
            python.parent.mkdir(parents=True)
            python.touch()
        return subprocess.CompletedProcess(command, 0 if module.works(command) else 1, module.output)

    module.output = "all of it"
    monkeypatch.setattr(module, "run", run)
    monkeypatch.setattr(module.shutil, "which", lambda name: module.uv)
    return module


def tools(machine):
    """What was run, in short: the tool, and what it was to do."""
    return [
        ("uv " if command[0] == machine.uv else "") + ("venv" if "venv" in command else "install")
        for command in machine.ran
    ]


@pytest.mark.parametrize(("uv", "installs"), [(None, "install"), ("/there/uv", "uv install")])
def test_one_installer_is_run_once(machine, tmp_path, uv, installs):
    machine.uv = uv
    for _ in range(2):
        machine.install(tmp_path / "v", True, False)
    assert tools(machine) == ["venv", installs]
    assert machine.ran[-1][-1] == f"{ROOT}[docs,test]"
    assert not any("--constraint" in command for command in machine.ran)
    machine.install(tmp_path / "v", False, False)  # what runs the tests runs the main job too
    assert len(machine.ran) == 2
    machine.install(tmp_path / "v", False, True)
    assert machine.ran[-1][-2:] == ["--constraint", str(ROOT / "constraints.txt")]
    assert machine.ran[-1][-3] == f"{ROOT}[docs,test]"


def test_pip_goes_on_where_uv_fails(machine, tmp_path):
    machine.uv, machine.works = "/there/uv", lambda command: command[0] != "/there/uv"
    machine.install(tmp_path / "v", False, False)
    assert tools(machine) == ["venv", "uv install", "install"]


def test_without_the_module_uv_makes_the_environment(machine, tmp_path, monkeypatch):
    monkeypatch.setattr(machine.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        SystemExit, match=r"lacks the standard module venv and ensurepip, .* `sudo apt install python3\.\d+-venv`"
    ):
        machine.install(tmp_path / "v", False, False)
    machine.uv = "/there/uv"
    machine.install(tmp_path / "v", False, False)
    assert tools(machine) == ["uv venv", "uv install"]
    assert "--seed" in machine.ran[0]


def test_no_network_is_said_and_the_next_time_begins_anew(machine, tmp_path):
    machine.works, machine.output = lambda command: "venv" in command, "Failed to establish a new connection"
    with pytest.raises(SystemExit, match=r"(?s)installing failed:.*new connection\n.*check the network connection"):
        machine.install(tmp_path / "v", False, False)
    half = tmp_path / "v" / "half"
    half.touch()
    assert not json.loads((tmp_path / "v" / machine.MARKER).read_text())["complete"]
    machine.works = lambda command: True
    machine.install(tmp_path / "v", False, False)
    assert not half.exists()
    assert tools(machine) == ["venv", "install"] * 2


def test_an_environment_of_the_users_own_is_used_and_never_emptied(machine, tmp_path, monkeypatch):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(SystemExit, match="exists and is no working virtual environment"):
        machine.install(tmp_path, False, False)
    monkeypatch.setattr(machine, "usable", lambda venv: True)
    machine.works = lambda command: False
    for _ in range(2):
        with pytest.raises(SystemExit, match="installing failed"):
            machine.install(tmp_path, False, False)
    assert (tmp_path / "thesis.tex").exists()
    assert tools(machine) == ["install"] * 2


def test_an_old_python_is_told_which_it_needs(machine, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bootstrap.py", "test"])
    monkeypatch.setattr(machine, "OLDEST", (9, 1))
    with pytest.raises(SystemExit, match=r"Python 9\.1 or newer is needed, and .* is Python 3\."):
        machine.main()
    assert machine.ran == []


def test_a_place_that_cannot_be_written_is_named(machine, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setattr(sys, "argv", ["bootstrap.py", "--venv", str(tmp_path / "file" / "v"), "train"])
    with pytest.raises(
        SystemExit, match=r"cannot write .*v \((Not a directory|File exists)\): choose another place with --venv DIR"
    ):
        machine.main()


PIN = re.compile(
    r"(?P<name>[a-z0-9][a-z0-9-]*)==(?P<version>[A-Za-z0-9.!+]+)(?: ; python_version (?P<when><|>=) '3.12')?"
)


def pins():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    wrong = [line for line in lines if not PIN.fullmatch(line)]
    assert not wrong, f"each line of constraints.txt is name==version, and for which Python: {wrong}"
    return [(match["name"], match["version"], match["when"]) for match in map(PIN.fullmatch, lines) if match]


def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.quick
def test_every_dependency_is_pinned_once_for_every_python():
    found = pins()
    assert [name for name, *_ in found] == sorted(name for name, *_ in found)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [lines for name, lines in project["optional-dependencies"].items() if name not in ("cuda", "tpu")]
    direct = [Requirement(line) for lines in [project["dependencies"], *extras] for line in lines]
    assert len(direct) > 20
    for requirement in direct:
        pinned = {when: version for name, version, when in found if name == normal(requirement.name)}
        assert set(pinned) in ({None}, {"<", ">="}), f"{requirement.name} is not in constraints.txt for every Python"
        for version in pinned.values():
            assert version in requirement.specifier, f"{requirement} does not allow {version} of constraints.txt"
