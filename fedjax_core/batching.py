"""How much a client trains and which examples each of its steps sees."""

from collections.abc import Callable
from typing import Literal, NamedTuple, TypedDict

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_core import checks, keys, shuffle
from fedjax_core.plans import Plan
from fedjax_core.population import Cohort, Population, check_population
from fedjax_core.types import Array, Examples, Key, PyTree, Weights

Order = Literal["shuffled", "replacement", "sequential"]


class Batch(NamedTuple):
    """What one client step sees. B is the batch size.

    Attributes:
      examples: leaves [B, ...].
      mask: bool[B]; False marks padding, which holds a copy of a real example and must not count.
      key: a key of this client and step, for dropout and the like.
      step: int32[], the client's step in this round, from 0.
      epoch: int32[], the client's epoch in this round, from 0; with order "replacement" as many steps as an epoch has.
      size: int32[], the client's number of examples.
    """

    examples: Examples
    mask: Array
    key: Key
    step: Array
    epoch: Array
    size: Array


class LocalWork(NamedTuple):
    """A client's local work in one round; build it with `local_work`.

    Attributes:
      batch_size: examples per step, B.
      num_epochs: passes over the client's examples (int or int32[num_clients]), or None.
      num_steps: number of steps (int or int32[num_clients]), or None.
      order: "shuffled" (epochs without replacement), "replacement" or "sequential".
    """

    batch_size: int
    num_epochs: int | Array | None
    num_steps: int | Array | None
    order: Order

    def steps(self, ids: Array, sizes: Array) -> Array:
        """int32[C], number of local steps of each client; 0 for a client without examples.

        Epochs whose steps int32 cannot count are as many whole epochs as it can (`check` refuses them where it sees
        the sizes).
        """
        per_epoch = -(-sizes // self.batch_size)
        if self.num_steps is not None:
            count = _per_client(self.num_steps, ids)
        else:
            most = checks.LARGEST_INT // jnp.maximum(per_epoch, 1)
            count = jnp.minimum(_per_client(self.num_epochs, ids), most) * per_epoch
        return jnp.where(sizes > 0, jnp.maximum(count, 1), 0).astype(jnp.int32)

    def examples(self, ids: Array, sizes: Array) -> Array:
        """float[C], number of examples in all local steps of each client, each as often as it is seen."""
        steps = self.steps(ids, sizes)
        per_epoch = jnp.maximum(-(-sizes // self.batch_size), 1)
        epochs, rest = steps // per_epoch, steps % per_epoch
        dtype = jnp.result_type(float)
        if self.order == "replacement":  # every batch is full
            return steps.astype(dtype) * self.batch_size
        return epochs.astype(dtype) * sizes + rest.astype(dtype) * self.batch_size

    def check(self, cohort: Cohort) -> None:
        """Compares the local work with the clients that do it.

        Raises:
          ValueError: if epochs or steps are an array of other clients, or, where sizes and epochs can be seen, there
            are more steps than int32 can count.
        """
        for name, value in (("num_epochs", self.num_epochs), ("num_steps", self.num_steps)):
            if value is not None and np.ndim(value) == 1:
                cohort.check_per_client(name, value)
        total = checks.leading_axis(cohort.examples)
        if self.batch_size > max(total, 2**24):
            raise ValueError(
                f"batch_size={self.batch_size}, but all clients together have {total} examples, and every batch has "
                "room for batch_size: the size of the largest client makes full batches"
            )
        if self.num_epochs is None or not all(map(checks.is_concrete, (self.num_epochs, cohort.ids, cohort.sizes))):
            return
        epochs = np.asarray(self.num_epochs, np.int64)
        epochs = epochs[np.maximum(np.asarray(cohort.ids), 0)] if epochs.ndim else epochs
        steps = epochs * -(-np.asarray(cohort.sizes, np.int64) // self.batch_size)
        if (steps > checks.LARGEST_INT).any():
            raise ValueError(
                f"num_epochs={np.max(epochs)} makes {np.max(steps)} local steps of a client, more than "
                f"{checks.LARGEST_INT}, which int32 can count: lower num_epochs"
            )


class FullPassOptions(TypedDict, total=False):
    """Keyword arguments of a method whose clients look at all their examples once: no epochs, no steps, no order.

    Attributes:
      batch_size: examples that are looked at together, which only bounds memory.
      weights: as in `LocalOptions`.
      plan: likewise.
    """

    batch_size: int
    weights: Weights
    plan: Plan | None


class LocalOptions(TypedDict, total=False):
    """Keyword arguments that nearly every method takes besides its own; see `local_work` and `for_each_client`.

    Attributes:
      batch_size: examples per local step; 20 unless given. At least the largest client's size means full batches.
      num_epochs: local epochs; 1 unless given. One number, or an int array [num_clients].
      num_steps: local steps instead of epochs. One number, or an int array [num_clients].
      order: "shuffled" (each epoch sees every example once, in an order of its own), "replacement" (independent
        draws) or "sequential" (in stored order).
      weights: weights of the clients in averages: "uniform" (default), "examples" (number of examples), or an
        array float[num_clients].
      plan: execution plan; None picks the backend's default.
    """

    batch_size: int
    num_epochs: int | Array
    num_steps: int | Array | None
    order: Order
    weights: Weights
    plan: Plan | None


def local_work(
    batch_size: int = 20,
    num_epochs: int | Array | None = None,
    num_steps: int | Array | None = None,
    order: Order = "shuffled",
) -> LocalWork:
    """Describes local work: epochs (the default is 1) or a number of steps, in batches of `batch_size`.

    With steps and order "shuffled", batches come from as many reshuffled epochs as it takes. The last batch of an
    epoch is smaller when the batch size does not divide the client's number of examples.

    Raises:
      ValueError: if a count is below 1, or both epochs and steps are given.
    """
    checks.positive_int("batch_size", batch_size, "each local step needs at least one example")
    checks.one_of("order", order, ("shuffled", "replacement", "sequential"))
    if num_epochs is not None and num_steps is not None:
        raise ValueError(
            f"num_epochs={num_epochs!r} and num_steps={num_steps!r} are both given: local work is counted in one or "
            "the other, leave one out"
        )
    if num_epochs is None and num_steps is None:
        num_epochs = 1
    _check_count("num_epochs", num_epochs)
    _check_count("num_steps", num_steps)
    return LocalWork(batch_size, num_epochs, num_steps, order)


def _check_count(name: str, value: object) -> None:
    if value is None or not checks.is_concrete(value):
        return
    array = np.asarray(value)
    if not np.issubdtype(array.dtype, np.integer) or array.ndim > 1 or array.size == 0 or array.min() < 1:
        shown = value if array.ndim == 0 else f"values down to {array.min() if array.size else 'nothing'}"
        raise ValueError(
            f"{name} must be an integer of at least 1 (or an array of them), got {shown!r}: to leave a "
            "client out, leave it out of the cohort"
        )
    if array.max() > checks.LARGEST_INT:
        raise ValueError(
            f"{name} must be at most {checks.LARGEST_INT}, which int32 can hold, got {array.max()}: lower it"
        )


def _per_client(value: object, ids: Array) -> Array:
    value = jnp.asarray(value, jnp.int32)
    return value[jnp.maximum(ids, 0)] if value.ndim == 1 else value


def draw_batch(
    work: LocalWork, examples: Examples, start: Array, size: Array, seed: Array, key: Key, step: Array
) -> Batch:
    """The batch of step `step` of the client whose examples are rows start..start+size-1.

    Args:
      work: the local work.
      examples: leaves [total, ...].
      start: int32[], the client's first row.
      size: int32[], the client's number of examples.
      seed: uint32[2], seed of the client's shuffles in this round.
      key: the client's key of this round.
      step: int32[], from 0.
    """
    lane = jnp.arange(work.batch_size, dtype=jnp.int32)
    step_key = keys.derive(key, step)
    # Nothing is negative here: `//` and `%` would look at the signs, an operation each.
    batch_size = jnp.int32(work.batch_size)
    per_epoch = jax.lax.div(jnp.maximum(size, 1) - 1, batch_size) + 1  # no sum that could pass 2^31
    epoch = jax.lax.div(step, per_epoch)
    if work.order == "replacement":
        draw_key, step_key = keys.split(step_key)
        index = jax.random.randint(draw_key, lane.shape, 0, jnp.maximum(size, 1))
        mask = jnp.ones(lane.shape, bool)
    else:
        position = (step - epoch * per_epoch) * batch_size + lane
        mask = position < size
        index = jnp.minimum(position, jnp.maximum(size - 1, 0))
        if work.order == "shuffled":
            epoch_seed = seed ^ (epoch.astype(jnp.uint32) * jnp.asarray([0x9E3779B9, 0xC2B2AE35], jnp.uint32))
            index = shuffle.permute(epoch_seed, index, size)
    rows = start + index
    batch = jax.tree.map(lambda leaf: jnp.take(leaf, rows, axis=0, mode="clip"), examples)
    return Batch(batch, mask, step_key, step, epoch, size)


class Stream(NamedTuple):
    """Batches of other examples of the same clients, beside those that a step is given; see `stream`.

    Attributes:
      inputs: per-client input, leaves [C, ...], to be handed to the program with the client's others.
      draw: `draw(own, step) -> Batch`, the batch of a step, int32[], from the client's row of `inputs`. Of a client
        without examples its mask is False throughout.
    """

    inputs: PyTree
    draw: Callable[[PyTree, Array], Batch]


class _StreamInput(NamedTuple):
    start: Array
    size: Array
    seed: Array
    key: Key


def stream(population: Population, cohort: Cohort, key: Key, work: LocalWork) -> Stream:
    """A further stream of batches: the validation, unlabelled or recent examples of the clients of a cohort.

    Args:
      population: these examples, by the same client numbers; a method finds it in `cohort.public`, for instance.
      cohort: the clients of the round.
      key: randomness of the batches; a client's is `fold_in(key, client_id)`.
      work: batch size and order; the number of steps is that of the pass in which batches are drawn.

    Raises:
      TypeError: if it is no population.
      ValueError: if the population has another number of clients.
    """
    check_population(population, "pass Population.from_clients(...) of these examples")
    if cohort.population_size not in (None, population.num_clients):
        raise ValueError(
            f"the stream's population has {population.num_clients} clients, and that of the cohort "
            f"{cohort.population_size}: give every client examples there, or none, by the same numbers"
        )
    others = population.checked_cohort(cohort.ids, distinct=True)
    client_keys = keys.derive(keys.one(key), jnp.maximum(cohort.ids, 0))

    def own(start: Array, size: Array, client_key: Key) -> _StreamInput:
        seed_key, step_key = keys.split(client_key)
        return _StreamInput(start, size, shuffle.seed(seed_key), step_key)

    def draw(own: _StreamInput, step: Array) -> Batch:
        batch = draw_batch(work, others.examples, own.start, own.size, own.seed, own.key, step)
        return batch._replace(mask=batch.mask & (own.size > 0))

    return Stream(jax.vmap(own)(others.starts, others.sizes, client_keys), draw)
