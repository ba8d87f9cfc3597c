"""FedBN against a plain NumPy program, and its invariants."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import algorithms
import fedjax_core as fc
import models
from fedjax_core import Population, Task, Variables
from tests.problems import assert_trees_equal, softmax_loss, softmax_params, softmax_population

LR, KEPT = 0.1, 0.5  # of the running statistics, what a batch leaves
SIZES = (3, 5, 0, 2, 3)
RNG = np.random.default_rng(2)
X = [(2 * i - 3) + (1 + i) * RNG.normal(size=n) for i, n in enumerate(SIZES)]  # shifted and stretched for each client
Y = [RNG.normal(size=n) + 1 for n in SIZES]
X[4], Y[4] = X[0], Y[0]  # the last client has the examples of the first
POPULATION = Population.from_clients([{"x": x, "y": y} for x, y in zip(X, Y, strict=True)])
START = {"w": 0.7, "norm": {"scale": 1.0, "bias": 0.0}, "head": 0.5}
BEGUN = Variables(jax.tree.map(jnp.asarray, START), {"mean": jnp.asarray(0.0), "var": jnp.asarray(1.0)})
ROUNDS = ([0, 3, -1, 1], [3, 2, 4, 0])


def forward(model, examples, *, key, mask, frozen=False):
    """w x, normalized with 1 added to the variance, scaled and moved, times the head."""
    params, statistics = model
    z = params["w"] * examples["x"]
    if key is not None and not frozen:
        rows = (mask | ~jnp.any(mask)).astype(z.dtype)
        mean = jnp.sum(rows * z) / jnp.sum(rows)
        now = {"mean": mean, "var": jnp.sum(rows * jnp.square(z - mean)) / jnp.sum(rows)}
        after = jax.tree.map(lambda old, new: KEPT * old + (1 - KEPT) * new, statistics, now)
    else:
        now = after = statistics
    z = (z - now["mean"]) / jnp.sqrt(now["var"] + 1)
    return params["head"] * (params["norm"]["scale"] * z + params["norm"]["bias"]), after


TASK = Task(
    lambda key: BEGUN,
    forward,
    lambda outputs, examples, mask: 0.5 * jnp.square(outputs - examples["y"]),
    lambda outputs, examples, mask: {"error": jnp.abs(outputs - examples["y"])},
    paths=lambda kind: {"norm": ("norm",)}[kind],
    has_statistics=True,
)


def made(**settings):
    settings = {"num_clients": len(SIZES), "batch_size": 2, "num_epochs": 2, "order": "sequential", **settings}
    return algorithms.fedbn(TASK, optax.sgd(LR), **settings)


METHOD = made()
ROUND = jax.jit(METHOD.round)


def trained(rounds=ROUNDS, population=POPULATION, state=None, round=ROUND, method=METHOD):
    state = method.init(BEGUN) if state is None else state
    for t, ids in enumerate(rounds):
        state, metrics = round(state, population.cohort(np.array(ids)), jax.random.key(t))
    return state, metrics


def plain(rounds, xs, ys, batch_size=2, epochs=2):
    """In NumPy, with the derivatives written out: (w, head), and of every client (scale, bias, mean, variance)."""
    shared = np.array([START["w"], START["head"]])
    own = [np.array([1.0, 0.0, 0.0, 1.0]) for _ in xs]
    for ids in rounds:
        ends = []
        for i in (i for i in ids if i >= 0 and len(xs[i])):
            (w, u), (scale, bias, mean, var) = shared, own[i]
            for _ in range(epochs):
                for at in range(0, len(xs[i]), batch_size):
                    x, y = xs[i][at : at + batch_size], ys[i][at : at + batch_size]
                    m, v = (w * x).mean(), (w * x).var()
                    s = np.sqrt(v + 1)
                    z = (w * x - m) / s
                    error = (u * (scale * z + bias) - y) / len(x)
                    of_z = error * u * scale
                    of_zw = (of_z - of_z.mean() - z * (of_z * z).mean()) / s
                    step = np.array([of_zw @ x, error @ (scale * z + bias), u * (error @ z), u * error.sum()])
                    w, u, scale, bias = np.array([w, u, scale, bias]) - LR * step
                    mean, var = KEPT * mean + (1 - KEPT) * m, KEPT * var + (1 - KEPT) * v
            own[i] = np.array([scale, bias, mean, var])
            ends.append(np.array([w, u]))
        shared = np.mean(ends, axis=0)
    return shared, np.stack(own)


def numbers(state):
    """What `plain` gives, of a state."""
    params, rows, statistics = state.method.params, state.method.personal.rows["norm"], state.statistics.rows.values
    shared = jnp.stack([params["w"], params["head"]])
    return shared, jnp.stack([rows["scale"], rows["bias"], statistics["mean"], statistics["var"]], axis=1)


def test_golden_traces():
    """Two clients, x = (0, 2) and (1, 5), y = (1, 3) and (-1, 1), a step of 0.1 on all of them in each round."""
    examples = {"x": np.array([0.0, 2.0, 1.0, 5.0]), "y": np.array([1.0, 3.0, -1.0, 1.0])}
    population = Population.from_sizes(examples, [2, 2])
    method = made(num_clients=2, num_epochs=1)
    state, round = method.init(BEGUN), jax.jit(method.round)
    # Client 0, by hand: w x has mean 0.7 and variance 0.49, so z = -+0.7 / sqrt(1.49) = -+0.57346234; the errors are
    # -1.28673117 and -2.71326883. The bias moves by 0.1 * 0.5 * 2, the scale by 0.1 * 0.25 * 1.42653766 * 0.57346234.
    expected = [
        ((0.71562775, 0.54458426), [(1.02045164, 0.1, 0.35, 0.745), (1.02413262, 0.0, 1.05, 1.48)]),
        (
            (0.73142604, 0.59718711),
            [(1.04189463, 0.20595113, 0.53281387, 0.62856154), (1.04836456, 0.0, 1.59844162, 1.76424614)],
        ),
    ]
    for t, (shared, own) in enumerate(expected):
        state, metrics = round(state, population.cohort([0, 1]), jax.random.key(t))
        for got, value in zip(numbers(state), (shared, own), strict=True):
            np.testing.assert_allclose(got, value, atol=1e-7)
        assert (metrics.bytes_up, metrics.bytes_down) == (16, 16), "w and the head travel, and nothing else"


def test_rounds_are_those_of_a_plain_loop():
    """Unequal clients, one without examples, a padded last batch and an empty slot."""
    state, _ = trained()
    for got, expected in zip(numbers(state), plain(ROUNDS, X, Y), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-11, atol=1e-13)


def test_every_client_predicts_with_its_own():
    state, _ = trained()
    (w, u), own = plain(ROUNDS, X, Y)
    found = fc.evaluate_view(TASK, METHOD.personal, state, POPULATION)["error"]
    for i in (0, 1, 3, 4):
        scale, bias, mean, var = own[i]
        outputs = u * (scale * (w * X[i] - mean) / np.sqrt(var + 1) + bias)
        assert found[i] == pytest.approx(np.abs(outputs - Y[i]).mean(), rel=1e-11)
    model = METHOD.params(state)
    assert_trees_equal(model.params["norm"], BEGUN.params["norm"])
    np.testing.assert_allclose(model.statistics["mean"], own[[0, 1, 3, 4], 2].mean(), rtol=1e-12)


def test_without_normalizations_it_is_fedavg():
    settings = {"batch_size": 2, "num_epochs": 1}
    population = softmax_population(SIZES)
    plain_loss = algorithms.fedbn(softmax_loss, optax.sgd(LR), num_clients=len(SIZES), personal=(), **settings)
    fedavg = algorithms.fedavg(softmax_loss, optax.sgd(LR), **settings)
    ends = []
    for method in (plain_loss, fedavg):
        state, round = method.init(softmax_params()), jax.jit(method.round)
        for t, ids in enumerate(ROUNDS):
            state, _ = round(state, population.cohort(np.array(ids)), jax.random.key(t))
        ends.append(method.params(state))
    assert_trees_equal(*ends)


def test_what_stays_at_home_depends_on_nobody_else():
    """A client's normalization after a round is that of its own, the model it was sent and its examples."""
    state, _ = trained(ROUNDS[:1])
    method, statistics = state.method, state.statistics
    others = np.array([i != 1 for i in range(len(SIZES))])
    shifted = lambda leaf: jnp.where(others, leaf + 1, leaf)  # noqa: E731
    changed = state._replace(
        method=method._replace(personal=method.personal._replace(rows=jax.tree.map(shifted, method.personal.rows))),
        statistics=statistics._replace(
            rows=statistics.rows._replace(values=jax.tree.map(shifted, statistics.rows.values))
        ),
    )
    moved = Population.from_clients(
        [{"x": x + 3 * (i != 1), "y": y} for i, (x, y) in enumerate(zip(X, Y, strict=True))]
    )
    one, _ = trained([[3, 1, 0, -1]], state=state)
    other, _ = trained([[3, 1, 0, -1]], moved, changed)
    np.testing.assert_array_equal(numbers(one)[1][1], numbers(other)[1][1])
    assert np.all(numbers(one)[0] != numbers(other)[0]), "the shared part does"


def test_who_is_absent_keeps_everything():
    before, _ = trained()
    after, _ = trained([[1, -1, 2, 3]], state=before)
    for i, same in enumerate((True, False, True, False, True)):
        assert np.array_equal(numbers(before)[1][i], numbers(after)[1][i]) == same


def test_clients_with_the_same_examples_stay_the_same():
    state, _ = trained([[0, 1, 4, 3], [4, 3, 0, -1]])
    own = numbers(state)[1]
    np.testing.assert_array_equal(own[0], own[4])
    assert np.all(own[0] != own[1])


def test_all_clients_have_the_same_shared_part():
    state, _ = trained()
    stacked = METHOD.client_params(state, np.arange(len(SIZES))).params
    for name in ("w", "head"):
        np.testing.assert_array_equal(stacked[name], np.full(len(SIZES), METHOD.params(state).params[name]))
    assert set(fc.leaf_paths(state.method.personal.rows)) == {"norm/scale", "norm/bias"}


@pytest.mark.parametrize(
    ("model", "kind"),
    [
        (models.cnn_bn((8, 8, 1), channels=(2, 2), hidden=3), "classification"),
        (models.resnet18_gn((8, 8, 3), width=8), "classification"),
        (models.transformer(9, 4, 1, 8, 2), "sequence"),
    ],
    ids=["batch", "group", "layer"],
)
def test_normalizations_are_found_by_their_type(model, kind):
    """Those of shortcuts too, whatever they are called; batch normalization with its running statistics."""
    task = models.task(model, kind)
    method = algorithms.fedbn(task, optax.sgd(LR), num_clients=4)
    state = jax.eval_shape(lambda key: method.init(model.init(key)), jax.random.key(0))
    rows = state.method.personal.rows if task.has_statistics else state.personal.rows
    paths = fc.leaf_paths(rows)
    assert set(paths) == set(model.paths("norm"))
    assert all(path.endswith(("scale", "bias")) for path in paths)
    assert all(leaf.shape[0] == 4 for leaf in jax.tree.leaves(rows))
    if task.has_statistics:
        assert {leaf.shape for leaf in jax.tree.leaves(state.statistics.rows.values)} == {(4, 2), (4, 3)}


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: algorithms.fedbn(softmax_loss, optax.sgd(LR), num_clients=2), TypeError, "pass a Task"),
        (
            lambda: algorithms.fedbn(models.task(models.mlp((4,), 2)), optax.sgd(LR), num_clients=2),
            ValueError,
            "FedBN keeps normalizations at home, and the model has no parameters of kind 'norm'.*personal=\\(\\)",
        ),
        (
            lambda: algorithms.fedbn(fc.as_task(softmax_loss), optax.sgd(LR), num_clients=2),
            ValueError,
            "does not know which of its parameters are 'norm'",
        ),
        (lambda: made(num_clients=0), ValueError, "num_clients must be an integer of at least 1"),
        (lambda: made(server_lr=-1.0), ValueError, "server_lr must lie in"),
        (lambda: made(personal="bn").init(BEGUN), ValueError, "'bn' is no path"),
        (lambda: made().init(BEGUN.params), TypeError, "init needs Variables"),
        (lambda: fc.with_statistics(made(), "average"), TypeError, "has statistics already"),
    ],
)
def test_what_does_not_fit_is_named(make, error, words):
    with pytest.raises(error, match=words):
        make()
