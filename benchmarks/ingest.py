"""Examples per second from prepared records to arrays that can be trained on, against a plain loop; and loading again.

    python benchmarks/ingest.py [--dataset fashion_mnist] [--data-dir DIR] [--repeats 5]

The loop is what a researcher writes first: one record of `tfds.data_source` at a time, its image decoded with Pillow,
everything in a list and stacked at the end. The build reads the same records into the cache: in blocks, straight into
the files, with checksums and the statistics of the channels. Loading again maps these files, as it is and with the
checksums compared.
"""

import argparse
import io
import sys
import tempfile
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from benchmarks import _measure
from pipelines.data import datasets, prepared


def plain_loop(folder: Path) -> dict[str, np.ndarray]:
    """Both splits, the way without this library: the baseline."""
    builder = tfds.builder_from_directory(str(folder))
    arrays = {}
    for split in ("train", "test"):
        source = builder.as_data_source(split=split, decoders={"image": tfds.decode.SkipDecoding()})
        images, labels = [], []
        for i in range(len(source)):
            record = source[i]
            image = np.asarray(Image.open(io.BytesIO(record["image"])))
            images.append(image if image.ndim == 3 else image[..., None])
            labels.append(record["label"])
        arrays |= {f"{split}_x": np.stack(images), f"{split}_y": np.asarray(labels, np.int32)}
    return arrays


def build(name: str, data_dir: str | None) -> datasets.Dataset:
    """Into a cache that is empty."""
    with tempfile.TemporaryDirectory() as folder:
        return datasets.load(name, data_dir, cache_dir=folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", default="fashion_mnist")
    parser.add_argument("--data-dir")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--save", default="ingest")
    args = parser.parse_args()
    (folder,) = (prepared.tfds_folder(args.data_dir) / args.dataset).iterdir()
    machine = _measure.machine()

    built, looped = build(args.dataset, args.data_dir), plain_loop(folder)
    for part in ("train", "test"):
        for leaf in ("x", "y"):
            np.testing.assert_array_equal(getattr(built, part)[leaf], looped[f"{part}_{leaf}"])
    examples = len(looped["train_y"]) + len(looped["test_y"])
    contenders = {
        "plain loop": partial(plain_loop, folder),
        "build the cache": partial(build, args.dataset, args.data_dir),
    }
    report = {name: _measure.summary(t) for name, t in _measure.take_turns(contenders, args.repeats).items()}
    for row in report.values():
        row["examples_per_s"] = examples / row["median_s"]
        row["speedup_over_plain_loop"] = report["plain loop"]["median_s"] / row["median_s"]

    with tempfile.TemporaryDirectory() as cache_dir:
        load = partial(datasets.load, args.dataset, args.data_dir, cache_dir=cache_dir)
        load()
        again = {"mapped": partial(load, verify=False), "mapped, checksums compared": partial(load, verify=True)}
        times = _measure.take_turns(again, 4 * args.repeats)
        reload = {name: _measure.summary(t) for name, t in times.items()}
    for row in reload.values():
        row["speedup_over_building"] = report["build the cache"]["median_s"] / row["median_s"]

    megabytes = sum(array.nbytes for array in looped.values()) / 1e6
    result = {
        "machine": machine,
        "workload": f"{args.dataset}, {examples} examples, {megabytes:.0f} MB decoded",
        "build": report,
        "load again": reload,
    }
    print(f"{result['workload']}")
    for name, row in {**report, **reload}.items():
        quartiles = f"{row['median_s']:9.4f} s [{row['q25_s']:.4f}, {row['q75_s']:.4f}]"
        rate = f"{row['examples_per_s']:8.0f} examples/s" if "examples_per_s" in row else ""
        ratio = next(f"{value:.1f}x" for key, value in row.items() if key.startswith("speedup"))
        print(f"  {name:28s}{quartiles}   {ratio}   {rate}")
    print(f"\nsaved {_measure.save(args.save, result)}")


if __name__ == "__main__":
    main()
