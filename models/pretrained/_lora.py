"""LoRA adapters of pretrained encoders in the layout of the package peft."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from fedjax_core import Params, checks
from models._common import PARAM_DTYPE
from models.pretrained import _weights

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."

# Modules are called otherwise in memory, where peft looks for them, than on disk (transformers from version 5 on).
_ATTENTION = tuple((f".attention.attention.{name}", f".attention.{name[0]}_proj") for name in ("query", "key", "value"))
_IN_MEMORY = {
    "bert": (),
    "dinov2": (
        *_ATTENTION,
        (".attention.output.dense", ".attention.o_proj"),
        (".mlp.weights_out", ".mlp.down_proj"),
    ),
    "vit": (
        *_ATTENTION,
        (".attention.output.dense", ".attention.o_proj"),
        (".intermediate.dense", ".mlp.fc1"),
        (".output.dense", ".mlp.fc2"),
        ("vit.encoder.layer.", "vit.layers."),
    ),
}


def save(
    folder: Path, adapter: Params, table: _weights.Table, config: Mapping[str, Any], alpha: float, scaling: str
) -> None:
    """Writes an adapter."""
    modules = _modules(table, config)
    ranks = {part["A"].shape[1] for part in adapter.values()}
    lost = [path for path in adapter if path not in modules]
    if lost or len(ranks) != 1:
        raise ValueError(
            f"adapter has a part for {lost[0]!r}, which is no module that peft can adapt there: leave it out of where"
            if lost
            else f"adapter must have one rank, got {sorted(ranks)}: pass what adapted(...).init makes"
        )
    (rank,) = ranks
    tensors = {}
    for path, part in adapter.items():
        for ours, theirs in (("A", "lora_A"), ("B", "lora_B")):
            name = f"{_PREFIX}{modules[path]}.{theirs}.weight"
            tensors[name] = np.ascontiguousarray(np.asarray(part[ours]).T)
    written = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha * rank if scaling == "constant" else alpha,
        "use_rslora": scaling == "root",
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": sorted(modules[path] for path in adapter),
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(written, indent=2) + "\n")
    _weights.save_file(tensors, folder / WEIGHTS)


def load(folder: Path, table: _weights.Table, config: Mapping[str, Any]) -> tuple[Params, dict[str, Any]]:
    """Reads an adapter, and the arguments of `models.adapters.lora` that it is one of."""
    if not (folder / CONFIG).exists():
        raise FileNotFoundError(f"{folder} has no {CONFIG}: pass the folder of an adapter")
    about = json.loads((folder / CONFIG).read_text())
    for name, plain in (("peft_type", "LORA"), ("bias", "none"), ("use_dora", False), ("fan_in_fan_out", False)):
        if about.get(name, plain) != plain:
            raise ValueError(
                f"{CONFIG} has {name}={about[name]!r}, which this library does not compute: only {plain!r}"
            )
    for name in ("rank_pattern", "alpha_pattern", "modules_to_save"):
        if about.get(name):
            raise ValueError(f"{CONFIG} has {name}={about[name]!r:.100}, which this library does not compute")
    paths = {module: path for path, module in _modules(table, config).items()}
    adapter: dict[str, dict[str, Any]] = {}
    with _weights.opened_file(folder / WEIGHTS) as shards:
        for name in sorted(shards.names):
            found = re.fullmatch(re.escape(_PREFIX) + r"(.+)\.lora_([AB])\.weight", name)
            if found is None or found[1] not in paths:
                raise ValueError(f"the adapter has {name!r}, which belongs to no layer of the model: load its own base")
            adapter.setdefault(paths[found[1]], {})[found[2]] = jnp.asarray(shards[name].T, PARAM_DTYPE)
    scaling = "root" if about.get("use_rslora", False) else "rank"
    checks.positive_int("r", about["r"], f"mend {CONFIG}")
    return adapter, {"rank": about["r"], "alpha": float(about["lora_alpha"]), "scaling": scaling}


def _modules(table: _weights.Table, config: Mapping[str, Any]) -> dict[str, str]:
    """Path of a dense layer here -> the name of its module in memory."""
    found = {}
    for path, entry in table.entries.items():
        # The first matrix of a gated perceptron is two modules in memory.
        if entry.layout == "transposed" and not entry.name.endswith(".mlp.weights_in.weight"):
            name = entry.name.removesuffix(".weight")
            for disk, memory in _IN_MEMORY[config["model_type"]]:
                name = name.replace(disk, memory)
            found[path.removesuffix("/kernel")] = name
    return found
