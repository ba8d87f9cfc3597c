"""The server's memory of each client's last update."""

import optax

import fedjax_core as fc


def remember(
    table: fc.ClientTable, mean: fc.PyTree, cohort: fc.Cohort, updates: fc.PyTree, p: fc.Array
) -> tuple[fc.ClientTable, fc.PyTree]:
    """Enters the cohort's updates in a table of last updates and moves the table's mean along.

    The mean over all clients changes by sum_S p_i (new_i - old_i): no row but the cohort's is looked at.

    Args:
      table: last updates, leaves [num_clients, ...].
      mean: sum_i p_i (row i) over all clients, leaves [...], float32 at least.
      cohort: who takes part.
      updates: the cohort's updates, leaves [C, ...].
      p: float[C], the clients' weights, 0 in empty slots.
    """
    change = optax.tree.sub(fc.sums.widen(updates), fc.gather(table, cohort))
    return fc.scatter(table, cohort, updates), optax.tree.add(mean, fc.sums.weighted(p, change))
