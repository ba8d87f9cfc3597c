"""Federated methods as pure functions: `algorithms.fedavg(loss_fn, optax.sgd(0.1), batch_size=20)`."""

from algorithms.continual.ewc import ewc
from algorithms.continual.fot import fot
from algorithms.optimization.anarchic import afa_cd, afa_cs
from algorithms.optimization.autoflip import autoflip
from algorithms.optimization.fal import fal
from algorithms.optimization.fedamd import fedamd
from algorithms.optimization.fedau import fedau, fedavg_ipw
from algorithms.optimization.fedavg import fedavg, fedsgd, local_sgd
from algorithms.optimization.fedcm import fedcm
from algorithms.optimization.feddyn import feddyn
from algorithms.optimization.fedexp import fedexp
from algorithms.optimization.fedfix import fedfix
from algorithms.optimization.fedgamma import fedgamma
from algorithms.optimization.fedld import fedld
from algorithms.optimization.fedlex import fedlex
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
from algorithms.zeroth_order.fedzo import fedprox_zo, fedzo, scaffold_zo
from algorithms.zeroth_order.fzoos import fzoos

__all__ = [
    "afa_cd",
    "afa_cs",
    "autoflip",
    "ewc",
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
    "fedld",
    "fedlex",
    "fednova",
    "fedopt",
    "fedprox",
    "fedprox_zo",
    "fedsam",
    "fedsgd",
    "fedsmoo",
    "fedspeed",
    "fedstale",
    "fedvarp",
    "fedyogi",
    "fedzo",
    "fot",
    "fzoos",
    "local_sgd",
    "mifa",
    "mime",
    "mimelite",
    "mofedsam",
    "moon",
    "scaffold",
    "scaffold_m",
    "scaffold_m_vr",
    "scaffold_zo",
]
