"""How the rounds of a run are made: everything on the devices, or cohorts brought there from host memory."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_core import (
    Algorithm,
    HostPopulation,
    continue_rounds,
    continue_staged,
    evaluate,
    everywhere,
    init_on_host,
    join_tables,
    needed_memory,
    place,
    shardings,
    split_tables,
)
from pipelines.setup import EVAL_BATCH, Experiment, explored, initial_states, run_keys


class Chunk(NamedTuple):
    """Some rounds and an evaluation, compiled.

    Attributes:
      run: `run(state) -> (state, metrics, scores, whether the models are finite)`, for all seeds; it takes the state
        over.
      needed: bytes that the compiled program needs on one device, 0 if that is not known.
    """

    run: Callable[[Any], Any]
    needed: int


class Engine(NamedTuple):
    """How the rounds are run.

    Attributes:
      expected: shapes of the state, and where it lies if that is on several processes.
      start: `start() -> state`, before the first round.
      place: `place(restored state) -> state`, where the chunks want it.
      compile: `compile(number of rounds, state) -> Chunk`.
    """

    expected: Any
    start: Callable[[], Any]
    place: Callable[[Any], Any]
    compile: Callable[[int, Any], Chunk]


def engine(experiment: Experiment, algorithm: Algorithm) -> Engine:
    """The engine of the configuration."""
    return (_staged if experiment.config.staged else _in_memory)(experiment, algorithm)


def placement(experiment: Experiment) -> Callable[[Any], Any]:
    """Puts arrays where compiled functions want them: with a mesh, whole on every device."""
    mesh = experiment.mesh
    return (lambda tree: tree) if mesh is None else lambda tree: place(tree, everywhere(mesh))


def whole(experiment: Experiment) -> Any:
    """The `out_shardings` of compiled functions whose results are read: whole on every device of a mesh."""
    return None if experiment.mesh is None else everywhere(experiment.mesh)


def chunk(experiment: Experiment, algorithm: Algorithm, length: int) -> Callable[..., Any]:
    """`chunk(state, population, test, keys)`: what `Chunk.run` returns, as a pure function."""
    rounds = jax.vmap(continue_rounds(algorithm, experiment.sampler, length), (0, None, 0))
    score = _scoring(experiment, algorithm)

    def chunk(state: Any, population: Any, test: Any, keys: Any) -> Any:
        state, metrics = rounds(state, population, _round_keys(keys))
        return state, metrics, *score(state, test)

    return chunk


def _in_memory(experiment: Experiment, algorithm: Algorithm) -> Engine:
    """Everything on the devices; a chunk is one compiled call."""
    population, test, keys = placement(experiment)((experiment.population, experiment.test, experiment.keys))
    states = partial(initial_states, experiment, algorithm)
    shapes = jax.eval_shape(states, experiment.keys)
    mesh, read = experiment.mesh, whole(experiment)
    where = None if mesh is None else shardings(shapes, mesh, batch_axes=1)

    def start() -> Any:
        def first(keys: Any, population: Any) -> Any:
            return explored(algorithm, states(keys), population, keys)

        return jax.jit(first, out_shardings=where)(keys, population)

    def place_state(state: Any) -> Any:
        # A copy: the arrays that come from numpy are not XLA's to give away.
        return jax.tree.map(jnp.copy, state if where is None else place(state, where))

    def compile(length: int, state: Any) -> Chunk:
        # It takes the state over, so that there are never two of it.
        results = None if mesh is None else (where, read, read, read)
        jitted = jax.jit(chunk(experiment, algorithm, length), donate_argnums=0, out_shardings=results)
        compiled = jitted.lower(state, population, test, keys).compile()
        return Chunk(lambda state: compiled(state, population, test, keys), needed_memory(compiled))

    return Engine(_with_places(shapes, where), start, place_state, compile)


def _staged(experiment: Experiment, algorithm: Algorithm) -> Engine:
    """Examples and client state on the host; a chunk is a loop of compiled rounds, which compile with the first."""
    config, population = experiment.config, experiment.population
    assert isinstance(population, HostPopulation)
    test, keys = placement(experiment)((experiment.test, experiment.keys))
    keys_of_rounds = jax.jit(_round_keys)(keys)
    states = partial(initial_states, experiment, algorithm)
    shapes = jax.eval_shape(states, experiment.keys)
    mesh = experiment.mesh
    where = None if mesh is None else shardings(split_tables(shapes)[0], mesh, batch_axes=1)

    def put(device: Any) -> Any:
        return device if where is None else place(device, where)

    def start() -> Any:
        device, tables = split_tables(init_on_host(states, keys, num_clients=population.num_clients, axis=1))
        return join_tables(put(device), tables)

    def place_state(state: Any) -> Any:
        device, tables = split_tables(state)
        return join_tables(put(device), jax.tree.map(np.array, tables))  # of our own: they are changed in place

    def compile(length: int, state: Any) -> Chunk:
        rounds = continue_staged(algorithm, experiment.sampler, length, horizon=config.rounds, mesh=mesh)
        score = jax.jit(_scoring(experiment, algorithm), out_shardings=whole(experiment))

        def run(state: Any) -> Any:
            state, metrics = rounds(state, population, keys_of_rounds)
            return state, metrics, *score(split_tables(state)[0], test)

        return Chunk(run, 0)

    return Engine(shapes, start, place_state, compile)


def _with_places(shapes: Any, where: Any) -> Any:
    """Shapes of a state, and with several processes where it lies, so that each restores its own part alone."""
    if where is None or jax.process_count() == 1:
        return shapes
    return jax.tree.map(lambda s, to: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=to), shapes, where)


def _round_keys(keys: Any) -> Any:
    """The keys of the rounds, of every seed."""
    return jax.vmap(lambda key: run_keys(key)[1])(keys)


def _scoring(experiment: Experiment, algorithm: Algorithm) -> Callable[[Any, Any], tuple[Any, Any]]:
    """`score(state, test) -> (scores, whether the models are finite)`, for all seeds."""
    score = jax.vmap(partial(evaluate, experiment.score_fn, batch_size=EVAL_BATCH), (0, None))

    def scoring(state: Any, test: Any) -> tuple[Any, Any]:
        params = jax.vmap(algorithm.params)(state)
        finite = [jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(params) if jnp.issubdtype(x.dtype, jnp.inexact)]
        return score(params, test), jnp.all(jnp.stack([jnp.bool_(True), *finite]))

    return scoring
