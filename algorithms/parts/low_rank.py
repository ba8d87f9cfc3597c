"""Trees of parameters with pairs of factors: {"A": [in, r], "B": [r, out]} in the place of a matrix [in, out]."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import fedjax_core as fc


def is_pair(node: Any) -> bool:
    """Whether a node of a tree is a pair of factors."""
    return isinstance(node, dict) and node.keys() == {"A", "B"} and jnp.ndim(node["A"]) == jnp.ndim(node["B"]) == 2


def pairs_of(tree: fc.Params) -> list[dict[str, fc.Array]]:
    """All pairs of a tree."""
    return [node for node in jax.tree.leaves(tree, is_leaf=is_pair) if is_pair(node)]


def map_pairs(function: Callable[..., Any], tree: fc.Params, *rest: fc.Params) -> fc.Params:
    """The tree with `function(part, *those of the others)` for each pair; of other leaves those of the last tree."""
    return jax.tree.map(
        lambda own, *others: function(own, *others) if is_pair(own) else (others[-1] if others else own),
        tree,
        *rest,
        is_leaf=is_pair,
    )


def cut(tree: fc.Params, rank: fc.Array, times: Any = 1.0) -> fc.Params:
    """The first columns of every A and rows of every B, these times a number; zeros for the others."""

    def of_part(part):
        there = jnp.arange(part["A"].shape[1]) < rank
        B = jnp.where(there[:, None], part["B"], 0)
        return {"A": jnp.where(there, part["A"], 0), "B": (times * B).astype(B.dtype)}

    return map_pairs(of_part, tree)


def rank_of(params: fc.Params) -> int:
    """The rank r of all pairs, or ValueError where there are none or of several ranks."""
    found = {rank for part in pairs_of(params) for rank in (part["A"].shape[1], part["B"].shape[0])}
    if len(found) != 1:
        raise ValueError(
            "params must hold parts {'A': [in, r], 'B': [r, out]} of one rank, got "
            f"{'none' if not found else f'ranks {sorted(found)}'}: make them by models.adapters.lora(rank)"
        )
    return int(found.pop())


def to_rank(matrix: fc.Array, r: int, axis: int) -> fc.Array:
    """The first r entries along an axis, with zeros where there are fewer."""
    there = jax.lax.slice_in_dim(matrix, 0, min(r, matrix.shape[axis]), axis=axis)
    more = [(0, 0), (0, 0)]
    more[axis] = (0, r - there.shape[axis])
    return jnp.pad(there, more)


def ranks_of_clients(ranks: Any, num_clients: int) -> np.ndarray:
    """The clients' ranks, int[num_clients], or ValueError."""
    fix = f"pass one for each client, such as [1 + i % 4 for i in range({num_clients})]"
    if not all(map(fc.checks.is_concrete, jax.tree.leaves(ranks))):
        raise ValueError(f"ranks must be known when the method is made, got traced ones: {fix}")
    try:
        found = np.asarray(ranks)
    except ValueError:  # of rows that differ in length
        found = np.asarray(None)
    if found.shape != (num_clients,) or not np.issubdtype(found.dtype, np.integer):
        raise ValueError(
            f"ranks must be {num_clients} integers, got {ranks!r:.60} of shape {list(found.shape)} and type "
            f"{found.dtype}: {fix}"
        )
    if found.min() < 1:
        raise ValueError(f"ranks[{found.argmin()}] is {found.min()}, and the lowest is 1: leave such a client out")
    return found
