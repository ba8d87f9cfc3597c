"""Runs slots of clients in lanes and over a mesh: what is behind `for_each_client`.

Letters in shapes: C slots of the cohort, L lanes, G groups, M = G C slots of all groups. A group is one member of
a batch that the caller vmaps over, such as a seed: `vmap` of a round does not run the lanes in lockstep over
seeds, it puts the clients of all seeds in one queue.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from fedjax_core import keys, shuffle, sums
from fedjax_core.batching import LocalWork, draw_batch
from fedjax_core.plans import Plan
from fedjax_core.types import Array, Key, PyTree

TINY_BYTES, TINY_LANES = 1024, 64
"""A client that carries no more from step to step is trained beside so many others, unless a plan says otherwise."""
TOGETHER_BYTES = 2**26
"""What all lanes carry, up to which they end together where each slot has one."""


class Slots(NamedTuple):
    """Per-slot inputs, leaves [M, ...]."""

    group: Array
    start: Array
    size: Array
    steps: Array
    weight: Array
    key: Key
    input: PyTree


class _Lanes(NamedTuple):
    """What the lanes are doing; leaves [L, ...], or [...] with a single lane."""

    slot: Array  # int32, the slot being trained, -1 when idle
    left: Array  # int32, steps left to do
    start: Array
    size: Array
    seed: Array
    key: Key
    step: Array
    loss: sums.Running  # sum of batch losses times batch counts
    examples_seen: sums.Running
    shared: PyTree  # this lane's copy of what differs between groups
    carry: PyTree


class Run(NamedTuple):
    """Everything about a call that is known at trace time."""

    work: LocalWork
    plan: Plan
    init: Callable[..., Any]
    step: Callable[..., Any]
    final: Callable[..., Any]
    treedef: Any  # of (shared, init consts, step consts, final consts)
    carry: PyTree
    summand: PyTree
    output: PyTree
    loss: Any


class ClosedFunction(NamedTuple):
    """`call(consts, *args)` of a traced function, and the values it closed over."""

    call: Callable[..., Any]
    consts: list[Array]


def close_convert(function: Callable[..., Any], *args: Any) -> tuple[ClosedFunction, Any]:
    """Traces a function on arguments of these shapes; returns it with its closure opened, and its result's shapes."""
    # From shapes alone: an array that lies on a mesh would leave that mesh's name in the program, which then could
    # not run inside shard_map.
    args = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), leaf.dtype), args)
    closed, shape = jax.make_jaxpr(function, return_shape=True)(*args)
    out_tree = jax.tree.structure(shape)
    jaxpr = closed.jaxpr

    def call(consts: list[Array], *args: Any) -> Any:
        flat = jax.extend.core.jaxpr_as_fun(jax.extend.core.ClosedJaxpr(jaxpr, consts))(*jax.tree.leaves(args))
        return jax.tree.unflatten(out_tree, flat)

    return ClosedFunction(call, list(closed.consts)), shape


def strip_weak_type(tree: PyTree) -> PyTree:
    """Arrays with their dtype made explicit: a weakly typed number would change type inside a loop."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.result_type(leaf)), tree)


def run_slots(
    run: Run,
    grouped: tuple[bool, ...],
    num_groups: int,
    slots: Slots,
    leaves: list[Array],
    examples: PyTree,
) -> tuple[PyTree, PyTree, Array, Array]:
    """Runs all slots; under vmap the batch members become groups of one longer queue.

    Args:
      run: what is known at trace time.
      grouped: for each of `leaves`, whether it has a leading axis [G].
      num_groups: G.
      slots: per-slot inputs, M = G C of them, group by group.
      leaves: shared values and closed-over constants.
      examples: leaves [total, ...].

    Returns:
      totals [G, ...], outputs [M, ...], losses [M], executed steps [G].
    """

    @jax.custom_batching.custom_vmap
    def call(slots: Slots, leaves: list[Array], examples: PyTree) -> tuple[PyTree, PyTree, Array, Array]:
        return _spread(run, grouped, num_groups, slots, leaves, examples)

    @call.def_vmap
    def _batched(axis_size: int, in_batched: Any, slots: Slots, leaves: list[Array], examples: PyTree) -> Any:
        slots_batched, leaves_batched, examples_batched = in_batched
        num_slots = slots.start.shape[1] if slots_batched.start else slots.start.shape[0]

        def fold(leaf: Array, batched: bool, has_group_axis: bool) -> Array:
            # [S, G, ...], [S, ...], [G, ...] or [...] to [S G, ...].
            if not batched:
                leaf = jnp.broadcast_to(leaf, (axis_size, *leaf.shape))
            if not has_group_axis:
                leaf = jnp.broadcast_to(leaf[:, None], (axis_size, num_groups, *leaf.shape[1:]))
            return leaf.reshape(axis_size * leaf.shape[1], *leaf.shape[2:])

        folded = jax.tree.map(lambda leaf, batched: fold(leaf, batched, True), slots, slots_batched)
        member = jnp.repeat(jnp.arange(axis_size, dtype=jnp.int32), num_slots)
        folded = folded._replace(group=folded.group + member * num_groups)
        if any(jax.tree.leaves(examples_batched)):
            # Different examples per member: lay them end to end and shift the starts.
            pairs = zip(jax.tree.leaves(examples), jax.tree.leaves(examples_batched), strict=True)
            flat = [fold(leaf, batched, True) for leaf, batched in pairs]
            total = flat[0].shape[0] // axis_size
            examples = jax.tree.unflatten(jax.tree.structure(examples), flat)
            folded = folded._replace(start=folded.start + member * total)
        new_grouped = tuple(g or b for g, b in zip(grouped, leaves_batched, strict=True))
        new_leaves = [
            fold(leaf, batched, had) if now else leaf
            for leaf, batched, had, now in zip(leaves, leaves_batched, grouped, new_grouped, strict=True)
        ]
        result = run_slots(run, new_grouped, axis_size * num_groups, folded, new_leaves, examples)
        result = jax.tree.map(lambda leaf: leaf.reshape(axis_size, -1, *leaf.shape[1:]), result)
        return result, jax.tree.map(lambda _: True, result)

    return call(slots, leaves, examples)


def _spread(
    run: Run,
    grouped: tuple[bool, ...],
    num_groups: int,
    slots: Slots,
    leaves: list[Array],
    examples: PyTree,
) -> tuple[PyTree, PyTree, Array, Array]:
    """Spreads the slots over the devices of the plan's mesh and sums the totals."""
    mesh, axis, devices = run.plan.mesh, run.plan.axis, run.plan.num_devices

    def in_own_dtypes(total: list[Array]) -> PyTree:
        shapes, treedef = jax.tree.flatten(run.summand)
        return jax.tree.unflatten(treedef, [t.astype(s.dtype) for t, s in zip(total, shapes, strict=True)])

    if mesh is None:
        total, *rest = _queue(run, grouped, num_groups, slots, leaves, examples)
        return in_own_dtypes(total), *rest

    num_slots = slots.steps.shape[0]
    per_device = -(-num_slots // devices)
    padding = per_device * devices - num_slots
    slots = jax.tree.map(lambda leaf: jnp.concatenate([leaf, *[leaf[:1]] * padding]), slots)
    steps = jnp.where(jnp.arange(per_device * devices) < num_slots, slots.steps, 0)
    slots = slots._replace(steps=steps)
    dealt = _deal(steps, devices)
    slots = jax.tree.map(lambda leaf: leaf[dealt], slots)

    def local(slots: Slots, leaves: list[Array], examples: PyTree) -> tuple[PyTree, PyTree, Array, Array]:
        total, outputs, loss, executed = _queue(run, grouped, num_groups, slots, leaves, examples)
        return jax.lax.psum(total, axis), outputs, loss, jax.lax.psum(executed, axis)

    split, whole = PartitionSpec(axis), PartitionSpec()
    total, outputs, loss, executed = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(split, whole, whole),
        out_specs=(whole, split, split, whole),
        axis_names={axis},  # along other axes, such as the model's, the compiler splits the work
        check_vma=False,  # the loops start from constants, which the check would ask to mark by hand
    )(slots, leaves, examples)
    back = jnp.argsort(dealt)[:num_slots]
    outputs, loss = jax.tree.map(lambda leaf: leaf[back], (outputs, loss))
    return in_own_dtypes(total), outputs, loss, executed


def _deal(steps: Array, devices: int) -> Array:
    """Deals slots to devices, equally many to each and about the same number of steps.

    Args:
      steps: int32[devices per_device], local steps of each slot.
      devices: number of devices.

    Returns:
      int32[devices per_device], which slots are the first device's, the second's, and so on.
    """
    per_device = steps.shape[0] // devices
    largest_first = jnp.argsort(-steps)
    if per_device > 16:
        # To the devices in turn, in reverse order every other time: with so many slots for each, what this misses of an
        # even distribution hardly counts.
        rank = np.arange(per_device * devices).reshape(per_device, devices)
        rank[1::2] = rank[1::2, ::-1]
        return largest_first[rank.T.reshape(-1)]

    def give(hands: Any, slot: Array) -> Any:
        # To the device that has the least to do, of those that have room.
        load, count, dealt = hands
        device = jnp.argmin(jnp.where(count < per_device, load, jnp.iinfo(load.dtype).max))
        dealt = dealt.at[device * per_device + count[device]].set(slot)
        return (load.at[device].add(steps[slot]), count.at[device].add(1), dealt), None

    nothing = jnp.zeros(devices, jnp.int32)
    hands = nothing, nothing, jnp.zeros_like(largest_first)
    return jax.lax.scan(give, hands, largest_first)[0][2]


def _queue(
    run: Run,
    grouped: tuple[bool, ...],
    num_groups: int,
    slots: Slots,
    leaves: list[Array],
    examples: PyTree,
) -> tuple[list[Array], PyTree, Array, Array]:
    """Feeds the slots to the lanes of one device: whenever a lane is free it takes the longest client left.

    The totals are those of the leaves of the summand, in the dtypes they are summed in.
    """
    num_slots = slots.steps.shape[0]
    few_clients = num_slots <= sums.FEW * num_groups
    few_steps = isinstance(run.work.num_steps, int) and run.work.num_steps <= sums.FEW
    lanes = _num_lanes(run, num_slots)
    busy = slots.steps > 0
    num_active = jnp.sum(busy, dtype=jnp.int32)
    # Longest first keeps the lanes level at the end; with one lane the order is free, so it stays as it was.
    queue = jnp.argsort(-slots.steps if lanes > 1 else ~busy).astype(jnp.int32)

    def lane_get(tree: PyTree, lane: Array) -> PyTree:
        return tree if lanes == 1 else jax.tree.map(lambda leaf: _row(leaf, lane), tree)

    def lane_put(tree: PyTree, lane: Array, new: PyTree) -> PyTree:
        return new if lanes == 1 else jax.tree.map(lambda leaf, n: _with_row(leaf, lane, n), tree, new)

    def values(lane_shared: list[Array]) -> Any:
        own = iter(lane_shared)
        merged = [next(own) if g else leaf for g, leaf in zip(grouped, leaves, strict=True)]
        return jax.tree.unflatten(run.treedef, merged)

    def zeros(shape: PyTree, *lead: int) -> PyTree:
        return jax.tree.map(lambda s: blank((*lead, *s.shape), s.dtype), shape)

    def blank(shape: tuple[int, ...], dtype: Any) -> Array:
        # There is no zero key; any key will do where nothing is read.
        is_key = jnp.issubdtype(dtype, jax.dtypes.prng_key)
        return jnp.broadcast_to(slots.key[0], shape) if is_key else jnp.zeros(shape, dtype)

    def no_loss() -> sums.Running:
        return sums.start((), sums.accumulator(run.loss.dtype), few=few_steps)

    def start_total(shape: Any) -> sums.Running:
        # Sums of integers are exact.
        dtype = sums.accumulator(shape.dtype) if jnp.issubdtype(shape.dtype, jnp.inexact) else shape.dtype
        return sums.start((num_groups, *shape.shape), dtype, few=few_clients)

    def idle() -> _Lanes:
        zero = jnp.int32(0)
        return _Lanes(
            slot=zero - 1,
            left=zero,
            start=zero,
            size=zero,
            seed=jnp.zeros(2, jnp.uint32),
            key=blank((), slots.key.dtype),
            step=zero,
            loss=no_loss(),
            examples_seen=no_loss(),
            shared=[blank(leaf.shape[1:], leaf.dtype) for g, leaf in zip(grouped, leaves, strict=True) if g],
            carry=zeros(run.carry),
        )

    def begin(slot: Array, there_is_one: Array | bool) -> _Lanes:
        """A lane at the start of the client in a slot, idle if there is none."""
        own = [leaf[slots.group[slot]] for g, leaf in zip(grouped, leaves, strict=True) if g]
        shared, init_consts, _, _ = values(own)
        client_input = jax.tree.map(lambda leaf: leaf[slot], slots.input)
        seed_key, init_key, step_key = keys.split(slots.key[slot], 3)
        return _Lanes(
            slot=jnp.where(there_is_one, slot, -1),
            left=jnp.where(there_is_one, slots.steps[slot], 0),
            start=slots.start[slot],
            size=slots.size[slot],
            seed=shuffle.seed(seed_key),
            key=step_key,
            step=jnp.int32(0),
            loss=no_loss(),
            examples_seen=no_loss(),
            shared=own,
            carry=run.init(init_consts, shared, client_input, init_key),
        )

    def end(lane: _Lanes) -> tuple[PyTree, PyTree, Array]:
        """What a lane's client adds to the total, its output, and its mean loss."""
        shared, _, _, final_consts = values(lane.shared)
        summand, output = run.final(final_consts, shared, lane.carry, slots.weight[jnp.maximum(lane.slot, 0)])
        loss = sums.value(lane.loss) / jnp.maximum(sums.value(lane.examples_seen), 1)
        return summand, output, loss.astype(run.loss.dtype)

    # Ends and starts are two loops: in one, the lanes would be read and written at once, and the processor's compiler
    # would copy all of them for each client.

    def is_done(state: Any) -> Array:
        lane_state, *_ = state
        return (lane_state.slot >= 0) & (lane_state.left == 0)

    def add_to_group(total: sums.Running, group: Array, summand: Array) -> sums.Running:
        new = sums.add(jax.tree.map(lambda leaf: _row(leaf, group), total), summand)
        return jax.tree.map(lambda leaf, row: _with_row(leaf, group, row), total, new)

    def finish(state: Any) -> Any:
        """Ends the client of one lane that is done."""
        lane_state, total, outputs, losses = state
        lane = jnp.argmax(is_done(state)).astype(jnp.int32)
        old = lane_get(lane_state, lane)
        summand, output, loss = end(old)
        group = slots.group[old.slot]
        total = [add_to_group(t, group, s) for t, s in zip(total, jax.tree.leaves(summand), strict=True)]
        outputs = jax.tree.map(lambda o, n: _with_row(o, old.slot, n), outputs, output)
        losses = _with_row(losses, old.slot, loss)
        free = lane_put(lane_state.slot, lane, jnp.int32(-1))
        return lane_state._replace(slot=free), total, outputs, losses

    def is_wanted(state: Any) -> Array:
        lane_state, taken = state
        return (lane_state.slot < 0) & (taken < num_active)

    def take_next(state: Any) -> Any:
        """Gives one free lane the next client of the queue."""
        lane_state, taken = state
        lane = jnp.argmax(is_wanted(state)).astype(jnp.int32)
        new = begin(queue[taken], True)
        return lane_put(lane_state, lane, new), taken + 1

    def step_lane(lane: _Lanes) -> _Lanes:
        shared, _, step_consts, _ = values(lane.shared)
        batch = draw_batch(run.work, examples, lane.start, lane.size, lane.seed, lane.key, lane.step)
        carry, loss = run.step(step_consts, shared, lane.carry, batch)
        count = jnp.sum(batch.mask, dtype=sums.accumulator(loss.dtype))
        return lane._replace(
            left=jnp.maximum(lane.left - 1, 0),
            step=lane.step + 1,
            loss=sums.add(lane.loss, loss.astype(count.dtype) * count),
            examples_seen=sums.add(lane.examples_seen, count),
            carry=carry,
        )

    step_lanes = step_lane if lanes == 1 else jax.vmap(step_lane)

    def advance(lane_state: _Lanes) -> tuple[_Lanes, Array]:
        """Steps all lanes until one of them has done its work; returns how many steps that took."""
        # No lane finishes before the one with the fewest steps left, so that many run without looking.
        running = lane_state.slot >= 0
        segment = jnp.min(jnp.where(running, lane_state.left, jnp.iinfo(jnp.int32).max))
        segment = jnp.where(jnp.any(running), segment, 0)
        return jax.lax.fori_loop(0, segment, lambda _, s: step_lanes(s), lane_state), segment

    def body(state: Any) -> Any:
        lane_state, taken, *results, executed = state
        lane_state, segment = advance(lane_state)
        state = lane_state, *results
        lane_state, *results = jax.lax.while_loop(lambda s: jnp.any(is_done(s)), finish, state)
        state = lane_state, taken
        lane_state, taken = jax.lax.while_loop(lambda s: jnp.any(is_wanted(s)), take_next, state)
        return lane_state, taken, *results, executed + segment * lanes

    def add_all(total: sums.Running, summands: Array) -> sums.Running:
        """Adds a summand of every slot."""
        summands = summands.astype(total.high.dtype)
        plain = few_clients or total.low is None
        if num_groups == 1:
            together = jnp.sum(summands, axis=0, keepdims=True) if plain else sums.total(summands)[None]
        elif plain:
            together = jnp.zeros_like(total.high).at[slots.group].add(summands)
        else:  # on a mesh the slots are not in the order of their groups
            order = jnp.argsort(slots.group)
            ends = jnp.searchsorted(slots.group[order], jnp.arange(num_groups + 1, dtype=jnp.int32))
            together = sums.of_segments(summands[order], ends)
        return sums.add(total, together)

    def end_together(state: Any) -> Any:
        """As `body` where each slot has a lane of its own, lane i for slot i: no queue, who is done ends at once."""
        lane_state, taken, total, outputs, losses, executed = state
        lane_state, segment = advance(lane_state)
        done = (lane_state.slot >= 0) & (lane_state.left == 0)

        def where_done(new: Array, old: Array) -> Array:
            return jnp.where(done.reshape(-1, *[1] * (new.ndim - 1)), new, old)

        summand, output, loss = jax.vmap(end)(lane_state)
        summand = jax.tree.map(lambda s: where_done(s, jnp.zeros_like(s)), summand)
        total = [add_all(t, s) for t, s in zip(total, jax.tree.leaves(summand), strict=True)]
        outputs, losses = jax.tree.map(where_done, (output, loss), (outputs, losses))
        lane_state = lane_state._replace(slot=jnp.where(done, -1, lane_state.slot))
        return lane_state, taken, total, outputs, losses, executed + segment * lanes

    def unfinished(state: Any) -> Array:
        lane_state, taken, *_ = state
        return jnp.any(lane_state.slot >= 0) | (taken < num_active)

    # Ending together reads all lanes whenever one is done: not for models that are more than launches of operations.
    each_its_own = 1 < lanes == num_slots and lanes * num_bytes(run.carry) <= TOGETHER_BYTES
    # All lanes begin at once; a single one begins in the loop, where the program to do so is anyway.
    first = jnp.arange(lanes, dtype=jnp.int32)
    if lanes == 1:
        lane_state = idle()
    elif each_its_own:
        lane_state = jax.vmap(begin)(first, busy)
    else:
        lane_state = jax.vmap(begin)(queue[:lanes], first < num_active)
    start = (
        lane_state,
        jnp.where(lanes > 1, jnp.minimum(num_active, lanes), 0),
        [start_total(s) for s in jax.tree.leaves(run.summand)],
        zeros(run.output, num_slots),
        jnp.zeros((num_slots,), run.loss.dtype),
        jnp.int32(0),
    )
    loop = end_together if each_its_own else body
    _, _, total, outputs, losses, executed = jax.lax.while_loop(unfinished, loop, start)
    return [sums.value(t) for t in total], outputs, losses, jnp.full((num_groups,), executed)


def _num_lanes(run: Run, num_slots: int) -> int:
    """Lanes of one device: those of the plan; where it leaves them open, more for a program of next to nothing.

    There the operations of a step cost their launch and no more, and so for many clients at once as for one.
    """
    lanes = run.plan.lanes_per_device(num_slots)
    if run.plan.lanes is not None:
        return lanes
    return max(lanes, min(num_slots, TINY_LANES)) if num_bytes(run.carry) <= TINY_BYTES else lanes


# What `leaf[i]` and `leaf.at[i].set(row)` do for an index in range, which needs no check: with the check, the
# processor's compiler copies the whole leaf before it writes the row.


def _row(leaf: Array, index: Array) -> Array:
    return jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False)


def _with_row(leaf: Array, index: Array, row: Array) -> Array:
    return jax.lax.dynamic_update_index_in_dim(leaf, row, index, 0)


def num_bytes(shapes: PyTree) -> int:
    """Bytes of arrays, or of whatever has their shapes and dtypes; a key counts as 8."""

    def item(dtype: Any) -> int:
        return 8 if jnp.issubdtype(dtype, jax.dtypes.prng_key) else np.dtype(dtype).itemsize

    return sum(math.prod(leaf.shape) * item(leaf.dtype) for leaf in jax.tree.leaves(shapes))
