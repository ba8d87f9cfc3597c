"""FedAvg on images: a convolutional network, clients with skewed labels, each tested on its own examples.

    python examples/images.py fashion_mnist --data-dir DIR
    python examples/images.py cifar10 --flip --lr 0.01 --momentum 0.9 --alpha 0.3 --rounds 40 --data-dir DIR

DIR holds prepared data; nothing is downloaded, and without it a message says what to put where.
"""

import argparse
import math

import jax
import jax.numpy as jnp
import optax

import algorithms
import models
from fedjax_core import client_statistics, continue_rounds, evaluate, evaluate_clients, samplers
from pipelines import Config
from pipelines.data import datasets
from pipelines.federation import federations

parser = argparse.ArgumentParser()
parser.add_argument("dataset", nargs="?", default="fashion_mnist", help="any set of labeled images (fashion_mnist)")
parser.add_argument("--data-dir", help="prepared data (default: the environment variable FEDJAX_CORE_DATA)")
parser.add_argument("--rounds", type=int, default=30)
parser.add_argument("--clients", type=int, default=100)
parser.add_argument("--cohort-size", type=int, default=10, help="clients that take part in a round")
parser.add_argument("--alpha", type=float, default=0.1, help="the smaller, the more unlike are the clients' labels")
parser.add_argument("--lr", type=float, default=0.03, help="the clients' learning rate")
parser.add_argument("--momentum", type=float, help="the clients' momentum")
parser.add_argument("--flip", action="store_true", help="train on images mirrored at random")
args = parser.parse_args()

try:
    dataset = datasets.load(args.dataset, args.data_dir)
except ValueError as error:
    parser.error(str(error))

# Who holds what: each class is divided in proportions from Dirichlet(alpha), and every client keeps a fifth of its
# examples for its own test. `fedjax-core federate` draws such a federation; `fedjax-core list` names other partitions.
config = Config(dataset=dataset.name, clients=args.clients, partition="dirichlet", alpha=args.alpha, test_share=0.2)
clients = federations.build(config, dataset)
train, own_tests = clients.population("train"), clients.population("test")
test = jax.tree.map(jnp.asarray, dataset.test)

# The images stay bytes, in memory and on the device: what a model is given is normalized inside the loss.
cnn = models.cnn(dataset.input_shape, dataset.num_classes)
inputs = datasets.normalized(cnn, dataset.normalization)
plain_loss, metric_fn = models.losses.cross_entropy(inputs), models.metrics.classification(inputs)


def flipped_loss(params, batch, key):
    """The cross-entropy of images of which each is mirrored with probability 1/2, float[B].

    The key belongs to the round, the client and the step, so a run that is repeated flips the same images.
    """
    flip_key, model_key = jax.random.split(key)
    flipped = jax.random.bernoulli(flip_key, shape=(len(batch["y"]), 1, 1, 1))
    x = jnp.where(flipped, batch["x"][:, :, ::-1], batch["x"])
    return plain_loss(params, {"x": x, "y": batch["y"]}, model_key)


loss_fn = flipped_loss if args.flip else plain_loss
optimizer = optax.sgd(args.lr, momentum=args.momentum)
fedavg = algorithms.fedavg(loss_fn, optimizer, batch_size=20, num_epochs=1, weights="examples")
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

own = client_statistics(accuracies(fedavg.params(state), own_tests))
print(f"clients on their own examples: mean {own.mean:.1%}, s.d. {own.std:.1%}, worst tenth {own.worst_decile:.1%}")
