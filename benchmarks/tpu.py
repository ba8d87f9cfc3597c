"""FedAvg rounds compiled for slices of TPU v5e that are not there: memory, collectives, predicted time. Nothing is run.

    python benchmarks/tpu.py [--only cnn resnet transformer lanes] [--print]

Strong scaling: a cohort of 256 clients on 4, 16, 64 and 256 chips. Weak scaling: a client a chip. lanes: the CNN with
one to ten clients side by side on a chip, with native convolutions and with convolutions made of dots. It needs the
extra tpu. A row that is in the results already is not compiled again; --print shows them as the tables of docs/tpu.md.
"""

import argparse
import shlex
import sys
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import numpy as np

import models

CLIENTS = 256
SLICES = {4: "v5e:2x2", 16: "v5e:4x4", 64: "v5e:8x8", 256: "v5e:16x16"}


def characters():
    """As many images as 256 clients of FEMNIST need for three batches of 20 each, all of noise."""
    return _images((28, 28, 1), 62, 60)


def photographs():
    """As many images as 256 clients of CIFAR-10 need for a batch of 50 each, all of noise."""
    return _images((32, 32, 3), 10, 50)


def texts():
    """A batch of 16 texts of 512 tokens for each of 256 clients, all of noise."""
    tokens = np.random.default_rng(0).integers(0, 16_000, (16 * (CLIENTS + 1), 513)).astype(np.int32)
    tokens[0, :2] = 15_999
    return _parts(tokens[:, :-1], tokens[:, 1:])


def transformer_110m(dataset):
    """A causal decoder of 110 million parameters."""
    return models.transformer(dataset.num_classes, 512, num_layers=12, dim=768, num_heads=12)


def _images(shape, classes, each):
    rng = np.random.default_rng(0)
    count = each * (CLIENTS + 1)
    return _parts(rng.integers(0, 256, (count, *shape)).astype(np.uint8), np.arange(count, dtype=np.int32) % classes)


def _parts(x, y):
    """All but one of 257 parts to train on, one to test on."""
    test = len(x) // (CLIENTS + 1)
    return (x[test:], y[test:]), (x[:test], y[:test])


BASE = {"partition": "iid", "clients": CLIENTS, "seeds": 1, "rounds": 5, "lr": 0.05, "method": "fedavg", "epochs": None}
HERE = "benchmarks/tpu.py"
WORKLOADS = {
    "cnn": {"dataset": f"{HERE}:characters", "model": "cnn", "batch-size": 20, "steps": 30},
    "resnet": {"dataset": f"{HERE}:photographs", "model": "resnet18_gn", "batch-size": 50, "steps": 50},
    "transformer": {"dataset": f"{HERE}:texts", "model": f"{HERE}:transformer_110m", "batch-size": 16, "steps": 10},
}
LANES = [(1, "native"), (2, "native"), (4, "native"), (10, "native"), (1, "dots"), (2, "dots"), (10, "dots")]


def rows(only):
    """(section, name of the row, topology, options of the command)."""
    for section in [name for name in ("cnn", "lanes", "resnet", "transformer") if name in only]:
        workload = BASE | WORKLOADS["cnn" if section == "lanes" else section]
        if section == "lanes":
            for lanes, convolution in LANES:
                options = workload | {"cohort-size": 40, "lanes": 4 * lanes, "convolution": convolution}
                yield section, f"{lanes} {convolution}", SLICES[4], options
            continue
        for chips in (4, 256, 16, 64):  # the ends first
            yield section, f"weak {chips}", SLICES[chips], workload | {"cohort-size": chips}
        for chips in (4, 64, 16):
            yield section, f"strong {chips}", SLICES[chips], workload | {"cohort-size": CLIENTS}


def command(topology, options):
    """The command that compiles the same."""
    words = [f"--{name} {shlex.quote(str(value))}" for name, value in options.items() if value is not None]
    return " ".join(["fedjax-core compile", f"--topology {topology}", *words])


@cache
def federation(section):
    """Which all rows of a section share."""
    from pipelines.experiment import setup

    return setup.federate(config_of(BASE | WORKLOADS["cnn" if section == "lanes" else section] | {"cohort-size": 4}))


def config_of(options):
    """The configuration that the command has."""
    from pipelines import Config

    names = {"lr": "client_lr", "batch-size": "batch_size", "cohort-size": "cohort_size"}
    values = {names.get(name, name): value for name, value in options.items() if name != "method"}
    return Config(methods=(options["method"],), **values)


def compiled(section, topology, options):
    """What a row has come to."""
    from pipelines.compiled import compiling

    tpus, experiment = compiling.prepare(config_of(options), topology, federation(section))
    try:
        found = compiling.compile_method(experiment, tpus, "fedavg").as_json()
    except compiling.TooLarge as error:
        found = {"too_large": str(error), "needs": error.need}
    return {"command": command(topology, options), **found}


def main():
    from benchmarks import _measure
    from pipelines.compiled import chips, compiling

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[*WORKLOADS, "lanes"], default=[*WORKLOADS, "lanes"])
    parser.add_argument("--print", action="store_true", dest="show")
    args = parser.parse_args()
    results = _measure.saved("tpu")
    if args.show:
        return show(results)
    jax.config.update("jax_platforms", "cpu")
    results["about"] = "compiled for TPU v5e and predicted, not run"
    results["assumptions"] = compiling.assumptions(chips.parse("v5e:2x2"))
    results["compiled_on"] = _measure.machine()
    for section, name, topology, options in rows(args.only):
        if name in results.get(section, {}):
            continue
        row = compiled(section, topology, options)
        results.setdefault(section, {})[name] = row
        _measure.save("tpu", results)
        shown = row.get("too_large") or (
            f"compiled in {row['compile_seconds']:.0f} s, {row['memory']['together'] / 1e9:.2f} GB a chip, "
            f"{row['predicted_seconds'] * 1e3:.1f} ms, {row['share_of_peak']:.1%} of peak"
        )
        print(f"{section}, {name}: {shown}", flush=True)


def show(results):
    """The tables of docs/tpu.md."""
    print(results["about"])
    for section, workload in WORKLOADS.items():
        print(f"\n{section}\n\n    {command('TOPOLOGY', BASE | workload | {'cohort-size': 'N'})}\n")
        heads = ("`--topology`", "`--cohort-size`", "compile", "memory of a chip", "steps", "roofline", "compiler")
        print(f"| {' | '.join(heads)} | sum of updates |")
        print("| --- | --: | --: | --: | --: | --: | --: | --: |")
        found = results.get(section, {}).items()
        for name, row in sorted(found, key=lambda item: (item[0].split()[0] == "strong", int(item[0].split()[1]))):
            chips = int(name.split()[1])
            clients = chips if name.startswith("weak") else CLIENTS
            print(f"| `{SLICES[chips]}` | {clients} | {_cells(row)} |")
    print("\n| lanes a chip | convolution | temporaries | a step of a client, by the compiler |")
    print("| --: | --- | --: | --: |")
    for name, row in results.get("lanes", {}).items():
        lanes, convolution = name.split()
        each = row["seconds"]["compiler"] / row["loops"][0]["useful"] * row["num_chips"]
        print(f"| {lanes} | {convolution} | {row['memory']['temporaries'] / 1e6:.0f} MB | {each * 1e6:.0f} us |")


def _cells(row):
    if "memory" not in row:
        return row["too_large"]
    seconds = row["seconds"]
    return " | ".join(
        [
            f"{row['compile_seconds']:.0f} s",
            f"{row['memory']['together'] / 1e9:.2f} GB",
            f"{row['loops'][0]['steps']:.0f}",
            f"{seconds['roofline'] * 1e3:,.4g} ms",
            f"{seconds['compiler'] * 1e3:,.4g} ms, {row['share_of_peak']:.1%} of peak",
            f"{seconds['collectives'] * 1e3:.2g} ms",
        ]
    )


if __name__ == "__main__":
    main()
