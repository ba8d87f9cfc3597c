"""Many rounds as one compiled step."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fedjax_core import checks, keys
from fedjax_core.population import Population
from fedjax_core.samplers import Sampler
from fedjax_core.types import Algorithm, Key, Metrics, Params


def continue_rounds(
    algorithm: Algorithm, sampler: Sampler, num_rounds: int
) -> Callable[[Any, Population, Key], tuple[Any, Metrics]]:
    """Returns a pure `run(state, population, key) -> (state, metrics)` for the next `num_rounds` rounds.

    Metrics are stacked over rounds, leaves [num_rounds, ...]. Both the cohort of round `state.round` and the clients'
    randomness are functions of (key, round) alone: give the same key to every part of a run, and one that stops
    anywhere and goes on from its state gives the numbers of a run that did not stop.
    """
    checks.positive_int("num_rounds", num_rounds, "run at least one round")

    def run(state: Any, population: Population, key: Key) -> tuple[Any, Metrics]:
        sample_key, train_key = keys.split(key)

        # The next cohort's ids are carried from round to round. XLA copies the expression of a value
        # into everything that reads it, and it would draw the cohort some ten times over: that took more than half of
        # a round of ten clients with ten parameters.
        def body(carry: Any, _: None) -> tuple[Any, Metrics]:
            state, ids = carry
            state, metrics = algorithm.round(state, population.cohort(ids), keys.derive(train_key, state.round))
            return (state, sampler(sample_key, state.round)), metrics

        (state, _), metrics = jax.lax.scan(body, (state, sampler(sample_key, state.round)), length=num_rounds)
        return state, metrics

    return run


def simulate(
    algorithm: Algorithm, sampler: Sampler, num_rounds: int
) -> Callable[[Params, Population, Key], tuple[Any, Metrics]]:
    """Returns a pure `run(params, population, key) -> (state, metrics)` of `num_rounds` rounds.

    `jax.jit(run)` is one compiled step; `jax.vmap(run, (None, None, 0))` runs several seeds at once, and a vmap of
    `lambda lr: simulate(fedavg(loss_fn, optax.sgd(lr)), ...)(params, population, key)` sweeps a hyper-parameter.
    The population is an argument, not a part of the closure, so that compiling never copies the data into the
    program.
    """
    run_rounds = continue_rounds(algorithm, sampler, num_rounds)

    def run(params: Params, population: Population, key: Key) -> tuple[Any, Metrics]:
        params = jax.tree.map(jnp.asarray, params)
        return run_rounds(algorithm.init(params), population, key)

    return run
