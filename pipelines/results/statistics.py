"""What is said of a few seeds: mean and spread, a confidence interval, whether two of them differ. S seeds."""

import numpy as np
import scipy.stats

CONFIDENCE = 0.95
TIE = 0.05
"""What a paired test gives a p-value of at least this cannot be told apart."""


def interval(values: np.ndarray) -> str:
    """Mean, and half the width of its confidence interval by Student's t; one value alone has none."""
    values = values.astype(np.float64)
    half = half_width(values)
    return f"{np.mean(values):.4g}" if half is None else f"{values.mean():.4f} ± {half:.4f}"


def half_width(values: np.ndarray) -> float | None:
    """Half the width of the confidence interval of a mean by Student's t, of float[S]; None where there is none."""
    values = values.astype(np.float64)
    if len(values) < 2 or not np.isfinite(values).all():
        return None
    t = scipy.stats.t.ppf(0.5 + CONFIDENCE / 2, len(values) - 1)
    return float(t * values.std(ddof=1) / np.sqrt(len(values)))


def spread(values: np.ndarray) -> str:
    """Mean and standard deviation."""
    if len(values) == 1 or not np.isfinite(values).all():
        return f"{np.mean(values):.4g}"
    return f"{values.mean():.4f} ± {values.std(ddof=1):.4f}"


def paired_test(one: np.ndarray, other: np.ndarray) -> float | None:
    """The p-value of Student's paired t-test, of float[S] each, seed by seed.

    Returns:
      None where nothing can be said: of one seed, of numbers that are not finite, or of differences that are all alike.
    """
    if len(one) < 2 or not np.isfinite(one).all() or not np.isfinite(other).all() or np.ptp(one - other) == 0:
        return None
    return float(scipy.stats.ttest_rel(one, other).pvalue)


def is_tied(values: np.ndarray, best: np.ndarray) -> bool:
    """Whether float[S] are the best, or a paired test cannot tell them from the best; not where it says nothing."""
    if np.array_equal(values, best):
        return True
    p = paired_test(values, best)
    return p is not None and p >= TIE
