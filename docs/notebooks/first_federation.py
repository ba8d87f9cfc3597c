# %% [markdown]
# # A first federation
#
# From a data set to two methods compared over learning rates and seeds. The data are
# 1,797 handwritten digits that come with scikit-learn, so nothing is downloaded;
# everything here takes half a minute on two processor cores, most of it compilation.

# %%
import time

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import algorithms
import fedjax_core as fc
from pipelines.data import datasets
from pipelines.federation import partition

# %% [markdown]
# ## Clients
#
# Fifty clients hold the digits. Each class is divided in shares drawn from
# Dirichlet(0.1), so that most clients see two or three classes, and their sizes differ.
# A `Population` stores all of them back to back, without padding.

# %%
digits = datasets.load("digits")
labels = digits.train["y"]
assignment = partition.dirichlet(labels, 50, alpha=0.1, seed=0)
population = partition.federate(digits, assignment)
sizes = np.asarray(population.sizes)
print(
    f"{population.num_clients} clients with {sizes.min()} to {sizes.max()} examples, {sizes.sum()} in all"
)

# %%
counts = np.stack([np.bincount(labels[assignment[i]], minlength=12) for i in range(50)])
counts = counts[np.argsort(-sizes)]
figure, axis = plt.subplots(
    figsize=(6, 2.4), layout="constrained", num="Labels of each client"
)
for digit in range(10):
    below = counts[:, :digit].sum(1)
    axis.bar(range(50), counts[:, digit], 1, below, color=f"C{digit}", label=str(digit))
axis.set(xlabel="client, by size", ylabel="examples", xlim=(-0.5, 49.5))
legend = axis.legend(title="digit", ncols=5, frameon=False)

# %% [markdown]
# ## A model and a loss
#
# The model is any pytree of arrays and the loss any function that returns **one value
# per example**; the library averages. This is logistic regression in plain JAX. Models
# of flax, Equinox and Haiku [do as well](../frameworks.md).


# %%
def logits(params, x):
    return x.reshape(len(x), 64) @ params["w"] + params["b"]


def loss_fn(params, batch, key):
    return optax.softmax_cross_entropy_with_integer_labels(
        logits(params, batch["x"]), batch["y"]
    )


def accuracy(params, batch):
    return jnp.argmax(logits(params, batch["x"]), -1) == batch["y"]


params = {"w": jnp.zeros((64, 10)), "b": jnp.zeros(10)}

# %% [markdown]
# ## One round
#
# A method takes the loss, an optax optimizer for the clients, and how much they train.
# It is a handful of pure functions; `round` is the whole federated round, and `jax.jit`
# makes one program of it.

# %%
fedavg = algorithms.fedavg(loss_fn, optax.sgd(0.3), batch_size=20, num_epochs=1)
cohort = population.cohort(jnp.arange(10))  # clients 0 to 9 take part
state, metrics = jax.jit(fedavg.round)(fedavg.init(params), cohort, jax.random.key(0))
print(
    f"mean training loss {metrics.loss:.2f}, model moved by {metrics.update_norm:.2f}"
)
print(f"each of {metrics.participants} clients sent {metrics.bytes_up:,.0f} bytes")

# %% [markdown]
# ## A whole simulation
#
# `simulate` puts the rounds into the compiled program, and a sampler decides who takes
# part in each. Here 10 of the 50 clients train in each of 100 rounds.

# %%
sampler = fc.samplers.uniform(50, 10)
run = jax.jit(fc.simulate(fedavg, sampler, num_rounds=100))
state, metrics = run(params, population, jax.random.key(0))  # compiles
begun = time.perf_counter()
state, metrics = jax.block_until_ready(run(params, population, jax.random.key(1)))
print(f"100 rounds in {time.perf_counter() - begun:.2f} s")
test = jax.jit(lambda params, test: fc.evaluate(accuracy, params, test))
print(f"test accuracy {test(fedavg.params(state), digits.test):.1%}")

# %% [markdown]
# ## A study
#
# A simulation is a pure function, so `jax.vmap` makes a study of it: here four learning
# rates times three seeds for each of two methods, tested after every five rounds. All
# twelve runs of a method are one compiled call. [FedDyn](../methods/feddyn.md) keeps a
# term for every client against the drift of local training, and sends no more than
# FedAvg.


# %%
def study(make, rates, keys):
    """Test accuracy of method `make(optimizer)`, float[rates, seeds, 12]."""

    def one(rate, key, population, test):
        method = make(optax.sgd(rate))
        five_rounds = fc.continue_rounds(method, sampler, 5)

        def step(state, _):
            state, _ = five_rounds(state, population, key)
            return state, fc.evaluate(accuracy, method.params(state), test)

        return jax.lax.scan(step, method.init(params), length=12)[1]

    over_seeds = jax.vmap(one, (None, 0, None, None))
    over_both = jax.jit(jax.vmap(over_seeds, (0, None, None, None)))
    return np.asarray(over_both(rates, keys, population, digits.test))


rates = jnp.array([0.1, 0.3, 1.0, 3.0])
keys = jax.random.split(jax.random.key(2), 3)
local = {"batch_size": 20, "num_epochs": 1}
results = {
    "FedAvg": study(lambda sgd: algorithms.fedavg(loss_fn, sgd, **local), rates, keys),
    "FedDyn": study(
        lambda sgd: algorithms.feddyn(loss_fn, sgd, num_clients=50, **local),
        rates,
        keys,
    ),
}
print("test accuracy after 60 rounds, mean and standard deviation over seeds")
print("learning rate " + "".join(f"{rate:>14.2f}" for rate in rates))
for name, found in results.items():
    mean, deviation = found[:, :, -1].mean(1), found[:, :, -1].std(1, ddof=1)
    cells = [f"{m:.1%} ± {d:.1%}" for m, d in zip(mean, deviation, strict=True)]
    print(f"{name:14}" + "".join(f"{cell:>14}" for cell in cells))

# %%
figure, axes = plt.subplots(
    1,
    len(rates),
    figsize=(7, 2.4),
    sharey=True,
    layout="constrained",
    num="Test accuracy against rounds for each learning rate",
)
rounds = np.arange(5, 61, 5)
for i, axis in enumerate(axes):
    for name, found in results.items():
        mean = found[i].mean(0)
        axis.plot(rounds, mean, label=name)
        axis.fill_between(rounds, found[i].min(0), found[i].max(0), alpha=0.2)
    axis.set(title=f"rate {rates[i]:.2g}", xlabel="round", ylim=(0.7, 1))
axes[0].set_ylabel("test accuracy")
legend = axes[-1].legend(frameon=False)

# %% [markdown]
# At the three smaller rates FedDyn is ahead by more than the spread over seeds; at a
# rate of 3 it is behind. Each at its best rate they are equal within the spread. So a
# comparison at one rate would have said whatever one likes, which is why a study of
# rates is worth one line. One data set, one split and three seeds are a first look;
# [all methods compared](../comparison.md) has more.
#
# ## Where to go from here
#
# - [Your own method](your_own_method.ipynb) in thirty lines, with a check of everything
#   that a method must get right.
# - The same from the command line, with checkpoints, reports and 46 methods:
#   `fedjax-core train --help`.
# - [Concepts](../concepts.md): populations, cohorts, client programs, execution plans.
# - [Methods](../methods/index.md), a page each.
