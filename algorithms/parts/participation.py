"""Who takes part how often: known probabilities of taking part, and intervals between rounds as estimates of them."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import optax

import fedjax_core as fc


def weighted(done: fc.Descent, x: fc.Params):
    """For `fedjax_core.local_descent`: uploads w_i (y_i - x), where the client's input is the factor w_i, float[]."""
    return fc.scale(done.own, optax.tree.sub(done.params, x)), ()


class Intervals(NamedTuple):
    """A client's participation up to its last round, int32[] each: intervals that have ended, and rounds in them."""

    ended: fc.Array
    rounds: fc.Array


def interval_table(num_clients: int) -> fc.ClientTable:
    """No client has taken part yet."""
    return fc.client_table(num_clients, Intervals(jnp.int32(0), jnp.int32(0)))


def mean_interval(intervals: Intervals, round: fc.Counter, cutoff: int) -> tuple[fc.Array, Intervals]:
    """The mean length of the intervals that ended before a round, and the intervals of a client that takes part in it.

    Args:
      intervals: int32[C] each.
      round: int32[], rounds done.
      cutoff: longest interval.

    Returns:
      float[C], 1 where no interval has ended; and the clients' new intervals.
    """
    away = (round - intervals.rounds) // cutoff  # intervals that the cutoff has ended since
    ended, rounds = intervals.ended + away, intervals.rounds + away * cutoff
    mean = jnp.where(ended > 0, rounds, 1).astype(jnp.result_type(float)) / jnp.maximum(ended, 1)
    return mean, Intervals(ended + 1, jnp.full_like(rounds, round + 1))


def check_probabilities(probabilities: fc.ArrayLike, num_clients: int | None = None, *others: str) -> None:
    """Checks probabilities of taking part: "uniform", one number or float[num_clients] (of tracers the shape).

    `others` are further words that the method knows.

    Raises:
      ValueError: for another string, a probability outside (0, 1], or another shape.
    """
    if isinstance(probabilities, str):
        fc.checks.one_of("probabilities", probabilities, ("uniform", *others))
        return
    shape = np.shape(probabilities)
    if shape == ():
        fc.checks.scalar("probabilities", probabilities, low=0, high=1, low_open=True)
        return
    if len(shape) != 1 or num_clients not in (None, shape[0]):
        raise ValueError(
            f"probabilities must be one number or float[{num_clients or 'num_clients'}], got shape {list(shape)}: pass "
            "each client's probability of taking part"
        )
    if fc.checks.is_concrete(probabilities):
        rates = np.asarray(probabilities)
        bad = rates[~((rates >= jnp.finfo(jnp.result_type(float)).tiny) & (rates <= 1))]
        if bad.size:
            raise ValueError(
                f"probabilities must lie in (0, 1], got {bad[0]}: leave clients that never take part out of the "
                "population"
            )


def inverse_probabilities(probabilities: fc.ArrayLike, cohort: fc.Cohort) -> fc.Array:
    """float[C], 1 / prob_i of each slot's client; "uniform" is |S| / N for all of them."""
    if isinstance(probabilities, str):
        rates = jnp.maximum(cohort.num_participants, 1).astype(jnp.result_type(float)) / cohort.num_clients
    else:
        rates = jnp.asarray(probabilities, jnp.result_type(float))
        if rates.ndim:
            cohort.check_per_client("probabilities", rates)
    return 1 / jnp.broadcast_to(rates if rates.ndim == 0 else rates[jnp.maximum(cohort.ids, 0)], cohort.ids.shape)
