"""A tree cut into parts by the paths of its leaves, and put together again.

What a client keeps and what it shares, what is trained and what is frozen: each is a part of one tree, of the same
structure with a `Hole` where another part has the leaf. A hole has no leaves, so that a part goes through `jax.grad`,
`jax.vmap`, an optimizer or an aggregator as any tree does, and nothing is computed, kept or sent for the rest.
"""

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.tree_util import keystr, tree_flatten_with_path

from fedjax_core import checks
from fedjax_core.types import PyTree

Where = str | re.Pattern[str] | Iterable[str] | Callable[[str, Any], bool]
"""Which leaves of a tree: a path, several paths, a regular expression, or a function of path and leaf."""


class Hole(NamedTuple):
    """The place of a leaf that belongs to another part; a tree without leaves."""


def leaf_paths(tree: PyTree) -> tuple[str, ...]:
    """The path of every leaf, in the order of `jax.tree.leaves`: keys, indices and names of fields, joined by "/"."""
    return tuple(keystr(path, simple=True, separator="/") for path, _ in tree_flatten_with_path(tree)[0])


def partition(tree: PyTree, *where: Where) -> tuple[Any, ...]:
    """Cuts a tree into the leaves that are chosen and the rest; `combine` is the inverse.

    Args:
      tree: any pytree: dicts, lists, NamedTuples, modules of other packages; leaves of any kind.
      *where: for each part which leaves it has:
        a path, "head/bias", or the path of a node, "head", for all leaves below it;
        several such paths, as `Model.paths` gives them; none, `()`, for a part without leaves;
        `re.compile(...)`, for the leaves whose whole path it matches (`fullmatch`);
        `f(path, leaf) -> bool`, which under a transformation may look at a leaf's shape and dtype, not its values.

    Returns:
      A part for each of `where` and last the rest: `chosen, rest = partition(params, "head")`, or with several
      `frozen, personal, shared = partition(params, "embed", "head")`. Each has the structure of `tree` with a `Hole` in
      place of the leaves that it does not have. A part may be cut again.

    Raises:
      ValueError: if a path is none of the tree's, an expression or a function chooses no leaf, two of `where` choose
        the same leaf, or none is given.
      TypeError: if one of `where` is something else, or a function gives something else than True or False.
    """
    if not where:
        raise ValueError("partition needs to know which leaves to choose, got none: pass a path, such as 'head'")
    leaves, treedef = jax.tree.flatten(tree)
    paths = leaf_paths(tree)
    owner: list[int | None] = [None] * len(leaves)
    for part, choice in enumerate(where):
        for i in _chosen(choice, paths, leaves):
            first = owner[i]
            if first is not None:
                raise ValueError(
                    f"{paths[i]!r} is chosen twice, by {_text(where[first])} and by {_text(choice)}: make them "
                    "choose different leaves"
                )
            owner[i] = part
    return tuple(
        jax.tree.unflatten(treedef, [leaf if own == part else Hole() for own, leaf in zip(owner, leaves, strict=True)])
        for part in (*range(len(where)), None)
    )


def combine(*parts: PyTree) -> Any:
    """Puts the parts of a tree together: the inverse of `partition`, whatever the order of the parts.

    Args:
      *parts: all parts of one tree. After a second cut give those of both at once, `combine(frozen, personal, shared)`.

    Returns:
      The tree, with the leaves of the parts.

    Raises:
      ValueError: if the parts are not of one structure, or a leaf is in two of them or in none.
    """
    if not parts:
        raise ValueError("combine needs the parts of a tree, got none: pass all that partition gave")
    flat: list[Any] = [jax.tree.flatten(part, is_leaf=_is_hole) for part in parts]
    if len(parts) == 1 and isinstance(parts[0], list | tuple) and not isinstance(parts[0], Hole):
        several = [part for part in parts[0] if any(map(_is_hole, jax.tree.leaves(part, is_leaf=_is_hole)))]
        if len(several) > 1:
            raise ValueError(
                f"combine got one {type(parts[0]).__name__} of {len(parts[0])} parts: call combine(*parts)"
            )
    for number, (_, treedef) in enumerate(flat[1:], 1):
        if treedef != flat[0][1]:
            raise ValueError(
                f"the parts must be of one structure, but {_difference(parts[0], parts[number], number)}; "
                "combine the parts that partition has given of one tree"
            )
    found = []
    for i, candidates in enumerate(zip(*(leaves for leaves, _ in flat), strict=True)):
        have = [number for number, leaf in enumerate(candidates) if not _is_hole(leaf)]
        if len(have) != 1:
            path = keystr(tree_flatten_with_path(parts[0], is_leaf=_is_hole)[0][i][0], simple=True, separator="/")
            if have:
                raise ValueError(
                    f"{path!r} is in parts {' and '.join(map(str, have))}: combine parts that do not overlap"
                )
            raise ValueError(f"{path!r} is in none of the {len(parts)} parts: combine all parts of the tree at once")
        found.append(candidates[have[0]])
    return jax.tree.unflatten(flat[0][1], found)


def _is_hole(node: Any) -> bool:
    return isinstance(node, Hole)


def _difference(first: PyTree, other: PyTree, number: int, path: str = "") -> str:
    """Where two trees of different structures differ first, in words; `other` is of part `number`."""
    one, two, name = _children(first), _children(other), f"part {number}"
    if one is not None and two is not None:
        for has, lacks, these, those, node in (("part 0", name, one, two, other), (name, "part 0", two, one, first)):
            more = next((child for child in these if child not in those), None)
            if more is not None:
                whole, kind = _joined(path, more), _text_of_node(node)
                return f"{has} has {whole!r}, and {lacks} does not: there it is {kind}"
        for child in one:
            pair: list[Any] = [jax.tree.structure(node[child], is_leaf=_is_hole) for node in (one, two)]
            if pair[0] != pair[1]:
                return _difference(one[child], two[child], number, _joined(path, child))
    at = f"has at {path!r}" if path else "is"
    return f"part 0 {at} {_text_of_node(first)}, and {name} {_text_of_node(other)}"


def _children(node: PyTree) -> dict[str, Any] | None:
    """What a node holds by name; None for a leaf and for a hole."""
    if _is_hole(node):
        return None
    found = tree_flatten_with_path(node, is_leaf=lambda other: other is not node)[0]
    return None if any(not path for path, _ in found) else {keystr(path, simple=True): child for path, child in found}


def _joined(path: str, name: str) -> str:
    return f"{path}/{name}" if path else name


def _text_of_node(node: PyTree) -> str:
    children = _children(node)
    if children is None:
        return "a hole" if _is_hole(node) else "a leaf"
    if node is None:
        return "None"
    inside = ", ".join(map(repr, list(children)[:3])) + ", ..." * (len(children) > 3)
    return f"a {type(node).__name__} with {inside or 'nothing in it'}"


def _chosen(where: Where, paths: tuple[str, ...], leaves: list[Any]) -> list[int]:
    """Indices of the leaves that `where` chooses."""
    if isinstance(where, str):
        return _below(where, paths)
    if isinstance(where, Mapping):
        raise TypeError(
            f"where must be paths, got {_text_of_node(where)}: the order is partition(tree, where), and "
            "fedjax_core.leaf_paths(tree) are the paths of a tree"
        )
    if isinstance(where, re.Pattern):
        found = [i for i, path in enumerate(paths) if where.fullmatch(path)]
    elif callable(where):
        checks.takes("where", where, ("path", "leaf"), example="lambda path, leaf: leaf.ndim > 1")
        answers = [where(path, leaf) for path, leaf in zip(paths, leaves, strict=True)]
        for path, answer in zip(paths, answers, strict=True):
            if not isinstance(answer, bool | np.bool_):
                raise TypeError(
                    f"{_text(where)} must give True or False, got {type(answer).__name__} for {path!r}: decide by "
                    "path, shape or dtype, which are known when a function is traced"
                )
        found = [i for i, answer in enumerate(answers) if answer]
    elif isinstance(where, Iterable):
        several = list(where)
        wrong = [path for path in several if not isinstance(path, str)]
        if wrong:
            raise TypeError(
                f"where must hold paths, got {wrong[0]!r:.100}: write them as text, such as 'head/bias', or give "
                "several choices as arguments of their own"
            )
        # One leaf may lie below two of the paths: they are one choice.
        return sorted({i for path in several for i in _below(path, paths)})
    else:
        raise TypeError(
            f"where must be a path, several paths, re.compile(...) or f(path, leaf) -> bool, got {where!r:.100}"
        )
    if not found:
        raise ValueError(f"{_text(where)} chooses no leaf: the paths are {_listing(paths)}")
    return found


def _below(path: str, paths: tuple[str, ...]) -> list[int]:
    """Indices of the leaf of that path, or of the leaves below it."""
    found = [i for i, other in enumerate(paths) if other == path or other.startswith(f"{path}/")]
    if not found:
        nodes = {"/".join(parts[: n + 1]) for parts in (other.split("/") for other in paths) for n in range(len(parts))}
        close = difflib.get_close_matches(path, sorted(nodes), 1)
        hint = f"did you mean {close[0]!r}?" if close else f"the paths are {_listing(paths)}"
        raise ValueError(f"{path!r} is no path of the tree: {hint}")
    return found


def _listing(paths: tuple[str, ...], most: int = 8) -> str:
    more = f" and {len(paths) - most} more" if len(paths) > most else ""
    return (", ".join(paths[:most]) or "none, for the tree has no leaves") + more


def _text(where: Any) -> str:
    if isinstance(where, re.Pattern):
        return f"the expression {where.pattern!r}"
    if callable(where):
        return f"the function {getattr(where, '__name__', type(where).__name__)}"
    return f"{where!r:.100}"
