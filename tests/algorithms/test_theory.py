"""What theory says of methods is well-formed data, and its sources are there."""

import re
from pathlib import Path

import pytest

import algorithms
from algorithms import theory
from algorithms.parts import claims
from algorithms.parts.claims import Claim

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "algorithms").glob("*/theory.py"))


@pytest.mark.parametrize("name", theory.ALL)
def test_claims_are_about_methods_and_stand_beside_them(name):
    own = theory.of(name)
    assert own
    assert len(set(own)) == len(own)
    for claim in own:
        claims.check(claim)
        assert str(claim)
    beside = Path(__import__(getattr(algorithms, name).__module__, fromlist=["_"]).__file__).with_name("theory.py")
    assert f'"{name}": (' in beside.read_text()


def test_every_file_is_read_and_no_method_twice():
    entered = [name for file in FILES for name in re.findall(r'^    "(\w+)": \(', file.read_text(), re.M)]
    assert sorted(entered) == sorted(theory.ALL)


def test_propositions_that_are_named_are_proved():
    page = (ROOT / "docs" / "converge.md").read_text()
    cited = {number for own in theory.ALL.values() for claim in own for number in _propositions(claim.source)}
    assert cited == {str(number) for number in range(1, 10)}
    assert all(f"**Proposition {number} (" in page for number in cited)


def _propositions(source):
    return re.findall(r"docs/converge.md, proposition (\d+)", source)


def test_a_method_without_claims():
    assert theory.of("fedgh") == ()


def test_claims_in_words():
    assert str(Claim("floor", "drift", "A", "zeta", 2)) == "the floor goes with zeta^2"
    assert str(Claim("floor", "drift", "A", "num_steps - 1", 2)) == "the floor goes with (num_steps - 1)^2"
    assert str(Claim("rate", "drift", "A", "zeta", 0)) == "the rate does not depend on zeta"
    assert str(Claim("floor", "drift", "A")) == "there is no floor"
    assert str(Claim("floor", "drift", "A", measure="consensus")) == "there is no floor of the consensus error"
    mean = Claim("mean", "nonconvex", "A", "rounds", -1, measure="gradient", relation="at most")
    assert str(mean) == "the mean of the squared gradient goes with a power of rounds of at most -1"
    assert str(Claim("rate", "drift", "A", "zeta", 0, relation="at least")).endswith("a power of zeta of at least 0")


@pytest.mark.parametrize(
    ("claim", "said"),
    [
        (Claim("flor", "drift", "A"), "quantity='flor'"),
        (Claim("floor", "dirft", "A"), "setting='dirft'"),
        (Claim("floor", "drift", "A", "eta", 1), "constant='eta'"),
        (Claim("floor", "drift", "A", "zeta"), "give both or neither"),
        (Claim("floor", "drift", "A", "", 1), "give both or neither"),
        (Claim("rate", "drift", "A"), "give both or neither"),
        (Claim("floor", "drift", ""), "no source"),
        (Claim("floor", "drift", "A", measure="distanc"), "measure='distanc'"),
        (Claim("floor", "drift", "A", "zeta", 2, relation="atmost"), "relation='atmost'"),
        (Claim("floor", "drift", "A", relation="at most"), "a bound is one of an exponent"),
        (Claim("floor", "drift", "A", "rounds", -1), "take the mean"),
    ],
)
def test_bad_claims(claim, said):
    with pytest.raises(ValueError, match=said):
        claims.check(claim)
