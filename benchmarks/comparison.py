"""All methods on one problem: Fashion-MNIST, unequal mixes of labels, every method with learning rates of its own.

    python -m benchmarks.comparison                   # all of it, 50 minutes on two cores; goes on where it was
    python -m benchmarks.comparison --only fedavg scaffold --models logistic_regression --alphas 0.1
    python -m benchmarks.comparison --draw            # the tables and figures again from what is there

Four settings: multinomial logistic regression and an MLP, 100 clients by Dirichlet(0.1) and Dirichlet(0.5), 10 of them
a round. Each method chooses its learning rates from the same grid by a sweep (`pipelines.studies.sweep`): client rates
times factors on its server rate, judged by the accuracy on examples that the clients hold back. Then three other seeds
run with these rates, as `fedjax-core train` does it. Every setting has a process and a core of its own. The directories
of sweeps and runs stay in runs/comparison; results/comparison.json and .md have the choices, the curves and the tables,
and docs/methods/figures a picture for each page.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import _measure
from pipelines.common import figures
from pipelines.configuration import methods
from pipelines.configuration.config import Config
from pipelines.experiment import setup
from pipelines.results.history import evaluated_rounds
from pipelines.run import train
from pipelines.studies import sweep
from pipelines.studies.sweep_config import Sweep

MODELS = {"logistic_regression": 0.78, "mlp": 0.80}
"""Model to the test accuracy for which rounds are counted."""
TITLES = {"logistic_regression": "logistic regression", "mlp": "perceptron"}
ALPHAS = (0.1, 0.5)

RATES = (0.01, 0.03, 0.1, 0.3, 1.0)  # of the clients
FACTORS = (0.3, 1.0, 3.0)  # on the method's own server rate
TUNING_ROUNDS, TUNING_SEED = 20, 1000
EVAL_EVERY = 5

SETTINGS: dict[str, dict[str, Any]] = {
    # Anarchic clients send steps, of which a local epoch has about eleven.
    "afa_cd": {"server_lr": 10.0},
    "afa_cs": {"server_lr": 10.0},
    # Explorations of 10 epochs by all clients, and attacks of 3 steps: their defaults cost 15 and 3 times as much.
    "autoflip": {"explore_epochs": 10, "patience": 5},
    "fedlex": {"explore_epochs": 10, "patience": 5},
    "fal": {"attack_steps": 3, "step_size": 0.05},
}
"""Where a method does not have its defaults."""

LEFT_OUT = {
    "apfl": "is FedAvg, and every client's own model beside it",
    "ditto": "is FedAvg, and every client's own model beside it",
    "fedagain": "distrusts clients that differ",
    "fedavg_ipw": "is FedAvg where all clients are equally likely",
    "local_sgd": "is FedAvg without a server rate",
    "fedopt": "has no server optimizer of its own: see FedAdagrad, FedAdam and FedYogi",
    "fedavg_ft": "is FedAvg, and every client's own model beside it",
    "fedbn": "keeps normalizations at home, of which these models have none",
    "ccvr": "is FedAvg, whose head is calibrated at the end",
    "fedetf": "balances the classes of each client, and is tuned to it",
    "fedgela": "is for clients that lack classes, and scales them for each",
    "fedloge": "is for long tails, and makes heads for each client",
    "fedrod": "balances the classes of each client, and makes a head for each",
    "fedper": "makes a model for each client: the global one has no trained head",
    "fedrep": "makes a model for each client: the global one has no trained head",
    "ifca": "makes several models",
    "cfl": "makes several models",
    "ocfl": "makes several models",
    "pfedme": "makes a model for each client: the global one is a center for them",
    "lg_fedavg": "makes a model for each client: the global one has no trained representation",
    "local_only": "makes a model for each client, and no global one",
    "per_fedavg": "makes a start for models of each client",
    "feddf": "needs public data",
    "fedgh": "has clients that differ in architecture",
    "frl": "trains no weights: it chooses among fixed ones",
    "fot": "is for a sequence of tasks; during the first it is FedAvg",
    "ewc": "is for a sequence of tasks; during the first it is FedAvg",
    "fedzo": "sees no gradients",
    "fedprox_zo": "sees no gradients",
    "scaffold_zo": "sees no gradients",
    "fzoos": "sees no gradients",
}
METHODS = [name for name in methods.names() if name not in LEFT_OUT]

PAGES = {
    "momentum": ["fedavg_m", "fedavg_m_vr", "scaffold_m", "scaffold_m_vr"],
    "anarchic": ["afa_cd", "afa_cs"],
    "fedstale": ["fedstale", "fedvarp"],
    "mime": ["mime", "mimelite"],
}
"""Pages of several methods; the others have the name of theirs."""


def federation_and_work(model: str) -> dict[str, Any]:
    """What the search for rates and the final runs have in common."""
    return {
        "dataset": "fashion_mnist",
        "clients": 100,
        "min_size": 10,
        "validation_share": 0.1,
        "cohort_size": 10,
        "model": model,
        "hidden": (50,),
        "batch_size": 50,
        "epochs": 1,
        "eval_every": EVAL_EVERY,
    }


def configuration(model: str, alpha: float, rounds: int, chosen: dict[str, dict[str, Any]]) -> Config:
    """The final runs: a method to its settings."""
    return Config(
        **federation_and_work(model),
        alpha=alpha,
        rounds=rounds,
        checkpoint_every=rounds,
        seeds=3,
        target=MODELS[model],
        methods=tuple(chosen),
        settings=chosen,
    )


def grid(name: str) -> dict[str, tuple[float, ...]]:
    """The values of a method's rates; one without a server rate has the clients' alone."""
    settings = methods.settings_of(name, SETTINGS.get(name, {}))
    found = {"client_lr": RATES}
    if "server_lr" in settings:
        found["server_lr"] = tuple(round(factor * settings["server_lr"], 6) for factor in FACTORS)
    return found


def choices(name: str) -> list[dict[str, float]]:
    """All points of the grid of a method."""
    values = grid(name)
    return [dict(zip(values, point, strict=True)) for point in itertools.product(*values.values())]


def search(model: str, alpha: float, name: str) -> Sweep:
    """The search for the rates of a method, on a seed that is not used again."""
    fixed = {key: value for key, value in SETTINGS.get(name, {}).items() if key not in grid(name)}
    return Sweep(
        **federation_and_work(model),
        alpha=alpha,
        rounds=TUNING_ROUNDS,
        seeds=1,
        first_seed=TUNING_SEED,
        methods=(name,),
        settings={name: fixed} if fixed else {},
        grid={name: grid(name)},
    )


def tune(asked: Sweep, name: str, out: Path) -> list[float]:
    """Accuracy on held-back examples for every choice, the mean of the last three evaluations; NaN if it diverged."""
    _, trials = sweep.run(asked, out, say=lambda line: None)
    found = {
        frozenset(trial.setting.values.items()): sweep.score(curves, "accuracy") for trial, curves in trials.items()
    }
    return [found[frozenset(choice.items())] for choice in choices(name)]


def study(model: str, alpha: float, rounds: int, names: list[str], out: Path) -> None:
    """Tunes and runs every method of one setting; what is there is not done again."""
    federation = None
    for name in names:
        path = out / name / "study.json"
        if path.exists():
            continue
        begin = time.perf_counter()
        fixed = SETTINGS.get(name, {})
        result: dict[str, Any] = {}
        try:
            scores = tune(search(model, alpha, name), name, out / name / "search")
            best = int(np.argmax(np.nan_to_num(scores, nan=-1)))
            chosen = choices(name)[best]
            result |= {"choices": choices(name), "scores": scores, "chosen": chosen}
            config = configuration(model, alpha, rounds, {name: fixed | chosen})
            federation = federation or setup.federate(config)
            history = train.run(setup.prepare(config, federation), out / name / "run")[name].history
            curves = history["test/accuracy"].astype(np.float64)
            own = {key: value for key, value in history.items() if key.startswith("test/") and key != "test/loss"}
            result |= {
                "command": config.command(f"runs/{name}"),
                "accuracy": curves.round(4).tolist(),
                "own": {key[5:]: np.round(value[:, -1].astype(float), 4).tolist() for key, value in own.items()},
                "down": round(float(history["round/bytes_down"][0, -1])),
                "up": round(float(history["round/bytes_up"][0, -1])),
            }
        except (train.Diverged, ValueError) as error:
            result["error"] = str(error).splitlines()[0]  # what comes after names folders
        result["seconds"] = time.perf_counter() - begin
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result))
        what = result.get("error") or f"{result['chosen']} {100 * np.mean(result['accuracy'], 0)[-1]:.1f} %"
        print(f"{model} {alpha:g} {name}: {what}, {result['seconds']:.0f} s", flush=True)
        jax.clear_caches()  # programs of other methods are not needed any more


def label(model: str, alpha: float) -> str:
    return f"{model}, alpha {alpha:g}"


def rounds_to(target: float, curves: np.ndarray, rounds: int) -> list[int | None]:
    """The first evaluated round of each seed that reaches the target, None for a seed that does not."""
    reached = curves >= target
    return [int(evaluated_rounds(rounds, EVAL_EVERY)[row.argmax()]) if row.any() else None for row in reached]


def tables(result: dict[str, Any]) -> str:
    """A table for each setting, best first, as Markdown."""
    lines = []
    for name, setting in result["settings"].items():
        model = setting["model"]
        lines += [
            f"### {name}",
            "",
            f"| method | test accuracy, % (mean ± s.d. of 3 seeds) | rounds to {100 * MODELS[model]:g} % | client rate "
            "| server rate | bytes down, up |",
            "| --- | --: | --: | --: | --: | --: |",
        ]
        done = {m: r for m, r in setting["methods"].items() if "error" not in r}
        for method, r in sorted(done.items(), key=lambda item: -final(item[1]).mean()):
            values = 100 * final(r)
            reached = rounds_to(MODELS[model], np.array(r["accuracy"]), result["rounds"])
            found = [str(n) if n is not None else "-" for n in reached]
            rates = [edge(r, rate) for rate in ("client_lr", "server_lr")]
            row = [
                method,
                f"{values.mean():.1f} ± {values.std(ddof=1):.1f}",
                ", ".join(found),
                *rates,
                f"{r['down']:,}, {r['up']:,}",
            ]
            lines.append(f"| {' | '.join(row)} |")
        for method, r in setting["methods"].items():
            if "error" in r:
                lines.append(f"| {method} | {r['error'].splitlines()[0]} | | | | |")
        lines.append("")
    return "\n".join(lines)


def final(r: dict[str, Any]) -> np.ndarray:
    """Accuracy of each seed at the end: the mean of the last three evaluations, since single ones jump about."""
    return np.array(r["accuracy"])[:, -3:].mean(1)


def edge(r: dict[str, Any], rate: str) -> str:
    """The chosen rate, with a star at an end of the grid."""
    if rate not in r["chosen"]:
        return ""
    tried = [choice[rate] for choice in r["choices"]]
    return f"{r['chosen'][rate]:g}" + ("*" if r["chosen"][rate] in (min(tried), max(tried)) else "")


def draw(result: dict[str, Any], pages_folder: Path) -> None:
    """A picture for each page of a method that shows one: it and FedAvg, where clients differ most."""
    from matplotlib.figure import Figure

    folder = pages_folder / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    shown = {name: s for name, s in result["settings"].items() if s["alpha"] == min(ALPHAS)}
    pages = {method: page for page, several in PAGES.items() for method in several}
    names = dict.fromkeys(method for s in shown.values() for method in s["methods"])
    x = evaluated_rounds(result["rounds"], EVAL_EVERY)
    for page in dict.fromkeys(pages.get(name, name) for name in names):
        text = pages_folder / f"{page}.md"
        if not text.exists() or f"figures/{page}.png" not in text.read_text():
            continue
        several = PAGES.get(page, [page])
        with figures.style():
            figure = Figure(figsize=(6.4, 2.5), layout="constrained")
            axes = figure.subplots(1, len(shown), squeeze=False)[0]
            for axis, setting in zip(axes, shown.values(), strict=True):
                lines = ["fedavg", *(m for m in several if m != "fedavg")]
                for i, method in enumerate(lines):
                    r = setting["methods"].get(method, {"error": "was not run"})
                    if "error" in r:
                        continue
                    curves = 100 * np.array(r["accuracy"])
                    color = "#888888" if method == "fedavg" else figures.COLORS[i - 1]
                    axis.plot(x, curves.mean(0), color=color, label=methods.paper_name(method), linewidth=1.5)
                    axis.fill_between(x, curves.min(0), curves.max(0), color=color, alpha=0.15, linewidth=0)
                best = max(np.max(r["accuracy"]) for r in setting["methods"].values() if "error" not in r)
                title = f"{TITLES[setting['model']]}, alpha {setting['alpha']:g}"
                axis.set(title=title, xlabel="round", xlim=(0, x[-1]), ylim=(100 * best - 35, 100 * best + 1))
                axis.title.set_fontsize(9)
            axes[0].set_ylabel("test accuracy, %")
            figures.legend_below(figure, *axes, columns=3)
            figures.write(folder / f"{page}.png", figure)


def collect(out: Path, args: argparse.Namespace) -> dict[str, Any]:
    """What all settings have found so far."""
    result: dict[str, Any] = {
        "machine": _measure.machine(),
        "rounds": args.rounds,
        "tuning": {"client_lr": RATES, "factors": FACTORS, "rounds": TUNING_ROUNDS, "seed": TUNING_SEED},
        "left_out": LEFT_OUT,
        "settings": {},
    }
    for model, alpha in itertools.product(args.models, args.alphas):
        found = {m: out / f"{model}-{alpha:g}" / m / "study.json" for m in args.only}
        done = {m: json.loads(path.read_text()) for m, path in found.items() if path.exists()}
        result["settings"][label(model, alpha)] = {"model": model, "alpha": alpha, "methods": done}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=METHODS, choices=METHODS, metavar="METHOD")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--alphas", nargs="+", type=float, default=list(ALPHAS))
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path("runs/comparison"))
    parser.add_argument("--save", default="comparison", help="name of the results (comparison)")
    parser.add_argument("--draw", action="store_true", help="do not run anything")
    parser.add_argument("--one", action="store_true", help="the one setting named, in this process")
    args = parser.parse_args()
    if args.one:
        study(args.models[0], args.alphas[0], args.rounds, args.only, args.out)
        return
    path = _measure.RESULTS / f"{args.save}.json"
    if args.draw:
        result = json.loads(path.read_text())
    else:
        run_all(args)
        result = collect(args.out, args)
        path.write_text(json.dumps(result) + "\n")
    text = tables(result)
    path.with_suffix(".md").write_text(text)
    draw(result, Path(__file__).resolve().parents[1] / "docs" / "methods")
    print(text)


def run_all(args: argparse.Namespace) -> None:
    """A process for each setting, as many at a time as there are cores, each on one core."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]
    waiting = list(itertools.product(args.models[::-1], args.alphas))  # what takes longest first
    at_work: dict[int, subprocess.Popen[bytes]] = {}
    while waiting or at_work:
        for core in cores:
            if core in at_work and at_work[core].poll() is not None and at_work.pop(core).returncode:
                raise SystemExit("a setting failed, see above")
            if core not in at_work and waiting:
                model, alpha = waiting.pop(0)
                own = ["--one", "--models", model, "--alphas", str(alpha), "--rounds", str(args.rounds)]
                own += ["--out", str(args.out / f"{model}-{alpha:g}"), "--only", *args.only]
                command = [sys.executable, "-m", "benchmarks.comparison", *own]
                if len(cores) > 1:
                    command = ["taskset", "-c", str(core), *command]
                at_work[core] = subprocess.Popen(command)
        time.sleep(0.5)


if __name__ == "__main__":
    main()
