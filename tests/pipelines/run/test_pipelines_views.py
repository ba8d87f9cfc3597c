"""Views and events on the command line's path: what is evaluated, what decides, what comes after the last round."""

import csv
import json
import os
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from click.testing import CliRunner

import fedjax_core as fc
from pipelines import load_run
from pipelines.cli import commands
from pipelines.common.progress import silent
from pipelines.configuration.config import Config
from pipelines.experiment import setup, views
from pipelines.federation import splits
from pipelines.results import early, history
from pipelines.run import client_scores, train
from tests.pages import assert_drawn_again

METHODS = '''
"""Methods of a user's own."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

import fedjax_core as fc
from algorithms.averaging.fedavg import fedavg


class State(NamedTuple):
    params: fc.Params
    shift: fc.ClientTable
    begun: fc.Array
    tasks: fc.Array
    ended: fc.Array
    round: fc.Counter = 0


def eventful(
    clients: fc.NumClients,
    how: fc.ClientOptimizer,
    objective: fc.LossFn,
    /,
    *,
    step: float = 0.5,
    **local,
) -> fc.Algorithm:
    """Eventful: FedAvg whose clients shift the last leaf, with an event of each kind."""
    training, gradient = fc.local_training(**local), fc.value_and_grad(objective)

    def init(params, key=None):
        shift = fc.client_table(clients, jnp.zeros(()))
        return State(params, shift, *(jnp.int32(0) for _ in range(3)))

    def update(state, cohort, key):
        program = fc.local_descent(fc.optimizer_at(how, state.round), gradient)
        results = training.run(program, state.params, cohort, key)
        rows = fc.gather(state.shift, cohort) + 1
        params = fc.add_scaled(state.params, step, results.aggregate)
        return state._replace(params=params, shift=fc.scatter(state.shift, cohort, rows)), results

    def before(state, cohort, key):
        return state._replace(begun=state.begun + cohort.num_participants)

    def task(state, cohort, key):
        return state._replace(tasks=state.tasks + 1)

    def after(state, cohort, key):
        rows = fc.gather(state.shift, cohort) + 100
        params = jax.tree.map(lambda leaf: leaf + 1 + jax.random.uniform(key), state.params)
        return state._replace(params=params, shift=fc.scatter(state.shift, cohort, rows), ended=state.ended + 1)

    def moved(params, row):
        leaves, treedef = jax.tree.flatten(params)
        return jax.tree.unflatten(treedef, [*leaves[:-1], leaves[-1].at[..., 0].add(0.01 * row)])

    own = fc.View(lambda state: state.params, moved, lambda state: state.shift)
    doubled = fc.View(lambda state: jax.tree.map(lambda leaf: 2 * leaf, state.params))
    events = {"begin": fc.Event(before, "before"), "turn": fc.Event(task, "task"), "end": fc.Event(after, "after")}
    return fc.federated(init, update, views={"personal": own, "doubled": doubled}, events=events)
'''


@pytest.fixture(autouse=True)
def module(tmp_path, monkeypatch):
    (tmp_path / "own_views.py").write_text(METHODS)
    monkeypatch.chdir(tmp_path)
    yield
    import sys

    sys.modules.pop("own_views", None)


OWN = "own_views:eventful"


@pytest.fixture
def config(small) -> Config:
    return small.replace(methods=(OWN,), rounds=4, checkpoint_every=2, seeds=2)


def call(*words):
    return CliRunner().invoke(commands.main, [str(word) for word in words], terminal_width=110)


def table(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_every_view_is_in_every_file_and_is_what_a_loop_over_clients_gives(config, tmp_path):
    config = config.replace(test_share=0.3, clients_over_time=True)
    out = tmp_path / "run"
    found = train.train(config, out)[OWN].history
    run = load_run(out)
    mine = run.methods[OWN]
    with jax.enable_x64(False):
        experiment = setup.prepare(config)
        tests = experiment.federation.population("test")
        assert experiment.algorithms[OWN].main_view == "personal"
        for s in (0, 1):
            of_seed, own = mine.state_of(s), []
            for client in range(6):
                begin, end = np.asarray(tests.offsets)[client : client + 2]
                leaves, treedef = jax.tree.flatten(of_seed.params)
                leaves[-1] = jnp.asarray(leaves[-1]).at[..., 0].add(0.01 * of_seed.shift.rows[client])
                examples = jax.tree.map(lambda leaf, b=begin, e=end: leaf[b:e], tests.examples)
                own.append(fc.evaluate(run.metric_fn, jax.tree.unflatten(treedef, leaves), examples)["accuracy"])
            np.testing.assert_allclose(found["client/personal/accuracy"][s], own, rtol=1e-6)
            there = fc.client_statistics(np.asarray(own))
            for name, value in (("", there.mean), ("_sd", there.std), ("_worst_decile", there.worst_decile)):
                np.testing.assert_allclose(found[f"final/test/personal/accuracy{name}"][s], value, rtol=1e-5)
            doubled = jax.tree.map(lambda leaf: 2 * leaf, of_seed.params)
            score = fc.evaluate(run.metric_fn, doubled, experiment.test)["accuracy"]
            np.testing.assert_allclose(found["final/test/doubled/accuracy"][s], score, rtol=1e-6)
    rows = table(out / "metrics.csv")
    assert {"test_accuracy", "test_personal_accuracy", "test_personal_accuracy_worst_decile"} <= set(rows[0])
    assert float(rows[1]["test_personal_loss"]) == pytest.approx(found["test/personal/loss"][0, 0], rel=1e-6)
    clients = table(out / "clients.csv")
    assert [row["view"] for row in clients[:12]] == ["global"] * 6 + ["personal"] * 6
    assert float(clients[6]["accuracy"]) == pytest.approx(found["client/personal/accuracy"][0, 0], nan_ok=True)
    summary = (out / "summary.md").read_text()
    assert "| Eventful | personal |" in summary
    assert summary.index("| Eventful | personal |") < summary.index("| Eventful | global |")
    assert "something after the last round" in summary
    assert "each client is tested by the model that it would use itself, on its own test examples" in summary
    import pyarrow.parquet as pq

    each = pq.read_table(out / "clients.parquet").to_pydict()
    assert set(each["view"]) == {"global", "personal"}
    last = [i for i, (v, r) in enumerate(zip(each["view"], each["round"], strict=True)) if (v, r) == ("personal", 4)]
    np.testing.assert_allclose(
        np.nanmean(np.asarray(each["accuracy"])[last].reshape(2, 6), 1), found["test/personal/accuracy"][:, -1], 1e-6
    )


def test_events_run_once_and_a_longer_run_goes_on_from_before_the_last(config, tmp_path):
    out, long = tmp_path / "run", tmp_path / "long"
    train.train(config, out)
    state = load_run(out).methods[OWN].state
    assert state.begun.tolist() == [6, 6]  # all clients, once
    assert state.ended.tolist() == [1, 1]
    assert state.tasks.tolist() == [0, 0]  # a run of `train` is not cut into tasks
    kept = (out / "metrics.csv").read_bytes(), (out / "clients.csv").read_bytes()
    train.train(config, out)
    assert load_run(out).methods[OWN].state.ended.tolist() == [1, 1]
    assert ((out / "metrics.csv").read_bytes(), (out / "clients.csv").read_bytes()) == kept
    longer = config.replace(rounds=8, seeds=3)
    train.train(longer, out)
    train.train(longer.replace(seeds=2), long)
    grown, whole = (load_run(folder).methods[OWN] for folder in (out, long))
    assert grown.state.ended.tolist() == [1, 1, 1]
    of_two = jax.tree.map(lambda leaf: leaf[:2], grown.state)
    jax.tree.map(np.testing.assert_array_equal, of_two, whole.state)
    for name, value in whole.history.items():
        np.testing.assert_array_equal(grown.history[name][:2], value, err_msg=name)


def test_stopped_between_the_last_round_and_the_event(config, tmp_path):
    out, whole = tmp_path / "run", tmp_path / "whole"

    def stop(progression):
        if progression.round == 4:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(train.Interrupted, match="after round 4"):
        train.train(config, out, reporter=silent()._replace(update=stop))
    assert load_run(out).methods[OWN].state.ended.tolist() == [0, 0]
    train.train(config, out)
    train.train(config, whole)
    assert load_run(out).methods[OWN].state.ended.tolist() == [1, 1]
    for name in ("metrics.csv", "clients.csv"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    # As if the process had died while the state after the event was written.
    shutil.rmtree(train.folder_of(out, OWN, 0) / train.AFTER)
    train.train(config, out)
    one, other = (load_run(folder).methods[OWN].state for folder in (out, whole))
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_the_main_view_decides_when_to_stop_and_which_model_is_best(config, tmp_path):
    config = config.replace(validation_share=0.3, patience=1, rounds=10, eval_every=1, checkpoint_every=4)
    found = train.train(config, tmp_path / "run")[OWN].history
    course = early.course(config, found)
    mine = load_run(tmp_path / "run").methods[OWN]
    with jax.enable_x64(False):
        experiment = setup.prepare(config)
        held = experiment.federation.population("validation")
        view = experiment.algorithms[OWN].personal
        for s in (0, 1):
            best = jax.tree.map(lambda leaf, s=s: jnp.asarray(leaf[s]), mine.best_state)
            assert best.round == course.best[s] + 1
            scores = fc.evaluate_view(experiment.metric_fn, view, best, held)["accuracy"]
            mean = fc.client_statistics(scores).mean
            np.testing.assert_allclose(found["validated/accuracy"][s, course.best[s]], mean, rtol=1e-6)
    ends = early.rounds_of(course, history.evaluated_rounds(10, 1))
    assert mine.state.round.tolist() == ends.tolist()  # of the last round of each seed, and then the event
    assert mine.state.ended.tolist() == [1, 1]
    assert "best/client/personal/accuracy" in mine.history


def test_a_finished_run_is_tested_view_by_view(small, tmp_path):
    """As at its end, whatever was evaluated then; on other data only the models that are everybody's."""
    out = tmp_path / "run"
    config = small.replace(methods=("per_fedavg", "fedavg"), rounds=2, test_share=0.3)
    found = train.train(config, out)
    rows = [json.loads(line) for line in call("evaluate", out, "--json").output.splitlines()]
    assert [(row["method"], row["view"], row["seed"]) for row in rows] == [
        *(("per_fedavg", view, seed) for view in ("global", "personal") for seed in (0, 1)),
        *(("fedavg", "global", seed) for seed in (0, 1)),
    ]
    for row in rows:
        for name in ("accuracy", "loss", "accuracy_sd", "accuracy_worst_decile"):
            if name in row:
                score = history.final_scores(found[row["method"]].history, row["view"], name)[row["seed"]]
                assert row[name] == pytest.approx(score, rel=1e-5), (row, name)
    assert "accuracy_worst_decile" in rows[2]
    of_train = call(
        "evaluate", out, "--view", "personal", "--split", "train", "--method", "fedavg", "--seed", 1, "--json"
    )
    own = json.loads(of_train.output)["accuracy"]
    assert own == pytest.approx(np.nanmean(found["fedavg"].history["client/train_accuracy"][1]), rel=1e-6)
    table = call("evaluate", out, "--method", "per_fedavg").output
    assert "worst tenth" in table
    assert "…" not in table
    elsewhere = call("evaluate", out, "--dataset", "iris", "--json")
    assert {json.loads(line)["view"] for line in elsewhere.output.splitlines()} == {"global"}
    for words, said in (
        (("--view", "personal", "--dataset", "iris"), "clients are tested on examples of their own"),
        (("--view", "globl"), "the methods of this run have global, personal"),
    ):
        refused = call("evaluate", out, *words)
        assert refused.exit_code == 2
        assert said in refused.output
    said = call("export", out, "--format", "npz", "--out", tmp_path / "models").output
    assert "per_fedavg is judged by its view personal" in said
    assert "fedavg is judged" not in said.replace("per_fedavg", "")
    said = call("export", out, "--format", "npz", "--personal", "--out", tmp_path / "models").output
    assert "clients of per_fedavg adapt" in said


@pytest.mark.parametrize(
    "method", ["local_only", *(pytest.param(name, marks=pytest.mark.slow) for name in ("per_fedavg", "ifca"))]
)
def test_plans_staging_and_blocks_give_the_same_scores(small, tmp_path, method, monkeypatch):
    """Brought to the device in blocks of two clients, and from host memory, it is what one call gives."""
    config = small.replace(methods=(method,), rounds=2, eval_every=2)
    first = train.train(config, tmp_path / "whole")[method].history
    staged = train.train(config.replace(staged=True, mesh=2), tmp_path / "staged")[method].history
    names = [name for name in first if "personal" in name]
    assert "test/personal/accuracy_sd" in names
    for name in names:
        np.testing.assert_allclose(staged[name], first[name], rtol=1e-4, atol=1e-6, err_msg=name)
    if method == "per_fedavg":  # which draws in blocks; the others give the same in any
        return
    monkeypatch.setattr(client_scores, "_MOST_CLIENTS", 2)
    with jax.enable_x64(False):
        experiment = setup.prepare(config)
        state = jax.tree.map(jnp.asarray, load_run(tmp_path / "whole").methods[method].state)
        [scorer] = client_scores.scorers(experiment, experiment.algorithms[method])
        in_blocks = scorer.scores(state)
    for metric, values in in_blocks.items():
        np.testing.assert_allclose(values, first[f"client/personal/{metric}"], rtol=1e-5, err_msg=metric)


def test_what_is_asked_for_is_evaluated_and_nothing_else(small, tmp_path):
    config = small.replace(methods=("fedavg", "local_only"), rounds=2, evaluate=("personal",), evaluate_clients=3)
    results = train.train(config, tmp_path / "run")
    for result in results.values():
        assert not any(name in result.history for name in ("test/accuracy", "client/accuracy"))
        assert (~np.isnan(result.history["client/personal/train_accuracy"])).sum(1).tolist() == [3, 3]
    summary = (tmp_path / "run" / "summary.md").read_text()
    assert "3 of 6 clients are tested" in summary
    assert "--evaluate personal --evaluate-clients 3" in summary
    assert "| FedAvg | personal |" in summary
    assert_drawn_again(tmp_path / "run", tmp_path / "again")


def test_dealt_test_examples_have_each_clients_mix_of_labels(small):
    with jax.enable_x64(False):
        federation = setup.federate(small.replace(dataset="digits", clients=10, alpha=0.5))
    config = small.replace(dataset="digits", clients=10, alpha=0.5)
    part = views.own_tests(config, federation)
    rows = part.assignment.rows
    assert part.source == "test"
    assert len(np.unique(rows)) == len(rows) == len(federation.dataset.test["y"])
    held = np.zeros((10, 10))
    for client in range(10):
        held[client] = np.bincount(federation.dataset.test["y"][part.assignment[client]], minlength=10)
    shares = train.class_shares(federation) * federation.sizes[:, None]
    expected = shares / shares.sum(0) * held.sum(0)
    assert np.abs(held - expected).max() < 1
    again = views.own_tests(config, federation)
    assert again.assignment == part.assignment


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"evaluate": ("prototype",)}, "evaluate names the view 'prototype', and the methods of this run have global"),
        ({"evaluate": ("globl",)}, "take of these"),
        ({"evaluate": ("doubled",), "methods": (OWN, "fedavg")}, "view of fedavg in evaluate"),
        ({"methods": ("fedper",), "feature_skew": "rotation", "dataset": "digits"}, "give test_share, for example 0.2"),
        ({"staged": True}, "asks all clients before the first round and after the last round"),
        (
            {"methods": ("local_only",), "staged": True, "keep_best": True, "validation_share": 0.2},
            "keeps rows of all clients",
        ),
    ],
)
def test_what_cannot_be_evaluated_is_refused(config, choices, message):
    with jax.enable_x64(False), pytest.raises(ValueError, match=message):
        setup.prepare(config.replace(**choices))


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"evaluate": "global"}, "evaluate must be a tuple"),
        ({"evaluate": ("global", "global")}, "names one twice"),
        ({"evaluate": (3,)}, "evaluate must be a text"),
        ({"evaluate_clients": 0}, "test at least one client"),
    ],
)
def test_what_is_no_choice_of_views_is_refused(choices, message):
    with pytest.raises(ValueError, match=message):
        Config(**choices)


def test_runs_of_before_there_were_views_go_on_with_the_global_model(small, tmp_path):
    """Their record names no views; it is read, and the run goes on, as it was begun."""
    config = small.replace(methods=("local_only",), rounds=2, evaluate=("global",))
    out = tmp_path / "run"
    train.train(config, out)
    content = json.loads((out / "config.json").read_text())
    for name in ("evaluate", "evaluate_clients"):
        del content["config"]["evaluation"][name]
    train.files.write_record(out / "config.json", content)
    assert load_run(out, with_data=False).config.evaluation.evaluate == ("global",)
    found = train.train(config.replace(rounds=4, evaluate=()), out)["local_only"].history
    assert history.views_of(found) == ["global"]


@pytest.mark.parametrize("test_share", [0.25, 0.0])
def test_new_clients_adapt_on_a_part_of_their_examples_and_are_tested_on_the_rest(small, tmp_path, test_share):
    config = small.replace(
        methods=("fedavg_ft", "local_only"), new_clients=2, cohort_size=2, rounds=2, eval_every=2, seeds=1,
        partition="iid", test_share=test_share,
    )  # fmt: skip
    results = train.train(config, tmp_path / "run")
    found = results["fedavg_ft"].history
    assert found["new/personal/accuracy"].shape == found["new/accuracy"].shape == (1, 2)
    assert "new/personal/accuracy" not in results["local_only"].history  # no row of its own, nothing to adapt
    run = load_run(tmp_path / "run")
    with jax.enable_x64(False):
        experiment = setup.prepare(config)
        algorithm = experiment.algorithms["fedavg_ft"]
        [scorer] = client_scores.of_new_clients(experiment, algorithm)
        again = scorer.scores(jax.tree.map(jnp.asarray, run.methods["fedavg_ft"].state))
        part = experiment.federation.parts["new"].assignment
        share = test_share or 0.5
        split = splits.split_clients(part, (0.0, share), labels=experiment.dataset.train["y"])
        # By hand: each new client tunes the global model on what it keeps, and is tested on the rest.
        assert (np.abs(split.test.sizes - share * part.sizes) <= 0.5).all()
        held = {name: leaf[split.test[0]] for name, leaf in experiment.dataset.train.items()}
        key = jax.random.fold_in(client_scores.key_of(experiment.keys[0]), 0)
        own = fc.Population.from_clients(
            [{name: leaf[split.train[client]] for name, leaf in experiment.dataset.train.items()} for client in (0, 1)]
        )
        tests = fc.Population.from_clients(
            [held, {name: leaf[split.test[1]] for name, leaf in experiment.dataset.train.items()}]
        )
        state = jax.tree.map(lambda leaf: jnp.asarray(leaf[0]), run.methods["fedavg_ft"].state)
        by_hand = fc.evaluate_view(experiment.metric_fn, algorithm.personal, state, tests, adapt_on=own, key=key)
    np.testing.assert_array_equal(again["accuracy"], found["new/personal/accuracy"])
    np.testing.assert_allclose(found["new/personal/accuracy"][0], by_hand["accuracy"], rtol=1e-5)
    summary = (tmp_path / "run" / "summary.md").read_text()
    assert "| new clients |" in summary
