"""Who is better off, alone, with FedAvg or with another method: by hand, and as a run of the command line tells it."""

import csv
import json

import jax
import numpy as np
import pytest
from click.testing import CliRunner

from pipelines.cli import commands
from pipelines.results import personal
from pipelines.results.subject import Subject
from tests.pages import assert_drawn_again

ALONE = np.asarray([[0.5, 0.5, 0.5, np.nan], [0.2, 0.9, 0.5, np.nan]])
GLOBAL = np.asarray([[0.4, 0.6, 0.8, np.nan], [0.4, 0.6, 0.8, np.nan]])


def subject(parts=("train", "test"), domains=()):
    return Subject(None, "", [], {}, [], dict.fromkeys(parts, 1), True, "", domains)


def test_more_fewer_and_equal_clients_are_counted_seed_by_seed():
    method = np.asarray([[0.6, 0.5, 0.4, 0.9], [0.1, 0.9 + 1e-8, 0.6, 0.9]])
    found = personal.compared(method, ALONE)
    assert found.better.tolist() == [1, 1]  # a last bit more is no more, and a client without a number is left out
    assert found.worse.tolist() == [1, 1]
    assert found.of == 3
    assert personal.shown(found) == "1.0 ± 0.0 of 3"
    assert personal.shown(personal.compared(method[:1], ALONE)) == "1 of 3"  # one seed of a run that still runs
    none = personal.compared(np.full((2, 4), np.nan), ALONE)
    assert (none.better.tolist(), none.worse.tolist(), none.of) == ([0, 0], [0, 0], 0)


def test_what_is_compared_is_on_the_same_examples():
    histories = {
        "local_only": {"client/accuracy": GLOBAL, "client/personal/accuracy": ALONE},
        "fedavg": {"client/accuracy": GLOBAL},
        "ditto": {"client/accuracy": ALONE, "client/personal/accuracy": GLOBAL},
    }
    own = personal.references(subject(), histories)
    assert list(own) == ["local_only", "fedavg"]
    np.testing.assert_array_equal(own["local_only"], ALONE)
    np.testing.assert_array_equal(own["fedavg"], GLOBAL)
    # Without test parts the global model is tested on other examples, unless each client is asked.
    mixed = subject(parts=("train",))
    assert list(personal.references(mixed, histories)) == ["local_only"]
    asked = {**histories, "fedavg": {"client/accuracy": ALONE, "client/personal/accuracy": GLOBAL}}
    np.testing.assert_array_equal(personal.references(mixed, asked)["fedavg"], GLOBAL)
    assert personal.own_accuracy(mixed, histories["ditto"], "global") is None
    assert personal.own_accuracy(mixed, histories["ditto"], "personal") is not None
    assert personal.own_accuracy(subject(), histories["fedavg"], "personal") is None
    assert personal.references(subject(), {"ditto": histories["ditto"]}) == {}


def test_domains_are_means_over_their_clients():
    found = personal.by_domain(subject(domains=("plain", "blurred", "plain", "empty")), GLOBAL)
    assert list(found) == ["plain", "blurred", "empty"]
    np.testing.assert_allclose(found["plain"], [0.6, 0.6])
    np.testing.assert_allclose(found["blurred"], [0.6, 0.6])
    assert np.isnan(found["empty"]).all()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Digits in five domains; Ditto beside what `--personal` adds."""
    out = tmp_path_factory.mktemp("personal") / "run"
    words = [
        *("train", "--personal", "--method", "ditto", "--dataset", "digits", "--feature-skew", "mixed"),
        *("--clients", "10", "--alpha", "0.5", "--test-share", "0.25", "--model", "logistic_regression"),
        *("--sampler", "full", "--rounds", "4", "--eval-every", "4", "--seeds", "2", "--epochs", "1"),
        *("--set", "client_lr=0.3", "--no-cache", "--out", str(out)),
    ]
    with jax.enable_x64(False):
        done = CliRunner().invoke(commands.main, words, terminal_width=110)
    assert done.exit_code == 0, done.output
    (out.parent / "printed").write_text(done.output)
    return out


def of_clients(run):
    """(method, view) to float[2, 10], accuracy of each client for each seed, from clients.csv; and their domains."""
    found, domains = {}, {}
    with (run / "clients.csv").open() as file:
        for row in csv.DictReader(file):
            values = found.setdefault((row["method"], row["view"]), np.full((2, 10), np.nan))
            values[int(row["seed"]), int(row["client"])] = float(row["accuracy"] or "nan")
            domains[int(row["client"])] = row["domain"]
    return found, [domains[client] for client in range(10)]


def test_a_personal_run_says_how_many_are_better_off(run):
    config = json.loads((run / "config.json").read_text())["config"]
    assert config["methods"] == ["local_only", "fedavg", "ditto"]
    assert config["evaluation"]["evaluate"] == ["global", "personal"]
    assert {each["client_lr"] for each in config["settings"].values()} == {0.3}
    accuracy, _ = of_clients(run)
    found = json.loads((run / "summary.json").read_text())
    for other, name in (("local_only", "alone"), ("fedavg", "fedavg")):
        more = accuracy["ditto", "personal"] - accuracy[other, "personal"]
        for sign, word in ((1, "better"), (-1, "worse")):
            counts = (sign * more > 1e-6).sum(axis=1)
            key = f"client_personal_{word}_than_{name}"
            assert [found["ditto"]["seeds"][s][key] for s in "01"] == counts.tolist()
            assert found["ditto"][key] == counts.mean()
    assert "client_personal_better_than_fedavg" not in found["fedavg"]
    assert "client_personal_better_than_alone" in found["fedavg"]
    better = (accuracy["ditto", "personal"] - accuracy["local_only", "personal"] > 1e-6).sum(axis=1)
    shown = f"{better.mean():.1f} ± {better.std(ddof=1):.1f} of {(~np.isnan(accuracy['ditto', 'personal'][0])).sum()}"
    rows = [line.strip("| ").split(" | ") for line in (run / "summary.md").read_text().splitlines() if " | " in line]
    columns = dict(zip(rows[0], next(row for row in rows if row[:2] == ["Ditto", "personal"]), strict=True))
    assert columns["better off than alone"] == shown
    assert columns["worst decile of clients"].endswith("%")
    printed = " ".join((run.parent / "printed").read_text().split())
    assert "ditto: personal test accuracy" in printed
    assert f"{shown} clients better off than alone" in printed
    assert "if its accuracy on its own test examples" in (run / "summary.html").read_text()


def test_over_clients_and_by_domain(run):
    accuracy, domains = of_clients(run)
    assert sorted(set(domains)) == ["blurred", "colored", "plain", "restyled", "rotated"]
    of_ditto = json.loads((run / "summary.json").read_text())["ditto"]
    own = accuracy["ditto", "personal"]
    np.testing.assert_allclose(of_ditto["client_personal_accuracy"], np.nanmean(own), rtol=1e-6)
    np.testing.assert_allclose(of_ditto["client_personal_accuracy_sd"], np.nanstd(own, axis=1).mean(), rtol=1e-6)
    assert of_ditto["client_personal_accuracy_worst_decile"] <= of_ditto["client_personal_accuracy"]
    for domain in set(domains):
        values = own[:, [each == domain for each in domains]]
        np.testing.assert_allclose(
            of_ditto[f"client_personal_accuracy_of_{domain}"], np.nanmean(values, axis=1).mean(), rtol=1e-6
        )
    text = (run / "summary.md").read_text()
    assert "Accuracy of the clients of each domain:" in text
    assert "domains, with the number of their clients:" in text


def test_the_report_is_the_same_when_drawn_again(run, tmp_path):
    assert_drawn_again(run, tmp_path / "again")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--evaluate", "global"), "--evaluate names global: leave one of the two out"),
        (("--models", "mlp,cnn", "--method", "fedgh"), "give --evaluate global,personal instead"),
    ],
)
def test_what_excludes_personal_models_is_refused(words, said, tmp_path):
    done = CliRunner().invoke(commands.main, ["train", "--personal", *words, "--out", str(tmp_path / "run")])
    assert done.exit_code == 2
    assert said in " ".join(done.output.split())
    assert not (tmp_path / "run").exists()
