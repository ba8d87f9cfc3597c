"""Checks that every federated method has to pass, for methods of your own too.

    problem = testing.classification()

    def make(*, lr=0.1, **settings):
        return my_method(problem.loss_fn, optax.sgd(lr), batch_size=4, **settings)

    testing.check_algorithm(make, problem, floats={"lr": 0.1})

Each check is a sentence about the method; the first that is not true is raised. A test suite that wants one test for
each takes `properties`. Methods are checked in float64, which is switched on meanwhile, and in float32. As compiling
takes most of the time, the checks share few programs: one of a round, which all its cohorts, keys, values and states go
through, and one of several simulations at once.
"""

import pickle
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_core import checks, clients, reference, samplers
from fedjax_core.algorithm import Algorithm
from fedjax_core.plans import Plan
from fedjax_core.population import Cohort, Population
from fedjax_core.simulation import continue_rounds, simulate
from fedjax_core.staging import HostPopulation, continue_staged, init_on_host
from fedjax_core.types import Array, Examples, Key, LossFn, Metrics, Params, PyTree

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
        ("shuffled" or "sequential"), the last two of which go to `local_training` or `for_each_client`; a method that
        takes no order leaves it out. Local work of one or two epochs in batches of a few examples is enough.
      problem: what the method is checked on; `classification()` unless given.
      floats: hyper-parameters that one can sweep over, by name, with their values. Each must work as a tracer.
      random: whether another key gives other numbers when examples are shuffled.
      rows_may_stay: whether a participant's row of per-client state may stay as it is.
      undefined_if_empty: fields of the method's own metrics that are NaN in a round without participants.

    Raises:
      AssertionError: with a sentence that says which property the method lacks.
      ValueError: if the problem has too few clients.
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
    "client_params_are_one_model_per_client",
    "a_state_can_be_donated",
    "the_server_uses_only_uploads",
    "metrics_count_scalars_and_participants",
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
        self.given = problem or classification()
        self._make, self.floats = make, dict(floats or {})
        self.random, self.rows_may_stay, self.undefined_if_empty = random, rows_may_stay, undefined_if_empty
        self._traces = 0
        sizes = np.asarray(self.given.population.sizes)
        busy = np.flatnonzero(sizes > 0)
        if len(busy) < 6:
            raise ValueError(f"the problem has {len(busy)} clients with examples: give it at least 6")
        a, b, c, d, e, f = (int(i) for i in busy[:6])
        self.busy = busy
        self.empty = int(np.argmin(sizes)) if len(busy) < len(sizes) else -1
        # Partial participation, an empty slot, an empty client.
        self.cohorts = [[a, d, c, b], [e, -1, b, f], [self.empty, c, a, d]]
        self.participants = (4, 3, 3)
        self.num_clients = len(sizes)
        self.sampler = samplers.uniform(self.num_clients, 4)

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
        return _as_floats(self.given.params, jnp.float64)

    @cached_property
    def population(self) -> Population:
        """The clients in float64."""
        return self._population(jnp.float64)

    def _population(self, dtype: Any) -> Population:
        given = self.given.population
        return Population.from_flat(_as_floats(given.examples, dtype), np.asarray(given.offsets))

    def make(self, values: Mapping[str, Any] | None = None, **settings: Any) -> Algorithm:
        """The method; one client after the other and examples in their order, which compiles fastest, unless told."""
        settings = {"plan": Plan(lanes=1), "order": "sequential", **settings}
        return self._make(**(self.floats if values is None else values), **settings)

    @cached_property
    def algorithm(self) -> Algorithm:
        """The method at its own values."""
        return self.make()

    @property
    def has_rows(self) -> bool:
        """Whether the method keeps state for every client."""
        state = jax.eval_shape(self.algorithm.init, self.params)
        return bool(jax.tree.leaves(clients.split_tables(state)[1]))

    @cached_property
    def jitted(self) -> Any:
        """`round(values, state, cohort, key)`, compiled once for float64 and once for float32."""

        def counted(values: Any, state: Any, cohort: Cohort, key: Key) -> Any:
            self._traces += 1
            _require(
                self._traces <= 2,
                "a round was traced again for other ids, sizes, keys, values or the state of the round before: its "
                "state must have the shapes and dtypes of the state that it was given",
            )
            return self.make(values).round(state, cohort, key)

        return jax.jit(counted)

    def round(self, state: Any, ids: Any, key: Key) -> tuple[Any, Metrics]:
        """One compiled round."""
        return self.jitted(self.floats, state, self.population.cohort(np.asarray(ids)), key)

    def rounds(self, round: Callable[..., Any], cohorts: list[list[int]]) -> tuple[Any, list[Metrics]]:
        """State after rounds of these cohorts, and the metrics of each."""
        state, metrics = self.algorithm.init(self.params), []
        for t, ids in enumerate(cohorts):
            state, info = round(state, ids, jax.random.fold_in(self.key, t))
            metrics.append(info)
        return state, metrics

    def by_plain_loop(self, cohorts: list[list[int]], **settings: Any) -> tuple[Any, list[Metrics]]:
        """The same by the slow, obvious loop over clients."""
        algorithm = self.make(**settings)
        with reference.plain_loop():
            return self.rounds(lambda state, ids, key: algorithm.round(state, self._cohort(ids), key), cohorts)

    def _cohort(self, ids: list[int]) -> Cohort:
        return self.population.cohort(np.asarray(ids))

    @cached_property
    def expected(self) -> tuple[Any, list[Metrics]]:
        """State and metrics after the cohorts, by the plain loop."""
        return self.by_plain_loop(self.cohorts)

    @cached_property
    def done(self) -> tuple[Any, list[Metrics]]:
        """State and metrics after the cohorts, by the compiled round."""
        return self.rounds(self.round, self.cohorts)

    @property
    def state(self) -> Any:
        """State after the cohorts."""
        return self.done[0]

    def simulated(self, values: Mapping[str, float], key: Key, num_rounds: int) -> tuple[Any, Metrics]:
        """What a simulation gives, by single compiled rounds; metrics stacked."""
        sample_key, train_key = jax.random.split(key)
        state, rows = self.make(values).init(self.params), []
        for t in range(num_rounds):
            cohort = self.population.cohort(self.sampler(sample_key, jnp.int32(t)))
            state, info = self.jitted(values, state, cohort, jax.random.fold_in(train_key, t))
            rows.append(info)
        return state, jax.tree.map(lambda *leaves: np.stack(leaves), *rows)

    # The checks.

    def a_round_equals_a_plain_loop(self) -> None:
        """Compiled rounds give what a loop over clients in Python gives."""
        _same(self.done, self.expected, "compiled rounds do not give the result of a plain loop over clients", **EXACT)

    def cohort_order_does_not_matter(self) -> None:
        """The slots of a cohort may be in any order."""
        again = self.rounds(self.round, [ids[::-1] for ids in self.cohorts])
        _same(again, self.done, "the order of the clients in a cohort changes the result", **EXACT)

    def empty_slots_and_clients_change_nothing(self) -> None:
        """A cohort with empty slots and clients without examples is that without them."""
        _, b, c, d, *_ = (int(i) for i in self.busy[:6])
        padded = self.rounds(self.round, [[d, -1, b, self.empty], [-1, self.empty, c, -1]])
        bare = self.by_plain_loop([[d, b], [c]])
        _same(padded, bare, "empty slots or clients without examples change the result", **EXACT)

    def an_empty_cohort_changes_only_the_counter(self) -> None:
        """A round of nobody leaves the state as it is, and reports a loss of NaN."""
        for ids in ([-1, -1, -1, -1], [self.empty, -1, -1, -1]):
            after, metrics = self.round(self.state, ids, self.key)
            _require(int(after.round) == int(self.state.round) + 1, "a round without participants is not counted")
            _same(
                after._replace(round=0), self.state._replace(round=0), "a round without participants changes the state"
            )
            _require(metrics.participants == 0, "metrics count participants in a round without")
            _require(metrics.update_norm == 0, "metrics tell of an update in a round without participants")
            _require(np.isnan(metrics.loss), "metrics tell of a loss in a round without participants, expected NaN")
            extra = metrics.extra
            if self.undefined_if_empty:
                extra = extra._replace(**dict.fromkeys(self.undefined_if_empty, 0))
            for leaf in jax.tree.leaves((after, (metrics.update_norm, extra))):
                finite = not jnp.issubdtype(jnp.result_type(leaf), jnp.floating) or bool(jnp.all(jnp.isfinite(leaf)))
                _require(finite, "a round without participants makes numbers that are not finite")

    def only_participants_rows_change(self) -> None:
        """Per-client state of the absent stays, that of participants changes."""
        _, b, *_, f = (int(i) for i in self.busy[:6])
        after, _ = self.round(self.state, [f, b, -1, -1], self.key)
        absent = np.setdiff1d(np.arange(self.num_clients), [b, f])
        tables = [jax.tree.leaves(clients.split_tables(state)[1]) for state in (self.state, after)]
        for old, new in zip(*tables, strict=True):
            old, new = _plain(old), _plain(new)
            _require(np.array_equal(old[absent], new[absent]), "the state of clients that took no part changes")
            changed = self.rows_may_stay or not np.array_equal(old[b], new[b])
            _require(changed, "the state of a client that took part stays as it was; if it may, say rows_may_stay=True")

    def same_key_same_bits(self) -> None:
        """A round is a function of its arguments."""
        state = self.algorithm.init(self.params)
        first, again = (self.round(state, self.cohorts[0], jax.random.key(3)) for _ in range(2))
        _same(again, first, "the same state, cohort and key give other bits")

    def seeds_and_floats_vmap_like_a_loop(self) -> None:
        """Simulations at once, of seeds and values of their own each, give what single rounds of each give."""

        def final(values: Any, key: Key) -> tuple[Params, Metrics]:
            algorithm = self.make(values, plan=None)  # all clients of all simulations beside each other
            state, metrics = simulate(algorithm, self.sampler, 2)(self.params, self.population, key)
            return algorithm.params(state), metrics

        # One member per hyper-parameter, each with that one lowered.
        names = list(self.floats)
        members = max(2, len(names))
        batch = {n: np.full(members, self.floats[n]) for n in names}
        for member, name in enumerate(names):
            batch[name][member] *= 0.8
        seeds = jax.random.split(jax.random.key(5), members)
        together = jax.jit(jax.vmap(final, axis_size=members))(batch, seeds)
        for member in range(members):
            alone = {n: float(v[member]) for n, v in batch.items()}
            state, metrics = self.simulated(alone, seeds[member], 2)
            one = jax.tree.map(lambda leaf, member=member: leaf[member], together)
            _same(
                one,
                (self.algorithm.params(state), metrics),
                "simulations at once, by vmap over seeds and hyper-parameters, differ from single rounds of each",
                rtol=1e-11,
                atol=1e-12,
            )

    def other_arguments_do_not_retrace(self) -> None:
        """One program does for all ids, sizes, keys, values and states of a population of so many examples."""
        sizes = np.asarray(self.population.sizes)[::-1]
        other = Population.from_sizes(jax.tree.map(lambda leaf: leaf[::-1], self.population.examples), sizes)
        state = self.algorithm.init(self.params)
        before = None
        for t, ids in enumerate((self.cohorts[0], self.cohorts[1], [-1] * 4)):
            values = {name: value * (1 - 0.1 * t) for name, value in self.floats.items()}
            state, _ = self.jitted(values, state, other.cohort(np.asarray(ids)), jax.random.key(t))
            before = self._traces if before is None else before
        _require(self._traces == before, "a round is traced again for other ids, keys or values")
        _require(int(state.round) == 3, f"the counter of rounds is {state.round} after three")

    def no_large_constants(self) -> None:
        """Data and parameters are arguments of the program, no part of it."""
        arguments = self.floats, self.algorithm.init(self.params), self._cohort(self.cohorts[0]), self.key
        size = sum(np.size(constant) for constant in self.jitted.trace(*arguments).jaxpr.consts)
        _require(
            size < MOST_CONSTANTS,
            f"the compiled round holds {size} numbers as constants: arrays go in by the state, the cohort or shared",
        )

    def dtypes_stay(self) -> None:
        """float32 stays float32: a round returns the structure, shapes and dtypes that it is given."""
        state = self.algorithm.init(_as_floats(self.params, jnp.float32))
        cohort = self._population(jnp.float32).cohort(np.asarray(self.cohorts[0]))
        after, _ = self.jitted.trace(self.floats, state, cohort, self.key).out_info
        _same_shapes(after, state, "a round of a model in float32 returns another type of state than init")
        _same_shapes(
            self.algorithm.params(state), _as_floats(self.params, jnp.float32), "params(state) is no model like init's"
        )

    def state_survives_pickling(self) -> None:
        """A state that is written and read again goes on to the same bits."""
        again = pickle.loads(pickle.dumps(self.state))
        _same(again, self.state, "a state changes when it is pickled and read again")
        on, expected = (self.round(state, self.cohorts[1], self.key) for state in (again, self.state))
        _same(on, expected, "a run that goes on from a pickled state gives other bits")

    def client_params_are_one_model_per_client(self) -> None:
        """`client_params(state, ids)` stacks a model for each of the ids."""
        rows = self.algorithm.client_params(self.state, jnp.array([2, 0, 5]))
        expected = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct((3, *leaf.shape), leaf.dtype), self.algorithm.params(self.state)
        )
        _same_shapes(rows, expected, "client_params(state, ids) is not one model for each id, stacked")

    def a_state_can_be_donated(self) -> None:
        """No buffer is in a state twice, nor are the caller's params in it."""
        for state in (self.algorithm.init(self.params), jax.jit(self.algorithm.init)(self.params), self.state):
            arrays = [leaf for leaf in jax.tree.leaves((self.params, state)) if leaf.size]
            buffers = {leaf.unsafe_buffer_pointer() for leaf in arrays}
            _require(
                len(buffers) == len(arrays),
                "a state cannot be donated: it holds an array twice, or one of the params it was made from",
            )

    def the_server_uses_only_uploads(self) -> None:
        """Of what clients keep, the outputs of their programs, only their own rows are made."""
        server, _ = self.made_of_outputs()
        _require(
            not server,
            "the server's state is made of the outputs of client programs, which stay with the clients: put into the "
            "upload what the server uses",
        )

    def made_of_outputs(self) -> tuple[bool, bool]:
        """Whether the server's state after a round, and the clients' rows, are made of outputs of client programs."""
        real, algorithm = clients.for_each_client, self.algorithm

        def parts(outputs: Array, state: Any, cohort: Cohort) -> tuple[Any, Any]:
            def only_shapes(program: Any, shared: Any, client_inputs: Any, cohort: Cohort, key: Key, **options: Any):
                call = partial(real, program, **options)
                shapes = jax.eval_shape(call, shared, client_inputs, cohort, key)
                blank = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
                return blank._replace(outputs=jax.tree.map(lambda o: o + outputs.astype(o.dtype), blank.outputs))

            with reference.replaced(only_shapes):
                return clients.split_tables(algorithm.round(state, cohort, self.key)[0])

        state = algorithm.init(self.params)
        closed, shape = jax.make_jaxpr(parts, return_shape=True)(jnp.zeros(()), state, self._cohort(self.cohorts[0]))
        jaxpr, num_server = closed.jaxpr, len(jax.tree.leaves(shape[0]))

        def made_of_first(results: list[Any]) -> bool:
            needed = set(filter(_is_variable, results))
            for equation in reversed(jaxpr.eqns):
                if needed & set(equation.outvars):
                    needed |= set(filter(_is_variable, equation.invars))
            return jaxpr.invars[0] in needed

        return made_of_first(jaxpr.outvars[:num_server]), made_of_first(jaxpr.outvars[num_server:])

    def metrics_count_scalars_and_participants(self) -> None:
        """Metrics count who took part and at least a model up and down, and measure a loss and an update."""
        size = clients.num_scalars(self.params)
        for info, participants in zip(self.done[1], self.participants, strict=True):
            _require(
                info.participants == participants,
                f"metrics count {info.participants} participants where there are {participants}",
            )
            _require(info.uploaded >= size, f"metrics count {info.uploaded} scalars up, fewer than a model's {size}")
            _require(info.downloaded >= size, f"metrics count {info.downloaded} scalars down, of a model of {size}")
            _require(bool(jnp.isfinite(info.loss)), f"metrics tell of a loss of {info.loss}")
            _require(info.update_norm > 0, f"metrics tell of an update of length {info.update_norm}")

    @cached_property
    def on_mesh(self) -> Any:
        """`round(state, cohort, key)` of shuffled examples, in two lanes on each of two devices (or the only one)."""
        devices = jax.devices()[:2]
        mesh = jax.make_mesh((len(devices),), ("clients",), devices=devices)
        return jax.jit(self.make(plan=Plan(lanes=2 * len(devices), mesh=mesh), order="shuffled").round)

    @cached_property
    def wide(self) -> list[list[int]]:
        """The cohorts with a fifth slot: lanes get more than one client each, devices unequally many."""
        return [[*ids, extra] for ids, extra in zip(self.cohorts, (int(self.busy[5]), -1, -1), strict=True)]

    def lanes_on_a_mesh_equal_a_plain_loop(self) -> None:
        """Lanes on the devices of a mesh, with shuffled examples, give what a loop over clients in Python gives."""
        got = self.rounds(lambda state, ids, key: self.on_mesh(state, self._cohort(ids), key), self.wide)
        expected = self.by_plain_loop(self.wide, order="shuffled")
        _same(got, expected, "lanes on a mesh do not give the result of a plain loop over clients", **EXACT)

    def another_key_gives_other_numbers(self) -> None:
        """The key is used, and in a method that draws nothing it makes no difference."""
        state, cohort = self.algorithm.init(self.params), self._cohort(self.wide[0])
        first, other = (self.on_mesh(state, cohort, jax.random.key(seed))[1].update_norm for seed in (3, 4))
        if self.random:
            _require(first != other, "another key gives the same numbers; if the method draws none, say random=False")
        else:
            _require(first == other, "another key gives other numbers, and random=False was said")

    def scanned_rounds_equal_single_rounds(self) -> None:
        """Rounds in one loop, and a run that goes on where one has ended, give the bits of single rounds."""
        run = jax.jit(continue_rounds(self.algorithm, self.sampler, 2))
        state, first = run(self.algorithm.init(self.params), self.population, self.key)
        state, second = run(state, self.population, self.key)
        scanned = jax.tree.map(lambda *leaves: np.concatenate(leaves), first, second)
        expected = self.simulated(self.floats, self.key, 4)
        _same((state, scanned), expected, "rounds in one compiled loop give other bits than single rounds")

    def client_state_in_host_memory_gives_the_same_bits(self) -> None:
        """A method that touches its tables through the cohort alone cannot tell that they hold its rows alone."""
        if not self.has_rows:
            return
        state = init_on_host(self.algorithm.init, self.params, num_clients=self.num_clients)
        examples = jax.tree.map(np.asarray, self.population.examples)
        host = HostPopulation.from_flat(examples, np.asarray(self.population.offsets))
        staged, _ = continue_staged(self.algorithm, self.sampler, 3)(state, host, self.key)
        expected, _ = self.simulated(self.floats, self.key, 3)
        _same(staged, expected, "per-client state in host memory gives other bits than on the device")

    def float32_agrees_with_float64(self) -> None:
        """In float32 a model moves as in float64, up to rounding."""
        params, population = _as_floats(self.params, jnp.float32), self._population(jnp.float32)
        state = self.algorithm.init(params)
        for t, ids in enumerate(self.cohorts):
            cohort = population.cohort(np.asarray(ids))
            state, _ = self.jitted(self.floats, state, cohort, jax.random.fold_in(self.key, t))
        _same_shapes(state, self.algorithm.init(params), "rounds in float32 return another type of state than init")
        _same(
            _as_floats(self.algorithm.params(state), jnp.float64),
            self.algorithm.params(self.expected[0]),
            "a model in float32 is not that in float64 up to rounding",
            rtol=1e-4,
            atol=1e-5,
        )


def _as_floats(tree: PyTree, dtype: Any) -> PyTree:
    """The tree with its arrays of floats in another precision."""
    return jax.tree.map(
        lambda leaf: jnp.asarray(leaf, dtype if jnp.issubdtype(jnp.result_type(leaf), jnp.floating) else None), tree
    )


def _plain(leaf: Any) -> np.ndarray:
    """An array as numpy's; of keys, their data."""
    is_key = jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if is_key else leaf)


def _require(holds: Any, sentence: str) -> None:
    """Raises AssertionError with the sentence unless it holds."""
    if not holds:
        raise AssertionError(sentence)


def _leaves(tree: PyTree) -> Iterator[tuple[str, Any]]:
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        yield jax.tree_util.keystr(path), leaf


def _same_shapes(actual: PyTree, expected: PyTree, sentence: str) -> None:
    """Raises AssertionError unless the trees have one structure, and their leaves the same shapes and dtypes."""
    one: Any = jax.tree.structure(actual)
    other: Any = jax.tree.structure(expected)
    _require(one == other, f"{sentence}: {one}, expected {other}")
    for (path, a), b in zip(_leaves(actual), jax.tree.leaves(expected), strict=True):
        got, wanted = ((jnp.result_type(leaf), jnp.shape(leaf)) for leaf in (a, b))
        _require(got == wanted, f"{sentence}: {path} is {got[0]}{list(got[1])}, expected {wanted[0]}{list(wanted[1])}")


def _same(actual: PyTree, expected: PyTree, sentence: str, *, rtol: float = 0, atol: float = 0) -> None:
    """Raises AssertionError unless the trees have one structure and the same numbers (NaN is NaN)."""
    one: Any = jax.tree.structure(actual)
    other: Any = jax.tree.structure(expected)
    _require(one == other, f"{sentence}: {one}, expected {other}")
    for (path, a), b in zip(_leaves(actual), jax.tree.leaves(expected), strict=True):
        x, y = _plain(a), _plain(b)
        _require(x.shape == y.shape, f"{sentence}: {path} has shape {list(x.shape)}, expected {list(y.shape)}")
        close = (x == y) | ((x != x) & (y != y)) if rtol == atol == 0 else np.isclose(x, y, rtol, atol, equal_nan=True)
        if not np.all(close):
            where = tuple(int(i) for i in np.argwhere(~close)[0])
            at = "" if not where else f"{list(where)}"
            raise AssertionError(f"{sentence}: {path}{at} is {x[where]!r}, expected {y[where]!r}")


def _is_variable(atom: Any) -> bool:
    return not hasattr(atom, "val")  # literals have one
