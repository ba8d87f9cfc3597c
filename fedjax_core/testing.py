"""Checks that every federated method has to pass, for methods of your own too.

    problem = testing.classification()

    def make(*, lr=0.1, **settings):
        return my_method(problem.loss_fn, optax.sgd(lr), batch_size=4, **settings)

    testing.check_algorithm(make, problem, floats={"lr": 0.1})

Each check is a promise that a method makes; the first that is broken is raised, with the number that is wrong and what
to do about it. A test suite that wants one test for each takes `properties`. Methods are checked in float64, which is
switched on meanwhile, and in float32. As compiling takes most of the time, the checks share few programs: one of a
round, which all cohorts, keys, values and states go through, and one of several simulations at once.
"""

import pickle
from collections.abc import Callable, Iterator, Mapping
from functools import cache, cached_property, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_core import checks, clients, reference, samplers, sizes
from fedjax_core.algorithm import Algorithm, global_client_params, is_private
from fedjax_core.placement import client_mesh, place, replicated, shardings
from fedjax_core.plans import Plan
from fedjax_core.population import Cohort, Population
from fedjax_core.simulation import continue_rounds
from fedjax_core.staging import HostPopulation, continue_staged, init_on_host
from fedjax_core.types import Array, Examples, Key, LossFn, Metrics, Params, PyTree, Variables

MOST_CONSTANTS = 64
"""Numbers that a compiled program may hold; more of them are data or parameters, which are arguments."""

EXACT = {"rtol": 1e-12, "atol": 1e-13}
"""How far two ways to compute the same may differ in float64."""


class Problem(NamedTuple):
    """What a method is checked on.

    Attributes:
      loss_fn: `loss_fn(params, batch, key) -> float[B]`. For the factory to use; the checks do not call it.
      params: where the method starts.
      population: at least six clients with examples; one without is wanted as well. Small, as the plain loop is slow.
    """

    loss_fn: LossFn | None
    params: Params
    population: Population


class Rounds(NamedTuple):
    """What some rounds give: the state after them, and their metrics, a list of one for each or stacked."""

    state: Any
    metrics: Any


def _without_counters(state: Any) -> Any:
    """A state whose counters of rounds, its own and those of states in it, are 0."""

    def zeroed(path: Any, leaf: Any) -> Any:
        return 0 if path and getattr(path[-1], "name", "") == "round" else leaf

    return jax.tree_util.tree_map_with_path(zeroed, state)


def softmax_loss(params: Params, batch: Examples, key: Key) -> Array:
    """Multinomial logistic regression on examples `x` float[B, d] and `y` int[B], one loss per example, float[B]."""
    logits = batch["x"] @ params["w"] + params["b"]
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), batch["y"][:, None], 1)[:, 0]


def classification(
    sizes: tuple[int, ...] = (1, 9, 4, 0, 13, 6, 2), *, dim: int = 5, classes: int = 3, seed: int = 1
) -> Problem:
    """A small problem of classification with clients that differ in features, labels and number of examples.

    Args:
      sizes: number of examples of each client. One has none, and hardly one is divided by a batch size of 4.
      dim: number of features.
      classes: number of classes.
      seed: of the examples and of the first model.
    """
    rng = np.random.default_rng(seed)
    examples = []
    for n in sizes:
        x = rng.normal(size=(n, dim)) + rng.normal(size=dim)
        y = np.argmax(x @ rng.normal(size=(dim, classes)), 1) if n else np.zeros(0, np.int64)
        examples.append({"x": x.astype(np.float32), "y": y.astype(np.int32)})
    weights = rng.normal(size=(dim, classes)) * 0.3
    params = {"w": jnp.asarray(weights, jnp.float32), "b": jnp.zeros(classes, jnp.float32)}
    return Problem(softmax_loss, params, Population.from_clients(examples))


def check_algorithm(
    make: Callable[..., Algorithm],
    problem: Problem | None = None,
    *,
    floats: Mapping[str, float] | None = None,
    random: bool = True,
    rows_may_stay: bool = False,
    undefined_if_empty: tuple[str, ...] = (),
) -> None:
    """Checks a federated method: everything that the methods of this library are checked for.

    Args:
      make: `make(**settings) -> Algorithm`. The settings are names of `floats`, `plan` (a `Plan`) and `order`
        ("shuffled" or "sequential"), the last two of which go to `local_training` or `for_each_client`; where a method
        takes no order, `make` drops it. Local work of one epoch in batches of a few examples is enough.
      problem: what the method is checked on; `classification()` unless given.
      floats: hyper-parameters that one can sweep over, by name, with their values. Each must work as a tracer.
      random: whether another key gives other numbers when examples are shuffled.
      rows_may_stay: whether a participant's row of per-client state may stay as it is.
      undefined_if_empty: fields of the method's own metrics that are NaN in a round without participants.

    Raises:
      AssertionError: says which promise is broken, where and by how much, and what to do.
      TypeError: if an argument is of another type, or `make` returns no `Algorithm`.
      ValueError: if the problem has too few clients, or a value of `floats` is no finite number.
      Exception: whatever the method raises, with a note that says what was checked.
    """
    options: Any = {"random": random, "rows_may_stay": rows_may_stay, "undefined_if_empty": undefined_if_empty}
    for check in properties(make, problem, floats=floats, **options).values():
        check()


def properties(
    make: Callable[..., Algorithm], problem: Problem | None = None, **options: Any
) -> dict[str, Callable[[], None]]:
    """The checks of `check_algorithm` by name: functions without arguments, in any order, that share what they compile.

    The names are those of `CHEAP` and `DEEP`. A check of something that a method does not have, such as per-client
    state, passes.
    """
    subject = Subject(make, problem, **options)
    return {name: partial(subject.check, name) for name in (*CHEAP, *DEEP)}


CHEAP = (
    "a_round_equals_a_plain_loop",
    "cohort_order_does_not_matter",
    "empty_slots_and_clients_change_nothing",
    "an_empty_cohort_changes_only_the_counter",
    "only_participants_rows_change",
    "same_key_same_bits",
    "seeds_and_floats_vmap_like_a_loop",
    "other_arguments_do_not_retrace",
    "no_large_constants",
    "dtypes_stay",
    "state_survives_pickling",
    "views_give_a_model_to_every_client",
    "a_state_can_be_donated",
    "the_server_uses_only_uploads",
    "metrics_count_bytes_and_participants",
)
"""Checks that share the program of one round, and one of several simulations at once."""

DEEP = (
    "lanes_on_a_mesh_equal_a_plain_loop",
    "another_key_gives_other_numbers",
    "scanned_rounds_equal_single_rounds",
    "client_state_in_host_memory_gives_the_same_bits",
    "float32_agrees_with_float64",
)
"""Checks that compile a program of their own each."""


class Subject:
    """A method under test, with the programs that its checks share; see `check_algorithm` for the arguments."""

    devices = 2
    """Of the mesh, where there are as many."""

    def __init__(
        self,
        make: Callable[..., Algorithm],
        problem: Problem | None = None,
        *,
        floats: Mapping[str, float] | None = None,
        random: bool = True,
        rows_may_stay: bool = False,
        undefined_if_empty: tuple[str, ...] = (),
    ):
        checks.function("make", make, "lambda **settings: my_method(loss_fn, optax.sgd(0.1), **settings)")
        if problem is not None and not isinstance(problem, Problem):
            raise TypeError(
                f"problem must be a Problem, got {type(problem).__name__}: pass testing.Problem(loss_fn, params, "
                "population) or testing.classification()"
            )
        self.problem = problem or classification()
        self._make = make
        self.floats = {name: _number(name, value) for name, value in (floats or {}).items()}
        self.random, self.rows_may_stay, self.undefined_if_empty = random, rows_may_stay, undefined_if_empty
        self._traces = 0
        sizes = np.asarray(self.problem.population.sizes)
        busy = np.flatnonzero(sizes > 0)
        if len(busy) < 6:
            raise ValueError(f"problem has {len(busy)} clients with examples: give it at least 6")
        a, b, c, d, e, f = (int(i) for i in busy[:6])
        self.busy = busy
        self.empty = int(np.argmin(sizes)) if len(busy) < len(sizes) else -1
        # Partial participation, an empty slot, an empty client.
        self.cohorts = [[a, d, c, b], [e, -1, b, f], [self.empty, c, a, d]]
        self.participants = (4, 3, 3)
        self.num_clients = len(sizes)
        self.sampler, self._draw = _sampler(self.num_clients)

    def check(self, name: str) -> None:
        """Runs one check by its name."""
        checks.one_of("name", name, (*CHEAP, *DEEP))
        with jax.enable_x64(True):
            try:
                getattr(self, name)()
            except Exception as error:
                error.add_note(f"(checked: {name.replace('_', ' ')})")
                raise

    # What the checks share.

    @cached_property
    def key(self) -> Key:
        """The key of all runs."""
        return jax.random.key(11)

    @cached_property
    def params(self) -> Params:
        """The first model in float64."""
        return _as_floats(self.problem.params, jnp.float64)

    @cached_property
    def population(self) -> Population:
        """The clients in float64."""
        return self._population(jnp.float64)

    def _population(self, dtype: Any) -> Population:
        given = self.problem.population
        cast = Population.from_flat(_as_floats(given.examples, dtype), np.asarray(given.offsets))
        return cast.with_public(_as_floats(given.public, dtype))

    def make(self, values: Mapping[str, Any] | None = None, **settings: Any) -> Algorithm:
        """The method; one client after the other and examples in their order, which compiles fastest, unless told."""
        settings = {"plan": Plan(lanes=1), "order": "sequential", **settings}
        algorithm = self._make(**(self.floats if values is None else values), **settings)
        missing = [name for name in Algorithm._fields[:3] if not callable(getattr(algorithm, name, None))]
        missing += [name for name in Algorithm._fields[3:] if not hasattr(algorithm, name)]
        if missing:
            raise TypeError(
                f"make must return an Algorithm, got {type(algorithm).__name__} without {' and '.join(missing)}: "
                "return for example fedjax_core.federated(init, update)"
            )
        return algorithm

    @cached_property
    def algorithm(self) -> Algorithm:
        """The method at its own values."""
        return self.make()

    def start(self, values: Mapping[str, Any] | None = None, dtype: Any = jnp.float64) -> Any:
        """The first state, on a device that is named, as states are that were read from files.

        A round is compiled once more for a state on a device by default, so all states here are alike.
        """
        algorithm = self.algorithm if values is None else self.make(values)
        return jax.device_put(algorithm.init(_as_floats(self.params, dtype), self.key), jax.devices()[0])

    @cached_property
    def has_rows(self) -> bool:
        """Whether the method keeps state for every client."""
        state = jax.eval_shape(self.algorithm.init, self.params, self.key)
        return bool(jax.tree.leaves(clients.split_tables(state)[1]))

    @cached_property
    def jitted(self) -> Any:
        """`round(values, state, cohort, key)`, compiled once for float64 and once for float32."""

        def counted(values: Any, state: Any, cohort: Cohort, key: Key) -> Any:
            self._traces += 1
            _require(
                self._traces <= 2,
                "a round was traced again for other ids, sizes, keys, values or the state of the round before: return "
                "a state with the shapes and dtypes of the state that the round was given",
            )
            return self.make(values).round(state, cohort, key)

        return jax.jit(counted)

    def round(self, state: Any, ids: Any, key: Key) -> tuple[Any, Metrics]:
        """One compiled round."""
        return self.jitted(self.floats, state, self._cohort(ids), key)

    def rounds(self, round: Callable[..., Any], start: Any, cohorts: list[list[int]]) -> Rounds:
        """Rounds of these cohorts from a state on."""
        state, metrics = start, []
        for t, ids in enumerate(cohorts):
            state, info = round(state, ids, jax.random.fold_in(self.key, t))
            metrics.append(info)
        return Rounds(state, metrics)

    def by_plain_loop(self, cohorts: list[list[int]], **settings: Any) -> Rounds:
        """The same from the first state on by the slow, obvious loop over clients."""
        algorithm = self.make(**settings)
        with reference.plain_loop():
            return self.rounds(
                lambda state, ids, key: algorithm.round(state, self._cohort(ids), key),
                algorithm.init(self.params, self.key),
                cohorts,
            )

    def _cohort(self, ids: Any) -> Cohort:
        return self.population.cohort(np.asarray(ids))

    @cached_property
    def expected(self) -> Rounds:
        """The cohorts by the plain loop."""
        return self.by_plain_loop(self.cohorts)

    @cached_property
    def done(self) -> Rounds:
        """The cohorts by the compiled round."""
        return self.rounds(self.round, self.start(), self.cohorts)

    @property
    def state(self) -> Any:
        """State after the cohorts."""
        return self.done.state

    def simulated(self, values: Mapping[str, float], key: Key, num_rounds: int) -> Rounds:
        """What a simulation gives, by single compiled rounds; metrics stacked."""
        sample_key, train_key = jax.random.split(key)
        state, rows = self.start(values), []
        for t in range(num_rounds):
            cohort = self.population.cohort(self._draw(sample_key, jnp.int32(t)))
            state, info = self.jitted(values, state, cohort, jax.random.fold_in(train_key, t))
            rows.append(info)
        return Rounds(state, _stacked(rows))

    # The checks.

    def a_round_equals_a_plain_loop(self) -> None:
        """Compiled rounds give what a loop over clients in Python gives."""
        _same(
            self.done,
            self.expected,
            "compiled rounds do not give the result of a plain loop over clients",
            "leave out the rows of a batch that batch.mask excludes, and use nothing that tells how clients are run "
            "(results.executed_steps, whether a value is a tracer)",
            **EXACT,
        )

    def cohort_order_does_not_matter(self) -> None:
        """The slots of a cohort may be in any order."""
        again = self.rounds(self.round, self.start(), [ids[::-1] for ids in self.cohorts])
        _same(
            again,
            self.done,
            "the order of the clients in a cohort changes the result",
            "combine uploads by sums over slots, and tell clients apart by cohort.ids, never by their slot",
            **EXACT,
        )

    def empty_slots_and_clients_change_nothing(self) -> None:
        """A cohort with empty slots and clients without examples is that without them."""
        _, b, c, d, *_ = (int(i) for i in self.busy[:6])
        padded = self.rounds(self.round, self.start(), [[d, -1, b, self.empty], [-1, self.empty, c, -1]])
        bare = self.by_plain_loop([[d, b], [c]])
        _same(
            padded,
            bare,
            "empty slots or clients without examples change the result",
            "count with cohort.num_participants instead of the number of slots, and leave out slots where cohort.mask "
            "is false",
            **EXACT,
        )

    def an_empty_cohort_changes_only_the_counter(self) -> None:
        """A round without participants leaves the state as it is, and reports a loss of NaN.

        Behind a private part it is a round like any other, and has noise: only the rows of clients stay.
        """
        private = is_private(self.algorithm)
        kept = (lambda state: clients.split_tables(state)[1]) if private else _without_counters
        for ids in ([-1, -1, -1, -1], [self.empty, -1, -1, -1]):
            after, metrics = self.round(self.state, ids, self.key)
            begun, ended = int(self.state.round), int(after.round)
            _require(
                ended == begun + 1,
                f"a round without participants is not counted: state.round is {ended} after {begun}; return it one "
                "higher from every round",
            )
            _same(
                kept(after),
                kept(self.state),
                "a round without participants changes the state",
                "keep what there was where cohort.num_participants is 0, as fedjax_core.federated does",
            )
            told = "metrics of a round without participants tell of"
            made = "make them by fedjax_core.round_metrics"
            _require(int(metrics.participants) == 0, f"{told} {metrics.participants} participants: {made}")
            moves = private or float(metrics.update_norm) == 0
            _require(moves, f"{told} an update of length {metrics.update_norm}: {made}")
            _require(np.isnan(metrics.loss), f"{told} a loss of {metrics.loss}, expected NaN: {made}")
            for path, leaf in _leaves({"state": after, "metrics": {"extra": metrics.extra}}):
                if path.startswith("metrics") and path.rpartition(".")[2] in self.undefined_if_empty:
                    continue
                finite = not jnp.issubdtype(jnp.result_type(leaf), jnp.floating) or bool(np.all(np.isfinite(leaf)))
                _require(
                    finite,
                    f"a round without participants makes {path} {np.asarray(leaf)}, which is not finite: divide by "
                    "max(cohort.num_participants, 1), or name a metric that is unknown then in undefined_if_empty",
                )

    def only_participants_rows_change(self) -> None:
        """Per-client state of the absent stays, that of participants changes."""
        _, b, *_, f = (int(i) for i in self.busy[:6])
        after, _ = self.round(self.state, [f, b, -1, -1], self.key)
        absent = np.setdiff1d(np.arange(self.num_clients), [b, f])
        old, new = (clients.split_tables(state)[1] for state in (self.state, after))
        for number, table in enumerate(clients.tables_of(self.state)):
            index = np.asarray(table.index) if clients.has_own_index(table) else np.arange(self.num_clients)
            for (path, one), other in zip(_leaves(old[number]), jax.tree.leaves(new[number]), strict=True):
                was, now = _plain(one), _plain(other)
                same = {
                    int(i): np.array_equal(was[index[i]], now[index[i]], equal_nan=now.dtype.kind == "f")
                    for i in np.flatnonzero(index >= 0)
                }
                moved = [int(i) for i in absent if not same.get(int(i), True)]
                _require(
                    not moved,
                    f"clients {b} and {f} took part, and the state of the absent clients {moved} changes (table "
                    f"{number}{path and '.'}{path}): write rows by fedjax_core.scatter, which leaves the others alone",
                )
                _require(
                    self.rows_may_stay or not same.get(b, False) or not np.any(index[[b]] >= 0),
                    f"client {b} took part, and its state stays as it was (table {number}{path and '.'}{path}): return "
                    "the table that fedjax_core.scatter returns, or say rows_may_stay=True if a row may stay",
                )

    def same_key_same_bits(self) -> None:
        """A round is a function of its arguments."""
        first, again = (self.round(self.start(), self.cohorts[0], jax.random.key(3)) for _ in range(2))
        _same(
            Rounds(*again),
            Rounds(*first),
            "the same state, cohort and key give other bits",
            "draw everything from the key that the round is given, and keep everything in the state",
        )

    def seeds_and_floats_vmap_like_a_loop(self) -> None:
        """Rounds at once, of seeds, values and states of their own each, give what single rounds of each give."""
        # One member per hyper-parameter, each with that one lowered.
        names = list(self.floats)
        members = max(2, len(names))
        batch = {n: np.full(members, self.floats[n]) for n in names}
        for member, name in enumerate(names):
            batch[name][member] *= 0.8
        keys = jax.random.split(jax.random.key(5), (2, members))
        alone = [{n: float(v[member]) for n, v in batch.items()} for member in range(members)]
        # The second round of each, as in the first much is zero; and how each begins.
        ids = np.asarray([self.cohorts[member % 3] for member in range(members)])
        firsts = [
            self.jitted(values, self.start(values), self._cohort(self.cohorts[0]), key)[0]
            for values, key in zip(alone, keys[0], strict=True)
        ]

        def one(values: Any, state: Any, ids: Array, key: Key, population: Population) -> tuple[Any, Rounds]:
            algorithm = self.make(values, plan=None)  # all clients of all members beside each other
            return algorithm.init(self.params, self.key), Rounds(*algorithm.round(state, population.cohort(ids), key))

        all_at_once = jax.vmap(one, in_axes=(0, 0, 0, 0, None), axis_size=members)
        begun, together = jax.jit(all_at_once)(batch, _stacked(firsts), ids, keys[1], self.population)
        for member, values in enumerate(alone):
            expected = self.jitted(values, firsts[member], self._cohort(ids[member]), keys[1][member])
            _same(
                jax.tree.map(lambda leaf, m=member: leaf[m], (begun, together)),
                (self.make(values).init(self.params, self.key), Rounds(*expected)),
                "rounds at once, by vmap over seeds and hyper-parameters, differ from single rounds of each",
                "use hyper-parameters as arrays: no float(), no Python branch on them, no number over all members",
                rtol=1e-11,
                atol=1e-12,
            )

    def other_arguments_do_not_retrace(self) -> None:
        """One program does for all ids, sizes, keys, values and states of a population of so many examples."""
        sizes = np.asarray(self.population.sizes)[::-1]
        other = Population.from_sizes(jax.tree.map(lambda leaf: leaf[::-1], self.population.examples), sizes)
        other = other.with_public(self.population.public)
        state = self.start()
        before = None
        for t, ids in enumerate((self.cohorts[0], self.cohorts[1], [-1] * 4)):
            values = {name: value * (1 - 0.1 * t) for name, value in self.floats.items()}
            state, _ = self.jitted(values, state, other.cohort(np.asarray(ids)), jax.random.key(t))
            before = self._traces if before is None else before
        _require(
            self._traces == before,
            "a round is traced again for other ids, keys, values or the state of the round before: return a state with "
            "the shapes and dtypes of the state that the round was given",
        )
        _require(
            int(state.round) == 3, f"state.round is {state.round} after three rounds: return it one higher from each"
        )

    def no_large_constants(self) -> None:
        """Data and parameters are arguments of the program, no part of it."""
        arguments = self.floats, self.start(), self._cohort(self.cohorts[0]), self.key
        sizes = [np.size(constant) for constant in self.jitted.trace(*arguments).jaxpr.consts]
        _require(
            sum(sizes) < MOST_CONSTANTS,
            f"the compiled round holds {sum(sizes)} numbers as constants, in arrays of {sizes}, and is compiled anew "
            "when they change: arrays go in by the state, the cohort or shared",
        )

    def dtypes_stay(self) -> None:
        """float32 stays float32: a round returns the structure, shapes and dtypes that it is given."""
        state = self.start(dtype=jnp.float32)
        cohort = self._population(jnp.float32).cohort(np.asarray(self.cohorts[0]))
        after, _ = self.jitted.trace(self.floats, state, cohort, self.key).out_info
        _same_shapes(
            after,
            state,
            "a round of a model in float32 returns another type of state than init",
            "cast by astype to the dtype of the leaf it replaces; arrays of numpy are of double precision",
        )
        _same_shapes(
            self.algorithm.params(state),
            _as_floats(self.params, jnp.float32),
            "params(state) is no model like the one that init was given",
            "return the model with its structure, shapes and dtypes",
        )

    def state_survives_pickling(self) -> None:
        """A state that is written and read again goes on to the same bits."""
        try:
            again = pickle.loads(pickle.dumps(self.state))
        except Exception as error:
            raise AssertionError(
                f"a state cannot be pickled and read again ({type(error).__name__}: {error}): make it of arrays in "
                "NamedTuples that are defined at the top of a module"
            ) from error
        fix = "keep everything that a round needs in leaves of the state, which are arrays"
        _same(again, self.state, "a state changes when it is pickled and read again", fix)
        self.goes_on_from(again)

    def goes_on_from(self, state: Any) -> None:
        """Checks that what was read from a file goes on as `self.state` does; not a check of its own."""
        state = jax.device_put(state, jax.devices()[0])
        on, expected = (self.round(state, self.cohorts[1], self.key) for state in (state, self.state))
        _same(
            Rounds(*on),
            Rounds(*expected),
            "a run that goes on from a state that was written and read gives other bits",
            "keep everything that a round needs in leaves of the state, which are arrays",
        )

    def views_give_a_model_to_every_client(self) -> None:
        """`client_params(state, ids)` stacks a model for each id; views have a row for every client, or none."""
        for name, view in self.algorithm.views.items():
            tables = view.rows(self.state)
            for number, table in enumerate((tables,) if view.groups is None else tables or ()):
                wanted = self.num_clients if view.groups is None else int(view.groups.sizes[number])
                sizes = {jnp.shape(leaf)[0] for leaf in jax.tree.leaves(table and table.rows)} - {wanted}
                _require(
                    table is None or (isinstance(table, clients.ClientTable) and not sizes),
                    f"the rows of the view {name!r} are not one for each of {wanted} clients: return a ClientTable of "
                    "the state, or None",
                )
        groups = self.algorithm.personal.groups
        for number in range(1 if groups is None else len(groups)):
            ids = np.array([2, 0, 5]) if groups is None else groups.members(number)
            rows = jax.eval_shape(lambda state, ids=ids: self.algorithm.client_params(state, ids), self.state)
            model = self.params if groups is None else self.params[number]
            expected = jax.eval_shape(lambda model, ids=ids: global_client_params(model, ids), model)
            _same_shapes(
                rows,
                expected,
                f"client_params(state, ids) is not one model for each of {len(ids)} ids, stacked",
                "return the model of one client from the view's model(shared, row)",
            )

    def a_state_can_be_donated(self) -> None:
        """No buffer is in a state twice, nor are the caller's params in it."""
        made = {
            "init(params)": self.algorithm.init(self.params, self.key),
            "jit(init)(params)": jax.jit(self.algorithm.init)(self.params, self.key),
            "a round": self.state,
        }
        for name, state in made.items():
            held: dict[int, str] = {}
            for path, leaf in _leaves({"params": self.params, "state": state}):
                if not leaf.size:
                    continue
                twin = held.setdefault(leaf.unsafe_buffer_pointer(), path)
                _require(
                    twin == path,
                    f"the state that {name} returns cannot be donated: {path} is the same buffer as {twin}; copy one "
                    "of them by jnp.copy",
                )

    def the_server_uses_only_uploads(self) -> None:
        """Of what clients keep, the outputs of their programs, only their own rows are made."""
        server, sent, _ = self.made_of_outputs()
        for made, what in ((server, "the server's state is"), (sent, "what the server sends in a later pass is")):
            _require(
                not made,
                f"{what} made of the outputs of client programs, which stay with the clients: put into the upload what "
                "the server uses",
            )

    def made_of_outputs(self) -> tuple[bool, bool, bool]:
        """Whether the server's state after a round, what it sends, and clients' rows are made of clients' outputs."""
        algorithm, key = self.algorithm, self.key

        def parts(outputs: Array, state: Any, cohort: Cohort) -> tuple[Any, Any, Any]:
            sent: list[Any] = []

            def only_shapes(program: Any, *arguments: Any, **options: Any) -> clients.ClientResults:
                sent.append((arguments[0], options.get("weights")))
                with clients.replaced(None):
                    shapes = jax.eval_shape(partial(clients.for_each_client, program, **options), *arguments)
                blank = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
                return blank._replace(outputs=jax.tree.map(lambda o: o + outputs.astype(o.dtype), blank.outputs))

            with clients.replaced(only_shapes):
                server, rows = clients.split_tables(algorithm.round(state, cohort, key)[0])
            return server, jax.tree.map(jnp.asarray, [x for x in jax.tree.leaves(sent) if not isinstance(x, str)]), rows

        state = algorithm.init(self.params, self.key)
        closed, shape = jax.make_jaxpr(parts, return_shape=True)(jnp.zeros(()), state, self._cohort(self.cohorts[0]))
        jaxpr, ends = closed.jaxpr, np.cumsum([len(jax.tree.leaves(part)) for part in shape])

        def made_of_first(results: list[Any]) -> bool:
            needed = set(filter(_is_variable, results))
            for equation in reversed(jaxpr.eqns):
                if needed & set(equation.outvars):
                    needed |= set(filter(_is_variable, equation.invars))
            return jaxpr.invars[0] in needed

        server, sent, rows = (made_of_first(jaxpr.outvars[a:b]) for a, b in zip([0, *ends], ends, strict=False))
        return server, sent, rows

    def metrics_count_bytes_and_participants(self) -> None:
        """Metrics count who took part and at least a model up and down, and measure a loss and an update.

        Of a model of which clients keep a part, the rest; where nothing is sent nothing moves. Where a `Message` states
        its size it may be less.
        """
        rows = jax.tree.leaves(clients.split_tables(self.algorithm.personal.rows(self.state))[1])
        size = sizes.num_bytes(self.params.params if isinstance(self.params, Variables) else self.params)
        size -= sizes.num_bytes([jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype) for leaf in rows])
        stated = self._states_sizes()
        made = "make metrics by fedjax_core.round_metrics from the results of the pass that trains"
        for info, participants in zip(self.done.metrics, self.participants, strict=True):
            _require(
                int(info.participants) == participants,
                f"metrics count {info.participants} participants where there are {participants}: {made}",
            )
            for way, count in (("up", info.bytes_up), ("down", info.bytes_down)):
                if stated[way]:
                    continue
                _require(
                    float(count) >= size,
                    f"metrics count {float(count):g} bytes {way}, fewer than the {size} of a model: upload and share "
                    "what moves the model, and count all passes of a round",
                )
            _require(bool(np.isfinite(info.loss)), f"metrics tell of a loss of {info.loss}: {made}")
            moves = float(info.update_norm) > 0 or float(info.bytes_up) == 0
            _require(moves, f"metrics tell of an update of length {info.update_norm}: {made}")

    def _states_sizes(self) -> dict[str, bool]:
        """Whether there are messages that state their size, up and down."""
        found = {"up": False, "down": False}

        def looking(program: Any, shared: Any, *rest: Any, **options: Any) -> clients.ClientResults:
            def final(shared: Any, carry: Any) -> tuple[Any, Any]:
                upload, output = program.final(shared, carry)
                found["up"] |= sizes.has_message(upload)
                return upload, output

            found["down"] |= sizes.has_message(shared)
            with clients.replaced(None):
                return clients.for_each_client(program._replace(final=final), shared, *rest, **options)

        with clients.replaced(looking):
            state = self.algorithm.init(self.params, self.key)
            jax.eval_shape(self.algorithm.round, state, self._cohort(self.cohorts[0]), self.key)
        return found

    @cached_property
    def on_mesh(self) -> Any:
        """(a first state, `round(state, ids, key)` of shuffled examples, in two lanes on each of some devices)."""
        mesh = client_mesh(min(self.devices, len(jax.devices())))
        algorithm = self.make(plan=Plan(lanes=2 * mesh.size, mesh=mesh), order="shuffled")
        state = algorithm.init(self.params, self.key)
        where = shardings(state, mesh)
        jitted = jax.jit(algorithm.round, out_shardings=(where, replicated(mesh)))  # as the first, for one program
        on_all = replicated(mesh)
        return place(state, where), lambda state, ids, key: jitted(state, place(self._cohort(ids), on_all), key)

    @cached_property
    def wide(self) -> list[list[int]]:
        """The cohorts with a fifth slot: lanes get more than one client each, devices unequally many."""
        return [[*ids, extra] for ids, extra in zip(self.cohorts, (int(self.busy[5]), -1, -1), strict=True)]

    def lanes_on_a_mesh_equal_a_plain_loop(self) -> None:
        """Lanes on the devices of a mesh, with shuffled examples, give what a loop over clients in Python gives."""
        start, round = self.on_mesh
        _same(
            self.rounds(round, start, self.wide),
            self.by_plain_loop(self.wide, order="shuffled"),
            "lanes on a mesh do not give the result of a plain loop over clients",
            "use nothing that tells how clients are run (results.executed_steps), and let arrays of all clients into "
            "client programs by shared, not by closure",
            **EXACT,
        )

    def another_key_gives_other_numbers(self) -> None:
        """The key is used, and in a method that draws nothing it makes no difference."""
        start, round = self.on_mesh

        def numbers(seed: int) -> tuple[float, float]:
            metrics = round(start, self.wide[0], jax.random.key(seed))[1]
            return float(metrics.update_norm), float(metrics.loss)

        first, other = numbers(3), numbers(4)
        if self.random:
            _require(
                first != other,
                f"another key gives the same numbers (an update of length {first[0]}): hand the key of the round on to "
                "the clients, or say random=False if the method draws nothing",
            )
        else:
            _require(
                first == other,
                f"another key gives other numbers (updates of length {first[0]} and {other[0]}), and random=False was "
                "said: leave it out, or draw nothing",
            )

    def scanned_rounds_equal_single_rounds(self) -> None:
        """Rounds in one loop, and a run that goes on where one has ended, give the bits of single rounds."""
        run = jax.jit(continue_rounds(self.algorithm, self.sampler, 2))
        state, first = run(self.start(), self.population, self.key)
        state, second = run(state, self.population, self.key)
        _same(
            Rounds(state, jax.tree.map(lambda *leaves: np.concatenate(leaves), first, second)),
            self.simulated(self.floats, self.key, 4),
            "rounds in one compiled loop give other bits than single rounds",
            "keep everything that rounds hand on in the state: what Python counts or remembers is fixed when a round "
            "is traced",
        )

    def client_state_in_host_memory_gives_the_same_bits(self) -> None:
        """A method that touches its tables through the cohort alone cannot tell that they hold its rows alone."""
        if not self.has_rows:
            return
        state = init_on_host(self.algorithm.init, self.params, self.key, num_clients=self.num_clients)
        examples = jax.tree.map(np.asarray, self.population.examples)
        host = HostPopulation.from_flat(examples, np.asarray(self.population.offsets))
        host = host.with_public(self.population.public)
        staged, _ = continue_staged(self.algorithm, self.sampler, 3)(state, host, self.key)
        _same(
            staged,
            self.simulated(self.floats, self.key, 3).state,
            "per-client state in host memory gives other bits than on the device",
            "read and write tables only by fedjax_core.gather and scatter; a sum over all clients is a field of the "
            "state",
        )

    def float32_agrees_with_float64(self) -> None:
        """In float32 a model moves as in float64, up to rounding."""
        population = self._population(jnp.float32)
        start = self.start(dtype=jnp.float32)
        state, _ = self.rounds(
            lambda state, ids, key: self.jitted(self.floats, state, population.cohort(np.asarray(ids)), key),
            start,
            self.cohorts,
        )
        _same_shapes(
            state,
            start,
            "rounds in float32 return another type of state than init",
            "cast by astype to the dtype of the leaf it replaces",
        )
        _same(
            _as_floats(self.algorithm.params(state), jnp.float64),
            _as_floats(self.algorithm.params(self.expected.state), jnp.float64),
            "a model in float32 is not that in float64 up to rounding",
            "avoid differences of large numbers and sums of many small ones in single precision (fedjax_core.sums)",
            rtol=1e-4,
            atol=1e-5,
        )


@cache
def _sampler(num_clients: int) -> tuple[samplers.Sampler, Callable[..., Array]]:
    """A sampler of four clients, and the same compiled."""
    sampler = samplers.uniform(num_clients, 4)
    return sampler, jax.jit(sampler)


def _as_floats(tree: PyTree, dtype: Any) -> PyTree:
    """The tree with its arrays of floats in another precision."""
    return jax.tree.map(
        lambda leaf: jnp.asarray(leaf, dtype if jnp.issubdtype(jnp.result_type(leaf), jnp.floating) else None), tree
    )


def _number(name: str, value: Any) -> float:
    """The value as a float, or ValueError."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.number) or not np.isfinite(value):
        raise ValueError(f"floats[{name!r}] must be a finite number, got {value!r:.200}: pass the value to check it at")
    return float(value)


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key)


def _plain(leaf: Any) -> np.ndarray:
    """An array as numpy's; of keys, their data."""
    return np.asarray(jax.random.key_data(leaf) if _is_key(leaf) else leaf)


def _stacked(trees: list[Any]) -> Any:
    """The trees as one with a leading axis, on the host."""
    return jax.tree.map(lambda *leaves: (jnp if _is_key(leaves[0]) else np).stack(leaves), *trees)


def _require(holds: Any, sentence: str) -> None:
    """Raises AssertionError with the sentence unless it holds."""
    if not holds:
        raise AssertionError(sentence)


def _leaves(tree: PyTree) -> Iterator[tuple[str, Any]]:
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        yield jax.tree_util.keystr(path, simple=True, separator="."), leaf


def _same_structure(actual: PyTree, expected: PyTree, sentence: str, fix: str) -> None:
    """Raises AssertionError unless the trees have one structure."""
    one: Any = jax.tree.structure(actual)
    other: Any = jax.tree.structure(expected)
    _require(one == other, f"{sentence}: it is built as {one}, expected {other}; {fix}")


def _same_shapes(actual: PyTree, expected: PyTree, sentence: str, fix: str) -> None:
    """Raises AssertionError unless the trees have one structure, and their leaves the same shapes and dtypes."""
    _same_structure(actual, expected, sentence, fix)
    for (path, a), b in zip(_leaves(actual), jax.tree.leaves(expected), strict=True):
        got, wanted = ((jnp.result_type(leaf), jnp.shape(leaf)) for leaf in (a, b))
        _require(
            got == wanted,
            f"{sentence}: {path} is {got[0]}{list(got[1])}, expected {wanted[0]}{list(wanted[1])}; {fix}",
        )


def _same(actual: PyTree, expected: PyTree, sentence: str, fix: str, *, rtol: float = 0, atol: float = 0) -> None:
    """Raises AssertionError unless the trees have one structure and the same numbers (NaN is NaN)."""
    _same_structure(actual, expected, sentence, fix)
    for (path, a), b in zip(_leaves(actual), jax.tree.leaves(expected), strict=True):
        x, y = _plain(a), _plain(b)
        _require(x.shape == y.shape, f"{sentence}: {path} has shape {list(x.shape)}, expected {list(y.shape)}; {fix}")
        exact = rtol == atol == 0
        close = (x == y) | ((x != x) & (y != y)) if exact else np.isclose(x, y, rtol, atol, equal_nan=True)
        if not np.all(close):
            where = tuple(int(i) for i in np.argwhere(~close)[0])
            at = str(list(where)) if where else ""
            gap = np.max(np.abs(x[~close].astype(np.float64) - y[~close].astype(np.float64)))
            allowed = "none" if exact else f"{rtol:g}"
            raise AssertionError(
                f"{sentence}: {path}{at} is {x[where]}, expected {y[where]} ({np.sum(~close)} of {x.size} numbers "
                f"there differ, by up to {gap:.2g}; allowed is {allowed}); {fix}"
            )


def _is_variable(atom: Any) -> bool:
    return not hasattr(atom, "val")  # literals have one
