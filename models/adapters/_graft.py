"""One function that grafts any adapter on any model."""

import zlib
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fedjax_core import Array, Hole, Key, Params, Variables, checks, leaf_paths, partition
from models._common import Model, Stage, span
from models.batch_norm import StatisticsModel, with_frozen_statistics

Rank = int | Array | None
"""The rank that one client uses, of those an adapter has, possibly traced; None for all."""


class Adapter(NamedTuple):
    """What is added to a model, before it is known to which.

    A layer's parameters are a dict, such as {"kernel": [in, out], "bias": [out]}; what is added to it, its part, is one
    too. An adapter has either `layer` or `stage`.

    Attributes:
      kinds: the kinds of layers that it can be added to, of `models.groups.KINDS`; none if it stands between stages.
      init: `init(key, shapes of the layer) -> part`; between stages `init(key, shapes of all parameters, stages)`.
      layer: `layer(part, call, x, key, rank) -> outputs` of the layer, of which `call(x)` gives those without adapter.
      stage: `stage(adapter, run, x, number, stages) -> outputs` of a stage, of which `run(x)` gives those without.
      merge: `merge(layer, part, rank, sign) -> layer` that does what layer and part do; with sign -1 the inverse.
      limit: `limit(part, rank) -> part` with zeros where a client of that rank has nothing.
    """

    kinds: tuple[str, ...]
    init: Callable[..., Any]
    layer: Callable[..., Any] | None = None
    stage: Callable[..., Any] | None = None
    merge: Callable[..., Any] | None = None
    limit: Callable[..., Any] | None = None


class Adapted(NamedTuple):
    """A model with an adapter: two trees, of which the first may stay frozen, shared by all clients and in memory once.

    Attributes:
      init: `init(key) -> adapter`, the new parameters {path of a layer: its part}.
      apply: `apply(base, adapter, x, key=None, rank=None) -> outputs [B, ...]`, like `Model.apply`. `rank`, an int or
        int32[] that may be traced, limits a client to the first of the adapter's ranks: the rest gets no gradient.
      features: `features(base, adapter, x, key=None, rank=None)`, like `Model.features`.
      stages: those of the model.
      run: `run(base, adapter, x, start=None, stop=None, key=None, rank=None)`, like `Model.run`.
      merge: `merge(base, adapter, rank=None) -> params` with which the model does what it does with the adapter.
      unmerge: `unmerge(params, adapter, rank=None) -> base`, the inverse up to rounding.
      limit: `limit(tree, rank)`, zeros where a client of that rank has nothing: of an adapter, or of what is added to
        it after each step, for an optimizer moves also what has no gradient (weight decay).
      layers: paths of the layers that have a part.
      joint: a `Model` of the parameters {"base": ..., "adapter": ...}, for losses and metrics. What is trained is a
        part of them: `partition(params, ["adapter", "base/head"])`.
    """

    init: Callable[[Key], Params]
    apply: Callable[..., Array]
    features: Callable[..., Array]
    stages: tuple[str, ...]
    run: Callable[..., Any]
    merge: Callable[..., Params]
    unmerge: Callable[..., Params]
    limit: Callable[[Params, Rank], Params]
    layers: tuple[str, ...]
    joint: Model


def adapted(model: Model | StatisticsModel, adapter: Adapter, where: Any = None) -> Adapted:
    """Grafts an adapter on a model.

    Layers are found by their path while flax runs them, so that nothing is copied, and under `jax.vmap` over clients'
    adapters the base is not batched.

    Args:
      model: of this package, or any `Model` whose `apply` calls flax modules. The base of one with running statistics
        is `Variables`, and frozen with them: batches are normalized by the running ones, in training too.
      adapter: `lora(...)` and the others of `models.adapters`.
      where: which parameters' layers get a part, as in `fedjax_core.partition`: paths (`model.paths("attention")`,
        "block_0"), an expression (`re.compile(".*/(query|value)/kernel")`) or a function. Of the layers chosen those
        get one that the adapter is for: dense ones for `lora`. Left out for `prompt`.

    Returns:
      An `Adapted`.

    Raises:
      TypeError: if `model` or `adapter` is something else.
      ValueError: if `where` is missing or chooses no layer that the adapter is for; from `apply`, if a layer with a
        part was not run as a flax module, so that its part would be ignored; from `merge`, if the adapter is none that
        can be merged; from all of them, if base or adapter are not those of this model; for a `rank` that the adapter
        does not know.
    """
    if not isinstance(model, Model | StatisticsModel):
        raise TypeError(
            f"model must be a Model, got {type(model).__name__}: the order is adapted(model, adapter, where)"
        )
    if not isinstance(adapter, Adapter):
        hint = ", and call what makes it" if callable(adapter) else ""
        raise TypeError(f"adapter must be an Adapter, got {type(adapter).__name__}: pass adapters.lora(rank=8){hint}")
    whole_shapes = jax.eval_shape(model.init, jax.random.key(0))
    shapes = _layers_of(whole_shapes)
    layers = _layers(model, adapter, where, shapes)
    kinds, inside = model.paths, "params/" if shapes is not whole_shapes else ""
    model = with_frozen_statistics(model)
    if adapter.layer is None and not model.stages:
        raise ValueError(
            "this adapter stands between the stages of a model, and this model has none: use one of models"
        )

    @jax.jit
    def init(key: Key) -> Params:
        if adapter.layer is None:
            return adapter.init(key, shapes, model.stages)
        return {path: adapter.init(_own(key, path), _at(shapes, path)) for path in layers}

    @cache
    def expected() -> dict[str, Any]:
        return _leaves(jax.eval_shape(lambda: init(jax.random.key(0))))

    of_layers = {f"{path}/{name}": leaf for path in layers for name, leaf in _at(shapes, path).items()}

    def check(base: Params, parts: Params) -> None:
        _check_leaves("base", _layers_of(base), of_layers)
        _check_leaves("adapter", parts, expected(), only=True)

    def run(
        base: Params,
        parts: Params,
        x: Any,
        start: Stage = None,
        stop: Stage = None,
        key: Key | None = None,
        rank: Rank = None,
    ) -> Any:
        whole = start is None and stop is None
        if whole:  # else either may hold only what those stages need
            check(base, parts)
        if adapter.layer is not None:
            call = (lambda: model.apply(base, x, key)) if whole else (lambda: model.run(base, x, start, stop, key))
            return _intercepted(call, parts, key, rank, strict=whole)
        _check_rank(adapter, rank)
        for number in range(*span(model.stages, start, stop)):
            one = lambda x, number=number: model.run(base, x, number, number + 1, key)  # noqa: E731
            x = adapter.stage(parts, one, x, number, model.stages)  # type: ignore[misc]
        return x

    def _intercepted(call: Callable[[], Any], parts: Params, key: Key | None, rank: Rank, strict: bool) -> Any:
        _check_rank(adapter, rank)
        met = set()

        def around(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
            path = "/".join(context.module.path)
            if context.method_name != "__call__" or path not in parts:
                return call(*args, **kwargs)
            met.add(path)
            own = None if key is None else _own(key, path)
            return adapter.layer(parts[path], lambda x: call(x, *args[1:], **kwargs), args[0], own, rank)  # type: ignore[misc]

        with nn.intercept_methods(around):
            outputs = call()
        if strict and set(parts) - met:
            raise ValueError(
                f"{sorted(set(parts) - met)[0]} has a part in the adapter, but no flax module of that path was run: "
                "graft on the model itself and not on a compiled function, and pass an adapter of this model"
            )
        return outputs

    def apply(base: Params, parts: Params, x: Any, key: Key | None = None, rank: Rank = None) -> Array:
        return run(base, parts, x, key=key, rank=rank)

    def features(base: Params, parts: Params, x: Any, key: Key | None = None, rank: Rank = None) -> Array:
        if model.stages:
            return run(base, parts, x, stop="head", key=key, rank=rank)
        return _intercepted(lambda: model.features(base, x, key), parts, key, rank, strict=False)

    def merged(base: Params, parts: Params, rank: Rank, sign: int) -> Params:
        _check_rank(adapter, rank)
        if adapter.merge is None:
            raise ValueError(
                "this adapter is no change of the layers' own parameters and cannot be merged: keep it apart"
            )
        check(base, parts)
        params = _layers_of(base)
        for path, part in parts.items():
            params = _replaced(params, path.split("/"), adapter.merge(_at(params, path), part, rank, sign))
        return base._replace(params=params) if isinstance(base, Variables) else params

    def limit(tree: Params, rank: Rank) -> Params:
        _check_rank(adapter, rank)
        if rank is None:
            return tree
        _check_leaves("tree", tree, expected(), only=True, holes=True)
        return {path: adapter.limit(part, rank) for path, part in tree.items()}  # type: ignore[misc]

    joint = Model(
        init=lambda key: {"base": model.init(key), "adapter": init(jax.random.fold_in(key, 1))},
        apply=lambda params, x, key=None: apply(*_both(params), x, key),
        features=lambda params, x, key=None: features(*_both(params), x, key),
        stages=model.stages,
        run=lambda params, x, start=None, stop=None, key=None: run(*_both(params), x, start, stop, key),
        paths=lambda kind: tuple(f"base/{inside}{path}" for path in kinds(kind)),
    )
    return Adapted(
        init,
        apply,
        features,
        model.stages,
        run,
        lambda base, parts, rank=None: merged(base, parts, rank, 1),
        lambda params, parts, rank=None: merged(params, parts, rank, -1),
        limit,
        layers,
        joint,
    )


def _layers_of(base: Params) -> Any:
    """The tree that has the layers by their paths."""
    return base.params if isinstance(base, Variables) else base


def _layers(model: Model | StatisticsModel, adapter: Adapter, where: Any, shapes: Params) -> tuple[str, ...]:
    """Paths of the layers that get a part."""
    if not adapter.kinds:
        if where is not None:
            raise ValueError(f"where must be left out for an adapter that stands between stages, got {where!r:.100}")
        return ()
    if where is None:
        raise ValueError("where must say which layers are adapted: pass model.paths('attention'), or other paths")
    chosen = _parents(leaf_paths(partition(shapes, where)[0]))
    able = set().union(*(_of_kind(model, kind, shapes) for kind in adapter.kinds))
    layers = tuple(path for path in chosen if path in able)
    if not layers:
        raise ValueError(
            f"where must choose layers of the kinds {', '.join(adapter.kinds)} for this adapter, got "
            f"{', '.join(chosen[:5])}: choose others, such as {', '.join(sorted(able)[:3]) or 'none, for it has none'}"
        )
    return layers


def _of_kind(model: Model | StatisticsModel, kind: str, shapes: Params) -> set[str]:
    """Paths of the model's layers of a kind, by their shapes where it does not know their types."""
    try:
        return set(_parents(model.paths(kind)))
    except ValueError:
        if model.stages:  # it knows, and has none
            return set()
    axes = {"dense": ("kernel", {2}), "convolution": ("kernel", {3, 4, 5}), "norm": ("scale", {1})}
    name, ranks = axes[kind]
    leaves = zip(leaf_paths(shapes), jax.tree.leaves(shapes), strict=True)
    return set(_parents(path for path, leaf in leaves if path.split("/")[-1] == name and len(leaf.shape) in ranks))


def _parents(paths: Any) -> tuple[str, ...]:
    return tuple(dict.fromkeys(path.rpartition("/")[0] for path in paths))


def _check_rank(adapter: Adapter, rank: Rank) -> None:
    if rank is None:
        return
    if adapter.limit is None:
        raise ValueError(f"rank must be left out for an adapter without ranks, got {rank!r}: only lora has them")
    is_array = isinstance(rank, jax.Array | np.ndarray | np.integer)
    is_int = isinstance(rank, int) and not isinstance(rank, bool)
    if not is_int and not (is_array and np.shape(rank) == () and np.issubdtype(rank.dtype, np.integer)):  # type: ignore[union-attr]
        got = f"{rank!r:.100}" if checks.is_concrete(rank) else f"{jnp.result_type(rank)}{list(np.shape(rank))}"
        raise ValueError(f"rank must be one integer, got {got}: pass an int, or int32[] and jax.vmap over several")


def _both(params: Any) -> tuple[Params, Params]:
    if not isinstance(params, Mapping) or not {"base", "adapter"} <= params.keys():
        raise ValueError(
            f"params of the joint model must be {{'base': ..., 'adapter': ...}}, got {_kind(params)}: put both in, and "
            "combine the parts of a tree that was cut"
        )
    return params["base"], params["adapter"]


def _leaves(tree: Params) -> dict[str, Any]:
    return dict(zip(leaf_paths(tree), jax.tree.leaves(tree), strict=True))


def _check_leaves(name: str, tree: Any, expected: dict[str, Any], *, only: bool = False, holes: bool = False) -> None:
    """Raises ValueError unless a tree has these leaves, by path; `only` for no others, `holes` for not all of them."""
    own = (
        "the model's own parameters, of model.init(key) or a checkpoint" if name == "base" else "what tuned.init gives"
    )
    fix = f"pass {own}, as {name}"
    found = _leaves(tree)
    if only and not isinstance(tree, Mapping):
        raise ValueError(f"{name} must be a dict with a part for each layer, got {_kind(tree)}: {fix}")
    more = next((path for path in found if path not in expected), None)
    if only and more is not None:
        raise ValueError(f"{name} has the leaf {more!r}, where this model's has {next(iter(expected))!r}: {fix}")
    for path, leaf in expected.items():
        if path in found:
            if jnp.shape(found[path]) != leaf.shape:
                got, want = list(jnp.shape(found[path])), list(leaf.shape)
                raise ValueError(f"{path!r} of {name} must have shape {want}, got {got}: {fix}")
        elif not holes:
            if any(map(_is_hole, jax.tree.leaves(tree, is_leaf=_is_hole))):
                raise ValueError(f"{name} has no leaf {path!r} but a hole: combine the parts of the tree first")
            raise ValueError(f"{name} has no leaf {path!r}, got {_kind(tree)}: {fix}")


def _is_hole(node: Any) -> bool:
    return isinstance(node, Hole)


def _kind(tree: Any) -> str:
    if not isinstance(tree, Mapping):
        return f"an object of type {type(tree).__name__}"
    names = ", ".join(repr(name) for name in list(tree)[:3]) + ", ..." * (len(tree) > 3)
    return f"a dict with {names}" if names else "an empty dict"


def _own(key: Key, path: str) -> Key:
    """The key of a layer, which depends on its path alone and not on what else is adapted."""
    return jax.random.fold_in(key, jnp.uint32(zlib.crc32(path.encode())))


def _at(tree: Params, path: str) -> Any:
    for name in path.split("/"):
        tree = tree[name]
    return tree


def _replaced(tree: Params, path: list[str], value: Any) -> Params:
    return value if not path else {**tree, path[0]: _replaced(tree[path[0]], path[1:], value)}
