import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models
from fedjax_core import ClientTable, Variables, continue_rounds, leaf_paths
from pipelines import Config
from pipelines.configuration import methods
from pipelines.data import datasets
from pipelines.experiment import setup
from pipelines.results import early
from pipelines.run import engines


@pytest.fixture(autouse=True)
def single_precision():
    with jax.enable_x64(False):
        yield


def tokens():
    rng = np.random.default_rng(0)
    text = rng.integers(0, 7, (30, 9)).astype(np.int32)
    part = {"x": text[:, :-1], "y": text[:, 1:]}
    return datasets.Dataset("tokens", part, {k: v[:5] for k, v in part.items()}, 7)


def test_prepare_builds_what_the_configuration_says(small):
    experiment = setup.prepare(small)
    assert experiment.population.num_clients == 6
    assert experiment.population.num_examples == 120
    assert int(experiment.population.sizes.min()) >= 2
    assert list(experiment.algorithms) == ["fedavg", "scaffold"]
    assert experiment.seeds == [0, 1]
    assert experiment.population.examples["x"].dtype == jnp.float32
    later = setup.prepare(small.replace(first_seed=1, seeds=1))
    assert later.seeds == [1]
    assert jnp.array_equal(jax.random.key_data(later.keys[0]), jax.random.key_data(experiment.keys[1]))


def test_all_methods_start_from_the_same_models_and_seeds_differ(small):
    experiment = setup.prepare(small.replace(model="mlp", hidden=(4,)))
    starts = [
        jax.vmap(a.params)(setup.initial_states(experiment, a, experiment.keys)) for a in experiment.algorithms.values()
    ]
    for one, other in zip(*map(jax.tree.leaves, starts), strict=True):
        np.testing.assert_array_equal(one, other)
    kernel = starts[0]["head"]["kernel"]
    assert not np.array_equal(kernel[0], kernel[1])


def test_methods_that_explore_do_so_before_the_first_round(small):
    settings = {name: {"explore_epochs": 2, "patience": 1} for name in ("fedlex", "autoflip")}
    experiment = setup.prepare(small.replace(methods=("fedavg", *settings), settings=settings))
    for name, algorithm in experiment.algorithms.items():
        before = setup.initial_states(experiment, algorithm, experiment.keys)
        first = engines.engine(experiment, algorithm).start()
        assert jax.tree.map(jnp.shape, first) == jax.tree.map(jnp.shape, before)
        if name == "fedavg":
            for one, other in zip(jax.tree.leaves(first), jax.tree.leaves(before), strict=True):
                np.testing.assert_array_equal(one, other)
        else:
            np.testing.assert_array_equal(first.maps.explorers, [6, 6])
            kernel = first.maps.mean["head"]["kernel"]
            assert not np.array_equal(kernel[0], kernel[1])
    assert not first.mask["head"]["kernel"].all()


def test_states_have_no_weakly_typed_leaf(small):
    # The model has no normalization, which FedBN is about.
    names = [name for name in methods.names() if name not in ("fedbn", "fedgh")]
    experiment = setup.prepare(small.replace(methods=tuple(names), public_share=0.2))
    for algorithm in experiment.algorithms.values():
        shapes = jax.eval_shape(lambda keys, a=algorithm: setup.initial_states(experiment, a, keys), experiment.keys)
        assert not any(leaf.weak_type for leaf in jax.tree.leaves(shapes))


def test_fedbn_keeps_the_normalizations_of_a_model_of_the_command_line():
    config = Config(
        dataset="digits", partition="iid", clients=4, cohort_size=2, methods=("fedbn",), model="resnet18_gn"
    )
    experiment = setup.prepare(config)
    state = jax.eval_shape(
        lambda keys: setup.initial_states(experiment, experiment.algorithms["fedbn"], keys), experiment.keys
    )
    assert set(leaf_paths(state.personal.rows)) == set(experiment.model.paths("norm"))
    with pytest.raises(ValueError, match="FedBN keeps normalizations at home, and the model has no parameters of kind"):
        setup.prepare(config.replace(model="mlp"))


@pytest.fixture
def batch_norm(monkeypatch):
    """The configuration of a run of a model with batch normalization, a small one."""
    small = lambda d, c: models.cnn_bn(d.input_shape, d.num_classes, channels=(2,), hidden=3)  # noqa: E731
    monkeypatch.setitem(setup.MODELS, "cnn_bn", small)
    methods = ("fedbn", "scaffold")
    return Config(dataset="digits", partition="iid", clients=4, cohort_size=2, methods=methods, model="cnn_bn")


@pytest.mark.parametrize("rule", ["average", "personal", "frozen"])
def test_methods_carry_the_statistics_of_a_model_as_they_are_told(batch_norm, rule):
    """FedBN's are always each client's own."""
    experiment = setup.prepare(batch_norm.replace(statistics=rule))
    for name, algorithm in experiment.algorithms.items():
        shapes = jax.eval_shape(lambda keys, a=algorithm: setup.initial_states(experiment, a, keys), experiment.keys)
        own = rule == "personal" or name == "fedbn"
        assert isinstance(shapes.statistics, ClientTable) == own
        models_of_seeds = jax.eval_shape(lambda state, a=algorithm: early.global_params(a, state), shapes)
        assert isinstance(models_of_seeds, Variables)
        assert all(leaf.shape[0] == len(experiment.seeds) for leaf in jax.tree.leaves(models_of_seeds))


def test_personal_statistics_are_not_staged(batch_norm):
    with pytest.raises(ValueError, match=r"fedbn keeps statistics of every client, .* leave out --staged"):
        setup.prepare(batch_norm.replace(staged=True))
    setup.prepare(batch_norm.replace(staged=True, methods=("fedavg",)))


@pytest.mark.parametrize("name", sorted(setup.SAMPLERS))
def test_every_sampler_draws_from_the_population(name, small):
    experiment = setup.prepare(small.replace(sampler=name, participation=0.5))
    drawn = [np.asarray(experiment.sampler(jax.random.key(0), jnp.int32(t))) for t in range(8)]
    some = [ids[ids >= 0] for ids in drawn]
    assert all(len(np.unique(ids)) == len(ids) for ids in some)
    assert max(ids.max(initial=-1) for ids in drawn) <= 5
    assert any(len(ids) for ids in some)
    if name in ("uniform", "weighted", "cyclic"):
        assert {len(ids) for ids in some} == {3}
    if name == "full":
        assert {len(ids) for ids in some} == {6}


@pytest.mark.parametrize("name", sorted(setup.MODELS))
def test_every_model_fits_some_data(name, monkeypatch):
    monkeypatch.setitem(datasets.DATASETS, "tokens", tokens)
    sequence = name in ("char_lstm", "transformer")
    config = Config(
        dataset="tokens" if sequence else "digits",
        partition="iid",
        clients=5,
        cohort_size=2,
        model=name,
        methods=("fedavg",),
    )
    experiment = setup.prepare(config)
    assert experiment.dataset.is_sequence == sequence
    params = jax.eval_shape(experiment.model.init, jax.random.key(0))
    batch = jax.tree.map(lambda leaf: leaf[:3], experiment.test)
    scores = jax.eval_shape(experiment.metric_fn, params, batch)
    # Those of sequences are weighted by their tokens.
    values = {key: getattr(score, "value", score) for key, score in scores.items()}
    assert {key: value.shape for key, value in values.items()} == {"accuracy": (3,), "loss": (3,)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": "irirs"}, r"unknown data set 'irirs': did you mean 'iris'\?"),
        ({"model": "mpl"}, r"unknown model 'mpl': did you mean 'mlp'\?"),
        ({"partition": "dirichlett"}, r"unknown partition 'dirichlett': did you mean 'dirichlet'\?"),
        ({"sampler": "unifrom"}, r"unknown sampler 'unifrom': did you mean 'uniform'\?"),
        ({"client_optimizer": "sdg"}, r"unknown client optimizer 'sdg': did you mean 'sgd'\?"),
        ({"cohort_size": 7}, "cohort_size=7 is larger than the population of 6 clients"),
        ({"clients": 100}, "num_clients=100 with at least 2 examples each need 200, but there are 120"),
        ({"clients": 500, "partition": "iid"}, "at most 120 clients"),
        ({"weights": "sizes"}, "unknown weights 'sizes': there are uniform, examples"),
        ({"order": "backwards"}, "unknown order 'backwards'"),
        ({"client_optimizer": "adam", "client_momentum": 0.9}, "client_momentum=0.9 means nothing to .*'adam'"),
        ({"mesh": 4096}, r"mesh=4096 but there are \d+ cpu devices"),
        ({"mesh": 2, "lanes": 3}, "does not divide lanes=3: use a multiple of 2"),
        ({"model": "char_lstm"}, r"model 'char_lstm' predicts the next token, but the inputs of iris are float32\[4\]"),
        ({"model": "cnn"}, r"input_shape must be \(height, width, channels\)"),
        ({"settings": {"fedavg": {"server_lr": -1.0}}}, "server_lr must lie in"),
        ({"settings": {"scaffold": {"option": "III"}}}, "option must be one of"),
        ({"sampler": "markov", "turn_on": 0.0, "turn_off": 0.0}, "turn_on and turn_off are both 0"),
        ({"x64": True}, "x64=True but JAX runs in float32"),
    ],
)
def test_mistakes_are_named_before_anything_is_compiled(changes, message, small):
    with pytest.raises((ValueError, TypeError), match=message):
        setup.prepare(small.replace(**changes))


def test_inputs_that_cannot_be_moved_a_little_are_not_attacked(small, monkeypatch):
    monkeypatch.setitem(datasets.DATASETS, "tokens", tokens)
    config = small.replace(dataset="tokens", model="transformer", partition="iid", attack_radius=0.1)
    with pytest.raises(ValueError, match=r"attack_radius=0\.1, but the inputs of tokens are int32\[8\]"):
        setup.prepare(config)


def test_per_method_client_settings_and_decay(small):
    config = small.replace(client_lr_decay=0.5, settings={"scaffold": {"client_lr": 0.4, "client_lr_decay": 1}})
    gradient = jnp.float32(1)

    def step(method, round):
        optimizer = setup.client_optimizer(config, method)
        optimizer = optimizer(round) if callable(optimizer) else optimizer
        return float(optimizer.update(gradient, optimizer.init(gradient), gradient)[0])

    assert step("fedavg", 0) == pytest.approx(-config.local.client_lr)
    assert step("fedavg", 2) == pytest.approx(-config.local.client_lr / 4)
    assert step("scaffold", 2) == pytest.approx(-0.4)


@pytest.mark.parametrize("decay", [1.0, 0.5])
def test_weight_decay_is_added_to_gradients_before_momentum(small, decay):
    config = small.replace(client_lr=0.1, client_momentum=0.5, client_weight_decay=0.2, client_lr_decay=decay)
    optimizer = setup.client_optimizer(config, "fedavg")
    optimizer = optimizer if decay == 1 else optimizer(1)
    params = jnp.float32(3)
    state, moved, momentum = optimizer.init(params), params, 0.0
    for gradient in (1.0, -2.0):
        update, state = optimizer.update(jnp.float32(gradient), state, moved)
        momentum = 0.5 * momentum + gradient + 0.2 * float(moved)
        assert float(update) == pytest.approx(-0.1 * decay * momentum, rel=1e-6)
        moved = moved + update
    adam = setup.client_optimizer(small.replace(client_optimizer="adam", client_weight_decay=0.5), "fedavg")
    update, _ = adam.update(jnp.float32(-1.0), adam.init(params), params)
    assert float(update) == pytest.approx(-small.local.client_lr, rel=1e-3)  # of the loss: -1 + 0.5 * 3 goes up
    own = setup.client_optimizer(small.replace(client_optimizer="adamw", client_weight_decay=0.5), "fedavg")
    update, _ = own.update(jnp.float32(-1.0), own.init(params), params)
    assert float(update) == pytest.approx(
        small.local.client_lr * (1 - 0.5 * 3), rel=1e-3
    )  # of its own: beside the step


def test_rates_replace_settings_and_may_be_swept(small):
    """A sweep over rates gives what configurations with these rates give, one by one."""
    pairs = {"client_lr": (0.05, 0.3), "server_lr": (0.5, 2.0)}
    base = setup.prepare(small.replace(methods=("scaffold",), settings={"scaffold": {"server_lr": 9.0}}))

    def final(algorithm):
        state = jax.tree.map(lambda leaf: leaf[0], setup.initial_states(base, algorithm, base.keys))
        state, _ = continue_rounds(algorithm, base.sampler, 3)(state, base.population, base.keys[0])
        return algorithm.params(state)

    swept = jax.jit(jax.vmap(lambda rates: final(base.make("scaffold", base.plan, rates))))(
        {name: jnp.asarray(values, jnp.float32) for name, values in pairs.items()}
    )
    for i in range(2):
        chosen = {"scaffold": {name: values[i] for name, values in pairs.items()}}
        config = small.replace(methods=("scaffold",), settings=chosen)
        one = setup.prepare(config, base.federation).algorithms["scaffold"]
        want = jax.jit(lambda one=one: final(one))()
        jax.tree.map(lambda got, want, i=i: np.testing.assert_allclose(got[i], want, rtol=1e-5, atol=1e-6), swept, want)


def test_predicted_memory_is_of_the_right_size(small, finished):
    experiment = setup.prepare(small)
    for method in small.methods:
        parts = setup.predicted_memory(experiment, method)
        manifest = next((finished / "checkpoints" / method).glob("round-00000012/manifest.json"))
        needed = json.loads(manifest.read_text())["info"]["memory"]
        assert needed / 1.5 < sum(parts.values()) < 4 * needed
    # Exact where it can be: 15 parameters, two seeds; the model, c, six c_i, and the round.
    assert setup.predicted_memory(experiment, "scaffold")["state"] == 2 * (8 * 15 * 4 + 4)
    assert parts["data"] == 150 * (4 * 4 + 4) + 7 * 4
