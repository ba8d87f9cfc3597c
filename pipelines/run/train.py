"""Runs a configuration: chunk by chunk, saved, resumable, all seeds at once.

A chunk is one compiled call of `eval_every` rounds and the evaluation after them. Chunks lie on a fixed grid of
rounds, so that a run that was stopped anywhere makes the very calls that an uninterrupted one makes, and gives its
numbers bit for bit (on one version of JAX and one kind of machine).

A run can grow: the same directory is given more rounds, seeds or methods (`Config.check_grown_from`). More rounds go on
from the last evaluation that the longer run makes too. Seeds that join later run beside the others as a batch of their
own, so that no number of those that are there changes.

A run directory:

    config.json             what is run, the versions that ran it, its batches of seeds, what is known of the data, the
                            name of the run, what its report says of it, and digests of the data and of itself
    checkpoints/            a copy of config.json
    checkpoints/<method>/   `pipelines.run.checkpoint`: the latest states; seeds-<first>/ in it is a batch
                            that joined later; <method>.journal/ has the metrics (`pipelines.run.journal`). Of a method
                            that does something after its last round (`fedjax_core.Event`) after/ in it has the state
                            that has come of it; more rounds go on from the state before
    metrics.csv             every metric of every round: appended to with every checkpoint, put in order at the end;
                            later seeds when they are done
    clients.csv, summary.md, .html and .json, results.tex, and curves and clients as .png and .pdf     at the end
    clients.parquet         so too, where it is asked for
"""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from fedjax_core import Algorithm, evaluate_examples, is_weighted, metric_values, out_of_memory
from fedjax_core.types import Params, PyTree
from pipelines.common import files, processes
from pipelines.common.files import Unwritable as Unwritable
from pipelines.common.processes import Refused
from pipelines.common.progress import Progression, Reporter, Speed, duration, silent, size
from pipelines.configuration import methods
from pipelines.configuration.config import Config
from pipelines.experiment import plans, views
from pipelines.experiment.setup import EVAL_BATCH, Experiment, memory_fix, prepare
from pipelines.federation import heterogeneity
from pipelines.federation.federations import Federation
from pipelines.results import early, history, report, subject
from pipelines.results.history import History
from pipelines.run import checkpoint, client_scores, engines, identity, run_directory
from pipelines.run.description import Description, described
from pipelines.run.run_directory import Interrupted, Kind, Work, versions, waited_for

AFTER = "after"
"""Folder of the state after what a method does after its last round, in that of its checkpoints."""


class Diverged(Exception):  # noqa: N818 (named for what happened)
    """The loss or the model is no longer finite; the last good state is saved."""


class _OutOfMemory(Exception):  # noqa: N818 (named for what happened)
    """The compiled rounds need more memory than there is."""


class Result(NamedTuple):
    """A finished method.

    Attributes:
      history: see `pipelines.results.history`.
      info: "compile_seconds", "run_seconds" and "memory", the bytes the compiled chunk needs.
    """

    history: History
    info: dict[str, Any]


def train(config: Config, out: str | Path, *, reporter: Reporter | None = None) -> dict[str, Result]:
    """Runs a configuration in the directory `out`, or what is left of it."""
    config = joined(config, Path(out))
    with jax.enable_x64(config.machine.x64):
        return run(prepare(config), out, reporter=reporter)


def run(experiment: Experiment, out: str | Path, *, reporter: Reporter | None = None) -> dict[str, Result]:
    """Runs an experiment in the directory `out`, or what is left of it, and writes the report.

    Args:
      experiment: from `pipelines.experiment.setup.prepare`.
      out: the run directory; made if need be.
      reporter: where words go; nowhere unless given.

    Returns:
      Method to its result.

    Raises:
      ValueError: if the directory belongs to another configuration, or to something else.
      Refused: if another process is at work in it, or memory suffices for no plan.
      Interrupted: after SIGINT or SIGTERM, once the chunk is done and saved. A second signal ends the process.
      Diverged: if the loss or the model is no longer finite.
      Unwritable: if the directory cannot be written to; what was saved is whole.
      Lost: if another process of the run is gone.
    """
    reporter = (reporter if processes.is_first() else None) or silent()
    out = Path(out)
    claim(out, experiment.config, experiment.federation)
    machine = experiment.config.with_role("machine")
    pinned = identity.identity(experiment.federation)
    grown = partial(_grown, experiment)
    with _all_processes(out), run_directory.at_work(out, KIND, reporter.say, grown, pinned, machine) as work:
        return _run(experiment, reporter, work)


def _run(experiment: Experiment, reporter: Reporter, work: Work) -> dict[str, Result]:
    out = work.out
    for name, file in _edited(out, experiment.config):
        reporter.say(
            f"note: {file}, which {name} is of, has been edited since this run was begun: what comes now may be "
            "another method, model or data set than what was run before"
        )
    results: dict[str, Result] = {}
    for name in experiment.algorithms:
        try:
            with files.explain_os_errors(out, partial(_saved, out, name)):
                results[name] = _run_method(experiment, name, results, reporter, work)
        finally:
            reporter.finish()
    histories = {name: result.history for name, result in results.items()}
    info = {name: result.info for name, result in results.items()}
    if not work.may_write:
        reporter.say(f"{out} is read-only, so its report stays as it is")
    elif processes.is_first():
        with files.explain_os_errors(out, "All rounds are done and saved, and the report is not"):
            report.write(out, experiment, histories, info, versions())
    processes.wait_for_all("report")
    return results


def _saved(out: Path, name: str) -> str:
    """What is saved of a method, in words."""
    round = checkpoint.latest_round(_folder(out, name))
    return f"{name} is saved after round {round}" if round else f"Nothing of {name} is saved yet"


def final_params(out: str | Path, method: str) -> Params:
    """The models a run has come to, leaves [S, ...] over its seeds, from the latest checkpoint of a method.

    Raises:
      ValueError: if `out` is no run directory, or has no checkpoint of the method.
    """
    from pipelines.run import loading  # which reads what this module writes

    trained = loading.load_run(out, methods=[method], with_data=False).methods[method]
    with jax.enable_x64(trained.x64):
        return early.global_params(trained.algorithm, trained.state) if trained.last is None else trained.last


def read_config(out: Path) -> Config:
    """The configuration of a run directory.

    Raises:
      ValueError: if it is none.
    """
    return _config(run_directory.read(out, KIND)["config"])


def _config(content: Any) -> Config:
    """The configuration of a record; in runs of before there were views the global model alone was evaluated."""
    config = Config.from_values(content)
    said = content.get("evaluation", {}) if isinstance(content, Mapping) else {}
    if "evaluate" in content or (isinstance(said, Mapping) and "evaluate" in said):
        return config
    return config.replace(evaluate=(views.GLOBAL,))


KIND = Kind("train", _config)


def saved_config(out: Path) -> Config | None:
    """The configuration of the run in a directory, or None if there is none."""
    found = processes.first_does(lambda: read_config(out).to_json() if files.has_record(out / "config.json") else None)
    return None if found is None else Config.from_json(found)


def joined(config: Config, out: Path) -> Config:
    """The configuration with the methods that the run in `out` has already: others join them and none leaves."""
    saved = saved_config(out)
    return config if saved is None else config.with_methods_of(saved)


def claim(out: Path, config: Config, federation: Federation | None = None) -> None:
    """Makes `out` the run directory of `config`, or checks that it is, or can grow to be.

    Args:
      out: the directory.
      config: the configuration.
      federation: what `pipelines.experiment.setup.federate` made of it; its digest belongs to the run and is
        checked if given.

    Raises:
      ValueError: if it holds a run of another configuration (with the fields that differ) or of other examples, or
        something else.
      Unwritable: if it cannot be written to.
    """

    run_directory.claim(
        out,
        KIND,
        json.loads(config.to_json()),
        lambda there: config.check_grown_from(_config(there), out),
        {} if federation is None else identity.identity(federation),
        identity.place(config.data.dataset, config.data.data_dir),
        sources=config.sources(),
    )


def run_name(out: Path) -> str:
    """The name that the run in a directory has given its checkpoints; empty for one of before there were names."""
    return str(run_directory.read(out, KIND).get("run", ""))


def _grown(experiment: Experiment, content: Mapping[str, Any]) -> dict[str, Any]:
    """What a record says of the run as it is now, and what is needed to use it without its data."""
    config, saved = experiment.config, _config(content["config"])
    # How the machine was used when it began stays on record: another plan changes last bits.
    kept = saved.with_role("machine")
    return {
        "sources": {**config.sources(), **content.get("sources", {})},
        "config": json.loads(config.replace(**kept).to_json()),
        "batches": content.get("batches", [saved.seeds]) + [config.seeds - saved.seeds] * (config.seeds > saved.seeds),
        "data": described(experiment),
        "subject": subject.of_experiment(experiment).as_json(),
    }


def read_description(out: Path) -> Description | None:
    """What the run directory says of its data, or None if it is of a version that said nothing."""
    found: Description | None = run_directory.read(out, KIND).get("data")
    return found


def seed_batches(out: Path) -> list[int]:
    """The numbers of seeds that were run at once, in the order in which they joined the run in `out`."""
    content = run_directory.read(out, KIND)
    return list(content.get("batches", [content["config"]["seeds"]]))


class _Batch(NamedTuple):
    """Seeds of a method that run at once.

    Attributes:
      experiment: the experiment with these seeds alone.
      run_config: the configuration of the run.
      label: the method, and the seeds if they joined later, for messages.
      folder: of the checkpoints.
      before: what came of the method's batches before this one.
    """

    experiment: Experiment
    run_config: Config
    label: str
    folder: Path
    before: list[Result]


def _edited(out: Path, config: Config) -> list[tuple[str, str]]:
    """(name, file) of the user's own code whose file is another than the one that began the run."""
    then = run_directory.read(out, KIND).get("sources", {})
    now = config.sources()
    return [
        (name, source["file"]) for name, source in now.items() if then.get(name, source)["sha256"] != source["sha256"]
    ]


def _run_method(
    experiment: Experiment,
    name: str,
    finished: dict[str, Result],
    reporter: Reporter,
    work: Work,
) -> Result:
    """Runs a method, one batch of seeds after the other."""
    results: list[Result] = []
    for first, part in batches_of(experiment, processes.first_does(lambda: seed_batches(work.out))):
        folder = folder_of(work.out, name, first)
        label = name if not first else f"{name}, seeds {part.seeds[0]} to {part.seeds[-1]}"
        batch = _Batch(part, experiment.config, label, folder, results)
        results = [*results, _run_batch(batch, name, finished, reporter, work)]
    return merged(results)


def batches_of(experiment: Experiment, sizes: Sequence[int]) -> list[tuple[int, Experiment]]:
    """(number of seeds before it, the experiment with its seeds alone) of every batch."""
    parts = []
    for first, number in zip(np.cumsum([0, *sizes]).tolist(), sizes, strict=False):
        config = experiment.config.replace(first_seed=experiment.config.first_seed + first, seeds=number)
        parts.append((first, experiment._replace(config=config, keys=experiment.keys[first : first + number])))
    return parts


def folder_of(out: Path, method: str, first: int) -> Path:
    """Where the checkpoints of a batch of seeds are, of which `first` others were there before."""
    return _folder(out, method) / f"seeds-{first}" if first else _folder(out, method)


def merged(results: Sequence[Result]) -> Result:
    """What came of all batches: seeds side by side, seconds added up, the largest program's memory."""
    if len(results) == 1:
        return results[0]
    histories, infos = [result.history for result in results], [result.info for result in results]
    info = {key: (max if key == "memory" else sum)([each[key] for each in infos]) for key in infos[0]}
    return Result(history.side_by_side(histories), info)


def _run_batch(
    batch: _Batch,
    name: str,
    finished: dict[str, Result],
    reporter: Reporter,
    work: Work,
) -> Result:
    """Runs a method with the plan of the experiment, or with the first smaller one that memory suffices for."""
    experiment = plans.fitted(batch.experiment, name, reporter)
    while True:
        try:
            part = batch._replace(experiment=experiment)
            return _run_with_plan(part, name, finished, reporter, work)
        except (_OutOfMemory, jax.errors.JaxRuntimeError) as error:
            if not (isinstance(error, _OutOfMemory) or out_of_memory(error)) or jax.process_count() > 1:
                raise
            less, said = plans.smaller(experiment), str(error).splitlines()[0]
        # Outside of the except block, where the error would keep the arrays of the failed attempt alive.
        if less is None:
            raise Refused(f"{name} does not fit into memory ({said}): {memory_fix(experiment, name)}")
        reporter.say(f"{name}: {said}; going on with {plans.described(less)}")
        experiment = plans.with_plan(experiment, name, less)


def _run_with_plan(
    batch: _Batch,
    name: str,
    finished: dict[str, Result],
    reporter: Reporter,
    work: Work,
) -> Result:
    experiment, label, folder = batch.experiment, batch.label, batch.folder
    config, algorithm = experiment.config, experiment.algorithms[name]
    engine, out, run = engines.engine(experiment, algorithm), work.out, work.run
    chosen = views.evaluated(config, algorithm)
    scorers = client_scores.scorers(experiment, algorithm)
    eval_rounds = history.evaluated_rounds(config.rounds, config.evaluation.eval_every)
    last_but_end = config.rounds // config.evaluation.eval_every * config.evaluation.eval_every

    def on_grid(round: int) -> bool:
        """Whether this run is evaluated there; one that was shorter ended anywhere."""
        return round == config.rounds or (round < config.rounds and round % config.evaluation.eval_every == 0)

    def first() -> tuple[Any, checkpoint.Saved]:
        saved = checkpoint.restore_latest(folder, engine.expected, f"the state of {name}", on_grid, run=run)
        if saved is None:
            none = checkpoint.Saved(0, None, {}, {"compile_seconds": 0.0, "run_seconds": 0.0, "memory": 0})
            return engine.start(), none
        model = jax.eval_shape(experiment.model.init, jax.random.key(0))
        return engine.place(saved.state), saved._replace(arrays=history.in_bytes(saved.arrays, model))

    state, saved = first()
    round, info, mark = saved.round, saved.info, saved.mark
    ending: History = {}
    if round >= config.rounds or np.all(early.stopped(state)):
        reporter.say(f"{label}: complete, {round} rounds")
        ending = _ending(experiment, algorithm, engine, scorers, state, folder, round, work)
        saved = saved._replace(arrays=saved.arrays | ending)
        if work.may_write:
            stops = early.last_rounds(config, saved.arrays, eval_rounds, len(experiment.seeds))
            reporter.log(name, experiment.seeds, 0, saved.arrays, stops)
        reporter.event("finished", {"method": name, "seeds": experiment.seeds, "rounds": round})
        return Result(saved.arrays, info)
    work.check_writable()
    measured = history.Growing(history.growing(saved.arrays))
    if not mark.length:
        measured.unsave()
    del saved
    if stop := work.stop():
        raise _interruption(batch, out, round, stop)
    if round:
        reporter.say(f"{label}: going on after round {round}")
    # The round in which each seed stopped; beyond the last one for those that go on.
    ends = early.last_rounds(config, measured.joined(), eval_rounds, len(experiment.seeds))
    reporter.log(name, experiment.seeds, 0, measured.joined(), ends)
    reporter.event("compiling", {"method": name, "seeds": experiment.seeds})

    grid = [0, *eval_rounds.tolist()]
    lengths = {after - before for before, after in pairwise(grid) if after > round}
    begin = time.monotonic()
    reporter.say(f"{label}: compiles with its first round" if config.machine.staged else f"{label}: compiling ...")
    chunks = {length: engine.compile(length, state) for length in sorted(lengths)}
    seconds = time.monotonic() - begin
    info["compile_seconds"] += seconds
    info["memory"] = max(chunk.needed for chunk in chunks.values())
    if info["memory"] > plans.device_memory(experiment):
        raise _OutOfMemory(
            f"{plans.described(experiment.plan)} needs {size(info['memory'])} and a device has "
            f"{size(plans.device_memory(experiment))}"
        )
    if not config.machine.staged:
        reporter.say(f"{label}: compiled in {duration(seconds)}, needs {size(info['memory'])}")

    earlier = {method: result.history for method, result in finished.items()}
    seeds = range(batch.run_config.first_seed, batch.run_config.first_seed + batch.run_config.seeds)
    columns: history.Columns | None = None  # of metrics.csv, which is written anew once and then appended to

    def save(ending: History | None = None) -> None:
        nonlocal mark, columns
        new = measured.unsaved()
        mark = checkpoint.save(folder, round, state, ending or {}, info, mark=mark, new=new, run=run)
        measured.saved()
        if not processes.is_first():
            return
        reporter.event("saved", {"method": name, "seeds": experiment.seeds, "round": round, "path": str(folder)})
        if batch.before and columns is None:
            earlier[name] = merged(batch.before).history
        if columns is None:
            everything = earlier if batch.before else {**earlier, name: measured.joined()}
            columns = history.csv_columns(everything)
            stops = early.ends(config, everything, eval_rounds)
            files.write_text(out / "metrics.csv", history.to_csv(everything, seeds, eval_rounds, stops))
        elif new and not batch.before:
            begin = round - new["round/loss"].shape[1]
            rows = history.csv_rows({name: new}, experiment.seeds, eval_rounds, columns, begin, {name: ends})
            files.append_text(out / "metrics.csv", rows)

    speed = Speed(round)
    follow = _follower(experiment, algorithm)
    judge = _judge(experiment, algorithm, scorers)
    for before, after in pairwise(grid):
        if after <= round:
            continue
        since = time.monotonic()
        state, metrics, scores, is_finite = waited_for(chunks[after - before].run(state))
        state, of_clients, more = judge(state)
        scores |= more
        new, going = history.from_rounds(metrics, scores), ends > round
        if history.first_bad_round(history.of_seeds(new, going)) or not bool(is_finite):
            good_round, good = round, measured.joined()
            state, saved = first()
            round, info, mark = saved.round, saved.info, saved.mark
            for left, right in pairwise(grid):
                # The state before this chunk was given away to it, so it is computed again from the last checkpoint.
                if round <= left and right <= good_round:
                    state = judge(chunks[right - left].run(state)[0])[0]
            measured = history.Growing(history.growing(saved.arrays))
            evaluations = int(np.searchsorted(eval_rounds, round, side="right"))
            measured.append(history.after(good, round, evaluations))
            round = good_round
            save()
            known_losses = _losses(experiment, algorithm, state)
            known = history.until(history.append(good, new), ends)
            cause = diagnose(experiment, name, known, known_losses)
            raise Diverged(f"{cause}\nThe state after round {round}, the last good one, is saved in {folder}.")
        if config.evaluation.clients_over_time:
            new |= {key: value[:, None] for key, value in follow(state, of_clients).items()}
        measured.append(new)
        round = after
        ends = np.where(going & early.stopped(state), round, ends)
        info["run_seconds"] += time.monotonic() - since
        shown = history.of_seeds(new, going)
        loss = history.mean_known(history.mean_losses(shown, np.asarray([after - before])))
        accuracy = float(shown[history.of_view("test", chosen.main, "accuracy")].mean())
        ended = round == config.rounds or bool(np.all(early.stopped(state)))
        rate = speed.at(round)
        reporter.log(name, experiment.seeds, before, new, ends)
        reporter.event("evaluated", _evaluation(experiment, name, round, rate, new, ends))
        reporter.update(Progression(label, round, config.rounds, rate, loss, accuracy))
        if ended:
            ending = _at_the_end(experiment, algorithm, scorers, state)
        stop = work.stop()
        # From the last evaluation before an end between two a longer run can go on.
        if round % config.report.checkpoint_every == 0 or round == last_but_end or ended or stop:
            save(ending)
        if ended and algorithm.events_at("after"):
            if stop:
                raise _interruption(batch, out, round, stop)
            ending |= _ending(experiment, algorithm, engine, scorers, state, folder, round, work)
        if ended:
            reporter.event("finished", {"method": name, "seeds": experiment.seeds, "rounds": round})
            break
        if stop:
            raise _interruption(batch, out, round, stop)
    return Result(measured.joined() | ending, info)


def _evaluation(
    experiment: Experiment, name: str, round: int, speed: float, new: History, ends: np.ndarray
) -> dict[str, Any]:
    """The fields of the event "evaluated": `new` is the history since the evaluation before, `ends` when seeds stop."""
    rounds = np.asarray([new["round/loss"].shape[1]])
    going = ends >= round
    scores = {history.column(key): value[:, 0] for key, value in new.items() if history.is_score(key)}
    values = {"train_loss": history.mean_losses(new, rounds)[:, 0], **scores}
    return {
        "method": name,
        "round": round,
        "rounds": experiment.config.rounds,
        "seeds": experiment.seeds,
        "rounds_per_second": speed,
        "stopped": (ends <= round).tolist(),
        **{key: np.where(going, value, np.nan).tolist() for key, value in values.items()},
    }


def _per_client(experiment: Experiment, params: Params) -> History:
    """How global models, leaves [S, ...], do for every client, [S, N], and for clients that took no part, [S, N'].

    "client/<metric>" is held out: on the client's own test examples where it has some. Where the federation has no such
    part it is the metric of each class of the test examples, averaged with the client's shares of the classes.
    "client/train_<metric>" is on the client's own training examples. Sequences have no class, so there both are the
    same. "validation/<metric>" and "new/<metric>" are there with such a part.
    """
    parts = experiment.federation.parts
    found = {f"client/train_{name}": value for name, value in _on_part(experiment, params, "train").items()}
    for part in ("validation", "new"):
        if part in parts:
            found |= {f"{part}/{name}": value for name, value in _on_part(experiment, params, part).items()}
    if "test" in parts:
        return found | {f"client/{name}": value for name, value in _on_part(experiment, params, "test").items()}
    if experiment.dataset.is_sequence:
        return found | {name.replace("train_", ""): value for name, value in found.items() if "train_" in name}
    on_examples = jax.vmap(partial(evaluate_examples, experiment.metric_fn, batch_size=EVAL_BATCH), (0, None))
    tested = _with_weights(
        jax.jit(on_examples, out_shardings=engines.replicated_results(experiment))(
            params, engines.placement(experiment)(experiment.test)
        )
    )
    shares = class_shares(experiment.federation)
    labels = np.asarray(experiment.dataset.test["y"])
    classes = np.unique(labels)  # a class without test examples cannot count
    weights = shares[:, classes]
    with np.errstate(invalid="ignore"):
        weights = weights / weights.sum(axis=1, keepdims=True)
    # As the means of each class of examples, as if it were a client.
    order = np.argsort(labels, kind="stable")
    ends = np.concatenate([[0], np.searchsorted(labels[order], classes, side="right")])
    for name, (value, weight) in tested.items():
        by_class = _means(value[:, order], ends, weight[:, order])
        found[f"client/{name}"] = (weights @ by_class.T).T
    return found


def _judge(
    experiment: Experiment, algorithm: Algorithm, scorers: Sequence[client_scores.Scorer]
) -> Callable[[Any], tuple[Any, Any, History]]:
    """`judge(state) -> (state, {view: scores of clients [S, N]}, scores)` for views in which clients differ.

    What is remembered is decided here where one of these is the main view, and with the rounds otherwise. The scores go
    by the names of a history.
    """
    config = experiment.config
    chosen = views.evaluated(config, algorithm)
    on_validation = [each for each in scorers if each.view == chosen.main] if config.evaluation.validates else []
    update = jax.jit(partial(early.updated, config))

    def judge(tree: Any) -> tuple[Any, Any, History]:
        state, models = early.split(tree)
        of_clients = {each.view: each.scores(state) for each in scorers}
        scores: History = {}
        for view, values in of_clients.items():
            scores |= client_scores.over_clients(view, values)
        if on_validation and models is not None:
            means = client_scores.means(on_validation[0].scores(state, "validation"))
            scores |= {f"validated/{metric}": value for metric, value in means.items()}
            models = update(models, early.of_state(config, algorithm, state), means)
        return early.joined(state, models), of_clients, scores

    return judge


def _follower(experiment: Experiment, algorithm: Algorithm) -> Callable[[Any, Any], History]:
    """`follow(state, {view: scores of clients [S, N]})`: these and those of the global model, "each/..." [S, N]."""
    over_time = experiment.config.evaluation.clients_over_time
    with_global = over_time and _tests_one_global(experiment, algorithm)
    score = _part_scorer(experiment, report.part_of_clients(experiment)) if with_global else None

    def follow(tree: Any, of_clients: Mapping[str, History]) -> History:
        found = {
            history.of_view("each", view, metric): value
            for view, values in of_clients.items()
            for metric, value in values.items()
        }
        if score is not None:
            params = early.global_params(algorithm, early.split(tree)[0])
            found |= {f"each/{metric}": value for metric, value in score(params).items()}
        return found

    return follow


def _at_the_end(
    experiment: Experiment, algorithm: Algorithm, scorers: Sequence[client_scores.Scorer], tree: Any
) -> History:
    """How the last models, and in a run that validates the best ones, do for every client."""
    config = experiment.config
    found: History = {}
    if not algorithm.events_at("after"):  # what is reported of one that goes on is made by `_ending`
        found = _of_reported(experiment, algorithm, scorers, early.last(config, algorithm, tree))
    if (models := early.split(tree)[1]) is not None:
        best = _of_reported(experiment, algorithm, scorers, early.best(config, algorithm, models))
        found |= {f"best/{key}": value for key, value in best.items() if key.startswith("client/")}
    return found


def _of_reported(
    experiment: Experiment, algorithm: Algorithm, scorers: Sequence[client_scores.Scorer], reported: early.Reported
) -> History:
    """`_per_client` of the global model, and the same of each view in which clients differ."""
    found = _per_client(experiment, reported.params) if _tests_one_global(experiment, algorithm) else {}
    if reported.state is None:
        return found
    names = {"train": ("client", "train_"), "test": ("client", ""), "validation": ("validation", "")}
    for part, (kind, begin) in names.items():
        if part != "test" and part not in experiment.federation.parts:
            continue
        for each in scorers:
            scores = each.scores(reported.state, part)
            found |= {history.of_view(kind, each.view, f"{begin}{metric}"): value for metric, value in scores.items()}
    for each in client_scores.of_new_clients(experiment, algorithm):
        scores = each.scores(reported.state)
        found |= {history.of_view("new", each.view, metric): value for metric, value in scores.items()}
    return found


def _tests_one_global(experiment: Experiment, algorithm: Algorithm) -> bool:
    """Whether a global model of all clients is evaluated."""
    chosen = views.evaluated(experiment.config, algorithm)
    return views.GLOBAL in chosen.names and views.has_one_global(algorithm)


def _ending(
    experiment: Experiment,
    algorithm: Algorithm,
    engine: engines.Engine,
    scorers: Sequence[client_scores.Scorer],
    tree: Any,
    folder: Path,
    round: int,
    work: Work,
) -> History:
    """What is measured of the state after what a method does after its last round; nothing if it does nothing.

    That state is computed once and saved beside the checkpoints. They keep the one before it, from which a longer run
    goes on.
    """
    config = experiment.config
    if not algorithm.events_at("after"):
        return {}
    shapes = early.split(engine.expected)[0]
    saved = checkpoint.restore_latest(
        folder / AFTER, shapes, "the state of this run", lambda at: at == round, run=work.run
    )
    if saved is not None:
        return saved.arrays
    work.check_writable()
    state = waited_for(engine.finish(early.last(config, algorithm, tree).state))
    found = _of_reported(experiment, algorithm, scorers, early.Reported(early.global_params(algorithm, state), state))
    scores = {key: np.asarray(value) for key, value in engines.final_scorer(experiment, algorithm)(state).items()}
    for each in scorers:
        scores |= client_scores.over_clients(each.view, each.scores(state))
    found |= {f"final/{key}": value for key, value in scores.items()}
    checkpoint.save(folder / AFTER, round, state, found, run=work.run, keep=1)
    return found


def _on_part(experiment: Experiment, params: Params, part: str) -> History:
    """Metrics of models [S, ...] on a part of the federation, mean over each client's examples, [S, N]."""
    return _part_scorer(experiment, part)(params)


def _part_scorer(experiment: Experiment, part: str) -> Callable[[Any], History]:
    """`_on_part` for one part, to be called again and again: it compiles once."""
    on_examples = jax.vmap(partial(evaluate_examples, experiment.metric_fn, batch_size=EVAL_BATCH), (0, None))
    score = jax.jit(on_examples, out_shardings=engines.replicated_results(experiment))
    return partial(_scored, experiment, score, part)


def _scored(experiment: Experiment, score: Callable[..., Any], part: str, params: Params) -> History:
    host = experiment.federation.host_population(part)
    rows, block = host.rows_of(np.arange(host.num_clients)), 64 * EVAL_BATCH
    place = engines.placement(experiment)
    values: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    if not len(rows):  # no client has any: NaN for every client, of the metrics that there would be
        one = {name: jax.ShapeDtypeStruct((1, *leaf.shape[1:]), leaf.dtype) for name, leaf in host.examples.items()}
        first = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), params)
        names, num_seeds = (
            jax.eval_shape(partial(metric_values, experiment.metric_fn), first, one),
            experiment.config.seeds,
        )
        return {name: np.full((num_seeds, host.num_clients), np.nan, np.float32) for name in names}
    for start in range(0, len(rows), block):
        chosen = rows[start : start + block]
        if len(rows) > block:  # one shape for all blocks: the last begins earlier
            chosen = rows[min(start, len(rows) - block) :][:block]
        examples = {name: leaf[chosen] for name, leaf in host.examples.items()}
        fresh = min(block, len(rows) - start)
        for name, (value, weight) in _with_weights(score(params, place(examples))).items():
            values.setdefault(name, []).append((value[:, -fresh:], weight[:, -fresh:]))

    def concatenated(blocks: Iterable[np.ndarray]) -> np.ndarray:
        return np.concatenate(list(blocks), axis=1)

    return {
        name: _means(concatenated(v for v, _ in blocks), host.offsets, concatenated(w for _, w in blocks))
        for name, blocks in values.items()
    }


def _with_weights(metrics: Mapping[str, Any]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Values and weights [S, n] of each metric's examples; weights of 1 where the metric gives none."""

    def pair(leaf: Any) -> tuple[np.ndarray, np.ndarray]:
        if is_weighted(leaf):
            return np.asarray(leaf.value), np.asarray(leaf.weight, np.float64)
        return np.asarray(leaf), np.ones(leaf.shape)

    return {name: pair(leaf) for name, leaf in metrics.items()}


def _means(values: np.ndarray, offsets: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Weighted means over each client's values, [S, N] of [S, n]; NaN for a client without any weight."""
    sizes = np.diff(offsets)
    client = np.repeat(np.arange(len(sizes)), sizes)
    dtype = np.result_type(values.dtype, np.float32)
    weights = np.ones(values.shape) if weights is None else weights

    def sums(rows: np.ndarray) -> np.ndarray:
        # Not differences of a running sum: a NaN of one client would be in those of all that come after it.
        return np.stack([np.bincount(client, weights=row, minlength=len(sizes)) for row in rows])

    with np.errstate(invalid="ignore"):
        counted = np.where(weights > 0, values.astype(np.float64) * weights, 0)  # what does not count may be NaN
        return (sums(counted) / sums(weights)).astype(dtype)


def class_shares(federation: Federation) -> np.ndarray:
    """float[N, K]: the share of each class in a client's training examples; NaN for a client without any."""
    assignment, dataset = federation.parts["train"].assignment, federation.dataset
    counts = heterogeneity.label_counts(assignment, dataset.train["y"], dataset.num_classes)
    with np.errstate(invalid="ignore"):
        return counts / counts.sum(axis=1, keepdims=True)


def _losses(experiment: Experiment, algorithm: Algorithm, tree: PyTree) -> np.ndarray:
    """Mean training loss of the models of a state, [S]."""
    last = early.last(experiment.config, algorithm, tree)
    sizes = experiment.federation.sizes
    if views.has_one_global(algorithm):
        losses = _on_part(experiment, last.params, "train")["loss"]
    else:
        losses = client_scores.scorer(experiment, algorithm, views.GLOBAL).scores(last.state, "train")["loss"]
    held = (sizes > 0) & ~np.isnan(losses).all(axis=0)  # a client without examples has no loss
    return np.average(losses[:, held], axis=1, weights=sizes[held])


def diagnose(experiment: Experiment, name: str, measured: History, good_losses: np.ndarray) -> str:
    """Says in which round a method left the finite numbers, and the most likely cause.

    Args:
      experiment: the experiment.
      name: the method.
      measured: the history, the bad chunk included.
      good_losses: [S], mean training loss of the last models that are finite.
    """
    last = measured["round/loss"].shape[1] - 1
    # Without a bad round the model overflowed in the last one, after its loss was measured.
    seed, at = history.first_bad_round(measured) or (0, last)
    loss, norm = measured["round/loss"][seed, at], measured["round/update_norm"][seed, at]
    before = f", {measured['round/update_norm'][seed, at - 1]:.3g} in the round before" if at else ""
    client_lr = experiment.config.client_settings(name)["client_lr"]
    if not np.isfinite(good_losses[seed]):
        cause = (
            f"the last finite model has the loss {good_losses[seed]} on the training examples, so the loss function or "
            "the model fails on some example: look for log(0), 0/0 and labels out of range"
        )
    elif np.isfinite(loss) and not np.isfinite(norm):
        used = methods.settings_of(name, experiment.config.method_settings(name))
        server = [f"{k}={v:g}" for k, v in used.items() if k.startswith("server") and isinstance(v, float)]
        listing = ", ".join(server) or "its hyper-parameters"
        cause = f"local training stayed finite and the server's step did not, so that step is too long: lower {listing}"
    else:
        cause = (
            f"the clients' steps are too long: lower client_lr={client_lr:g}, for example to "
            f"{min(client_lr / 10, 0.1):g}, or clip the gradients"
        )
    return (
        f"{name} stopped in round {at + 1} (seed {experiment.seeds[seed]}): the training loss is {loss:.3g}, the norm "
        f"of the model's update {norm:.3g}{before}.\nMost likely cause: {cause}."
    )


def _interruption(batch: _Batch, out: Path, round: int, number: int) -> Interrupted:
    name = batch.label
    where = f"before {name} began" if round == 0 else f"after round {round} of {name}, which is saved"
    return run_directory.interruption(number, where, batch.run_config.command(str(out)))


@contextmanager
def _all_processes(out: Path) -> Iterator[None]:
    """Turns the runtime's error about a process that is gone into `processes.Lost`."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1 or out_of_memory(error):
            raise
        raise processes.lost(out, str(error).splitlines()[0][:200]) from None


def _folder(out: Path, method: str) -> Path:
    return out / "checkpoints" / methods.folder(method)
