"""Vision transformers: ViT and DINOv2."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from fedjax_core import Array, checks
from models._common import (
    PARAM_DTYPE,
    Model,
    Staged,
    Tokens,
    build,
    check_image_shape,
    check_inputs,
    check_positive,
    plain,
)
from models.pretrained import _encoder as encoder
from models.pretrained._weights import Table

_NEEDED = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "image_size",
    "patch_size",
    "num_channels",
    "layer_norm_eps",
    "hidden_act",
)
_ONLY = {"hidden_act": tuple(encoder.ACTIVATIONS)}


class _Embed(nn.Module):
    """[B, H, W, C] -> [B, 1 + N, dim]: a class token, and the N patches in rows, with their positions."""

    dim: int
    patch: int
    trained_on: int  # patches along a side of the images of the checkpoint
    dropout: float
    parameter_groups: ClassVar = {"embedding": ("cls", "position")}

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        B, H, W, C = x.shape
        rows, columns, p = H // self.patch, W // self.patch, self.patch
        # A convolution whose stride is its size is a product of patches and one matrix.
        patches = x.reshape(B, rows, p, columns, p, C).transpose(0, 1, 3, 2, 4, 5).reshape(B, rows * columns, p * p * C)
        y = nn.Dense(self.dim, param_dtype=PARAM_DTYPE, name="patch")(patches)
        normal = nn.initializers.normal(0.02)
        cls = self.param("cls", normal, (self.dim,), PARAM_DTYPE)
        position = self.param("position", normal, (1 + self.trained_on**2, self.dim), PARAM_DTYPE)
        if (rows, columns) != (self.trained_on, self.trained_on):
            position = _resized(position, self.trained_on, rows, columns)
        y = jnp.concatenate([jnp.broadcast_to(cls.astype(y.dtype), (B, 1, self.dim)), y], axis=1)
        return nn.Dropout(self.dropout)(y + position, deterministic=not train)


def _resized(position: Array, trained_on: int, rows: int, columns: int) -> Array:
    """Positions [1 + n n, d] for a grid of other size, [1 + rows columns, d]; that of the class token stays."""
    grid = position[1:].reshape(trained_on, trained_on, -1)
    down, across = (jnp.asarray(_bicubic(trained_on, size), position.dtype) for size in (rows, columns))
    grid = jnp.einsum("ri,cj,ijd->rcd", down, across, grid)
    return jnp.concatenate([position[:1], grid.reshape(rows * columns, -1)])


def _bicubic(size: int, target: int) -> np.ndarray:
    """[target, size]: bicubic interpolation with a = -0.75 that repeats the border, as the checkpoints' code does it.

    (`jax.image.resize` has a = -0.5.)
    """
    a = -0.75
    center = (np.arange(target) + 0.5) * size / target - 0.5
    weights = np.zeros((target, size))
    for offset in range(-1, 3):
        at = np.floor(center) + offset
        t = np.abs(center - at)
        near = (a + 2) * t**3 - (a + 3) * t**2 + 1
        far = a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a
        index = np.clip(at, 0, size - 1).astype(int)
        np.add.at(weights, (np.arange(target), index), np.where(t <= 1, near, far))
    return weights


class _ViT(Staged):
    embedding: tuple[int, int, int, float]
    num_layers: int
    block_settings: tuple[tuple[str, Any], ...]
    epsilon: float
    num_classes: int
    with_mean: bool

    def setup(self) -> None:
        self.embed = _Embed(*self.embedding)
        self.block = [encoder.Block(**dict(self.block_settings)) for _ in range(self.num_layers)]
        self.norm = encoder.norm(self.epsilon)
        self.head = nn.Dense(self.num_classes, kernel_init=nn.initializers.zeros, param_dtype=PARAM_DTYPE)

    def stages(self) -> dict[str, Callable[[Any, bool], Any]]:
        return {
            "embed": lambda x, train: Tokens(self.embed(x, train)),
            **{f"block_{i}": block for i, block in enumerate(self.block)},
            "norm": lambda x, _: x._replace(values=self.norm(x.values)),
            "pool": plain(self.pool),
            "head": plain(self.head),
        }

    def pool(self, x: Tokens) -> Array:
        cls, patches = x.values[:, 0], x.values[:, 1:]
        return jnp.concatenate([cls, jnp.mean(patches, axis=1)], axis=-1) if self.with_mean else cls


def vit(
    config: Mapping[str, Any],
    num_classes: int,
    *,
    input_shape: Sequence[int] | None = None,
    dropout: float | None = None,
) -> Model:
    """Patches and a class token, pre-norm blocks, a final norm, a dense head that starts at zero: ViT and DINOv2.

    Dosovitskiy et al., "An Image is Worth 16x16 Words: Transformers for Image Recognition at Scale", 2021
    (https://arxiv.org/abs/2010.11929), whose features are the class token; Oquab et al., "DINOv2: Learning Robust
    Visual Features without Supervision", 2024 (https://arxiv.org/abs/2304.07193), with a factor for every channel of
    what a sublayer adds, whose features are the class token beside the mean of the patches. Images of another size than
    the checkpoint's get its positions interpolated (bicubic); the parameters stay those of the checkpoint. Dropout acts
    on the embeddings and on what each sublayer adds, not on attention weights.

    Args:
      config: the entries of a config.json of type "vit" or "dinov2".
      num_classes: K, outputs of the head.
      input_shape: (H, W, C) of one image, H and W multiples of the patch size; that of the config unless given.
      dropout: rate at training, in [0, 1); that of the config unless given.

    Returns:
      A `Model` from images [B, H, W, C], normalized as the checkpoint wants them, to logits [B, K] and features
      [B, hidden_size], or [B, 2 hidden_size] for DINOv2.

    Raises:
      ValueError: if the config lacks an entry or asks for what is not computed here, or an argument is not as above.
    """
    dino = config.get("model_type") == "dinov2"
    found = encoder.settings(config, (*_NEEDED, "mlp_ratio" if dino else "intermediate_size"), _ONLY)
    rate = float(config.get("hidden_dropout_prob", 0.0)) if dropout is None else dropout
    checks.scalar("dropout", rate, low=0, high=1, high_open=True)
    dim, patch, size = found["hidden_size"], found["patch_size"], found["image_size"]
    shape = check_image_shape(input_shape or (size, size, found["num_channels"]), smallest=patch)
    if shape[0] % patch or shape[1] % patch or shape[2] != found["num_channels"]:
        raise ValueError(
            f"input_shape must be multiples of the patch size {patch}, with {found['num_channels']} channels, got "
            f"{shape}: resize or pad the images"
        )
    gated = dino and config.get("use_swiglu_ffn", False)
    width = int(dim * found["mlp_ratio"]) if dino else found["intermediate_size"]
    block = {
        "dim": dim,
        "num_heads": found["num_attention_heads"],
        "mlp_dim": 8 * math.ceil(int(width * 2 / 3) / 8) if gated else width,
        "epsilon": found["layer_norm_eps"],
        "activation": found["hidden_act"],
        "pre_norm": True,
        "dropout": rate,
        "qkv_bias": config.get("qkv_bias", True),
        "layer_scale": dino,
        "gated": gated,
    }
    module = _ViT(
        (dim, patch, size // patch, rate),
        found["num_hidden_layers"],
        tuple(block.items()),
        found["layer_norm_eps"],
        check_positive("num_classes", num_classes),
        dino,
    )
    return build(module, (1, *shape), PARAM_DTYPE, partial(check_inputs, input_shape=shape))


def table(config: Mapping[str, Any], params: Mapping[str, Any]) -> Table:
    """Where each parameter stands in a checkpoint."""
    dino = config["model_type"] == "dinov2"
    names = Table("dinov2." if dino else "vit.", ignored=(r"pooler\..*", r"embeddings\.mask_token"))
    names.add("embed/cls", "embeddings.cls_token", "token")
    names.add("embed/position", "embeddings.position_embeddings", "tokens")
    names.add("embed/patch/kernel", "embeddings.patch_embeddings.projection.weight", "patches")
    names.add("embed/patch/bias", "embeddings.patch_embeddings.projection.bias")
    before, after = ("norm1", "norm2") if dino else ("layernorm_before", "layernorm_after")
    up, down = ("intermediate.dense", "output.dense") if not dino else ("mlp.fc1", "mlp.fc2")
    if config.get("use_swiglu_ffn", False):
        up, down = "mlp.weights_in", "mlp.weights_out"
    for i in range(config["num_hidden_layers"]):
        ours, theirs = f"block_{i}", f"encoder.layer.{i}"
        for name in ("query", "key", "value"):
            names.dense(f"{ours}/{name}", f"{theirs}.attention.attention.{name}", bias=config.get("qkv_bias", True))
        names.dense(f"{ours}/out", f"{theirs}.attention.output.dense")
        names.norm(f"{ours}/attention_norm", f"{theirs}.{before}")
        names.dense(f"{ours}/up", f"{theirs}.{up}")
        names.dense(f"{ours}/down", f"{theirs}.{down}")
        names.norm(f"{ours}/mlp_norm", f"{theirs}.{after}")
        if dino:
            names.add(f"{ours}/attention_scale", f"{theirs}.layer_scale1.lambda1")
            names.add(f"{ours}/mlp_scale", f"{theirs}.layer_scale2.lambda1")
    if dino and config.get("use_mask_token", True):
        names.zeros["embeddings.mask_token"] = (1, config["hidden_size"])
    names.norm("norm", "layernorm")
    names.dense("head", "classifier", prefix="")
    return names
