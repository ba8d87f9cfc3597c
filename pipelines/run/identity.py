"""What a run must find again to go on: the examples that it was begun with, and the kind of random keys."""

from collections.abc import Iterable, Mapping
from hashlib import sha256
from io import BytesIO
from pathlib import Path

import jax
import numpy as np

from pipelines.data import cache
from pipelines.data.dataset import Dataset
from pipelines.federation.federations import Federation


def identity(federation: Federation) -> dict[str, str]:
    """What `of` says of a federation."""
    parts = sorted(federation.parts.items())
    return of(federation.dataset, (f"{name} {source} {assignment.digest()}" for name, (source, assignment) in parts))


def of(dataset: Dataset, owners: Iterable[str]) -> dict[str, str]:
    """ "examples": digest of the data set, "clients": of who holds which of them, and those of `keys`.

    The digest of an array that is mapped from the cache of decoded data is the one that is kept there and was looked at
    when it was loaded, so that large data sets are not read for it.

    Args:
      dataset: what is trained and tested on.
      owners: digests of the assignments of its examples to clients.
    """
    hashed, clients = sha256(), sha256()
    for part in ("train", "test"):
        for name, leaf in sorted(getattr(dataset, part).items()):
            hashed.update(f"{part} {name} {_digest(leaf)}".encode())
    for each in owners:
        clients.update(each.encode())
    return {"examples": hashed.hexdigest(), "clients": clients.hexdigest(), **keys()}


def keys() -> dict[str, str]:
    """ "keys": the kind of random keys, and "partitionable": whether they draw by partitionable threefry
    (`jax_threefry_partitionable`), which changes them.
    """
    kind = str(getattr(jax.config, "jax_default_prng_impl"))  # noqa: B009 (not in its type stub)
    partitionable = str(bool(getattr(jax.config, "jax_threefry_partitionable")))  # noqa: B009
    return {"keys": kind, "partitionable": partitionable}


def place(dataset: str, data_dir: str | None) -> str:
    """A data set and where it is, for messages."""
    return dataset if data_dir is None else f"{dataset} in {data_dir}"


def check(then: Mapping[str, str], now: Mapping[str, str], where: str, out: Path) -> None:
    """Raises ValueError if a run was begun with something else, with both digests and what to do.

    Args:
      then: what the run of the directory was begun with.
      now: what is there now; what either does not name is not compared.
      where: the data set, as `place` names it.
      out: the directory.
    """
    for name, before in then.items():
        here = now.get(name, before)
        if here == before:
            continue
        if name == "keys":
            raise ValueError(
                f"{out} was begun with random keys of the kind {before} and JAX makes {here} now: set "
                f"JAX_DEFAULT_PRNG_IMPL={before}, or choose another --out"
            )
        if name == "partitionable":
            raise ValueError(
                f"{out} was begun with jax_threefry_partitionable={before} and it is {here} now, which draws other "
                f"numbers: set JAX_THREEFRY_PARTITIONABLE={before}, or choose another --out"
            )
        if name == "examples":
            what, remedy = f"the examples of {where} have changed", "bring back the data that it was begun with"
        else:
            what = f"the examples of {where} are assigned to other clients"
            remedy = "use the version of the library that it was begun with"
        raise ValueError(
            f"{what} since the run in {out} was begun (digest {here[:12]} here, {before[:12]} there), and going on "
            f"would mix both in one result: {remedy}, or choose another --out"
        )


def _digest(leaf: np.ndarray) -> str:
    """The sha256 of an array as a .npy file."""
    kept = cache.kept_digest(leaf)
    if kept is not None:
        return kept
    contiguous = np.ascontiguousarray(leaf).reshape(leaf.shape)
    header = BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(contiguous))
    hashed = sha256(header.getvalue())
    hashed.update(contiguous.data)
    return hashed.hexdigest()
