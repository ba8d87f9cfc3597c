"""This library on all there is: `jax.jit` of a round, the clients spread over a mesh of all devices.

A CPU is a device for every core here. XLA makes one of it unless `jax_num_cpu_devices` says otherwise before JAX is
used.
"""

import os
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import optax

import algorithms
from benchmarks.peers import jax_models
from benchmarks.peers.worker import Recorder, Task
from fedjax_core import (
    ClientProgram,
    Cohort,
    Plan,
    Population,
    client_mesh,
    for_each_client,
    local_work,
    place,
    replicated,
    shardings,
)
from fedjax_core.plans import default_lanes

PARTS = 4
"""Parts of a batch, of which those that are all padding are left out, in the long steps of models of text."""


def run(task: Task, recorder: Recorder, num_devices: int | None = None) -> None:
    """Runs the task on so many devices, all unless given."""
    jax.config.update("jax_num_cpu_devices", num_devices or len(os.sched_getaffinity(0)))
    mesh = client_mesh(num_devices)
    workload, federation = task.workload, task.federation
    parts = PARTS if workload.is_text and workload.batch_size % PARTS == 0 else 1
    plan = Plan(mesh=mesh, batch_parts=parts)
    model = jax_models.make_model(workload, task.dropout)
    fedavg = algorithms.fedavg(
        jax_models.make_loss(workload, model),
        optax.sgd(workload.learning_rate),
        batch_size=workload.batch_size,
        num_epochs=workload.num_epochs,
        order="shuffled" if task.shuffled else "sequential",
        weights="examples",
        plan=plan,
    )
    population = Population.from_flat({"x": federation.x, "y": federation.y}, federation.offsets)
    population = place(population, replicated(mesh))
    state = fedavg.init(jax_models.load(model, task.parameters))
    state = place(state, shardings(state, mesh))
    round_fn, count = jax.jit(fedavg.round), executed_steps(task, plan)
    recorder.ready(jax.default_backend(), jax_models.versions())

    for t, ids in enumerate(task.cohorts):
        state, metrics = round_fn(state, population.cohort(ids), jax.random.key(t))
        jax.block_until_ready((state, metrics))
        executed = partial(count, population.cohort(ids))
        if not recorder.round_done(partial(jax_models.unload, state.params), executed):
            break


def executed_steps(task: Task, plan: Plan) -> Callable[[Cohort], int]:
    """How many steps the plan executes for a cohort, idle ones included, counted with clients that do nothing."""
    idle = ClientProgram(lambda *_: (), lambda shared, carry, batch: (carry, jnp.zeros(())), lambda *_: ((), ()))
    work = local_work(task.workload.batch_size, num_epochs=task.workload.num_epochs, order="sequential")
    # Spelled out, because for clients that do nothing a plan left open is another one.
    plan = Plan(lanes=plan.lanes or default_lanes() * plan.num_devices, mesh=plan.mesh)
    run = jax.jit(lambda c: for_each_client(idle, (), c, jax.random.key(0), work=work, plan=plan).executed_steps)
    return lambda cohort: int(run(cohort))
