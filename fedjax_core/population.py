"""Clients' examples, stored flat, and the cohorts drawn from them."""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_core import checks
from fedjax_core.types import Array, ArrayLike, Examples, PyTree


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cohort:
    """The clients of one round: where their examples lie, not the examples themselves.

    C is the number of slots, at least 1. A slot is empty when its id is -1 (or outside the population); an empty slot
    and a client without examples train nothing, weigh nothing and write nothing.

    Attributes:
      ids: int32[C], client ids, -1 for an empty slot.
      starts: int32[C], first row of each client in `examples`.
      sizes: int32[C], number of examples of each client, 0 in an empty slot.
      rows: int32[C], row of each client in the tables of per-client state (`ClientTable`): its id where the tables
        hold the whole population, its slot where they hold the cohort's rows alone (`fedjax_core.staging`).
      examples: leaves [total, ...]: the population's, shared and not copied, or those of the cohort alone.
      num_clients: size of the population, int32[].
      num_examples: number of examples of the population, int32[].
      public: what the server holds beside the clients' examples, as in `Population`.
      population_size: `num_clients` as a number known while tracing, with which everything that is given per client is
        compared; None in a cohort put together by hand, where nothing is compared.
      table_size: rows that tables of per-client state have where they go with this cohort; None likewise.
      group: of a cohort that `Groups.split` has made, (the groups, number of the group); None of another.
      route: where passes over these clients go through on their way, or None (`fedjax_core.messages`). It is there
        only while a round is traced.
      private: whether it must not show that nobody takes part: what a private part adds to a sum, it adds in a round
        without participants too.
    """

    ids: Array
    starts: Array
    sizes: Array
    rows: Array
    examples: Examples
    num_clients: Array
    num_examples: Array
    public: PyTree = ()
    population_size: int | None = field(default=None, metadata={"static": True})
    table_size: int | None = field(default=None, metadata={"static": True})
    group: tuple[Any, int] | None = field(default=None, metadata={"static": True})
    route: Callable[..., PyTree] | None = field(default=None, metadata={"static": True})
    private: bool = field(default=False, metadata={"static": True})

    @property
    def mask(self) -> Array:
        """bool[C], the slots that take part."""
        return self.sizes > 0

    @property
    def num_participants(self) -> Array:
        """int32[], number of slots that take part."""
        return jnp.sum(self.mask, dtype=jnp.int32)

    def per_client(self, name: str, values: ArrayLike) -> Array:
        """The clients' entries of an array [num_clients, ...], leaves [C, ...]; any entry in an empty slot.

        Raises:
          ValueError: if it has not one entry for each client of the population.
        """
        self.check_per_client(name, values)
        return jnp.asarray(values)[jnp.maximum(self.ids, 0)]

    def check_per_client(self, name: str, values: ArrayLike) -> None:
        """Raises ValueError unless `values`, an array of at least one axis, has one entry for each client."""
        length = np.shape(values)[0]
        if self.population_size is not None and length != self.population_size:
            raise ValueError(
                f"{name} has {length} entries, but the population has {self.population_size} clients: pass one entry "
                "per client"
            )

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
      public: what the server holds beside the clients' examples and gives to methods that ask for it: any pytree of
        arrays, such as unlabelled images for distillation, a small trusted set, or the frozen part of a pretrained
        model. Like the examples it is an argument of compiled functions and never a constant of theirs, there is one of
        it for all seeds and lanes, and it is not in a run's checkpoints. Rounds find it in `cohort.public`.
    """

    examples: Examples
    offsets: Array
    public: PyTree = ()

    @classmethod
    def from_flat(cls, examples: Examples, offsets: ArrayLike, *, check_finite: bool = True) -> "Population":
        """Builds a population from flat examples and client boundaries.

        Args:
          examples: pytree, leaves [total, ...], grouped by client.
          offsets: integers [num_clients + 1], from 0 to total, not decreasing.
          check_finite: look for NaN and infinity in the examples (one pass over the data).

        64-bit leaves become 32-bit ones, unless JAX has 64 bits enabled, after a pass that looks whether they fit.

        Raises:
          TypeError: if a leaf holds no numbers.
          ValueError: if leading axes differ, the offsets do not cover the examples, the data is not finite, or a
            number does not fit into 32 bits.
        """
        checks.numbers(examples)
        total = checks.leading_axis(examples)
        bounds = check_offsets(offsets, total)
        if total >= 2**31:
            raise ValueError(f"examples have {total} rows, more than int32 can address: split the population")
        if check_finite:
            checks.finite(examples)
        checks.fits(examples)
        return cls(jax.tree.map(jnp.asarray, examples), jnp.asarray(bounds, jnp.int32))

    @classmethod
    def from_sizes(cls, examples: Examples, sizes: ArrayLike, *, check_finite: bool = True) -> "Population":
        """Like `from_flat`, from the number of examples of each client instead of the boundaries."""
        return cls.from_flat(examples, offsets_of(sizes), check_finite=check_finite)

    @classmethod
    def from_clients(cls, clients: Sequence[Examples], *, check_finite: bool = True) -> "Population":
        """Builds a population from one pytree of examples per client (sizes may differ).

        Raises:
          TypeError: if a leaf holds no numbers.
          ValueError: if there is no client, or the clients' pytrees differ in structure, trailing shape or dtype.
        """
        if not clients:
            raise ValueError("clients is empty: pass one pytree of examples per client")
        for i, client in enumerate(clients):
            checks.numbers(client, f"clients[{i}]")
        sizes = [checks.leading_axis(client, f"clients[{i}]") for i, client in enumerate(clients)]
        first = jax.tree.map(lambda leaf: np.asarray(leaf)[:0], clients[0])
        for i, client in enumerate(clients[1:], start=1):
            empty = jax.tree.map(lambda leaf: np.asarray(leaf)[:0], client)
            checks.same_structure(f"clients[{i}]", empty, first, "clients[0]")
        flat = jax.tree.map(lambda *leaves: np.concatenate([np.asarray(leaf) for leaf in leaves]), *clients)
        return cls.from_sizes(flat, np.asarray(sizes, np.int64), check_finite=check_finite)

    def with_public(self, public: PyTree) -> "Population":
        """The same clients beside public data, in the place of what there was.

        Raises:
          TypeError: if a leaf holds no numbers.
          ValueError: if a number does not fit into 32 bits.
        """
        return replace(self, public=jax.tree.map(jnp.asarray, checked_public(public)))

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
        """The examples of one client, leaves [n, ...] (outside jit; for looking at data).

        Raises:
          ValueError: unless `index` is a client's number, 0 to num_clients - 1.
        """
        check_client(index, self.num_clients)
        start, stop = int(self.offsets[index]), int(self.offsets[index + 1])
        return jax.tree.map(lambda leaf: leaf[start:stop], self.examples)

    def cohort(self, ids: ArrayLike) -> Cohort:
        """The cohort of clients `ids`, int[C] with C of at least 1; -1 marks an empty slot.

        Inside `jit` this gathers 2 C integers. The values of ids cannot be checked there: an id outside the population
        counts as an empty slot, and so does one that an earlier slot holds.

        Raises:
          ValueError: if ids are not a 1-d array of integers, and if concrete ids repeat a client or lie outside the
            population.
        """
        return self.checked_cohort(ids, distinct=False)

    def checked_cohort(self, ids: ArrayLike, *, distinct: bool) -> Cohort:
        """`cohort`; `distinct` says of traced ids that they are valid, which saves looking for repetitions."""
        ids = checks.client_numbers(ids)
        if checks.is_concrete(ids):
            check_ids(np.asarray(ids), self.num_clients)
            distinct = True
        found = _look_up(jnp.asarray(ids), self.offsets, self.num_clients, self.num_examples, distinct)
        return Cohort(
            examples=self.examples,
            **found,
            public=self.public,
            population_size=self.num_clients,
            table_size=self.num_clients,
        )


@partial(jax.jit, static_argnums=(2, 3, 4), inline=True)  # one call where a dozen would take a millisecond on a mesh
def _look_up(ids: Array, offsets: Array, num_clients: int, num_examples: int, distinct: bool) -> dict[str, Array]:
    """The fields of a `Cohort`, but for the examples."""
    valid = (ids >= 0) & (ids < num_clients)
    if not distinct:
        valid &= ~repeated(ids)
    ids = jnp.where(valid, ids, -1).astype(jnp.int32)  # wider ones are compared before they are narrowed
    row = jnp.where(valid, ids, 0)
    starts = offsets[row]
    return {
        "ids": ids,
        "starts": starts,
        "sizes": jnp.where(valid, offsets[row + 1] - starts, 0),
        "rows": row,
        "num_clients": jnp.int32(num_clients),
        "num_examples": jnp.int32(num_examples),
    }


def checked_public(public: PyTree) -> PyTree:
    """Public data, after checks."""
    checks.numbers(public, "public")
    checks.fits(public)
    return public


def repeated(ids: Array) -> Array:
    """bool[C], the slots whose id, int[C], an earlier slot holds; for ids of -1 as well."""
    order = jnp.argsort(ids, stable=True)
    inner = ids[order]
    return jnp.zeros(ids.shape, bool).at[order[1:]].set(inner[1:] == inner[:-1])


def check_offsets(offsets: ArrayLike, total: int) -> np.ndarray:
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
    falling = bounds[1:] < bounds[:-1]  # a difference of unsigned integers would never be negative
    if falling.any():
        client = int(np.flatnonzero(falling)[0])
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


def offsets_of(sizes: ArrayLike) -> np.ndarray:
    """Client boundaries int64[num_clients + 1] of clients of these sizes.

    Raises:
      ValueError: unless sizes are integers [num_clients] of at least 0.
    """
    counts = np.asarray(sizes)
    if counts.ndim != 1 or not np.issubdtype(counts.dtype, np.integer) or (counts < 0).any() or not counts.size:
        raise ValueError(
            f"sizes must be a 1-d array of integers of at least 0, got {counts.dtype}{list(counts.shape)} "
            f"{counts.reshape(-1)[:5].tolist()}: pass the number of examples of each client"
        )
    if counts.sum(dtype=np.float64) >= 2**31:
        raise ValueError(
            f"sizes sum to {counts.sum(dtype=np.float64):.0f}, more examples than int32 can count: split the population"
        )
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])


def check_population(population: object, on_host: str, name: str = "population") -> None:
    """Raises TypeError unless `population` is a `Population`.

    Args:
      population: what was given.
      on_host: what to do with a `HostPopulation`.
      name: of the argument, in the error.
    """
    if isinstance(population, Population):
        return
    if isinstance(population, Cohort):
        fix = "pass the population that it was drawn from (a cohort goes to algorithm.round)"
    elif type(population).__name__ == "HostPopulation":
        fix = on_host
    else:
        fix = "make one of examples and sizes, Population.from_sizes(examples, sizes)"
    got = checks.misplaced(population) or type(population).__name__
    raise TypeError(f"{name} must be a Population, got {got}: {fix}")


def check_client(index: SupportsIndex, num_clients: int) -> None:
    """Raises ValueError unless `index` is an integer from 0 to num_clients - 1."""
    try:
        number = operator.index(index)
    except TypeError:
        number = -1
    if isinstance(index, bool) or not 0 <= number < num_clients:
        raise ValueError(
            f"there is no client {index!r:.60}: clients are numbered 0 to {num_clients - 1}, use such a number"
        )


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
