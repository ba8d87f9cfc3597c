"""`fedjax-core list`: everything, one kind, one thing, or the nearest name of the right kind."""

import pytest
from click.testing import CliRunner

from pipelines.cli import catalog, commands


def listed(*words):
    return CliRunner().invoke(commands.main, ["list", *words], terminal_width=110)


@pytest.mark.parametrize(
    ("words", "heading", "shown"),
    [
        (["methods"], "methods", "scaffold"),
        (["method"], "methods", "fedavg"),
        (["models"], "models", "mlp"),
        (["datasets"], "data sets", "digits"),
        (["data-set"], "data sets", "iris"),
        (["data", "sets"], "data sets", "wine"),
        (["Partitions"], "partitions", "dirichlet"),
        (["feature_skews"], "feature skews", "rotation"),
        (["skew"], "feature skews", "rotation"),
        (["samplers"], "samplers", "markov"),
        (["optimizers"], "client optimizers", "adamw"),
        (["plans"], "plans", "staged"),
    ],
)
def test_a_kind_is_called_by_its_heading(words, heading, shown):
    result = listed(*words)
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[0].startswith(heading)
    assert any(line.startswith(shown) for line in lines)
    assert len([line for line in lines if line.startswith(("mlp", "digits", "scaffold "))]) <= 1, "nothing else"


def test_all_is_every_kind_and_several_names_are_shown_one_after_the_other():
    text = listed().output
    for kind in catalog.kinds():
        assert f"\n{kind}s" in f"\n{text}"
    text = listed("uniform", "plans", "fedavg").output
    places = [text.index(said) for said in ("different clients", "model_parallel", "McMahan")]
    assert places == sorted(places)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("metods", "did you mean 'methods'"),
        ("sampelrs", "did you mean 'samplers'"),
        ("scafold", "did you mean 'scaffold'? That is a method"),
        ("markow", "did you mean 'markov'? That is a sampler"),
        ("", "unknown name ''"),
        ("\u4e2d", "`fedjax-core list` shows everything"),
        ("x" * 5000, "unknown name 'xxx"),
    ],
)
def test_the_nearest_of_all_names(name, said):
    result = listed(name)
    assert result.exit_code == 2
    assert said in result.output
    assert len(result.output) < 1000
