"""Groups of a model's parameters by the type of the module they belong to, whatever its name.

    model.paths("norm")                                  # of a model of this package
    module_paths(module, example)["norm"]                # of any flax module
    personal, shared = fedjax_core.partition(params, model.paths("norm"))

| kind | parameters |
| --- | --- |
| attention | the projections of queries, keys, values and outputs |
| bias | named "bias", of whatever module, those of normalizations among them |
| convolution | kernels and biases of convolutions |
| dense | kernels and biases of dense layers, those of attention and of the head among them |
| embedding | tables of tokens, positions and the like |
| head | all below the top-level entry "head" |
| norm | scales and biases of layer, group, batch, instance and root-mean-square normalization |
| recurrent | of recurrent cells |
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import flax.linen as nn
import jax

from fedjax_core import leaf_paths

TYPES: dict[str, tuple[type, ...]] = {
    "attention": (nn.MultiHeadDotProductAttention,),
    "convolution": (nn.Conv, nn.ConvTranspose, nn.ConvLocal),
    "dense": (nn.Dense, nn.DenseGeneral, nn.Einsum),
    "embedding": (nn.Embed,),
    "norm": (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.InstanceNorm, nn.BatchNorm),
    "recurrent": (nn.RNNCellBase,),
}
KINDS = tuple(sorted({*TYPES, "bias", "head"}))


def module_paths(module: nn.Module, *args: Any, **kwargs: Any) -> dict[str, tuple[str, ...]]:
    """Kind -> the paths of the parameters of that kind, for the kinds that a flax module has.

    A module may say of its own parameters and children what they are, by a class attribute
    `parameter_groups = {"attention": ("query", "key")}`.

    Args:
      module: any flax linen module.
      *args: what it is called with; arrays, their shapes (`jax.ShapeDtypeStruct`), or settings such as True.
      **kwargs: settings by name.
    """
    kinds: dict[str, set[str]] = {}

    def note(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        path = context.module.path
        if not path and context.module.name:  # a copy of a submodule, such as a cell that is asked for its first state
            return call(*args, **kwargs)
        for kind, types in TYPES.items():
            if isinstance(context.module, types):
                kinds.setdefault("/".join(path), set()).add(kind)
        for kind, children in getattr(context.module, "parameter_groups", {}).items():
            for child in children:
                kinds.setdefault("/".join((*path, child)), set()).add(kind)
        return call(*args, **kwargs)

    traced = {i: arg for i, arg in enumerate(args) if all(hasattr(leaf, "shape") for leaf in jax.tree.leaves(arg))}

    def init(traced: dict[int, Any]) -> Any:
        given = [traced.get(i, arg) for i, arg in enumerate(args)]
        return module.init({"params": jax.random.key(0), "dropout": jax.random.key(0)}, *given, **kwargs)

    with nn.intercept_methods(note):
        params = jax.eval_shape(init, traced).get("params", {})

    found: dict[str, list[str]] = {}
    for path in leaf_paths(params):
        names = path.split("/")
        above = ["/".join(names[:n]) for n in range(len(names) + 1)]
        own = set().union(*(kinds.get(node, set()) for node in above))
        own |= {"bias"} if names[-1] == "bias" else set()
        own |= {"head"} if names[0] == "head" else set()
        for kind in own:
            found.setdefault(kind, []).append(path)
    return {kind: tuple(paths) for kind, paths in sorted(found.items())}


def paths_of(module: nn.Module, *args: Any, **kwargs: Any) -> Callable[[str], tuple[str, ...]]:
    """`Model.paths` of a flax module that is called with these arguments; traces it at the first question."""

    @cache
    def found() -> dict[str, tuple[str, ...]]:
        return module_paths(module, *args, **kwargs)

    def paths(kind: str) -> tuple[str, ...]:
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}: pick one of them")
        if kind not in found():
            raise ValueError(f"the model has no parameters of kind {kind!r}: it has {', '.join(found())}")
        return found()[kind]

    return paths
