"""Sweeps: trials equal runs of `train`, go on where they stopped, grow; the best settings, ties and edges."""

import json
import shutil
import signal

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from pipelines.cli.commands import main
from pipelines.experiment import setup
from pipelines.run import run_directory, train
from pipelines.run.run_directory import Interrupted
from pipelines.studies import sweep, sweep_report
from pipelines.studies.sweep_config import Setting, Sweep

pytestmark = pytest.mark.xdist_group("sweeps")  # in one process, which makes what they share once

SMALL = {
    "dataset": "iris",
    "clients": 6,
    "min_size": 2,
    "cohort_size": 3,
    "model": "logistic_regression",
    "rounds": 6,
    "eval_every": 2,
    "seeds": 2,
    "batch_size": 10,
    "epochs": 1,
    "x64": True,
}


def small(**choices):
    return Sweep(**{**SMALL, "methods": ("fedavg",), "grid": {"": {"client_lr": (0.05, 0.5)}}, **choices})


def quiet(text):
    pass


def same(one, other):
    assert one.keys() == other.keys()
    for trial, curves in one.items():
        assert curves.keys() == other[trial].keys()
        for name, values in curves.items():
            np.testing.assert_array_equal(values, other[trial][name], err_msg=f"{trial} {name}")


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A sweep: (sweep, results, directory).

    One method is judged by personal models, has a choice that cannot be traced and, with some of them, something to do
    after the last round; another has clients adapt before they predict.
    """
    out = tmp_path_factory.mktemp("sweep") / "study"
    asked = small(
        methods=("fedprox", "fedrep", "fedavg_ft"),
        grid={"": {"client_lr": (0.05, 0.5)}, "fedprox": {"mu": (0.1, 1.0)}, "fedrep": {"head_epochs": (1, 0)}},
        model="mlp",
        hidden=(4,),
        test_share=0.2,
    )
    return *sweep.run(asked, out, quiet), out


def test_trials_equal_runs_of_one_setting(done, tmp_path):
    """The same numbers as `train` gives with the setting and the seed, but for the order of sums."""
    asked, results, _ = done
    for method, place in (("fedprox", 2), ("fedrep", 0), ("fedavg_ft", 1)):
        setting = asked.settings_of_grid(method)[place]
        config = asked.config_of(method, setting)
        history = train.run(setup.prepare(config), tmp_path / method)[method].history
        final = {f"final/{name}" for name in history if method == "fedrep" and name.startswith("test/")}
        expected = {name for name in history if name.startswith(("round/", "test/"))} | final
        for s, seed in enumerate((0, 1)):
            curves = results[sweep.Trial(method, setting, seed)]
            held = {"validated/loss", "validated/accuracy"}
            assert set(curves) == expected | held | {f"final/{name}" for name in held if final}
            for name in expected:
                there = curves[name][0] if name in final else curves[name]
                np.testing.assert_allclose(there, history[name][s], rtol=1e-9, atol=1e-12, err_msg=name)


def test_validation_scores_are_of_the_examples_kept_back(done):
    asked, results, _ = done
    experiment = sweep.prepare(asked)
    held = experiment.federation.host_population("validation")
    assert held.num_examples > 0
    trial = next(iter(results))
    curves = results[trial]
    assert curves["validated/accuracy"].shape == (3,)
    counts = curves["validated/accuracy"] * held.num_examples
    np.testing.assert_allclose(counts, np.round(counts), atol=1e-4)


def test_the_table(done):
    asked, results, out = done
    found = pq.read_table(out / "sweep.parquet").to_pandas()
    assert len(found) == sum(len(curves["round/loss"]) for curves in results.values()) == 10 * 2 * 6
    assert set(found["method"]) == {"fedprox", "fedrep", "fedavg_ft"}
    assert found["mu"].isna().equals(found["method"] != "fedprox")
    setting = asked.settings_of_grid("fedprox")[3]
    rows = found[(found.method == "fedprox") & (found.setting == setting.name) & (found.seed == 1)]
    assert (rows["client_lr"] == 0.5).all()
    assert (rows["mu"] == 1).all()
    assert rows["finite"].all()
    curves = results[sweep.Trial("fedprox", setting, 1)]
    np.testing.assert_array_equal(rows["loss"], curves["round/loss"].astype(float))
    known = rows["test_accuracy"].dropna()
    assert list(rows.loc[known.index, "round"]) == [2, 4, 6]
    np.testing.assert_array_equal(known, curves["test/accuracy"].astype(float))
    rows = found[(found.method == "fedrep") & (found["head_epochs"] == 1)]
    assert list(rows.loc[rows["final_test_personal_accuracy"].notna(), "round"].unique()) == [6]


def report_again(out, target, *words):
    return CliRunner().invoke(main, ["report", str(out), "--out", str(target), *words])


def test_the_report_is_drawn_again_from_the_trials(done, tmp_path):
    _, _, out = done
    again = report_again(out, tmp_path / "again")
    assert again.exit_code == 0, again.output
    names = {path.name for path in (tmp_path / "again").iterdir()}
    assert names == {"summary.md", "summary.html", "results.tex", "sensitivity.png", "sensitivity.pdf"}
    for name in names:
        assert (tmp_path / "again" / name).read_bytes() == (out / name).read_bytes(), name


def test_the_report_of_a_sweep_that_was_stopped_or_spoiled(done, tmp_path, monkeypatch):
    asked, _, whole = done
    out = tmp_path / "study"
    shutil.copytree(whole, out)
    monkeypatch.setattr("pipelines.common.figures.write", lambda path, figure: None)
    monkeypatch.setattr("pipelines.common.figures.svg", lambda figure: b"")
    trial = sweep.Trial("fedprox", asked.settings_of_grid("fedprox")[0], 1)
    trial.path(out).unlink()
    assert report_again(out, tmp_path / "again").exit_code == 0
    text = (tmp_path / "again" / "summary.md").read_text()
    assert "**This sweep has not ended.** Not done yet: FedProx." in text
    assert not any(line.startswith("| FedProx") for line in text.splitlines())
    for spoil, words in (
        (lambda: (out / "sweep.parquet").write_bytes(b"mine"), "sweep.parquet was changed since it was written"),
        (lambda: trial.path(out).write_bytes(b"mine"), f"{trial.path(out)} is damaged"),
        (lambda: shutil.rmtree(out / "trials"), "no method of the sweep in"),
    ):
        spoil()
        refused = report_again(out, tmp_path / "none")
        assert refused.exit_code == 2
        assert words in refused.output
    assert not (tmp_path / "none").exists()


def test_what_is_trained_at_once_changes_nothing_but_last_bits(done, tmp_path):
    asked, results, _ = done
    asked = asked.replace(methods=("fedprox",), grid={"fedprox": asked.grid["fedprox"]}, at_once=3)
    _, others = sweep.run(asked, tmp_path / "study", quiet)
    for trial, curves in others.items():
        for name, values in curves.items():
            np.testing.assert_allclose(values, results[trial][name], rtol=1e-9, atol=1e-12)


def test_a_stopped_sweep_goes_on_to_the_same_numbers(tmp_path, monkeypatch):
    asked = small(at_once=4)
    _, whole = sweep.run(asked, tmp_path / "whole", quiet)
    calls = []

    def stop():
        calls.append(None)
        return signal.SIGINT if len(calls) == 2 else 0

    real = run_directory.at_work

    class Stopping:
        def __init__(self, *args):
            self.inner = real(*args)

        def __enter__(self):
            return self.inner.__enter__()._replace(stop=stop)

        def __exit__(self, *error):
            return self.inner.__exit__(*error)

    monkeypatch.setattr(run_directory, "at_work", Stopping)
    with pytest.raises(Interrupted, match=r"fedjax-core sweep .*--grid fedavg.client_lr=0.05,0.5"):
        sweep.run(asked, tmp_path / "parts", quiet)
    monkeypatch.setattr(run_directory, "at_work", real)
    files = sorted((tmp_path / "parts" / "trials" / "fedavg").iterdir())
    assert len(files) == 4
    with np.load(files[0]) as stored:
        assert len(stored["round/loss"]) == 4
        assert "state/0" in stored
    _, parts = sweep.run(asked, tmp_path / "parts", quiet)
    same(parts, whole)
    with np.load(files[0]) as stored:
        assert len(stored["round/loss"]) == 6
        assert "state/0" not in stored


def test_saved_states_of_every_kind_of_leaf_go_on(tmp_path, monkeypatch):
    """Typed keys, integers and tables of clients come back as they were."""
    monkeypatch.setattr(sweep, "SAVE_SECONDS", -1.0)
    asked = small(methods=("scaffold", "fedvarp"), at_once=4)
    _, found = sweep.run(asked, tmp_path / "study", quiet)
    assert all(len(curves["round/loss"]) == 6 for curves in found.values())


def test_more_values_seeds_and_methods_join(done, tmp_path):
    first = small(grid={"": {"client_lr": (0.5,)}}, seeds=1)
    out = tmp_path / "study"
    _, before = sweep.run(first, out, quiet)
    stamps = {path: path.stat().st_mtime_ns for path in (out / "trials" / "fedavg").iterdir()}
    more = small(methods=("fedprox",), grid={"": {"client_lr": (0.05,)}}, seeds=2)
    joined, found = sweep.run(more, out, quiet)
    assert joined.grid["fedavg"]["client_lr"] == (0.5,)
    assert joined.methods == ("fedavg", "fedprox")
    joined, found = sweep.run(small(grid={"": {"client_lr": (0.05,)}}), out, quiet)
    assert joined.grid["fedavg"]["client_lr"] == (0.05, 0.5)
    assert joined.methods == ("fedavg", "fedprox")
    assert len(found) == 4 + 2
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    ((trial, curves),) = before.items()
    (same_one,) = (curves for other, curves in found.items() if other.of == trial.of)
    np.testing.assert_array_equal(same_one["round/loss"], curves["round/loss"])
    with pytest.raises(ValueError, match="another sweep:\n  rounds: 8 here, 6 there"):
        sweep.run(small(rounds=8), out, quiet)
    with pytest.raises(ValueError, match="the grid of fedavg is over client_momentum here"):
        sweep.run(small(grid={"": {"client_momentum": (0.0, 0.9)}}), out, quiet)


def test_halving_trains_the_best_to_the_end(tmp_path):
    asked = small(grid={"": {"client_lr": (0.001, 0.01, 0.1, 1.0)}}, halving=2, rounds=8, seeds=2)
    assert asked.rungs("fedavg") == [(2, 2), (4, 1), (8, 0)]
    _, found = sweep.run(asked, tmp_path / "study", quiet)
    rounds = {}
    for trial, curves in found.items():
        rounds.setdefault(trial.setting.values["client_lr"], set()).add(len(curves["round/loss"]))
    assert sorted(map(tuple, rounds.values())) == [(2,), (2,), (4,), (8,)]
    plain = small(grid=asked.grid, rounds=8, seeds=2)
    _, all_of_them = sweep.run(plain, tmp_path / "plain", quiet)
    means = {}
    for trial, curves in all_of_them.items():  # who goes on is who leads in the sweep of all
        means.setdefault(trial.setting.values["client_lr"], []).append(sweep.score(curves, "accuracy", 2, 2))
    leading = sorted(means, key=lambda lr: -np.mean(means[lr]))[:2]
    assert {lr for lr, done in rounds.items() if done != {2}} == set(leading)
    for trial, curves in found.items():
        length = len(curves["round/loss"])
        np.testing.assert_allclose(curves["round/loss"], all_of_them[trial]["round/loss"][:length], rtol=1e-9)
    with pytest.raises(ValueError, match="another sweep"):
        sweep.run(asked.replace(seeds=3), tmp_path / "study", quiet)


def test_settings_that_diverge_are_marked_and_the_rest_goes_on(tmp_path):
    said = []
    asked = small(grid={"": {"client_lr": (0.1, 1e38)}}, seeds=1, x64=False, model="mlp")
    with jax.enable_x64(False):
        _, found = sweep.run(asked, tmp_path / "study", said.append)
    (best,) = sweep_report.best(asked, found, {"fedavg": "global"})
    assert best.setting.values == {"client_lr": 0.1}
    assert [setting.values["client_lr"] for setting in best.diverged] == [1e38]
    assert any("fedavg diverged with 1 of 2 settings: client_lr=1e+38" in line for line in said)
    table = pq.read_table(tmp_path / "study" / "sweep.parquet").to_pandas()
    assert not table[table.client_lr == 1e38].finite.iloc[-1]
    assert table[table.client_lr == 0.1].finite.all()


def test_a_damaged_trial_is_trained_again_and_a_table_edited_by_hand_is_written_again(done, tmp_path):
    asked = small(grid={"": {"client_lr": (0.5,)}}, seeds=1)
    out, said = tmp_path / "study", []
    _, before = sweep.run(asked, out, quiet)
    (path,) = (out / "trials" / "fedavg").iterdir()
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    whole = (out / "sweep.parquet").read_bytes()
    (out / "sweep.parquet").write_bytes(whole[:-1] + b"x")
    with pytest.warns(UserWarning, match="is damaged .*: the trial is run again"):
        _, after = sweep.run(asked, out, said.append)
    same(after, before)
    assert any("sweep.parquet was changed since it was written" in line for line in said)
    assert (out / "sweep.parquet").read_bytes() == whole


def curves_of(*values):
    rounds = {f"round/{name}": np.ones(6) for name in ("loss", "update_norm", "participants")}
    return {"validated/accuracy": np.asarray(values), "test/accuracy": np.asarray(values), **rounds}


def test_the_best_setting_is_that_of_the_validation_scores():
    asked = small(grid={"": {"client_lr": (0.1, 0.2, 0.3)}}, seeds=2)
    results = {}
    for setting, level in zip(asked.settings_of_grid("fedavg"), (0.5, 0.7, 0.6), strict=True):
        for seed in (0, 1):
            curves = curves_of(0.0, level, level, level + 0.01 * seed)
            curves["test/accuracy"] = 1 - curves["validated/accuracy"]
            results[sweep.Trial("fedavg", setting, seed)] = curves
    (best,) = sweep_report.best(asked, results, {"fedavg": "global"})
    assert best.setting.values == {"client_lr": 0.2}
    assert best.edges == []
    np.testing.assert_allclose(best.validation, [0.7, 0.7 + 0.01 / 3])
    np.testing.assert_allclose(best.test, 1 - best.validation)
    assert sweep_report.interval(np.asarray([1.0, 2.0, 3.0])) == "2.0000 ± 2.4841"  # t(2, 97.5 %) = 4.3027, / sqrt 3


def test_edges_and_ties():
    asked = small(methods=("fedavg", "fedprox"), grid={"": {"client_lr": (0.1, 0.2)}, "fedprox": {"mu": (0.1,)}})
    setting = asked.settings_of_grid("fedprox")[1]
    assert sweep_report._edges(asked, "fedprox", setting) == ["client_lr=0.2, the largest"]

    def best(*test, view="global"):
        return sweep_report.Best("fedavg", setting, np.zeros(3), np.asarray(test), view, [], [], 1)

    found = [best(0.80, 0.85, 0.9), best(0.81, 0.84, 0.9), best(0.70, 0.75, 0.81), best(0.1, np.nan, 0.1)]
    assert sweep_report.ties(found, "accuracy") == [True, True, False, False]
    assert sweep_report.ties([best(0.3), best(0.2)], "loss") == [False, True]
    own = [best(0.99, 0.98, view="personal"), best(0.7, 0.8), best(0.6, 0.58, view="personal"), best(0.2, 0.31)]
    assert sweep_report.ties(own, "accuracy") == [True, True, False, False]


def call(*words):
    return CliRunner().invoke(main, ["sweep", *map(str, words)])


def test_the_command(tmp_path):
    numbers = {name: value for name, value in SMALL.items() if name != "x64"}
    words = [word for name, value in numbers.items() for word in (f"--{name.replace('_', '-')}", value)]
    words += ["--method", "fedavg", "--grid", "client_lr=log:0.05:0.5:2", "--grid", "client_momentum=0,0.9"]
    result = call(*words, "--out", tmp_path / "study")
    assert result.exit_code == 0, result.output
    assert "written:" in result.output
    names = {path.name for path in (tmp_path / "study").iterdir()}
    assert {"summary.md", "results.tex", "sweep.parquet", "sensitivity.png", "sensitivity.pdf", "study.json"} <= names
    summary = (tmp_path / "study" / "summary.md").read_text()
    assert r"\textbf{" in (tmp_path / "study" / "results.tex").read_text()
    commands = [line for line in summary.splitlines() if line.startswith("fedjax-core")]
    assert len(commands) == 2
    assert commands[0].startswith("fedjax-core train")
    assert "--set fedavg.client_lr=" in commands[0]
    config = json.loads((tmp_path / "study" / "study.json").read_text())["config"]
    assert config["grid"] == {"fedavg": {"client_lr": [0.05, 0.5], "client_momentum": [0.0, 0.9]}}
    again = call("--config", tmp_path / "study", "--out", tmp_path / "study")  # a study is a configuration too
    assert again.exit_code == 0, again.output
    written = call("--config", tmp_path / "study", "--write-config", tmp_path / "sweep.toml")
    assert written.exit_code == 0, written.output
    read = call("--config", tmp_path / "sweep.toml", "--out", tmp_path / "study")
    assert read.exit_code == 0, read.output


def test_spaced_values_are_rounded_but_stay_apart():
    def values(text):
        return small(grid={"": {"client_lr": text}}).grid["fedavg"]["client_lr"]

    assert values("log:0.01:1:5") == (0.01, 0.0316, 0.1, 0.316, 1.0)
    assert values("lin:0.1:0.1234:3") == (0.1, 0.112, 0.1234)
    assert len(set(values("lin:1:1.01:900"))) == 900


MISTAKES = [
    ({"grid": {"": {"client_lrr": (1.0,)}}}, "did you mean 'client_lr'"),
    ({"grid": {}}, "grid is empty"),
    ({"grid": {"": {"client_lr": ()}}}, "grid of client_lr is empty"),
    ({"grid": {"fedsgd": {"client_lr": (1.0,)}}}, "unknown method in grid"),
    ({"grid": {"": {"client_lr": "0.1,x"}}}, "value 2 of 2: fedavg.client_lr must be a number"),
    ({"grid": {"": {"client_lr": (0.1, 0.1)}}}, "names 0.1 twice"),
    ({"grid": {"": {"client_lr": (0.1, -1)}}}, "value 2 of 2: client_lr"),
    ({"grid": {"": {"client_lr": "log:0:1:3"}}}, "both ends of a logarithmic grid are above 0"),
    ({"grid": {"": {"client_lr": "lin:1:2"}}}, "write lin:FROM:TO:HOW_MANY"),
    ({"grid": {"": {"client_lr": {"a": 1}}}}, "must be a list of values"),
    ({"grid": "client_lr"}, "must be method -> name -> values"),
    ({"settings": {"fedavg": {"client_lr": 1.0}}}, "is set to 1.0 and has a grid too"),
    ({"validation_share": 0.0}, "validation_share=0 with a sweep"),
    ({"patience": 2}, "patience means nothing to a sweep"),
    ({"staged": True}, "staged means nothing to a sweep"),
    ({"halving": 1}, "halving=1 keeps all"),
    ({"grid": {"": {"client_lr": "lin:0.1:1:90000"}}}, "2 to 1,000 values"),
    ({"grid": {"": {"client_lr": "lin:0.1:1:900"}}, "seeds": 900}, "more than 100,000 trials"),
]


@pytest.mark.parametrize(("choices", "said"), MISTAKES)
def test_mistakes_are_named(choices, said):
    with pytest.raises((ValueError, TypeError), match=said):
        small(**choices)


def test_a_value_that_a_method_refuses_is_named_with_its_place(tmp_path):
    asked = small(methods=("fedprox",), grid={"": {"client_lr": (0.1, 0.2)}, "fedprox": {"mu": (0.1, -1.0)}})
    with pytest.raises(ValueError, match=r"grid of fedprox, .*mu=-1.0 \(value 2 of 2\): mu must lie"):
        sweep.run(asked, tmp_path / "study", quiet)
    assert not (tmp_path / "study").exists()


def test_names_of_settings_are_those_of_their_values():
    one, other = Setting({"a": 1.0}, {"a": (1, 1)}), Setting({"a": 1.0}, {"a": (2, 3)})
    assert one.name == other.name
    assert hash(one) == hash(other)
    assert Setting({"a": 2.0}, {}).name != one.name


@pytest.mark.skipif(jax.device_count() < 2, reason="needs two devices")
def test_devices_share_the_trials(done, tmp_path):
    asked, results, _ = done
    asked = asked.replace(methods=("fedprox",), grid={"fedprox": asked.grid["fedprox"]}, mesh=2)
    _, others = sweep.run(asked, tmp_path / "study", quiet)
    for trial, curves in others.items():
        np.testing.assert_allclose(curves["round/loss"], results[trial]["round/loss"], rtol=1e-9)
