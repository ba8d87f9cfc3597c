"""Time to the first round: importing, tracing and compiling, per model and per method.

    python benchmarks/compiling.py [--only start-up models methods growth]

Start-up is of whole processes, in turns: what JAX and optax take to import, what the library does, the command line,
and a run of one round with an empty cache of compiled programs and with the one that it left. Elsewhere no cache is
used: every figure is of a process's own compilation after `jax.clear_caches()`, with the persistent cache off. The last
part shows that nothing grows with the number of rounds, clients or local steps.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
import optax

import algorithms
import models
from benchmarks import _measure
from fedjax_core import Population, samplers, simulate
from models import losses
from pipelines import Config
from pipelines.configuration import methods
from pipelines.experiment import setup

BATCH = 20


def image(model, shape):
    return model, {"x": jnp.zeros((1, *shape)), "y": jnp.zeros(1, jnp.int32)}, losses.cross_entropy(model)


def text(model, length):
    tokens = jnp.zeros((1, length), jnp.int32)
    return model, {"x": tokens, "y": tokens}, losses.sequence_cross_entropy(model)


MODELS = {
    "logistic": lambda: image(models.logistic_regression((28, 28, 1), 10), (28, 28, 1)),
    "mlp": lambda: image(models.mlp((28, 28, 1), 10), (28, 28, 1)),
    "cnn": lambda: image(models.cnn((28, 28, 1), 10), (28, 28, 1)),
    "char_lstm": lambda: text(models.char_lstm(86), 80),
    "transformer": lambda: text(models.transformer(86, 80, num_layers=2, dim=128, num_heads=4), 80),
    "resnet18_gn": lambda: image(models.resnet18_gn((32, 32, 3), 10), (32, 32, 3)),
}


def population_of(example, num_clients, size):
    total = num_clients * size
    examples = jax.tree.map(lambda leaf: np.zeros((total, *leaf.shape[1:]), leaf.dtype), example)
    return Population.from_flat(examples, np.arange(num_clients + 1) * size)


def compile_seconds(function, *args, repeats):
    """(median, all) seconds to trace and compile."""
    seconds = []
    for _ in range(repeats):
        jax.clear_caches()
        begin = time.perf_counter()
        jax.jit(function).lower(*args).compile()
        seconds.append(time.perf_counter() - begin)
    return {"median_s": float(np.median(seconds)), "all_s": seconds}


def a_round(name, repeats):
    model, example, loss_fn = MODELS[name]()
    fedavg = algorithms.fedavg(loss_fn, optax.sgd(0.1), batch_size=BATCH)
    state = fedavg.init(model.init(jax.random.key(0)))
    cohort = population_of(example, 10, 40).cohort(np.arange(10))
    return compile_seconds(fedavg.round, state, cohort, jax.random.key(0), repeats=repeats)


def growth(repeats):
    """Seconds of FedAvg's whole simulation on the MLP at three scales, one thing larger at a time."""
    model, example, loss_fn = MODELS["mlp"]()
    params, found = model.init(jax.random.key(0)), {}
    base = {"rounds": 10, "clients": 10, "steps": 10}
    for what in base:
        found[what] = {}
        for value in (1, 10, 1000):
            at = base | {what: value}
            fedavg = algorithms.fedavg(loss_fn, optax.sgd(0.1), batch_size=BATCH, num_steps=at["steps"])
            run = simulate(fedavg, samplers.uniform(at["clients"], min(at["clients"], 10)), at["rounds"])
            population = population_of(example, at["clients"], 2)
            found[what][str(value)] = compile_seconds(run, params, population, jax.random.key(0), repeats=repeats)
    return found


def start_up(repeats):
    """Seconds of processes, their limits first: those of JAX and optax are no library's to save."""
    root = Path(__file__).resolve().parents[1]
    python, command = [sys.executable, "-c"], [sys.executable, "-m", "pipelines"]
    train = [
        *command,
        "train",
        "--dataset",
        "digits",
        "--model",
        "logistic_regression",
        "--rounds",
        "1",
        "--seeds",
        "1",
    ]
    with tempfile.TemporaryDirectory() as folder:
        # Of modules bytecode is kept, as it is of installed ones.
        environment = os.environ | {"PYTHONPYCACHEPREFIX": f"{folder}/bytecode", "PYTHONPATH": str(root)}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        number = 0

        def run(arguments, cache=None):
            kept = environment | ({"JAX_COMPILATION_CACHE_DIR": cache} if cache else {})
            subprocess.run(arguments, env=kept, cwd=folder, check=True, stdout=subprocess.DEVNULL)

        def train_once(cold):
            nonlocal number
            number += 1
            cache = f"{folder}/cache-{number}" if cold else f"{folder}/cache"
            run([*train, "--out", f"{folder}/run-{number}"], cache)

        contenders = {
            "Python": partial(run, [*python, "pass"]),
            "import jax, optax": partial(run, [*python, "import jax, optax"]),
            "import algorithms": partial(run, [*python, "import algorithms"]),
            "import algorithms, models": partial(run, [*python, "import algorithms, models"]),
            "fedjax-core --help": partial(run, [*command, "--help"]),
            "fedjax-core list": partial(run, [*command, "list"]),
            "fedjax-core train, one round, nothing compiled yet": partial(train_once, True),
            "the same, compiled before": partial(train_once, False),
        }
        for contender in contenders.values():
            contender()
        times = _measure.take_turns(contenders, repeats)
    return {name: _measure.summary(seconds) for name, seconds in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parts = ("start-up", "models", "methods", "growth")
    parser.add_argument("--only", nargs="+", choices=parts, default=parts)
    parser.add_argument("--models", nargs="*", default=list(MODELS))
    parser.add_argument(
        "--methods",
        nargs="*",
        default=[
            name for name in methods.names() if not ({"public", "tasks"} & set(methods.describe(name).needs.values()))
        ],
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--save", default="compiling")
    args = parser.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)
    result = _measure.saved(args.save) | {"machine": _measure.machine()} | {part: {} for part in args.only}
    if "start-up" in args.only:
        result["start-up"] = start_up(args.repeats)
        for name, row in result["start-up"].items():
            print(f"{name:52s} {row['median_s']:6.2f} s ({row['q25_s']:.2f} to {row['q75_s']:.2f})", flush=True)
    for name in args.models if "models" in args.only else []:
        row = result["models"][name] = a_round(name, 1 if name == "resnet18_gn" else args.repeats)
        print(f"FedAvg, {name:12s} {row['median_s']:6.2f} s", flush=True)
    for name in args.methods if "methods" in args.only else []:
        experiment = setup.prepare(Config(dataset="digits", model="logistic_regression", methods=(name,), seeds=1))
        key = jax.random.key(0)
        state = jax.eval_shape(experiment.algorithms[name].init, experiment.model.init(key), key)
        cohort = jax.eval_shape(lambda p: p.cohort(np.arange(10)), experiment.population)
        row = result["methods"][name] = compile_seconds(
            experiment.algorithms[name].round, state, cohort, jax.random.key(0), repeats=1
        )
        print(f"{name:22s} logistic {row['median_s']:6.2f} s", flush=True)
    if "growth" in args.only:
        result["growth"] = growth(args.repeats)
    for what, rows in result["growth"].items() if "growth" in args.only else []:
        listing = ", ".join(f"{value}: {row['median_s']:.2f} s" for value, row in rows.items())
        print(f"FedAvg, mlp, by {what}: {listing}")
    print(f"saved {_measure.save(args.save, result)}")


if __name__ == "__main__":
    main()
