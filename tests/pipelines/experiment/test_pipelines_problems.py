"""What runs have besides one whole model: public data of the server, several architectures."""

import jax
import numpy as np
import pytest
from click.testing import CliRunner
from jax.experimental.compilation_cache import compilation_cache

from pipelines import Config, load_run
from pipelines.cli import commands
from pipelines.configuration import methods
from pipelines.experiment import setup
from pipelines.federation import federations
from pipelines.run import export, scoring, train

SMALL = Config(
    dataset="iris",
    clients=4,
    cohort_size=2,
    partition="iid",
    model="logistic_regression",
    epochs=1,
    batch_size=20,
    eval_every=1,
    seeds=2,
    mesh=1,
    x64=True,
)
DISTILLED = SMALL.replace(
    methods=("feddf",), settings={"feddf": {"server_steps": 3}}, public_share=0.25, seeds=1, rounds=2
)


def saved(out):
    """The states that a run has come to, and its curves."""
    run = load_run(out)
    assert not run.missing
    return {name: (trained.state, trained.history) for name, trained in run.methods.items()}


def assert_same(one, other):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_the_server_holds_examples_that_no_client_has_and_no_labels():
    federation = setup.federate(DISTILLED)
    held = federation.parts["public"].assignment.rows
    taken = federation.parts["train"].assignment.rows
    assert len(held) == 30
    np.testing.assert_array_equal(np.sort(np.concatenate([held, taken])), np.arange(120))
    again = setup.federate(DISTILLED.replace(first_seed=7)).parts["public"].assignment.rows
    np.testing.assert_array_equal(held, again)
    other = setup.federate(DISTILLED.replace(partition_seed=1)).parts["public"].assignment.rows
    assert not np.array_equal(held, other)
    for staged in (False, True):
        population = setup.prepare(DISTILLED.replace(staged=staged), federation).population
        assert set(population.public["unlabelled"]) == {"x"}
        np.testing.assert_array_equal(population.public["unlabelled"]["x"], federation.dataset.train["x"][held])


def test_the_server_sees_inputs_without_the_skew_of_clients():
    skewed = DISTILLED.replace(dataset="digits", feature_skew="noise", public_share=0.1)
    federation, plain = setup.federate(skewed), setup.federate(skewed.replace(feature_skew="none"))
    np.testing.assert_array_equal(federation.public_inputs["x"], plain.public_inputs["x"])
    assert not np.array_equal(federation.dataset.train["x"], plain.dataset.train["x"])


def test_a_saved_federation_keeps_its_public_part(tmp_path):
    federation = setup.federate(DISTILLED)
    federations.save(federation, DISTILLED, tmp_path)
    fields, digest = federations.read(tmp_path)
    config = DISTILLED.replace(federation=str(tmp_path), federation_digest=digest)
    assert fields["public_share"] == 0.25
    assert setup.federate(config).parts["public"] == federation.parts["public"]


@pytest.fixture
def quick(monkeypatch, tmp_path_factory):
    """Runs without figures, and programs that are compiled once for all runs of a test."""
    monkeypatch.setattr(train.report, "write", lambda *args: None)
    usual = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("compiled")))
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_compilation_cache_dir", usual)
    compilation_cache.reset_cache()


@pytest.mark.usefixtures("quick")
def test_feddf_runs_resumes_and_is_evaluated(tmp_path):
    train.train(DISTILLED, tmp_path / "whole")
    train.train(DISTILLED.replace(rounds=1), tmp_path / "grown")
    train.train(DISTILLED, tmp_path / "grown")
    assert_same(saved(tmp_path / "whole"), saved(tmp_path / "grown"))
    without = load_run(tmp_path / "grown", with_data=False)  # models are there without the data
    whole = load_run(tmp_path / "whole")
    examples, _ = scoring.examples_of(whole)
    (row,) = scoring.score(whole, examples)
    assert row["method"] == "feddf"
    assert 0 <= row["accuracy"] <= 1
    assert_same(without.methods["feddf"].params(), whole.methods["feddf"].params())
    with pytest.raises(ValueError, match="public_share"):
        train.train(DISTILLED.replace(public_share=0.5), tmp_path / "grown")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["--method", "feddf"],
            "feddf needs public data and public_share=0 leaves none: give public_share, for example",
        ),
        (["--method", "fedgh"], "fedgh is for clients that differ in architecture, and models=[] names none: give two"),
        (
            ["--method", "fedgh", "--models", "mlp"],
            "models=['mlp'] names 1: give two or more, for example",
        ),
        (["--method", "fedgh", "--models", "mlp,mlp"], "models=['mlp', 'mlp'] names one twice"),
        (["--method", "fedgh", "--models", "mlp,cmn"], "unknown model 'cmn': did you mean 'cnn'?"),
        (
            ["--models", "mlp,cnn"],
            "models=['mlp', 'cnn'] are for clients that differ in architecture, and fedavg has",
        ),
        (
            ["--method", "fedgh", "--models", "mlp,resnet18_gn"],
            "features of different widths (mlp 100, resnet18_gn 512), and one header cannot fit all: give --hidden 512",
        ),
        (
            ["--method", "fedgh", "--models", "mlp,cnn", "--clients", "1", "--cohort-size", "1"],
            "models=['mlp', 'cnn'] are 2, and there are 1 clients",
        ),
        (["--method", "fedgh", "--models", "mlp,cnn_bn", "--hidden", "512"], "tasks[1] has statistics"),
        (
            ["--method", "fedlora"],
            "fedlora needs low-rank parts of a frozen model, which only a model of your own can have: give --model",
        ),
        (
            ["--method", "sfprompt"],
            "sfprompt needs a model in three pieces, which runs of the command line",
        ),
        (["--public-share", "1"], "public_share must lie in [0, 1), got 1"),
        (["--public-share", "-0.1"], "public_share must lie in [0, 1), got -0.1"),
        (["--public-share", "nan"], "public_share must be finite"),
        (["--public-share", "some"], "'some'"),
        (["--public-share", "0.0001"], "public_share: a share of 0.0001 of 1438 examples holds out 0"),
        (["--public-share", "0.9999"], "public_share: a share of 0.9999 of 1438 examples holds out 1438 and leaves 0"),
    ],
)
def test_mistakes_are_one_line(words, said, tmp_path):
    result = CliRunner().invoke(commands.main, ["train", "--no-cache", "--out", str(tmp_path / "run"), *words])
    assert result.exit_code == 2, result.output
    assert said in result.output
    assert "Traceback" not in result.output


MIXED = SMALL.replace(
    methods=("fedgh",), models=("mlp", "logistic_regression"), hidden=(4,), seeds=1, rounds=2, clients=5, steps=2
)


@pytest.mark.usefixtures("quick")
def test_fedgh_runs_resumes_and_is_evaluated(tmp_path):
    train.train(MIXED, tmp_path / "whole")
    train.train(MIXED.replace(rounds=1), tmp_path / "grown")
    train.train(MIXED, tmp_path / "grown")
    assert_same(saved(tmp_path / "whole"), saved(tmp_path / "grown"))
    run = load_run(tmp_path / "grown")
    examples, _ = scoring.examples_of(run)
    rows = scoring.score(run, examples, part="test")
    assert [row["view"] for row in rows] == ["global", "personal"]
    trained = run.methods["fedgh"]
    for row in rows:
        last = trained.history["test/accuracy" if row["view"] == "global" else "test/personal/accuracy"][0, -1]
        assert row["accuracy"] == pytest.approx(last)
    without = load_run(tmp_path / "grown", with_data=False).methods["fedgh"]
    assert_same(without.params(), trained.params())
    small, large = trained.params()
    assert small["head"]["kernel"].shape == large["head"]["kernel"].shape == (4, 3)
    assert jax.tree.structure(small) != jax.tree.structure(large)
    exported = {each.name: each.params for each in export.models_of(run, clients=range(2))}
    own = jax.tree.map(lambda leaf: leaf[0], trained.client_params([1]))
    assert_same(exported["fedgh-seed0-client1"], own)


def test_clients_are_dealt_to_models_in_turn():
    experiment = setup.prepare(MIXED)
    view = experiment.algorithms["fedgh"].personal
    np.testing.assert_array_equal(view.groups.of, [0, 1, 0, 1, 0])
    with pytest.raises(ValueError, match="differ in architecture: apply the model of one group"):
        experiment.model.apply({}, np.zeros((1, 4)))
    assert MIXED.slug() != MIXED.replace(models=("logistic_regression", "mlp")).slug()
    (said,) = setup.unused(MIXED, ["model"])
    assert said == "--model means nothing beside --models mlp,logistic_regression"


OWN = '''
"""A method of a user's own, by arguments of any name and place."""

import algorithms
import fedjax_core as fc


def mixed(dealt: fc.GroupsOfClients, labels: fc.NumClasses, how: fc.ClientOptimizer, each: fc.TaskOfEachGroup, **local):
    """Mixed: FedGH by other names."""
    return algorithms.fedgh(each, how, groups=dealt, num_classes=labels, **local)
'''


def test_a_method_of_ones_own_is_given_tasks_and_groups_by_what_it_declares(tmp_path, monkeypatch):
    (tmp_path / "own_of_groups.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    config = MIXED.replace(methods=("own_of_groups:mixed",))
    (algorithm,) = setup.prepare(config).algorithms.values()
    np.testing.assert_array_equal(algorithm.personal.groups.of, [0, 1, 0, 1, 0])
    with pytest.raises(ValueError, match="own_of_groups:mixed is for clients that differ in architecture, and models="):
        config.replace(models=())


def test_public_data_that_no_method_takes_is_said():
    given = ["public_share"]
    (said,) = setup.unused(DISTILLED.replace(methods=("fedavg",), settings={}), given)
    assert said.endswith("none of fedavg takes public data: it is for feddf")
    assert setup.unused(DISTILLED, given) == []
    assert "feddf" in methods.names()
