"""Softmax regression in plain numpy: the losses, gradients and descents that methods are compared with."""

import numpy as np

from tests.problems import softmax_params, softmax_population

SIZES = (3, 5, 0, 8, 2, 6)
POPULATION = softmax_population(SIZES)
HELD_OUT = softmax_population((2, 1, 2, 3, 2, 2), seed=5)


def start():
    return {k: np.asarray(v) for k, v in softmax_params().items()}


def client(population, i):
    return {k: np.asarray(v) for k, v in population.client(i).items()}


def loss_and_gradient(params, examples):
    """Mean loss and its gradient."""
    x, y = examples["x"], examples["y"]
    logits = x @ params["w"] + params["b"]
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    error = (p - np.eye(p.shape[1])[y]) / len(y)
    return -np.log(p[np.arange(len(y)), y]).mean(), {"w": x.T @ error, "b": error.sum(0)}


def loss(params, examples):
    return loss_and_gradient(params, examples)[0]


def hessian_times(params, examples, d):
    """The Hessian of the mean loss times a vector, written out."""
    x = examples["x"]
    logits = x @ params["w"] + params["b"]
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    moved = x @ d["w"] + d["b"]
    error = p * (moved - (p * moved).sum(1, keepdims=True)) / len(x)
    return {"w": x.T @ error, "b": error.sum(0)}


def stepped(params, direction, lr, moving=("w", "b")):
    return {k: v - lr * direction[k] if k in moving else v for k, v in params.items()}


def batches(examples, size, epochs=1):
    """In stored order, the last of an epoch smaller."""
    count = len(examples["y"])
    return [{k: v[at : at + size] for k, v in examples.items()} for _ in range(epochs) for at in range(0, count, size)]


def mean(models):
    return {k: sum(model[k] for model in models) / len(models) for k in models[0]}
