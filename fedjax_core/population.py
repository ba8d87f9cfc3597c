"""Clients' examples, stored flat, and the cohorts drawn from them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_core import checks
from fedjax_core.types import Array, Examples


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cohort:
    """The clients of one round: where their examples lie, not the examples themselves.

    C is the number of slots. A slot is empty when its id is -1 (or outside the population); an empty slot and a
    client without examples train nothing, weigh nothing and write nothing.

    Attributes:
      ids: int32[C], client ids, -1 for an empty slot.
      starts: int32[C], first row of each client in `examples`.
      sizes: int32[C], number of examples of each client, 0 in an empty slot.
      rows: int32[C], row of each client in the tables of per-client state (`ClientTable`): its id where the tables
        hold the whole population, its slot where they hold the cohort's rows alone (`fedjax_core.staging`).
      examples: leaves [total, ...]: the population's, shared and not copied, or those of the cohort alone.
      num_clients: size of the population, int32[].
      num_examples: number of examples of the population, int32[].
    """

    ids: Array
    starts: Array
    sizes: Array
    rows: Array
    examples: Examples
    num_clients: Array
    num_examples: Array

    @property
    def mask(self) -> Array:
        """bool[C], the slots that take part."""
        return self.sizes > 0

    @property
    def num_participants(self) -> Array:
        """int32[], number of slots that take part."""
        return jnp.sum(self.mask, dtype=jnp.int32)

    def only(self, chosen: Array) -> "Cohort":
        """The same slots, those outside `chosen`, bool[C], empty."""
        return replace(self, ids=jnp.where(chosen, self.ids, -1), sizes=jnp.where(chosen, self.sizes, 0))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Population:
    """All clients' examples, stored once: flat, grouped by client, no padding.

    A pytree. Pass it to compiled functions as an argument: a large array that a compiled function closes over
    becomes a constant of the program, which makes compilation slow.

    Attributes:
      examples: leaves [total, ...]; client i owns rows offsets[i] to offsets[i + 1].
      offsets: int32[num_clients + 1].
    """

    examples: Examples
    offsets: Array

    @classmethod
    def from_flat(cls, examples: Examples, offsets: Any, *, check_finite: bool = True) -> "Population":
        """Builds a population from flat examples and client boundaries.

        Args:
          examples: pytree, leaves [total, ...], grouped by client.
          offsets: integers [num_clients + 1], from 0 to total, not decreasing.
          check_finite: look for NaN and infinity in the examples (one pass over the data).

        Raises:
          ValueError: if leading axes differ, the offsets do not cover the examples, or the data is not finite.
        """
        total = checks.leading_axis(examples)
        bounds = check_offsets(offsets, total)
        if total >= 2**31:
            raise ValueError(f"examples have {total} rows, more than int32 can address: split the population")
        if check_finite:
            checks.finite(examples)
        return cls(jax.tree.map(jnp.asarray, examples), jnp.asarray(bounds, jnp.int32))

    @classmethod
    def from_sizes(cls, examples: Examples, sizes: Any, *, check_finite: bool = True) -> "Population":
        """Like `from_flat`, from the number of examples of each client instead of the boundaries."""
        return cls.from_flat(examples, offsets_of(sizes), check_finite=check_finite)

    @classmethod
    def from_clients(cls, clients: Sequence[Examples], *, check_finite: bool = True) -> "Population":
        """Builds a population from one pytree of examples per client (sizes may differ).

        Raises:
          ValueError: if there is no client, or the clients' pytrees differ in structure, trailing shape or dtype.
        """
        if not clients:
            raise ValueError("clients is empty: pass one pytree of examples per client")
        sizes = [checks.leading_axis(client, f"clients[{i}]") for i, client in enumerate(clients)]
        first = jax.tree.map(lambda leaf: np.asarray(leaf)[:0], clients[0])
        for i, client in enumerate(clients[1:], start=1):
            empty = jax.tree.map(lambda leaf: np.asarray(leaf)[:0], client)
            checks.same_structure(f"clients[{i}]", empty, first, "clients[0]")
        flat = jax.tree.map(lambda *leaves: np.concatenate([np.asarray(leaf) for leaf in leaves]), *clients)
        return cls.from_sizes(flat, np.asarray(sizes, np.int64), check_finite=check_finite)

    @property
    def num_clients(self) -> int:
        """Number of clients."""
        return self.offsets.shape[0] - 1

    @property
    def num_examples(self) -> int:
        """Number of examples of all clients."""
        return jax.tree.leaves(self.examples)[0].shape[0]

    @property
    def sizes(self) -> Array:
        """int32[num_clients], number of examples of each client."""
        return jnp.diff(self.offsets)

    def client(self, index: int) -> Examples:
        """The examples of one client, leaves [n, ...] (outside jit; for looking at data)."""
        start, stop = int(self.offsets[index]), int(self.offsets[index + 1])
        return jax.tree.map(lambda leaf: leaf[start:stop], self.examples)

    def cohort(self, ids: Any) -> Cohort:
        """The cohort of clients `ids`, int[C]; -1 marks an empty slot.

        Inside `jit` this gathers 2 C integers. Ids cannot be checked there: an id outside the population counts
        as an empty slot.

        Raises:
          ValueError: if concrete ids are not a 1-d array of integers, repeat a client or lie outside the population.
        """
        if checks.is_concrete(ids) and not isinstance(ids, jax.Array):
            ids = np.asarray(ids)
        shape, dtype = ids.shape, ids.dtype
        if len(shape) != 1 or not jnp.issubdtype(dtype, jnp.integer):
            raise ValueError(
                f"ids must be a 1-d array of integers, got {dtype}{list(shape)}: pass client numbers, -1 for an "
                "empty slot"
            )
        if checks.is_concrete(ids):
            check_ids(np.asarray(ids), self.num_clients)
        found = _look_up(jnp.asarray(ids, jnp.int32), self.offsets, self.num_clients, self.num_examples)
        return Cohort(examples=self.examples, **found)


@partial(jax.jit, static_argnums=(2, 3), inline=True)  # one call where a dozen would take a millisecond on a mesh
def _look_up(ids: Array, offsets: Array, num_clients: int, num_examples: int) -> dict[str, Array]:
    """The fields of a `Cohort`, but for the examples."""
    valid = (ids >= 0) & (ids < num_clients)
    row = jnp.where(valid, ids, 0)
    starts = offsets[row]
    return {
        "ids": jnp.where(valid, ids, -1),
        "starts": starts,
        "sizes": jnp.where(valid, offsets[row + 1] - starts, 0),
        "rows": row,
        "num_clients": jnp.int32(num_clients),
        "num_examples": jnp.int32(num_examples),
    }


def check_offsets(offsets: Any, total: int) -> np.ndarray:
    """Returns client boundaries as an array after checking them.

    Raises:
      ValueError: unless they are integers [num_clients + 1], from 0 to `total`, not decreasing.
    """
    bounds = np.asarray(offsets)
    if bounds.ndim != 1 or bounds.shape[0] < 2 or not np.issubdtype(bounds.dtype, np.integer):
        raise ValueError(
            f"offsets must be a 1-d array of integers with one entry more than there are clients, got "
            f"{bounds.dtype}{list(bounds.shape)}: pass numpy.cumsum([0, *sizes])"
        )
    if (np.diff(bounds) < 0).any():
        client = int(np.flatnonzero(np.diff(bounds) < 0)[0])
        raise ValueError(
            f"offsets decrease at client {client} ({bounds[client]} to {bounds[client + 1]}), which would be a "
            "negative size: pass numpy.cumsum([0, *sizes]) with sizes of at least 0"
        )
    if bounds[0] != 0 or bounds[-1] != total:
        raise ValueError(
            f"offsets run from {bounds[0]} to {bounds[-1]} but the examples have rows 0 to {total}: the offsets "
            "must cover every example, starting at 0"
        )
    return bounds


def offsets_of(sizes: Any) -> np.ndarray:
    """Client boundaries int64[num_clients + 1] of clients of these sizes.

    Raises:
      ValueError: unless sizes are integers [num_clients] of at least 0.
    """
    counts = np.asarray(sizes)
    if counts.ndim != 1 or not np.issubdtype(counts.dtype, np.integer) or (counts < 0).any():
        raise ValueError(
            f"sizes must be a 1-d array of integers of at least 0, got {counts.dtype}{list(counts.shape)} "
            f"{counts.reshape(-1)[:5].tolist()}: pass the number of examples of each client"
        )
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])


def check_ids(ids: np.ndarray, num_clients: int) -> None:
    """Checks a cohort's client numbers, int[C].

    Raises:
      ValueError: if one lies outside -1..num_clients-1 or a client is there twice.
    """
    outside = ids[(ids < -1) | (ids >= num_clients)]
    if outside.size:
        raise ValueError(
            f"ids holds {outside[0]}, but clients are numbered 0 to {num_clients - 1}: use such a number, or "
            "-1 for an empty slot"
        )
    present, counts = np.unique(ids[ids >= 0], return_counts=True)
    if (counts > 1).any():
        raise ValueError(
            f"ids holds client {present[counts > 1][0]} more than once: each client may fill one slot of a cohort"
        )
