"""FedAvg on Fashion-MNIST: the paper's convolutional network, clients with skewed labels, each tested on its own.

    python examples/fashion_mnist.py --data-dir DIR

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
parser.add_argument("--rounds", type=int, default=30)
parser.add_argument("--clients", type=int, default=100)
parser.add_argument("--cohort-size", type=int, default=10, help="clients that take part in a round")
args = parser.parse_args()

try:
    dataset = datasets.load("fashion_mnist", args.data_dir)
except ValueError as error:
    parser.error(str(error))

# Who holds what: each class is dealt out in proportions from Dirichlet(0.1), and every client keeps a fifth of its
# examples for its own test. `fedjax-core federate` draws such a federation; `fedjax-core list` names other partitions.
config = Config(dataset=dataset.name, clients=args.clients, partition="dirichlet", alpha=0.1, test_share=0.2)
clients = federations.build(config, dataset)
train, own_tests = clients.population("train"), clients.population("test")
test = jax.tree.map(jnp.asarray, dataset.test)

# The images stay bytes, in memory and on the device: what a model is given is normalized inside the loss.
cnn = models.cnn(dataset.input_shape, dataset.num_classes)
inputs = datasets.normalized(cnn, dataset.normalization)
loss_fn, metric_fn = models.losses.cross_entropy(inputs), models.metrics.classification(inputs)

fedavg = algorithms.fedavg(loss_fn, optax.sgd(0.03), batch_size=20, num_epochs=1, weights="examples")
sampler = samplers.uniform(clients.num_clients, args.cohort_size)

# Five rounds (fewer if --rounds is no multiple) are one compiled step; the same key goes to every part of the run.
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
