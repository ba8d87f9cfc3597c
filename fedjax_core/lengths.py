"""The length of local work: what methods divide a displacement by to have it in the units of a gradient."""

from typing import NamedTuple

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import optax

from fedjax_core import checks
from fedjax_core.types import Array, ArrayLike, Params, PyTree, Scalar

_UNIT = 2.0**-10
"""The constant gradient that z is given: short of any sensible clipping, and a power of two, so that it costs no
rounding."""


class Measured(NamedTuple):
    """State of a `measured` optimizer.

    Attributes:
      inner: state of the optimizer itself.
      length: float[], of the steps so far.
      damped_length: float[], the same where a proximal term shrinks what earlier steps have moved; () without one.
      probe, damped_probe: states of the optimizer on the scalars that the lengths are read from.
    """

    inner: PyTree
    length: Array
    damped_length: PyTree
    probe: PyTree
    damped_probe: PyTree


def measured(optimizer: optax.GradientTransformation, mu: Scalar | None = None) -> optax.GradientTransformation:
    """The same optimizer, which also measures how long its steps are in the units of a gradient.

    A scalar z is trained beside the model on the gradient 1, from z = 0: -z is the length. For an optimizer that is
    linear in the gradients, displacement = -sum_k a_k g_k with a_k >= 0, and -z is the sum of the a_k: K lr for plain
    SGD. It covers momentum and learning rates that change without a formula for each. Clipping and weight decay have no
    part in it: they change the gradients (g_k is then what is left of the gradient after clipping, or the gradient with
    the decay added), not the weights a_k.

    Args:
      optimizer: the optimizer.
      mu: weight of a proximal term (mu / 2) ||y - x||^2 in what it descends on, for `damped_length`.

    Raises:
      ValueError: when its state is made, if the optimizer is not linear in small gradients, as Adam is not.
    """

    def init(params: Params) -> Measured:
        _check_linear(optimizer)
        zero = jnp.zeros(())
        damped = ((), ()) if mu is None else (zero, optimizer.init(zero))
        return Measured(optimizer.init(params), zero, damped[0], optimizer.init(zero), damped[1])

    def longer(length: Array, probe: PyTree, gradient: Scalar) -> tuple[Array, PyTree]:
        # The optimizer sees a parameter of 0, which weight decay leaves alone.
        update, probe = optimizer.update(jnp.asarray(_UNIT * gradient, length.dtype), probe, jnp.zeros_like(length))
        return length - (update / _UNIT).astype(length.dtype), probe

    def update(gradient: Params, state: Measured, params: Params | None = None) -> tuple[Params, Measured]:
        steps, inner = optimizer.update(gradient, state.inner, params)
        length, probe = longer(state.length, state.probe, 1.0)
        damped = state.damped_length, state.damped_probe
        if mu is not None:
            damped = longer(*damped, 1 - mu * state.damped_length)
        return steps, Measured(inner, length, damped[0], probe, damped[1])

    return optax.GradientTransformation(init, update)


def first_length(optimizer: optax.GradientTransformation) -> Array:
    """float[], the length of a first step: lr for plain SGD."""
    measuring = measured(optimizer)
    zero = jnp.zeros(())
    return measuring.update(zero, measuring.init(zero), zero)[1].length


def per_length(displacement: Params, length: Array) -> Params:
    """`displacement / length`, and `displacement` itself where the length is 0."""
    divisor = jnp.where(length > 0, length, 1)
    return jax.tree.map(lambda d: d / divisor.astype(d.dtype), displacement)


def _check_linear(optimizer: optax.GradientTransformation) -> None:
    """Raises ValueError unless the steps of an optimizer are linear in small gradients.

    It is tried out on one parameter, now: traced hyper-parameters are replaced by numbers, which does not make an
    optimizer linear.
    """
    fix = (
        "pass SGD, with momentum, clipping, weight decay or schedules if you like, or use a method that divides by no "
        "length, such as fedavg, fedopt, scaffold or mime"
    )

    def steps(g: Array, p: Array) -> Array:
        state, updates = optimizer.init(p), []
        for _ in range(3):
            update, state = optimizer.update(g, state, p)
            updates.append(update)
        return jnp.stack(updates)

    try:
        scalar = jax.ShapeDtypeStruct((), jnp.zeros(()).dtype)
        closed = jax.make_jaxpr(steps)(scalar, scalar)
    except Exception as error:
        raise ValueError(
            "the method divides what a client has moved by the length of its local work, which needs a "
            "client_optimizer that treats all parameters alike; this one fails on a single parameter "
            f"({type(error).__name__}): {fix}"
        ) from error
    with jax.ensure_compile_time_eval():
        consts = [stand_in(const) for const in closed.consts]
        run = jax.extend.core.jaxpr_as_fun(jax.extend.core.ClosedJaxpr(closed.jaxpr, consts))

        def tried(scale: float, p: float) -> np.ndarray:
            return np.asarray(run(jnp.asarray(scale * _UNIT), jnp.asarray(p))[0])

        rounding = float(np.finfo(scalar.dtype).eps)
        # At 0 a linear step scales without any rounding; elsewhere weight decay adds to it, but nothing may scale it.
        for p, tolerance in ((0.0, 16 * rounding), (1.0, 0.02)):
            still = tried(0, p) if p else np.zeros(3, scalar.dtype)
            full, fourth, back = (tried(scale, p) - still for scale in (1, 0.25, -1))
            if not np.isfinite([full, fourth, back]).all():
                return
            difference = max(np.abs(full - 4 * fourth).max(), np.abs(full + back).max())
            if difference > tolerance * np.abs(full).max() + 64 * rounding * np.abs(still).max():
                raise ValueError(
                    "the method divides what a client has moved by the length of its local work, which needs a "
                    "client_optimizer that is linear in small gradients; this one, like Adam, is not (a gradient a "
                    f"fourth as large does not give a fourth of the step): {fix}"
                )
            # What is traced has been replaced by numbers of any sign.
            if (full > 0).any() and not p and all(checks.is_concrete(const) for const in closed.consts):
                raise ValueError(
                    "the method divides what a client has moved by the length of its local work, and this "
                    "client_optimizer climbs: pass one with a learning rate above 0"
                )


def stand_in(const: ArrayLike) -> ArrayLike:
    """The value, or some value of that shape in the place of a tracer."""
    if not isinstance(const, jax.core.Tracer):
        return const
    if jnp.issubdtype(const.dtype, jax.dtypes.prng_key):
        return jnp.broadcast_to(jax.random.key(0), const.shape)
    value = 0.1 if jnp.issubdtype(const.dtype, jnp.floating) else 0
    return jnp.full(const.shape, value, const.dtype)
