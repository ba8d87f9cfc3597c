"""Runs a configuration: chunk by chunk, saved, resumable, all seeds at once.

A chunk is one compiled call of `eval_every` rounds and the evaluation after them. Chunks lie on a fixed grid of
rounds, so that a run that was stopped anywhere makes the very calls that an uninterrupted one makes, and gives its
numbers bit for bit (on one version of JAX and one kind of machine).

A run directory:

    config.json             what is run, and the versions that ran it
    checkpoints/<method>/   `pipelines.checkpoint`: the state and the metrics so far
    metrics.csv             every metric of every round, rewritten from the checkpoints
    clients.csv, curves.png, clients.png, summary.md     at the end, see `pipelines.report`
"""

import json
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from fedjax_core import (
    Algorithm,
    HostPopulation,
    continue_rounds,
    continue_staged,
    evaluate,
    evaluate_examples,
    init_on_host,
    join_tables,
    split_tables,
)
from pipelines import checkpoint, files, heterogeneity, history, methods, report
from pipelines.config import Config
from pipelines.federation import Federation
from pipelines.history import History
from pipelines.progress import Progression, Reporter, duration, silent, size
from pipelines.setup import EVAL_BATCH, Experiment, initial_states, prepare, run_keys


class Interrupted(Exception):  # noqa: N818 (nothing went wrong)
    """The run was asked to stop and has saved what it had.

    Attributes:
      signal: number of the signal that asked.
      message: where it stopped, and how to go on.
    """

    def __init__(self, signal: int, message: str) -> None:
        super().__init__(message)
        self.signal, self.message = signal, message


class Diverged(Exception):  # noqa: N818 (named for what happened)
    """The loss or the model is no longer finite; the last good state is saved."""


class Result(NamedTuple):
    """A finished method.

    Attributes:
      history: see `pipelines.history`.
      info: "compile_seconds", "run_seconds" and "memory", the bytes the compiled chunk needs.
    """

    history: History
    info: dict[str, Any]


def train(config: Config, out: str | Path, *, reporter: Reporter | None = None) -> dict[str, Result]:
    """Runs a configuration in the directory `out`, or what is left of it."""
    with jax.enable_x64(config.x64):
        return run(prepare(config), out, reporter=reporter)


def run(experiment: Experiment, out: str | Path, *, reporter: Reporter | None = None) -> dict[str, Result]:
    """Runs an experiment in the directory `out`, or what is left of it, and writes the report.

    Args:
      experiment: from `pipelines.setup.prepare`.
      out: the run directory; made if need be.
      reporter: where words go; nowhere unless given.

    Returns:
      Method to its result.

    Raises:
      ValueError: if the directory belongs to another configuration, or to something else.
      Interrupted: after SIGINT or SIGTERM, once the chunk is done and saved. A second signal ends the process.
      Diverged: if the loss or the model is no longer finite.
    """
    reporter = reporter or silent()
    out = Path(out)
    claim(out, experiment.config)
    for name, then, now in _changed_versions(out):
        reporter.say(f"note: this run was begun with {name} {then} and goes on with {now}: last bits may differ")
    results: dict[str, Result] = {}
    with _stop_requests(reporter) as stop_signal:
        for name in experiment.algorithms:
            try:
                results[name] = _run_method(experiment, name, out, results, reporter, stop_signal)
            finally:
                reporter.finish()
    histories = {name: result.history for name, result in results.items()}
    info = {name: result.info for name, result in results.items()}
    report.write(out, experiment, histories, info, versions())
    return results


def final_params(out: str | Path, method: str) -> Any:
    """The models a run has come to, leaves [S, ...] over its seeds, from the latest checkpoint of a method.

    Raises:
      ValueError: if `out` is no run directory, or has no checkpoint of the method.
    """
    config = read_config(Path(out))
    with jax.enable_x64(config.x64):
        experiment = prepare(config)
        algorithm = experiment.algorithms[method]
        expected = jax.eval_shape(partial(initial_states, experiment, algorithm), experiment.keys)
        saved = checkpoint.restore_latest(_folder(Path(out), method), expected)
        if saved is None:
            raise ValueError(f"{out} has no checkpoint of {method}: run it first")
        return jax.vmap(algorithm.params)(saved.state)


def versions() -> dict[str, str]:
    """Versions that can change a number, and the device."""
    found = {name: version(name) for name in ("jax", "jaxlib", "flax", "optax", "numpy")}
    return {"python": ".".join(map(str, sys.version_info[:3])), **found, "device": jax.devices()[0].device_kind}


def read_config(out: Path) -> Config:
    """The configuration of a run directory.

    Raises:
      ValueError: if it is none.
    """
    path = out / "config.json"
    if not path.exists():
        raise ValueError(f"{out} is no run directory, it has no config.json: give the --out of a run")
    try:
        return Config.from_json(json.dumps(json.loads(path.read_text())["config"]))
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read ({error}): choose another --out") from None


def claim(out: Path, config: Config) -> None:
    """Makes `out` the run directory of `config`, or checks that it is.

    Raises:
      ValueError: if it holds a run of another configuration (with the fields that differ), or something else.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file: choose a directory")
    out.mkdir(parents=True, exist_ok=True)
    if (out / "config.json").exists():
        differences = config.differences(read_config(out))
        if differences:
            listing = "\n".join(
                f"  {name}: {here!r} here, {there!r} there" for name, (here, there) in differences.items()
            )
            raise ValueError(
                f"{out} holds a run of another configuration:\n{listing}\nchoose another --out, or run with that "
                "configuration"
            )
        return
    if any(not path.name.endswith(files.TEMPORARY_SUFFIX) for path in out.iterdir()):
        raise ValueError(f"{out} holds files but no run (no config.json): choose an empty or a new directory for --out")
    content = {"config": json.loads(config.to_json()), "versions": versions()}
    files.write_text(out / "config.json", json.dumps(content, indent=2) + "\n")


def _changed_versions(out: Path) -> list[tuple[str, str, str]]:
    """(name, version that began the run, version now) of everything that has changed since."""
    then = json.loads((out / "config.json").read_text()).get("versions", {})
    return [(name, then[name], now) for name, now in versions().items() if name in then and then[name] != now]


def _run_method(
    experiment: Experiment,
    name: str,
    out: Path,
    finished: dict[str, Result],
    reporter: Reporter,
    stop_signal: Callable[[], int],
) -> Result:
    config, algorithm, folder = experiment.config, experiment.algorithms[name], _folder(out, name)
    engine = (_staged_engine if config.staged else _engine)(experiment, algorithm)
    expected = jax.eval_shape(partial(initial_states, experiment, algorithm), experiment.keys)

    def first() -> tuple[Any, History, int, dict[str, Any]]:
        saved = checkpoint.restore_latest(folder, expected, f"the state of {name}")
        if saved is None:
            return engine.start(), {}, 0, {"compile_seconds": 0.0, "run_seconds": 0.0, "memory": 0}
        return engine.place(saved.state), saved.arrays, saved.round, saved.info

    state, measured, round, info = first()
    if round >= config.rounds:
        reporter.say(f"{name}: complete, {round} rounds")
        return Result(measured, info)
    if stop_signal():
        raise _interruption(experiment, out, name, round, stop_signal())
    if round:
        reporter.say(f"{name}: going on after round {round}")

    grid = [0, *history.evaluated_rounds(config.rounds, config.eval_every).tolist()]
    lengths = {after - before for before, after in pairwise(grid) if after > round}
    begin = time.monotonic()
    reporter.say(f"{name}: compiles with its first round" if config.staged else f"{name}: compiling ...")
    chunks = {length: engine.compile(length, state) for length in sorted(lengths)}
    seconds = time.monotonic() - begin
    info["compile_seconds"] += seconds
    info["memory"] = max(chunk.needed for chunk in chunks.values())
    if not config.staged:
        reporter.say(f"{name}: compiled in {duration(seconds)}, needs {size(info['memory'])}")

    def save() -> None:
        checkpoint.save(folder, round, state, measured, info)
        everything = {**{n: result.history for n, result in finished.items()}, name: measured}
        text = history.to_csv(everything, experiment.seeds, history.evaluated_rounds(config.rounds, config.eval_every))
        files.write_text(out / "metrics.csv", text)

    began_at, begin = round, time.monotonic()
    for before, after in pairwise(grid):
        if after <= round:
            continue
        since = time.monotonic()
        state, metrics, scores, is_finite = _wait(chunks[after - before].run(state))
        new = history.from_rounds(metrics, scores)
        if history.first_bad_round(new) or not bool(is_finite):
            good_history, good_round = measured, round
            state, measured, round, info = first()
            for left, right in pairwise(grid):
                # The state before this chunk was given away to it, so it is computed again from the last checkpoint.
                if round <= left and right <= good_round:
                    state = chunks[right - left].run(state)[0]
            measured, round = good_history, good_round
            save()
            cause = diagnose(
                experiment, name, history.append(measured, new), round, _losses(experiment, algorithm, state)
            )
            raise Diverged(f"{cause}\nThe state after round {round}, the last good one, is saved in {folder}.")
        measured, round = history.append(measured, new), after
        info["run_seconds"] += time.monotonic() - since
        speed = (round - began_at) / max(time.monotonic() - begin, 1e-9)
        loss = float(history.mean_losses(new, np.asarray([after - before])).mean())
        accuracy = float(new["test/accuracy"].mean())
        reporter.update(Progression(name, round, config.rounds, speed, loss, accuracy))
        if round == config.rounds:
            measured |= _per_client(experiment, algorithm, state)
        if round % config.checkpoint_every == 0 or round == config.rounds or stop_signal():
            save()
        if stop_signal() and round < config.rounds:
            raise _interruption(experiment, out, name, round, stop_signal())
    return Result(measured, info)


class _Chunk(NamedTuple):
    """Some rounds and an evaluation, compiled.

    Attributes:
      run: `run(state) -> (state, metrics, scores, whether the models are finite)`, for all seeds; it takes the state
        over.
      needed: bytes that the compiled program needs on one device, 0 if that is not known.
    """

    run: Callable[[Any], Any]
    needed: int


class _Engine(NamedTuple):
    """How the rounds are run.

    Attributes:
      start: `start() -> state`, before the first round.
      place: `place(restored state) -> state`, where the chunks want it.
      compile: `compile(number of rounds, state) -> _Chunk`.
    """

    start: Callable[[], Any]
    place: Callable[[Any], Any]
    compile: Callable[[int, Any], _Chunk]


def _engine(experiment: Experiment, algorithm: Algorithm) -> _Engine:
    """Everything on the device; a chunk is one compiled call."""
    move = _placement(experiment)
    population, test, keys = move((experiment.population, experiment.test, experiment.keys))
    sharding = None if experiment.mesh is None else NamedSharding(experiment.mesh, PartitionSpec())

    def start() -> Any:
        return move(jax.jit(partial(initial_states, experiment, algorithm))(keys))

    def place(state: Any) -> Any:
        # A copy: the arrays that come from numpy are not XLA's to give away.
        return move(jax.tree.map(jnp.copy, state))

    def compile(length: int, state: Any) -> _Chunk:
        # It takes the state over, so that there are never two of it.
        jitted = jax.jit(_chunk(experiment, algorithm, length), donate_argnums=0, out_shardings=sharding)
        compiled = jitted.lower(state, population, test, keys).compile()
        return _Chunk(lambda state: compiled(state, population, test, keys), _needed(compiled))

    return _Engine(start, place, compile)


def _chunk(experiment: Experiment, algorithm: Algorithm, length: int) -> Callable[..., Any]:
    """`chunk(state, population, test, keys)`: what `_Chunk.run` returns, as a pure function."""
    rounds = jax.vmap(continue_rounds(algorithm, experiment.sampler, length), (0, None, 0))
    score = _scoring(experiment, algorithm)

    def chunk(state: Any, population: Any, test: Any, keys: Any) -> Any:
        state, metrics = rounds(state, population, _round_keys(keys))
        return state, metrics, *score(state, test)

    return chunk


def _staged_engine(experiment: Experiment, algorithm: Algorithm) -> _Engine:
    """Examples and client state on the host; a chunk is a loop of compiled rounds, which compile with the first."""
    move, config, population = _placement(experiment), experiment.config, experiment.population
    assert isinstance(population, HostPopulation)
    test, keys = move((experiment.test, experiment.keys))
    keys_of_rounds = jax.jit(_round_keys)(keys)

    def start() -> Any:
        states = partial(initial_states, experiment, algorithm)
        device, tables = split_tables(init_on_host(states, keys, num_clients=population.num_clients, axis=1))
        return join_tables(move(device), tables)

    def place(state: Any) -> Any:
        device, tables = split_tables(state)
        return join_tables(move(device), jax.tree.map(np.array, tables))  # of our own: they are changed in place

    def compile(length: int, state: Any) -> _Chunk:
        rounds = continue_staged(algorithm, experiment.sampler, length, horizon=config.rounds, mesh=experiment.mesh)
        score = jax.jit(_scoring(experiment, algorithm))

        def chunk(state: Any) -> Any:
            state, metrics = rounds(state, population, keys_of_rounds)
            return state, metrics, *score(split_tables(state)[0], test)

        return _Chunk(chunk, 0)

    return _Engine(start, place, compile)


def _round_keys(keys: Any) -> Any:
    """The keys of the rounds, of every seed."""
    return jax.vmap(lambda key: run_keys(key)[1])(keys)


def _scoring(experiment: Experiment, algorithm: Algorithm) -> Callable[[Any, Any], tuple[Any, Any]]:
    """`score(state, test) -> (scores, whether the models are finite)`, for all seeds."""
    score = jax.vmap(partial(evaluate, experiment.metric_fn, batch_size=EVAL_BATCH), (0, None))

    def scoring(state: Any, test: Any) -> tuple[Any, Any]:
        params = jax.vmap(algorithm.params)(state)
        finite = [jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(params) if jnp.issubdtype(x.dtype, jnp.inexact)]
        return score(params, test), jnp.all(jnp.stack([jnp.bool_(True), *finite]))

    return scoring


def _placement(experiment: Experiment) -> Callable[[Any], Any]:
    """Puts arrays where the compiled chunk wants them: with a mesh, whole on every device."""
    if experiment.mesh is None:
        return lambda tree: tree
    everywhere = NamedSharding(experiment.mesh, PartitionSpec())
    return lambda tree: jax.device_put(tree, everywhere)


def _needed(chunk: Any) -> int:
    """Bytes a compiled chunk needs on one device; 0 where the backend does not say."""
    analysis = chunk.memory_analysis()
    if analysis is None:
        return 0
    sizes = analysis.argument_size_in_bytes + analysis.output_size_in_bytes + analysis.temp_size_in_bytes
    return int(sizes - analysis.alias_size_in_bytes)


def _per_client(experiment: Experiment, algorithm: Algorithm, state: Any) -> History:
    """How the final global model does for every client, [S, N], and for clients that took no part, [S, N'].

    "client/<metric>" is held out: on the client's own test examples where it has some. Where the federation has no such
    part it is the metric of each class of the test examples, averaged with the client's shares of the classes.
    "client/train_<metric>" is on the client's own training examples. Sequences have no class, so there both are the
    same. "validation/<metric>" and "new/<metric>" are there with such a part.
    """
    params = jax.vmap(algorithm.params)(split_tables(state)[0])
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
    tested = jax.jit(on_examples)(params, _placement(experiment)(experiment.test))
    shares = class_shares(experiment.federation)
    labels = np.asarray(experiment.dataset.test["y"])
    classes = np.unique(labels)  # a class without test examples cannot count
    weights = shares[:, classes]
    with np.errstate(invalid="ignore"):
        weights = weights / weights.sum(axis=1, keepdims=True)
    for name, value in tested.items():
        by_class = np.stack([np.asarray(value)[:, labels == k].mean(axis=1) for k in classes])
        found[f"client/{name}"] = (weights @ by_class).T
    return found


def _on_part(experiment: Experiment, params: Any, part: str) -> History:
    """Metrics of models [S, ...] on a part of the federation, mean over each client's examples, [S, N]."""
    host = experiment.federation.host_population(part)
    rows, block = host.rows_of(np.arange(host.num_clients)), 64 * EVAL_BATCH
    score = jax.jit(jax.vmap(partial(evaluate_examples, experiment.metric_fn, batch_size=EVAL_BATCH), (0, None)))
    place = _placement(experiment)
    values: dict[str, list[np.ndarray]] = {}
    for start in range(0, len(rows), block):
        chosen = rows[start : start + block]
        if len(rows) > block:  # one shape for all blocks: the last begins earlier
            chosen = rows[min(start, len(rows) - block) :][:block]
        examples = {name: leaf[chosen] for name, leaf in host.examples.items()}
        for name, value in score(params, place(examples)).items():
            fresh = min(block, len(rows) - start)
            values.setdefault(name, []).append(np.asarray(value)[:, -fresh:])
    return {name: _means(np.concatenate(blocks, axis=1), host.offsets) for name, blocks in values.items()}


def _means(values: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Means over each client's values, [S, N] of [S, n]; NaN for a client without any."""
    sizes = np.diff(offsets)
    client = np.repeat(np.arange(len(sizes)), sizes)
    # Not differences of a running sum: a NaN of one client would be in those of all that come after it.
    sums = np.stack([np.bincount(client, weights=row, minlength=len(sizes)) for row in values])
    with np.errstate(invalid="ignore"):
        return (sums / sizes).astype(values.dtype)


def class_shares(federation: Federation) -> np.ndarray:
    """float[N, K]: the share of each class in a client's training examples; NaN for a client without any."""
    assignment, dataset = federation.parts["train"].assignment, federation.dataset
    counts = heterogeneity.label_counts(assignment, dataset.train["y"], dataset.num_classes)
    with np.errstate(invalid="ignore"):
        return counts / counts.sum(axis=1, keepdims=True)


def _losses(experiment: Experiment, algorithm: Algorithm, state: Any) -> np.ndarray:
    """Mean training loss of the models of a state, [S]."""
    params = jax.vmap(algorithm.params)(split_tables(state)[0])
    sizes = experiment.federation.sizes
    held = sizes > 0  # a client without examples has no loss
    return np.average(_on_part(experiment, params, "train")["loss"][:, held], axis=1, weights=sizes[held])


def diagnose(experiment: Experiment, name: str, measured: History, good_round: int, good_losses: np.ndarray) -> str:
    """Says in which round a method left the finite numbers, and the most likely cause.

    Args:
      experiment: the experiment.
      name: the method.
      measured: the history, the bad chunk included.
      good_round: rounds done in the last state that is finite.
      good_losses: [S], mean training loss of that state's models.
    """
    found = history.first_bad_round(measured)
    if found is None:
        # The model overflowed in the very last round, after its loss was measured.
        seed, at = 0, measured["round/loss"].shape[1] - 1
    else:
        seed, at = found
    loss, norm = measured["round/loss"][seed, at], measured["round/update_norm"][seed, at]
    norms = measured["round/update_norm"][seed, :at]
    if not np.isfinite(loss):
        what = f"the training loss is {loss}"
    else:
        what = f"the training loss is {loss:.3g} but the model's update has norm {norm}"
    kind = (
        "Infinity means that values outgrew the float range."
        if np.isinf(loss) or np.isinf(norm)
        else "NaN means an undefined operation, such as infinity minus infinity, 0/0 or the log of a negative number."
    )
    settings = experiment.config.client_settings(name)
    client_lr = settings["client_lr"]
    lower = min(client_lr / 10, 0.1)
    usual = float(np.median(norms)) if len(norms) else 0.0
    grown = float(norms[-1]) / usual if usual > 0 else 1.0
    if not np.isfinite(good_losses[seed]):
        cause = (
            f"the model after round {good_round} is finite but its loss on the training examples is "
            f"{good_losses[seed]}, so the loss function or the model fails on some example: look for log(0), 0/0 and "
            "labels out of range"
        )
    elif np.isfinite(loss) and not np.isfinite(norm):
        server = {k: v for k, v in _numbers(experiment, name).items() if k.startswith("server")}
        listing = ", ".join(f"{k}={v:g}" for k, v in server.items()) or "its hyper-parameters"
        cause = f"local training stayed finite and the server's step did not, so that step is too long: lower {listing}"
    elif at - good_round <= 1 and at <= 1:
        cause = (
            f"it happened at once, from a model whose loss was {good_losses[seed]:.3g}, so the clients' steps are too "
            f"long: lower client_lr={client_lr:g}, for example to {lower:g}"
        )
    elif grown > 3:
        cause = (
            f"the update norm had grown to {norms[-1]:.3g}, {grown:.0f} times its median, so training was diverging: "
            f"lower client_lr={client_lr:g} (for example to {lower:g}) or the server's step"
        )
    else:
        cause = (
            f"nothing grew before (update norm {norms[-1]:.3g}, median {usual:.3g}), so a rare batch or client "
            f"overflowed: lower client_lr={client_lr:g}, clip the gradients, or try --x64 to see if it is the range"
        )
    return (
        f"{name} stopped in round {at + 1} (seed {experiment.seeds[seed]}): {what}. {kind}\nMost likely cause: {cause}."
    )


def _numbers(experiment: Experiment, name: str) -> dict[str, float]:
    used = methods.settings_of(name, experiment.config.method_settings(name))
    return {k: v for k, v in used.items() if isinstance(v, float)}


def _interruption(experiment: Experiment, out: Path, name: str, round: int, number: int) -> Interrupted:
    command = experiment.config.command(str(out))
    where = f"stopped before {name} began" if round == 0 else f"stopped after round {round} of {name}, which is saved"
    return Interrupted(number, f"{where}. The same command goes on from there:\n  {command}")


@contextmanager
def _stop_requests(reporter: Reporter) -> Iterator[Callable[[], int]]:
    """Turns SIGINT and SIGTERM into a wish to stop: yields a function that returns the signal's number, or 0.

    The second signal has its usual effect, at once, even inside a compiled call.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: 0  # only the main thread may handle signals
        return

    def handle(number: int, frame: FrameType | None) -> None:
        received.append(number)
        for each in previous:
            signal.signal(each, signal.SIG_DFL)
        reporter.say("stopping: finishing this chunk and saving it (once more to abort)")

    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in previous:
        signal.signal(number, handle)
    try:
        yield lambda: received[0] if received else 0
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _wait(outputs: Any) -> Any:
    """Waits for a computation in Python, so that signals are handled meanwhile, and returns it."""
    on_device: list[Any] = [leaf for leaf in jax.tree.leaves(outputs) if isinstance(leaf, jax.Array)]
    for leaf in on_device:
        while not leaf.is_ready():
            time.sleep(0.002)
    return outputs


def _folder(out: Path, method: str) -> Path:
    return out / "checkpoints" / method
