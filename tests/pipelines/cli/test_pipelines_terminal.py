"""The command line where something is missing or broken: no home, no docstrings, no output, damaged programs."""

import inspect
import os
import subprocess
import sys
import warnings
import zlib
from pathlib import Path

import jax
import pytest

import algorithms
from pipelines.cli import terminal
from pipelines.common import cards
from pipelines.common.progress import Reporter
from pipelines.data import cache

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def restored():
    """Leaves JAX's settings of its compilation cache as they were."""
    names = ("jax_compilation_cache_dir", "jax_enable_compilation_cache", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_cards_are_read_from_source_where_there_are_no_docstrings(monkeypatch):
    whole = inspect.getdoc(algorithms.scaffold)
    assert cards.text(algorithms.scaffold) == whole

    class Optimized:
        optimize = 2

    monkeypatch.setattr(cards.sys, "flags", Optimized)
    assert cards.text(algorithms.scaffold) == whole
    assert cards.text(len) == "", "nothing has the source of it"


def test_damaged_programs_are_removed_so_that_they_are_kept_again(tmp_path, restored):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    content = zlib.compress(b"program" * 100)
    programs = {"jit_chunk-1": content, "jit_chunk-2": content[:20], "jit_chunk-3": b"", "jit_other-1": b""}
    for name, kept in programs.items():
        (tmp_path / f"{name}-cache").write_bytes(kept)
    assert terminal.repaired("overflow encountered in divide") is None
    warning = "Error reading persistent compilation cache entry for 'jit_chunk': error: incomplete"
    assert "was damaged: it is compiled and kept again" in terminal.repaired(warning)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["jit_chunk-1-cache", "jit_other-1-cache"]
    # What can be unpacked and is no program: nothing tells which, so all of that name go.
    terminal.repaired(warning)
    assert [path.name for path in tmp_path.iterdir()] == ["jit_other-1-cache"]
    assert "at every start, empty the folder" in terminal.repaired(warning)


def test_without_a_place_programs_are_not_kept_and_that_is_said_once(tmp_path, monkeypatch, restored):
    jax.config.update("jax_compilation_cache_dir", None)
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.warns(cache.CacheWarning, match=r"compiled programs are not kept \(.*file") as said:
        terminal.keep_compiled()
    assert len(said) == 1
    assert not jax.config.jax_enable_compilation_cache


def test_a_user_without_a_home_has_no_cache(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def home():
        raise RuntimeError("Could not determine home directory.")

    def build(allocate):
        allocate("x", (2,), "i4")[:] = 3
        return {"sum": 6}

    monkeypatch.setattr(cache.Path, "home", home)
    with pytest.raises(OSError, match="set HOME or XDG_CACHE_HOME"):
        cache.user_folder("data")
    with pytest.warns(cache.CacheWarning, match="building it in memory"):
        entry = cache.fetch("name", "1", {}, "source", build)
    assert entry.info == {"sum": 6}
    assert entry.arrays["x"].tolist() == [3, 3]


def test_a_run_goes_on_when_its_words_cannot_be_written(monkeypatch, capsys, tmp_path):
    said = []

    def say(text):
        if text == "two":
            raise OSError(28, "No space left on device")
        if text == "wrong":
            raise ValueError("a bug")
        said.append(text)

    guarded = terminal.going_on(Reporter(say, lambda progression: None, lambda: None), tmp_path)
    guarded.say("one")
    monkeypatch.setattr(terminal, "silence_output", lambda: None)
    with pytest.raises(ValueError, match="a bug"):
        guarded.say("wrong")
    guarded.say("two")
    guarded.say("three")
    assert said == ["one"]
    assert capsys.readouterr().err == (
        f"Warning: the output cannot be written (No space left on device): the run goes on, see {tmp_path}\n"
    )


@pytest.mark.parametrize("error", [RuntimeError("Unable to initialize backend 'cuda'"), AssertionError()])
def test_devices_that_are_not_there(error, monkeypatch):
    def devices():
        raise error

    monkeypatch.setattr(terminal.jax, "devices", devices)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    with pytest.raises(ValueError, match=r"JAX_PLATFORMS=cuda, but JAX finds no such device .*: unset it"):
        terminal.check_jax()


def test_printing_is_told_from_other_files(tmp_path):
    class Full:
        def write(self, text):
            raise OSError(28, "No space left on device")

        def flush(self):
            pass

    with pytest.raises(OSError, match="No space") as printing:
        terminal.Console(file=Full()).print("text")
    assert terminal._of_output(printing.value)
    with pytest.raises(OSError, match="No space") as other:
        Full().write("text")
    assert not terminal._of_output(other.value)


def test_a_run_needs_compiling():
    with jax.disable_jit(), pytest.raises(ValueError, match=r"JAX_DISABLE_JIT is set, .* unset it"):
        terminal.check_jax()


def test_one_bad_machine(tmp_path):
    """No docstrings, no home, no temporary folder, ASCII, one column: it comes all the same, but not to a full disk."""
    environment = {
        "PYTHONPATH": str(ROOT),
        "PATH": os.environ["PATH"],
        "JAX_PLATFORMS": "cpu",
        "LC_ALL": "C",
        "PYTHONUTF8": "0",
        "PYTHONIOENCODING": "ascii",
        "COLUMNS": "1",
        "TERM": "dumb",
        "HOME": str(tmp_path / "missing"),
        "TMPDIR": str(tmp_path / "missing"),
    }
    command = [sys.executable, "-OO", "-m", "pipelines", "list", "fedexp"]
    options = {"env": environment, "cwd": tmp_path, "check": False, "stdin": subprocess.DEVNULL}
    done = subprocess.run(command, capture_output=True, **options)
    assert done.returncode == 0, done.stderr.decode()
    assert b"FedExP" in done.stdout
    assert b"Paper:" in done.stdout
    assert done.stdout.isascii()
    full = Path("/dev/full")
    if full.exists():
        with full.open("wb") as out:
            done = subprocess.run(command, stdout=out, stderr=subprocess.PIPE, **options)
        assert done.returncode == terminal.UNEXPECTED
        assert done.stderr.decode().strip() == "Error: the output cannot be written (No space left on device)"


def test_warnings_of_others_pass():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert terminal.repaired("anything") is None
