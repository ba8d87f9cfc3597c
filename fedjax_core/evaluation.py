"""Evaluation of one model on all examples, of one row per client, and of what each client predicts with."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import KeyPath

from fedjax_core import checks, convolutions, keys, masks, sums, tasks
from fedjax_core.algorithm import View, parts_of
from fedjax_core.batching import Batch, local_work
from fedjax_core.clients import ClientProgram, Plan, for_each_client, gather
from fedjax_core.groups import Groups
from fedjax_core.population import Cohort, Population, check_population
from fedjax_core.sizes import num_bytes
from fedjax_core.types import Array, ArrayLike, Examples, Key, Params, PyTree

MOST_ROWS = 2**24
"""Bytes of clients' rows that are taken out of their tables together; so few cost less than lanes that wait."""

MetricFn = Callable[..., PyTree]
"""`metric_fn(params, batch) -> pytree of float[B]`, one value per example, or a `Weighted` of them.

Integers and bool are numbers too. A function with a parameter `mask` is given the mask of the batch; see
`fedjax_core.masks`. A `Task` may stand in the place of a function: its metrics are meant."""


class Weighted(NamedTuple):
    """A metric whose examples do not all count the same, such as the accuracy of a text, in which each token counts.

    Its mean is the sum of weight times value over the sum of the weights, over all examples or those of a client; NaN
    where the weights sum to 0. The value of an example of weight 0 may be anything. Any NamedTuple with these two
    fields will do.

    Attributes:
      value: [B, ...], one value per example.
      weight: [B], how much each counts, at least 0. A negative one is an error in `evaluate` and `evaluate_clients`,
        and makes the mean NaN in `evaluate_personal` and under `jax.jit`.
    """

    value: Array
    weight: Array


class ClientStatistics(NamedTuple):
    """How a metric is spread over clients; float[] each, clients without examples left out."""

    mean: Array
    std: Array
    worst_decile: Array  # mean over the tenth of the clients (at least one) that fare worst


def evaluate(
    metric_fn: MetricFn, params: Params, examples: Examples, *, batch_size: int = 256, public: PyTree = ()
) -> PyTree:
    """Means over all examples of the values of `metric_fn`, a pytree of float[]; NaN where there is no example.

    Sums are taken in float32 at least; the mean has the dtype of the values, and of integers and bool it is a float.

    Args:
      metric_fn: one value per example, or a `Weighted`.
      params: a model.
      examples: leaves [n, ...].
      batch_size: examples per forward pass.
      public: public data, for a metric with a parameter of that name; `population.public`, for instance.

    Raises:
      TypeError: if the examples are a population or hold no numbers.
      ValueError: if a value is not an array of numbers [B, ...], by an error that names the metric, or numbers of the
        examples do not fit into 32 bits.
    """
    values = evaluate_examples(metric_fn, params, examples, batch_size=batch_size, public=public)
    _check_weights(values)

    def mean(leaf: Weighted | Array) -> Array:
        part = _summand(leaf)
        return _ratio(sums.total(part.value), sums.total(part.weight), leaf)

    return jax.tree.map(mean, values, is_leaf=is_weighted)


def evaluate_examples(
    metric_fn: MetricFn, params: Params, examples: Examples, *, batch_size: int = 256, public: PyTree = ()
) -> PyTree:
    """Values of `metric_fn` on every example in order, leaves [n, ...] (for an AUC, say).

    They are what the metric returns, integers and bool included, and a `Weighted` stays one. No batch has padding: the
    last one begins earlier instead, so the mask that a metric may ask for is True throughout.

    Args:
      metric_fn: values [B, ...] for a batch of B examples.
      params: a model.
      examples: leaves [n, ...].
      batch_size: examples per forward pass.
      public: as in `evaluate`.

    Raises:
      TypeError, ValueError: as `evaluate`.
    """
    _check_arguments(metric_fn, params)
    if hasattr(examples, "offsets"):
        raise TypeError(
            f"examples must be a pytree of arrays [n, ...], got a {type(examples).__name__}: pass its `examples`, or "
            "use evaluate_clients for one row per client"
        )
    checks.numbers(examples)
    checks.fits(examples)
    total = checks.leading_axis(examples)
    batch_size = min(
        checks.positive_int("batch_size", batch_size, "evaluate at least one example at a time"),
        max(total, 1),
    )

    def values_of(params: Params, batch: Examples) -> PyTree:
        with masks.with_public(public):
            return metric_values(metric_fn, params, batch)

    if total == 0:
        one_row = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((1, *leaf.shape[1:]), leaf.dtype), examples)
        shapes = jax.eval_shape(values_of, params, one_row)
        return jax.tree.map(lambda s: jnp.zeros((0, *s.shape[1:]), s.dtype), shapes)
    num_batches = -(-total // batch_size)

    def one(start: Array) -> PyTree:
        # The last batch is shifted back inside the data instead of padded.
        batch = jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, start, batch_size), examples)
        return values_of(params, batch)

    starts = jnp.minimum(jnp.arange(num_batches) * batch_size, total - batch_size)
    values = convolutions.rewritten(lambda starts: jax.lax.map(one, starts))(starts)
    last = num_batches * batch_size - total

    def join(leaf: Array) -> Array:
        head = leaf[:-1].reshape(-1, *leaf.shape[2:])
        return jnp.concatenate([head, leaf[-1, last:]])

    return jax.tree.map(join, values)


def evaluate_clients(metric_fn: MetricFn, params: Params, population: Population, *, batch_size: int = 256) -> PyTree:
    """Means per client of one model's values, a pytree of float[num_clients]; NaN for a client without examples.

    Batches go across clients: a metric that looks at the whole batch sees examples of several. Dtypes and errors are
    those of `evaluate`; a `HostPopulation` is refused by a TypeError.
    """
    _check_arguments(metric_fn, params)
    check_population(population, "pass population.to_device()")
    values = evaluate_examples(metric_fn, params, population.examples, batch_size=batch_size, public=population.public)
    _check_weights(values)

    def mean(leaf: Weighted | Array) -> Array:
        part = _summand(leaf)
        weight = sums.of_segments(part.weight, population.offsets)
        return _ratio(sums.of_segments(part.value, population.offsets), weight, leaf)

    return jax.tree.map(mean, values, is_leaf=is_weighted)


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
      metric_fn: one value per example, or a `Weighted`. Each batch is of one client, and the last may be padded.
      client_params: leaves [C, ...], for example `algorithm.client_params(state, ids)`.
      population: examples to evaluate on.
      ids: int[C], the clients.
      batch_size: examples per forward pass.
      plan: execution plan.

    Raises:
      ValueError: as `evaluate`.
    """
    _check_arguments(metric_fn, client_params, "client_params")
    check_population(population, "pass population.to_device()")
    cohort = population.cohort(ids)
    for path, leaf in jax.tree_util.tree_flatten_with_path(client_params)[0]:
        if jnp.shape(leaf)[:1] != cohort.ids.shape:
            raise ValueError(
                f"client_params{jax.tree_util.keystr(path)} has shape {list(jnp.shape(leaf))}, but {len(cohort.ids)} "
                "clients have a model each: pass algorithm.client_params(state, ids), leaves [C, ...], or use "
                "evaluate_clients for one model"
            )
    return _evaluate_each(
        metric_fn, lambda shared, row: row, (), client_params, cohort, batch_size=batch_size, plan=plan
    )


def evaluate_view(
    metric_fn: MetricFn | tuple[MetricFn, ...],
    view: View,
    state: PyTree,
    population: Population,
    ids: ArrayLike | None = None,
    *,
    adapt_on: Population | None = None,
    key: Key | None = None,
    at_once: int = 16,
    batch_size: int = 64,
    plan: Plan | None = None,
) -> PyTree:
    """Means per client, each predicting as a method's view says: a pytree of float[C], NaN for an empty slot.

    A client's model is put together where the client is evaluated. Of what clients share there is one. Of their rows
    those of all clients are taken out together where they are small, and those of `at_once` where they are not.
    Clients of different architectures (`View.groups`) are evaluated group by group, and come back in the order of
    `ids`.

    Args:
      metric_fn: one value per example, or a `Weighted`. Each batch is of one client, and the last may be padded. With
        groups a tuple of one for each, such as their tasks, or one for all.
      view: for example `algorithm.personal`, or `algorithm.views["global"]`.
      state: the method's state.
      population: examples to evaluate on.
      ids: int[C], the clients; all unless given.
      adapt_on: the clients' own examples for a view that adapts before it predicts, by the same numbers. A client
        without any predicts as it is.
      key: randomness of adapting; a client's is `fold_in(key, client_id)`.
      at_once: clients that are adapted, or whose large rows are taken out, together: so many of them are held.
      batch_size: examples per forward pass.
      plan: execution plan.

    Raises:
      TypeError: if `view` is no View.
      ValueError: as `evaluate`; if the view adapts and there is nothing to adapt on, or the other way round; if there
        are no rows for the clients of the population; if there are not as many metric functions as groups, or they
        give metrics of other names.
    """
    if not isinstance(view, View):
        raise TypeError(
            f"view must be a View, got {type(view).__name__}: pass algorithm.personal or algorithm.views['global']"
        )
    check_population(population, "pass population.to_device()")
    checks.positive_int("at_once", at_once, "adapt at least one client at a time")
    if adapt_on is not None:
        check_population(adapt_on, "pass adapt_on.to_device()", "adapt_on")
    if view.adapt is None and adapt_on is not None:
        raise ValueError("adapt_on is given, and the view does not adapt: leave it out")
    if view.adapt is not None and (adapt_on is None or key is None):
        missing = "adapt_on is" if adapt_on is None else "key is"
        raise ValueError(
            f"{missing} missing, and the view adapts before it predicts: pass adapt_on=, the clients' training "
            "examples, and key=jax.random.key(0)"
        )
    cohort = population.cohort(np.arange(population.num_clients) if ids is None else ids)
    if view.groups is not None:
        own: dict[str, Any] = {"adapt_on": adapt_on, "key": key, "at_once": at_once}
        own |= {"batch_size": batch_size, "plan": plan}
        return _evaluate_groups(metric_fn, view, view.groups, state, population, cohort, own)
    if isinstance(metric_fn, tuple):
        raise TypeError("metric_fn is a tuple, and the view has no groups of clients: pass one function, or a Task")
    one_metric: MetricFn = metric_fn
    shared, table = parts_of(view, state)
    _check_arguments(metric_fn, shared, "view.shared(state)")

    def rows_of(cohort: Cohort) -> PyTree:
        return () if table is None else gather(table, cohort)

    def plainly(cohort: Cohort, inputs: PyTree, model: Callable[[PyTree, PyTree], Params]) -> PyTree:
        return _evaluate_each(one_metric, model, shared, inputs, cohort, batch_size=batch_size, plan=plan)

    if view.adapt is None or adapt_on is None or key is None:
        if num_bytes(jax.eval_shape(lambda: rows_of(cohort))) <= MOST_ROWS:
            return plainly(cohort, rows_of(cohort), view.model)

        def some_rows(ids: Array) -> PyTree:
            some = population.cohort(ids)
            return plainly(some, rows_of(some), view.model)

        return _in_turns(some_rows, cohort.ids, at_once)
    if adapt_on.num_clients != population.num_clients:
        raise ValueError(
            f"adapt_on has {adapt_on.num_clients} clients and population {population.num_clients}: pass the same "
            "clients' examples"
        )
    phases = view.adapt.phases()
    own_examples, key = adapt_on, keys.one(key)

    # What is shared is passed on: on a mesh it may not be closed over.
    def unadapted(shared: PyTree, row: PyTree, client_key: Key) -> PyTree:
        for phase in phases:
            row = phase.program.final(shared, phase.program.init(shared, row, client_key))[1]
        return row

    def some(ids: Array) -> PyTree:
        training, testing = own_examples.cohort(ids), population.cohort(ids)
        adapted = rows = rows_of(testing)
        for number, phase in enumerate(phases):
            own_key = key if len(phases) == 1 else keys.derive(key, number)
            done = for_each_client(phase.program, shared, training, own_key, adapted, work=phase.work, plan=plan)
            adapted = done.outputs
        client_keys = keys.derive(key, jnp.maximum(ids, 0))

        def model(shared: PyTree, own: PyTree) -> Params:
            row, adapted, has_adapted, client_key = own
            as_it_is = unadapted(shared, row, client_key)
            now = jax.tree.map(lambda new, old: jnp.where(has_adapted, new, old), adapted, as_it_is)
            return view.model(shared, now)

        return plainly(testing, (rows, adapted, training.mask, client_keys), model)

    return _in_turns(some, cohort.ids, at_once)


def _in_turns(function: Callable[[Array], PyTree], ids: Array, at_once: int) -> PyTree:
    """`function(ids)`, leaves [C, ...], of so many clients at a time."""
    count = ids.shape[0]
    at_once = min(at_once, count)
    filled = jnp.pad(ids, (0, -count % at_once), constant_values=-1).reshape(-1, at_once)
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:])[:count], jax.lax.map(function, filled))


def _evaluate_groups(
    metric_fn: MetricFn | tuple[MetricFn, ...],
    view: View,
    groups: Groups,
    state: PyTree,
    population: Population,
    cohort: Cohort,
    options: dict[str, Any],
) -> PyTree:
    """`evaluate_view` of a view of groups: each group's clients by its own metric, float[C]."""
    of_groups = metric_fn if isinstance(metric_fn, tuple) else (metric_fn,) * len(groups)
    if len(of_groups) != len(groups):
        raise ValueError(
            f"metric_fn has {len(of_groups)} entries, but the view has {len(groups)} groups: pass one for each, or one "
            "for all"
        )
    means = [
        evaluate_view(own, view.of_group(number), state, population, part.ids, **options)
        for number, (own, part) in enumerate(zip(of_groups, groups.split(cohort), strict=True))
    ]
    for number, mean in enumerate(means[1:], 1):
        one: object = jax.tree.structure(mean)
        other: object = jax.tree.structure(means[0])
        if one != other:
            raise ValueError(
                f"metric_fn gives {one} for group {number} and {other} for group 0: make all groups' metrics the same"
            )
    joined = groups.join(cohort, means)
    return jax.tree.map(lambda leaf: jnp.where(sums.across(cohort.mask, leaf), leaf, jnp.nan), joined)


def _evaluate_each(
    metric_fn: MetricFn,
    model: Callable[[PyTree, PyTree], Params],
    shared: PyTree,
    rows: PyTree,
    cohort: Cohort,
    *,
    batch_size: int,
    plan: Plan | None,
) -> PyTree:
    """Means per client of a cohort, each with `model(shared, row)` and the rows' leaves [C, ...]."""
    examples = cohort.examples

    def one_example(leaf):
        return jax.ShapeDtypeStruct((1, *leaf.shape[1:]), leaf.dtype)

    def one_row(leaf):
        return jax.ShapeDtypeStruct(jnp.shape(leaf)[1:], jnp.result_type(leaf))

    # What a metric returns for one example: the shapes, and dtypes, of the totals.
    with masks.with_public(cohort.public):
        shapes = jax.eval_shape(
            lambda shared, row, batch: metric_values(metric_fn, model(shared, row), batch),
            shared,
            jax.tree.map(one_row, rows),
            jax.tree.map(one_example, examples),
        )

    if checks.leading_axis(examples) == 0:

        def nothing(leaf) -> Array:
            part = jax.eval_shape(_summand, leaf)
            total, weight = (jnp.zeros((cohort.ids.shape[0], *each.shape[1:]), each.dtype) for each in part)
            return _ratio(total, weight, leaf)

        return jax.tree.map(nothing, shapes, is_leaf=is_weighted)

    def init(shared: PyTree, row: PyTree, key: Key):
        def start(leaf):
            part = jax.eval_shape(_summand, leaf)
            return _Totals(*(sums.start(each.shape[1:], each.dtype) for each in part))

        return model(shared, row), jax.tree.map(start, shapes, is_leaf=is_weighted)

    def step(shared: PyTree, carry: PyTree, batch: Batch):
        params, totals = carry
        values = metric_values(metric_fn, params, batch.examples, batch.mask)

        def more(total: _Totals, leaf: Weighted | Array) -> _Totals:
            part = _summand(leaf, batch.mask)
            return _Totals(*(sums.add(t, sums.total(v)) for t, v in zip(total, part, strict=True)))

        return (params, jax.tree.map(more, totals, values, is_leaf=is_weighted)), jnp.float32(0)

    def final(shared: PyTree, carry: PyTree):
        _, totals = carry
        means = jax.tree.map(
            lambda total, leaf: _ratio(sums.value(total.value), sums.value(total.weight), leaf),
            totals,
            shapes,
            is_leaf=is_weighted,
        )
        return (), means

    work = local_work(batch_size=batch_size, order="sequential")
    results = for_each_client(
        ClientProgram(init, step, final),
        shared,
        cohort,
        jax.random.key(0),
        client_inputs=rows,
        work=work,
        plan=plan,
    )

    def of_participants(leaf: Array) -> Array:
        return jnp.where(sums.across(cohort.mask, leaf), leaf, jnp.nan)

    return jax.tree.map(of_participants, results.outputs)


class _Totals(NamedTuple):
    """Sums so far of (weight times value, weight); to `is_weighted` a leaf like what they are sums of."""

    value: sums.Running
    weight: sums.Running


def is_weighted(node: PyTree) -> bool:
    """Whether a node of what a metric returned is a `Weighted`."""
    return getattr(type(node), "_fields", None) == Weighted._fields


def _check_arguments(metric_fn: object, params: Params, name: str = "params") -> None:
    """Raises TypeError for a metric that is no function, and for another of the library's objects as a model."""
    checks.function("metric_fn", metric_fn, "a function (params, batch) -> float[B]")
    other = checks.misplaced(params)
    if other is not None:
        raise TypeError(
            f"{name} must be a pytree of arrays, got {other}: pass the parameters of a model (those of a state are "
            "algorithm.params(state)); the metric, the parameters and the examples come in this order"
        )


def metric_values(metric_fn: MetricFn, params: Params, examples: Examples, mask: Array | None = None) -> PyTree:
    """What `metric_fn` returns for a batch, checked: arrays of numbers [B, ...], and pairs of them (`Weighted`).

    Args:
      metric_fn: the metric.
      params: a model.
      examples: leaves [B, ...].
      mask: bool[B], for a metric that takes one; every row is an example unless given.

    Raises:
      ValueError: for anything else, by an error that names the metric.
    """
    size = checks.leading_axis(examples)
    values = masks.call(tasks.as_metric(metric_fn), params, examples, mask=mask, name="metric_fn")
    leaves = jax.tree_util.tree_flatten_with_path(values, is_leaf=lambda node: node is None or is_weighted(node))[0]
    if not leaves:
        raise ValueError(
            "metric_fn returned nothing to average: return a value per example, for example {'accuracy': float[B]}"
        )

    def check(path: KeyPath, leaf: PyTree, weight: bool = False) -> Array:
        name = f"metric{jax.tree_util.keystr(path)}{' (its weight)' if weight else ''}"
        is_array = isinstance(leaf, jax.Array | np.ndarray) and not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        is_number = is_array and (
            jnp.issubdtype(leaf.dtype, jnp.floating)
            or jnp.issubdtype(leaf.dtype, jnp.integer)
            or jnp.issubdtype(leaf.dtype, jnp.bool_)
        )
        if not is_number or leaf.shape[:1] != (size,) or (weight and leaf.ndim != 1):
            got = f"{leaf.dtype}{list(leaf.shape)}" if hasattr(leaf, "dtype") else f"{type(leaf).__name__} {leaf!r:.40}"
            raise ValueError(
                f"metric_fn must return one real number per example, [{size}{'' if weight else ', ...'}], but {name} "
                f"is {got}: return the values of the examples and do not average over the batch, the library does that"
            )
        return jnp.asarray(leaf)

    def checked(path: KeyPath, leaf: PyTree):
        if is_weighted(leaf):
            return Weighted(check(path, leaf.value), check(path, leaf.weight, True))
        return check(path, leaf)

    return jax.tree_util.tree_map_with_path(checked, values, is_leaf=lambda node: node is None or is_weighted(node))


def _check_weights(values: PyTree) -> None:
    """Raises ValueError if a weight that can be looked at is negative; under jit the mean is NaN then."""
    for path, leaf in jax.tree_util.tree_flatten_with_path(values, is_leaf=is_weighted)[0]:
        if not is_weighted(leaf) or not checks.is_concrete(leaf.weight) or not leaf.weight.size:
            continue
        with jax.ensure_compile_time_eval():
            least = float(jnp.min(leaf.weight))
        if least < 0:
            raise ValueError(
                f"metric_fn must weigh every example by at least 0, but the weight of metric"
                f"{jax.tree_util.keystr(path)} is {least:g} for one: return 0 for what does not count"
            )


def _summand(leaf: PyTree, mask: Array | None = None) -> Weighted:
    """(weight times value, weight) of every example, in the dtypes to sum in; zeros where the mask is False."""
    pair = leaf if is_weighted(leaf) else Weighted(leaf, jnp.ones(leaf.shape[0], sums.accumulator(leaf.dtype)))
    value, weight = sums.widen(pair.value), sums.widen(pair.weight)
    weight = jnp.where(weight >= 0, weight, jnp.nan)
    if mask is not None:
        weight = jnp.where(mask, weight, 0)
    across = sums.across(weight, value).astype(value.dtype)
    # where and not a product: what does not count may be NaN.
    return Weighted(jnp.where(across != 0, across * value, 0), weight)


def _ratio(total: Array, weight: Array, leaf: PyTree) -> Array:
    """Total over weight, NaN where the weight is 0, in the dtype of the mean of `leaf`."""
    weight = sums.across(weight, total).astype(total.dtype)
    mean = jnp.where(weight > 0, total / jnp.where(weight > 0, weight, 1), jnp.nan)
    return mean.astype(sums.mean_dtype((leaf.value if is_weighted(leaf) else leaf).dtype))


def client_statistics(values: Array, *, higher_is_better: bool = True) -> ClientStatistics:
    """Mean, standard deviation and worst decile over clients of float[num_clients]; NaN entries are left out.

    Computed in float32 at least, in the dtype of the values. NaN where all are left out.

    Raises:
      ValueError: unless the values are real numbers, one for each client.
    """
    values = values if isinstance(values, jax.Array) else np.asarray(values)
    if values.ndim != 1 or not (jnp.issubdtype(values.dtype, np.floating) or jnp.issubdtype(values.dtype, np.integer)):
        raise ValueError(
            f"values must be one real number for each client, float[num_clients], got {values.dtype}"
            f"{list(values.shape)}: pass one metric of evaluate_clients"
        )
    dtype = sums.mean_dtype(jnp.result_type(values))
    values = sums.widen(values)
    present = ~jnp.isnan(values)
    count = jnp.sum(present)
    many = jnp.where(count > 0, count, jnp.nan).astype(values.dtype)
    mean = sums.total(jnp.where(present, values, 0)) / many
    std = jnp.sqrt(sums.total(jnp.where(present, jnp.square(values - mean), 0)) / many)
    order = jnp.sort(jnp.where(present, values if higher_is_better else -values, jnp.inf))
    worst = jnp.maximum(-(-count // 10), 1)
    tail = sums.total(jnp.where(jnp.arange(values.shape[0]) < worst, order, 0)) / worst.astype(values.dtype)
    tail = jnp.where(count > 0, tail if higher_is_better else -tail, jnp.nan)
    return ClientStatistics(mean.astype(dtype), std.astype(dtype), tail.astype(dtype))
