"""How a cohort is spread over the hardware."""

from dataclasses import dataclass

import jax
from jax.sharding import AxisType, Mesh

from fedjax_core import checks, collectives


@dataclass(frozen=True)
class Plan:
    """How `for_each_client` uses the hardware.

    Attributes:
      lanes: clients trained at the same time, over the whole mesh; 1 is one client after another; None picks the
        backend's default, and many for a program that carries next to nothing from step to step.
      mesh: devices to spread the cohort over, or None for one device.
      axis: the mesh axis the clients are spread over.
      fast_convolutions: whether convolutions and pooling of the clients are rewritten, on a CPU, to what its compiler
        is fast at; see `fedjax_core.convolutions`. Without, they are compiled as the model has them.
      batch_parts: equal parts of a batch, of which those at its end that are all padding are not computed where a
        device trains one client at a time. It saves time with long steps of clients whose examples do not fill their
        batches, and costs the compilation of the step once more for each part. 1 computes every batch whole.
    """

    lanes: int | None = None
    mesh: Mesh | None = None
    axis: str = "clients"
    fast_convolutions: bool = True
    batch_parts: int = 1

    def __post_init__(self) -> None:
        if self.lanes is not None:
            checks.positive_int("lanes", self.lanes, "1 trains one client after another")
        if not isinstance(self.fast_convolutions, bool):
            raise TypeError(
                f"fast_convolutions must be True or False, got {self.fast_convolutions!r}: False compiles convolutions "
                "as the model has them"
            )
        checks.positive_int("batch_parts", self.batch_parts, "1 computes every batch whole, its padding too")
        if self.mesh is None:
            return
        if not isinstance(self.mesh, Mesh):
            raise TypeError(
                f"mesh must be a jax.sharding.Mesh, got {type(self.mesh).__name__}: pass for example "
                f"jax.make_mesh((2,), ({self.axis!r},)), or fedjax_core.client_mesh(2)"
            )
        if self.axis not in self.mesh.shape:
            raise ValueError(
                f"axis {self.axis!r} is not an axis of the mesh, which has {tuple(self.mesh.shape)}: build it with "
                f"jax.make_mesh((number_of_devices,), ({self.axis!r},))"
            )
        if self.lanes is not None and self.lanes % self.num_devices:
            raise ValueError(
                f"the mesh has {self.num_devices} devices along {self.axis!r}, which does not "
                f"divide lanes={self.lanes}: use a multiple of {self.num_devices}"
            )
        object.__setattr__(self, "mesh", auto_mesh(self.mesh))
        collectives.warn_if_too_late(self.mesh.devices.flat)

    @property
    def num_devices(self) -> int:
        """Number of devices the clients are spread over."""
        return 1 if self.mesh is None else self.mesh.shape[self.axis]

    def check_batch(self, batch_size: int) -> None:
        """Raises ValueError if a batch cannot be cut into equal parts."""
        if batch_size % self.batch_parts:
            raise ValueError(
                f"batch_size={batch_size} cannot be cut into batch_parts={self.batch_parts} equal parts: take a "
                "divisor of the batch size"
            )

    def lanes_per_device(self, num_slots: int) -> int:
        """Lanes on each device, at most the number of slots there."""
        lanes = default_lanes() if self.lanes is None else self.lanes // self.num_devices
        return max(1, min(lanes, num_slots))


def auto_mesh(mesh: Mesh) -> Mesh:
    """The mesh with axes on which the compiler places what is outside the clients' loop; only that is by hand."""
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def default_lanes() -> int:
    """Lanes per device if the user names none.

    One on a CPU, where a single client already keeps the cores busy (benchmarks/results/plans.json). 16 elsewhere: on
    an H200 an MLP's 64 clients were fastest in 16 lanes, and pfl's CNN gained up to its 50 (docs/gpu.md). For a TPU its
    compiler expects an MLP's clients to take a seventh of the time in 16 lanes, and a CNN's 1.2 times in ten
    (docs/tpu.md).
    """
    return 1 if jax.default_backend() == "cpu" else 16
