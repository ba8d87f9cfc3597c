"""Trains the clients of one device, several at once: the compiled loop behind `for_each_client`.

A lane is a place where one client after the other is trained. All lanes take a local step at the same time, as one
`vmap`, and a lane whose client is done is given the next one, so that unequal clients leave few lanes idle.

Letters in shapes: L lanes, M slots, G groups. A group is one member of a batch that the caller vmaps over, such as a
seed; see `fedjax_core.execution`. A single lane has no axis [L].
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from fedjax_core import keys, shuffle, sums
from fedjax_core.batching import LocalWork, draw_batch
from fedjax_core.plans import Plan
from fedjax_core.sizes import num_bytes
from fedjax_core.types import Array, Key, PyTree

TINY_BYTES, TINY_LANES = 1024, 64
"""Up to so many bytes of carry, a client is trained in one of so many lanes, unless a plan says otherwise."""
NO_QUEUE_BYTES = 2**26
"""Up to so many bytes of all carries together, a device with a lane for each slot runs without a queue."""


class _Loops(NamedTuple):
    clients: str
    steps: str
    ends: str
    starts: str


LOOPS = _Loops("client_loop", "local_steps", "client_ends", "client_starts")
"""Names of the loops in compiled programs and profiles: until all clients are done, in it local steps until one of them
is, clients that end, and clients that begin."""


class Slots(NamedTuple):
    """Per-slot inputs, leaves [M, ...]."""

    group: Array
    start: Array
    size: Array
    steps: Array
    weight: Array
    key: Key
    input: PyTree


class Run(NamedTuple):
    """Everything about a call of `for_each_client` that is known at trace time.

    Attributes:
      work: local steps and batches.
      plan: execution plan.
      init, step, final: the functions of the client program, each with its closed-over constants as first argument.
      treedef: structure of (shared, constants of init, of step, of final).
      carry, summand, output, loss: shapes and dtypes of what they return.
      rewrite: whether they have convolutions or pooling that the plan rewrites, see `fedjax_core.convolutions`.
    """

    work: LocalWork
    plan: Plan
    init: Callable[..., Any]
    step: Callable[..., Any]
    final: Callable[..., Any]
    treedef: jax.tree_util.PyTreeDef
    carry: PyTree
    summand: PyTree
    output: PyTree
    loss: jax.ShapeDtypeStruct
    rewrite: bool


class _Device(NamedTuple):
    """What a device works on, which stays the same in the loop. All but the last five is known at trace time.

    Attributes:
      run: the call.
      grouped: for each of `leaves`, whether it differs between groups and so has a leading axis [G].
      num_groups: G.
      num_lanes: L.
      few_clients, few_steps: whether a plain sum is good enough over a group's clients, over a client's steps.
      slots: per-slot inputs.
      leaves: shared values and closed-over constants.
      examples: leaves [total, ...].
      queue: int32[M], slots in the order in which they are trained; those without steps come last.
      num_active: int32[], slots with steps.
    """

    run: Run
    grouped: tuple[bool, ...]
    num_groups: int
    num_lanes: int
    few_clients: bool
    few_steps: bool
    slots: Slots
    leaves: list[Array]
    examples: PyTree
    queue: Array
    num_active: Array


class _Lane(NamedTuple):
    """A client in training; leaves [L, ...] for all lanes.

    Attributes:
      slot: int32, the client's slot, -1 in an idle lane.
      left: int32, local steps that are left to do.
      start, size: int32, where the client's examples are.
      seed: uint32[2], of the order of its examples.
      key: its key.
      step: int32, local steps done.
      loss: sum of batch losses times the batches' numbers of examples.
      examples_seen: sum of these numbers.
      shared: the rows of its group of the leaves that differ between groups.
      carry: what the program carries from step to step.
    """

    slot: Array
    left: Array
    start: Array
    size: Array
    seed: Array
    key: Key
    step: Array
    loss: sums.Running
    examples_seen: sums.Running
    shared: list[Array]
    carry: PyTree


class _Results(NamedTuple):
    """What the clients have come to: total of each leaf of the summand, [G, ...]; outputs [M, ...]; losses [M]."""

    total: list[sums.Running]
    outputs: PyTree
    losses: Array


class _State(NamedTuple):
    """What the loop carries.

    Attributes:
      lanes: the lanes.
      taken: int32[], slots of the queue that were given to a lane.
      results: of the clients that are done.
      executed: int32[], steps executed over all lanes, idle ones included.
    """

    lanes: _Lane
    taken: Array
    results: _Results
    executed: Array


def run_on_device(
    run: Run,
    grouped: tuple[bool, ...],
    num_groups: int,
    slots: Slots,
    leaves: list[Array],
    examples: PyTree,
) -> tuple[list[Array], PyTree, Array, Array]:
    """Trains the clients of all slots in the lanes of one device.

    There are two loops. In general a lane that is free takes the next slot of a queue. Where each slot has a lane of
    its own and the model is small there is no queue, and the clients that are done end at once.

    Args:
      run: what is known at trace time.
      grouped: for each of `leaves`, whether it has a leading axis [G].
      num_groups: G.
      slots: per-slot inputs.
      leaves: shared values and closed-over constants.
      examples: leaves [total, ...].

    Returns:
      The totals of the leaves of the summand, [G, ...] in the dtypes they are summed in; outputs [M, ...]; losses [M];
      executed steps [G].
    """
    num_slots = slots.steps.shape[0]
    num_lanes = lanes_of(run.plan, run.carry, num_slots)
    busy = slots.steps > 0
    num_active = jnp.sum(busy, dtype=jnp.int32)
    # The longest first, so that all lanes end at about the same time. With one lane the order is free, and stays.
    queue = jnp.argsort(-slots.steps if num_lanes > 1 else ~busy).astype(jnp.int32)
    device = _Device(
        run=run,
        grouped=grouped,
        num_groups=num_groups,
        num_lanes=num_lanes,
        few_clients=num_slots <= sums.FEW * num_groups,
        few_steps=isinstance(run.work.num_steps, int) and run.work.num_steps <= sums.FEW,
        slots=slots,
        leaves=leaves,
        examples=examples,
        queue=queue,
        num_active=num_active,
    )
    # Without a queue, all lanes are read whenever a client is done. That is cheap only for models whose steps cost
    # little more than the launch of their operations.
    without_queue = 1 < num_lanes == num_slots and num_lanes * num_bytes(run.carry) <= NO_QUEUE_BYTES

    first = jnp.arange(num_lanes, dtype=jnp.int32)
    if num_lanes == 1:  # its client begins in the loop, where the program for that is anyway
        lanes = _idle_lane(device)
    elif without_queue:  # lane i trains slot i
        lanes = jax.vmap(partial(_begin, device))(first, busy)
    else:
        lanes = jax.vmap(partial(_begin, device))(queue[:num_lanes], first < num_active)
    state = _State(
        lanes,
        taken=jnp.where(num_lanes > 1, jnp.minimum(num_active, num_lanes), 0),
        results=_no_results(device, num_slots),
        executed=jnp.int32(0),
    )
    iterate = _iterate_without_queue if without_queue else _iterate_with_queue
    with jax.named_scope(LOOPS.clients):
        state = jax.lax.while_loop(partial(_is_unfinished, device), partial(iterate, device), state)
    total, outputs, losses = state.results
    return [sums.value(t) for t in total], outputs, losses, jnp.full((num_groups,), state.executed)


def lanes_of(plan: Plan, carry: PyTree, num_slots: int) -> int:
    """Lanes of one device: those of the plan; where it leaves them open, more for a program of next to nothing.

    There the operations of a step cost their launch and no more, and so for many clients at once as for one.
    """
    lanes = plan.lanes_per_device(num_slots)
    if plan.lanes is not None:
        return lanes
    return max(lanes, min(num_slots, TINY_LANES)) if num_bytes(carry) <= TINY_BYTES else lanes


def _is_unfinished(device: _Device, state: _State) -> Array:
    return jnp.any(state.lanes.slot >= 0) | (state.taken < device.num_active)


# One iteration of the loop, in its two forms.


def _iterate_with_queue(device: _Device, state: _State) -> _State:
    """Advances the lanes until a client is done, ends those that are, and gives their lanes the next of the queue."""
    lanes, segment = _advance(device, state.lanes)
    # Two loops, for ends and for starts: in one, the lanes would be read and written at once, and the processor's
    # compiler would copy all of them for each client.
    with jax.named_scope(LOOPS.ends):
        lanes, results = jax.lax.while_loop(
            lambda s: jnp.any(_is_done(s[0])), partial(_end_one, device), (lanes, state.results)
        )
    with jax.named_scope(LOOPS.starts):
        lanes, taken = jax.lax.while_loop(
            lambda s: jnp.any(_is_free(device, *s)), partial(_begin_one, device), (lanes, state.taken)
        )
    return _State(lanes, taken, results, state.executed + segment * device.num_lanes)


def _iterate_without_queue(device: _Device, state: _State) -> _State:
    """Advances the lanes until a client is done, and ends all that are, together. Lane i trains slot i."""
    lanes, segment = _advance(device, state.lanes)
    done = _is_done(lanes)

    def where_done(new: Array, old: Array) -> Array:
        return jnp.where(sums.across(done, new), new, old)

    summand, output, loss = jax.vmap(partial(_end, device))(lanes)
    summand = jax.tree.map(lambda s: where_done(s, jnp.zeros_like(s)), summand)
    results = _Results(
        [_add_all(device, t, s) for t, s in zip(state.results.total, jax.tree.leaves(summand), strict=True)],
        *jax.tree.map(where_done, (output, loss), (state.results.outputs, state.results.losses)),
    )
    lanes = lanes._replace(slot=jnp.where(done, -1, lanes.slot))
    return _State(lanes, state.taken, results, state.executed + segment * device.num_lanes)


# Local steps.


def _advance(device: _Device, lanes: _Lane) -> tuple[_Lane, Array]:
    """Steps all lanes until a client is done; returns how many steps that took."""
    step = partial(_step, device)
    step_all = step if device.num_lanes == 1 else jax.vmap(step)
    # No client is done before the one with the fewest steps left, so that many steps need no look at the lanes.
    running = lanes.slot >= 0
    segment = jnp.min(jnp.where(running, lanes.left, jnp.iinfo(jnp.int32).max))
    segment = jnp.where(jnp.any(running), segment, 0)
    with jax.named_scope(LOOPS.steps):
        return jax.lax.fori_loop(0, segment, lambda _, lanes: step_all(lanes), lanes), segment


def _step(device: _Device, lane: _Lane) -> _Lane:
    """One local step."""
    shared, _, step_consts, _ = _program_values(device, lane.shared)
    batch = draw_batch(device.run.work, device.examples, lane.start, lane.size, lane.seed, lane.key, lane.step)
    carry, loss = device.run.step(step_consts, shared, lane.carry, batch)
    count = jnp.sum(batch.mask, dtype=sums.accumulator(loss.dtype))
    return lane._replace(
        left=jnp.maximum(lane.left - 1, 0),
        step=lane.step + 1,
        loss=sums.add(lane.loss, loss.astype(count.dtype) * count),
        examples_seen=sums.add(lane.examples_seen, count),
        carry=carry,
    )


# A client begins.


def _is_free(device: _Device, lanes: _Lane, taken: Array) -> Array:
    """bool[L], lanes that can take a client, of whom there are some left."""
    return (lanes.slot < 0) & (taken < device.num_active)


def _begin_one(device: _Device, state: tuple[_Lane, Array]) -> tuple[_Lane, Array]:
    """Gives one free lane the next client of the queue; the state is (lanes, taken)."""
    lanes, taken = state
    lane = jnp.argmax(_is_free(device, lanes, taken)).astype(jnp.int32)
    new = _begin(device, device.queue[taken], True)
    return _set_lane(device, lanes, lane, new), taken + 1


def _begin(device: _Device, slot: Array, there_is_one: Array | bool) -> _Lane:
    """A lane at the start of the client in a slot, idle if there is none."""
    slots = device.slots
    own = [leaf[slots.group[slot]] for g, leaf in zip(device.grouped, device.leaves, strict=True) if g]
    shared, init_consts, _, _ = _program_values(device, own)
    client_input = jax.tree.map(lambda leaf: leaf[slot], slots.input)
    seed_key, init_key, step_key = keys.split(slots.key[slot], 3)
    return _Lane(
        slot=jnp.where(there_is_one, slot, -1),
        left=jnp.where(there_is_one, slots.steps[slot], 0),
        start=slots.start[slot],
        size=slots.size[slot],
        seed=shuffle.seed(seed_key),
        key=step_key,
        step=jnp.int32(0),
        loss=_no_loss(device),
        examples_seen=_no_loss(device),
        shared=own,
        carry=device.run.init(init_consts, shared, client_input, init_key),
    )


# A client ends.


def _is_done(lanes: _Lane) -> Array:
    """bool[L], lanes whose client has done all of its steps."""
    return (lanes.slot >= 0) & (lanes.left == 0)


def _end_one(device: _Device, state: tuple[_Lane, _Results]) -> tuple[_Lane, _Results]:
    """Ends the client of one lane that is done; the state is (lanes, results)."""
    lanes, (total, outputs, losses) = state
    lane = jnp.argmax(_is_done(lanes)).astype(jnp.int32)
    old = _get_lane(device, lanes, lane)
    summand, output, loss = _end(device, old)
    group = device.slots.group[old.slot]
    total = [_add_to_group(t, group, s) for t, s in zip(total, jax.tree.leaves(summand), strict=True)]
    outputs = jax.tree.map(lambda o, n: _with_row(o, old.slot, n), outputs, output)
    losses = _with_row(losses, old.slot, loss)
    free = _set_lane(device, lanes.slot, lane, jnp.int32(-1))
    return lanes._replace(slot=free), _Results(total, outputs, losses)


def _end(device: _Device, lane: _Lane) -> tuple[PyTree, PyTree, Array]:
    """What a lane's client adds to the total, its output, and its mean loss."""
    shared, _, _, final_consts = _program_values(device, lane.shared)
    weight = device.slots.weight[jnp.maximum(lane.slot, 0)]
    summand, output = device.run.final(final_consts, shared, lane.carry, weight)
    loss = sums.value(lane.loss) / jnp.maximum(sums.value(lane.examples_seen), 1)
    return summand, output, loss.astype(device.run.loss.dtype)


def _add_to_group(total: sums.Running, group: Array, summand: Array) -> sums.Running:
    """Adds one client's summand to the total of its group."""
    new = sums.add(jax.tree.map(lambda leaf: _row(leaf, group), total), summand)
    return jax.tree.map(lambda leaf, row: _with_row(leaf, group, row), total, new)


def _add_all(device: _Device, total: sums.Running, summands: Array) -> sums.Running:
    """Adds a summand of every slot, [M, ...], to the totals of the groups."""
    summands = summands.astype(total.high.dtype)
    group = device.slots.group
    plain = device.few_clients or total.low is None
    if device.num_groups == 1:
        together = jnp.sum(summands, axis=0, keepdims=True) if plain else sums.total(summands)[None]
    elif plain:
        together = jnp.zeros_like(total.high).at[group].add(summands)
    else:  # on a mesh the slots are not in the order of their groups
        order = jnp.argsort(group)
        ends = jnp.searchsorted(group[order], jnp.arange(device.num_groups + 1, dtype=jnp.int32))
        together = sums.of_segments(summands[order], ends)
    return sums.add(total, together)


# Where the loop starts.


def _idle_lane(device: _Device) -> _Lane:
    zero = jnp.int32(0)
    return _Lane(
        slot=zero - 1,
        left=zero,
        start=zero,
        size=zero,
        seed=jnp.zeros(2, jnp.uint32),
        key=_zeros(device, (), device.slots.key.dtype),
        step=zero,
        loss=_no_loss(device),
        examples_seen=_no_loss(device),
        shared=[
            _zeros(device, leaf.shape[1:], leaf.dtype)
            for g, leaf in zip(device.grouped, device.leaves, strict=True)
            if g
        ],
        carry=jax.tree.map(lambda s: _zeros(device, s.shape, s.dtype), device.run.carry),
    )


def _no_results(device: _Device, num_slots: int) -> _Results:
    def no_total(shape: jax.ShapeDtypeStruct) -> sums.Running:
        # Sums of integers are exact.
        dtype = sums.accumulator(shape.dtype) if jnp.issubdtype(shape.dtype, jnp.inexact) else shape.dtype
        return sums.start((device.num_groups, *shape.shape), dtype, few=device.few_clients)

    return _Results(
        total=[no_total(s) for s in jax.tree.leaves(device.run.summand)],
        outputs=jax.tree.map(lambda s: _zeros(device, (num_slots, *s.shape), s.dtype), device.run.output),
        losses=jnp.zeros((num_slots,), device.run.loss.dtype),
    )


def _no_loss(device: _Device) -> sums.Running:
    return sums.start((), sums.accumulator(device.run.loss.dtype), few=device.few_steps)


def _zeros(device: _Device, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    """Zeros; there is no zero key, so any key where nothing is read."""
    is_key = jnp.issubdtype(dtype, jax.dtypes.prng_key)
    return jnp.broadcast_to(device.slots.key[0], shape) if is_key else jnp.zeros(shape, dtype)


# Access.


def _program_values(device: _Device, own: list[Array]) -> tuple[PyTree, list[Array], list[Array], list[Array]]:
    """(shared, constants of init, of step, of final) for a client; `own` are its group's rows of the grouped leaves."""
    rows = iter(own)
    merged = [next(rows) if g else leaf for g, leaf in zip(device.grouped, device.leaves, strict=True)]
    return jax.tree.unflatten(device.run.treedef, merged)


def _get_lane(device: _Device, tree: PyTree, lane: Array) -> PyTree:
    return tree if device.num_lanes == 1 else jax.tree.map(lambda leaf: _row(leaf, lane), tree)


def _set_lane(device: _Device, tree: PyTree, lane: Array, new: PyTree) -> PyTree:
    return new if device.num_lanes == 1 else jax.tree.map(lambda leaf, n: _with_row(leaf, lane, n), tree, new)


# What `leaf[i]` and `leaf.at[i].set(row)` do for an index in range, which needs no check: with the check, the
# processor's compiler copies all of the leaf before it writes the row.


def _row(leaf: Array, index: Array) -> Array:
    return jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False)


def _with_row(leaf: Array, index: Array, row: Array) -> Array:
    return jax.lax.dynamic_update_index_in_dim(leaf, row, index, 0)
