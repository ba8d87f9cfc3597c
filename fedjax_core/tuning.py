"""Finds the fastest execution plan by trying some."""

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from fedjax_core import checks
from fedjax_core.algorithm import Algorithm, first_state
from fedjax_core.placement import place, replicated, shardings
from fedjax_core.plans import Plan
from fedjax_core.population import Cohort
from fedjax_core.types import Key, Params


class Trial(NamedTuple):
    """What came of trying a plan.

    Attributes:
      plan: the plan.
      seconds: median seconds of a round; infinity if it could not run.
      compile_seconds: seconds to trace and compile it.
      memory: bytes that the compiled round needs on one device, 0 where the backend does not say.
      error: why it could not run, or an empty string.
    """

    plan: Plan
    seconds: float
    compile_seconds: float
    memory: int
    error: str


def try_plans(
    make: Callable[[Plan], Algorithm],
    params: Params,
    cohort: Cohort,
    key: Key,
    plans: Sequence[Plan],
    *,
    repeats: int = 3,
    memory_limit: float = float("inf"),
) -> list[Trial]:
    """Compiles a round with each plan and measures it, fastest first.

    A plan whose round needs more than `memory_limit` bytes, or runs out of memory, is not run to its end: its time is
    infinity. A short round tells as much as a long one, so give a method with few local steps.

    Args:
      make: `make(plan) -> Algorithm`.
      params: the model.
      cohort: clients of the round, as many as in the real one.
      key: key of the round.
      plans: what to try.
      repeats: measured rounds of each plan, after one that is not.
      memory_limit: bytes one device may use.

    Raises:
      ValueError: if there is no plan to try.
    """
    checks.positive_int("repeats", repeats, "measure at least one round")
    if not plans:
        raise ValueError("plans is empty: give at least one, for example [Plan(lanes=1), Plan(lanes=8)]")
    found = [_try(make(plan), plan, params, cohort, key, repeats, memory_limit) for plan in plans]
    return sorted(found, key=lambda trial: trial.seconds)


def needed_memory(compiled: jax.stages.Compiled) -> int:
    """Bytes a compiled function needs on one device; 0 where the backend does not say."""
    analysis = compiled.memory_analysis()
    if analysis is None:
        return 0
    sizes = analysis.argument_size_in_bytes + analysis.output_size_in_bytes + analysis.temp_size_in_bytes
    return int(sizes - analysis.alias_size_in_bytes)


def out_of_memory(error: Exception) -> bool:
    """Whether an error of the runtime says that memory has run out."""
    return "RESOURCE_EXHAUSTED" in str(error) or "out of memory" in str(error).lower()


def _try(
    algorithm: Algorithm, plan: Plan, params: Params, cohort: Cohort, key: Key, repeats: int, memory_limit: float
) -> Trial:
    begin = time.perf_counter()
    compile_seconds, memory = 0.0, 0
    try:
        state = first_state(algorithm, jax.tree.map(jax.numpy.asarray, params), key)
        if plan.mesh is not None:
            state = place(state, shardings(state, plan.mesh))
            cohort, key = place((cohort, key), replicated(plan.mesh))
        compiled = jax.jit(algorithm.round).lower(state, cohort, key).compile()
        compile_seconds, memory = time.perf_counter() - begin, needed_memory(compiled)
        if memory > memory_limit:
            return Trial(plan, float("inf"), compile_seconds, memory, f"needs {memory} of {memory_limit:.0f} bytes")
        times = []
        for _ in range(1 + repeats):
            begin = time.perf_counter()
            jax.block_until_ready(compiled(state, cohort, key))
            times.append(time.perf_counter() - begin)
    except jax.errors.JaxRuntimeError as error:
        if not out_of_memory(error):
            raise
        return Trial(plan, float("inf"), compile_seconds, memory, str(error).splitlines()[0])
    return Trial(plan, float(np.median(times[1:])), compile_seconds, memory, "")
