"""Populations larger than device memory: each round's examples are brought to the device while the last one computes.

    population = HostPopulation.from_sizes(examples, sizes)          # numpy arrays, memory-mapped files as well
    run = simulate_staged(algorithm, samplers.uniform(population.num_clients, 100), num_rounds=500)
    state, metrics = run(params, population, jax.random.key(0))

The numbers are those of `simulate` with the same population on the device, bit for bit: only where the examples lie
differs. A run is a loop in Python around one compiled round. Cohorts are functions of (key, round), so all of them
are known before the first round, and with them the largest one: its size, rounded up, is the shape of every
transfer, and the round is compiled once.

Per-client state can stay in host memory or in files too, see `init_on_host`. Then a round gets the rows of its
cohort, and rows that the round before has changed go from one to the other on the device.

Letters in shapes: N clients, C slots of a cohort, S simulations run at once (seeds).
"""

import itertools
import math
import operator
import signal
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding
from jax.typing import DTypeLike

from fedjax_core import checks, sums
from fedjax_core.algorithm import Algorithm, check_algorithm, check_rounds, check_state, first_state
from fedjax_core.clients import ClientTable, has_own_index, join_tables, map_tables, split_tables, tables_of
from fedjax_core.keys import derive, split, typed
from fedjax_core.plans import auto_mesh
from fedjax_core.population import (
    Cohort,
    Population,
    check_client,
    check_ids,
    check_offsets,
    checked_public,
    offsets_of,
)
from fedjax_core.samplers import Sampler, check_callable, check_length, check_sampler
from fedjax_core.types import Array, ArrayLike, Examples, Key, Metrics, Params, PyTree

_ALIGNMENT = 64  # the processor's backend takes memory aligned like this as it is, without a copy
_SAMPLED_AT_ONCE = 1 << 24  # client numbers that one call of the sampler over many rounds may produce


@dataclass(frozen=True)
class HostPopulation:
    """All clients' examples in host memory or on disk; the counterpart of `Population`.

    Attributes:
      examples: pytree of numpy arrays (memory maps too), leaves [total, ...].
      offsets: int64[N + 1].
      rows: int64[offsets[-1]], or None. Client i owns examples rows[offsets[i]:offsets[i + 1]]; without `rows`,
        examples offsets[i] to offsets[i + 1]. With it a data set need not be written anew to be divided among clients.
      public: what the server holds beside, as in `Population`; it is on the device for the whole run.
    """

    examples: Examples
    offsets: np.ndarray
    rows: np.ndarray | None = None
    public: PyTree = ()

    @classmethod
    def from_flat(
        cls, examples: Examples, offsets: ArrayLike, rows: ArrayLike | None = None, *, check_finite: bool = False
    ) -> "HostPopulation":
        """Builds a population from flat examples and client boundaries.

        Args:
          examples: pytree of arrays, leaves [total, ...]; grouped by client unless `rows` is given.
          offsets: integers [N + 1], from 0 to total (to the length of `rows`), not decreasing.
          rows: integers, the examples of client 0, of client 1, ...; in any order, an example may be left out.
          check_finite: look for NaN and infinity, which reads every example.

        Leaves of 64 bits become 32-bit ones on the device (unless JAX has 64 bits enabled). Whether their numbers fit
        is looked at here, or in a memory map at each cohort that is read.

        Raises:
          TypeError: if a leaf holds no numbers.
          ValueError: if leading axes differ, the offsets do not cover the rows, a row is out of range, there are
            more rows than int32 can count, the data is not finite, or a number does not fit into 32 bits.
        """
        checks.numbers(examples)
        total = checks.leading_axis(examples)
        if rows is not None:
            rows = np.asarray(rows)
            if rows.ndim != 1 or not np.issubdtype(rows.dtype, np.integer):
                raise ValueError(
                    f"rows must be a 1-d array of integers, got {rows.dtype}{list(rows.shape)}: pass the numbers of "
                    "the examples, client after client"
                )
            if rows.size and (rows.min() < 0 or rows.max() >= total):
                bad = rows.min() if rows.min() < 0 else rows.max()
                raise ValueError(f"rows holds {bad}, but the examples are 0 to {total - 1}: use those")
            rows = rows.astype(np.int64)
        bounds = check_offsets(offsets, total if rows is None else len(rows)).astype(np.int64)
        if bounds[-1] >= 2**31:
            raise ValueError(f"the clients have {bounds[-1]} examples, more than int32 can count: split the population")
        if check_finite:
            checks.finite(examples)
        examples = jax.tree.map(np.asanyarray, examples)  # a memory map stays one
        checks.fits(jax.tree.map(lambda leaf: None if isinstance(leaf, np.memmap) else leaf, examples))
        return cls(examples, bounds, rows)

    @classmethod
    def from_sizes(
        cls, examples: Examples, sizes: ArrayLike, rows: ArrayLike | None = None, *, check_finite: bool = False
    ) -> "HostPopulation":
        """Like `from_flat`, from the number of examples of each client instead of the boundaries."""
        return cls.from_flat(examples, offsets_of(sizes), rows, check_finite=check_finite)

    @property
    def num_clients(self) -> int:
        """Number of clients, N."""
        return self.offsets.shape[0] - 1

    @property
    def num_examples(self) -> int:
        """Number of examples of all clients."""
        return int(self.offsets[-1])

    @property
    def sizes(self) -> np.ndarray:
        """int64[N], number of examples of each client."""
        return np.diff(self.offsets)

    def sizes_of(self, ids: np.ndarray) -> np.ndarray:
        """int64[...], number of examples of clients `ids`, int[...]."""
        return self.offsets[ids + 1] - self.offsets[ids]

    def rows_of(self, ids: ArrayLike) -> np.ndarray:
        """int64[n], the rows of `examples` of clients `ids`, int[k], one client after the other."""
        ids = np.asarray(ids, np.int64)
        if ids.size and (ids.min() < 0 or ids.max() >= self.num_clients):
            check_client(int(ids.min() if ids.min() < 0 else ids.max()), self.num_clients)
        sizes = self.sizes_of(ids)
        ends = np.cumsum(sizes)
        # Row k of the result is row k - (end of the clients before) of its client.
        shift = np.repeat(self.offsets[ids] - (ends - sizes), sizes)
        index = np.arange(ends[-1] if len(ends) else 0) + shift
        return index if self.rows is None else self.rows[index]

    def client(self, index: int) -> Examples:
        """The examples of one client, leaves [n, ...].

        Raises:
          ValueError: unless `index` is a client's number, 0 to num_clients - 1.
        """
        check_client(index, self.num_clients)
        rows = self.rows_of([index])
        return jax.tree.map(lambda leaf: leaf[rows], self.examples)

    def to_device(self) -> Population:
        """The same population as a `Population`, grouped by client, in device memory."""
        rows = self.rows_of(np.arange(self.num_clients))
        population = Population.from_flat(jax.tree.map(lambda leaf: leaf[rows], self.examples), self.offsets)
        return population.with_public(self.public)

    def with_public(self, public: PyTree) -> "HostPopulation":
        """The same clients beside public data; see `Population.with_public`."""
        return replace(self, public=jax.tree.map(np.asarray, checked_public(public)))


def simulate_staged(
    algorithm: Algorithm, sampler: Sampler, num_rounds: int, *, mesh: Mesh | None = None
) -> Callable[[Params, HostPopulation, Key], tuple[Any, Metrics]]:
    """Returns `run(params, population, key) -> (state, metrics)` of `num_rounds` rounds; `simulate`, staged.

    With keys key[S] and params with leading axes [S] it runs S simulations at once, like a `vmap` of `simulate` over
    both: clients that several of them draw are brought over once.

    Args:
      algorithm: the method.
      sampler: who takes part. Where most of its slots are empty (`samplers.bernoulli` over a million clients) the
        cohort is packed into as many slots as the fullest round needs.
      num_rounds: number of rounds.
      mesh: devices that get a cohort's examples, all of them each; JAX's default device unless given.

    Returns:
      The function; not to be jitted. Its compiled round is kept between calls.
    """
    run_rounds = continue_staged(algorithm, sampler, num_rounds, mesh=mesh)

    def run(params: Params, population: HostPopulation, key: Key) -> tuple[PyTree, Metrics]:
        key = _one_or_row(key)
        params = checks.model(params)
        if not key.ndim:
            return run_rounds(first_state(algorithm, params, key), population, key)
        for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
            if jnp.shape(leaf)[:1] != key.shape:
                raise ValueError(
                    f"params{jax.tree_util.keystr(path)} has shape {list(jnp.shape(leaf))}, but there are "
                    f"{key.shape[0]} keys, each for a simulation with parameters of its own: stack them to "
                    f"[{key.shape[0]}, ...] (fedjax_core.global_client_params(params, jnp.arange({key.shape[0]})) "
                    "repeats one model), or pass one key"
                )
        return run_rounds(jax.vmap(partial(first_state, algorithm))(params, key), population, key)

    return run


def continue_staged(
    algorithm: Algorithm,
    sampler: Sampler,
    num_rounds: int,
    *,
    horizon: int | None = None,
    mesh: Mesh | None = None,
) -> Callable[[Any, HostPopulation, Key], tuple[Any, Metrics]]:
    """Returns `run(state, population, key) -> (state, metrics)` for the next `num_rounds` rounds.

    The counterpart of `continue_rounds`, and like it to be given the same key in every part of a run. Tables of
    per-client state that are numpy arrays (`init_on_host`) are changed in place and come back in the new state.
    The function raises ValueError for tables and samplers made for another number of clients than the population has,
    for a sampler that draws a client twice or one that is not there, for a table that is at another round than the
    state, and for simulations that are not at the same round. Ctrl-C takes effect after the round that is under way,
    as an `Interrupted` (a KeyboardInterrupt) with the state to go on from.

    Args:
      algorithm: the method.
      sampler: who takes part.
      num_rounds: number of rounds of one call.
      horizon: number of rounds of the whole run, whose largest cohort sets the shapes; unless given, a call looks
        no further than its own rounds, and a later one may need another shape.
      mesh: see `simulate_staged`.
    """
    check_algorithm(algorithm)
    check_callable(sampler)
    checks.positive_int("num_rounds", num_rounds, "run at least one round")
    if horizon is not None:
        checks.positive_int("horizon", horizon, "it is the number of rounds of the whole run")
    cohorts = _Cohorts(sampler)
    replicated = None if mesh is None else NamedSharding(auto_mesh(mesh), PartitionSpec())
    round_key_of = jax.jit(derive)
    rounds = {
        batched: jax.jit(_round(algorithm, batched), donate_argnums=0, static_argnums=8) for batched in (False, True)
    }

    def run(state: PyTree, population: HostPopulation, key: Key) -> tuple[PyTree, Metrics]:
        if not isinstance(population, HostPopulation):
            fix = "use simulate or continue_rounds for a population on the device"
            if not isinstance(population, Population):
                fix = "make one of examples and sizes, HostPopulation.from_sizes(examples, sizes)"
            got = checks.misplaced(population) or type(population).__name__
            raise TypeError(f"population must be a HostPopulation, got {got}: {fix}")
        check_state(state, "use simulate_staged to begin from parameters")
        key = _one_or_row(key)
        batched = key.ndim == 1
        keys = key if batched else key[None]
        done = np.asarray(state.round).reshape(-1)
        if (batched and np.shape(state.round) != key.shape) or (not batched and np.ndim(state.round)):
            raise ValueError(
                f"key has shape {list(key.shape)}, but the state is one of {list(np.shape(state.round))} simulations: "
                "pass one key for each"
            )
        if (done != done[0]).any():
            raise ValueError(
                f"the simulations have done {done.tolist()} rounds: run at once only what is at the same round"
            )
        check_rounds(done, num_rounds)
        first, last = int(done[0]), int(done[0]) + num_rounds
        check_sampler(sampler, population.num_clients, keys[0])
        check_length(sampler, done, num_rounds)
        cohorts.prepare(population, keys, range(first, max(last, horizon or 0)))
        on_host = _has_host_tables(state)
        for table in tables_of(state):
            for leaf in jax.tree.leaves(table.index if has_own_index(table) else table.rows):
                if leaf.shape[int(batched)] != population.num_clients:
                    raise ValueError(
                        f"a table of per-client state has {leaf.shape[int(batched)]} rows, but the population has "
                        f"{population.num_clients} clients: make the method and its state with that num_clients"
                    )
        device, tables, indices = _to_host(state) if on_host else (state, None, [])
        # The caller keeps its state, as with any other function, but for the tables.
        device = jax.tree.map(jnp.copy, device)
        where = _Where(indices, batched)
        stage = _Stage(population, cohorts, tables, where, replicated)
        train_key = split(key)[..., 1]
        totals = jax.device_put(np.asarray([population.num_clients, population.num_examples], np.int32), replicated)
        public = jax.device_put(population.public, replicated)

        metrics: list[Metrics] = []
        so_far = _Progress(first, device, ())
        with _later() as interrupted, _kept_in_step(tables, first) as reached:
            try:
                staged = stage(first, None)
                changed = staged.tables
                for t in range(first, last):
                    round_key = round_key_of(train_key, t)
                    device, changed, info = rounds[batched](
                        so_far.device,
                        staged.slots,
                        staged.examples,
                        staged.tables,
                        changed,
                        totals,
                        round_key,
                        public,
                        population.num_clients,
                    )
                    metrics.append(info)
                    # In one assignment, so that whatever interrupts this finds a state and the rows that belong to it.
                    so_far = _Progress(t + 1, device, (*so_far.running, (staged, changed, info)))
                    # The device is busy now, and the rest is done meanwhile. The round before must have ended before
                    # its buffers are filled again, and its rows be in the tables before the next cohort's are read.
                    for before in so_far.running[:-1]:
                        _finish(before, tables, where)
                    so_far = so_far._replace(running=so_far.running[-1:])
                    if interrupted():
                        raise KeyboardInterrupt
                    if t + 1 < last:
                        staged = stage(t + 1, staged.ids)
                _finish_all(so_far, tables, where)
                reached(last)
                if interrupted():
                    raise KeyboardInterrupt
            except BaseException as error:
                # What has been sent to the device is finished, so that the tables are those of a round; rows that are
                # in them already are written once more. Where that fails, the tables are not used again.
                try:
                    _finish_all(so_far, tables, where)
                except Exception:
                    raise error from None
                reached(so_far.round)
                if isinstance(error, KeyboardInterrupt) and so_far.round > first:
                    of_call = _stacked(metrics[: so_far.round - first], batched)
                    raise Interrupted(so_far.round, _state(so_far.device, tables, indices), of_call) from None
                raise
        return _state(so_far.device, tables, indices), _stacked(metrics, batched)

    return run


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during `simulate_staged` or `continue_staged`, after the round that was under way.

    The state that was given to the call is not to be used again where its tables are numpy arrays: they have gone on.

    Attributes:
      round: rounds done.
      state: the state after them, to go on from.
      metrics: of the rounds of this call, leaves [rounds of this call, ...] ([S, rounds, ...] with several keys).
    """

    def __init__(self, round: int, state: PyTree, metrics: Metrics) -> None:
        super().__init__(f"interrupted after round {round}: go on from the `state` of this exception")
        self.round, self.state, self.metrics = round, state, metrics


class _Progress(NamedTuple):
    """How far a call has come.

    Attributes:
      round: rounds done or on the device.
      device: the state after them, without tables.
      running: rounds whose rows are perhaps not in the tables yet, oldest first.
    """

    round: int
    device: PyTree
    running: tuple[tuple["_Staged", PyTree, Metrics], ...]


def _finish_all(so_far: _Progress, tables: PyTree, where: "_Where") -> None:
    for running in so_far.running:
        _finish(running, tables, where)
    jax.block_until_ready(so_far.device)


def _to_host(state: PyTree) -> tuple[PyTree, list[PyTree], list[PyTree]]:
    """The state without its tables, the rows of these, and the indices of these.

    The round finds the rows of its cohort by their slots and has no use for an index.
    """
    device, rows = split_tables(state)
    indices = [table.index for table in tables_of(device)]
    return map_tables(lambda table: table._replace(index=()), device), rows, indices


def _state(device: PyTree, rows: list[PyTree] | None, indices: list[PyTree]) -> PyTree:
    """The state of `_to_host` again."""
    if rows is None:
        return device
    whole = map(ClientTable, rows, indices)
    return map_tables(lambda _: next(whole), device)


def _stacked(metrics: list[Metrics], batched: bool) -> Metrics:
    stacked: Metrics = jax.tree.map(lambda *leaves: jnp.stack(leaves, axis=int(batched)), *metrics)
    return stacked


@contextmanager
def _later() -> Iterator[Callable[[], bool]]:
    """Puts Ctrl-C off: yields a function that says whether it was pressed. The second time it interrupts at once.

    Where somebody else handles the signal, or this is not the main thread, which alone gets signals, nothing changes.
    """
    pressed: list[int] = []
    default = signal.default_int_handler
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is not default:
        yield lambda: False
        return

    def handle(number: int, frame: object) -> None:
        pressed.append(number)
        if len(pressed) > 1:
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, handle)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, default)
    if pressed:  # after the last round had begun
        raise KeyboardInterrupt


_ROUND_OF_TABLE: dict[int, tuple[weakref.ref[np.ndarray], int | None]] = {}
"""Identity of an array that is a table on the host to itself and the round that it is at, None in between."""


@contextmanager
def _kept_in_step(tables: PyTree, first: int) -> Iterator[Callable[[int], None]]:
    """Refuses tables that are not at round `first`; yields a function that says at which they are now.

    Raises:
      ValueError: if a call of before has left them at another round than that of the state they are given with.
    """
    owners = {id(owner): owner for owner in map(_owner, jax.tree.leaves(tables))}
    for name, owner in owners.items():
        found, at = _ROUND_OF_TABLE.get(name, (None, first))
        if found is None or found() is not owner or at == first:
            continue
        where = "between two rounds" if at is None else f"at round {at}"
        raise ValueError(
            f"the state is at round {first}, but its tables of per-client state are {where}: a call changes them in "
            "place, also one that was interrupted. Go on from the state that the last call returned (the `state` of "
            "the Interrupted that it raised), or begin anew with init_on_host; give copies of the tables if you have "
            "put them back yourself"
        )

    def reached(round: int | None) -> None:
        for name, owner in owners.items():
            _ROUND_OF_TABLE[name] = weakref.ref(owner, partial(_forget, name)), round

    reached(None)
    yield reached


def _forget(name: int, gone: object) -> None:
    _ROUND_OF_TABLE.pop(name, None)


def _owner(leaf: np.ndarray) -> np.ndarray:
    """The array whose memory a view shows."""
    while isinstance(leaf.base, np.ndarray):
        leaf = leaf.base
    return leaf


def init_on_host(
    init: Callable[..., Any], *args: Any, num_clients: int, directory: str | Path | None = None, axis: int = 0
) -> PyTree:
    """The state `init(*args)` with its tables of per-client state in host memory, never whole on a device.

    Every client must begin with the same row, which holds for the library's methods: one row is computed and
    repeated. Rows of zeros cost no memory until they are written.

    Args:
      init: `algorithm.init`, or a `vmap` of it.
      *args: its arguments, usually the model.
      num_clients: N; rows lie along an axis of this length.
      directory: keep the tables in files of this directory, memory-mapped; it must be empty or new. None keeps them
        in memory.
      axis: axis of the rows: 0, or 1 with a `vmap` over simulations.

    Returns:
      The state; leaves of its tables are numpy arrays [N, ...] ([S, N, ...] with axis 1).

    Raises:
      ValueError: if the directory is not empty, a table has no axis of length N there, or rows differ.
    """
    folder = None if directory is None else Path(directory)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise ValueError(f"directory {folder} is not empty: choose a new one, files are not written over")

    state = jax.eval_shape(init, *args)
    _, shapes = split_tables(state)
    for table in tables_of(state):
        for leaf in jax.tree.leaves(table.index if has_own_index(table) else table.rows):
            if len(leaf.shape) <= axis or leaf.shape[axis] != num_clients:
                raise ValueError(
                    f"a table of per-client state has shape {leaf.shape}, without num_clients={num_clients} rows along "
                    f"axis {axis}: pass the num_clients the method was made with, and axis=1 for a vmap over "
                    "simulations"
                )

    def one_row(*args: Any) -> tuple[PyTree, PyTree, PyTree]:
        device, tables = split_tables(init(*args))
        first = jax.tree.map(lambda leaf: jax.lax.slice_in_dim(leaf, 0, 1, axis=axis), tables)
        last = jax.tree.map(lambda leaf: jax.lax.slice_in_dim(leaf, leaf.shape[axis] - 1, None, axis=axis), tables)
        return device, first, last

    # Inside one compiled function a slice of a repeated row is that row; the table is never made.
    device, first, last = jax.jit(one_row)(*args)
    for one, other in zip(jax.tree.leaves(first), jax.tree.leaves(last), strict=True):
        if not np.array_equal(one, other, equal_nan=np.asarray(one).dtype.kind == "f"):
            raise ValueError(
                "the first client and the last begin with different rows, and init_on_host repeats one: begin with the "
                "same row for all (a method's start that draws one for each client is for tables on the device)"
            )
    names = (f"table-{number}.npy" for number in itertools.count())

    def allocate(shape: jax.ShapeDtypeStruct, row: ArrayLike) -> np.ndarray:
        table: np.ndarray
        if folder is None:
            table = np.zeros(shape.shape, shape.dtype)
        else:
            table = np.lib.format.open_memmap(folder / next(names), mode="w+", dtype=shape.dtype, shape=shape.shape)
        row = np.asarray(row)
        if row.any():
            table[...] = row
        return table

    return join_tables(device, jax.tree.map(allocate, shapes, first))


class _Cohorts:
    """Who takes part in each round of a run, found in blocks of rounds.

    Attributes:
      width: slots of a cohort, C.
      num_rows: examples that the largest cohort needs, rounded up.
    """

    width: int
    num_rows: int

    def __init__(self, sampler: Sampler) -> None:
        self._sampler = sampler
        self._sample = jax.jit(jax.vmap(jax.vmap(sampler, (None, 0)), (0, None)))
        self._prepared: tuple[HostPopulation, np.ndarray, range] | None = None

    def prepare(self, population: HostPopulation, keys: Key, rounds: range) -> None:
        """Looks through all cohorts of `rounds`, for key[S], to find the shapes; does nothing if it has before."""
        data = np.asarray(jax.random.key_data(keys))
        if self._prepared is not None:
            of, with_keys, known = self._prepared
            if of is population and np.array_equal(with_keys, data) and rounds[0] in known and rounds[-1] in known:
                return
        self._population, self._sample_key = population, split(keys)[..., 0]
        slots = jax.eval_shape(self._sampler, keys[0], jnp.int32(0)).shape[0]
        self._block = max(1, min(len(rounds), _SAMPLED_AT_ONCE // (slots * keys.shape[0])))
        self._have: tuple[int, np.ndarray, np.ndarray] | None = None
        most = widest = 1
        for t in rounds:
            self._check(t)
            ids = self._ids(t)
            present = ids >= 0
            widest = max(widest, int(present.sum(axis=1).max()))
            most = max(most, int(population.sizes_of(np.unique(ids[present])).sum()))
        # Packing changes the shape of sums over slots, and with it their rounding: only where it saves something.
        self.width = _rounded_up(widest) if 2 * _rounded_up(widest) <= slots else slots
        self.num_rows = _rounded_up(most)
        self._prepared = population, data, rounds

    def __call__(self, t: int) -> np.ndarray:
        """int64[S, width], the participants of round t; -1 in empty slots and for clients without examples."""
        ids = self._ids(t)
        if ids.shape[1] == self.width:
            return ids
        packed = np.full((len(ids), self.width), -1, np.int64)
        for row, target in zip(ids, packed, strict=True):
            present = row[row >= 0]
            target[: len(present)] = present
        return packed

    def _ids(self, t: int) -> np.ndarray:
        if self._have is None or not 0 <= t - self._have[0] < self._block:
            # Blocks are all of one length, so that the sampler is compiled once.
            rounds = np.arange(t, t + self._block, dtype=np.int32)
            ids = np.asarray(self._sample(self._sample_key, rounds)).astype(np.int64)
            most = self._population.num_clients - 1
            sized = self._population.sizes_of(np.clip(ids, 0, most)) > 0
            self._have = t, np.where((ids >= 0) & (ids <= most) & sized, ids, -1), ids
        start, block, _ = self._have
        return block[:, t - start]

    def _check(self, t: int) -> None:
        """Raises ValueError if the sampler draws a client twice in round t, or one that is not there."""
        self._ids(t)
        assert self._have is not None
        start, _, drawn = self._have
        for row in drawn[:, t - start]:
            try:
                check_ids(row, self._population.num_clients)
            except ValueError as error:
                raise ValueError(f"in round {t} the sampler's {error}") from None


class _Staged(NamedTuple):
    """A cohort on the device, as it was sent.

    Attributes:
      slots: `_Slots` in one array int32[5, C], or int32[5, S, C].
      examples: the cohort's, leaves [num_rows, ...].
      tables: rows of the tables as they are in host memory, leaves [C, ...]; None with tables on the device.
      ids: int64[S, C], in host memory.
    """

    slots: Array
    examples: Examples
    tables: PyTree
    ids: np.ndarray


class _Slots(NamedTuple):
    """What a cohort says of its slots, int32[C] each; `before` is the slot in the round before, -1 if there is none."""

    ids: Array | np.ndarray
    starts: Array | np.ndarray
    sizes: Array | np.ndarray
    rows: Array | np.ndarray
    before: Array | np.ndarray


class _Stage:
    """Brings cohorts to the device, through two sets of buffers that take turns."""

    def __init__(
        self, population: HostPopulation, cohorts: _Cohorts, tables: PyTree, where: "_Where", sharding: Sharding | None
    ) -> None:
        self._population, self._cohorts, self._tables = population, cohorts, tables
        self._where, self._sharding = where, sharding

        def buffer(leaf: np.ndarray) -> np.ndarray:
            return _aligned((cohorts.num_rows, *leaf.shape[1:]), leaf.dtype)

        self._unchecked = jax.tree.map(lambda leaf: _is_wide(leaf) and isinstance(leaf, np.memmap), population.examples)
        self._buffers = itertools.cycle([jax.tree.map(buffer, population.examples) for _ in range(2)])

    def __call__(self, t: int, ids_before: np.ndarray | None) -> _Staged:
        """The cohort of round t; `ids_before` are those of the round before, if it has not been finished."""
        population, ids = self._population, self._cohorts(t)
        present = ids >= 0
        clients, position = np.unique(ids[present], return_inverse=True)
        rows, buffers = population.rows_of(clients), next(self._buffers)

        def fill(leaf: np.ndarray, buffer: np.ndarray) -> None:
            # clip, because with the default mode numpy writes to a copy first; the rows are in range.
            np.take(leaf, rows, axis=0, out=buffer[: len(rows)], mode="clip")

        jax.tree.map(fill, population.examples, buffers)
        if any(jax.tree.leaves(self._unchecked)):
            read = jax.tree.map(lambda buffer, late: buffer[: len(rows)] if late else None, buffers, self._unchecked)
            checks.fits(read)
        client_sizes = population.sizes_of(clients)
        sizes, starts = np.zeros(ids.shape, np.int32), np.zeros(ids.shape, np.int32)
        sizes[present] = client_sizes[position]
        starts[present] = (np.cumsum(client_sizes) - client_sizes)[position]
        slots = _Slots(
            ids=ids,
            starts=starts,
            sizes=sizes,
            rows=np.maximum(ids, 0) if self._tables is None else np.broadcast_to(np.arange(ids.shape[1]), ids.shape),
            before=_slots_in(ids, ids_before) if ids_before is not None else np.full_like(ids, -1),
        )
        sent = np.stack(slots).astype(np.int32)
        tables = self._tables and [
            jax.tree.map(operator.itemgetter(self._where.read(number, ids)), rows)
            for number, rows in enumerate(self._tables)
        ]
        sent = sent if self._where.batched else sent[:, 0]
        on_device, examples, tables = jax.device_put((sent, buffers, tables), self._sharding)
        return _Staged(on_device, examples, tables, ids)


def _round(algorithm: Algorithm, batched: bool) -> Callable[..., Any]:
    """`round(device, slots, examples, tables, changed, totals, key, public, num_clients)`.

    It returns (device, changed, metrics). `device` is the state, without its tables if those are in host memory. Then
    `tables` are the cohort's rows as they are there, and `changed` the rows that the round before has returned.
    `totals` are the population's clients and examples, int32[2], `public` is its public data, and `num_clients` is the
    number of clients as it is known while tracing.
    """

    def round(
        num_clients: int,
        device: PyTree,
        slots: Array,
        examples: Examples,
        tables: PyTree,
        changed: PyTree,
        totals: Array,
        key: Key,
        public: PyTree,
    ) -> tuple[PyTree, PyTree, Metrics]:
        ids, starts, sizes, rows, before = slots
        cohort = Cohort(
            ids,
            starts,
            sizes,
            rows,
            examples,
            num_clients=totals[0],
            num_examples=totals[1],
            public=public,
            population_size=num_clients,
            table_size=num_clients if tables is None else ids.shape[0],
        )
        if tables is None:
            device, info = algorithm.round(device, cohort, key)
            return device, None, info

        def newest(row: Array, newer: Array) -> Array:
            return jnp.where(sums.across(before >= 0, row), newer[jnp.maximum(before, 0)], row)

        state, info = algorithm.round(join_tables(device, jax.tree.map(newest, tables, changed)), cohort, key)
        return *split_tables(state), info

    def run(*args: Any):
        one = partial(round, args[-1])
        return (jax.vmap(one, (0, 1, None, 0, 0, None, 0, None)) if batched else one)(*args[:-1])

    return run


def _one_or_row(key: Key) -> Key:
    """One typed key or a row of them."""
    key = typed(key)
    if key.ndim > 1:
        raise ValueError(f"key must be one random key or key[S], got keys of shape {list(key.shape)}: pass key[S]")
    return key


def _is_wide(leaf: np.ndarray) -> bool:
    """Whether the leaf's dtype changes on the way to the device."""
    return checks.narrowed(leaf.dtype) is not None


def _finish(running: tuple[_Staged, PyTree, Metrics], tables: PyTree, where: "_Where") -> None:
    """Waits for a round and writes the rows that it has changed into the tables."""
    staged, changed, info = running
    jax.block_until_ready(info)
    if tables is None:
        return
    for number, (table, rows) in enumerate(zip(tables, changed, strict=True)):
        to, of = where.written(number, staged.ids)
        for leaf, new in zip(jax.tree.leaves(table), jax.tree.leaves(rows), strict=True):
            leaf[to] = np.asarray(new)[of]


class _Where:
    """Where the rows of clients are in tables on the host, [N, ...] or [S, N, ...].

    Attributes:
      batched: whether there are several simulations.
    """

    def __init__(self, indices: list[PyTree], batched: bool) -> None:
        self.batched = batched
        self._indices = [np.asarray(index) if jax.tree.leaves(index) else None for index in indices]

    def _rows(self, number: int, ids: np.ndarray) -> np.ndarray:
        """int64[S, C]: the rows of clients [S, C] in a table, -1 in empty slots and for clients without one."""
        index = self._indices[number]
        if index is None:
            return ids
        found = index[np.arange(len(ids))[:, None], ids] if self.batched else index[ids]
        return np.where(ids >= 0, found, -1)

    def read(self, number: int, ids: np.ndarray) -> Any:
        """Indices for the rows of clients [S, C]; any row stands in where there is none."""
        rows = np.maximum(self._rows(number, ids), 0)
        return (np.arange(len(ids))[:, None], rows) if self.batched else rows[0]

    def written(self, number: int, ids: np.ndarray) -> tuple[Any, Any]:
        """Indices for the rows there are in a table, and for them in the rows of the cohort."""
        rows = self._rows(number, ids)
        simulation, slot = np.nonzero(rows >= 0)
        row = rows[simulation, slot]
        return ((simulation, row), (simulation, slot)) if self.batched else (row, slot)


def _has_host_tables(state: PyTree) -> bool:
    leaves = jax.tree.leaves(split_tables(state)[1])
    on_host = [isinstance(leaf, np.ndarray) for leaf in leaves]
    if any(on_host) and not all(on_host):
        raise ValueError(
            "some tables of per-client state are numpy arrays and some are not: keep all of them in host memory "
            "(init_on_host makes such a state) or none"
        )
    return any(on_host)


def _slots_in(ids: np.ndarray, before: np.ndarray) -> np.ndarray:
    """int64[S, C]: the slot in which each client was before, -1 if in none; ids and before are int64[S, C]."""
    found = np.full(ids.shape, -1, np.int64)
    for row, earlier, target in zip(ids, before, found, strict=True):
        order = np.argsort(earlier)
        at = order[np.minimum(np.searchsorted(earlier[order], row), len(order) - 1)]
        same = (earlier[at] == row) & (row >= 0)
        target[same] = at[same]
    return found


def _rounded_up(count: int) -> int:
    """The next number with four binary digits and zeros: at most an eighth more, and few different ones."""
    step = 1 << max(count.bit_length() - 4, 0)
    return -(-count // step) * step


def _aligned(shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
    """Zeros at an address that the processor's backend takes without a copy."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.zeros(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)
