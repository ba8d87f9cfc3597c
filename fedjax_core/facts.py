"""What a method's factory asks its caller for, declared in its signature.

    def moon(loss_fn: LossFn, client_optimizer: ClientOptimizer, *, features: FeatureFn, num_clients: NumClients, ...)

The annotations say what each argument is, whatever its name and wherever it stands. `needs` reads them, and so do the
command line, the documentation and the tests that every method gets; `values_suffice` and `local_options` read whether
a method takes gradients and which options of local work mean something to it. What a method does beside its rounds and
how it predicts is in the `Algorithm` that the factory returns; what its clients send, `uploads` finds by tracing a
round.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, NamedTuple, Unpack, get_args, get_origin, get_type_hints, is_typeddict

from fedjax_core.batching import LocalOptions
from fedjax_core.groups import Groups
from fedjax_core.tasks import Task
from fedjax_core.types import Array, Examples, Key, Need, Params, PyTree


class Split(NamedTuple):
    """A model in three pieces, of which clients have the first and the last, and a server the one between.

    What is trained, y, is in head and tail. The frozen parameters are `public`, the public data of the population. What
    stands at the cuts is a pytree with leaves [B, ...]; the tail takes what the head gives as well as what the body
    gives. A key means training, the same for all pieces of a step; None means evaluation.

    Attributes:
      head: `head(y, public, examples, key) -> s`, on the client.
      body: `body(public, s, key) -> r`, on the server.
      tail: `tail(y, public, r, key) -> outputs [B, ...]`, on the client.
      loss: `loss(outputs, examples) -> float[B]`, of each example alone.
    """

    head: Callable[[Params, Any, Examples, Key | None], Any]
    body: Callable[[Any, Any, Key | None], Any]
    tail: Callable[[Params, Any, Any, Key | None], Array]
    loss: Callable[[Array, Examples], Array]


NumClients = Annotated[int, Need("num_clients")]
"""The size of the population, N."""
NumClasses = Annotated[int, Need("num_classes")]
"""The number of classes, C."""
AdapterLossFn = Annotated[Callable[..., Array], Need("adapter loss")]
"""A loss of low-rank parts {"A": [in, r], "B": [r, out]} and of other leaves, of a model that is frozen."""
SplitModel = Annotated[Split, Need("split")]
"""A model in the pieces that clients and server have of it."""
FeatureFn = Annotated[Callable[[Params, Examples, Key], Array], Need("features")]
"""`features(params, batch, key) -> float[B, ...]`, the representation of each example."""
LogitsFn = Annotated[Callable[[Params, Examples, Key], Array], Need("logits")]
"""`logits(params, batch, key) -> float[B, C]`, the scores of the C classes for each example."""
LayerInputsFn = Annotated[Callable[[Params, Examples], Mapping[str, Array]], Need("inputs")]
"""`inputs(params, batch) -> {path: float[samples, d]}`, what goes into the layers."""
LayerWidths = Annotated[Mapping[str, int], Need("layers")]
"""Path of every layer to the width of what goes into it."""

PublicFn = Annotated[Callable[[PyTree], Any], Need("public")]
"""`unlabelled(public)`, the examples that a method wants among the population's public data; it cannot do without."""

GroupsOfClients = Annotated[Groups, Need("groups")]
"""Which architecture each client has."""
TaskOfEachGroup = Annotated[Sequence[Task], Need("tasks")]
"""A task for each group of clients, whose models differ in architecture."""
TaskWithHead = Annotated[Task, Need("task")]
"""A `Task` with features [B, d] and a head that is one dense layer of them."""

_NEVER_OPTIONAL = ("loss", "client optimizer")

_BY_NAME = {
    "loss_fn": "loss",
    "client_optimizer": "client optimizer",
    **{name: name for name in ("num_clients", "features", "logits", "inputs", "layers", "personal")},
}
"""What an argument without a declaration is taken for, so that a factory of one's own needs none."""


def needs(factory: Callable[..., Any]) -> dict[str, str]:
    """What a factory asks for: argument name to `Need.what`, in the order of the arguments.

    An argument that is not annotated with a `Need` counts by its usual name (`loss_fn`, `num_clients`, ...), unless
    another one is declared to be that. A loss or a client optimizer that may be None is an option and no need.
    """
    hints = _hints(factory)
    names = list(inspect.signature(factory).parameters)
    declared = {name: what for name in names if (what := _declared(hints.get(name))) is not None}
    taken = set(declared.values())
    found = {}
    for name in names:
        if name in declared:
            found[name] = declared[name]
        elif name in _BY_NAME and _BY_NAME[name] not in taken:
            found[name] = _BY_NAME[name]
    return found


def values_suffice(factory: Callable[..., Any]) -> bool:
    """Whether a method is given values of its loss and takes no gradients (`LossValuesFn`)."""
    marks = (_marks(hint) for hint in _hints(factory).values())
    return any(mark.values_only for found in marks for mark in found)


def local_options(factory: Callable[..., Any]) -> tuple[str, ...]:
    """Which options of local work (`LocalOptions`) a factory takes, in their order.

    They are arguments of its own, or `**local: Unpack[...]` of a `TypedDict` that has them; all of them where `**local`
    does not say.
    """
    known = tuple(LocalOptions.__annotations__)
    parameters = inspect.signature(factory).parameters
    taken = set(parameters)
    for name, parameter in parameters.items():
        if parameter.kind is not parameter.VAR_KEYWORD:
            continue
        hint = _hints(factory).get(name)
        said = get_args(hint)[0] if get_origin(hint) is Unpack else None
        taken |= set(said.__annotations__ if is_typeddict(said) else known)
    return tuple(name for name in known if name in taken)


def _hints(factory: Callable[..., Any]) -> dict[str, Any]:
    try:
        return get_type_hints(factory, include_extras=True)
    except Exception:  # annotations that cannot be resolved say nothing
        return {}


def _marks(annotation: Any) -> list[Need]:
    if get_origin(annotation) is not Annotated:
        return []
    return [mark for mark in annotation.__metadata__ if isinstance(mark, Need)]


def _declared(annotation: Any) -> str | None:
    if get_origin(annotation) is Annotated:
        if marks := _marks(annotation):
            return str(marks[-1].what)
        return _declared(get_args(annotation)[0])
    for option in get_args(annotation):  # `FeatureFn | None`
        if get_origin(option) is Annotated and (what := _declared(option)) not in (None, *_NEVER_OPTIONAL):
            return what
    return None
