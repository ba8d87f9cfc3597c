"""The studies of published settings: files that are configurations, tables of what was run, and a small one runs."""

import functools
import importlib.util
import json
import os
import re
import shlex
from pathlib import Path

import jax
import numpy as np
import pytest

from pipelines import Config
from pipelines.data import datasets
from pipelines.experiment import own_model, setup
from pipelines.federation import federations
from pipelines.run import train
from tests.test_documented_commands import commands_in, parsed

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "examples" / "studies"
REAL = Path(os.environ.get("FEDJAX_CORE_DATA") or ROOT.parent / "shared" / "data")
STUDIES = sorted(path.stem for path in FOLDER.glob("*.toml") if path.stem != "published")


def module(name):
    spec = importlib.util.spec_from_file_location(f"studies_{name}", FOLDER / f"{name}.py")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


collect = module("collect")


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)  # where the commands are given


@pytest.mark.parametrize("study", STUDIES)
def test_a_study_is_a_configuration_with_a_digest_a_section_and_a_published_figure(study):
    config = collect.planned(study)
    assert re.fullmatch("[0-9a-f]{64}", config.federation.digest)
    text = collect.PAGE.read_text()
    assert f"<!-- study: {study} -->" in text
    said = collect.published()[study]
    assert set(said["figures"]) <= set(config.methods)
    assert said["source"]


def test_the_page_shows_what_is_in_the_results_and_nothing_else():
    text = collect.PAGE.read_text()
    assert collect.renewed(text) == text, "run python examples/studies/collect.py"
    assert set(collect.published()) == set(STUDIES)
    results = {path.stem for path in collect.RESULTS.glob("*.json")}
    assert results <= set(STUDIES)
    for study in results:
        found, plan = json.loads((collect.RESULTS / f"{study}.json").read_text()), collect.planned(study)
        assert (found["rounds_of_the_study"], found["seeds_of_the_study"]) == (plan.rounds, plan.seeds)
        assert set(found["methods"]) <= set(plan.methods)
        for own in found["methods"].values():
            assert own["curve"][-1][0] == found["rounds"]
            assert len(own["accuracy"]) == found["seeds"]
            assert own["curve"][-1][1] == pytest.approx(np.mean(own["accuracy"]), abs=1e-5)


def test_the_commands_of_the_page_can_be_given():
    from pipelines.cli import commands

    shown = commands_in(collect.PAGE.read_text())
    assert len(shown) >= 7
    for words in shown:
        values = parsed(commands.main, words)
        assert values["config_path"].stem in STUDIES, shlex.join(words)


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """Loads a data set, each once."""
    return functools.cache(lambda name: datasets.load(name, REAL, cache_dir=tmp_path_factory.mktemp("cache")))


@pytest.mark.parametrize(
    "study", [name for name in STUDIES if name.startswith(("synthetic", "mnist", "niid", "fedavg"))]
)
def test_a_digest_is_that_of_the_federation(study, load):
    config = collect.planned(study)
    name = config.data.dataset
    if not name.startswith("examples") and not (REAL / "tfds" / name).is_dir():
        pytest.skip(f"no prepared data in {REAL}")
    federation = federations.build(config, load(name))
    assert federation.digest() == config.federation.digest


@pytest.mark.parametrize(
    ("network", "shape", "parameters"),
    [
        ("sigmoid_regression", (28, 28, 1), 7_850),
        ("small_cnn", (28, 28, 1), 44_426),
        ("dropout_cnn", (32, 32, 3), 1_626_442),
        ("imagenet_resnet18_gn", (32, 32, 3), 11_181_642),
    ],
)
def test_networks_have_as_many_parameters_as_theirs(network, shape, parameters):
    x = np.zeros((4, *shape), np.float32)
    y = np.arange(4, dtype=np.int32)
    dataset = datasets.Dataset("images", {"x": x, "y": y}, {"x": x, "y": y}, 10)
    model = own_model.build(f"examples/studies/networks.py:{network}", dataset)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == parameters


def test_synthetic_clients_differ_as_much_as_said():
    made = module("synthetic")
    for alpha, beta in ((0, 0), (1, 1)):
        x, y, groups = made._made(alpha, beta)
        sizes = np.bincount(groups)
        assert len(sizes) == 30
        assert sizes.min() >= 50
        again = made._made(alpha, beta)
        np.testing.assert_array_equal(again[0], x)
        assert set(np.unique(y)) <= set(range(10))
        # Within a client the j-th input varies by j^-1.2.
        largest = groups == np.argmax(sizes)
        np.testing.assert_allclose(x[largest].var(axis=0), np.arange(1, 61) ** -1.2, rtol=0.25)
    centers = {
        beta: np.asarray([x[groups == k].mean() for k in range(30)])
        for beta in (0, 1)
        for x, _, groups in [made._made(0, beta)]
    }
    # Means over 60 inputs: their own spread is 1 / sqrt(60), B_k's is beta.
    assert centers[0].std() == pytest.approx(1 / np.sqrt(60), rel=0.35)
    assert centers[1].std() == pytest.approx(np.sqrt(1 + 1 / 60), rel=0.35)


def test_a_study_runs_in_part_and_is_told_as_that(tmp_path, monkeypatch):
    """Two rounds of the smallest study: what is collected is of that run, and another run is refused."""
    plan = collect.planned("synthetic_1_1_fedml")
    part = plan.replace(rounds=2, seeds=2, eval_every=1)
    run = tmp_path / "run"
    with jax.enable_x64(False):
        train.run(setup.prepare(part), run)
    with pytest.raises(ValueError, match="eval_every is 1 and 5 in the study"):
        collect.collected("synthetic_1_1_fedml", run)
    monkeypatch.setattr(collect, "FREE", (*collect.FREE, "eval_every"))
    found = collect.collected("synthetic_1_1_fedml", run)
    assert (found["rounds"], found["rounds_of_the_study"]) == (2, 200)
    assert (found["seeds"], found["seeds_of_the_study"]) == (2, 5)
    summary = json.loads((run / "summary.json").read_text())["fedavg"]["seeds"]
    own = found["methods"]["fedavg"]
    assert own["accuracy"] == [round(summary[s]["test_accuracy"], 6) for s in "01"]
    assert [at for at, _, _ in own["curve"]] == [1, 2]
    with pytest.raises(ValueError, match=r"the run is not one of synthetic_0_0: (?=.*dataset is )(?=.*epochs is )"):
        collect.collected("synthetic_0_0", run)
    with pytest.raises(ValueError, match="there is no study 'synthetic'"):
        collect.collected("synthetic", run)
    monkeypatch.setattr(collect, "RESULTS", tmp_path)
    (tmp_path / "synthetic_1_1_fedml.json").write_text(json.dumps(found))
    shown = "\n".join(collect.table("synthetic_1_1_fedml"))
    mean, sd = 100 * np.mean(own["accuracy"]), 100 * np.std(own["accuracy"], ddof=1)
    assert f"| FedAvg | above 60 | {mean:.2f} ± {sd:.2f} |" in shown
    assert "Run: 2 of 200 rounds, 2 of 5 seeds" in shown
    longer = Config(**{**plan.flat(), "rounds": 201})
    with pytest.raises(ValueError, match="rounds is 201 and 200 in the study"):
        collect.check("synthetic_1_1_fedml", longer)
