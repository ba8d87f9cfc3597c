"""A study over learning rates and seeds as one compiled step.

A simulation is a pure function, so `jax.vmap` turns one into many. The learning rate is an ordinary argument of the
function that builds the method; no part of the library knows that it is a batch of rates.
"""

import os
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import algorithms
from fedjax_core import Population, evaluate, samplers, simulate

NUM_ROUNDS = int(os.environ.get("FEDJAX_CORE_EXAMPLE_ROUNDS", "50"))
NUM_CLIENTS, COHORT_SIZE = 50, 10
RATES = jnp.array([0.01, 0.03, 0.1, 0.3, 1.0])
KEYS = jax.random.split(jax.random.key(0), 4)

pixels, labels = load_digits(return_X_y=True)
examples = {"x": (pixels / 16).astype(np.float32), "y": labels.astype(np.int32)}
order = np.random.default_rng(0).permutation(len(labels))
train, test = ({k: v[part] for k, v in examples.items()} for part in (order[300:], order[:300]))
shards = np.array_split(np.argsort(train["y"], kind="stable"), NUM_CLIENTS)  # one or two digits per client
population = Population.from_clients([{k: v[s] for k, v in train.items()} for s in shards])
params = {"w": jnp.zeros((64, 10)), "b": jnp.zeros(10)}
sampler = samplers.uniform(NUM_CLIENTS, COHORT_SIZE)


def logits(params, x):
    """Logistic regression: x [B, 64] -> [B, 10]."""
    return x @ params["w"] + params["b"]


def loss_fn(params, batch, key):
    """One loss per example, float[B]."""
    return optax.softmax_cross_entropy_with_integer_labels(logits(params, batch["x"]), batch["y"])


def accuracy(params, batch):
    """1.0 for every example that is classified correctly, float[B]."""
    return (jnp.argmax(logits(params, batch["x"]), axis=-1) == batch["y"]).astype(jnp.float32)


def study(rate, key, population, test):
    """One whole simulation: training loss per round, float[rounds], and test accuracy, float[].

    The data are arguments. Had the function closed over them, they would become constants of the program, which
    makes compilation slow.
    """
    method = algorithms.fedavg(loss_fn, optax.sgd(rate), batch_size=20)
    state, metrics = simulate(method, sampler, NUM_ROUNDS)(params, population, key)
    return metrics.loss, evaluate(accuracy, method.params(state), test)


over_seeds = jax.vmap(study, (None, 0, None, None))
over_both = jax.vmap(over_seeds, (0, None, None, None))

start = time.perf_counter()
compiled = jax.jit(over_both).lower(RATES, KEYS, population, test).compile()
print(f"compiled once, in {time.perf_counter() - start:.1f} s")

start = time.perf_counter()
losses, accuracies = jax.block_until_ready(compiled(RATES, KEYS, population, test))
runs = len(RATES) * len(KEYS)
print(f"{runs} simulations of {NUM_ROUNDS} rounds in {time.perf_counter() - start:.1f} s\n")

print("learning rate   last training loss   test accuracy (mean and s.d. over seeds)")
for rate, loss, accuracy_of_seeds in zip(RATES, losses[:, :, -1], accuracies, strict=True):
    print(f"{rate:13.2f}   {loss.mean():18.3f}   {accuracy_of_seeds.mean():.1%} +- {accuracy_of_seeds.std():.1%}")
