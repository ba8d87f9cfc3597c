"""Any method on problems with known constants: the errors after every round, all settings and seeds in one program.

    make = measure.method("scaffold", num_steps=5)
    cases = [Case({"zeta": zeta}, {"client_lr": 0.1}) for zeta in (0.1, 0.3, 1.0)]
    curves = measure.measure(quadratic, make, cases, rounds=300, seeds=8)
    curves.excess  # float64[3, 8, 301], F(x) - F* before the first and after every round

A seed draws a problem anew, with the same constants, besides batches and cohorts: a spread over seeds is one over
problems, also where nothing is random in a method. All seeds of a case and all cases of a seed share what they can: the
draw of the problem is the same for all cases that differ in constants alone, and so are batches and cohorts.

S is the number of cases, R that of seeds, T that of rounds.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import algorithms
from fedjax_core import (
    Algorithm,
    Array,
    ClientProgram,
    ClientResults,
    Cohort,
    Descent,
    Metrics,
    Plan,
    checks,
    continue_rounds,
    messages,
    samplers,
)
from fedjax_core.facts import local_options, needs
from fedjax_core.types import Key, PyTree
from pipelines.common.names import pick
from pipelines.studies.convergence import problems
from pipelines.studies.convergence.problems import Data, Problem

Make = Callable[[Problem, Mapping[str, Any]], Algorithm]
"""`make(problem, hyper)`: a method for a problem; what it computes with `hyper` is traced."""


class Case(NamedTuple):
    """A setting that is measured.

    Attributes:
      constants: arguments of the problem, such as zeta and sigma; sizes must be the same in all cases.
      hyper: real hyper-parameters by name, client_lr among them; the same names in all cases.
    """

    constants: Mapping[str, Any]
    hyper: Mapping[str, float]


class Curves(NamedTuple):
    """What was measured, in double precision; not finite from where on a run diverged.

    Attributes:
      distance: squared distance to the minimizers, float64[S, R, T + 1].
      gradient: squared norm of the gradient of F, float64[S, R, T + 1].
      excess: F(x) - F*, float64[S, R, T + 1].
      drift: consensus error of a round, the mean over the participants of ||y_i - x||^2 at the end of their local
        training, x being where they began, float64[S, R, T]; NaN for a method whose clients do not descend by
        `fedjax_core.local_descent`.
    """

    distance: np.ndarray
    gradient: np.ndarray
    excess: np.ndarray
    drift: np.ndarray


def names() -> list[str]:
    """The methods of the library that a loss, a client optimizer and the number of clients are enough for."""
    return [name for name in algorithms.__all__ if not _wants_more(name) and "loss" in _asked(name).values()]


def method(name: str, *, num_steps: int | np.ndarray = 1, batch_size: int = 1, **fixed: Any) -> Make:
    """A method of the library, whose clients take steps of plain SGD on batches drawn with replacement.

    Args:
      name: of the method.
      num_steps: local steps of a round, K, or an int array of each client's; of no meaning to a method with one full
        pass.
      batch_size: B, examples of a step.
      **fixed: arguments of its factory that are the same in all cases.

    Returns:
      `make(problem, hyper)`, where `hyper` has `client_lr` and may have real arguments of the factory, and K as
      `num_steps`.

    Raises:
      ValueError: if there is no such method, it needs more than a loss, or an argument is wrong.
    """
    if name in algorithms.__all__ and (more := _wants_more(name)):
        raise ValueError(
            f"method {name} also needs {', '.join(more)}, which a problem that is a plain function has not: take one "
            f"of {', '.join(names())}"
        )
    factory = getattr(algorithms, pick("method", name, names()))
    if np.ndim(num_steps) == 0:
        checks.positive_int("num_steps", num_steps, "take at least one local step")
    checks.positive_int("batch_size", batch_size, "each step needs at least one example")
    known = [each for each in inspect.signature(factory).parameters if each != "local"]
    for each in fixed:
        pick(f"argument of {name}", each, [*known, *local_options(factory)])
    given = {"num_steps": num_steps, "batch_size": batch_size, "order": "replacement"} | fixed
    given = {key: value for key, value in given.items() if key in known or key in local_options(factory)}

    def make(problem: Problem, hyper: Mapping[str, Any]) -> Algorithm:
        own = dict(hyper)
        if "client_lr" not in own:
            raise ValueError(f"hyper of {name} has no client_lr, the learning rate of the clients: give it one")
        sgd = optax.sgd(own.pop("client_lr"))
        work = given
        if "num_steps" in own:
            steps = jnp.asarray(own.pop("num_steps"), jnp.int32)
            work = given | {"num_steps": jnp.broadcast_to(steps, problem.data.population.num_clients)}
        for each in own:
            pick(f"hyper-parameter of {name}", each, [key for key in known if key not in _asked(name)])
        clients = problem.data.population.num_clients
        brought = {"loss": problem.loss_fn, "client optimizer": sgd, "num_clients": clients}
        asked = {argument: brought[what] for argument, what in _asked(name).items() if what in brought}
        plan = {"plan": Plan(lanes=clients)} if "plan" in local_options(factory) else {}
        made: Algorithm = factory(**asked, **plan, **work, **own)
        return made

    return make


def measure(
    build: Callable[..., Problem],
    make: Make,
    cases: Sequence[Case],
    *,
    rounds: int,
    seeds: int,
    cohort_size: int | None = None,
    probabilities: Sequence[float] | None = None,
    first_seed: int = 0,
) -> Curves:
    """Runs a method on all cases and seeds, as one compiled program.

    Args:
      build: `build(seed, **constants)`, one of `problems.KINDS` or a function like them.
      make: the method, see `method`.
      cases: the settings.
      rounds: T.
      seeds: R.
      cohort_size: clients that take part in a round, drawn uniformly; all unless given.
      probabilities: of each client to take part in a round, independently of all else; instead of cohort_size.
      first_seed: the first of the seeds, which are consecutive.

    Raises:
      ValueError: if there are no cases; if they differ in sizes or in the names of their hyper-parameters; if one is
        refused by the problem or by the method (with its place); if a number is out of its range.
    """
    checks.positive_int("rounds", rounds, "run at least one round")
    checks.positive_int("seeds", seeds, "take at least one")
    if not cases:
        raise ValueError("cases is empty: give at least one")
    made = [[_built(build, place, case, first_seed + r) for r in range(seeds)] for place, case in enumerate(cases)]
    first = made[0][0]
    _check_alike(made, cases)
    for place, case in enumerate(cases):
        try:
            make(first, case.hyper)
        except (ValueError, TypeError) as error:
            raise ValueError(f"case {place + 1} of {len(cases)} ({_words(case)}): {error}") from None
    clients = first.data.population.num_clients
    if cohort_size is not None and not 1 <= checks.positive_int("cohort_size", cohort_size, "at least one") <= clients:
        raise ValueError(f"cohort_size={cohort_size} is above the number of clients, {clients}: lower it")
    if cohort_size is not None and probabilities is not None:
        raise ValueError("cohort_size and probabilities are both given: give one of them, or neither for all clients")
    if probabilities is not None:
        if len(probabilities) != clients:
            raise ValueError(f"probabilities has {len(probabilities)} values for {clients} clients: give one to each")
        sampler = samplers.bernoulli(np.asarray(probabilities))
    else:
        sampler = samplers.full(clients) if cohort_size is None else samplers.uniform(clients, cohort_size)
    one = _curve(first, make, sampler, rounds)
    stacked = [jax.tree.map(lambda *leaves: jnp.stack(leaves), *(p.data for p in row)) for row in made]
    data = jax.tree.map(lambda *leaves: jnp.stack(leaves), *stacked)
    hyper = {name: jnp.asarray([case.hyper[name] for case in cases], float) for name in cases[0].hyper}
    keys = jax.vmap(jax.random.key)(jnp.arange(first_seed, first_seed + seeds))
    run = jax.jit(jax.vmap(jax.vmap(one, (0, None, 0)), (0, 0, None)))
    return Curves(*map(np.asarray, run(data, hyper, keys)))


def _curve(first: Problem, make: Make, sampler: Any, rounds: int) -> Callable[[Data, Mapping[str, Array], Key], Any]:
    """`curve(data, hyper, key) -> Curves` of one case and seed, without their axes."""

    def errors(problem: Problem, x: Array) -> tuple[Array, Array, Array]:
        away, slope = problems.distance(problem, x), problems.gradient_norm(problem, x)
        return away**2, slope**2, problems.suboptimality(problem, x)

    def curve(data: Data, hyper: Mapping[str, Array], key: Key) -> tuple[Array, ...]:
        problem = first._replace(data=data)
        algorithm = watched(make(problem, hyper))
        one_round = continue_rounds(algorithm, sampler, 1)

        def body(state: PyTree, _: None) -> tuple[PyTree, tuple[Array, ...]]:
            state, metrics = one_round(state, data.population, key)
            return state, (*errors(problem, algorithm.params(state)), metrics.extra.drift[0])

        state = algorithm.init(data.start, key)
        _, (*after, moved) = jax.lax.scan(body, state, length=rounds)
        begun = errors(problem, data.start)
        return (*(jnp.concatenate([a[None], b]) for a, b in zip(begun, after, strict=True)), moved)

    return curve


class Watched(NamedTuple):
    """The own metrics of a method that is watched.

    Attributes:
      method: those of the method.
      drift: float[], the mean over the participants of ||y_i - x||^2; NaN if no client descends.
    """

    method: PyTree
    drift: Array


def watched(algorithm: Algorithm) -> Algorithm:
    """The method, whose metrics also tell how far clients go: of a round with several descents that of the last one.

    No number of the method changes. What it takes is what every part takes: a round that is not compiled by itself.
    """

    def round(state: Any, cohort: Cohort, key: Key) -> tuple[Any, Metrics]:
        told: list[Array] = []
        state, metrics = algorithm.round(state, messages.through(cohort, lambda asked: _run_watched(asked, told)), key)
        return state, metrics._replace(extra=Watched(metrics.extra, told[-1] if told else jnp.asarray(jnp.nan)))

    return algorithm._replace(round=round)


def _run_watched(asked: messages.Pass, told: list[Array]) -> ClientResults:
    """Runs a pass, and tells of it if its clients descend by `fedjax_core.local_descent`."""
    program = asked.program
    descends: list[bool] = []

    def init(shared: PyTree, own: PyTree, key: Key) -> PyTree:
        carry = program.init(shared, own, key)
        descends.append(isinstance(carry, Descent))
        return carry, carry.params if descends[-1] else ()

    def step(shared: PyTree, carry: PyTree, batch: Any) -> PyTree:
        inner, begun = carry
        inner, loss = program.step(shared, inner, batch)
        return (inner, begun), loss

    def final(shared: PyTree, carry: PyTree) -> PyTree:
        inner, begun = carry
        upload, output = program.final(shared, inner)
        moved = optax.tree.norm(optax.tree.sub(inner.params, begun), squared=True) if descends[-1] else ()
        return upload, (output, moved)

    results = asked._replace(program=ClientProgram(init, step, final)).run()
    outputs, moved = results.outputs
    if descends[-1]:
        there = asked.cohort.mask
        told.append(jnp.sum(jnp.where(there, moved, 0)) / jnp.maximum(jnp.sum(there), 1))
    return results._replace(outputs=outputs)


def _asked(name: str) -> dict[str, str]:
    return needs(getattr(algorithms, name))


def _wants_more(name: str) -> list[str]:
    """What a method needs besides a loss, a client optimizer and the number of clients."""
    if not inspect.isfunction(getattr(algorithms, name)):
        return ["to be a method"]
    return [what for what in _asked(name).values() if what not in ("loss", "client optimizer", "num_clients")]


def _words(case: Case) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in {**case.constants, **case.hyper}.items())


def _built(build: Callable[..., Problem], place: int, case: Case, seed: int) -> Problem:
    try:
        return build(seed, **case.constants)
    except (ValueError, TypeError) as error:
        raise ValueError(f"case {place + 1} ({_words(case)}): {error}") from None


def _check_alike(made: Sequence[Sequence[Problem]], cases: Sequence[Case]) -> None:
    """Raises ValueError unless all cases can be run by one program."""

    def shapes(problem: Problem) -> list[Any]:
        return [np.shape(leaf) for leaf in jax.tree.leaves(problem.data)]

    for place, (row, case) in enumerate(zip(made, cases, strict=True), 1):
        if row[0].loss_fn is not made[0][0].loss_fn or shapes(row[0]) != shapes(made[0][0]):
            raise ValueError(
                f"case {place} ({_words(case)}) has other sizes than the first: what changes the number of dimensions, "
                "clients or examples is measured by a call of its own"
            )
        if set(case.hyper) != set(cases[0].hyper):
            raise ValueError(
                f"case {place} has the hyper-parameters {sorted(case.hyper)}, and the first {sorted(cases[0].hyper)}: "
                "give the same to all"
            )
