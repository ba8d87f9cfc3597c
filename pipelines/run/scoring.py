"""The models of a finished run on examples: its own, or those of another data set."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_core import evaluate
from pipelines.common.names import pick
from pipelines.data import datasets
from pipelines.experiment.setup import EVAL_BATCH, in_precision
from pipelines.run import description
from pipelines.run.loading import Run

SPLITS = ("test", "train")


def examples_of(
    run: Run, dataset: str | None = None, data_dir: str | None = None, split: str = "test"
) -> tuple[dict[str, np.ndarray], str]:
    """(examples to test a run's models on, what is to be said about them).

    Args:
      run: the run.
      dataset: name of a data set (`pipelines.data.datasets.load`); the run's own unless given, as its clients see it.
      data_dir: folder of prepared data; that of the run unless given.
      split: "test" or "train"; of the run's own data also a part that its clients hold, "validation" or "new".

    Raises:
      ValueError: if there is no such data set or part, or its examples are of another kind than those of the run.
    """
    if dataset is None:
        if run.federation is None:
            raise ValueError(f"the data of the run is not here ({run.missing}): name a data set with --dataset")
        parts = {name: part for name, part in run.federation.parts.items() if name not in SPLITS}
        if pick("split", split, (*SPLITS, *parts)) in SPLITS:
            return getattr(run.federation.dataset, split), ""
        host = run.federation.host_population(split)
        rows = host.rows_of(np.arange(host.num_clients))
        if not len(rows):
            raise ValueError(f"the {split} part of the run is empty: take another split")
        return {name: leaf[rows] for name, leaf in host.examples.items()}, ""
    pick("split of another data set", split, SPLITS)
    place = data_dir if data_dir is not None else run.config.data.data_dir
    known = datasets.options(dataset, place)
    text: dict[str, Any] = {
        "sequence_length": run.config.data.sequence_length,
        "vocabulary": run.config.data.vocabulary,
    }
    loaded = datasets.load(dataset, place, **{name: value for name, value in text.items() if name in known})
    with jax.enable_x64(run.config.machine.x64):
        loaded = in_precision(loaded)
    wrong = description.misfit(loaded, run.data)
    if wrong:
        raise ValueError(
            f"the models of this run cannot be tested on {dataset}: {wrong}. They were trained on {run.data['name']}"
        )
    note = ""
    if loaded.num_classes < run.data["num_classes"]:
        note = f"{dataset} has {loaded.num_classes} classes and the models tell {run.data['num_classes']} apart"
    return getattr(loaded, split), note


def score(run: Run, examples: dict[str, np.ndarray], *, seeds: Sequence[int] | None = None) -> list[dict[str, Any]]:
    """Metrics of the final global models, mean over the examples: one row for each method and seed.

    Args:
      run: the run; its methods are scored.
      examples: leaves [n, ...].
      seeds: all unless given.

    Returns:
      Rows of "method", "seed", "round" (rounds done) and the metrics, "loss" and "accuracy".

    Raises:
      ValueError: if there is no such seed.
    """
    rows = []
    with jax.enable_x64(run.config.machine.x64):
        scoring = jax.jit(partial(evaluate, run.metric_fn, batch_size=EVAL_BATCH))
        on_device = jax.tree.map(jnp.asarray, examples)
        for name, trained in run.methods.items():
            for seed in trained.seeds if seeds is None else seeds:
                values = scoring(trained.params(seed), on_device)
                done = trained.rounds[trained.seeds.index(seed)]
                metrics = {metric: float(value) for metric, value in values.items()}
                rows.append({"method": name, "seed": seed, "round": done, **metrics})
    return rows
