"""Small problems with known answers, shared by the tests."""

import jax
import jax.numpy as jnp
import numpy as np

from algorithms import messages
from fedjax_core import Part, Population, global_algorithm, local_training
from fedjax_core.algorithm import ModelState
from fedjax_core.clients import ClientProgram, round_metrics
from fedjax_core.testing import softmax_loss  # noqa: F401 (one of the problems)

# The quadratic test problem Q3: f_i(x) = 0.5 (x - b_i)' A_i (x - b_i).
Q3_A = np.array([[[1, 0], [0, 2]], [[2, 0.5], [0.5, 1]], [[3, 0], [0, 0.5]]], np.float64)
Q3_B = np.array([[1, 0], [-1, 2], [0, -2]], np.float64)
Q3_START = np.ones(2)
Q3_OPTIMUM = np.linalg.solve(Q3_A.sum(0), np.einsum("nij,nj->i", Q3_A, Q3_B))
FULL = np.array([[0, 1, 2]] * 3)
PART = np.array([[0, 1], [1, 2], [0, 2]])


def quadratic_loss(params, batch, key):
    d = params - batch["b"]
    return 0.5 * jnp.einsum("bi,bij,bj->b", d, batch["A"], d)


def q3_population(copies=(1, 1, 1)):
    """Q3 with client i's one example repeated: with batch size 1 and one epoch, K_i = copies[i] local steps."""
    return Population.from_clients(
        [{"A": np.repeat(Q3_A[i : i + 1], n, 0), "b": np.repeat(Q3_B[i : i + 1], n, 0)} for i, n in enumerate(copies)]
    )


def softmax_features(params, batch, key):
    return jnp.tanh(batch["x"] @ params["w"])


def softmax_params(dim=5, classes=3, dtype=np.float64, seed=0):
    rng = np.random.default_rng(seed)
    return {"w": jnp.asarray(rng.normal(size=(dim, classes)) * 0.3, dtype), "b": jnp.zeros(classes, dtype)}


def softmax_population(sizes, dim=5, classes=3, dtype=np.float64, seed=1):
    """Clients of the given sizes whose features and labels differ from client to client."""
    rng = np.random.default_rng(seed)
    clients = []
    for n in sizes:
        shift = rng.normal(size=dim)
        x = rng.normal(size=(n, dim)) + shift
        y = np.argmax(x @ rng.normal(size=(dim, classes)), 1) if n else np.zeros(0, np.int64)
        clients.append({"x": x.astype(dtype), "y": y.astype(np.int32)})
    return Population.from_clients(clients)


def assert_trees_close(actual, expected, rtol, atol=0.0):
    flat, treedef = jax.tree.flatten(actual)
    other, otherdef = jax.tree.flatten(expected)
    assert treedef == otherdef
    for a, b in zip(flat, other, strict=True):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=rtol, atol=atol)


def assert_trees_equal(actual, expected):
    flat, treedef = jax.tree.flatten(actual)
    other, otherdef = jax.tree.flatten(expected)
    assert treedef == otherdef
    for a, b in zip(flat, other, strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def reporting():
    """A method whose clients send their one example, and whose model is the average of what they send."""
    work = local_training(batch_size=1, num_steps=1)
    program = ClientProgram(
        init=lambda shared, own, key: {"a": jnp.zeros(3), "b": jnp.zeros(1)},
        step=lambda shared, carry, batch: (
            {"a": batch.examples["x"][0, :3], "b": batch.examples["x"][0, 3:]},
            jnp.zeros(()),
        ),
        final=lambda shared, carry: (carry, ()),
    )

    def round(state, cohort, key):
        results = work.run(program, (), cohort, key)
        metrics = round_metrics(results, cohort, state.params, results.aggregate)
        return ModelState(results.aggregate, state.round + 1), metrics

    return global_algorithm(lambda params: ModelState(params, jnp.int32(0)), round)


def every_part(malicious, *, top_k: float) -> dict[str, Part]:
    """Each part of `algorithms.messages` by name, with options that fit small problems.

    Args:
      malicious: bool[num_clients], for attacks.
      top_k: share of the entries that top-k sends.
    """
    return {
        "top_k": messages.top_k(top_k),
        "stochastic_rounding": messages.stochastic_rounding(16),
        "client_level_dp": messages.client_level_dp(1.0, 0.5, expected=4.0),
        "coordinate_median": messages.coordinate_median(),
        "trimmed_mean": messages.trimmed_mean(1),
        "krum": messages.krum(1, selected=2),
        "sign_flip": messages.sign_flip(malicious),
        "alie": messages.alie(malicious),
        "inner_product_manipulation": messages.inner_product_manipulation(malicious),
        "deadline": messages.deadline(9.0, seconds_per_example=0.1),
        "observed": messages.observed(),
        "rank_reversal": messages.rank_reversal(malicious),
    }


def rounds(round, state, population, cohorts):
    """The states before, between and after rounds of one key, and their metrics."""
    states, metrics = [state], []
    for ids in cohorts:
        state, info = round(states[-1], population.cohort(np.array(ids)), jax.random.key(0))
        states.append(state)
        metrics.append(info)
    return states, metrics
