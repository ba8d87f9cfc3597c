"""Federated LoRA: a pretrained sentence encoder learns from skewed clients whether a review is good or bad (SST-2).

    python examples/sentences.py --data-dir DIR

DIR holds prepared data; nothing is downloaded, and without it a message says what to put where. The encoder, MiniLM-L6,
comes with a package (docs/models.md, "Pretrained encoders").

Clients train and send an adapter and a head, less than 1 % of the parameters. The rest is public data of the
population: an argument of the compiled round, in memory once. Any method can stand in the place of FedAvg.
"""

import argparse

import jax
import numpy as np
import optax

import algorithms
import fedjax_core as fc
import models
from pipelines.data import datasets, prepared
from pipelines.federation import partition

parser = argparse.ArgumentParser()
parser.add_argument("--data-dir", help="prepared data (default: the environment variable FEDJAX_CORE_DATA)")
parser.add_argument("--rounds", type=int, default=5)
parser.add_argument("--clients", type=int, default=20)
parser.add_argument("--cohort-size", type=int, default=4, help="clients that take part in a round")
parser.add_argument("--sentences", type=int, default=2000, help="of the training set, shared out among the clients")
parser.add_argument("--tests", type=int, default=872, help="sentences to test on")
parser.add_argument("--alpha", type=float, default=0.5, help="skew of the labels, the smaller the more")
parser.add_argument("--rank", type=int, default=8)
args = parser.parse_args()

try:
    dataset = datasets.load("glue/sst2", args.data_dir, sequence_length=280, vocabulary="bytes")
    encoder, tokenize = models.pretrained.minilm(num_classes=2, max_len=32)
except ValueError as error:
    place = prepared.tfds_folder(args.data_dir) / "glue" / "sst2"
    parser.error(
        f"glue/sst2 is not downloaded: put what tensorflow-datasets prepares at {place}, or name another folder by "
        f"--data-dir or FEDJAX_CORE_DATA ({error})"
    )
except ImportError as error:
    parser.error(str(error))


def examples(split, count):
    """The first sentences as MiniLM reads them, [count, 32] tokens, and their labels."""
    texts = [bytes(row[row != dataset.pad_token].tolist()).decode(errors="ignore") for row in split["x"][:count]]
    return {"x": tokenize(texts), "y": np.asarray(split["y"][:count])}


train, tests = examples(dataset.train, args.sentences), examples(dataset.test, args.tests)
owners = partition.dirichlet(train["y"], args.clients, alpha=args.alpha, min_size=16)
population = fc.Population.from_clients([jax.tree.map(lambda leaf, own=own: leaf[own], train) for own in owners])

tuned = models.adapted(encoder.model, models.adapters.lora(args.rank), encoder.model.paths("attention"))
params = {"base": encoder.params, "adapter": tuned.init(jax.random.key(0))}
trained, frozen = fc.partition(params, ["adapter", "base/head"])
share = models.num_parameters(trained) / models.num_parameters(params)
print(f"{models.num_parameters(trained):,} parameters are trained and sent, {share:.1%} of all", flush=True)

cross_entropy, classification = models.losses.cross_entropy(tuned.joint), models.metrics.classification(tuned.joint)


def loss_fn(trained, batch, key, public):
    """float[B]; the frozen parameters are the population's public data."""
    return cross_entropy(fc.combine(trained, public), batch, key)


def metric_fn(trained, batch, public):
    """{"loss": float[B], "accuracy": float[B]}"""
    return classification(fc.combine(trained, public), batch)


population = population.with_public(frozen)
fedavg = algorithms.fedavg(loss_fn, optax.adam(2e-3), batch_size=16, num_epochs=1, weights="examples")
sampler = fc.samplers.uniform(args.clients, args.cohort_size)
run = jax.jit(fc.continue_rounds(fedavg, sampler, 1))
test = jax.jit(lambda params, public: fc.evaluate(metric_fn, params, tests, public=public)["accuracy"])

state, key = fedavg.init(trained), jax.random.key(1)
for done in range(1, args.rounds + 1):
    state, metrics = run(state, population, key)
    score = test(fedavg.params(state), population.public)
    print(f"round {done:2d}  training loss {metrics.loss[-1]:.3f}  test accuracy {score:.1%}", flush=True)
