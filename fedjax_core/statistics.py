"""The statistics of a model through the rounds of any method: averaged, personal or frozen.

    task = models.task(models.cnn_bn(), "classification")
    fedavg = with_statistics(algorithms.fedavg(task, optax.sgd(0.1)), "average")
    state = fedavg.init(task.init(key))

A method sees the parameters only: its server optimizers, momenta and control variates know nothing of statistics, and
no line of it is written for them. They go beside the method, through every pass over clients that uploads something,
and come out of the forward passes of the local steps (`fedjax_core.tasks`).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_core import checks, sums, tasks
from fedjax_core.aggregation import Aggregator, Stacked, itself, weighted_mean
from fedjax_core.algorithm import Algorithm, Event, View, check_algorithm, is_private, parts_around, separate
from fedjax_core.batching import Batch
from fedjax_core.clients import ClientProgram, ClientResults, ClientTable, client_table, gather, scatter, takes_steps
from fedjax_core.messages import Pass, through
from fedjax_core.population import Cohort
from fedjax_core.sizes import Message
from fedjax_core.types import Array, Key, Metrics, PyTree, Variables

RULES = ("average", "personal", "frozen")


class StatisticsState(NamedTuple):
    """The state of a method whose model has statistics.

    Attributes:
      method: the state of the method, which knows the parameters only.
      statistics: those of the global model; personal ones are a `ClientTable` of `OwnStatistics`.
    """

    method: Any
    statistics: PyTree

    @property
    def round(self) -> Array:
        """int32[], number of rounds done, which the method counts."""
        counted: Array = self.method.round
        return counted


class OwnStatistics(NamedTuple):
    """A client's statistics, and in how many rounds it has trained, int32[]; in none they are the first ones."""

    values: PyTree
    rounds: Array


def with_statistics(algorithm: Algorithm, rule: str, *, num_clients: int | None = None) -> Algorithm:
    """A method for a task with statistics: what becomes of them, by one argument, whatever the method.

    In every pass that uploads something a client's statistics begin as the rule says, and after each local step they
    are those of the step's first forward pass, of its real examples only. Passes of one round follow each other: each
    begins with what the one before has left. Evaluations in a pass that sends nothing, in an event beside the rounds
    and on the server read statistics and leave them as they are.

      "average": x's statistics s go down and s_i - s up; s <- s + sum_S w_i (s_i - s), by the weights of the method's
        clients, and untouched by its optimizers and corrections.
      "personal": every client keeps its own, nothing of them is sent, and the view "personal" predicts with them. The
        global model, `params` and the view "global", predicts with the mean of those of the clients that have trained
        (as for a client that nobody has seen), or with the first ones if none has; no round uses that mean.
      "frozen": constants, which go down with the model. It trains with them as it predicts with them, for example after
        pretraining; this works with every method.

    Args:
      algorithm: an `Algorithm` whose factory was given a `Task` with statistics. It may have a part around it
        (`with_part`), which then sees no statistics; a part around the result sees their uploads as well.
      rule: "average", "personal" or "frozen".
      num_clients: size of the population, for "personal".

    Returns:
      The method. `init(variables)` takes `Variables`, as `task.init` gives them; its state is a `StatisticsState`,
      and the models of `params` and of its views are `Variables`.

    Raises:
      ValueError: for another rule, num_clients without "personal" or the other way round.
      TypeError: for "average" around a private part, which the statistics would go past.
      TypeError (`init`): if it is given no `Variables`, or is to average integers.
      TypeError (`round`, while it is traced): if the method cannot update statistics, because it evaluates the task in
        a transformation of its own or not at all in a pass that uploads; or if it was compiled before it was wrapped.
    """
    if isinstance(algorithm, str):
        raise TypeError(f"algorithm must be an Algorithm, got {algorithm!r}: the order is (algorithm, rule)")
    checks.one_of("rule", rule, RULES)
    if rule == "personal":
        checks.positive_int("num_clients", num_clients, "personal statistics need the size of the population")
    elif num_clients is not None:
        raise ValueError(
            f"num_clients={num_clients!r} means nothing to rule={rule!r}, which keeps no rows: leave it out"
        )
    check_algorithm(algorithm)
    if has_statistics(algorithm):
        raise TypeError("the method has statistics already: wrap it once, with the rule that is wanted")
    if any(view.groups is not None for view in algorithm.views.values()):
        raise TypeError(
            "the method's clients differ in architecture, and statistics are those of one: take models without "
            "(group or layer normalization in the place of batch normalization)"
        )

    if rule == "average" and is_private(algorithm):
        raise TypeError(
            "the method has a private part around it, and statistics that are averaged around that would reach the "
            "server without clip and noise: put the part outside, with_part(with_statistics(method, 'average'), part)"
        )

    frozen = rule == "frozen"

    def of_server(state: StatisticsState) -> PyTree:
        return _mean_of_trained(state.statistics) if rule == "personal" else state.statistics

    def init(variables: Variables, key: Key | None = None) -> StatisticsState:
        params, statistics = _checked(variables, rule)
        with tasks.using(statistics, frozen=frozen):
            method = algorithm.init(params, key)
        kept = statistics
        if rule == "personal":
            kept = client_table(num_clients or 0, OwnStatistics(statistics, jnp.int32(0)))
        return separate(StatisticsState(method, kept), variables)

    # The parameters are checked by the method, the statistics by `_checked`; statistics are no params to other methods.
    init._has_checks = init._has_statistics = True  # type: ignore[attr-defined]
    init._parts = parts_around(algorithm)  # type: ignore[attr-defined]

    def round(state: StatisticsState, cohort: Cohort, key: Key) -> tuple[StatisticsState, Metrics]:
        route = _ROUTES[rule](state.statistics)
        with tasks.using(of_server(state), frozen=frozen):
            method, metrics = algorithm.round(state.method, through(cohort, route), key)
        return StatisticsState(method, route.end(cohort)), metrics

    def reading(event: Event) -> Event:
        def run(state: StatisticsState, cohort: Cohort, key: Key) -> StatisticsState:
            route = _ROUTES[rule](state.statistics, updates=False)
            with tasks.using(of_server(state), frozen=frozen):
                return state._replace(method=event.run(state.method, through(cohort, route), key))

        return event._replace(run=run)

    def params(state: StatisticsState) -> Variables:
        return Variables(algorithm.params(state.method), of_server(state))

    views = {name: _shared_view(view, of_server, frozen) for name, view in algorithm.views.items()}
    if rule == "personal":
        views |= {name: _own_view(view) for name, view in algorithm.views.items() if name != "global"}
        views["personal"] = _own_view(algorithm.personal)
    events = {name: reading(event) for name, event in algorithm.events.items()}
    return Algorithm(init, round, params, views, events, algorithm.main)


def has_statistics(algorithm: Algorithm) -> bool:
    """Whether `with_statistics` is around a method."""
    return hasattr(algorithm.init, "_has_statistics")


def _shared_view(view: View, of_server: Callable[[StatisticsState], PyTree], frozen: bool) -> View:
    """The view whose models have the statistics that the server has."""

    def adapted(program: ClientProgram) -> ClientProgram:
        def using(shared: PyTree) -> Any:
            return tasks.using(shared[1], frozen=frozen)

        def init(shared: PyTree, row: PyTree, key: Key) -> PyTree:
            with using(shared):
                return program.init(shared[0], row, key)

        def step(shared: PyTree, carry: PyTree, batch: Batch) -> tuple[PyTree, Array]:
            with using(shared):
                return program.step(shared[0], carry, batch)

        def final(shared: PyTree, carry: PyTree) -> tuple[PyTree, PyTree]:
            with using(shared):
                return program.final(shared[0], carry)

        return ClientProgram(init, step, final)

    return View(
        shared=lambda state: (view.shared(state.method), of_server(state)),
        model=lambda shared, row: Variables(view.model(shared[0], row), shared[1]),
        rows=lambda state: view.rows(state.method),
        adapt=view.adapt and view.adapt.changed(adapted),
    )


def _own_view(view: View) -> View:
    """The view whose models have the statistics of the client, which are part of its row."""

    def rows(state: StatisticsState) -> ClientTable:
        own = view.rows(state.method)
        values = state.statistics.rows.values
        return state.statistics._replace(rows=(() if own is None else own.rows, values))

    def adapted(program: ClientProgram) -> ClientProgram:
        def init(shared: PyTree, row: PyTree, key: Key) -> PyTree:
            with tasks.using(row[1]):
                return program.init(shared, row[0], key), row[1]

        def step(shared: PyTree, carry: PyTree, batch: Batch) -> tuple[PyTree, Array]:
            own, statistics = carry
            with tasks.using(statistics):
                own, loss = program.step(shared, own, batch)
            return (own, statistics), loss

        def final(shared: PyTree, carry: PyTree) -> tuple[PyTree, PyTree]:
            own, statistics = carry
            with tasks.using(statistics):
                upload, output = program.final(shared, own)
            return upload, (output, statistics)

        return ClientProgram(init, step, final)

    return View(
        shared=lambda state: view.shared(state.method),
        model=lambda shared, row: Variables(view.model(shared, row[0]), row[1]),
        rows=rows,
        adapt=view.adapt and view.adapt.changed(adapted),
    )


def _checked(variables: object, rule: str) -> Variables:
    """The model with its arrays checked."""
    if not isinstance(variables, Variables) or not jax.tree.leaves(variables.statistics):
        got = "no statistics" if isinstance(variables, Variables) else type(variables).__name__
        raise TypeError(
            f"init needs Variables(params, statistics), got {got}: pass task.init(key), or take the method without "
            "with_statistics if its task has none"
        )
    params = checks.params(variables.params)
    for path, leaf in jax.tree_util.tree_flatten_with_path(variables.statistics)[0]:
        dtype = jnp.result_type(leaf)
        if rule == "average" and not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"statistics{jax.tree_util.keystr(path)} has dtype {dtype}, and a mean over clients is a float: make "
                "it a float, or choose 'personal' or 'frozen'"
            )
    statistics = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.result_type(leaf)), variables.statistics)
    if not checks.all_finite(statistics):
        checks.finite(statistics, "statistics", fix="begin with finite ones")
    return Variables(params, statistics)


def _mean_of_trained(table: ClientTable) -> PyTree:
    """The mean of the statistics of the clients that have trained, or of all if none has."""
    values, rounds = table.rows
    counted = (rounds > 0) | ~jnp.any(rounds > 0)

    def mean(leaf: Array) -> Array:
        weight = counted.astype(sums.accumulator(jnp.result_type(leaf)))
        total = sums.weighted(weight, leaf)
        return (total / jnp.sum(weight)).astype(leaf.dtype)

    return jax.tree.map(mean, values)


class _Route:
    """The way of the passes of one round, while the round is traced; `statistics` is what the last one has left."""

    frozen = False

    def __init__(self, statistics: PyTree, *, updates: bool = True) -> None:
        self.statistics = statistics
        self._updates = updates and not self.frozen
        self._updated = False
        self._sent: PyTree = None
        self._trace = tasks.current_trace()

    def __call__(self, asked: Pass) -> ClientResults:
        if self._trace != tasks.current_trace():
            raise TypeError(
                "the round that with_statistics is put around was compiled (or is looped over) by itself: wrap the "
                "method first and compile then, jax.jit(with_statistics(method, rule).round)"
            )
        return self._through(asked, self._updates and bool(jax.tree.leaves(asked.upload())))

    def _through(self, asked: Pass, update: bool) -> ClientResults:
        raise NotImplementedError

    def end(self, cohort: Cohort) -> PyTree:
        """The statistics after the round."""
        if self._updates and not self._updated and takes_steps():
            raise TypeError(
                "no client of this method updates the statistics of the task in a pass that uploads: freeze them, "
                "with_statistics(method, 'frozen'), or make the method with the task as its loss_fn"
            )
        self._trace = None
        return self._after(cohort)

    def _after(self, cohort: Cohort) -> PyTree:
        return self.statistics

    def _step(
        self, update: bool, program: ClientProgram, shared: PyTree, own: PyTree, statistics: PyTree, batch: Batch
    ) -> tuple[PyTree, PyTree, Array]:
        """A local step of a client: its carry and its statistics after it, and the loss."""
        if not update:
            with tasks.using(statistics, frozen=self.frozen):
                own, loss = program.step(shared, own, batch)
            return own, statistics, loss
        with tasks.updating(statistics) as seen:
            own, loss = program.step(shared, own, batch)
        if jax.tree.leaves(seen.statistics):
            self._updated = True
            checks.same_structure("statistics", seen.statistics, statistics, "those of task.init")
            statistics = seen.statistics
        return own, statistics, loss


class _Averaged(_Route):
    def _through(self, asked: Pass, update: bool) -> ClientResults:
        program = asked.program

        def init(shared: PyTree, inputs: PyTree, key: Key) -> PyTree:
            shared, begun = shared
            with tasks.using(begun, frozen=self.frozen):
                own = program.init(shared, inputs, key)
            return own, begun if update else ()

        def step(shared: PyTree, carry: PyTree, batch: Batch) -> tuple[PyTree, Array]:
            (shared, begun), (own, now) = shared, carry
            own, new, loss = self._step(update, program, shared, own, now if update else begun, batch)
            return (own, new if update else ()), loss

        def final(shared: PyTree, carry: PyTree) -> tuple[PyTree, PyTree]:
            (shared, begun), (own, now) = shared, carry
            with tasks.using(now if update else begun, frozen=self.frozen):
                upload, output = program.final(shared, own)
            # As a difference, as the model is sent: it is small where little has changed, for codecs and clipping.
            return ((upload, jax.tree.map(jnp.subtract, now, begun)) if update else upload), output

        # What clients have from an earlier pass of the round is not sent to them again.
        sent = Message(self.statistics, 0) if self._sent is self.statistics else self.statistics
        self._sent = self.statistics
        asked = asked._replace(program=ClientProgram(init, step, final), shared=(asked.shared, sent))
        if not update:
            return asked.run()
        decode = asked.decode

        def beside(change: Callable[[PyTree, Array], PyTree] | None) -> Callable[[PyTree, Array], PyTree] | None:
            return change and (lambda uploads, weights: (change(uploads[0], weights), uploads[1]))

        def of_upload(look: Callable[[PyTree], PyTree]) -> Callable[[PyTree], PyTree]:
            return lambda both: look(both[0])

        results = asked._replace(
            aggregator=_beside(asked.aggregator),
            decode=decode and (lambda sent: (decode(sent[0]), sent[1])),
            change=beside(asked.change),
            looks=tuple((of_upload(look), beside(before)) for look, before in asked.looks),
        ).run()
        aggregate, moved = results.aggregate
        self.statistics = jax.tree.map(jnp.add, self.statistics, moved)
        return results._replace(aggregate=aggregate)


class _Frozen(_Averaged):
    frozen = True


class _Personal(_Route):
    def _through(self, asked: Pass, update: bool) -> ClientResults:
        program = asked.program

        def init(shared: PyTree, inputs: PyTree, key: Key) -> PyTree:
            inputs, now = inputs
            with tasks.using(now):
                return program.init(shared, inputs, key), now

        def step(shared: PyTree, carry: PyTree, batch: Batch) -> tuple[PyTree, Array]:
            own, now = carry
            own, now, loss = self._step(update, program, shared, own, now, batch)
            return (own, now), loss

        def final(shared: PyTree, carry: PyTree) -> tuple[PyTree, PyTree]:
            own, now = carry
            with tasks.using(now):
                upload, output = program.final(shared, own)
            return upload, (output, now)

        rows, rounds = gather(self.statistics, asked.cohort)
        results = asked._replace(
            program=ClientProgram(init, step, final), client_inputs=(asked.client_inputs, rows)
        ).run()
        outputs, rows = results.outputs
        if update:
            self.statistics = scatter(self.statistics, asked.cohort, OwnStatistics(rows, rounds))
        return results._replace(outputs=outputs)

    def _after(self, cohort: Cohort) -> PyTree:
        # Once a round, however many passes it has made.
        rows, rounds = gather(self.statistics, cohort)
        return scatter(self.statistics, cohort, OwnStatistics(rows, rounds + 1))


_ROUTES: dict[str, type[_Route]] = {"average": _Averaged, "personal": _Personal, "frozen": _Frozen}


def _beside(inner: Aggregator | Stacked) -> Aggregator | Stacked:
    """The aggregation of (upload, statistics): the method's own of uploads, the weighted mean of statistics."""
    mean = weighted_mean()
    if isinstance(inner, Stacked):

        def finish(uploads: PyTree, weights: Array) -> tuple[PyTree, PyTree]:
            moved = sums.cast_like(sums.weighted(sums.shares(weights), uploads[1]), uploads[1])
            return inner.finish(uploads[0], weights), moved

        return Stacked(finish)

    mean_of = inner.mean_of
    return Aggregator(
        lambda upload, weight: (inner.lift(upload[0], weight), mean.lift(upload[1], weight)),
        lambda total: (inner.finish(total[0]), mean.finish(total[1])),
        mean_of if mean_of in (None, itself) else lambda upload: (mean_of(upload[0]), upload[1]),
    )
