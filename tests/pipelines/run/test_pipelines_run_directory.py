"""What holds of every command that has a run directory: one test for each property, one row for each command."""

import errno
import functools
import json
import os
import shutil
import signal
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest
from click.testing import CliRunner
from filelock import FileLock

from pipelines import Config
from pipelines.cli import commands
from pipelines.common import figures, files, processes
from pipelines.experiment import setup
from pipelines.run import checkpoint, identity, run_directory, trials
from pipelines.studies import zeroth_order


class Command(NamedTuple):
    """A small run of a command.

    Attributes:
      words: of the command line, but for the data and the directory.
      marker: its record.
      results: what is compared.
      field: of its configuration, a valid other value, and a wrong one.
      states: folder of what is saved.
      flag: an option that the command to go on with has.
    """

    words: str
    marker: str
    results: tuple[str, ...]
    field: tuple[str, object, object]
    states: str
    flag: str


COMMANDS = {
    "train": Command(
        "train --method fedavg --model logistic_regression --partition iid --clients 4 --cohort-size 2 --rounds 4 "
        "--eval-every 1 --checkpoint-every 1 --seeds 1 --epochs 1 --mesh 1 --lanes 1 --no-cache",
        "config.json",
        ("metrics.csv", "clients.csv"),
        ("batch_size", 37, -1),
        "checkpoints/fedavg",
        "--eval-every 1",
    ),
    "continual": Command(
        "continual --method fedavg --scenario split --tasks 2 --rounds 2 --clients 2 --cohort-size 2 --hidden 4 "
        "--batch-size 64 --checkpoint-every 1",
        "config.json",
        ("accuracy.csv",),
        ("batch_size", 37, -1),
        "checkpoints/fedavg",
        "--checkpoint-every 1",
    ),
    "zeroth-order": Command(
        "zeroth-order metric --clients 2 --rounds 2 --steps 1 --seeds 3 --directions 2",
        "study.json",
        ("curves.csv", "summary.md"),
        ("capacity", 37, -1),
        "curves",
        "--directions 2",
    ),
}


@pytest.fixture(scope="module", autouse=True)
def small():
    """One device, one method for values alone, and no figures, which are not what is tested here."""
    with pytest.MonkeyPatch.context() as patch, jax.enable_x64(False):
        one = jax.devices()[:1]
        patch.setattr(jax, "devices", lambda *args: one)
        patch.setattr(figures, "write", lambda path, figure: None)
        patch.setattr(zeroth_order, "METHODS", {"FZooS": ("fedzo", {})})
        patch.setattr(zeroth_order, "_pretrained", functools.cache(zeroth_order._pretrained))
        fresh = setup.prepare
        prepare = functools.cache(lambda config, written: fresh(Config.from_json(config)))
        patch.setattr(
            setup, "prepare", lambda config: prepare(config.to_json(), Path(config.data.dataset).stat().st_mtime_ns)
        )
        yield


def write_data(path, order=1):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(120, 3)).astype(np.float32)
    np.savez(path, x=x, y=(x[:, 0] > 0).astype(np.int64)[::order])


class Runs(NamedTuple):
    """Finished runs; copy one before changing anything."""

    folder: Path

    def call(self, name, out, *more):
        data = self.folder / "mine.npz"
        words = [*COMMANDS[name].words.split(), "--dataset", str(data), "--out", str(out), *more]
        return CliRunner().invoke(commands.main, words)

    def copy(self, name, out):
        return Path(shutil.copytree(self.folder / name, out))


@pytest.fixture(scope="module")
def runs(tmp_path_factory, small):
    found = Runs(tmp_path_factory.mktemp("runs"))
    write_data(found.folder / "mine.npz")
    for name in COMMANDS:
        done = found.call(name, found.folder / name)
        assert done.exit_code == 0, done.output
    return found


pytestmark = pytest.mark.xdist_group("run directories")
every_command = pytest.mark.parametrize("name", COMMANDS)


def record(out, name):
    return json.loads((out / COMMANDS[name].marker).read_text())


def unfinished(runs, name, tmp_path):
    """A copy of a finished run that lacks what was saved last, and the report."""
    out = runs.copy(name, tmp_path / "run")
    command = COMMANDS[name]
    last = max((out / command.states).iterdir())
    last.unlink() if last.is_file() else shutil.rmtree(last)
    for result in command.results:
        (out / result).unlink()
    return out


def check_same(runs, name, out):
    """The results are those of a run that nothing has happened to; reports name their directory in their command."""
    untouched = runs.folder / name
    for result in COMMANDS[name].results:
        found, expected = ((there / result).read_bytes() for there in (out, untouched))
        assert found.replace(str(out).encode(), b"OUT") == expected.replace(str(untouched).encode(), b"OUT")


@every_command
def test_a_run_says_what_it_was_begun_with(runs, name):
    content = record(runs.folder / name, name)
    assert set(content["identity"]) == {"examples", "clients", "keys", "partitionable"}
    assert len(content["run"]) == 16
    assert content["versions"]["jax"] == jax.__version__
    assert content.get("command", "train") == name
    assert files.is_kept(runs.folder / name / COMMANDS[name].marker)


@every_command
def test_other_examples_owners_and_keys_are_refused(runs, name, tmp_path, monkeypatch):
    out = unfinished(runs, name, tmp_path)
    data = runs.folder / "mine.npz"
    try:
        write_data(data, -1)
        done = runs.call(name, out)
    finally:
        write_data(data)
    assert done.exit_code == 2
    assert f"the examples of {data} have changed since the run in {out} was begun" in done.output
    now, whole = identity.keys(), identity.of
    with monkeypatch.context() as patch:
        patch.setattr(identity, "keys", lambda: now | {"keys": "rbg"})
        done = runs.call(name, out)
    assert done.exit_code == 2
    assert "set JAX_DEFAULT_PRNG_IMPL=threefry2x32" in done.output
    monkeypatch.setattr(identity, "of", lambda dataset, owners: whole(dataset, ["others"]))
    done = runs.call(name, out)
    assert done.exit_code == 2
    assert "are assigned to other clients" in done.output


@every_command
def test_what_another_run_has_saved_is_refused(runs, name, tmp_path):
    out = runs.copy(name, tmp_path / "run")
    path = out / COMMANDS[name].marker
    files.write_record(path, record(out, name) | {"run": "f" * 16})
    done = runs.call(name, out)
    assert done.exit_code == 2
    theirs = record(runs.folder / name, name)["run"]
    assert f"({theirs}, and this one is {'f' * 16})" in done.output
    assert "back, or remove that" in done.output


@every_command
def test_a_damaged_record_is_taken_from_its_copy_and_one_of_an_earlier_version_is_completed(
    runs, name, tmp_path, monkeypatch
):
    out = runs.copy(name, tmp_path / "run")
    path = out / COMMANDS[name].marker
    whole = path.read_bytes()
    path.write_text(path.read_text().replace('"versions"', '"noisrevs"'))
    done = runs.call(name, out)
    assert done.exit_code == 0, done.output
    assert done.output.count(f"Warning: {path} is damaged (it is not what was written") == 1
    assert path.read_bytes() == whole
    check_same(runs, name, out)

    copy = out / "checkpoints" / path.name
    for each in (path, copy):
        each.write_text("{")
    done = runs.call(name, out)
    assert done.exit_code == 2
    assert "put one of them back from a backup" in done.output

    # As earlier versions wrote it: without a copy, a digest and all that the record says beside.
    config = json.loads(whole)["config"]
    path.write_text(json.dumps({"config": config} if name == "train" else config))
    copy.unlink()
    monkeypatch.setattr(run_directory, "_name", lambda: json.loads(whole)["run"])  # theirs were without one
    done = runs.call(name, out)
    assert done.exit_code == 0, done.output
    content = record(out, name)
    assert content["config"] == config
    assert content["identity"] == json.loads(whole)["identity"]
    assert files.is_kept(path)


def _table(config, field):
    """The section of a configuration that has a field."""
    return config if field in config else next(each for each in config.values() if field in each)


@every_command
def test_an_edit_by_hand_is_taken_inside_the_configuration_where_it_could_be_one_and_nowhere_else(runs, name, tmp_path):
    out = runs.copy(name, tmp_path / "run")
    field, other, wrong = COMMANDS[name].field
    path, content = out / COMMANDS[name].marker, record(out, name)
    before = _table(content["config"], field)[field]
    for value in (other, wrong):
        edited = json.loads(json.dumps(content["config"]))
        _table(edited, field)[field] = value
        path.write_text(json.dumps(content | {"config": edited, "run": "0" * 16}))
        done = runs.call(name, out)
        if value == other:
            assert done.exit_code == 2
            assert f"was edited by hand: its configuration is taken as it is now ({field} {other}" in done.output
            assert f"{field}: {before} here, {other} there" in done.output
            # Nor can what is there be given the name of what was edited.
            flag = "--" + field.replace("_", "-")
            relabelled = runs.call(name, out, flag, str(other))
            assert relabelled.exit_code == 2
            assert f"{field}: {other} here, {before} there" in relabelled.output
        else:  # it comes from the copy, and so does the name
            assert done.exit_code == 0, done.output
            assert "is damaged" in done.output
            assert record(out, name) == content


@every_command
def test_a_finished_run_in_a_read_only_place_can_be_looked_at_and_nothing_is_written_where_nothing_changed(
    runs, name, tmp_path, monkeypatch
):
    def times(out):
        kept = [path for path in out.rglob("*") if path.is_file()]
        return {path: path.stat().st_mtime_ns for path in kept if path.name != files.LOCK}

    def read_only(*args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    out = runs.copy(name, tmp_path / "finished")
    before = times(out)
    cut = unfinished(runs, name, tmp_path)
    monkeypatch.setattr(processes.FileLock, "acquire", read_only)
    for where in ("write", "append_text"):
        monkeypatch.setattr(files, where, read_only)
    done = runs.call(name, out)
    assert done.exit_code == 0, done.output
    assert f"{out} is read-only, so its report stays as it is" in done.output
    assert times(out) == before
    done = runs.call(name, cut)
    assert done.exit_code == 5
    assert "Read-only file system" in done.output
    assert "mount it writable" in done.output
    done = runs.call(name, tmp_path / "new")
    assert done.exit_code == 5
    assert "Nothing was run: mount it writable" in done.output


@every_command
def test_a_signal_lets_what_is_under_way_be_saved_and_the_same_command_goes_on(runs, name, tmp_path, monkeypatch):
    out, sent = tmp_path / "run", []
    number = signal.SIGTERM if name == "continual" else signal.SIGINT
    module, saving = (trials, "save") if name == "zeroth-order" else (checkpoint, "save")
    save = getattr(module, saving)

    def stopping(*args, **kwargs):
        if not sent:
            sent.append(number)
            os.kill(os.getpid(), number)
        return save(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(module, saving, stopping)
        done = runs.call(name, out)
    # A signal that comes while `train` saves is heard after the next chunk.
    saved = 2 if name == "train" else 1
    assert done.exit_code == 128 + number, done.output
    assert done.output.count("stopping: finishing this") == 1
    said, command = done.output.splitlines()[-2:]
    assert f"after {saved} of 3 trials" in said or f"after round {saved} of fedavg" in said
    assert "saved. The same command goes on from there:" in said
    assert command.startswith(f"  fedjax-core {name} ")
    assert f" {COMMANDS[name].flag} " in command
    assert command.endswith(f" --out {out}")
    assert len(list((out / COMMANDS[name].states).iterdir())) == saved
    assert not (out / COMMANDS[name].results[-1]).exists()
    done = runs.call(name, out)
    assert done.exit_code == 0, done.output
    check_same(runs, name, out)


@every_command
def test_a_second_process_is_refused(runs, name, tmp_path):
    for out in (runs.copy(name, tmp_path / "run"), tmp_path / "new"):
        (out / "checkpoints").mkdir(parents=True, exist_ok=True)
        with FileLock(out / "checkpoints" / files.LOCK):
            done = runs.call(name, out)
        assert done.exit_code == 2
        assert f"another process is at work in {out}: wait until" in done.output
    assert not (out / COMMANDS[name].marker).exists()


@every_command
def test_a_full_disk_is_told_with_what_is_saved(runs, name, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    out = unfinished(runs, name, tmp_path)
    saving = (trials, "_write") if name == "zeroth-order" else (checkpoint, "_to_disk")
    said = "2 of 3 trials of FZooS are saved" if name == "zeroth-order" else "fedavg is saved after round 3"
    with monkeypatch.context() as patch:
        patch.setattr(*saving, full)
        done = runs.call(name, out)
    assert done.exit_code == 5
    assert f"cannot write in {out} (No space left on device). {said}: make room" in done.output
    assert not list(out.rglob("unfinished*"))
    with monkeypatch.context() as patch:
        patch.setattr(figures, "write", full)
        done = runs.call(name, runs.copy(name, tmp_path / "finished"))
    assert done.exit_code == 5
    assert "saved, and the report is not: make room" in done.output


@every_command
def test_a_directory_of_another_command_is_refused(runs, name, tmp_path):
    for other in COMMANDS:
        if other != name:
            before = (runs.folder / other / COMMANDS[other].marker).read_bytes()
            done = runs.call(name, runs.folder / other)
            assert done.exit_code == 2
            assert "another command" in done.output or "holds files but no run" in done.output
            assert (runs.folder / other / COMMANDS[other].marker).read_bytes() == before
    done = runs.call(name, runs.folder / name / "checkpoints")
    assert done.exit_code == 2
    assert "holds files but no run" in done.output


def test_curves_that_are_damaged_or_of_another_trial_are_noticed(runs, tmp_path):
    out = runs.copy("zeroth-order", tmp_path / "run")
    first, second = (out / "curves" / f"FZooS-{trial}.npz" for trial in (0, 1))
    content = first.read_bytes()
    step = 8 * len(content) // 23
    load = functools.partial(trials.load, first, record(out, "zeroth-order")["run"], zeroth_order._of("FZooS", 0))
    whole = load()
    for bit in range(0, 8 * len(content), step):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        first.write_bytes(flipped)
        with pytest.MonkeyPatch.context() as patch:
            said = []
            patch.setattr(trials.warnings, "warn", lambda text, *args, said=said, **kwargs: said.append(text))
            found = load()
        if found is None:
            assert "is damaged" in said[0]
        else:  # of what numpy does not look at, such as times
            assert all(np.array_equal(found[key], whole[key]) for key in whole)
    first.write_bytes(content)
    shutil.copy(first, second)
    done = runs.call("zeroth-order", out)
    assert done.exit_code == 2
    assert "FZooS-1.npz is of FZooS, trial 0" in done.output
