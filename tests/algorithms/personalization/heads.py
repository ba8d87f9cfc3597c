"""A small network under a dense head, as a task and in NumPy with its gradients by hand, for methods about heads."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fedjax_core as fc
from tests.algorithms.personalization import plain
from tests.algorithms.personalization.plain import POPULATION, SIZES

WIDTH, CLASSES = 4, 3
COHORTS = ([0, 3, -1, 5], [1, 0, 4, 2])
LOCAL = {"batch_size": 2, "num_epochs": 2, "order": "sequential"}
SGD = optax.sgd(0.1)
COUNTS = [np.bincount(np.asarray(POPULATION.client(i)["y"]), minlength=CLASSES) for i in range(len(SIZES))]


def init(key):
    keys = jax.random.split(key)
    head = {"kernel": jax.random.normal(keys[1], (WIDTH, CLASSES)) * 0.5, "bias": jnp.arange(CLASSES) * 0.1}
    return {"body": jax.random.normal(keys[0], (5, WIDTH)) * 0.5, "head": head}


def features(params, examples, key=None, mask=None):
    return jnp.tanh(examples["x"] @ params["body"])


def head(params, z):
    return z @ params["head"]["kernel"] + params["head"]["bias"]


def loss(outputs, examples, mask):
    return optax.softmax_cross_entropy_with_integer_labels(outputs, examples["y"])


def paths(kind):
    if kind != "head":
        raise ValueError(f"no {kind}")
    return ("head",)


TASK = fc.Task(
    init,
    lambda params, examples, *, key, mask: (head(params, features(params, examples)), ()),
    loss,
    lambda outputs, examples, mask: {"accuracy": jnp.argmax(outputs, -1) == examples["y"]},
    features,
    head,
    paths,
)
MODEL = init(jax.random.key(0))

# Of a representation that is a parameter itself, so that the gradient of h can be read off a step.
FREE = fc.Task(
    lambda key: {"h": jnp.array([1.0, 0, 0]), "head": {"kernel": jnp.zeros((3, 3)), "bias": jnp.zeros(3)}},
    lambda params, examples, *, key, mask: (head(params, FREE.features(params, examples)), ()),
    loss,
    lambda outputs, examples, mask: {},
    lambda params, examples, key=None, mask=None: jnp.broadcast_to(params["h"], (len(examples["y"]), 3)),
    head,
    paths,
)


def labelled(*clients):
    """A population whose clients have these labels and nothing else."""
    return fc.Population.from_clients([{"y": np.asarray(y, np.int32)} for y in clients])


def run(method, cohorts=COHORTS, population=POPULATION, start=MODEL, key=None):
    """The state after the rounds, and the losses."""
    state, losses, round = method.init(start, key), [], compiled(method)
    for t, ids in enumerate(cohorts):
        state, metrics = round(state, population.cohort(ids), jax.random.key(t))
        losses.append(float(metrics.loss))
    return state, losses


@functools.cache
def compiled(method):
    return jax.jit(method.round)


def flat(params):
    """A model's arrays by name."""
    leaves = {"kernel": params["head"]["kernel"], "bias": params["head"]["bias"]}
    leaves |= {k: v for k, v in params.items() if k != "head"}
    return {k: np.asarray(v) for k, v in leaves.items() if not isinstance(v, fc.Hole)}


# By hand.


def softmax(logits):
    e = np.exp(logits - logits.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def cross_entropy(logits, y):
    """Mean loss, and its gradient in the logits."""
    p = softmax(logits)
    return -np.log(p[np.arange(len(y)), y]).mean(), (p - np.eye(CLASSES)[y]) / len(y)


def balanced(logits, counts):
    with np.errstate(divide="ignore"):
        return logits + np.log(counts)


def represent(model, x):
    return np.tanh(x @ model["body"])


def of_body(z, x, back):
    """The gradient of the body from that of the representation."""
    return x.T @ (back * (1 - z**2))


def of_head(z, error):
    return {"kernel": z.T @ error, "bias": error.sum(0)}


def plain_rounds(x, rows, step, lr=0.1):
    """Rounds by loops.

    Args:
      x: the model, arrays by name.
      rows: each client's own arrays by name.
      step: `step(y, v, batch, counts) -> (loss, gradient of y, gradient of v)`; what has none stays.
      lr: of both.
    """
    rows, losses = [dict(row) for row in rows], []
    for ids in COHORTS:
        ends, means = [], []
        for i in (i for i in ids if i >= 0 and SIZES[i]):
            y, seen, sizes = dict(x), [], []
            for batch in plain.batches(plain.client(POPULATION, i), 2, epochs=2):
                value, g, g_own = step(y, rows[i], batch, COUNTS[i])
                y = {k: v - lr * g[k] if k in g else v for k, v in y.items()}
                rows[i] = {k: v - lr * g_own[k] for k, v in rows[i].items()}
                seen.append(value)
                sizes.append(len(batch["y"]))
            ends.append(y)
            means.append(np.average(seen, weights=sizes))
        x = {k: sum(end[k] for end in ends) / len(ends) for k in x}
        losses.append(np.mean(means))
    return x, rows, losses
