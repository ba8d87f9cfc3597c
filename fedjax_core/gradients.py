"""Masked mean losses, their gradients, and client optimizers."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from fedjax_core import sums
from fedjax_core.batching import Batch
from fedjax_core.clients import ClientProgram
from fedjax_core.types import Array, Key, LossFn, Params, Scalar

ClientOptimizer: TypeAlias = optax.GradientTransformation | Callable[[Array], optax.GradientTransformation]
"""An optax optimizer, or a function of the round (int32[]) that gives one, for learning rates that decay over
rounds: `lambda t: optax.sgd(0.1 * 0.998**t)`."""


def batch_loss(loss_fn: LossFn, params: Params, batch: Batch) -> Array:
    """Mean loss over the real examples of a batch, float[]; padding has no part in it, nor in its gradient.

    Raises:
      ValueError: if the loss function does not return one value per example.
    """
    values = loss_fn(params, batch.examples, batch.key)
    size = batch.mask.shape[0]
    if not isinstance(values, jax.Array) or values.shape != (size,) or not jnp.issubdtype(values.dtype, jnp.floating):
        got = f"{values.dtype}{list(values.shape)}" if isinstance(values, jax.Array) else type(values).__name__
        raise ValueError(
            f"loss_fn must return one loss per example, float[{size}], but returned {got}: do not average over the "
            "batch, the library does that with the padding masked out"
        )
    total = jnp.sum(sums.widen(jnp.where(batch.mask, values, 0)))
    return (total / jnp.maximum(jnp.sum(batch.mask), 1).astype(total.dtype)).astype(values.dtype)


def value_and_grad(loss_fn: LossFn) -> Callable[[Params, Batch], tuple[Array, Params]]:
    """Mean loss over a batch and its gradient: `(params, batch) -> (float[], gradient)`."""
    return jax.value_and_grad(lambda params, batch: batch_loss(loss_fn, params, batch))


def optimizer_at(optimizer: ClientOptimizer, round: Array) -> optax.GradientTransformation:
    """The client optimizer of a round.

    Raises:
      TypeError: if `optimizer` is neither an optax optimizer nor a function that gives one.
    """
    chosen: Any = optimizer(round) if callable(optimizer) else optimizer
    if not (hasattr(chosen, "init") and hasattr(chosen, "update")):
        raise TypeError(
            f"client_optimizer must be an optax optimizer or a function of the round that returns one, got "
            f"{type(optimizer).__name__}: pass for example optax.sgd(0.1)"
        )
    return chosen


def descend(
    optimizer: optax.GradientTransformation, params: Params, opt_state: Any, direction: Params
) -> tuple[Params, Any]:
    """One optimizer step against `direction` (a gradient, corrected or not): returns (params, opt_state)."""
    updates, opt_state = optimizer.update(direction, opt_state, params)
    return optax.apply_updates(params, updates), opt_state


def move(params: Params, scale: Scalar, direction: Params) -> Params:
    """`params + scale * direction`, in the dtype of the parameters and rounded once."""

    def one(p: Array, d: Array) -> Array:
        wide = sums.accumulator(p.dtype)
        return (p.astype(wide) + jnp.asarray(scale, wide) * d.astype(wide)).astype(p.dtype)

    return jax.tree.map(one, params, direction)


class Length(NamedTuple):
    """A scalar z trained beside the model on the gradient 1, from z = 0: -z is the length of the local work.

    For an optimizer that is linear in the gradients, displacement = -sum_k a_k g_k with a_k >= 0, and -z is the sum
    of the a_k: K lr for plain SGD. It covers momentum and learning rates that change without a formula for each.
    """

    z: Array
    opt_state: Any

    @classmethod
    def start(cls, optimizer: optax.GradientTransformation) -> "Length":
        """No local work yet."""
        z = jnp.zeros(())
        return cls(z, optimizer.init(z))

    def extend(self, optimizer: optax.GradientTransformation, mu: Scalar = 0.0) -> "Length":
        """One more step, with a proximal term of weight `mu` if the model has one."""
        return Length(*descend(optimizer, self.z, self.opt_state, 1 + mu * self.z))

    def normalize(self, displacement: Params) -> Params:
        """`displacement` in the units of a gradient, pointing downhill (as it is while nothing has moved)."""
        length = jnp.where(self.z < 0, -self.z, 1)
        return jax.tree.map(lambda d: d / length.astype(d.dtype), displacement)


def full_gradient_program(loss_fn: LossFn) -> ClientProgram:
    """A program that uploads, and keeps as output, the gradient of a client's mean loss at the shared params.

    Run it for one epoch (`local_work(batch_size, order="sequential")`); the batch size then only bounds memory.
    """
    gradient = value_and_grad(loss_fn)

    def init(shared: Params, client_input: Any, key: Key) -> Any:
        return sums.start_tree(shared), jnp.int32(0)

    def step(shared: Params, carry: Any, batch: Batch) -> Any:
        total, count = carry
        loss, grads = gradient(shared, batch)
        size = jnp.sum(batch.mask, dtype=jnp.int32)
        scaled = jax.tree.map(lambda g: size.astype(g.dtype) * g, sums.widen(grads))
        return (sums.add_tree(total, scaled), count + size), loss

    def final(shared: Params, carry: Any) -> Any:
        total, count = carry
        mean = sums.mean_tree(total, count, shared)
        return mean, mean

    return ClientProgram(init, step, final)
