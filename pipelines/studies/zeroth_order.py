"""Experiments with function values alone: synthetic functions, a black-box attack, metrics that have no gradient.

    fedjax-core zeroth-order synthetic --function ackley --heterogeneity 5 --out runs/ackley

Each compares FZooS with FedZO, FedProx-ZO and SCAFFOLD-ZO I and II over several seeds: a trial is one seed, which draws
functions and a start, the same for all methods. Where functions have gradients, FedAvg and SCAFFOLD are there with
them: what the best of estimates would do, in local minima and with clients that drift apart. As many trials run at once
as there are devices (from the command line, cores). Every (method, trial) is saved when it is done, so that the same
command goes on where it was stopped (`pipelines.run.run_directory`; the record is study.json). What comes out:
curves.csv, curves.png and .pdf, summary.md and .html, and results.tex.
"""

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.linalg.cython_lapack  # noqa: F401 - JAX loads it late, and threads are limited of what is loaded
from jax.flatten_util import ravel_pytree
from threadpoolctl import threadpool_limits

import algorithms
from fedjax_core import Algorithm, Array, LossFn, Plan, Population, checks, continue_rounds, masks, num_bytes, samplers
from fedjax_core.types import Examples, Key, Params, PyTree
from pipelines.common import files, growth
from pipelines.common.names import pick
from pipelines.configuration.options import check_grown, named
from pipelines.data.dataset import Dataset
from pipelines.experiment import memory
from pipelines.federation.assignment import Assignment
from pipelines.run import identity, run_directory, trials
from pipelines.run.run_directory import Kind, Work
from pipelines.studies.zeroth_order_config import ALL, Attack, Metric, Study, of_values

METHODS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "FZooS": ("fzoos", {}),
    "FedZO": ("fedzo", {}),
    "FedProx-ZO": ("fedprox_zo", {}),
    "SCAFFOLD-ZO I": ("scaffold_zo", {"option": "I"}),
    "SCAFFOLD-ZO II": ("scaffold_zo", {"option": "II"}),
}
"""Name in figures to the factory in `algorithms` and what distinguishes it."""

REFERENCES: Mapping[str, tuple[str, dict[str, Any]]] = {
    "FedAvg with gradients": ("fedavg", {}),
    "SCAFFOLD with gradients": ("scaffold", {}),
}
"""The same for methods that make no queries: they are given the true gradients."""

_ROUND = 200  # bytes of a round of a trial, in the curves of all methods and as text


class Task(NamedTuple):
    """One trial's function F = mean_i f_i of x in [0, 1]^d.

    Attributes:
      loss_fn: f_i, from the one example that a client has.
      population: what distinguishes the clients.
      start: x_0, float[d].
      optimum: least value of F, or None where it is not known.
      differentiable: whether loss_fn has a gradient worth comparing with.
    """

    loss_fn: LossFn
    population: Population
    start: Array
    optimum: float | None = None
    differentiable: bool = True


def synthetic(
    trial: int, *, function: str = "quadratic", dim: int = 300, clients: int = 5, heterogeneity: float = 0.5
) -> Task:
    """Quadratic, Ackley or Levy function of u = 20 x - 10, whose clients differ by `heterogeneity`.

    quadratic: f_i = (0.1 / d) (<c_i, u^2> + <e_i, u> + 1), with c_i and e_i = 1 + heterogeneity (D_i - 1 / N) in each
    coordinate, D from Dirichlet(1/N, ..., 1/N). The clients' average is the same function for any heterogeneity. ackley
    and levy (the standard functions) have their minimum moved from client to client, by heterogeneity (D_i - 1 / N).
    """
    pick("function", function, _FUNCTIONS)
    rng = np.random.default_rng([trial, 1])
    shares = rng.dirichlet(np.full(clients, 1 / clients), (2, dim)).transpose(0, 2, 1) - 1 / clients
    examples = {"first": heterogeneity * shares[0], "second": heterogeneity * shares[1]}
    population = Population.from_sizes({k: v.astype(np.float32) for k, v in examples.items()}, [1] * clients)

    def loss_fn(x: Array, batch: Examples, key: Key) -> Array:
        u = 20 * jnp.clip(x, 0, 1) - 10
        return jax.vmap(lambda first, second: _FUNCTIONS[function](u, first, second))(batch["first"], batch["second"])

    return Task(loss_fn, population, jnp.asarray(rng.uniform(size=dim), jnp.float32), _optimum(function, dim))


def _optimum(function: str = "", dim: int = 1) -> float | None:
    """Least value of F of a synthetic function, where it is known."""
    return 0.1 * (-0.25 + 1 / dim) if function == "quadratic" else None


def attack(
    trial: int,
    *,
    dataset: str = "digits",
    data_dir: str | None = None,
    clients: int = 10,
    alpha: float = 1.0,
    epsilon: float = 0.3,
    hidden: int = 32,
) -> Task:
    """One perturbation of a test image that is to mislead the classifiers of all clients, untargeted.

    Client i's classifier, a perceptron, is trained by FedAvg in a cohort of itself on its Dirichlet(alpha) share of the
    training set. f_i is the logit of the true class less the largest other one; the perturbation of every pixel is
    epsilon (2 x - 1), of pixels in [0, 1], which stay there. Each trial takes another image, of those that all the
    classifiers have right. It starts from no perturbation.
    """
    model, classifiers, images, labels = _classifiers(dataset, data_dir, clients, alpha, hidden)
    image, label = images[trial % len(images)], labels[trial % len(images)]
    examples = {
        "classifier": classifiers,
        "image": np.repeat(image[None], clients, 0),
        "label": np.full(clients, label, np.int32),
    }

    def margin(classifier: Params, image: Array, label: Array, x: Array) -> Array:
        moved = jnp.clip(image + epsilon * (2 * jnp.clip(x, 0, 1) - 1).reshape(image.shape), 0, 1)
        logits = model.apply(classifier, moved[None])[0]
        others = jnp.where(jnp.arange(logits.size) == label, -jnp.inf, logits)
        return logits[label] - jnp.max(others)

    def loss_fn(x: Array, batch: Examples, key: Key) -> Array:
        return jax.vmap(partial(margin, x=x))(batch["classifier"], batch["image"], batch["label"])

    return Task(loss_fn, Population.from_sizes(examples, [1] * clients), jnp.full(image.size, 0.5, jnp.float32))


def metric(
    trial: int,
    *,
    score: str = "f1",
    dataset: str = "digits",
    data_dir: str | None = None,
    clients: int = 7,
    alpha: float = 10.0,
    reach: float = 0.2,
    hidden: int = 14,
    pretraining: int = 3,
    pool: int = 1,
) -> Task:
    """1 - macro precision, recall, F1 or Jaccard index of a small perceptron, whose weights x shifts by up to `reach`.

    The perceptron has had `pretraining` rounds of FedAvg on all clients' examples. f_i is the score of the shifted
    weights w + reach (2 x - 1) on client i's own training examples, all of them at once: it is no mean over examples
    and piecewise constant, with steps as fine as the client has examples. A class that neither occurs nor is predicted
    does not count. Of images the mean of every `pool` x `pool` pixels is taken, which leaves fewer weights.
    """
    pick("score", score, _SCORES)
    checks.positive_int("pool", pool, "1 leaves images as they are")
    model, start, population, num_classes = _pretrained(
        dataset, data_dir, clients, alpha, hidden, pretraining, trial, pool
    )
    sizes = np.asarray(population.sizes)
    width = int(sizes.max())
    rows = np.minimum(np.arange(width), sizes[:, None] - 1) + np.asarray(population.offsets)[:-1, None]
    examples = {k: np.asarray(v)[rows] for k, v in population.examples.items()}
    examples["mask"] = np.arange(width) < sizes[:, None]
    weights, unravel = ravel_pytree(start)

    def one(x: Array, inputs: Array, labels: Array, mask: Array, weights: Array) -> Array:
        logits = model.apply(unravel(weights + reach * (2 * jnp.clip(x, 0, 1) - 1)), inputs)
        predicted = jax.nn.one_hot(jnp.argmax(logits, axis=1), num_classes) * mask[:, None]
        true = jax.nn.one_hot(labels, num_classes) * mask[:, None]
        hits, guessed, actual = (jnp.sum(a, axis=0) for a in (predicted * true, predicted, true))
        values = _SCORES[score](hits, guessed, actual)
        return 1 - jnp.sum(jnp.where(guessed + actual > 0, values, 0)) / jnp.sum(guessed + actual > 0)

    def loss_fn(x: Array, batch: Examples, key: Key) -> Array:
        return jax.vmap(partial(one, x))(batch["x"], batch["y"], batch["mask"], batch["weights"])

    examples["weights"] = np.repeat(np.asarray(weights)[None], clients, 0)
    half = jnp.full(weights.size, 0.5, jnp.float32)
    return Task(loss_fn, Population.from_sizes(examples, [1] * clients), half, differentiable=False)


TASKS: Mapping[str, Callable[..., Task]] = {"synthetic": synthetic, "attack": attack, "metric": metric}


def build(name: str, study: Study, task: Task) -> Algorithm:
    """A method of `METHODS` or `REFERENCES` for a study."""
    known = {**METHODS, **REFERENCES}
    factory, own = known[pick("method", name, known)]
    num_clients = task.population.num_clients
    settings: dict[str, Any] = dict(own)
    if factory in ("fzoos", "scaffold_zo", "scaffold"):
        settings["num_clients"] = num_clients
    if factory == "fzoos":
        settings["queries"] = algorithms.FZooSQueries(capacity=study.capacity, radius=study.radius)
        settings["surrogate"] = algorithms.FZooSSurrogate(
            neighbors=study.neighbors,
            noise=study.noise,
            num_features=study.features,
            feature_neighbors=500,  # the paper's, as the defaults of `Study`
            feature_lengthscale=study.lengthscale,
        )
        settings |= {"correction_decay": study.correction_decay, "diagnose": task.differentiable}
    elif name in METHODS:
        settings |= {"num_directions": study.directions, "mu": study.mu}
    plan = Plan(lanes=1) if jax.default_backend() == "cpu" else Plan(lanes=num_clients)
    # Functions are flat outside their box: a coordinate that left it would have no slope to come back by.
    optimizer = optax.chain(optax.adam(study.client_lr), _stay_in_box())
    return getattr(algorithms, factory)(
        task.loss_fn, optimizer, batch_size=1, num_steps=study.steps, plan=plan, **settings
    )


def _stay_in_box() -> optax.GradientTransformation:
    """Cuts steps off where they would leave [0, 1]^d; the last of a chain."""

    def update(updates: Any, state: PyTree, params: Params = None) -> tuple[Any, Any]:
        return jax.tree.map(lambda x, step: jnp.clip(x + step, 0, 1) - x, params, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def curve(name: str, study: Study, task: Task) -> Callable[[Population, Array, Any], dict[str, Array]]:
    """Returns `run(population, start, key) -> {"value", "queries": [rounds + 1]}` of one trial, to be jitted.

    value is F(x) before the first and after every round, known to the figure but not to the method; queries are those
    of all clients so far, per client, and absent for `REFERENCES`. FZooS adds "cosine" and "error", [rounds], if the
    task has gradients.
    """
    algorithm = build(name, study, task)
    one = continue_rounds(algorithm, samplers.full(task.population.num_clients), 1)

    def run(population: Population, start: Array, key: Key) -> dict[str, Array]:
        def value(x: Array) -> Array:
            return jnp.mean(masks.call(task.loss_fn, x, population.examples, key))

        def body(state: PyTree, _: None) -> tuple[Any, Any]:
            state, metrics = one(state, population, key)
            accuracy = jax.tree.map(jnp.squeeze, getattr(metrics.extra, "accuracy", ()))
            asked = jax.tree.map(jnp.squeeze, getattr(metrics.extra, "queries", ()))
            return state, (value(algorithm.params(state)), asked, accuracy)

        state = algorithm.init(start)
        _, (values, queries, accuracy) = jax.lax.scan(body, state, length=study.rounds)
        result = {"value": jnp.concatenate([value(start)[None], values])}
        if name in METHODS:
            so_far = jnp.cumsum(jnp.concatenate([jnp.zeros(1, queries.dtype), queries]))
            result["queries"] = so_far / population.num_clients
        return result | ({"cosine": accuracy.cosine, "error": accuracy.error} if accuracy else {})

    return run


KIND = Kind("zeroth-order", of_values, "study.json", "group of trials")


def identity_of(study: Study) -> dict[str, str]:
    """What a study must find again to go on: its data, if it has some, and the kind of random keys."""
    if not isinstance(study, Attack | Metric):
        return identity.keys()
    dataset, assignment = _assigned(study.dataset, study.data_dir, study.clients, study.alpha)
    return identity.of(dataset, [assignment.digest()])


def compare(study: Study, out: Path, say: Callable[[str], None] = print) -> dict[str, dict[str, np.ndarray]]:
    """Runs what is not yet there of a study, and writes its report into the directory `out`.

    Returns:
      Name of a method to its curves, each [trials, rounds + 1] (see `curve`).

    Raises:
      Interrupted: after SIGINT or SIGTERM, once the trials at work are saved. A second signal ends the process.
      Unwritable: if the directory cannot be written to; what was saved is whole.
      ValueError: if something is wrong with the study, the directory holds another one or one of other examples, or
        another process is at work in it.
    """
    study = _joined(study, out)
    # Mistakes show in building a task, before the directory is there.
    first = TASKS[study.task](0, **study.own())
    known = {**METHODS, **(REFERENCES if first.differentiable else {})}
    names = [name for name, (factory, _) in known.items() if factory in study.methods]
    if not names:
        raise ValueError(f"methods={list(study.methods)} need gradients, and {study.task} has none: add fzoos or fedzo")
    for name in names:
        build(name, study, first)
    held = {
        "seeds": study.seeds * (num_bytes(first.population) + num_bytes(first.start)),
        "rounds": study.seeds * study.rounds * _ROUND,
    }
    memory.refuse("the study", held, memory.available())
    pinned = identity_of(study)
    claim(study, out, pinned)
    tasks = [first, *(TASKS[study.task](trial, **study.own()) for trial in range(1, study.seeds))]
    at_work = run_directory.at_work(out, KIND, say, lambda there: {"config": _content(study)}, pinned)
    # Systems of 150 unknowns are solved one after the other: a second thread would only wait, which takes a core too.
    with threadpool_limits(1, user_api="blas"), at_work as work:
        results = {name: _trials(name, study, tasks, work, say) for name in names}
        if work.may_write:
            with files.explain_os_errors(out, "All trials are done and saved, and the report is not"):
                report(study, results, tasks[0].optimum, out, out)
        else:
            say(f"{out} is read-only, so its report stays as it is")
    return results


def _trials(
    name: str, study: Study, tasks: Sequence[Task], work: Work, say: Callable[[str], None]
) -> dict[str, np.ndarray]:
    """The curves of a method, of all trials, each [trials, rounds + 1]; runs those that are not there, one a device."""
    run = jax.jit(curve(name, study, tasks[0]))
    parts = [trials.load(_path(work.out, name, trial), work.run, _of(name, trial)) for trial in range(len(tasks))]
    missing = [trial for trial, part in enumerate(parts) if part is None]
    devices = jax.devices()
    done = len(parts) - len(missing)

    def saved() -> str:
        return f"{done} of {len(parts)} trials of {name} are saved"

    if missing:
        with files.explain_os_errors(work.out, saved):
            work.check_writable()
    for group in (missing[i : i + len(devices)] for i in range(0, len(missing), len(devices))):
        if stop := work.stop():
            begun = f"after {done} of {len(parts)} trials of {name}, which are saved"
            where = begun if done else f"before {name} began"
            raise run_directory.interruption(stop, where, study.command(work.out))
        # Calls return before they are done, so that all devices are at work; the first result is waited for.
        results = [
            run(*jax.device_put((tasks[trial].population, tasks[trial].start, jax.random.key(trial)), device))
            for trial, device in zip(group, devices, strict=False)
        ]
        for trial, result in zip(group, results, strict=True):
            values = {k: np.asarray(v) for k, v in run_directory.waited_for(result).items()}
            with files.explain_os_errors(work.out, saved):
                trials.save(_path(work.out, name, trial), work.run, _of(name, trial), values)
            parts[trial], done = values, done + 1
            after = f"{values['queries'][-1]:g} queries a client" if "queries" in values else f"{study.rounds} rounds"
            say(f"{name}, trial {trial}: F = {values['value'][-1]:.5g} after {after}")
    return _stacked([part for part in parts if part is not None])


def again(out: Path, target: Path, say: Callable[[str], None]) -> list[str]:
    """Writes the report of the study in the directory `out` again, from its trials, into `target`.

    Returns:
      The names of the files.

    Raises:
      ValueError: if `out` holds no such study, no method is done, or a trial or curves.csv is not what was written.
    """
    record = run_directory.read(out, KIND)
    study, run = of_values(record["config"]), str(record.get("run", ""))
    results = {}
    for name in _names(study):
        parts = [trials.load(_path(out, name, i), run, _of(name, i), whole=True) for i in range(study.seeds)]
        there = [part for part in parts if part is not None]
        if len(there) == study.seeds:
            results[name] = _stacked(there)
    if not results:
        raise ValueError(f"no method of the study in {out} is done, so that there is nothing to show: run it first")
    path = out / "curves.csv"
    known = _names(study)
    expected = curves_csv(results).splitlines()
    found = path.read_text().splitlines() if path.exists() else []
    # It is written at the end: where methods are still missing, the one that is there is of before the study grew.
    if found and found != expected and (len(results) == len(known) or not set(found) <= set(expected)):
        raise ValueError(
            f"{path} is not what was measured: put it back, or give the command of the study again, which writes it "
            "anew and repeats nothing that is done"
        )
    values = study.flat()
    optimum = _optimum(values["function"], values["dim"]) if study.task == "synthetic" else None
    files.make_directory(target)
    return report(study, results, optimum, target, out)


def _names(study: Study) -> list[str]:
    """The methods of a study, by their names in figures."""
    known = {**METHODS, **(REFERENCES if study.task != "metric" else {})}
    return [name for name, (factory, _) in known.items() if factory in study.methods]


def _stacked(parts: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The curves of all trials of a method, each [trials, rounds + 1]."""
    return {k: np.stack([part[k] for part in parts]) for k in parts[0]}


def _path(out: Path, name: str, trial: int) -> Path:
    return out / "curves" / f"{name.replace(' ', '-')}-{trial}.npz"


def _of(name: str, trial: int) -> dict[str, Any]:
    return {"method": name, "trial": trial}


def claim(study: Study, out: Path, pinned: Mapping[str, str] | None = None) -> None:
    """Makes `out` the directory of a study, or checks that it holds the same one, or one with fewer seeds.

    Args:
      study: the study.
      out: the directory.
      pinned: what `identity_of` says of it; not compared unless given.

    Raises:
      ValueError: if it holds another one (with what differs), one of other examples, or something else.
      Unwritable: if it cannot be written to.
    """
    own, content = study.own(), _content(study)

    def check(there: Any) -> None:
        saved = of_values(there)
        if type(saved) is not type(study):
            raise ValueError(
                f"{out} holds a study of another task, {saved.task}, and not {study.task}: choose another --out"
            )
        check_grown(study, saved, out, _GROWS, "study", "more seeds and methods")

    where = identity.place(str(own.get("dataset", study.task)), own.get("data_dir"))
    run_directory.claim(out, KIND, content, check, pinned or {}, where)


def _content(study: Study) -> dict[str, Any]:
    """A study as JSON values."""
    return {"task": study.task, **json.loads(study.to_json())}


_GROWS = {"seeds": growth.at_least, "methods": growth.contains}


def _joined(study: Study, out: Path) -> Study:
    """The study with the methods that are in `out` already: others join them and none leaves."""
    if not files.has_record(out / KIND.marker):
        return study
    there = of_values(run_directory.read(out, KIND)["config"])
    return study.replace(methods=tuple(name for name in ALL if name in {*there.methods, *study.methods}))


def slug(study: Study) -> str:
    """A short readable name of a study, the same for more seeds or methods of it and for no other."""
    values = study.flat()
    kind = str(values.get("function") or values.get("score") or values.get("dataset") or "")
    but = {*_GROWS, *named(type(study), "place", "report")}
    return f"{study.task}-{kind}-{growth.digest(values, but)}"


def report(
    study: Study, results: Mapping[str, Mapping[str, np.ndarray]], optimum: float | None, out: Path, run: Path
) -> list[str]:
    """Writes curves.csv, curves.png and .pdf, summary.md and .html, and results.tex.

    Args:
      study: the study.
      results: name of a method to its curves.
      optimum: least value of F, where it is known.
      out: where to.
      run: directory of the study, for the command that repeats it.

    Returns:
      The names of the files.
    """
    from pipelines.common import figures
    from pipelines.results import latex, pages

    files.write_text(out / "curves.csv", curves_csv(results))
    with figures.style():
        pages.write(out, summary(study, results, optimum, run), {"curves.png": figure(study, results, optimum)})
    files.write_text(
        out / "results.tex", latex.table(*table(results), f"{study.task}; made by fedjax-core zeroth-order")
    )
    return ["summary.md and .html", "results.tex", "curves.csv", "curves.png and .pdf"]


def curves_csv(results: Mapping[str, Mapping[str, np.ndarray]]) -> str:
    """One row per method, trial and round."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["method", "trial", "round", "queries_per_client", "value", "cosine", "error"])
    for name, result in results.items():
        for trial, values in enumerate(result["value"]):
            for t, v in enumerate(values):
                queries = f"{result['queries'][trial, t]:g}" if "queries" in result else ""
                own = [result[k][trial, t - 1] if k in result and t else "" for k in ("cosine", "error")]
                writer.writerow([name, trial, t, queries, v, *own])
    return text.getvalue()


def figure(study: Study, results: Mapping[str, Mapping[str, np.ndarray]], optimum: float | None) -> Any:
    """F against rounds and against queries (means and standard deviations), and the surrogates' accuracy if known."""
    from matplotlib.figure import Figure

    from pipelines.common import figures

    known = any("cosine" in result for result in results.values())
    drawn = Figure(figsize=(14 if known else 10, 4.2), layout="constrained")
    axes = drawn.subplots(1, 3 if known else 2)
    for color, (name, result) in zip((*figures.COLORS, "#777777"), results.items(), strict=False):
        values = result["value"] - (0 if optimum is None else optimum)
        rounds = np.arange(values.shape[1])
        _band(axes[0], rounds, values, color, name, "-" if "queries" in result else ":")
        if "queries" in result:
            _band(axes[1], result["queries"].mean(0), values, color, name)
        for key, line in (("cosine", "-"), ("error", "--")):
            if key in result:
                label = {"cosine": "cosine with the true gradient", "error": "relative error"}[key]
                _band(axes[2], rounds[1:], result[key], color, label, line)
    label = "F(x)" if optimum is None else "F(x) - F*"
    axes[0].set(title=f"{label} against rounds", xlabel="round")
    axes[1].set(title=f"{label} against queries", xlabel="queries per client")
    if optimum is not None:
        axes[0].set_yscale("log")
        axes[1].set_yscale("log")
    if known:
        axes[2].set(title="Surrogate gradients of FZooS", xlabel="round", ylim=(0, 1.5))
    figures.legend_below(drawn, *axes, columns=7)
    options = ", ".join(f"{k}={v}" for k, v in study.own().items() if v is not None and k != "data_dir")
    figures.title(drawn, f"{study.task} ({options}); mean and standard deviation of {study.seeds} trials")
    return drawn


def queries_to(target: np.ndarray, result: Mapping[str, np.ndarray]) -> np.ndarray:
    """Queries per client until F is at most the trial's target, float[trials]; NaN where it is never reached."""
    reached = result["value"] <= target[:, None]
    first = np.argmax(reached, axis=1)
    queries = np.take_along_axis(result["queries"], first[:, None], 1)[:, 0].astype(float)
    return np.where(reached.any(1), queries, np.nan)


def summary(study: Study, results: Mapping[str, Mapping[str, np.ndarray]], optimum: float | None, run: Path) -> str:
    """Final values, the queries after which FZooS is where each baseline ends, and the command, as Markdown."""
    lines = [
        f"# {study.task}",
        "",
        *(f"- {k}: {', '.join(v) if k == 'methods' else v}" for k, v in study.flat().items()),
    ]
    if optimum is not None:
        lines += ["", f"Least value of F: {optimum:.6g}."]
    lines += [
        "",
        "Final F is the mean and standard deviation over trials.",
    ]
    if "FZooS" in results:
        lines += [
            "The last column says after how many queries per client, in the median trial, FZooS is as low as the",
            "baseline in the end, and in how many trials it ever is.",
        ]
    if REFERENCES.keys() & results.keys():
        lines += ["Methods with gradients are given the true ones and query nothing."]
    header, rows = table(results)
    lines += ["", *("| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows))]
    waiting = [name for name in _names(study) if name not in results]
    if waiting:
        lines += ["", f"**This study has not ended.** Not done yet: {', '.join(waiting)}."]
    lines += ["", "![F against rounds and against queries](curves.png)", ""]
    lines += ["## Again", "", "```", study.command(run), "```"]
    return "\n".join(lines) + "\n"


def table(results: Mapping[str, Mapping[str, np.ndarray]]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of results."""
    rows = []
    for name, result in results.items():
        final = result["value"][:, -1].astype(float)
        deviation = f" ± {final.std(ddof=1):.2g}" if len(final) > 1 else ""
        needed = ""
        if name != "FZooS" and "FZooS" in results:
            needs = queries_to(final, results["FZooS"])
            there = ~np.isnan(needs)
            needed = f"{np.median(needs[there]):g} ({there.sum()} of {len(needs)})" if there.any() else "not reached"
        queries = f"{result['queries'][:, -1].mean():g}" if "queries" in result else "none"
        rows.append([name, f"{final.mean():.5g}{deviation}", queries, needed])
    header = ["method", "final F", "queries per client", "FZooS needs"]
    return (header, rows) if "FZooS" in results else (header[:3], [row[:3] for row in rows])


def _band(axis: Any, x: np.ndarray, values: np.ndarray, color: str, label: str, line: str = "-") -> None:
    mean = values.mean(axis=0)
    axis.plot(x, mean, line, color=color, linewidth=1.6, label=label)
    if len(values) > 1:
        sd = values.std(axis=0, ddof=1)
        low = mean - sd
        if (values > 0).all():  # nothing below the least value on a logarithmic axis
            low = np.maximum(low, values.min(axis=0))
        axis.fill_between(x, low, mean + sd, color=color, alpha=0.18, linewidth=0)


def _quadratic(u: Array, first: Array, second: Array) -> Array:
    return 0.1 / u.size * ((1 + first) @ u**2 + (1 + second) @ u + 1)


def _ackley(u: Array, first: Array, second: Array) -> Array:
    v = u - first
    # Without the small number the square root has no derivative at the minimum.
    near = jnp.exp(-0.2 * jnp.sqrt(jnp.mean(v**2) + 1e-12))
    return -20 * near - jnp.exp(jnp.mean(jnp.cos(2 * jnp.pi * v))) + 20 + jnp.e


def _levy(u: Array, first: Array, second: Array) -> Array:
    w = 1 + (u - first - 1) / 4
    inner = (w[:-1] - 1) ** 2 * (1 + 10 * jnp.sin(jnp.pi * w[:-1] + 1) ** 2)
    last = (w[-1] - 1) ** 2 * (1 + jnp.sin(2 * jnp.pi * w[-1]) ** 2)
    return (jnp.sin(jnp.pi * w[0]) ** 2 + jnp.sum(inner) + last) / u.size


_FUNCTIONS = {"quadratic": _quadratic, "ackley": _ackley, "levy": _levy}


def _ratio(a: Array, b: Array) -> Array:
    return a / jnp.where(b > 0, b, 1)


_SCORES: Mapping[str, Callable[[Array, Array, Array], Array]] = {
    "precision": lambda hits, guessed, actual: _ratio(hits, guessed),
    "recall": lambda hits, guessed, actual: _ratio(hits, actual),
    "f1": lambda hits, guessed, actual: _ratio(2 * hits, guessed + actual),
    "jaccard": lambda hits, guessed, actual: _ratio(hits, guessed + actual - hits),
}
"""Name to the score of each class, from hits, predictions and true members, float[K] each."""


def _federated(
    dataset: str, data_dir: str | None, clients: int, alpha: float, hidden: int, pool: int = 1
) -> tuple[Any, Population, Any, Any]:
    """The data set, the clients' examples, a perceptron, and the same of inputs as the clients have them."""
    import models
    from pipelines.data import datasets
    from pipelines.experiment import setup
    from pipelines.federation import partition

    loaded, assignment = _assigned(dataset, data_dir, clients, alpha)
    if loaded.normalization is not None:  # bytes
        parts = ({**part, "x": part["x"].astype(np.float32) / 255} for part in (loaded.train, loaded.test))
        loaded = loaded._replace(train=next(parts), test=next(parts), normalization=None)
    if pool > 1:
        parts = ({**part, "x": _pooled(dataset, part["x"], pool)} for part in (loaded.train, loaded.test))
        loaded = loaded._replace(train=next(parts), test=next(parts))
    loaded = setup.in_precision(loaded)
    model = models.mlp(loaded.input_shape, loaded.num_classes, hidden=(hidden,))
    return loaded, partition.federate(loaded, assignment), model, datasets.normalized(model, loaded.normalization)


def _assigned(dataset: str, data_dir: str | None, clients: int, alpha: float) -> tuple[Dataset, Assignment]:
    """The data set as it is loaded, and who holds which of its examples."""
    from pipelines.data import datasets
    from pipelines.federation import partition

    loaded = datasets.load(dataset, data_dir)
    if loaded.is_sequence:
        raise ValueError(f"dataset {dataset!r} is text: take images or a table, such as digits or breast_cancer")
    return loaded, partition.dirichlet(loaded.train["y"], clients, alpha=alpha, min_size=20)


def _pooled(dataset: str, x: np.ndarray, pool: int) -> np.ndarray:
    """Means of squares of pixels, [n, height / pool, width / pool, channels]."""
    if x.ndim != 4 or x.shape[1] % pool or x.shape[2] % pool:
        raise ValueError(
            f"pool={pool}, but an input of {dataset} has shape {list(x.shape[1:])}: take images, and a divisor of "
            "their height and width"
        )
    n, height, width, channels = x.shape
    return x.reshape(n, height // pool, pool, width // pool, pool, channels).mean(axis=(2, 4))


@cache
def _classifiers(
    dataset: str, data_dir: str | None, clients: int, alpha: float, hidden: int, rounds: int = 20
) -> tuple[Any, Any, np.ndarray, np.ndarray]:
    """The model, the clients' own classifiers (leaves [N, ...]), and test images that they all have right."""
    import models

    loaded, population, model, inputs = _federated(dataset, data_dir, clients, alpha, hidden)
    fedavg = algorithms.fedavg(models.losses.cross_entropy(inputs), optax.adam(0.003), batch_size=50, num_steps=30)

    def train(population: Population, i: Array) -> Any:
        state = fedavg.init(model.init(jax.random.fold_in(jax.random.key(0), i)))

        def body(state: PyTree, t: Array) -> tuple[Any, None]:
            return fedavg.round(state, population.cohort(i[None]), jax.random.key(t))[0], None

        return fedavg.params(jax.lax.scan(body, state, jnp.arange(rounds))[0])

    classifiers = jax.jit(jax.vmap(train, (None, 0)))(population, jnp.arange(clients))
    images, labels = np.asarray(loaded.test["x"][:500]), np.asarray(loaded.test["y"][:500])
    logits = jax.vmap(inputs.apply, (0, None))(classifiers, jnp.asarray(images))
    right = np.asarray(jnp.all(jnp.argmax(logits, axis=-1) == labels, axis=0))
    if not right.any():
        raise ValueError(
            f"no test image of {dataset} is right for all {clients} classifiers: raise alpha={alpha:g}, so that "
            "clients have seen all classes, or take fewer clients"
        )
    return inputs, jax.tree.map(np.asarray, classifiers), images[right], labels[right]


def _pretrained(
    dataset: str, data_dir: str | None, clients: int, alpha: float, hidden: int, rounds: int, seed: int, pool: int = 1
) -> tuple[Any, Any, Population, int]:
    """The model, its parameters after some rounds of FedAvg, the clients' examples, and the number of classes."""
    import models

    loaded, population, model, inputs = _federated(dataset, data_dir, clients, alpha, hidden, pool)
    fedavg = algorithms.fedavg(models.losses.cross_entropy(inputs), optax.sgd(0.1), batch_size=20)
    state, round_fn = fedavg.init(model.init(jax.random.key(seed))), jax.jit(fedavg.round)
    for t in range(rounds):
        state, _ = round_fn(state, population.cohort(np.arange(clients)), jax.random.key(t))
    return inputs, fedavg.params(state), population, loaded.num_classes
