"""Federated methods as pure functions: `algorithms.fedavg(loss_fn, optax.sgd(0.1), batch_size=20)`."""

from algorithms.optimization.fedavg import fedavg, fedsgd, local_sgd
from algorithms.optimization.fedcm import fedcm
from algorithms.optimization.feddyn import feddyn
from algorithms.optimization.fedexp import fedexp
from algorithms.optimization.fednova import fednova
from algorithms.optimization.fedopt import fedadagrad, fedadam, fedavgm, fedopt, fedyogi
from algorithms.optimization.fedprox import fedprox
from algorithms.optimization.fedsam import fedasam, fedsam, mofedsam
from algorithms.optimization.scaffold import scaffold

__all__ = [
    "fedadagrad",
    "fedadam",
    "fedasam",
    "fedavg",
    "fedavgm",
    "fedcm",
    "feddyn",
    "fedexp",
    "fednova",
    "fedopt",
    "fedprox",
    "fedsam",
    "fedsgd",
    "fedyogi",
    "local_sgd",
    "mofedsam",
    "scaffold",
]
