"""BERT-like text encoders: BERT, MiniLM and whatever else has the type "bert"."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from fedjax_core import Array, checks
from models._common import PARAM_DTYPE, Model, Staged, Tokens, build, check_positive, check_tokens, embed, plain
from models.attention import mean_of_tokens
from models.pretrained import _encoder as encoder
from models.pretrained._weights import Table

POOLINGS = ("mean", "pooler", "cls")
_NEEDED = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
    "type_vocab_size",
    "layer_norm_eps",
    "hidden_act",
)
_ONLY = {
    "hidden_act": tuple(encoder.ACTIVATIONS),
    "position_embedding_type": ("absolute",),
    "is_decoder": (False,),
    "add_cross_attention": (False,),
}


class _Embed(nn.Module):
    vocab_size: int
    max_len: int
    num_types: int
    dim: int
    epsilon: float
    dropout: float

    def setup(self) -> None:
        table = partial(nn.Embed, embedding_init=nn.initializers.normal(0.02), param_dtype=PARAM_DTYPE)
        self.token, self.position = table(self.vocab_size, self.dim), table(self.max_len, self.dim)
        self.type = table(self.num_types, self.dim)
        self.norm = encoder.norm(self.epsilon)
        self.drop = nn.Dropout(self.dropout)

    def __call__(self, tokens: Array, types: Array, train: bool) -> Array:
        y = embed(self.token, tokens) + embed(self.type, types) + self.position(jnp.arange(tokens.shape[1]))
        return self.drop(self.norm(y), deterministic=not train)


class _Bert(Staged):
    embedding: tuple[int, int, int, int, float, float]
    num_layers: int
    block_settings: tuple[tuple[str, Any], ...]
    num_classes: int
    pad_token: int
    pooling: str

    def setup(self) -> None:
        self.embed = _Embed(*self.embedding)
        self.block = [encoder.Block(**dict(self.block_settings)) for _ in range(self.num_layers)]
        if self.pooling == "pooler":
            self.pooler = nn.Dense(self.embedding[3], param_dtype=PARAM_DTYPE)
        self.head = nn.Dense(self.num_classes, kernel_init=nn.initializers.zeros, param_dtype=PARAM_DTYPE)

    def stages(self) -> dict[str, Callable[[Any, bool], Any]]:
        return {
            "embed": self.embed_tokens,
            **{f"block_{i}": block for i, block in enumerate(self.block)},
            "pool": plain(self.pool),
            "head": plain(self.head),
        }

    def embed_tokens(self, x: Any, train: bool) -> Tokens:
        x = x if isinstance(x, Mapping) else {"tokens": x}
        tokens = x["tokens"]
        mask = x["mask"].astype(bool) if "mask" in x else tokens != self.pad_token
        return Tokens(self.embed(tokens, x.get("types", jnp.zeros_like(tokens)), train), mask)

    def pool(self, x: Tokens) -> Array:
        if self.pooling == "mean":
            return mean_of_tokens(x.values, x.mask)
        return x.values[:, 0] if self.pooling == "cls" else jnp.tanh(self.pooler(x.values[:, 0]))


def bert(config: Mapping[str, Any], num_classes: int, *, pooling: str = "mean", dropout: float | None = None) -> Model:
    """Token, position and segment embeddings, post-norm blocks, a pooled text, a dense head that starts at zero.

    Devlin, Chang, Lee and Toutanova, "BERT: Pre-training of Deep Bidirectional Transformers for Language
    Understanding", 2019 (https://arxiv.org/abs/1810.04805). Dropout acts on the embeddings and on what each sublayer
    adds, not on attention weights.

    Args:
      config: the entries of a config.json of type "bert".
      num_classes: K, outputs of the head.
      pooling: what the features of a text are: "mean" over its real tokens, as sentence encoders have it; "pooler", a
        dense layer and tanh on the first token, as BERT classifies; or "cls", the first token.
      dropout: rate at training, in [0, 1); that of the config unless given.

    Returns:
      A `Model` with logits [B, K] and features [B, hidden_size] from int[B, T] tokens, where padding is what holds the
      config's pad_token_id, or from {"tokens": int[B, T], "mask": bool[B, T], "types": int[B, T]}, of which the last
      two may be left out: the mask is False at padding, which is neither attended to nor part of the mean; types are
      the segments, 0 unless given. The result does not depend on how far a text was padded.

    Raises:
      ValueError: if the config lacks an entry or asks for what is not computed here, or an argument is not as above.
    """
    checks.one_of("pooling", pooling, POOLINGS)
    found = encoder.settings(config, _NEEDED, _ONLY)
    rate = float(config.get("hidden_dropout_prob", 0.0)) if dropout is None else dropout
    checks.scalar("dropout", rate, low=0, high=1, high_open=True)
    dim, epsilon, max_len = found["hidden_size"], found["layer_norm_eps"], found["max_position_embeddings"]
    block = {
        "dim": dim,
        "num_heads": found["num_attention_heads"],
        "mlp_dim": found["intermediate_size"],
        "epsilon": epsilon,
        "activation": found["hidden_act"],
        "pre_norm": False,
        "dropout": rate,
    }
    module = _Bert(
        (found["vocab_size"], max_len, found["type_vocab_size"], dim, epsilon, rate),
        found["num_hidden_layers"],
        tuple(block.items()),
        check_positive("num_classes", num_classes),
        config.get("pad_token_id") or 0,
        pooling,
    )
    return build(module, (1, 1), int, partial(_check, max_len=max_len))


def _check(x: Any, max_len: int) -> None:
    """Raise ValueError unless `x` is int[B, T], or a dict of such with the entry "tokens"."""
    if not isinstance(x, Mapping):
        return check_tokens(x, max_len)
    if "tokens" not in x or set(x) - {"tokens", "mask", "types"}:
        raise ValueError(
            f"x must have the entry 'tokens' and may have 'mask' and 'types', got {', '.join(map(repr, sorted(x)))}: "
            "rename its entries"
        )
    check_tokens(x["tokens"], max_len)
    for name in ("mask", "types"):
        if name in x and jnp.shape(x[name]) != jnp.shape(x["tokens"]):
            raise ValueError(
                f"x[{name!r}] must have the shape of the tokens, {jnp.shape(x['tokens'])}, got {jnp.shape(x[name])}"
            )
    return None


def table(config: Mapping[str, Any], params: Mapping[str, Any]) -> Table:
    """Where each parameter stands in a checkpoint."""
    names = Table("bert.", ignored=(r"embeddings\.position_ids", r"cls\..*", r"pooler\..*"))
    for ours, theirs in (("token", "word"), ("position", "position"), ("type", "token_type")):
        names.add(f"embed/{ours}/embedding", f"embeddings.{theirs}_embeddings.weight")
    names.norm("embed/norm", "embeddings.LayerNorm")
    for i in range(config["num_hidden_layers"]):
        ours, theirs = f"block_{i}", f"encoder.layer.{i}"
        for name in ("query", "key", "value"):
            names.dense(f"{ours}/{name}", f"{theirs}.attention.self.{name}")
        names.dense(f"{ours}/out", f"{theirs}.attention.output.dense")
        names.norm(f"{ours}/attention_norm", f"{theirs}.attention.output.LayerNorm")
        names.dense(f"{ours}/up", f"{theirs}.intermediate.dense")
        names.dense(f"{ours}/down", f"{theirs}.output.dense")
        names.norm(f"{ours}/mlp_norm", f"{theirs}.output.LayerNorm")
    if "pooler" in params:
        names.dense("pooler", "pooler.dense")
    names.dense("head", "classifier", prefix="")
    return names
