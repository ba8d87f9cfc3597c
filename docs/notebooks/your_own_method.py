# %% [markdown]
# # Your own method
#
# What a new method is, in full: the idea, its update in code, the check that it is a
# correct federated method, and a first study of its own parameter.
#
# **The idea.** SCAFFOLD corrects every local step by a control: what all clients'
# gradients are on average, minus what the client's own is. A client's control is the
# mean gradient of its last round alone, which is noisy if it takes few steps. We smooth
# it: with a factor beta, the new control is (1 - beta) old + beta new. With beta = 1
# this is SCAFFOLD, so we know what must come out there.

# %%
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import algorithms
import fedjax_core as fc
from fedjax_core import testing
from pipelines.data import datasets
from pipelines.federation import partition

# %% [markdown]
# ## The method
#
# `fc.local_descent` is a client that takes steps of an optimizer along a direction, and
# `fc.federated` makes a method of a first state and an update. Batches, masks, unequal
# clients, random keys, lanes, devices, metrics and rounds without participants
# are not the method's business. What is in a `ClientTable` belongs to clients: one row
# each.


# %%
class SmoothedState(NamedTuple):
    """Global model x, the mean c of the controls, every client's control c_i."""

    params: fc.Params
    control: fc.Params
    client_controls: fc.ClientTable
    round: fc.Counter = 0


def smoothed(loss_fn, client_optimizer, *, num_clients, beta=0.5, **local):
    """Smoothed SCAFFOLD: controls that remember more than one round.

    Client, from y = x:  y <- y - lr (g_i(y) + c - c_i), K times;
                         c_i+ = (1 - beta) c_i + beta mean of the g_i(y).
    Server:              x <- x + mean_S (y_i - x);
                         c <- c + (1 / N) sum_S (c_i+ - c_i).
    """
    clients = fc.local_training(**local)
    gradient = fc.value_and_grad(loss_fn)

    def init(params):
        zeros = optax.tree.zeros_like(params)
        return SmoothedState(params, zeros, fc.client_table(num_clients, zeros))

    def direction(y, batch, shared, c_i):
        _, c = shared
        loss, g = gradient(y, batch)
        corrected = jax.tree.map(lambda g, c, c_i: g + c - c_i, g, c, c_i)
        return loss, corrected, g  # of the third, local_descent takes the mean

    def upload(done, shared):
        x, _ = shared
        change = jax.tree.map(lambda g, c_i: beta * (g - c_i), done.mean, done.own)
        # To the server, and to the client's row of the table.
        return (optax.tree.sub(done.params, x), change), optax.tree.add(
            done.own, change
        )

    def update(state, cohort, key):
        program = fc.local_descent(
            client_optimizer,
            direction,
            start=fc.first_part,  # of what is sent down, the model
            upload=upload,
            with_mean=True,
        )
        shared = state.params, state.control
        own = fc.gather(state.client_controls, cohort)
        results = clients.run(program, shared, cohort, key, client_inputs=own)
        moved, change = results.aggregate  # means over the cohort
        share = jnp.sum(results.weights) / num_clients  # of all clients, the cohort
        state = state._replace(
            params=optax.tree.add(state.params, moved),
            control=fc.add_scaled(state.control, share, change),
            client_controls=fc.scatter(state.client_controls, cohort, results.outputs),
        )
        return state, results

    return fc.federated(init, update)


# %% [markdown]
# ## Is it right?
#
# `check_algorithm` runs the method on a small problem and compares it with a plain
# Python loop over clients, in float64 to 1e-12: unequal clients, partial participation,
# empty slots, lanes and devices, `vmap` over seeds and over `beta`, state that is saved
# or kept in host memory, float32. A mistake is an error that says which property is
# missing.

# %%
problem = testing.classification()


def make(*, beta=0.5, **options):
    return smoothed(
        problem.loss_fn,
        optax.sgd(0.1),
        num_clients=7,
        beta=beta,
        batch_size=4,
        **options,
    )


testing.check_algorithm(make, problem, floats={"beta": 0.5})
print("smoothed SCAFFOLD is a correct federated method")

# %% [markdown]
# What does a mistake look like? Here the server takes a plain mean over all slots of
# the cohort, whether a client is in them or not:


# %%
def careless(loss_fn, client_optimizer, **local):
    """FedAvg, but for a mistake in the mean."""
    clients = fc.local_training(**local)
    gradient = fc.value_and_grad(loss_fn)

    def upload(done, x):
        moved = optax.tree.sub(done.params, x)
        return moved, moved

    def update(state, cohort, key):
        program = fc.local_descent(client_optimizer, gradient, upload=upload)
        results = clients.run(program, state.params, cohort, key)
        moved = jax.tree.map(lambda leaf: leaf.mean(0), results.outputs)
        return state._replace(params=optax.tree.add(state.params, moved)), results

    return fc.federated(fc.ModelState, update)


def make_careless(**options):
    return careless(problem.loss_fn, optax.sgd(0.1), batch_size=4, **options)


try:
    testing.check_algorithm(make_careless, problem)
except AssertionError as error:
    print(error)

# %% [markdown]
# ## Does it help?
#
# Logistic regression on handwritten digits, fifty clients with most of their examples
# in two or three classes, ten of them in a round with five local steps. `beta` is a
# number like any other: one `vmap` runs all its values, and several seeds, at once.

# %%
digits = datasets.load("digits")
assignment = partition.dirichlet(digits.train["y"], 50, alpha=0.1, seed=0)
population = partition.federate(digits, assignment)


def loss_fn(params, batch, key=None):
    logits = batch["x"].reshape(-1, 64) @ params["w"] + params["b"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])


params = {"w": jnp.zeros((64, 10)), "b": jnp.zeros(10)}
sampler = fc.samplers.uniform(50, 10)
local = {"num_clients": 50, "batch_size": 10, "num_steps": 5}


def losses(method, key, population):
    """Training loss over all examples after every fifth round, float[20]."""
    five_rounds = fc.continue_rounds(method, sampler, 5)

    def step(state, _):
        state, _ = five_rounds(state, population, key)
        loss = fc.evaluate(loss_fn, method.params(state), population.examples)
        return state, loss

    return jax.lax.scan(step, method.init(params), length=20)[1]


def with_beta(beta, key, population):
    method = smoothed(loss_fn, optax.sgd(0.3), beta=beta, **local)
    return losses(method, key, population)


betas = jnp.array([0.1, 0.3, 1.0])
keys = jax.random.split(jax.random.key(1), 4)
study = jax.jit(jax.vmap(jax.vmap(with_beta, (None, 0, None)), (0, None, None)))
found = study(betas, keys, population)  # [betas, seeds, 20]

# %%
figure, axis = plt.subplots(
    figsize=(5, 2.8), layout="constrained", num="Training loss against rounds by beta"
)
rounds = np.arange(5, 101, 5)
for beta, curves in zip(betas, np.asarray(found), strict=True):
    axis.plot(rounds, curves.mean(0), label=f"beta = {beta:.1f}")
    axis.fill_between(rounds, curves.min(0), curves.max(0), alpha=0.2)
axis.set(xlabel="round", ylabel="training loss", yscale="log")
legend = axis.legend(frameon=False)
for beta, curves in zip(betas, np.asarray(found), strict=True):
    last = curves[:, -1]
    print(f"beta {beta:.1f}: loss {last.mean():.3f} ± {last.std(ddof=1):.3f}")

# %% [markdown]
# And with beta = 1 it must be SCAFFOLD, number for number:

# %%
scaffold = algorithms.scaffold(loss_fn, optax.sgd(0.3), **local)
theirs = jax.jit(losses, static_argnums=0)(scaffold, keys[0], population)
np.testing.assert_allclose(found[2, 0], theirs, rtol=1e-3)
print("with beta = 1 it is SCAFFOLD")

# %% [markdown]
# So it does not help: the smaller beta is, the older the controls are, and here that
# costs more than their noise does. That is a result too, on one problem, and it took a
# minute. What would one do next?
#
# - Look where controls are noisier (`num_steps=1`, `batch_size=1`) or older (more clients).
# - Compare on other data and with other methods: `fedjax-core train --method
#   my_methods:smoothed --method scaffold` takes the function from a file of yours
#   ([your own method, model and data](../own.md)), with checkpoints and a report.
# - [Concepts](../concepts.md) explains the parts, and the
#   [reference](../reference/core.md) has all of them.
