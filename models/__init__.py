"""Flax models as pure functions, with their losses and metrics; nothing here knows a client or a round."""

from models import (
    adapters,
    attention,
    capture,
    convolution,
    detection,
    groups,
    heads,
    initialization,
    losses,
    metrics,
    pretrained,
)
from models._common import Model, Tokens, map_inputs, num_parameters
from models.adapters import adapted
from models.autoencoder import autoencoder
from models.batch_norm import StatisticsModel, cnn_bn
from models.cnn import cnn
from models.dense import logistic_regression, mlp
from models.lstm import char_lstm
from models.resnet import resnet18_gn
from models.splitting import split
from models.tasks import task
from models.transformer import transformer

__all__ = [
    "Model",
    "StatisticsModel",
    "Tokens",
    "adapted",
    "adapters",
    "attention",
    "autoencoder",
    "capture",
    "char_lstm",
    "cnn",
    "cnn_bn",
    "convolution",
    "detection",
    "groups",
    "heads",
    "initialization",
    "logistic_regression",
    "losses",
    "map_inputs",
    "metrics",
    "mlp",
    "num_parameters",
    "pretrained",
    "resnet18_gn",
    "split",
    "task",
    "transformer",
]
