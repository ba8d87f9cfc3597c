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

import jax.numpy as jnp

from fedjax_core import checks
from fedjax_core.types import Array


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


def call(function: Callable[..., Any], params: Any, examples: Any, *rest: Any, mask: Array | None = None) -> Any:
    """`function(params, examples, *rest)`, with the mask if the function takes one.

    Args:
      function: a loss, a metric, or what else looks at a batch.
      params: its first argument.
      examples: its second, leaves [B, ...].
      *rest: further arguments, such as the key.
      mask: bool[B]; every row is an example unless given.
    """
    if not takes_mask(function):
        return function(params, examples, *rest)
    if mask is None:
        mask = jnp.ones(checks.leading_axis(examples), bool)
    return function(params, examples, *rest, mask=mask)


def _parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    try:
        return dict(inspect.signature(function, follow_wrapped=False).parameters)
    except (TypeError, ValueError):  # functions without a signature, as some written in C
        return {}
