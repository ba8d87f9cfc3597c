"""Partition and combine: exact inverses over any tree, under transformations, and what they say about bad input."""

import re
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fedjax_core as fc

PARAMS = {
    "embed": {"embedding": jnp.arange(6.0).reshape(3, 2)},
    "block_0": {"query": {"kernel": jnp.ones((2, 2)), "bias": jnp.zeros(2)}, "bias_net": {"kernel": jnp.ones(2)}},
    "head": {"kernel": jnp.ones((2, 3)), "bias": jnp.arange(3.0)},
    "head_norm": {"scale": jnp.ones(2)},
}
PATHS = fc.leaf_paths(PARAMS)


class Pair(NamedTuple):
    first: object
    second: object


def held(part):
    """Paths of the leaves that a part has."""
    return [path for path in fc.leaf_paths(part) if path]


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("head", ["head/bias", "head/kernel"]),
        ("head/bias", ["head/bias"]),
        (["head/bias", "embed"], ["embed/embedding", "head/bias"]),
        (("head", "head/bias"), ["head/bias", "head/kernel"]),
        ((), []),
        (re.compile(r".*/bias"), ["block_0/query/bias", "head/bias"]),
        (re.compile("head"), None),
        (lambda path, leaf: leaf.ndim == 1, ["block_0/bias_net/kernel", "block_0/query/bias", "head/bias"]),
        (lambda path, leaf: np.prod(leaf.shape) > 5, ["embed/embedding", "head/kernel"]),
    ],
    ids=["node", "leaf", "several", "nested", "nothing", "expression", "whole", "shape", "size"],
)
def test_what_is_chosen(where, expected):
    if expected is None:  # an expression matches whole paths
        with pytest.raises(ValueError, match="chooses no leaf"):
            fc.partition(PARAMS, where)
        return
    if expected and expected[0].startswith("block_0/bias_net"):
        expected = [*expected, "head_norm/scale"]
    chosen, rest = fc.partition(PARAMS, where)
    assert held(chosen) == expected
    assert held(rest) == [path for path in PATHS if path not in expected]
    same(fc.combine(chosen, rest), PARAMS)
    same(fc.combine(rest, chosen), PARAMS)


def trees(leaves):
    return st.recursive(
        leaves | st.none(),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.text("ab/", max_size=2), inner, max_size=3)
            | st.tuples(inner, inner).map(lambda both: Pair(*both))
        ),
        max_leaves=8,
    )


@settings(max_examples=60, deadline=None)
@given(trees(st.integers()), st.integers(2, 3))
def test_combine_is_the_inverse_for_any_tree(tree, modulus):
    owners = iter(range(10_000))
    parts = [list(group) for group in [[]] * modulus]
    for path in fc.leaf_paths(tree):
        parts[next(owners) % modulus].append(path)
    paths = fc.leaf_paths(tree)
    if len(set(paths)) < len(paths) or any(a != b and b.startswith(f"{a}/") for a in paths for b in paths):
        return  # keys that hold the separator: such paths are not told apart
    cut = fc.partition(tree, *parts[:-1])
    assert sum(len(jax.tree.leaves(part)) for part in cut) == len(paths)
    assert fc.combine(*cut) == tree
    assert fc.combine(*reversed(cut)) == tree


def test_a_part_is_cut_again():
    frozen, rest = fc.partition(PARAMS, "embed")
    personal, shared = fc.partition(rest, ["head", "head_norm"])
    same(fc.combine(frozen, personal, shared), PARAMS)
    for part, other in zip(
        fc.partition(PARAMS, "embed", ["head", "head_norm"]), (frozen, personal, shared), strict=True
    ):
        same(part, other)


def test_modules_of_equinox():
    module = eqx.nn.MLP(2, 3, 4, 1, use_final_bias=False, key=jax.random.key(0))
    chosen, rest = fc.partition(module, re.compile(r"layers/\d+/weight"))
    assert held(chosen) == ["layers/0/weight", "layers/1/weight"]
    again = fc.combine(chosen, rest)
    assert jax.tree.structure(again) == jax.tree.structure(module)
    np.testing.assert_array_equal(again(jnp.ones(2)), module(jnp.ones(2)))


def test_under_transformations_only_the_part_is_computed_and_kept():
    def loss(params, scale):
        return scale * sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(params))

    chosen, rest = fc.partition(PARAMS, "head")
    gradient = jax.grad(lambda part: loss(fc.combine(part, rest), 1.0))(chosen)
    same(gradient, fc.partition(jax.grad(loss)(PARAMS, 1.0), "head")[0])
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), chosen)
    losses = jax.jit(jax.vmap(lambda part: loss(fc.combine(part, rest), 1.0)))(stacked)
    np.testing.assert_allclose(losses[1], loss(fc.combine(jax.tree.map(lambda leaf: 2 * leaf, chosen), rest), 1.0))
    state = optax.adam(0.1).init(chosen)
    assert len(jax.tree.leaves(state)) == 1 + 2 * 2  # the count, and two moments of the head's two leaves
    updates, _ = optax.adam(0.1).update(gradient, state, chosen)
    assert held(optax.apply_updates(chosen, updates)) == held(chosen)
    # Cutting under jit gives the same parts.
    same(
        jax.jit(lambda params: fc.partition(params, lambda path, leaf: leaf.ndim == 2)[0])(PARAMS),
        fc.partition(PARAMS, lambda path, leaf: leaf.ndim == 2)[0],
    )


CHOSEN, REST = fc.partition(PARAMS, "head")
HOLE = fc.Hole()
BAD = [
    ("no choice", lambda: fc.partition(PARAMS), ValueError, ["got none"]),
    ("typing error", lambda: fc.partition(PARAMS, "haed"), ValueError, ["'haed' is no path", "did you mean 'head'"]),
    ("wrong in a list", lambda: fc.partition(PARAMS, ["head", "body"]), ValueError, ["'body'", "embed/embedding"]),
    ("part of a name", lambda: fc.partition(PARAMS, "block"), ValueError, ["'block'", "block_0"]),
    ("expression", lambda: fc.partition(PARAMS, re.compile("x.*")), ValueError, ["'x.*'", "chooses no leaf"]),
    ("function", lambda: fc.partition(PARAMS, lambda p, leaf: False), ValueError, ["chooses no leaf"]),
    ("overlap", lambda: fc.partition(PARAMS, "head", re.compile(".*bias")), ValueError, ["'head/bias'", "twice"]),
    ("value", lambda: fc.partition(PARAMS, lambda p, x: jnp.sum(x) > 0), TypeError, ["True or False", "block_0"]),
    ("number", lambda: fc.partition(PARAMS, 3), TypeError, ["got 3", "re.compile"]),
    ("list of else", lambda: fc.partition(PARAMS, [re.compile("h")]), TypeError, ["hold paths", "text"]),
    ("no leaves", lambda: fc.partition({}, "a"), ValueError, ["'a'", "no leaves"]),
    ("nothing", lambda: fc.combine(), ValueError, ["got none"]),
    ("twice", lambda: fc.combine(CHOSEN, PARAMS), ValueError, ["'head/bias' is in parts 0 and 1"]),
    ("missing", lambda: fc.combine(CHOSEN, CHOSEN), ValueError, ["in none of the 2 parts", "at once"]),
    ("one part", lambda: fc.combine(CHOSEN), ValueError, ["'block_0/bias_net/kernel' is in none of the 1 parts"]),
    ("others", lambda: fc.combine(CHOSEN, {"a": 1}), ValueError, ["one structure", "part 1", "'a'"]),
    (
        "arguments swapped",
        lambda: fc.partition("head", PARAMS),
        TypeError,
        ["where must be paths", "'block_0'", "order"],
    ),
    ("a tree for where", lambda: fc.partition(PARAMS, PARAMS), TypeError, ["where must be paths, got a dict with"]),
    ("parts in a tuple", lambda: fc.combine(fc.partition(PARAMS, "head")), ValueError, ["one tuple of 2", "*parts"]),
    (
        "one leaf more",
        lambda: fc.combine({"a": HOLE, "b": {"c": 1}}, {"a": 2, "b": {"c": HOLE, "d": 3}}),
        ValueError,
        ["part 1 has 'b/d', and part 0 does not: there it is a dict with 'c'"],
    ),
    (
        "one leaf less",
        lambda: fc.combine({"a": HOLE, "b": {"c": 1, "d": HOLE}}, {"a": 2, "b": {"c": HOLE}}),
        ValueError,
        ["part 0 has 'b/d', and part 1 does not: there it is a dict with 'c'"],
    ),
    (
        "the third",
        lambda: fc.combine({"a": HOLE}, {"a": 1}, {"a": {"b": HOLE}}),
        ValueError,
        ["part 0 has at 'a' a hole, and part 2 a dict with 'b'"],
    ),
    (
        "nothing of it",
        lambda: fc.combine(CHOSEN, ()),
        ValueError,
        ["part 0 has 'block_0'", "a tuple with nothing in it"],
    ),
    (
        "list and tuple",
        lambda: fc.combine({"a": [HOLE, 1]}, {"a": (2, HOLE)}),
        ValueError,
        ["part 0 has at 'a' a list with '0', '1', and part 1 a tuple with '0', '1'"],
    ),
    (
        "None",
        lambda: fc.combine({"a": None, "b": 1}, {"a": 2, "b": HOLE}),
        ValueError,
        ["part 0 has at 'a' None, and part 1 a leaf"],
    ),
    ("a leaf", lambda: fc.combine(CHOSEN, 3.0), ValueError, ["part 0 is a dict with 'block_0', ", "and part 1 a leaf"]),
]


@pytest.mark.parametrize(("call", "error", "words"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
def test_bad_input(call, error, words):
    with pytest.raises(error) as caught:
        call()
    for word in words:
        assert word in str(caught.value)
    assert "PyTreeDef" not in str(caught.value)
