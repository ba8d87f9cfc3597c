"""A study of convergence: what is measured for a claim, verdicts, its directory, and its command."""

import csv
import json

import numpy as np
import pytest
from click.testing import CliRunner

from algorithms import theory
from algorithms.parts import claims
from algorithms.parts.claims import Claim
from pipelines.cli import commands
from pipelines.common import figures
from pipelines.run import run_directory
from pipelines.run.checkpoint import OtherRun
from pipelines.studies.convergence import problems
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

    def measure(build, make, cases, *, rounds, seeds, first_seed, cohort_size, probabilities):
        asked.append(cases)
        t = np.arange(rounds + 1.0)
        found = np.zeros((len(cases), seeds, rounds + 1))
        for s, case in enumerate(cases):
            known, lr, steps = case.constants, case.hyper["client_lr"], case.hyper.get("num_steps", make)
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
    assert len(calls) == 5
    (tmp_path / "out" / "claims.csv").write_text("mine")
    with pytest.raises(ValueError, match=r"claims.csv is not what was measured"):
        studies.again(tmp_path / "out", tmp_path / "again", print)
    rows = list(csv.DictReader((tmp_path / "again" / "claims.csv").open()))
    assert [row["verdict"] for row in rows] == [each.word for each in verdicts]
    assert rows[5]["theory"] == "no floor"
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {
        "fedavg.png",
        "curves.png",
        "consensus.png",
        "curves",
    }


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
        with pytest.raises(run_directory.Interrupted, match="after 2 of 5 units, which are saved"):
            studies.run(STUDY, out, lines.append)
    assert len(calls) == 2
    with pytest.raises(ValueError, match="no method of the study"):
        studies.again(out, out, lines.append)
    studies.run(STUDY, out, lines.append)
    assert len(calls) == 5
    _, first = studies.run(STUDY, out, lines.append)
    assert len(calls) == 5
    # Another method, and the first is still there.
    joined, verdicts = studies.run(STUDY.replace(methods=("fedprox",)), out, lines.append)
    assert joined.methods == ("fedavg", "fedprox")
    assert len(calls) == 7
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
    assert len(calls) == 7


@pytest.mark.parametrize("name", ALL)
def test_everything_is_measured_that_is_needed(name):
    """Every claim finds its curves among the units, at values that differ in one constant."""
    study, found = STUDY.replace(seeds=2), {}
    for unit in studies.units(name, study.dim):
        cases = np.zeros((len(unit.cases), 1, 65))
        found[unit.key] = Curves(cases, cases, cases, cases)
        assert len({str(case) for case in unit.cases}) == len(unit.cases)
    assert len(found) == len(studies.units(name, study.dim))
    for claim in theory.of(name):
        values, curves = studies._over(study, name, claim, found)
        if claim.constant in ("", "rounds"):
            assert (len(values), len(curves)) == (0, 1)
            continue
        assert values.shape == ((3, 2) if claim.constant == "curvature" else (3,))
        assert len(curves) == len({(id(each), place) for each, place in curves}) == 3


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


def laid(curves, setting="drift", steps=5, clients=6):
    """What `judge` reads, of the same curves for every measure: float64[S, R, T + 1]."""
    return {("fedavg", setting, steps, clients): Curves(curves, curves, curves, curves)}


@pytest.mark.parametrize(
    ("relation", "exponent", "word"),
    [
        ("equal", 2, "confirmed"),
        ("equal", 1, "contradicted"),
        ("equal", 3, "contradicted"),
        ("at least", 1, "confirmed"),
        ("at least", 3, "contradicted"),
        ("at most", 3, "confirmed"),
        ("at most", 1, "contradicted"),
        ("at least", 2.155, "not decided"),
        ("at most", 1.845, "not decided"),
    ],
)
def test_a_bound_counts_on_its_side(calls, relation, exponent, word):
    each = 2 + np.array([-0.01, 0.0, 0.01])
    levels = np.stack([value**each for value in (0.01, 0.001, 0.1)])  # the base case first
    curves = np.exp(-np.arange(1001.0)) + levels[..., None]
    claim = Claim("floor", "drift", "A", "zeta", exponent, relation=relation)
    verdict = studies.judge(STUDY, "fedavg", claim, laid(curves))
    assert verdict.word == word
    np.testing.assert_allclose(verdict.found.value, 2, atol=1e-6)


@pytest.mark.parametrize(
    ("power", "exponent", "word"), [(0.5, -0.5, "confirmed"), (0.5, -1, "contradicted"), (3, -1, "confirmed")]
)
def test_the_mean_over_rounds(calls, power, exponent, word):
    """That of t^-1/2 falls as fast as that; of what can be summed like 1 / t and no faster."""
    curves = np.broadcast_to((1 + np.arange(20001.0)) ** -power, (1, 3, 20001))
    claim = Claim("mean", "nonconvex", "A", "rounds", exponent, measure="gradient", relation="at most")
    verdict = studies.judge(STUDY, "fedavg", claim, laid(curves, "nonconvex"))
    assert verdict.word == word
    np.testing.assert_allclose(verdict.found.value, max(-power, -1), atol=0.02)
    assert verdict.found.low <= verdict.found.value <= verdict.found.high
    assert studies.figure(STUDY, [verdict]) is None


def test_a_claim_is_judged_by_its_own_measure(calls):
    t = np.broadcast_to(np.exp(-np.arange(1001.0)), (1, 3, 1001))
    measured = {("fedavg", "drift", 5, 6): Curves(t, t + 0.1, t, t[..., 1:] + 0.1)}
    words = {
        measure: studies.judge(STUDY, "fedavg", Claim("floor", "drift", "A", measure=measure), measured).word
        for measure in claims.MEASURES
    }
    against, for_it = "contradicted", "confirmed"
    assert words == {"distance": for_it, "gradient": against, "excess": for_it, "consensus": against}


def test_a_constant_that_each_problem_has_its_own_of(calls, monkeypatch):
    """Rates of 2 lr K times the least eigenvalue, which other values of convexity give each seed in its own way."""
    claim = Claim("rate", "drift", "A", "curvature", 1)
    monkeypatch.setattr(theory, "ALL", {"fedavg": (claim,)})
    study = STUDY.replace(dim=4)
    unit, *others = studies.units("fedavg", 4)
    assert [case.constants["convexity"] for case in unit.cases] == [0.2, 0.02, 0.8]
    assert not others
    own = np.array([studies._curvatures(study, studies.DESIGNS["drift"], case.constants) for case in unit.cases])
    assert own.shape == (3, 3)
    assert len(np.unique(own)) == 9
    verdict = studies.judge(study, "fedavg", claim, laid(np.exp(-0.2 * own[..., None] * np.arange(3001.0))))
    assert verdict.word == "confirmed"
    np.testing.assert_allclose(verdict.found.each, 1, rtol=1e-6)
    np.testing.assert_allclose(verdict.values, own[[1, 0, 2]].mean(1))


def test_constants_that_are_made_of_another_one(monkeypatch):
    claim = Claim("floor", "partial", "A", "1 - beta", 2)
    monkeypatch.setattr(theory, "ALL", {"fedstale": (claim,)})
    (unit,) = studies.units("fedstale", 2)
    assert [case.hyper["beta"] for case in unit.cases] == [0.5, 0.0, 0.75]
    curves = np.zeros((3, 1, 65))
    values, found = studies._over(STUDY, "fedstale", claim, {unit.key: Curves(curves, curves, curves, curves)})
    assert values.tolist() == [1.0, 0.5, 0.25]
    assert [place for _, place in found] == [1, 0, 2]


def test_a_step_on_whole_batches_takes_all_examples_of_a_client(monkeypatch):
    monkeypatch.setattr(studies, "method", lambda name, **own: own)
    unit = next(unit for unit in studies.units("fedavg", 3) if unit.setting == "logistic")
    problem = problems.logistic(0, **unit.cases[0].constants)
    own = studies.maker(unit)
    assert np.diff(problem.data.population.offsets).tolist() == [own["batch_size"]] * 6
    assert own["order"] == "sequential"


def test_who_takes_part_with_what_probability():
    assert studies.in_turn((0.25, 0.5, 1.0), 5) == [0.25, 0.5, 1.0, 0.25, 0.5]
    assert studies.in_turn(None, 5) is None
