"""Rounds of large models on one accelerator: native against dot convolutions, lanes, and single against bfloat16.

    python benchmarks/accelerator.py [--workloads resnet transformer] [--precisions float32 bfloat16] [--small]

resnet: FL-Simulator's protocol, ResNet-18 with group normalization on images of CIFAR-10's shape, 10 of 100 clients a
round with 500 images each, batches of 50, 5 epochs: 500 local steps. FL-Simulator publishes 15.86 s a round on a V100.
transformer: a causal decoder of about 110 million parameters (12 layers, width 768, 16,000 tokens), 4 clients of 80
sequences of 512 tokens a round, batches of 16, one epoch: 20 local steps.

With bfloat16 a step computes in it (parameters and inputs are cast at its start), while the parameters that clients
keep and the server averages stay in single precision. Every combination is a process of its own, because one that runs
out of memory would take the others along; that is a row of the table. Speed is given as a share of the matrix product's
in the same precision, measured in the same process. `--small` shrinks everything to a few minutes on a processor, to
see that it runs; it says nothing about speed.
"""

import argparse
import json
import subprocess
import sys
import time
from functools import partial
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
import optax

import algorithms
import models
from benchmarks import _measure
from benchmarks.peers import workloads
from fedjax_core import Plan, Population, out_of_memory

PUBLISHED = {"resnet": "FL-Simulator on a V100: 15.86 s a round"}
LANES = {"resnet": (1, 2, 5, 10), "transformer": (1, 2, 4)}
CONVOLUTIONS = {"resnet": ("native", "dots"), "transformer": ("-",)}
# clients, cohort, examples of a client, batch, epochs
FEDERATION = {"resnet": (100, 10, 500, 50, 5), "transformer": (8, 4, 80, 16, 1)}
SMALL_FEDERATION = {"resnet": (4, 2, 10, 5, 1), "transformer": (4, 2, 4, 2, 1)}
TRANSFORMER = {"vocab_size": 16_000, "max_len": 512, "num_layers": 12, "dim": 768, "num_heads": 12}
SMALL_TRANSFORMER = {"vocab_size": 50, "max_len": 16, "num_layers": 2, "dim": 32, "num_heads": 2}


def make(name: str, convolution: str, small: bool):
    """(model, its loss, examples of all clients, operations of the products of an example's gradient)."""
    num_clients, _, each, _, _ = (SMALL_FEDERATION if small else FEDERATION)[name]
    rng, total = np.random.default_rng(0), num_clients * each
    if name == "resnet":
        width = 4 if small else 64
        model = models.resnet18_gn((32, 32, 3), 10, width=width, convolution=convolution)
        examples = {"x": rng.normal(size=(total, 32, 32, 3)).astype(np.float32)}
        examples["y"] = rng.integers(0, 10, total).astype(np.int32)
        work = workloads.flops_per_example(workloads.WORKLOADS["resnet"], width=width)
        return model, models.losses.cross_entropy(model), examples, work
    shape = SMALL_TRANSFORMER if small else TRANSFORMER
    model = models.transformer(**shape)
    tokens = rng.integers(0, shape["vocab_size"], (total, shape["max_len"] + 1)).astype(np.int32)
    examples = {"x": tokens[:, :-1], "y": tokens[:, 1:]}
    text = workloads.WORKLOADS["transformer"]._replace(shape=(shape["max_len"],), num_classes=shape["vocab_size"])
    work = workloads.flops_per_example(text, width=shape["dim"], blocks=shape["num_layers"])
    return model, models.losses.sequence_cross_entropy(model), examples, work


def in_precision(loss_fn, dtype):
    """The loss computed in another precision; gradients come back in that of the parameters."""

    def cast(leaf):
        return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    def computed(params, batch, key):
        return loss_fn(jax.tree.map(cast, params), jax.tree.map(cast, batch), key).astype(jnp.float32)

    return computed


def peak(dtype) -> float:
    """Operations a second of a large product in this precision."""
    size, times = 8192, 8
    a = jnp.ones((size, size), dtype)

    @jax.jit
    def run(a):
        return jax.lax.fori_loop(0, times, lambda _, b: (a @ b) * dtype(1 / size), a)

    jax.block_until_ready(run(a))
    return times * 2 * size**3 / min(_measure.take_turns({"product": partial(run, a)}, 5)["product"])


def measure(name: str, convolution: str, lanes: int, precision: str, repeats: int, small: bool) -> dict:
    """One combination: seconds, share of the peak, memory; or what went wrong."""
    num_clients, cohort_size, each, batch_size, epochs = (SMALL_FEDERATION if small else FEDERATION)[name]
    dtype = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}[precision]
    model, loss_fn, examples, work = make(name, convolution, small)
    population = Population.from_sizes(examples, [each] * num_clients)
    fedavg = algorithms.fedavg(
        in_precision(loss_fn, dtype),
        optax.sgd(0.01),
        batch_size=batch_size,
        num_epochs=epochs,
        plan=Plan(lanes=min(lanes, cohort_size)),
    )
    params, round_fn = model.init(jax.random.key(0)), jax.jit(fedavg.round)
    row = {"parameters": models.num_parameters(params)}
    state, rng, seconds = fedavg.init(params), np.random.default_rng(1), []
    try:
        for t in range(1 + repeats):
            cohort = population.cohort(rng.choice(num_clients, cohort_size, replace=False))
            begin = time.perf_counter()
            state, metrics = jax.block_until_ready(round_fn(state, cohort, jax.random.key(t)))
            seconds.append(time.perf_counter() - begin)
    except Exception as error:
        if not out_of_memory(error):
            raise
        return row | {"error": "out of memory"}
    row |= {"first_round_s": seconds[0], "round": _measure.summary(seconds[1:]), "loss": float(metrics.loss)}
    steps = cohort_size * epochs * -(-each // batch_size)
    row["ms_per_step"] = 1e3 * row["round"]["median_s"] / steps
    stats = jax.devices()[0].memory_stats() or {}
    row["peak_memory_gib"] = stats.get("peak_bytes_in_use", 0) / 2**30
    if not small:
        rate = work * cohort_size * epochs * each / row["round"]["median_s"]
        row |= {"tflops": rate / 1e12, "share_of_peak": rate / peak(dtype)}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", choices=list(FEDERATION), default=list(FEDERATION))
    parser.add_argument("--precisions", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--save", default=None, help="name of the results (accelerator, or accelerator_small)")
    parser.add_argument("--one", nargs=4, default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        name, convolution, lanes, precision = args.one
        row = measure(name, convolution, int(lanes), precision, args.repeats, args.small)
        print(json.dumps({"machine": _measure.machine(), "row": row}))
        return
    result = {"machine": None, "published": PUBLISHED, "small": args.small, "rows": []}
    save = args.save or ("accelerator_small" if args.small else "accelerator")
    for name in args.workloads:
        for convolution, precision, lanes in product(CONVOLUTIONS[name], args.precisions, LANES[name]):
            what = {"workload": name, "convolution": convolution, "precision": precision, "lanes": lanes}
            one = [name, convolution, str(lanes), precision]
            flags = ["--repeats", str(args.repeats), *(["--small"] if args.small else [])]
            done = subprocess.run(
                [sys.executable, __file__, *flags, "--one", *one], capture_output=True, text=True, check=False
            )
            if done.returncode:
                lines = done.stderr.strip().splitlines()
                row = {"error": lines[-1] if lines else f"ended with {done.returncode}"}
            else:
                answer = json.loads(done.stdout.splitlines()[-1])
                result["machine"], row = answer["machine"], answer["row"]
            result["rows"].append(what | row)
            told = row.get("error") or (
                f"{row['round']['median_s']:.3f} s a round, {row['ms_per_step']:.2f} ms a step, "
                f"{row['peak_memory_gib']:.1f} GiB"
            )
            if "tflops" in row:
                told += f", {row['tflops']:.2f} TFLOP/s, {100 * row['share_of_peak']:.0f} % of the matrix product's"
            print(f"{name:11s} {convolution:6s} {precision:8s} {lanes:2d} lanes: {told}", flush=True)
            _measure.save(save, result)
        if name in PUBLISHED and not args.small:
            print(PUBLISHED[name])


if __name__ == "__main__":
    main()
