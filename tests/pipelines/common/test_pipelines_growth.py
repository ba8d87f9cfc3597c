import csv
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from pipelines import Config
from pipelines.common import growth
from pipelines.common.progress import Reporter
from pipelines.run import loading, run_directory, train
from pipelines.studies import zeroth_order
from pipelines.studies.zeroth_order_config import Synthetic
from tests.pages import assert_drawn_again

# It ends between two evaluations of a longer run.
SHORT = Config(
    dataset="iris",
    clients=6,
    cohort_size=3,
    min_size=2,
    model="logistic_regression",
    methods=("fedavg",),
    rounds=7,
    eval_every=2,
    checkpoint_every=4,
    seeds=2,
    epochs=1,
    client_lr_decay=0.9,
    target=0.8,
)
LONG = SHORT.replace(rounds=10)
LARGE = LONG.replace(seeds=3, methods=("fedavg", "scaffold"))


def rows(out, method, seeds):
    with (out / "metrics.csv").open() as file:
        return [row for row in csv.DictReader(file) if row["method"] == method and int(row["seed"]) in seeds]


def say_to(said):
    return Reporter(said.append, lambda progression: None, lambda: None)


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    out = tmp_path_factory.mktemp("short") / "run"
    train.train(SHORT, out)
    return out


def times_of_checkpoints(out):
    """When each file was written, the copy of the configuration left out: it goes with the configuration."""
    files = (path for path in (out / "checkpoints").rglob("*") if path.name != "config.json")
    return {path: path.stat().st_mtime_ns for path in files}


def test_a_run_that_grows_is_to_the_bit_the_one_made_at_once(short, tmp_path):
    grown, long, third = tmp_path / "grown", tmp_path / "long", tmp_path / "third"
    shutil.copytree(short, grown)
    said: list[str] = []
    results = train.train(LARGE, grown, reporter=say_to(said))
    # Not from round 7, after which a run of 10 rounds is not evaluated.
    assert "fedavg: going on after round 6" in said
    assert any(line.startswith("fedavg, seeds 2 to 2: compiling") for line in said)
    train.train(LONG, long)
    assert rows(grown, "fedavg", {0, 1}) == rows(long, "fedavg", {0, 1})
    assert (long / "clients.csv").read_text().splitlines()[:13] == (grown / "clients.csv").read_text().splitlines()[:13]
    train.train(LONG.replace(first_seed=2, seeds=1), third)
    assert rows(grown, "fedavg", {2}) == rows(third, "fedavg", {2})
    assert len(rows(grown, "scaffold", {0, 1, 2})) == 30
    assert results["fedavg"].history["test/accuracy"].shape == (3, 5)

    # A method that joins later has the batches of seeds that the others have.
    content = json.loads((grown / "config.json").read_text())
    assert content["batches"] == [2, 1]
    assert train.read_config(grown) == LARGE
    run = loading.load_run(grown)
    assert run.methods["scaffold"].seeds == [0, 1, 2]
    np.testing.assert_array_equal(run.methods["fedavg"].state.round, [10, 10, 10])
    for one, other in zip(
        jax.tree.leaves(train.final_params(grown, "fedavg")),
        jax.tree.leaves(train.final_params(long, "fedavg")),
        strict=True,
    ):
        np.testing.assert_array_equal(one[:2], other)

    # Nothing is left to do, for the whole or for a part of it, and another target makes another report.
    before = times_of_checkpoints(grown)
    said.clear()
    train.train(LARGE.replace(methods=("scaffold",), target=0.5), grown, reporter=say_to(said))
    assert said == [
        "fedavg: complete, 10 rounds",
        "fedavg, seeds 2 to 2: complete, 10 rounds",
        "scaffold: complete, 10 rounds",
        "scaffold, seeds 2 to 2: complete, 10 rounds",
    ]
    assert times_of_checkpoints(grown) == before
    assert train.read_config(grown).report.target == 0.5
    assert "rounds to 50 %" in (grown / "summary.md").read_text()
    assert_drawn_again(grown, tmp_path / "again")


def test_an_end_between_evaluations_leaves_a_checkpoint_to_go_on_from(short):
    names = sorted(path.name for path in (short / "checkpoints" / "fedavg").iterdir())
    assert names == ["round-00000004", "round-00000006", "round-00000007"]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"rounds": 6}, "rounds: 6 here, 7 there (it can be raised and not lowered)"),
        ({"seeds": 1}, "seeds: 1 here, 2 there (it can be raised and not lowered)"),
        ({"first_seed": 1}, "first_seed: 1 here, 0 there"),
        ({"alpha": 0.5}, "alpha: 0.5 here, 0.3 there"),
        ({"client_lr": 0.1}, "client_lr: 0.1 here, 0.2 there"),
        ({"eval_every": 4}, "eval_every: 4 here, 2 there"),
        ({"methods": ("scaffold",)}, "what is there stays: name fedavg too"),
        ({"settings": {"fedavg": {"server_lr": 0.5}}}, "those of fedavg are fixed"),
        ({"epochs": None, "steps": 3}, "steps: 3 here, None there"),
    ],
)
def test_what_is_another_run_is_refused_with_what_differs(changed, said):
    with pytest.raises(ValueError, match="another configuration") as refused:
        SHORT.replace(**changed).check_grown_from(SHORT, Path("out"))
    assert said in str(refused.value)
    assert "more rounds, seeds and methods" in str(refused.value)
    assert str(refused.value).count(" there") - str(refused.value).count("is there") == len(changed)


@pytest.mark.parametrize(
    "changed",
    [
        {"rounds": 8},
        {"seeds": 3},
        {"methods": ("scaffold", "fedavg"), "settings": {"scaffold": {"client_lr": 0.5}}},
        {"target": 0.1, "checkpoint_every": 10},
        {"mesh": 2, "lanes": 2, "memory": 1.0, "data_dir": "elsewhere"},
    ],
)
def test_what_may_grow(changed):
    SHORT.replace(**changed).check_grown_from(SHORT, Path("out"))


def test_methods_join_those_that_are_there_with_their_settings():
    there = SHORT.replace(methods=("fedavg", "fedprox"), settings={"fedprox": {"mu": 0.5}})
    joining = SHORT.replace(methods=("fedadam", "fedavg"), settings={"fedadam": {"tau": 0.1}})
    both = joining.with_methods_of(there)
    assert both.methods == ("fedavg", "fedprox", "fedadam")
    assert both.settings == {"fedprox": {"mu": 0.5}, "fedadam": {"tau": 0.1}}
    both.check_grown_from(there, Path("out"))


def test_a_study_can_be_given_more_seeds_and_nothing_else(tmp_path):
    study = Synthetic(dim=4, function="levy", rounds=2, seeds=2)
    zeroth_order.claim(study, tmp_path / "study")
    larger = study.replace(seeds=3)
    zeroth_order.claim(larger, tmp_path / "study")
    grown = {"config": zeroth_order._content(larger)}
    with run_directory.at_work(tmp_path / "study", zeroth_order.KIND, print, lambda there: grown, {}):
        assert json.loads((tmp_path / "study" / "study.json").read_text())["config"]["seeds"] == 3
    other = study.replace(rounds=4, seeds=3, dim=5)
    with pytest.raises(ValueError, match="another study") as refused:
        zeroth_order.claim(other, tmp_path / "study")
    for words in (
        "rounds: 4 here, 2 there",
        "dim: 5 here, 4 there",
        "can be given more seeds and methods, and nothing else",
    ):
        assert words in str(refused.value)
    with pytest.raises(ValueError, match="seeds: 2 here, 3 there"):
        zeroth_order.claim(study, tmp_path / "study")
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match=r"no study\.json"):
        zeroth_order.claim(study, tmp_path)


def test_rules_say_what_is_wrong():
    assert growth.at_least(3, 3) == ""
    assert "not lowered" in growth.at_least(2, 3)
    assert growth.contains(["b", "a", "c"], ["a", "b"]) == ""
    assert growth.contains(["a"], ["a", "b"]) == "what is there stays: name b too"
    assert growth.same_for(["a"])({"a": {"x": 1}, "b": {"x": 2}}, {"a": {"x": 1}}) == ""
    assert "those of a" in growth.same_for(["a"])({}, {"a": {"x": 1}})
