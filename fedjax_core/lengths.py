"""The length of local work: what methods divide a displacement by to have it in the units of a gradient."""

from typing import Any, NamedTuple

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import optax

from fedjax_core.types import Array, Params, Scalar

_UNIT = 2.0**-10
"""The constant gradient that z is given: short of any sensible clipping, and a power of two, so that it costs no
rounding."""


class Length(NamedTuple):
    """A scalar z trained beside the model on the gradient 1, from z = 0: -z is the length of the local work.

    For an optimizer that is linear in the gradients, displacement = -sum_k a_k g_k with a_k >= 0, and -z is the sum
    of the a_k: K lr for plain SGD. It covers momentum and learning rates that change without a formula for each.
    Clipping and weight decay have no part in it: they change the gradients (g_k is then what is left of the gradient
    after clipping, or the gradient with the decay added), not the weights a_k.
    """

    z: Array
    opt_state: Any

    @classmethod
    def start(cls, optimizer: optax.GradientTransformation) -> "Length":
        """No local work yet.

        Raises:
          ValueError: if the optimizer is not linear in small gradients, as Adam is not.
        """
        _check_linear(optimizer)
        z = jnp.zeros(())
        return cls(z, optimizer.init(z))

    def extend(self, optimizer: optax.GradientTransformation, mu: Scalar = 0.0) -> "Length":
        """One more step, with a proximal term of weight `mu` if the model has one."""
        # The optimizer sees a parameter of 0, which weight decay leaves alone.
        update, opt_state = optimizer.update(_UNIT * (1 + mu * self.z), self.opt_state, jnp.zeros_like(self.z))
        return Length(self.z + (update / _UNIT).astype(self.z.dtype), opt_state)

    def normalize(self, displacement: Params) -> Params:
        """`displacement` in the units of a gradient, pointing downhill (as it is while nothing has moved)."""
        return per_length(displacement, -self.z)


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
            whole, fourth, back = (tried(scale, p) - still for scale in (1, 0.25, -1))
            if not np.isfinite([whole, fourth, back]).all():
                return
            difference = max(np.abs(whole - 4 * fourth).max(), np.abs(whole + back).max())
            if difference > tolerance * np.abs(whole).max() + 64 * rounding * np.abs(still).max():
                raise ValueError(
                    "the method divides what a client has moved by the length of its local work, which needs a "
                    "client_optimizer that is linear in small gradients; this one, like Adam, is not (a gradient a "
                    f"fourth as large does not give a fourth of the step): {fix}"
                )


def stand_in(const: Any) -> Any:
    """The value, or some value of that shape in the place of a tracer."""
    if not isinstance(const, jax.core.Tracer):
        return const
    if jnp.issubdtype(const.dtype, jax.dtypes.prng_key):
        return jnp.broadcast_to(jax.random.key(0), const.shape)
    value = 0.1 if jnp.issubdtype(const.dtype, jnp.floating) else 0
    return jnp.full(const.shape, value, const.dtype)
