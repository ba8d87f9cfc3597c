"""Prompt tokens: learned vectors before those of a text or an image."""

from typing import Any

import jax
import jax.numpy as jnp

from fedjax_core import Array, Key, Params, checks
from models._common import PARAM_DTYPE, Tokens
from models.adapters._graft import Adapter


def prompt(num_tokens: int, *, deep: bool = False, bound: float = 0.1) -> Adapter:
    """P learned tokens in a transformer, which its blocks see beside the real ones.

    They join at the end of the stage "embed" and leave before the one behind the last block, so that pooling, the head
    and the shapes of the outputs do not know of them; what stands between the blocks has P more tokens, the first ones.
    Where a token stands makes no difference to attention that sees all of them; a causal decoder sees the prompt before
    everything. Jia et al., "Visual Prompt Tuning", 2022 (https://arxiv.org/abs/2203.12119), whose deep form has tokens
    of its own before each block and drops them behind it; for texts Lester, Al-Rfou and Constant, "The Power of Scale
    for Parameter-Efficient Prompt Tuning", 2021 (https://arxiv.org/abs/2104.08691).

    Args:
      num_tokens: P; 0 leaves the model as it is.
      deep: tokens for each block.
      bound: they start uniform in +-bound.

    Returns:
      An `Adapter` for models with the stages "embed" and "block_0", "block_1", ...: transformers, pretrained or not.
      The adapter is {"embed": float[P, d]}, or if deep {"block_0": float[P, d], ...}; it cannot be merged.
    """
    num_tokens = checks.count("num_tokens", num_tokens, "pass a number of tokens")
    checks.scalar("bound", bound, low=0)

    def init(key: Key, shapes: Params, stages: tuple[str, ...]) -> dict[str, Array]:
        blocks = _blocks(stages)
        dim = shapes["block_0"]["query"]["kernel"].shape[0]
        names = blocks if deep else ["embed"]
        keys = jax.random.split(key, len(names))
        return {
            name: jax.random.uniform(own, (num_tokens, dim), PARAM_DTYPE, -bound, bound)
            for name, own in zip(names, keys, strict=True)
        }

    def stage(adapter: Params, run: Any, x: Any, number: int, stages: tuple[str, ...]) -> Any:
        name, blocks = stages[number], _blocks(stages)
        if deep:
            return _dropped(run(_joined(x, adapter[name])), num_tokens) if name in blocks else run(x)
        if name == "embed":
            return _joined(run(x), adapter["embed"])
        behind = number == stages.index(blocks[-1]) + 1
        return run(_dropped(x, num_tokens) if behind else x)

    return Adapter((), init, stage=stage)


def _blocks(stages: tuple[str, ...]) -> list[str]:
    blocks = [name for name in stages if name.startswith("block_")]
    if "embed" not in stages or not blocks:
        raise ValueError(
            f"prompt tokens need a transformer, with stages embed, block_0, ...; this model has {', '.join(stages)}"
        )
    return blocks


def _joined(x: Tokens, tokens: Array) -> Tokens:
    values = jnp.broadcast_to(tokens.astype(x.values.dtype), (x.values.shape[0], *tokens.shape))
    mask = x.mask if x.mask is None else jnp.concatenate([jnp.ones(values.shape[:2], bool), x.mask], 1)
    return Tokens(jnp.concatenate([values, x.values], 1), mask)


def _dropped(x: Tokens, count: int) -> Tokens:
    return Tokens(x.values[:, count:], x.mask if x.mask is None else x.mask[:, count:])
