"""FedAgain: golden weights, a plain loop, forgers, and its invariants."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import algorithms
import fedjax_core as fc
from algorithms.parts import trust
from fedjax_core import Plan
from tests.algorithms.personalization import plain
from tests.problems import assert_trees_close, assert_trees_equal, softmax_loss, softmax_params, softmax_population

KEY = jax.random.key(0)
SIZES = (3, 5, 0, 8, 2, 6)
POPULATION = softmax_population(SIZES).with_public(softmax_population([7], seed=9).examples)
LOCAL = {"batch_size": 2, "num_epochs": 1, "order": "sequential", "num_clients": len(SIZES), "plan": Plan(lanes=1)}
WITHOUT_ROWS = {k: v for k, v in LOCAL.items() if k != "num_clients"}
COHORTS = ([0, 3, -1, 5], [1, 0, 4, 2], [5, 4, 3, 1])

R, D = np.array([0.1, 0.1, 0.4]), np.array([1.0, 2.0, 3.0])


def weights(r, d, n=None, a=1.0, b=1.0, reference="median", floor=0.0):
    r, d = jnp.asarray(r, float), jnp.asarray(d, float)
    known = jnp.isfinite(r) & jnp.isfinite(d)
    s = trust.log_trust(r, d, a, b, known, reference)
    return np.asarray(trust.shares(jnp.ones(len(r)) if n is None else jnp.asarray(n, float), s, s, known, floor))


@pytest.mark.parametrize(
    ("reference", "expected"),
    [("mean", [0.59220107, 0.35918811, 0.04861082]), ("median", [0.61544283, 0.37328494, 0.01127223])],
)
def test_golden_weights(reference, expected):
    np.testing.assert_allclose(weights(R, D, reference=reference), expected, atol=5e-9)


def test_signals_are_relative_to_their_reference():
    np.testing.assert_allclose(trust.relative(jnp.asarray(R), jnp.ones(3, bool), "mean"), [0.5, 0.5, 2], rtol=1e-15)
    np.testing.assert_allclose(trust.relative(jnp.asarray(R), jnp.ones(3, bool), "median"), [1, 1, 4], rtol=1e-15)
    even = trust.relative(jnp.array([8.0, 1, 3, 100, 2]), jnp.array([True, True, True, False, True]), "median")
    np.testing.assert_allclose(even[jnp.array([0, 1, 2, 4])] * 2.5, [8, 1, 3, 2], rtol=1e-15)
    np.testing.assert_array_equal(trust.relative(jnp.array([0.0, 0, 7]), jnp.ones(3, bool), "median"), [1, 1, 1])


def test_weights_sum_to_1_and_have_the_ratios_of_their_trust():
    rng = np.random.default_rng(0)
    r, d, n, a, b = rng.uniform(0.1, 1, 6), rng.uniform(1, 3, 6), rng.integers(1, 9, 6), 0.7, 1.3
    for reference, ref in (("median", np.median), ("mean", np.mean)):
        found = weights(r, d, n, a, b, reference)
        assert np.sum(found) == pytest.approx(1, rel=1e-14)
        assert np.all(found > 0)
        s = n * np.exp(-a * r / ref(r) - b * d / ref(d))
        np.testing.assert_allclose(found, s / s.sum(), rtol=1e-12)
        np.testing.assert_allclose(weights(7 * r, 0.01 * d, n, a, b, reference), found, rtol=1e-12)
    np.testing.assert_allclose(weights(r, d, n, 0.0, 0.0), n / n.sum(), rtol=1e-14)
    np.testing.assert_allclose(weights(r, d, n, 1.0, 0.0), weights(r, d[::-1], n, 1.0, 0.0), rtol=1e-14)
    np.testing.assert_allclose(weights(r, d, n, 0.0, 1.0), weights(r[::-1], d, n, 0.0, 1.0), rtol=1e-14)
    np.testing.assert_allclose(weights(np.ones(6), np.ones(6), n), n / n.sum(), rtol=1e-14)


def test_a_worse_outlier_moves_the_others_ratios_with_the_mean_and_not_with_the_median():
    worse = np.array([0.1, 0.2, 0.15, 0.4]), np.array([1.0, 2.0, 1.5, 3.0])
    worst = np.array([0.1, 0.2, 0.15, 400.0]), np.array([1.0, 2.0, 1.5, 3000.0])
    for reference, same in (("median", True), ("mean", False)):
        one, two = (weights(*each, reference=reference) for each in (worse, worst))
        assert np.allclose(one[:3] / one[0], two[:3] / two[0], rtol=1e-10) == same


def test_trust_falls_with_each_signal_while_the_reference_stays():
    n = np.array([1, 1, 1, 1, 1])
    r, d = np.array([0.1, 0.2, 0.3, 0.4, 0.5]), np.ones(5)
    assert np.all(np.diff(weights(r, d, n)) < 0)
    assert np.all(np.diff(weights(d, r, n)) < 0)


def test_all_weight_goes_to_the_smallest_error_as_it_counts_more_and_one_client_has_all():
    n = np.array([1, 2, 3, 4])
    for a in (1e4, 1e30):  # far below the smallest float
        found = weights([0.3, 0.1, 0.1, 0.2], [1, 1, 1, 1], n, a=a)
        np.testing.assert_allclose(found, [0, 0.4, 0.6, 0], atol=1e-14)
    for signal in (0.0, 3.0, 1e30):
        np.testing.assert_array_equal(weights([signal], [signal], [5], a=7.0), [1])


def test_below_the_floor_all_weigh_the_same():
    n = np.array([1, 2, 3])
    largest = np.exp(-1 - 0.5)  # median reference: r of (1, 1, 4), d of (0.5, 1, 1.5)
    np.testing.assert_allclose(weights(R, D, n, floor=1.001 * largest), np.full(3, 1 / 3), rtol=1e-14)
    np.testing.assert_array_equal(weights(R, D, n, floor=0.999 * largest), weights(R, D, n))


def test_what_is_not_finite_weighs_nothing_and_does_not_move_the_reference():
    found = weights([0.1, np.nan, 0.1, 0.4, 0.3], [1, 1, 2, 3, np.inf])
    np.testing.assert_allclose(found, [0.61544283, 0, 0.37328494, 0.01127223, 0], atol=5e-9)
    np.testing.assert_array_equal(weights([np.nan, np.nan], [1, 1]), [0, 0])


def test_divergences():
    rng = np.random.default_rng(0)
    x = {"w": rng.normal(size=(3, 2)), "b": np.zeros(4)}
    d = {"w": rng.normal(size=(5, 3, 2)), "b": rng.normal(size=(5, 4))}
    w, b = np.linalg.norm(d["w"].reshape(5, -1), axis=1), np.linalg.norm(d["b"], axis=1)
    x, d = jax.tree.map(jnp.asarray, (x, d))
    np.testing.assert_allclose(trust.divergences(d, x, "model"), np.hypot(w, b), rtol=1e-14)
    by_layer = np.hypot(w / np.linalg.norm(x["w"]), b)
    np.testing.assert_allclose(trust.divergences(d, x, "layers"), by_layer, rtol=1e-14)


def test_the_last_examples_of_a_client_are_held_out():
    cohort = POPULATION.cohort([3, 1, 4, -1, 2])
    training, measuring = trust.parted(cohort, 0.4)
    np.testing.assert_array_equal(training.sizes, [5, 3, 2, 0, 0])
    np.testing.assert_array_equal(measuring.sizes, [3, 2, 2, 0, 0])
    np.testing.assert_array_equal(measuring.starts - cohort.starts, [5, 3, 0, 0, 0])


def by_hand(signal, rho=1.0, held=lambda n: 0):
    """The model after the rounds and the last trust in each client, a = b = 1, in NumPy."""
    x, tau = {k: np.asarray(v) for k, v in softmax_params().items()}, np.ones(len(SIZES))
    for ids in COHORTS:
        busy = sorted(i for i in ids if i >= 0 and SIZES[i])
        ends = []
        for i in busy:
            y, examples = x, plain.client(POPULATION, i)
            used = {k: v[: len(v) - held(len(v))] for k, v in examples.items()}
            for batch in plain.batches(used, 2):
                y = plain.stepped(y, plain.loss_and_gradient(y, batch)[1], 0.1)
            ends.append(y)
        r = np.array([signal(y, i) for i, y in zip(busy, ends, strict=True)])
        d = np.array([np.sqrt(sum(np.sum((y[k] - x[k]) ** 2) for k in x)) for y in ends])
        s = np.exp(-r / np.median(r) - d / np.median(d))
        tau[busy] = (1 - rho) * tau[busy] + rho * s
        share = tau[busy] / tau[busy].sum()
        x = {k: sum(own * y[k] for own, y in zip(share, ends, strict=True)) for k in x}
    return x, tau


def run(method, cohorts=COHORTS, population=POPULATION):
    state, round = method.init(softmax_params()), jax.jit(method.round)
    for t, ids in enumerate(cohorts):
        state, metrics = round(state, population.cohort(ids), jax.random.key(t))
    return state, metrics


@pytest.mark.parametrize("who", ["client", "held out", "server"])
def test_rounds_are_those_of_a_plain_loop(who):
    public = {k: np.asarray(v) for k, v in POPULATION.public.items()}
    held = (lambda n: int(0.4 * n + 1e-9)) if who == "held out" else lambda n: 0

    def signal(y, i):
        if who == "server":
            return plain.loss(y, public)
        examples = plain.client(POPULATION, i)
        count = held(SIZES[i])
        return plain.loss(y, {k: v[len(v) - count :] if count else v for k, v in examples.items()})

    settings = {
        "client": {},
        "held out": {"held_out": 0.4},
        "server": {"benchmark": lambda public: public},
    }[who]
    method = algorithms.fedagain(softmax_loss, optax.sgd(0.1), rho=0.6, **settings, **LOCAL)
    state, metrics = run(method)
    x, tau = by_hand(signal, 0.6, held)
    assert_trees_close(state.params, x, rtol=1e-11, atol=1e-13)
    np.testing.assert_allclose(np.exp(state.log_trust.rows), tau, rtol=1e-11)
    model = sum(leaf.size * 8 for leaf in jax.tree.leaves(x))
    assert float(metrics.bytes_up) == model + 8 * (who != "server")  # the model, and the error where clients tell it
    assert float(metrics.bytes_down) == model
    assert 1 <= float(metrics.extra.effective) <= 4


def test_without_weight_on_the_signals_it_is_fedavg_by_numbers_of_examples():
    method = algorithms.fedagain(softmax_loss, optax.sgd(0.1), a=0.0, b=0.0, weights="examples", **LOCAL)
    expected, _ = run(algorithms.fedavg(softmax_loss, optax.sgd(0.1), weights="examples", **WITHOUT_ROWS))
    assert_trees_close(run(method)[0].params, expected.params, rtol=1e-13, atol=1e-15)


def test_one_participant_has_all_weight_and_the_trust_in_the_absent_stays():
    method = algorithms.fedagain(softmax_loss, optax.sgd(0.1), a=5.0, **LOCAL)
    state, metrics = run(method, [[3, -1, -1, -1]])
    expected, _ = run(algorithms.fedavg(softmax_loss, optax.sgd(0.1), **WITHOUT_ROWS), [[3, -1, -1, -1]])
    assert_trees_close(state.params, expected.params, rtol=1e-14, atol=1e-16)
    np.testing.assert_allclose(state.log_trust.rows, [0, 0, 0, -6, 0, 0], atol=1e-14)  # -a - b: it is its own reference
    assert float(metrics.extra.effective) == pytest.approx(1)


def test_a_forger_that_sends_the_model_back_is_found_by_its_error_alone():
    """Its divergence is 0, the best that there is."""
    still = lambda round, client: optax.sgd(jnp.where(client == 3, 0.0, 0.5))  # noqa: E731
    method = algorithms.fedagain(softmax_loss, still, benchmark=lambda public: public, **LOCAL)
    state, _ = run(method, [[0, 3, 1, 5]])
    x = softmax_params()
    error = float(jnp.mean(softmax_loss(x, POPULATION.public, None)))
    rows = np.asarray(state.log_trust.rows)
    # s_3 = exp(-a r~_3) with nothing for the distance.
    local = run(algorithms.local_only(softmax_loss, still, **LOCAL), [[0, 3, 1, 5]])[0].personal.rows
    errors = [
        float(jnp.mean(softmax_loss(jax.tree.map(lambda leaf, i=i: leaf[i], local), POPULATION.public, None)))
        for i in (0, 3, 1, 5)
    ]
    assert errors[1] == pytest.approx(error, rel=1e-12)
    assert rows[3] == pytest.approx(-error / np.median(errors), rel=1e-12)


def test_a_model_that_is_not_finite_does_not_spoil_the_others():
    examples = {k: np.asarray(v).copy() for k, v in POPULATION.examples.items()}
    start = sum(SIZES[:3])
    examples["x"][start : start + SIZES[3]] = 1e308  # the loss overflows
    spoiled = fc.Population.from_sizes(examples, SIZES)
    method = algorithms.fedagain(softmax_loss, optax.sgd(0.1), **LOCAL)
    state, metrics = run(method, [[0, 3, 1, 5]], spoiled)
    expected, _ = run(method, [[0, -1, 1, 5]], spoiled)
    assert_trees_close(state.params, expected.params, rtol=1e-13, atol=1e-15)
    assert np.isneginf(state.log_trust.rows[3])
    assert np.isfinite(metrics.extra.error)
    again, _ = jax.jit(method.round)(state, POPULATION.cohort([0, 3, 1, 5]), KEY)
    assert np.all(np.isfinite(again.log_trust.rows[3])), "trust is this round's alone"


def test_errors_of_clients_are_measured_without_a_key():
    """As a model predicts: with dropout they would be others."""

    def loss(params, batch, key):
        return softmax_loss(params, batch, key) + (0 if key is None else 100.0)

    method = algorithms.fedagain(loss, optax.sgd(0.1), **LOCAL)
    _, metrics = run(method, COHORTS[:1])
    assert float(metrics.loss) > 100
    assert float(metrics.extra.error) < 10


def test_nobody_takes_part():
    method = algorithms.fedagain(softmax_loss, optax.sgd(0.1), **LOCAL)
    state, metrics = run(method, [[-1, -1, 2, -1]])
    assert_trees_equal(state.params, softmax_params())
    assert [float(value) for value in metrics.extra] == [0, 0, 0]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"a": -1.0}, "a must lie in"),
        ({"b": -1.0}, "b must lie in"),
        ({"rho": 1.5}, "rho must lie in"),
        ({"reference": "max"}, "reference must be one of"),
        ({"divergence": "leaf"}, "divergence must be one of"),
        ({"floor": -1.0}, "floor must lie in"),
        ({"held_out": 1.0}, "held_out must lie in"),
        ({"server_lr": -1.0}, "server_lr must lie in"),
        ({"num_clients": 0}, "num_clients must be an integer of at least 1"),
    ],
)
def test_what_does_not_fit_is_named(settings, words):
    with pytest.raises(ValueError, match=words):
        algorithms.fedagain(softmax_loss, optax.sgd(0.1), **{"num_clients": 2, **settings})


def test_a_benchmark_wants_public_data():
    with pytest.raises(TypeError, match="benchmark must be a function"):
        algorithms.fedagain(softmax_loss, optax.sgd(0.1), num_clients=2, benchmark={"x": 1})
    method = algorithms.fedagain(softmax_loss, optax.sgd(0.1), benchmark=lambda public: public, **LOCAL)
    with pytest.raises(ValueError, match="the benchmark is part of the population's public data, and there is none"):
        run(method, population=softmax_population(SIZES))
