"""Which execution plan a run takes: what is fast here, and fits into memory.

On a processor every core stands in for a device, with one client each: measured over six models in
benchmarks/results/plans.json. Elsewhere a few steps of local training are tried in lanes of several sizes and, on a
GPU, with both convolutions, once for a device, a model and a batch size; what came of it is kept in the user's cache
folder.
"""

import dataclasses
import json
from collections.abc import Collection, Sequence
from contextlib import suppress
from hashlib import sha256
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import algorithms
from fedjax_core import HostPopulation, Plan, Population, Trial, try_plans, with_statistics
from pipelines.common import files, processes
from pipelines.common.processes import cores
from pipelines.common.progress import Reporter, size
from pipelines.configuration.config import Config
from pipelines.data import cache
from pipelines.experiment import memory
from pipelines.experiment.setup import Experiment, memory_fix, predicted_memory, prepare

TRIAL_STEPS = 4
LANES = (1, 2, 4, 8, 16, 32, 64, 128)
"""Lanes of each device that a trial looks at, as far as there are clients and memory for them."""


def tuned(config: Config, reporter: Reporter) -> Config:
    """The configuration with the fields that say how the machine is used filled in, as far as they are left open.

    Args:
      config: lanes, mesh and convolution that are given stay as they are.
      reporter: hears of each trial.
    """
    if jax.default_backend() == "cpu":
        if config.machine.mesh is not None or config.machine.lanes is not None or jax.process_count() > 1:
            return config
        busy = (
            config.participation.cohort_size * config.seeds
            if config.participation.sampler in ("uniform", "weighted", "cyclic")
            else cores()
        )
        devices = min(cores(), len(jax.devices()), busy)
        return config.replace(mesh=devices) if devices > 1 else config
    if config.machine.mesh is None and len(jax.devices()) > 1:
        config = config.replace(mesh=len(jax.devices()))
    if config.machine.lanes is not None:
        return config
    return _tried(config, reporter)


def fitted(experiment: Experiment, method: str, reporter: Reporter) -> Experiment:
    """The experiment with a plan of the method that fits into memory by prediction, if there is one."""
    limit = device_memory(experiment)
    while (need := sum(predicted_memory(experiment, method).values())) > limit:
        less = smaller(experiment)
        if less is None:
            reporter.say(
                f"warning: {method} needs about {size(need)} by prediction, which leans to the high side, and the "
                f"device has {size(limit)}: {memory_fix(experiment, method)}"
            )
            break
        reporter.say(f"{method}: {described(experiment.plan)} would need about {size(need)} of {size(limit)}")
        experiment = with_plan(experiment, method, less)
    return experiment


def smaller(experiment: Experiment) -> Plan | None:
    """The next plan that needs less memory, or None: half the lanes, then one core instead of several."""
    plan = experiment.plan
    lanes = plan.lanes_per_device(slots(experiment))
    if lanes > 1:
        return dataclasses.replace(plan, lanes=lanes // 2 * plan.num_devices)
    alone = plan.mesh is not None and jax.process_count() == 1 and "model" not in plan.mesh.shape
    if alone and plan.num_devices > 1 and jax.default_backend() == "cpu":
        return Plan(1)  # the devices of a processor share its memory, and each holds the examples
    return None


def with_plan(experiment: Experiment, method: str, plan: Plan) -> Experiment:
    """The experiment with another plan, for one method."""
    return experiment._replace(plan=plan, algorithms=experiment.algorithms | {method: experiment.make(method, plan)})


def slots(experiment: Experiment) -> int:
    """Clients that may be trained at the same time, those of all seeds."""
    ids = jax.eval_shape(experiment.sampler, jax.random.key(0), jnp.int32(0))
    return ids.shape[0] * experiment.config.seeds


def device_memory(experiment: Experiment) -> float:
    """Bytes that one device may use; infinity if nothing says."""
    if experiment.config.machine.memory is not None:
        return experiment.config.machine.memory * 2**30
    if jax.default_backend() == "cpu":
        return memory.available() / experiment.plan.num_devices
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("bytes_limit", float("inf"))


def described(plan: Plan) -> str:
    """A plan in words."""
    lanes = "lanes as usual" if plan.lanes is None else f"{plan.lanes} lane{'s' if plan.lanes > 1 else ''}"
    return lanes if plan.mesh is None else f"{lanes} on {plan.num_devices} device{'s' if plan.num_devices > 1 else ''}"


def kept(config: Config, saved: Config, explicit: Collection[str]) -> Config:
    """The configuration with the machine fields of a saved one, but for those that are given anew.

    A mesh of more devices than there are now is not kept; all there are make the new one.
    """
    if "mesh" not in explicit and (saved.machine.mesh or 1) > len(jax.devices()):
        explicit = {*explicit, "mesh", "lanes", "model_parallel"}
        config = config.replace(mesh=len(jax.devices()))
    fields = {name: value for name, value in saved.with_role("machine").items() if name not in explicit}
    return config.replace(**fields)


def _tried(config: Config, reporter: Reporter) -> Config:
    """The fastest lanes and convolution for a configuration, tried now or looked up."""
    # Any one method stands for all: what is measured is the local step.
    experiment = prepare(config.replace(methods=("fedavg",), models=(), evaluate=(), settings={}))
    name, where = f"{_fingerprint(experiment)}.json", "not kept"
    # Processes that took different plans would wait for each other forever, so the first one's counts.
    found = processes.first_does(lambda: _kept_trial(name))
    if found is None:
        reporter.say("trying execution plans ...")
        found = processes.from_first(_measure(config, experiment))
        if processes.is_first():
            with suppress(OSError):  # where nothing can be kept, the next run tries again
                path = cache.user_folder("plans") / name
                path.parent.mkdir(parents=True, exist_ok=True)
                files.write_text(path, json.dumps(found, indent=2) + "\n")
                where = f"kept in {path}"
    else:
        where = "kept from an earlier run"
    convolution = config.machine.convolution if config.machine.convolution != "auto" else found["convolution"]
    reporter.say(f"plan: {found['lanes']} lanes, convolution {convolution} (tried on this device, {where})")
    return config.replace(lanes=found["lanes"], convolution=convolution)


def _kept_trial(name: str) -> dict[str, Any] | None:
    """What an earlier run has found, or None: also where the file is damaged, which is then written anew."""
    try:
        found = json.loads((cache.user_folder("plans") / name).read_text())
        return {**found, "lanes": int(found["lanes"]), "convolution": str(found["convolution"])}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _measure(config: Config, experiment: Experiment) -> dict[str, Any]:
    """Tries lanes with the convolution as it is, then, but for TPUs, convolutions as dots with the best lanes.

    For a TPU the compiler pads the patches of convolutions that are made of dots to twelve times their size, and
    expects the CNN's step to take 1.8 times as long as with its own convolutions, in lanes four times (docs/tpu.md).
    """
    devices, most = experiment.plan.num_devices, slots(experiment)
    plans = [Plan(n * devices, experiment.mesh) for n in LANES if n == 1 or n * devices <= most]
    trials = {"auto": trial(experiment, plans)}
    best = trials["auto"][0]
    may_gain = config.model in ("cnn", "cnn_bn", "resnet18_gn") and jax.default_backend() != "tpu"
    if config.machine.convolution == "auto" and may_gain:
        chosen = prepare(config.replace(methods=("fedavg",), models=(), evaluate=(), settings={}, convolution="dots"))
        trials["dots"] = trial(chosen, [best.plan])
    convolution = min(trials, key=lambda name: trials[name][0].seconds)
    return {
        "lanes": best.plan.lanes,
        "convolution": convolution,
        "trials": [
            {"convolution": name, "lanes": t.plan.lanes, "seconds": t.seconds, "memory": t.memory, "error": t.error}
            for name, found in trials.items()
            for t in found
        ],
    }


def trial(experiment: Experiment, plans: Sequence[Plan]) -> list[Trial]:
    """Tries plans on a few steps of local training of as many clients as the run trains at a time, fastest first."""
    config = experiment.config
    ids = np.arange(slots(experiment)) % experiment.population.num_clients
    population = experiment.population
    if isinstance(population, HostPopulation):
        # Enough examples for a few steps each; who holds them does not matter to the time.
        rows = np.resize(
            population.rows_of(np.arange(min(64, population.num_clients))), TRIAL_STEPS * config.local.batch_size
        )
        examples = jax.tree.map(lambda leaf: leaf[rows], population.examples)
        population, ids = Population.from_clients([examples]), np.zeros_like(ids)

    def make(plan: Plan) -> Any:
        method = algorithms.fedavg(
            experiment.loss_fn, optax.sgd(0.01), batch_size=config.local.batch_size, num_steps=TRIAL_STEPS, plan=plan
        )
        return with_statistics(method, "average") if experiment.loss_fn.has_statistics else method

    params = experiment.model.init(jax.random.key(0))
    cohort = population.cohort(ids)
    return try_plans(make, params, cohort, jax.random.key(0), plans, memory_limit=device_memory(experiment))


def _fingerprint(experiment: Experiment) -> str:
    """What the speed of a local step depends on, in short."""
    config = experiment.config
    batch = jax.tree.map(lambda leaf: [*leaf.shape[1:], str(leaf.dtype)], experiment.test)
    params = jax.eval_shape(experiment.model.init, jax.random.key(0))
    shapes = [[list(leaf.shape), str(leaf.dtype)] for leaf in jax.tree.leaves(params)]
    device = [jax.devices()[0].device_kind, len(jax.devices()), experiment.plan.num_devices, jax.__version__]
    known = [
        device,
        config.model,
        config.machine.convolution,
        config.local.batch_size,
        slots(experiment),
        batch,
        shapes,
    ]
    return sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:16]
