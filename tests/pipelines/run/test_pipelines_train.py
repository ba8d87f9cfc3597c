import csv
import json
import os
import shutil
import signal
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from algorithms.robustness.fal import pgd
from fedjax_core import evaluate, simulate
from pipelines import Config
from pipelines.common import files
from pipelines.common.progress import Reporter
from pipelines.experiment import setup
from pipelines.run import checkpoint, engines, run_directory, train


def recorder(on_update=lambda progression: None):
    said = []
    return said, Reporter(said.append, on_update, lambda: None)


def rows(out):
    with (out / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def params_bytes(out, method):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(train.final_params(out, method))]


def test_a_run_is_simulate(finished, small):
    """The chunked driver changes no number: a seed of it is one direct call of `simulate`."""
    with jax.enable_x64(False):
        experiment = setup.prepare(small)
        algorithm = experiment.algorithms["scaffold"]
        init_key, rounds_key = setup.run_keys(experiment.keys[1])
        run = jax.jit(simulate(algorithm, experiment.sampler, small.rounds))
        state, metrics = run(experiment.model.init(init_key), experiment.population, rounds_key)
        scores = evaluate(experiment.metric_fn, algorithm.params(state), experiment.test)
    ours = [row for row in rows(finished) if (row["method"], row["seed"]) == ("scaffold", "1")]
    assert [int(row["round"]) for row in ours] == list(range(1, 13))
    for column in ("loss", "update_norm"):
        np.testing.assert_allclose([float(row[column]) for row in ours], getattr(metrics, column), rtol=2e-5)
    for column in ("bytes_up", "bytes_down", "participants"):
        assert [int(row[column]) for row in ours] == getattr(metrics, column).tolist()
    assert float(ours[-1]["test_loss"]) == pytest.approx(float(scores["loss"]), rel=2e-5)
    assert float(ours[-1]["test_accuracy"]) == pytest.approx(float(scores["accuracy"]))
    for one, other in zip(
        jax.tree.leaves(train.final_params(finished, "scaffold")), jax.tree.leaves(algorithm.params(state)), strict=True
    ):
        np.testing.assert_allclose(one[1], other, rtol=1e-4, atol=1e-6)


def test_accuracy_under_attack_is_in_the_report(small, tmp_path):
    """With every evaluation, for every method; FAL is the one that trains for it. What else is measured stays."""
    with jax.enable_x64(False):
        settings = {"fal": {"rho": 0.5, "step_size": 0.25, "attack_steps": 3}}
        config = small.replace(methods=("fedavg", "fal"), settings=settings, attack_radius=0.5)
        results = train.train(config, tmp_path / "run")
        experiment = setup.prepare(config)
        final = jax.tree.map(lambda leaf: leaf[0], train.final_params(tmp_path / "run", "fal"))
        # Iris is measured in centimeters, so that no box [0, 1] holds the attack back.
        attack = pgd(experiment.loss_fn, rho=0.5, step_size=0.125, attack_steps=10, low=-np.inf, high=np.inf)
        moved = attack(final, experiment.test, None)
        expected = experiment.metric_fn(final, moved)["accuracy"].mean()
    history = results["fal"].history
    assert float(history["test/robust_accuracy"][0, -1]) == pytest.approx(float(expected))
    assert (history["test/robust_accuracy"] <= history["test/accuracy"]).all()
    assert np.abs(moved["x"] - experiment.test["x"]).max() == pytest.approx(0.5, rel=1e-5)
    assert rows(tmp_path / "run")[-1]["test_robust_accuracy"]
    summary = (tmp_path / "run" / "summary.md").read_text()
    assert "| under attack |" in summary
    assert "by at most 0.5" in summary
    assert "--attack-radius 0.5" in summary


def test_seeds_differ(finished):
    last = [row for row in rows(finished) if row["round"] == "12" and row["method"] == "fedavg"]
    assert last[0]["loss"] != last[1]["loss"]


def test_a_complete_run_is_not_run_again(finished, small, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    for name in ("metrics.csv", "summary.md", "curves.png"):
        (out / name).unlink()
    said, reporter = recorder()
    results = train.train(small, out, reporter=reporter)
    assert said == ["fedavg: complete, 12 rounds", "scaffold: complete, 12 rounds"]
    assert (out / "metrics.csv").read_bytes() == (finished / "metrics.csv").read_bytes()
    assert (out / "summary.md").exists()
    assert (out / "curves.png").read_bytes() == (finished / "curves.png").read_bytes()
    assert results["scaffold"].history["test/accuracy"].shape == (2, 6)


def test_other_versions_than_began_the_run_are_told(finished, small, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    content = json.loads((out / "config.json").read_text())
    content["versions"]["optax"] = "0.0.1"
    files.write_record(out / "config.json", content)
    said, reporter = recorder()
    train.train(small, out, reporter=reporter)
    notes = [line for line in said if "begun with" in line]
    assert len(notes) == 1
    assert notes[0].startswith("note: this run was begun with optax 0.0.1 and goes on with ")


def test_stopped_by_sigint_and_gone_on_is_to_the_bit_the_same(finished, small, tmp_path):
    out = tmp_path / "run"

    def stop(progression):
        if progression.round == 6:  # between two checkpoints
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    said, reporter = recorder(stop)
    with pytest.raises(train.Interrupted) as stopped:
        train.train(small, out, reporter=reporter)
    assert stopped.value.signal == signal.SIGINT
    assert small.command(str(out)) in stopped.value.message
    assert "after round 6 of fedavg" in stopped.value.message
    assert any(line.startswith("stopping") for line in said)
    assert signal.getsignal(signal.SIGINT) is before
    assert sorted(p.name for p in (out / "checkpoints" / "fedavg").iterdir()) == ["round-00000004", "round-00000006"]
    assert len(rows(out)) == 2 * 6

    # What was saved last is damaged: it goes on from round 4, not 6, and the numbers are the same.
    (out / "checkpoints" / "fedavg" / "round-00000006" / "arrays.npz").write_bytes(b"")
    said, reporter = recorder()
    with pytest.warns(checkpoint.CheckpointWarning, match="round-00000006"):
        train.train(small, out, reporter=reporter)
    assert "fedavg: going on after round 4" in said
    assert (out / "metrics.csv").read_bytes() == (finished / "metrics.csv").read_bytes()
    assert (out / "clients.csv").read_bytes() == (finished / "clients.csv").read_bytes()
    for method in small.methods:
        assert params_bytes(out, method) == params_bytes(finished, method)


def test_the_second_signal_is_not_caught():
    said, reporter = recorder()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with run_directory.stop_requests(reporter.say) as stop_signal:
        assert stop_signal() == 0
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop_signal() == signal.SIGTERM
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert {number: signal.getsignal(number) for number in before} == before
    assert len(said) == 1


DIVERGING = Config(
    dataset="wine",
    clients=5,
    cohort_size=3,
    min_size=2,
    methods=("fedavg",),
    hidden=(6,),
    rounds=40,
    eval_every=2,
    checkpoint_every=20,
    seeds=2,
    epochs=1,
    settings={"fedavg": {"server_lr": 30.0}},
)


def test_divergence_stops_with_the_cause_and_keeps_the_last_good_state(tmp_path):
    messages, states, rounds = [], [], []
    # Saved seldom, so that the last good state must be computed again, and saved always, so that it is there.
    for name, config in (("seldom", DIVERGING), ("always", DIVERGING.replace(checkpoint_every=2))):
        out = tmp_path / name
        with pytest.raises(train.Diverged) as stopped:
            train.train(config, out)
        messages.append(str(stopped.value))
        latest = max((out / "checkpoints" / "fedavg").iterdir())
        manifest = json.loads((latest / "manifest.json").read_text())
        rounds.append(manifest["round"])
        states.append(params_bytes(out, "fedavg"))
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(train.final_params(out, "fedavg")))
        assert len(rows(out)) == 2 * rounds[-1]
        assert not (out / "summary.md").exists()
    assert rounds[0] % 20, "the test needs a run that diverges between two checkpoints, not at one"
    assert rounds[0] == rounds[1]
    assert states[0] == states[1]
    at = int(messages[0].split("stopped in round ")[1].split()[0])
    assert rounds[0] < at <= rounds[0] + 2
    assert f"The state after round {rounds[0]}" in messages[0]
    assert "Most likely cause" in messages[0]


@pytest.fixture(scope="module")
def experiment(small):
    with jax.enable_x64(False):
        return setup.prepare(small)


def history_of(loss, norm):
    return {
        "round/loss": np.asarray([[1.0] * len(loss), loss]),
        "round/update_norm": np.asarray([[1.0] * len(norm), norm]),
        "round/participants": np.full((2, len(loss)), 3),
    }


@pytest.mark.parametrize(
    ("loss", "norm", "good_loss", "said"),
    [
        ([np.nan, np.nan], [np.nan, np.nan], 1.1, ["round 1 ", "loss is nan", "client_lr=0.2", "to 0.02"]),
        ([1, 2, 9, np.inf], [1, 1, 9, 10], 3.0, ["round 4 ", "loss is inf", "update 10, 9 in the", "client_lr=0.2"]),
        ([1, 1, 1], [1, 1, np.inf], 1.0, ["round 3 ", "update inf", "server's step", "server_lr=1"]),
        ([1, 1, 1, np.nan], [1, 1, 1, 1], np.nan, ["loss nan on the training examples", "log(0)"]),
        ([1, 1, 1], [1, 1, 1], 1.0, ["round 3 "]),
    ],
)
def test_diagnosis(experiment, loss, norm, good_loss, said):
    text = train.diagnose(experiment, "fedavg", history_of(loss, norm), np.asarray([1.0, good_loss]))
    assert text.startswith("fedavg stopped in round")
    assert "seed 1" in text or not np.isnan(loss + norm).any()
    for words in said:
        assert words in text


def test_a_directory_of_another_configuration_is_refused_with_the_fields(finished, small):
    other = small.replace(rounds=8, settings={"fedavg": {"server_lr": 0.5}})
    with pytest.raises(ValueError, match="another configuration") as refused:
        train.claim(finished, other)
    assert "  rounds: 8 here, 12 there" in str(refused.value)
    assert "  settings: {'fedavg': {'server_lr': 0.5}} here, {} there" in str(refused.value)
    assert str(refused.value).count(" there") == 2
    train.claim(finished, small)


def test_a_directory_of_something_else_is_refused(tmp_path, small):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match="holds files but no run"):
        train.claim(tmp_path, small)
    with pytest.raises(ValueError, match="is a file"):
        train.claim(tmp_path / "thesis.tex", small)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        train.claim(tmp_path / "run", small)
    with pytest.raises(ValueError, match="no run directory"):
        train.read_config(tmp_path)


def test_killed_while_claiming_leaves_a_directory_that_can_be_claimed(tmp_path, small):
    (tmp_path / "config.json.unfinished").write_text("{")
    train.claim(tmp_path, small)
    assert train.read_config(tmp_path) == small


def test_final_params_of_what_never_ran(tmp_path, small):
    train.claim(tmp_path, small.replace(methods=("fedavg",)))
    with pytest.raises(ValueError, match="no checkpoint of fedavg"):
        train.final_params(tmp_path, "fedavg")


def test_no_data_is_captured_as_a_constant(experiment):
    """The population and the test set are arguments of the compiled chunk."""
    algorithm = experiment.algorithms["fedavg"]
    with jax.enable_x64(False):
        states = jax.eval_shape(partial(setup.initial_states, experiment, algorithm), experiment.keys)
        chunk = engines.chunk(experiment, algorithm, 2)
        closed = jax.make_jaxpr(chunk)(states, experiment.population, experiment.test, experiment.keys)
    assert sum(jnp.size(const) for const in closed.consts) < 10


def test_a_mesh_gives_the_same_numbers(finished, small, tmp_path):
    if len(jax.devices()) < 2:
        pytest.skip("needs two devices")
    config = small.replace(mesh=2, lanes=2, methods=("fedavg",), rounds=4)
    results = train.train(config, tmp_path / "run")
    ours = [float(row["loss"]) for row in rows(finished) if row["method"] == "fedavg" and int(row["round"]) <= 4]
    np.testing.assert_allclose(results["fedavg"].history["round/loss"].reshape(-1), ours, rtol=1e-4)


def test_double_precision(small, tmp_path):
    config = small.replace(x64=True, methods=("fedavg",), rounds=2, checkpoint_every=2)
    results = train.train(config, tmp_path / "run")
    assert results["fedavg"].history["round/loss"].dtype == np.float64
    assert jax.tree.leaves(train.final_params(tmp_path / "run", "fedavg"))[0].dtype == jnp.float64
