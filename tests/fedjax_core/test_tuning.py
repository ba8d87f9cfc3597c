import jax
import numpy as np
import optax
import pytest

import algorithms
from fedjax_core import Plan, client_mesh, try_plans
from tests.problems import softmax_loss, softmax_params, softmax_population

KEY = jax.random.key(0)


def make(plan):
    return algorithms.fedavg(softmax_loss, optax.sgd(0.1), batch_size=4, num_steps=2, plan=plan)


def cohort():
    return softmax_population((5, 9, 3, 4)).cohort(np.arange(4))


def test_plans_come_back_fastest_first():
    plans = [Plan(lanes=1), Plan(lanes=4), Plan(lanes=2, mesh=client_mesh(2))]
    trials = try_plans(make, softmax_params(), cohort(), KEY, plans, repeats=2)
    assert {trial.plan for trial in trials} == set(plans)
    seconds = [trial.seconds for trial in trials]
    assert seconds == sorted(seconds)
    assert all(0 < trial.seconds < trial.compile_seconds and trial.memory > 0 and not trial.error for trial in trials)


def test_what_does_not_fit_is_not_run():
    wide = try_plans(make, softmax_params(), cohort(), KEY, [Plan(lanes=4)], repeats=1)[0].memory
    narrow, too_wide = try_plans(
        make, softmax_params(), cohort(), KEY, [Plan(lanes=4), Plan(lanes=1)], repeats=1, memory_limit=wide - 1
    )
    assert narrow.plan.lanes == 1
    assert narrow.seconds < float("inf")
    assert too_wide.seconds == float("inf")
    assert f"needs {wide} of {wide - 1} bytes" in too_wide.error


def test_a_plan_that_runs_out_of_memory_is_passed_over():
    def loss(params, batch, key):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes")

    def failing(plan):
        chosen = loss if plan.lanes == 4 else softmax_loss
        return algorithms.fedavg(chosen, optax.sgd(0.1), batch_size=4, num_steps=2, plan=plan)

    fine, failed = try_plans(failing, softmax_params(), cohort(), KEY, [Plan(lanes=4), Plan(lanes=1)], repeats=1)
    assert fine.plan.lanes == 1
    assert failed.seconds == float("inf")
    assert "RESOURCE_EXHAUSTED" in failed.error


def test_nothing_to_try():
    with pytest.raises(ValueError, match=r"plans is empty: give at least one, for example \[Plan\(lanes=1\)"):
        try_plans(make, softmax_params(), cohort(), KEY, [])
