"""Convolutions and pooling in the form in which the processor's compiler is fast at them, for any model.

XLA's CPU backend has a fast convolution. It takes it where the images are NHWC, the kernel HWIO and no window reversed,
and it brings other convolutions into that form in the outermost computation only. A client's steps are a loop, and the
two gradients of a convolution are convolutions with other dimension numbers and a reversed kernel: there they fell to
a naive loop, some 20 times slower (https://github.com/jax-ml/jax/issues/12868). `rewritten` changes a traced program,
loops and all, so that it asks for the fast one: transposes, the canonical convolution, a transpose back, kept apart by
`optimization_barrier`, as the compiler would fold them into the convolution again. Kernels of one pixel become
products; sums over very many pixels (the gradients of kernels) are taken a few rows at a time; groups, such as the
clients of several lanes, one after the other; pooling over windows that do not overlap becomes slices.
`benchmarks/convolution.py` measures each choice.

All of it is inside `jax.lax.platform_dependent`: a program that is lowered for another platform (on a mesh of
accelerators, by `jax.export`, for a topology that is not there) has its convolutions as they were written, whatever
backend it was traced on.

Letters in shapes: N examples, S and T spatial axes of the input and output, K of the kernel, C input channels, F output
channels, G groups.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Primitive, jaxpr_as_fun
from jax.typing import DTypeLike

from fedjax_core.types import Array, PyTree

SHORT_SUM = 1024
"""A convolution that sums over far more numbers for each output is split into sums over about so many."""
FEW_PIXELS = 64
"""Windows of up to so many pixels are taken apart: those of pooling, and kernels of one channel."""


def rewritten(function: Callable[..., PyTree]) -> Callable[..., PyTree]:
    """The same function of arrays, with the convolutions and the pooling that it traces rewritten for the processor.

    Its results are equal but for the order of sums. It can be differentiated and mapped; what that adds to it is as
    JAX writes it, so rewrite last: `rewritten(jax.grad(loss))`. A function without convolutions and pooling is what it
    was, operation by operation.

    Args:
      function: of pytrees of arrays.
    """

    def call(*args: PyTree) -> PyTree:
        # From shapes alone, as in `execution.close_convert`.
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), leaf.dtype), args)
        closed, out = jax.make_jaxpr(function, return_shape=True)(*shapes)
        flat = jaxpr_as_fun(rewrite(closed))(*jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(out), flat)

    return call


def rewrite(closed: ClosedJaxpr) -> ClosedJaxpr:
    """A traced program with its convolutions and pooling rewritten, itself where it has none."""
    return _rewritten_value(closed, {})


def has_any(jaxpr: Jaxpr) -> bool:
    """Whether `rewrite` would change a traced program."""
    return _any_in(jaxpr)


# The traversal. A changed equation is exchanged in its place and nothing is traced anew, so that all else (types,
# effects, names, sharing of subprograms) stays.


def _any_in(value: Any) -> bool:
    if isinstance(value, Jaxpr):  # which a closed one is too from JAX 0.12 on
        return any(_replacement(eqn) is not None or any(map(_any_in, eqn.params.values())) for eqn in value.eqns)
    if isinstance(value, ClosedJaxpr):
        return _any_in(value.jaxpr)
    return isinstance(value, (tuple, list)) and any(map(_any_in, value))


def _rewritten_value(value: Any, done: dict[int, Any]) -> Any:
    """A parameter of an equation, with the programs in it rewritten; `done` holds those that were, by identity."""
    if isinstance(value, Jaxpr):
        if id(value) not in done:
            eqns = [_rewritten_equation(eqn, done) for eqn in value.eqns]
            same = all(new is old for new, old in zip(eqns, value.eqns, strict=True))
            done[id(value)] = value if same else value.replace(eqns=eqns)
        return done[id(value)]
    if isinstance(value, ClosedJaxpr):
        jaxpr = _rewritten_value(value.jaxpr, done)
        if jaxpr is value.jaxpr:
            return value
        if id(value) not in done:
            done[id(value)] = ClosedJaxpr(jaxpr, value.consts)
        return done[id(value)]
    if isinstance(value, tuple | list):
        new = [_rewritten_value(v, done) for v in value]
        return value if all(n is v for n, v in zip(new, value, strict=True)) else type(value)(new)
    return value


def _rewritten_equation(eqn: JaxprEqn, done: dict[int, Any]) -> JaxprEqn:
    replacement = _replacement(eqn)
    if replacement is not None:
        avals: list[Any] = [v.aval for v in eqn.invars]
        shapes = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in avals]
        (new,) = jax.make_jaxpr(replacement)(*shapes).jaxpr.eqns
        return eqn.replace(primitive=new.primitive, params=new.params)
    params = {name: _rewritten_value(value, done) for name, value in eqn.params.items()}
    same = all(params[name] is value for name, value in eqn.params.items())
    return eqn if same else eqn.replace(params=params)


def _replacement(eqn: JaxprEqn) -> Callable[..., Array] | None:
    """A jitted function of an equation's operands, to take its place, or None."""
    if eqn.primitive.name not in _REPLACEMENTS:
        return None
    applies, function = _REPLACEMENTS[eqn.primitive.name]
    avals = [v.aval for v in eqn.invars]
    if any(map(_varies_by_hand, avals)) or not applies(*avals, **eqn.params):
        return None
    return partial(_by_platform, function, eqn.primitive, tuple(eqn.params.items()))


def _varies_by_hand(aval: Any) -> bool:
    """Whether it is of a `shard_map` that checks what differs between devices: there a new operation would not pass."""
    manual = getattr(aval, "mat", None)
    return bool(manual.varying if manual is not None else getattr(aval, "vma", ()))


@partial(jax.jit, static_argnums=(0, 1, 2))
def _by_platform(function: Callable[..., Array], primitive: Primitive, params: Any, *operands: Array):
    return lax.platform_dependent(
        *operands, cpu=partial(function, **dict(params)), default=partial(primitive.bind, **dict(params))
    )


# Convolutions.


class _Window(NamedTuple):
    """How a kernel goes over the images, an entry for each spatial axis; as for `jax.lax.conv_general_dilated`."""

    window_strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    lhs_dilation: tuple[int, ...]
    rhs_dilation: tuple[int, ...]

    def positions(self, size: Sequence[int], kernel: Sequence[int]) -> tuple[int, ...]:
        """T for S and K."""
        return tuple(
            (sum(pads) + (s - 1) * dilation - (k - 1) * step) // stride + 1
            for s, k, stride, pads, dilation, step in zip(size, kernel, *self, strict=True)
        )


class _Dot(NamedTuple):
    """How products are summed."""

    precision: Any
    preferred_element_type: DTypeLike | None


def _is_convolution_of_floats(lhs: Any, rhs: Any, **params: Any) -> bool:
    del params
    return (
        lhs.dtype == rhs.dtype
        and jnp.issubdtype(lhs.dtype, jnp.floating)
        and 3 <= len(lhs.shape) <= 5
        and all(isinstance(size, int) and size > 0 for size in (*lhs.shape, *rhs.shape))
    )


def _convolution(
    lhs: Array,
    rhs: Array,
    *,
    dimension_numbers: lax.ConvDimensionNumbers,
    feature_group_count: int,
    batch_group_count: int,
    precision: Any,
    preferred_element_type: DTypeLike | None,
    **params: Any,
) -> Array:
    """`jax.lax.conv_general_dilated` as the processor likes it."""
    window = _Window(**{name: tuple(params[name]) for name in _Window._fields})
    dot = _Dot(precision, preferred_element_type)
    batch, channels, *spatial = dimension_numbers.lhs_spec
    lhs = lhs.transpose(batch, *spatial, channels)  # [N, S, C]
    features, channels, *spatial = dimension_numbers.rhs_spec
    rhs = rhs.transpose(*spatial, channels, features)  # [K, C, F]
    if feature_group_count > 1:
        out = _in_groups(_split(lhs, -1, feature_group_count), _split(rhs, -1, feature_group_count), window, dot)
    elif batch_group_count > 1:
        out = _in_groups(_split(lhs, 0, batch_group_count), _split(rhs, -1, batch_group_count), window, dot)
    else:
        out = _in_one(lhs, rhs, window, dot)
    batch, features, *spatial = dimension_numbers.out_spec
    return out.transpose(np.argsort([batch, *spatial, features]))


def _split(x: Array, axis: int, groups: int) -> Array:
    """An axis [G n] as a first axis [G], and [n] where it was."""
    axis %= x.ndim
    return jnp.moveaxis(x.reshape(*x.shape[:axis], groups, -1, *x.shape[axis + 1 :]), axis, 0)


def _in_groups(lhs: Array, rhs: Array, window: _Window, dot: _Dot) -> Array:
    """[G, N, S, C] and [G, K, C, F] to [N, T, G F]: one group after the other, which beats the compiler's groups."""
    kernel = rhs.shape[1:-2]
    positions = window.positions(lhs.shape[2:-1], kernel)
    if rhs.shape[-2:] == (1, 1) and math.prod(kernel) <= min(math.prod(positions), FEW_PIXELS):
        return _of_one_channel(lhs[..., 0], rhs[..., 0, 0], window, dot)
    # A loop, and not one convolution after the other in the program: that is up to 1.3 times as fast for four groups,
    # and takes several times as long to compile.
    out = lax.map(lambda pair: _in_one(pair[0], pair[1], window, dot), (lhs, rhs))
    return jnp.moveaxis(out, 0, -2).reshape(*out.shape[1:-1], -1)


def _of_one_channel(lhs: Array, rhs: Array, window: _Window, dot: _Dot) -> Array:
    """A depthwise convolution by small kernels, element by element. [G, N, S] and [G, K] to [N, T, G]."""
    x, kernel = _padded(jnp.moveaxis(lhs, 0, -1), window), jnp.moveaxis(rhs, 0, -1)
    positions = window.positions(lhs.shape[2:], kernel.shape[:-1])
    dtype = dot.preferred_element_type or lhs.dtype
    total: Array | float = 0.0
    for pixel in itertools.product(*map(range, kernel.shape[:-1])):
        first = [k * step for k, step in zip(pixel, window.rhs_dilation, strict=True)]
        last = [f + (n - 1) * s + 1 for f, n, s in zip(first, positions, window.window_strides, strict=True)]
        part = lax.slice(x, [0, *first, 0], [x.shape[0], *last, x.shape[-1]], [1, *window.window_strides, 1])
        total = total + part.astype(_wide(dtype)) * kernel[pixel].astype(_wide(dtype))
    return jnp.asarray(total, dtype)


def _wide(dtype: DTypeLike) -> DTypeLike:
    """What sums of a dtype are taken in where they are taken in parts."""
    return jnp.promote_types(dtype, jnp.float32)


def _in_one(lhs: Array, rhs: Array, window: _Window, dot: _Dot) -> Array:
    """[N, S, C] and [K, C, F] to [N, T, F]."""
    kernel = rhs.shape[:-2]
    positions = math.prod(window.positions(lhs.shape[1:-1], kernel))
    if math.prod(kernel) == 1:
        return _of_one_pixel(lhs, rhs, window, dot)
    if positions == 1:
        return _at_one_position(lhs, rhs, window, dot)
    if math.prod(kernel) > positions and math.prod(rhs.shape[:-1]) >= 2 * SHORT_SUM:
        return _by_rows(lhs, rhs, window, dot)
    return _canonical(lhs, rhs, window, dot)


def _canonical(lhs: Array, rhs: Array, window: _Window, dot: _Dot) -> Array:
    """What the compiler has a fast convolution for."""
    letters = "XYZ"[: lhs.ndim - 2]
    # Without the barriers, transposes and the reversal of a kernel become part of the convolution again.
    lhs, rhs = lax.optimization_barrier((lhs, rhs))
    numbers = (f"N{letters}C", f"{letters}IO", f"N{letters}C")
    out = lax.conv_general_dilated(lhs, rhs, **window._asdict(), dimension_numbers=numbers, **dot._asdict())
    return lax.optimization_barrier(out)


def _of_one_pixel(lhs: Array, rhs: Array, window: _Window, dot: _Dot) -> Array:
    """A kernel of one pixel is a matrix. Where images are dilated it comes before the zeros between their pixels."""
    matrix = rhs.reshape(rhs.shape[-2:])

    def product(x: Array) -> Array:
        return jnp.matmul(x.reshape(-1, x.shape[-1]), matrix, **dot._asdict()).reshape(*x.shape[:-1], -1)

    dilated = any(d > 1 for d in window.lhs_dilation)
    out = _strided(_padded(product(lhs) if dilated else lhs, window), window.window_strides)
    return out if dilated else product(out)


def _at_one_position(lhs: Array, rhs: Array, window: _Window, dot: _Dot) -> Array:
    """A kernel that goes nowhere: one product over all of its pixels. [N, S, C] and [K, C, F] to [N, 1, F]."""
    steps = window.rhs_dilation
    last = [(k - 1) * step + 1 for k, step in zip(rhs.shape[:-2], steps, strict=True)]
    x = _padded(lhs, window)
    x = _strided(lax.slice(x, [0] * x.ndim, [x.shape[0], *last, x.shape[-1]]), steps)
    # In the order [C, K, N], that of the images of a kernel's gradient as JAX writes it, so nothing moves in memory.
    x, y = x.transpose(x.ndim - 1, *range(1, x.ndim - 1), 0), jnp.moveaxis(rhs, -2, 0)
    x, y = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
    out = lax.dot_general(x, y, (((0,), (0,)), ((), ())), **dot._asdict())
    return out.reshape(out.shape[0], *[1] * len(steps), -1)


def _by_rows(lhs: Array, rhs: Array, window: _Window, dot: _Dot) -> Array:
    """Few outputs that are long sums, such as the gradient of a kernel: a few rows of the large kernel at a time."""
    rows, row = rhs.shape[0], math.prod(rhs.shape[1:-1])
    some = max(n for n in range(1, rows + 1) if rows % n == 0 and (n == 1 or n * row <= SHORT_SUM))
    (stride, *_), (step, *_) = window.window_strides, window.rhs_dilation
    positions = window.positions(lhs.shape[1:-1], rhs.shape[:-2])
    lhs = _padded(lhs, window, axes=1)
    rest = window._replace(
        padding=((0, 0), *window.padding[1:]),
        lhs_dilation=(1, *window.lhs_dilation[1:]),
    )
    height = (some - 1) * step + (positions[0] - 1) * stride + 1
    dtype = dot.preferred_element_type or lhs.dtype
    wide = dot._replace(preferred_element_type=_wide(dtype))

    def add(total: Array, start: Array) -> tuple[Array, None]:
        x = lax.dynamic_slice_in_dim(lhs, start * step, height, 1)
        kernel = lax.dynamic_slice_in_dim(rhs, start, some, 0)
        return total + _canonical(x, kernel, rest, wide), None

    starts = jnp.arange(0, rows, some, dtype=jnp.int32)
    shape = (lhs.shape[0], *positions, rhs.shape[-1])
    return lax.scan(add, jnp.zeros(shape, _wide(dtype)), starts)[0].astype(dtype)


def _padded(x: Array, window: _Window, axes: int | None = None) -> Array:
    """The images dilated and padded, along the first so many spatial axes or all."""
    sides = [(low, high, d - 1) for (low, high), d in zip(window.padding, window.lhs_dilation, strict=True)][:axes]
    nothing = [(0, 0, 0)] * (x.ndim - 1 - len(sides))
    return lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *sides, *nothing])


def _strided(x: Array, strides: Sequence[int]) -> Array:
    return lax.slice(x, [0] * x.ndim, x.shape, [1, *strides, 1])


# Pooling.


def _is_plain_pooling(x: Any, window_dimensions: Sequence[int], window_strides: Sequence[int], **params: Any) -> bool:
    dilations = [*params.get("base_dilation", ()), *params.get("window_dilation", ())]
    return (
        tuple(window_dimensions) == tuple(window_strides)
        and 1 < math.prod(window_dimensions) <= FEW_PIXELS
        and all(d == 1 for d in dilations)
        and all(tuple(pads) == (0, 0) for pads in params["padding"])
        and jnp.issubdtype(x.dtype, jnp.floating)
        and all(size >= window for size, window in zip(x.shape, window_dimensions, strict=True))
    )


def _parts(x: Array, window: Sequence[int]) -> list[Array]:
    """The entries of every window: first ones, second ones, and so on, each [T]."""
    counts = [size // w for size, w in zip(x.shape, window, strict=True)]
    return [
        lax.slice(x, first, [f + (n - 1) * w + 1 for f, n, w in zip(first, counts, window, strict=True)], window)
        for first in itertools.product(*map(range, window))
    ]


def _max_pool(x: Array, *, window_dimensions: Sequence[int], **_: Any) -> Array:
    """The maximum over each window, one axis after the other, so that few slices are long."""
    for axis, window in enumerate(window_dimensions):
        if window > 1:
            alone = [1] * axis + [window] + [1] * (x.ndim - axis - 1)
            x = functools.reduce(jnp.maximum, _parts(x, alone))
    return x


def _max_pool_gradient(source: Array, x: Array, *, window_dimensions: Sequence[int], **_: Any) -> Array:
    """Each window's entry of `source` where its maximum is, the first of equal ones, as in `select_and_scatter_add`."""
    parts = _parts(x, window_dimensions)
    best, chosen = parts[0], jnp.zeros(source.shape, jnp.int8)
    for k, part in enumerate(parts[1:], 1):
        keep = best >= part
        best, chosen = jnp.where(keep, best, part), jnp.where(keep, chosen, jnp.int8(k))
    # [T, W] of each axis beside each other: the entry at index w of the windows is theirs if w was chosen.
    shape = [n for pair in zip(source.shape, window_dimensions, strict=True) for n in pair]
    index = np.arange(math.prod(window_dimensions), dtype=np.int8).reshape(
        [n for w in window_dimensions for n in (1, w)]
    )
    spread = [n for t in source.shape for n in (t, 1)]
    out = jnp.where(chosen.reshape(spread) == index, source.reshape(spread), jnp.zeros((), source.dtype))
    out = jnp.broadcast_to(out, shape).reshape([t * w for t, w in zip(source.shape, window_dimensions, strict=True)])
    rest = [(0, size - n, 0) for size, n in zip(x.shape, out.shape, strict=True)]
    return lax.pad(out, jnp.zeros((), out.dtype), rest)


def _is_plain_pooling_gradient(source: Any, x: Any, *, select_prim: Any, **params: Any) -> bool:
    del source
    return select_prim.name == "ge" and _is_plain_pooling(x, **params)


_REPLACEMENTS: dict[str, tuple[Callable[..., bool], Callable[..., Array]]] = {
    "conv_general_dilated": (_is_convolution_of_floats, _convolution),
    "reduce_window_max": (_is_plain_pooling, _max_pool),
    "select_and_scatter_add": (_is_plain_pooling_gradient, _max_pool_gradient),
}
