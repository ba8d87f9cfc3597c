import dataclasses
import math

import jax
import jax.numpy as jnp
import optax
import pytest
from click.testing import CliRunner

import algorithms
from fedjax_core import Groups, as_task, values_suffice
from pipelines import Config
from pipelines.cli import commands
from pipelines.configuration import methods
from pipelines.experiment import setup


def loss_fn(params, batch, key):
    return jnp.sum((params - batch["x"]) ** 2, axis=-1)


# What is at the head is a normalization too, for methods that ask a task what its normalizations are.
TASK = dataclasses.replace(
    as_task(loss_fn),
    init=lambda key: {"head": jnp.zeros((3, 2))},
    paths=lambda kind: ("head",),
    features=lambda *args: args[1]["x"],
    head=lambda params, z: z,
)

# Of a body without parameters and a dense layer.
HEADED = dataclasses.replace(
    TASK,
    init=lambda key: {"head": {"kernel": jnp.zeros((3, 2)), "bias": jnp.zeros(2)}},
    head=lambda params, z: z @ params["head"]["kernel"] + params["head"]["bias"],
)


def build(name, settings=None, **local):
    return methods.build(
        name,
        TASK,
        optax.sgd(0.1),
        num_clients=4,
        settings=settings or {},
        local={"batch_size": 2, **local},
        model_functions=dict.fromkeys(["features", "inputs", "logits"], lambda params, batch, key: params * batch["x"])
        | {"layers": {}, "num_classes": 2, "task": HEADED, "tasks": (TASK,) * 2, "groups": Groups.by_modulo(4, 2)},
    )


def test_the_classic_methods_are_there():
    assert {"fedavg", "fedsgd", "fedadam", "fedprox", "scaffold", "feddyn", "fednova"} <= set(methods.names())


@pytest.mark.parametrize("name", methods.names())
def test_every_method_describes_itself_and_builds(name):
    method = methods.describe(name)
    assert ": " in method.title, "the first line of a docstring is 'Name: one line'"
    assert len(method.paper) > 20, "the last paragraph of a docstring starts with 'Paper:'"
    assert method.paper[-1] == "."
    assert "batch_size" not in method.hyperparameters
    algorithm = build(name, num_epochs=2, num_steps=None, order="shuffled", weights="uniform")
    params = {"head": jnp.zeros((3, 2))}
    params = HEADED.init(None) if methods.asks_for(name, "task") else params
    params = (params, params) if methods.asks_for(name, "tasks") else params
    state = jax.eval_shape(algorithm.init, params, jax.random.key(0))
    assert state.round.dtype == jnp.int32
    for key, default in method.hyperparameters.items():
        assert methods.parse(name, key, str(default)) == default


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "fedlora",
            "fedlora needs low-rank parts of a frozen model, which only a model of your own can have: give --model",
        ),
        ("sfprompt", "sfprompt needs a model in three pieces"),
        ("fedghx", "unknown method 'fedghx': did you mean 'fedgh'"),
    ],
)
def test_a_method_that_the_command_line_cannot_run_says_why(name, words):
    assert name not in methods.names()
    for refusing in (lambda: methods.check_runs(name), lambda: Config(methods=(name,))):
        with pytest.raises(ValueError, match=words):
            refusing()


def test_every_method_is_listed_with_what_it_asks_for():
    listed = methods.all_names()
    assert set(methods.names()) < set(listed)
    assert {"fedlora", "sfprompt"} <= set(listed)
    assert "public data (--public-share)" in methods.asks_in_words(methods.describe("feddf"))
    assert methods.asks_in_words(methods.describe("scaffold")) == "state of every client"
    assert methods.asks_in_words(methods.describe("fedsgd")) == "no local epochs or steps"
    assert methods.asks_in_words(methods.describe("fedzo")) == "values of the loss and no gradients"
    assert methods.asks_in_words(methods.describe("fedgh")).startswith("a model for each group of clients (--models)")


def test_hyperparameters_are_the_keyword_arguments_with_plain_defaults():
    scaffold = methods.describe("scaffold")
    assert scaffold.hyperparameters == {"server_lr": 1.0, "option": "II"}
    assert scaffold.needs == {
        "loss_fn": "loss",
        "client_optimizer": "client optimizer",
        "num_clients": "num_clients",
    }
    assert "num_clients" not in methods.describe("fedavg").needs.values()
    assert scaffold.factory is algorithms.scaffold


def test_values_are_read_as_the_type_of_the_default():
    assert methods.parse("fedadam", "b1", "0.5") == 0.5
    assert methods.parse("fedavgm", "nesterov", "true") is True
    assert methods.parse("fedavgm", "nesterov", "no") is False
    assert methods.parse("scaffold", "option", "I") == "I"
    assert isinstance(methods.parse("fedavg", "server_lr", 1), float)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: methods.describe("fedavgg"), r"unknown method 'fedavgg': did you mean 'fedavg'\?"),
        (lambda: methods.parse("fedprox", "m", "1"), r"unknown hyper-parameter of fedprox 'm': did you mean 'mu'\?"),
        (lambda: methods.parse("fedprox", "mu", "big"), "fedprox.mu must be a number like its default 0.1, got 'big'"),
        (lambda: methods.parse("fedavgm", "nesterov", "maybe"), "fedavgm.nesterov is on or off, got 'maybe'"),
        (lambda: methods.read("x", "1.5", 3), "x must be an integer like its default 3, got '1.5'"),
        (lambda: build("fedprox", {"mu": "-1"}), "mu must lie in"),
        (lambda: build("fedavg", order="sideways"), "order must be one of"),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_settings_reach_the_factory():
    def step(algorithm):
        from fedjax_core import Population

        population = Population.from_sizes({"x": jnp.ones((8, 3))}, jnp.asarray([2, 2, 2, 2]))
        state, _ = algorithm.round(algorithm.init(jnp.zeros(3)), population.cohort(jnp.arange(4)), jax.random.key(0))
        return algorithm.params(state)

    whole, half = step(build("fedavg")), step(build("fedavg", {"server_lr": "0.5"}))
    assert jnp.allclose(half, 0.5 * whole)
    assert float(jnp.abs(whole).max()) > 0


def test_the_factories_defaults_are_used_unless_overruled():
    assert methods.settings_of("fzoos", {})["capacity"] == algorithms.FZooSQueries().capacity
    assert methods.settings_of("fzoos", {"capacity": "60"})["capacity"] == 60
    assert methods.settings_of("fedadam", {})["server_lr"] == 0.03
    assert methods.settings_of("fedadam", {"server_lr": "0.5"})["server_lr"] == 0.5


def test_options_in_tuples_are_set_by_their_own_names():
    known = methods.describe("fzoos").hyperparameters
    assert known["survey"] == 50
    assert known["kernel"] == "matern"
    assert known["safeguard"] is False
    assert "survey_candidates: points that" in methods.describe("fzoos").card
    with pytest.raises(ValueError, match=r"did you mean 'survey'\?"):
        methods.parse("fzoos", "surveys", 3)
    with pytest.raises(ValueError, match="capacity=60 has no room for a survey of x and 70 points"):
        build("fzoos", {"capacity": "60", "survey": "70"})


def test_fzoos_fits_the_default_model():
    """The paper's options would remember ten times as much, 14 GB for the default run, and end in NaN."""
    config = Config(methods=("fzoos",))
    with jax.enable_x64(False):
        experiment = setup.prepare(config)
        assert sum(setup.predicted_memory(experiment, "fzoos").values()) < 3e9
    settings = methods.settings_of("fzoos", {})
    steps = 5 * -(-int(experiment.population.sizes.max()) // config.local.batch_size)
    assert (
        settings["feature_lengthscale"] > config.local.client_lr * steps
    )  # the way of a client, along gradients of length 1
    assert "7,510 parameters" in methods.advice("fzoos", 7510)
    assert methods.advice("fzoos", 15) == methods.advice("fedavg", 7510) == ""


def test_local_work_is_kept_from_the_single_step_method():
    assert methods.takes_local_work("fedavg")
    assert not methods.takes_local_work("fedsgd")
    build("fedsgd", num_epochs=3, order="shuffled")
    with pytest.raises(ValueError, match="num_epochs"):
        algorithms.fedsgd(loss_fn, optax.sgd(0.1), num_epochs=3)


# Their global models have a part that is only trained in each client's own.
PARTLY_TRAINED = ("fedper", "fedrep", "lg_fedavg", "local_only")


WITH_GRADIENTS = [n for n in methods.names() if n != "fedbn" and not values_suffice(methods.describe(n).factory)]


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_GRADIENTS)
def test_every_method_trains_at_its_defaults_on_the_command_line(name, tmp_path):
    """Those without gradients take minutes for a round of so large a model, which `methods.advice` says.

    The model has no normalization, which FedBN is about.
    """
    own = {"feddf": "--public-share 0.1 --set feddf.server_steps=100", "fedgh": "--models mlp,cnn"}.get(name, "")
    words = (
        f"train --method {name} {own} --rounds 2 --seeds 1 --eval-every 2 --mesh 1 --no-cache --out {tmp_path / 'run'}"
    )
    result = CliRunner().invoke(commands.main, words.split())
    assert result.exit_code == 0, result.output
    rows = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    last = dict(zip(rows[0].split(","), rows[-1].split(","), strict=True))
    scores = ("loss", "update_norm", "test_personal_loss" if name == "fedgh" else "test_loss")
    assert all(math.isfinite(float(last[score])) for score in scores)
    if name not in (*PARTLY_TRAINED, "fedgh"):
        assert float(last["test_accuracy"]) > 0.1
