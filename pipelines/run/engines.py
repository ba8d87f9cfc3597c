"""How the rounds of a run are made: everything on the devices, or cohorts brought there from host memory."""

from collections.abc import Callable, Mapping
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
    init_on_host,
    join_tables,
    needed_memory,
    place,
    replicated,
    shardings,
    split_tables,
)
from fedjax_core.types import Key, PyTree
from pipelines.experiment import views
from pipelines.experiment.setup import EVAL_BATCH, Experiment, begun, ended, initial_states, run_keys
from pipelines.results import early
from pipelines.results.history import of_view


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
      finish: `finish(state of the method) -> state` after what the method does after its last round; the argument
        stays as it is.
    """

    expected: PyTree
    start: Callable[[], Any]
    place: Callable[[Any], Any]
    compile: Callable[[int, Any], Chunk]
    finish: Callable[[Any], Any]


def engine(experiment: Experiment, algorithm: Algorithm) -> Engine:
    """The engine of the configuration, for a method."""
    return (_staged if experiment.config.machine.staged else _in_memory)(experiment, algorithm)


def placement(experiment: Experiment) -> Callable[[Any], Any]:
    """Puts arrays where compiled functions want them: with a mesh, whole on every device."""
    mesh = experiment.mesh
    return (lambda tree: tree) if mesh is None else lambda tree: place(tree, replicated(mesh))


def replicated_results(experiment: Experiment) -> Any:
    """The `out_shardings` of compiled functions whose results are read: whole on every device of a mesh."""
    return None if experiment.mesh is None else replicated(experiment.mesh)


def chunk(experiment: Experiment, algorithm: Algorithm, length: int) -> Callable[..., Any]:
    """`chunk(state, population, test, keys)`: what `Chunk.run` returns, as a pure function; test: `tests`."""
    rounds = jax.vmap(continue_rounds(algorithm, experiment.sampler, length), (0, None, 0))
    score = _scoring(experiment, algorithm)

    def chunk(before: PyTree, population: Any, test: Any, keys: Key):
        before, models = early.split(before)
        state, metrics = rounds(before, population, _round_keys(keys))
        models, scores, is_finite = score(models, state, test)
        return early.joined(state, models), metrics, scores, is_finite

    return chunk


def tests(experiment: Experiment) -> Any:
    """What models are scored on: the test examples, or (those, the validation examples) in a run that validates."""
    if not experiment.config.evaluation.validates:
        return experiment.test
    held = experiment.federation.host_population("validation")
    rows = held.rows_of(np.arange(held.num_clients))
    return experiment.test, {name: jnp.asarray(leaf[rows]) for name, leaf in held.examples.items()}


def _in_memory(experiment: Experiment, algorithm: Algorithm) -> Engine:
    """Everything on the devices; a chunk is one compiled call."""
    config = experiment.config
    population, test, keys = placement(experiment)((experiment.population, tests(experiment), experiment.keys))
    states = partial(initial_states, experiment, algorithm)
    shapes = jax.eval_shape(lambda keys: early.begin(config, algorithm, states(keys)), experiment.keys)
    mesh, read = experiment.mesh, replicated_results(experiment)
    where = None if mesh is None else shardings(shapes, mesh, batch_axes=1)

    def start():
        def first(keys: Key, population: Any):
            return early.begin(config, algorithm, begun(algorithm, states(keys), population, keys))

        return jax.jit(first, out_shardings=where)(keys, population)

    def finish(state: PyTree):
        of_states = None if where is None else early.split(where)[0]
        return jax.jit(partial(ended, algorithm), out_shardings=of_states)(state, population, keys)

    def place_state(state: PyTree):
        # A copy: the arrays that come from numpy are not XLA's to give away.
        return jax.tree.map(jnp.copy, state if where is None else place(state, where))

    def compile(length: int, state: PyTree) -> Chunk:
        # It takes the state over, so that there are never two of it.
        results = None if mesh is None else (where, read, read, read)
        jitted = jax.jit(chunk(experiment, algorithm, length), donate_argnums=0, out_shardings=results)
        compiled = jitted.lower(state, population, test, keys).compile()
        return Chunk(lambda state: compiled(state, population, test, keys), needed_memory(compiled))

    return Engine(_with_places(shapes, where), start, place_state, compile, finish)


def _staged(experiment: Experiment, algorithm: Algorithm) -> Engine:
    """Examples and client state on the host; a chunk is a loop of compiled rounds, which compile with the first."""
    config, population = experiment.config, experiment.population
    assert isinstance(population, HostPopulation)
    test, keys = placement(experiment)((tests(experiment), experiment.keys))
    keys_of_rounds = jax.jit(_round_keys)(keys)
    states = partial(initial_states, experiment, algorithm)
    shapes = jax.eval_shape(lambda keys: early.begin(config, algorithm, states(keys)), experiment.keys)
    mesh = experiment.mesh
    where = None if mesh is None else shardings(split_tables(early.split(shapes)[0])[0], mesh, batch_axes=1)

    def put(device: Any):
        return device if where is None else place(device, where)

    def start():
        device, tables = split_tables(init_on_host(states, keys, num_clients=population.num_clients, axis=1))
        _, models = early.split(early.begin(config, algorithm, device))
        return early.joined(join_tables(put(device), tables), placement(experiment)(models))

    def place_state(restored: PyTree):
        state, models = early.split(restored)
        device, tables = split_tables(state)
        placed = join_tables(put(device), jax.tree.map(np.array, tables))  # of our own: they are changed in place
        return early.joined(placed, placement(experiment)(models))

    def compile(length: int, state: PyTree) -> Chunk:
        rounds = continue_staged(algorithm, experiment.sampler, length, horizon=config.rounds, mesh=mesh)
        score = jax.jit(_scoring(experiment, algorithm), out_shardings=replicated_results(experiment))

        def run(before: PyTree):
            before, models = early.split(before)
            state, metrics = rounds(before, population, keys_of_rounds)
            models, scores, is_finite = score(models, split_tables(state)[0], test)
            return early.joined(state, models), metrics, scores, is_finite

        return Chunk(run, 0)

    # Of a method that asks all clients after the last round nothing is staged (`setup.prepare`).
    return Engine(shapes, start, place_state, compile, lambda state: state)


def _with_places(shapes: PyTree, where: Any) -> Any:
    """Shapes of a state, and with several processes where it lies, so that each restores its own part alone."""
    if where is None or jax.process_count() == 1:
        return shapes
    return jax.tree.map(lambda s, to: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=to), shapes, where)


def _round_keys(keys: Key) -> Any:
    """The keys of the rounds, of every seed."""
    return jax.vmap(lambda key: run_keys(key)[1])(keys)


def _scoring(experiment: Experiment, algorithm: Algorithm) -> Callable[[Any, Any, Any], tuple[Any, Any, Any]]:
    """`score(remembered, state, tests) -> (remembered, scores, whether the models are finite)`, for all seeds.

    Of the views of one model; those in which clients differ are `pipelines.run.client_scores`, and where one of them is
    the main view nothing is decided here. What is remembered is None in a run that does not validate. The models of a
    seed that has stopped may be anything.
    """
    config = experiment.config
    chosen = views.evaluated(config, algorithm)
    on_test = jax.vmap(partial(evaluate, experiment.score_fn, batch_size=EVAL_BATCH), (0, None))
    on_validation = jax.vmap(partial(evaluate, experiment.metric_fn, batch_size=EVAL_BATCH), (0, None))

    def scoring(models: early.Models | None, state: PyTree, test: Any) -> tuple[Any, Any, Any]:
        params = jax.vmap(algorithm.params)(state)
        leaves = [x for x in jax.tree.leaves(params) if jnp.issubdtype(x.dtype, jnp.inexact)]
        finite = [jnp.all(jnp.isfinite(x), axis=tuple(range(1, x.ndim))) for x in leaves]
        sound = jnp.all(jnp.stack([jnp.ones(config.seeds, bool), *finite]), axis=0)
        examples, held_back = (test, None) if models is None else test
        model_of = _models(algorithm, chosen, state)
        scores = one_model_scores(on_test, model_of, examples)
        if models is None:
            return None, scores, jnp.all(sound)
        if chosen.main in model_of:
            held = on_validation(model_of[chosen.main], held_back)
            scores |= {f"validated/{metric}": value for metric, value in held.items()}
            models = early.updated(config, models, early.of_state(config, algorithm, state), held)
        return models, scores, jnp.all(sound | models.stopped)

    return scoring


def _models(algorithm: Algorithm, chosen: views.Evaluated, state: PyTree) -> dict[str, Any]:
    """The models [S, ...] of the views of one model."""
    return {
        view: jax.vmap(partial(views.one_model, algorithm, view))(state)
        for view in chosen.of_one_model(algorithm, state)
    }


def one_model_scores(on_test: Callable[..., Any], model_of: Mapping[str, Any], examples: Any) -> dict[str, Any]:
    """The scores of views of one model, by their names in a history."""
    return {
        of_view("test", view, metric): value
        for view, params in model_of.items()
        for metric, value in on_test(params, examples).items()
    }


def final_scorer(experiment: Experiment, algorithm: Algorithm) -> Callable[[Any], dict[str, Any]]:
    """`score(state) -> scores` of the views of one model on the test examples, as at every evaluation."""
    chosen = views.evaluated(experiment.config, algorithm)
    on_test = jax.vmap(partial(evaluate, experiment.score_fn, batch_size=EVAL_BATCH), (0, None))

    def score(state: PyTree, examples: Any) -> dict[str, Any]:
        model_of = _models(algorithm, chosen, state)
        return one_model_scores(on_test, model_of, examples)

    jitted = jax.jit(score, out_shardings=replicated_results(experiment))
    return lambda state: jitted(state, placement(experiment)(experiment.test))
