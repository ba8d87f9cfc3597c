"""Prototypes: the means of the features of each class that clients hold."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import fedjax_core as fc


class Pairs(NamedTuple):
    """What clients send: means of classes [n, d], the classes int32[n], and whether a client holds it, bool[n]."""

    means: fc.Array
    classes: fc.Array
    held: fc.Array


def class_means(
    task: fc.Task, model: fc.Params, examples: fc.Examples, labels: Callable[..., fc.Array], num_classes: int
) -> fc.ClientProgram:
    """A client that sends the mean of the features of each class that it holds, in a pass over its examples."""

    def features(model: fc.Params, examples: fc.Examples, mask: fc.Array) -> fc.Array:
        assert task.features is not None
        z = task.features(model, examples, None, mask)
        if jnp.ndim(z) != 2:
            raise ValueError(f"a task's features must be float[B, d], got shape {list(jnp.shape(z))}: flatten them")
        return z

    one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((1, *leaf.shape[1:]), leaf.dtype), examples)
    shape = jax.eval_shape(features, model, one, jnp.ones(1, bool))

    def init(shared: Any, model: fc.Params, key: fc.Key):
        total = fc.sums.start((num_classes, shape.shape[1]), fc.sums.accumulator(shape.dtype))
        return model, total, jnp.zeros(num_classes, jnp.int32)

    def step(shared: Any, carry: Any, batch: fc.Batch):
        model, total, count = carry
        of_class = (labels(batch.examples)[:, None] == jnp.arange(num_classes)) & batch.mask[:, None]
        z = jnp.where(batch.mask[:, None], features(model, batch.examples, batch.mask), 0)
        z = fc.sums.widen(z)
        total = fc.sums.add(total, jnp.matmul(of_class.T.astype(z.dtype), z, precision="highest"))
        return (model, total, count + jnp.sum(of_class, axis=0, dtype=jnp.int32)), jnp.zeros((), jnp.result_type(float))

    def final(shared: Any, carry: Any):
        _, total, count = carry
        held, total = count > 0, fc.sums.value(total)
        means = total / jnp.maximum(count, 1)[:, None].astype(total.dtype)
        size = fc.num_bytes([jax.ShapeDtypeStruct(shape.shape[1:], shape.dtype), jnp.int32(0)])  # a mean and its class
        return fc.Message((means.astype(shape.dtype), held), jnp.sum(held) * size), ()

    return fc.ClientProgram(init, step, final)


def in_order(cohort: fc.Cohort, sent: tuple[fc.Array, fc.Array]) -> Pairs:
    """The pairs by clients' numbers and then by classes, from means [C, classes, d] and held [C, classes]."""
    means, held = jax.tree.map(lambda leaf: leaf[jnp.argsort(cohort.ids)], sent)
    classes = jnp.broadcast_to(jnp.arange(held.shape[1], dtype=jnp.int32), held.shape)
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), Pairs(means, classes, held))
