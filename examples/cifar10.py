"""FedAvg on CIFAR-10: clients with skewed labels, random flips inside the loss, and how the clients fare at the end.

    python examples/cifar10.py --data-dir DIR

DIR holds prepared data; nothing is downloaded, and without it a message says what to put where.
"""

import argparse
import math

import jax
import jax.numpy as jnp
import optax

import algorithms
import models
from fedjax_core import continue_rounds, evaluate, evaluate_clients, samplers, spread
from pipelines import Config
from pipelines.data import datasets
from pipelines.federation import federations

parser = argparse.ArgumentParser()
parser.add_argument("--data-dir", help="prepared data (default: the environment variable FEDJAX_CORE_DATA)")
parser.add_argument("--rounds", type=int, default=40)
parser.add_argument("--clients", type=int, default=100)
parser.add_argument("--cohort-size", type=int, default=10, help="clients that take part in a round")
args = parser.parse_args()

try:
    dataset = datasets.load("cifar10", args.data_dir)
except ValueError as error:
    parser.error(str(error))

config = Config(dataset=dataset.name, clients=args.clients, partition="dirichlet", alpha=0.3, test_share=0.1)
clients = federations.build(config, dataset)
train, own_tests = clients.population("train"), clients.population("test")
test = jax.tree.map(jnp.asarray, dataset.test)

cnn = models.cnn(dataset.input_shape, dataset.num_classes)
inputs = datasets.normalized(cnn, dataset.normalization)  # from bytes
plain_loss, metric_fn = models.losses.cross_entropy(inputs), models.metrics.classification(inputs)


def loss_fn(params, batch, key):
    """The cross-entropy of images of which each is mirrored with probability 1/2, float[B].

    The key belongs to the round, the client and the step, so a run that is repeated flips the same images.
    """
    flip_key, model_key = jax.random.split(key)
    flipped = jax.random.bernoulli(flip_key, shape=(len(batch["y"]), 1, 1, 1))
    x = jnp.where(flipped, batch["x"][:, :, ::-1], batch["x"])
    return plain_loss(params, {"x": x, "y": batch["y"]}, model_key)


fedavg = algorithms.fedavg(loss_fn, optax.sgd(0.01, momentum=0.9), batch_size=20, num_epochs=1, weights="examples")
sampler = samplers.uniform(clients.num_clients, args.cohort_size)
every = math.gcd(args.rounds, 5)
run = jax.jit(continue_rounds(fedavg, sampler, every))
accuracy = jax.jit(lambda params, test: evaluate(metric_fn, params, test)["accuracy"])
accuracies = jax.jit(lambda params, tests: evaluate_clients(metric_fn, params, tests)["accuracy"])

init_key, key = jax.random.split(jax.random.key(0))
state = fedavg.init(cnn.init(init_key))
for done in range(every, args.rounds + 1, every):
    state, metrics = run(state, train, key)
    score = accuracy(fedavg.params(state), test)
    print(f"round {done:3d}  training loss {metrics.loss[-1]:.3f}  test accuracy {score:.1%}", flush=True)

own = spread(accuracies(fedavg.params(state), own_tests))
print(f"clients on their own examples: mean {own.mean:.1%}, s.d. {own.std:.1%}, worst tenth {own.worst_decile:.1%}")
