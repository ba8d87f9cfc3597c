"""Other starts for a model than those of its layers."""

import math

import jax
import jax.numpy as jnp
from jax.tree_util import keystr, tree_flatten_with_path, tree_unflatten

from fedjax_core import Key, Params
from models._common import Model


def uniform(model: Model) -> Model:
    """The model with weights and biases that start uniform in +-1 / sqrt(fan in), as those of PyTorch's layers do.

    The fan in of a layer is the number of values that one of its outputs is a weighted sum of. flax starts weights
    normal with variance 1 / fan in, three times this one's, and biases at zero.

    Args:
      model: of dense and convolution layers alone.

    Returns:
      The same model with another `init`, which raises ValueError if a parameter is not a kernel with 2 or 4 axes or its
      bias.
    """

    def init(key: Key) -> Params:
        params = model.init(key)
        leaves, treedef = tree_flatten_with_path(params)
        shapes = {keystr(path, simple=True, separator="/"): jnp.shape(leaf) for path, leaf in leaves}

        def bound(path: str) -> float:
            layer, _, name = path.rpartition("/")
            kernel = shapes.get(f"{layer}/kernel", ())
            if name not in ("kernel", "bias") or len(kernel) not in (2, 4):
                raise ValueError(
                    f"parameter {path!r} of shape {list(shapes[path])} belongs to no dense or convolution layer: start "
                    "this model as it is"
                )
            return 1 / math.sqrt(math.prod(kernel[:-1]))

        bounds = [bound(path) for path in shapes]
        keys = jax.random.split(jax.random.fold_in(key, 1), len(leaves))
        started = [
            jax.random.uniform(own, leaf.shape, leaf.dtype, -a, a)
            for own, (_, leaf), a in zip(keys, leaves, bounds, strict=True)
        ]
        return tree_unflatten(treedef, started)

    return model._replace(init=init)
