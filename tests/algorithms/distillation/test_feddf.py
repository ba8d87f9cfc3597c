"""FedDF against a slow, obvious program in NumPy, and what it is at special values."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import algorithms
import fedjax_core as fc
from fedjax_core import samplers
from tests.problems import assert_trees_close, assert_trees_equal, softmax_loss, softmax_params, softmax_population

SIZES = (3, 5, 0, 8, 2, 6)
PUBLIC = {"x": np.asarray(softmax_population([7], seed=9).examples["x"])}
HELD_OUT = softmax_population([6], seed=2).examples
POPULATION = softmax_population(SIZES).with_public(PUBLIC)
KEY = jax.random.key(7)
IDS = [0, 1, 3, -1, 5, 2]
TAKING = [0, 1, 3, 5]


def logits(params, batch, key):
    """Not linear in the parameters: else the average would predict as all teachers together from the start."""
    return 2 * jnp.tanh(batch["x"] @ params["w"] + params["b"])


def make(**settings):
    settings = {
        "batch_size": 2,
        "order": "sequential",
        "server_optimizer": optax.sgd(0.5),
        "server_steps": 6,
    } | settings
    settings = {"server_batch_size": 3, **settings}
    return algorithms.feddf(softmax_loss, optax.sgd(0.1), logits=logits, **settings)


def run_round(public, **settings):
    """The model and the metrics after a round."""
    method, population = make(**settings), POPULATION.with_public(public)
    state, metrics = jax.jit(method.round)(method.init(softmax_params()), population.cohort(IDS), KEY)
    return jax.tree.map(np.asarray, method.params(state)), metrics


@functools.cache
def one_round(**settings):
    return run_round(PUBLIC, **settings)


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def gradient(params, x, p):
    """Of the mean cross-entropy of the labels p; for KL it is the same."""
    g = (softmax(x @ params["w"] + params["b"]) - p) / len(x)
    return {"w": x.T @ g, "b": g.sum(0)}


@functools.cache
def clients_models():
    """What each participant uploads, x + its displacement, by a loop."""
    found = []
    for i in TAKING:
        params = {name: np.asarray(leaf) for name, leaf in softmax_params().items()}
        x, y = (np.asarray(POPULATION.client(i)[name]) for name in ("x", "y"))
        for at in range(0, len(y), 2):
            g = gradient(params, x[at : at + 2], np.eye(3)[y[at : at + 2]])
            params = {name: params[name] - 0.1 * g[name] for name in params}
        found.append(params)
    return found


def average(shares):
    models = clients_models()
    return {name: sum(s * m[name] for s, m in zip(shares, models, strict=True)) for name in ("w", "b")}


def test_a_round_without_steps_of_the_server_is_fedavg():
    for weights in ("uniform", "examples"):
        fedavg = algorithms.fedavg(softmax_loss, optax.sgd(0.1), batch_size=2, order="sequential", weights=weights)
        state, expected = jax.jit(fedavg.round)(fedavg.init(softmax_params()), POPULATION.cohort(IDS), KEY)
        params, metrics = one_round(server_steps=0, weights=weights)
        assert_trees_close(params, fedavg.params(state), rtol=1e-12)
        assert metrics.loss == expected.loss
        assert metrics.extra.server_steps == metrics.extra.server_loss == 0


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"ensemble": "probabilities", "temperature": 2.0},
        {"temperature": 3.0, "weights": "examples"},
        {"server_steps": 1},  # targets of this batch alone
    ],
)
def test_full_batches_of_the_server_are_those_of_a_slow_program(settings):
    """With all public examples in a batch, their order makes no difference."""
    settings = {"temperature": 1.0, "ensemble": "logits", "weights": "uniform", "server_steps": 6} | settings
    temperature, steps = settings["temperature"], settings["server_steps"]
    params, metrics = one_round(server_batch_size=20, **settings)
    sizes = np.array([SIZES[i] for i in TAKING])
    student = average(np.full(4, 0.25) if settings["weights"] == "uniform" else sizes / sizes.sum())
    x = PUBLIC["x"]
    z = np.stack([2 * np.tanh(x @ m["w"] + m["b"]) for m in clients_models()]) / temperature
    target = softmax(z.mean(0)) if settings["ensemble"] == "logits" else softmax(z).mean(0)
    losses = []
    for _ in range(steps):
        h = np.tanh(x @ student["w"] + student["b"])
        q = softmax(2 * h / temperature)
        losses.append(np.mean(np.sum(target * (np.log(target) - np.log(q)), 1)))
        g = (q - target) / len(x) / temperature * 2 * (1 - h**2)
        student = {"w": student["w"] - 0.5 * x.T @ g, "b": student["b"] - 0.5 * g.sum(0)}
    assert_trees_close(params, student, rtol=1e-11)
    assert metrics.extra.server_loss == pytest.approx(np.mean(losses), rel=1e-10)
    assert metrics.extra.server_steps == steps


def test_teachers_are_asked_once_or_in_every_step_with_the_same_result():
    """Two steps see six of seven examples, three see some again; the third does nothing here."""
    two_steps = optax.sgd(lambda step: jnp.where(step < 2, 0.5, 0.0))
    in_every_step, once = (one_round(server_optimizer=two_steps, server_steps=n)[0] for n in (2, 3))
    assert_trees_close(in_every_step, once, rtol=1e-12)
    assert not np.allclose(once["w"], average([0.25] * 4)["w"], rtol=1e-3)


def test_one_teacher_equal_to_the_student_teaches_nothing():
    method = make()
    state, metrics = jax.jit(method.round)(method.init(softmax_params()), POPULATION.cohort([3, -1]), KEY)
    fedavg = algorithms.fedavg(softmax_loss, optax.sgd(0.1), batch_size=2, order="sequential")
    expected, _ = jax.jit(fedavg.round)(fedavg.init(softmax_params()), POPULATION.cohort([3, -1]), KEY)
    assert_trees_close(method.params(state), fedavg.params(expected), rtol=1e-12)
    assert abs(metrics.extra.server_loss) < 1e-14


def test_golden_values():
    """Teachers of logits (4, 0) and (0, 2), and a student of logits (2, 1), on one public example."""
    teach = np.array([[4.0, 0.0], [0.0, 2.0]])
    population = fc.Population.from_sizes({"target": teach}, [1, 1]).with_public({"one": np.ones((1, 1))})

    def loss(params, batch, key):  # a step of rate 1 goes to the client's target
        return jnp.sum(jnp.square(params - batch["target"]), axis=1) / 2

    def z(params, batch, key):
        return batch["one"] * params

    for ensemble, target in (("logits", (0.73105858, 0.26894142)), ("probabilities", (0.55060836, 0.44939164))):
        method = algorithms.feddf(
            loss,
            optax.sgd(1.0),
            logits=z,
            ensemble=ensemble,
            server_optimizer=optax.sgd(1.0),
            server_steps=1,
            batch_size=1,
        )
        state, metrics = jax.jit(method.round)(method.init(jnp.zeros(2)), population.cohort([0, 1]), KEY)
        # The student begins at the average (2, 1), whose softmax is the target of averaged logits.
        q = np.array([0.73105858, 0.26894142])
        np.testing.assert_allclose(method.params(state), np.array([2, 1]) - (q - target), atol=2e-8)
        assert metrics.extra.server_loss == pytest.approx(np.sum(target * (np.log(target) - np.log(q))), abs=1e-8)


def test_the_gradient_of_a_student_that_knows_nothing():
    """Teachers whose logits are (2, 1), and a student of logits (0, 0), which is their average."""
    root = np.sqrt([2.0, 1.0])
    population = fc.Population.from_sizes({"target": np.stack([root, -root])}, [1, 1]).with_public(
        {"one": np.ones((1, 1))}
    )

    def loss(params, batch, key):  # a step of rate 1 goes to the client's target
        return jnp.sum(jnp.square(params - batch["target"]), axis=1) / 2

    method = algorithms.feddf(
        loss,
        optax.sgd(1.0),
        logits=lambda params, batch, key: batch["one"] * (jnp.square(params) + params),
        server_optimizer=optax.sgd(1.0),
        server_steps=1,
        batch_size=1,
    )
    state, metrics = jax.jit(method.round)(method.init(jnp.zeros(2)), population.cohort([0, 1]), KEY)
    np.testing.assert_allclose(method.params(state), [0.23105858, -0.23105858], atol=1e-8)
    assert metrics.extra.server_loss == pytest.approx(0.11094407, abs=1e-8)


def test_the_schedule_is_adam_along_a_cosine():
    assert_trees_equal(
        one_round(server_optimizer=None, server_lr=1e-2, server_steps=4)[0],
        one_round(server_optimizer=optax.adam(optax.cosine_decay_schedule(1e-2, 4)), server_steps=4)[0],
    )


def validated(**settings):
    return run_round(algorithms.FedDFData(PUBLIC, HELD_OUT), **settings)


def held_out_loss(params):
    return float(jnp.mean(softmax_loss(params, HELD_OUT, None)))


def test_the_model_of_the_smallest_validation_loss_is_kept():
    looked_at = [held_out_loss(one_round(server_steps=n)[0]) for n in (0, 2, 4, 5)]
    best = int(np.argmin(looked_at))
    params, metrics = validated(server_steps=5, check_every=2, patience=100)
    assert held_out_loss(params) == pytest.approx(min(looked_at), rel=1e-12)
    assert_trees_close(params, one_round(server_steps=(0, 2, 4, 5)[best])[0], rtol=1e-12)
    assert metrics.extra.server_steps == 5


def test_the_server_stops_when_its_patience_is_over():
    """A server that never gets better keeps the average, and looks at it until its steps are as many."""
    params, metrics = validated(server_optimizer=optax.sgd(0.0), server_steps=50, check_every=2, patience=5)
    assert_trees_close(params, one_round(server_steps=0)[0], rtol=1e-12)
    assert metrics.extra.server_steps == 6


def test_plans_seeds_and_staging_agree():
    settings = {"order": "shuffled"}
    expected = one_round(**settings)
    for plan in (fc.Plan(lanes=3), fc.Plan(lanes=4, mesh=fc.client_mesh(2))):
        population = POPULATION if plan.mesh is None else fc.place(POPULATION, fc.replicated(plan.mesh))
        method = make(plan=plan, **settings)
        state, _ = jax.jit(method.round)(method.init(softmax_params()), population.cohort(IDS), KEY)
        assert_trees_close(method.params(state), expected[0], rtol=1e-12)
    method, sampler = make(**settings), samplers.uniform(len(SIZES), 3)
    run = fc.simulate(method, sampler, 2)
    keys = jax.random.split(KEY, 2)
    one = jax.jit(run)(softmax_params(), POPULATION, keys[0])
    together = jax.jit(jax.vmap(run, (None, None, 0)))(softmax_params(), POPULATION, keys)
    assert_trees_close(jax.tree.map(lambda leaf: leaf[0], together), one, rtol=1e-12)
    examples = jax.tree.map(np.asarray, POPULATION.examples)
    on_host = fc.HostPopulation.from_sizes(examples, SIZES).with_public(PUBLIC)
    staged = fc.simulate_staged(method, sampler, 2)(softmax_params(), on_host, keys[0])
    assert_trees_equal(staged, one)


def test_unlabelled_examples_may_be_a_part_of_public_data():
    """Beside what a loss takes of it."""

    def loss(params, batch, key, public):
        return public["factor"] * softmax_loss(params, batch, key)

    def z(params, batch, key, public):
        return public["factor"] * logits(params, batch, key)

    settings = {"batch_size": 2, "order": "sequential", "server_optimizer": optax.sgd(0.5), "server_steps": 6}
    method = algorithms.feddf(
        loss,
        optax.sgd(0.1),
        logits=z,
        unlabelled=lambda public: algorithms.FedDFData(public["data"], HELD_OUT),
        **{**settings, "server_batch_size": 3, "check_every": 2},
    )
    population = POPULATION.with_public({"factor": np.ones(()), "data": PUBLIC})
    state, metrics = jax.jit(method.round)(method.init(softmax_params()), population.cohort(IDS), KEY)
    expected, other = validated(check_every=2)
    assert_trees_close(method.params(state), expected, rtol=1e-12)
    assert metrics.extra.server_loss == pytest.approx(float(other.extra.server_loss), rel=1e-12)


def test_no_more_than_the_uploads_is_held():
    dim, slots = 200, 10
    population = fc.Population.from_sizes(
        {"x": np.ones((slots, dim), np.float32), "y": np.zeros(slots, np.int32)}, [1] * slots
    ).with_public({"x": np.ones((30, dim), np.float32)})
    params = {"w": jnp.zeros((dim, 50), jnp.float32), "b": jnp.zeros(50, jnp.float32)}
    method = make(server_optimizer=None, server_batch_size=2, plan=fc.Plan(lanes=1))
    round = jax.jit(method.round, donate_argnums=0)
    state = jax.eval_shape(method.init, params)
    held = round.lower(state, population.cohort(np.arange(slots)), KEY).compile().memory_analysis()
    assert held.temp_size_in_bytes < (slots + 8) * fc.num_bytes(params)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"temperature": 0.0}, r"temperature must lie in \(0, inf"),
        ({"ensemble": "votes"}, "ensemble must be"),
        ({"server_steps": -1}, "server_steps must be an integer of at least 0, got -1: 0 is FedAvg"),
        ({"server_batch_size": 0}, "server_batch_size must be an integer of at least 1"),
        ({"patience": 0}, "patience must be an integer of at least 1"),
        ({"check_every": 0}, "check_every must be an integer of at least 1"),
        ({"server_lr": -1.0}, "server_lr must lie in"),
    ],
)
def test_what_cannot_be_is_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        make(**settings)


def test_data_and_logits_that_do_not_fit_are_named():
    method = make()
    state = method.init(softmax_params())
    with pytest.raises(
        ValueError, match="the server trains on public data, and the population has none: give it unlabelled"
    ):
        jax.eval_shape(method.round, state, softmax_population(SIZES).cohort([0, 1]), KEY)
    method = algorithms.feddf(softmax_loss, optax.sgd(0.1), logits=lambda params, batch, key: jnp.mean(batch["x"]))
    with pytest.raises(ValueError, match=r"logits must return one row of class scores per example, float\[7, C\]"):
        jax.eval_shape(method.round, state, POPULATION.cohort([0, 1]), KEY)


NONE = {"x": np.zeros((0, 5))}


@pytest.mark.parametrize(
    ("public", "words"),
    [
        (NONE, "public holds 0 examples, and the server needs at least 1"),
        (algorithms.FedDFData(NONE, HELD_OUT), "public holds 0 examples"),
        (algorithms.FedDFData(PUBLIC, {**NONE, "y": np.zeros(0, np.int32)}), "validation holds 0 examples"),
        (algorithms.FedDFData(PUBLIC, ()), "validation holds no arrays"),
        ({"image": PUBLIC["x"]}, r"logits reads 'x', and the public examples .* have 'image': .*with_public"),
        (algorithms.FedDFData({"image": PUBLIC["x"]}, HELD_OUT), "logits reads 'x', .* have 'image'"),
        (algorithms.FedDFData(PUBLIC, PUBLIC), "loss_fn reads 'y', and the public examples .* have 'x'"),
        ({"x": PUBLIC["x"], "more": np.zeros(3)}, "the leading axes of public differ"),
        ({"x": np.zeros(())}, r"public\['x'\] is a scalar"),
    ],
)
def test_public_data_that_does_not_fit_is_named(public, words):
    method = make()
    cohort = POPULATION.with_public(public).cohort([0, 1])
    with pytest.raises(ValueError, match=words):
        jax.eval_shape(method.round, method.init(softmax_params()), cohort, KEY)


def test_a_key_that_is_missing_elsewhere_is_no_matter_of_public_data():
    method = algorithms.feddf(softmax_loss, optax.sgd(0.1), logits=lambda params, batch, key: params["x"] @ batch["x"])
    with pytest.raises(KeyError, match="'x'"):
        jax.eval_shape(method.round, method.init(softmax_params()), POPULATION.cohort([0, 1]), KEY)


def test_integers_of_numpy_will_do():
    assert_trees_equal(run_round(PUBLIC, server_steps=np.int64(6), server_batch_size=np.int32(3)), one_round())
