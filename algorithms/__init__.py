"""Federated methods as pure functions: `algorithms.fedavg(loss_fn, optax.sgd(0.1), batch_size=20)`."""

from algorithms.averaging.fedavg import fedavg, fedsgd, local_sgd
from algorithms.averaging.fedexp import fedexp
from algorithms.averaging.fednova import fednova
from algorithms.averaging.fedopt import fedadagrad, fedadam, fedavgm, fedopt, fedyogi
from algorithms.continual.ewc import ewc
from algorithms.continual.fot import fot
from algorithms.distillation.feddf import FedDFData as FedDFData
from algorithms.distillation.feddf import feddf
from algorithms.drift.fedcm import fedcm
from algorithms.drift.feddyn import feddyn
from algorithms.drift.fedld import fedld
from algorithms.drift.fedprox import fedprox
from algorithms.drift.fedspeed import fedspeed
from algorithms.drift.mime import mime, mimelite
from algorithms.drift.momentum import fedavg_m, fedavg_m_vr, scaffold_m, scaffold_m_vr
from algorithms.drift.moon import moon
from algorithms.drift.scaffold import scaffold
from algorithms.exploration.autoflip import autoflip
from algorithms.exploration.fedlex import fedlex
from algorithms.finetuning.fedlora import fedlora
from algorithms.finetuning.sfprompt import sfprompt
from algorithms.heterogeneous.fedgh import fedgh
from algorithms.participation.anarchic import afa_cd, afa_cs
from algorithms.participation.fedamd import fedamd
from algorithms.participation.fedau import fedau, fedavg_ipw
from algorithms.participation.fedfix import fedfix
from algorithms.participation.fedstale import fedstale, fedvarp
from algorithms.participation.mifa import mifa
from algorithms.personalization.apfl import apfl
from algorithms.personalization.baselines import fedavg_ft, local_only
from algorithms.personalization.ccvr import ccvr
from algorithms.personalization.cfl import cfl
from algorithms.personalization.ditto import ditto
from algorithms.personalization.fedbn import fedbn
from algorithms.personalization.fedetf import fedetf
from algorithms.personalization.fedgela import fedgela
from algorithms.personalization.fedloge import fedloge
from algorithms.personalization.fedper import fedper, lg_fedavg
from algorithms.personalization.fedrep import fedrep
from algorithms.personalization.fedrod import fedrod
from algorithms.personalization.ifca import ifca
from algorithms.personalization.ocfl import ocfl
from algorithms.personalization.per_fedavg import per_fedavg
from algorithms.personalization.pfedme import pfedme
from algorithms.robustness.fal import fal
from algorithms.robustness.fedagain import fedagain
from algorithms.robustness.frl import frl
from algorithms.sharpness.fedgamma import fedgamma
from algorithms.sharpness.fedsam import fedasam, fedsam, mofedsam
from algorithms.sharpness.fedsmoo import fedsmoo
from algorithms.zeroth_order.fedzo import fedprox_zo, fedzo, scaffold_zo
from algorithms.zeroth_order.fzoos import FZooSQueries as FZooSQueries
from algorithms.zeroth_order.fzoos import FZooSSurrogate as FZooSSurrogate
from algorithms.zeroth_order.fzoos import fzoos

__all__ = [
    "afa_cd",
    "afa_cs",
    "apfl",
    "autoflip",
    "ccvr",
    "cfl",
    "ditto",
    "ewc",
    "fal",
    "fedadagrad",
    "fedadam",
    "fedagain",
    "fedamd",
    "fedasam",
    "fedau",
    "fedavg",
    "fedavg_ft",
    "fedavg_ipw",
    "fedavg_m",
    "fedavg_m_vr",
    "fedavgm",
    "fedbn",
    "fedcm",
    "feddf",
    "feddyn",
    "fedetf",
    "fedexp",
    "fedfix",
    "fedgamma",
    "fedgela",
    "fedgh",
    "fedld",
    "fedlex",
    "fedloge",
    "fedlora",
    "fednova",
    "fedopt",
    "fedper",
    "fedprox",
    "fedprox_zo",
    "fedrep",
    "fedrod",
    "fedsam",
    "fedsgd",
    "fedsmoo",
    "fedspeed",
    "fedstale",
    "fedvarp",
    "fedyogi",
    "fedzo",
    "fot",
    "frl",
    "fzoos",
    "ifca",
    "lg_fedavg",
    "local_only",
    "local_sgd",
    "mifa",
    "mime",
    "mimelite",
    "mofedsam",
    "moon",
    "ocfl",
    "per_fedavg",
    "pfedme",
    "scaffold",
    "scaffold_m",
    "scaffold_m_vr",
    "scaffold_zo",
    "sfprompt",
]
