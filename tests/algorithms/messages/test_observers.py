"""A server that looks at uploads sees what it has of each client at its place, and no number of the method changes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import algorithms
import fedjax_core as fc
from algorithms import messages as parts
from fedjax_core import Plan, with_part
from fedjax_core.messages import Part
from tests.problems import assert_trees_equal, reporting, softmax_loss, softmax_params, softmax_population

SIZES = (3, 5, 0, 8, 2, 6)
POPULATION = softmax_population(SIZES)
IDS = (5, 0, -1, 3, 2)
BAD = np.arange(len(SIZES)) == 3
AROUND = {
    "top_k": parts.top_k(0.3),
    "rounding": parts.stochastic_rounding(2),
    "flip": parts.sign_flip(BAD, factor=10.0),
    "median": parts.coordinate_median(),
    "dp": parts.client_level_dp(0.1, 0.0, expected=4.0),
    "look": parts.observed(),
}


def nested(method, names):
    for name in names:
        method = with_part(method, AROUND[name], like=POPULATION)
    return method


def trained(algorithm, rounds=2):
    state, run = algorithm.init(softmax_params()), jax.jit(algorithm.round)
    for t in range(rounds):
        state, metrics = run(state, POPULATION.cohort(list(IDS)), jax.random.key(t))
    return state, metrics


def without(tree, names):
    """The state, or the own metrics, without those of observers."""
    taken = []
    for name in reversed(names):
        taken += [] if name == "look" else [tree.passes]
        tree = tree.method
    return tree, taken


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("fedavg", ("look",)),
        ("scaffold", ("look",)),
        ("mime", ("look", "top_k")),
        ("fedavg", ("top_k", "look", "rounding")),
        ("scaffold", ("look", "flip", "look")),
        ("fedavg", ("look", "dp", "look")),
        ("fednova", ("look", "rounding", "look", "flip", "look", "median", "look")),
        ("fedstale", ("look", "top_k")),
    ],
)
def test_no_bit_of_the_method_changes(name, names):
    options = {"num_clients": len(SIZES)} if name in ("scaffold", "fedstale") else {}
    method = getattr(algorithms, name)(softmax_loss, optax.sgd(0.1), batch_size=2, plan=Plan(lanes=1), **options)
    plain = tuple(part for part in names if part != "look")
    # Their keys are of the passes of a round, and do not know how many parts there are.
    (state, metrics), (expected, told) = trained(nested(method, names)), trained(nested(method, plain))
    assert_trees_equal(without(state, names), without(expected, plain))
    assert_trees_equal(without(metrics.extra, names), without(told.extra, plain))
    assert_trees_equal(metrics._replace(extra=()), told._replace(extra=()))


N = 4
UPLOADS = np.random.default_rng(1).normal(size=(N, 4))


HERE = {
    "top_k": parts.top_k(0.5),
    "flip": parts.sign_flip(np.arange(N) == 1, factor=10.0),
    "median": parts.coordinate_median(),
    "look": parts.observed(),
    "keep": parts.observed(lambda upload: upload),
}


def looked(names):
    """What each observer has in its rows after a round in which all clients but the last take part."""
    population = fc.Population.from_sizes({"x": UPLOADS}, [1] * N)
    algorithm = reporting()
    for name in names:
        algorithm = with_part(algorithm, HERE[name], like=population)
    state = algorithm.init({"a": jnp.zeros(3), "b": jnp.zeros(1)})
    state, metrics = jax.jit(algorithm.round)(state, population.cohort([2, -1, 0, 1]), jax.random.key(0))
    rows, told, extra = [], [], metrics.extra
    for name in reversed(names):
        if name in ("look", "keep"):
            rows.append(state.passes[0].rows)
            told.append(extra.passes[0])
        state, extra = state.method, extra.method
    return rows[::-1], told[::-1]


@pytest.mark.parametrize(
    ("names", "kinds"),
    [
        (("look",), ("exact",)),
        (("look", "top_k"), ("kept",)),
        (("top_k", "look"), ("kept",)),
        (("look", "flip"), ("exact",)),
        (("flip", "look"), ("flipped",)),
        (("look", "top_k", "flip", "look", "median", "look"), ("kept", "kept flipped", "kept flipped")),
    ],
)
def test_what_is_seen_is_what_the_server_has_there(names, kinds):
    """Behind a codec, wherever it stands, what is decoded; of attacks those that were put around before."""
    kept = np.where(np.abs(UPLOADS) >= np.sort(np.abs(UPLOADS), axis=1)[:, [2]], UPLOADS, 0)  # 2 of 4
    whole = {"exact": UPLOADS, "kept": kept}
    rows, told = looked(names)
    for own, mean, kind in zip(rows, told, kinds, strict=True):
        base, *flipped = kind.split(" ") if kind != "flipped" else ("exact", "flipped")
        factor = np.array([1, 10 if flipped else 1, 1, 0])
        expected = np.linalg.norm(whole[base], axis=1) * factor
        np.testing.assert_allclose(own, expected, rtol=1e-12)
        np.testing.assert_allclose(mean, expected[:3].mean(), rtol=1e-12)


def test_whole_uploads_can_be_kept():
    (rows,), (told,) = looked(("keep",))
    found = np.concatenate([rows["a"], rows["b"]], axis=1)
    np.testing.assert_array_equal(found[:3], UPLOADS[:3])
    np.testing.assert_array_equal(found[3], 0)
    np.testing.assert_allclose(told["a"], UPLOADS[:3, :3].mean(axis=0), rtol=1e-12)


def test_a_state_of_the_server_in_the_place_of_rows():
    """Sum and number of what was seen in all rounds, and the largest in the metrics."""
    part = parts.observed(
        tell=lambda seen, cohort: jnp.max(seen),
        init=lambda upload, num_clients: (jnp.zeros(()), jnp.int32(0)),
        update=lambda state, seen, cohort: (state[0] + jnp.sum(seen), state[1] + cohort.num_participants),
    )
    method = algorithms.fedavg(softmax_loss, optax.sgd(0.1), batch_size=2, plan=Plan(lanes=1))
    both = with_part(with_part(method, part, like=POPULATION), parts.observed(), like=POPULATION)
    state, metrics = trained(both, 1)
    (total, count), rows = state.method.passes[0], state.passes[0].rows
    assert count == 3
    np.testing.assert_allclose(total, np.sum(rows), rtol=1e-12)
    assert metrics.extra.method.passes[0] == np.max(rows)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: parts.observed(3), r"look must be a function, got an object of type int: pass look\(upload\)"),
        (lambda: parts.observed(tell=3), "tell must be a function"),
        (lambda: parts.observed(init=lambda upload, n: ()), "observed has init without update: a state needs both"),
        (lambda: parts.observed(update=lambda *a: ()), "observed has update without init"),
        (lambda: parts.observed(init=1, update=lambda *a: ()), "init must be a function"),
    ],
)
def test_mistakes_are_named(make, said):
    with pytest.raises(TypeError, match=said):
        make()


def test_a_part_of_ones_own_takes_out_what_it_has_asked_for():
    def around(state, asked, key):
        results = asked.watched(lambda upload: upload["b"]).watched(fc.sums.norm).run()
        *rest, own, norm = results.seen
        return results._replace(seen=tuple(rest)), state, (own, norm)

    method = algorithms.fedavg(softmax_loss, optax.sgd(0.1), batch_size=2)
    _, metrics = trained(with_part(method, Part(around), like=POPULATION), 1)
    own, norm = metrics.extra.passes[0]
    assert own.shape == (5, 3)
    np.testing.assert_array_equal(np.asarray(norm) == 0, [False, False, True, False, True])
