"""A federated method as pure functions, and the checks that every one of them gets."""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_core import checks, keys
from fedjax_core.clients import check_tables, join_tables, round_metrics, split_tables
from fedjax_core.population import Cohort
from fedjax_core.types import Array, ArrayLike, Counter, Key, Metrics, Params, PyTree

MOST_ROUNDS = 2**31 - 1
"""What the counter of a state can hold."""


class _Functions(NamedTuple):
    init: Callable[[Params], Any]
    round: Callable[[Any, Any, Key], tuple[Any, Metrics]]
    params: Callable[[Any], Params]
    client_params: Callable[[Any, Array], Params]


class ModelState(NamedTuple):
    """The state of a method that keeps nothing but the global model x, and the number of rounds done."""

    params: Params
    round: Counter = 0


class Algorithm(_Functions):
    """A federated method as pure functions.

    What they are given is checked before they see it, while tracing and at no cost in the compiled round: `init` gets
    arrays of floats (`checks.params`), and `round` a state, a cohort, tables of per-client state that have one row for
    each client of the cohort's population, and one typed key (`keys.one`).

    Attributes:
      init: `init(params) -> state`. Every state has a field `round`, int32[], the number of rounds done.
      round: `round(state, cohort, key) -> (state, Metrics)`, one whole federated round.
      params: `params(state)`, the global model.
      client_params: `client_params(state, ids)`, the model that each of the clients `ids` (int32[C]) would use,
        leaves stacked to [C, ...]; the global model broadcast where the method has no personal part.
    """

    __slots__ = ()

    def __new__(
        cls,
        init: Callable[[Params], Any],
        round: Callable[[Any, Any, Key], tuple[Any, Metrics]],
        params: Callable[[Any], Params],
        client_params: Callable[[Any, Array], Params],
    ) -> "Algorithm":
        """The functions with their checks; those that have them already stay as they are."""
        return super().__new__(cls, checked_init(init), checked_round(round), params, _checked_ids(client_params))

    @classmethod
    def _make(cls, functions: Iterable[Callable[..., Any]]) -> "Algorithm":  # type: ignore[override]
        """Also behind `_replace`: a function that is put in another's place gets the checks too."""
        return cls(*functions)


def global_client_params(params: Params, ids: Array) -> Params:
    """The global model once per client: leaves [...] become [C, ...] for ids [C]."""
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (ids.shape[0], *jnp.shape(leaf))), params)


def global_algorithm(
    init: Callable[[Params], Any],
    round: Callable[[Any, Any, Key], tuple[Any, Metrics]],
    params: Callable[[Any], Params] = lambda state: state.params,
) -> Algorithm:
    """A method without a personal part: every client would use the global model."""
    return Algorithm(init, round, params, lambda state, ids: global_client_params(params(state), ids))


def federated(
    init: Callable[[Params], Any],
    update: Callable[[Any, Cohort, Key], Any],
    params: Callable[[Any], Params] = lambda state: state.params,
    *,
    skip_empty: bool = True,
) -> Algorithm:
    """A method from what is its own: how its state begins, and what a round makes of it.

    What all methods share is done here: the counter of rounds, the metrics, and the rule that a round without
    participants changes nothing but the counter. Every client would use the global model.

    Args:
      init: `init(params) -> state`, a NamedTuple with a field `params`, the model that the server moves, and a field
        `round` that begins at 0 (`round: Counter = 0`).
      update: `update(state, cohort, key) -> (state, results)` or `(state, results, extra)`: the state after a round,
        whose counter is not its business; the `ClientResults` of the pass whose loss and scalars the metrics report;
        and the method's own metrics.
      params: `params(state)`, the global model; the field of that name unless given.
      skip_empty: whether a round without participants leaves the state as it is.
    """

    def begin(params: Params):
        return init(params)._replace(round=jnp.int32(0))

    def round(state: PyTree, cohort: Cohort, key: Key) -> tuple[PyTree, Metrics]:
        new, results, *extra = update(state, cohort, key)
        if skip_empty:
            new = _unless_empty(cohort, new, state)
        metrics = round_metrics(results, cohort, state.params, new.params, *extra)
        return new._replace(round=state.round + 1), metrics

    return global_algorithm(begin, round, params)


def _unless_empty(cohort: Cohort, new: PyTree, old: PyTree) -> PyTree:
    """`new` if a client takes part, else `old`; per-client tables are always `new`: only participants write there."""
    not_empty = cohort.num_participants > 0
    new, rows = split_tables(new)
    old, _ = split_tables(old)
    kept = jax.tree.map(lambda n, o: n if n is o else jnp.where(not_empty, n, o), new, old)
    return join_tables(kept, rows)


def checked_init(init: Callable[..., Any]) -> Callable[..., Any]:
    """`init(params, ...)` on checked arrays; see `checks.params` for what is refused.

    Each array of the state becomes one of its own, so that the state can be donated (`jax.jit(algorithm.round,
    donate_argnums=0)`) and the params that it was made from are still there.
    """
    if not callable(init) or hasattr(init, "_has_checks"):
        return init

    @functools.wraps(init)
    def checked(params: Params, *args: Any, **kwargs: Any):
        params = checks.params(params)
        return separate(init(params, *args, **kwargs), params)

    checked._has_checks = True  # type: ignore[attr-defined]
    return checked


def separate(tree: PyTree, *others: PyTree) -> PyTree:
    """The pytree with a copy in the place of every array that occurs in it before, or in the others."""
    seen = {id(leaf) for leaf in jax.tree.leaves(others)}

    def own(leaf):
        if id(leaf) in seen and isinstance(leaf, jax.Array):
            return jnp.copy(leaf)
        seen.add(id(leaf))
        return leaf

    return jax.tree.map(own, tree)


def checked_round(round: Callable[..., Any]) -> Callable[..., Any]:
    """`round(state, cohort, key)`, or another event of a method with these arguments, after checks of all three.

    Raises (the function that is returned):
      TypeError: if the state, the cohort or the key is something else.
      ValueError: if tables of per-client state are of another population, or there are several keys.
    """
    if not callable(round) or hasattr(round, "_has_checks"):
        return round

    @functools.wraps(round)
    def checked(state: PyTree, cohort: Cohort, key: Key, *args: Any, **kwargs: Any):
        check_state(state, "pass algorithm.init(params)")
        if not isinstance(cohort, Cohort):
            got = checks.misplaced(cohort) or type(cohort).__name__
            raise TypeError(
                f"cohort must be a Cohort, got {got}: pass population.cohort(ids); the order of arguments is (state, "
                "cohort, key)"
            )
        check_rounds(state.round, 1)
        check_tables(state, cohort)
        return round(state, cohort, keys.one(key), *args, **kwargs)

    checked._has_checks = True  # type: ignore[attr-defined]
    return checked


def check_state(state: PyTree, begin: str) -> None:
    """Raises TypeError unless `state` has the counter of rounds; `begin` says how to come by a state."""
    if not hasattr(state, "round"):
        raise TypeError(
            f"state must be what the method's init returns, with a field `round`, got {type(state).__name__}: {begin}"
        )


def check_rounds(done: ArrayLike, more: int) -> None:
    """Raises OverflowError-like ValueError if a state's counter of rounds, where it can be seen, cannot go on."""
    if not checks.is_concrete(done) or (isinstance(done, jax.Array) and not done.is_fully_addressable):
        return
    on_host = np.asarray(done)  # a reduction of a JAX array would be traced where the state is closed over
    most, least = int(on_host.max()), int(on_host.min())
    if least < 0:
        raise ValueError(f"state.round is {least}, and no number of rounds: begin with algorithm.init(params)")
    if most + more > MOST_ROUNDS:
        raise ValueError(
            f"state.round is {most}, and {more} more rounds are beyond {MOST_ROUNDS}, the most it can count: begin a "
            "new run with algorithm.init(algorithm.params(state))"
        )


def check_algorithm(algorithm: object) -> None:
    """Raises TypeError unless `algorithm` has the functions of an `Algorithm`."""
    missing = [name for name in _Functions._fields[:3] if not callable(getattr(algorithm, name, None))]
    if not missing:
        return
    other = checks.misplaced(algorithm)
    if other is not None:
        raise TypeError(
            f"algorithm must be an Algorithm, got {other}: the order of arguments is (algorithm, sampler, num_rounds)"
        )
    if callable(algorithm):
        name = getattr(algorithm, "__name__", type(algorithm).__name__)
        raise TypeError(
            f"algorithm must be an Algorithm, got the function {name}: call it first, for example "
            f"{name}(loss_fn, optax.sgd(0.1))"
        )
    raise TypeError(
        f"algorithm must be an Algorithm, got {type(algorithm).__name__} without {' and '.join(missing)}: pass for "
        "example algorithms.fedavg(loss_fn, optax.sgd(0.1))"
    )


def _checked_ids(client_params: Callable[..., Any]) -> Callable[..., Any]:
    """`client_params(state, ids)` with ids as an array int[C]."""
    if not callable(client_params) or hasattr(client_params, "_has_checks"):
        return client_params

    @functools.wraps(client_params)
    def checked(state: PyTree, ids: ArrayLike):
        ids = checks.client_numbers(ids)
        if checks.is_concrete(ids) and np.size(ids):
            sizes = [jnp.shape(leaf)[0] for leaf in jax.tree.leaves(split_tables(state)[1]) if jnp.ndim(leaf)]
            on_host = np.asarray(ids)
            least, most = int(on_host.min()), int(on_host.max())
            if least < 0 or (sizes and most >= min(sizes)):
                of = f"0 to {min(sizes) - 1}" if sizes else "from 0 on"
                raise ValueError(f"ids holds {least if least < 0 else most}: clients are numbered {of}")
        return client_params(state, ids)

    checked._has_checks = True  # type: ignore[attr-defined]
    return checked
