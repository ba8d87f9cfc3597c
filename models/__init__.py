"""Flax models as pure functions, with their losses and metrics; nothing here knows a client or a round."""

from models import adapters, attention, capture, convolution, groups, heads, initialization, losses, metrics, pretrained
from models._common import Model, Tokens, map_inputs, num_parameters
from models.adapters import adapted
from models.cnn import cnn
from models.dense import logistic_regression, mlp
from models.lstm import char_lstm
from models.resnet import resnet18_gn
from models.transformer import transformer

__all__ = [
    "Model",
    "Tokens",
    "adapted",
    "adapters",
    "attention",
    "capture",
    "char_lstm",
    "cnn",
    "convolution",
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
    "transformer",
]
