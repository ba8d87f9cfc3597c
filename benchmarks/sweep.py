"""64 learning rates in one sweep, against 64 runs one after another and against a Python loop over a compiled run.

    python -m benchmarks.sweep [--rounds 100] [--sample 4] [--repeats 5]

FedAvg with logistic regression on the digits, 10 of 50 clients a round, evaluated at the end. First the commands, start
and compilation included, nothing kept from before: `fedjax-core sweep` with 64 rates, and `fedjax-core train` with
--sample of them, whose mean counts 64 times. Then in one process, compilation apart: all 64 as one program of the
sweep on all cores, against a loop that calls a compiled run, whose rate is an argument, 64 times.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from pipelines.common import processes

processes.cores_as_devices()

import jax  # noqa: E402
import numpy as np  # noqa: E402

from benchmarks import _measure  # noqa: E402
from fedjax_core import continue_rounds, evaluate  # noqa: E402
from pipelines.experiment import setup  # noqa: E402
from pipelines.studies import sweep  # noqa: E402
from pipelines.studies.sweep_config import Sweep  # noqa: E402

SETTINGS = 64


def configuration(rounds: int) -> Sweep:
    return Sweep(
        dataset="digits",
        clients=50,
        cohort_size=10,
        model="logistic_regression",
        methods=("fedavg",),
        grid={"fedavg": {"client_lr": f"log:0.003:3:{SETTINGS}"}},
        rounds=rounds,
        eval_every=rounds,
        seeds=1,
    )


def seconds_of(words: list[str], out: Path) -> float:
    """Of a command with a directory and a folder of compiled programs of its own."""
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(out / "compiled")}
    begin = time.perf_counter()
    command = [sys.executable, "-m", "pipelines", *words, "--out", str(out / "run"), "--quiet"]
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begin


def commands(asked: Sweep, sample: int) -> dict[str, Any]:
    settings = asked.settings_of_grid("fedavg")
    with tempfile.TemporaryDirectory() as folder:
        together = seconds_of(["sweep", *asked.words()], Path(folder) / "sweep")
        single = []
        for setting in settings[:: max(SETTINGS // sample, 1)][:sample]:
            words = ["train", *asked.config_of("fedavg", setting).words()]
            single.append(seconds_of(words, Path(folder) / setting.name))
    return {"sweep_s": together, "single_s": single, "ratio": SETTINGS * float(np.mean(single)) / together}


def programs(asked: Sweep, repeats: int) -> dict[str, Any]:
    experiment = sweep.prepare(asked)
    group = [sweep.Trial("fedavg", setting, 0) for setting in asked.settings_of_grid("fedavg")]
    program = sweep.Program(experiment, "fedavg", {}, ("client_lr",), jax.devices(), SETTINGS)

    def together() -> Any:
        states = program.start(group, SETTINGS)
        return program.advance(asked.rounds, states, group, SETTINGS, last=True)

    def run(rate: Any, data: Any) -> Any:
        algorithm, (population, test), key = (
            experiment.make("fedavg", experiment.plan, {"client_lr": rate}),
            data,
            jax.random.key(0),
        )
        keys = key[None]
        state = jax.tree.map(lambda leaf: leaf[0], setup.initial_states(experiment, algorithm, keys))
        rounds = continue_rounds(algorithm, experiment.sampler, asked.rounds)
        state, metrics = rounds(state, population, setup.run_keys(keys[0])[1])
        return metrics, evaluate(experiment.score_fn, algorithm.params(state), test)

    compiled = jax.jit(run)
    data = jax.device_put((experiment.population, experiment.test), jax.devices()[0])
    rates = [np.float32(trial.setting.values["client_lr"]) for trial in group]

    def loop() -> Any:
        return [compiled(rate, data) for rate in rates]

    first = {
        "sweep": _measure.first_call(together)[0],
        "loop": _measure.first_call(compiled, rates[0], data)[0],
    }
    times = _measure.take_turns({"sweep": together, "loop": loop}, repeats)
    medians = {name: float(np.median(of)) for name, of in times.items()}
    return {
        "first_call_s": first,
        **{name: _measure.summary(of) for name, of in times.items()},
        "ratio": medians["loop"] / medians["sweep"],
        "ratio_with_compilation": (medians["loop"] + first["loop"]) / first["sweep"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--sample", type=int, default=4, help="single runs that stand for all")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--save", default="sweep")
    args = parser.parse_args()
    asked = configuration(args.rounds)
    result = {"machine": _measure.machine(), "rounds": args.rounds, "settings": SETTINGS}
    result |= {"commands": commands(asked, args.sample), "programs": programs(asked, args.repeats)}
    _measure.save(args.save, result)
    by_command, by_program = result["commands"], result["programs"]
    print(f"sweep {by_command['sweep_s']:.1f} s; one run {np.mean(by_command['single_s']):.1f} s, so that")
    print(f"  {SETTINGS} runs take {by_command['ratio']:.1f} times as long")
    print(f"one program {by_program['sweep']['median_s']:.2f} s, loop {by_program['loop']['median_s']:.2f} s: ", end="")
    print(f"{by_program['ratio']:.2f} times, with compilation {by_program['ratio_with_compilation']:.2f} times")


if __name__ == "__main__":
    main()
