"""Runs slots of clients over a mesh and over batches of calls: what is behind `for_each_client`.

Letters in shapes: C slots of the cohort, G groups, M = G C slots of all groups. A group is one member of a batch that
the caller vmaps over, such as a seed: `vmap` of a round does not train the clients of all seeds in lockstep, it puts
them in one queue. What a device does with its slots is in `fedjax_core.lanes`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from fedjax_core import convolutions
from fedjax_core.lanes import Run, Slots, run_on_device
from fedjax_core.types import Array, PyTree


class ClosedFunction(NamedTuple):
    """`call(consts, *args)` of a traced function, the values it closed over, and what was traced."""

    call: Callable[..., Any]
    consts: list[Array]
    jaxpr: jax.extend.core.Jaxpr


def close_convert(function: Callable[..., Any], *args: PyTree) -> tuple[ClosedFunction, PyTree]:
    """Traces a function on arguments of these shapes; returns it with its closure opened, and its result's shapes."""
    # From shapes alone: an array that lies on a mesh would leave that mesh's name in the program, which then could
    # not run inside shard_map.
    args = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), leaf.dtype), args)
    closed, shape = jax.make_jaxpr(function, return_shape=True)(*args)
    out_tree = jax.tree.structure(shape)
    jaxpr = closed.jaxpr

    def call(consts: list[Array], *args: PyTree) -> PyTree:
        try:
            flat = jax.extend.core.jaxpr_as_fun(jax.extend.core.ClosedJaxpr(jaxpr, consts))(*jax.tree.leaves(args))
        except ValueError as error:
            if "Mesh for all inputs" not in str(error):
                raise
            raise ValueError(
                "a client program closes over an array that lies on a mesh: compile the round, "
                "jax.jit(algorithm.round), with the array in its state or cohort (population.with_public), or pass "
                "it by shared"
            ) from error
        return jax.tree.unflatten(out_tree, flat)

    return ClosedFunction(call, list(closed.consts), jaxpr), shape


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
        return _run_on_devices(run, grouped, num_groups, slots, leaves, examples)

    @call.def_vmap
    def _batched(
        axis_size: int,
        in_batched: tuple[Slots, list[bool], PyTree],
        slots: Slots,
        leaves: list[Array],
        examples: PyTree,
    ):
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


def _run_on_devices(
    run: Run,
    grouped: tuple[bool, ...],
    num_groups: int,
    slots: Slots,
    leaves: list[Array],
    examples: PyTree,
) -> tuple[PyTree, PyTree, Array, Array]:
    """Runs all slots on the devices of the plan's mesh, or on one device, and sums the totals."""
    mesh, axis, devices = run.plan.mesh, run.plan.axis, run.plan.num_devices
    on_device: Callable[..., Any] = partial(run_on_device, run, grouped, num_groups)
    if run.rewrite:  # the whole loop, because the clients of several lanes make one convolution, in groups
        on_device = convolutions.rewritten(on_device)

    def in_own_dtypes(total: list[Array]) -> PyTree:
        shapes, treedef = jax.tree.flatten(run.summand)
        return jax.tree.unflatten(treedef, [t.astype(s.dtype) for t, s in zip(total, shapes, strict=True)])

    if mesh is None:
        total, *rest = on_device(slots, leaves, examples)
        return in_own_dtypes(total), *rest

    # As many slots for each device, filled up with slots without steps.
    num_slots = slots.steps.shape[0]
    per_device = -(-num_slots // devices)
    padding = per_device * devices - num_slots
    slots = jax.tree.map(lambda leaf: jnp.concatenate([leaf, *[leaf[:1]] * padding]), slots)
    steps = jnp.where(jnp.arange(per_device * devices) < num_slots, slots.steps, 0)
    slots = slots._replace(steps=steps)
    # Every device finds the whole order for itself. Left to the compiler, it would be split over the devices, which
    # would then talk to each other once a slot.
    whole = NamedSharding(mesh, PartitionSpec())
    order = jax.lax.with_sharding_constraint(
        balanced_order(jax.lax.with_sharding_constraint(steps, whole), devices), whole
    )
    slots = jax.tree.map(lambda leaf: leaf[order], slots)

    def local(slots: Slots, leaves: list[Array], examples: PyTree) -> tuple[PyTree, PyTree, Array, Array]:
        total, outputs, loss, executed = on_device(slots, leaves, examples)
        return jax.lax.psum(total, axis), outputs, loss, jax.lax.psum(executed, axis)

    split, replicated = PartitionSpec(axis), PartitionSpec()
    total, outputs, loss, executed = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(split, replicated, replicated),
        out_specs=(replicated, split, split, replicated),
        axis_names={axis},  # along other axes, such as the model's, the compiler splits the work
        check_vma=False,  # the loops start from constants, which the check would ask to mark by hand
    )(slots, leaves, examples)
    original_order = jnp.argsort(order)[:num_slots]
    outputs, loss = jax.tree.map(lambda leaf: leaf[original_order], (outputs, loss))
    return in_own_dtypes(total), outputs, loss, executed


def balanced_order(steps: Array, devices: int) -> Array:
    """The order of slots in which each device has equally many and about the same number of steps.

    Args:
      steps: int32[devices per_device], local steps of each slot.
      devices: number of devices.

    Returns:
      int32[devices per_device], the slots of the first device, then those of the second, and so on.
    """
    per_device = steps.shape[0] // devices
    if per_device == 1:
        return jnp.arange(devices, dtype=jnp.int32)
    longest_first = jnp.argsort(-steps)
    if per_device > 16:
        # One slot for each device in turn, in reverse order every other time. With so many slots for each, the
        # difference to an even distribution is small.
        rank = np.arange(per_device * devices).reshape(per_device, devices)
        rank[1::2] = rank[1::2, ::-1]
        return longest_first[rank.T.reshape(-1)]

    def assign(state: PyTree, slot: Array):
        # To the device with the fewest steps so far, of those that have not all of their slots.
        load, count, order = state
        device = jnp.argmin(jnp.where(count < per_device, load, jnp.iinfo(load.dtype).max))
        order = order.at[device * per_device + count[device]].set(slot)
        return (load.at[device].add(steps[slot]), count.at[device].add(1), order), None

    none = jnp.zeros(devices, jnp.int32)
    state = none, none, jnp.zeros_like(longest_first)
    return jax.lax.scan(assign, state, longest_first)[0][2]
