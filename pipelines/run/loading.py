"""A finished run, to be used: its model and what every method has come to, wherever it was trained.

    run = load_run("runs/mine")
    scaffold = run.methods["scaffold"]
    logits = run.model.apply(scaffold.params(seed=0), x)

Neither the devices nor the data of the run need be there. Letters: S seeds, N clients, C clients asked for.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import models
from fedjax_core import Algorithm, Array
from fedjax_core.types import ArrayLike, Key, Params, PyTree
from pipelines.common.names import pick
from pipelines.configuration.config import Config
from pipelines.experiment import setup
from pipelines.experiment.setup import Experiment
from pipelines.federation.federations import Federation
from pipelines.results import early
from pipelines.results.history import History, in_bytes, side_by_side
from pipelines.run import checkpoint, description, train
from pipelines.run.description import Description


class Trained(NamedTuple):
    """What one method has come to.

    Attributes:
      algorithm: the method.
      state: its state, numpy leaves [S, ...] (typed keys where it has some); after what the method does after its last
        round, if the run has come to that.
      best: in a run that validates (`pipelines.results.early`) the global models that were best on the validation
        examples, leaves [S, ...]; else None.
      last: there the models of the rounds in which the seeds stopped, where their states were not kept; else None, and
        they are those of the state.
      best_state: there the states of the best rounds, numpy leaves [S, ...], where they were kept; else None.
      seeds: the S seeds.
      rounds: rounds done with each seed.
      history: what was measured (`pipelines.results.history`), as far as all seeds have come.
      num_clients: N.
      x64: whether the run was made in double precision.
    """

    algorithm: Algorithm
    state: PyTree
    seeds: list[int]
    rounds: list[int]
    history: History
    num_clients: int
    x64: bool
    best: PyTree = None
    last: PyTree = None
    best_state: PyTree = None

    def state_of(self, seed: int | None = None) -> PyTree:
        """The state of one seed, the first one unless given; leaves [...].

        Raises:
          ValueError: if the run has no such seed.
        """
        at = self._index(seed)
        return jax.tree.map(lambda leaf: leaf[at], self.state)

    def params(self, seed: int | None = None) -> Params:
        """The global model of one seed, the first one unless given."""
        if self.last is not None:
            return jax.tree.map(lambda leaf: leaf[self._index(seed)], self.last)
        with jax.enable_x64(self.x64):
            one = jax.tree.map(lambda leaf: leaf[None], self.state_of(seed))
            return jax.tree.map(lambda leaf: leaf[0], early.global_params(self.algorithm, one))

    def best_params(self, seed: int | None = None) -> Params:
        """The global model of one seed that was best on the validation examples, the first seed unless given.

        Raises:
          ValueError: if the run did not validate, or there is no such seed.
        """
        if self.best is None:
            raise ValueError(
                "this run kept no best model: train with patience, stop_at or keep_best, and a validation_share"
            )
        return jax.tree.map(lambda leaf: leaf[self._index(seed)], self.best)

    def client_params(self, ids: ArrayLike, seed: int | None = None) -> Params:
        """The models that these clients would use, leaves [C, ...] for ids, int[C]: the global one where the method
        has no personal part.

        Raises:
          ValueError: if there is no such seed, or no client of such a number.
        """
        ids = np.asarray(ids)
        if ids.ndim != 1 or (ids.size and not np.issubdtype(ids.dtype, np.integer)):
            raise ValueError(f"ids must be a list of client numbers, got {ids.dtype}{list(ids.shape)}")
        outside = ids[(ids < 0) | (ids >= self.num_clients)]
        if outside.size:
            raise ValueError(f"client {outside[0]} is none of this run: its clients are 0 to {self.num_clients - 1}")
        with jax.enable_x64(self.x64):
            return self.algorithm.client_params(self.state_of(seed), jnp.asarray(ids, jnp.int32))

    def _index(self, seed: int | None) -> int:
        if seed is None:
            return 0
        if seed not in self.seeds:
            raise ValueError(f"seed {seed} is none of this run: it has {', '.join(map(str, self.seeds))}")
        return self.seeds.index(seed)


class Run(NamedTuple):
    """A run that has been loaded.

    Attributes:
      config: its configuration.
      federation: who holds which examples, or None where the data is not there.
      missing: why not; an empty string where it is.
      data: what is known of the data in any case (`pipelines.run.description`).
      model: `init`, `apply` and `features` of inputs as the data set has them; a `models.StatisticsModel` if it has
        running statistics.
      metric_fn: `metric_fn(params, batch) -> {"loss": [B], "accuracy": [B]}`.
      methods: name to what it has come to, of those that have been saved.
      experiment: what was run, with the data if it is there; its population may be a stub.
    """

    config: Config
    federation: Federation | None
    missing: str
    data: Description
    model: models.Model | models.StatisticsModel
    metric_fn: Callable[[Any, Any], dict[str, Array]]
    methods: dict[str, Trained]
    experiment: Experiment


def load_run(
    out: str | Path,
    *,
    methods: Sequence[str] | None = None,
    federation: Federation | None = None,
    experiment: Experiment | None = None,
    with_data: bool = True,
) -> Run:
    """Loads a run from its directory, on whatever devices there are.

    Args:
      out: the run directory. Nothing is written there.
      methods: those to load; all that have been saved unless given.
      federation: the federation that was trained on, where it was made of arrays and has no name to load it by.
      experiment: what was run (`pipelines.run.train.run`), for methods or a model that no configuration describes.
      with_data: whether to look for the data at all; without it, loading is quick.

    Raises:
      ValueError: if `out` is no run directory, has no checkpoint yet or none of a method that is asked for, or the data
        is gone and the directory is of a version that did not write down what it was like.
    """
    out = Path(out)
    config = train.read_config(out)
    known = train.read_description(out)
    for name in methods or ():
        pick("method of this run", name, config.methods)
    # How the machine was used when the run was made says nothing about this one.
    here = config.replace(mesh=None, model_parallel=1, lanes=None, memory=None)
    with jax.enable_x64(config.machine.x64):
        missing = "" if with_data else "it was not asked for"
        if experiment is not None:
            federation = experiment.federation
        elif federation is None and (with_data or known is None):
            federation, missing = _federation(here, known)
        if federation is None and known is None:
            raise ValueError(
                f"{out} does not say what its data was like, and the data is not there ({missing}): run it once more "
                "where the data is, which writes that down"
            )
        if experiment is None:
            # With one client a round any population will do; nothing is trained.
            bare = here.replace(
                sampler="uniform",
                cohort_size=1,
                attack_radius=0.0,
                staged=False,
                evaluate=("global",),
                patience=None,
                stop_at=None,
                keep_best=False,
            )
            found = known or description.of_federation(federation)  # type: ignore[arg-type]
            if config.models:  # whose clients are tested one by one, so that it is asked how they differ
                bare = bare.replace(partition="iid", clients=found["clients"], feature_skew="none")
            stub = description.without_data(found)
            experiment = setup.prepare(bare, stub)
        trained = {name: _trained(out, config, experiment, name) for name in methods or config.methods}
        there = {name: found for name, found in trained.items() if found is not None}
    lacking = [name for name in methods or () if name not in there]
    if lacking or not there:
        raise ValueError(f"{out} has no checkpoint of {', '.join(lacking or config.methods)}: run it first")
    data = known or description.of_federation(federation)  # type: ignore[arg-type]
    experiment = experiment._replace(config=here, federation=federation or experiment.federation)
    return Run(config, federation, missing, data, experiment.model, experiment.metric_fn, there, experiment)


def _federation(config: Config, known: Description | None) -> tuple[Federation | None, str]:
    """(the federation of a configuration, or None; why there is none)."""
    try:
        found = setup.federate(config)
    except (ValueError, OSError, ImportError) as error:
        return None, str(error)
    now = description.of_federation(found)
    changed = [name for name, value in (known or now).items() if name in now and now[name] != value]
    if changed:
        what = ", ".join(f"{name} is {now[name]} and was {(known or now)[name]}" for name in changed)
        return None, f"the data set {config.data.dataset!r} here is another one than that of the run: {what}"
    return found, ""


def _trained(out: Path, config: Config, experiment: Experiment, name: str) -> Trained | None:
    algorithm = experiment.algorithms[name]
    all_keys = jax.vmap(jax.random.key)(jnp.arange(config.first_seed, config.first_seed + config.seeds))
    model = jax.eval_shape(experiment.model.init, jax.random.key(0))
    parts, seeds, rounds = [], [], []
    all_seeds = experiment._replace(config=config, keys=all_keys)
    for first, batch in train.batches_of(all_seeds, train.seed_batches(out)):
        expected = jax.eval_shape(partial(_expected, batch, algorithm), batch.keys)
        folder = train.folder_of(out, name, first)
        saved = checkpoint.restore_latest(folder, expected, f"the state of {name}", run=train.run_name(out))
        if saved is not None:
            saved = _after(saved, folder / train.AFTER, early.split(expected)[0], name, train.run_name(out))
            parts.append(saved._replace(arrays=in_bytes(saved.arrays, model)))
            seeds += batch.seeds
            rounds += [saved.round] * len(batch.seeds)
    if not parts:
        return None
    whole_state = parts[0].state if len(parts) == 1 else jax.tree.map(_side_by_side, *[part.state for part in parts])
    state, kept = early.split(whole_state)
    last = best = best_state = None
    if kept is not None:
        with jax.enable_x64(config.machine.x64):
            best, best_state = early.best(config, algorithm, kept)
            last, last_state = early.last(config, algorithm, whole_state)
        if last_state is not None:
            state, last = last_state, None
    names = [key for key in parts[0].arrays if all(key in part.arrays for part in parts)]
    if all(np.all(early.stopped(part.state)) or part.round >= config.rounds for part in parts):
        history = side_by_side([{key: part.arrays[key] for key in names} for part in parts])
    else:
        history = {key: _as_far_as_all([part.arrays[key] for part in parts]) for key in names}
    num_clients = experiment.population.num_clients
    x64 = config.machine.x64
    return Trained(algorithm, state, seeds, rounds, history, num_clients, x64, best, last, best_state)


def _after(saved: checkpoint.Saved, folder: Path, expected: Any, name: str, run: str) -> checkpoint.Saved:
    """What is saved, with the state after what the method does after its last round, if it has done it since."""
    found = checkpoint.restore_latest(
        folder, expected, f"the state of {name}", lambda round: round == saved.round, run=run
    )
    if found is None:
        return saved
    _, models = early.split(saved.state)
    state = early.joined(found.state, None if models is None else models._replace(last=found.state))
    return saved._replace(state=state, arrays=saved.arrays | found.arrays)


def _expected(experiment: Experiment, algorithm: Algorithm, keys: Key) -> Any:
    return early.begin(experiment.config, algorithm, setup.initial_states(experiment, algorithm, keys))


def _side_by_side(*leaves: Any) -> Any:
    return jnp.concatenate(leaves) if isinstance(leaves[0], jax.Array) else np.concatenate(leaves)


def _as_far_as_all(arrays: Sequence[np.ndarray]) -> np.ndarray:
    shortest = min(array.shape[1] for array in arrays)
    return np.concatenate([array[:, :shortest] for array in arrays])
