"""A federated method as pure functions, and the checks that every one of them gets."""

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_core import checks, keys, masks
from fedjax_core.batching import LocalWork
from fedjax_core.clients import (
    ClientProgram,
    ClientResults,
    ClientTable,
    check_tables,
    has_own_index,
    join_tables,
    round_metrics,
    split_tables,
    tables_of,
)
from fedjax_core.groups import Groups
from fedjax_core.placement import unmeshed
from fedjax_core.population import Cohort
from fedjax_core.types import Array, ArrayLike, Counter, Key, Metrics, Params, PyTree

MOST_ROUNDS = 2**31 - 1
"""What the counter of a state can hold."""


class View(NamedTuple):
    """How a method predicts: what all clients share, what is a client's own, and the model made of both.

    No more than a client's row is ever held for each client: where the body of a model is shared, evaluating a thousand
    clients takes one body (`evaluate_view`).

    Attributes:
      shared: `shared(state)`, what is the same for all clients; the global model in the view "global".
      model: `model(shared, row) -> params`, with which a client predicts; what is shared unless given.
      rows: `rows(state) -> ClientTable`, each client's own part; nothing unless given.
      adapt: what a client does with its own examples before it predicts, or None.
      groups: where clients differ in architecture, who has which, else None. With groups `shared(state)` and
        `rows(state)` are tuples of one entry for each, and `model` and `adapt` are given those of the client's group.
    """

    shared: Callable[[Any], PyTree]
    model: Callable[[PyTree, PyTree], Params] = lambda shared, row: shared
    rows: Callable[[Any], ClientTable | None] = lambda state: None
    adapt: "Adaptation | None" = None
    groups: Groups | None = None

    def of_group(self, number: int) -> "View":
        """How the clients of one group predict: a view of theirs alone."""

        def entry(given: Callable[[Any], Any]) -> Callable[[Any], Any]:
            def of_state(state: Any) -> Any:
                entries = given(state)
                return None if entries is None else entries[number]

            return of_state

        return self._replace(shared=entry(self.shared), rows=entry(self.rows), groups=None)


class Adaptation(NamedTuple):
    """A client program that is run before prediction: fine-tuning, a meta-learner's inner steps, test-time adaptation.

    Attributes:
      program: gets `view.shared(state)` as what is shared and the client's row as its input, and gives as output what
        the view's `model(shared, row)` takes in the place of the row. It uploads nothing.
      work: local steps and batches.
      first: what is done before, or None; its output is the row that the program gets.
    """

    program: ClientProgram
    work: LocalWork
    first: "Adaptation | None" = None

    def phases(self) -> list["Adaptation"]:
        """One pass over a client's examples after the other."""
        return [*(self.first.phases() if self.first else []), self]

    def changed(self, change: Callable[[ClientProgram], ClientProgram]) -> "Adaptation":
        """The same with every program changed."""
        return self._replace(program=change(self.program), first=self.first and self.first.changed(change))


Phase = Literal["before", "task", "after"]


class Event(NamedTuple):
    """What a method does beside its rounds.

    Attributes:
      run: `run(state, cohort, key) -> state`.
      when: "before" the first round, at a "task"'s end, or "after" the last round.
    """

    run: Callable[[Any, Cohort, Key], Any]
    when: Phase


class _Functions(NamedTuple):
    init: Callable[..., Any]
    round: Callable[[Any, Any, Key], tuple[Any, Metrics]]
    params: Callable[[Any], Params]
    views: Mapping[str, View]
    events: Mapping[str, Event]
    main: str | None


class _ByName(dict[str, Any]):
    """A dict that says what it has, where somebody asks for something else."""

    def __init__(self, what: str, entries: Mapping[str, Any]) -> None:
        super().__init__(entries)
        self._what = what

    def __missing__(self, name: object) -> Any:
        there = ", ".join(map(repr, self)) or "none"
        raise KeyError(f"the method has no {self._what} {name!r}: its {self._what}s are {there}")

    def __reduce__(self) -> Any:
        return _ByName, (self._what, dict(self))


class ModelState(NamedTuple):
    """The state of a method that keeps nothing but the global model x, and the number of rounds done."""

    params: Params
    round: Counter = 0


class Algorithm(_Functions):
    """A federated method as pure functions.

    What they are given is checked before they see it, while tracing and at no cost in the compiled round: `init` gets
    arrays of floats (`checks.params`), and `round` and events a state, a cohort, tables of per-client state that have
    one row for each client of the cohort's population, and one typed key (`keys.one`).

    Attributes:
      init: `init(params, key=None) -> state`. Every state has a field `round`, int32[], the number of rounds done. The
        key is for methods that draw something before the first round; others leave it alone.
      round: `round(state, cohort, key) -> (state, Metrics)`, one whole federated round.
      params: `params(state)`, the global model.
      views: how the method predicts, by name. "global" is always there, the global model unless given; "personal" is
        what each client would use itself; other names are the method's own.
      events: what the method does beside its rounds, by name; see `run_events`.
      main: name of the view that the method is to be judged by, or None; see `main_view`.
    """

    __slots__ = ()

    def __new__(
        cls,
        init: Callable[..., Any],
        round: Callable[[Any, Any, Key], tuple[Any, Metrics]],
        params: Callable[[Any], Params],
        views: Mapping[str, View] | None = None,
        events: Mapping[str, Event] | None = None,
        main: str | None = None,
    ) -> "Algorithm":
        """The functions with their checks; those that have them already stay as they are."""
        for what, function, arguments in (
            ("init", init, "a function params -> state"),
            ("round", round, "a function (state, cohort, key) -> (state, metrics)"),
            ("params", params, "a function state -> params"),
        ):
            checks.function(what, function, arguments)
        for what, given in (("views", views), ("events", events)):
            if given is not None and not isinstance(given, Mapping):
                raise TypeError(f"{what} must be a dict by name, got {type(given).__name__}: pass {{name: ...}}")
        for name, view in (views or {}).items():
            if not isinstance(view, View):
                raise TypeError(
                    f"views[{name!r}] must be a View, got {type(view).__name__}: pass for example View(shared, model, "
                    "rows)"
                )
        checked = {}
        for name, event in (events or {}).items():
            if not isinstance(event, Event):
                raise TypeError(
                    f"events[{name!r}] must be an Event, got {type(event).__name__}: pass for example "
                    "Event(run, 'before')"
                )
            checks.one_of(f"events[{name!r}].when", event.when, get_args(Phase))
            checked[name] = event._replace(run=checked_event(name, event.run))
        params = checked_params(params)
        views = _ByName("view", {"global": View(params), **(views or {})})
        events = _ByName("event", checked)
        if main is not None:
            checks.one_of("main", main, tuple(views))
        return super().__new__(cls, checked_init(init), checked_round(round), params, views, events, main)

    @classmethod
    def _make(cls, functions: Iterable[Any]) -> "Algorithm":  # type: ignore[override]
        """Also behind `_replace`: a function that is put in another's place gets the checks too."""
        return cls(*functions)

    def __hash__(self) -> int:
        """That of its functions, so that it can be a static argument; views and events are dicts, which have none."""
        return hash((self.init, self.round, self.params))

    @property
    def personal(self) -> View:
        """The view that each client would use: "personal" where the method has it, else "global"."""
        return self.views.get("personal", self.views["global"])

    @property
    def main_view(self) -> str:
        """Name of the view that the method is to be judged by: `main`, or "personal" if there is that, or "global"."""
        return self.main or ("personal" if "personal" in self.views else "global")

    def events_at(self, when: Phase) -> list[Event]:
        """The events of that time, in their order."""
        checks.one_of("when", when, get_args(Phase))
        return [event for event in self.events.values() if event.when == when]

    def client_params(self, state: Any, ids: ArrayLike) -> Params:
        """The model that each of the clients `ids`, int[C], would use, leaves stacked to [C, ...].

        Whole models are stacked, which is what is wanted for export; to evaluate clients take `evaluate_view`, which
        does not. What a view adapts by examples is not adapted here. Where clients differ in architecture, ask for
        those of one group at a time: other models do not stack.

        Raises:
          ValueError: if there is no such client, or they are of several groups.
          TypeError: if there are groups and ids are traced, whose groups are not known.
        """
        ids, view = _checked_ids(ids, state), self.personal
        if view.groups is not None:
            view = view.of_group(_one_group(view.groups, ids))
        shared, table = parts_of(view, state)
        if table is None:
            return global_client_params(view.model(shared, ()), ids)
        at = table.index[ids] if has_own_index(table) else ids
        rows = jax.tree.map(lambda leaf: leaf[at], table.rows)
        return jax.vmap(lambda row: view.model(shared, row))(rows)


def run_events(algorithm: Algorithm, when: Phase, state: Any, cohort: Cohort, key: Key) -> Any:
    """The state after all of a method's events of that time, in their order; the state itself where there is none.

    Args:
      algorithm: the method.
      when: "before" the first round, at a "task"'s end, "after" the last round.
      state: the method's state.
      cohort: the clients that are asked; most methods want all of them.
      key: randomness; the k-th event gets `fold_in(key, k)`, and one alone gets the key itself.
    """
    check_algorithm(algorithm)
    due = algorithm.events_at(when)
    for number, event in enumerate(due):
        state = event.run(state, cohort, key if len(due) == 1 else jax.random.fold_in(key, number))
    return state


def parts_of(view: View, state: PyTree) -> tuple[PyTree, PyTree]:
    """What a view takes out of a state: what is shared, and the table of the clients' rows or None.

    Raises:
      TypeError: if the state is that of another method, or rows are no `ClientTable`.
    """
    checks.takes("view.shared", view.shared, ("state",), example="a function state -> what all clients share")
    checks.takes("view.model", view.model, ("shared", "row"), example="a function (shared, row) -> params")
    checks.takes("view.rows", view.rows, ("state",), example="a function state -> ClientTable, or leave it out")
    if view.adapt is not None and not isinstance(view.adapt, Adaptation):
        got = checks.misplaced(view.adapt) or type(view.adapt).__name__
        raise TypeError(f"view.adapt must be an Adaptation or None, got {got}: pass Adaptation(program, work)")
    with state_of_method(state):
        shared, rows = view.shared(state), view.rows(state)
    if rows is not None and view.groups is None and not isinstance(rows, ClientTable):
        raise TypeError(
            f"the view's rows(state) must be a ClientTable or None, got {type(rows).__name__}: keep what is each "
            "client's own in a table, client_table(num_clients, row)"
        )
    return shared, rows


def global_client_params(params: Params, ids: Array | np.ndarray) -> Params:
    """The global model once per client: leaves [...] become [C, ...] for ids [C]."""
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (ids.shape[0], *jnp.shape(leaf))), params)


def global_algorithm(
    init: Callable[..., Any],
    round: Callable[[Any, Any, Key], tuple[Any, Metrics]],
    params: Callable[[Any], Params] = lambda state: state.params,
) -> Algorithm:
    """A method without a personal part: every client would use the global model."""
    return Algorithm(init, round, params)


def federated(
    init: Callable[..., Any],
    update: Callable[[Any, Cohort, Key], Any],
    params: Callable[[Any], Params] = lambda state: state.params,
    *,
    views: Mapping[str, View] | None = None,
    events: Mapping[str, Event] | None = None,
    main: str | None = None,
    skip_empty: bool = True,
) -> Algorithm:
    """A method from what is its own: how its state begins, and what a round makes of it.

    What all methods share is done here: the counter of rounds, the metrics, and the rule that a round without
    participants changes nothing but the counter.

    Args:
      init: `init(params) -> state` or `init(params, key) -> state`, a NamedTuple with a field `params`, the model that
        the server moves, and a field `round` that begins at 0 (`round: Counter = 0`).
      update: `update(state, cohort, key) -> (state, results)` or `(state, results, extra)`: the state after a round,
        whose counter is not its business; the `ClientResults` of the pass whose loss and bytes the metrics report;
        and the method's own metrics.
      params: `params(state)`, the global model; the field of that name unless given.
      views: how the method predicts, see `Algorithm`; every client by the global model unless given.
      events: what it does beside its rounds, likewise.
      main: the view that it is to be judged by, likewise.
      skip_empty: whether a round without participants leaves the state as it is. Behind a private part
        (`fedjax_core.messages.Part`) it is a round like any other, whose noise says nothing of who was there.
    """

    checks.function("init", init, "a function params -> state")
    checks.takes(
        "update", update, ("state", "cohort", "key"), example="a function (state, cohort, key) -> (state, results)"
    )

    @functools.wraps(init)  # its signature says whether it takes a key
    def begin(params: Params, *key: Key | None):
        state = init(params, *key)
        if not {"params", "round"} <= set(getattr(state, "_fields", ())):
            fields = f"{type(state).__name__}{getattr(state, '_fields', '')}"
            raise TypeError(
                f"init must return a NamedTuple with the fields params and round, got {fields}: write a class like "
                "fedjax_core.ModelState, with `round: Counter = 0`"
            )
        return state._replace(round=jnp.int32(0))

    def round(state: PyTree, cohort: Cohort, key: Key) -> tuple[PyTree, Metrics]:
        new, results, *extra = _checked_update(update(state, cohort, key), state)
        if skip_empty:
            new = _unless_empty(cohort, new, state)
        metrics = round_metrics(results, cohort, state.params, new.params, *extra)
        return new._replace(round=state.round + 1), metrics

    return Algorithm(begin, round, params, views, events, main)


def is_private(algorithm: Algorithm) -> bool:
    """Whether a private part is around a method (`fedjax_core.messages.Part`): its empty rounds have noise as well."""
    return any(part.private for part in parts_around(algorithm))


def parts_around(algorithm: Algorithm) -> tuple[Any, ...]:
    """The parts around a method (`fedjax_core.messages.Part`), the innermost first."""
    found: tuple[Any, ...] = getattr(algorithm.init, "_parts", ())
    return found


def _checked_update(returned: Any, state: PyTree) -> tuple[Any, ...]:
    """What `update` returned, or TypeError unless it is (state, results) or (state, results, extra)."""
    whole = isinstance(returned, tuple) and not hasattr(returned, "_fields")
    if not whole or len(returned) not in (2, 3) or not isinstance(returned[1], ClientResults):
        kinds = ", ".join(type(each).__name__ for each in returned) if whole else type(returned).__name__
        raise TypeError(
            f"update must return (state, results) or (state, results, extra), with the ClientResults of a pass, got "
            f"{f'({kinds})' if whole else kinds}: return the state and what for_each_client returned"
        )
    check_same_state("update", returned[0], state)
    return returned


def _unless_empty(cohort: Cohort, new: PyTree, old: PyTree) -> PyTree:
    """`new` if a client takes part, else `old`; per-client tables are always `new`: only participants write there.

    Behind a private part it is `new` always. The comparison stays: without it the compiler would round otherwise.
    """
    not_empty = cohort.num_participants >= (0 if cohort.private else 1)
    new, rows = split_tables(new)
    old, _ = split_tables(old)
    kept = jax.tree.map(lambda n, o: n if n is o else jnp.where(not_empty, n, o), new, old)
    return join_tables(kept, rows)


def checked_init(init: Callable[..., Any]) -> Callable[..., Any]:
    """`init(params, key=None)` on checked arrays; see `checks.params` for what is refused.

    Each array of the state becomes one of its own, so that the state can be donated (`jax.jit(algorithm.round,
    donate_argnums=0)`) and the params that it was made from are still there.

    Raises (the function that is returned):
      ValueError: if the method draws something before the first round and there is no key.
    """
    if not callable(init) or hasattr(init, "_has_checks"):
        return init
    takes_key, needs_key = _key_parameter(init)

    @functools.wraps(init)
    def checked(params: Params, key: Key | None = None):
        params = checks.params(params)
        if not takes_key:
            return separate(init(params), params)
        if key is None and needs_key:
            raise ValueError(
                "init(params) needs a key, for this method draws something before the first round: call init(params, "
                "jax.random.key(0))"
            )
        return separate(init(params, key if key is None else keys.one(key)), params)

    checked._has_checks = True  # type: ignore[attr-defined]
    return checked


_INIT = 2**31 - 1
"""Folded into the key of a simulation for what a method draws before the first round."""


def first_state(algorithm: Algorithm, params: Params, key: Key) -> Any:
    """The state from which a simulation with this key begins."""
    params = checks.model(params)  # before the key: they may be in each other's place
    return checked_init(algorithm.init)(params, keys.derive(keys.one(key), jnp.int32(_INIT)))


def _key_parameter(init: Callable[..., Any]) -> tuple[bool, bool]:
    """Whether it has a second parameter, and whether that has no default."""
    try:
        parameters = inspect.signature(init).parameters.values()
    except (TypeError, ValueError):  # it has no signature
        return False, False
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    second = [p for p in parameters if p.kind in positional][1:2]
    return bool(second), bool(second) and second[0].default is inspect.Parameter.empty


def separate(tree: PyTree, *others: PyTree) -> PyTree:
    """The pytree with a copy in the place of every array that occurs in it before, or in the others."""
    seen = {id(leaf) for leaf in jax.tree.leaves(others)}

    def own(leaf):
        if id(leaf) in seen and isinstance(leaf, jax.Array):
            return jnp.copy(leaf)
        seen.add(id(leaf))
        return leaf

    return jax.tree.map(own, tree)


def checked_round(round: Callable[..., Any]) -> Callable[..., Any]:
    """`round(state, cohort, key)`, or another event of a method with these arguments, after checks of all three.

    Raises (the function that is returned):
      TypeError: if the state, the cohort or the key is something else.
      ValueError: if tables of per-client state are of another population, or there are several keys.
    """
    if not callable(round) or hasattr(round, "_has_checks"):
        return round

    @functools.wraps(round)
    def checked(state: PyTree, cohort: Cohort, key: Key, *args: Any, **kwargs: Any):
        check_state(state, "pass algorithm.init(params)")
        if not isinstance(cohort, Cohort):
            got = checks.misplaced(cohort) or type(cohort).__name__
            raise TypeError(
                f"cohort must be a Cohort, got {got}: pass population.cohort(ids); the order of arguments is (state, "
                "cohort, key)"
            )
        check_rounds(state.round, 1)
        check_tables(state, cohort)
        state, cohort, key = unmeshed((state, cohort, keys.one(key)))  # so that client programs may close over them
        with masks.with_public(cohort.public), state_of_method(state):
            return round(state, cohort, key, *args, **kwargs)

    checked._has_checks = True  # type: ignore[attr-defined]
    return checked


def checked_event(name: str, run: Callable[..., Any]) -> Callable[..., Any]:
    """The function of an event, checked as a round is, and that it returns a state like the one that it was given.

    Raises (the function that is returned; that of its parameters at once):
      TypeError: as `checked_round`, or if it is no function of (state, cohort, key), or returns something else.
      ValueError: as `checked_round`.
    """
    if hasattr(run, "_has_checks"):
        return run
    checks.takes(
        f"events[{name!r}].run", run, ("state", "cohort", "key"), example="a function (state, cohort, key) -> state"
    )
    inner = checked_round(run)

    @functools.wraps(run)
    def checked(state: PyTree, *args: Any, **kwargs: Any):
        new = inner(state, *args, **kwargs)
        check_same_state(f"event {name!r}", new, state)
        return new

    checked._has_checks = True  # type: ignore[attr-defined]
    return checked


def checked_params(params: Callable[[Any], Params]) -> Callable[[Any], Params]:
    """`params(state)` with an error that says so if the state is that of another method."""
    if hasattr(params, "_has_checks"):
        return params

    @functools.wraps(params)
    def checked(state: PyTree) -> Params:
        with state_of_method(state):
            return params(state)

    checked._has_checks = True  # type: ignore[attr-defined]
    return checked


@contextmanager
def state_of_method(state: PyTree) -> Iterator[None]:
    """Inside, a field that the state has not is an error that says what a state is.

    Raises:
      TypeError: if the state is that of another method.
    """
    try:
        yield
    except AttributeError as error:
        if error.obj is not state or not error.name:
            raise
        got = checks.misplaced(state) or type(state).__name__
        raise TypeError(
            f"state must be a state of this method, got {got}, which has no field {error.name!r}: {_no_state(state)}"
        ) from error


def check_same_state(name: str, new: PyTree, old: PyTree) -> None:
    """Raises TypeError unless a state has the structure and shapes of the one before it."""
    before: object = jax.tree.structure(old)
    after: object = jax.tree.structure(new)
    if before != after:
        got = checks.misplaced(new) or type(new).__name__
        if type(new) is not type(old):
            difference = f"{got} and not {type(old).__name__}"
        else:
            difference = f"one of structure {after!s:.300} and not {before!s:.300}"
        raise TypeError(f"{name} must return the state, changed or not, but returned {difference}: return state")
    for (path, leaf), was in zip(jax.tree_util.tree_flatten_with_path(new)[0], jax.tree.leaves(old), strict=True):
        if jnp.shape(leaf) != jnp.shape(was):
            raise TypeError(
                f"{name} changed state{jax.tree_util.keystr(path)} from shape {list(jnp.shape(was))} to "
                f"{list(jnp.shape(leaf))}: keep the shapes of the state that init returns"
            )


def check_state(state: PyTree, begin: str) -> None:
    """Raises TypeError unless `state` has the counter of rounds; `begin` says how to come by a state."""
    if not hasattr(state, "round"):
        raise TypeError(
            f"state must be what the method's init returns, with a field `round`, got {type(state).__name__}: "
            f"{_no_state(state, begin)}"
        )


def _no_state(value: Any, fix: str = "pass algorithm.init(params), or what a round of this method returned") -> str:
    """What to do where a value is no state."""
    is_pair = isinstance(value, tuple) and len(value) == 2 and not hasattr(value, "_fields")
    if is_pair and hasattr(value[0], "round"):
        return "a round returns (state, metrics), pass the first of the two"
    return fix


def check_rounds(done: ArrayLike, more: int) -> None:
    """Raises OverflowError-like ValueError if a state's counter of rounds, where it can be seen, cannot go on."""
    if not checks.is_concrete(done) or (isinstance(done, jax.Array) and not done.is_fully_addressable):
        return
    on_host = np.asarray(done)  # a reduction of a JAX array would be traced where the state is closed over
    most, least = int(on_host.max()), int(on_host.min())
    if least < 0:
        raise ValueError(f"state.round is {least}, and no number of rounds: begin with algorithm.init(params)")
    if most + more > MOST_ROUNDS:
        raise ValueError(
            f"state.round is {most}, and {more} more rounds are beyond {MOST_ROUNDS}, the most it can count: begin a "
            "new run with algorithm.init(algorithm.params(state))"
        )


def check_algorithm(algorithm: object) -> None:
    """Raises TypeError unless `algorithm` has the functions of an `Algorithm`."""
    missing = [name for name in _Functions._fields[:3] if not callable(getattr(algorithm, name, None))]
    if not missing:
        return
    other = checks.misplaced(algorithm)
    if other is not None:
        raise TypeError(
            f"algorithm must be an Algorithm, got {other}: the order of arguments is (algorithm, sampler, num_rounds)"
        )
    if callable(algorithm):
        name = getattr(algorithm, "__name__", type(algorithm).__name__)
        raise TypeError(
            f"algorithm must be an Algorithm, got the function {name}: call it first, for example "
            f"{name}(loss_fn, optax.sgd(0.1))"
        )
    raise TypeError(
        f"algorithm must be an Algorithm, got {type(algorithm).__name__} without {' and '.join(missing)}: pass for "
        "example algorithms.fedavg(loss_fn, optax.sgd(0.1))"
    )


def _checked_ids(ids: ArrayLike, state: PyTree) -> Array | np.ndarray:
    """ids as an array int[C] of clients that are there, as far as that can be seen."""
    ids = checks.client_numbers(ids)
    if checks.is_concrete(ids) and np.size(ids):
        by_client = [table.index if has_own_index(table) else table.rows for table in tables_of(state)]
        sizes = [jnp.shape(leaf)[0] for leaf in jax.tree.leaves(by_client) if jnp.ndim(leaf)]
        on_host = np.asarray(ids)
        least, most = int(on_host.min()), int(on_host.max())
        if least < 0 or (sizes and most >= min(sizes)):
            of = f"0 to {min(sizes) - 1}" if sizes else "from 0 on"
            raise ValueError(f"ids holds {least if least < 0 else most}: clients are numbered {of}")
    return ids


def _one_group(groups: Groups, ids: ArrayLike) -> int:
    """The group that all the clients are in."""
    if not checks.is_concrete(ids):
        raise TypeError(
            "ids are traced, and clients of different architectures have no common stack: pass numpy integers, or "
            "evaluate them all by evaluate_view"
        )
    found = sorted({int(groups.of[i]) for i in np.asarray(ids)})
    if len(found) > 1:
        raise ValueError(
            f"ids are of clients of groups {' and '.join(map(str, found))}, whose models do not stack: ask for those "
            f"of one group, such as groups.members({found[0]}), or evaluate them all by evaluate_view"
        )
    return found[0]
