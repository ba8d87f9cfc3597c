"""FAL: federated adversarial learning, with its adversary for training and evaluation."""

import math
from collections.abc import Callable
from typing import Any, Unpack

import jax
import jax.numpy as jnp

import fedjax_core as fc
from algorithms.parts.averaging import averaging

Adversary = Callable[..., fc.Examples]
"""`(params, examples, key, mask=None) -> examples` with other inputs "x" for that model. The mask, bool[B], is for a
loss that looks at the whole batch."""


def fal(
    loss_fn: fc.LossFn,
    client_optimizer: fc.ClientOptimizer,
    *,
    rho: fc.Scalar = 0.1,
    step_size: fc.Scalar = 0.025,
    attack_steps: int = 10,
    norm: str = "linf",
    random_start: bool = True,
    low: fc.Scalar = 0.0,
    high: fc.Scalar = 1.0,
    server_lr: fc.Scalar = 1.0,
    **local: Unpack[fc.LocalOptions],
) -> fc.Algorithm:
    """FAL: every local step attacks the local model, then descends on the batch that the attack has made.

    Client, from y = x:  X' = the inputs within rho of the batch's X with a high loss under y (see `pgd`);
                         y <- y - lr grad_y loss(y; X'), X' held fixed, K times.
    Server:              x <- x + server_lr sum_S w_i (y_i - x).

    Down: x (1P). Up: y_i - x (1P). attack_steps + 1 gradients per step.

    Args:
      loss_fn: `loss_fn(params, batch, key) -> float[B]`; batches are dicts whose "x" is attacked.
      client_optimizer: optax optimizer, started anew in every round, or a function of the round, or of the round and
        the client's id, giving one.
      rho: radius of the attack; 0 is FedAvg.
      step_size: length of each of its steps.
      attack_steps: number of them. One that is at least rho long, with norm="linf" and no random start, is FGSM.
      norm: "linf" or "l2".
      random_start: start the attack from a point drawn uniformly from the ball around each input.
      low: least value of an input; -inf for none.
      high: largest value of an input; inf for none.
      server_lr: 1 replaces the model by the average.
      **local: batch_size, num_epochs or num_steps, order, weights, plan; see `LocalOptions`.

    The training loss that is reported is that of X'. For evaluation under attack see `robust`.

    Differences: the paper analyzes any adversary, with everyone taking part, a network of two layers of which one is
    trained, and balls in the Euclidean norm; projected gradient ascent is the usual adversary in practice. No code was
    released.

    Paper: Li, Song, Yang, "Federated Adversarial Learning: A Framework with Convergence Analysis", 2023, algorithm 1.
    """
    attack = pgd(
        loss_fn,
        rho=rho,
        step_size=step_size,
        attack_steps=attack_steps,
        norm=norm,
        random_start=random_start,
        low=low,
        high=high,
    )
    gradient = fc.value_and_grad(loss_fn)

    def direction(y, batch, x, _):
        return gradient(y, batch._replace(examples=attack(y, batch.examples, batch.key, mask=batch.mask)))

    return averaging(direction, client_optimizer, server_lr=server_lr, **local)


def pgd(
    loss_fn: fc.LossFn,
    *,
    rho: fc.Scalar,
    step_size: fc.Scalar,
    attack_steps: int,
    norm: str = "linf",
    random_start: bool = False,
    low: fc.Scalar = 0.0,
    high: fc.Scalar = 1.0,
) -> Adversary:
    """Projected gradient ascent on the inputs of a batch, each example on its own; arguments as for `fal`.

    X' starts from X and takes steps of length step_size along the sign of the loss's gradient ("linf") or along the
    gradient ("l2"), each followed by the projection on the ball of radius rho around X and on the box [low, high]. An
    input that lies outside the box may stay there, but goes no farther. Bytes (uint8) become floats in which 255
    stands for 1, so that rho, step_size, low and high mean the same for them.

    Returns:
      `attack(params, examples, key, mask=None) -> examples`. The key goes to the loss, and gives the random start; the
      mask, bool[B], is for a loss that takes one.
    """
    fc.checks.scalar("rho", rho, low=0)
    fc.checks.scalar("step_size", step_size, low=0)
    fc.checks.positive_int("attack_steps", attack_steps, "an attack takes at least one step")
    fc.checks.one_of("norm", norm, ("linf", "l2"))
    least_high: Any = fc.checks.scalar("low", low, finite=False) if fc.checks.is_concrete(low) else -math.inf
    fc.checks.scalar("high", high, low=least_high, finite=False)

    def attack(
        params: fc.Params, examples: fc.Examples, key: fc.Key | None, mask: fc.Array | None = None
    ) -> fc.Examples:
        clean, unit = _pixels(examples["x"])
        radius, step = (jnp.asarray(length * unit, clean.dtype) for length in (rho, step_size))
        least = jnp.minimum(clean, jnp.asarray(low * unit, clean.dtype))
        largest = jnp.maximum(clean, jnp.asarray(high * unit, clean.dtype))

        def project(x: fc.Array) -> fc.Array:
            d = x - clean
            d = jnp.clip(d, -radius, radius) if norm == "linf" else d * jnp.minimum(1, radius / _lengths(d))
            return jnp.clip(clean + d, least, largest)

        def total_loss(x: fc.Array) -> fc.Array:
            with fc.tasks.reading():
                values = fc.masks.call(loss_fn, params, {**examples, "x": x}, key, mask=mask)
            return jnp.sum(fc.sums.widen(values if mask is None else jnp.where(mask, values, 0)))

        def ascend(_: int, x: fc.Array) -> fc.Array:
            g = jax.grad(total_loss)(x)
            direction = jnp.sign(g) if norm == "linf" else g / _lengths(g)
            return project(x + step * direction)

        x = clean
        if random_start:
            if key is None:
                raise ValueError("random_start=True but the key is None: give a key, or evaluate without random start")
            x = project(clean + radius * _from_unit_ball(key, clean, norm))
        return {**examples, "x": jax.lax.fori_loop(0, attack_steps, ascend, x)}

    return attack


def robust(metric_fn: Callable[..., Any], attack: Adversary) -> Callable[..., Any]:
    """`metric_fn(params, batch)` on the inputs that the attack makes of the batch: robust accuracy, for `evaluate`."""

    def metric(params: fc.Params, batch: fc.Examples, mask: fc.Array | None = None) -> fc.PyTree:
        attacked = fc.masks.call(attack, params, batch, None, mask=mask)
        return fc.masks.call(metric_fn, params, attacked, mask=mask)

    return metric


def _pixels(x: fc.ArrayLike) -> tuple[fc.Array, int]:
    """Inputs as floats, and what 1 is in their unit."""
    x = jnp.asarray(x)
    if jnp.issubdtype(x.dtype, jnp.floating):
        return x, 1
    if x.dtype == jnp.uint8:
        return x.astype(jnp.result_type(float)), 255
    raise ValueError(f"the inputs batch['x'] are {x.dtype}, which no gradient moves: pass floats or bytes (uint8)")


def _lengths(d: fc.Array) -> fc.Array:
    """Euclidean norm of every example [B, ...], with all axes kept; 1 for zeros."""
    square = jnp.sum(jnp.square(d), axis=tuple(range(1, d.ndim)), keepdims=True)
    return jnp.sqrt(jnp.where(square > 0, square, 1))


def _from_unit_ball(key: fc.Key, x: fc.Array, norm: str) -> fc.Array:
    """A uniform draw for every example [B, ...]; an example's does not depend on how many there are."""

    def one(row: fc.Array) -> fc.Array:
        own = jax.random.fold_in(key, row)
        if norm == "linf":
            return jax.random.uniform(own, x.shape[1:], jnp.float32, -1.0, 1.0)
        direction_key, length_key = jax.random.split(own)
        d = jax.random.normal(direction_key, (1, *x.shape[1:]), jnp.float32)
        return (d / _lengths(d))[0] * jax.random.uniform(length_key, (), jnp.float32) ** (1 / d.size)

    # Far from the numbers of the keys that the loss may split off the same key. In single precision for all.
    return jax.vmap(one)(0x0FA10000 + jnp.arange(x.shape[0])).astype(x.dtype)
