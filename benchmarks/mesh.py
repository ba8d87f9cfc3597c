"""What a mesh costs, what it gains on a processor, and an estimate for a TPU pod.

    python benchmarks/mesh.py [--repeats 7]
    python benchmarks/mesh.py --estimate

Weak scaling: 5 clients a device on 1, 2, 4 and 8 devices for which the processor stands in. They share its cores, so
this measures overhead and not speed: the time a client costs would stay the same if the mesh cost nothing. Bytes
reduced are read from the compiled program.

Cores: the same round on one device, and with every core standing in for one, which is what `fedjax-core train` does on
a processor. The estimate is arithmetic on the assumptions in `POD`, nothing is measured.
"""

import argparse
import re
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import numpy as np
import optax

import algorithms
import models
from benchmarks import _measure
from fedjax_core import Plan, Population, client_mesh, place, replicated, shardings
from models import losses

BATCH = 20
POD = {
    "chips": 256,
    "peak_flops": 197e12,  # bfloat16, of one TPU v5e
    "hbm_bytes_per_s": 819e9,
    "link_bytes_per_s": 45e9,  # one direction of one of its 4 links; a ring over a torus axis uses two
    "share_of_peak": 0.3,  # of small convolutions and matrices on such chips, a guess to be measured
}


def workload(name):
    if name in ("char_lstm", "transformer"):
        model = (
            models.char_lstm(86)
            if name == "char_lstm"
            else models.transformer(86, 80, num_layers=2, dim=128, num_heads=4)
        )
        rng = np.random.default_rng(0)
        draw = lambda n: {k: rng.integers(0, 86, (n, 80)).astype(np.int32) for k in "xy"}  # noqa: E731
        return model, losses.sequence_cross_entropy(model), draw, 60
    build = {"logistic": models.logistic_regression, "mlp": models.mlp, "cnn": models.cnn}[name]
    model = build((28, 28, 1), 10)
    rng = np.random.default_rng(0)

    def draw(n):
        return {"x": rng.random((n, 28, 28, 1), np.float32), "y": rng.integers(0, 10, n).astype(np.int32)}

    return model, losses.cross_entropy(model), draw, 600


def federation(draw, mean, num_clients):
    sizes = _measure.log_normal_sizes(np.random.default_rng(0), num_clients, mean)
    return Population.from_flat(draw(int(sizes.sum())), np.concatenate([[0], np.cumsum(sizes)]))


def compiled_round(method, name, num_clients, mesh):
    """(call, the program's text) of a round of all clients."""
    model, loss_fn, draw, mean = workload(name)
    options = {"num_clients": num_clients} if method == "scaffold" else {}
    algorithm = getattr(algorithms, method)(
        loss_fn, optax.sgd(0.05), batch_size=BATCH, num_epochs=1, plan=Plan(mesh=mesh), **options
    )
    state, key = algorithm.init(model.init(jax.random.key(0))), jax.random.key(1)
    cohort = federation(draw, mean, num_clients).cohort(np.arange(num_clients))
    where = None
    if mesh is not None:
        where = shardings(state, mesh)
        state, (cohort, key) = place(state, where), place((cohort, key), replicated(mesh))
    results = None if mesh is None else (where, replicated(mesh))
    compiled = jax.jit(algorithm.round, out_shardings=results).lower(state, cohort, key).compile()
    return partial(compiled, state, cohort, key), compiled.as_text()


def moved(text):
    """Bytes of the results of collective operations in a compiled program, by kind."""
    width = {"f32": 4, "s32": 4, "u32": 4, "pred": 1, "f64": 8, "bf16": 2, "u8": 1, "s8": 1}
    found = {}
    for shapes, kind in re.findall(
        r"= (\([^)]*\)|\S+) (all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)\(", text
    ):
        for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", shapes):
            number = int(np.prod([int(n) for n in shape.split(",") if n], dtype=int)) if shape else 1
            found[kind] = found.get(kind, 0) + number * width.get(dtype, 4)
    return found


def weak_scaling(repeats):
    rows = {}
    for method in ("fedavg", "scaffold"):
        contenders, about = {}, {}
        for devices in (1, 2, 4, 8):
            call, text = compiled_round(method, "mlp", 5 * devices, client_mesh(devices))
            jax.block_until_ready(call())
            contenders[devices], about[devices] = call, moved(text)
        times = _measure.take_turns(contenders, repeats)
        steps = {d: work(5 * d) for d in contenders}
        base = np.median(times[1]) / steps[1]
        rows[method] = {}
        for devices, seconds in times.items():
            row = _measure.summary(seconds) | {"steps": steps[devices], "bytes_in_collectives": about[devices]}
            row["cost_of_a_step_over_one_device"] = float(np.median(seconds) / steps[devices] / base)
            rows[method][str(devices)] = row
            print(
                f"{method:8s} {devices} devices: {row['median_s'] * 1e3:8.1f} ms, a step costs "
                f"{row['cost_of_a_step_over_one_device']:.2f} of one device's; {about[devices]} bytes"
            )
    return rows


def work(num_clients):
    """Steps of a round of the mlp's federation."""
    offsets = np.asarray(federation(lambda n: {"x": np.zeros(n, np.int8)}, 600, num_clients).offsets)
    return int((-(-np.diff(offsets) // BATCH)).sum())


def over_cores(names, repeats):
    cores, rows = len(jax.devices()), {}
    cores = min(cores, _measure.machine()["cores"])
    for name in names:
        contenders = {
            "one device": compiled_round("fedavg", name, 10, None)[0],
            "a device a core": compiled_round("fedavg", name, 10, client_mesh(cores))[0],
        }
        for call in contenders.values():
            jax.block_until_ready(call())
        times = _measure.take_turns(contenders, repeats)
        rows[name] = {label: _measure.summary(seconds) for label, seconds in times.items()}
        ratio = np.median(times["one device"]) / np.median(times["a device a core"])
        rows[name] |= {"cores": cores, "speedup": float(ratio)}
        print(
            f"{name:12s} one device {rows[name]['one device']['median_s'] * 1e3:9.1f} ms, {cores} cores as devices "
            f"{rows[name]['a device a core']['median_s'] * 1e3:9.1f} ms: {ratio:.2f}x"
        )
    return rows


def estimate():
    """Seconds of a round on a pod, by arithmetic: local steps, the sum of the updates, the rows of client state."""
    cases = {
        # parameters, FLOPs of a step (forward and backward), local steps of a client, clients a round
        "CNN of FedAvg, batch 20, 30 steps": (1_663_370, 6 * 20 * 12.3e6, 30, 256),
        "ResNet-18-GN, batch 50, 5 epochs of 500": (11_173_962, 6 * 50 * 556e6, 50, 256),
        "transformer of 100M, batch 16 x 512 tokens, 10 steps": (100_000_000, 6 * 16 * 512 * 100e6, 10, 256),
    }
    rows = {}
    for name, (parameters, flops, steps, clients) in cases.items():
        per_chip = -(-clients // POD["chips"])
        compute = per_chip * steps * flops / (POD["peak_flops"] * POD["share_of_peak"])
        # A step reads and writes the model about 5 times: weights forward and backward, gradient, update.
        memory = per_chip * steps * 5 * 4 * parameters / POD["hbm_bytes_per_s"]
        reduce = 2 * 4 * parameters / (2 * POD["link_bytes_per_s"])  # a ring moves every byte twice
        step_time = max(compute, memory)
        total = step_time + reduce
        share = per_chip * steps * flops / total / POD["peak_flops"]
        rows[name] = {
            "compute_s": compute,
            "memory_s": memory,
            "reduce_s": reduce,
            "round_s": total,
            "share_of_peak": share,
            "bytes_reduced": 4 * parameters,
        }
        print(
            f"{name}: {total * 1e3:.1f} ms a round of {clients} clients (arithmetic {compute * 1e3:.1f}, memory "
            f"{memory * 1e3:.1f}, reduction of {4e-6 * parameters:.0f} MB {reduce * 1e3:.2f}), {100 * share:.0f} % of "
            "peak"
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--models", nargs="*", default=["logistic", "mlp"])
    parser.add_argument("--estimate", action="store_true", help="the arithmetic alone")
    parser.add_argument("--save", default="mesh")
    args = parser.parse_args()
    if args.estimate:
        estimate()
        return
    jax.config.update("jax_num_cpu_devices", 8)
    result = {
        "machine": _measure.machine(),
        "cores": over_cores(args.models, args.repeats),
        "weak_scaling": weak_scaling(args.repeats),
        "estimate": {"assumptions": POD, "rounds": estimate()},
    }
    print(f"saved {_measure.save(args.save, result)}")


if __name__ == "__main__":
    main()
