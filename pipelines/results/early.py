"""Early stopping, and the best model on the examples that clients keep back for validation.

At every evaluation the models of all seeds are scored on the validation examples of all clients; test examples are
never looked at. The model is that of the method's main view (`pipelines.experiment.views`); where clients differ in it,
the score is the mean over clients, each by its own model on its own examples. A seed's best model is the one with the
best score so far, the first of equals. A seed stops when its score has not improved for `patience` evaluations, or its
accuracy has reached `stop_at`. Seeds run at once, so one that has stopped is computed on until the last has stopped,
and what is reported of it stays as it was: its last model, its best one, and all numbers. Both decisions are functions
of the scores alone, made by comparisons, so that a run that was interrupted anywhere decides alike.

Letters: S seeds, e evaluations done. In a history the scores are "validated/<metric>", [S, e].
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_core import Algorithm, Array, split_tables
from fedjax_core.statistics import has_statistics
from fedjax_core.types import Params, PyTree
from pipelines.configuration.config import Config
from pipelines.experiment import views
from pipelines.results.history import History, is_score


class Models(NamedTuple):
    """What is remembered of the evaluations so far, for all seeds.

    What is kept of a method is the global model, or its whole state where something else is made of it too
    (`pipelines.experiment.views.keeps_states`).

    Attributes:
      best: what is kept of the best round, leaves [S, ...].
      last: of the latest, of a seed that has stopped of that moment, leaves [S, ...].
      score: float[S], of the best models: higher is better.
      waited: int32[S], evaluations since then.
      stopped: bool[S].
    """

    best: PyTree
    last: PyTree
    score: Array
    waited: Array
    stopped: Array


class Kept(NamedTuple):
    """What a run that validates has instead of a method's state, in memory and in checkpoints.

    Attributes:
      state: the method's state, leaves [S, ...]; that of a seed that has stopped goes on and is not reported.
      models: see `Models`.
    """

    state: PyTree
    models: Models


class Course(NamedTuple):
    """How the seeds of a method have done.

    Attributes:
      best: int[S], the evaluation of the best model, counted from 0.
      ends: int[S], evaluations until the seed stopped, or all that there are.
      stopped: bool[S], whether it stopped.
    """

    best: np.ndarray
    ends: np.ndarray
    stopped: np.ndarray


def begin(config: Config, algorithm: Algorithm, state: PyTree) -> PyTree:
    """A state, leaves [S, ...], before the first evaluation; with what is remembered if the run validates."""
    if not config.evaluation.validates:
        return state
    kept = of_state(config, algorithm, state)
    seeds = jax.tree.leaves(kept)[0].shape[0]
    # Copies: a compiled chunk takes each of its arguments over.
    best, last = (jax.tree.map(jnp.copy, kept) for _ in range(2))
    score = jnp.full(seeds, -jnp.inf, jnp.result_type(float))
    return Kept(state, Models(best, last, score, jnp.zeros(seeds, jnp.int32), jnp.zeros(seeds, bool)))


def split(tree: PyTree) -> tuple[Any, Models | None]:
    """(the method's state, what is remembered), of what an engine or a checkpoint holds."""
    return (tree.state, tree.models) if isinstance(tree, Kept) else (tree, None)


def joined(state: PyTree, models: Models | None) -> PyTree:
    """What `split` takes apart."""
    return state if models is None else Kept(state, models)


def of_state(config: Config, algorithm: Algorithm, state: PyTree) -> PyTree:
    """What is kept of a state, leaves [S, ...]."""
    return state if views.keeps_states(config, algorithm) else global_params(algorithm, state)


def global_params(algorithm: Algorithm, state: PyTree) -> Params:
    """The global models of states [S, ...]."""
    # Of personal statistics, which are rows of clients, the global model has the mean.
    whole = state if has_statistics(algorithm) else split_tables(state)[0]
    return jax.vmap(algorithm.params)(whole)


class Reported(NamedTuple):
    """What a method has come to, of all seeds.

    Attributes:
      params: the global models, leaves [S, ...].
      state: the state that they are of, or None where only models were kept.
    """

    params: Params
    state: Any


def last(config: Config, algorithm: Algorithm, tree: PyTree) -> Reported:
    """What is reported at the end, of what an engine or a checkpoint holds: of a stopped seed as it was then."""
    state, models = split(tree)
    return _reported(config, algorithm, state if models is None else models.last, models is None)


def best(config: Config, algorithm: Algorithm, models: Models) -> Reported:
    """The same of the best rounds."""
    return _reported(config, algorithm, models.best, False)


def _reported(config: Config, algorithm: Algorithm, kept: Any, is_state: bool) -> Reported:
    if is_state or views.keeps_states(config, algorithm):
        return Reported(global_params(algorithm, kept), kept)
    return Reported(kept, None)


def updated(config: Config, models: Models, kept: PyTree, scores: Mapping[str, Array]) -> Models:
    """What is remembered after an evaluation.

    Args:
      config: the configuration.
      models: what was remembered before.
      kept: what is kept of the states now (`of_state`), leaves [S, ...].
      scores: metric to float[S], on the validation examples.
    """
    going = ~models.stopped
    score = _score(config, scores).astype(models.score.dtype)
    improved = going & (score > models.score)
    waited = jnp.where(going, jnp.where(improved, 0, models.waited + 1), models.waited)
    stopped = models.stopped
    if config.evaluation.patience is not None:
        stopped |= waited >= config.evaluation.patience
    if config.evaluation.stop_at is not None:
        stopped |= going & (scores["accuracy"].astype(models.score.dtype) >= config.evaluation.stop_at)
    return Models(
        jax.tree.map(lambda new, old: jnp.where(_rows(improved, new), new, old), kept, models.best),
        jax.tree.map(lambda new, old: jnp.where(_rows(going, new), new, old), kept, models.last),
        jnp.where(improved, score, models.score),
        waited,
        stopped,
    )


def course(config: Config, history: History) -> Course | None:
    """How the seeds have done so far; None for a run that does not validate, or before its first evaluation."""
    if not config.evaluation.validates or "validated/accuracy" not in history:
        return None
    # As on the device, where they are compared with `stop_at` in this type.
    dtype = np.float64 if config.machine.x64 else np.float32
    found = {name: history[f"validated/{name}"].astype(dtype) for name in ("loss", "accuracy")}
    scores, reached = _score(config, found), found["accuracy"]
    seeds, evaluations = scores.shape
    best, ends, stopped = np.zeros(seeds, int), np.full(seeds, evaluations), np.zeros(seeds, bool)
    for s in range(seeds):
        highest, waited = -np.inf, 0
        for e in range(evaluations):
            if scores[s, e] > highest:
                best[s], highest, waited = e, scores[s, e], 0
            else:
                waited += 1
            late = config.evaluation.patience is not None and waited >= config.evaluation.patience
            if late or (config.evaluation.stop_at is not None and reached[s, e] >= dtype(config.evaluation.stop_at)):
                ends[s], stopped[s] = e + 1, True
                break
    return Course(best, ends, stopped)


def stopped(tree: PyTree) -> np.ndarray:
    """bool[S], which seeds have stopped, of what an engine or a checkpoint holds; a single False if none can."""
    models = split(tree)[1]
    return np.asarray(False if models is None else models.stopped)


def last_rounds(config: Config, history: History, eval_rounds: np.ndarray, seeds: int) -> np.ndarray:
    """int[S], the rounds in which the seeds stopped; for one that goes on a number beyond all rounds."""
    found = course(config, history)
    beyond = np.full(seeds, np.iinfo(np.int64).max)
    return beyond if found is None else np.where(found.stopped, rounds_of(found, eval_rounds), beyond)


def hold(values: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """[S, e], of each seed its value at its end from there on."""
    at = np.minimum(np.arange(values.shape[1]), ends[:, None] - 1)
    return np.take_along_axis(values, at, axis=1)


def reported(config: Config, history: History, eval_rounds: np.ndarray) -> History:
    """The history as it is reported: nothing of a seed after it has stopped.

    Scores stay as they were, and no client takes part in its rounds any more.

    Args:
      config: the configuration.
      history: as measured.
      eval_rounds: the rounds of the evaluations.
    """
    found = course(config, history)
    if found is None:
        return history
    after = np.arange(history["round/loss"].shape[1]) >= rounds_of(found, eval_rounds)[:, None]
    shown = {name: hold(v, found.ends) if is_score(name) else v for name, v in history.items()}
    return shown | {"round/participants": np.where(after, 0, history["round/participants"])}


def rounds_of(course: Course, eval_rounds: np.ndarray) -> np.ndarray:
    """int[S], the rounds of every seed."""
    return np.asarray(eval_rounds)[course.ends - 1]


def ends(config: Config, histories: Mapping[str, History], eval_rounds: np.ndarray) -> dict[str, np.ndarray]:
    """Method to int[S], the rounds that are reported of every seed, for the methods of a run that validates."""
    courses = {name: course(config, history) for name, history in histories.items()}
    return {name: rounds_of(found, eval_rounds) for name, found in courses.items() if found is not None}


def _score(config: Config, scores: Mapping[str, Any]) -> Any:
    return scores["accuracy"] if config.evaluation.best_by == "accuracy" else -scores["loss"]


def _rows(which: Array, leaf: Array) -> Array:
    return which.reshape(-1, *[1] * (leaf.ndim - 1))
