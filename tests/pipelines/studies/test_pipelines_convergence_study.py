"""A study of convergence: what is measured for a claim, verdicts, its directory, and its command."""

import csv
import json

import numpy as np
import pytest
from click.testing import CliRunner

from algorithms import theory
from algorithms.parts.claims import Claim
from pipelines.cli import commands
from pipelines.common import figures
from pipelines.run import run_directory
from pipelines.run.checkpoint import OtherRun
from pipelines.studies.convergence import study as studies
from pipelines.studies.convergence.config import ALL, Converge
from pipelines.studies.convergence.measure import Curves

CLAIMS = {
    "fedavg": (
        Claim("floor", "drift", "A", "zeta", 2, exact=True),
        Claim("floor", "drift", "A", "client_lr", 1),  # it is 2
        Claim("floor", "drift", "A", "num_steps - 1", 2),
        Claim("rate", "drift", "A", "num_steps", 1),
        Claim("floor", "noise", "B", "clients", -1),
        Claim("floor", "equal", "A"),
    ),
    "fedprox": (Claim("floor", "drift", "A", "mu", 0), Claim("floor", "equal", "A")),
}


@pytest.fixture
def calls(monkeypatch):
    """Curves by formula in the place of those of methods; the list of what was asked for."""
    asked = []

    def measure(build, make, cases, *, rounds, seeds, first_seed, cohort_size):
        asked.append(cases)
        t = np.arange(rounds + 1.0)
        found = np.zeros((len(cases), seeds, rounds + 1))
        for s, case in enumerate(cases):
            known, lr, steps = case.constants, case.hyper["client_lr"], make
            for r in range(seeds):
                level = (lr * known["zeta"] * (steps - 1)) ** 2 + known.get("sigma", 0) ** 2 * lr / known["clients"]
                level *= (1 + 0.1 * r) * (known["hessians"] == "different" or known.get("sigma", 0) > 0)
                found[s, r] = np.exp(-lr * steps * t) + level
        return Curves(found, found, found, found[..., 1:])

    monkeypatch.setattr(studies, "measure", measure)
    monkeypatch.setattr(studies, "maker", lambda unit: unit.num_steps)
    monkeypatch.setattr(theory, "ALL", CLAIMS)
    monkeypatch.setattr(figures, "write", lambda path, figure: path.write_text("figure"))
    return asked


STUDY = Converge(methods=("fedavg",), rounds=3000, seeds=3, dim=2)


def test_verdicts_and_the_report(calls, tmp_path):
    _, verdicts = studies.run(STUDY, tmp_path / "out", lambda line: None)
    assert [each.word for each in verdicts] == ["confirmed", "contradicted", *["confirmed"] * 4]
    np.testing.assert_allclose([each.found.value for each in verdicts[:5]], [2, 2, 2, 1, -1], atol=0.02)
    assert verdicts[2].values == (1, 4, 8)  # K - 1
    report = (tmp_path / "out" / "summary.md").read_text()
    assert "5 confirmed, 1 contradicted, 0 not decided." in report
    assert "- FedAvg, drift: the floor goes with client_lr^1; measured 2 [2, 2]" in report
    assert "--method fedavg --rounds 3000 --seeds 3 --dim 2" in report
    # Drawn again it is the same, from what was saved alone.
    assert "summary.html" in studies.again(tmp_path / "out", tmp_path / "again", print)
    assert (tmp_path / "again" / "summary.md").read_text() == report
    assert len(calls) == 7
    (tmp_path / "out" / "claims.csv").write_text("mine")
    with pytest.raises(ValueError, match=r"claims.csv is not what was measured"):
        studies.again(tmp_path / "out", tmp_path / "again", print)
    rows = list(csv.DictReader((tmp_path / "again" / "claims.csv").open()))
    assert [row["verdict"] for row in rows] == [each.word for each in verdicts]
    assert rows[5]["theory"] == "no floor"
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"fedavg.png", "curves.png", "curves", "study.json"}


@pytest.mark.parametrize(("tolerance", "word"), [(0.2, "confirmed"), (0.05, "not decided"), (0.01, "not decided")])
def test_an_interval_that_crosses_the_tolerance_decides_nothing(calls, tolerance, word):
    t, each = np.arange(1001.0), np.array([-0.1, 0.0, 0.1])
    found = np.stack(
        [np.exp(-0.5 * t)[None] + 0.01 * value ** (2 + 0.3 * each)[:, None] for value in (0.001, 0.01, 0.1)]
    )
    curves = Curves(found[[1, 0, 2]], found, found, found)
    study = STUDY.replace(tolerance=tolerance)
    measured = {("fedavg", "drift", 5, 6): curves}
    claim = CLAIMS["fedavg"][0]
    verdict = studies.judge(study, "fedavg", claim, measured)
    assert verdict.word == word
    assert ("more rounds or seeds" in verdict.why) == (word == "not decided")


def test_a_floor_that_is_missing_is_not_decided_and_one_of_zero_contradicts(calls):
    t = np.arange(1001.0)
    claim, none = CLAIMS["fedavg"][0], Claim("floor", "drift", "A")
    falling = np.broadcast_to(1 / (1 + t), (5, 3, 1001))
    for word, curve in (("not decided", falling), ("contradicted", np.broadcast_to(np.exp(-t), (5, 3, 1001)))):
        measured = {("fedavg", "drift", 5, 6): Curves(curve, curve, curve, curve)}
        assert studies.judge(STUDY, "fedavg", claim, measured).word == word
    stays = np.broadcast_to(np.exp(-t) + 0.1, (5, 3, 1001))
    for word, curve in (("not decided", falling), ("contradicted", stays)):
        measured = {("fedavg", "drift", 5, 6): Curves(curve, curve, curve, curve)}
        assert studies.judge(STUDY, "fedavg", none, measured).word == word


def test_a_study_goes_on_and_more_methods_join(calls, tmp_path, monkeypatch):
    out, lines = tmp_path / "out", []
    stop = iter([0, 0, 15])

    with monkeypatch.context() as patch:
        patch.setattr(run_directory.Work, "stop", property(lambda self: lambda: next(stop)))
        with pytest.raises(run_directory.Interrupted, match="after 2 of 7 units, which are saved"):
            studies.run(STUDY, out, lines.append)
    assert len(calls) == 2
    with pytest.raises(ValueError, match="no method of the study"):
        studies.again(out, out, lines.append)
    studies.run(STUDY, out, lines.append)
    assert len(calls) == 7
    _, first = studies.run(STUDY, out, lines.append)
    assert len(calls) == 7
    # Another method, and the first is still there.
    joined, verdicts = studies.run(STUDY.replace(methods=("fedprox",)), out, lines.append)
    assert joined.methods == ("fedavg", "fedprox")
    assert len(calls) == 9
    assert [each.word for each in verdicts[:6]] == [each.word for each in first]
    assert json.loads((out / "study.json").read_text())["config"]["methods"] == ["fedavg", "fedprox"]
    with pytest.raises(ValueError, match="rounds: 100 here, 3000 there"):
        studies.run(STUDY.replace(rounds=100), out, lines.append)
    with monkeypatch.context() as patch:  # as by another version: what is there is of other cases
        patch.setitem(studies.OWN, "fedavg", {"server_lr": 0.5})
        with pytest.raises(OtherRun, match="remove that file"):
            studies.run(STUDY, out, lines.append)
    # The tolerance changes no number: only the report is written anew.
    assert studies.run(STUDY.replace(tolerance=0.5), out, lines.append)
    assert len(calls) == 9


@pytest.mark.parametrize("name", ALL)
def test_everything_is_measured_that_is_needed(name):
    """Every claim finds its curves among the units, at values that differ in one constant."""
    found = {}
    for unit in studies.units(name, 2):
        cases = np.zeros((len(unit.cases), 1, 65))
        found[(unit.method, unit.setting, unit.num_steps, unit.clients)] = Curves(cases, cases, cases, cases)
        assert len({str(case) for case in unit.cases}) == len(unit.cases)
    assert len(found) == len(studies.units(name, 2))
    for claim in theory.of(name):
        values, curves = studies._over(name, claim, 2, found)
        assert len(values) == len(curves) == 3 or (not claim.constant and len(curves) == 1)
        assert len({(id(each), place) for each, place in curves}) == len(curves)


def test_a_real_unit(tmp_path, monkeypatch):
    """FedNova with unequal steps: one small program, from the command line."""
    monkeypatch.setattr(theory, "ALL", {"fednova": (Claim("floor", "unequal", "A", "zeta", 2),)})
    monkeypatch.setattr(figures, "write", lambda path, figure: None)
    words = ["converge", "--method", "fednova", "--rounds", "2500", "--seeds", "2", "--dim", "2"]
    done = CliRunner().invoke(commands.main, [*words, "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert "1 confirmed, 0 contradicted, 0 not decided; written:" in done.output


def test_figures_are_drawn(calls, tmp_path):
    _, verdicts = studies.run(STUDY, tmp_path / "out", lambda line: None)
    drawn = studies.figure(STUDY, [each for each in verdicts if each.values])
    visible = [axis for axis in drawn.axes if axis.get_visible()]
    assert len(visible) == 5
    assert [axis.get_xlabel() for axis in visible][:2] == ["zeta", "client_lr"]
    assert studies.figure(STUDY, []) is None


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ({"methods": ("fedavgg",)}, "fedavg"),
        ({"methods": ()}, "methods is empty"),
        ({"rounds": 63}, "rounds=63 are too few"),
        ({"seeds": 1}, "seeds=1 has no interval"),
        ({"dim": 1}, "dim=1 has room for one eigenvalue"),
        ({"tolerance": 0.0}, "tolerance must lie in"),
    ],
)
def test_bad_configurations(own, said):
    with pytest.raises(ValueError, match=said):
        Converge(**own)


def test_too_much_memory_is_refused_before_anything_is_built(tmp_path):
    with pytest.raises(ValueError, match="the problems of a unit would hold at least"):
        studies.run(Converge(dim=2**31 - 1), tmp_path / "out")


def test_names_of_studies():
    assert studies.slug(STUDY) == studies.slug(STUDY.replace(methods=("scaffold",), tolerance=1.0))
    assert studies.slug(STUDY) != studies.slug(STUDY.replace(rounds=100))
