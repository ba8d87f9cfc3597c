"""Observers: what a server can see of each client's upload."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import fedjax_core as fc
from fedjax_core.messages import Part, Pass


def observed(
    look: Callable[[fc.PyTree], fc.PyTree] = fc.sums.norm,
    *,
    tell: Callable[[fc.PyTree, fc.Cohort], fc.PyTree] | None = None,
    init: Callable[[fc.PyTree, int], Any] | None = None,
    update: Callable[[Any, fc.PyTree, fc.Cohort], Any] | None = None,
) -> Part:
    """An honest but curious server: it looks at every upload that it gets, and does what it would have done.

    seen_i = look(u_i);  kept: what was last seen of every client, a row each;  told: the mean over the participants

    Looked at is the upload as the server has decoded it, at the part's place among those that change decoded uploads:
    before an attack it was put around, after one that it is put around. No number of the method changes.

    Args:
      look: `look(upload)`, any pytree of arrays; the Euclidean norm unless given, the upload itself by `lambda u: u`.
      tell: `tell(seen, cohort)`, what the metrics show of it, leaves [C, ...] in the slots of the cohort; the mean over
        the participants unless given.
      init: `init(upload, num_clients) -> state`, from shapes, in the place of the rows; with `update`.
      update: `update(state, seen, cohort) -> state`, such as a running sum on the server.

    Paper: Zhu, Liu, Han, "Deep Leakage from Gradients", 2019, whose adversary this is.
    """
    if (init is None) != (update is None):
        given, missing = ("update", "init") if init is None else ("init", "update")
        raise TypeError(f"observed has {given} without {missing}: a state needs both, or leave both out for rows")
    for name, value, example in (
        ("look", look, "look(upload) -> arrays"),
        ("tell", tell or _mean, "tell(seen, cohort) -> arrays"),
        ("init", init or _mean, "init(upload, num_clients) -> state"),
        ("update", update or _mean, "update(state, seen, cohort) -> state"),
    ):
        fc.checks.function(name, value, example)

    def rows(upload: fc.PyTree, num_clients: int) -> fc.ClientTable:
        seen = jax.eval_shape(look, upload)
        return fc.client_table(num_clients, jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), seen))

    def around(state: Any, asked: Pass, key: fc.Key) -> Any:
        results = asked.watched(look).run()
        *others, seen = results.seen
        new = fc.scatter(state, asked.cohort, seen) if update is None else update(state, seen, asked.cohort)
        return results._replace(seen=tuple(others)), new, (tell or _mean)(seen, asked.cohort)

    return Part(around, init or rows, "observed")


def _mean(seen: fc.PyTree, cohort: fc.Cohort) -> fc.PyTree:
    """The mean over the participants, 0 where there are none."""
    return fc.sums.weighted(fc.sums.shares(cohort.mask.astype(float)), seen)
