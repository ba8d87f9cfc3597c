"""The models of a finished run on examples: its own, or those of another data set."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_core import evaluate, split_tables
from pipelines.common.names import pick
from pipelines.data import datasets
from pipelines.experiment import views as known
from pipelines.experiment.setup import EVAL_BATCH, in_precision
from pipelines.federation.federations import PUBLIC
from pipelines.results.history import of_view
from pipelines.run import client_scores, description
from pipelines.run.loading import Run, Trained

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
        parts = {name: part for name, part in run.federation.parts.items() if name not in (*SPLITS, PUBLIC)}
        if pick("split", split, (*SPLITS, *parts)) in SPLITS:
            return getattr(run.federation.dataset, split), ""
        host = run.federation.host_population(split)
        rows = host.rows_of(np.arange(host.num_clients))
        if not len(rows):
            raise ValueError(f"the {split} part of the run is empty: take another split")
        return {name: leaf[rows] for name, leaf in host.examples.items()}, ""
    pick("split of another data set", split, SPLITS)
    place = data_dir if data_dir is not None else run.config.data.data_dir
    options = datasets.options(dataset, place)
    text: dict[str, Any] = {
        "sequence_length": run.config.data.sequence_length,
        "vocabulary": run.config.data.vocabulary,
    }
    loaded = datasets.load(dataset, place, **{name: value for name, value in text.items() if name in options})
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


def score(
    run: Run,
    examples: dict[str, np.ndarray],
    *,
    seeds: Sequence[int] | None = None,
    views: Sequence[str] = (),
    part: str | None = None,
) -> list[dict[str, Any]]:
    """Metrics of what the methods have come to: one row for each method, view and seed.

    Args:
      run: the run; its methods are scored.
      examples: leaves [n, ...], for the views of one model: the mean over them.
      seeds: all unless given.
      views: names of views; those that the run has evaluated unless given.
      part: of the run's own federation, on whose examples clients are tested one by one, in the views in which they
        differ: the mean over clients, and of the accuracy its standard deviation and worst decile. None for examples
        that are no client's, on which these views are left out.

    Returns:
      Rows of "method", "view", "seed", "round" (rounds done) and the metrics, "loss" and "accuracy".

    Raises:
      ValueError: if there is no such seed or view, or nothing that can be scored on these examples.
    """
    config = run.config if not views else run.config.replace(evaluate=tuple(views))
    known.check_names(config, {name: trained.algorithm for name, trained in run.methods.items()})
    rows: list[dict[str, Any]] = []
    with jax.enable_x64(run.config.machine.x64):
        scoring = jax.jit(partial(evaluate, run.metric_fn, batch_size=EVAL_BATCH))
        on_device = jax.tree.map(jnp.asarray, examples)
        for name, trained in run.methods.items():
            states = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), trained.state)
            for view in known.evaluated(config, trained.algorithm, name).names:
                differs = known.differs(trained.algorithm, view, states)
                if differs and (part is None or trained.last is not None):
                    if not views:
                        continue
                    why = "it kept the states of no stopped seed" if part else "no example of another data set is so"
                    raise ValueError(
                        f"in the view {view} clients are tested on examples of their own, and {why}: leave it out"
                    )
                values = _of_clients(run, trained, view, part) if differs and part else None
                for seed in trained.seeds if seeds is None else seeds:
                    if values is None:
                        found = scoring(_model(trained, view, seed), on_device)
                    else:
                        trained.state_of(seed)  # says if there is no such seed
                        found = {metric: each[trained.seeds.index(seed)] for metric, each in values.items()}
                    done = trained.rounds[trained.seeds.index(seed)]
                    metrics = {metric: float(value) for metric, value in found.items()}
                    rows.append({"method": name, "view": view, "seed": seed, "round": done, **metrics})
    if not rows:
        raise ValueError(
            "in all views of these methods clients are tested on examples of their own, which these are not: name the "
            "view global, or test on the run's own data"
        )
    return rows


def _model(trained: Trained, view: str, seed: int) -> Any:
    if view == known.GLOBAL:
        return trained.params(seed)
    return known.one_model(trained.algorithm, view, split_tables(trained.state_of(seed))[0])


def _of_clients(run: Run, trained: Trained, view: str, part: str) -> dict[str, Any]:
    """Scores over clients of a view in which they differ, [S] each."""
    if part not in ("train", "validation", "test"):
        raise ValueError(f"in the view {view} clients have models of their own, and those of {part} have none")
    # The keys of the seeds that there are, for views that draw.
    keys = jax.vmap(jax.random.key)(jnp.asarray(trained.seeds))
    experiment = run.experiment._replace(keys=keys)
    scorer = client_scores.scorer(experiment, trained.algorithm, view)
    scores = client_scores.over_clients(view, scorer.scores(jax.tree.map(jnp.asarray, trained.state), part))
    return {name.removeprefix(of_view("test", view, "")): value for name, value in scores.items()}
