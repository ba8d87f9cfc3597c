"""The slow, obvious way to run a cohort: a Python loop over clients, batches without padding, uploads kept in a list.

`for_each_client` here has the signature of the real one, and `plain_loop` puts it in the real one's place, so that any
method can be run on it, round by round and not compiled. It shares with the real one only what defines the result:
which example the shuffle puts where, and how a client's keys are derived. Nothing but tests has a use for it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_core import checks, clients, shuffle, sizes
from fedjax_core.aggregation import Aggregator, Stacked, weighted_mean
from fedjax_core.batching import Batch, LocalWork
from fedjax_core.clients import ClientProgram, ClientResults
from fedjax_core.plans import Plan
from fedjax_core.population import Cohort
from fedjax_core.types import Array, Key, PyTree, Weights


@contextmanager
def plain_loop() -> Iterator[None]:
    """Inside, methods run their clients by the plain loop."""
    with clients.replaced(for_each_client):
        yield


def for_each_client(
    program: ClientProgram,
    shared: PyTree,
    cohort: Cohort,
    key: Key,
    client_inputs: PyTree = (),
    *,
    work: LocalWork,
    weights: Weights = "uniform",
    aggregator: Aggregator | Stacked | None = None,
    plan: Plan | None = None,
) -> ClientResults:
    """`fedjax_core.for_each_client` on arrays that are no tracers; the plan makes no difference."""
    if not checks.is_concrete(cohort.ids):
        raise TypeError(
            "the plain loop cannot run inside of jax.jit, scan or vmap: call the method's round on arrays, and compile "
            "nothing in it that runs clients"
        )
    aggregator = aggregator or weighted_mean()
    down, shared = np.broadcast_to(np.asarray(sizes.sent_bytes(shared)), cohort.ids.shape), sizes.opened(shared)
    ids, starts, lengths = (np.asarray(a) for a in (cohort.ids, cohort.starts, cohort.sizes))
    examples = jax.tree.map(np.asarray, cohort.examples)
    weight = client_weights(weights, ids, lengths, jax.tree.leaves(examples)[0].shape[0], int(cohort.num_clients))
    uploads: dict[int, PyTree] = {}
    outputs: dict[int, PyTree] = {}
    losses, steps, up = np.zeros(len(ids)), np.zeros(len(ids), np.int32), np.zeros(len(ids))
    for slot, (i, start, size) in enumerate(zip(ids, starts, lengths, strict=True)):
        if i < 0 or size == 0:
            continue
        seed_key, init_key, step_key = jax.random.split(jax.random.fold_in(key, int(i)), 3)
        own = jax.tree.map(lambda leaf, slot=slot: leaf[slot], client_inputs)
        as_this_client = partial(clients.as_client, jnp.int32(i))
        with as_this_client():
            carry = program.init(shared, own, init_key)
        loss_sum, count = 0.0, 0
        for step, index in enumerate(batches(work, int(i), int(size), shuffle.seed(seed_key))):
            batch = Batch(
                jax.tree.map(lambda leaf, index=index, start=start: jnp.asarray(leaf[start + index]), examples),
                jnp.ones(len(index), bool),
                jax.random.fold_in(step_key, step),
                jnp.int32(step),
                jnp.int32(step // -(-int(size) // work.batch_size)),
                jnp.int32(size),
            )
            with as_this_client():
                carry, loss = program.step(shared, carry, batch)
            loss_sum, count = loss_sum + float(loss) * len(index), count + len(index)
            steps[slot] = step + 1
        with as_this_client():
            upload, output = program.final(shared, carry)
        up[slot], upload = sizes.sent_bytes(upload), sizes.opened(upload)
        uploads[slot], outputs[slot] = upload, output
        losses[slot] = loss_sum / count
    if not uploads:  # no client took part: zeros, shaped like the results of a client that has taken no step
        first = jax.tree.map(lambda leaf: leaf[0], client_inputs)
        upload, output = program.final(shared, program.init(shared, first, key))
        upload = sizes.opened(upload)

    def rows(by_slot: dict[int, PyTree], one: PyTree) -> PyTree:
        blank = jax.tree.map(jnp.zeros_like, one)
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *[by_slot.get(s, blank) for s in range(len(ids))])

    if isinstance(aggregator, Stacked):
        aggregate = aggregator.finish(rows(uploads, upload), jnp.asarray(weight))
    else:
        summands = [aggregator.lift(u, jnp.asarray(weight[slot])) for slot, u in uploads.items()]
        if not summands:
            summands = [jax.tree.map(jnp.zeros_like, aggregator.lift(upload, jnp.asarray(weight[0])))]
        aggregate = aggregator.finish(jax.tree.map(lambda *leaves: sum(leaves[1:], leaves[0]), *summands))
    return clients.ClientResults(
        aggregate=aggregate,
        outputs=rows(outputs, output),
        weights=jnp.asarray(weight),
        loss=jnp.asarray(losses),
        steps=jnp.asarray(steps),
        executed_steps=jnp.int32(steps.sum()),
        bytes_up=jnp.asarray(up),
        bytes_down=jnp.where(cohort.mask, down, 0),
    )


@partial(jax.jit, static_argnums=2)
def _permute(seed: Array, size: Array, most: int) -> Array:
    """The shuffle of up to `most` examples, compiled once (each is checked to be a permutation by the caller)."""
    return shuffle.permute(seed, jnp.minimum(jnp.arange(most), size - 1), size)


def client_weights(weights: Weights, ids: np.ndarray, sizes: np.ndarray, total: int, num_clients: int) -> np.ndarray:
    """float[C], the weights of the clients, 0 for those that do not take part."""
    present = (ids >= 0) & (sizes > 0)
    if isinstance(weights, str):
        raw = np.ones(len(ids)) if weights == "uniform" else sizes * num_clients / total
    else:
        raw = np.asarray(weights)[np.maximum(ids, 0)] / np.mean(np.asarray(weights))
    return np.where(present, raw, 0.0)


def batches(work: LocalWork, client: int, size: int, seed: Array) -> Iterator[np.ndarray]:
    """The rows of each batch, as numpy arrays of their true length (no padding)."""
    per_epoch = -(-size // work.batch_size)
    count: Any = work.num_epochs if work.num_steps is None else work.num_steps
    count = int(np.asarray(count) if np.ndim(count) == 0 else np.asarray(count)[client])
    num_steps = count * per_epoch if work.num_steps is None else count
    for step in range(num_steps):
        epoch, position = divmod(step, per_epoch)
        if work.order == "sequential":
            order = np.arange(size)
        else:
            if work.order != "shuffled":
                raise ValueError(f"the plain loop knows no order {work.order!r}: use shuffled or sequential")
            odd = np.array([0x9E3779B9, 0xC2B2AE35], np.uint64)
            epoch_seed = np.asarray(seed) ^ ((epoch * odd) & 0xFFFFFFFF).astype(np.uint32)
            order = np.asarray(_permute(epoch_seed, size, max(64, 1 << (size - 1).bit_length())))[:size]
            if sorted(order) != list(range(size)):
                raise AssertionError(f"the shuffle of {size} examples is no permutation")
        yield order[position * work.batch_size : (position + 1) * work.batch_size]
