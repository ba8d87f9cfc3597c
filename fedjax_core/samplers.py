"""Who takes part: pure functions `(key, round) -> ids`, ids int32[C] with -1 for an empty slot.

`key` is the same in every round of a run and `round` counts from 0, so a cohort can be recomputed for any round,
in any order, and a process with memory (Markov) needs no state.

Any function like this is a sampler. Those of this module say for how many clients they are made and promise that no
client fills two slots (`ValidSampler`); simulations compare the number with the population's. What a function of your
own draws is looked at before the first round, all rounds of it; `valid(function, num_clients)` makes the same promise
for it, and nothing is drawn twice.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_core import checks, keys, shuffle
from fedjax_core.types import Array, ArrayLike, Key

Sampler = Callable[[Key, Array], Array]


@dataclass(frozen=True, eq=False)
class ValidSampler:
    """A sampler that promises its ids to be different clients of a population of `num_clients`, or -1.

    Attributes:
      sample: `sample(key, round) -> ids`, int32[C].
      num_clients: size of the population that it draws from; None for any of at least `least`.
      least: the smallest population that has all its clients.
      num_rounds: rounds that it has cohorts for, from 0; None for any number.
    """

    sample: Sampler
    num_clients: int | None
    least: int = 1
    num_rounds: int | None = None

    def __call__(self, key: Key, round: Array) -> Array:
        """The clients of a round, int32[C]."""
        return self.sample(keys.one(key), round)

    def check(self, num_clients: int) -> None:
        """Raises ValueError if a population has not the number of clients that the sampler was made for."""
        if self.num_clients is not None and self.num_clients != num_clients:
            raise ValueError(
                f"the sampler was made for {self.num_clients} clients, but the population has {num_clients}: make it "
                f"with num_clients={num_clients} (population.num_clients)"
            )
        if self.least > num_clients:
            raise ValueError(
                f"the sampler draws client {self.least - 1}, but the population has {num_clients} clients, 0 to "
                f"{num_clients - 1}: draw those"
            )


def valid(sampler: Sampler, num_clients: int) -> ValidSampler:
    """Your own sampler with the promise that its ids are different clients 0 to num_clients - 1, and -1 elsewhere.

    A simulation then does not look at what it draws. The promise has to hold: a client that is drawn twice would be
    trained and counted twice (a staged run always looks, and refuses it).

    Args:
      sampler: `sampler(key, round) -> ids`, int32[C].
      num_clients: size of the population.
    """
    checks.function("sampler", sampler, "a function (key, round) -> ids")
    return ValidSampler(sampler, checks.positive_int("num_clients", num_clients, "a population has a client"))


def check_callable(sampler: object) -> None:
    """Raises TypeError unless a sampler is a function that can be called with (key, round)."""
    if inspect.isfunction(sampler) and sampler.__module__ == __name__ and "<locals>" not in sampler.__qualname__:
        raise TypeError(
            f"sampler is the function samplers.{sampler.__name__} itself: call it first, "
            f"samplers.{sampler.__name__}{inspect.signature(sampler)}".split(" ->")[0]
        )
    if not callable(sampler):
        got = checks.misplaced(sampler) or type(sampler).__name__
        raise TypeError(
            f"sampler must be a function (key, round) -> ids, got {got}: pass for example "
            "samplers.uniform(num_clients, cohort_size), or samplers.schedule(cohorts) for ids known beforehand"
        )
    if not isinstance(sampler, ValidSampler):
        checks.takes("sampler", sampler, ("key", "round"), example="a function (key, round) -> ids, int32[C]")


def check_length(sampler: Sampler, start: ArrayLike, num_rounds: int) -> None:
    """Raises ValueError if a recorded schedule ends before a run of `num_rounds` rounds from round `start` does."""
    promise = inspect.unwrap(sampler) if callable(sampler) else sampler
    if not isinstance(promise, ValidSampler) or promise.num_rounds is None:
        return
    seen = checks.is_concrete(start) and getattr(start, "is_fully_addressable", True)
    last = (int(np.asarray(start).max()) if seen else 0) + num_rounds
    if last > promise.num_rounds:
        raise ValueError(
            f"the schedule has cohorts for {promise.num_rounds} rounds, but the run goes on to round {last - 1}: give "
            "one for every round (rows of -1 without participants), or schedule(cohorts, repeat=True) to begin it again"
        )


def check_sampler(sampler: Sampler, num_clients: int, key: Key) -> bool:
    """Checks a sampler for a population, while tracing; returns whether it promises to draw valid ids.

    Raises:
      TypeError: if it is no function (key, round) -> ids.
      ValueError: if it is made for another population, or its ids are not int[C] with C of at least 1.
    """
    check_callable(sampler)
    promise = inspect.unwrap(sampler)  # behind jax.jit, say
    if isinstance(promise, ValidSampler):
        promise.check(num_clients)
    try:
        ids = jax.eval_shape(sampler, key, jax.ShapeDtypeStruct((), jnp.int32))
    except (
        jax.errors.ConcretizationTypeError,
        jax.errors.TracerArrayConversionError,
        jax.errors.TracerIntegerConversionError,
    ) as error:
        raise TypeError(
            "the sampler looks at the key or the number of the round, which are not known while rounds are compiled: "
            "draw with jax.random and index jax arrays, or record the ids beforehand in samplers.schedule(cohorts)"
        ) from error
    if (
        not hasattr(ids, "shape")
        or len(ids.shape) != 1
        or ids.shape[0] == 0
        or not jnp.issubdtype(ids.dtype, jnp.integer)
    ):
        got = f"{ids.dtype}{list(ids.shape)}" if hasattr(ids, "shape") else type(ids).__name__
        raise ValueError(
            f"the sampler must return client numbers int32[C] with at least one slot, but returned {got}: -1 marks an "
            "empty slot"
        )
    return isinstance(promise, ValidSampler)


def uniform(num_clients: int, cohort_size: int) -> ValidSampler:
    """`cohort_size` different clients, every cohort equally likely; the work does not grow with num_clients."""
    _check_sizes(num_clients, cohort_size)

    def sample(key: Key, round: Array) -> Array:
        seed = shuffle.seed(keys.derive(key, round))
        return shuffle.permute(seed, jnp.arange(cohort_size, dtype=jnp.int32), jnp.int32(num_clients))

    return ValidSampler(sample, num_clients)


def full(num_clients: int) -> ValidSampler:
    """Every client in every round."""
    checks.positive_int("num_clients", num_clients, "a population has at least one client")
    return ValidSampler(lambda key, round: jnp.arange(num_clients, dtype=jnp.int32), num_clients)


def weighted(weights: ArrayLike, cohort_size: int) -> ValidSampler:
    """`cohort_size` different clients, drawn one by one with probability proportional to weights [num_clients]."""
    weights = _concrete("weights", weights)
    _check_sizes(weights.shape[0], cohort_size)
    if (weights < 0).any() or not np.isfinite(weights).all():
        raise ValueError(
            f"weights must be finite and at least 0, got {weights.min()}: pass for example the clients' sizes"
        )
    if (weights > 0).sum() < cohort_size:
        raise ValueError(
            f"cohort_size={cohort_size} but only {(weights > 0).sum()} clients have a positive weight: "
            "lower cohort_size"
        )
    log_weights = np.log(np.where(weights > 0, weights, 1)) + np.where(weights > 0, 0.0, -np.inf)

    def sample(key: Key, round: Array) -> Array:
        noise = jax.random.gumbel(keys.derive(key, round), weights.shape)
        return jax.lax.top_k(jnp.asarray(log_weights) + noise, cohort_size)[1].astype(jnp.int32)

    return ValidSampler(sample, weights.shape[0])


def bernoulli(probabilities: ArrayLike, num_clients: int | None = None) -> ValidSampler:
    """Every client on its own: client i takes part with its probability, independently of all else.

    Args:
      probabilities: float[num_clients], or one number for `num_clients` clients.
      num_clients: needed with one number.

    Returns:
      A sampler with num_clients slots, the absent ones empty.
    """
    rates = _rates("probabilities", probabilities, num_clients)

    def sample(key: Key, round: Array) -> Array:
        draw = jax.random.uniform(keys.derive(key, round), rates.shape)
        return _present(draw < jnp.asarray(rates, draw.dtype))

    return ValidSampler(sample, len(rates))


def cyclic(num_clients: int, cohort_size: int) -> ValidSampler:
    """Clients in turn: a random order fixed by the key, cut into cohorts; the last may wrap to the front."""
    _check_sizes(num_clients, cohort_size)
    # round * cohort_size mod num_clients, bit by bit of the round: the product itself is more than 32 bits hold.
    of_bits = np.array([(cohort_size << bit) % num_clients for bit in range(31)], np.uint32)

    def sample(key: Key, round: Array) -> Array:
        size, first = jnp.uint32(num_clients), jnp.uint32(0)
        for bit, offset in enumerate(of_bits):
            first = (first + jnp.where((round >> bit) & 1, offset, np.uint32(0))) % size
        position = (first + jnp.arange(cohort_size, dtype=jnp.uint32)) % size
        return shuffle.permute(shuffle.seed(key), position.astype(jnp.int32), jnp.int32(num_clients))

    return ValidSampler(sample, num_clients)


def periodic(probabilities: ArrayLike, period: int, num_clients: int | None = None) -> ValidSampler:
    """Client i takes part in the first round(p_i period) rounds of each period, from a random phase of its own.

    The cyclic pattern of Wang and Ji (FedAU, 2024). Arguments as for `bernoulli`; num_clients slots.
    """
    rates = _rates("probabilities", probabilities, num_clients)
    checks.positive_int("period", period, "a period is a number of rounds")
    active = np.round(rates * period).astype(np.int32)

    def sample(key: Key, round: Array) -> Array:
        phase = jax.random.randint(key, rates.shape, 0, period)
        # Of 32 bits without a sign, which hold the sum of two numbers below the period.
        since = (jnp.uint32(round % period) + phase.astype(jnp.uint32)) % jnp.uint32(period)
        return _present(since < active.astype(np.uint32))

    return ValidSampler(sample, len(rates))


def markov(turn_on: ArrayLike, turn_off: ArrayLike, num_clients: int | None = None) -> ValidSampler:
    """Each client is a two-state Markov chain, on (takes part) or off, started from its stationary distribution.

    Args:
      turn_on: probability of going from off to on in a round; float[num_clients] or one number.
      turn_off: probability of going from on to off, likewise. The long-run share of rounds spent on is
        turn_on / (turn_on + turn_off).
      num_clients: needed if both are numbers.

    Returns:
      A sampler with num_clients slots. The state of round t is found without simulating rounds 0..t-1: each
      round's draw is a map of the two states to themselves, and the state after the latest constant map does not
      depend on the past, so the search goes back only until every client has met one.
    """
    if num_clients is None:
        lengths = {np.shape(v)[0] for v in (turn_on, turn_off) if np.ndim(v) == 1}
        num_clients = lengths.pop() if len(lengths) == 1 else None
    on, off = _rates("turn_on", turn_on, num_clients), _rates("turn_off", turn_off, num_clients)
    if (on + off <= 0).any():
        raise ValueError(
            f"turn_on and turn_off are both 0 for client {int(np.argmax(on + off <= 0))}: it would never change, so it "
            "has no long-run share; make one of them positive"
        )

    def sample(key: Key, round: Array) -> Array:
        rate_on, rate_off = jnp.asarray(on, jnp.float32), jnp.asarray(off, jnp.float32)

        def search(state: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
            t, known, value, flips = state
            draw = jax.random.uniform(keys.derive(key, t), on.shape, jnp.float32)
            from_off, from_on = draw < rate_on, draw < 1 - rate_off
            constant, swap = from_off == from_on, from_off & ~from_on
            value = jnp.where(~known & constant, from_off ^ flips, value)
            flips = jnp.where(~known & swap, ~flips, flips)
            return t - 1, known | constant, value, flips

        none = jnp.zeros(on.shape, bool)
        start = (jnp.asarray(round, jnp.int32), none, none, none)
        _, known, value, flips = jax.lax.while_loop(lambda s: (s[0] > 0) & ~jnp.all(s[1]), search, start)
        first = jax.random.uniform(keys.derive(key, 0), on.shape, jnp.float32) < rate_on / (rate_on + rate_off)
        return _present(jnp.where(known, value, first ^ flips))

    return ValidSampler(sample, len(on))


def schedule(cohorts: ArrayLike, num_clients: int | None = None, *, repeat: bool = False) -> ValidSampler:
    """A recorded schedule: row t of `cohorts` in round t.

    A run of more rounds than there are rows is refused, unless the schedule repeats; under `jax.jit` only as far as the
    round that it begins with is known, and later rounds have no participants.

    Args:
      cohorts: int[rounds, C], client numbers, -1 for an empty slot.
      num_clients: size of the population; any that has these clients unless given.
      repeat: begin again after the last row.
    """
    if not isinstance(repeat, bool):
        raise TypeError(f"repeat must be True or False, got {repeat!r:.60}: say whether the schedule begins again")
    if num_clients is not None:
        checks.positive_int("num_clients", num_clients, "a population has at least one client")
    try:
        array = np.asarray(cohorts)
    except ValueError:  # rows of unequal length
        array = np.empty(0, object)
    if array.ndim != 2 or not np.issubdtype(array.dtype, np.integer) or array.size == 0:
        raise ValueError(
            f"cohorts must be an integer array [rounds, slots], got {array.dtype}{list(array.shape)}: pad "
            "short cohorts with -1"
        )
    highest = checks.LARGEST_INT - 1 if num_clients is None else num_clients - 1
    outside = array[(array < -1) | (array > highest)]
    if outside.size:
        raise ValueError(
            f"cohorts holds {outside[0]}, but clients are numbered 0 to {highest}: use those, -1 for an empty slot"
        )
    for t, row in enumerate(array):
        present, counts = np.unique(row[row >= 0], return_counts=True)
        if (counts > 1).any():
            raise ValueError(
                f"cohorts has client {present[counts > 1][0]} twice in round {t}: each client may appear once a round"
            )
    rows = array.astype(np.int32)

    def sample(key: Key, round: Array) -> Array:
        if repeat:
            return jnp.asarray(rows)[round % len(rows)]
        row = jnp.asarray(rows)[jnp.minimum(round, len(rows) - 1)]
        return jnp.where(round < len(rows), row, -1)

    return ValidSampler(sample, num_clients, 1 + int(rows.max()), None if repeat else len(rows))


class Deliveries(NamedTuple):
    """Who delivers when; R rounds are R steps of the server.

    Attributes:
      cohorts: int32[R, C], the clients that deliver at each step, -1 for empty slots; for `schedule`.
      ticks: int64[R], when the step takes place.
      shares: float[num_clients], share of the steps at which each client delivers.
    """

    cohorts: np.ndarray
    ticks: np.ndarray
    shares: np.ndarray


def deliveries(
    times: ArrayLike, num_rounds: int, *, buffer: int | None = None, interval: int | None = None
) -> Deliveries:
    """Clients that each take a time of their own and start again when their work has been taken in.

    The server acts when `buffer` clients have finished (1: asynchronous, one at a time; all of them: synchronous), and
    those who are early wait; or every `interval` ticks, with whoever has finished, perhaps no client. Of clients that
    finish together the lowest number is first.

    Args:
      times: integers [num_clients], ticks that each client's work takes (integers, so that ties are ties).
      num_rounds: steps of the server, R.
      buffer: clients per step, or None with an interval.
      interval: ticks between steps, or None with a buffer.
    """
    times = np.asarray(times)
    if (
        times.ndim != 1
        or not np.issubdtype(times.dtype, np.integer)
        or times.size == 0
        or times.min() < 1
        or times.max() > checks.LARGEST_INT
    ):
        raise ValueError(
            f"times must be integers from 1 to {checks.LARGEST_INT}, one per client, got {times.dtype}"
            f"{list(times.shape)} {times.reshape(-1)[:5].tolist()}: count in ticks small enough for whole numbers"
        )
    if (buffer is None) == (interval is None):
        raise ValueError(
            f"buffer={buffer} and interval={interval}: the server waits for a number of clients or for a time, give one"
        )
    checks.positive_int("num_rounds", num_rounds, "at least one step of the server")
    if buffer is not None:
        _check_sizes(times.size, buffer)
    else:
        checks.positive_int("interval", interval, "a number of ticks")
    done, tick = times.astype(np.int64), 0
    cohorts, ticks = np.full((num_rounds, buffer or times.size), -1, np.int32), np.zeros(num_rounds, np.int64)
    for t in range(num_rounds):
        if interval is None:
            ready = np.argsort(done, kind="stable")[:buffer]
            tick = int(done[ready[-1]])
        else:
            tick += interval
            ready = np.flatnonzero(done <= tick)
        cohorts[t, : len(ready)], ticks[t] = ready, tick
        done[ready] = tick + times[ready]
    shares = np.bincount(cohorts[cohorts >= 0], minlength=times.size) / num_rounds
    return Deliveries(cohorts, ticks, shares)


def _present(mask: Array) -> Array:
    return jnp.where(mask, jnp.arange(mask.shape[0], dtype=jnp.int32), -1)


def _concrete(name: str, values: ArrayLike) -> np.ndarray:
    try:
        array = np.asarray(values, np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be float[num_clients], got {values!r:.60}: pass one number per client") from None
    if array.ndim != 1 or array.size == 0:
        raise ValueError(
            f"{name} must be a 1-d array with one entry per client, got shape {list(array.shape)}: "
            "pass float[num_clients]"
        )
    return array


def _rates(name: str, values: ArrayLike, num_clients: int | None) -> np.ndarray:
    if np.ndim(values) == 0:
        if num_clients is None:
            raise ValueError(f"{name}={values!r} is one number, so num_clients must say for how many clients")
        checks.positive_int("num_clients", num_clients, "a population has at least one client")
        values = np.full(num_clients, values)
    rates = _concrete(name, values)
    if num_clients is not None and rates.shape[0] != num_clients:
        raise ValueError(f"{name} has {rates.shape[0]} entries but num_clients={num_clients}: pass one per client")
    if not ((rates >= 0) & (rates <= 1)).all():
        bad = rates[~((rates >= 0) & (rates <= 1))][0]
        raise ValueError(f"{name} must lie in [0, 1], got {bad}: they are probabilities per round")
    return rates


def _check_sizes(num_clients: int, cohort_size: int) -> None:
    checks.positive_int("num_clients", num_clients, "a population has at least one client")
    checks.positive_int("cohort_size", cohort_size, "a cohort has at least one slot")
    if cohort_size > num_clients:
        raise ValueError(
            f"cohort_size={cohort_size} is larger than the population of {num_clients} clients: lower "
            f"cohort_size to at most {num_clients}"
        )
