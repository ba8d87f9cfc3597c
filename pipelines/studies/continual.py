"""One task after another: what has been learned of each, and what is forgotten.

    results = run(Continual(methods=("fot", "fedavg")), "runs/continual")

A scenario makes the tasks of one data set. "permuted": the same examples with the pixels in another order in every
task, one head for all. "split": the classes are divided among the tasks, each has its own head, and which task it is
is told when it is tested. All tasks have the same number of examples, so that one compiled program serves them all.

A method is trained for `rounds` rounds on every task, at whose end its events at a "task"'s end run, and is then tested
on all of them, learned or not. What it does before its first round it does with the clients of the first task, and what
it does after its last round with those of the last one, before the last test. "joint" is FedAvg on the examples of all
tasks together, for as many rounds and local steps as the others have in all: about what could be reached at best, if
nothing were forgotten.

Every seed has tasks, a partition, first weights and rounds of its own; what is shown is the mean over them.

A run directory (`pipelines.run.run_directory`) holds config.json and checkpoints/<method>, with the number of the seed
behind it for all but the first, and accuracy.csv, accuracy.png and .pdf, results.tex, and summary.md, .html and .json
of the methods that are finished.
"""

import csv
import io
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

import algorithms
import models
from fedjax_core import (
    Algorithm,
    Examples,
    Plan,
    Population,
    client_mesh,
    continue_rounds,
    evaluate,
    place,
    replicated,
    run_events,
    samplers,
    shardings,
)
from fedjax_core.algorithm import Phase
from fedjax_core.types import Key, PyTree
from pipelines.common import figures, files, growth
from pipelines.common.progress import Reporter, duration, silent
from pipelines.configuration import methods
from pipelines.configuration.options import check_grown, named
from pipelines.data import datasets
from pipelines.data.datasets import Dataset
from pipelines.experiment import setup
from pipelines.federation import partition
from pipelines.federation.assignment import Assignment
from pipelines.results import latex, pages
from pipelines.run import checkpoint, identity
from pipelines.run.run_directory import Kind, Work, at_work, claim, interruption, read, waited_for
from pipelines.studies import continual_config
from pipelines.studies.continual_config import Continual


class Scenario(NamedTuple):
    """The tasks of a configuration, and the model that is to learn them.

    Attributes:
      model: of inputs as the tasks have them.
      layers: path of every weight to protect to its width: all but the heads of single tasks.
      population: `population(t)`, the clients' training examples of task t.
      joint: `joint()`, those of all tasks.
      test: `test(t)`, the test examples of task t.
      identity: `identity()`, what a run must find again to go on (`pipelines.run.identity`).
    """

    model: models.Model
    layers: dict[str, int]
    population: Callable[[int], Population]
    joint: Callable[[], Population]
    test: Callable[[int], Examples]
    identity: Callable[[], dict[str, str]]


class Scores(NamedTuple):
    """What one method has come to with one seed.

    Attributes:
      accuracy: float[T, T], test accuracy on task j (column) after task i (row).
      untrained: float[T], that of the initial model.
      seconds: of rounds and ends of tasks, without compiling and testing.
      directions: fot: path of a protected weight to how many directions its basis has at the end, and its width.
    """

    accuracy: np.ndarray
    untrained: np.ndarray
    seconds: float
    directions: Mapping[str, tuple[int, int]] = {}


def measures(accuracy: np.ndarray, untrained: np.ndarray) -> dict[str, float]:
    """What the accuracy matrix R, float[T, T], says; b, float[T], is the accuracy of the initial model.

    average accuracy: mean_j R[T-1, j]. forgetting: mean_{j<T-1} R[j, j] - R[T-1, j], how much worse a task is at the
    end than right after it was learned; backward transfer is its negative. forward transfer: mean_{j>0} R[j-1, j] -
    b[j], how much better than at the start a task is before it is learned. With one task the last three are NaN. Of
    "joint", which learns all tasks at once, the average accuracy alone says something. (Lopez-Paz, Ranzato, "Gradient
    Episodic Memory for Continual Learning", 2017.)
    """
    final, learned = accuracy[-1], np.diagonal(accuracy)
    several = len(accuracy) > 1
    forgetting = float(np.mean(learned[:-1] - final[:-1])) if several else np.nan
    return {
        "average accuracy": float(np.mean(final)),
        "forgetting": forgetting,
        "backward transfer": -forgetting,
        "forward transfer": float(np.mean(np.diagonal(accuracy, 1) - untrained[1:])) if several else np.nan,
    }


def scenario(config: Continual, dataset: Dataset | None = None) -> Scenario:
    """The tasks of a configuration, of its first seed.

    Args:
      config: the configuration.
      dataset: the data set that it names; loaded unless given.

    Raises:
      ValueError: as `pipelines.data.datasets.load` and the partitions; if the data set has no label per example, or
        fewer classes than tasks; if the cohort is larger than the population.
    """
    dataset = dataset or datasets.load(config.dataset, config.data_dir)
    if dataset.is_sequence or dataset.vocabulary_size is not None:
        raise ValueError(f"dataset {config.dataset!r} is text: choose a data set of images or measurements")
    samplers.uniform(config.clients, config.cohort_size)
    return (_permuted if config.scenario == "permuted" else _split)(config, dataset)


def _permuted(config: Continual, dataset: Dataset) -> Scenario:
    size = int(np.prod(dataset.input_shape))

    def order(t: int) -> np.ndarray:
        return np.random.default_rng([config.first_seed, t]).permutation(size) if t else np.arange(size)

    def part(examples: Examples, t: int) -> Examples:
        x = examples["x"]
        return {**examples, "x": x.reshape(len(x), size)[:, order(t)].reshape(x.shape)}

    model = datasets.normalized(_model(config, dataset, dataset.num_classes), dataset.normalization)
    train, test = (lambda t: part(dataset.train, t)), (lambda t: part(dataset.test, t))
    return _scenario(config, dataset, model, train, test, lambda t: dataset.train["y"], heads=False)


def _split(config: Continual, dataset: Dataset) -> Scenario:
    each = dataset.num_classes // config.tasks
    if each < 1:
        raise ValueError(
            f"tasks={config.tasks}, but {dataset.name} has {dataset.num_classes} classes to divide: ask for fewer"
        )
    rng = np.random.default_rng(config.first_seed)
    classes = rng.permutation(dataset.num_classes)[: each * config.tasks].reshape(config.tasks, each)

    def parts(examples: Examples) -> list[Examples]:
        rows = [rng.permutation(np.flatnonzero(np.isin(examples["y"], own))) for own in classes]
        least = min(map(len, rows))  # one program for all tasks needs as many examples in each
        return [
            {
                "x": {"inputs": examples["x"][kept], "task": np.full(least, t, np.int32)},
                "y": np.argmax(examples["y"][kept][:, None] == classes[t], axis=1).astype(np.int32),
            }
            for t, kept in enumerate(r[:least] for r in rows)
        ]

    train, test = parts(dataset.train), parts(dataset.test)
    model = datasets.normalized(_model(config, dataset, each * config.tasks), dataset.normalization)
    model = models.heads.multi_head(model, config.tasks)
    labels = lambda t: train[t]["y"]  # noqa: E731
    return _scenario(config, dataset, model, train.__getitem__, test.__getitem__, labels, heads=True)


def _model(config: Continual, dataset: Dataset, outputs: int) -> models.Model:
    if config.model == "cnn":
        model = models.cnn(dataset.input_shape, outputs)
    else:
        model = models.mlp(dataset.input_shape, outputs, config.hidden, config.dropout)
    return models.initialization.uniform(model) if config.start == "uniform" else model


def _scenario(
    config: Continual,
    dataset: Dataset,
    model: models.Model,
    train: Callable[[int], Any],
    test: Callable[[int], Any],
    labels: Callable[[int], np.ndarray],
    *,
    heads: bool,
) -> Scenario:
    """`train(t)` and `test(t)` are the examples of task t, `labels(t)` train's; `heads`: each task has its own."""

    def assignment(t: int) -> Assignment:
        split = partition.iid if config.partition == "iid" else partition.shards
        return split(labels(t), config.clients, seed=config.first_seed + t)

    def clients(t: int) -> list[Examples]:
        """The examples of each client."""
        examples = train(t)
        return [jax.tree.map(lambda leaf, rows=rows: leaf[rows], examples) for rows in assignment(t)]

    def joint() -> Population:
        tasks = [clients(t) for t in range(config.tasks)]
        together = lambda *leaves: np.concatenate(leaves)  # noqa: E731
        return Population.from_clients([jax.tree.map(together, *own) for own in zip(*tasks, strict=True)])

    one = jax.tree.map(lambda leaf: leaf[:1], test(0)["x"])
    widths = models.capture.layer_widths(model.apply, jax.eval_shape(model.init, jax.random.key(0)), one)
    return Scenario(
        model=model,
        layers={path: width for path, width in widths.items() if not (heads and path.startswith("head/"))},
        population=lambda t: Population.from_clients(clients(t)),
        joint=joint,
        test=lambda t: jax.tree.map(jnp.asarray, test(t)),
        identity=lambda: identity.of(dataset, (assignment(t).digest() for t in range(config.tasks))),
    )


def build(
    config: Continual, name: str, tasks: Scenario, *, num_steps: int | None = None, plan: Plan | None = None
) -> Algorithm:
    """The method `name`, with `num_steps` local steps instead of epochs if given."""
    optimizer = optax.chain(optax.add_decayed_weights(config.weight_decay), optax.sgd(config.client_lr))
    length = {"num_epochs": config.epochs} if num_steps is None else {"num_steps": num_steps}
    own: dict[str, dict[str, Any]] = {
        "fot": {
            "inputs": lambda params, batch: models.capture.layer_inputs(tasks.model.apply)(params, batch["x"]),
            "layers": tasks.layers,
            "energy": config.energy,
            "energy_step": config.energy_step,
            "rule": config.rule,
            "oversampling": config.oversampling,
        },
        "ewc": {"lam": config.lam},
        "fedprox": {"mu": config.mu},
    }
    factory = getattr(algorithms, "fedavg" if name == "joint" else name)
    loss_fn = models.losses.cross_entropy(tasks.model)
    return factory(loss_fn, optimizer, batch_size=config.batch_size, plan=plan, **length, **own.get(name, {}))


def run(
    config: Continual, out: str | Path, *, plan: Plan | None = None, reporter: Reporter | None = None
) -> dict[str, list[Scores]]:
    """Runs a configuration in the directory `out`, or what is left of it.

    Args:
      config: what to run.
      out: the run directory; made if need be.
      plan: execution plan of the rounds; all devices unless given.
      reporter: where words go; nowhere unless given.

    Returns:
      Name of a method to what it has come to, for every seed.

    Raises:
      Interrupted: after SIGINT or SIGTERM, once the chunk is done and saved. A second signal ends the process.
      Unwritable: if the directory cannot be written to; what was saved is whole.
      ValueError: if something is wrong with the configuration, the directory holds another one's run or one of other
        examples, or another process is at work in it.
    """
    reporter = reporter or silent()
    out = Path(out)
    config = _joined(config, out)
    # All seeds have the same shapes, but for tasks whose sizes are drawn.
    dataset = datasets.load(config.dataset, config.data_dir)
    tasks = {seed: scenario(config.replace(first_seed=seed, seeds=1), dataset) for seed in _seeds(config)}
    first = tasks[config.first_seed]
    content, pinned = json.loads(config.to_json()), first.identity()
    for name in config.methods:  # their mistakes show before the directory is there
        build(config, name, first, num_steps=1)

    def check(there: Any) -> None:
        saved = continual_config.of_values(there)
        check_grown(config, saved, out, _GROWS, "configuration", "more methods and seeds")

    claim(out, KIND, content, check, pinned, identity.place(config.dataset, config.data_dir))
    if plan is None:
        plan = Plan(mesh=client_mesh() if len(jax.devices()) > 1 else None)
    results: dict[str, list[Scores]] = {}
    with at_work(out, KIND, reporter.say, lambda there: {"config": content}, pinned) as work:
        for name in config.methods:
            trainer, results[name] = _Trainer(config, name, first, plan), []
            for seed, own in tasks.items():
                folder = _folder(config, out, name, seed)
                with files.explain_os_errors(out, partial(_saved, name, folder)):
                    results[name].append(_run_method(trainer, seed, own, folder, reporter, work))
            if work.may_write:
                with files.explain_os_errors(out, f"{name} is done and saved, and the report is not"):
                    write(out, config, results, out)
            shown = ", ".join(f"{key} {value}" for key, value in _shown(results[name]).items())
            reporter.say(f"{name}: {shown}")
        if not work.may_write:
            reporter.say(f"{out} is read-only, so its report stays as it is")
    return results


def _seeds(config: Continual) -> range:
    return range(config.first_seed, config.first_seed + config.seeds)


def _folder(config: Continual, out: Path, name: str, seed: int) -> Path:
    """Where a method's checkpoints with one seed are."""
    return out / "checkpoints" / (name if seed == config.first_seed else f"{name}-{seed}")


def _saved(name: str, folder: Path) -> str:
    """What is saved of a method, in words."""
    round = checkpoint.latest_round(folder)
    return f"{name} is saved after round {round}" if round else f"Nothing of {name} is saved yet"


def again(out: Path, target: Path, say: Callable[[str], None]) -> list[str]:
    """Writes the report of the run in the directory `out` again, from its checkpoints, into `target`.

    Returns:
      The names of the files.

    Raises:
      ValueError: if `out` holds no such run, no method has learned all tasks, or a checkpoint or accuracy.csv is not
        what was written.
    """
    record = read(out, KIND)
    config, run = continual_config.of_values(record["config"]), str(record.get("run", ""))
    results: dict[str, list[Scores]] = {}
    for name in config.methods:
        found = [checkpoint.measured(_folder(config, out, name, seed), run=run) for seed in _seeds(config)]
        scores = [_scores(saved) for saved in found if saved is not None and len(saved.arrays["accuracy"])]
        if len(scores) == config.seeds and all(len(each.accuracy) == config.tasks for each in scores):
            results[name] = scores
    if not results:
        raise ValueError(f"no method in {out} has learned all tasks, so that there is nothing to show: run it first")
    path = out / "accuracy.csv"
    if path.exists():
        # The table has the methods that were done when it was written.
        known = [dict(list(results.items())[: i + 1]) for i in range(len(results))]
        if path.read_bytes() not in [accuracy_csv(_seeds(config), each).encode() for each in known]:
            raise ValueError(
                f"{path} is not what was measured: put it back, or give the command of the run again, which writes it "
                "anew and repeats nothing that is done"
            )
    files.make_directory(target)
    return write(target, config, results, out)


def _scores(saved: checkpoint.Saved) -> Scores:
    """What a checkpoint says of a method with one seed."""
    directions = {path: (int(k), int(d)) for path, (k, d) in saved.info.get("directions", {}).items()}
    return Scores(saved.arrays["accuracy"], saved.arrays["untrained"], saved.info["seconds"], directions)


def write(out: Path, config: Continual, results: Mapping[str, Sequence[Scores]], run: Path) -> list[str]:
    """Writes accuracy.csv, accuracy.png and .pdf, results.tex, summary.md, .html and .json of finished methods.

    Args:
      out: where to.
      config: the configuration.
      results: name of a method to what it has come to with every seed.
      run: the run directory, for the command that repeats the run.

    Returns:
      The names of the files.
    """
    summary = {
        name: {
            **{key: float(np.mean(values)) for key, values in over_seeds(scores).items()},
            "seeds": {
                seed: {
                    **measures(each.accuracy, each.untrained),
                    "accuracy": each.accuracy.tolist(),
                    "untrained": each.untrained.tolist(),
                    "seconds": each.seconds,
                    **({"directions": each.directions} if each.directions else {}),
                }
                for seed, each in zip(_seeds(config), scores, strict=True)
            },
        }
        for name, scores in results.items()
    }
    files.write_text(out / "summary.json", json.dumps(summary, indent=2) + "\n")
    files.write_text(out / "accuracy.csv", accuracy_csv(_seeds(config), results))
    files.write_text(out / "results.tex", results_tex(results))
    with figures.style():
        pages.write(out, summary_md(config, results, run), {"accuracy.png": heat_map(results)})
    return ["summary.md, .html and .json", "accuracy.csv", "results.tex", "accuracy.png and .pdf"]


def summary_md(config: Continual, results: Mapping[str, Sequence[Scores]], run: Path) -> str:
    """The measures of every method, the settings and the command that repeats the run, as Markdown."""
    first = next(iter(results.values()))
    rows = [[shown_name(name), *_shown(scores).values()] for name, scores in results.items()]
    waiting = [shown_name(name) for name in config.methods if name not in results]
    seeds = f"{config.seeds} seeds" if config.seeds > 1 else "1 seed"
    lines = [
        f"# {Path(config.dataset).stem}, {config.tasks} tasks ({config.scenario}), one after another",
        "",
        *([f"**This run has not ended.** Not done yet: {', '.join(waiting)}.", ""] if waiting else []),
        *pages.table(["method", *over_seeds(first)], rows),
        "",
        f"Mean and standard deviation over {seeds}, of test accuracy. The figure has the accuracy on every task (from "
        "left to right) after every task (from top to bottom).",
        "",
        "![Test accuracy on every task after every task](accuracy.png)",
        "",
        "## Settings",
        "",
        *(f"- {k}: {', '.join(map(str, v)) if isinstance(v, tuple) else v}" for k, v in config.flat().items()),
        "",
        "## Again",
        "",
        "```",
        config.command(run),
        "```",
    ]
    return "\n".join(lines) + "\n"


def over_seeds(scores: Sequence[Scores]) -> dict[str, np.ndarray]:
    """The measures of a method with every seed, name to float[S]."""
    each = [measures(one.accuracy, one.untrained) for one in scores]
    return {key: np.array([values[key] for values in each]) for key in each[0]}


def _shown(scores: Sequence[Scores]) -> dict[str, str]:
    """The measures of a method in percent, with the standard deviation over seeds where there are several."""

    def percent(values: np.ndarray) -> str:
        if np.isnan(values).any():
            return "none"
        deviation = f" ± {100 * np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
        return f"{100 * np.mean(values):.2f}{deviation} %"

    return {key: percent(values) for key, values in over_seeds(scores).items()}


def accuracy_csv(seeds: Iterable[int], results: Mapping[str, Sequence[Scores]]) -> str:
    """One row per method, seed, task learned last (-1 for the initial model) and task tested."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["method", "seed", "after_task", "task", "accuracy"])
    for name, scores in results.items():
        for seed, each in zip(seeds, scores, strict=True):
            for after, row in enumerate([each.untrained, *each.accuracy], -1):
                writer.writerows([name, seed, after, task, str(value)] for task, value in enumerate(row))
    return text.getvalue()


def results_tex(results: Mapping[str, Sequence[Scores]]) -> str:
    """The measures of every method, in percent, as a table in LaTeX."""
    rows = [[shown_name(name), *_shown(scores).values()] for name, scores in results.items()]
    first = next(iter(results.values()))
    return latex.table(["method", *over_seeds(first)], rows, "made by fedjax-core continual")


def shown_name(name: str) -> str:
    """A method's name in figures and tables."""
    return "Joint" if name == "joint" else methods.paper_name(name)


def heat_map(results: Mapping[str, Sequence[Scores]]) -> Figure:
    """The accuracy matrix of every method, the mean over its seeds.

    Tasks are tested from left to right, and learned from top to bottom.
    """
    num_tasks = len(next(iter(results.values()))[0].untrained)
    side = max(2.6, 0.42 * num_tasks)
    figure = Figure(figsize=(side * len(results) + 1, side + 0.6), layout="constrained")
    panels = figure.subplots(1, len(results), squeeze=False)[0]
    for panel, (name, scores) in zip(panels, results.items(), strict=True):
        accuracy = np.mean([each.accuracy for each in scores], axis=0)
        image = panel.imshow(accuracy, vmin=0, vmax=1, cmap="viridis")
        for (i, j), value in np.ndenumerate(accuracy):
            color = "black" if value > 0.6 else "white"
            panel.text(j, i, f"{100 * value:.0f}", ha="center", va="center", color=color, fontsize=8)
        panel.set(title=shown_name(name), xlabel="tested on task", xticks=range(num_tasks), yticks=range(num_tasks))
        panel.grid(visible=False)
    panels[0].set_ylabel("after task")
    figure.colorbar(image, ax=list(panels), label="test accuracy", format=figures.Percent())
    return figure


class _Trainer:
    """A method and its compiled programs, which all seeds share.

    Attributes:
      config: what is run.
      name: of the method.
      steps: local steps of a client, None for those of its epochs.
      method: the method.
      shapes: of its state.
      seconds: of compiled rounds and ends of tasks, since it was last set.
    """

    def __init__(self, config: Continual, name: str, tasks: Scenario, plan: Plan) -> None:
        self.config, self.name = config, name
        self._tasks, self._plan = tasks, plan
        self.steps = None
        if name == "joint":  # with as many local steps as a client takes on one task
            self.steps = config.epochs * -(-int(tasks.population(0).sizes.max()) // config.batch_size)
        self.method = build(config, name, tasks, num_steps=self.steps, plan=plan)
        self._sampler = samplers.uniform(config.clients, config.cohort_size)
        self.initial = jax.jit(lambda key: self.method.init(tasks.model.init(key)))
        self.shapes = jax.eval_shape(self.initial, jax.random.key(0))
        mesh = plan.mesh
        self._replicated = None if mesh is None else replicated(mesh)
        self._kept = None if mesh is None else shardings(self.shapes, mesh)
        metric_fn = models.metrics.classification(tasks.model)
        self._score = jax.jit(lambda params, test: evaluate(metric_fn, params, test, batch_size=500)["accuracy"])
        self._compiled: dict[Any, Any] = {}
        self.seconds = 0.0

    def replicate(self, tree: PyTree) -> Any:
        """Puts a copy on every device."""
        return tree if self._replicated is None else place(tree, self._replicated)

    def place_state(self, state: PyTree) -> Any:
        """Puts a state where the plan has it."""
        return state if self._kept is None else place(state, self._kept)

    def scores(self, state: PyTree, tasks: Scenario) -> np.ndarray:
        """Test accuracy on every task, float[T]."""
        params = self.method.params(state)
        tests = (self.replicate(tasks.test(j)) for j in range(self.config.tasks))
        return np.array([self._score(params, test) for test in tests], float)

    def rounds(self, length: int, state: PyTree, population: Population, key: Key) -> Any:
        """The state after some rounds, and their metrics."""

        def made() -> Any:
            results = None if self._kept is None else (self._kept, self._replicated)
            return jax.jit(continue_rounds(self.method, self._sampler, length), out_shardings=results)

        return self._timed(length, made, (state, population, key))

    def beside_rounds(self, when: Phase, state: PyTree, population: Population, run_key: Any) -> Any:
        """The state after what the method does before its first or after its last round, as in other runs."""
        if not self.method.events_at(when):
            return state
        return self._event(when, setup.beside_rounds, when, (state, population, run_key))

    def end_task(self, state: PyTree, population: Population, run_key: Any, key: Key) -> Any:
        """The state after the end of a task, at which the cohort of the last round looks back."""
        ids = self._sampler(jax.random.split(run_key)[0], state.round - 1)
        return self._event("end", run_events, "task", (state, population.cohort(ids), key))

    def _event(self, name: str, run: Callable[..., Any], when: Phase, args: tuple[Any, ...]) -> Any:
        if self._kept is not None:
            args = jax.device_put(args, jax.devices()[0])

        def made() -> Any:
            # On one device: decompositions of matrices do not split, and once a task their time hardly counts.
            alone = replace(self._plan, mesh=None)
            method = build(self.config, self.name, self._tasks, num_steps=self.steps, plan=alone)
            return jax.jit(partial(run, method, when))

        return self.place_state(self._timed(name, made, args))

    def _timed(self, name: Any, make: Callable[[], Any], args: tuple[Any, ...]) -> Any:
        """The result of a program, compiled once for arguments of these shapes; adds to `seconds`."""
        known = (name, *(leaf.shape for leaf in jax.tree.leaves(args)))
        if known not in self._compiled:
            self._compiled[known] = make().lower(*args).compile()
        begin = time.monotonic()
        result = waited_for(self._compiled[known](*args))
        self.seconds += time.monotonic() - begin
        return result


def _run_method(trainer: _Trainer, seed: int, tasks: Scenario, folder: Path, reporter: Reporter, work: Work) -> Scores:
    """Trains and tests a method with one seed; a checkpoint after the last round of a task holds the state after it."""
    config, name = trainer.config, trainer.name
    called = name if config.seeds == 1 else f"{name}, seed {seed}"
    everything = tasks.joint() if name == "joint" else None
    init_key, run_key, end_key = jax.random.split(jax.random.key(seed), 3)

    def save(state: PyTree) -> None:
        arrays = {"accuracy": accuracy, "untrained": untrained}
        info = {"seconds": trainer.seconds, "directions": _directions(state)}
        checkpoint.save(folder, int(state.round), state, arrays, info, run=work.run)

    def stop_if_asked(done: int) -> None:
        if stop := work.stop():
            where = f"after round {done} of {called}, which is saved" if done else f"before {called} began"
            raise interruption(stop, where, config.command(work.out))

    saved = checkpoint.restore_latest(folder, trainer.shapes, f"the state of {name}", run=work.run)
    state = trainer.initial(init_key) if saved is None else jax.tree.map(jnp.asarray, saved.state)
    state = trainer.place_state(state)
    if saved is None:
        accuracy, untrained, trainer.seconds = np.zeros((0, config.tasks)), trainer.scores(state, tasks), 0.0
    else:
        trainer.seconds = saved.info["seconds"]
        accuracy, untrained = saved.arrays["accuracy"], saved.arrays["untrained"]
        reporter.say(f"{called}: {saved.round} of {config.tasks * config.rounds} rounds are done")

    if len(accuracy) < config.tasks:
        work.check_writable()
        stop_if_asked(0 if saved is None else saved.round)
    if saved is None and trainer.method.events_at("before"):
        state = trainer.beside_rounds("before", state, trainer.replicate(everything or tasks.population(0)), run_key)
    for t in range(len(accuracy), config.tasks):
        population = trainer.replicate(everything or tasks.population(t))
        end = (t + 1) * config.rounds
        while (done := int(state.round)) < end:
            length = min(config.checkpoint_every, end - done)
            state, metrics = trainer.rounds(length, state, population, run_key)
            if not (np.isfinite(metrics.loss) | (metrics.participants == 0)).all():
                raise FloatingPointError(
                    f"the loss of {called} is no longer finite after {done} to {done + length} rounds: lower client_lr"
                    + (", or lam" if name == "ewc" else "")
                )
            if done + length < end:
                save(state)
                stop_if_asked(done + length)
        if trainer.method.events_at("task"):
            state = trainer.end_task(state, population, run_key, jax.random.fold_in(end_key, t))
        if t + 1 == config.tasks:
            state = trainer.beside_rounds("after", state, population, run_key)
        accuracy = np.vstack([accuracy, trainer.scores(state, tasks)])
        save(state)
        shown = " ".join(f"{100 * value:.1f}" for value in accuracy[-1])
        reporter.say(f"{called}: task {t} learned, accuracy {shown} % ({duration(trainer.seconds)})")
        if directions := _directions(state):
            reporter.say("directions taken: " + ", ".join(f"{path} {k} of {d}" for path, (k, d) in directions.items()))
        if t + 1 < config.tasks:
            stop_if_asked(end)
    return Scores(accuracy, untrained, trainer.seconds, _directions(state))


def _directions(state: PyTree) -> dict[str, tuple[int, int]]:
    """How full the bases are of a state that has some; a layer whose basis is full is frozen."""
    return {path: (int(rank), len(columns)) for path, (columns, rank) in getattr(state, "bases", {}).items()}


KIND = Kind("continual", continual_config.of_values)
_GROWS = {"methods": growth.contains, "seeds": growth.at_least}


def slug(config: Continual) -> str:
    """A short readable name of a run, the same with more methods or seeds and for no other."""
    name = Path(config.dataset).stem or "data"
    but = {*_GROWS, *named(Continual, "place", "machine", "report")}
    return f"continual-{config.scenario}-{name}-{growth.digest(config.flat(), but)}"


def _joined(config: Continual, out: Path) -> Continual:
    """The configuration with the methods that the run in `out` has already: others join them and none leaves."""
    there = read(out, KIND)["config"]["methods"] if files.has_record(out / KIND.marker) else []
    return config.replace(methods=(*there, *(name for name in config.methods if name not in there)))
