"""Clocks: how long a round takes, and who is too late for it."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

import fedjax_core as fc
from fedjax_core.messages import Admission, Part


class ClockState(NamedTuple):
    """Simulated time since the first round.

    Attributes:
      elapsed: seconds, a sum that many short rounds do not spoil.
    """

    elapsed: fc.sums.Running


class ClockInfo(NamedTuple):
    """What a clock tells of a round.

    Attributes:
      seconds: float[], how long the round has taken.
      elapsed: float[], seconds since the first round.
      late: int32[], clients that were asked, and left out as they came too late.
    """

    seconds: fc.Array
    elapsed: fc.Array
    late: fc.Array


def deadline(
    limit: fc.Scalar = np.inf,
    *,
    seconds_per_example: fc.ArrayLike,
    bytes_per_second_up: fc.ArrayLike = np.inf,
    bytes_per_second_down: fc.ArrayLike = np.inf,
    latency: fc.ArrayLike = 0.0,
    first: int | None = None,
) -> Part:
    """A clock: clients that are slower than the deadline, or than the first m, have no part in the round.

    t_i = latency_i + bytes down / down_i + examples c_i + bytes up / up_i;  they take part whose t_i <= limit and who
    are among the first m (of equal times the lower number);  the round takes min(limit, t of the last it waits for)

    To over-select, draw more clients than `first`. The method is given a cohort in which slots of late clients are
    empty: they train nothing, and their rows stay. Examples and bytes are those of all passes of its round, and bytes
    those that the parts inside leave: put the clock around codecs.

    Args:
      limit: seconds that the server waits.
      seconds_per_example: c_i, of training; this and the next are numbers or float[num_clients].
      bytes_per_second_up: up_i.
      bytes_per_second_down: down_i.
      latency: seconds.
      first: m; all that are in time unless given. Not beside a private part: see `Admission.apart`.

    Paper: Bonawitz et al., "Towards Federated Learning at Scale: System Design", 2019, whose rounds select more
    clients than they wait for and end at a deadline.
    """
    fc.checks.scalar("limit", limit, low=0, low_open=True, finite=False)
    if first is not None:
        fc.checks.positive_int("first", first, "the number of clients that a round waits for")
    given = {"seconds_per_example": seconds_per_example, "latency": latency}
    rates = {"bytes_per_second_up": bytes_per_second_up, "bytes_per_second_down": bytes_per_second_down}
    for name, values in (given | rates).items():
        _check_per_client(name, values, is_rate=name in rates)

    def choose(state: ClockState, cohort: fc.Cohort, traffic: fc.Traffic, key: fc.Key) -> Any:
        c, wait, up, down = (
            cohort.per_client(name, values) if np.ndim(values) else jnp.asarray(values, float)
            for name, values in (given | rates).items()
        )
        t = wait + traffic.bytes_down / down + traffic.examples * c + traffic.bytes_up / up
        t = jnp.where(cohort.mask, t, jnp.inf)
        order = jnp.lexsort((cohort.ids, t, ~cohort.mask))
        count = jnp.minimum(cohort.num_participants, first or cohort.ids.size)
        among = jnp.argsort(order) < count
        chosen = cohort.mask & among & (t <= limit)
        seconds = jnp.where(count > 0, jnp.minimum(t[order[jnp.maximum(count - 1, 0)]], limit), 0)
        elapsed = fc.sums.add(state.elapsed, seconds)
        late = cohort.num_participants - jnp.sum(chosen, dtype=jnp.int32)
        info = ClockInfo(seconds, fc.sums.value(elapsed), late)
        return cohort.only(chosen | ~cohort.mask), ClockState(elapsed), info

    def begin() -> ClockState:
        return ClockState(fc.sums.start((), jnp.result_type(float)))

    return Part(name="deadline", admission=Admission(choose, begin, apart=first is None))


def _check_per_client(name: str, values: Any, *, is_rate: bool) -> None:
    """Raises ValueError unless these are numbers that can be, one or one for each client."""
    if not fc.checks.is_concrete(values):
        return
    array = np.asarray(values)
    wanted = "above 0" if is_rate else "of at least 0, and finite"
    possible = array.ndim < 2 and array.size > 0 and array.dtype.kind in "fiu"
    possible = possible and bool(np.all(array > 0) if is_rate else np.all((array >= 0) & np.isfinite(array)))
    if not possible:
        raise ValueError(
            f"{name} must be a number {wanted}, or float[num_clients] of such, got {values!r:.80}: measure a client"
        )
