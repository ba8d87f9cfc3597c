"""Runs one program on every client of a cohort, on whatever hardware there is.

The same `ClientProgram` runs one client after another, in lanes (several clients at once, each lane fed clients
back to back, so that unequal sizes waste little), and spread over a mesh of devices. The plan changes speed and
memory, never results beyond float rounding.

Letters in shapes: C slots of the cohort, L lanes, G groups, M = G C slots of all groups. A group is one member of
a batch that the caller vmaps over, such as a seed: `vmap` of a round does not run the lanes in lockstep over
seeds, it puts the clients of all seeds in one queue.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, PartitionSpec

from fedjax_core import checks, shuffle
from fedjax_core.aggregation import Aggregator, client_weights, weighted_mean
from fedjax_core.batching import Batch, LocalWork, draw_batch, local_work
from fedjax_core.population import Cohort
from fedjax_core.types import Array, Key, Metrics, Params, PyTree


class ClientProgram(NamedTuple):
    """What a client does in a round, as three pure functions.

    Attributes:
      init: `init(shared, client_input, key) -> carry`, where the client starts.
      step: `step(shared, carry, batch) -> (carry, loss)`, one local step on a `Batch`; loss is float[].
      final: `final(shared, carry) -> (upload, output)`: the upload goes over the wire and is aggregated, the output
        is kept per client (new client state, diagnostics).
    """

    init: Callable[[PyTree, PyTree, Key], PyTree]
    step: Callable[[PyTree, PyTree, Batch], tuple[PyTree, Array]]
    final: Callable[[PyTree, PyTree], tuple[PyTree, PyTree]]


@dataclass(frozen=True)
class Plan:
    """How `for_each_client` uses the hardware.

    Attributes:
      lanes: clients trained at the same time, over the whole mesh; 1 is one client after another; None picks the
        backend's default.
      mesh: devices to spread the cohort over, or None for one device.
      axis: the mesh axis the clients are spread over.
    """

    lanes: int | None = None
    mesh: Mesh | None = None
    axis: str = "clients"

    def __post_init__(self) -> None:
        if self.lanes is not None:
            checks.positive_int("lanes", self.lanes, "1 trains one client after another")
        if self.mesh is None:
            return
        if self.axis not in self.mesh.shape:
            raise ValueError(
                f"axis {self.axis!r} is not an axis of the mesh, which has {tuple(self.mesh.shape)}: build it with "
                f"jax.make_mesh((number_of_devices,), ({self.axis!r},))"
            )
        if self.lanes is not None and self.lanes % self.num_devices:
            raise ValueError(
                f"the mesh has {self.num_devices} devices along {self.axis!r}, which does not "
                f"divide lanes={self.lanes}: use a multiple of {self.num_devices}"
            )
        # The compiler places what is outside the clients' loop; only the cohort is spread by hand.
        auto = (AxisType.Auto,) * len(self.mesh.axis_names)
        object.__setattr__(self, "mesh", Mesh(self.mesh.devices, self.mesh.axis_names, axis_types=auto))

    @property
    def num_devices(self) -> int:
        """Number of devices the clients are spread over."""
        return 1 if self.mesh is None else self.mesh.shape[self.axis]

    def lanes_per_device(self, num_slots: int) -> int:
        """Lanes on each device, at most the number of slots there."""
        lanes = default_lanes() if self.lanes is None else self.lanes // self.num_devices
        return max(1, min(lanes, num_slots))


def default_lanes() -> int:
    """Lanes per device if the user names none.

    One on a CPU, where a single client already keeps the cores busy (benchmarks/results/plans.json). 16 elsewhere is
    a guess that no measurement backs yet.
    """
    return 1 if jax.default_backend() == "cpu" else 16


class ClientResults(NamedTuple):
    """What `for_each_client` returns.

    Attributes:
      aggregate: result of the aggregator.
      outputs: second result of `ClientProgram.final`, leaves [C, ...]; zeros in slots that took no part.
      weights: float[C], weights used in the aggregation, 0 in slots that took no part.
      loss: float[C], mean training loss of each client over its examples and steps.
      steps: int32[C], local steps taken.
      executed_steps: int32[], steps executed over all lanes, idle ones included.
      uploaded: int32[], scalars in one upload.
      downloaded: int32[], scalars in `shared`.
    """

    aggregate: PyTree
    outputs: PyTree
    weights: Array
    loss: Array
    steps: Array
    executed_steps: Array
    uploaded: Array
    downloaded: Array


class _Slots(NamedTuple):
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
    loss: Array  # sum of batch losses times batch counts
    examples_seen: Array
    shared: PyTree  # this lane's copy of what differs between groups
    carry: PyTree


def for_each_client(
    program: ClientProgram,
    shared: PyTree,
    client_inputs: PyTree,
    cohort: Cohort,
    key: Key,
    *,
    work: LocalWork,
    weights: Any = "uniform",
    aggregator: Aggregator | None = None,
    plan: Plan | None = None,
) -> ClientResults:
    """Runs a program on every client of a cohort.

    A client's randomness is `fold_in(key, client_id)`: it does not depend on the slot, the lane, the device or the
    other clients.

    Args:
      program: what each client does.
      shared: what is sent to every participant, any pytree; its scalars are counted as downloaded.
      client_inputs: per-client input, leaves [C, ...] (for example gathered client state), or () for none.
      cohort: the clients.
      key: the round's key.
      work: local steps and batches.
      weights: "uniform", "examples" or float[num_clients].
      aggregator: what to do with the uploads; the weighted mean unless given.
      plan: how to use the hardware.

    Raises:
      TypeError: if a step changes the structure, shape or dtype of the carry.
      ValueError: if a step's loss is not a scalar.
    """
    aggregator = aggregator or weighted_mean()
    plan = plan or Plan()
    weight = client_weights(weights, cohort)
    client_keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.maximum(cohort.ids, 0))
    steps = work.steps(cohort.ids, cohort.sizes)
    client_inputs = _strong(client_inputs)
    for leaf in jax.tree.leaves(client_inputs):
        if jnp.shape(leaf)[:1] != cohort.ids.shape:
            raise ValueError(
                f"client_inputs has a leaf of shape {jnp.shape(leaf)}, but the cohort has "
                f"{cohort.ids.shape[0]} slots: gather the rows of cohort.ids first"
            )
    slots = _Slots(jnp.zeros_like(cohort.ids), cohort.starts, cohort.sizes, steps, weight, client_keys, client_inputs)

    # The program may close over traced values (a learning rate under vmap, say). Tracing it here turns those into
    # explicit inputs, so that the custom batching rule below sees them.
    shared = _strong(shared)
    first = jax.tree.map(lambda leaf: leaf[0], slots)
    batch = jax.eval_shape(
        partial(draw_batch, work), cohort.examples, first.start, first.size, _SEED, first.key, first.start
    )

    def init(shared: PyTree, client_input: PyTree, key: Key) -> PyTree:
        return _strong(program.init(shared, client_input, key))

    def final(shared: PyTree, carry: PyTree, weight: Array) -> tuple[PyTree, PyTree]:
        upload, output = program.final(shared, carry)
        return _strong(aggregator.lift(upload, weight)), _strong(output)

    init_fn, carry = _hoist(init, shared, first.input, first.key)
    step_fn, stepped = _hoist(program.step, shared, carry, batch)
    _check_step(carry, stepped)
    final_fn, (summand, output) = _hoist(final, shared, carry, first.weight)
    upload, _ = jax.eval_shape(program.final, shared, carry)

    leaves, treedef = jax.tree.flatten((shared, init_fn.consts, step_fn.consts, final_fn.consts))
    run = _Run(work, plan, init_fn.call, step_fn.call, final_fn.call, treedef, carry, summand, output, stepped[1])
    total, outputs, loss, executed = _call(run, (False,) * len(leaves), 1, slots, leaves, cohort.examples)
    return ClientResults(
        aggregate=aggregator.finish(jax.tree.map(lambda leaf: leaf[0], total)),
        outputs=outputs,
        weights=weight,
        loss=loss,
        steps=steps,
        executed_steps=executed[0],
        uploaded=jnp.int32(num_scalars(upload)),
        downloaded=jnp.int32(num_scalars(shared)),
    )


class LocalTraining(NamedTuple):
    """The local options of a method, checked; `run` is `for_each_client` with them filled in.

    Attributes:
      work: local steps and batches.
      weights: "uniform", "examples" or float[num_clients].
      plan: execution plan, or None.
    """

    work: LocalWork
    weights: Any
    plan: Plan | None

    def run(
        self,
        program: ClientProgram,
        shared: PyTree,
        client_inputs: PyTree,
        cohort: Cohort,
        key: Key,
        *,
        aggregator: Aggregator | None = None,
    ) -> ClientResults:
        """Runs a program on every client of a cohort; see `for_each_client`."""
        return for_each_client(
            program,
            shared,
            client_inputs,
            cohort,
            key,
            work=self.work,
            weights=self.weights,
            aggregator=aggregator,
            plan=self.plan,
        )


def local_training(*, weights: Any = "uniform", plan: Plan | None = None, **work: Any) -> LocalTraining:
    """Checks the options of `LocalOptions`, which every method takes, and keeps them together."""
    if isinstance(weights, str):
        checks.one_of("weights", weights, ("uniform", "examples"))
    if plan is not None and not isinstance(plan, Plan):
        raise TypeError(f"plan must be a Plan, got {type(plan).__name__}: pass for example Plan(lanes=4)")
    return LocalTraining(local_work(**work), weights, plan)


def num_scalars(tree: PyTree) -> int:
    """Number of scalars in a pytree of arrays (or of their shapes)."""
    return sum(int(np.prod(jnp.shape(leaf))) for leaf in jax.tree.leaves(tree))


def gather(table: PyTree, cohort: Cohort) -> PyTree:
    """Rows of per-client state: leaves [num_clients, ...] become [C, ...] (row 0 stands in for an empty slot)."""
    return jax.tree.map(lambda leaf: leaf[jnp.maximum(cohort.ids, 0)], table)


def scatter(table: PyTree, cohort: Cohort, rows: PyTree) -> PyTree:
    """Writes rows [C, ...] back into per-client state [num_clients, ...]; only participants' rows change."""
    index = jnp.where(cohort.mask, cohort.ids, cohort.num_clients)  # out of range: dropped
    return jax.tree.map(lambda leaf, row: leaf.at[index].set(row.astype(leaf.dtype), mode="drop"), table, rows)


def round_metrics(results: ClientResults, cohort: Cohort, old: Params, new: Params, extra: Any = ()) -> Metrics:
    """The metrics every method reports, from a pass over the clients and the global model before and after."""
    weight = jnp.sum(results.weights)
    loss = jnp.sum(results.weights.astype(results.loss.dtype) * results.loss)
    return Metrics(
        loss=loss / jnp.where(weight > 0, weight, 1).astype(loss.dtype),
        update_norm=optax.tree.norm(optax.tree.sub(new, old)),
        uploaded=results.uploaded,
        downloaded=results.downloaded,
        participants=cohort.num_participants,
        extra=extra,
    )


def client_rows(num_clients: int, params: Params) -> PyTree:
    """Zeros shaped like `params`, once per client: leaves [num_clients, ...]."""
    return jax.tree.map(lambda leaf: jnp.zeros((num_clients, *jnp.shape(leaf)), jnp.result_type(leaf)), params)


# ---------------------------------------------------------------------------------------------------------------
# Inside: hoisting, the batching rule, the queue of clients.

_SEED = jax.ShapeDtypeStruct((2,), np.dtype("uint32"))


class _Hoisted(NamedTuple):
    call: Callable[..., Any]
    consts: list[Array]


def _hoist(function: Callable[..., Any], *args: Any) -> tuple[_Hoisted, Any]:
    """Returns `call(consts, *args)` and the consts that `function` closes over, and the shape of the result."""
    # From shapes alone: an array that lies on a mesh would leave that mesh's name in the program, which then could
    # not run inside shard_map.
    args = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), leaf.dtype), args)
    closed, shape = jax.make_jaxpr(function, return_shape=True)(*args)
    out_tree = jax.tree.structure(shape)
    jaxpr = closed.jaxpr

    def call(consts: list[Array], *args: Any) -> Any:
        flat = jax.extend.core.jaxpr_as_fun(jax.extend.core.ClosedJaxpr(jaxpr, consts))(*jax.tree.leaves(args))
        return jax.tree.unflatten(out_tree, flat)

    return _Hoisted(call, list(closed.consts)), shape


def _strong(tree: PyTree) -> PyTree:
    """Arrays with their dtype made explicit: a weakly typed number would change type inside a loop."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.result_type(leaf)), tree)


def _check_step(carry: PyTree, stepped: Any) -> None:
    if not isinstance(stepped, tuple) or len(stepped) != 2:
        raise TypeError("step must return (carry, loss): return the training loss of the batch beside the carry")
    new, loss = stepped
    if jnp.shape(loss) != ():
        raise ValueError(
            f"the loss of a step must be a scalar, got shape {jnp.shape(loss)}: take the mean over the batch"
        )
    before: Any = jax.tree.structure(carry)
    after: Any = jax.tree.structure(new)
    if before != after:
        raise TypeError(
            f"step changed the structure of the carry from {before} to {after}: return a carry built like the one "
            "init returns"
        )
    for (path, old), leaf in zip(jax.tree_util.tree_flatten_with_path(carry)[0], jax.tree.leaves(new), strict=True):
        if old.shape != leaf.shape or old.dtype != leaf.dtype:
            raise TypeError(
                f"step changed carry{jax.tree_util.keystr(path)} from {old.dtype}{list(old.shape)} to "
                f"{leaf.dtype}{list(leaf.shape)}: keep shape and dtype (cast with astype)"
            )


class _Run(NamedTuple):
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


def _call(
    run: _Run,
    grouped: tuple[bool, ...],
    num_groups: int,
    slots: _Slots,
    leaves: list[Array],
    examples: PyTree,
) -> tuple[PyTree, PyTree, Array, Array]:
    """Runs all slots; under vmap the batch members become groups of one longer queue.

    Args:
      run: what is known at trace time.
      grouped: for each of `leaves`, whether it has a leading axis [G].
      num_groups: G.
      slots: per-slot inputs, M = G C of them, group by group.
      leaves: shared values and hoisted constants.
      examples: leaves [total, ...].

    Returns:
      totals [G, ...], outputs [M, ...], losses [M], executed steps [G].
    """

    @jax.custom_batching.custom_vmap
    def call(slots: _Slots, leaves: list[Array], examples: PyTree) -> tuple[PyTree, PyTree, Array, Array]:
        return _spread(run, grouped, num_groups, slots, leaves, examples)

    @call.def_vmap
    def _batched(axis_size: int, in_batched: Any, slots: _Slots, leaves: list[Array], examples: PyTree) -> Any:
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
        result = _call(run, new_grouped, axis_size * num_groups, folded, new_leaves, examples)
        result = jax.tree.map(lambda leaf: leaf.reshape(axis_size, -1, *leaf.shape[1:]), result)
        return result, jax.tree.map(lambda _: True, result)

    return call(slots, leaves, examples)


def _spread(
    run: _Run,
    grouped: tuple[bool, ...],
    num_groups: int,
    slots: _Slots,
    leaves: list[Array],
    examples: PyTree,
) -> tuple[PyTree, PyTree, Array, Array]:
    """Spreads the slots over the devices of the plan's mesh and sums the totals."""
    mesh, axis, devices = run.plan.mesh, run.plan.axis, run.plan.num_devices
    if mesh is None:
        return _queue(run, grouped, num_groups, slots, leaves, examples)

    # Deal the slots like cards, largest first and back and forth, so that every device gets about the same work.
    num_slots = slots.steps.shape[0]
    per_device = -(-num_slots // devices)
    padding = per_device * devices - num_slots
    slots = jax.tree.map(lambda leaf: jnp.concatenate([leaf, *[leaf[:1]] * padding]), slots)
    steps = jnp.where(jnp.arange(per_device * devices) < num_slots, slots.steps, 0)
    slots = slots._replace(steps=steps)
    rank = np.arange(per_device * devices).reshape(per_device, devices)
    rank[1::2] = rank[1::2, ::-1]
    dealt = jnp.argsort(-steps)[rank.T.reshape(-1)]
    slots = jax.tree.map(lambda leaf: leaf[dealt], slots)

    def local(slots: _Slots, leaves: list[Array], examples: PyTree) -> tuple[PyTree, PyTree, Array, Array]:
        total, outputs, loss, executed = _queue(run, grouped, num_groups, slots, leaves, examples)
        return jax.lax.psum(total, axis), outputs, loss, jax.lax.psum(executed, axis)

    split, whole = PartitionSpec(axis), PartitionSpec()
    total, outputs, loss, executed = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(split, whole, whole),
        out_specs=(whole, split, split, whole),
        check_vma=False,  # the loops start from constants, which the check would ask to mark by hand
    )(slots, leaves, examples)
    back = jnp.argsort(dealt)[:num_slots]
    outputs, loss = jax.tree.map(lambda leaf: leaf[back], (outputs, loss))
    return total, outputs, loss, executed


def _queue(
    run: _Run,
    grouped: tuple[bool, ...],
    num_groups: int,
    slots: _Slots,
    leaves: list[Array],
    examples: PyTree,
) -> tuple[PyTree, PyTree, Array, Array]:
    """Feeds the slots to the lanes of one device: whenever a lane is free it takes the longest client left."""
    num_slots = slots.steps.shape[0]
    lanes = run.plan.lanes_per_device(num_slots)
    busy = slots.steps > 0
    num_active = jnp.sum(busy, dtype=jnp.int32)
    # Longest first keeps the lanes level at the end; with one lane the order is free, so it stays as it was.
    queue = jnp.argsort(-slots.steps if lanes > 1 else ~busy).astype(jnp.int32)

    def lane_get(tree: PyTree, lane: Array) -> PyTree:
        return tree if lanes == 1 else jax.tree.map(lambda leaf: leaf[lane], tree)

    def lane_put(tree: PyTree, lane: Array, new: PyTree) -> PyTree:
        return new if lanes == 1 else jax.tree.map(lambda leaf, n: leaf.at[lane].set(n), tree, new)

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

    lead = () if lanes == 1 else (lanes,)
    int_zero = jnp.zeros(lead, jnp.int32)
    idle = _Lanes(
        slot=int_zero - 1,
        left=int_zero,
        start=int_zero,
        size=int_zero,
        seed=jnp.zeros((*lead, 2), jnp.uint32),
        key=blank(lead, slots.key.dtype),
        step=int_zero,
        loss=jnp.zeros(lead, run.loss.dtype),
        examples_seen=jnp.zeros(lead, run.loss.dtype),
        shared=[blank((*lead, *leaf.shape[1:]), leaf.dtype) for g, leaf in zip(grouped, leaves, strict=True) if g],
        carry=zeros(run.carry, *lead),
    )

    def is_free(state: Any) -> Array:
        # A lane wants service when its client is done, or when it is idle and clients wait.
        lane_state, taken, *_ = state
        return (lane_state.left == 0) & ((lane_state.slot >= 0) | (taken < num_active))

    def serve(state: Any) -> Any:
        """Finishes the client of one free lane, if it has one, and gives the lane the next client of the queue."""
        lane_state, taken, total, outputs, losses = state
        lane = jnp.argmax(is_free(state)).astype(jnp.int32)
        old = lane_get(lane_state, lane)
        done, slot = old.slot >= 0, jnp.maximum(old.slot, 0)
        group = slots.group[slot]
        shared, _, _, final_consts = values(old.shared)
        summand, output = run.final(final_consts, shared, old.carry, slots.weight[slot])
        total = jax.tree.map(lambda t, s: t.at[group].add(jnp.where(done, s, jnp.zeros_like(s))), total, summand)
        outputs = jax.tree.map(lambda o, n: o.at[slot].set(jnp.where(done, n, o[slot])), outputs, output)
        loss = old.loss / jnp.maximum(old.examples_seen, 1)
        losses = losses.at[slot].set(jnp.where(done, loss, losses[slot]))

        more = taken < num_active
        slot = queue[jnp.minimum(taken, num_slots - 1)]
        own = [leaf[slots.group[slot]] for g, leaf in zip(grouped, leaves, strict=True) if g]
        shared, init_consts, _, _ = values(own)
        client_input = jax.tree.map(lambda leaf: leaf[slot], slots.input)
        seed_key, init_key, step_key = jax.random.split(slots.key[slot], 3)
        new = _Lanes(
            slot=jnp.where(more, slot, -1),
            left=jnp.where(more, slots.steps[slot], 0),
            start=slots.start[slot],
            size=slots.size[slot],
            seed=shuffle.seed(seed_key),
            key=step_key,
            step=jnp.int32(0),
            loss=jnp.zeros_like(old.loss),
            examples_seen=jnp.zeros_like(old.examples_seen),
            shared=own,
            carry=run.init(init_consts, shared, client_input, init_key),
        )
        return lane_put(lane_state, lane, new), taken + more, total, outputs, losses

    def step_lane(lane: _Lanes) -> _Lanes:
        shared, _, step_consts, _ = values(lane.shared)
        batch = draw_batch(run.work, examples, lane.start, lane.size, lane.seed, lane.key, lane.step)
        carry, loss = run.step(step_consts, shared, lane.carry, batch)
        count = jnp.sum(batch.mask, dtype=loss.dtype)
        return lane._replace(
            left=jnp.maximum(lane.left - 1, 0),
            step=lane.step + 1,
            loss=lane.loss + loss * count,
            examples_seen=lane.examples_seen + count,
            carry=carry,
        )

    step_lanes = step_lane if lanes == 1 else jax.vmap(step_lane)

    def body(state: Any) -> Any:
        *state, executed = state
        state = jax.lax.while_loop(lambda s: jnp.any(is_free(s)), serve, tuple(state))
        lane_state, *rest = state
        # No lane finishes before the one with the fewest steps left, so that many run without looking.
        running = lane_state.slot >= 0
        segment = jnp.min(jnp.where(running, lane_state.left, jnp.iinfo(jnp.int32).max))
        segment = jnp.where(jnp.any(running), segment, 0)
        lane_state = jax.lax.fori_loop(0, segment, lambda _, s: step_lanes(s), lane_state)
        return lane_state, *rest, executed + segment * lanes

    def unfinished(state: Any) -> Array:
        lane_state, taken, *_ = state
        return jnp.any(lane_state.slot >= 0) | (taken < num_active)

    start = (
        idle,
        jnp.int32(0),
        zeros(run.summand, num_groups),
        zeros(run.output, num_slots),
        jnp.zeros((num_slots,), run.loss.dtype),
        jnp.int32(0),
    )
    _, _, total, outputs, losses, executed = jax.lax.while_loop(unfinished, body, start)
    return total, outputs, losses, jnp.full((num_groups,), executed)
