"""Gradients at the worst point nearby."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

import fedjax_core as fc


def sam_gradient(
    loss_fn: fc.LossFn, rho: fc.Scalar, eta: fc.Scalar | None = None
) -> Callable[..., tuple[fc.Array, fc.Params]]:
    """The gradient at y + rho g / ||g||, a direction for `fedjax_core.local_descent`; the loss is that at y.

    Args:
      loss_fn: `loss_fn(params, batch, key) -> float[B]`.
      rho: radius, at least 0.
      eta: with it the perturbation is adaptive: rho T^2 g / ||T g||, T = |y| + eta for weights of two axes or more and
        1 for the others (Kwon, Kim, Park, Choi, "ASAM", 2021).
    """
    fc.checks.scalar("rho", rho, low=0)
    gradient = fc.value_and_grad(loss_fn)

    def scale(leaf: fc.Array) -> fc.Array:
        return jnp.ones_like(leaf) if eta is None or leaf.ndim < 2 else jnp.abs(leaf) + eta

    def perturbed(y: fc.Params, batch: fc.Batch, *_) -> tuple[fc.Array, fc.Params]:
        loss, g = gradient(y, batch)
        T = jax.tree.map(scale, y)
        norm = fc.sums.norm(optax.tree.mul(T, g))
        radius = rho / jnp.where(norm > 0, norm, 1)
        at = jax.tree.map(lambda y, t, g: y + radius.astype(g.dtype) * t**2 * g, y, T, g)
        return loss, gradient(at, batch)[1]

    return perturbed
