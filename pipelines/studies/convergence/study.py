"""Theory beside measurement: every claim about a method is confirmed, contradicted, or not decided.

    fedjax-core converge --method fedavg --method scaffold --out runs/theory

Claims are data beside the methods (`algorithms.theory`). Each holds in a setting, for which `DESIGNS` says what is
measured: a problem of known constants, a base case, and for each constant the values that it takes while all others
stay. Cases that differ in real numbers are one compiled program, a unit, which is saved when it is done, so that the
same command goes on where it was stopped; more methods may join. What comes out: summary.html and summary.md,
claims.csv, a figure for each method, curves.png and consensus.png, each figure as .pdf too.

A verdict takes the 95 % interval of an exponent over the seeds, and that of theory's exponent plus and minus the
tolerance: confirmed if the first lies within the second, contradicted if they are apart, and else not decided. Of a
bound on the exponent one side counts. That there is no floor is confirmed if the error comes to rounding, and
contradicted if it stays at a plateau above it.
"""

import csv
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from algorithms import theory
from algorithms.parts.claims import SETTINGS, Claim
from pipelines.common import figures, files, growth
from pipelines.configuration import methods
from pipelines.configuration.options import check_grown, named
from pipelines.experiment import memory
from pipelines.results import pages
from pipelines.run import identity, run_directory, trials
from pipelines.run.run_directory import Kind, Work
from pipelines.studies.convergence import fit, problems
from pipelines.studies.convergence.config import ALL, Converge
from pipelines.studies.convergence.fit import Estimate
from pipelines.studies.convergence.measure import Case, Curves, Make, measure, method

KIND = Kind("converge", Converge.from_values, "study.json", "unit")

CONFIRMED, CONTRADICTED, UNDECIDED = "confirmed", "contradicted", "not decided"
WORDS = (CONFIRMED, CONTRADICTED, UNDECIDED)
COLUMNS = (
    *("method", "setting", "quantity", "measure", "constant", "theory", "measured", "low", "high", "verdict", "why"),
    "source",
)

_GROWS = {"methods": growth.contains}


class Design(NamedTuple):
    """What is measured in a setting.

    Attributes:
      constants: of the problem in the base case.
      num_steps: K there.
      clients: N there.
      client_lr: there.
      values: constant to the values that it takes, of problem and methods; of `_VARIED`, what is varied takes them.
      cohort: clients that take part in a round, or None for all.
      unequal: whether clients take 1, K and 2 K - 1 steps in turn.
      problem: of `problems.KINDS`.
      probabilities: of clients to take part in a round, in turn; instead of a cohort.
      whole: whether a step takes all of a client's examples, and not one.
      share: rounds that are measured, as a share of those of the study.
    """

    constants: Mapping[str, Any]
    num_steps: int
    clients: int
    client_lr: float
    values: Mapping[str, tuple[float, ...]]
    cohort: int | None = None
    unequal: bool = False
    problem: str = "quadratic"
    probabilities: tuple[float, ...] | None = None
    whole: bool = False
    share: float = 1.0


_VARIED: Mapping[str, tuple[str, Callable[[float], float]]] = {
    "num_steps - 1": ("num_steps", lambda steps: steps - 1),
    "1 - beta": ("beta", lambda beta: 1 - beta),
    "curvature": ("convexity", lambda convexity: convexity),  # and what comes of it is looked up in the problems
}
"""Constants that are made of another one: that one, and how."""

_OF_METHODS = {"beta": (0.25, 0.5, 1.0), "mu": (0.1, 0.3, 1.0), "rho": (0.00003, 0.0001, 0.0003)}
_BASE = {"beta": 0.5, "mu": 0.3, "rho": 0.0001}
"""What these are in the base case of a method that has a claim about them."""
OWN: Mapping[str, Mapping[str, float]] = {
    "feddyn": {"alpha": 0.5},
    "fedspeed": {"lam": 2.0},
    "mime": {"momentum": 0.5},
    "fedamd": {"probability": 0.5},
    "afa_cd": {"server_lr": 3.0},
    "afa_cs": {"server_lr": 3.0},
}
"""Hyper-parameters of methods other than their defaults.

The linear terms of FedDyn and FedSpeed are forgotten by 1 - lr K alpha in a round: with the default of 0.1 FedDyn has
not come to rounding after 4,000 rounds. Leading terms are those of rates that are small beside what Mime forgets of its
momentum in a round, and beside how often FedAMD's anchors are renewed. The server of AFA steps by server_lr local
steps, by default one.
"""
_RATES = {"client_lr": (0.01, 0.02, 0.04)}
_ZETAS = {"zeta": (0.001, 0.01, 0.1)}

# Rates are small where leading terms are asked for, and large where noise has to be averaged over rounds.
DESIGNS: Mapping[str, Design] = {
    "drift": Design(
        {"hessians": "different", "convexity": 0.2, "zeta": 0.01},
        5,
        6,
        0.02,
        {**_ZETAS, **_RATES, "num_steps": (2, 5, 9), "convexity": (0.02, 0.2, 0.8), **_OF_METHODS},
        share=0.6,
    ),
    "equal": Design({"hessians": "equal", "convexity": 0.2, "zeta": 0.01}, 5, 6, 0.02, {}),
    "noise": Design(
        {"hessians": "equal", "convexity": 0.5, "zeta": 0.0, "sigma": 0.3},
        5,
        6,
        0.1,
        {"sigma": (0.1, 0.3, 1.0), "client_lr": (0.05, 0.1, 0.2), "clients": (3, 6, 12), "num_steps": (4, 5, 12)},
    ),
    "partial": Design(
        {"hessians": "different", "convexity": 0.5, "zeta": 0.01},
        3,
        6,
        0.025,
        {**_ZETAS, "client_lr": (0.0125, 0.025, 0.05), "1 - beta": (0.0, 0.5, 0.75)},
        cohort=3,
        share=2.0,
    ),
    "irregular": Design(
        {"hessians": "different", "convexity": 0.5, "zeta": 0.01},
        3,
        6,
        0.025,
        {**_ZETAS, "client_lr": (0.0125, 0.025, 0.05)},
        probabilities=(0.25, 0.5, 1.0),
        share=4.0,
    ),
    "unequal": Design(
        {"hessians": "different", "convexity": 0.2, "zeta": 0.01},
        3,
        6,
        0.02,
        {**_ZETAS, **_RATES},
        unequal=True,
        share=0.5,
    ),
    "apart": Design(
        {"hessians": "different", "convexity": 0.5, "zeta": 100.0},
        5,
        6,
        0.02,
        {"zeta": (30.0, 100.0, 300.0), **_RATES, "num_steps": (2, 5, 9)},
        share=4.0,
    ),
    "values": Design(
        {"hessians": "equal", "convexity": 0.5, "zeta": 0.1},
        5,
        6,
        0.4,
        {
            "zeta": (0.01, 0.1, 1.0),
            "client_lr": (0.2, 0.4, 0.8),
            "clients": (3, 6, 12),
            "num_steps": (4, 5, 12),
            "mu": _OF_METHODS["mu"],
        },
    ),
    "logistic": Design(
        {"convexity": 0.15, "zeta": 0.1, "copies": 2},
        5,
        6,
        0.02,
        {"zeta": (0.03, 0.1, 0.3), **_RATES, "num_steps": (2, 5, 9), "convexity": (0.05, 0.15, 0.5)},
        problem="logistic",
        whole=True,
    ),
    "pl": Design(
        {"zeta": 1.0, "radius": 3.0},
        5,
        6,
        0.01,
        {"zeta": (0.5, 1.0, 2.0), "client_lr": (0.005, 0.01, 0.02), "num_steps": (2, 5, 9)},
        problem="sine",
    ),
    "nonconvex": Design(
        {"zeta": 0.1, "radius": 2.0}, 5, 6, 0.02, {**_RATES, "num_steps": (2, 5, 9)}, problem="saturating", share=0.5
    ),
    "nonconvex noise": Design(
        {"zeta": 0.0, "sigma": 0.1, "radius": 1.0},
        5,
        6,
        0.1,
        {"sigma": (0.03, 0.1, 0.3), "client_lr": (0.05, 0.1, 0.2)},
        problem="saturating",
    ),
}


class Unit(NamedTuple):
    """Cases of a method that are one compiled program.

    Attributes:
      method: its name.
      setting: of `DESIGNS`.
      num_steps: K in the base case.
      clients: N.
      cases: the settings; the first is the base case, but for N.
    """

    method: str
    setting: str
    num_steps: int
    clients: int
    cases: tuple[Case, ...]

    @property
    def of(self) -> dict[str, Any]:
        """What tells it from others, for its file."""
        design = DESIGNS[self.setting]
        cases = [{"constants": dict(c.constants), "hyper": dict(c.hyper)} for c in self.cases]
        said = {"cases": cases, "design": repr(design[5:])}
        own = {name: getattr(self, name) for name in ("method", "setting", "num_steps", "clients")}
        return {**own, "cases": growth.digest(said)}

    @property
    def key(self) -> tuple[str, str, int, int]:
        """Its place among what was measured."""
        return self.method, self.setting, self.num_steps, self.clients

    def path(self, out: Path) -> Path:
        """Its file."""
        setting = self.setting.replace(" ", "_")
        return out / "curves" / f"{self.method}-{setting}-{self.num_steps}-{self.clients}.npz"


class Verdict(NamedTuple):
    """What has come of a claim.

    Attributes:
      method: the method that it is about.
      claim: the claim.
      word: `CONFIRMED`, `CONTRADICTED` or `UNDECIDED`.
      found: the exponent; or the floor, of a claim that there is none.
      why: the reason of a verdict that is not decided, in words; what tells against a claim beside the interval.
      values: of the constant, in the mean over the seeds; none if it is the number of rounds.
      quantities: at each of them, or of the base case.
      local: slopes between neighboring values.
    """

    method: str
    claim: Claim
    word: str
    found: Estimate
    why: str
    values: tuple[float, ...]
    quantities: tuple[Estimate, ...]
    local: np.ndarray


Measured = dict[tuple[str, str, int, int], Curves]
"""Curves by method, setting, K and N of a unit."""


def varied(constant: str) -> str:
    """The argument that is varied for a constant: itself, or what it is made of."""
    return _VARIED[constant][0] if constant in _VARIED else constant


def values_of(setting: str, constant: str) -> tuple[float, ...]:
    """The values that `varied(constant)` takes in a setting."""
    values = DESIGNS[setting].values
    return values.get(constant, values.get(varied(constant), ()))


def units(name: str, dim: int) -> list[Unit]:
    """Everything that is measured for the claims about a method."""
    found = []
    takes = {varied(claim.constant) for claim in theory.of(name)} & set(_BASE)
    for setting in dict.fromkeys(claim.setting for claim in theory.of(name)):
        design = DESIGNS[setting]
        own = [claim.constant for claim in theory.of(name) if claim.setting == setting]
        asked = [constant for constant in dict.fromkeys(own) if constant not in ("", "rounds")]
        base = {"client_lr": design.client_lr, **{key: _BASE[key] for key in takes}, **OWN.get(name, {})}
        constants = {"dim": dim, "clients": design.clients, **design.constants}
        if "num_steps" in map(varied, asked):
            base["num_steps"] = design.num_steps
        cases, sizes = [Case(constants, base)], [design.clients]
        for constant in asked:
            argument = varied(constant)
            for value in values_of(setting, constant):
                if argument == "clients":
                    sizes.append(int(value))
                elif argument in base:
                    cases.append(Case(constants, {**base, argument: value}))
                else:
                    cases.append(Case({**constants, argument: value}, base))
        alone = [case for place, case in enumerate(cases) if case not in cases[:place]]
        for clients in dict.fromkeys(sizes):
            one = Case({**constants, "clients": clients}, base)
            own_cases = tuple(alone) if clients == design.clients else (one,)
            found.append(Unit(name, setting, design.num_steps, clients, own_cases))
    return found


def run(study: Converge, out: Path, say: Callable[[str], None] = print) -> tuple[Converge, list[Verdict]]:
    """Measures what is not yet there of a study, and writes its report into the directory `out`.

    Returns:
      The study with the methods that have joined it in that directory, and a verdict on every claim.

    Raises:
      Interrupted: after SIGINT or SIGTERM, once the unit at work is saved. A second signal ends the process.
      Unwritable: if the directory cannot be written to; what was saved is whole.
      ValueError: if the directory holds another study, another process is at work in it, or memory does not suffice.
    """
    study = joined(study, out)
    todo = [unit for name in study.methods for unit in units(name, study.dim)]
    held = max(len(unit.cases) * unit.clients for unit in todo) * study.seeds * (2 * study.dim) * 8 * study.dim**2
    curves = max(len(unit.cases) for unit in todo) * study.seeds * 4 * study.rounds * 32
    memory.refuse("the problems of a unit", {"seeds": held, "rounds": curves}, memory.available())
    pinned = identity.keys()
    claim(study, out, pinned)
    content = json.loads(study.to_json())
    with run_directory.at_work(out, KIND, say, lambda there: {"config": content}, pinned) as work:
        measured: Measured = {}
        for place, unit in enumerate(todo):
            measured[unit.key] = _curves(study, unit, place, todo, work, say)
        verdicts = verdicts_on(study, measured)
        if work.may_write:
            with files.explain_os_errors(out, "All units are measured and saved, and the report is not"):
                write(study, verdicts, measured, out, out)
        else:
            say(f"{out} is read-only, so its report stays as it is")
    return study, verdicts


def _curves(
    study: Converge, unit: Unit, place: int, todo: Sequence[Unit], work: Work, say: Callable[[str], None]
) -> Curves:
    """The curves of a unit, measured unless they are there."""
    there = trials.load(unit.path(work.out), work.run, unit.of)
    if there is not None:
        return Curves(**there)

    def saved() -> str:
        return f"{place} of {len(todo)} units are saved"

    with files.explain_os_errors(work.out, saved):
        work.check_writable()
    if stop := work.stop():
        raise run_directory.interruption(
            stop, f"after {place} of {len(todo)} units, which are saved", study.command(work.out)
        )
    say(f"unit {place + 1} of {len(todo)}: {unit.method}, {unit.setting}, K = {unit.num_steps}, N = {unit.clients}")
    design = DESIGNS[unit.setting]
    with jax.enable_x64(True):
        found = measure(
            problems.KINDS[design.problem],
            maker(unit),
            unit.cases,
            rounds=max(64, round(study.rounds * design.share)),
            seeds=study.seeds,
            first_seed=study.first_seed,
            cohort_size=design.cohort,
            probabilities=in_turn(design.probabilities, unit.clients),
        )
    with files.explain_os_errors(work.out, saved):
        trials.save(unit.path(work.out), work.run, unit.of, found._asdict())
    return found


def in_turn(values: Sequence[float] | None, clients: int) -> list[float] | None:
    """A value for each client, or None."""
    return None if values is None else np.resize(values, clients).tolist()


def maker(unit: Unit) -> Make:
    """The method of a unit."""
    design, steps = DESIGNS[unit.setting], unit.num_steps
    own: dict[str, Any] = {}
    constants = unit.cases[0].constants
    if design.whole:
        own |= {"batch_size": 2 * constants["dim"] * constants["copies"], "order": "sequential"}
    elif not constants.get("sigma", 0):
        own |= {"order": "sequential"}  # examples of a client are equal, and nothing has to be drawn
    if unit.method == "fedzo":  # the proposition is about directions that span all
        own |= {"num_directions": constants["dim"]}
    return method(
        unit.method, num_steps=np.resize([1, steps, 2 * steps - 1], unit.clients) if design.unequal else steps, **own
    )


def joined(study: Converge, out: Path) -> Converge:
    """The study with the methods that are in `out` already: others join them and none leaves."""
    if not files.has_record(out / KIND.marker):
        return study
    there = Converge.from_values(run_directory.read(out, KIND)["config"])
    return study.replace(methods=tuple(name for name in ALL if name in {*there.methods, *study.methods}))


def claim(study: Converge, out: Path, pinned: Mapping[str, str]) -> None:
    """Makes `out` the directory of a study, or checks that it holds the same one, or one with fewer methods.

    Raises:
      ValueError: if it holds another one (with what differs), or something else.
      Unwritable: if it cannot be written to.
    """

    def check(there: Any) -> None:
        check_grown(study, Converge.from_values(there), out, _GROWS, "study", "more methods")

    run_directory.claim(out, KIND, json.loads(study.to_json()), check, pinned, "problems")


def slug(study: Converge) -> str:
    """A short readable name of a study, the same for more methods of it and for no other."""
    return f"converge-{growth.digest(study.flat(), {*_GROWS, *named(Converge, 'place', 'report')})}"


def verdicts_on(study: Converge, measured: Measured) -> list[Verdict]:
    """The verdicts on all claims about the methods of a study."""
    return [judge(study, name, each, measured) for name in study.methods for each in theory.of(name)]


def judge(study: Converge, name: str, claim: Claim, measured: Measured) -> Verdict:
    """The verdict on a claim about a method."""
    values, curves = _over(study, name, claim, measured)
    errors = [
        getattr(each, "drift" if claim.measure == "consensus" else claim.measure)[place] for each, place in curves
    ]
    if claim.constant == "rounds":
        power = fit.power(fit.running_mean(errors[0]))
        exponent, local = _negative(power), np.zeros(0)
        found: tuple[Estimate, ...] = (power,)
    else:
        estimate = {"floor": fit.floor, "rate": fit.linear_rate, "mean": fit.mean}[claim.quantity]
        found = tuple(estimate(each) for each in errors)
        if claim.exponent is None:
            floor = found[0]
            word = UNDECIDED if floor.value is None else CONTRADICTED if floor.value else CONFIRMED
            return Verdict(name, claim, word, floor, floor.why, (), found, np.zeros(0))
        exponent, local = fit.scaling(values, found)
    names, why = tuple(values.reshape(len(values), -1).mean(1)) if len(values) else (), exponent.why
    if exponent.value is None:
        zero = any(each.value == 0 for each in found)
        return Verdict(name, claim, CONTRADICTED if zero else UNDECIDED, exponent, why, names, found, local)
    low, high = _bounds(claim, study.tolerance)
    if low <= exponent.low and exponent.high <= high:
        word = CONFIRMED
    elif exponent.high < low or exponent.low > high:
        word = CONTRADICTED
    else:
        word, why = UNDECIDED, "the interval is partly within the tolerance: more rounds or seeds would tell"
    return Verdict(name, claim, word, exponent, why, names, found, local)


def _bounds(claim: Claim, tolerance: float) -> tuple[float, float]:
    """Between what an exponent must lie."""
    assert claim.exponent is not None
    low = -math.inf if claim.relation == "at most" else claim.exponent - tolerance
    return low, math.inf if claim.relation == "at least" else claim.exponent + tolerance


def _negative(found: Estimate) -> Estimate:
    if found.value is None:
        return found
    return Estimate(-found.value, -found.high, -found.low, -found.each, found.why)


def _over(study: Converge, name: str, claim: Claim, measured: Measured) -> tuple[np.ndarray, list[tuple[Curves, int]]]:
    """The values of the constant of a claim, [S] or [S, R], and for each its curves and their place in a unit."""
    design = DESIGNS[claim.setting]
    base = (design.num_steps, design.clients)
    if claim.constant in ("", "rounds"):
        return np.zeros(0), [(measured[(name, claim.setting, *base)], 0)]
    argument, values = varied(claim.constant), values_of(claim.setting, claim.constant)
    cases = next(unit.cases for unit in units(name, study.dim) if unit.key == (name, claim.setting, *base))
    first, found = cases[0], []
    for value in values:
        if argument == "clients":
            found.append((measured[(name, claim.setting, base[0], int(value))], 0))
        else:
            asked = {**first.constants, **first.hyper, argument: value}
            place = [{**case.constants, **case.hyper} for case in cases].index(asked)
            found.append((measured[(name, claim.setting, *base)], place))
    if claim.constant == "curvature":
        return np.array([_curvatures(study, design, {**first.constants, argument: value}) for value in values]), found
    made = _VARIED[claim.constant][1] if claim.constant in _VARIED else float
    return np.array([made(value) for value in values]), found


def _curvatures(study: Converge, design: Design, constants: Mapping[str, Any]) -> list[float]:
    """Of the problem of each seed."""
    with jax.enable_x64(True):
        made = [problems.KINDS[design.problem](study.first_seed + seed, **constants) for seed in range(study.seeds)]
    return [each.constants.curvature for each in made]


def again(out: Path, target: Path, say: Callable[[str], None]) -> list[str]:
    """Writes the report of the study in the directory `out` again, from its units, into `target`.

    Methods that are not done are left out.

    Returns:
      The names of the files.

    Raises:
      ValueError: if `out` holds no such study, no method is done, or a unit or claims.csv is not what was written.
    """
    record = run_directory.read(out, KIND)
    study, run_name = Converge.from_values(record["config"]), str(record.get("run", ""))
    measured: Measured = {}
    done = []
    for name in study.methods:
        own = units(name, study.dim)
        there = [trials.load(unit.path(out), run_name, unit.of, whole=True) for unit in own]
        found = {unit.key: Curves(**one) for unit, one in zip(own, there, strict=True) if one is not None}
        if len(found) == len(own):
            measured |= found
            done.append(name)
    if not done:
        raise ValueError(f"no method of the study in {out} is done, so that there is nothing to show: run it first")
    verdicts = verdicts_on(study.replace(methods=tuple(done)), measured)
    path = out / "claims.csv"
    # It is written at the end: where methods are still missing, the one that is there is of before the study grew.
    if len(done) == len(study.methods) and path.exists() and path.read_text() != table(verdicts):
        raise ValueError(
            f"{path} is not what was measured: put it back, or give the command of the study again, which writes it "
            "anew and repeats nothing that is done"
        )
    files.make_directory(target)
    return write(study.replace(methods=tuple(done)), verdicts, measured, target, out)


def write(study: Converge, verdicts: Sequence[Verdict], measured: Measured, out: Path, run: Path) -> list[str]:
    """Writes summary.html and .md, claims.csv, and the figures into `out`; returns their names.

    Args:
      study: what was measured.
      verdicts: on all claims about its methods.
      measured: all curves.
      out: where to.
      run: directory of the study, for the command that repeats it.
    """
    with figures.style():
        shown = {name: figure(study, [each for each in verdicts if each.method == name]) for name in study.methods}
        drawn = {f"{name}.png": each for name, each in shown.items() if each is not None}
        drawn |= {"curves.png": curves_figure(study, measured), "consensus.png": consensus_figure(study, measured)}
        pages.write(out, summary(study, verdicts, [name.removesuffix(".png") for name in drawn], run), drawn)
    files.write_text(out / "claims.csv", table(verdicts))
    return ["summary.html", "summary.md", "claims.csv", *drawn]


def table(verdicts: Sequence[Verdict]) -> str:
    """A row for every claim, as CSV."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for each in verdicts:
        claim, found = each.claim, each.found
        ends = ["", "", ""] if found.value is None else [found.value, found.low, found.high]
        stated = "no floor" if claim.exponent is None else f"{claim.exponent:g}"
        stated = stated if claim.relation == "equal" else f"{claim.relation} {stated}"
        writer.writerow(
            [
                each.method,
                claim.setting,
                claim.quantity,
                claim.measure,
                claim.constant,
                stated,
                *ends,
                each.word,
                each.why,
                claim.source,
            ]
        )
    return text.getvalue()


def summary(study: Converge, verdicts: Sequence[Verdict], drawn: Sequence[str], out: Path) -> str:
    """Theory beside what was measured, as Markdown."""
    count = {word: sum(each.word == word for each in verdicts) for word in WORDS}
    lines = [
        f"# Theory and measurement: {len(verdicts)} claims about {len(study.methods)} methods",
        "",
        ", ".join(f"{number} {word}" for word, number in count.items()) + ".",
        "",
        f"An exponent is fitted to each of {study.seeds} problems by itself; its interval (95 %, Student's) is that "
        f"over them. A claim is confirmed if the interval lies within {study.tolerance:g} of theory's exponent, "
        "contradicted if it lies wholly outside, and else not decided; a bound is compared on its side. Quantities are "
        "those of the squared distance to the minimizer unless others are named. Slopes between neighboring values "
        "show whether there is one power over the whole range. What is marked as exact holds at every rate, the rest "
        "to leading order for small ones.",
    ]
    against = [each for each in verdicts if each.word == CONTRADICTED]
    if against:
        lines += ["", "## Contradicted", ""]
        lines += [
            f"- {_title(each.method)}, {each.claim.setting}: {each.claim}; measured {_found(each)}" for each in against
        ]
    for name in study.methods:
        lines += ["", f"## {_title(name)}", ""]
        own = [each for each in verdicts if each.method == name]
        lines += [
            "| setting | theory | measured | between neighbors | verdict | source |",
            "| --- | --- | --- | --- | --- | --- |",
        ]
        for each in own:
            exact = " (exact)" if each.claim.exact else ""
            local = ", ".join(f"{slope:.3g}" for slope in each.local)
            lines.append(
                f"| {each.claim.setting} | {each.claim}{exact} | {_found(each)} | {local} | {each.word} | "
                f"{each.claim.source} |"
            )
        if name in drawn:
            lines += ["", f"![{_title(name)}: measured quantities beside the slopes of theory]({name}.png)"]
    lines += ["", "## Settings", ""]
    lines += [
        f"- {setting}: {SETTINGS[setting]}; {_words(design)}"
        for setting, design in DESIGNS.items()
        if any(each.claim.setting == setting for each in verdicts)
    ]
    lines += [
        *(f"- {_title(name)} with {_listed(OWN[name])}" for name in study.methods if name in OWN),
        "",
        f"Problems in {study.dim} dimensions, L = 1, `||x_0 - x*|| = 1` unless another radius is named; {study.rounds} "
        "rounds; batches of one example unless whole ones are.",
        "",
        "![Squared distance to the minimizer in the base case of each setting](curves.png)",
        "",
        "The consensus error is the mean over the participants of the squared distance between where a client's local "
        "training ends and where it began. Methods whose clients do not descend from one direction have none here.",
        "",
        "![Consensus error in the base case of each setting](consensus.png)",
        "",
        "## Once more",
        "",
        "```",
        study.command(out),
        "```",
        "",
    ]
    return "\n".join(lines)


def _listed(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} = {value:g}" for name, value in values.items())


def _title(name: str) -> str:
    return methods.paper_name(name)


def _words(design: Design) -> str:
    steps = f"1, {design.num_steps} and {2 * design.num_steps - 1} in turn" if design.unequal else f"{design.num_steps}"
    real = {name: value for name, value in design.constants.items() if not isinstance(value, str | int)}
    words = [
        _listed(real),
        f"{design.share:g} of the rounds",
        f"lr = {design.client_lr:g}",
        f"K = {steps}",
        f"N = {design.clients}",
    ]
    if design.probabilities is not None:
        words.append(f"probabilities {', '.join(f'{value:g}' for value in design.probabilities)} in turn")
    return ", ".join(words)


def _found(each: Verdict) -> str:
    if each.found.value is None:
        return f"no number: {each.why}"
    if each.claim.exponent is None and each.found.value == 0:
        return "comes to rounding"
    return str(each.found) + (f"; {each.why}" if each.word == UNDECIDED else "")


def figure(study: Converge, verdicts: Sequence[Verdict]) -> Figure | None:
    """Quantities of a method over constants, a panel for each claim, beside lines with the slopes of theory."""
    shown = [each for each in verdicts if each.values and all(one.value for one in each.quantities)]
    if not shown:
        return None
    columns = min(4, len(shown))
    rows = -(-len(shown) // columns)
    drawn = Figure(figsize=(3.1 * columns, 2.8 * rows), layout="constrained")
    axes = np.atleast_1d(drawn.subplots(rows, columns)).ravel()
    for axis, each in zip(axes, shown, strict=False):
        at, each_seed = np.asarray(each.values), np.stack([one.each for one in each.quantities])
        middle = np.exp(np.log(each_seed).mean(1))
        axis.plot(at, each_seed, color="#bbbbbb", linewidth=0.8)
        axis.plot(at, middle, "o-", color=figures.COLORS[0], label="measured")
        center = np.exp(np.mean(np.log(middle))), np.exp(np.mean(np.log(at)))
        line = center[0] * (at / center[1]) ** each.claim.exponent
        axis.plot(at, line, "--", color=figures.COLORS[1], label="slope of theory")
        axis.set(
            xscale="log",
            yscale="log",
            xlabel=each.claim.constant,
            ylabel=f"{each.claim.quantity}, {each.claim.measure}",
        )
        axis.set_xticks(at, [f"{value:.3g}" for value in at])
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_title(f"{each.claim.setting}: {each.word}", fontsize=9)
    for axis in axes[len(shown) :]:
        axis.set_visible(False)
    figures.legend_below(drawn, *axes[: len(shown)])
    figures.title(drawn, f"{_title(shown[0].method)}, {study.seeds} problems")
    return drawn


def curves_figure(study: Converge, measured: Measured) -> Figure:
    """Squared distance over rounds in the base case, a panel for each setting, geometric means over seeds."""
    return _base_cases(study, measured, lambda curves: curves.distance, "||x - x*||^2")


def consensus_figure(study: Converge, measured: Measured) -> Figure:
    """Consensus error over rounds in the base case, of the methods whose clients descend by `local_descent`."""
    return _base_cases(study, measured, lambda curves: curves.drift, "mean ||y_i - x||^2")


def _base_cases(study: Converge, measured: Measured, errors: Callable[[Curves], np.ndarray], label: str) -> Figure:
    settings = [name for name in DESIGNS if any(key[1] == name for key in measured)]
    columns = min(4, len(settings))
    rows = -(-len(settings) // columns)
    drawn = Figure(figsize=(3.3 * columns, 2.8 * rows + 0.4), layout="constrained")
    axes = np.atleast_1d(drawn.subplots(rows, columns)).ravel()
    for axis, setting in zip(axes, settings, strict=False):
        design = DESIGNS[setting]
        for place, name in enumerate(study.methods):
            key = (name, setting, design.num_steps, design.clients)
            if key in measured and np.isfinite(base := errors(measured[key])[0]).all():
                middle = np.exp(np.log(np.maximum(base, 1e-32)).mean(0))
                axis.plot(middle, label=_title(name), **figures.look(place))
        axis.set(yscale="log", xlabel="round", title=setting)
    for axis in axes[len(settings) :]:
        axis.set_visible(False)
    for place in range(0, len(settings), columns):
        axes[place].set_ylabel(label)
    figures.legend_below(drawn, *axes[: len(settings)])
    return drawn
