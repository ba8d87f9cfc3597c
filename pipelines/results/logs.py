"""Metrics to TensorBoard or Weights & Biases, as far as a run has been evaluated.

Each seed of a method is a run of its own there. What is logged is a function of the history: a run that goes on writes
its log anew from what was saved, so that no step is in it twice, whatever happened before.
"""

import hashlib
import os
import shutil
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pipelines.common.names import pick
from pipelines.configuration.config import Config
from pipelines.results.history import History, evaluated_rounds, is_score, mean_losses


class Log(NamedTuple):
    """Where the metrics of one seed of a method go.

    Attributes:
      write: `write(round, metrics)`, a number for each name.
      close: `close()`.
    """

    write: Callable[[int, dict[str, float]], None]
    close: Callable[[], None]


class Logger(NamedTuple):
    """Where the metrics of a run go.

    Attributes:
      log: `log(method, seeds, begin, new, ends)`: the history after the round `begin`, up to an evaluation, and
        int[S], the round in which each seed stopped, or a later one. What begins with round 0 begins a log anew.
      finish: `finish()`, when a method is done or given up.
    """

    log: Callable[[str, Sequence[int], int, History, np.ndarray], None]
    finish: Callable[[], None]


def logger(kinds: Sequence[str], config: Config, out: Path) -> Logger:
    """A logger into the run directory `out`.

    Args:
      kinds: of `LOGS`, "tensorboard" or "wandb".
      config: the configuration, which says when a run is evaluated.
      out: the run directory.

    Raises:
      ValueError: if there is no such kind, or its package is not installed.
    """
    for kind in kinds:
        package, _ = LOGS[pick("log", kind, list(LOGS))]
        try:
            import_module(package)
        except ImportError:
            raise ValueError(
                f"--log {kind} needs the package {package}: install it with pip install 'fedjax-core[{kind}]'"
            ) from None
    eval_rounds = evaluated_rounds(config.rounds, config.evaluation.eval_every)
    opened: dict[tuple[str, int, str], Log] = {}

    def log(method: str, seeds: Sequence[int], begin: int, new: History, ends: np.ndarray) -> None:
        if not new:
            return
        for seed, rows in zip(seeds, scalars(new, eval_rounds, begin, ends), strict=True):
            for kind in dict.fromkeys(kinds):
                at = (method, seed, kind)
                if begin == 0:
                    if at in opened:  # begun again with a smaller plan
                        opened[at].close()
                    opened[at] = LOGS[kind][1](out, config, method, seed)
                for round, metrics in rows:
                    opened[at].write(round, metrics)

    def finish() -> None:
        for each in opened.values():
            each.close()
        opened.clear()

    return Logger(log, finish)


def scalars(
    history: History, eval_rounds: np.ndarray, begin: int, ends: np.ndarray
) -> list[list[tuple[int, dict[str, float]]]]:
    """For each seed (round, metrics) of every evaluation that is reported; what is not known is left out."""
    names = [name for name in history if is_score(name)]
    rounds = eval_rounds[eval_rounds > begin][: history[names[0]].shape[1]]
    losses = mean_losses(history, rounds - begin)
    seeds = []
    for s in range(len(losses)):
        rows = []
        for e, round in enumerate(rounds[rounds <= ends[s]].tolist()):
            metrics = {"train/loss": float(losses[s, e])}
            metrics |= {name.replace("validated/", "validation/"): float(history[name][s, e]) for name in names}
            rows.append((round, {name: value for name, value in metrics.items() if not np.isnan(value)}))
        seeds.append(rows)
    return seeds


def _tensorboard(out: Path, config: Config, method: str, seed: int) -> Log:
    from tensorboardX import SummaryWriter

    folder = out / "tensorboard" / method / f"seed-{seed}"
    shutil.rmtree(folder, ignore_errors=True)  # written anew
    writer = SummaryWriter(logdir=str(folder))

    def write(round: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            writer.add_scalar(name, value, global_step=round)
        writer.flush()

    return Log(write, writer.close)


def _wandb(out: Path, config: Config, method: str, seed: int) -> Log:
    import wandb

    # The same name for the same seed of the same run, so that one that is uploaded twice is one.
    said = f"{out.resolve()} {config.slug()} {method} {seed}"
    name = hashlib.sha256(said.encode()).hexdigest()[:12]
    for old in (out / "wandb").glob(f"*-{name}"):
        shutil.rmtree(old, ignore_errors=True)
    mode: Any = os.environ.get("WANDB_MODE", "offline")
    run = wandb.init(
        project="fedjax-core",
        group=config.slug(),
        name=f"{method}, seed {seed}",
        id=name,
        dir=str(out),
        mode=mode,
        reinit="create_new",
        config={"method": method, "seed": seed, **{k: str(v) for k, v in vars(config).items()}},
        settings=wandb.Settings(silent=True, console="off"),
    )
    return Log(lambda round, metrics: run.log(metrics, step=round), run.finish)


LOGS: dict[str, tuple[str, Callable[[Path, Config, str, int], Log]]] = {
    "tensorboard": ("tensorboardX", _tensorboard),
    "wandb": ("wandb", _wandb),
}
"""Kind to the package that it needs, and `open(out, config, method, seed) -> Log`, which begins a log anew."""
