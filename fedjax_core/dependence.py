"""Whether a loss looks at other examples of its batch, found by following the batch axis through its program.

What is followed is which axis of each array holds the examples. A sum over that axis, a product of two such arrays that
pairs examples, a sort along it: from there on a value is made of several examples. Operations whose effect on the axis
is not known here (a gather, a loop) end the search without a finding, so that what is found is there.
"""

import math
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import jax
import jax.extend.core as extend

from fedjax_core import masks
from fedjax_core.types import Array, Examples, Key, Params

ALONE, MIXED, UNKNOWN = "alone", "mixed", "unknown"
"""Of an array: made of no example; of several at once; not known. Else the number of the axis of the examples."""

Kind = str | int

# fmt: off
_ELEMENTWISE = {
    "abs", "acos", "acosh", "add", "add_any", "and", "asin", "asinh", "atan", "atan2", "atanh", "cbrt", "ceil",
    "clamp", "convert_element_type", "copy", "copy_p", "cos", "cosh", "digamma", "div", "eq", "erf", "erf_inv",
    "erfc", "exp", "exp2", "expm1", "floor", "ge", "gt", "integer_pow", "is_finite", "le", "lgamma", "log",
    "log1p", "logistic", "lt", "max", "min", "mul", "ne", "neg", "nextafter", "not", "optimization_barrier", "or",
    "pow", "reduce_precision", "rem", "round", "rsqrt", "select_n", "sign", "sin", "sinh", "sqrt", "square",
    "stop_gradient", "sub", "tan", "tanh", "xor",
}
# fmt: on
_ALONG_ONE_AXIS = {"cumsum": "axis", "cumprod": "axis", "cummax": "axis", "cummin": "axis", "cumlogsumexp": "axis"}

_looked_at: "weakref.WeakSet[Any]" = weakref.WeakSet()


def losses_of(loss_fn: Callable[..., Array], params: Params, examples: Examples, key: Key, mask: Array) -> Any:
    """What a loss returns, which should be float[B]; warns of one that takes no mask and looks at the whole batch.

    A loss is looked at when it is first traced, and what was traced is what is computed then: it is not traced again to
    be looked at. What cannot be looked at passes.

    Args:
      loss_fn: `loss_fn(params, examples, key) -> float[B]`, with a mask if it takes one.
      params: its arguments, or tracers.
      examples: leaves [B, ...].
      key: a key.
      mask: bool[B].
    """
    if not _is_due(loss_fn):
        return masks.call(loss_fn, params, examples, key, mask=mask, name="loss_fn")
    try:
        closed = _traced(loss_fn, params, examples, key)
    except Exception:  # called as it is, it says what is wrong, or works on numbers alone
        return masks.call(loss_fn, params, examples, key, mask=mask, name="loss_fn")
    found = _mixed_by(closed, params, examples, key)
    if found:
        warnings.warn(
            f"loss_fn makes the loss of an example of other examples of the batch too ({found}), and where a batch is "
            "padded, padding counts among them: give it a parameter mask, bool[B], and leave out the rows where it is "
            "False (fedjax_core.masks), or make it a Task",
            stacklevel=3,
        )
    return extend.jaxpr_as_fun(closed)(*jax.tree.leaves((params, examples, key)))[0]


def mixes(loss_fn: Callable[..., Array], params: Params, examples: Examples, key: Key) -> str:
    """The operation by which a loss puts examples together, or "" if none is found; arguments as above."""
    return _mixed_by(_traced(loss_fn, params, examples, key), params, examples, key)


def _is_due(loss_fn: Callable[..., Array]) -> bool:
    """Whether a loss takes no mask and is seen for the first time."""
    try:
        if loss_fn in _looked_at or masks.takes_mask(loss_fn):
            return False
        _looked_at.add(loss_fn)
    except TypeError:  # no hash or no weak reference
        return False
    return True


def _traced(loss_fn: Callable[..., Array], *arguments: Any) -> Any:
    """The program of a loss, whose one result is an array; it may close over tracers."""

    def shape(leaf: Any) -> Any:
        kind = jax.typeof(leaf)
        return jax.ShapeDtypeStruct(kind.shape, kind.dtype, weak_type=kind.weak_type)

    def losses(params: Params, examples: Examples, key: Key) -> Array:
        values = masks.call(loss_fn, params, examples, key, name="loss_fn")
        if not isinstance(values, jax.Array):
            raise TypeError("no array")
        return values

    return jax.make_jaxpr(losses)(*jax.tree.map(shape, arguments))


def _mixed_by(closed: Any, params: Params, examples: Examples, key: Key) -> str:
    counts = [len(jax.tree.leaves(tree)) for tree in (params, examples, key)]
    kinds: list[Kind] = [ALONE] * counts[0] + [0] * counts[1] + [ALONE] * counts[2]
    by: list[str] = []
    try:
        results = _follow(closed.jaxpr, kinds, by)
    except Exception:  # an operation that is built in another way than is known here
        return ""
    return by[0] if MIXED in results and by else ""


def _follow(jaxpr: Any, kinds: list[Kind], by: list[str]) -> list[Kind]:
    """The kinds of a program's results, from those of its arguments; `by` is told what puts examples together."""
    known: dict[Any, Kind] = dict(zip(jaxpr.invars, kinds, strict=True))

    def of(atom: Any) -> Kind:
        return ALONE if isinstance(atom, extend.Literal) else known.get(atom, ALONE)

    for equation in jaxpr.eqns:
        arguments = [of(atom) for atom in equation.invars]
        if all(kind == ALONE for kind in arguments):
            continue
        inner = next((equation.params[n] for n in ("jaxpr", "call_jaxpr", "fun_jaxpr") if n in equation.params), None)
        if MIXED in arguments:
            results: list[Kind] = [MIXED] * len(equation.outvars)
        elif UNKNOWN in arguments:
            results = [UNKNOWN] * len(equation.outvars)
        elif inner is not None and len(_open(inner).invars) == len(arguments):
            name = equation.primitive.name
            one_call = name not in ("scan", "while", "cond")
            results = _follow(_open(inner), arguments, by) if one_call else [UNKNOWN] * len(equation.outvars)
        else:
            kind = _one(equation, arguments)
            results = [kind] * len(equation.outvars)
            if kind == MIXED:
                by.append(equation.primitive.name)
        known.update(zip(equation.outvars, results, strict=True))
    return [of(atom) for atom in jaxpr.outvars]


def _open(jaxpr: Any) -> Any:
    return jaxpr.jaxpr if isinstance(jaxpr, extend.ClosedJaxpr) else jaxpr


def _one(equation: Any, arguments: list[Kind]) -> Kind:
    """Kind of the result of one operation, some of whose arguments hold examples along an axis and the rest none."""
    name, params = equation.primitive.name, equation.params
    axes = {kind for kind in arguments if isinstance(kind, int)}
    if name == "dot_general":
        return _product(params["dimension_numbers"], arguments, [atom.aval.ndim for atom in equation.invars])
    if name in _ELEMENTWISE:
        return axes.pop() if len(axes) == 1 else MIXED
    if name == "concatenate":
        return axes.pop() if len(axes) == 1 and params["dimension"] not in axes else UNKNOWN
    if len(axes) != 1 or not isinstance(arguments[0], int):
        return UNKNOWN
    axis = arguments[0]
    old, new = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
    if name.startswith("reduce_") or name in ("argmax", "argmin"):
        over = params["axes"]
        return MIXED if axis in over else axis - sum(other < axis for other in over)
    if name == "sort":
        return MIXED if params["dimension"] == axis else axis
    if name in _ALONG_ONE_AXIS:
        return MIXED if params[_ALONG_ONE_AXIS[name]] == axis else axis
    if name == "broadcast_in_dim":
        return int(params["broadcast_dimensions"][axis])
    if name == "transpose":
        return int(params["permutation"].index(axis))
    if name == "squeeze":
        return axis - sum(other < axis for other in params["dimensions"])
    if name == "reshape":
        before = math.prod(old[:axis])
        same = (i for i in range(len(new)) if math.prod(new[:i]) == before and new[i] == old[axis])
        return next(same, UNKNOWN)
    if name == "conv_general_dilated":
        numbers = params["dimension_numbers"]
        return int(numbers.out_spec[0]) if numbers.lhs_spec[0] == axis and params["batch_group_count"] == 1 else UNKNOWN
    if name in ("slice", "pad", "rev", "dynamic_slice") and len(old) == len(new):
        untouched = old[axis] == new[axis] and not (name == "rev" and axis in params["dimensions"])
        return axis if untouched else UNKNOWN
    return UNKNOWN


def _product(numbers: Any, arguments: list[Kind], ndims: list[int]) -> Kind:
    """Kind of a `dot_general`; its results have the common axes first, then those of the left, then of the right."""
    contracted, common = numbers
    places: list[int] = []
    for side, kind in enumerate(arguments):
        if not isinstance(kind, int):
            continue
        if kind in contracted[side]:
            return MIXED
        if kind in common[side]:
            places.append(list(common[side]).index(kind))
            continue
        free = [i for i in range(ndims[side]) if i not in contracted[side] and i not in common[side]]
        others = ndims[0] - len(contracted[0]) - len(common[0]) if side else 0
        places.append(len(common[side]) + others + free.index(kind))
    return places[0] if len(set(places)) == 1 else MIXED
