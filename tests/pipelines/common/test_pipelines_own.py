"""A user's own method, model and data set, by module:name on the command line and in a configuration."""

import json
import re
import sys

import jax
import numpy as np
import pytest
from click.testing import CliRunner

from pipelines import Config
from pipelines.cli import commands
from pipelines.common import files, own
from pipelines.configuration import methods
from pipelines.data import datasets
from pipelines.experiment import setup
from pipelines.run import train

METHODS = '''
from typing import Any, NamedTuple

import jax.numpy as jnp

import algorithms


class State(NamedTuple):
    params: Any
    round: Any


def shrunk(loss_fn, client_optimizer, *, shrink=0.5, steps_seen: int, nesterov=False, **local):
    """FedAvg whose server step is shrunk.

    Paper: nobody, 2026.
    """
    inner = algorithms.fedavg(loss_fn, client_optimizer, server_lr=shrink, **local)
    assert isinstance(steps_seen, int)
    return inner


def strict(loss_fn, client_optimizer, num_clients, batch_size, num_epochs=1):
    assert num_clients == 6
    return algorithms.fedavg(loss_fn, client_optimizer, batch_size=batch_size, num_epochs=num_epochs)


def nothing(loss_fn, client_optimizer, **local):
    return None


def fails(loss_fn, client_optimizer, **local):
    return {}["missing"]


def no_arguments():
    return None


def no_round(loss_fn, client_optimizer, **local):
    inner = algorithms.fedavg(loss_fn, client_optimizer, **local)
    return inner._replace(round=lambda state, cohort, key: state)


def grows(loss_fn, client_optimizer, **local):
    inner = algorithms.fedavg(loss_fn, client_optimizer, **local)

    def round(state, cohort, key):
        state, metrics = inner.round(state, cohort, key)
        return state._replace(round=state.round.astype(jnp.float32)), metrics

    return inner._replace(round=round)


def breaks(loss_fn, client_optimizer, **local):
    inner = algorithms.fedavg(loss_fn, client_optimizer, **local)
    return inner._replace(round=lambda state, cohort, key: cohort.no_such_thing)


NUMBER = 3
'''

MODELS = """
import flax.linen as nn
import jax
import jax.numpy as jnp

import math


class Net(nn.Module):
    num_classes: int

    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.Dropout(0.5, deterministic=not train)(nn.relu(nn.Dense(5)(x.reshape(len(x), -1))))
        return nn.Dense(self.num_classes, name="head")(x)


class Normed(nn.Module):
    num_classes: int

    @nn.compact
    def __call__(self, x, train=False):
        return nn.Dense(self.num_classes)(nn.BatchNorm(use_running_average=not train)(x))


def linear(input_shape, num_classes):
    d = math.prod(input_shape)

    def init(key):
        return {"w": jnp.zeros((d, num_classes)), "b": jnp.zeros(num_classes)}

    return init, lambda params, x: x.reshape(-1, d) @ params["w"] + params["b"]


INSTANCE = Net(3)


def outputs_of_two(num_classes):
    return Net(2)


def wants_width(num_classes, width):
    return Net(num_classes)


def text():
    return "a model"


def fails(num_classes):
    raise RuntimeError("out of ideas")


def broken(input_shape, num_classes):
    return lambda key: {}, lambda params, x: params["no"]
"""

DATA = """
import numpy as np


def load(shift: float = 0.0):
    rng = np.random.default_rng(0)
    y = np.arange(90) % 3
    return {"x": np.eye(3)[y] + shift + 0.1 * rng.normal(size=(90, 3)), "y": y}


def pair():
    return np.zeros((9, 6, 6), np.int64), np.arange(9) % 3


def said(sequence_length, vocabulary):
    from pipelines.data import sources

    texts = ["good film", "bad film"] * 6
    labels = [1, 0] * 6
    return sources.from_texts(
        texts, texts, labels=(labels, labels), sequence_length=sequence_length, vocabulary=vocabulary
    )


def number():
    return 3


def fails():
    return open("no such file at all")


ARRAYS = load()
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A current directory with the user's files; two are called like packages of the library."""
    for name, content in {"my_methods": METHODS, "models": MODELS, "data": DATA, "syntax": "def f(:\n"}.items():
        (tmp_path / f"{name}.py").write_text(content)
    (tmp_path / "raises.py").write_text("import math\n\nmath.sqrt(-1)\n")
    (tmp_path / "needs.py").write_text("import no_such_package\n")
    monkeypatch.chdir(tmp_path)
    path, modules = list(sys.path), set(sys.modules)
    yield tmp_path
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if name in ("my_methods", "raises", "syntax", "needs", "lowrank") or name.startswith("_own_"):
            del sys.modules[name]


SMALL = Config(
    dataset="data:load",
    clients=6,
    cohort_size=3,
    min_size=2,
    partition="iid",
    model="logistic_regression",
    methods=("fedavg",),
    rounds=4,
    eval_every=2,
    checkpoint_every=2,
    seeds=1,
    epochs=1,
    x64=True,
)


def small(**changes):
    return SMALL.replace(**changes)


@pytest.mark.parametrize("name", ["my_methods:shrunk", "my_methods.py:shrunk"])
def test_a_method_of_ones_own_is_described_like_any_other(here, name):
    described = methods.describe(name)
    assert described.title == "FedAvg whose server step is shrunk."
    assert described.paper == "nobody, 2026."
    assert described.hyperparameters == {"shrink": 0.5, "steps_seen": None, "nesterov": False}
    assert methods.settings_of(name, {"shrink": "0.25", "steps_seen": "3"}) == {
        "shrink": 0.25,
        "steps_seen": 3,
        "nesterov": False,
    }
    shown = CliRunner().invoke(commands.main, ["list", name], terminal_width=110).output
    assert "--set shrunk.shrink=..." in shown
    assert "has to be set" in shown


def test_it_is_built_with_its_settings_and_what_it_takes(here):
    settings = {"my_methods:shrunk": {"steps_seen": 3, "shrink": 0.25}}
    names = ("my_methods:shrunk", "my_methods:strict", "fedavg")
    experiment = setup.prepare(small(methods=names, settings=settings))  # traces a round of each
    params = experiment.model.init(jax.random.key(0))

    def moved(name):
        algorithm = experiment.algorithms[name]
        cohort = experiment.population.cohort(np.arange(3))
        state, _ = jax.jit(algorithm.round)(algorithm.init(params), cohort, jax.random.key(1))
        return jax.tree.map(lambda after, before: np.asarray(after - before), algorithm.params(state), params)

    shrunk, whole = moved("my_methods:shrunk"), moved("fedavg")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, 0.25 * b, rtol=1e-9, atol=1e-12), shrunk, whole)
    with pytest.raises(ValueError, match=r"takes no argument 'weights', and this run has weights='examples'"):
        setup.prepare(small(methods=("my_methods:strict",), weights="examples"))


@pytest.mark.parametrize("name", ["models:Net", "models:linear", "models:INSTANCE", "models.py:Net"])
def test_a_model_of_ones_own(here, name):
    experiment = setup.prepare(small(model=name))
    params = experiment.model.init(jax.random.key(0))
    outputs = experiment.model.apply(params, experiment.test["x"])
    assert outputs.shape == (len(experiment.test["y"]), 3)
    if name == "models:Net":  # a key means training, and so dropout
        trained = experiment.model.apply(params, experiment.test["x"], jax.random.key(1))
        assert not np.allclose(outputs, trained)


TUNED = """
import jax

import models


def tuned(input_shape, num_classes):
    whole = models.mlp(input_shape, num_classes, hidden=(6,))
    base = whole.init(jax.random.key(0))
    low = models.adapted(whole, models.adapters.lora(2, alpha=1.0), whole.paths("dense"))

    def of_base(function):
        return lambda adapter, x, key=None: function(base, adapter, x, key)

    return models.Model(low.init, of_base(low.apply), of_base(low.features))
"""


def test_low_rank_parts_of_a_model_of_ones_own(here):
    (here / "lowrank.py").write_text(TUNED)
    words = ["train", "--no-cache", "--method", "fedlora,fedavg", "--set", "fedlora.rule=products", "--set", "alpha=1"]
    words += ["--dataset", "data:load", "--partition", "iid", "--clients", "6", "--cohort-size", "3", "--rounds", "2"]
    words += ["--eval-every", "2", "--checkpoint-every", "2", "--seeds", "1", "--out", "out", "--mesh", "1"]
    refused = CliRunner().invoke(commands.main, [*words, "--model", "mlp"])
    assert refused.exit_code == 2
    assert "fedlora needs low-rank parts of a frozen model" in refused.output
    with pytest.raises(ValueError, match=r"params must hold parts .* of one rank, got none"):
        setup.prepare(small(methods=("fedlora",), model="models:Net"))
    done = CliRunner().invoke(commands.main, [*words, "--model", "lowrank:tuned"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    for method in ("fedlora", "fedavg"):
        params = train.final_params(here / "out", method)
        assert set(params) == {"dense_0", "head"}
        assert all(part["B"].any() for part in params.values())


def test_data_of_ones_own(here):
    assert datasets.load("data:load").train["x"].shape == (72, 3)
    assert datasets.load("data:load", shift=2.0).train["x"].mean() > 2
    assert datasets.load("data:ARRAYS").num_classes == 3
    assert datasets.load("data:pair").train["x"].dtype == np.uint8
    assert datasets.load("data:said", sequence_length=7).input_shape == (7,)
    domains = datasets.load("data:load+data.py:ARRAYS")
    assert domains.group_names == ("load", "ARRAYS")
    assert setup.prepare(small(dataset="data:said", sequence_length=9)).dataset.input_shape == (9,)


MISTAKES = [
    ({"methods": ("my_method:shrunk",)}, ["no module 'my_method'", "did you mean 'my_methods:shrunk'?"]),
    ({"methods": ("my_method.py:shrunk",)}, ["no file my_method.py", "did you mean my_methods.py?"]),
    ({"methods": ("my_methods:shrnk",)}, ["unknown method in my_methods.py 'shrnk'", "did you mean 'shrunk'?"]),
    ({"methods": ("my_methods:NUMBER",)}, ["'my_methods:NUMBER' is of type int and cannot be called"]),
    ({"methods": ("my_methods:no_arguments",)}, ["takes ()", "(loss_fn, client_optimizer, *, its own options"]),
    ({"methods": ("my_methods:State",)}, ["a method is made by a function (loss_fn, client_optimizer"]),
    ({"methods": ("my_methods:shrunk",)}, ["needs steps_seen, which has no default", "--set shrunk.steps_seen"]),
    ({"methods": ("my_methods:nothing",)}, ["returned NoneType without a function 'init'", "fedjax_core.Algorithm"]),
    ({"methods": ("my_methods:fails",)}, ["'my_methods:fails' fails: KeyError: 'missing'", "(my_methods.py, line"]),
    ({"methods": ("my_methods:no_round",)}, ["return (state, metrics)"]),
    ({"methods": ("my_methods:grows",)}, ["makes state.round float32[] from int32[]"]),
    ({"methods": ("my_methods:breaks",)}, ["AttributeError", "no_such_thing", "(my_methods.py, line"]),
    ({"methods": ("syntax:f",)}, ["importing syntax fails: SyntaxError", "(syntax.py, line 1)"]),
    ({"methods": ("raises:f",)}, ["importing raises fails: ValueError", "(raises.py, line 3)"]),
    ({"methods": ("needs:f",)}, ["ModuleNotFoundError: No module named 'no_such_package' (needs.py, line 1)"]),
    ({"methods": ("my methods:f",)}, ["'my methods' is no name of a module"]),
    (
        {"methods": ("my_methods:shrunk", "my_methods:shrunk")},
        ["names one twice"],
    ),
    ({"model": "models:Nett"}, ["unknown model in models.py 'Nett'", "did you mean 'Net'?"]),
    ({"model": "models:wants_width"}, ["needs an argument 'width'", "num_classes"]),
    ({"model": "models:text"}, ["gives str: return a models.Model"]),
    ({"model": "models:fails"}, ["'models:fails' fails: RuntimeError: out of ideas (models.py, line"]),
    ({"model": "models:broken"}, ["'models:broken' fails: KeyError: 'no' (models.py, line"]),
    ({"model": "models:outputs_of_two"}, ["outputs of shape [3, 2]", "3 classes", "logits [3, 3]"]),
    ({"model": "models:Normed"}, ["keeps the collections batch_stats", "group or layer normalization"]),
    ({"dataset": "data:lod"}, ["unknown data set in data.py 'lod'", "did you mean 'load'?"]),
    ({"dataset": "data:number"}, ["number is int: return", "DatasetDict"]),
    ({"dataset": "data:fails"}, ["'data:fails' fails: FileNotFoundError", "(data.py, line"]),
]


@pytest.mark.parametrize(("changes", "parts"), MISTAKES, ids=[str(*c.values()) for c, _ in MISTAKES])
def test_mistakes_are_a_sentence(here, changes, parts):
    with pytest.raises(ValueError, match=re.escape(parts[0])) as caught:
        setup.prepare(small(**changes))
    for part in parts:
        assert part in str(caught.value)


def test_other_errors_stay_what_they_are(here):
    """The library's own complaint is not blamed on the user's file."""
    with pytest.raises(ValueError, match=r"^cohort_size=60 is larger"):
        setup.prepare(small(model="models:Net", cohort_size=60))


def test_names_of_ones_own():
    assert all(map(own.is_own, ("a.b:c", "some/path/file.py:name", "/tmp/x.py:f")))
    for other in ("fedavg", "glue/sst2", "mnist:3.0.1", "mine.npz", "mnist+usps", ":f", "a:"):
        assert not own.is_own(other)


def test_a_run_of_ones_own_goes_on_and_tells_of_an_edit(here):
    words = ["train", "--no-cache", "--method", "my_methods:shrunk", "--set", "shrunk.steps_seen=1"]
    words += ["--model", "models:linear", "--dataset", "data:load", "--partition", "iid", "--clients", "6"]
    words += ["--cohort-size", "3", "--rounds", "2", "--eval-every", "2", "--checkpoint-every", "2", "--seeds", "1"]
    words += ["--out", "out", "--mesh", "1"]
    first = CliRunner().invoke(commands.main, words, catch_exceptions=False)
    assert first.exit_code == 0, first.output
    assert "edited" not in first.output
    summary = (here / "out" / "summary.md").read_text()
    assert "shrink=0.5" in summary
    assert "steps_seen=1" in summary
    written = json.loads((here / "out" / "config.json").read_text())
    assert written["sources"]["my_methods:shrunk"]["file"] == "my_methods.py"
    assert set(written["sources"]) == {"my_methods:shrunk", "models:linear", "data:load"}
    assert jax.tree.leaves(train.final_params(here / "out", "my_methods:shrunk"))

    record = files.read_record(here / "out" / "config.json")
    record["sources"]["my_methods:shrunk"]["sha256"] = "0" * 64  # as if the file had been another then
    files.write_record(here / "out" / "config.json", record)
    again = CliRunner().invoke(commands.main, words, catch_exceptions=False)
    assert again.exit_code == 0, again.output
    assert "my_methods.py, which my_methods:shrunk is of, has been edited" in again.output
    assert "complete, 2 rounds" in again.output


def test_a_run_of_ones_own_grows_by_rounds_and_seeds_to_the_bit(here):
    name = "my_methods:strict"
    common = {"methods": (name,), "model": "models:linear", "mesh": 1}
    long = small(**common, rounds=4, seeds=2)
    train.train(small(**common, rounds=2, seeds=1), here / "grown")
    train.train(long, here / "grown")
    train.train(long, here / "whole")
    grown, whole = (jax.tree.leaves(train.final_params(here / out, name)) for out in ("grown", "whole"))
    assert len(grown) == 2
    for one, other in zip(grown, whole, strict=True):
        np.testing.assert_array_equal(one, other)
