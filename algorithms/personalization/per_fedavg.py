"""Per-FedAvg."""

from typing import Unpack

import jax
import jax.numpy as jnp
import optax

import fedjax_core as fc
from algorithms.parts import personal as parts
from algorithms.parts.averaging import averaging


def per_fedavg(
    loss_fn: fc.LossFn,
    client_optimizer: fc.ClientOptimizer,
    *,
    inner_lr: fc.Scalar = 0.01,
    form: str = "FO",
    delta: fc.Scalar = 1e-3,
    adapt_steps: int = 1,
    server_lr: fc.Scalar = 1.0,
    **local: Unpack[fc.LocalOptions],
) -> fc.Algorithm:
    """Per-FedAvg: trains a model from which one step on a client's own examples leads to a good one (MAML).

    Client, from y = x, with batches B1, B2, B3 a step:
             z = y - inner_lr g(y; B1);  d = g(z; B2);
             d <- d - inner_lr H(y; B3) d (form HF; FO leaves it out);  y <- y - lr d, K times.
    Server:  x <- x + server_lr sum_S w_i (y_i - x).
    A client predicts after adapt_steps steps x <- x - inner_lr g(x) on its own examples.

    Down: x (1P). Up: y_i - x (1P).

    Args:
      loss_fn: `loss_fn(params, batch, key) -> float[B]`.
      client_optimizer: optax optimizer, started anew in every round, or a function of the round, or of the round and
        the client's id, giving one; its learning rate is the paper's beta.
      inner_lr: the paper's alpha. 0 is FedAvg on a half of each batch (FO) or a third (the others).
      form: "FO", first-order; "HF", with products of the Hessian, exact; or "HF-difference", which takes
        (g(y + delta d; B3) - g(y - delta d; B3)) / (2 delta) for H(y; B3) d, as the paper does.
      delta: of that difference. Too small a one drowns in rounding, and too large a one sees more than the curvature.
      adapt_steps: steps before a client predicts, in batches of `batch_size`.
      server_lr: 1 replaces the model by the average.
      **local: batch_size (for B1, B2 and B3 together), num_epochs or num_steps, order, weights, plan; see
        `LocalOptions`.

    B1, B2 and B3 are every second or third example of a batch; one that would be empty is B1. The global model is a
    start and no model to predict with: evaluate the view "personal", which adapts.

    Differences: the paper's HF takes a difference of two gradients for the product of Hessian and vector; that of the
    form "HF" here is exact, at the same cost.

    Paper: Fallah, Mokhtari, Ozdaglar, "Personalized Federated Learning with Theoretical Guarantees: A Model-Agnostic
    Meta-Learning Approach", 2020, algorithm 1.
    """
    fc.checks.scalar("inner_lr", inner_lr, low=0)
    fc.checks.one_of("form", form, ("FO", "HF", "HF-difference"))
    fc.checks.scalar("delta", delta, low=0, low_open=True)
    fc.checks.positive_int("adapt_steps", adapt_steps, "a client predicts after at least one step")
    gradient = fc.value_and_grad(loss_fn)

    def direction(y, batch, x, own):
        b1, b2, *b3 = parts_of(batch, 2 if form == "FO" else 3)
        _, g = gradient(y, b1)
        loss, d = gradient(fc.add_scaled(y, -inner_lr, g), b2)
        if form != "FO":
            d = fc.add_scaled(d, -inner_lr, curved(y, b3[0], d))
        return loss, d

    def curved(y: fc.Params, batch: fc.Batch, d: fc.Params) -> fc.Params:
        """The Hessian of the batch times d."""
        with fc.tasks.reading():  # statistics are those of the step's first gradient
            if form == "HF":
                product: fc.Params = jax.jvp(lambda y: gradient(y, batch)[1], (y,), (d,))[1]
                return product
            ahead, behind = (gradient(fc.add_scaled(y, by, d), batch)[1] for by in (delta, -delta))
            return fc.scale(1 / (2 * delta), optax.tree.sub(ahead, behind))

    adapting = fc.local_training(**local).work._replace(num_epochs=None, num_steps=adapt_steps)
    views = {"personal": parts.tuned(loss_fn, optax.sgd(inner_lr), adapting)}
    return averaging(direction, client_optimizer, server_lr=server_lr, **local)._replace(views=views)


def parts_of(batch: fc.Batch, count: int) -> list[fc.Batch]:
    """Every count-th example of a batch, from the first, the second, ... on; for a part without any the first part."""
    size = batch.mask.shape[0]
    first = jnp.arange(0, size, count)

    def part(number: int) -> fc.Batch:
        rows = jnp.minimum(first + number, size - 1)
        mask = batch.mask[rows] & (first + number < size)
        rows = jnp.where(jnp.any(mask), rows, first)
        mask = jnp.where(jnp.any(mask), mask, batch.mask[first])
        examples = jax.tree.map(lambda leaf: leaf[rows], batch.examples)
        return batch._replace(examples=examples, mask=mask, key=fc.keys.derive(batch.key, jnp.int32(number)))

    return [part(number) for number in range(count)]
