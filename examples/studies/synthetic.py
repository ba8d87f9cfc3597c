"""FedProx's synthetic(alpha, beta) federations: 30 clients whose data and whose rule both differ.

Client k draws how far it is from the others, u_k ~ N(0, alpha^2) and B_k ~ N(0, beta^2), then a rule and inputs:

    W_k, b_k ~ N(u_k, 1);  v_k ~ N(B_k, 1);  x ~ N(v_k, diag(j^-1.2));  y = argmax(W_k x + b_k)

with 60 inputs, 10 classes and 50 + exp(N(4, 2^2)) examples. (Li et al., "Federated Optimization in Heterogeneous
Networks", 2020. Its text says that u_k and B_k have the variances alpha and beta; the release takes these for standard
deviations, as here, which is the same for 0 and 1.)
"""

import numpy as np

from pipelines.data import sources

CLIENTS, INPUTS, CLASSES = 30, 60, 10


def _made(alpha: float, beta: float, seed: int = 0):
    rng = np.random.default_rng([seed, 30])
    sizes = rng.lognormal(4, 2, CLIENTS).astype(int) + 50
    shift, center = rng.normal(0, alpha, CLIENTS), rng.normal(0, beta, CLIENTS)
    deviation = np.arange(1, INPUTS + 1) ** -0.6
    x, y = [], []
    for client, size in enumerate(sizes):
        mean = rng.normal(center[client], 1, INPUTS)
        weights = rng.normal(shift[client], 1, (INPUTS, CLASSES))
        bias = rng.normal(shift[client], 1, CLASSES)
        x.append(mean + deviation * rng.standard_normal((size, INPUTS)))
        y.append(np.argmax(x[-1] @ weights + bias, axis=1))
    return np.concatenate(x).astype(np.float32), np.concatenate(y), np.repeat(np.arange(CLIENTS), sizes)


def _dataset(alpha: float, beta: float):
    x, y, groups = _made(alpha, beta)
    # A tenth of each client's examples is held out, as in the release.
    out = np.zeros(len(y), bool)
    for client in range(CLIENTS):
        rows = np.flatnonzero(groups == client)
        out[rows[int(0.9 * len(rows)) :]] = True
    return sources.from_arrays(
        x[~out],
        y[~out].astype(np.int32),
        test=(x[out], y[out].astype(np.int32)),
        groups=groups[~out],
        test_groups=groups[out],
        name=f"synthetic({alpha:g}, {beta:g})",
        num_classes=CLASSES,
    )


def zero():
    """synthetic(0, 0)."""
    return _dataset(0, 0)


def half():
    """synthetic(0.5, 0.5)."""
    return _dataset(0.5, 0.5)


def one():
    """synthetic(1, 1)."""
    return _dataset(1, 1)
