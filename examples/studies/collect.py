"""Puts what a run has come to into this folder: results/STUDY.json with its curve, and the tables of README.md.

    fedjax-core train --config examples/studies/mnist_logistic.toml --out runs/mnist_logistic
    python examples/studies/collect.py mnist_logistic runs/mnist_logistic

A run is one of a study if it has the study's choices but for fewer rounds, seeds or methods, which are told as what
they are, and for how the machine was used. Without arguments the tables are written again.
"""

import argparse
import csv
import json
import re
import shutil
import sys
import tomllib
from pathlib import Path

import numpy as np

from pipelines import Config
from pipelines.configuration import config_file, methods
from pipelines.run import train

HERE = Path(__file__).resolve().parent
PAGE = HERE / "README.md"
RESULTS = HERE / "results"
FREE = ("rounds", "seeds", "methods", "settings", "checkpoint_every")
_MARK = re.compile(r"(<!-- study: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def studies() -> list[str]:
    """Names of the configuration files."""
    return sorted(path.stem for path in HERE.glob("*.toml") if path.stem != "published")


def planned(study: str) -> Config:
    """The configuration of a study.

    Raises:
      ValueError: if there is no such study.
    """
    if study not in studies():
        raise ValueError(f"there is no study {study!r}: there are {', '.join(studies())}")
    return Config(**config_file.read(HERE / f"{study}.toml"))


def published() -> dict[str, dict]:
    """Study to "source", "figures" (method to text) and, unless it is the accuracy, "measure"."""
    return tomllib.loads((HERE / "published.toml").read_text())


def check(study: str, done: Config) -> None:
    """Raises ValueError unless a run of this configuration is one of the study, or a part of it."""
    plan = planned(study)
    wrong = {name: pair for name, pair in done.differences(plan).items() if name not in FREE}
    wrong |= {m: (m, plan.methods) for m in done.methods if m not in plan.methods}
    wrong |= {
        name: (getattr(done, name), getattr(plan, name))
        for name in ("rounds", "seeds")
        if getattr(done, name) > getattr(plan, name)
    }
    for method in set(done.methods) & set(plan.methods):
        ours, theirs = ({**config.client_settings(method), **config.method_settings(method)} for config in (done, plan))
        if ours != theirs:
            wrong[f"settings of {method}"] = (ours, theirs)
    if wrong:
        listed = "; ".join(f"{name} is {here!r} and {there!r} in the study" for name, (here, there) in wrong.items())
        raise ValueError(f"the run is not one of {study}: {listed}")


def collected(study: str, run: Path) -> dict:
    """What a finished run has come to, as JSON values.

    Raises:
      ValueError: if it is not a finished run of the study.
    """
    done = train.read_config(run)
    check(study, done)
    if not (run / "summary.json").exists():
        raise ValueError(f"{run} has no summary.json: let it come to its end, or give fedjax-core report {run}")
    plan, summary = planned(study), json.loads((run / "summary.json").read_text())
    identity = json.loads((run / "config.json").read_text())["identity"]
    curves: dict[str, dict[int, list[float]]] = {}
    with (run / "metrics.csv").open() as file:
        for row in csv.DictReader(file):
            if row["test_accuracy"]:
                of_method = curves.setdefault(row["method"], {})
                of_method.setdefault(int(row["round"]), []).append(float(row["test_accuracy"]))
    found = {}
    for method in done.methods:
        curve = {at: values for at, values in sorted(curves.get(method, {}).items()) if len(values) == done.seeds}
        if done.rounds not in curve:  # not at its end yet
            continue
        finals = [summary[method]["seeds"][str(seed)]["test_accuracy"] for seed in range(done.seeds)]
        found[method] = {
            "accuracy": [round(each, 6) for each in finals],
            "rounds_to_target": [summary[method]["seeds"][str(s)]["rounds_to_target"] for s in range(done.seeds)],
            "curve": [[at, round(float(np.mean(v)), 6), round(_deviation(v), 6)] for at, v in curve.items()],
        }
    if not found:
        raise ValueError(f"no method of {run} has come to its end: let one run to the last round")
    return {
        "study": study,
        "rounds": done.rounds,
        "rounds_of_the_study": plan.rounds,
        "seeds": done.seeds,
        "seeds_of_the_study": plan.seeds,
        "target": done.report.target,
        "examples": identity["examples"],
        "clients": identity["clients"],
        "methods": found,
    }


def table(study: str) -> list[str]:
    """Lines of Markdown: published figures beside those of the run that was collected, if one was."""
    said, path = published()[study], RESULTS / f"{study}.json"
    found = json.loads(path.read_text()) if path.exists() else {"methods": {}}
    in_rounds = said.get("measure") == "rounds"
    unit = f"rounds to {100 * planned(study).report.target:g} %" if in_rounds else "test accuracy"
    rows = []
    for method in planned(study).methods:
        own = found["methods"].get(method)
        here = "not run" if own is None else _rounds(own) if in_rounds else _percent(own["accuracy"])
        rows.append([methods.paper_name(method), said["figures"].get(method, "none"), here])
    lines = [f"| method | published {unit} | here |", "| --- | --- | --- |"]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    if found["methods"]:
        of = found["rounds"], found["rounds_of_the_study"], found["seeds"], found["seeds_of_the_study"]
        lines += ["", "Run: {} of {} rounds, {} of {} seeds (mean ± standard deviation).".format(*of)]
        if (RESULTS / f"{study}.png").exists():
            lines += ["", f"![Test accuracy and training loss against rounds](results/{study}.png)"]
    return [*lines, "", f"Published: {said['source']}."]


def renewed(text: str) -> str:
    """A page with its tables as the results are now."""
    return _MARK.sub(lambda mark: mark[1] + "\n".join(table(mark[2])) + "\n" + mark[3], text)


def _percent(values: list[float]) -> str:
    known = 100 * np.asarray(values)
    return f"{known.mean():.2f} ± {known.std(ddof=1):.2f}" if len(known) > 1 else f"{known[0]:.2f}"


def _rounds(own: dict) -> str:
    reached = [each for each in own["rounds_to_target"] if each is not None]
    if not reached:
        return "not reached"
    missed = len(own["rounds_to_target"]) - len(reached)
    return f"{np.mean(reached):.0f}" + (f" ({missed} of {missed + len(reached)} seeds not)" if missed else "")


def _deviation(values: list[float]) -> float:
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def main() -> None:
    """Parses the command line, and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", nargs="?", help="name of a configuration file of this folder")
    parser.add_argument("run", nargs="?", type=Path, help="directory of its run")
    options = parser.parse_args()
    if (options.study is None) != (options.run is None):
        parser.error("give a study and the directory of its run, or nothing")
    if options.study is not None:
        try:
            result = collected(options.study, options.run)
        except ValueError as error:
            parser.error(str(error))
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{options.study}.json").write_text(json.dumps(result, indent=1) + "\n")
        whole = list(result["methods"]) == list(planned(options.study).methods)
        if whole and (options.run / "curves.png").exists():
            shutil.copy(options.run / "curves.png", RESULTS / f"{options.study}.png")
        else:  # an older figure would show another run
            (RESULTS / f"{options.study}.png").unlink(missing_ok=True)
    PAGE.write_text(renewed(PAGE.read_text()))
    print(f"written: {PAGE}", file=sys.stdout)


if __name__ == "__main__":
    main()
