"""A factor and a term for every channel."""

from typing import Any

import jax.numpy as jnp

from fedjax_core import Array, Key
from models._common import PARAM_DTYPE
from models.adapters._graft import Adapter, Rank


def scale_shift() -> Adapter:
    """y = scale f(x) + shift, for every output channel of a layer f, with scale 1 and shift 0 at the start.

    Lian, Zhou, Feng and Wang, "Scaling & Shifting Your Features: A New Baseline for Efficient Model Tuning", 2022
    (https://arxiv.org/abs/2210.08823), who draw the start close to 1 and 0.

    Returns:
      An `Adapter` for dense layers, convolutions and normalizations. A layer's part is {"scale": float[out], "shift":
      float[out]}; it can be merged into a layer that has a bias.
    """

    def init(key: Key, layer: Any) -> dict[str, Array]:
        outputs = layer["kernel" if "kernel" in layer else "scale"].shape[-1]
        return {"scale": jnp.ones(outputs, PARAM_DTYPE), "shift": jnp.zeros(outputs, PARAM_DTYPE)}

    def layer(part: dict[str, Array], call: Any, x: Array, key: Key | None, rank: Rank) -> Array:
        y = call(x)
        return y * part["scale"].astype(y.dtype) + part["shift"].astype(y.dtype)

    def merge(layer: Any, part: dict[str, Array], rank: Rank, sign: int) -> Any:
        weight = "kernel" if "kernel" in layer else "scale"
        if "bias" not in layer:
            raise ValueError(
                f"a layer with only {', '.join(sorted(layer))} has no bias to merge a shift into: keep the adapter "
                "apart"
            )
        if sign > 0:
            bias = layer["bias"] * part["scale"] + part["shift"]
            return {**layer, weight: layer[weight] * part["scale"], "bias": bias}
        bias = (layer["bias"] - part["shift"]) / part["scale"]
        return {**layer, weight: layer[weight] / part["scale"], "bias": bias}

    return Adapter(("dense", "convolution", "norm"), init, layer=layer, merge=merge)
