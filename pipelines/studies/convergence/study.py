"""Theory beside measurement: every claim about a method is confirmed, contradicted, or not decided.

    fedjax-core converge --method fedavg --method scaffold --out runs/theory

Claims are data beside the methods (`algorithms.theory`). Each holds in a setting, for which `DESIGNS` says what is
measured: quadratics of known constants, a base case, and for each constant the values that it takes while all others
stay. Cases that differ in real numbers are one compiled program, a unit, which is saved when it is done, so that the
same command goes on where it was stopped; more methods may join. What comes out: summary.html and summary.md,
claims.csv, a figure for each method and curves.png, each figure as .pdf too.

A verdict takes the 95 % interval of an exponent over the seeds, and that of theory's exponent plus and minus the
tolerance: confirmed if the first lies within the second, contradicted if they are apart, and else not decided. That
there is no floor is confirmed if the error comes to rounding, and contradicted if it stays at a plateau above it.
"""

import csv
import io
import json
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
from pipelines.studies.convergence.fit import Estimate, Scaling
from pipelines.studies.convergence.measure import Case, Curves, Make, measure, method

KIND = Kind("converge", Converge.from_values, "study.json", "unit")

CONFIRMED, CONTRADICTED, UNDECIDED = "confirmed", "contradicted", "not decided"
WORDS = (CONFIRMED, CONTRADICTED, UNDECIDED)

_GROWS = {"methods": growth.contains}


class Design(NamedTuple):
    """What is measured in a setting.

    Attributes:
      constants: of the problem in the base case.
      num_steps: K there.
      clients: N there.
      client_lr: there.
      values: constant to the values that it takes, of problem and methods; num_steps too means K.
      cohort: clients that take part in a round, or None for all.
      unequal: whether clients take 1, K and 2 K - 1 steps in turn.
    """

    constants: Mapping[str, Any]
    num_steps: int
    clients: int
    client_lr: float
    values: Mapping[str, tuple[float, ...]]
    cohort: int | None = None
    unequal: bool = False


_OF_METHODS = {"beta": (0.25, 0.5, 1.0), "mu": (0.1, 0.3, 1.0)}
_BASE = {"beta": 0.5, "mu": 0.3}
"""What these are in the base case of a method that has a claim about them."""
OWN: Mapping[str, Mapping[str, float]] = {"feddyn": {"alpha": 0.5}}
"""Hyper-parameters of methods other than their defaults.

The linear terms of FedDyn are forgotten by 1 - lr K alpha in a round: with its default of 0.1 it has not come to
rounding after 4,000 rounds.
"""

# Rates are small where leading terms are asked for, and large where noise has to be averaged over rounds.
DESIGNS: Mapping[str, Design] = {
    "drift": Design(
        {"hessians": "different", "convexity": 0.2, "zeta": 0.01},
        5,
        6,
        0.02,
        {"zeta": (0.001, 0.01, 0.1), "client_lr": (0.01, 0.02, 0.04), "num_steps": (2, 5, 9), **_OF_METHODS},
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
        0.05,
        {"zeta": (0.001, 0.01, 0.1), "client_lr": (0.025, 0.05, 0.1)},
        cohort=3,
    ),
    "unequal": Design(
        {"hessians": "different", "convexity": 0.2, "zeta": 0.01},
        3,
        6,
        0.02,
        {"zeta": (0.001, 0.01, 0.1), "client_lr": (0.01, 0.02, 0.04)},
        unequal=True,
    ),
}


class Unit(NamedTuple):
    """Cases of a method that are one compiled program.

    Attributes:
      method: its name.
      setting: of `DESIGNS`.
      num_steps: K.
      clients: N.
      cases: the settings; the first is the base case, but for K and N.
    """

    method: str
    setting: str
    num_steps: int
    clients: int
    cases: tuple[Case, ...]

    @property
    def of(self) -> dict[str, Any]:
        """What tells it from others, for its file."""
        cases = [{"constants": dict(case.constants), "hyper": dict(case.hyper)} for case in self.cases]
        own = {name: getattr(self, name) for name in ("method", "setting", "num_steps", "clients")}
        return {**own, "cases": growth.digest({"cases": cases})}

    @property
    def key(self) -> tuple[str, str, int, int]:
        """Its place among what was measured."""
        return self.method, self.setting, self.num_steps, self.clients

    def path(self, out: Path) -> Path:
        """Its file."""
        return out / "curves" / f"{self.method}-{self.setting}-{self.num_steps}-{self.clients}.npz"


class Verdict(NamedTuple):
    """What has come of a claim.

    Attributes:
      method: the method that it is about.
      claim: the claim.
      word: `CONFIRMED`, `CONTRADICTED` or `UNDECIDED`.
      found: the exponent; or the floor, of a claim that there is none.
      why: the reason of a verdict that is not decided, in words; what tells against a claim beside the interval.
      values: of the constant.
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


def units(name: str, dim: int) -> list[Unit]:
    """Everything that is measured for the claims about a method."""
    found = []
    takes = {claim.constant for claim in theory.of(name)} & set(_BASE)
    for setting in dict.fromkeys(claim.setting for claim in theory.of(name)):
        design = DESIGNS[setting]
        asked = {claim.constant for claim in theory.of(name) if claim.setting == setting}
        base = {"client_lr": design.client_lr, **{key: _BASE[key] for key in takes}, **OWN.get(name, {})}
        constants = {"dim": dim, "clients": design.clients, **design.constants}
        cases = [Case(constants, base)]
        for constant in (key for key in design.values if key in asked):
            for value in design.values[constant]:
                if constant in base and value != base[constant]:
                    cases.append(Case(constants, {**base, constant: value}))
                elif constant in constants and constant != "clients" and value != constants[constant]:
                    cases.append(Case({**constants, constant: value}, base))
        found.append(Unit(name, setting, design.num_steps, design.clients, tuple(cases)))
        if asked & {"num_steps", "num_steps - 1"}:
            for steps in design.values["num_steps"]:
                if steps != design.num_steps:
                    found.append(Unit(name, setting, int(steps), design.clients, (cases[0],)))
        if "clients" in asked:
            for clients in design.values["clients"]:
                if clients != design.clients:
                    alone = Case({**constants, "clients": int(clients)}, base)
                    found.append(Unit(name, setting, design.num_steps, int(clients), (alone,)))
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
    curves = max(len(unit.cases) for unit in todo) * study.seeds * study.rounds * 32
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
    with jax.enable_x64(True):
        found = measure(
            problems.quadratic,
            maker(unit),
            unit.cases,
            rounds=study.rounds,
            seeds=study.seeds,
            first_seed=study.first_seed,
            cohort_size=DESIGNS[unit.setting].cohort,
        )
    with files.explain_os_errors(work.out, saved):
        trials.save(unit.path(work.out), work.run, unit.of, found._asdict())
    return found


def maker(unit: Unit) -> Make:
    """The method of a unit."""
    steps = unit.num_steps
    if DESIGNS[unit.setting].unequal:
        in_turn = np.resize([1, steps, 2 * steps - 1], unit.clients)
        return method(unit.method, num_steps=in_turn)
    return method(unit.method, num_steps=steps)


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

    run_directory.claim(out, KIND, json.loads(study.to_json()), check, pinned, "quadratics")


def slug(study: Converge) -> str:
    """A short readable name of a study, the same for more methods of it and for no other."""
    return f"converge-{growth.digest(study.flat(), {*_GROWS, *named(Converge, 'place', 'report')})}"


def verdicts_on(study: Converge, measured: Measured) -> list[Verdict]:
    """The verdicts on all claims about the methods of a study."""
    return [judge(study, name, each, measured) for name in study.methods for each in theory.of(name)]


def judge(study: Converge, name: str, claim: Claim, measured: Measured) -> Verdict:
    """The verdict on a claim about a method."""
    values, curves = _over(name, claim, study.dim, measured)
    estimate = fit.floor if claim.quantity == "floor" else fit.linear_rate
    found = tuple(estimate(each.distance[place]) for each, place in curves)
    if claim.exponent is None:
        floor = found[0]
        word = UNDECIDED if floor.value is None else CONTRADICTED if floor.value else CONFIRMED
        return Verdict(name, claim, word, floor, floor.why, (), found, np.zeros(0))
    at = [value - 1 if claim.constant == "num_steps - 1" else value for value in values]
    law: Scaling = fit.scaling(at, found)
    exponent, why = law.exponent, law.exponent.why
    if exponent.value is None:
        zero = any(each.value == 0 for each in found)
        return Verdict(name, claim, CONTRADICTED if zero else UNDECIDED, exponent, why, tuple(at), found, law.local)
    low, high = claim.exponent - study.tolerance, claim.exponent + study.tolerance
    if low <= exponent.low and exponent.high <= high:
        word = CONFIRMED
    elif exponent.high < low or exponent.low > high:
        word = CONTRADICTED
    else:
        word, why = UNDECIDED, "the interval is partly within the tolerance: more rounds or seeds would tell"
    return Verdict(name, claim, word, exponent, why, tuple(at), found, law.local)


def _over(name: str, claim: Claim, dim: int, measured: Measured) -> tuple[tuple[float, ...], list[tuple[Curves, int]]]:
    """The values of the constant of a claim, and for each its curves and their place in a unit."""
    design = DESIGNS[claim.setting]
    of = {(u.num_steps, u.clients): u for u in units(name, dim) if u.setting == claim.setting}
    base = (design.num_steps, design.clients)
    if not claim.constant:
        return (), [(measured[(name, claim.setting, *base)], 0)]
    constant = claim.constant.removesuffix(" - 1")
    values = design.values[constant]
    found = []
    for value in values:
        if constant == "num_steps":
            found.append((measured[(name, claim.setting, int(value), base[1])], 0))
        elif constant == "clients":
            found.append((measured[(name, claim.setting, base[0], int(value))], 0))
        else:
            first = of[base].cases[0]
            wanted = [
                place
                for place, case in enumerate(of[base].cases)
                if {**case.constants, **case.hyper} == {**first.constants, **first.hyper, constant: value}
            ]
            found.append((measured[(name, claim.setting, *base)], wanted[0]))
    return values, found


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
        drawn["curves.png"] = curves_figure(study, measured)
        pages.write(out, summary(study, verdicts, [name.removesuffix(".png") for name in drawn], run), drawn)
    files.write_text(out / "claims.csv", table(verdicts))
    return ["summary.html", "summary.md", "claims.csv", *drawn]


def table(verdicts: Sequence[Verdict]) -> str:
    """A row for every claim, as CSV."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["method", "setting", "quantity", "constant", "theory", "measured", "low", "high", "verdict", "why", "source"]
    )
    for each in verdicts:
        claim, found = each.claim, each.found
        ends = ["", "", ""] if found.value is None else [found.value, found.low, found.high]
        stated = "no floor" if claim.exponent is None else f"{claim.exponent:g}"
        writer.writerow(
            [
                each.method,
                claim.setting,
                claim.quantity,
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
        "contradicted if it lies wholly outside, and else not decided. Quantities are those of `||x - x*||^2`. Slopes "
        "between neighboring values show whether there is one power over the whole range. What is marked as exact "
        "holds at every rate, the rest to leading order for small ones.",
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
        f"Quadratics in {study.dim} dimensions, L = 1, `||x_0 - x*|| = 1`, {study.rounds} rounds; batches of one "
        "example.",
        "",
        "![Squared distance to the minimizer in the base case of each setting](curves.png)",
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
    steps = f"1, {design.num_steps} and {2 * design.num_steps - 1} in turn" if design.unequal else design.num_steps
    return (
        f"mu = {design.constants['convexity']:g}, zeta = {design.constants['zeta']:g}, sigma = "
        f"{design.constants.get('sigma', 0):g}, lr = {design.client_lr:g}, K = {steps}, N = {design.clients}"
    )


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
        axis.set(xscale="log", yscale="log", xlabel=each.claim.constant, ylabel=each.claim.quantity)
        axis.set_xticks(at, [f"{value:g}" for value in at])
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_title(f"{each.claim.setting}: {each.word}", fontsize=9)
    for axis in axes[len(shown) :]:
        axis.set_visible(False)
    figures.legend_below(drawn, *axes[: len(shown)])
    figures.title(drawn, f"{_title(shown[0].method)}, {study.seeds} problems")
    return drawn


def curves_figure(study: Converge, measured: Measured) -> Figure:
    """Squared distance over rounds in the base case, a panel for each setting, geometric means over seeds."""
    settings = [name for name in DESIGNS if any(key[1] == name for key in measured)]
    drawn = Figure(figsize=(3.3 * len(settings), 3.2), layout="constrained")
    axes = np.atleast_1d(drawn.subplots(1, len(settings))).ravel()
    for axis, setting in zip(axes, settings, strict=True):
        design = DESIGNS[setting]
        for place, name in enumerate(study.methods):
            key = (name, setting, design.num_steps, design.clients)
            if key in measured:
                errors = np.maximum(measured[key].distance[0], 1e-32)
                axis.plot(np.exp(np.log(errors).mean(0)), label=_title(name), **figures.look(place))
        axis.set(yscale="log", xlabel="round", title=setting)
    axes[0].set_ylabel("||x - x*||^2")
    figures.legend_below(drawn, *axes)
    return drawn
