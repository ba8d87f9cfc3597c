"""Federated LoRA: a pretrained sentence encoder learns from skewed clients whether a review is good or bad (SST-2).

    python examples/sentences.py --data-dir DIR

DIR holds prepared data; nothing is downloaded, and without it a message says what to put where. The encoder, MiniLM-L6,
comes with a package (docs/models.md, "Pretrained encoders").

First the clients train a head on the frozen encoder. From there they train adapters too, each of the rank that it can
afford, and the server puts adapters of unequal ranks together by two rules. What is frozen is public data of the
population: an argument of the compiled round, in memory once. With adapters of one rank any method can stand in the
place of `fedlora`.
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
parser.add_argument("--rounds", type=int, default=5, help="of each rule")
parser.add_argument("--head-rounds", type=int, default=20, help="of the head alone, before")
parser.add_argument("--clients", type=int, default=40)
parser.add_argument("--cohort-size", type=int, default=8, help="clients that take part in a round")
parser.add_argument("--sentences", type=int, default=4000, help="of the training set, shared out among the clients")
parser.add_argument("--tests", type=int, default=872, help="sentences to test on")
parser.add_argument("--alpha", type=float, default=1.0, help="skew of the labels, the smaller the more")
parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8], help="of the clients, in turn")
parser.add_argument("--rules", nargs="+", default=["factors", "products"], help="how the server averages; see fedlora")
parser.add_argument("--lr", type=float, default=1e-3)
parser.add_argument("--seed", type=int, default=0)
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


def examples(split, count, length):
    """The first sentences as MiniLM reads them, [count, length] tokens, what it makes of them, and their labels."""
    texts = [bytes(row[row != dataset.pad_token].tolist()).decode(errors="ignore") for row in split["x"][:count]]
    tokens = tokenize(texts)[:, :length]
    batches = [features(tokens[at : at + 64]) for at in range(0, len(tokens), 64)]
    return {"x": tokens, "features": np.concatenate(batches), "y": np.asarray(split["y"][:count])}


features = jax.jit(lambda tokens: encoder.model.features(encoder.params, tokens))
# Most of the training set are phrases of some ten words; the tests are whole sentences.
train, tests = examples(dataset.train, args.sentences, 24), examples(dataset.test, args.tests, 32)
owners = partition.dirichlet(train["y"], args.clients, alpha=args.alpha, min_size=16, seed=args.seed)
population = fc.Population.from_clients([jax.tree.map(lambda leaf, own=own: leaf[own], train) for own in owners])
sampler = fc.samplers.uniform(args.clients, args.cohort_size)
local = {"batch_size": 16, "num_epochs": 1, "weights": "examples"}
key = jax.random.key(args.seed)


# The head alone, on features that the frozen encoder has made once.
def head_logits(head, batch):
    """float[B, 2]"""
    return batch["features"] @ head["kernel"] + head["bias"]


def head_loss(head, batch, key):
    """float[B]"""
    return optax.softmax_cross_entropy_with_integer_labels(head_logits(head, batch), batch["y"])


fedavg = algorithms.fedavg(head_loss, optax.sgd(1.0), **local)
run = jax.jit(fc.simulate(fedavg, sampler, args.head_rounds))
state, metrics = run(encoder.params["head"], population, key)
head = fedavg.params(state)
score = np.mean(np.argmax(head_logits(head, tests), 1) == tests["y"])
print(
    f"head on the frozen encoder: test accuracy {score:.1%}, {metrics.bytes_up[-1]:,.0f} bytes up a client and round",
    flush=True,
)

# Adapters on the attention of every block, of the largest rank, and the head from there on.
largest = max(args.ranks)
lora = models.adapters.lora(largest, alpha=2.0, scaling="constant")
tuned = models.adapted(encoder.model, lora, encoder.model.paths("attention"))
params = {"base": {**encoder.params, "head": head}, "adapter": tuned.init(key)}
trained, frozen = fc.partition(params, ["adapter", "base/head"])
population = population.with_public(frozen)
cross_entropy, classification = models.losses.cross_entropy(tuned.joint), models.metrics.classification(tuned.joint)


def loss_fn(trained, batch, key, public):
    """float[B]; the frozen parameters are the population's public data."""
    return cross_entropy(fc.combine(trained, public), batch, key)


def metric_fn(trained, batch, public):
    """{"loss": float[B], "accuracy": float[B]}"""
    return classification(fc.combine(trained, public), batch)


test = jax.jit(lambda params, public: fc.evaluate(metric_fn, params, tests, public=public)["accuracy"])
ranks = [args.ranks[i % len(args.ranks)] for i in range(args.clients)]
whole = fc.num_bytes(params)
print(f"adapters of ranks {', '.join(map(str, args.ranks))}; the model has {whole:,.0f} bytes", flush=True)
for rule in args.rules:
    method = algorithms.fedlora(
        loss_fn,
        optax.adam(args.lr),
        num_clients=args.clients,
        ranks=ranks,
        rule=rule,
        alpha=2.0,
        scaling="constant",  # factors of unequal scales would not be for averaging
        **local,
    )
    run, state, sent = jax.jit(fc.continue_rounds(method, sampler, 1)), method.init(trained), []
    for done in range(1, args.rounds + 1):
        state, metrics = run(state, population, key)
        sent.append(metrics.bytes_up[-1])
        print(f"{rule}, round {done}: training loss {metrics.loss[-1]:.3f}", flush=True)
    score = test(method.params(state), population.public)
    print(f"{rule}: test accuracy {score:.1%}, {np.mean(sent):,.0f} bytes up a client and round", flush=True)
