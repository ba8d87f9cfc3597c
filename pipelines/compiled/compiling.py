"""Compiles the rounds of a run for a slice of TPUs that is not there, and predicts what they would need of it.

    reports = compile_for(Config(methods=("fedavg",)), "v5e:4x4")

The compiler is the one that a TPU has, so that memory and the collectives in the program are what they would be. Time
is predicted: by a roofline, and by the compiler's own estimates. Nothing is run.
"""

import math
import re
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_core import Plan, continue_rounds, keys, needed_memory, out_of_memory, replicated, shardings
from pipelines.common.progress import size
from pipelines.compiled import chips, schedule
from pipelines.compiled.chips import HOP_SECONDS, Slice
from pipelines.compiled.program import Collective, Cost, Program
from pipelines.configuration.config import Config
from pipelines.experiment import setup
from pipelines.experiment.setup import Experiment, initial_states, run_keys
from pipelines.federation.federations import Federation

COHORTS = 8
"""Rounds of which the cohorts are drawn, with the run's own keys, to know how many steps a round has."""
_CLOSE = 1.125
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class TooLarge(ValueError):  # noqa: N818 (named for what is wrong)
    """The program needs more memory than a chip has.

    Attributes:
      need: bytes that it needs, by the compiler; infinity where it does not say.
    """

    def __init__(self, message: str, need: float) -> None:
        super().__init__(message)
        self.need = need


class Report(NamedTuple):
    """What compiling a method's round has shown. Bytes, operations and seconds are those of one chip and one round.

    Attributes:
      method: name of the method.
      topology: name of the slice.
      num_chips: chips of the mesh.
      model_parallel: chips that share the model of a client.
      lanes: clients that a chip trains at the same time.
      slots: clients of a round, those of all seeds.
      parameters: numbers of the model.
      trace_seconds, compile_seconds: on this machine.
      memory: what the program needs, name to bytes: "arguments" (state and examples), "results" beside them,
        "temporaries", "program", and "together".
      hbm_bytes: memory of a chip.
      flops: operations of matrix products on the chip with most steps, two for each multiply-add.
      moved_bytes: bytes read from and written to HBM there.
      collectives: (kind, bytes, chips that take part, times a round).
      useful_flops: operations of all chips that are for clients and not for idle lanes or chips.
      loops: for each pass over the clients, how often its loops run (`schedule.Loops`).
      seconds: name to predicted seconds: "products" at peak, "memory" at full bandwidth, "collectives", "roofline" (of
        each operation the longer of the first two, and the collectives), "compiler" (its estimates of all operations,
        and the collectives; None where the clock is not published).
      share_of_peak: useful operations over what all chips could do in the longer of "roofline" and "compiler".
      unknown_loops: loops of which nothing says how often they run, counted once.
      host_calls: instructions that talk to the host.
    """

    method: str
    topology: str
    num_chips: int
    model_parallel: int
    lanes: int
    slots: int
    parameters: int
    trace_seconds: float
    compile_seconds: float
    memory: dict[str, int]
    hbm_bytes: float
    flops: float
    moved_bytes: float
    collectives: list[tuple[str, int, int, float]]
    useful_flops: float
    loops: list[schedule.Loops]
    seconds: dict[str, float | None]
    share_of_peak: float
    unknown_loops: list[str]
    host_calls: list[str]

    @property
    def predicted_seconds(self) -> float:
        """The longer of the two predictions of a round."""
        return max(seconds for seconds in (self.seconds["roofline"], self.seconds["compiler"]) if seconds is not None)

    def as_json(self) -> dict[str, Any]:
        """All of it as plain values."""
        return {
            **self._asdict(),
            "collectives": [
                {"kind": kind, "bytes": number, "chips": together, "times": times}
                for kind, number, together, times in self.collectives
            ],
            "loops": [each._asdict() for each in self.loops],
            "predicted_seconds": self.predicted_seconds,
            "run": False,
        }


class Limit(NamedTuple):
    """The most of something that fits into a chip's memory.

    Attributes:
      fits: the largest number that was compiled and fits; 0 if none does.
      needs: bytes that it needs.
      too_many: the smallest that was compiled and does not fit, or None if all that there can be do.
      compiled: how many programs were compiled to know it.
    """

    fits: int
    needs: float
    too_many: int | None
    compiled: int


def compile_for(config: Config, topology: str) -> list[Report]:
    """Compiles a round of each method of a configuration for a slice.

    Args:
      config: of a run. `mesh` is the number of chips, all of the slice unless given; `lanes` are over all chips, as in
        a run, one a chip unless given.
      topology: name of the slice, such as "v5e:4x4" (`chips.CHIPS`).

    Raises:
      ValueError: for what is wrong with the configuration or the slice, before anything is compiled; `TooLarge` if a
        program needs more memory than a chip has.
    """
    tpus, experiment = prepare(config, topology)
    return [compile_method(experiment, tpus, name) for name in config.methods]


def prepare(config: Config, topology: str, federation: Federation | None = None) -> tuple[Slice, Experiment]:
    """The slice, and the experiment with a plan for it, everything checked that can be without compiling.

    Args:
      config: of a run.
      topology: name of the slice.
      federation: see `pipelines.experiment.setup.prepare`.
    """
    tpus = chips.parse(topology)
    machine = config.machine
    if machine.staged:
        raise ValueError(
            "staged=True: how large a cohort is in memory is known only when a staged run has drawn it, so its program "
            "cannot be compiled ahead; leave out --staged"
        )
    if machine.x64:
        raise ValueError("x64=True, but TPUs compute in single precision: leave out --x64")
    mesh = chips.mesh(tpus, machine.mesh, model=machine.model_parallel)
    devices = mesh.shape["clients"]
    lanes = devices if machine.lanes is None else machine.lanes
    if lanes % devices:
        raise ValueError(
            f"lanes={lanes} is no multiple of the {devices} chips that clients are dealt to: lanes count those of all "
            f"chips together, take {-(-lanes // devices) * devices}"
        )
    return tpus, setup.prepare(config, federation, plan=Plan(lanes, mesh))


def compile_method(experiment: Experiment, tpus: Slice, name: str) -> Report:
    """Compiles a round of one method, all seeds at once, as in a run.

    Raises:
      TooLarge: if it needs more memory than a chip has.
    """
    config, plan, mesh = experiment.config, experiment.plan, experiment.plan.mesh
    assert mesh is not None
    begin = time.perf_counter()
    traced, passes, shapes = _lowered(experiment, name)
    traced_at = time.perf_counter()
    try:
        compiled = traced.compile()
    except jax.errors.JaxRuntimeError as error:
        if not out_of_memory(error):
            raise
        need, have = _needed(str(error), tpus)
        said = size(need) if math.isfinite(need) else "more"
        raise TooLarge(
            f"{name} needs {said} of memory on a chip of {tpus.name}, which has {size(have)}: lower --lanes, "
            "--batch-size or --seeds, share the model with --model-parallel, or take more chips",
            need,
        ) from None
    seconds = time.perf_counter() - traced_at
    analysis = compiled.memory_analysis()
    assert analysis is not None
    read = Program(compiled.as_text() or "")
    cohorts = _cohorts(experiment)
    slots = cohorts[0].shape[0]
    lanes = plan.lanes_per_device(-(-slots // plan.num_devices))
    found = [_loops(experiment, each, lanes, cohorts) for each in passes]
    cost = read.cost(tpus.chip, schedule.trips(found))
    useful = [each._replace(steps=each.useful / plan.num_devices / lanes) for each in found]
    useful_flops = read.cost(tpus.chip, schedule.trips(useful)).flops * mesh.size
    times = _seconds(cost, tpus)
    longest = max(value for key in ("roofline", "compiler") if (value := times[key]) is not None)
    return Report(
        method=name,
        topology=tpus.name,
        num_chips=mesh.size,
        model_parallel=config.machine.model_parallel,
        lanes=lanes,
        slots=slots,
        parameters=sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)),
        trace_seconds=traced_at - begin,
        compile_seconds=seconds,
        memory={
            "arguments": analysis.argument_size_in_bytes,
            "results": analysis.output_size_in_bytes - analysis.alias_size_in_bytes,
            "temporaries": analysis.temp_size_in_bytes,
            "program": analysis.generated_code_size_in_bytes,
            "together": needed_memory(compiled) + analysis.generated_code_size_in_bytes,
        },
        hbm_bytes=tpus.chip.hbm_bytes,
        flops=cost.flops,
        moved_bytes=cost.hbm_bytes,
        collectives=[(*each, count) for each, count in sorted(cost.collectives.items(), key=lambda c: -c[0].num_bytes)],
        useful_flops=useful_flops,
        loops=found,
        seconds=times,
        share_of_peak=useful_flops / (longest * tpus.chip.flops * mesh.size) if longest else 0.0,
        unknown_loops=sorted(cost.unknown),
        host_calls=read.host_calls,
    )


def most_lanes(config: Config, topology: str, name: str) -> Limit:
    """The most lanes of a chip whose program fits into its memory: found by compiling some."""
    _, experiment = prepare(config, topology)
    plan = experiment.plan
    most = -(-len(_cohorts(experiment)[0]) // plan.num_devices)

    def need(lanes: int) -> tuple[float, float]:
        return _need(config.replace(lanes=lanes * plan.num_devices), topology, name, experiment.federation)

    return _most(need, most)


def largest_cohort(config: Config, topology: str, name: str) -> Limit:
    """The most clients of a round, of those that there are, whose program fits into a chip's memory.

    Raises:
      ValueError: if the sampler has no such number.
    """
    if config.participation.sampler not in ("uniform", "weighted", "cyclic"):
        raise ValueError(
            f"sampler={config.participation.sampler!r} has no cohort size to look for: take uniform, weighted or cyclic"
        )
    _, experiment = prepare(config, topology)

    def need(clients: int) -> tuple[float, float]:
        return _need(config.replace(cohort_size=clients), topology, name, experiment.federation)

    return _most(need, experiment.population.num_clients)


def _need(config: Config, topology: str, name: str, federation: Federation) -> tuple[float, float]:
    """(bytes that a method's program needs, bytes there are)."""
    tpus, experiment = prepare(config, topology, federation)
    try:
        return compile_method(experiment, tpus, name).memory["together"], tpus.chip.hbm_bytes
    except TooLarge as error:
        return max(error.need, math.nextafter(tpus.chip.hbm_bytes, math.inf)), tpus.chip.hbm_bytes


def _most(need: Callable[[int], tuple[float, float]], most: int) -> Limit:
    """The largest number up to `most` that fits, to an eighth: all of it, or by a line through what was compiled.

    Args:
      need: `need(number) -> (bytes it needs, bytes there are)`; infinity where only that it is too much is known.
      most: the largest number there can be.
    """
    needs: dict[int, float] = {}
    limit = math.inf

    def fits(number: int) -> bool:
        nonlocal limit
        needs[number], limit = need(number)
        return needs[number] <= limit

    def found(low: int, high: int | None) -> Limit:
        return Limit(low, needs.get(low, math.nan), high, len(needs))

    if fits(most):
        return found(most, None)
    if most == 1 or not fits(1):
        return found(0, 1)
    low, high = 1, most
    while high - low > 1 and high > low * _CLOSE:
        if math.isfinite(needs[high]) and needs[high] > needs[low]:
            # A little below where the line between the two reaches the limit.
            guess = low + 0.97 * (high - low) * (limit - needs[low]) / (needs[high] - needs[low])
        else:
            guess = math.sqrt(low * high)
        number = min(max(round(guess), low + 1), high - 1)
        if fits(number):
            low = number
        else:
            high = number
    return found(low, high)


def assumptions(tpus: Slice) -> list[str]:
    """What the predictions rest on, in words."""
    chip = tpus.chip
    lines = [
        f"{chip.name}, a chip: {chip.flops / 1e12:g} TFLOP/s of products in bfloat16, in which products of float32 "
        f"are taken by default; {chip.hbm_bytes / 2**30:g} GiB of HBM at {chip.hbm_bytes_per_second / 1e9:g} GB/s; "
        f"links of {chip.link_bytes_per_second / 1e9:g} GB/s each way ({chip.source})",
        "roofline: every operation takes the longer of its products at peak and its HBM bytes at full bandwidth, one "
        "after the other; what lies in on-chip memory is free, and so is all that is no product",
        f"collectives: a ring in both directions over one axis of the slice, and {HOP_SECONDS * 1e6:g} us a hop along "
        "every axis; nothing is computed meanwhile",
        f"steps of the chip that has most, the mean of the cohorts of {COHORTS} rounds, drawn with the run's own keys; "
        "every pass trains all of its cohort",
    ]
    if chip.cycles_per_second is not None:
        lines.append(
            f"compiler: its estimates of the cycles of all operations, at {chip.cycles_per_second / 1e9:.2f} GHz"
        )
    return [*lines, "compiled and predicted, not run"]


def collective_seconds(each: Collective, tpus: Slice) -> float:
    """Predicted seconds of a collective, by `assumptions`."""
    if each.chips == 1:
        return 0.0
    number = each.chips or tpus.num_chips
    hops = sum(axis // 2 for axis in tpus.shape)
    share = (number - 1) / number
    # Both directions of one axis: half of the bytes goes each way.
    ring = share * each.num_bytes / (2 * tpus.chip.link_bytes_per_second)
    if each.kind == "all-reduce":  # a reduce-scatter and an all-gather
        return 2 * (ring + hops * HOP_SECONDS)
    if each.kind == "collective-permute":
        return each.num_bytes / tpus.chip.link_bytes_per_second + HOP_SECONDS
    return ring + hops * HOP_SECONDS


def _seconds(cost: Cost, tpus: Slice) -> dict[str, float | None]:
    chip = tpus.chip
    together = sum(collective_seconds(each, tpus) * count for each, count in cost.collectives.items())
    clock = chip.cycles_per_second
    return {
        "products": cost.flops / chip.flops,
        "memory": cost.hbm_bytes / chip.hbm_bytes_per_second,
        "collectives": together,
        "roofline": cost.roofline_seconds + together,
        "compiler": None if clock is None else cost.cycles / clock + together,
    }


def _lowered(experiment: Experiment, name: str) -> tuple[Any, list[schedule.Pass], Any]:
    """(the traced round of all seeds, its passes, shapes of the model)."""
    mesh = experiment.plan.mesh
    assert mesh is not None
    whole = replicated(mesh)
    # Made anew: what was traced before is not traced again, and its passes would not be seen.
    algorithm = experiment.make(name, experiment.plan)
    key_shapes = jax.eval_shape(lambda keys: keys, experiment.keys)
    states = jax.eval_shape(partial(initial_states, experiment, algorithm), key_shapes)
    where = shardings(states, mesh, batch_axes=1)

    population, seed_keys = jax.tree.map(
        partial(_shape, sharding=whole), (setup.population_shapes(experiment.population), key_shapes)
    )
    arguments = (jax.tree.map(_shape, states, where), population, seed_keys)
    rounds = jax.vmap(continue_rounds(algorithm, experiment.sampler, 1), (0, None, 0))
    jitted = jax.jit(rounds, donate_argnums=0, out_shardings=(where, whole))
    with schedule.recording() as passes:
        lowered = jitted.lower(*arguments)
    return lowered, passes, jax.eval_shape(experiment.model.init, jax.random.key(0))


def _shape(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _cohorts(experiment: Experiment) -> list[np.ndarray]:
    """Sizes of the clients of the first rounds, -1 for an empty slot: of each round int[S C], those of all seeds."""
    sizes = np.asarray(experiment.population.sizes)

    @jax.jit
    def drawn(seed_keys: Any) -> Any:
        sample = jax.vmap(lambda key: keys.split(run_keys(key)[1])[0])(seed_keys)
        rounds = jnp.arange(COHORTS, dtype=jnp.int32)
        return jax.vmap(lambda t: jax.vmap(lambda key: experiment.sampler(key, t))(sample))(rounds)

    ids = np.asarray(drawn(experiment.keys)).reshape(COHORTS, -1)
    return [np.where(row >= 0, sizes[np.maximum(row, 0)], -1) for row in ids]


def _loops(experiment: Experiment, each: schedule.Pass, lanes: int, cohorts: Sequence[np.ndarray]) -> schedule.Loops:
    seeds = experiment.config.seeds
    sizes = np.asarray(experiment.population.sizes)
    if each.num_slots == len(sizes):
        cohorts = [np.tile(sizes, seeds)]
    elif each.num_slots * seeds != len(cohorts[0]):
        cohorts = [np.resize(row, each.num_slots * seeds) for row in cohorts]
    devices = experiment.plan.num_devices
    return schedule.mean([schedule.loops(schedule.steps_of(each.work, row), devices, lanes) for row in cohorts])


def _needed(message: str, tpus: Slice) -> tuple[float, float]:
    """(bytes a program needs, bytes there are) from the compiler's refusal."""
    match = re.search(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm", message)
    if match is None:
        return math.inf, tpus.chip.hbm_bytes
    need, unit, have, of = match.groups()
    return float(need) * _UNITS[unit], float(have) * _UNITS[of]
