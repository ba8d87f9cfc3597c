"""Methods x hyper-parameters x seeds: every setting of a grid is trained, one compiled program for each method.

    fedjax-core sweep --method fedavg --method fedprox --grid client_lr=log:0.01:1:5 --grid fedprox.mu=0.01,0.1

A trial is one setting with one seed. Trials of a method are trained together, by a `jax.vmap` over settings and seeds
which all devices share (from the command line, cores), as many at once as memory allows; what cannot be traced, an
integer or a choice, makes programs of its own. Settings are judged on examples that the clients keep back. With
successive halving most of them are given up early.

Every trial is saved when it is done, in `trials`, and about once a minute before, so that the same command goes on
where it was stopped, whatever stopped it; more values, seeds and methods may join. What comes out is written by
`pipelines.studies.sweep_report`: sweep.parquet, summary.md, results.tex, sensitivity.png and .pdf.
"""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fedjax_core import Algorithm, Array, Population, continue_rounds, needed_memory
from fedjax_core.types import PyTree
from pipelines.common import files
from pipelines.common.progress import duration
from pipelines.configuration import methods
from pipelines.experiment import memory, setup
from pipelines.experiment.setup import Experiment
from pipelines.results import history
from pipelines.run import identity, run_directory, trials
from pipelines.run.run_directory import Kind, Work
from pipelines.studies import sweep_scores
from pipelines.studies.sweep_config import Setting, Sweep

KIND = Kind("sweep", Sweep.from_values, "study.json", "part of the trials")

SAVE_SECONDS = 60.0
"""Between two times that trials which are under way are saved."""
LAST = 3
"""Evaluations at the end whose mean is the score of a trial: single ones jump about."""
_SHARE_OF_MEMORY = 0.5

Curves = dict[str, np.ndarray]
"""What a trial has measured, by the names of a history without seeds (`pipelines.results.history`): "round/<metric>"
[rounds, ...], "test/<metric>", "test/<view>/<metric>" and "validated/<metric>" [evaluations], "final/..." [1]."""


class Trial(NamedTuple):
    """A setting with a seed.

    Attributes:
      method: name of the method.
      setting: a point of its grid.
      seed: the seed.
    """

    method: str
    setting: Setting
    seed: int

    @property
    def of(self) -> dict[str, Any]:
        """What tells it from others, for its file."""
        return {"method": self.method, "setting": dict(self.setting.values), "seed": self.seed}

    def path(self, out: Path) -> Path:
        """Its file."""
        return out / "trials" / methods.folder(self.method) / f"{self.setting.name}-{self.seed}.npz"


Results = dict[Trial, Curves]
"""Of a method whose settings were halved those that were given up have shorter curves."""


def score(curves: Curves, by: str, rounds: int | None = None, every: int = 1, name: str | None = None) -> float:
    """The score of a trial: the mean of its last `LAST` evaluations, or what has come of it at the end.

    Args:
      curves: of the trial.
      by: "accuracy" or "loss".
      rounds: look no further than this round, where it is evaluated.
      every: rounds between evaluations.
      name: of the score, such as "test/accuracy"; that on validation examples, by which settings are judged, unless
        given.

    Returns:
      NaN if the trial diverged until then.
    """
    name = name or f"validated/{by}"
    if not sound_rounds(curves)[:rounds].all():
        return math.nan
    if rounds is None and f"final/{name}" in curves:
        return float(curves[f"final/{name}"][-1])
    values = curves[name] if rounds is None else curves[name][: -(-rounds // every)]
    return float(np.mean(values[-LAST:], dtype=np.float64))


def sound_rounds(curves: Curves) -> np.ndarray:
    """bool[rounds]: whether loss and update are finite; a round without participants has no loss."""
    took_part = curves["round/participants"] > 0
    return (np.isfinite(curves["round/loss"]) | ~took_part) & np.isfinite(curves["round/update_norm"])


def better_first(scores: np.ndarray, by: str) -> np.ndarray:
    """Indices from best to worst; what is not finite comes last."""
    signed = scores if by == "loss" else -scores
    return np.argsort(np.where(np.isfinite(signed), signed, np.inf), kind="stable")


def run(sweep: Sweep, out: Path, say: Callable[[str], None] = print) -> tuple[Sweep, Results]:
    """Trains what is not yet there of a sweep, and writes its report into the directory `out`.

    Returns:
      The sweep with what has joined it in that directory, and its trials.

    Raises:
      Interrupted: after SIGINT or SIGTERM, once what is under way is saved. A second signal ends the process.
      Unwritable: if the directory cannot be written to; what was saved is whole.
      ValueError: if a method refuses a value of its grid (by an error that names it and its place), something else is
        wrong with the sweep, the directory holds another one or one of other examples, or another process is at work
        in it.
    """
    from pipelines.studies import sweep_report

    sweep = joined(sweep, out)
    experiment = prepare(sweep)
    pinned = identity.identity(experiment.federation)
    claim(sweep, out, pinned)
    content = json.loads(sweep.to_json())
    main = {name: sweep_scores.main_view(experiment, name) for name in sweep.methods}
    with run_directory.at_work(out, KIND, say, lambda there: {"config": content, "views": main}, pinned) as work:
        found: Results = {}
        for method in sweep.methods:
            found |= _trials_of(sweep, experiment, method, work, say)
        if work.may_write:
            with files.explain_os_errors(out, "All trials are done and saved, and the report is not"):
                sweep_report.write(sweep, found, main, out, say)
        else:
            say(f"{out} is read-only, so its report stays as it is")
    return sweep, found


def prepare(sweep: Sweep) -> Experiment:
    """Everything the trials need; every value of every grid is given to its method once.

    Raises:
      ValueError: as `setup.prepare`, and for a value that a method refuses.
    """
    devices = jax.devices()
    if sweep.machine.mesh is not None and sweep.machine.mesh > len(devices):
        raise ValueError(
            f"mesh={sweep.machine.mesh} but there are {len(devices)} {devices[0].platform} devices: lower it"
        )
    # Devices have trials of their own; no client is spread over them. One seed's memory is looked at: how many are
    # trained at once is found out later.
    experiment = setup.prepare(sweep.replace(mesh=None, seeds=1))
    for method in sweep.methods:
        for setting in sweep.settings_of_grid(method):
            try:
                experiment.make(method, experiment.plan, setting.values)
            except (ValueError, TypeError) as error:
                if not setting.values:
                    raise
                raise ValueError(f"grid of {method}, {setting.where()}: {error}") from None
    return experiment._replace(config=sweep)


def joined(sweep: Sweep, out: Path) -> Sweep:
    """The sweep with what is in `out` already: others join and nothing leaves."""
    if not files.has_record(out / KIND.marker) or sweep.halving is not None:
        return sweep
    return sweep.joined(Sweep.from_values(run_directory.read(out, KIND)["config"]))


def claim(sweep: Sweep, out: Path, pinned: Mapping[str, str] | None = None) -> None:
    """Makes `out` the directory of a sweep, or checks that it holds the same one, or one with less in it.

    Raises:
      ValueError: if it holds another one (with what differs), one of other examples, or something else.
      Unwritable: if it cannot be written to.
    """
    where = identity.place(sweep.data.dataset, sweep.data.data_dir)
    content = json.loads(sweep.to_json())
    run_directory.claim(
        out, KIND, content, lambda there: sweep.check_grown_from(Sweep.from_values(there), out), pinned or {}, where
    )


class Program:
    """The compiled calls of one method with one choice of what cannot be traced, over any number of trials.

    P is the number of trials of a call, a multiple of the devices.

    Args:
      experiment: the experiment.
      method: name of the method.
      fixed: hyper-parameters that are not traced.
      names: those that are.
      devices: that share the trials.
      most: trials of a call at most, as far as it is known.
    """

    def __init__(
        self,
        experiment: Experiment,
        method: str,
        fixed: Mapping[str, Any],
        names: Sequence[str],
        devices: Sequence[Any],
        most: int,
    ) -> None:
        self._experiment, self._method, self._fixed = experiment, method, fixed
        self._names, self._most = tuple(names), most
        self._mesh = Mesh(np.asarray(devices), ("trials",))
        self._split = NamedSharding(self._mesh, PartitionSpec("trials"))
        algorithm = experiment.make(method, experiment.plan, fixed)
        examples, self._score = sweep_scores.scoring(experiment, algorithm)
        self._has_ending = bool(algorithm.events_at("after"))
        everywhere = NamedSharding(self._mesh, PartitionSpec())
        self._data = jax.device_put((experiment.population, examples), everywhere)
        self._begin = jax.jit(self._mapped(self._start, 2))
        self._compiled: dict[tuple[int, int, bool], Any] = {}

    def trials_of_a_call(self, trials: int, length: int) -> int:
        """How many of so many trials are to be trained together for `length` rounds a call: what fits into memory."""
        devices = self._mesh.size
        while True:
            calls = -(-trials // max(self._most, 1))
            together = -(-trials // (calls * devices)) * devices
            needed = needed_memory(self._advance(length, together, False))
            if needed <= _budget() or together <= devices:
                return together
            self._most = together // 2

    def start(self, group: Sequence[Trial], together: int) -> PyTree:
        """States before the first round, leaves [P, ...]."""
        return self._begin(*self._arguments(group, together), self._data)

    def stacked(self, states: Sequence[Sequence[np.ndarray]], together: int) -> PyTree:
        """States of trials, their leaves as `leaves` gave them, for a call: leaves [P, ...]."""
        states = [*states, *[states[-1]] * (together - len(states))]
        shapes, structure = jax.tree.flatten(self._shapes(together))
        found = []
        for shape, several in zip(shapes, zip(*states, strict=True), strict=True):
            leaf = np.stack(several)
            if jnp.issubdtype(shape.dtype, jax.dtypes.prng_key):
                found.append(jax.random.wrap_key_data(jnp.asarray(leaf), impl=jax.random.key_impl(shape)))
            else:
                found.append(leaf if leaf.dtype.kind != "V" else leaf.view(shape.dtype))  # numpy has no bfloat16
        return jax.device_put(jax.tree.unflatten(structure, found), self._split)

    def advance(self, length: int, states: PyTree, group: Sequence[Trial], together: int, *, last: bool) -> Any:
        """(states, metrics [P, length, ...], scores [P]) after `length` rounds; it takes the states over.

        After the last ones there are scores "final/..." of what a method makes of its state then, if it does something.
        """
        return self._advance(length, together, last)(*self._arguments(group, together), states, self._data)

    def _algorithm(self, rates: Mapping[str, Any]) -> Algorithm:
        return self._experiment.make(self._method, self._experiment.plan, {**self._fixed, **rates})

    def _start(self, rates: Mapping[str, Array], seed: Array, data: Any) -> PyTree:
        algorithm, key = self._algorithm(rates), jax.random.key(seed)[None]
        states = setup.initial_states(self._experiment, algorithm, key)
        return jax.tree.map(lambda leaf: leaf[0], setup.begun(algorithm, states, data[0], key))

    def _advance(self, length: int, together: int, last: bool) -> Any:
        last = last and self._has_ending

        def advance(rates: Mapping[str, Array], seed: Array, state: PyTree, data: Any) -> Any:
            algorithm, (population, examples), key = self._algorithm(rates), data, jax.random.key(seed)
            rounds = continue_rounds(algorithm, self._experiment.sampler, length)
            state, metrics = rounds(state, population, setup.run_keys(key)[1])
            scores = self._score(algorithm, state, key, examples)
            if last:
                ended = setup.ended(algorithm, jax.tree.map(lambda leaf: leaf[None], state), population, key[None])
                of_end = self._score(algorithm, jax.tree.map(lambda leaf: leaf[0], ended), key, examples)
                scores |= {f"final/{name}": value for name, value in of_end.items()}
            return state, metrics, scores

        if (length, together, last) not in self._compiled:
            jitted = jax.jit(self._mapped(advance, 3), donate_argnums=2)
            arguments = self._arguments([], together)
            compiled = jitted.lower(*arguments, self._shapes(together), self._data).compile()
            self._compiled[length, together, last] = compiled
        return self._compiled[length, together, last]

    def _mapped(self, function: Callable[..., Any], batched: int) -> Callable[..., Any]:
        """Over trials, each device its own: the first arguments are theirs, the last is the same for all."""
        over = PartitionSpec("trials")
        return jax.shard_map(
            jax.vmap(function, in_axes=(*[0] * batched, None)),
            mesh=self._mesh,
            in_specs=(*[over] * batched, PartitionSpec()),
            out_specs=over,
            check_vma=False,
        )

    def _shapes(self, together: int) -> Any:
        shapes = jax.eval_shape(self._mapped(self._start, 2), *self._arguments([], together), self._data)
        return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=self._split), shapes)

    def _arguments(self, group: Sequence[Trial], together: int) -> tuple[dict[str, Any], Any]:
        """(traced hyper-parameters [P], seeds [P]) of trials, the last of them again and again; shapes for none."""
        if not group:
            rate = jax.ShapeDtypeStruct((together,), jnp.result_type(float), sharding=self._split)
            seeds = jax.ShapeDtypeStruct((together,), jnp.int32, sharding=self._split)
            return dict.fromkeys(self._names, rate), seeds
        filled = [*group, *[group[-1]] * (together - len(group))]
        rates = {
            name: np.asarray([trial.setting.values[name] for trial in filled], jnp.result_type(float))
            for name in self._names
        }
        return jax.device_put((rates, np.asarray([trial.seed for trial in filled], np.int32)), self._split)


def _leaves(states: PyTree) -> list[np.ndarray]:
    """The leaves [P, ...] of states as numpy arrays; typed keys as their data."""
    typed = [jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) for leaf in jax.tree.leaves(states)]
    return [
        np.asarray(jax.random.key_data(leaf) if is_key else leaf)
        for leaf, is_key in zip(jax.tree.leaves(states), typed, strict=True)
    ]


def _budget() -> float:
    """Bytes that a compiled call may take on one device."""
    if jax.default_backend() == "cpu":
        return _SHARE_OF_MEMORY * memory.available() / len(jax.devices())
    limits = jax.local_devices()[0].memory_stats() or {}
    return _SHARE_OF_MEMORY * limits.get("bytes_limit", float("inf"))


def _traced(experiment: Experiment, method: str, values: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the hyper-parameters, of these of a method, whose values can share a program."""
    floats = [name for name, value in values.items() if isinstance(value, float) and name not in _UNTRACED]

    def can_be(names: Sequence[str]) -> bool:
        def one(rates: Mapping[str, Array]) -> Any:
            rest = {name: value for name, value in values.items() if name not in names}
            algorithm = experiment.make(method, experiment.plan, {**rest, **rates})
            key = experiment.keys[:1]
            state = jax.tree.map(lambda leaf: leaf[0], setup.initial_states(experiment, algorithm, key))
            assert isinstance(experiment.population, Population)  # a sweep is never staged
            cohort = experiment.population.cohort(experiment.sampler(key[0], jnp.int32(0)))
            return algorithm.round(state, cohort, key[0])

        try:
            jax.eval_shape(one, {name: jnp.float32(0) for name in names})
        except Exception:  # a method of the user's own may say anything
            return False
        return True

    return tuple(floats if can_be(floats) else [name for name in floats if can_be([name])])


_UNTRACED = ("client_momentum", "client_lr_decay", "client_weight_decay")
"""They decide what the clients' optimizer is made of."""


def _trials_of(sweep: Sweep, experiment: Experiment, method: str, work: Work, say: Callable[[str], None]) -> Results:
    """The trials of a method; trains those that are not there."""
    settings = sweep.settings_of_grid(method)
    seeds = sweep.all_seeds
    by, every = sweep.evaluation.best_by, sweep.evaluation.eval_every
    names = [name for name in settings[0].values]
    traced = _traced(experiment, method, settings[0].values)
    fixed_names = [name for name in names if name not in traced]
    devices = jax.devices()[: sweep.machine.mesh]
    found: Results = {}
    for setting in settings:
        for seed in seeds:
            trial = Trial(method, setting, seed)
            if (stored := trials.load(trial.path(work.out), work.run, trial.of)) is not None:
                found[trial] = stored
    programs: dict[Any, Program] = {}
    begin = time.monotonic()

    def fixed(setting: Setting) -> dict[str, Any]:
        return {name: setting.values[name] for name in fixed_names}

    def program(setting: Setting) -> Program:
        own = fixed(setting)
        key = tuple(own.values())
        if key not in programs:
            most = sweep.at_once or _first_guess(experiment, method)
            programs[key] = Program(experiment, method, own, traced, devices, most)
        return programs[key]

    def value(setting: Setting, rounds: int | None = None) -> float:
        scores = [score(found[Trial(method, setting, seed)], by, rounds, every) for seed in seeds]
        return float(np.mean(scores))

    def ranked(some: Sequence[Setting], rounds: int | None = None) -> list[Setting]:
        return [some[i] for i in better_first(np.asarray([value(setting, rounds) for setting in some]), by)]

    alive = list(settings)
    for end, kept in sweep.rungs(method):
        missing = [Trial(method, setting, seed) for setting in alive for seed in seeds]
        missing = [trial for trial in missing if rounds_done(found.get(trial)) < end]
        if missing:
            with files.explain_os_errors(work.out):
                work.check_writable()
            number = len({trial.setting.name for trial in missing})
            say(f"{method}: {number} settings, {len(missing)} trials to round {end}")
        alike: dict[Any, list[Trial]] = {}
        for trial in missing:
            done = rounds_done(found.get(trial)) if _can_go_on(found.get(trial)) else 0
            alike.setdefault((done, tuple(fixed(trial.setting).values())), []).append(trial)
        # What has come furthest is finished first.
        for (done, _), waiting in sorted(alike.items(), key=lambda item: -item[0][0]):
            while waiting:
                own = program(waiting[0].setting)
                together = own.trials_of_a_call(len(waiting), min(every, end - done))
                group, waiting = waiting[:together], waiting[together:]
                _train(own, sweep, group, together, done, end, found, work, say)
        if kept:
            order = ranked(alive, end)
            for setting in order[kept:]:  # their states are not needed any more
                for seed in seeds:
                    trial = Trial(method, setting, seed)
                    if _can_go_on(found[trial]):
                        found[trial] = measured(found[trial])
                        _save(work, trial, found[trial])
            alive = [setting for setting in alive if setting in order[:kept]]
            say(f"{method}: {kept} settings go on beyond round {end}, the best of them {order[0] or 'as it is'}")
    best = ranked(alive)[0]
    took = f" in {duration(time.monotonic() - begin)}" if programs else ""
    say(f"{method}: done{took}, best {best}: validation {by} {value(best):.4g}")
    return {trial: measured(curves) for trial, curves in found.items()}


def _train(
    program: "Program",
    sweep: Sweep,
    group: list[Trial],
    together: int,
    done: int,
    end: int,
    found: Results,
    work: Work,
    say: Callable[[str], None],
) -> None:
    """Trains some trials, which all have done as many rounds, to a round, and saves them."""
    states = (
        program.stacked([_states(found[trial]) for trial in group], together)
        if done
        else program.start(group, together)
    )
    curves = [measured(found[trial]) if done else {} for trial in group]
    saved = time.monotonic()

    def keep(states: PyTree | None) -> None:
        leaves = [] if states is None else _leaves(states)
        with files.explain_os_errors(work.out):
            for i, trial in enumerate(group):
                own = {f"{_STATE}{j}": leaf[i] for j, leaf in enumerate(leaves)}
                found[trial] = {**curves[i], **own}
                _save(work, trial, found[trial])

    while done < end:
        length = min(sweep.evaluation.eval_every, end - done)
        last = done + length == sweep.rounds
        advanced = program.advance(length, states, group, together, last=last)
        states, metrics, scores = run_directory.waited_for(advanced)
        done += length
        new = history.from_rounds(metrics, scores)
        for i in range(len(group)):
            own = {name: values[i] for name, values in new.items()}
            curves[i] = {
                name: np.concatenate([curves[i][name], values]) if name in curves[i] else values
                for name, values in own.items()
            }
        if done == end:
            keep(None if end == sweep.rounds else states)
        elif (stop := work.stop()) or time.monotonic() - saved > SAVE_SECONDS:
            keep(states)
            saved = time.monotonic()
            if stop:
                raise run_directory.interruption(
                    stop, f"after round {done} of {len(group)} trials of {group[0].method}", sweep.command(work.out)
                )
    if stop := work.stop():
        raise run_directory.interruption(
            stop, f"after {len(group)} trials of {group[0].method}", sweep.command(work.out)
        )


_STATE = "state/"


def measured(arrays: trials.Arrays) -> Curves:
    """What a trial has measured, without its state."""
    return {name: values for name, values in arrays.items() if not name.startswith(_STATE)}


def rounds_done(arrays: trials.Arrays | None) -> int:
    """Rounds that a trial has done."""
    return 0 if arrays is None else len(arrays["round/loss"])


def _states(arrays: trials.Arrays) -> list[np.ndarray]:
    return [arrays[f"{_STATE}{j}"] for j in range(sum(name.startswith(_STATE) for name in arrays))]


def saved_trials(sweep: Sweep, method: str, out: Path, run: str) -> Results | None:
    """The trials of a method, from their files; None unless the method is done.

    Raises:
      ValueError: if a file is damaged, or is that of another trial or study.
    """
    found: Results = {}
    ended = False
    for setting in sweep.settings_of_grid(method):
        for seed in sweep.all_seeds:
            trial = Trial(method, setting, seed)
            arrays = trials.load(trial.path(out), run, trial.of, whole=True)
            if arrays is None or _can_go_on(arrays):
                return None
            found[trial] = measured(arrays)
            ended = ended or rounds_done(arrays) == sweep.rounds
    return found if ended else None


def _can_go_on(arrays: trials.Arrays | None) -> bool:
    return arrays is not None and any(name.startswith(_STATE) for name in arrays)


def _save(work: Work, trial: Trial, arrays: trials.Arrays) -> None:
    trials.save(trial.path(work.out), work.run, trial.of, arrays)


def _first_guess(experiment: Experiment, method: str) -> int:
    """How many trials may fit into memory, by what is predicted of one."""
    parts = setup.predicted_memory(experiment._replace(config=experiment.config.replace(seeds=1)), method)
    one = sum(number for part, number in parts.items() if part != "data")
    return int(min(max(_budget() * len(jax.devices()) / max(one, 1), 1), 2**16))
