"""Models as files that other programs read: safetensors, msgpack and npz.

    fedjax-core export runs/mine --format safetensors --out models

The names of leaves are their paths, joined by dots ("params.Dense_0.kernel"); a model that is one array is "params". In
msgpack they are a tree of dictionaries, as flax's own.

    safetensors.numpy.load_file(file)                               name to array
    numpy.load(file)                                                the same
    flax.serialization.msgpack_restore(file.read_bytes())           dictionaries in dictionaries
    pipelines.run.export.read(file, like=params)                        any of them, as the pytree that it was
"""

import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np

from fedjax_core import checks
from fedjax_core.types import Params, PyTree
from pipelines.common import files
from pipelines.common.names import pick
from pipelines.configuration.methods import folder
from pipelines.experiment import views
from pipelines.run.loading import Run

_AT_ONCE = 64  # personal models that are in memory at a time


class Exported(NamedTuple):
    """A model to be written.

    Attributes:
      name: of its file, without the ending.
      params: the model.
    """

    name: str
    params: Params


def models_of(
    run: Run,
    *,
    methods: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    clients: Sequence[int] | None = None,
) -> Iterator[Exported]:
    """The models of a run: METHOD-seedS, or with `clients` METHOD-seedS-clientC of each of these.

    Args:
      run: the run.
      methods: all unless given.
      seeds: all unless given.
      clients: whose personal models; none unless given.

    Raises:
      ValueError: if there is no such method, seed or client.
    """
    for method in methods or run.methods:
        trained = run.methods[pick("method of this run", method, run.methods)]
        for seed in trained.seeds if seeds is None else seeds:
            name = f"{folder(method)}-seed{seed}"
            if clients is None:
                yield Exported(name, trained.params(seed))
                continue
            # Models of different architecture do not stack.
            together = _AT_ONCE if trained.algorithm.personal.groups is None else 1
            for at in range(0, len(clients), together):
                ids = list(clients[at : at + together])
                stacked = jax.tree.map(np.asarray, trained.client_params(ids, seed))
                for row, client in enumerate(ids):
                    personal = jax.tree.map(lambda leaf, row=row: leaf[row], stacked)
                    yield Exported(f"{name}-client{client}", personal)


def notes(run: Run, *, personal: bool) -> list[str]:
    """What is to be known of the models that are written, a sentence each.

    Args:
      run: the run.
      personal: whether they are the models of clients.
    """
    found = []
    for name, trained in run.methods.items():
        view = trained.algorithm.main_view
        if not personal and view != views.GLOBAL:
            found.append(f"{name} is judged by its view {view}, and this is its global model: --personal writes those")
        if personal and trained.algorithm.personal.adapt is not None:
            found.append(f"clients of {name} adapt before they predict; these are the models that they begin with")
    return found


def write(path: Path, params: Params, kind: str | None = None) -> None:
    """Writes a model to a file that is complete or absent.

    Args:
      path: the file.
      params: any pytree of arrays.
      kind: a name of `FORMATS`; that of the file's ending unless given.

    Raises:
      ValueError: if the format is unknown or its package is not installed, or two leaves have the same name.
    """
    kind = checked_format(kind or path.suffix.removeprefix("."))
    arrays = named(params)
    files.write(path, lambda temporary: FORMATS[kind](temporary, arrays))


def read(path: str | Path, like: PyTree = None) -> Any:
    """Reads what `write` wrote.

    Args:
      path: the file; its ending says the format.
      like: pytree of arrays or shapes, in whose structure the leaves are returned; name to array unless given.

    Raises:
      ValueError: if the leaves of the file are not those of `like`.
    """
    path = Path(path)
    kind = checked_format(path.suffix.removeprefix("."))
    if kind == "safetensors":
        import safetensors.numpy

        arrays: dict[str, Any] = safetensors.numpy.load_file(path)
    elif kind == "npz":
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
    else:
        arrays = named(flax.serialization.msgpack_restore(path.read_bytes()))
    if like is None:
        return arrays
    wanted = _shapes(like)
    got = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in arrays.items()}
    if kind == "npz":  # which stores what numpy does not know in float32
        got = {n: jax.ShapeDtypeStruct(s.shape, wanted[n].dtype if n in wanted else s.dtype) for n, s in got.items()}
    checks.same_structure(str(path), got, wanted, "the model")
    leaves = [jnp.asarray(arrays[name], wanted[name].dtype) for name in wanted]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def named(params: Params) -> dict[str, np.ndarray]:
    """Name to array of every leaf, in the order of the leaves.

    Raises:
      ValueError: if two leaves have the same name, or one is no array of numbers.
    """
    arrays: dict[str, np.ndarray] = {}
    folders: set[str] = set()
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        name = _name(path)
        parents = [name[:at] for at, letter in enumerate(name) if letter == "."]
        if name in arrays or name in folders or any(parent in arrays for parent in parents):
            raise ValueError(f"two leaves of the model are called {name!r}: name them apart, without dots")
        if jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key):
            raise ValueError(f"{name} is a random key, which no file format has: take it out of the model")
        folders.update(parents)
        # In C order, which safetensors takes for granted.
        arrays[name] = np.array(leaf, order="C")
    return arrays


def checked_format(kind: str) -> str:
    """The name of a format that can be written and read here.

    Raises:
      ValueError: if there is none of that name, or its package is not installed.
    """
    pick("format", kind, FORMATS)
    if kind == "safetensors" and importlib.util.find_spec("safetensors") is None:
        raise ValueError("safetensors is not installed: pip install 'fedjax-core[export]', or take msgpack or npz")
    return kind


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".") or "params"


def _shapes(like: PyTree) -> dict[str, jax.ShapeDtypeStruct]:
    flat = jax.tree_util.tree_flatten_with_path(like)[0]
    return {_name(path): jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf)) for path, leaf in flat}


def _nested(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, array in arrays.items():
        *folders, last = name.split(".")
        at = tree
        for each in folders:
            at = at.setdefault(each, {})
        at[last] = array
    return tree


def _safetensors(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    import safetensors.numpy

    path.write_bytes(safetensors.numpy.save(dict(arrays), metadata={"format": "jax"}))


def _msgpack(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    path.write_bytes(flax.serialization.msgpack_serialize(_nested(arrays)))


def _npz(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    def plain(array: np.ndarray) -> np.ndarray:
        # numpy has no bfloat16 of its own and would read back bytes without a meaning.
        return array if array.dtype.isbuiltin == 1 else array.astype(np.float32)

    with path.open("wb") as file:
        np.savez(file, **{name: plain(array) for name, array in arrays.items()})  # type: ignore[arg-type]


FORMATS: dict[str, Callable[[Path, Mapping[str, np.ndarray]], None]] = {
    "safetensors": _safetensors,
    "msgpack": _msgpack,
    "npz": _npz,
}
"""Name, which is the ending of its files too, to `writer(path, name to array)`."""
