"""One client step of the FedAvg CNN inside lax.scan: native convolution, rewritten as in a plan, and dots.

    PYTHONPATH=. python benchmarks/convolution.py   # prints rows and writes benchmarks/results/convolution.json

A step is the gradient of the mean cross-entropy of a batch and a plain SGD update, float32, the way a client trains.
"vmapped" trains two clients with a kernel each in one program; times are per client and step. Every time is given as
a share of the float32 matrix product's speed measured in the same run, and of the native convolution in the same
scan. Variants are timed in turn, repeat by repeat, so that a busy machine slows all of them alike.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp

import models
from fedjax_core import convolutions
from models.convolution import dot_conv_general_dilated

RESULT = Path(__file__).parent / "results" / "convolution.json"
VARIANTS = {
    "native": "native",
    "rewritten": "native",
    "rows": partial(dot_conv_general_dilated, patches="rows"),
    "full": partial(dot_conv_general_dilated, patches="full"),
    "dots": "dots",
}
CLIENTS = 2

# Multiplications and additions per example: forward, and twice that for the two gradients, except that nothing
# needs the gradient of the images.
CONV_1 = 2 * 28 * 28 * 25 * 32
CONV_2 = 2 * 14 * 14 * 25 * 32 * 64
DENSE = 2 * (3136 * 512 + 512 * 10)
FLOPS = 2 * CONV_1 + 3 * (CONV_2 + DENSE)


def timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


def quartiles(seconds: list[float], count: int) -> dict[str, float]:
    """Milliseconds per one of the `count` steps in each repeat."""
    times = [1e3 * s / count for s in seconds]
    return {
        "median_ms": round(statistics.median(times), 3),
        "min_ms": round(min(times), 3),
        "max_ms": round(max(times), 3),
    }


def compile_steps(convolution, batch_size: int, steps: int | None, vmapped: bool, rewrite: bool = False):
    """Compiled SGD steps in a scan (one step and no scan for None), and the seconds their compilation took."""
    model = models.cnn(convolution=convolution)
    loss_fn = models.losses.cross_entropy(model)

    def train(params, batches):
        def step(params, batch):
            gradient = jax.grad(lambda p: loss_fn(p, batch, None).mean())(params)
            return jax.tree.map(lambda p, g: p - 0.01 * g, params, gradient), None

        if steps is None:
            return step(params, jax.tree.map(lambda leaf: leaf[0], batches))[0]
        return jax.lax.scan(step, params, batches)[0]

    params = model.init(jax.random.key(0))
    batches = {
        "x": jax.random.normal(jax.random.key(1), (steps or 1, batch_size, 28, 28, 1)),
        "y": jax.random.randint(jax.random.key(2), (steps or 1, batch_size), 0, 10),
    }
    if vmapped:
        train = jax.vmap(train)
        params, batches = jax.tree.map(lambda leaf: jnp.stack([leaf] * CLIENTS), (params, batches))
    if rewrite:
        train = convolutions.rewritten(train)
    lowered = jax.jit(train).lower(params, batches)
    start = time.perf_counter()
    compiled = lowered.compile()
    return partial(compiled, params, batches), time.perf_counter() - start


def matmul_peak(size: int = 1536) -> tuple[Callable[[], object], int]:
    a = jax.random.normal(jax.random.key(0), (size, size))
    return partial(jax.jit(jnp.matmul), a, a), 2 * size**3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--steps", type=int, default=8, help="steps in a scan")
    parser.add_argument("--native-steps", type=int, default=2, help="the same where native is slow")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[20, 32])
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()

    load_before = [round(load, 2) for load in os.getloadavg()]
    matmul, matmul_flops = matmul_peak()
    cases = []
    for batch_size in options.batch_sizes:
        for vmapped in (False, True):
            for name, convolution in VARIANTS.items():
                steps = options.native_steps if name == "native" else options.steps
                run, compile_s = compile_steps(convolution, batch_size, steps, vmapped, name == "rewritten")
                row = {"variant": name, "batch_size": batch_size, "clients": CLIENTS if vmapped else 1}
                cases.append((row | {"compile_s": round(compile_s, 2)}, run, steps))
        # A peer without the loop: the same step called from Python, where the fast convolution is kept.
        run, compile_s = compile_steps("native", batch_size, None, vmapped=False)
        row = {"variant": "native, no scan", "batch_size": batch_size, "clients": 1}
        cases.append((row | {"compile_s": round(compile_s, 2)}, run, 1))

    for run in [matmul, *(run for _, run, _ in cases)]:
        timed(run)
    seconds: list[list[float]] = [[] for _ in cases]
    matmul_seconds = []
    for _ in range(options.repeats):
        matmul_seconds.append(timed(matmul))
        for times, (_, run, _) in zip(seconds, cases, strict=True):
            times.append(timed(run))

    # Medians on both sides: on a shared machine the best product and the median step saw different loads.
    peak = matmul_flops / statistics.median(matmul_seconds) / 1e9
    rows = []
    for (row, _, steps), times in zip(cases, seconds, strict=True):
        row |= quartiles(times, steps * row["clients"])
        row["gflops"] = round(FLOPS * row["batch_size"] / row["median_ms"] / 1e6, 1)
        row["share_of_matmul"] = round(row["gflops"] / peak, 3)
        rows.append(row)
    for row in rows:
        same = [r for r in rows if all(r[k] == row[k] for k in ("batch_size", "clients"))]
        row["speed_over_native_in_scan"] = round(same[0]["median_ms"] / row["median_ms"], 2)
        print(json.dumps(row))

    report = {
        "what": "one SGD step of models.cnn() on 28x28x1 inside lax.scan; times per client and step",
        "device": jax.devices()[0].device_kind,
        "backend": jax.default_backend(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "load_average_before": load_before,
        "jax": jax.__version__,
        "python": platform.python_version(),
        "repeats": options.repeats,
        "matmul_gflops": round(peak, 1),
        "rows": rows,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(report, indent=2) + "\n")
    print(f"matmul {peak:.0f} GFLOP/s; wrote {options.output}")


if __name__ == "__main__":
    main()
