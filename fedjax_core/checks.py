"""Checks of what a user hands in. Each error names the argument, the value and the fix.

A check that needs a value is made only where the value is concrete: under `jit` or `vmap` a hyper-parameter or
an id may be a tracer, and then only its shape and type can be checked.
"""

import math
from typing import Any

import jax
import numpy as np


def is_concrete(value: Any) -> bool:
    """Whether the value can be looked at now (it is not a tracer)."""
    return not isinstance(value, jax.core.Tracer)


def positive_int(name: str, value: Any, fix: str) -> int:
    """Returns `value` as an int of at least 1, or raises ValueError."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}: {fix}")
    return int(value)


def scalar(
    name: str,
    value: Any,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    low_open: bool = False,
    high_open: bool = False,
) -> Any:
    """Returns a float hyper-parameter unchanged after checking it lies in its interval (tracers pass)."""
    if not is_concrete(value):
        return value
    array = np.asarray(value)
    if array.shape != () or not np.issubdtype(array.dtype, np.number):
        raise ValueError(f"{name} must be a number, got {value!r}: pass a float or a 0-d array")
    number = float(array)
    below = number <= low if low_open else number < low
    above = number >= high if high_open else number > high
    if math.isnan(number) or below or above:
        left, right = "(" if low_open else "[", ")" if high_open else "]"
        raise ValueError(
            f"{name} must lie in {left}{low:g}, {high:g}{right}, got {number:g}: choose a value in that interval"
        )
    return value


def one_of(name: str, value: Any, choices: tuple[str, ...]) -> str:
    """Returns `value` if it is one of the choices, or raises ValueError."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}: pick one of them")
    return value


def leading_axis(examples: Any, name: str = "examples") -> int:
    """The common length of the leading axes of a pytree's leaves, or ValueError if they differ."""
    leaves = jax.tree_util.tree_flatten_with_path(examples)[0]
    if not leaves:
        raise ValueError(f"{name} is a pytree without arrays: pass for example {{'x': inputs, 'y': labels}}")
    sizes = {}
    for path, leaf in leaves:
        shape = np.shape(leaf)
        if not shape:
            raise ValueError(
                f"{name}{jax.tree_util.keystr(path)} is a scalar, but every leaf needs a leading axis of "
                "examples: give it shape [n, ...]"
            )
        sizes[jax.tree_util.keystr(path)] = shape[0]
    if len(set(sizes.values())) > 1:
        listing = ", ".join(f"{name}{path} has {size}" for path, size in sizes.items())
        raise ValueError(f"the leading axes of {name} differ ({listing}): every leaf needs one row per example")
    return next(iter(sizes.values()))


def finite(examples: Any, name: str = "examples") -> None:
    """Raises ValueError if a float leaf holds NaN or infinity, saying where the first one is."""
    for path, leaf in jax.tree_util.tree_flatten_with_path(examples)[0]:
        if not is_concrete(leaf):
            continue
        array = np.asarray(leaf)
        if np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all():
            bad = np.argwhere(~np.isfinite(array))
            where = tuple(int(i) for i in bad[0])
            raise ValueError(
                f"{name}{jax.tree_util.keystr(path)} holds {len(bad)} values that are NaN or infinite, the first "
                f"at index {where}: clean or drop those examples"
            )


def labels(values: Any, num_classes: int, name: str = "labels") -> None:
    """Raises ValueError unless `values` are integers in [0, num_classes)."""
    array = np.asarray(values)
    if not np.issubdtype(array.dtype, np.integer):
        raise ValueError(
            f"{name} must be integers, got dtype {array.dtype}: encode the classes as 0..{num_classes - 1}"
        )
    outside = np.flatnonzero((array < 0) | (array >= num_classes))
    if outside.size:
        first = int(outside[0])
        raise ValueError(
            f"{name} must lie in [0, {num_classes}), got {array.reshape(-1)[first]} at position {first} "
            f"({outside.size} in all): fix the labels or raise num_classes"
        )


def same_structure(name: str, value: Any, expected: Any, expected_name: str) -> None:
    """Raises ValueError unless two pytrees have the same structure, shapes and dtypes, naming the first difference."""
    value_leaves = dict(jax.tree_util.tree_flatten_with_path(value)[0])
    expected_leaves = dict(jax.tree_util.tree_flatten_with_path(expected)[0])
    for path in [*expected_leaves, *value_leaves]:
        where = jax.tree_util.keystr(path)
        if path not in value_leaves or path not in expected_leaves:
            has, lacks = (expected_name, name) if path in expected_leaves else (name, expected_name)
            raise ValueError(
                f"{name} and {expected_name} have different structures: {has} has the leaf {where}, {lacks} does "
                "not; build both from the same model"
            )
        got, want = value_leaves[path], expected_leaves[path]
        if np.shape(got) != np.shape(want) or jax.numpy.result_type(got) != jax.numpy.result_type(want):
            raise ValueError(
                f"{name}{where} is {jax.numpy.result_type(got)}{list(np.shape(got))} but {expected_name}{where} is "
                f"{jax.numpy.result_type(want)}{list(np.shape(want))}: build both from the same model"
            )
