"""Rounds on one accelerator: lanes, native against dot convolutions, single against bfloat16, pfl's whole protocol.

    python benchmarks/accelerator.py [--only mlp cnn ...] [--seconds 2] [--protocol] [--small]
    python benchmarks/accelerator.py --cases pfl-cifar10:50:dots:bfloat16 gpt:1:-:float32 --kernels

The workloads are those of `benchmarks/peers` (whose peers run on the same card with `python -m benchmarks.peers`), and
some of them again with a cohort of 64 clients, which shows what lanes are worth: name "cnn/64". All combinations are
compiled side by side, in a process that has ended before anything is timed, then timed one after another. Compiling is
what takes the time on a GPU: give `--only` and `--compile-limit` where it is short.

fl-simulator: ResNet-18 with group normalization, 10 of 100 clients a round with 500 images each, batches of 50, 5
epochs: 500 local steps. FL-Simulator publishes 15.86 s a round on a V100. gpt: a causal decoder of about 110 million
parameters, 4 clients of 80 sequences of 512 tokens, batches of 16: 20 local steps.

With bfloat16 a step computes in it (parameters and inputs are cast at its start), while the parameters that clients
keep and the server averages stay in single precision. Products in single precision are those of the backend's
default: TF32 on a GPU, whose speed for large matrices is measured beside and is what shares refer to. `--protocol`
runs the 1,500 rounds of pfl's CIFAR-10 benchmark with an evaluation of 10,000 images after every tenth, in the
fastest of its combinations. `--cases` names single combinations, workload:lanes:convolution:precision, compiled in
this order. `--kernels` says of every row which kernels of a round take how much time. `--small` shrinks everything to
what a processor does in a minute, to see that it runs; it says nothing about speed.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
import optax

import algorithms
from benchmarks import _measure
from benchmarks.peers import jax_models, workloads
from benchmarks.peers.workloads import Workload
from fedjax_core import Plan, Population, out_of_memory

PUBLISHED = {"fl-simulator": "FL-Simulator on a V100: 15.86 s a round"}
WIDE = 64
IMAGES = ("cnn", "resnet", "pfl-cifar10", "fl-simulator")


class Case(NamedTuple):
    """One combination.

    Attributes:
      workload: name of a workload of the peers; "/64" behind it asks for a cohort of 64 clients.
      lanes: clients trained at the same time.
      convolution: "native" or "dots"; "-" for a model without any.
      precision: "float32" or "bfloat16".
    """

    workload: str
    lanes: int
    convolution: str
    precision: str = "float32"


def cases(names: list[str]) -> list[Case]:
    """The combinations of some workloads."""
    every = []
    for name in names:
        base = name.split("/")[0]
        kinds = ("native", "dots") if base in IMAGES else ("-",)
        lanes = {"gpt": (1, 2, 4), "pfl-cifar10": (1, 10, 50), "fl-simulator": (1, 2, 5, 10)}.get(name, (1, 10))
        if name.endswith("/64"):
            lanes = (1, 4, 16, 64)
        every += [Case(name, number, kind) for kind in kinds for number in lanes]
        if name in ("gpt", "fl-simulator", "pfl-cifar10"):
            every += [Case(name, number, kind, "bfloat16") for kind in kinds for number in lanes]
    return every


def case_of(text: str) -> Case:
    """The combination that a text of `--cases` names."""
    try:
        name, lanes, convolution, precision = text.split(":")
        case = Case(name, int(lanes), convolution, precision)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not workload:lanes:convolution:precision") from None
    if name not in NAMES or convolution not in ("native", "dots", "-") or precision not in ("float32", "bfloat16"):
        raise argparse.ArgumentTypeError(f"{text!r} names none of {NAMES}, native, dots, -, float32, bfloat16")
    return case


NAMES = [
    *("logistic", "mlp", "cnn", "lstm", "transformer", "resnet", "pfl-cifar10", "fl-simulator", "gpt"),
    *("mlp/64", "cnn/64", "transformer/64"),
]


def setting(name: str, small: bool) -> Workload:
    """The workload of a name."""
    base, *wide = name.split("/")
    workload = workloads.ALL[base]
    if wide:
        workload = workload._replace(cohort_size=WIDE)
    if small:
        workload = workload._replace(mean_size=2 * workload.batch_size, num_clients=12, cohort_size=4)
    return workload


def in_precision(loss_fn, dtype):
    """The loss computed in another precision; gradients come back in that of the parameters."""

    def cast(leaf):
        return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    def computed(params, batch, key):
        return loss_fn(jax.tree.map(cast, params), jax.tree.map(cast, batch), key).astype(jnp.float32)

    return computed


def peak(dtype) -> float:
    """Operations a second of a large product of random matrices in this precision."""
    size, times = (8192, 8) if jax.default_backend() != "cpu" else (512, 1)
    a, b = jax.random.normal(jax.random.key(0), (2, size, size), dtype)

    @jax.jit
    def run(a, b):
        return jax.lax.fori_loop(0, times, lambda _, x: (x @ b) * dtype(size**-0.5), a)

    jax.block_until_ready(run(a, b))
    return times * 2 * size**3 / min(_measure.take_turns({"product": partial(run, a, b)}, 5)["product"])


class Federation(NamedTuple):
    """A workload's clients on the device, and where its model starts."""

    workload: Workload
    population: Population
    parameters: workloads.Parameters


def federation(name: str, small: bool) -> Federation:
    workload = setting(name, small)
    x, y, offsets = workloads.make_federation(workload)
    population = Population.from_flat({"x": jnp.asarray(x), "y": jnp.asarray(y)}, offsets)
    return Federation(workload, population, workloads.initial_parameters(workload))


def method(case: Case, workload: Workload):
    """(The case's FedAvg, its model)."""
    model = jax_models.make_model(workload, dropout=True, convolution=case.convolution)
    loss_fn = jax_models.make_loss(workload, model)
    dtype = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}[case.precision]
    fedavg = algorithms.fedavg(
        loss_fn if case.precision == "float32" else in_precision(loss_fn, dtype),
        optax.sgd(workload.learning_rate),
        batch_size=workload.batch_size,
        num_epochs=workload.num_epochs,
        weights="examples",
        plan=Plan(lanes=min(case.lanes, workload.cohort_size)),
    )
    return fedavg, model


def compiled(case: Case, clients: Federation) -> tuple[Callable, dict]:
    """The compiled round of a case, and what its compiler says: seconds (beside the others), bytes."""
    workload, population, parameters = clients
    fedavg, model = method(case, workload)
    state = fedavg.init(jax_models.load(model, parameters))
    cohort = population.cohort(workloads.cohorts(workload, 1)[0])
    start = time.perf_counter()
    program = jax.jit(fedavg.round).lower(state, cohort, jax.random.key(0)).compile()
    row = {"compile_s": time.perf_counter() - start}
    memory = program.memory_analysis()
    if memory is not None:
        row["temporary_mib"] = memory.temp_size_in_bytes / 2**20
    return program, row


def kernels_of(run: Callable) -> dict:
    """Milliseconds of the device's kernels in one run, altogether and of the 25 that take most, with how often."""
    jax.block_until_ready(run())
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(run())
        spent: dict[str, list[float]] = {}
        for path in Path(folder).rglob("*.xplane.pb"):
            for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
                for line in plane.lines:
                    if "/device:" in plane.name and line.name.startswith("Stream"):
                        for event in line.events:
                            spent.setdefault(event.name, []).append(event.duration_ns / 1e6)
    longest = sorted(spent.items(), key=lambda item: -sum(item[1]))[:25]
    return {
        "all_ms": sum(map(sum, spent.values())),
        "launches": sum(map(len, spent.values())),
        "longest": [{"name": name, "ms": sum(times), "times": len(times)} for name, times in longest],
    }


def measure(case: Case, clients: Federation, program: Callable, seconds: float, kernels: bool = False) -> dict:
    """Times rounds of a case; memory that does not suffice is said."""
    workload, population, parameters = clients
    fedavg, model = method(case, workload)
    state = fedavg.init(jax_models.load(model, parameters))
    ids = workloads.cohorts(workload, 50)
    times = []
    try:
        for t, chosen in enumerate(ids):
            cohort = population.cohort(chosen)
            begin = time.perf_counter()
            state, metrics = jax.block_until_ready(program(state, cohort, jax.random.key(t)))
            times.append(time.perf_counter() - begin)
            if len(times) > 3 and sum(times[1:]) > seconds:
                break
    except Exception as error:
        if not out_of_memory(error):
            raise
        return {"error": "out of memory"}
    done = list(zip(ids, times, strict=False))[1:]
    steps = [workloads.local_steps(workload, chosen) for chosen, _ in done]
    rates = [workloads.flops(workload, chosen) / spent for chosen, spent in done]
    row = {}
    if kernels:
        row["kernels"] = kernels_of(lambda: program(state, population.cohort(ids[0]), jax.random.key(0)))
    return row | {
        "round": _measure.summary(times[1:]),
        "seconds": times[1:],
        "ms_per_local_step": 1e3 * float(np.median(np.divide(times[1:], steps))),
        "tflops": float(np.median(rates)) / 1e12,
        "loss": float(metrics.loss),
    }


def whole_protocol(case: Case, clients: Federation, rounds: int) -> dict:
    """Seconds of pfl's whole benchmark, compilation apart: rounds called one by one, evaluation after every tenth."""
    workload, population, parameters = clients
    fedavg, model = method(case, workload)
    round_fn = jax.jit(fedavg.round, donate_argnums=0)
    x, y, _ = workloads.make_federation(workload._replace(num_clients=10_000 // workload.mean_size))
    held_out = {"x": jnp.asarray(x), "y": jnp.asarray(y)}

    @jax.jit
    def evaluate(params, held_out):
        return jnp.mean(jnp.argmax(model.apply(params, held_out["x"]), axis=1) == held_out["y"])

    def run(number: int):
        state, accuracies = fedavg.init(jax_models.load(model, parameters)), []
        for t, chosen in enumerate(workloads.cohorts(workload, number)):
            state, _ = round_fn(state, population.cohort(chosen), jax.random.key(t))
            if t % 10 == 0:
                accuracies.append(evaluate(state.params, held_out))
        return jax.block_until_ready(accuracies)

    run(2)
    start = time.perf_counter()
    accuracies = run(rounds)
    return {
        "case": case._asdict(),
        "rounds": rounds,
        "seconds": time.perf_counter() - start,
        "last_accuracy": float(accuracies[-1]),
    }


def compile_only(every: list[Case], clients: dict[str, Federation], threads: int | None) -> None:
    """Compiles side by side into the compilation cache, and prints the number of each case that is there."""
    with ThreadPoolExecutor(threads) as pool:
        waiting = {pool.submit(compiled, case, clients[case.workload]): number for number, case in enumerate(every)}
        for future in as_completed(waiting):
            if future.exception() is None:
                print(json.dumps({"case": waiting[future]} | future.result()[1]), flush=True)


def compile_beside(cache: str, arguments: list[str], limit: float) -> dict[int, dict]:
    """Runs `compile_only` in a process of its own, which is stopped after `limit` seconds, so that nothing compiles
    any more when the first round is timed; what the compiler said of the cases that were done, by their numbers."""
    command = [sys.executable, __file__, *arguments, "--compile-only"]
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": cache, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    with tempfile.TemporaryFile("w+") as said:
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run(command, env=environment, stdout=said, timeout=limit, check=False)
        said.seek(0)
        rows = [json.loads(line) for line in said if line.startswith('{"case"')]
    return {row.pop("case"): row for row in rows}


def told(case: Case, row: dict) -> str:
    text = f"{case.workload:14s} {case.convolution:6s} {case.precision:8s} {case.lanes:2d} lanes: "
    if "error" in row:
        return text + row["error"]
    text += (
        f"{row['round']['median_s'] * 1e3:10.2f} ms a round, {row['ms_per_local_step']:8.3f} ms a step, "
        f"{row['tflops']:7.2f} TFLOP/s"
    )
    text += f" ({row['share_of_product']:.0%}), {row.get('temporary_mib', 0):7.0f} MiB"
    return text + f", compiled in {row['compile_s']:.0f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--seconds", type=float, default=1.5, help="of rounds of a combination, after the first (1.5)")
    parser.add_argument("--protocol", action="store_true", help="pfl's 1,500 rounds too")
    parser.add_argument("--convolutions", nargs="+", default=["native", "dots", "-"])
    parser.add_argument("--precisions", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--lanes", nargs="+", type=int, help="only these numbers of lanes")
    parser.add_argument("--compile-limit", type=float, default=1e6, help="seconds for all compilations together")
    parser.add_argument("--cache", help="folder of compiled programs (default: a new one)")
    parser.add_argument("--compile-only", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, default=None, help="that compile (default: as Python chooses)")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--cases", nargs="+", type=case_of, help="these combinations instead")
    parser.add_argument("--kernels", action="store_true", help="say which kernels take how long")
    parser.add_argument("--programs", type=Path, help="folder for the compiled programs as text")
    parser.add_argument("--save", default=None, help="name of the results (accelerator, or accelerator_small)")
    args = parser.parse_args()
    if args.cases:
        args.only = list(dict.fromkeys(case.workload for case in args.cases))
    every = args.cases or [
        case
        for case in cases(args.only)
        if case.convolution in args.convolutions
        and case.precision in args.precisions
        and (args.lanes is None or case.lanes in args.lanes)
    ]
    if args.compile_only:
        compile_only(every, {name: federation(name, args.small) for name in args.only}, args.threads)
        return
    cache = args.cache or tempfile.mkdtemp()
    start = time.perf_counter()
    known = compile_beside(cache, sys.argv[1:], args.compile_limit)
    compiling = time.perf_counter() - start
    jax.config.update("jax_compilation_cache_dir", cache)
    products = {"float32": peak(jnp.float32), "bfloat16": peak(jnp.bfloat16)}
    save = args.save or ("accelerator_small" if args.small else "accelerator")
    result = {
        "machine": _measure.machine(),
        "published": PUBLISHED,
        "small": args.small,
        "products_tflops": {name: rate / 1e12 for name, rate in products.items()},
        "compiling_side_by_side_s": compiling,
        "rows": [],
    }
    print(f"compiled {len(known)} of {len(every)} rounds in {compiling:.0f} s")
    print(result["machine"], result["products_tflops"], flush=True)
    clients = {name: federation(name, args.small) for name in args.only}
    for number, case in enumerate(every):
        try:
            if number not in known:
                raise TimeoutError(f"not compiled after {args.compile_limit:.0f} s")
            program, row = compiled(case, clients[case.workload])  # from the cache
            row = known[number] | row | {"compile_s": known[number]["compile_s"]}
            row |= measure(case, clients[case.workload], program, args.seconds, args.kernels)
            if args.programs:
                args.programs.mkdir(parents=True, exist_ok=True)
                (args.programs / ("-".join(map(str, case)).replace("/", "_") + ".txt")).write_text(program.as_text())
        except Exception as error:  # one that the compiler refuses must not take the others along
            row = {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
        if "tflops" in row:
            row["share_of_product"] = row["tflops"] * 1e12 / products[case.precision]
        result["rows"].append(case._asdict() | row)
        print(told(case, row), flush=True)
        for kernel in row.get("kernels", {}).get("longest", [])[: args.kernels * 15]:
            print(f"    {kernel['ms']:9.3f} ms {kernel['times']:6d} x {kernel['name'][:90]}")
        if "kernels" in row:
            print(f"    {row['kernels']['all_ms']:9.3f} ms {row['kernels']['launches']:6d} in all", flush=True)
        _measure.save(save, result)
    if args.protocol:
        done = [row for row in result["rows"] if row["workload"] == "pfl-cifar10" and "round" in row]
        if done:
            best = min(done, key=lambda row: row["round"]["median_s"])
            case = Case(*(best[field] for field in Case._fields))
            result["protocol"] = whole_protocol(case, clients["pfl-cifar10"], 20 if args.small else 1500)
            print(json.dumps(result["protocol"]), flush=True)
            _measure.save(save, result)


if __name__ == "__main__":
    main()
