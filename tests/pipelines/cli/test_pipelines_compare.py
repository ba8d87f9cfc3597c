"""`fedjax-core compare`: numbers against NumPy by hand, what is unfair, what is refused, one page without a network."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from click.testing import CliRunner

from pipelines.cli.commands import main
from pipelines.common import files
from pipelines.common.progress import size
from pipelines.run import comparison, measured, train
from tests.pages import pictures_of


def call(*words):
    return CliRunner().invoke(main, ["compare", *(str(word) for word in words)])


@pytest.fixture(scope="module")
def other(small, tmp_path_factory):
    """A run of one method of the first one, with another step size, fewer rounds and more seeds."""
    out = tmp_path_factory.mktemp("compare") / "slow"
    with jax.enable_x64(False):
        train.train(small.replace(methods=("fedavg",), client_lr=0.01, rounds=8, seeds=3), out)
    return out


@pytest.fixture(scope="module")
def found(finished, other):
    return comparison.load([finished, other])


@pytest.fixture(scope="module")
def page(finished, other, tmp_path_factory):
    """The directory of a comparison, and what the command said."""
    out = tmp_path_factory.mktemp("compared") / "page"
    result = call(finished, other, "--out", out)
    assert result.exit_code == 0, result.output
    return out, result.output


def tables_of(text):
    """The tables of a Markdown text: rows of cells."""
    blocks = [block.splitlines() for block in text.split("\n\n") if block.startswith("| ")]
    return [
        [[cell.strip() for cell in line.strip("|").split("|")] for line in block if "---" not in line]
        for block in blocks
    ]


def percent(values):
    return f"{100 * values.mean():.2f} ± {100 * values.std(ddof=1):.2f} %"


def plain(values):
    return f"{values.mean():.4f} ± {values.std(ddof=1):.4f}"


def test_the_table_by_hand(page, finished, other):
    _, results, *_ = tables_of((page[0] / "comparison.md").read_text())
    header, *rows = results
    assert header == [
        *("run", "method", "seeds", "rounds", "final accuracy", "best accuracy", "final loss", "best loss"),
        *("rounds to 80 %", "sent up", "sent down", "compile", "run"),
    ]
    assert [row[:2] for row in rows] == [["run", "FedAvg"], ["run", "SCAFFOLD"], ["slow", "FedAvg"]]
    assert [row[4].startswith("**") for row in rows] == expected_ties(finished, other)
    for row, out, method in zip(rows, (finished, finished, other), ("fedavg", "scaffold", "fedavg"), strict=True):
        history = measured.read(out).histories[method]
        accuracy, loss = (history[f"test/{name}"].astype(float) for name in ("accuracy", "loss"))
        row[4] = row[4].strip("*")
        assert row[2:8] == [
            str(len(accuracy)),
            str(history["round/loss"].shape[1]),
            percent(accuracy[:, -1]),
            percent(accuracy.max(axis=1)),
            plain(loss[:, -1]),
            plain(loss.min(axis=1)),
        ]
        first = [2 * (np.flatnonzero(each >= 0.8)[0] + 1) if (each >= 0.8).any() else None for each in accuracy]
        there = [each for each in first if each is not None]
        few = f" ({len(there)} of {len(first)} seeds)" if len(there) < len(first) else ""
        assert row[8] == (f"{np.mean(there):.0f}{few}" if there else "not reached")
        sent = history["round/bytes_up"].astype(float) * history["round/participants"]
        assert row[9] == size(round(sent.sum() / len(accuracy)))


def cauchy(values):
    """The p-value of a paired t-test of two differences: with one degree of freedom Student's t is Cauchy's."""
    error = values.std(ddof=1) / np.sqrt(2)
    return None if error == 0 else 1 - 2 / np.pi * np.arctan(abs(values.mean() / error))


def expected_ties(finished, other):
    runs = [measured.read(finished).histories["fedavg"], measured.read(finished).histories["scaffold"]]
    finals = [each["test/accuracy"][:, -1].astype(float) for each in [*runs, measured.read(other).histories["fedavg"]]]
    best = max(finals, key=lambda values: values.mean())
    marked = []
    for values in finals:
        p = cauchy(values[:2] - best[:2])
        marked.append(np.array_equal(values[:2], best[:2]) or (p is not None and p >= 0.05))
    return marked


def test_no_method_is_best_where_seeds_are_no_pairs(finished):
    run = measured.read(finished)
    assert any(comparison.ties(comparison.of([run, run], ["run", "again"], 0.8)))
    assert not any(comparison.ties(comparison.of([run, identity_with(run, clients="other")], ["run", "again"], 0.8)))


def test_the_differences_by_hand(page, finished, other):
    *_, differences, _ = tables_of((page[0] / "comparison.md").read_text())
    one, slow = measured.read(finished).histories, measured.read(other).histories
    first = one["fedavg"]["test/accuracy"][:, -1].astype(float)
    expected = {
        "run/SCAFFOLD": one["scaffold"]["test/accuracy"][:, -1] - first,
        "slow/FedAvg": slow["fedavg"]["test/accuracy"][:2, -1] - first,  # seeds 0 and 1 are in both
    }
    assert [row[:3] for row in differences[1:]] == [[label, "run/FedAvg", "2"] for label in expected]
    for row, values in zip(differences[1:], expected.values(), strict=True):
        mean, error = values.mean(), values.std(ddof=1) / np.sqrt(2)
        half = np.tan(np.pi * 0.475) * error
        assert row[3] == f"{100 * mean:+.2f} ± {100 * half:.2f}"
        p = cauchy(values)
        assert row[4] == "-" if p is None else float(row[4]) == pytest.approx(p, rel=5e-3)


def test_what_differs_comes_first_and_what_is_the_same_is_said(page):
    text = (page[0] / "comparison.md").read_text()
    assert text.index("## What differs") < text.index("## What makes this unfair") < text.index("## Results")
    differs = tables_of(text)[0]
    assert differs[0] == ["choice", "run", "slow"]
    assert {row[0]: row[1:] for row in differs[1:]} == {
        "methods": ["fedavg, scaffold", "fedavg"],
        "client_lr": ["0.2", "0.01"],
        "rounds": ["12", "8"],
        "seeds": ["2", "3"],
    }
    (same,) = [line for line in text.splitlines() if line.startswith("The same in all of them: ")]
    assert "dataset=iris, clients=6" in same
    assert same.endswith("and all others at their defaults.")


def test_the_page_asks_for_nothing_and_says_how_to_run_all_of_it_again(page, small, finished, other):
    out, said = page
    assert {path.name for path in out.iterdir()} == {"comparison.md", "comparison.html", "curves.png", "curves.pdf"}
    html = (out / "comparison.html").read_text()
    assert len(pictures_of(html)) == 1
    for label in ("run/FedAvg", "run/SCAFFOLD", "slow/FedAvg"):
        assert f"<td>{label}</td>" in html
    text = (out / "comparison.md").read_text()
    for command in (
        small.command(str(finished)),
        measured.read(other).config.command(str(other)),
        f"fedjax-core compare {finished} {other} --out {out}",
    ):
        assert command in text.splitlines()
    assert "note: The numbers of rounds are others (run: 12; slow: 8)." in said
    assert "note: The seeds are others (run: 0, 1; slow: 0 to 2)." in said
    assert f"written: {out / 'comparison.html'} and .md, curves.png and .pdf" in said


def test_the_figure_has_a_band_for_every_method_of_every_run(found):
    figure = comparison.curves(found)
    accuracy, loss = figure.axes
    lines = {line.get_label(): line for line in loss.lines}
    assert list(lines) == ["run/FedAvg", "run/SCAFFOLD", "slow/FedAvg"]
    assert len(loss.collections) == len(accuracy.collections) == 3
    history = found.runs[1].histories["fedavg"]
    np.testing.assert_array_equal(lines["slow/FedAvg"].get_xdata(), [2, 4, 6, 8])
    np.testing.assert_allclose(lines["slow/FedAvg"].get_ydata(), history["test/loss"].mean(axis=0), rtol=1e-6)
    assert len({(line.get_color(), line.get_linestyle()) for line in lines.values()}) == 3


def test_another_target(finished, other):
    header, rows = comparison.rows(comparison.load([finished, other], 0.999))
    assert header[8] == "rounds to 99.9 %"
    assert [row[8] for row in rows] == ["not reached"] * 3


def test_names_tell_runs_apart():
    assert comparison.run_names([Path("/a/run"), Path("/b/other")]) == ["run", "other"]
    assert comparison.run_names([Path("/a/x/run"), Path("/a/y/run"), Path("/b/z")]) == ["x/run", "y/run", "b/z"]


def record_with(run, **changed):
    return run._replace(record={**run.record, **changed})


def identity_with(run, **changed):
    return record_with(run, identity={**run.record["identity"], **changed})


def configured(run, **changed):
    return run._replace(subject=run.subject._replace(config=run.config.replace(**changed)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda run: run, ""),
        (
            lambda run: identity_with(run, examples="other" * 9),
            "The examples are others, so that accuracies are of other",
        ),
        (lambda run: identity_with(run, clients="other" * 9), "The same examples are held by other clients"),
        (lambda run: record_with(run, identity={}), "Nothing is known of the examples of again"),
        (lambda run: configured(run, evaluate_clients=3), "Not as many clients are tested by models of their own"),
        (
            lambda run: run._replace(subject=run.subject._replace(parts={"train": 5, "test": 9})),
            "test parts of clients",
        ),
        (lambda run: identity_with(run, keys="rbg"), "The random keys are of other kinds"),
        (lambda run: configured(run, rounds=20), "The numbers of rounds are others (run: 12; again: 20)"),
        (lambda run: configured(run, first_seed=4), "The seeds are others (run: 0, 1; again: 4, 5)"),
        (lambda run: configured(run, x64=True), "Not all are in double precision (x64: run: no; again: yes)"),
        (lambda run: configured(run, eval_every=3), "They are evaluated at other rounds"),
        (lambda run: record_with(run, versions={"device": "TPU v5e"}), "They ran on other devices"),
        (
            lambda run: run._replace(histories={"fedavg": run.histories["fedavg"]}),
            "Methods that have not been evaluated yet are left out (again: scaffold)",
        ),
    ],
)
def test_what_is_unfair(change, words, finished):
    run = measured.read(finished)
    lines = comparison.unfair(comparison.of([run, change(run)], ["run", "again"], 0.8))
    if words:
        assert any(words in line for line in lines), lines
    else:
        assert lines == []


def test_examples_in_another_precision_cannot_be_told_from_others(finished):
    run = measured.read(finished)
    lines = comparison.unfair(
        comparison.of([run, configured(identity_with(run, examples="x"), x64=True)], ["a", "b"], 0.8)
    )
    assert lines[0].startswith("Whether the examples are the same cannot be told: their digests are others (a: ")
    assert not any("accuracies are of other tasks" in line for line in lines)


def test_the_best_is_no_worse_than_what_comes_of_it_in_the_end(finished):
    run = measured.read(finished)
    history = {
        **run.histories["fedavg"],
        "final/test/accuracy": np.asarray([1.0, 0.1]),
        "final/test/loss": np.asarray([9.0, 0.0]),
    }
    (entry,) = comparison.of([run._replace(histories={"fedavg": history})], ["a"], 0.8).entries
    accuracy, loss = history["test/accuracy"].astype(float), history["test/loss"].astype(float)
    assert entry.best_accuracy.tolist() == [1.0, accuracy[1].max()]
    assert entry.best_loss.tolist() == [loss[0].min(), 0.0]
    assert entry.final_accuracy.tolist() == [1.0, 0.1]


def test_other_federations_and_other_seeds_are_no_pairs(finished):
    run = measured.read(finished)
    same = comparison.differences(comparison.of([run, run], ["run", "again"], 0.8))
    assert [(each.one.label, each.other.label) for each in same] == [
        ("run/SCAFFOLD", "run/FedAvg"),
        ("again/FedAvg", "run/FedAvg"),
        ("again/SCAFFOLD", "run/FedAvg"),
        ("again/SCAFFOLD", "run/SCAFFOLD"),
    ]
    assert same[-1].p is None  # nothing differs
    for changed in (identity_with(run, clients="other"), configured(run, first_seed=7), record_with(run, identity={})):
        pairs = comparison.differences(comparison.of([run, changed], ["run", "again"], 0.8))
        assert {each.one.label for each in pairs} <= {"run/SCAFFOLD", "again/SCAFFOLD"}
        assert all(each.one.run == each.other.run for each in pairs)


def copied(run, tmp_path):
    shutil.copytree(run, tmp_path / "copy")
    return tmp_path / "copy"


def unevaluated(run, tmp_path):
    out = copied(run, tmp_path)
    for path in (out / "checkpoints").iterdir():
        if path.is_dir():
            shutil.rmtree(path)
    return out


def edited(run, tmp_path):
    out = copied(run, tmp_path)
    (out / "metrics.csv").write_text((out / "metrics.csv").read_text().replace(",0,2,", ",0,2,1", 1))
    return out


def a_sweep(run, tmp_path):
    (tmp_path / "sweep").mkdir()
    files.write_record(tmp_path / "sweep" / "study.json", {"config": {}, "command": "sweep"})
    return tmp_path / "sweep"


REFUSED = {
    "one run alone": (lambda run, other, t: [run], "there is 1 run to compare: name two or more"),
    "the same twice": (lambda run, other, t: [run, other, run.parent / "." / run.name], "are the same directory"),
    "a copy": (lambda run, other, t: [run, copied(run, t)], "are copies of one run: leave one of them out"),
    "no directory": (lambda run, other, t: [run, t / "none"], "none is no directory: give the --out of a run"),
    "no run": (lambda run, other, t: [run, t], "is no run directory, it has no config.json"),
    "nothing evaluated": (lambda run, other, t: [run, unevaluated(other, t)], "has not been evaluated yet"),
    "edited": (
        lambda run, other, t: [run, edited(other, t)],
        "metrics.csv is not what was measured (line 3 was edited)",
    ),
    "two kinds": (lambda run, other, t: [run, a_sweep(run, t)], "is of `fedjax-core train` and "),
    "two sweeps": (
        lambda run, other, t: [a_sweep(run, t), shutil.copytree(t / "sweep", t / "b")],
        "`fedjax-core report ",
    ),
    "a sweep first": (lambda run, other, t: [a_sweep(run, t), run], "`fedjax-core sweep` and "),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_compared_is_refused_before_anything_is_drawn(name, finished, other, tmp_path):
    make, words = REFUSED[name]
    result = call(*make(finished, other, tmp_path), "--out", tmp_path / "out")
    assert result.exit_code == 2, result.output
    (line,) = [line for line in result.output.splitlines() if line.startswith("Error: ")]
    assert words in line
    assert not (tmp_path / "out").exists()


def test_a_full_directory_and_an_impossible_target_are_refused(finished, other, tmp_path):
    (tmp_path / "mine.txt").write_text("")
    result = call(finished, other, "--out", tmp_path)
    assert (result.exit_code, "is not empty: choose a new or an empty directory" in result.output) == (2, True)
    result = call(finished, other, "--out", tmp_path / "out", "--target", "80")
    assert result.exit_code == 2
    assert "80" in result.output


def test_the_numbers_of_a_run_that_was_stopped_are_those_so_far(finished, other, tmp_path):
    out = copied(other, tmp_path)
    for path in sorted((out / "checkpoints" / "fedavg").iterdir())[1:]:
        shutil.rmtree(path)
    found = comparison.load([finished, out])
    assert found.entries[-1].rounds.tolist() == [2, 4]
    lines = comparison.unfair(found)
    assert "Not all have ended, and are shown as far as they have come (copy/FedAvg at round 4 of 8)." in lines
    assert json.loads((out / "config.json").read_text())["config"]["rounds"] == 8
