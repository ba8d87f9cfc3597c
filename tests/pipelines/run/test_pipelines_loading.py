import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_core import evaluate
from pipelines import Config, load_run
from pipelines.common import files
from pipelines.data import sources
from pipelines.experiment import setup
from pipelines.experiment.setup import MODELS
from pipelines.federation import federations
from pipelines.results import history, report
from pipelines.run import description, train

rng = np.random.default_rng(0)
X = rng.normal(size=(90, 4)).astype(np.float32)
MINE = sources.from_arrays(X, (X[:, 0] > 0).astype(np.int32), name="mine")
OWN = Config(
    dataset="mine",
    clients=5,
    cohort_size=3,
    partition="iid",
    model="logistic_regression",
    methods=("scaffold",),
    rounds=2,
    eval_every=1,
    checkpoint_every=1,
    seeds=2,
    first_seed=3,
    epochs=1,
)


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A run of arrays that have no name to load them by, as it is made in Python."""
    out = tmp_path_factory.mktemp("own") / "run"
    with jax.enable_x64(False):
        experiment = setup.prepare(OWN, federations.build(OWN, MINE))
        train.run(experiment, out)
    return out, experiment


def test_a_run_of_arrays_of_ones_own_is_used_without_them(own):
    out, _ = own
    # As if it were made on another machine, with more devices than there are here.
    elsewhere = out.parent / "elsewhere"
    shutil.copytree(out, elsewhere)
    content = json.loads((elsewhere / "config.json").read_text())
    content["config"] |= {"mesh": 64, "model_parallel": 2, "lanes": 128}
    (elsewhere / "config.json").write_text(json.dumps(content))
    run = load_run(elsewhere)
    assert run.federation is None
    assert "unknown data set 'mine'" in run.missing
    assert run.data["examples"] == {"x": ["float32", [4]], "y": ["int32", []]}
    assert (run.data["num_classes"], run.data["clients"]) == (2, 5)
    scaffold = run.methods["scaffold"]
    assert (scaffold.seeds, scaffold.rounds) == ([3, 4], [2, 2])
    assert {leaf.shape[:2] for leaf in jax.tree.leaves(scaffold.state.client_controls)} == {(2, 5)}
    with jax.enable_x64(False):
        for s, seed in enumerate(scaffold.seeds):
            params = scaffold.params(seed)
            scores = evaluate(run.metric_fn, params, jax.tree.map(jnp.asarray, MINE.test))
            # One program for the seeds at once and another for one model: the last bit of a mean may differ.
            np.testing.assert_allclose(scores["accuracy"], scaffold.history["test/accuracy"][s, -1], rtol=1e-6)
            personal = scaffold.client_params([4, 0], seed)
            jax.tree.map(lambda row, one: np.testing.assert_array_equal(row[1], one), personal, params)
            assert run.model.apply(params, X[:3]).shape == (3, 2)
    assert not np.array_equal(jax.tree.leaves(scaffold.params(3))[0], jax.tree.leaves(scaffold.params(4))[0])
    jax.tree.map(np.testing.assert_array_equal, scaffold.params(), scaffold.params(3))


def test_the_data_is_there_where_it_is_given_or_can_be_loaded(own, finished, small):
    out, experiment = own
    assert load_run(out, federation=experiment.federation).federation is experiment.federation
    assert load_run(out, experiment=experiment).model is experiment.model
    run = load_run(finished, methods=["fedavg"])
    assert list(run.methods) == ["fedavg"]
    with jax.enable_x64(False):
        assert run.federation.digest() == setup.federate(small).digest()
    assert run.missing == ""
    assert load_run(finished, with_data=False).federation is None


def test_data_that_is_another_one_is_not_taken_for_that_of_the_run(own, tmp_path):
    shutil.copytree(own[0], tmp_path / "run")
    content = json.loads((tmp_path / "run" / "config.json").read_text())
    content["config"]["data"]["dataset"] = "iris"  # the name of another data set that is there
    (tmp_path / "run" / "config.json").write_text(json.dumps(content))
    run = load_run(tmp_path / "run")
    assert run.federation is None
    assert "another one than that of the run" in run.missing
    assert "num_classes is 3 and was 2" in run.missing
    content.pop("data")  # a run of a version that did not write it down
    content["config"]["data"]["dataset"] = "nowhere"
    files.write_record(tmp_path / "run" / "config.json", content)
    with pytest.raises(ValueError, match="does not say what its data was like"):
        load_run(tmp_path / "run")


def test_mistakes(own, finished, tmp_path, small):
    scaffold = load_run(own[0], with_data=False).methods["scaffold"]
    for call, said in (
        (lambda: scaffold.params(0), "seed 0 is none of this run: it has 3, 4"),
        (lambda: scaffold.client_params([0, 5]), "client 5 is none of this run: its clients are 0 to 4"),
        (lambda: scaffold.client_params(3), r"must be a list of client numbers"),
        (lambda: load_run(own[0], methods=["scafold"]), "did you mean 'scaffold'"),
        (lambda: load_run(tmp_path), "no run directory"),
    ):
        with pytest.raises(ValueError, match=said):
            call()
    train.claim(tmp_path / "new", small.replace(methods=("fedavg",)))
    with pytest.raises(ValueError, match="no checkpoint of fedavg: run it first"):
        load_run(tmp_path / "new")


def test_a_model_is_built_from_the_description_as_from_the_data():
    """Images with statistics, a text and measurements: the models have the same parameters."""
    images = np.zeros((20, 8, 8, 1), np.uint8)
    images[::2] = 200
    labels = np.arange(20, dtype=np.int32) % 4
    text = {"x": np.zeros((20, 6), np.int32), "y": np.ones((20, 6), np.int32)}
    token = MINE._replace(train=text, test=text, num_classes=7, pad_id=-1, vocabulary_size=7)
    for dataset, model in (
        (sources.from_arrays(images, labels, name="images"), "cnn"),
        (token, "transformer"),
        (MINE, "mlp"),
    ):
        config = OWN.replace(model=model)
        known = json.loads(json.dumps(description.of_federation(federations.build(config, dataset))))
        again = description.without_data(known)
        assert description.of_federation(again) == known | {"sizes": {"train": 1, "test": 1}}
        assert again.dataset.normalization == dataset.normalization
        assert again.num_clients == 5
        one, other = (
            jax.eval_shape(MODELS[model](d, config).init, jax.random.key(0)) for d in (dataset, again.dataset)
        )
        assert one == other
        assert description.misfit(dataset, known) == ""


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"examples": {"x": ["float32", [5]], "y": ["int32", []]}}, "inputs have shape [4] and those of the run [5]"),
        ({"examples": {"x": ["uint8", [4]], "y": ["int32", []]}}, "inputs are float32 and those of the run uint8"),
        ({"examples": {"x": ["float32", [4]], "y": ["int32", [4]]}}, "labels have shape [] and those of the run [4]"),
        ({"num_classes": 1}, "it has 2 classes and the run 1"),
        ({"examples": {"z": ["float32", [4]]}}, "it has no 'z'"),
    ],
)
def test_what_a_model_cannot_be_applied_to(change, said):
    known = description.of_federation(federations.build(OWN, MINE))
    assert said in description.misfit(MINE, {**known, **change})


def test_a_run_that_counted_scalars_goes_on_in_bytes(own, tmp_path, monkeypatch):
    """A directory as it was written before there were bytes, loaded, and made longer."""
    from_rounds = history.from_rounds

    def in_scalars(metrics, scores):
        found = from_rounds(metrics, scores)
        for old, new in (("uploaded", "bytes_up"), ("downloaded", "bytes_down")):
            found[f"round/{old}"] = (found.pop(f"round/{new}") / 4).astype(np.int32)
        return found

    def run(out, rounds):
        with jax.enable_x64(False):
            experiment = setup.prepare(OWN.replace(rounds=rounds), federations.build(OWN, MINE))
            train.run(experiment, out)
            return load_run(out).methods["scaffold"].history, (out / "metrics.csv").read_text()

    with monkeypatch.context() as patch:
        patch.setattr(history, "from_rounds", in_scalars)
        patch.setattr(history, "in_bytes", lambda found, params: found)
        patch.setattr(history, "to_csv", lambda *given: "an older table\n")
        patch.setattr(report, "write", lambda *given: None)
        with jax.enable_x64(False):
            experiment = setup.prepare(OWN.replace(rounds=1), federations.build(OWN, MINE))
            train.run(experiment, tmp_path / "older")
    loaded = load_run(tmp_path / "older").methods["scaffold"].history
    expected = load_run(own[0]).methods["scaffold"].history
    assert "round/uploaded" not in loaded
    for name in ("round/bytes_up", "round/bytes_down"):
        np.testing.assert_array_equal(loaded[name], expected[name][:, :1])
    grown, table = run(tmp_path / "older", 2)
    assert set(grown) == set(expected)
    for name in ("round/bytes_up", "round/bytes_down", "round/loss"):
        np.testing.assert_array_equal(grown[name], expected[name])
    assert table == (own[0] / "metrics.csv").read_text()
