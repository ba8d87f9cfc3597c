"""Runs one program on every client of a cohort, on whatever hardware there is.

The same `ClientProgram` runs one client after another, in lanes (several clients at once, each lane fed clients
back to back, so that unequal sizes waste little), and spread over a mesh of devices. The plan changes speed and
memory, never results beyond float rounding. C is the number of slots of the cohort.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedjax_core import checks, convolutions, execution, keys, lanes, masks, sizes, sums
from fedjax_core.aggregation import Aggregator, Stacked, check_weights, client_weights, weighted_mean
from fedjax_core.batching import Batch, LocalWork, draw_batch, local_work
from fedjax_core.plans import Plan
from fedjax_core.population import Cohort
from fedjax_core.types import Array, Key, Metrics, Params, PyTree, Weights


class ClientProgram(NamedTuple):
    """What a client does in a round, as three pure functions.

    Attributes:
      init: `init(shared, client_input, key) -> carry`, where the client starts.
      step: `step(shared, carry, batch) -> (carry, loss)`, one local step on a `Batch`; loss is float[].
      final: `final(shared, carry) -> (upload, output)`: the upload goes over the wire and is aggregated, the output
        is kept per client (new client state, diagnostics). A `Message` in the upload states its true size.
    """

    init: Callable[[PyTree, PyTree, Key], PyTree]
    step: Callable[[PyTree, PyTree, Batch], tuple[PyTree, Array]]
    final: Callable[[PyTree, PyTree], tuple[PyTree, PyTree]]


class ClientResults(NamedTuple):
    """What `for_each_client` returns.

    Attributes:
      aggregate: result of the aggregator: all that the server learns.
      outputs: second result of `ClientProgram.final`, leaves [C, ...]; zeros in slots that took no part.
      weights: float[C], weights used in the aggregation, 0 in slots that took no part.
      loss: float[C], mean training loss of each client over its examples and steps.
      steps: int32[C], local steps taken.
      executed_steps: int32[], steps executed over all lanes, idle ones included.
      bytes_up: float[C], bytes that each client has sent up in this pass, 0 in slots that took no part. Those of
        several passes of a round add up.
      bytes_down: float[C], bytes that it was sent.
      seen: what parts have seen of the uploads and not yet taken out (`fedjax_core.messages`); () for methods.
    """

    aggregate: PyTree
    outputs: PyTree
    weights: Array
    loss: Array
    steps: Array
    executed_steps: Array
    bytes_up: Array
    bytes_down: Array
    seen: tuple[PyTree, ...] = ()


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
    """Runs a program on every client of a cohort.

    Whatever the server uses is in the upload: outputs stay with the client, as its new state or as the input of its
    next pass. A client's randomness is `fold_in(key, client_id)`: it does not depend on the slot, the lane, the device
    or the other clients.

    Args:
      program: what each client does.
      shared: what is sent to every participant, any pytree, counted in `bytes_down`. A `Message` in it states its true
        size; clients get its payload.
      cohort: the clients.
      key: the round's key.
      client_inputs: per-client input, leaves [C, ...], for example gathered client state; none by default.
      work: local steps and batches.
      weights: "uniform", "examples" or float[num_clients].
      aggregator: what to do with the uploads; the weighted mean unless given.
      plan: how to use the hardware.

    Raises:
      TypeError: if a step changes the structure, shape or dtype of the carry, or an argument is of another type.
      ValueError: if a step's loss is not a scalar, or what is given per client or per slot does not have one entry for
        each.
    """
    if not isinstance(cohort, Cohort):
        raise TypeError(f"cohort must be a Cohort, got {type(cohort).__name__}: pass population.cohort(ids)")
    if not isinstance(aggregator, Aggregator | Stacked | None):
        raise TypeError(
            f"aggregator must be an Aggregator or Stacked, got {checks.described(aggregator)}: pass for example "
            "weighted_mean() or stacked(rule)"
        )
    if cohort.route is not None:
        from fedjax_core.messages import Pass  # which runs passes by this function

        options = {"work": work, "weights": weights, "plan": plan}
        routed: ClientResults = cohort.route(
            Pass(program, shared, client_inputs, cohort, key, options, aggregator or weighted_mean())
        )
        return routed
    replacement = _REPLACEMENT.get()
    if replacement is not None:
        options = {"work": work, "weights": weights, "aggregator": aggregator, "plan": plan}
        with masks.with_public(cohort.public):
            return replacement(program, shared, cohort, key, client_inputs, **options)
    key = keys.one(key)
    if not isinstance(work, LocalWork):
        raise TypeError(f"work must be LocalWork, got {checks.described(work)}: pass local_work(batch_size=20)")
    _check_program(program)
    work.check(cohort)
    aggregator = aggregator or weighted_mean()
    if plan is not None and not isinstance(plan, Plan):
        raise TypeError(f"plan must be a Plan, got {type(plan).__name__}: pass for example Plan(lanes=4)")
    plan = plan or Plan()
    plan.check_batch(work.batch_size)
    weight = client_weights(weights, cohort)
    client_keys = keys.derive(key, jnp.maximum(cohort.ids, 0))
    steps = work.steps(cohort.ids, cohort.sizes)
    client_inputs = execution.strip_weak_type(client_inputs)
    for leaf in jax.tree.leaves(client_inputs):
        if jnp.shape(leaf)[:1] != cohort.ids.shape:
            raise ValueError(
                f"client_inputs has a leaf of shape {jnp.shape(leaf)}, but the cohort has "
                f"{cohort.ids.shape[0]} slots: gather the rows of cohort.ids first"
            )
    slots = lanes.Slots(
        jnp.zeros_like(cohort.ids), cohort.starts, cohort.sizes, steps, weight, client_keys, client_inputs
    )

    sizes.check_messages("shared", shared, cohort.ids.shape[0])
    down, shared = sizes.sent_bytes(shared), sizes.opened(shared)

    # The program may close over traced values (a learning rate under vmap, say). Tracing it here turns those into
    # explicit inputs, so that the custom batching rule below sees them.
    shared = execution.strip_weak_type(shared)
    first = jax.tree.map(lambda leaf: leaf[0], slots)
    seed = jax.ShapeDtypeStruct((2,), jnp.uint32)
    batch = jax.eval_shape(
        partial(draw_batch, work), cohort.examples, first.start, first.size, seed, first.key, first.start
    )

    asked: list[bool] = []
    up: list[Any] = []  # bytes of an upload; a traced number goes along with the outputs

    @contextmanager
    def as_this(client: Array) -> Iterator[None]:
        with as_client(client, asked, cohort.population_size), masks.with_public(cohort.public):
            yield

    def init(client: Array, shared: PyTree, client_input: PyTree, key: Key) -> PyTree:
        with as_this(client):
            return execution.strip_weak_type(program.init(shared, client_input, key))

    def step(client: Array, shared: PyTree, carry: PyTree, batch: Batch):
        with as_this(client):
            return program.step(shared, carry, batch)

    def final(client: Array, shared: PyTree, carry: PyTree, weight: Array) -> tuple[PyTree, PyTree]:
        with as_this(client):
            upload, output = _pair(program.final(shared, carry))
        sizes.check_messages("the upload", upload)
        size, upload = sizes.sent_bytes(upload), sizes.opened(upload)
        up[:] = [None if isinstance(size, jax.Array) else size]
        kept = (upload if isinstance(aggregator, Stacked) else (), output, size if up[0] is None else ())
        summand = () if isinstance(aggregator, Stacked) else aggregator.lift(upload, weight)
        return execution.strip_weak_type(summand), execution.strip_weak_type(kept)

    client = jnp.int32(0)
    init_fn, carry = execution.close_convert(init, client, shared, first.input, first.key)
    step_fn, stepped = execution.close_convert(step, client, shared, carry, batch)
    _check_step(carry, stepped)
    # Under `vmap` of several lanes every part would be computed. Where the caller vmaps over seeds there are more slots
    # than those of the cohort.
    if plan.batch_parts > 1 and lanes.lanes_of(plan, carry, lanes.TINY_LANES) == 1:
        step_fn = _by_rows(step, step_fn, plan.batch_parts, (client, shared, carry), batch)
    final_fn, (summand, output) = execution.close_convert(final, client, shared, carry, first.weight)
    if asked:  # the client's id is carried along
        slots = slots._replace(input=(jnp.maximum(cohort.ids, 0), client_inputs))
        carry = (client, carry)
    init_fn, step_fn, final_fn = _with_client(init_fn, step_fn, final_fn, carried=bool(asked))

    leaves, treedef = jax.tree.flatten((shared, init_fn.consts, step_fn.consts, final_fn.consts))
    run = lanes.Run(
        work,
        plan,
        init_fn.call,
        step_fn.call,
        final_fn.call,
        treedef,
        carry,
        summand,
        output,
        stepped[1],
        rewrite=plan.fast_convolutions
        and any(convolutions.has_any(function.jaxpr) for function in (init_fn, step_fn, final_fn)),
    )
    total, outputs, loss, executed = execution.run_slots(run, (False,) * len(leaves), 1, slots, leaves, cohort.examples)
    uploads, outputs, stated = outputs
    if isinstance(aggregator, Stacked):
        aggregate = aggregator.finish(uploads, weight)
    else:
        aggregate = aggregator.finish(jax.tree.map(lambda leaf: leaf[0], total))
    return ClientResults(
        aggregate=aggregate,
        outputs=outputs,
        weights=weight,
        loss=loss,
        steps=steps,
        executed_steps=executed[0],
        bytes_up=_to_participants(cohort, stated if up[0] is None else up[0]),
        bytes_down=_to_participants(cohort, down),
    )


def _pair(ended: Any) -> tuple[PyTree, PyTree]:
    """What `ClientProgram.final` returns, after a look whether it is a pair."""
    if not isinstance(ended, tuple) or len(ended) != 2 or hasattr(ended, "_fields"):
        raise TypeError(
            f"final must return the pair (upload, output), got {checks.described(ended)}: return () in the place of "
            "the output of a client that keeps nothing, or of the upload of one that sends nothing"
        )
    return ended


def _to_participants(cohort: Cohort, count: Any) -> Array:
    """float[C], a number of bytes (or one for each slot) for participants, 0 for the others."""
    return jnp.where(cohort.mask, jnp.asarray(count, jnp.result_type(float)), 0)


def bytes_for_each(cohort: Cohort, tree: PyTree) -> Array:
    """float[C], the bytes of a tree for every participant of a cohort, 0 in other slots.

    For what a method sends outside of `for_each_client`; a `Message` in the tree states its true size.
    """
    sizes.check_messages("tree", tree, cohort.ids.shape[0])
    return _to_participants(cohort, sizes.sent_bytes(tree))


def check_results(name: str, results: object, fix: str) -> None:
    """Raises TypeError unless these are the results of a pass."""
    if not isinstance(results, ClientResults):
        raise TypeError(
            f"{name} must be ClientResults, got {type(results).__name__}: pass what for_each_client returned, {fix}"
        )


def _check_program(program: object) -> None:
    """Raises TypeError unless the functions of a program can be called as clients call them."""
    if not isinstance(program, ClientProgram):
        raise TypeError(
            f"program must be a ClientProgram, got {checks.described(program)}: pass ClientProgram(init, step, final)"
        )
    arguments = (("shared", "client_input", "key"), ("shared", "carry", "batch"), ("shared", "carry"))
    returns = ("carry", "(carry, loss)", "(upload, output)")
    for name, taken, result in zip(ClientProgram._fields, arguments, returns, strict=True):
        example = f"a function ({', '.join(taken)}) -> {result}"
        checks.takes(f"program.{name}", getattr(program, name), taken, example=example)


def upload_of(program: ClientProgram, shared: PyTree, client_inputs: PyTree, key: Key) -> PyTree:
    """Shapes and dtypes of what a client uploads, the payloads of messages in their place."""
    return _end_of(program, shared, client_inputs, key)[0]


def _end_of(program: ClientProgram, shared: PyTree, client_inputs: PyTree, key: Key) -> tuple[PyTree, PyTree]:
    """Shapes and dtypes of what a client uploads and keeps, without its steps, which change neither."""

    def end(shared: PyTree, client_inputs: PyTree, key: Key) -> PyTree:
        own = jax.tree.map(lambda leaf: leaf[0], client_inputs)
        with as_client(jnp.int32(0)):
            carry = execution.strip_weak_type(program.init(shared, own, key))
            upload, output = _pair(program.final(shared, carry))
        return execution.strip_weak_type((sizes.opened(upload), output))

    ends: tuple[PyTree, PyTree] = jax.eval_shape(end, sizes.opened(shared), client_inputs, keys.one(key))
    return ends


def without_steps(
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
    """Zeros in the shapes and dtypes of what `for_each_client` returns, for whom wants no more (see `replaced`).

    Steps cost by far the most to trace, and are not traced. Losses are of the default float type.
    """
    upload, output = _end_of(program, shared, client_inputs, key)
    aggregator = aggregator or weighted_mean()
    weight, nothing = client_weights(weights, cohort), _to_participants(cohort, 0)

    def blank(shapes: PyTree, *slots: int) -> PyTree:
        def one(leaf: Any) -> Array:  # there is no zero key
            shape, is_key = (*slots, *leaf.shape), jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
            return jnp.broadcast_to(keys.one(key), shape) if is_key else jnp.zeros(shape, leaf.dtype)

        return jax.tree.map(one, shapes)

    if isinstance(aggregator, Stacked):
        aggregate = aggregator.finish(blank(upload, *weight.shape), weight)
    else:
        aggregate = aggregator.finish(aggregator.lift(blank(upload), weight[0]))
    steps = jnp.zeros_like(cohort.ids)
    return ClientResults(
        aggregate, blank(output, *weight.shape), weight, nothing, steps, steps[0], bytes_up=nothing, bytes_down=nothing
    )


_REPLACEMENT: ContextVar[Callable[..., ClientResults] | None] = ContextVar("replacement", default=None)


@contextmanager
def replaced(for_each_client: Callable[..., ClientResults] | None) -> Iterator[None]:
    """Inside, `for_each_client` is this function of the same arguments, under whatever name a method imported it.

    For tests: a method can be compared with what it gives on another implementation (`fedjax_core.reference`). None
    puts the real one back.
    """
    token = _REPLACEMENT.set(for_each_client)
    try:
        yield
    finally:
        _REPLACEMENT.reset(token)


def takes_steps() -> bool:
    """Whether clients take steps in the passes that are traced, which they do not where only shapes are wanted."""
    return _REPLACEMENT.get() is not without_steps


_CLIENT: ContextVar[tuple[Array, list[bool], int | None] | None] = ContextVar("client", default=None)


@contextmanager
def as_client(client: Array, asked: list[bool] | None = None, population_size: int | None = None) -> Iterator[None]:
    """While a client's functions are called: `current_client` is `client`, and `asked` is not empty once it was."""
    token = _CLIENT.set((client, [] if asked is None else asked, population_size))
    try:
        yield
    finally:
        _CLIENT.reset(token)


def current_client() -> Array:
    """int32[], id of the client whose program is being called, as `jax.lax.axis_index` is the index along an axis.

    For an optimizer that differs by client. Outside of a client's program it is 0.
    """
    current = _CLIENT.get()
    if current is None:
        return jnp.int32(0)
    client, asked, _ = current
    asked.append(True)
    return client


def current_population_size() -> int | None:
    """Number of clients of the population that the client is of whose program is being called, if it is known."""
    current = _CLIENT.get()
    return None if current is None else current[2]


def _by_rows(
    step: Callable[..., Any], whole: execution.ClosedFunction, parts: int, others: tuple[PyTree, ...], batch: Batch
) -> execution.ClosedFunction:
    """A step that is computed on the first parts of its batch, those that have an example.

    Args:
      step: `step(*others, batch) -> (carry, loss)`.
      whole: the same, traced on a whole batch.
      parts: equal parts of a batch; padding is at its end.
      others: shapes of the arguments before the batch.
      batch: shapes of a batch.
    """
    rows = batch.mask.shape[0] // parts

    def first(batch: Batch, count: int) -> Batch:
        cut = jax.tree.map(lambda leaf: leaf[: count * rows], (batch.examples, batch.mask))
        return batch._replace(examples=cut[0], mask=cut[1])

    shorter = [
        execution.close_convert(step, *others, jax.eval_shape(partial(first, count=count), batch))[0]
        for count in range(1, parts)
    ]
    steps = [*shorter, whole]
    ends = np.cumsum([len(each.consts) for each in steps])

    def call(consts: list[Array], *args: PyTree) -> PyTree:
        *rest, batch = args

        def branch(count: int, consts: list[Array], rest: list[PyTree], batch: Batch) -> PyTree:
            own = consts[ends[count] - len(steps[count].consts) : ends[count]]
            return steps[count].call(own, *rest, first(batch, count + 1))

        needed = (jnp.sum(batch.mask, dtype=jnp.int32) + (rows - 1)) // rows
        branches = [partial(branch, count) for count in range(parts)]
        return jax.lax.switch(needed - 1, branches, consts, rest, batch)

    return whole._replace(call=call, consts=[const for each in steps for const in each.consts])


def _with_client(
    init: execution.ClosedFunction, step: execution.ClosedFunction, final: execution.ClosedFunction, *, carried: bool
) -> tuple[execution.ClosedFunction, execution.ClosedFunction, execution.ClosedFunction]:
    """A program's traced functions without their first argument, the client's id: it is carried along, or 0."""

    def split(value: PyTree) -> tuple[Array, PyTree]:
        return value if carried else (jnp.int32(0), value)

    def join(client: Array, value: PyTree) -> PyTree:
        return (client, value) if carried else value

    def call_init(consts: list[Array], shared: PyTree, client_input: PyTree, key: Key) -> PyTree:
        client, own = split(client_input)
        return join(client, init.call(consts, client, shared, own, key))

    def call_step(consts: list[Array], shared: PyTree, carry: PyTree, batch: Batch):
        client, own = split(carry)
        own, loss = step.call(consts, client, shared, own, batch)
        return join(client, own), loss

    def call_final(consts: list[Array], shared: PyTree, carry: PyTree, weight: Array):
        client, own = split(carry)
        return final.call(consts, client, shared, own, weight)

    return init._replace(call=call_init), step._replace(call=call_step), final._replace(call=call_final)


class LocalTraining(NamedTuple):
    """The local options of a method, checked; `run` is `for_each_client` with them filled in.

    Attributes:
      work: local steps and batches.
      weights: "uniform", "examples" or float[num_clients].
      plan: execution plan, or None.
    """

    work: LocalWork
    weights: Weights
    plan: Plan | None

    def full_pass(self) -> "LocalTraining":
        """The same for one pass over all examples of a client, in stored order."""
        return self._replace(work=local_work(self.work.batch_size, order="sequential"))

    def one_step(self) -> "LocalTraining":
        """The same for a single local step."""
        return self._replace(work=self.work._replace(num_epochs=None, num_steps=1))

    def run(
        self,
        program: ClientProgram,
        shared: PyTree,
        cohort: Cohort,
        key: Key,
        client_inputs: PyTree = (),
        *,
        aggregator: Aggregator | Stacked | None = None,
    ) -> ClientResults:
        """Runs a program on every client of a cohort; see `for_each_client`."""
        return for_each_client(
            program,
            shared,
            cohort,
            key,
            client_inputs=client_inputs,
            work=self.work,
            weights=self.weights,
            aggregator=aggregator,
            plan=self.plan,
        )


def kept_by_client(program: ClientProgram) -> ClientProgram:
    """The program with its upload as output instead: nothing is sent."""
    return program._replace(final=lambda shared, carry: ((), sizes.opened(program.final(shared, carry)[0])))


def local_training(*, weights: Weights = "uniform", plan: Plan | None = None, **work: Any) -> LocalTraining:
    """Checks the options of `LocalOptions`, which every method takes, and keeps them together."""
    checks.options(work, [*LocalWork._fields, "weights", "plan"])
    check_weights(weights)
    if plan is not None and not isinstance(plan, Plan):
        raise TypeError(f"plan must be a Plan, got {type(plan).__name__}: pass for example Plan(lanes=4)")
    return LocalTraining(local_work(**work), weights, plan)


def num_scalars(tree: PyTree) -> int:
    """Number of scalars in a pytree of arrays (or of their shapes)."""
    return sum(int(np.prod(jnp.shape(leaf))) for leaf in jax.tree.leaves(tree))


class ClientTable(NamedTuple):
    """State that a method keeps for every client, one row each.

    A type of its own, so that what handles states (placing them on a mesh, keeping rows in host memory, predicting
    memory) can tell rows of clients from everything else. Methods touch it only through `gather` and `scatter`. A
    NamedTuple like the states that hold it, so that whatever writes pytrees to files (flax.serialization, orbax,
    pickle) knows it without being told.

    Attributes:
      rows: pytree, leaves [num_clients, ...]; or [C, ...], the rows of one cohort (`fedjax_core.staging`).
      index: int32[num_clients], the row of each client, -1 for a client that has none, where not every client has one
        (`Groups.table`); () where row i is client i's.
    """

    rows: PyTree
    index: PyTree = ()


def client_table(num_clients: int, row: PyTree) -> ClientTable:
    """The same first row for every client; num_clients is at least 1 (0 where a method keeps no rows)."""

    def repeat(leaf: Array) -> Array:
        return jnp.broadcast_to(jnp.asarray(leaf, jnp.result_type(leaf)), (num_clients, *jnp.shape(leaf)))

    return ClientTable(jax.tree.map(repeat, row))


def split_tables(state: PyTree) -> tuple[PyTree, list[PyTree]]:
    """(the state with its tables of per-client state without their rows, these rows)."""
    rows = [table.rows for table in tables_of(state)]
    return map_tables(lambda table: table._replace(rows=None), state), rows


def join_tables(state: PyTree, rows: list[PyTree]) -> PyTree:
    """Puts rows into the tables that `split_tables` has left empty."""
    remaining = iter(rows)
    return map_tables(lambda table: table._replace(rows=next(remaining)), state)


def tables_of(state: PyTree) -> list[ClientTable]:
    """The tables of per-client state in a state, in the order of `split_tables`."""
    nodes = jax.tree.leaves(state, is_leaf=_is_table)
    return [node for node in nodes if _is_table(node)]


def map_tables(function: Callable[[ClientTable], ClientTable], state: PyTree) -> PyTree:
    """The state with what a function makes of its tables in their place."""
    return jax.tree.map(lambda node: function(node) if _is_table(node) else node, state, is_leaf=_is_table)


def _is_table(node: PyTree) -> bool:
    return isinstance(node, ClientTable)


def check_tables(state: PyTree, cohort: Cohort) -> None:
    """Checks that the tables of per-client state in `state` have one row for each client of the cohort's population.

    Raises:
      ValueError: if one has not, which would read other clients' rows and drop what is written.
    """
    for table in tables_of(state):
        has_index = has_own_index(table)
        expected = cohort.population_size if has_index else cohort.table_size
        for leaf in jax.tree.leaves(table.index if has_index else table.rows):
            rows = jnp.shape(leaf)[0] if jnp.ndim(leaf) else 0
            if expected is not None and rows != expected:
                made_with = "groups of as many clients" if has_index else f"num_clients={cohort.population_size}"
                made_with += ", and its parts with like=the population"
                raise ValueError(
                    f"the state has rows for {rows} clients, but the population has {cohort.population_size}: make the "
                    f"method with {made_with}"
                    if expected == cohort.population_size
                    else f"the state has tables of {rows} rows, but the cohort has {expected} slots"
                )


def has_own_index(table: ClientTable) -> bool:
    """Whether rows are found by `table.index`."""
    return bool(jax.tree.leaves(table.index))


def _rows_of(table: ClientTable, cohort: Cohort) -> Array:
    """int32[C], the row of each slot's client in the table, -1 for a client without."""
    return table.index[jnp.maximum(cohort.ids, 0)] if has_own_index(table) else cohort.rows


def gather(table: ClientTable, cohort: Cohort) -> PyTree:
    """The cohort's rows, leaves [C, ...] (any row stands in for an empty slot, or for a client without one).

    Raises:
      ValueError: if the table is of another population, see `check_tables`.
    """
    _check_table(table)
    check_tables(table, cohort)
    rows = _rows_of(table, cohort)
    if has_own_index(table):
        rows = jnp.maximum(rows, 0)
    return jax.tree.map(lambda leaf: leaf[rows], table.rows)


def scatter(table: ClientTable, cohort: Cohort, rows: PyTree) -> ClientTable:
    """Writes the cohort's rows, leaves [C, ...], back; only rows of participants that have one change.

    Raises:
      ValueError: if the table is of another population, see `check_tables`.
    """
    _check_table(table)
    check_tables(table, cohort)
    _check_rows(table, cohort, rows)
    own = _rows_of(table, cohort)
    writes = cohort.mask & (own >= 0) if has_own_index(table) else cohort.mask

    def write(leaf: Array, row: Array) -> Array:
        index = jnp.where(writes, own, leaf.shape[0])  # out of range: dropped
        return leaf.at[index].set(row.astype(leaf.dtype), mode="drop")

    return table._replace(rows=jax.tree.map(write, table.rows, rows))


def _check_table(table: object) -> None:
    if not isinstance(table, ClientTable):
        got = checks.misplaced(table) or type(table).__name__
        raise TypeError(
            f"table must be a ClientTable, got {got}: make one by client_table(num_clients, row); the order of "
            "arguments is (table, cohort)"
        )


def _check_rows(table: ClientTable, cohort: Cohort, rows: PyTree) -> None:
    """Raises ValueError unless there is a row of the table's shapes for each slot, which would be broadcast else."""
    expected: object = jax.tree.structure(table.rows)
    given: object = jax.tree.structure(rows)
    if given != expected:
        raise ValueError(
            f"rows have the structure {given!s:.200} and the table's rows {expected!s:.200}: write what gather "
            "returned, changed"
        )
    there, slots = jax.tree_util.tree_flatten_with_path(table.rows)[0], cohort.ids.shape[0]
    for (path, leaf), row in zip(there, jax.tree.leaves(rows), strict=True):
        shape = (slots, *jnp.shape(leaf)[1:])
        if jnp.shape(row) != shape:
            raise ValueError(
                f"rows{jax.tree_util.keystr(path)} has shape {list(jnp.shape(row))}, but {slots} slots have rows of "
                f"shape {list(shape)}: write one row for each slot of the cohort"
            )


def round_metrics(results: ClientResults, cohort: Cohort, old: Params, new: Params, extra: PyTree = ()) -> Metrics:
    """The metrics every method reports, from a pass over the clients and the global model before and after.

    A round of several passes gives the results of one with the bytes of all, `results._replace(bytes_up=...)`.
    """
    # Participants who all weigh nothing count alike; a round without participants has no loss.
    weights = jnp.where(jnp.any(results.weights > 0), results.weights, cohort.mask.astype(results.weights.dtype))
    weight = sums.total(weights)
    loss = sums.weighted(weights, results.loss)
    loss = (loss / jnp.where(weight > 0, weight, 1).astype(loss.dtype)).astype(results.loss.dtype)
    return Metrics(
        loss=jnp.where(weight > 0, loss, jnp.nan),
        update_norm=sums.norm(optax.tree.sub(sums.widen(new), sums.widen(old))),
        bytes_up=_mean_bytes(results.bytes_up, cohort),
        bytes_down=_mean_bytes(results.bytes_down, cohort),
        participants=cohort.num_participants,
        extra=extra,
    )


def _mean_bytes(counts: Array, cohort: Cohort) -> Array:
    """float[], the mean over participants; where all are alike exactly that number, however large."""
    largest = jnp.max(counts)
    return largest - mean_over_participants(largest - counts, cohort)


def mean_over_participants(values: Array, cohort: Cohort) -> Array:
    """float[], mean of numbers [C] over the participants of a cohort; 0 where there are none."""
    total = sums.total(jnp.where(cohort.mask, values, 0))
    return (total / jnp.maximum(cohort.num_participants, 1)).astype(jnp.result_type(float))


def _check_step(carry: PyTree, stepped: object) -> None:
    if not isinstance(stepped, tuple) or len(stepped) != 2:
        raise TypeError("step must return (carry, loss): return the training loss of the batch beside the carry")
    new, loss = stepped
    if jnp.shape(loss) != ():
        raise ValueError(
            f"the loss of a step must be a scalar, got shape {jnp.shape(loss)}: take the mean over the batch"
        )
    before: object = jax.tree.structure(carry)
    after: object = jax.tree.structure(new)
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
