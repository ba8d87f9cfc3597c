"""Fits to curves whose rates, floors and exponents are known, and to those that have none."""

import math

import numpy as np
import pytest

from pipelines.studies.convergence import fit

T = np.arange(401.0)


def correlated(seeds, rounds, spread, memory=0.8, seed=0):
    """Noise of mean 1 whose logarithm is correlated from round to round, [R, T]."""
    rng = np.random.default_rng(seed)
    steps = rng.normal(size=(seeds, rounds))
    state, found = np.zeros(seeds), []
    for now in steps.T:
        state = memory * state + math.sqrt(1 - memory**2) * now
        found.append(state)
    return np.exp(spread * np.transpose(found) - spread**2 / 2)


def test_floor_and_rate_of_a_curve_that_falls_linearly():
    errors = 3 * np.exp(-0.1 * T)[None] + np.array([1e-4, 2e-4, 3e-4])[:, None]
    floor = fit.floor(errors)
    np.testing.assert_allclose(floor.each, [1e-4, 2e-4, 3e-4], rtol=1e-3)
    half = 4.302653 * 1e-4 / math.sqrt(3)  # Student's, two degrees of freedom
    np.testing.assert_allclose([floor.value, floor.low, floor.high], [2e-4, 2e-4 - half, 2e-4 + half], rtol=1e-3)
    rate = fit.linear_rate(errors)
    np.testing.assert_allclose(rate.each, 0.1, rtol=0.1)  # ten times above the floor it bends already
    np.testing.assert_allclose(fit.linear_rate(3 * np.exp(-0.1 * T)[None]).value, 0.1, rtol=1e-9)


def test_at_rounding_the_floor_is_zero_and_the_rate_that_of_before():
    errors = np.maximum(np.exp(-0.5 * T), 1e-31)[None].repeat(2, 0)
    floor = fit.floor(errors)
    assert floor.value == floor.low == floor.high == 0
    assert "at rounding" in floor.why
    np.testing.assert_allclose(fit.linear_rate(errors).value, 0.5, rtol=1e-9)
    assert "at rounding" in fit.power(errors).why


def test_the_slow_part_of_two_makes_the_rate():
    errors = (np.exp(-0.9 * T) + 1e-2 * np.exp(-0.06 * T))[None]
    np.testing.assert_allclose(fit.linear_rate(errors).value, 0.06, rtol=1e-6)


@pytest.mark.parametrize("p", [0.5, 1.0, 2.0])
def test_powers_are_neither_plateaus_nor_linear(p):
    errors = (1 + np.arange(2001.0))[None] ** -p * np.array([[1.0], [2.0]])
    power = fit.power(errors)
    np.testing.assert_allclose(power.value, p, rtol=1e-2)
    assert fit.floor(errors).value is None
    assert "still falling" in fit.floor(errors).why
    assert fit.linear_rate(errors).value is None


def test_a_linear_fall_is_no_power():
    power = fit.power(np.exp(-0.05 * T)[None])
    assert power.value is None
    assert "does not fall like a power" in power.why


def test_intervals_hold_what_they_promise_with_correlated_noise():
    """Of 200 studies with 6 seeds about 95 % cover the truth; residuals of the rounds would make them far too short."""
    hits = []
    for study in range(200):
        errors = 1e-3 * correlated(6, 401, 0.3, seed=study) + np.exp(-0.3 * T)
        found = fit.floor(errors)
        if found.value is not None:
            hits.append(found.low <= 1e-3 <= found.high)
    assert len(hits) > 60
    assert 0.9 <= np.mean(hits) <= 0.99


def test_noise_leaves_a_plateau_undecided():
    found = fit.floor(correlated(3, 65, 1.0, 0.95))
    assert found.value is None
    assert "not decided" in found.why


def test_scaling_laws():
    at = [0.1, 0.3, 1.0, 3.0]
    rows = [fit.over_seeds(value**2 * np.array([1.0, 1.1, 1.3])) for value in at]
    found = fit.scaling(at, rows)
    np.testing.assert_allclose(found.exponent[:3], 2, rtol=1e-12)
    np.testing.assert_allclose(found.local, 2, rtol=1e-12)
    # Seeds that differ in their exponents give the interval; the order of the settings is of no meaning.
    exponents = np.array([1.8, 2.0, 2.2])
    found = fit.scaling(at[::-1], [fit.over_seeds(value**exponents) for value in at[::-1]])
    np.testing.assert_allclose(found.exponent.each, exponents)
    np.testing.assert_allclose(found.exponent.high - 2.0, 4.302653 * 0.2 / math.sqrt(3), rtol=1e-6)


def test_two_powers_show_in_the_local_slopes():
    at = [0.01, 0.1, 1.0, 10.0]
    found = fit.scaling(at, [fit.over_seeds(np.array([v + v**3, v + v**3])) for v in at])
    np.testing.assert_allclose(found.local, [1.0, 1.3, 2.7], atol=0.05)


one = fit.over_seeds(np.ones(2))


@pytest.mark.parametrize(
    ("at", "rows", "said"),
    [
        ([1, 2, 4], [one, fit.none("no plateau"), one], "at 2: no plateau"),
        ([1, 2, 4], [one, one, fit.floor(np.eye(1, 99).repeat(2, 0))], "at 4 it is 0"),
        ([1, 9], [one, one], "fewer than three values"),
        ([1, 1.1, 1.2], [one, one, one], "within a factor of three"),
    ],
)
def test_no_scaling_law_where_there_is_none(at, rows, said):
    found = fit.scaling(at, rows)
    assert found.exponent.value is None
    assert said in found.exponent.why
    assert len(found.local) == 0


@pytest.mark.parametrize(
    ("errors", "said"),
    [
        (np.full((2, 99), np.nan), "diverged"),
        (np.vstack([np.ones(99), np.full(99, np.inf)]), "diverged, with seed 1"),
        (np.zeros((1, 99)), "begins at the minimizer"),
        (np.ones((2, 20)), "too few"),
    ],
)
def test_no_number_where_there_is_none(errors, said):
    for each in (fit.floor, fit.linear_rate, fit.power):
        found = each(errors)
        assert found.value is None
        assert found.why
    assert said in fit.floor(errors).why
    assert said in str(fit.floor(errors))


def test_a_curve_that_rises_has_no_plateau():
    assert "it rises" in fit.floor(np.exp(0.01 * T)[None]).why


def test_one_seed_has_no_interval():
    found = fit.floor(np.exp(-0.3 * T)[None] + 1.0)
    assert found.value == pytest.approx(1.0)
    assert (found.low, found.high) == (-math.inf, math.inf)
    assert "one seed" in str(found)


def test_bad_input():
    with pytest.raises(ValueError, match=r"errors must be \[seeds, rounds \+ 1\]"):
        fit.floor(np.ones(9))
    with pytest.raises(ValueError, match="rounds must be"):
        fit.floor(np.ones((2, 1)))
    with pytest.raises(ValueError, match="constant has 2 values and quantity 1"):
        fit.scaling([1, 2], [one])
    with pytest.raises(ValueError, match="must be positive"):
        fit.scaling([0.0, 1, 2], [one] * 3)
    with pytest.raises(ValueError, match=r"quantity has \[2, 2, 3\] seeds"):
        fit.scaling([1, 2, 3], [one, one, fit.over_seeds(np.ones(3))])


def test_a_constant_of_each_seed():
    """Seeds with values of their own: each has the exponent of its own line."""
    at = np.array([[0.1, 0.2], [0.3, 0.9], [1.0, 2.5]])
    found = fit.scaling(at, [fit.over_seeds(row**1.5) for row in at])
    np.testing.assert_allclose(found.exponent.each, 1.5, rtol=1e-12)
    np.testing.assert_allclose(found.local, 1.5, rtol=1e-12)
    with pytest.raises(ValueError, match=r"quantity has \[3, 3, 3\] seeds"):
        fit.scaling(at, [fit.over_seeds(np.ones(3))] * 3)


def test_means_over_rounds():
    errors = np.array([[4.0, 2.0, 0.0], [1.0, 1.0, 4.0]])
    np.testing.assert_array_equal(fit.running_mean(errors), [[4.0, 3.0, 2.0], [1.0, 1.0, 2.0]])
    np.testing.assert_array_equal(fit.mean(errors).each, [2.0, 2.0])
    assert "diverged" in fit.mean(np.full((2, 9), np.nan)).why
