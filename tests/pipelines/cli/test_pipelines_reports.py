"""`fedjax-core report`: the report of a run drawn again, as far as the run has come; what it refuses."""

import json
import shutil

import numpy as np
import pytest
from click.testing import CliRunner

from pipelines.cli.commands import main
from pipelines.common import files
from pipelines.run import measured, train
from tests.pages import pictures_of


def call(*words):
    return CliRunner().invoke(main, [str(word) for word in words])


@pytest.fixture
def run(finished, tmp_path):
    """A copy of a finished run, without its report."""
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    return out


def report_of(out):
    return {path.name: path.read_bytes() for path in out.iterdir() if path.is_file() and path.name != "config.json"}


def test_a_report_is_the_one_that_the_run_wrote(finished, run, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("a report needs no data and no model")

    for name in ("data.datasets.load", "experiment.setup.prepare", "run.checkpoint.restore_latest"):
        monkeypatch.setattr(f"pipelines.{name}", fail)
    again = call("report", run, "--out", tmp_path / "again")
    assert again.exit_code == 0, again.output
    assert (
        f"written: {tmp_path / 'again' / 'summary.md'}, .html and .json, results.tex, curves and clients"
        in again.output
    )
    assert len(pictures_of((tmp_path / "again" / "summary.html").read_text())) == 2
    there, drawn = report_of(finished), report_of(tmp_path / "again")
    assert set(there) - set(drawn) == {"metrics.csv", "clients.csv"}
    for name, content in drawn.items():
        # A copy says where it is in the command that repeats it.
        assert content.replace(str(run).encode(), str(finished).encode()) == there[name], name


def test_a_report_goes_into_the_run_and_changes_no_table(run, undrawn):
    for name in ("summary.md", "summary.html"):
        (run / name).unlink()
    before = report_of(run)
    assert call("report", run).exit_code == 0
    after = report_of(run)
    assert {name: after[name] for name in before if "summary" not in name} == {
        name: content for name, content in before.items() if "summary" not in name
    }
    assert {"summary.md", "summary.html"} <= set(after)


@pytest.fixture
def undrawn(monkeypatch):
    """Figures are made and not drawn, which is most of the time that a report takes."""
    monkeypatch.setattr("pipelines.common.figures.write", lambda path, figure: None)
    monkeypatch.setattr("pipelines.common.figures.svg", lambda figure: b"")


def shorten(run, method, but):
    for path in (run / "checkpoints" / method).iterdir():
        if path.name not in but:
            shutil.rmtree(path)


def test_a_run_that_was_stopped_is_shown_as_far_as_it_has_come(run, finished, undrawn):
    shorten(run, "scaffold", ["round-00000008"])
    found = measured.read(run)
    assert not found.ended
    assert found.histories["scaffold"]["test/accuracy"].shape == (2, 4)
    whole = measured.read(finished).histories["scaffold"]
    np.testing.assert_array_equal(found.histories["scaffold"]["round/loss"], whole["round/loss"][:, :8])
    assert call("report", run).exit_code == 0
    text = (run / "summary.md").read_text()
    assert "**This run has not ended.** SCAFFOLD has come to round 8 of 12." in text
    row = next(line for line in text.splitlines() if line.startswith("| SCAFFOLD | "))
    last = 100 * whole["test/accuracy"][:, 3].astype(float)
    assert row.split(" | ")[1:3] == [f"{last.mean():.2f} ± {last.std(ddof=1):.2f} %", ""]
    numbers = json.loads((run / "summary.json").read_text())["scaffold"]["seeds"]
    assert numbers["1"]["bytes_up_total"] == 8 * 3 * 2 * 15 * 4


def test_a_method_that_has_not_begun_is_named(run, undrawn):
    shorten(run, "scaffold", [])
    assert call("report", run).exit_code == 0
    assert "SCAFFOLD has not been evaluated yet." in (run / "summary.md").read_text()
    shorten(run, "fedavg", ["round-00000004"])
    assert call("report", run).exit_code == 0
    text = (run / "summary.md").read_text()
    assert "FedAvg has come to round 4 of 12." in text
    assert "clients.png" not in text


def test_seeds_that_joined_later_are_in_the_report(run, small, undrawn):
    """A batch of seeds that has not come as far as the first one."""
    first = measured.read(run).histories["fedavg"]
    grown = small.replace(seeds=3, methods=("fedavg",), eval_every=2)
    content = json.loads((run / "config.json").read_text())
    joined = json.loads(train.joined(grown, run).to_json())
    files.write_record(run / "config.json", {**content, "config": joined, "batches": [2, 1]})
    found = measured.read(run)
    assert not found.ended
    np.testing.assert_array_equal(found.histories["fedavg"]["round/loss"], first["round/loss"])
    assert call("report", run).exit_code == 0
    assert "FedAvg has been run with 2 of 3 seeds." in (run / "summary.md").read_text()


def damage(path):
    path.write_bytes(path.read_bytes()[:-3] + b"xyz")


def edited(path):
    path.write_text(path.read_text().replace("fedavg,0,3,", "fedavg,0,3,9", 1))


def cut(path):
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-2]))


def without_subject(run):
    content = json.loads((run / "config.json").read_text())
    files.write_record(run / "config.json", {k: v for k, v in content.items() if k != "subject"})


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda run: shutil.rmtree(run), "is no directory: give the --out of a run"),
        (lambda run: (shutil.rmtree(run), run.write_text("")), "is a file: give the --out of a run"),
        (lambda run: (shutil.rmtree(run), run.mkdir()), "is no run directory, it has no config.json and no study.json"),
        (lambda run: (shorten(run, "fedavg", []), shorten(run, "scaffold", [])), "has not been evaluated yet"),
        (lambda run: edited(run / "metrics.csv"), "metrics.csv is not what was measured (line 4 was edited)"),
        (lambda run: cut(run / "metrics.csv"), "metrics.csv is not what was measured (it has 47 lines and not 49)"),
        (lambda run: (run / "metrics.csv").write_bytes(b"\xff"), "metrics.csv is not what was measured"),
        (
            lambda run: damage(run / "checkpoints" / "scaffold" / "round-00000012" / "arrays.npz"),
            "round-00000012 is damaged (arrays.npz is not what was written, its sha256 differs): put it back",
        ),
        (
            lambda run: [damage(p) for p in (run / "checkpoints" / "fedavg.journal").iterdir()],
            "are not what was written, from byte",
        ),
        (without_subject, "does not say what its report needs"),
    ],
)
def test_what_is_no_run_or_is_spoiled_is_refused_before_anything_is_drawn(spoil, words, run, tmp_path):
    spoil(run)
    result = call("report", run, "--out", tmp_path / "again")
    assert result.exit_code == 2, result.output
    (line,) = [line for line in result.output.splitlines() if line.startswith("Error: ")]
    assert words in line
    assert not (tmp_path / "again").exists()


def test_a_full_directory_is_no_place_for_a_report(run, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("")
    result = call("report", run, "--out", tmp_path / "full")
    assert result.exit_code == 2
    assert f"--out {tmp_path / 'full'} is not empty: choose a new or an empty directory" in result.output
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine.txt"]


def test_a_run_that_can_only_be_read_has_its_report_elsewhere(run, monkeypatch):
    monkeypatch.setattr("pipelines.cli.report_commands.os.access", lambda path, mode: path != run)
    result = call("report", run)
    assert result.exit_code == 2
    assert f"Error: {run} cannot be written to: give a directory for the report by --out" in result.output
