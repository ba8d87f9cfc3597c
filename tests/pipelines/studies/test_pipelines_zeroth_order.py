"""The zeroth-order experiments: the functions against plain NumPy, and a small study from the command line."""

import csv
import os
import subprocess
import sys
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from click.testing import CliRunner
from sklearn.metrics import f1_score, jaccard_score, precision_score, recall_score

from pipelines.cli import commands
from pipelines.studies import zeroth_order
from pipelines.studies.zeroth_order_config import STUDIES, Synthetic, of_values


@pytest.fixture(autouse=True)
def _single_precision():
    with jax.enable_x64(False):
        yield


def call(*words):
    return CliRunner().invoke(commands.main, ["zeroth-order", *[str(word) for word in words]])


def values_at(task, x):
    return np.asarray(task.loss_fn(jnp.asarray(x, jnp.float32), task.population.examples, None), np.float64)


@pytest.mark.parametrize("heterogeneity", [0.5, 50.0])
def test_the_clients_average_is_one_quadratic_with_a_known_minimum(heterogeneity):
    task = zeroth_order.synthetic(3, dim=20, clients=4, heterogeneity=heterogeneity)
    x = np.random.default_rng(0).uniform(size=20)
    u = 20 * x - 10
    np.testing.assert_allclose(values_at(task, x).mean(), 0.1 / 20 * ((u**2).sum() + u.sum() + 1), rtol=1e-4)
    np.testing.assert_allclose(values_at(task, np.full(20, 0.475)).mean(), task.optimum, rtol=1e-4)
    assert np.ptp(values_at(task, x)) > 0
    other = zeroth_order.synthetic(4, dim=20, clients=4, heterogeneity=heterogeneity)
    assert not np.array_equal(other.start, task.start)


@pytest.mark.parametrize(("function", "minimum"), [("ackley", 0.5), ("levy", 0.55)])
def test_alike_clients_have_the_standard_functions(function, minimum):
    """Ackley is 0 at u = 0, Levy at u = 1."""
    task = zeroth_order.synthetic(0, function=function, dim=12, heterogeneity=0.0)
    np.testing.assert_allclose(values_at(task, np.full(12, minimum)), 0, atol=1e-4)
    assert (values_at(task, np.full(12, 0.1)) > 1).all()
    far = values_at(zeroth_order.synthetic(0, function=function, dim=12, heterogeneity=5.0), np.full(12, minimum))
    assert (far > 0.1).all()


@pytest.mark.parametrize(
    ("score", "reference"),
    [("precision", precision_score), ("recall", recall_score), ("f1", f1_score), ("jaccard", jaccard_score)],
)
def test_scores_are_those_of_scikit_learn(score, reference):
    """On every client's own examples, of which there are unequally many."""
    task = zeroth_order.metric(0, score=score, dataset="wine", clients=3, hidden=4, pretraining=1)
    model, start, population, _ = zeroth_order._pretrained("wine", None, 3, 10.0, 4, 1, 0)
    for i, value in enumerate(values_at(task, np.full(task.start.size, 0.5))):
        own = population.client(i)
        predicted = np.argmax(model.apply(start, own["x"]), axis=1)
        expected = reference(np.asarray(own["y"]), predicted, average="macro", zero_division=0)
        np.testing.assert_allclose(1 - value, expected, atol=1e-6)
    assert not np.allclose(values_at(task, np.random.default_rng(0).uniform(size=task.start.size)), 1 - expected)


def test_images_may_be_made_smaller_for_a_metric():
    task = zeroth_order.metric(0, clients=3, hidden=4, pretraining=1, pool=2)
    assert task.start.size == 4 * 4 * 4 + 4 + 4 * 10 + 10
    _, _, whole, _ = zeroth_order._pretrained("digits", None, 3, 10.0, 4, 1, 0)
    _, _, pooled, _ = zeroth_order._pretrained("digits", None, 3, 10.0, 4, 1, 0, 2)
    for row in range(2):
        for column in range(2):
            square = np.asarray(whole.examples["x"])[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            np.testing.assert_allclose(pooled.examples["x"][:, row, column], square.mean(axis=(1, 2)), rtol=1e-5)


def test_an_attack_starts_from_an_image_that_all_have_right_and_moves_pixels_by_at_most_epsilon():
    task = zeroth_order.attack(1, clients=3, hidden=8)
    assert (values_at(task, task.start) > 0).all()
    still = zeroth_order.attack(1, clients=3, hidden=8, epsilon=0.0)
    x = np.random.default_rng(0).uniform(size=64)
    np.testing.assert_allclose(values_at(still, x), values_at(task, task.start), rtol=1e-5)
    assert not np.allclose(values_at(task, x), values_at(task, task.start), rtol=1e-3)


@pytest.mark.parametrize("name", ["FedZO", "FZooS"])
def test_steps_end_at_the_faces_of_the_box(name):
    """Outside, a function is flat: nothing would lead back."""
    study = Synthetic(steps=3, client_lr=0.4, directions=2, features=20, neighbors=20, capacity=70)
    task = zeroth_order.synthetic(0, dim=6, clients=2)
    algorithm = zeroth_order.build(name, study, task)
    state, cohort = algorithm.init(jnp.full(6, 0.99)), task.population.cohort(np.arange(2))
    state, _ = jax.jit(algorithm.round)(state, cohort, jax.random.key(0))
    assert ((algorithm.params(state) >= 0) & (algorithm.params(state) <= 1)).all()
    assert np.abs(algorithm.params(state) - 0.99).max() > 0.3


SMALL = ("--dim", 6, "--clients", 2, "--rounds", 3, "--steps", 2, "--seeds", 2, "--features", 20, "--capacity", 70)
SMALL += ("--neighbors", 20, "--directions", 2)


def test_a_study_from_the_command_line_that_goes_on_where_it_stopped(tmp_path):
    out = tmp_path / "study"
    words = ("synthetic", "--heterogeneity", 0.5, *SMALL, "--out", out)
    first = call(*words)
    assert first.exit_code == 0, first.output
    assert {p.name for p in out.iterdir()} == {
        *("study.json", "checkpoints", "curves", "curves.csv", "curves.png", "curves.pdf", "results.tex"),
        *("summary.md", "summary.html"),
    }
    rows = list(csv.DictReader((out / "curves.csv").open()))
    assert len(rows) == (5 + 2) * 2 * 4
    last = {row["method"]: float(row["queries_per_client"]) for row in rows if row["queries_per_client"]}
    # Per client: FZooS 1 + 10 once, 1 + 50 twice, 2 (5 + 1) three times; the others 2 (2 + 1), with option I 3 (2 + 1).
    expected = {"FZooS": 11 + 102 + 36, "FedZO": 18, "FedProx-ZO": 18, "SCAFFOLD-ZO I": 27, "SCAFFOLD-ZO II": 18}
    assert last == expected
    assert all(float(row["cosine"]) <= 1 + 1e-5 for row in rows if row["cosine"])
    summary = (out / "summary.md").read_text()
    assert "| FZooS |" in summary
    assert summary.count("| none |") == 2

    kept = {name: (out / name).read_bytes() for name in ("curves.csv", "curves.png", "summary.md")}
    drawn = CliRunner().invoke(commands.main, ["report", str(out), "--out", str(tmp_path / "again")])
    assert drawn.exit_code == 0, drawn.output
    for name in (*kept, "summary.html", "results.tex", "curves.pdf"):
        assert (tmp_path / "again" / name).read_bytes() == (out / name).read_bytes(), name
    (out / "curves.csv").write_bytes(kept["curves.csv"][:-3])
    refused = CliRunner().invoke(commands.main, ["report", str(out)])
    assert (refused.exit_code, "curves.csv is not what was measured" in refused.output) == (2, True)
    (out / "curves" / "FedZO-1.npz").unlink()
    (out / "curves.csv").unlink()
    assert CliRunner().invoke(commands.main, ["report", str(out)]).exit_code == 0
    assert "Not done yet: FedZO." in (out / "summary.md").read_text()
    again = call(*words)
    assert [line.split(":")[0] for line in again.output.splitlines()[:-1]] == ["FedZO, trial 1"]
    assert {name: (out / name).read_bytes() for name in kept} == kept

    other = call("synthetic", "--heterogeneity", 5, *SMALL, "--out", out)
    assert other.exit_code == 2
    assert "another study" in other.output


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("synthetic", "--function", "ackly"), "did you mean 'ackley'?"),
        (("metric", "--score", "f2"), "did you mean 'f1'?"),
        (("metric", "--pool", 3), "pool=3, but an input of digits has shape [8, 8, 1]"),
        (("metric", "--dataset", "wine", "--pool", 2), "pool=2, but an input of wine has shape [13]"),
        (("attack", "--dataset", "digitz"), "digits"),
    ],
)
def test_mistakes_are_named(words, said, tmp_path):
    result = call(*words, "--out", tmp_path / "study")
    assert result.exit_code == 2
    assert said in result.output


def test_methods_with_gradients_are_there_where_the_function_has_them():
    """With one step a round, FedAvg takes the mean of the clients' first steps of Adam."""
    task = zeroth_order.synthetic(0, dim=6, clients=2)
    study = Synthetic(rounds=2, steps=1)
    result = jax.jit(zeroth_order.curve("FedAvg with gradients", study, task))(
        task.population, task.start, jax.random.key(0)
    )
    assert set(result) == {"value"}
    x = np.asarray(task.start, np.float64)
    for expected in result["value"]:
        np.testing.assert_allclose(values_at(task, x).mean(), expected, rtol=1e-4)
        gradients = jax.jacobian(task.loss_fn)(jnp.asarray(x, jnp.float32), task.population.examples, None)
        # Adam's first step goes by its rate along the sign of each client's gradient; the server takes the mean.
        x = x - study.client_lr * np.sign(gradients).mean(axis=0)


@pytest.mark.parametrize(("task", "known"), [("synthetic", True), ("metric", False)])
def test_methods_with_gradients_are_compared_only_where_there_are_gradients(task, known, tmp_path, monkeypatch):
    names, curves = [], {"value": np.ones((1, 2)), "queries": np.ones((1, 2))}
    monkeypatch.setattr(zeroth_order, "_trials", lambda name, *rest: names.append(name) or curves)
    options = {"synthetic": {"dim": 6}, "metric": {"dataset": "wine", "hidden": 4, "pretraining": 1, "clients": 3}}
    zeroth_order.compare(STUDIES[task](**options[task], seeds=1), tmp_path)
    assert names == [*zeroth_order.METHODS, *(zeroth_order.REFERENCES if known else ())]


def test_methods_are_chosen_and_others_may_join_them(tmp_path):
    words = ("synthetic", *SMALL, "--out", tmp_path / "study")
    first = call(*words, "--method", "fedzo,fedavg", "--quiet")
    assert (first.exit_code, first.output) == (0, "")
    methods = {row["method"] for row in csv.DictReader((tmp_path / "study" / "curves.csv").open())}
    assert methods == {"FedZO", "FedAvg with gradients"}
    assert "FZooS" not in (tmp_path / "study" / "summary.md").read_text()
    more = call(*words, "--method", "fedprox_zo", "--seeds", 3)
    assert more.exit_code == 0, more.output
    counted = Counter(row["method"] for row in csv.DictReader((tmp_path / "study" / "curves.csv").open()))
    assert counted == dict.fromkeys(["FedZO", "FedProx-ZO", "FedAvg with gradients"], 3 * 4)
    wrong = call("metric", "--method", "scaffold", "--out", tmp_path / "other")
    assert wrong.exit_code == 2
    assert "need gradients, and metric has none" in wrong.output


def test_a_study_is_a_configuration_file_and_mistakes_leave_no_directory(tmp_path):
    study = tmp_path / "study"
    assert call("synthetic", *SMALL, "--method", "fedzo", "--out", study).exit_code == 0
    again = call("synthetic", "--config", study, "--out", study)
    assert again.exit_code == 0, again.output
    other = call("metric", "--config", study, "--out", tmp_path / "other")
    assert "this is a study of the task 'synthetic', and not 'metric'" in other.output
    wrong = call("synthetic", *SMALL, "--capacity", 3, "--out", tmp_path / "other")
    assert wrong.exit_code == 2
    assert not (tmp_path / "other").exists()


def test_a_study_of_before_there_were_seeds_and_methods_is_read():
    content = {
        **{"task": "synthetic", "options": {"dim": 4, "function": "levy"}, "rounds": 2, "trials": 3, "lr": 0.5},
    }
    assert of_values(content) == Synthetic(dim=4, function="levy", rounds=2, seeds=3, client_lr=0.5)


def test_a_new_process_solves_with_one_thread(tmp_path):
    """JAX's solver is loaded when it is first called, but the threads must be limited by then."""
    program = """
import jax.numpy as jnp, pathlib, sys, threadpoolctl
from pipelines.studies import zeroth_order
from pipelines.studies.zeroth_order_config import Synthetic
def told(*args):
    jnp.linalg.cholesky(jnp.eye(3)).block_until_ready()
    print(*(library["num_threads"] for library in threadpoolctl.threadpool_info() if library["user_api"] == "blas"))
    sys.exit()
zeroth_order._trials = told
zeroth_order.compare(Synthetic(seeds=1), pathlib.Path(sys.argv[1]))
"""
    environment = {k: v for k, v in os.environ.items() if not k.endswith("_NUM_THREADS")}
    command = [sys.executable, "-c", program, str(tmp_path / "study")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert set(done.stdout.split()) == {"1"}


def test_queries_until_a_target_is_reached():
    result = {"value": np.array([[3.0, 2.0, 1.0], [3.0, 3.0, 2.5]]), "queries": np.array([[0, 10, 20], [0, 10, 20]])}
    np.testing.assert_array_equal(zeroth_order.queries_to(np.array([2.0, 2.0]), result), [10, np.nan])
