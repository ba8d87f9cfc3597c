"""Many rounds as one compiled step."""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_core import checks, keys
from fedjax_core.algorithm import Algorithm, check_algorithm, check_rounds, check_state, first_state
from fedjax_core.population import Population, check_ids, check_population, repeated
from fedjax_core.samplers import Sampler, check_callable, check_length, check_sampler
from fedjax_core.types import Array, Key, Metrics, Params, PyTree


def continue_rounds(
    algorithm: Algorithm, sampler: Sampler, num_rounds: int
) -> Callable[[Any, Population, Key], tuple[Any, Metrics]]:
    """Returns a pure `run(state, population, key) -> (state, metrics)` for the next `num_rounds` rounds.

    Metrics are stacked over rounds, leaves [num_rounds, ...]. Both the cohort of round `state.round` and the clients'
    randomness are functions of (key, round) alone: give the same key to every part of a run, and one that stops
    anywhere and goes on from its state gives the numbers of a run that did not stop.

    Sizes are compared while tracing: a sampler or a method that is made for another number of clients than the
    population has is refused. What a sampler of your own draws is looked at before the first round of a call, for all
    its rounds: an invalid cohort raises ValueError. Under `jax.jit` no client is trained then, what is returned is NaN,
    and a call back to Python raises the error, which JAX passes on as a JaxRuntimeError; in a process of several
    devices, where others would wait for one that fails, it is a RuntimeWarning. `samplers.valid` spares all this.

    Raises:
      TypeError: if an argument is of another kind than it should be; the function that is returned, likewise.
      ValueError: if num_rounds is below 1. The function that is returned: if sizes do not match, the key is an array of
        keys, or a sampler draws a client twice or one that is not there.
    """
    check_algorithm(algorithm)
    check_callable(sampler)
    checks.positive_int("num_rounds", num_rounds, "run at least one round")

    def run(state: PyTree, population: Population, key: Key) -> tuple[PyTree, Metrics]:
        check_population(population, "use simulate_staged or continue_staged for it")
        check_state(state, "use simulate to begin from parameters")
        check_rounds(state.round, num_rounds)
        sample_key, train_key = keys.split(keys.one(key))
        draw = sampler
        bad: PyTree = None
        promised = check_sampler(sampler, population.num_clients, sample_key)
        check_length(sampler, state.round, num_rounds)
        if not promised:
            bad = _first_bad_cohort(sampler, sample_key, state.round, num_rounds, population.num_clients)
            if checks.is_concrete(bad[0]):
                _complain(population.num_clients, *bad)
            else:
                draw = lambda key, t: jnp.where(bad[0] < 0, sampler(key, t), -1)  # noqa: E731

        # The next cohort's ids are carried from round to round. XLA copies the expression of a value
        # into everything that reads it, and it would draw the cohort some ten times over: that took more than half of
        # a round of ten clients with ten parameters.
        def body(carry: PyTree, _: None) -> tuple[PyTree, Metrics]:
            state, ids = carry
            cohort = population.checked_cohort(ids, distinct=True)
            state, metrics = algorithm.round(state, cohort, keys.derive(train_key, state.round))
            return (state, draw(sample_key, state.round)), metrics

        (state, _), metrics = jax.lax.scan(body, (state, draw(sample_key, state.round)), length=num_rounds)
        if bad is not None and not checks.is_concrete(bad[0]):
            state, metrics = jax.tree.map(partial(_nan_if, bad[0] >= 0), (state, metrics))
            # At the end, when rounds without participants are over, and with what comes of them.
            bad = jax.lax.optimization_barrier((*bad, state.round))[:2]
            jax.debug.callback(partial(_report, population.num_clients), *bad)
        return state, metrics

    return run


def simulate(
    algorithm: Algorithm, sampler: Sampler, num_rounds: int
) -> Callable[[Params, Population, Key], tuple[Any, Metrics]]:
    """Returns a pure `run(params, population, key) -> (state, metrics)` of `num_rounds` rounds.

    `jax.jit(run)` is one compiled step; `jax.vmap(run, (None, None, 0))` runs several seeds at once, and a vmap of
    `lambda lr: simulate(fedavg(loss_fn, optax.sgd(lr)), ...)(params, population, key)` sweeps a hyper-parameter.
    The population is an argument, not a part of the closure, so that compiling never copies the data into the
    program. What is checked, and when, is said at `continue_rounds`.

    Rounds alone are run: what a method does beside them (`algorithm.events`, the exploration of FedLEx for instance) is
    done by `run_events`, between `algorithm.init` and `continue_rounds`, or after those.
    """
    run_rounds = continue_rounds(algorithm, sampler, num_rounds)

    def run(params: Params, population: Population, key: Key) -> tuple[Any, Metrics]:
        return run_rounds(first_state(algorithm, params, key), population, key)

    return run


def _first_bad_cohort(
    sampler: Sampler, key: Key, start: Array, num_rounds: int, num_clients: int
) -> tuple[Array, Array]:
    """Draws the cohorts of the next rounds; returns the first invalid one: (its round int32[] or -1, its ids [C])."""

    def look(worst: PyTree, t: Array) -> tuple[PyTree, None]:
        ids = jnp.asarray(sampler(key, t))
        wrong = (ids < -1) | (ids >= num_clients) | (repeated(ids) & (ids >= 0))
        found = jnp.any(wrong) & (worst[0] < 0)
        return jax.tree.map(lambda new, old: jnp.where(found, new, old), (t, ids), worst), None

    rounds = jnp.asarray(start, jnp.int32) + jnp.arange(num_rounds, dtype=jnp.int32)
    ids = jax.eval_shape(sampler, key, rounds[0])
    worst, _ = jax.lax.scan(look, (jnp.int32(-1), jnp.zeros(ids.shape, ids.dtype)), rounds)
    return worst


def _complain(num_clients: int, round: Array, ids: Array) -> None:
    """Raises ValueError if there is an invalid cohort."""
    if int(round) < 0:
        return
    try:
        check_ids(np.asarray(ids), num_clients)
    except ValueError as error:
        raise ValueError(f"in round {int(round)} the sampler's {error}") from None


def _report(num_clients: int, round: Array, ids: Array) -> None:
    """`_complain` from inside a compiled program: an error with one device, a warning with several."""
    try:
        _complain(num_clients, round, ids)
    except ValueError as error:
        if jax.device_count() == 1:
            raise
        warnings.warn(f"{error}; no client was trained, and the results are NaN", RuntimeWarning, stacklevel=2)


def _nan_if(bad: Array, leaf: Array) -> Array:
    is_float = jnp.issubdtype(leaf.dtype, jnp.floating)
    return jnp.where(bad, jnp.asarray(jnp.nan, leaf.dtype), leaf) if is_float else leaf
