"""Early stopping and the best model: a function of the validation scores, the same wherever a run was interrupted."""

import csv
import os
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_core import evaluate
from pipelines import Config, load_run
from pipelines.common.progress import Reporter
from pipelines.experiment import setup
from pipelines.results import early, history, report
from pipelines.run import train
from tests.pages import assert_drawn_again

VALIDATING = {"validation_share": 0.3, "methods": ("fedavg",), "eval_every": 1, "checkpoint_every": 2, "rounds": 9}


def config_of(**options) -> Config:
    return Config(validation_share=0.1, **options)


@pytest.mark.parametrize(
    ("options", "accuracy", "best", "ends", "stopped"),
    [
        ({"patience": 2}, [0.1, 0.3, 0.2, 0.3, 0.9], 1, 4, True),  # an equal one is no improvement
        ({"patience": 1}, [0.1, 0.3, 0.2, 0.9], 1, 3, True),
        ({"patience": 3}, [0.1, 0.3, 0.2, 0.9], 3, 4, False),
        ({"stop_at": 0.3}, [0.1, 0.3, 0.2], 1, 2, True),
        ({"stop_at": 0.3, "patience": 1}, [0.2, 0.1, 0.3], 0, 2, True),
        ({"stop_at": 0.0}, [0.0, 0.1], 0, 1, True),
        ({"keep_best": True}, [0.2, 0.1, 0.1], 0, 3, False),
        ({"patience": 2}, [np.nan, 0.2, np.nan, np.nan], 1, 4, True),
        ({"patience": 1, "best_by": "loss"}, [0.9, 0.1, 0.5], 1, 3, True),  # the loss is the accuracy here
    ],
)
def test_when_a_seed_stops_and_what_its_best_model_is(options, accuracy, best, ends, stopped):
    """By hand, and the same on the device, evaluation by evaluation, with another seed beside it."""
    config = config_of(**options)
    scores = np.stack([np.asarray(accuracy), np.linspace(0.1, 0.2, len(accuracy))]).astype(np.float32)
    found = early.course(config, {"validated/accuracy": scores, "validated/loss": scores})
    assert (found.best[0], found.ends[0], found.stopped[0]) == (best, ends, stopped)

    models = early.Models(
        *({"w": jnp.full((2, 1), -1.0)} for _ in range(2)),
        jnp.full(2, -jnp.inf),
        jnp.zeros(2, jnp.int32),
        jnp.zeros(2, bool),
    )
    for e, now in enumerate(scores.T):
        params = {"w": jnp.full((2, 1), float(e))}
        models = early.updated(config, models, params, {"accuracy": jnp.asarray(now), "loss": jnp.asarray(now)})
    assert models.best["w"][:, 0].tolist() == found.best.tolist()
    assert models.last["w"][:, 0].tolist() == (found.ends - 1).tolist()
    assert models.stopped.tolist() == found.stopped.tolist()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"patience": 3}, "patience=3 with validation_share=0"),
        ({"stop_at": 0.9}, "stop_at=0.9 with validation_share=0"),
        ({"keep_best": True}, "never by test examples; give validation_share"),
        ({"patience": 0, "validation_share": 0.1}, "patience"),
        ({"stop_at": 1.5, "validation_share": 0.1}, "stop_at"),
        ({"best_by": "luck", "validation_share": 0.1}, "unknown best_by .*there are accuracy, loss"),
    ],
)
def test_what_cannot_be(options, words):
    with pytest.raises(ValueError, match=words):
        Config(**options)


def test_an_empty_validation_part_is_refused(small):
    config = small.replace(**VALIDATING, patience=1, gap=1000, split_by="position")
    with jax.enable_x64(False), pytest.raises(ValueError, match="leaves no client an example for validation"):
        setup.prepare(config)


def test_nothing_is_reported_after_the_stop():
    config = config_of(patience=1, rounds=6, eval_every=2, checkpoint_every=2)
    measured = {
        "validated/accuracy": np.asarray([[0.5, 0.4, 0.9], [0.5, 0.6, 0.7]]),
        "validated/loss": np.zeros((2, 3)),
        "test/accuracy": np.asarray([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]]),
        **{f"round/{name}": np.ones((2, 6)) for name in ("loss", "update_norm", "bytes_up", "bytes_down")},
        "round/participants": np.full((2, 6), 3),
    }
    rounds = np.asarray([2, 4, 6])
    shown = early.reported(config, measured, rounds)
    assert shown["test/accuracy"].tolist() == [[0.1, 0.2, 0.2], [0.4, 0.5, 0.6]]
    assert shown["round/participants"].tolist() == [[3, 3, 3, 3, 0, 0], [3] * 6]
    assert report.transferred(shown, "bytes_up") == (4 * 3 + 6 * 3) / 2
    text = history.to_csv({"m": measured}, [0, 1], rounds, early.ends(config, {"m": measured}, rounds))
    rows = list(csv.DictReader(text.splitlines()))
    assert [int(row["round"]) for row in rows] == [1, 2, 3, 4, 1, 2, 3, 4, 5, 6]
    assert rows[1]["validation_accuracy"] == "0.5"


@pytest.fixture(scope="module")
def stopped(small, tmp_path_factory):
    """A run that stops early, interrupted between two checkpoints."""
    out = tmp_path_factory.mktemp("early") / "run"
    config = small.replace(**VALIDATING, patience=1)

    def stop(progression):
        if progression.round == 1:
            os.kill(os.getpid(), signal.SIGINT)

    with jax.enable_x64(False):
        for _ in range(2):
            try:
                results = train.train(config, out, reporter=Reporter(lambda text: None, stop, lambda: None))
            except train.Interrupted:
                continue
            break
    return config, out, results["fedavg"].history


def test_a_run_that_stops_early(stopped, tmp_path):
    config, out, measured = stopped
    found = early.course(config, measured)
    assert found.stopped.all()
    evaluations = measured["validated/accuracy"].shape[1]
    assert evaluations == found.ends.max() < 9
    with jax.enable_x64(False):
        at_once = train.train(config, tmp_path / "run")["fedavg"].history
        staged = train.train(config.replace(staged=True), tmp_path / "staged")["fedavg"].history
        experiment = setup.prepare(config)
        run = load_run(out)
        trained = run.methods["fedavg"]
        held = experiment.federation.population("validation").examples
        scores = [evaluate(experiment.metric_fn, trained.best_params(s), held)["accuracy"] for s in (0, 1)]
        last = [evaluate(experiment.metric_fn, trained.params(s), experiment.test)["accuracy"] for s in (0, 1)]
    for name, value in at_once.items():
        assert value.tobytes() == measured[name].tobytes(), name
    assert (out / "metrics.csv").read_bytes() == (tmp_path / "run" / "metrics.csv").read_bytes()
    assert (out / "clients.csv").read_bytes() == (tmp_path / "run" / "clients.csv").read_bytes()
    np.testing.assert_allclose(staged["validated/loss"], measured["validated/loss"], rtol=1e-5)
    np.testing.assert_allclose(scores, measured["validated/accuracy"][(0, 1), found.best], rtol=1e-6)
    np.testing.assert_allclose(last, measured["test/accuracy"][np.arange(2), found.ends - 1], rtol=1e-6)
    text = (out / "summary.md").read_text()
    assert "| of the best model | its round | rounds |" in text
    assert f"{found.ends.mean():.0f} (2 of 2 seeds stopped)" in text
    assert "--patience 1" in text
    assert "best_accuracy" in (out / "clients.csv").read_text().splitlines()[0]
    assert train.train(config, out)["fedavg"].history["test/accuracy"].shape[1] == evaluations
    assert_drawn_again(out, tmp_path / "again")


def test_runs_without_validation_keep_no_best_model(finished):
    with pytest.raises(ValueError, match="kept no best model: train with patience"):
        load_run(finished, methods=["fedavg"], with_data=False).methods["fedavg"].best_params()


def test_seeds_that_join_later_stop_by_themselves(stopped, tmp_path):
    config, out, before = stopped
    grown = tmp_path / "grown"
    shutil.copytree(out, grown)
    more = config.replace(seeds=3)
    with jax.enable_x64(False):
        measured = train.train(more, grown)["fedavg"].history
        experiment = setup.prepare(more)
        trained = load_run(grown).methods["fedavg"]
        held = experiment.federation.population("validation").examples
        scores = [evaluate(experiment.metric_fn, trained.best_params(s), held)["accuracy"] for s in range(3)]
    found, alone = early.course(more, measured), early.course(config, before)
    assert found.stopped.all()
    assert found.ends[:2].tolist() == alone.ends.tolist()
    np.testing.assert_allclose(scores, measured["validated/accuracy"][range(3), found.best], rtol=1e-6)
    made = trained.history["validated/accuracy"]
    np.testing.assert_array_equal(made, measured["validated/accuracy"])
    rows = list(csv.DictReader((grown / "metrics.csv").read_text().splitlines()))
    assert [sum(row["seed"] == str(seed) for row in rows) for seed in range(3)] == found.ends.tolist()
    assert rows[: alone.ends.sum()] == list(csv.DictReader((out / "metrics.csv").read_text().splitlines()))


def test_a_run_that_had_not_stopped_goes_on_as_if_it_had_been_longer(stopped, tmp_path):
    config, out, measured = stopped
    short = config.replace(rounds=1)
    with jax.enable_x64(False):
        train.train(short, tmp_path / "run")
        grown = train.train(config, tmp_path / "run")["fedavg"].history
    for name, value in measured.items():
        assert value.tobytes() == grown[name].tobytes(), name
    assert (tmp_path / "run" / "metrics.csv").read_bytes() == (out / "metrics.csv").read_bytes()


@pytest.mark.parametrize("staged", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_on_a_mesh_the_same_seeds_stop(stopped, tmp_path, staged):
    """Interrupted there too: what is remembered is put back on the devices."""
    config, _, measured = stopped
    config = config.replace(mesh=2, staged=staged)

    def stop(progression):
        if progression.round == 1:
            os.kill(os.getpid(), signal.SIGINT)

    with jax.enable_x64(False):
        with pytest.raises(train.Interrupted):
            train.train(config, tmp_path / "run", reporter=Reporter(lambda text: None, stop, lambda: None))
        on_mesh = train.train(config, tmp_path / "run")["fedavg"].history
    np.testing.assert_allclose(on_mesh["validated/loss"], measured["validated/loss"], rtol=1e-5)
    np.testing.assert_array_equal(early.course(config, on_mesh).ends, early.course(config, measured).ends)


def test_what_a_stopped_seed_does_later_is_no_divergence():
    measured = {
        "round/loss": np.asarray([[1.0, np.nan], [1.0, 1.0]]),
        "round/update_norm": np.asarray([[1.0, np.inf], [1.0, 1.0]]),
        "round/participants": np.full((2, 2), 3),
    }
    assert history.first_bad_round(measured) == (0, 1)
    assert history.first_bad_round(history.until(measured, np.asarray([1, 2]))) is None


@pytest.mark.parametrize("begin", [0, 2])
def test_rows_that_are_appended_end_where_a_seed_stopped(begin):
    rounds, eval_rounds = 6, np.asarray([2, 4, 6])
    measured = {
        **{f"round/{name}": np.ones((2, rounds)) for name in ("loss", "update_norm", "bytes_up", "bytes_down")},
        "round/participants": np.full((2, rounds), 3),
        "validated/accuracy": np.asarray([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]]),
    }
    new, ends = history.after(measured, begin, begin // 2), {"m": np.asarray([4, 6])}
    columns = history.csv_columns({"m": measured})
    lines = history.csv_rows({"m": new}, [0, 1], eval_rounds, columns, begin, ends).splitlines()
    whole = history.to_csv({"m": measured}, [0, 1], eval_rounds, ends).splitlines()[1:]
    assert lines == [line for line in whole if int(line.split(",")[2]) > begin]
    assert len(whole) == 10
