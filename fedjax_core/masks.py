"""What losses and metrics are given besides a batch, where they have a parameter for it: its mask, public data.

The library leaves padding out of every mean by itself, which is enough for a function that looks at one example at a
time. Batch normalization, in-batch contrastive losses and the like look at all rows of a batch, and take padding for
examples unless they are told. Such a function has a parameter named `mask`, and is then given bool[B], False in the
rows that are padding: `loss_fn(params, batch, key, mask)`, `metric_fn(params, batch, mask)`.

A function with a parameter named `public` is given the public data of the population (`Population.with_public`): the
frozen part of a pretrained model, say, on which any method then trains adapters. It is an argument of the compiled
round, of which there is one for all clients, lanes and seeds.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import KeyPath

from fedjax_core import checks
from fedjax_core.types import Array, Examples, Params, PyTree

_PUBLIC: ContextVar[PyTree] = ContextVar("public", default=())


@contextmanager
def with_public(public: PyTree) -> Iterator[None]:
    """Inside, functions with a parameter `public` are given this."""
    token = _PUBLIC.set(public)
    try:
        yield
    finally:
        _PUBLIC.reset(token)


def takes_mask(function: Callable[..., Any]) -> bool:
    """Whether a function has a parameter `mask` that can be given by name and that is not bound yet.

    Seen through `functools.partial`, `functools.wraps`, JAX's transformations and objects that can be called.
    """
    return takes_argument(function, "mask")


def takes_argument(function: Callable[..., Any], name: str) -> bool:
    """The same of a parameter of any name."""
    inner: Any = function
    while isinstance(inner, partial):
        if name in inner.keywords:
            return False
        inner = inner.func
    outside = _parameters(function)
    if name in outside:
        return outside[name].kind is not inspect.Parameter.POSITIONAL_ONLY
    # A decorator that hands on whatever it is given, around a function that has the parameter.
    hands_on = not outside or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in outside.values())
    wrapped = getattr(inner, "__wrapped__", None)
    return hands_on and wrapped is not None and takes_argument(wrapped, name)


def call(
    function: Callable[..., Any],
    params: Params,
    examples: Examples,
    *rest: Any,
    mask: Array | None = None,
    name: str = "",
) -> PyTree:
    """`function(params, examples, *rest)`, with the mask and with public data if the function takes them.

    Args:
      function: a loss, a metric, or what else looks at a batch.
      params: its first argument.
      examples: its second, leaves [B, ...].
      *rest: further arguments, such as the key.
      mask: bool[B]; every row is an example unless given.
      name: what the function is called in messages; its own name unless given.

    Raises:
      TypeError: if it is no function of these arguments, or takes public data and there is none. What it raises itself
        gets a note with what it was given.
    """
    given = named_arguments(function)
    name = name or getattr(function, "__name__", "function")
    arguments = ("params", "batch", "key")[: 2 + len(rest)]
    example = f"a function ({', '.join(arguments)}) of one value per example"
    checks.takes(name, function, arguments, example=example, named=given)
    named: dict[str, Any] = {}
    if "mask" in given:
        named["mask"] = jnp.ones(checks.leading_axis(examples), bool) if mask is None else mask
    if "public" in given:
        named["public"] = _PUBLIC.get()
        if not jax.tree.leaves(named["public"]):
            raise TypeError(
                f"{name} takes public data, and there is none: pass a population with some, "
                "population.with_public(tree), or evaluate with public="
            )
    try:
        return function(params, examples, *rest, **named)
    except Exception as error:
        note = f"{name} was called with params {_shapes(params)} and a batch {_shapes(examples)}"
        if note not in getattr(error, "__notes__", ()):
            error.add_note(note)
        raise


def named_arguments(function: Callable[..., Any]) -> tuple[str, ...]:
    """Which of "mask" and "public" a function takes."""
    return tuple(name for name in ("mask", "public") if takes_argument(function, name))


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
