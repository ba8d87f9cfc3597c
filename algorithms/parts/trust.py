"""Trust in clients by two signals: the error of what they send, and how far it is from what they were given.

C is the number of slots of a cohort.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp

import fedjax_core as fc
from algorithms.parts.selection import order_statistic


def parted(cohort: fc.Cohort, share: fc.Scalar) -> tuple[fc.Cohort, fc.Cohort]:
    """The cohort without the last examples of each client, and with these alone.

    A client that has too few for this share of them is in both with all of its examples.
    """
    # 0.2 of 10 examples are 2, whatever the precision.
    held = jnp.floor(share * cohort.sizes + 1e-6).astype(cohort.sizes.dtype)
    rest = cohort.sizes - held
    last = replace(
        cohort,
        starts=jnp.where(held > 0, cohort.starts + rest, cohort.starts),
        sizes=jnp.where(held > 0, held, cohort.sizes),
    )
    return replace(cohort, sizes=rest), last


def mean_loss(loss_fn: fc.LossFn) -> fc.ClientProgram:
    """A client that uploads the mean loss of its model, which is its input, in a pass over its examples."""

    def init(shared, model, key):
        return model, fc.sums.start((), jnp.result_type(float)), jnp.int32(0)

    def step(shared, carry, batch):
        model, total, count = carry
        loss, size = fc.batch_loss(loss_fn, model, batch._replace(key=None)), jnp.sum(batch.mask, dtype=jnp.int32)
        return (model, fc.sums.add(total, size * loss.astype(total.high.dtype)), count + size), loss

    def final(shared, carry):
        _, total, count = carry
        value = fc.sums.value(total)
        return value / jnp.maximum(count, 1).astype(value.dtype), ()

    return fc.ClientProgram(init, step, final)


def divergences(displacements: fc.Params, x: fc.Params, by: str) -> fc.Array:
    """float[C], how far models are from x whose displacements have leaves [C, ...].

    Args:
      displacements: y_i - x.
      x: the model that they began with.
      by: "model" for |y_i - x|, "layers" for the root of sum_l |y_il - x_l|^2 / |x_l|^2; a leaf x_l of zeros counts as
        one of length 1.
    """
    if by == "layers":

        def relative(leaf: fc.Array, own: fc.Array) -> fc.Array:
            norm = fc.sums.norm(own)
            return fc.sums.widen(leaf) / jnp.where(norm > 0, norm, 1).astype(fc.sums.accumulator(leaf.dtype))

        displacements = jax.tree.map(relative, displacements, x)
    return jax.vmap(fc.sums.norm)(displacements).astype(jnp.result_type(float))


def relative(values: fc.Array, known: fc.Array, reference: str) -> fc.Array:
    """float[C], values over their "median" or "mean" among those that are known; 1 where that is 0."""
    n = jnp.sum(known)
    if reference == "median":
        low, high = (order_statistic(values, k, known) for k in (jnp.maximum(n - 1, 0) // 2, n // 2))
        ref = (low + high) / 2
    else:
        ref = fc.sums.total(jnp.where(known, values, 0)) / jnp.maximum(n, 1)
    usable = (n > 0) & (ref != 0)
    return jnp.where(usable, values / jnp.where(usable, ref, 1), 1)


def log_trust(
    r: fc.Array, d: fc.Array, a: fc.Scalar, b: fc.Scalar, known: fc.Array, reference: str = "median"
) -> fc.Array:
    """float[C], log s_i = -a r_i / ref(r) - b d_i / ref(d); minus infinity where a signal is not known."""
    r, d = (jnp.where(known, values, 0) for values in (r, d))
    return jnp.where(known, -a * relative(r, known, reference) - b * relative(d, known, reference), -jnp.inf)


def shares(weights: fc.Array, log_tau: fc.Array, log_s: fc.Array, known: fc.Array, floor: fc.Scalar) -> fc.Array:
    """float[C], w_i tau_i / sum_j w_j tau_j of the slots that are known, 0 of others; all alike below the floor.

    From logarithms, so that it is right where every trust is too small for a float.
    """
    tau = jnp.where(known & (weights > 0), log_tau, -jnp.inf)
    most = jnp.max(tau)
    own = weights * jnp.where(tau > -jnp.inf, jnp.exp(tau - jnp.where(most > -jnp.inf, most, 0)), 0)
    distrusted = jnp.max(jnp.where(known, log_s, -jnp.inf)) < jnp.log(floor)
    return fc.sums.shares(jnp.where(distrusted, known.astype(own.dtype), own))
