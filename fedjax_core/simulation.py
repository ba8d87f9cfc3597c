"""Many rounds as one compiled step."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fedjax_core import checks
from fedjax_core.population import Population
from fedjax_core.samplers import Sampler
from fedjax_core.types import Algorithm, Key, Metrics, Params


def step(algorithm: Algorithm, sampler: Sampler, population: Population, state: Any, key: Key) -> tuple[Any, Metrics]:
    """The round that comes next: samples the cohort of round `state.round` and runs it.

    Both the cohort and the clients' randomness are functions of (key, round) alone, so a run that stops anywhere
    and goes on from its state gives the numbers of a run that did not stop.
    """
    sample_key, train_key = jax.random.split(key)
    cohort = population.cohort(sampler(sample_key, state.round))
    return algorithm.round(state, cohort, jax.random.fold_in(train_key, state.round))


def continue_rounds(
    algorithm: Algorithm, sampler: Sampler, num_rounds: int
) -> Callable[[Any, Population, Key], tuple[Any, Metrics]]:
    """Returns a pure `run(state, population, key) -> (state, metrics)` for the next `num_rounds` rounds.

    Metrics are stacked over rounds, leaves [num_rounds, ...]. Give the same key to every part of a run.
    """
    checks.positive_int("num_rounds", num_rounds, "run at least one round")

    def run(state: Any, population: Population, key: Key) -> tuple[Any, Metrics]:
        def body(state: Any, _: None) -> tuple[Any, Metrics]:
            return step(algorithm, sampler, population, state, key)

        return jax.lax.scan(body, state, length=num_rounds)

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
