"""The bottleneck adapter."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fedjax_core import Array, Key
from models._common import PARAM_DTYPE, check_positive
from models.adapters._graft import Adapter, Rank


def bottleneck(width: int, *, activation: Callable[[Array], Array] = jax.nn.gelu) -> Adapter:
    """h + activation(h D + d) U + u behind a dense layer with outputs h; U and u are zero at the start.

    Houlsby et al., "Parameter-Efficient Transfer Learning for NLP", 2019 (https://arxiv.org/abs/1902.00751). Behind
    the perceptron of every block of a transformer: `where=re.compile(r"block_[0-9]+/down/kernel")`; that is
    2 d width + width + d parameters in a block of width d.

    Args:
      width: of the perceptron.
      activation: of it.

    Returns:
      An `Adapter` for dense layers. A layer's part is {"down": {"kernel": float[out, width], "bias": float[width]},
      "up": {"kernel": float[width, out], "bias": float[out]}}; it cannot be merged.
    """
    width = check_positive("width", width)

    def init(key: Key, layer: Any) -> dict[str, dict[str, Array]]:
        outputs = layer["kernel"].shape[-1]
        down = jax.nn.initializers.lecun_normal()(key, (outputs, width), PARAM_DTYPE)
        return {
            "down": {"kernel": down, "bias": jnp.zeros(width, PARAM_DTYPE)},
            "up": {"kernel": jnp.zeros((width, outputs), PARAM_DTYPE), "bias": jnp.zeros(outputs, PARAM_DTYPE)},
        }

    def layer(part: dict[str, Any], call: Any, x: Array, key: Key | None, rank: Rank) -> Array:
        h = call(x)
        hidden = activation(h @ part["down"]["kernel"] + part["down"]["bias"])
        return h + (hidden @ part["up"]["kernel"] + part["up"]["bias"]).astype(h.dtype)

    return Adapter(("dense",), init, layer=layer)
