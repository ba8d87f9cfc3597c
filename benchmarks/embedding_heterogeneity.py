"""FedAvg under label-based and embedding-based splits of equal concentration.

    python benchmarks/embedding_heterogeneity.py [--data-dir DIR] [--alphas 0.5 2 10] [--rounds 50]

The claim of "Redefining non-IID Data in Federated Learning for Computer Vision Tasks" (2025), small: at the same alpha
a split over clusters of embeddings costs FedAvg more loss than one over labels suggests. Of the paper are 25 clients
that all take part, 50 local steps of batch 16 and at least 128 examples each; not of the paper are the task,
classification of Fashion-MNIST (of digits where that is not prepared, with at least 8 examples each), the perceptron
with 100 hidden units and its learning rate of 0.1. Both splits come from the same allocation; every seed has splits, an
initial model and batches of its own. Measured is the global model on the data that each client holds, mean and standard
deviation over clients of the loss, and besides on the test part. An IID split shows the loss without heterogeneity.

The claim does not show here, where the split is over the very labels that the model learns: at every alpha it is the
split over labels that costs more on average, though not for every seed (`results/embedding_heterogeneity.json`).
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
import optax

import algorithms
import models
from benchmarks import _measure
from fedjax_core import evaluate, evaluate_clients, samplers, simulate
from models import losses, metrics
from pipelines.data import datasets
from pipelines.federation import embedding, partition

CLIENTS = 25
CLUSTERS = 10
STEPS = 50
BATCH = 16
RATE = 0.1
MEASURES = ("client_loss_mean", "client_loss_std", "test_loss", "test_accuracy")


def load(data_dir: str | None) -> tuple[datasets.Dataset, int]:
    """Fashion-MNIST where it is prepared, else digits; and the fewest examples of a client."""
    try:
        return datasets.load("fashion_mnist", data_dir), 128
    except ValueError as missing:
        print(f"{missing}\nTaking digits instead.", file=sys.stderr)
        return datasets.load("digits"), 8


def normalized(dataset: datasets.Dataset) -> datasets.Dataset:
    """The data set with the floats that a model is to see."""
    if dataset.normalization is None:
        return dataset
    mean, std = (np.float32(values) for values in dataset.normalization)
    train, test = ({**part, "x": (part["x"] / np.float32(255) - mean) / std} for part in (dataset.train, dataset.test))
    return dataset._replace(train=train, test=test, normalization=None)


def run(dataset: datasets.Dataset, assignment: partition.Assignment, rounds: int, seed: int) -> dict[str, float]:
    """FedAvg on a split, and how its global model does on every client's data and on the test part."""
    model = models.mlp(dataset.input_shape, dataset.num_classes, hidden=(100,))
    metric_fn = metrics.classification(model)
    fedavg = algorithms.fedavg(
        losses.cross_entropy(model), optax.sgd(RATE), batch_size=BATCH, num_steps=STEPS, weights="examples"
    )
    population = partition.federate(dataset, assignment)
    init_key, rounds_key = jax.random.split(jax.random.key(seed))
    simulation = jax.jit(simulate(fedavg, samplers.full(CLIENTS), rounds))
    state, _ = simulation(model.init(init_key), population, rounds_key)
    params = fedavg.params(state)
    clients = np.asarray(evaluate_clients(metric_fn, params, population)["loss"])
    test = evaluate(metric_fn, params, jax.tree.map(jnp.asarray, dataset.test))
    values = (clients.mean(), clients.std(), test["loss"], test["accuracy"])
    return dict(zip(MEASURES, map(float, values), strict=True))


def mean_and_std(rows: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Mean and standard deviation over seeds of every measure."""
    table = {name: np.asarray([row[name] for row in rows]) for name in MEASURES}
    return {name: {"mean": float(v.mean()), "std": float(v.std(ddof=1))} for name, v in table.items()}


def main() -> None:
    """Runs every split with every seed and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", default=None)
    parser.add_argument("--alphas", nargs="+", type=float, default=[0.5, 2.0, 10.0])
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    machine = _measure.machine()
    raw, min_size = load(args.data_dir)
    start = time.perf_counter()
    embeddings = embedding.embed(raw)
    embed_s = time.perf_counter() - start
    dataset = normalized(raw)
    ids = {"labels": dataset.train["y"], "embeddings": embedding.kmeans(embeddings, CLUSTERS)}
    results: dict[str, list[dict[str, float]]] = {}
    print(f"{'split':24s}" + "".join(f"{name:>22s}" for name in MEASURES))

    def measure(split, function, clusters, **options):
        results[split] = [
            run(dataset, function(clusters, CLIENTS, **options, seed=seed), args.rounds, seed)
            for seed in range(args.seeds)
        ]
        cells = "".join(f"{v['mean']:12.4f} ± {v['std']:7.4f}" for v in mean_and_std(results[split]).values())
        print(f"{split:24s}{cells}", flush=True)

    measure("iid", partition.iid, ids["labels"])
    excess = {}
    for alpha in args.alphas:
        for name, clusters in ids.items():
            measure(f"{name}, alpha {alpha:g}", partition.clusters, clusters, alpha=alpha, min_size=min_size)
        by_label, by_embedding = (
            np.asarray([row["client_loss_mean"] for row in results[f"{name}, alpha {alpha:g}"]]) for name in ids
        )
        more = by_embedding / by_label - 1
        excess[f"{alpha:g}"] = more.tolist()
        print(f"alpha {alpha:g}: by embeddings the loss is larger by, for every seed: {np.round(more, 3)}", flush=True)
    record = {
        "machine": machine,
        "dataset": dataset.name,
        "clients": CLIENTS,
        "clusters": CLUSTERS,
        "min_size": min_size,
        "rounds": args.rounds,
        "embed_s": embed_s,
        "seconds": time.perf_counter() - start,
        "splits": {split: {"spread": mean_and_std(rows), "seeds": rows} for split, rows in results.items()},
        "excess_by_embeddings": excess,
    }
    print(_measure.save("embedding_heterogeneity", record))


if __name__ == "__main__":
    main()
