"""Groups of clients that differ in architecture, in one compiled round.

    groups = Groups([0, 1, 0, 1, 1])                        # or Groups.by_modulo(5, 2)
    one, other = groups.split(cohort)                       # a cohort each
    results = for_each_client(program_of_one, shared, one, key, gather(state.tables[0], one), work=work), ...
    merged = groups.merge(cohort, results)

Models of different structure cannot stand in one stack, so each group has a pass of its own, of a program of its own,
and a table of its own with a row for each of its clients. What groups exchange (prototypes, logits, a head) is of one
shape for all. A client's randomness is `fold_in(key, client_id)`, in whatever cohort it is.

Letters in shapes: N clients, C slots of a cohort, G groups, M clients in a group, K = min(C, M) slots of a group.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_core import checks, sums
from fedjax_core.clients import ClientResults, ClientTable, check_results, client_table
from fedjax_core.population import Cohort
from fedjax_core.types import Array, ArrayLike, PyTree


class Groups:
    """Which group each client belongs to. Equal and hashed by its numbers, so that it can be a static argument.

    Attributes:
      of: int32[N], the group of each client, 0 to G - 1; every group has one.
      rows: int32[N], the place of each client in its group, in the order of clients' numbers.
      sizes: int32[G], number of clients in each group.
    """

    of: np.ndarray
    rows: np.ndarray
    sizes: np.ndarray

    def __init__(self, of: ArrayLike) -> None:
        """Groups by an assignment.

        Args:
          of: integers [N], the group of each client.

        Raises:
          TypeError: if they are traced; which clients are in a group is known when a round is compiled.
          ValueError: if they are no integers [N] of at least 0, or a group has no clients.
        """
        if not checks.is_concrete(of):
            raise TypeError("of must be known when a round is compiled, got a traced value: pass numpy integers [N]")
        given = np.asarray(of)
        if given.ndim != 1 or not given.size or not np.issubdtype(given.dtype, np.integer):
            raise ValueError(
                f"of must be a 1-d array of integers, got {given.dtype}{list(given.shape)}: pass the group of each "
                "client, such as [0, 1, 0, 1]"
            )
        if given.min() < 0:
            client = int(np.argmin(given))
            raise ValueError(
                f"of has group {given[client]} for client {client}: groups are numbered from 0, each client is in one"
            )
        missing = np.setdiff1d(np.arange(min(given.max(), given.size) + 1), given)
        if missing.size:
            raise ValueError(
                f"group {missing[0]} has no clients, and groups go up to {given.max()}: number groups without gaps "
                "(numpy.unique(of, return_inverse=True)[1] does)"
            )
        self.of, self.sizes = _fixed(given), _fixed(np.bincount(given))
        order = np.argsort(self.of, kind="stable")
        rows = np.empty_like(self.of)
        rows[order] = np.arange(given.size) - np.repeat(np.cumsum(self.sizes) - self.sizes, self.sizes)
        self.rows = _fixed(rows)
        # Computed from the number of a client then, and no array in the compiled round.
        self._is_modulo = bool((self.of == np.arange(given.size) % len(self)).all())

    @classmethod
    def by_modulo(cls, num_clients: int, num_groups: int) -> "Groups":
        """Client i in group i modulo `num_groups`.

        Raises:
          ValueError: unless there are at least as many clients as groups.
        """
        checks.positive_int("num_clients", num_clients, "the size of the population")
        checks.positive_int("num_groups", num_groups, "one for each architecture")
        if num_groups > num_clients:
            raise ValueError(
                f"num_groups={num_groups} but there are {num_clients} clients: each group has at least one client"
            )
        return cls(np.arange(num_clients) % num_groups)

    def __len__(self) -> int:
        """Number of groups, G."""
        return self.sizes.size

    def __eq__(self, other: object) -> bool:
        """Whether they are the same groups."""
        return isinstance(other, Groups) and np.array_equal(self.of, other.of)

    def __hash__(self) -> int:
        """Of the assignment."""
        return hash(self.of.tobytes())

    def __repr__(self) -> str:
        return f"Groups of {', '.join(map(str, self.sizes))} clients"

    @property
    def num_clients(self) -> int:
        """Number of clients, N."""
        return self.of.size

    def members(self, group: int) -> np.ndarray:
        """int32[M], the clients of a group, in the order of their rows.

        Raises:
          ValueError: if there is no such group.
        """
        self._check_group(group)
        return np.flatnonzero(self.of == group).astype(np.int32)

    def index(self, group: int) -> np.ndarray:
        """int32[N], the row of each client in a table of the group (`ClientTable.index`), -1 for other groups' clients.

        Raises:
          ValueError: if there is no such group.
        """
        self._check_group(group)
        return np.where(self.of == group, self.rows, np.int32(-1))

    def table(self, group: int, row: PyTree) -> ClientTable:
        """The same first row for every client of a group, leaves [M, ...].

        Raises:
          ValueError: if there is no such group.
        """
        index = jnp.asarray(self.index(group))
        return client_table(int(self.sizes[group]), row)._replace(index=index)

    def split(self, cohort: Cohort) -> tuple[Cohort, ...]:
        """The cohort of each group, in K = min(C, M) slots: its clients first, in their order, and empty slots after.

        A group whose clients are all in the cohort has no empty slot. What else a cohort holds stays.

        Raises:
          ValueError: if the groups are those of another population.
        """
        return tuple(self._part(cohort, slots, number) for number, slots in enumerate(self._slots(cohort)))

    def join(self, cohort: Cohort, values: Sequence[PyTree]) -> PyTree:
        """What was computed in the slots of each group, leaves [K, ...], in the slots of the cohort, leaves [C, ...].

        Args:
          cohort: the one that was split.
          values: one pytree for each group, all of one structure.

        Returns:
          The values; 0 in slots that no group has.

        Raises:
          ValueError: if there is not one for each group, or groups or shapes do not fit the cohort.
        """
        self._check_number("values", values)
        slots = self._slots(cohort)
        structures: list[object] = [jax.tree.structure(each) for each in values]
        other = next((number for number, each in enumerate(structures) if each != structures[0]), None)
        if other is not None:
            raise ValueError(
                f"values[{other}] has the structure {structures[other]}, and values[0] {structures[0]}: compute the "
                "same in each group, or keep what differs apart"
            )

        def put(*leaves: Array) -> Array:
            joined = jnp.zeros((cohort.ids.shape[0], *leaves[0].shape[1:]), jnp.result_type(*leaves))
            for at, leaf in zip(slots, leaves, strict=True):
                if leaf.shape[:1] != at.order.shape:
                    raise ValueError(
                        f"values has a leaf of shape {list(leaf.shape)} for a group of {at.order.shape[0]} slots: pass "
                        "what was computed on the cohorts that split returned"
                    )
                own = jnp.where(sums.across(at.own, leaf), leaf, joined[at.order])
                joined = joined.at[at.order].set(own.astype(joined.dtype), unique_indices=True)
            return joined

        return jax.tree.map(put, *values)

    def merge(self, cohort: Cohort, results: Sequence[ClientResults]) -> ClientResults:
        """The results of one pass in each group as those of one pass over the cohort.

        Args:
          cohort: the one that was split.
          results: of the passes over the groups' cohorts, one for each group.

        Returns:
          Weights, losses, steps and bytes in the slots of the cohort, executed steps of all groups, and tuples of the
          groups' aggregates and outputs as they are.

        Raises:
          TypeError: if one is no `ClientResults`.
          ValueError: if there is not one for each group, or they are of other cohorts.
        """
        self._check_number("results", results)
        for number, result in enumerate(results):
            check_results(f"results[{number}]", result, "for each group")
        by_slot = ("weights", "loss", "steps", "bytes_up", "bytes_down")
        joined = self.join(cohort, [tuple(getattr(result, name) for name in by_slot) for result in results])
        return ClientResults(
            aggregate=tuple(result.aggregate for result in results),
            outputs=tuple(result.outputs for result in results),
            executed_steps=sum((result.executed_steps for result in results), jnp.int32(0)),
            **dict(zip(by_slot, joined, strict=True)),
        )

    def _slots(self, cohort: Cohort) -> list["_Slots"]:
        if not isinstance(cohort, Cohort):
            got = checks.misplaced(cohort) or checks.described(cohort)
            raise TypeError(f"cohort must be a Cohort, got {got}: pass population.cohort(ids)")
        if cohort.population_size not in (None, self.num_clients):
            raise ValueError(
                f"the groups are of {self.num_clients} clients, but the population has {cohort.population_size}: make "
                "Groups with one entry for each client"
            )
        if cohort.group is not None:
            raise ValueError("the cohort is that of a group already: split the round's cohort")
        clients = jnp.maximum(cohort.ids, 0)
        of = clients % len(self) if self._is_modulo else jnp.asarray(self.of)[clients]
        found = []
        for number, size in enumerate(self.sizes):
            own = (cohort.ids >= 0) & (of == number)
            order = jnp.argsort(~own, stable=True)[: min(int(size), own.shape[0])]
            found.append(_Slots(order, own[order]))
        return found

    def _part(self, cohort: Cohort, slots: "_Slots", number: int) -> Cohort:
        return replace(
            cohort,
            ids=jnp.where(slots.own, cohort.ids[slots.order], -1),
            starts=cohort.starts[slots.order],
            sizes=jnp.where(slots.own, cohort.sizes[slots.order], 0),
            rows=cohort.rows[slots.order],
            group=(self, number),
        )

    def _check_group(self, group: int) -> None:
        if isinstance(group, bool) or not isinstance(group, int | np.integer) or not 0 <= group < len(self):
            raise ValueError(f"there is no group {group!r:.60}: groups are numbered 0 to {len(self) - 1}")

    def _check_number(self, name: str, given: Sequence[PyTree]) -> None:
        if len(given) != len(self):
            raise ValueError(f"{name} has {len(given)} entries, but there are {len(self)} groups: pass one for each")


class _Slots(NamedTuple):
    """Where a group's clients are in a cohort.

    Attributes:
      order: int32[K], slots of the cohort, those of the group's clients first.
      own: bool[K], whether a client of the group is there.
    """

    order: Array
    own: Array


def _fixed(values: np.ndarray) -> np.ndarray:
    """The integers as int32, of our own and not to be written to."""
    values = values.astype(np.int32)
    values.flags.writeable = False
    return values
