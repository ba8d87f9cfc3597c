import csv
import re

import jax
import numpy as np
import pytest

from fedjax_core import evaluate_clients
from pipelines import checkpoint, report, setup, train
from pipelines.assignment import Assignment
from pipelines.data import Dataset
from pipelines.federation import Federation, Part
from pipelines.history import evaluated_rounds


@pytest.fixture(scope="module")
def experiment(small):
    with jax.enable_x64(False):
        return setup.prepare(small)


@pytest.fixture(scope="module")
def histories(finished, experiment):
    found = {}
    for name, algorithm in experiment.algorithms.items():
        with jax.enable_x64(False):
            shapes = jax.eval_shape(lambda k, a=algorithm: setup.initial_states(experiment, a, k), experiment.keys)
        found[name] = checkpoint.restore_latest(finished / "checkpoints" / name, shapes).arrays
    return found


def test_every_file_is_there(finished):
    names = {path.name for path in finished.iterdir()}
    assert names == {
        *("config.json", "checkpoints", "metrics.csv", "clients.csv", "curves.png", "clients.png", "summary.md")
    }
    for name in ("curves.png", "clients.png"):
        content = (finished / name).read_bytes()
        assert content.startswith(b"\x89PNG")
        assert len(content) > 10_000


def test_clients_csv_is_what_the_final_model_does(finished, small, experiment):
    with (finished / "clients.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if (row["method"], row["seed"]) == ("scaffold", "1")]
    assert [int(row["examples"]) for row in rows] == experiment.population.sizes.tolist()
    params = jax.tree.map(lambda leaf: leaf[1], train.final_params(finished, "scaffold"))
    own = evaluate_clients(experiment.metric_fn, params, experiment.population)
    np.testing.assert_allclose([float(row["train_accuracy"]) for row in rows], own["accuracy"], rtol=1e-6)
    np.testing.assert_allclose([float(row["train_loss"]) for row in rows], own["loss"], rtol=1e-5)
    # Held out, by hand: accuracy per class on the test part, averaged with the client's shares of the classes.
    hits = np.asarray(experiment.metric_fn(params, experiment.test)["accuracy"])
    labels = np.asarray(experiment.test["y"])
    per_class = np.asarray([hits[labels == k].mean() for k in range(3)])
    for i, row in enumerate(rows):
        mix = np.bincount(np.asarray(experiment.population.client(i)["y"]), minlength=3)
        assert float(row["accuracy"]) == pytest.approx((mix / mix.sum()) @ per_class, rel=1e-6)


def test_class_shares():
    examples = {"x": np.zeros((4, 1)), "y": np.asarray([0, 0, 2, 1], np.int32)}
    dealt = Assignment.from_parts([[0, 1, 2], [], [3]])
    shares = train.class_shares(Federation(Dataset("four", examples, examples, 3), {"train": Part("train", dealt)}))
    np.testing.assert_allclose(shares, [[2 / 3, 0, 1 / 3], [np.nan] * 3, [0, 1, 0]])


def test_summary_repeats_the_numbers(finished, small, histories):
    text = (finished / "summary.md").read_text()
    row = next(line for line in text.splitlines() if line.startswith("| scaffold | ") and "±" in line)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    final = histories["scaffold"]["test/accuracy"][:, -1].astype(float)
    assert cells[1] == f"{100 * final.mean():.2f} ± {100 * final.std(ddof=1):.2f} %"
    with (finished / "metrics.csv").open() as file:
        sent = [int(r["uploaded_total"]) for r in csv.DictReader(file) if r["method"] == "scaffold"]
    assert sum(sent) == 2 * 12 * 3 * 2 * 15  # seeds, rounds, participants, model and control, parameters
    assert cells[4] == f"{sum(sent) // 2:,}"
    assert re.fullmatch(r"[\d.]+ s", cells[6])
    assert small.command(str(finished)) in text
    assert "fedavg | client_lr=0.2, server_lr=1 |" in text
    assert "15 parameters" in text


def test_rounds_to_target():
    accuracy = np.asarray([[0.5, 0.9, 0.8], [0.5, 0.6, 0.9]])
    rounds = np.asarray([5, 10, 15])
    assert report.rounds_to_target(accuracy, rounds, 0.9) == "12"
    assert report.rounds_to_target(accuracy, rounds, 0.5) == "5"
    assert report.rounds_to_target(accuracy[:, :2], rounds[:2], 0.9) == "10 (1 of 2 seeds)"
    assert report.rounds_to_target(accuracy, rounds, 0.99) == "not reached"


def test_transferred_is_exact_beyond_int32():
    history = {
        "round/uploaded": np.full((2, 3), 2_000_000_001, np.int32),
        "round/participants": np.full((2, 3), 1000, np.int32),
    }
    assert report.transferred(history, "uploaded") == 3 * 1000 * 2_000_000_001


def test_mean_sd():
    assert report.mean_sd(np.asarray([0.9, 0.92])) == "91.00 ± 1.41 %"
    assert report.mean_sd(np.asarray([0.9])) == "90.00 %"


def test_worst_decile_leaves_out_empty_clients():
    values = np.asarray([np.nan, *np.linspace(0.1, 1.0, 10)])
    assert report.worst_decile(values) == pytest.approx(0.1)


def test_curves_show_means_and_bands(small, experiment, histories):
    figure = report.curves(experiment, histories, evaluated_rounds(small.rounds, small.eval_every))
    accuracy, loss = figure.axes
    lines = {line.get_label(): line for line in accuracy.lines}
    assert {"fedavg", "scaffold"} <= set(lines)
    np.testing.assert_array_equal(lines["scaffold"].get_xdata(), [2, 4, 6, 8, 10, 12])
    np.testing.assert_allclose(lines["scaffold"].get_ydata(), histories["scaffold"]["test/accuracy"].mean(axis=0))
    assert len(accuracy.collections) == len(loss.collections) == 2
    assert lines["fedavg"].get_color() != lines["scaffold"].get_color()
    first = loss.lines[0].get_ydata()[0]
    assert first == pytest.approx(histories["fedavg"]["round/loss"][:, :2].mean())
    assert "accuracy" in accuracy.get_title()
    assert "loss" in loss.get_title()
    assert accuracy.get_xlabel() == "round"


def test_one_seed_has_no_band(small, experiment, histories):
    import dataclasses

    one = {name: {key: value[:1] for key, value in h.items()} for name, h in histories.items()}
    alone = experiment._replace(config=dataclasses.replace(small, seeds=1))
    figure = report.curves(alone, one, evaluated_rounds(12, 2))
    assert not figure.axes[0].collections


def test_histogram_counts_every_client(small, experiment, histories):
    figure = report.client_histogram(experiment, histories)
    for axis, name in zip(figure.axes, histories, strict=True):
        assert axis.get_title() == name
        assert sum(bar.get_height() for bar in axis.patches) == pytest.approx(small.clients)
