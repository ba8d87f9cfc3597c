"""FedAvg on handwritten digits: a whole federated round is one compiled step.

The model is a plain function; nothing here needs a neural-network library.
"""

import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import algorithms
from fedjax_core import Population, evaluate, samplers

NUM_ROUNDS = int(os.environ.get("FEDJAX_CORE_EXAMPLE_ROUNDS", "100"))
NUM_CLIENTS, COHORT_SIZE = 50, 10

# Real data: 1,797 images of 8 x 8 pixels, of which 300 are kept for testing.
pixels, labels = load_digits(return_X_y=True)
examples = {"x": (pixels / 16).astype(np.float32), "y": labels.astype(np.int32)}
order = np.random.default_rng(0).permutation(len(labels))
train, test = ({k: v[part] for k, v in examples.items()} for part in (order[300:], order[:300]))

# Two shards of the sorted labels per client, so that most clients see only two or three digits. Clients may have
# different numbers of examples: the population stores them back to back, without padding.
shards = np.array_split(np.argsort(train["y"], kind="stable"), 2 * NUM_CLIENTS)
order = np.random.default_rng(1).permutation(2 * NUM_CLIENTS).reshape(NUM_CLIENTS, 2)
rows = [np.concatenate([shards[a], shards[b]]) for a, b in order]
population = Population.from_clients([{k: v[r] for k, v in train.items()} for r in rows])


def logits(params, x):
    """Logistic regression: x [B, 64] -> [B, 10]."""
    return x @ params["w"] + params["b"]


def loss_fn(params, batch, key):
    """One loss per example, float[B]; the library averages, so that padding never counts."""
    return optax.softmax_cross_entropy_with_integer_labels(logits(params, batch["x"]), batch["y"])


def accuracy(params, batch):
    """1.0 for every example that is classified correctly, float[B]."""
    return (jnp.argmax(logits(params, batch["x"]), axis=-1) == batch["y"]).astype(jnp.float32)


params = {"w": jnp.zeros((64, 10)), "b": jnp.zeros(10)}
sampler = samplers.uniform(NUM_CLIENTS, COHORT_SIZE)
sample_key, train_key = jax.random.split(jax.random.key(0))
test_accuracy = jax.jit(lambda params, test: evaluate(accuracy, params, test))

fedavg = algorithms.fedavg(loss_fn, optax.sgd(0.5), batch_size=20, num_epochs=2)
round_fn = jax.jit(fedavg.round)
state = fedavg.init(params)
for r in range(NUM_ROUNDS):
    cohort = population.cohort(sampler(sample_key, r))
    state, metrics = round_fn(state, cohort, jax.random.fold_in(train_key, r))
    if (r + 1) % 10 == 0 or r + 1 == NUM_ROUNDS:
        score = test_accuracy(fedavg.params(state), test)
        print(f"round {r + 1:3d}  training loss {metrics.loss:.3f}  test accuracy {score:.1%}")
