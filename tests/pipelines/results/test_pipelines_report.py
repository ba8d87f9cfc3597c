import csv
import json
import re
import warnings

import jax
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from fedjax_core import evaluate_clients
from pipelines.common.progress import size
from pipelines.configuration import methods
from pipelines.data.datasets import Dataset
from pipelines.experiment import setup
from pipelines.federation.assignment import Assignment
from pipelines.federation.federations import Federation, Part
from pipelines.results import report
from pipelines.results.history import evaluated_rounds
from pipelines.results.subject import of_experiment
from pipelines.run import checkpoint, train


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
        *("config.json", "checkpoints", "metrics.csv", "clients.csv", "results.tex"),
        *("summary.md", "summary.html", "summary.json", "curves.png", "curves.pdf", "clients.png", "clients.pdf"),
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
    assignment = Assignment.from_parts([[0, 1, 2], [], [3]])
    shares = train.class_shares(
        Federation(Dataset("four", examples, examples, 3), {"train": Part("train", assignment)})
    )
    np.testing.assert_allclose(shares, [[2 / 3, 0, 1 / 3], [np.nan] * 3, [0, 1, 0]])


def test_summary_repeats_the_numbers(finished, small, histories):
    text = (finished / "summary.md").read_text()
    row = next(line for line in text.splitlines() if line.startswith("| SCAFFOLD | ") and "±" in line)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    final = histories["scaffold"]["test/accuracy"][:, -1].astype(float)
    assert cells[1] == f"{100 * final.mean():.2f} ± {100 * final.std(ddof=1):.2f} %"
    with (finished / "metrics.csv").open() as file:
        sent = [int(r["bytes_up_total"]) for r in csv.DictReader(file) if r["method"] == "scaffold"]
    assert sum(sent) == 2 * 12 * 3 * 2 * 15 * 4  # seeds, rounds, participants, model and control, parameters, bytes
    assert cells[4] == size(sum(sent) // 2) == "4.3 kB"
    assert re.fullmatch(r"[\d.]+ s", cells[6])
    assert small.command(str(finished)) in text
    assert "| FedAvg | fedavg | client_lr=0.2, server_lr=1 |" in text
    assert "15 parameters" in text


def test_summary_json_is_what_the_history_ends_with(finished, small, histories):
    found = json.loads((finished / "summary.json").read_text())
    assert list(found) == ["fedavg", "scaffold"]
    for name, of_method in found.items():
        history, seeds = histories[name], of_method["seeds"]
        assert list(seeds) == ["0", "1"]
        for s, seed in enumerate(seeds.values()):
            assert seed["test_accuracy"] == pytest.approx(float(history["test/accuracy"][s, -1]))
            assert seed["test_loss"] == pytest.approx(float(history["test/loss"][s, -1]))
            tail = report.worst_decile(history["client/accuracy"][s].astype(float))
            assert seed["client_accuracy_worst_decile"] == pytest.approx(tail)
            above = np.flatnonzero(history["test/accuracy"][s] >= small.report.target)
            assert seed["rounds_to_target"] == (2 * (above[0] + 1) if len(above) else None)
        sent = [seed["bytes_up_total"] for seed in seeds.values()]
        assert sum(sent) == 2 * 12 * 3 * (2 if name == "scaffold" else 1) * 15 * 4
        assert of_method["bytes_up_total"] == sum(sent) / 2
        accuracies = [seed["test_accuracy"] for seed in seeds.values()]
        assert of_method["test_accuracy"] == pytest.approx(sum(accuracies) / 2)


def test_the_latex_table_has_the_same_cells(finished):
    rows = [line for line in (finished / "summary.md").read_text().splitlines() if line.startswith("| FedAvg |")]
    cells = [cell.strip() for cell in rows[0].strip("|").split("|")]
    text = (finished / "results.tex").read_text()
    expected = " & ".join(cells[:6]).replace("%", r"\%").replace("±", r"$\pm$")
    assert expected + r" \\" in text
    assert text.count(r"\\") == 3


def test_a_run_without_participants_has_a_report(small, tmp_path):
    """No client takes part in any round, and none has examples to be tested on or to be validated with."""
    empty = {"gap": 1000, "split_by": "position", "test_share": 0.2, "validation_share": 0.2}
    config = small.replace(methods=("fedavg",), rounds=1, sampler="bernoulli", participation=0.0, **empty, seeds=1)
    with jax.enable_x64(False), warnings.catch_warnings():
        warnings.simplefilter("error")
        results = train.train(config, tmp_path / "run")
    text = (tmp_path / "run" / "summary.md").read_text()
    assert "No client took part in any round of FedAvg: its model is the initial one." in text
    assert "No client has test examples" in text
    assert "No client has validation examples" in text
    assert text.count("| no examples |") == 1
    assert "nan" not in text.split("## Settings")[0]
    assert np.isnan(results["fedavg"].history["client/accuracy"]).all()
    assert results["fedavg"].history["client/accuracy"].shape == (1, 6)
    assert (tmp_path / "run" / "clients.pdf").exists()


@pytest.mark.parametrize("seeds", [1, 2])
@pytest.mark.parametrize("evaluations", [1, 3])
@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"client/accuracy": np.nan}, "no examples"),
        ({"round/participants": 0, "round/loss": np.nan}, "No client took part in any round of FedAvg"),
        ({"round/loss": 0.0}, "FedAvg"),
        ({"test/accuracy": 0.0, "client/accuracy": 0.0}, "| 0.00"),
        ({"test/accuracy": 1.0, "client/accuracy": 1.0}, "| 100.00"),
        ({"test/accuracy": np.nan, "test/loss": np.nan}, "no examples"),
    ],
)
def test_a_report_of_anything(seeds, evaluations, changed, words, small, experiment, tmp_path, monkeypatch):
    """What is drawn and written from histories that are empty, constant or unknown: no error and no warning."""
    config = small.replace(methods=("fedavg",), rounds=evaluations, eval_every=1, seeds=seeds)
    shapes = {
        **{name: (seeds, evaluations) for name in ("test/loss", "test/accuracy", "round/loss", "round/update_norm")},
        **{f"round/{name}": (seeds, evaluations) for name in ("bytes_up", "bytes_down", "participants")},
        **{f"client/{name}": (seeds, 6) for name in ("loss", "accuracy", "train_loss", "train_accuracy")},
    }
    rng = np.random.default_rng(0)
    history = {name: rng.uniform(0.2, 0.9, shape) for name, shape in shapes.items()}
    history |= {name: np.full(shapes[name], value) for name, value in changed.items()}
    for name in ("bytes_up", "bytes_down", "participants"):
        history[f"round/{name}"] = (3 * history[f"round/{name}"]).round().astype(np.int32)
    info = {"fedavg": {"compile_seconds": 1.0, "run_seconds": 1.0, "memory": 0}}
    monkeypatch.setattr(report.figures, "write", lambda path, figure: FigureCanvasAgg(figure).draw())
    with warnings.catch_warnings(), jax.enable_x64(False):
        warnings.simplefilter("error")
        report.write(tmp_path, experiment._replace(config=config), {"fedavg": history}, info, {"jax": "0"})
    text = (tmp_path / "summary.md").read_text().split("## Settings")[0]
    assert words in text
    assert "nan" not in text
    assert "inf " not in text


def test_rounds_to_target():
    accuracy = np.asarray([[0.5, 0.9, 0.8], [0.5, 0.6, 0.9]])
    rounds = np.asarray([5, 10, 15])
    assert report.rounds_to_target(accuracy, rounds, 0.9) == "12"
    assert report.rounds_to_target(accuracy, rounds, 0.5) == "5"
    assert report.rounds_to_target(accuracy[:, :2], rounds[:2], 0.9) == "10 (1 of 2 seeds)"
    assert report.rounds_to_target(accuracy, rounds, 0.99) == "not reached"


def test_transferred_is_exact_beyond_int32():
    history = {
        "round/bytes_up": np.full((2, 3), 2_000_000_001.0),
        "round/participants": np.full((2, 3), 1000, np.int32),
    }
    assert report.transferred(history, "bytes_up") == 3 * 1000 * 2_000_000_001


def test_mean_sd():
    assert report.mean_sd(np.asarray([0.9, 0.92])) == "91.00 ± 1.41 %"
    assert report.mean_sd(np.asarray([0.9])) == "90.00 %"
    assert report.mean_sd(np.asarray([0.9, np.nan, 0.92])) == "91.00 ± 1.41 %"
    assert report.mean_sd(np.asarray([np.nan, np.nan])) == "no examples"


def test_worst_decile_leaves_out_empty_clients():
    values = np.asarray([np.nan, *np.linspace(0.1, 1.0, 10)])
    assert report.worst_decile(values) == pytest.approx(0.1)
    assert np.isnan(report.worst_decile(np.full(3, np.nan)))


def test_curves_show_means_and_bands(small, experiment, histories):
    figure = report.curves(
        of_experiment(experiment), histories, evaluated_rounds(small.rounds, small.evaluation.eval_every)
    )
    accuracy, loss = figure.axes
    lines = {line.get_label(): line for line in accuracy.lines}
    assert {"FedAvg", "SCAFFOLD"} <= set(lines)
    np.testing.assert_array_equal(lines["SCAFFOLD"].get_xdata(), [2, 4, 6, 8, 10, 12])
    np.testing.assert_allclose(lines["SCAFFOLD"].get_ydata(), histories["scaffold"]["test/accuracy"].mean(axis=0))
    assert len(accuracy.collections) == len(loss.collections) == 2
    assert lines["FedAvg"].get_color() != lines["SCAFFOLD"].get_color()
    first = loss.lines[0].get_ydata()[0]
    assert first == pytest.approx(histories["fedavg"]["round/loss"][:, :2].mean())
    assert "accuracy" in accuracy.get_title()
    assert "loss" in loss.get_title()
    assert accuracy.get_xlabel() == "round"


def test_one_seed_has_no_band(small, experiment, histories):
    one = {name: {key: value[:1] for key, value in h.items()} for name, h in histories.items()}
    alone = experiment._replace(config=small.replace(seeds=1))
    figure = report.curves(of_experiment(alone), one, evaluated_rounds(12, 2))
    assert not figure.axes[0].collections


def test_histogram_counts_every_client(small, experiment, histories):
    figure = report.client_histogram(of_experiment(experiment), histories)
    for axis, name in zip(figure.axes, histories, strict=True):
        assert axis.get_title().startswith(f"{methods.paper_name(name)}\nmean ")
        assert sum(bar.get_height() for bar in axis.patches) == pytest.approx(small.federation.clients)
