"""The mask of a batch, for losses and metrics that look at the whole batch.

The library leaves padding out of every mean by itself, which is enough for a function that looks at one example at a
time. Batch normalization, in-batch contrastive losses and the like look at all rows of a batch, and take padding for
examples unless they are told. Such a function has a parameter named `mask`, and is then given bool[B], False in the
rows that are padding: `loss_fn(params, batch, key, mask)`, `metric_fn(params, batch, mask)`.
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import KeyPath

from fedjax_core import checks
from fedjax_core.types import Array, Examples, Params, PyTree


def takes_mask(function: Callable[..., Any]) -> bool:
    """Whether a function has a parameter `mask` that can be given by name and that is not bound yet.

    Seen through `functools.partial`, `functools.wraps`, JAX's transformations and objects that can be called.
    """
    inner: Any = function
    while isinstance(inner, partial):
        if "mask" in inner.keywords:
            return False
        inner = inner.func
    outside = _parameters(function)
    if "mask" in outside:
        return outside["mask"].kind is not inspect.Parameter.POSITIONAL_ONLY
    # A decorator that hands on whatever it is given, around a function that has the parameter.
    hands_on = not outside or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in outside.values())
    wrapped = getattr(inner, "__wrapped__", None)
    return hands_on and wrapped is not None and takes_mask(wrapped)


def call(
    function: Callable[..., Any],
    params: Params,
    examples: Examples,
    *rest: Any,
    mask: Array | None = None,
    name: str = "",
) -> PyTree:
    """`function(params, examples, *rest)`, with the mask if the function takes one.

    Args:
      function: a loss, a metric, or what else looks at a batch.
      params: its first argument.
      examples: its second, leaves [B, ...].
      *rest: further arguments, such as the key.
      mask: bool[B]; every row is an example unless given.
      name: what the function is called in messages; its own name unless given.

    Raises:
      TypeError: if it is no function of these arguments. What it raises itself gets a note with what it was given.
    """
    masked = takes_mask(function)
    name = name or getattr(function, "__name__", "function")
    arguments = ("params", "batch", "key")[: 2 + len(rest)]
    example = f"a function ({', '.join(arguments)}) of one value per example"
    checks.takes(name, function, arguments, example=example, mask=masked)
    if masked and mask is None:
        mask = jnp.ones(checks.leading_axis(examples), bool)
    try:
        return function(params, examples, *rest, **({"mask": mask} if masked else {}))
    except Exception as error:
        note = f"{name} was called with params {_shapes(params)} and a batch {_shapes(examples)}"
        if note not in getattr(error, "__notes__", ()):
            error.add_note(note)
        raise


def _shapes(tree: PyTree) -> str:
    """The leaves of a pytree, as many as fit on a line."""

    def one(path: KeyPath, leaf: PyTree) -> str:
        kind = f"{leaf.dtype}{list(leaf.shape)}" if hasattr(leaf, "dtype") else type(leaf).__name__
        return f"{jax.tree_util.keystr(path)} {kind}".strip()

    leaves = [one(path, leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]]
    return "{" + ", ".join([*leaves[:8], *(["..."] if len(leaves) > 8 else [])]) + "}"


def _parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    try:
        return dict(inspect.signature(function, follow_wrapped=False).parameters)
    except (TypeError, ValueError):  # functions without a signature, such as some written in C
        return {}
