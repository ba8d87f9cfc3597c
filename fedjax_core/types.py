"""Names for the few types every room of the library agrees on."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array
Key = jax.Array
"""A typed random key, `jax.random.key(seed)`."""
PyTree = Any
Params = Any
"""Any pytree of arrays."""
Examples = Any
"""A pytree of arrays whose leading axes agree."""
Scalar = float | jax.Array
"""A Python float or a (possibly traced) 0-d array."""

LossFn = Callable[..., Array]
"""`loss_fn(params, batch, key) -> float[B]`: one value per example of the batch.

With a fourth parameter named `mask` it is given bool[B] as well, False where the batch is padded: for a loss that looks
at the whole batch (`fedjax_core.masks`)."""


class Metrics(NamedTuple):
    """What every round reports; every field is a 0-d array, every round the same structure.

    Attributes:
      loss: training loss of the participants, averaged over each client's local steps and then over clients
        with the method's aggregation weights; NaN in a round without participants, where nothing was measured.
      update_norm: Euclidean norm of the change of the global model.
      uploaded: scalars sent up by each participant in this round, an integer; where they differ between participants
        their mean, a float, 0 in a round without.
      downloaded: scalars sent down to each participant in this round, likewise.
      participants: number of clients that took part.
      extra: the method's own metrics, a NamedTuple of arrays (or an empty tuple).
    """

    loss: Array
    update_norm: Array
    uploaded: Array
    downloaded: Array
    participants: Array
    extra: Any = ()


class Algorithm(NamedTuple):
    """A federated method as pure functions.

    Attributes:
      init: `init(params) -> state`. Every state has a field `round`, int32[], the number of rounds done.
      round: `round(state, cohort, key) -> (state, Metrics)`, one whole federated round.
      params: `params(state)`, the global model.
      client_params: `client_params(state, ids)`, the model that each of the clients `ids` (int32[C]) would use,
        leaves stacked to [C, ...]; the global model broadcast where the method has no personal part.
    """

    init: Callable[[Params], Any]
    round: Callable[[Any, Any, Key], tuple[Any, Metrics]]
    params: Callable[[Any], Params]
    client_params: Callable[[Any, Array], Params]


def global_client_params(params: Params, ids: Array) -> Params:
    """The global model once per client: leaves [...] become [C, ...] for ids [C]."""
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (ids.shape[0], *jnp.shape(leaf))), params)


def global_algorithm(
    init: Callable[[Params], Any],
    round: Callable[[Any, Any, Key], tuple[Any, Metrics]],
    params: Callable[[Any], Params] = lambda state: state.params,
) -> Algorithm:
    """A method without a personal part: every client would use the global model.

    Each array of the first state becomes one of its own, so that the state can be donated (`jax.jit(algorithm.round,
    donate_argnums=0)`) and the params that it was made from are still there.
    """

    def own_init(initial: Params) -> Any:
        return separate(init(initial), initial)

    return Algorithm(own_init, round, params, lambda state, ids: global_client_params(params(state), ids))


def separate(tree: PyTree, *others: PyTree) -> PyTree:
    """The pytree with a copy in the place of every array that occurs in it before, or in the others."""
    seen = {id(leaf) for leaf in jax.tree.leaves(others)}

    def own(leaf: Any) -> Any:
        if id(leaf) in seen and isinstance(leaf, jax.Array):
            return jnp.copy(leaf)
        seen.add(id(leaf))
        return leaf

    return jax.tree.map(own, tree)
