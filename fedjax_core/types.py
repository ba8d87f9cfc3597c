"""Names for the few types that all parts of the library use."""

from collections.abc import Callable, Sequence
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np

Array = jax.Array
Key = jax.Array
"""A typed random key, `jax.random.key(seed)`."""
ArrayLike = jax.Array | np.ndarray | Sequence[Any] | float
"""What an array is made of: an array of JAX or numpy, a number, nested sequences of numbers."""
PyTree = Any
Params = Any
"""Any pytree of arrays."""
Examples = Any
"""A pytree of arrays whose leading axes agree."""
Scalar = float | jax.Array
"""A Python float or a (possibly traced) 0-d array."""

Counter = int | jax.Array
"""A number of rounds: 0 at the beginning, int32[] from then on."""

Weights = str | ArrayLike
"""Weights of the clients: "uniform", "examples" (number of examples), or float[num_clients]."""


class Need(NamedTuple):
    """Marks an argument of a factory as something that its caller has to bring (`fedjax_core.needs`).

    Attributes:
      what: "loss", "adapter loss", "split", "client optimizer", "num_clients", "num_classes", "features", "logits",
        "inputs", "layers", "public", "personal", "groups", "task" or "tasks"; a factory of one's own may name others.
      values_only: of a loss, whether values of it are enough, and no gradient is taken.
    """

    what: str
    values_only: bool = False


LossFn = Annotated[Callable[..., Array], Need("loss")]
"""`loss_fn(params, batch, key) -> float[B]`: one value per example of the batch.

With a fourth parameter named `mask` it is given bool[B] as well, False where the batch is padded: for a loss that looks
at the whole batch (`fedjax_core.masks`)."""

LossValuesFn = Annotated[Callable[..., Array], Need("loss", values_only=True)]
"""A `LossFn` of which a method takes values alone: it need not have a gradient."""


class Variables(NamedTuple):
    """A model with statistics, which a forward pass updates and no gradient does (flax calls them `batch_stats`).

    Attributes:
      params: pytree of arrays, what is trained.
      statistics: pytree of arrays; see `fedjax_core.with_statistics`.
    """

    params: Params
    statistics: PyTree


class Metrics(NamedTuple):
    """What every round reports; every field is a 0-d array, every round the same structure.

    Attributes:
      loss: training loss of the participants, averaged over each client's local steps and then over clients
        with the method's aggregation weights; NaN in a round without participants, where nothing was measured.
      update_norm: Euclidean norm of the change of the global model.
      bytes_up: bytes sent up in this round, mean over the participants, a float; 0 in a round without.
      bytes_down: bytes sent down, likewise.
      participants: number of clients that took part.
      extra: the method's own metrics, a NamedTuple of arrays (or an empty tuple).
    """

    loss: Array
    update_norm: Array
    bytes_up: Array
    bytes_down: Array
    participants: Array
    extra: PyTree = ()
