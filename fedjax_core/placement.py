"""Where arrays lie on a mesh of devices, in one process or in many.

A mesh has an axis "clients", along which the clients of a cohort are spread, and may have an axis "model", along which
the devices that train one client share its model. One code path serves all: on one process everything is a
`device_put`, and with several (`jax.distributed`) each gives its devices their part of what all of them hold.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from fedjax_core import checks
from fedjax_core.clients import ClientTable
from fedjax_core.types import Array, PyTree

CLIENTS, MODEL = "clients", "model"


def client_mesh(num_devices: int | None = None, *, model: int = 1) -> Mesh:
    """A mesh to give to `Plan`, over the devices of all processes.

    Args:
      num_devices: devices to take, a multiple of `model`; all there are unless given.
      model: devices that share the model of one client. With more than one the mesh has a second axis, "model".

    Raises:
      ValueError: if there are not as many, or `model` does not divide them.
    """
    checks.positive_int("model", model, "1 keeps every model whole on one device")
    devices = jax.devices()
    if num_devices is None:
        num_devices = len(devices)
    checks.positive_int("num_devices", num_devices, "a mesh has at least one device")
    if num_devices > len(devices):
        raise ValueError(
            f"num_devices={num_devices} but there are {len(devices)} {devices[0].platform} devices: lower it (the "
            f"processor can stand in for several with JAX_NUM_CPU_DEVICES={num_devices})"
        )
    if num_devices % model:
        raise ValueError(f"model={model} does not divide num_devices={num_devices}: take a multiple of {model}")
    if num_devices < len(devices) and jax.process_count() > 1:
        raise ValueError(
            f"num_devices={num_devices} of {len(devices)}: the devices of all {jax.process_count()} processes make one "
            "mesh, leave num_devices out"
        )
    return mesh_over(devices[:num_devices], model=model)


def mesh_over(devices: Sequence[Any], *, model: int = 1) -> Mesh:
    """A mesh over these devices, which may be stand-ins for some that are not there; `model` divides their number."""
    grid = np.asarray(devices).reshape(-1, model)
    if model == 1:
        return Mesh(grid[:, 0], (CLIENTS,), axis_types=(AxisType.Auto,))
    return Mesh(grid, (CLIENTS, MODEL), axis_types=(AxisType.Auto,) * 2)


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device: how examples, keys and metrics lie."""
    return NamedSharding(mesh, PartitionSpec())


def shardings(state: PyTree, mesh: Mesh, *, batch_axes: int = 0) -> PyTree:
    """How a method's state lies on a mesh: a `NamedSharding` for every leaf.

    Tables of per-client state (`ClientTable`) are split by client where the devices divide the number of clients, and
    along the longest axis of a row that they divide where they do not. With an axis "model", matrices and larger
    arrays are split along their longest axis that it divides; the compiler does the rest. Everything else, and what
    nothing divides, is whole on every device.

    Args:
      state: the state, or its shapes (`jax.eval_shape`).
      mesh: from `client_mesh`, or any mesh with an axis "clients".
      batch_axes: leading axes of all leaves that count simulations (1 for a `vmap` over seeds).
    """
    clients, model = mesh.shape.get(CLIENTS, 1), mesh.shape.get(MODEL, 1)

    def split(leaf: Array, is_row: bool) -> NamedSharding:
        spec: list[str | None] = [None] * len(leaf.shape)
        own = range(batch_axes + is_row, len(spec))  # axes of one model, or of one client's row

        def longest(parts: int) -> int | None:
            fitting = [axis for axis in own if spec[axis] is None and leaf.shape[axis] % parts == 0]
            return max(fitting, key=lambda axis: leaf.shape[axis], default=None)

        if is_row and clients > 1:
            by_client = leaf.shape[batch_axes] % clients == 0
            axis = batch_axes if by_client else longest(clients)
            if axis is not None:
                spec[axis] = CLIENTS
        if model > 1 and len(own) >= 2 and not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            axis = longest(model)
            if axis is not None:
                spec[axis] = MODEL
        return NamedSharding(mesh, PartitionSpec(*spec))

    def of_node(node: PyTree):
        if isinstance(node, ClientTable):
            rows = jax.tree.map(lambda leaf: split(leaf, True), node.rows)
            return ClientTable(rows, jax.tree.map(lambda _: replicated(mesh), node.index))
        return split(node, False)

    return jax.tree.map(of_node, state, is_leaf=lambda node: isinstance(node, ClientTable))


def place(tree: PyTree, sharding: PyTree) -> PyTree:
    """Puts arrays where a sharding says, across processes too.

    Args:
      tree: pytree of arrays; with several processes, each holds all of it, and the same.
      sharding: one `NamedSharding` for all leaves, or a pytree of them like `tree`.
    """
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)
    if isinstance(sharding, NamedSharding):
        sharding = jax.tree.map(lambda _: sharding, tree)
    return jax.tree.map(_place_part, tree, sharding)


def _place_part(leaf: Array | np.ndarray, sharding: NamedSharding) -> Array:
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return jax.device_put(leaf, sharding)  # on the mesh already
    if jax.dtypes.issubdtype(jax.numpy.result_type(leaf), jax.dtypes.prng_key):
        data = _place_part(jax.random.key_data(leaf), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    value = np.asarray(leaf)
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def unmeshed(tree: PyTree) -> PyTree:
    """The same arrays, but for the name of a mesh in their types, which is there while a function of them is traced.

    A client program that closes over an array is traced with the array's type. Inside `shard_map` the array has another
    one, of the same mesh with its axes by hand, and what was traced (a `jnp.where`, a nested loop) does not fit any
    more: JAX refuses it. Where arrays lie does not change, and the compiler sees no operation. Arrays that are not
    traced, in a round that is not compiled, and those of a mesh with explicit axes, whose types say how they lie, stay
    as they are.
    """

    def one(leaf: Array) -> Array:
        if not isinstance(leaf, jax.core.Tracer):
            return leaf
        axes = jax.typeof(leaf).sharding.mesh.axis_types
        if not axes or any(axis != AxisType.Auto for axis in axes):
            return leaf
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            data: Array = _UNMESHED.bind(jax.random.key_data(leaf))
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
        found: Array = _UNMESHED.bind(leaf)
        return found

    return jax.tree.map(one, tree)


_UNMESHED = Primitive("unmeshed")
_UNMESHED.def_impl(lambda x: x)
_UNMESHED.def_abstract_eval(lambda x: ShapedArray(x.shape, x.dtype, weak_type=x.weak_type))
mlir.register_lowering(_UNMESHED, lambda context, x: [x])
ad.deflinear2(_UNMESHED, lambda cotangent, x: [cotangent])
batching.defvectorized(_UNMESHED)
