"""The workloads' models in JAX, as this library, the naive round and FedJAX train them."""

from functools import partial

import flax.linen as nn
import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

import models
from benchmarks.peers.workloads import Parameters, Workload
from models import Model, losses
from models.convolution import max_pool_2x2


class _PflCNN(nn.Module):
    num_classes: int
    dropout: bool
    convolution: str

    @nn.compact
    def __call__(self, x, train):
        conv = partial(
            nn.Conv,
            kernel_size=(3, 3),
            padding="VALID",
            conv_general_dilated=models.convolution.convolution(self.convolution),
        )
        drop = partial(nn.Dropout, deterministic=not (train and self.dropout))
        x = nn.relu(conv(32, name="conv_0")(x))
        x = drop(0.25)(nn.relu(max_pool_2x2(conv(64, name="conv_1")(x))))
        x = drop(0.5)(nn.relu(nn.Dense(128, name="dense")(x.reshape(x.shape[0], -1))))
        return nn.Dense(self.num_classes, name="head")(x)


def pfl_cnn(num_classes: int, dropout: bool, convolution: str) -> Model:
    """The CNN of pfl's CIFAR-10 benchmark; `features` is not there."""
    module = _PflCNN(num_classes, dropout, convolution)

    def apply(params, x, key=None):
        rngs = None if key is None else {"dropout": key}
        return module.apply({"params": params}, x, key is not None, rngs=rngs)

    return Model(lambda key: module.init(key, np.zeros((1, 32, 32, 3), np.float32), False)["params"], apply, None)


def make_model(workload: Workload, dropout: bool, convolution: str = "auto") -> Model:
    """The model; `convolution` as in `models.convolution.convolution`."""
    if workload.kind == "pfl-cifar10":
        return pfl_cnn(workload.num_classes, dropout, convolution)
    if workload.kind == "lstm":
        return models.char_lstm(workload.num_classes)
    if workload.kind == "transformer":
        return models.transformer(
            workload.num_classes, workload.shape[0], num_layers=2, dim=128, num_heads=workload.num_heads
        )
    if workload.kind == "gpt":
        return models.transformer(
            workload.num_classes, workload.shape[0], num_layers=12, dim=768, num_heads=workload.num_heads
        )
    if workload.kind in ("cnn", "resnet"):
        factory = models.cnn if workload.kind == "cnn" else models.resnet18_gn
        return factory(workload.shape, workload.num_classes, convolution=convolution)
    factory = models.logistic_regression if workload.kind == "logistic" else models.mlp
    return factory(workload.shape, workload.num_classes)


def make_loss(workload: Workload, model: Model) -> losses.LossFn:
    """One loss for each example."""
    return (losses.sequence_cross_entropy if workload.is_text else losses.cross_entropy)(model)


def load(model: Model, parameters: Parameters):
    """The parameters as the model takes them."""
    params = unflatten_dict({tuple(path.split("/")): jax.numpy.asarray(leaf) for path, leaf in parameters.items()})
    expected = jax.eval_shape(model.init, jax.random.key(0))
    found, wanted = (jax.tree.map(np.shape, tree) for tree in (params, expected))
    assert found == wanted, f"the workload's parameters are {found}, the model's {wanted}"
    return params


def unload(params) -> Parameters:
    """The model's parameters by path."""
    return {"/".join(path): np.asarray(leaf) for path, leaf in flatten_dict(params).items()}


def versions() -> dict[str, str]:
    import flax
    import optax

    return {"jax": jax.__version__, "flax": flax.__version__, "optax": optax.__version__}
