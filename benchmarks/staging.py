"""Staged populations: bytes per second against memcpy, and a staged round against the round in memory.

    python benchmarks/staging.py [--repeats 7]

Throughput: what it takes to gather a cohort of 100 of 10,000 clients (60 images of 28x28 bytes each) into the transfer
buffers and hand them to the device, as a share of a plain copy of as many bytes in one piece, from memory and from
memory-mapped files (in the page cache), client by client in order and with the examples scattered.

Rounds: SCAFFOLD with the MLP 784-200-200-10 and logistic regression, 10 of 200 clients (60 images each), batch 20,
one and five epochs; twenty rounds. Staged (examples on the host; examples and client rows on the host) against one
compiled scan over the rounds with everything on the device, and against a loop of jitted rounds.

A million clients: seconds of a round of 100 of 1,000,000 clients, and of 100 of 1,000.
"""

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
import optax

import algorithms
import models
from benchmarks import _measure
from fedjax_core import HostPopulation, continue_rounds, continue_staged, init_on_host, samplers, staging
from models import losses

EACH = 60
KEY = jax.random.key(0)


def images(count: int) -> dict:
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (count, 28, 28, 1), np.uint8)
    return {"x": x, "y": rng.integers(0, 10, count).astype(np.int32)}


def throughput(repeats: int) -> dict:
    examples, clients = images(10_000 * EACH), 10_000
    offsets = np.arange(clients + 1) * EACH
    scattered = np.random.default_rng(1).permutation(clients * EACH)
    with tempfile.TemporaryDirectory() as folder:
        for name, leaf in examples.items():
            np.save(Path(folder) / f"{name}.npy", leaf)
        mapped = {name: np.load(Path(folder) / f"{name}.npy", mmap_mode="r") for name in examples}
        populations = {
            "memory": HostPopulation.from_flat(examples, offsets),
            "memory, scattered": HostPopulation.from_flat(examples, offsets, scattered),
            "files": HostPopulation.from_flat(mapped, offsets),
            "files, scattered": HostPopulation.from_flat(mapped, offsets, scattered),
        }
        contenders, rounds = {}, 50
        for name, population in populations.items():
            cohorts = staging._Cohorts(samplers.uniform(clients, 100))
            cohorts.prepare(population, KEY[None], range(rounds))
            stage = staging._Stage(population, cohorts, None, False, None)

            def one(stage=stage):
                for t in range(rounds):
                    jax.block_until_ready(stage(t, None)[:2])

            one()
            contenders[name] = one
        size = 100 * EACH
        target = {name: np.empty_like(leaf[:size]) for name, leaf in examples.items()}

        def copy():  # a stretch of the data that no cache holds, in one piece
            for t in range(rounds):
                for name, leaf in examples.items():
                    np.copyto(target[name], leaf[t * size : (t + 1) * size])

        contenders["memcpy"] = copy
        times = _measure.take_turns(contenders, repeats)
    size = sum(leaf.nbytes for leaf in target.values()) * rounds
    plain = np.median(times["memcpy"])
    return {
        name: {
            **_measure.summary(t),
            "gigabytes_per_second": size / np.median(t) / 1e9,
            "share_of_memcpy": plain / np.median(t),
        }
        for name, t in times.items()
    }


def model_of(name: str):
    shape = (28, 28, 1)
    return models.logistic_regression(shape, 10) if name == "logistic" else models.mlp(shape, 10)


def rounds(model_name: str, epochs: int, repeats: int, clients: int = 200, num_rounds: int = 20) -> dict:
    model = model_of(model_name)
    loss = losses.cross_entropy(model)

    def loss_fn(params, batch, key):  # bytes until they are on the device
        return loss(params, {"x": batch["x"] / jnp.float32(255), "y": batch["y"]}, key)

    algorithm = algorithms.scaffold(loss_fn, optax.sgd(0.05), num_clients=clients, batch_size=20, num_epochs=epochs)
    host = HostPopulation.from_flat(images(clients * EACH), np.arange(clients + 1) * EACH)
    device, sampler = host.to_device(), samplers.uniform(clients, 10)
    params = model.init(KEY)
    state = algorithm.init(params)
    on_host = init_on_host(algorithm.init, params, num_clients=clients)
    scanned, one = (
        jax.jit(continue_rounds(algorithm, sampler, num_rounds)),
        jax.jit(continue_rounds(algorithm, sampler, 1), donate_argnums=0),
    )
    staged = continue_staged(algorithm, sampler, num_rounds)

    def loop():
        s = jax.tree.map(jnp.copy, state)
        for _ in range(num_rounds):
            s, info = one(s, device, KEY)
        return s, info

    contenders = {
        "in memory, one scan": lambda: scanned(state, device, KEY),
        "in memory, a loop of rounds": loop,
        "staged examples": lambda: staged(state, host, KEY),
        "staged examples and client rows": lambda: staged(on_host, host, KEY),
    }
    for function in contenders.values():
        jax.block_until_ready(function())
    times = _measure.take_turns(contenders, repeats)
    plain = np.median(times["in memory, one scan"])
    return {
        name: {**_measure.summary([s / num_rounds for s in t]), "times_in_memory": np.median(t) / plain}
        for name, t in times.items()
    }


def million(repeats: int) -> dict:
    params = {"w": jnp.zeros((20, 10), jnp.float32)}

    def loss_fn(params, batch, key):
        return optax.softmax_cross_entropy_with_integer_labels(batch["x"] @ params["w"], batch["y"])

    contenders = {}
    for clients in (1_000, 1_000_000):
        rng = np.random.default_rng(0)
        sizes = rng.integers(1, 20, clients)
        total = int(sizes.sum())
        examples = {"x": rng.random((total, 20), np.float32), "y": rng.integers(0, 10, total).astype(np.int32)}
        host = HostPopulation.from_sizes(examples, sizes)
        algorithm = algorithms.scaffold(loss_fn, optax.sgd(0.1), num_clients=clients, batch_size=10)
        state = init_on_host(algorithm.init, params, num_clients=clients)
        run = continue_staged(algorithm, samplers.uniform(clients, 100), 20)
        contenders[f"{clients:,} clients"] = lambda run=run, state=state, host=host: run(state, host, KEY)
    for function in contenders.values():
        jax.block_until_ready(function())
    times = _measure.take_turns(contenders, repeats)
    return {name: _measure.summary([s / 20 for s in t]) for name, t in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    repeats = parser.parse_args().repeats
    result: dict = {"machine": _measure.machine(), "throughput": throughput(repeats), "rounds": {}}
    for name, row in result["throughput"].items():
        print(
            f"{name:32s} {row['gigabytes_per_second']:6.1f} GB/s  {row['share_of_memcpy']:5.2f} of memcpy", flush=True
        )
    for model in ("logistic", "mlp"):
        for epochs in (1, 5):
            title = f"{model}, {epochs} epoch{'s' if epochs > 1 else ''}"
            result["rounds"][title] = rounds(model, epochs, repeats)
            for name, row in result["rounds"][title].items():
                seconds, ratio = row["median_s"], row["times_in_memory"]
                print(f"{title:20s} {name:34s} {1e3 * seconds:8.2f} ms a round  {ratio:5.2f}", flush=True)
    result["million"] = million(repeats)
    for name, row in result["million"].items():
        print(f"{name:20s} {1e3 * row['median_s']:8.2f} ms a round", flush=True)
    print("written:", _measure.save("staging", result))


if __name__ == "__main__":
    main()
