"""Evaluation of one model on all examples, and one row per client."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_core import checks
from fedjax_core.batching import local_work
from fedjax_core.clients import ClientProgram, Plan, for_each_client
from fedjax_core.population import Population
from fedjax_core.types import Array, Examples, Params, PyTree

MetricFn = Callable[[Params, Examples], PyTree]
"""`metric_fn(params, batch) -> pytree of float[B]`, one value per example."""


class Spread(NamedTuple):
    """How a metric is spread over clients; float[] each, clients without examples left out."""

    mean: Array
    std: Array
    worst_decile: Array  # mean over the tenth of the clients (at least one) that fare worst


def evaluate(metric_fn: MetricFn, params: Params, examples: Examples, *, batch_size: int = 256) -> PyTree:
    """Means over all examples of the values of `metric_fn`, a pytree of float[].

    Args:
      metric_fn: one value per example.
      params: a model.
      examples: leaves [n, ...].
      batch_size: examples per forward pass.
    """
    values = evaluate_examples(metric_fn, params, examples, batch_size=batch_size)
    return jax.tree.map(lambda v: jnp.mean(v, axis=0), values)


def evaluate_examples(metric_fn: MetricFn, params: Params, examples: Examples, *, batch_size: int = 256) -> PyTree:
    """Values of `metric_fn` on every example, leaves float[n, ...]."""
    total = checks.leading_axis(examples)
    batch_size = min(
        checks.positive_int("batch_size", batch_size, "evaluate at least one example at a time"),
        max(total, 1),
    )
    num_batches = -(-total // batch_size)

    def one(start: Array) -> PyTree:
        # The last batch is shifted back inside the data instead of padded.
        batch = jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, start, batch_size), examples)
        return metric_fn(params, batch)

    starts = jnp.minimum(jnp.arange(num_batches) * batch_size, total - batch_size)
    values = jax.lax.map(one, starts)
    last = num_batches * batch_size - total

    def join(leaf: Array) -> Array:
        head = leaf[:-1].reshape(-1, *leaf.shape[2:])
        return jnp.concatenate([head, leaf[-1, last:]])

    return jax.tree.map(join, values)


def evaluate_clients(metric_fn: MetricFn, params: Params, population: Population, *, batch_size: int = 256) -> PyTree:
    """Means per client of one model's values, a pytree of float[num_clients]; NaN for a client without examples."""
    values = evaluate_examples(metric_fn, params, population.examples, batch_size=batch_size)
    client = jnp.searchsorted(population.offsets, jnp.arange(population.num_examples), side="right") - 1

    def mean(leaf: Array) -> Array:
        summed = jax.ops.segment_sum(leaf, client, population.num_clients, indices_are_sorted=True)
        sizes = population.sizes.astype(leaf.dtype)
        return jnp.where(sizes > 0, summed / jnp.maximum(sizes, 1), jnp.nan)

    return jax.tree.map(mean, values)


def evaluate_personal(
    metric_fn: MetricFn,
    client_params: Params,
    population: Population,
    ids: Array,
    *,
    batch_size: int = 64,
    plan: Plan | None = None,
) -> PyTree:
    """Means per client, each with a model of its own: a pytree of float[C], NaN for an empty slot.

    Args:
      metric_fn: one value per example.
      client_params: leaves [C, ...], for example `algorithm.client_params(state, ids)`.
      population: examples to evaluate on.
      ids: int[C], the clients.
      batch_size: examples per forward pass.
      plan: execution plan.
    """
    cohort = population.cohort(ids)

    def init(shared: Any, params: Params, key: Any) -> Any:
        rows = jax.tree.map(lambda leaf: leaf[:1], population.examples)
        shapes = jax.eval_shape(metric_fn, params, rows)
        return params, jax.tree.map(lambda s: jnp.zeros((), s.dtype), shapes), jnp.int32(0)

    def step(shared: Any, carry: Any, batch: Any) -> Any:
        params, totals, count = carry
        values = metric_fn(params, batch.examples)
        totals = jax.tree.map(lambda t, v: t + jnp.sum(jnp.where(batch.mask, v, 0)).astype(t.dtype), totals, values)
        return (params, totals, count + jnp.sum(batch.mask, dtype=jnp.int32)), jnp.float32(0)

    def final(shared: Any, carry: Any) -> Any:
        _, totals, count = carry
        return (), jax.tree.map(lambda t: t / jnp.maximum(count, 1).astype(t.dtype), totals)

    work = local_work(batch_size=batch_size, order="sequential")
    results = for_each_client(
        ClientProgram(init, step, final), (), client_params, cohort, jax.random.key(0), work=work, plan=plan
    )
    return jax.tree.map(lambda leaf: jnp.where(cohort.mask, leaf, jnp.nan), results.outputs)


def spread(values: Array, *, higher_is_better: bool = True) -> Spread:
    """Mean, standard deviation and worst decile over clients of float[num_clients]; NaN entries are left out."""
    present = ~jnp.isnan(values)
    count = jnp.sum(present)
    mean = jnp.nanmean(values)
    order = jnp.sort(jnp.where(present, values if higher_is_better else -values, jnp.inf))
    worst = jnp.maximum(-(-count // 10), 1)
    tail = jnp.sum(jnp.where(jnp.arange(values.shape[0]) < worst, order, 0)) / worst
    return Spread(mean, jnp.nanstd(values), tail if higher_is_better else -tail)
