"""SFPrompt against the uncut model and a plain NumPy program."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import algorithms
import fedjax_core as fc
import models
from algorithms.finetuning.sfprompt import _derivative_norms
from algorithms.parts.pruning import pruned
from tests.problems import assert_trees_close, assert_trees_equal, softmax_population

SIZES = (4, 6, 0, 3, 5)
IDS = [0, 3, -1, 1]
LR, RATE = 0.2, 0.1
POPULATION = softmax_population(SIZES)
RNG = np.random.default_rng(0)
# head: tanh(x H + p), body: tanh(s B), tail: r w + b
FROZEN = {"H": RNG.normal(size=(5, 6)), "B": RNG.normal(size=(6, 6))}
TRAINED = {"p": RNG.normal(size=6) * 0.1, "w": RNG.normal(size=(6, 3)) * 0.3, "b": np.zeros(3)}
PUBLIC = POPULATION.with_public(FROZEN)


def cross_entropy(logits, examples):
    return optax.softmax_cross_entropy_with_integer_labels(logits, examples["y"])


SMALL = fc.Split(
    lambda y, public, examples, key: jnp.tanh(examples["x"] @ public["H"] + y["p"]),
    lambda public, s, key: jnp.tanh(s @ public["B"]),
    lambda y, public, r, key: r @ y["w"] + y["b"],
    cross_entropy,
)


def made(model=SMALL, optimizer=None, **settings):
    settings = {"num_epochs": 2, "batch_size": 2, "order": "sequential", "self_epochs": 2, **settings}
    return algorithms.sfprompt(model, optimizer or optax.sgd(LR), **settings)


def trained(method, rounds=2, population=PUBLIC, params=TRAINED):
    state, run = method.init(params), jax.jit(method.round)
    for t in range(rounds):
        state, metrics = run(state, population.cohort(IDS), jax.random.key(t))
    return state.params, metrics


def by_hand(keep, self_epochs, scored, weights, rounds=2):
    """The same in NumPy, with the derivatives written out."""

    def softmax(y, r):
        e = np.exp(r @ y["w"] + y["b"])
        return e / e.sum(axis=1, keepdims=True)

    def gradient(y, x, labels, body):
        s = np.tanh(x @ FROZEN["H"] + y["p"])
        r = np.tanh(s @ FROZEN["B"]) if body else s
        d = softmax(y, r)
        d[np.arange(len(labels)), labels] -= 1
        d /= len(labels)
        g_r = d @ y["w"].T
        g_s = (g_r * (1 - r**2)) @ FROZEN["B"].T if body else g_r
        return {"p": (g_s * (1 - s**2)).sum(axis=0), "w": r.T @ d, "b": d.sum(axis=0)}

    def descend(y, x, labels, epochs, body):
        for _ in range(epochs):
            for at in range(0, len(labels), 2):
                g = gradient(y, x[at : at + 2], labels[at : at + 2], body)
                y = {name: y[name] - LR * g[name] for name in y}
        return y

    params = TRAINED
    for _ in range(rounds):
        done = []
        for i in (0, 3, 1):
            x, labels = (np.asarray(POPULATION.client(i)[name]) for name in "xy")
            y = descend(params, x, labels, self_epochs, False)
            of = y if scored == "after" else params
            q = softmax(of, np.tanh(x @ FROZEN["H"] + of["p"]))
            scores = np.linalg.norm(q - np.eye(3)[labels], axis=1)
            kept = np.sort(np.argsort(-scores, kind="stable")[: math.ceil(keep * len(labels))])
            y = descend(y, x[kept], labels[kept], 2 if keep else 0, True)
            done.append((SIZES[i] if weights == "examples" else 1, y))
        total = sum(w for w, _ in done)
        params = {name: sum(w * y[name] for w, y in done) / total for name in params}
    return params


@pytest.mark.parametrize(
    ("keep", "self_epochs", "scored", "weights"),
    [
        (0.5, 2, "after", "examples"),
        (0.5, 2, "before", "uniform"),
        (0.3, 0, "after", "uniform"),
        (1.0, 1, "after", "uniform"),
        (0, 2, "after", "examples"),
    ],
)
def test_it_is_what_numpy_gives(keep, self_epochs, scored, weights):
    method = made(keep=keep, self_epochs=self_epochs, scored=scored, weights=weights)
    assert_trees_close(trained(method)[0], by_hand(keep, self_epochs, scored, weights), rtol=1e-11, atol=1e-13)


def transformer(num_tokens=2):
    """A small text classifier with a prompt, cut behind its first block and before its norm."""
    model = models.transformer(10, 4, 2, 8, 2, num_classes=3, pad_token=0)
    tuned = models.adapted(model, models.adapters.prompt(num_tokens))
    params = {"base": model.init(jax.random.key(0)), "adapter": tuned.init(jax.random.key(1))}
    y, public = fc.partition(
        params, ["adapter", "base/norm", "base/head"] if num_tokens else ["base/norm", "base/head"]
    )
    return tuned.joint, y, public


def texts(sizes=SIZES):
    rng = np.random.default_rng(3)
    n = sum(sizes)
    return fc.Population.from_sizes({"x": rng.integers(0, 10, (n, 4)), "y": rng.integers(0, 3, n)}, sizes)


@pytest.mark.parametrize(("head", "tail"), [("block_0", "norm"), (1, "head")])
def test_gradients_across_the_cuts_are_those_of_the_uncut_model(head, tail):
    """One step of one client, in a round, against `jax.grad` of the whole, wherever the cuts are."""
    model, y, public = transformer()
    cut = models.split(model, cross_entropy, head=head, tail=tail)
    if tail == "head":  # the body cannot have what is trained
        y, public = fc.partition(fc.combine(y, public), ["adapter", "base/head"])
    population = texts().with_public(public)
    method = made(cut, optax.sgd(1.0), keep=1.0, self_epochs=0, batch_size=6, num_epochs=1)
    state, _ = jax.jit(method.round)(method.init(y), population.cohort([1]), jax.random.key(0))
    examples = population.client(1)

    def whole(y):
        return jnp.mean(cross_entropy(model.apply(fc.combine(y, public), examples["x"]), examples))

    got = jax.tree.map(lambda old, new: old - new, y, state.params)
    assert_trees_close(got, jax.grad(whole)(y), rtol=1e-12, atol=1e-14)


def test_without_its_own_phases_it_is_fedavg_of_the_uncut_model():
    """Plain split learning of the tail, with no prompt, to the rounding of sums; shuffled, from the same keys."""
    model, y, public = transformer(num_tokens=0)
    options = {"batch_size": 2, "num_epochs": 2, "weights": "examples"}
    cut = models.split(model, cross_entropy, head="block_0", tail="norm")
    population = texts().with_public(public)
    split = algorithms.sfprompt(cut, optax.adam(0.01), keep=1.0, self_epochs=0, **options)

    def loss_fn(y, batch, key, public):
        return cross_entropy(model.apply(fc.combine(y, public), batch["x"], key), batch)

    fedavg = algorithms.fedavg(loss_fn, optax.adam(0.01), **options)
    results = [trained(method, population=population, params=y) for method in (split, fedavg)]
    assert_trees_close(results[0][0], results[1][0], rtol=1e-12, atol=1e-14)


def test_both_phases_agree_where_the_body_is_the_identity():
    same = SMALL._replace(body=lambda public, s, key: s)
    alone = trained(made(same, keep=0, self_epochs=2))[0]
    assert_trees_close(alone, trained(made(same, keep=1.0, self_epochs=0))[0], rtol=1e-13, atol=1e-15)


def test_scores_of_known_predictions():
    """sqrt(1 - 1/C) for a uniform one, 0 for one that is right and sqrt(2) for one that is wrong for certain."""
    sure = 60.0
    logits = jnp.array([[0.0] * 10, [sure] + [0] * 9, [0, sure] + [0] * 8])
    batch = fc.Batch({"y": jnp.zeros(3, jnp.int32)}, jnp.array([True] * 3), None, 0, 0, 3)
    norms = _derivative_norms(cross_entropy, logits, batch)
    np.testing.assert_allclose(norms, [0.9486832980505138, 0, 2**0.5], atol=1e-12)


@pytest.mark.parametrize("keep", [0.1, 0.3, 0.5, 0.7, 1.0, 1e-9])
def test_pruning_keeps_the_largest_scores_in_order(keep):
    sizes = (4, 6, 0, 10, 1, 30)
    offsets = np.cumsum([0, *sizes])
    population = fc.Population.from_sizes({"x": np.arange(sum(sizes))}, sizes)
    scores = np.random.default_rng(1).integers(0, 5, sum(sizes)).astype(float)  # with ties, of which the first stay
    ids = [5, -1, 0, 3, 2, 4]
    cohort = population.cohort(np.array(ids))
    rows = jax.jit(pruned)(cohort, jnp.asarray(scores), keep)
    for slot, i in enumerate(ids):
        if i < 0 or not sizes[i]:
            assert rows.sizes[slot] == 0
            continue
        mine = scores[offsets[i] : offsets[i + 1]]
        count = max(1, math.ceil(round(keep * sizes[i], 6)))
        expected = offsets[i] + np.sort(np.argsort(-mine, kind="stable")[:count])
        start = int(rows.starts[slot])
        np.testing.assert_array_equal(rows.examples["x"][start : start + int(rows.sizes[slot])], expected)
        assert rows.sizes[slot] == count


def test_a_traced_share_of_one_prunes_nothing():
    def run(keep):
        method = made(keep=keep)
        return method.round(method.init(TRAINED), PUBLIC.cohort(IDS), jax.random.key(0))[0].params

    assert_trees_close(jax.jit(run)(1.0), jax.jit(lambda: run(1.0))(), rtol=1e-14, atol=1e-16)


def traveled(model=SMALL, params=TRAINED, population=PUBLIC, **settings):
    metrics = trained(made(model, **settings), 1, population, params)[1]
    assert float(metrics.bytes_up + metrics.bytes_down) == pytest.approx(
        float(metrics.extra.model_bytes + metrics.extra.smashed_bytes), rel=1e-12
    )
    return metrics


def test_bytes_are_counted():
    """Down p, W_t; up as much; and four tensors for each example, epoch and participant; nothing of phases 1 and 2."""
    model_bytes = 2 * 8 * (6 + 18 + 3)
    full = traveled(keep=1.0, self_epochs=0)
    assert float(full.extra.model_bytes) == model_bytes
    mean_size = (4 + 6 + 3) / 3
    assert float(full.extra.smashed_bytes) == pytest.approx(4 * 6 * 8 * 2 * mean_size, rel=1e-14)
    assert float(full.extra.kept) == pytest.approx(mean_size, rel=1e-14)
    half = traveled(keep=0.5, num_epochs=3, self_epochs=5)
    assert float(half.extra.smashed_bytes) == pytest.approx(4 * 6 * 8 * 3 * (2 + 3 + 2) / 3, rel=1e-14)
    assert float(half.bytes_up) == pytest.approx(float(half.bytes_down), rel=1e-14)
    steps = traveled(keep=0.5, num_epochs=None, num_steps=1)
    assert float(steps.extra.smashed_bytes) == pytest.approx(4 * 6 * 8 * 2, rel=1e-14)
    nothing = traveled(keep=0)
    assert (float(nothing.extra.smashed_bytes), float(nothing.extra.kept)) == (0, 0)
    assert float(nothing.bytes_up) == model_bytes / 2


def test_activations_grow_with_the_prompt():
    """(P + T) D values and the mask of the tokens, which has no gradient."""
    population = texts()
    for num_tokens in (1, 2):
        model, y, public = transformer(num_tokens)
        cut = models.split(model, cross_entropy, head="block_0", tail="norm")
        got = traveled(cut, y, population.with_public(public), keep=1.0, num_epochs=1, self_epochs=0)
        one = (num_tokens + 4) * (4 * 8 * 8 + 2)
        assert float(got.extra.smashed_bytes) == pytest.approx(one * 13 / 3, rel=1e-14)


def test_the_frozen_parameters_are_not_of_the_state():
    """Nothing of W_h and W_b is in what the server averages, so that they stay to the bit."""
    model, y, public = transformer()
    cut = models.split(model, cross_entropy, head="block_0", tail="norm")
    population = texts().with_public(public)
    params, _ = trained(made(cut), 1, population, y)
    assert fc.leaf_paths(params) == fc.leaf_paths(y)
    assert_trees_equal(population.public, public)
    assert all(np.any(old != new) for old, new in zip(jax.tree.leaves(y), jax.tree.leaves(params), strict=True))


def test_a_mesh_and_an_identity_part_give_the_same():
    """With frozen parameters, which the method test in test_every_method.py has none of."""
    plain = made(order="shuffled")
    expected, _ = trained(plain, 1)
    spread = made(order="shuffled", plan=fc.Plan(lanes=2, mesh=fc.client_mesh(2)))
    assert_trees_close(trained(spread, 1)[0], expected, rtol=1e-12, atol=1e-14)
    identity = fc.Part(lambda state, asked, key: (asked.run(), state, ()))
    around = fc.with_part(plain, identity, like=PUBLIC)
    state, metrics = jax.jit(around.round)(around.init(TRAINED), PUBLIC.cohort(IDS), jax.random.key(0))
    assert_trees_equal(around.params(state), expected)
    assert len(metrics.extra.passes) == 1  # phases 1 and 2 send nothing


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"model": cross_entropy}, TypeError, "model must be an fc.Split, got function"),
        ({"keep": 1.5}, ValueError, "keep must"),
        ({"self_epochs": -1}, ValueError, "self_epochs must be an integer of at least 0, got -1"),
        ({"self_epochs": np.float64(1)}, ValueError, r"self_epochs must be an integer .* got np\.float64\(1\.0\)"),
        ({"self_epochs": True}, ValueError, "self_epochs must be an integer .* got True"),
        ({"keep": 0, "self_epochs": 0}, ValueError, "leave nothing to train"),
        ({"scored": "later"}, ValueError, "scored must be"),
    ],
)
def test_mistakes_are_named(settings, error, words):
    with pytest.raises(error, match=words):
        made(**settings)


def test_integers_of_numpy_will_do():
    one, two = np.int64(1), np.int32(2)
    given, plain = (trained(made(self_epochs=a, num_epochs=a, batch_size=b), 1)[0] for a, b in ((one, two), (1, 2)))
    assert_trees_equal(given, plain)


@pytest.mark.parametrize(
    ("head", "tail", "words"),
    [("block_9", "norm", "start must be a stage"), ("norm", "block_0", "comes before"), (0, "norm", "without a stage")],
)
def test_cuts_that_cannot_be_are_named(head, tail, words):
    with pytest.raises(ValueError, match=words):
        models.split(transformer()[0], cross_entropy, head=head, tail=tail)


def test_a_body_that_is_trained_is_refused():
    model, y, public = transformer()
    y, public = fc.partition(fc.combine(y, public), ["adapter", "base/block_1", "base/head"])
    method = made(models.split(model, cross_entropy, head="block_0", tail="norm"))
    with pytest.raises(Exception, match="has the frozen parameters alone"):
        method.round(method.init(y), texts().with_public(public).cohort(IDS), jax.random.key(0))
