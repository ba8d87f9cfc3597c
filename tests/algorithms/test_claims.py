"""Each method's claim at small scale, measured by benchmarks/claims.py (minutes, so by hand: `-m slow`)."""

import jax
import pytest

import algorithms
from benchmarks import claims

CLAIMS = claims.claims()


def test_every_method_has_a_claim():
    assert set(CLAIMS) == set(algorithms.__all__)


@pytest.mark.slow
@pytest.mark.parametrize("name", CLAIMS)
def test_claim_holds_over_seeds(name):
    with jax.enable_x64(False):
        claim = CLAIMS[name]()
    assert claim.holds, f"{claim.text}: {claim.method} against {claim.baseline} ({claim.measure})"
