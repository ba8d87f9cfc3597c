"""Rates, floors and scaling laws fitted to curves of convergence, with confidence intervals, or the reason for none.

The errors of one run are correlated from round to round, so that residuals of a fit say nothing of its error. Every
number here is therefore fitted to each seed by itself, and the interval is Student's over the seeds, which are
independent of each other and of any correlation within a run.

Errors are positive, float64[R, T + 1] of R seeds, before the first and after each of T rounds.

What counts as what, in words:

* A curve is *at rounding* if in the mean over the last half of its rounds it is below a given share of where it began:
  nothing can be told of a floor but that there is none above that.
* It has *a plateau* if the mean over the last quarter of its rounds differs from that over the quarter before by less
  than `FLAT` in logarithm, and the interval of this difference over the seeds lies within these bounds. A decay like
  1 / sqrt(t) changes by 0.17, and one like 1 / t by 0.34, so that neither is taken for a plateau; one slower than
  t^-0.4 could be. If the interval crosses a bound it is not decided; if it lies beyond, there is no plateau.
* It falls *linearly* if, between the geometric mean of its beginning and its end and ten times its floor (or the end of
  the run), the slopes of its logarithm in both halves of that time differ by less than a factor of `STRAIGHT`.
* It falls *like a power* of the number of rounds if the same holds of its logarithm over that of the round, in the last
  three quarters of the run.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy.stats

from fedjax_core import checks

CONFIDENCE = 0.95
FLAT = 0.15
STRAIGHT = 1.5
_ABOVE_FLOOR = 10.0
_FEWEST_POINTS = 8
_LEAST_FALL = 2.0
"""Of a logarithm, in a window that a rate is fitted to."""


class Estimate(NamedTuple):
    """A fitted number, or the reason why there is none.

    Attributes:
      value: the mean over the seeds, or None.
      low: lower end of its interval; -inf with one seed.
      high: upper end; inf with one seed.
      each: the number of each seed, float64[R]; empty without a number.
      why: why there is none, or what is to be known of it.
    """

    value: float | None
    low: float
    high: float
    each: np.ndarray
    why: str = ""

    def __str__(self) -> str:
        if self.value is None:
            return f"none: {self.why}"
        if not math.isfinite(self.low):
            return f"{self.value:.4g} ({self.why})"
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"


class Scaling(NamedTuple):
    """How a quantity depends on a constant, quantity ~ constant^exponent.

    Attributes:
      exponent: slope of the logarithms, by least squares.
      local: slopes between neighboring values of the constant, means over seeds, float64[S - 1]; far apart they say
        that there is no one power over the whole range. Empty without a number.
    """

    exponent: Estimate
    local: np.ndarray


def over_seeds(each: np.ndarray, why: str = "") -> Estimate:
    """Mean and Student's interval of a number of each seed, float64[R]."""
    each = np.asarray(each, np.float64)
    mean = float(each.mean())
    if len(each) == 1:
        return Estimate(mean, -math.inf, math.inf, each, why or "one seed, no interval")
    half = float(scipy.stats.t.ppf(0.5 + CONFIDENCE / 2, len(each) - 1) * each.std(ddof=1) / math.sqrt(len(each)))
    return Estimate(mean, mean - half, mean + half, each, why)


def none(why: str) -> Estimate:
    """No number, for a reason."""
    return Estimate(None, -math.inf, math.inf, np.zeros(0), why)


def floor(errors: np.ndarray, *, rounding: float = 1e-20) -> Estimate:
    """What a curve stays at: the mean over the last half of its rounds; 0 if it is at rounding.

    Args:
      errors: float64[R, T + 1].
      rounding: share of the error at the beginning below which nothing is told from 0.

    Raises:
      ValueError: if the shape is another one.
    """
    if (bad := _unfit(errors)) is not None:
        return none(bad)
    half = errors.shape[1] // 2
    last = errors[:, -half:]
    if last.mean() <= rounding * errors[:, 0].mean():
        return Estimate(0.0, 0.0, 0.0, np.zeros(len(errors)), "at rounding, no floor above it")
    if half < 2 * _FEWEST_POINTS:
        return none(f"{errors.shape[1] - 1} rounds are too few to see a plateau: run at least {4 * _FEWEST_POINTS}")
    quarter = half // 2
    before, after = last[:, :quarter].mean(1), last[:, -quarter:].mean(1)
    if not (before > 0).all() or not (after > 0).all():
        return none("some seeds are at rounding and others are not: choose a larger share for it")
    change = over_seeds(np.log(after / before))
    low, high = (change.low, change.high) if len(errors) > 1 else (change.each[0], change.each[0])
    if max(-low, high) < FLAT:
        return over_seeds(last.mean(1))
    how = f"its logarithm changes by {change.value:.3g} [{low:.3g}, {high:.3g}] in the last quarter of the rounds"
    if high <= -FLAT:
        return none(f"no plateau, it is still falling: {how}")
    if low >= FLAT:
        return none(f"no plateau, it rises: {how}")
    return none(f"a plateau is not decided, {how}: more rounds or seeds would tell")


def linear_rate(errors: np.ndarray, *, rounding: float = 1e-20) -> Estimate:
    """c of an error that falls like exp(-c t), per round, before it comes to its floor.

    Args:
      errors: float64[R, T + 1].
      rounding: as for `floor`.

    Raises:
      ValueError: if the shape is another one.
    """
    if (bad := _unfit(errors)) is not None:
        return none(bad)
    stays = floor(errors, rounding=rounding)
    found, bent = [], []
    for seed, curve in enumerate(errors):
        least = rounding * curve[0] if stays.value is None or stays.value == 0 else stays.each[seed]
        above = np.flatnonzero(curve <= _ABOVE_FLOOR * least)
        end = int(above[0]) if len(above) else len(curve) - 1
        middle = math.sqrt(curve[0] * max(curve[end], least))
        begin = int(np.flatnonzero(curve <= middle)[0]) if (curve[: end + 1] <= middle).any() else end
        rounds, logs = np.arange(begin, end + 1), np.log(np.maximum(curve[begin : end + 1], np.finfo(float).tiny))
        if len(rounds) < _FEWEST_POINTS or logs[0] - logs[-1] < _LEAST_FALL:
            return none(
                f"seed {seed} has {len(rounds)} rounds in which its error falls by a factor of "
                f"{math.exp(max(logs[0] - logs[-1], 0)):.3g}, too few or too little for a rate: at least "
                f"{_FEWEST_POINTS} rounds and {math.exp(_LEAST_FALL):.3g}"
            )
        found.append(-_slope(rounds, logs))
        bent.append(_halves(rounds, logs))
    if (why := _bent(np.array(bent))) is not None:
        return none(f"it does not fall linearly: {why}")
    return over_seeds(np.array(found))


def power(errors: np.ndarray, *, rounding: float = 1e-20) -> Estimate:
    """p of an error that falls like t^-p in the number of rounds t.

    Args:
      errors: float64[R, T + 1].
      rounding: as for `floor`.

    Raises:
      ValueError: if the shape is another one.
    """
    if (bad := _unfit(errors)) is not None:
        return none(bad)
    stays = floor(errors, rounding=rounding)
    if stays.value is not None:
        return none("it is at its floor" if stays.value else "it is at rounding")
    count = errors.shape[1] - 1
    rounds = np.unique(np.geomspace(max(1, count // 4), count, 64).astype(int))
    if len(rounds) < 2 * _FEWEST_POINTS:
        return none(f"{count} rounds are too few for a power: run at least {8 * _FEWEST_POINTS}")
    if not (errors[:, rounds] > 0).all():
        return none("the error is 0 in some round")
    times, logs = np.log(rounds), np.log(errors[:, rounds])
    if (why := _bent(np.array([_halves(times, each) for each in logs]))) is not None:
        return none(f"it does not fall like a power of the number of rounds: {why}")
    return over_seeds(np.array([-_slope(times, each) for each in logs]))


def mean(errors: np.ndarray) -> Estimate:
    """The mean over all rounds, that before the first included.

    Args:
      errors: float64[R, T + 1].

    Raises:
      ValueError: if the shape is another one.
    """
    if (bad := _unfit(errors)) is not None:
        return none(bad)
    return over_seeds(errors.mean(1))


def running_mean(errors: np.ndarray) -> np.ndarray:
    """The mean over all rounds so far, float64[R, T + 1], of errors [R, T + 1]."""
    return np.cumsum(errors, 1) / np.arange(1, errors.shape[1] + 1)


def scaling(constant: Sequence[float] | np.ndarray, quantity: Sequence[Estimate]) -> Scaling:
    """The exponent p of quantity ~ constant^p, over settings that differ in that constant alone.

    Args:
      constant: positive, such as zeta or the learning rate; float[S], or float[S, R] where each seed has its own.
      quantity: what was fitted at each of them, such as a floor, of the same seeds.

    Raises:
      ValueError: if there is not one quantity for each constant, they are of different numbers of seeds, or a constant
        is not positive.
    """
    at = np.asarray(constant, np.float64)
    if at.ndim not in (1, 2) or len(at) != len(quantity):
        raise ValueError(f"constant has {at.size} values and quantity {len(quantity)}: give one for each")
    if not (np.isfinite(at) & (at > 0)).all():
        raise ValueError(f"constant={at.tolist()} must be positive, its logarithm is taken: leave out others")
    nothing, names = np.zeros(0), at if at.ndim == 1 else at.mean(1)
    for value, each in zip(names, quantity, strict=True):
        if each.value is None:
            return Scaling(none(f"at {value:.4g}: {each.why}"), nothing)
    counts = {len(each.each) for each in quantity}
    if len(counts) > 1 or (at.ndim == 2 and at.shape[1] not in counts):
        raise ValueError(f"quantity has {[len(each.each) for each in quantity]} seeds: fit the same seeds everywhere")
    values = np.stack([each.each for each in quantity])
    if not (values > 0).all():
        zero = names[~(values > 0).all(1)]
        return Scaling(none(f"at {', '.join(f'{value:.4g}' for value in zero)} it is 0, {quantity[0].why}"), nothing)
    order = np.argsort(names)
    at = np.log(np.broadcast_to(at.reshape(len(at), -1), values.shape)[order])
    values, middle = np.log(values[order]), at.mean(1)
    if len(np.unique(middle)) < 3 or middle[-1] - middle[0] < math.log(3):
        return Scaling(none("there are fewer than three values, or they lie within a factor of three"), nothing)
    slopes = np.array([_slope(x, y) for x, y in zip(at.T, values.T, strict=True)])
    return Scaling(over_seeds(slopes), np.diff(values.mean(1)) / np.diff(middle))


def _unfit(errors: np.ndarray) -> str | None:
    """Why nothing can be fitted to these curves, or None."""
    if np.ndim(errors) != 2 or 0 in np.shape(errors):
        raise ValueError(f"errors must be [seeds, rounds + 1], got {np.shape(errors)}: give each seed a row")
    checks.positive_int("rounds", errors.shape[1] - 1, "give the error before the first round and after each")
    if not np.isfinite(errors).all():
        bad = [str(seed) for seed in np.flatnonzero(~np.isfinite(errors).all(1))]
        return f"diverged, with seed {', '.join(bad)}" if len(bad) < len(errors) else "diverged"
    if not (errors[:, 0] > 0).all():
        return "it begins at the minimizer"
    return None


def _slope(x: np.ndarray, y: np.ndarray) -> float:
    away = x - x.mean()
    return float(away @ y / (away @ away))


def _halves(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Slopes downward in the first and second half."""
    middle = len(x) // 2
    return -_slope(x[: middle + 1], y[: middle + 1]), -_slope(x[middle:], y[middle:])


def _bent(slopes: np.ndarray) -> str | None:
    """What is wrong with slopes in two halves [R, 2] that should be one, or None."""
    first, second = slopes.mean(0)
    if first > 0 and second > 0 and max(first, second) < STRAIGHT * min(first, second):
        return None
    return f"the slope is {first:.3g} in the first half and {second:.3g} in the second"
