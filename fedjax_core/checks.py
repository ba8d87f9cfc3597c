"""Checks of a user's arguments. Each error names the argument, the value and the fix.

A check that needs a value is made only where the value is concrete: under `jit` or `vmap` a hyper-parameter or
an id may be a tracer, and then only its shape and type can be checked.
"""

import difflib
import inspect
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from fedjax_core.types import ArrayLike, Examples, Params, PyTree, Variables

LARGEST_INT = 2**31 - 1
"""Counts, sizes and client numbers are int32 on the device."""


def is_concrete(value: object) -> bool:
    """Whether the value can be looked at now (it is not a tracer)."""
    return not isinstance(value, jax.core.Tracer)


def positive_int(name: str, value: object, fix: str) -> int:
    """Returns `value` as an int from 1 to 2^31 - 1, or raises ValueError."""
    return _int(name, value, fix, 1)


def count(name: str, value: object, fix: str) -> int:
    """Returns `value` as an int from 0 to 2^31 - 1, or raises ValueError."""
    return _int(name, value, fix, 0)


def _int(name: str, value: object, fix: str, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r:.200}: {fix}")
    if value > LARGEST_INT:
        raise ValueError(f"{name} must be at most {LARGEST_INT}, which int32 can hold, got {value!r}: lower it")
    return int(value)


def scalar(
    name: str,
    value: object,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    low_open: bool = False,
    high_open: bool = False,
    finite: bool = True,
) -> Any:
    """Returns a float hyper-parameter unchanged after checking it lies in its interval (tracers pass).

    Infinity is refused unless `finite` is false, and so is what becomes infinite in the precision that JAX computes in.
    """
    if not is_concrete(value):
        return value
    array = np.asarray(value)
    if array.shape != () or not (jnp.issubdtype(array.dtype, np.floating) or jnp.issubdtype(array.dtype, np.integer)):
        raise ValueError(f"{name} must be a number, got {value!r:.200}: pass a float or a 0-d array")
    number = float(array)
    below = number <= low if low_open else number < low
    above = number >= high if high_open else number > high
    if math.isnan(number) or below or above:
        left, right = "(" if low_open else "[", ")" if high_open else "]"
        raise ValueError(
            f"{name} must lie in {left}{low:g}, {high:g}{right}, got {number:g}: choose a value in that interval"
        )
    largest = float(jnp.finfo(jnp.result_type(float)).max)
    if finite and abs(number) > largest:
        raise ValueError(f"{name} must be at most {largest:g} in size, got {number:g}: choose a finite number")
    return value


def one_of(name: str, value: object, choices: tuple[str, ...]) -> str:
    """Returns `value` if it is one of the choices, or raises ValueError."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}: pick one of them")
    return value


def leading_axis(examples: Examples, name: str = "examples") -> int:
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


def numbers(examples: Examples, name: str = "examples") -> None:
    """Raises TypeError for a leaf that JAX cannot hold as numbers (objects, strings, dates), naming it."""
    for path, leaf in jax.tree_util.tree_flatten_with_path(examples)[0]:
        dtype = leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype
        if not (jnp.issubdtype(dtype, jax.dtypes.prng_key) or is_number(dtype)):
            raise TypeError(
                f"{name}{jax.tree_util.keystr(path)} has dtype {dtype}, which JAX cannot hold: pass numbers (encode "
                "classes and words as integers, drop fields that no loss reads)"
            )


def is_number(dtype: DTypeLike) -> bool:
    """Whether JAX computes with a dtype: booleans, integers, floats (bfloat16 and the like too) and complex numbers."""
    if dtype in (np.dtype(bool), *_EXTENDED):
        return True
    return np.dtype(dtype).kind in "iufc" and np.dtype(dtype).itemsize <= (16 if np.dtype(dtype).kind == "c" else 8)


_EXTENDED = tuple(
    np.dtype(getattr(jnp, kind))
    for kind in ("bfloat16", "int4", "uint4", "float8_e4m3fn", "float8_e5m2", "float8_e4m3b11fnuz")
    if hasattr(jnp, kind)
)


def finite(examples: Examples, name: str = "examples", fix: str = "clean or drop those examples") -> None:
    """Raises ValueError if a float or complex leaf holds NaN or infinity, saying where the first one is."""
    for path, leaf in jax.tree_util.tree_flatten_with_path(examples)[0]:
        if not is_concrete(leaf):
            continue
        array = np.asarray(leaf)
        if not jnp.issubdtype(array.dtype, np.inexact):
            continue
        if array.dtype.kind not in "fc":
            array = array.astype(np.float32)  # numpy cannot ask bfloat16
        if not np.isfinite(array).all():
            bad = np.argwhere(~np.isfinite(array))
            where = tuple(int(i) for i in bad[0])
            raise ValueError(
                f"{name}{jax.tree_util.keystr(path)} holds {len(bad)} values that are NaN or infinite, the first "
                f"at index {where}: {fix}"
            )


def narrowed(dtype: DTypeLike) -> np.dtype | None:
    """The dtype that a 64-bit one becomes on the device, or None if it stays what it is (as with x64 enabled)."""
    if jnp.issubdtype(dtype, jax.dtypes.extended):
        return None
    there = jax.dtypes.canonicalize_dtype(dtype)
    return None if there == dtype else np.dtype(there)


def fits(tree: PyTree, name: str = "examples") -> None:
    """Raises ValueError if a number changes on its way to the device, where 64-bit leaves become 32-bit ones.

    One pass over the leaves of 64 bits. Integers must fit; floats must not become infinite (fewer digits are fine).
    """
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        if not is_concrete(leaf) or isinstance(leaf, jax.Array):
            continue
        array = np.asarray(leaf)
        there = narrowed(array.dtype)
        if there is None or array.size == 0:
            continue
        if array.dtype.kind in "iu":
            limits = np.iinfo(there)
            outside = next((v for v in (array.max(), array.min()) if not limits.min <= int(v) <= limits.max), None)
            fix = "number them anew from 0"
        else:
            most = np.finfo(there).max
            parts = (array.real, array.imag) if array.dtype.kind == "c" else (array,)
            # fmin and fmax pass over NaN, and infinities were there before.
            extremes = [v for part in parts for v in (np.fmax.reduce(part, None), np.fmin.reduce(part, None))]
            outside = next((v for v in extremes if abs(v) > most), None)
            if outside is not None and np.isinf(outside):
                beyond = np.concatenate([np.ravel(part) for part in parts])
                beyond = beyond[np.isfinite(beyond) & (np.abs(beyond) > most)]
                outside = beyond[0] if beyond.size else None
            fix = "scale them"
        if outside is not None:
            raise ValueError(
                f"{name}{jax.tree_util.keystr(path)} holds {outside}, which does not fit into the {there} that "
                f"{array.dtype} becomes on the device: {fix}, or enable 64 bits with "
                'jax.config.update("jax_enable_x64", True)'
            )


def client_numbers(ids: ArrayLike, name: str = "ids") -> np.ndarray | jax.Array:
    """`ids` as an array int[C], a numpy or a JAX one, or ValueError.

    Raises:
      ValueError: for another dtype or shape, or no entry at all.
    """
    if not isinstance(ids, jax.Array | np.ndarray):
        if any(not is_concrete(leaf) for leaf in jax.tree.leaves(ids)):
            ids = jnp.asarray(ids)
        else:
            try:
                ids = (
                    np.asarray(ids, np.int64)
                    if isinstance(ids, list | tuple | range) and not len(ids)
                    else np.asarray(ids)
                )
            except (TypeError, ValueError, OverflowError):
                raise ValueError(
                    f"{name} must be a 1-d array of integers, got {type(ids).__name__} {ids!r:.60}: pass client numbers"
                ) from None
    shape, dtype = ids.shape, ids.dtype
    if len(shape) != 1 or not jnp.issubdtype(dtype, np.integer):
        mask = ", numpy.flatnonzero(mask) for a mask" if np.dtype(dtype).kind == "b" else ""
        raise ValueError(
            f"{name} must be a 1-d array of integers, got {dtype}{list(shape)}: pass client numbers, -1 for an "
            f"empty slot{mask}"
        )
    if shape[0] == 0:
        raise ValueError(f"{name} is empty: a cohort has at least one slot, pass [-1] for a round without participants")
    return ids


def params(params: Params, name: str = "params") -> Params:
    """The parameters of a model as JAX arrays, or an error that names the leaf that is none.

    Parameters are a pytree of floating-point arrays (Python floats count): every one of them is trained and averaged.
    Whatever else a model needs does not belong there: tables of integers and masks are closed over or part of the
    examples, running statistics have no gradient.

    Raises:
      TypeError: for an object that is no pytree of arrays, a leaf that is no array of real floats, and for
        collections of state beside or among the parameters (flax `batch_stats`, nnx `BatchStat`, equinox `State`).
      ValueError: for no arrays at all, or a number that does not fit into the dtype it has on the device.
    """
    other = misplaced(params)
    if other is not None:
        raise TypeError(
            f"{name} must be a pytree of arrays, got {other}: pass the parameters of a model (those of a state are "
            "algorithm.params(state)); the order of arguments is (params, population, key)"
        )
    if isinstance(params, Variables):
        raise TypeError(
            f"{name} has statistics beside the parameters, which the method alone would leave as they are: wrap it, "
            "fedjax_core.with_statistics(method, 'average'), or 'personal' or 'frozen'"
        )
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    _no_model_state(name, params)
    for path, leaf in leaves:
        where = name + jax.tree_util.keystr(path)
        if isinstance(leaf, jax.Array | np.ndarray | np.generic | float):
            dtype = leaf.dtype if hasattr(leaf, "dtype") else np.dtype(np.float64)
            if not jnp.issubdtype(dtype, np.floating) or not is_number(dtype):
                raise TypeError(f"{where} has dtype {dtype}{_instead_of(dtype)}")
        elif isinstance(leaf, int | complex):
            raise TypeError(f"{where} is {leaf!r}{_instead_of(np.asarray(leaf).dtype)}")
        elif not path:
            raise TypeError(
                f"{name} must be a pytree of arrays, got {described(leaf)}: pass the parameters themselves, such as "
                'model.init(key), the "params" of flax variables, or the first part of '
                "equinox.partition(model, equinox.is_inexact_array)"
            )
        else:
            raise TypeError(
                f"{where} is {described(leaf)}, and parameters are arrays: pass only those and close over the rest "
                "(of an equinox model, the first part of equinox.partition(model, equinox.is_inexact_array); of an nnx "
                "model, nnx.state(model, nnx.Param))"
            )
    if not leaves:
        raise ValueError(
            f"{name} is a pytree without arrays, {type(params).__name__} {params!r:.60}: pass the parameters that are "
            "to be trained"
        )
    fits(params, name)
    # With an explicit dtype: a weakly typed number would change its type inside a loop.
    arrays = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.result_type(leaf)), params)
    if not all_finite(arrays):
        finite(arrays, name, fix="a model that begins with them never recovers: initialize it anew")
    return arrays


def model(variables: PyTree) -> PyTree:
    """What a simulation begins with: parameters, or `Variables` if the method knows what becomes of statistics.

    Raises:
      TypeError, ValueError: as `params`; whether there may be statistics is for the method to say.
    """
    if isinstance(variables, Variables):
        return variables._replace(params=params(variables.params))
    return params(variables)


def all_finite(tree: PyTree) -> bool:
    """Whether no float that can be looked at is NaN or infinite: one number a leaf comes from the device."""
    with jax.ensure_compile_time_eval():  # also where a function that is compiled has closed over the arrays
        looked = [
            jnp.all(jnp.isfinite(leaf))
            for leaf in jax.tree.leaves(tree)
            if is_concrete(leaf) and jnp.issubdtype(leaf.dtype, np.inexact) and leaf.is_fully_addressable
        ]
        return all(map(bool, jax.device_get(looked)))


def _instead_of(dtype: DTypeLike) -> str:
    if jnp.issubdtype(dtype, np.complexfloating):
        return ", and gradient descent is for real numbers: keep real and imaginary part as two parameters"
    if jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return ", and a random key cannot be trained: take the key that the loss is given"
    return (
        ", and only floating-point arrays can be trained and averaged: leave it out of the parameters (close over it, "
        "or make it part of the examples), or make it float32 if it is to be trained"
    )


def described(leaf: object) -> str:
    """What a value is, for an error: a text, a function by its name, an object by its type."""
    if isinstance(leaf, str | bytes):
        return f"the text {leaf!r:.40}"
    kind = getattr(leaf, "__qualname__", None) if callable(leaf) else None
    return f"the function {kind}" if kind else f"an object of type {type(leaf).__name__}"


_STATE_COLLECTIONS = ("batch_stats", "cache", "intermediates", "losses", "perturbations", "state", "spectral_stats")
_STATE_TYPES = {
    ("flax", "BatchStat"): "running statistics of nnx",
    ("flax", "Cache"): "a cache of nnx",
    ("flax", "RngState"): "random state of nnx",
    ("flax", "Intermediate"): "an intermediate value of nnx",
    ("equinox", "State"): "state of equinox",
    ("equinox", "StateIndex"): "state of equinox",
}
_STATE_FIX = (
    "which no gradient changes and no method averages: pass the parameters alone, and normalize without running "
    "statistics, by flax.linen.GroupNorm or LayerNorm or by the statistics of each batch, or train a Task that has "
    "some (fedjax_core.with_statistics)"
)


def _no_model_state(name: str, params: Params) -> None:
    """Raises TypeError if the variables of a model hold more than its parameters."""

    def state_type(node: PyTree) -> str | None:
        kinds = ((kind.__module__.split(".")[0], kind.__name__) for kind in type(node).__mro__)
        return next((_STATE_TYPES[kind] for kind in kinds if kind in _STATE_TYPES), None)

    if isinstance(params, Mapping) and "params" in params:
        found = next((key for key in params if key in _STATE_COLLECTIONS), None)
        if found is not None:
            raise TypeError(
                f"{name} holds the collection {found!r} beside the parameters, {_STATE_FIX}; the parameters are "
                f"{name}['params']"
            )
    nodes = jax.tree_util.tree_flatten_with_path(params, is_leaf=lambda node: state_type(node) is not None)[0]
    for path, node in nodes:
        if any(getattr(key, "key", None) == "batch_stats" for key in path):
            raise TypeError(f"{name}{jax.tree_util.keystr(path)} is a running statistic, {_STATE_FIX}")
        kind = state_type(node)
        # Equinox leaves the places of state behind in a model whose state is kept apart: those are empty.
        if kind is not None and jax.tree.leaves(node):
            raise TypeError(f"{name}{jax.tree_util.keystr(path)} is {kind}, {_STATE_FIX}")


def function(name: str, value: object, example: str) -> None:
    """Raises TypeError unless `value` can be called."""
    if not callable(value):
        raise TypeError(f"{name} must be a function, got {described(value)}: pass {example}")


def takes(
    name: str, value: Callable[..., Any], arguments: tuple[str, ...], *, example: str, named: tuple[str, ...] = ()
) -> None:
    """Raises TypeError unless `value` is a function that can be called with these arguments, by position.

    Args:
      name: what it is called in the message.
      value: the function; one that does not tell its parameters passes.
      arguments: names of the arguments that it is given.
      example: what to pass instead.
      named: names of keyword arguments that it is given besides.
    """
    function(name, value, example)
    try:
        # As Python would call it: what a decorator has wrapped may take other arguments.
        signature = inspect.signature(value, follow_wrapped=False)
    except (TypeError, ValueError):  # it has no signature
        return
    try:
        signature.bind(*arguments, **dict.fromkeys(named))
    except TypeError:
        called = ", ".join([*arguments, *(f"{each}=..." for each in named)])
        raise TypeError(
            f"{name} is called with ({called}), but its parameters are {signature}: pass {example}"
        ) from None


def misplaced(value: object) -> str | None:
    """What a value is that stands in the place of another argument: one of the library's own objects, or a key."""
    if isinstance(value, Variables):  # a model
        return None
    if type(value).__module__.split(".")[0] in ("fedjax_core", "algorithms") and not inspect.isfunction(value):
        is_state = hasattr(value, "round") and hasattr(value, "_fields") and not callable(value.round)
        return f"the state {type(value).__name__}" if is_state else type(value).__name__
    if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        return "a random key"
    return None


def options(names: Iterable[str], known: Collection[str]) -> None:
    """Raises TypeError for a keyword argument that is not known, naming the nearest one that is."""
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else "leave it out, or see the method's own arguments."
            raise TypeError(f"there is no option {name}: {hint} Local training takes {', '.join(known)}")


def optimizer(name: str, value: object) -> Any:
    """Returns `value` if it is an optax optimizer, or raises TypeError."""
    if not is_optimizer(value):
        raise TypeError(f"{name} must be an optax optimizer, got {described(value)}: pass for example optax.sgd(0.1)")
    return value


def is_optimizer(value: object) -> bool:
    """Whether a value has the functions of an optax optimizer (a class that makes one has not)."""
    made = not inspect.isclass(value)
    return made and callable(getattr(value, "init", None)) and callable(getattr(value, "update", None))


def not_called(optimizer: Callable[..., Any]) -> bool:
    """Whether a function makes an optimizer from a learning rate (`optax.sgd`), not from the round."""
    try:
        first = next(iter(inspect.signature(optimizer).parameters), None)
    except (TypeError, ValueError):
        first = None
    inner = getattr(optimizer, "func", optimizer)  # of a functools.partial
    return (
        first in ("learning_rate", "lr", "rate", "step_size")
        or str(getattr(inner, "__module__", "")).split(".")[0] == "optax"
    )


def labels(values: ArrayLike, num_classes: int, name: str = "labels") -> None:
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


def same_structure(name: str, value: PyTree, expected: PyTree, expected_name: str) -> None:
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
