"""Federated methods as pure functions: `algorithms.fedavg(loss_fn, optax.sgd(0.1), batch_size=20)`."""

from algorithms.optimization.anarchic import afa_cd, afa_cs
from algorithms.optimization.fal import fal
from algorithms.optimization.fedamd import fedamd
from algorithms.optimization.fedau import fedau, fedavg_ipw
from algorithms.optimization.fedavg import fedavg, fedsgd, local_sgd
from algorithms.optimization.fedcm import fedcm
from algorithms.optimization.feddyn import feddyn
from algorithms.optimization.fedexp import fedexp
from algorithms.optimization.fedfix import fedfix
from algorithms.optimization.fedgamma import fedgamma
from algorithms.optimization.fednova import fednova
from algorithms.optimization.fedopt import fedadagrad, fedadam, fedavgm, fedopt, fedyogi
from algorithms.optimization.fedprox import fedprox
from algorithms.optimization.fedsam import fedasam, fedsam, mofedsam
from algorithms.optimization.fedsmoo import fedsmoo
from algorithms.optimization.fedspeed import fedspeed
from algorithms.optimization.fedstale import fedstale, fedvarp
from algorithms.optimization.mifa import mifa
from algorithms.optimization.mime import mime, mimelite
from algorithms.optimization.momentum import fedavg_m, fedavg_m_vr, scaffold_m, scaffold_m_vr
from algorithms.optimization.moon import moon
from algorithms.optimization.scaffold import scaffold

__all__ = [
    "afa_cd",
    "afa_cs",
    "fal",
    "fedadagrad",
    "fedadam",
    "fedamd",
    "fedasam",
    "fedau",
    "fedavg",
    "fedavg_ipw",
    "fedavg_m",
    "fedavg_m_vr",
    "fedavgm",
    "fedcm",
    "feddyn",
    "fedexp",
    "fedfix",
    "fedgamma",
    "fednova",
    "fedopt",
    "fedprox",
    "fedsam",
    "fedsgd",
    "fedsmoo",
    "fedspeed",
    "fedstale",
    "fedvarp",
    "fedyogi",
    "local_sgd",
    "mifa",
    "mime",
    "mimelite",
    "mofedsam",
    "moon",
    "scaffold",
    "scaffold_m",
    "scaffold_m_vr",
]
