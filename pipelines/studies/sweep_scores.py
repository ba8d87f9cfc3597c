"""How a trial of a sweep is scored, inside its compiled call: every view of its method, as in a run of `train`.

A trial has hyper-parameters of its own, so that its views are made where it is traced, and all clients are tested in
one call: their examples lie on the device beside those that are trained on.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_core import Algorithm, Array, client_statistics, evaluate, evaluate_view
from fedjax_core.types import Key, PyTree
from pipelines.experiment import setup, views
from pipelines.experiment.setup import EVAL_BATCH, Experiment
from pipelines.results.history import of_view
from pipelines.run import client_scores

Scores = dict[str, Array]
"""Scores of one trial by the names of a history: "test/<metric>", "test/<view>/<metric>", "validated/<metric>"."""


def main_view(experiment: Experiment, method: str) -> str:
    """The view by which a method is judged."""
    return views.evaluated(experiment.config, experiment.algorithms[method], method).main


def scoring(experiment: Experiment, algorithm: Algorithm) -> tuple[Any, Callable[..., Scores]]:
    """The examples that trials are scored on, and how.

    Args:
      experiment: the experiment, not staged.
      algorithm: a method as it is for all trials; its hyper-parameters may be others.

    Returns:
      (examples, `score(algorithm, state, key, examples) -> Scores`) for the state of one trial and its seed's key.
    """
    chosen = views.evaluated(experiment.config, algorithm)
    states = jax.eval_shape(partial(setup.initial_states, experiment, algorithm), experiment.keys)
    of_one, of_clients = chosen.of_one_model(algorithm, states), chosen.of_clients(algorithm, states)
    asked = views.chosen_clients(experiment.config, experiment.federation.num_clients)
    numbers = np.arange(experiment.federation.num_clients)
    ids = np.where(np.isin(numbers, asked), numbers, -1)

    def score(algorithm: Algorithm, state: PyTree, key: Key, examples: Mapping[str, Any]) -> Scores:
        def by_clients(name: str, part: str) -> Mapping[str, Any]:
            view = views.view_of(algorithm, name)
            adapts = view.adapt is not None
            values = evaluate_view(
                experiment.metric_fn,
                view,
                state,
                examples[f"clients' {part}"],
                ids,
                at_once=client_scores.ADAPTED_AT_ONCE,
                batch_size=EVAL_BATCH,
                plan=experiment.plan,
                adapt_on=examples["clients' train"] if adapts else None,
                key=jax.random.fold_in(client_scores.key_of(key), 0) if adapts else None,
            )
            return {metric: client_statistics(value) for metric, value in values.items()}

        found: Scores = {}
        of_examples = partial(evaluate, batch_size=EVAL_BATCH)
        for name in of_one:
            params = views.one_model(algorithm, name, state)
            scores = of_examples(experiment.score_fn, params, examples["test"])
            found |= {of_view("test", name, metric): value for metric, value in scores.items()}
        for name in of_clients:
            found |= client_scores.named(name, by_clients(name, "test"))
        if chosen.main in of_one:
            params = views.one_model(algorithm, chosen.main, state)
            held = of_examples(experiment.metric_fn, params, examples["validation"])
        else:
            held = {metric: of.mean for metric, of in by_clients(chosen.main, "validation").items()}
        return found | {f"validated/{metric}": value for metric, value in held.items()}

    examples = {"test": experiment.test} if of_one else {}
    if chosen.main in of_one:
        held = experiment.federation.host_population("validation")
        rows = held.rows_of(np.arange(held.num_clients))
        examples["validation"] = {name: jnp.asarray(leaf[rows]) for name, leaf in held.examples.items()}
    parts = {"test": views.own_tests(experiment.config, experiment.federation)} if of_clients else {}
    if any(views.view_of(algorithm, name).adapt is not None for name in of_clients):
        parts["train"] = experiment.federation.parts["train"]
    if chosen.main in of_clients:
        parts["validation"] = experiment.federation.parts["validation"]
    for name, part in parts.items():
        population = client_scores.population_of(experiment, part).to_device()
        examples[f"clients' {name}"] = population.with_public(experiment.population.public)
    return examples, score
