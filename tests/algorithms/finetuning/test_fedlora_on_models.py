"""Federated LoRA on the library's transformer and on a BERT-like encoder, whose clients have ranks of their own.

The reference trains merged models: NumPy has every client's small factors, puts c A B into the weights, takes the
plain model's gradients there and carries them to the factors by the chain rule, without the code of the adapters.
"""

import re
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import algorithms
import fedjax_core as fc
import models
from models import adapters, pretrained
from tests.problems import assert_trees_close, assert_trees_equal

R, ALPHA, LR, VOCABULARY, LENGTH, CLASSES = 3, 2.0, 0.3, 7, 5, 3
SIZES = (4, 3, 0, 2, 6)
RANKS = (1, 3, 2, 2, 1)
N = len(SIZES)
COHORTS = [[0, 3, -1, 1], [4, -1, 1, 2]]  # partial participation, empty slots, a client without examples
BERT = {
    "model_type": "bert",
    "vocab_size": VOCABULARY,
    "hidden_size": 4,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 6,
    "max_position_embeddings": LENGTH,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "hidden_act": "gelu",
    "pad_token_id": 0,
}
MODELS = {
    "transformer": models.transformer(
        VOCABULARY, LENGTH, num_layers=1, dim=4, num_heads=2, mlp_ratio=2, num_classes=CLASSES, pad_token=0
    ),
    "bert": pretrained.from_config(BERT, num_classes=CLASSES),  # what MiniLM is
}
LAYERS = ("block_0/query", "block_0/up")  # one of them [4, 4], the other wider than it is high


def texts(size, rng):
    """Sentences of unequal lengths with padding behind, and their classes."""
    x = rng.integers(1, VOCABULARY, (size, LENGTH))
    lengths = rng.integers(2, LENGTH + 1, (size, 1))
    return {"x": np.where(np.arange(LENGTH) < lengths, x, 0), "y": rng.integers(0, CLASSES, size)}


@cache
def problem(name):
    """(model, model with adapters, its frozen parameters, those trained, the population with the former in it)."""
    model = MODELS[name]
    tuned = models.adapted(model, adapters.lora(R, alpha=ALPHA), re.compile(r"block_0/(query|up)/kernel"))
    assert tuned.layers == LAYERS
    base, adapter = model.init(jax.random.key(0)), tuned.init(jax.random.key(1))
    rng = np.random.default_rng(3)
    # Far from the start, where B is zero and all rules agree.
    adapter = {path: {n: p + 0.5 * rng.normal(size=p.shape) for n, p in part.items()} for path, part in adapter.items()}
    base["head"] = jax.tree.map(lambda leaf: leaf + rng.normal(size=leaf.shape), base["head"])
    trained, frozen = fc.partition({"base": base, "adapter": adapter}, ["adapter", "base/head"])
    population = fc.Population.from_clients([texts(n, rng) for n in SIZES]).with_public(frozen)
    return model, tuned, base, trained, population


@cache
def made(rule, name="transformer", ranks=RANKS, **settings):
    cross_entropy = models.losses.cross_entropy(problem(name)[1].joint)

    def loss_fn(trained, batch, key, public):
        return cross_entropy(fc.combine(trained, public), batch, key)

    settings = {"batch_size": 2, "num_epochs": 2, "order": "sequential", "plan": fc.Plan(lanes=1), **settings}
    return algorithms.fedlora(
        loss_fn, optax.sgd(LR), num_clients=N, rule=rule, ranks=ranks, alpha=ALPHA, weights="examples", **settings
    )


@cache
def compiled(rule, name="transformer", **settings):
    """One round; the clients' ranks are state, so that one program is for all of them."""
    return jax.jit(made(rule, name, **settings).round)


def rounds(rule, cohorts=COHORTS, name="transformer", ranks=RANKS, start=None, **settings):
    _, _, _, trained, population = problem(name)
    state = made(rule, name, ranks).init(trained) if start is None else start
    for t, ids in enumerate(cohorts):
        state, metrics = compiled(rule, name, **settings)(state, population.cohort(ids), jax.random.key(t))
    return state, metrics


@cache
def plain_gradient(name):
    loss_fn = models.losses.cross_entropy(MODELS[name])
    return jax.jit(jax.grad(lambda params, examples: jnp.mean(loss_fn(params, examples, None))))


def with_kernels(base, change, head):
    """A model of its own: the base with something added to the kernels of layers, and another head."""
    block = dict(base["block_0"])
    for path in LAYERS:
        layer = path.split("/")[1]
        block[layer] = {**block[layer], "kernel": np.asarray(block[layer]["kernel"]) + change[path]}
    return {**base, "block_0": block, "head": head}


def parts_of(trained):
    """NumPy's {path: (A, B)} and head."""
    factors = {path: tuple(np.asarray(trained["adapter"][path][n]) for n in "AB") for path in LAYERS}
    return factors, {n: np.asarray(leaf) for n, leaf in trained["base"]["head"].items()}


def client(name, rule, i, rank, factors, head):
    """c, the small factors and the head that client i comes to."""
    base, population = problem(name)[2], problem(name)[4]
    c = ALPHA / rank
    times = (ALPHA / R) / c if rule == "products" else 1
    own = {path: (A[:, :rank], times * B[:rank]) for path, (A, B) in factors.items()}
    examples = {n: np.asarray(leaf) for n, leaf in population.client(i).items()}
    for _epoch in range(2):
        for at in range(0, SIZES[i], 2):
            model = with_kernels(base, {path: c * A @ B for path, (A, B) in own.items()}, head)
            g = plain_gradient(name)(model, {n: leaf[at : at + 2] for n, leaf in examples.items()})
            for path, (A, B) in own.items():
                g_kernel = np.asarray(g["block_0"][path.split("/")[1]]["kernel"])
                own[path] = A - LR * c * g_kernel @ B.T, B - LR * c * A.T @ g_kernel
            head = {n: leaf - LR * np.asarray(g["head"][n]) for n, leaf in head.items()}
    return c, own, head


def by_hand(rule, cohorts=COHORTS, name="transformer", ranks=RANKS):
    """The server's factors and head after some rounds, and the mean change of each layer in the last."""
    factors, head = parts_of(problem(name)[3])
    for ids in cohorts:
        taking = [i for i in ids if i >= 0 and SIZES[i]]
        w = {i: SIZES[i] / sum(SIZES[k] for k in taking) for i in taking}
        done = {i: client(name, rule, i, ranks[i], factors, head) for i in taking}
        head = {n: sum(w[i] * done[i][2][n] for i in taking) for n in head}
        mean = {}
        for path, (A, B) in factors.items():
            small = {i: done[i][1][path] for i in taking}
            mean[path] = sum(w[i] * done[i][0] * small[i][0] @ small[i][1] for i in taking)
            A, B = np.zeros_like(A), np.zeros_like(B)
            if rule == "products":
                P, S, Q = np.linalg.svd(mean[path], full_matrices=False)
                A[:], B[:] = P[:, :R], (S[:, None] * Q)[:R] / (ALPHA / R)
            else:
                norm = {i: np.linalg.norm(a @ b) if rule == "norms" else 1.0 for i, (a, b) in small.items()}
                total = sum(w[i] * norm[i] for i in taking)
                for i, (a, b) in small.items():
                    A[:, : ranks[i]] += w[i] * norm[i] / total * a
                    B[: ranks[i]] += w[i] * norm[i] / total * b
            factors[path] = A, B
    return factors, head, mean


RULES = ("factors", "norms", "products")


@pytest.mark.parametrize(("rule", "name"), [*((rule, "transformer") for rule in RULES), ("products", "bert")])
def test_rounds_are_those_of_merged_models_in_numpy(rule, name):
    state, metrics = rounds(rule, name=name)
    factors, head, _ = by_hand(rule, name=name)
    found, found_head = parts_of(state.params)
    assert_trees_close(found_head, head, rtol=1e-9, atol=1e-12)
    for path, (A, B) in factors.items():
        np.testing.assert_allclose(found[path][0] @ found[path][1], A @ B, rtol=1e-9, atol=1e-12)
        if rule != "products":  # whose factors have signs of their own
            np.testing.assert_allclose(found[path][0], A, rtol=1e-9, atol=1e-12)
    # What travels is a client's rank of each factor, and the head; an int32 tells the server the rank.
    wide = {"transformer": 8, "bert": 6}[name]
    numbers = [RANKS[i] * (4 + 4 + 4 + wide) + 4 * CLASSES + CLASSES for i in (4, 1)]
    assert float(metrics.bytes_down) == 8 * np.mean(numbers)
    assert float(metrics.bytes_up) == 8 * np.mean(numbers) + 4


def test_products_are_exact_where_the_servers_rank_holds_all_clients():
    """Three clients of rank 1 for a server of rank 3: nothing is cut off. The mean of factors errs by a covariance."""
    ids, ones = [[0, 1, 3]], (1,) * N
    start = problem("transformer")[3]
    for rule in ("products", "factors"):
        got, _ = parts_of(rounds(rule, ids, ranks=ones)[0].params)
        mean = by_hand(rule, ids, ranks=ones)[2]
        for path in LAYERS:
            A, B = got[path]
            error = np.linalg.norm(ALPHA / R * A @ B - mean[path])
            assert error < 1e-12 if rule == "products" else error > 1e-3
    # A client of rank 1 scales what it is sent by alpha / 1; so is the error of "factors".
    done = {i: client("transformer", "factors", i, 1, *parts_of(start)) for i in ids[0]}
    w = np.array([SIZES[i] for i in ids[0]]) / sum(SIZES[i] for i in ids[0])
    for path in LAYERS:
        A, B = (np.stack([done[i][1][path][n] for i in ids[0]]) for n in (0, 1))
        covariance = np.einsum("k,kir,kro->io", w, A - np.tensordot(w, A, 1), B - np.tensordot(w, B, 1))
        error = by_hand("factors", ids, ranks=ones)[2][path] / ALPHA - got[path][0] @ got[path][1]
        np.testing.assert_allclose(error, covariance, atol=1e-12)


@pytest.mark.parametrize("rule", RULES)
def test_a_client_neither_reads_nor_writes_beyond_its_rank(rule):
    """Other numbers there give the same bits; what comes back has the rank of those who have sent."""
    state = made(rule).init(problem("transformer")[3])
    noise = {
        path: {"A": part["A"].at[:, 2:].set(9.0), "B": part["B"].at[2:].set(-7.0)}
        for path, part in state.params["adapter"].items()
    }
    other = state._replace(params={**state.params, "adapter": noise})
    cohort = [[3, -1, -1, 0]]  # of the ranks 2 and 1
    (one, of_one), (two, of_two) = rounds(rule, cohort, start=state), rounds(rule, cohort, start=other)
    assert_trees_equal((one, of_one.loss), (two, of_two.loss))
    for A, B in parts_of(one.params)[0].values():
        if rule == "products":  # D has at most the sum of the ranks
            assert np.linalg.matrix_rank(A @ B, tol=1e-9) <= 3
        else:
            assert not A[:, 2:].any()
            assert not B[2:].any()
    assert_trees_equal(one.ranks, state.ranks)


@pytest.mark.parametrize("rule", ["factors", "products"])
def test_plans_agree(rule):
    expected, metrics = rounds(rule)
    plans = [fc.Plan(lanes=2)]
    if rule == "products":
        plans.append(fc.Plan(lanes=2, mesh=jax.make_mesh((2,), ("clients",))))
    for plan in plans:
        state, info = rounds(rule, plan=plan)
        found, head = parts_of(state.params)
        factors, expected_head = parts_of(expected.params)
        assert_trees_close(head, expected_head, rtol=1e-12, atol=1e-12)
        for path in LAYERS:
            np.testing.assert_allclose(found[path][0] @ found[path][1], factors[path][0] @ factors[path][1], atol=1e-12)
        assert_trees_close(info, metrics, rtol=1e-12)


def test_the_base_is_frozen_and_the_model_is_the_base_and_its_changes():
    model, tuned, base, _, population = problem("transformer")
    before = jax.tree.map(np.array, population.public)
    state, _ = rounds("products")
    assert_trees_equal(population.public, before)
    final = fc.combine(state.params, population.public)
    merged = tuned.merge(final["base"], final["adapter"])
    factors, head = parts_of(state.params)
    own = with_kernels(base, {path: ALPHA / R * A @ B for path, (A, B) in factors.items()}, head)
    assert_trees_close(merged, own, rtol=0, atol=1e-15)
    touched = [f"{path}/kernel" for path in LAYERS]
    (moved, same), (was, still) = (fc.partition(tree, [*touched, "head"]) for tree in (merged, base))
    assert_trees_equal(same, still)
    for new, old in zip(jax.tree.leaves(moved), jax.tree.leaves(was), strict=True):
        assert np.abs(new - old).max() > 0.01

    # A client of its own rank predicts with that much of the change.
    x = jnp.asarray(population.client(1)["x"])
    apply = jax.jit(model.apply)
    np.testing.assert_allclose(jax.jit(tuned.joint.apply)(final, x), apply(own, x), atol=1e-12)
    row = jax.tree.map(lambda leaf: leaf[0], made("products").client_params(state, [0]))
    rank = RANKS[0]
    cut = {path: ALPHA / R * A[:, :rank] @ B[:rank] for path, (A, B) in factors.items()}
    personal = jax.jit(tuned.joint.apply)(fc.combine(row, population.public), x)
    np.testing.assert_allclose(personal, apply(with_kernels(base, cut, head), x), atol=1e-12)


def test_a_round_of_nobody_changes_nothing():
    state, _ = rounds("products")
    after, metrics = rounds("products", [[-1, 2, -1, -1]], start=state)
    assert_trees_equal(after._replace(round=state.round), state)
    assert int(metrics.participants) == 0
    assert float(metrics.bytes_up) == 0


def test_a_run_that_stopped_goes_on_with_the_same_bits():
    _, _, _, trained, population = problem("transformer")
    method, sampler, key = made("factors"), fc.samplers.uniform(N, 3), jax.random.key(5)
    one = jax.jit(fc.continue_rounds(method, sampler, 1))
    state = method.init(trained)
    for _ in range(3):
        state, _ = one(jax.tree.map(np.array, state), population, key)  # as from a file
    whole, _ = jax.jit(fc.continue_rounds(method, sampler, 3))(method.init(trained), population, key)
    assert_trees_equal(state, whole)
    assert int(state.round) == 3
