"""Checkpoints in the safetensors format, as the package transformers writes them: names, layouts, shards."""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_core import Params, leaf_paths

INDEX, WEIGHTS = "model.safetensors.index.json", "model.safetensors"


class Entry(NamedTuple):
    """Where a parameter stands on disk: its name there, and its layout (a key of `_LAYOUTS`)."""

    name: str
    layout: str


class Table:
    """Path of a parameter here -> `Entry`, one to one, so that it is read both ways."""

    def __init__(self, prefix: str, ignored: tuple[str, ...] = ()) -> None:
        """`prefix` stands before the names of the body in a checkpoint with a head; `ignored` names are never read."""
        self.prefix = prefix
        self.entries: dict[str, Entry] = {}
        self.zeros: dict[str, tuple[int, ...]] = {}  # written for the other side, which has them, and not read
        self._ignored = re.compile("|".join(f"(?:{re.escape(prefix)})?(?:{name})" for name in ignored))

    def add(self, path: str, name: str, layout: str = "same", prefix: str | None = None) -> None:
        """Enters one parameter."""
        self.entries[path] = Entry((self.prefix if prefix is None else prefix) + name, layout)

    def dense(self, path: str, name: str, *, bias: bool = True, prefix: str | None = None) -> None:
        """Enters a dense layer, whose matrix is [out, in] on disk."""
        self.add(f"{path}/kernel", f"{name}.weight", "transposed", prefix)
        if bias:
            self.add(f"{path}/bias", f"{name}.bias", "same", prefix)

    def norm(self, path: str, name: str) -> None:
        """Enters a normalization."""
        self.add(f"{path}/scale", f"{name}.weight")
        self.add(f"{path}/bias", f"{name}.bias")

    def is_ignored(self, name: str) -> bool:
        """Whether a name on disk is known and not needed."""
        return self._ignored.fullmatch(name) is not None


def _patches_to_disk(kernel: np.ndarray, patch: int, channels: int) -> np.ndarray:
    return kernel.reshape(patch, patch, channels, -1).transpose(3, 2, 0, 1)


def _from_disk(layout: str, value: np.ndarray) -> np.ndarray:
    if layout == "transposed":
        return value.T
    if layout == "patches":  # [out, channels, rows, columns] -> [rows columns channels, out]
        return value.transpose(2, 3, 1, 0).reshape(-1, value.shape[0])
    if layout == "token":  # [1, 1, d] -> [d]
        return value.reshape(value.shape[-1])
    return value[0] if layout == "tokens" else value  # [1, N, d] -> [N, d]


def _to_disk(layout: str, value: np.ndarray, config: Mapping[str, Any]) -> np.ndarray:
    if layout == "transposed":
        return value.T
    if layout == "patches":
        return _patches_to_disk(value, config["patch_size"], config["num_channels"])
    if layout == "token":
        return value[None, None]
    return value[None] if layout == "tokens" else value


class Shards:
    """The tensors of a folder by name, each read when it is asked for."""

    def __init__(self, where: dict[str, Any]) -> None:
        """`where` leads from a name to the open file that has it."""
        self._where = where
        self.names = frozenset(where)

    def __getitem__(self, name: str) -> np.ndarray:
        return self._where[name].get_tensor(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor, without reading it."""
        return tuple(self._where[name].get_slice(name).get_shape())


@contextmanager
def opened(folder: Path) -> Iterator[Shards]:
    """The weights of a folder: one file, or several with an index."""
    safe_open = _safetensors().safe_open
    index = folder / INDEX
    if index.exists():
        files = json.loads(index.read_text())["weight_map"]
    elif (folder / WEIGHTS).exists():
        files = None
    else:
        raise FileNotFoundError(f"{folder} has neither {WEIGHTS} nor {INDEX}: pass the folder of a checkpoint")
    with ExitStack() as stack:
        names = sorted(set(files.values())) if files else [WEIGHTS]
        lost = [name for name in names if not (folder / name).exists()]
        if lost:
            raise FileNotFoundError(f"{folder} lacks {lost[0]}, which {INDEX} names: copy all files of the checkpoint")
        shards = {name: stack.enter_context(safe_open(folder / name, framework="numpy")) for name in names}
        if files is None:
            files = dict.fromkeys(shards[WEIGHTS].keys(), WEIGHTS)
        yield Shards({name: shards[file] for name, file in files.items()})


@contextmanager
def opened_file(file: Path) -> Iterator[Shards]:
    """The tensors of one file."""
    if not file.exists():
        raise FileNotFoundError(f"{file.parent} lacks {file.name}: copy all its files")
    with _safetensors().safe_open(file, framework="numpy") as tensors:
        yield Shards(dict.fromkeys(tensors.keys(), tensors))


def read(shards: Shards, table: Table, shapes: Params, skip: tuple[str, ...] = ()) -> Params:
    """The parameters of the given tree of shapes; leaves below the top-level entries `skip` stay shapes.

    Raises:
      ValueError: if a parameter is not on disk, or of another shape, or a tensor on disk has no place here.
    """
    # A checkpoint of the body alone has its names without the prefix.
    bare = not any(name.startswith(table.prefix) for name in shards.names)
    leaves, treedef = jax.tree.flatten(shapes)
    paths = leaf_paths(shapes)
    used, found = set(), []
    for path, leaf in zip(paths, leaves, strict=True):
        entry = table.entries[path]
        name = entry.name.removeprefix(table.prefix) if bare else entry.name
        used.add(name)
        if path.split("/")[0] in skip:
            found.append(leaf)
            continue
        if name not in shards.names:
            raise ValueError(
                f"the checkpoint lacks {name!r}, which the model has as {path!r}: its config asks for another"
            )
        value = _from_disk(entry.layout, shards[name])
        if value.shape != leaf.shape:
            raise ValueError(
                f"{name!r} has shape {list(shards.shape(name))} on disk, which is no {path!r} of shape "
                f"{list(leaf.shape)}: it is of another model than its config.json says"
            )
        found.append(jnp.asarray(value, leaf.dtype))
    unknown = sorted(name for name in shards.names - used if not table.is_ignored(name))
    if unknown:
        raise ValueError(
            f"the checkpoint has {len(unknown)} tensors that no parameter takes, {', '.join(unknown[:3])} first: it is "
            "of another model than its config.json says"
        )
    return jax.tree.unflatten(treedef, found)


def written(table: Table, params: Params, config: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Name on disk -> tensor, the inverse of `read`."""
    leaves = zip(leaf_paths(params), jax.tree.leaves(params), strict=True)
    zeros = {table.prefix + name: np.zeros(shape, np.float32) for name, shape in table.zeros.items()}
    entries = [(table.entries[path], np.asarray(leaf)) for path, leaf in leaves]
    return zeros | {entry.name: np.ascontiguousarray(_to_disk(entry.layout, leaf, config)) for entry, leaf in entries}


def save_file(tensors: dict[str, np.ndarray], file: Path) -> None:
    """Writes tensors as transformers does."""
    _safetensors()
    from safetensors.numpy import save_file as save

    save(tensors, file, metadata={"format": "pt"})


def _safetensors() -> Any:
    try:
        import safetensors
    except ImportError as error:
        raise ImportError("checkpoints need the package safetensors: pip install 'fedjax-core[pretrained]'") from error
    return safetensors
