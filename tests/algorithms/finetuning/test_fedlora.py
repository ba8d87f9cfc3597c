"""Federated LoRA against a plain NumPy program, and the identities of its three rules."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import algorithms
import fedjax_core as fc
import models
from tests.problems import assert_trees_close, assert_trees_equal, softmax_loss, softmax_population

SIZES = (4, 6, 0, 3, 5)
N, R, ALPHA, LR = len(SIZES), 4, 3.0, 0.2
POPULATION = softmax_population(SIZES)
BASE = np.random.default_rng(0).normal(size=(5, 3))
IDS = [0, 3, -1, 1]
RULES = ("factors", "norms", "products")


def adapter(seed=1, zero=False):
    rng = np.random.default_rng(seed)
    part = {"A": rng.uniform(-0.4, 0.4, (5, R)), "B": np.zeros((R, 3)) if zero else rng.normal(size=(R, 3))}
    return {"layer": part, "head": rng.normal(size=3)}


def loss_fn(params, batch, key):
    part = params["layer"]
    return softmax_loss({"w": BASE + ALPHA / R * part["A"] @ part["B"], "b": params["head"]}, batch, key)


def made(rule, ranks=None, loss_fn=loss_fn, **settings):
    settings = {"num_epochs": 2, "batch_size": 2, "order": "sequential", "alpha": ALPHA, **settings}
    return algorithms.fedlora(loss_fn, optax.sgd(LR), num_clients=N, rule=rule, ranks=ranks, **settings)


def trained(method, params, rounds=2):
    state, run = method.init(params), jax.jit(method.round)
    for t in range(rounds):
        state, metrics = run(state, POPULATION.cohort(IDS), jax.random.key(t))
    return state, metrics


def softmax_gradient(w, b, x, y):
    logits = x @ w + b
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p = p / p.sum(axis=1, keepdims=True)
    p[np.arange(len(y)), y] -= 1
    return x.T @ p / len(y), p.mean(axis=0)


def by_hand(rule, ranks, params, rounds=2):
    """The same in NumPy, with small factors for small ranks and no masks."""
    A, B, head = params["layer"]["A"], params["layer"]["B"], params["head"]
    for _ in range(rounds):
        done = []
        for i in (0, 3, 1):
            r = ranks[i]
            c = ALPHA / r
            a, b, h = A[:, :r].copy(), B[:r].copy(), head.copy()
            if rule == "products":
                b = b * (ALPHA / R) / c
            x, y = (np.asarray(POPULATION.client(i)[name]) for name in "xy")
            for _epoch in range(2):
                for at in range(0, len(y), 2):
                    gw, gh = softmax_gradient(BASE + c * a @ b, h, x[at : at + 2], y[at : at + 2])
                    a, b, h = a - LR * c * gw @ b.T, b - LR * c * a.T @ gw, h - LR * gh
            done.append((c, a, b, h))
        head = np.mean([h for *_, h in done], axis=0)
        if rule == "products":
            P, S, Q = np.linalg.svd(np.mean([c * a @ b for c, a, b, _ in done], axis=0), full_matrices=False)
            A, B = np.zeros_like(A), np.zeros_like(B)
            A[:, : len(S)], B[: len(S)] = P[:, :R], (S[:, None] * Q)[:R] / (ALPHA / R)
        else:
            norms = [np.linalg.norm(a @ b) if rule == "norms" else 1.0 for _, a, b, _ in done]
            padded = [
                (np.pad(a, ((0, 0), (0, R - a.shape[1]))), np.pad(b, ((0, R - len(b)), (0, 0)))) for _, a, b, _ in done
            ]
            A = sum(n * a for n, (a, _) in zip(norms, padded, strict=True)) / sum(norms)
            B = sum(n * b for n, (_, b) in zip(norms, padded, strict=True)) / sum(norms)
    return A, B, head


@pytest.mark.parametrize("ranks", [(4, 4, 4, 4, 4), (1, 2, 4, 3, 1)])
@pytest.mark.parametrize("rule", RULES)
def test_it_is_what_small_factors_give_in_numpy(rule, ranks):
    state, metrics = trained(made(rule, ranks), adapter())
    A, B, head = by_hand(rule, ranks, adapter())
    got = state.params["layer"]
    np.testing.assert_allclose(got["A"] @ got["B"], A @ B, rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(state.params["head"], head, rtol=1e-9)
    if rule != "products":  # whose factors have signs of their own
        np.testing.assert_allclose(got["A"], A, rtol=1e-9, atol=1e-12)
    # What a client has no rank for does not travel; each tells its rank, an int32.
    numbers = np.mean([ranks[i] * (5 + 3) + 3 for i in (0, 3, 1)])
    assert float(metrics.bytes_down) == pytest.approx(8 * numbers, rel=1e-12)
    assert float(metrics.bytes_up) == pytest.approx(8 * numbers + 4, rel=1e-12)


def test_equal_ranks_averaged_by_factors_are_fedavg_of_the_adapter():
    fedavg = algorithms.fedavg(loss_fn, optax.sgd(LR), num_epochs=2, batch_size=2, order="sequential")
    assert_trees_close(
        trained(made("factors"), adapter())[0].params, trained(fedavg, adapter())[0].params, rtol=1e-12, atol=1e-14
    )


def one_step(method, params):
    state = method.init(params)
    return jax.jit(method.round)(state, POPULATION.cohort([1]), jax.random.key(0))[0].params


@pytest.mark.parametrize("rule", RULES)
def test_the_first_step_moves_only_b(rule):
    """The gradient of A is zero while B is."""
    start = adapter(zero=True)
    state = one_step(made("factors", num_epochs=None, num_steps=1), start)
    np.testing.assert_array_equal(state["layer"]["A"], start["layer"]["A"])
    assert np.abs(state["layer"]["B"]).max() > 0
    alone = one_step(made(rule, num_epochs=None, num_steps=1), start)["layer"]
    np.testing.assert_allclose(alone["A"] @ alone["B"], state["layer"]["A"] @ state["layer"]["B"], atol=1e-14)


@pytest.mark.parametrize("rule", RULES)
def test_one_client_alone_keeps_what_it_has_learned(rule):
    """All rules agree where there is nothing to average; and "products" does not look at how factors share a scale."""
    alone = one_step(made(rule), adapter())["layer"]
    expected = one_step(made("factors"), adapter())["layer"]
    np.testing.assert_allclose(alone["A"] @ alone["B"], expected["A"] @ expected["B"], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("rule", RULES)
def test_equal_clients_come_to_what_one_of_them_does(rule):
    """All rules agree; and weights by equal norms are equal weights."""
    three = softmax_population((6,)).client(0)
    population = fc.Population.from_clients([three] * N)
    method = made(rule)
    run = jax.jit(method.round)
    ends = []
    for ids in ([0, -1, -1], [0, 1, 2]):
        state, _ = run(method.init(adapter()), population.cohort(ids), jax.random.key(0))
        ends.append(state.params["layer"]["A"] @ state.params["layer"]["B"])
    np.testing.assert_allclose(ends[0], ends[1], rtol=1e-10, atol=1e-12)


def test_averaging_factors_errs_in_the_second_order_of_a_step():
    """From one A and no B: with a step ten times smaller the product of the means is 100 times nearer to the mean."""

    def product(rule):
        def of_rate(lr):
            local = {"batch_size": 2, "order": "sequential"}
            method = algorithms.fedlora(loss_fn, optax.sgd(lr), num_clients=N, rule=rule, alpha=ALPHA, **local)
            state, _ = method.round(method.init(adapter(zero=True)), POPULATION.cohort(IDS), jax.random.key(0))
            return state.params["layer"]["A"] @ state.params["layer"]["B"]

        return jax.jit(jax.vmap(of_rate))(jnp.array([0.1, 0.01]))

    errors = jnp.linalg.norm(product("factors") - product("products"), axis=(1, 2))
    assert errors[0] > 90 * errors[1] > 0


def deltas(state, ids=IDS):
    """c_k A_k B_k of every client, as the personal view has it."""
    method = made("products", RANKS)
    rows = method.client_params(state, [i for i in ids if i >= 0])["layer"]
    return ALPHA / R * np.asarray(rows["A"]) @ np.asarray(rows["B"])


RANKS = (1, 2, 4, 3, 1)


def test_products_send_each_client_the_best_of_its_rank():
    """Eckart and Young: what is cut off has the norm of the values cut off."""
    state, _ = trained(made("products", RANKS), adapter())
    part = state.params["layer"]
    whole = ALPHA / R * np.asarray(part["A"] @ part["B"])
    values = np.linalg.svd(whole, compute_uv=False)
    for i, delta in zip((0, 3, 1), deltas(state), strict=True):
        assert np.linalg.matrix_rank(delta, tol=1e-9) <= RANKS[i]
        assert np.linalg.norm(whole - delta) == pytest.approx(np.linalg.norm(values[RANKS[i] :]), abs=1e-12)


def test_the_error_of_averaging_factors_is_the_covariance_of_the_factors():
    rng = np.random.default_rng(4)
    A, B = rng.normal(size=(3, 5, R)), rng.normal(size=(3, R, 3))
    error = np.mean(A @ B, axis=0) - A.mean(axis=0) @ B.mean(axis=0)
    np.testing.assert_allclose(error, np.mean((A - A.mean(axis=0)) @ (B - B.mean(axis=0)), axis=0), atol=1e-14)


def test_nothing_beyond_a_clients_rank_ever_moves():
    """With an optimizer that moves what has no gradient, too."""
    decayed = algorithms.fedlora(
        loss_fn, optax.adamw(0.1, weight_decay=0.5), num_clients=N, ranks=(1,) * N, batch_size=2, alpha=ALPHA
    )
    part = trained(decayed, adapter())[0].params["layer"]
    assert not np.any(part["A"][:, 1:])
    assert not np.any(part["B"][1:])


def test_on_a_model_of_the_library_with_its_base_in_the_public_data():
    model = models.mlp((5,), 3, hidden=(6,))
    tuned = models.adapted(model, models.adapters.lora(rank=2, alpha=ALPHA), model.paths("dense"))
    base, start = model.init(jax.random.key(0)), tuned.init(jax.random.key(1))

    def loss_fn(params, batch, key, public):
        logits = tuned.apply(public, params, batch["x"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])

    population = POPULATION.with_public(base)
    method = algorithms.fedlora(
        loss_fn, optax.sgd(0.3), num_clients=N, ranks=(1, 2, 1, 2, 1), rule="products", alpha=ALPHA, num_epochs=5
    )
    state, run = method.init(start), jax.jit(method.round)
    losses = []
    for t in range(8):
        state, metrics = run(state, population.cohort([0, 1, 3, 4]), jax.random.key(t))
        losses.append(float(metrics.loss))
    assert losses[-1] < 0.7 * losses[0]

    # The scale of a client's rank is that of the adapter's own `rank=`.
    row = jax.tree.map(lambda leaf: leaf[0], method.client_params(state, [0]))
    part = jax.tree.map(lambda leaf: leaf, method.views["personal"].shared(state))
    x = population.client(0)["x"]
    received = {
        path: {"A": p["A"], "B": p["B"] * (ALPHA / 2) / ALPHA} for path, p in part.items()
    }  # c_k = alpha / 1 for rank 1
    assert_trees_close(tuned.apply(base, row, x), tuned.apply(base, received, x, rank=1), rtol=1e-5, atol=1e-6)


def test_an_empty_round_changes_nothing():
    method = made("products", RANKS)
    state, _ = trained(method, adapter())
    after, _ = jax.jit(method.round)(state, POPULATION.cohort([-1, 2]), jax.random.key(9))
    assert_trees_equal(after._replace(round=state.round), state)


@pytest.mark.parametrize(
    ("settings", "params", "words"),
    [
        ({"rule": "sum"}, None, "rule must be"),
        ({"ranks": (1, 2)}, None, r"ranks must be 5 integers, got \(1, 2\) of shape \[2\] .* range\(5\)"),
        ({"ranks": 2}, None, r"ranks must be 5 integers, got 2 of shape \[\] "),
        ({"ranks": (1, 2, 1.5, 1, 1)}, None, r"ranks must be 5 integers, got \(1, 2, 1\.5, 1, 1\) .* type float"),
        ({"ranks": np.ones(N, bool)}, None, "ranks must be 5 integers, got array.* type bool"),
        ({"ranks": "12345"}, None, "ranks must be 5 integers, got '12345'"),
        ({"ranks": [[1], [2, 3], 1, 1, 1]}, None, r"ranks must be 5 integers, got \[\[1\], \[2, 3\]"),
        ({"ranks": (1, 2, 9, 1, 1)}, adapter(), r"ranks\[2\] is 9, but the adapter's rank is 4: .*lora\(9\)"),
        ({"ranks": (1, 0, 1, 1, 1)}, None, r"ranks\[1\] is 0, and the lowest is 1"),
        (
            {},
            {"a": {"A": jnp.zeros((5, 2)), "B": jnp.zeros((1, 3))}},
            r"params must hold parts .* got ranks \[1, 2\]",
        ),
        ({}, {"w": jnp.zeros((5, 3))}, "params must hold parts .* got none"),
        (
            {},
            {
                "a": {"A": jnp.zeros((5, 2)), "B": jnp.zeros((2, 3))},
                "b": {"A": jnp.zeros((3, 1)), "B": jnp.zeros((1, 3))},
            },
            r"got ranks \[1, 2\]",
        ),
        ({"scaling": "none"}, None, "scaling must be"),
    ],
)
def test_mistakes_are_named(settings, params, words):
    with pytest.raises(ValueError, match=words):
        made(**{"rule": "factors", **settings}).init(params)


def test_ranks_must_be_known_when_the_method_is_made():
    with pytest.raises(ValueError, match="ranks must be known"):
        jax.jit(lambda ranks: made("factors", ranks).init(adapter()))(jnp.ones(N, int))


def test_integers_of_numpy_and_jax_will_do():
    given = algorithms.fedlora(loss_fn, optax.sgd(LR), num_clients=np.int32(N), ranks=jnp.arange(1, N + 1) % R + 1)
    own = algorithms.fedlora(loss_fn, optax.sgd(LR), num_clients=N, ranks=[2, 3, 4, 1, 2])
    assert_trees_equal(given.init(adapter()), own.init(adapter()))
