"""LoRA: a low-rank change of dense layers."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from fedjax_core import Array, Hole, Key, checks
from models._common import PARAM_DTYPE, check_positive
from models.adapters._graft import Adapter, Rank

_SCALINGS = ("rank", "root", "constant")


def lora(rank: int, *, alpha: float | Array = 16.0, scaling: str = "rank", dropout: float = 0.0) -> Adapter:
    """y = x W + b + s (x A) B, with A [in, r] uniform in +-1 / sqrt(in) and B [r, out] zero at the start.

    Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2022 (https://arxiv.org/abs/2106.09685). The scale
    that keeps the size of the change at larger ranks: Kalajdzievski, "A Rank Stabilization Scaling Factor for
    Fine-Tuning with LoRA", 2023 (https://arxiv.org/abs/2312.03732).

    Clients of different ranks share one compiled step: all have `rank` columns, and a client of rank r uses the first r
    (`rank=r` in `Adapted.apply` and the others), with the scale s of its own rank. The rest is masked in the forward
    pass, so it gets no gradient; `Adapted.limit(updates, r)` keeps an optimizer from moving it.

    Args:
      rank: r, the largest rank of any client.
      alpha: strength; may be traced.
      scaling: what s is: "rank" for alpha / r, "root" for alpha / sqrt(r), "constant" for alpha.
      dropout: rate at training of the inputs of A, in [0, 1).

    Returns:
      An `Adapter` for dense layers. A layer's part is {"A": float[in, r], "B": float[r, out]}; it can be merged.
    """
    most = check_positive("rank", rank)
    checks.scalar("alpha", alpha)
    checks.one_of("scaling", scaling, _SCALINGS)
    checks.scalar("dropout", dropout, low=0, high=1, high_open=True)

    def init(key: Key, layer: Any) -> dict[str, Array]:
        width, outputs = layer["kernel"].shape
        bound = 1 / math.sqrt(width)
        a = jax.random.uniform(key, (width, most), PARAM_DTYPE, -bound, bound)
        return {"A": a, "B": jnp.zeros((most, outputs), PARAM_DTYPE)}

    def scale(rank: Rank) -> Any:
        if rank is not None and checks.is_concrete(rank) and not 1 <= int(rank) <= most:
            raise ValueError(f"rank must lie in 1..{most}, the ranks that the adapter has, got {rank}: lower it")
        used = most if rank is None else rank
        return {"rank": alpha / used, "root": alpha / used**0.5, "constant": alpha}[scaling]

    def limit(part: dict[str, Any], rank: Rank) -> dict[str, Any]:
        if rank is None:
            return part
        scale(rank)  # checks it
        mask = jnp.arange(most) < rank
        masks = {"A": mask, "B": mask[:, None]}
        # One of the two may be in another part of the tree, as where A is frozen.
        return {
            name: leaf if isinstance(leaf, Hole) else jnp.where(masks[name], leaf, 0) for name, leaf in part.items()
        }

    def layer(part: dict[str, Array], call: Any, x: Array, key: Key | None, rank: Rank) -> Array:
        y, part = call(x), limit(part, rank)
        if key is not None and dropout:
            x = jnp.where(jax.random.bernoulli(key, 1 - dropout, x.shape), x / (1 - dropout), 0)
        return y + (jnp.asarray(scale(rank), y.dtype) * ((x @ part["A"]) @ part["B"])).astype(y.dtype)

    def merge(layer: Any, part: dict[str, Array], rank: Rank, sign: int) -> Any:
        part, kernel = limit(part, rank), layer["kernel"]
        change = jnp.asarray(sign * scale(rank), kernel.dtype) * (part["A"] @ part["B"])
        return {**layer, "kernel": kernel + change.astype(kernel.dtype)}

    return Adapter(("dense",), init, layer=layer, merge=merge, limit=limit)
