"""TPU chips and slices: what is published of them, and stand-ins for their devices, for which programs are compiled.

The compiler is in the package libtpu (the extra `tpu`), which needs no TPU.
"""

import contextlib
import math
import os
import re
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from fedjax_core import checks
from fedjax_core.placement import mesh_over
from pipelines.common.names import pick


class Chip(NamedTuple):
    """What is published of a chip.

    Attributes:
      name: generation, as in the name of a topology.
      flops: peak operations of matrix products a second, in bfloat16, which products of float32 take by default too.
      hbm_bytes: its memory.
      hbm_bytes_per_second: bandwidth of that.
      link_bytes_per_second: bandwidth of a link to a neighbor, in one direction.
      cycles_per_second: clock at which its four matrix units of 128 x 128 a core reach the peak, for the compiler's own
        estimates; None for other units.
      axes: of the grid of chips in a slice.
      most: chips of the largest slice.
      accelerator: `TPU_ACCELERATOR_TYPE` of a slice, with the number that it has for each chip.
      source: page that says so.
    """

    name: str
    flops: float
    hbm_bytes: float
    hbm_bytes_per_second: float
    link_bytes_per_second: float
    cycles_per_second: float | None
    axes: int
    most: int
    accelerator: tuple[str, int]
    source: str


# Gigabytes of memory are taken as powers of two: the compiler lets a program have 15.75 GiB of the 16 "GB" of v5e.
_V5E = Chip(
    "v5e",
    flops=197e12,
    hbm_bytes=16 * 2**30,
    hbm_bytes_per_second=819e9,
    link_bytes_per_second=50e9,
    cycles_per_second=197e12 / (4 * 2 * 128**2),
    axes=2,
    most=256,
    accelerator=("v5litepod", 1),
    source="https://cloud.google.com/tpu/docs/v5e",
)
_V5P = Chip(
    "v5p",
    flops=459e12,
    hbm_bytes=95 * 2**30,
    hbm_bytes_per_second=2765e9,
    link_bytes_per_second=100e9,
    cycles_per_second=459e12 / (2 * 4 * 2 * 128**2),
    axes=3,
    most=6144,
    accelerator=("v5p", 2),
    source="https://cloud.google.com/tpu/docs/v5p",
)
_V6E = Chip(
    "v6e",
    flops=918e12,
    hbm_bytes=32 * 2**30,
    hbm_bytes_per_second=1638e9,
    link_bytes_per_second=100e9,
    cycles_per_second=None,
    axes=2,
    most=256,
    accelerator=("v6e", 1),
    source="https://cloud.google.com/tpu/docs/v6e",
)
CHIPS = {chip.name: chip for chip in (_V5E, _V5P, _V6E)}
"""Name to chip. Links: v5e and v6e have four of them, with 400 and 800 GB/s in both directions together; v5p has six,
with 4,800 Gbit/s."""

HOP_SECONDS = 1e-6
"""What passing something on to the next chip takes at least; an assumption."""

_NAME = re.compile(r"(\w+):(\d+(?:x\d+)*)")


class Slice(NamedTuple):
    """A slice of TPUs: a grid of chips.

    Attributes:
      name: such as "v5e:4x4".
      chip: its chips.
      shape: chips along each axis of the grid.
    """

    name: str
    chip: Chip
    shape: tuple[int, ...]

    @property
    def num_chips(self) -> int:
        """Number of chips."""
        return math.prod(self.shape)


def parse(topology: str) -> Slice:
    """The slice of a name such as "v5e:4x4", which need not be known to the compiler.

    Raises:
      ValueError: if it is no such name, of no chip in `CHIPS`, or of a grid with other axes or too many chips.
    """
    match = _NAME.fullmatch(topology.strip())
    if match is None:
        raise ValueError(
            f"topology={topology!r} is no name of a slice: write the chip and the grid of chips, such as v5e:4x4"
        )
    chip = CHIPS[pick("TPU", match.group(1), CHIPS)]
    shape = tuple(map(int, match.group(2).split("x")))
    example = f"{chip.name}:{'x'.join(['4'] * chip.axes)}"
    if len(shape) != chip.axes or min(shape) < 1:
        raise ValueError(
            f"topology={topology!r}, but chips of {chip.name} make grids of {chip.axes} axes, as {example}"
        )
    if math.prod(shape) > chip.most:
        raise ValueError(
            f"topology={topology!r} has {math.prod(shape)} chips, and the largest slice of {chip.name} has "
            f"{chip.most}: take a smaller one, such as {example}"
        )
    return Slice(f"{chip.name}:{match.group(2)}", chip, shape)


def devices(tpus: Slice) -> list[Any]:
    """Stand-ins for the devices of a slice: programs can be compiled for them, and not run.

    Raises:
      ValueError: if the compiler is not installed, or knows no such slice.
    """
    if find_spec("libtpu") is None:
        raise ValueError(
            "the compiler for TPUs is not installed (package libtpu): install the extra tpu, "
            "`pip install 'fedjax-core[tpu]'`; no TPU is needed"
        )
    options = {"chips_per_host_bounds": (1,) * 3} if tpus.num_chips == 1 else {}
    try:
        with _environment(tpus):
            found = topologies.get_topology_desc(platform="tpu", topology_name=tpus.name, **options)
    except (jax.errors.JaxRuntimeError, NotImplementedError, RuntimeError) as error:
        said = str(error).splitlines()[0][:200]
        example = f"{tpus.chip.name}:{'x'.join(['2', '2', '1'][: tpus.chip.axes])}"
        raise ValueError(
            f"topology={tpus.name!r} is no slice that the compiler knows ({said}): take another, such as {example}"
        ) from None
    return list(found.devices)


def mesh(tpus: Slice, num_devices: int | None = None, *, model: int = 1) -> Mesh:
    """The mesh over the chips of a slice, as `fedjax_core.client_mesh` makes it of devices that are there.

    Args:
      tpus: the slice.
      num_devices: chips to take, a multiple of `model`; all unless given.
      model: chips that share the model of one client.

    Raises:
      ValueError: as `devices`; if the slice has not as many chips, or `model` does not divide them.
    """
    num_devices = tpus.num_chips if num_devices is None else num_devices
    checks.positive_int("mesh", num_devices, "a mesh has at least one device")
    checks.positive_int("model_parallel", model, "1 keeps every model whole on one chip")
    if num_devices > tpus.num_chips:
        raise ValueError(
            f"mesh={num_devices} but {tpus.name} has {tpus.num_chips} chips: lower it, leave it out, or take a larger "
            "slice"
        )
    if num_devices % model:
        raise ValueError(
            f"model_parallel={model} does not divide the {num_devices} chips: take a divisor, or another mesh"
        )
    return mesh_over(devices(tpus)[:num_devices], model=model)


@contextlib.contextmanager
def _environment(tpus: Slice) -> Iterator[None]:
    """Inside, the compiler is told what else it would ask a TPU's host for; what is set already stays.

    After that the variables are gone again: a real TPU of this machine would take them for its own.
    """
    kind, each = tpus.chip.accelerator
    wanted = {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": f"{kind}-{each * tpus.num_chips}",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
        # Otherwise one process at a time may load the compiler, as if it took a TPU.
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    added = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)
