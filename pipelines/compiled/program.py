"""Reads an optimized program of XLA for TPUs: its matrix products, the bytes it moves, its collectives and its loops.

`cost_analysis` of a compiled program counts the body of a loop once, however often it runs, and the steps of a round
are such a body. Here every computation counts as often as it runs, as far as that is known. The text of a program is
a list of computations, each a list of instructions; a computation is used by instructions of others, as the body of a
`while` or the inside of a `fusion`.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from types import MappingProxyType
from typing import NamedTuple

from pipelines.compiled.chips import Chip

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

_BITS = {"pred": 8, "token": 0, "opaque": 0, "c64": 64, "c128": 128, "f8e4m3fn": 8, "f8e5m2": 8}
_ARRAY = re.compile(r"([a-z]\w*)\[([^\]]*)\](\{[^}]*\})?")
_NAMES = re.compile(r"%([\w.\-]+)")
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id"),
    *("optimization-barrier", "domain", "iota"),
}
"""Operations that move nothing: names for what is there, and numbers that are made where they are used."""
_ALIASES = ("AssumeGatherIndicesInBound", "ConcatBitcast", "GatherScatterIndicesBitpacked")
"""Calls to the compiler's own that say something about their operand and move nothing."""
_HBM = 0


class Array(NamedTuple):
    """An array in a program.

    Attributes:
      dtype: such as "f32".
      shape: sizes of its axes.
      layout: numbers of its axes, the one that varies fastest first.
      tile: sizes to multiples of which the last axes of the layout are padded.
      space: number of the memory in which it lies, 0 for HBM.
    """

    dtype: str
    shape: tuple[int, ...]
    layout: tuple[int, ...]
    tile: tuple[int, ...]
    space: int

    @property
    def num_bytes(self) -> int:
        """Bytes it takes, padding included."""
        physical = [self.shape[axis] for axis in reversed(self.layout)]
        for i, unit in enumerate(reversed(self.tile), 1):
            if i <= len(physical):
                physical[-i] = -(-physical[-i] // unit) * unit
        return math.prod(physical) * _bits(self.dtype) // 8

    @property
    def own_bytes(self) -> int:
        """Bytes of its numbers alone."""
        return math.prod(self.shape) * _bits(self.dtype) // 8

    @property
    def hbm_bytes(self) -> int:
        """Bytes it takes of HBM."""
        return self.num_bytes if self.space == _HBM else 0


def _bits(dtype: str) -> int:
    if dtype in _BITS:
        return _BITS[dtype]
    number = re.match(r"[a-z]+(\d+)", dtype)
    return int(number.group(1)) if number else 0


class Instruction(NamedTuple):
    """An instruction of a computation.

    Attributes:
      name: its name.
      opcode: what it does, such as "fusion".
      arrays: the arrays of its result, those of nested tuples one after the other.
      operands: names of the instructions whose results it takes.
      inside: what stands between its parentheses.
      attributes: what stands behind them.
    """

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    inside: str
    attributes: str

    def called(self, attribute: str) -> list[str]:
        """Names of the computations that an attribute such as `calls` names."""
        match = re.search(rf"\b{attribute}=(?:\{{([^}}]*)\}}|(%[\w.\-]+))", self.attributes)
        return _NAMES.findall(match.group(1) or match.group(2)) if match else []

    @property
    def scope(self) -> str:
        """Where in the traced program it comes from, such as "jit(round)/shard_map/while"."""
        match = re.search(r'op_name="([^"]*)"', self.attributes)
        return match.group(1) if match else ""

    @property
    def estimated_cycles(self) -> int:
        """The compiler's estimate for it, 0 where there is none."""
        match = re.search(r'"estimated_cycles":"(\d+)"', self.attributes)
        return int(match.group(1)) if match else 0

    @property
    def group_size(self) -> int:
        """Chips that take part in a collective together, 0 if the text does not say."""
        mesh = re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", self.attributes)
        if mesh:
            sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh.group(1)))
            return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", mesh.group(2)) if axis in sizes)
        short = re.search(r"replica_groups=\[(\d+),(\d+)\]", self.attributes)
        if short:
            return int(short.group(2))
        listed = re.search(r"replica_groups=\{\{([\d,]*)\}", self.attributes)
        return len(listed.group(1).split(",")) if listed and listed.group(1) else 0


class Collective(NamedTuple):
    """A collective operation.

    Attributes:
      kind: of `COLLECTIVES`.
      num_bytes: bytes of its result on a chip (of an all-to-all or a permutation: what each sends; of a
        reduce-scatter: of its operand), without padding.
      chips: chips that take part together, 0 if that is not known.
    """

    kind: str
    num_bytes: int
    chips: int


class Cost(NamedTuple):
    """What running something takes on a chip.

    Attributes:
      flops: operations of matrix products and convolutions, two for each multiply-add.
      hbm_bytes: bytes read from and written to HBM, padding included.
      cycles: the compiler's own estimates, added up.
      roofline_seconds: of each operation the longer of its products at peak and its bytes at full bandwidth, added up.
      collectives: each collective to how often it runs.
      unknown: scopes of loops of which nothing says how often they run; they are counted once.
    """

    flops: float = 0.0
    hbm_bytes: float = 0.0
    cycles: float = 0.0
    roofline_seconds: float = 0.0
    collectives: Mapping[Collective, float] = MappingProxyType({})
    unknown: frozenset[str] = frozenset()

    def __add__(self, other: "Cost") -> "Cost":  # type: ignore[override]
        counts = dict(self.collectives)
        for each, number in other.collectives.items():
            counts[each] = counts.get(each, 0) + number
        return Cost(
            self.flops + other.flops,
            self.hbm_bytes + other.hbm_bytes,
            self.cycles + other.cycles,
            self.roofline_seconds + other.roofline_seconds,
            counts,
            self.unknown | other.unknown,
        )

    def times(self, count: float) -> "Cost":
        """That so many times."""
        collectives = {each: number * count for each, number in self.collectives.items()}
        return Cost(
            self.flops * count,
            self.hbm_bytes * count,
            self.cycles * count,
            self.roofline_seconds * count,
            collectives,
            self.unknown,
        )


Trips = Callable[[Instruction], float | None]
"""How often a `while` runs its body, or None where that is not known."""


class Program:
    """An optimized program, read from its text.

    Attributes:
      computations: name to instructions by name, in their order.
      entry: name of the computation that runs.
    """

    def __init__(self, text: str) -> None:
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        self._roots: dict[str, str] = {}
        current: dict[str, Instruction] | None = None
        name = ""
        for line in text.splitlines():
            if line.startswith(("%", "ENTRY ")) and line.rstrip().endswith("{"):
                name = _NAMES.search(line).group(1)  # type: ignore[union-attr]
                current = self.computations[name] = {}
                if line.startswith("ENTRY"):
                    self.entry = name
            elif line.startswith("}"):
                current = None
            elif current is not None and " = " in line:
                instruction = _instruction(line)
                current[instruction.name] = instruction
                if line.lstrip().startswith("ROOT "):
                    self._roots[name] = instruction.name
        if not self.entry:
            raise ValueError("this is no text of an XLA program: it has no ENTRY computation")

    def root(self, computation: str) -> Instruction:
        """The instruction whose result is that of a computation."""
        return self.computations[computation][self._roots[computation]]

    def instructions(self) -> Iterator[Instruction]:
        """All instructions of all computations."""
        for computation in self.computations.values():
            yield from computation.values()

    @cached_property
    def host_calls(self) -> list[str]:
        """Names of instructions that talk to the host: callbacks, infeed, outfeed, sends and receives."""
        talking = ("infeed", "outfeed", "send", "recv")
        calls = re.compile(r'custom_call_target="[^"]*(?:callback|Host)[^"]*"', re.IGNORECASE)
        return [
            each.name
            for each in self.instructions()
            if each.opcode in talking or (each.opcode == "custom-call" and calls.search(each.attributes))
        ]

    def loops(self) -> list[Instruction]:
        """All `while` instructions."""
        return [each for each in self.instructions() if each.opcode == "while"]

    def fixed_trips(self, loop: Instruction) -> int | None:
        """How often a loop runs that counts up to a constant, or None."""
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes)
        if known:
            return int(known.group(1))
        (condition,) = loop.called("condition")
        instructions, root = self.computations[condition], self.root(condition)
        if root.opcode != "compare" or "direction=LT" not in root.attributes or len(root.operands) != 2:
            return None
        counter, end = (instructions[name] for name in root.operands)
        if counter.opcode == "get-tuple-element" and end.opcode == "constant" and end.inside.lstrip("-").isdigit():
            return max(int(end.inside), 0)
        return None

    def cost(self, chip: Chip, trips: Trips = lambda loop: None) -> Cost:
        """What a run of the program takes on a chip.

        Args:
          chip: the chip.
          trips: how often loops run; those of which it says None are taken to count up to their constant.
        """
        return self._cost(self.entry, chip, trips, {})

    def _cost(self, name: str, chip: Chip, trips: Trips, done: dict[str, Cost]) -> Cost:
        if name not in done:
            total = Cost()
            for each in self.computations[name].values():
                total += self._cost_of(each, name, chip, trips, done)
            done[name] = total
        return done[name]

    def _cost_of(self, each: Instruction, within: str, chip: Chip, trips: Trips, done: dict[str, Cost]) -> Cost:
        if each.opcode == "while":
            count: float | None = trips(each)
            count = self.fixed_trips(each) if count is None else count
            unknown = frozenset() if count is not None else frozenset([each.scope or each.name])
            count = 1 if count is None else count
            (body,), (condition,) = each.called("body"), each.called("condition")
            total = self._cost(body, chip, trips, done).times(count)
            return total + self._cost(condition, chip, trips, done).times(count + 1) + Cost(unknown=unknown)
        if each.opcode == "conditional":
            branches = each.called("branch_computations") or [
                *each.called("true_computation"),
                *each.called("false_computation"),
            ]
            costs = [self._cost(branch, chip, trips, done) for branch in branches]
            return max(costs, key=lambda cost: (cost.roofline_seconds, cost.cycles))  # at most
        if each.opcode in ("call", "async-start"):
            inner = [*each.called("to_apply"), *each.called("calls")]
            return sum((self._cost(called, chip, trips, done) for called in inner), Cost())
        kind = each.opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            return Cost(collectives={self._collective(each, kind, within): 1})
        flops, moved = self.flops(each, within), self.hbm_bytes(each, within)
        seconds = max(flops / chip.flops, moved / chip.hbm_bytes_per_second)
        return Cost(float(flops), float(moved), float(each.estimated_cycles), seconds)

    def _collective(self, each: Instruction, kind: str, within: str) -> Collective:
        sent = self._operand_arrays(each, within)
        received = each.arrays[-len(sent) :] if each.opcode.endswith("-start") else each.arrays
        arrays = received if kind in ("all-reduce", "all-gather") else sent
        return Collective(kind, sum(array.own_bytes for array in arrays), each.group_size)

    def _operand_arrays(self, each: Instruction, within: str) -> tuple[Array, ...]:
        computation = self.computations[within]
        return tuple(array for name in each.operands if name in computation for array in computation[name].arrays)

    def flops(self, each: Instruction, within: str) -> int:
        """Operations of the products of an instruction, those inside of a fusion included."""
        if each.opcode == "fusion":
            return sum(
                self.flops(inner, called)
                for called in each.called("calls")
                for inner in self.computations[called].values()
            )
        if each.opcode == "convolution":
            return self._convolution_flops(each, within)
        if each.opcode == "dot":
            lhs, _ = self._operand_arrays(each, within)
            match = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", each.attributes)
            axes = [int(axis) for axis in match.group(1).split(",") if axis] if match else []
            return 2 * math.prod(each.arrays[0].shape) * math.prod(lhs.shape[axis] for axis in axes)
        return 0

    def _convolution_flops(self, each: Instruction, within: str) -> int:
        """Two for each product of an entry of an image, no padding, and one of the kernel.

        Batches of products are convolutions to the compiler too, whose images are dilated by zeros.
        """
        lhs, rhs = self._operand_arrays(each, within)
        out = each.arrays[0]
        left, right, result = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", each.attributes).groups()  # type: ignore[union-attr]
        pairs = 1
        for i in range(len(left) - 2):
            image, kernel, positions = (
                array.shape[labels.index(str(i))] for array, labels in ((lhs, left), (rhs, right), (out, result))
            )
            pairs *= _pairs(image, kernel, positions, *(_window(each.attributes, name, i) for name in _WINDOW))
        return 2 * out.shape[result.index("b")] * out.shape[result.index("f")] * rhs.shape[right.index("i")] * pairs

    def hbm_bytes(self, each: Instruction, within: str) -> int:
        """Bytes that an instruction reads from HBM and writes there, padding included."""
        if each.opcode in _FREE or each.opcode.endswith("-done"):
            return 0
        if each.opcode == "custom-call" and any(f'"{name}"' in each.attributes for name in _ALIASES):
            return 0
        computation = self.computations[within]
        if each.opcode in ("copy-start", "slice-start"):
            # The result is (what is written, what is read, ...) or ((what is read), what is written, ...).
            source = sum(array.hbm_bytes for array in self._operand_arrays(each, within))
            target = each.arrays[0 if each.opcode == "copy-start" else 1]
            return min(source, target.num_bytes) + target.hbm_bytes
        operands = [computation[name] for name in each.operands if name in computation]
        if each.opcode == "fusion":
            (called,) = each.called("calls")
            read = sum(self._read(called, i, operand) for i, operand in enumerate(operands))
            return read + self._written(called, self.root(called), each.arrays)
        if each.opcode in ("slice", "dynamic-slice", "gather"):
            rest = sum(array.hbm_bytes for operand in operands[1:] for array in operand.arrays)
            return rest + _part(operands[0], each.arrays) + sum(array.hbm_bytes for array in each.arrays)
        if each.opcode == "dynamic-update-slice":
            update = operands[1].arrays[0]
            return update.hbm_bytes + (update.num_bytes if each.arrays[0].space == _HBM else 0)
        arrays = [array for operand in operands for array in operand.arrays]
        return sum(array.hbm_bytes for array in (*arrays, *each.arrays))

    def _read(self, called: str, number: int, operand: Instruction) -> int:
        """Bytes that a fusion reads of an operand: of what is sliced inside of it, the slices."""
        whole = sum(array.hbm_bytes for array in operand.arrays)
        return min(whole, self._used(called, number, operand)) if whole else 0

    def _used(self, called: str, number: int, operand: Instruction) -> int:
        computation = self.computations[called]
        names = [i.name for i in computation.values() if i.opcode == "parameter" and i.inside == str(number)]
        whole, total = sum(array.num_bytes for array in operand.arrays), 0
        while names:
            name = names.pop()
            for user in computation.values():
                for place, taken in enumerate(user.operands):
                    if taken != name:
                        continue
                    if user.opcode == "bitcast":
                        names.append(user.name)
                    elif user.opcode in ("slice", "dynamic-slice", "gather") and place == 0:
                        total += _part(operand, user.arrays)
                    elif user.opcode == "dynamic-update-slice" and place == 0:
                        pass  # in its place: only the update is written
                    elif user.opcode == "fusion":
                        total += self._used(user.called("calls")[0], place, operand)
                    else:
                        total += whole
        return total

    def _written(self, called: str, root: Instruction, arrays: tuple[Array, ...]) -> int:
        """Bytes that a fusion writes, of an update in its place the update."""
        if root.opcode == "tuple" and len(root.operands) == len(arrays):
            inner = [self.computations[called][name] for name in root.operands]
            return sum(self._written(called, i, (array,)) for i, array in zip(inner, arrays, strict=True))
        if root.opcode == "bitcast":
            return self._written(called, self.computations[called][root.operands[0]], arrays)
        if root.opcode == "fusion":
            (deeper,) = root.called("calls")
            return self._written(deeper, self.root(deeper), arrays)
        if root.opcode == "dynamic-update-slice":
            update = self.computations[called][root.operands[1]].arrays[0]
            return sum(min(array.hbm_bytes, update.num_bytes) for array in arrays)
        return sum(array.hbm_bytes for array in arrays)


def _part(operand: Instruction, taken: Iterable[Array]) -> int:
    """Bytes of HBM that are read for a part of an operand."""
    whole = sum(array.hbm_bytes for array in operand.arrays)
    return min(whole, sum(array.num_bytes for array in taken))


_WINDOW = {"stride": 1, "pad": 0, "lhs_dilate": 1, "rhs_dilate": 1}


def _window(attributes: str, name: str, axis: int) -> int:
    """A number of a convolution's window along an axis, its default where it is not given; of a pad the lower one."""
    match = re.search(rf"window=\{{[^}}]*?\b{name}=([\d_x\-]+)", attributes)
    if match is None:
        return _WINDOW[name]
    return int(re.split(r"(?<=\d)_", match.group(1).split("x")[axis])[0])


def _pairs(image: int, kernel: int, positions: int, stride: int, low: int, image_step: int, kernel_step: int) -> int:
    """Pairs along an axis of a position of the kernel and an entry of it that lies on an entry of the image."""
    last = (image - 1) * image_step
    places = (position * stride + entry * kernel_step - low for position in range(positions) for entry in range(kernel))
    return sum(0 <= place <= last and place % image_step == 0 for place in places)


def _balanced(text: str, start: int) -> int:
    """Where the parenthesis ends that opens at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i + 1
    raise ValueError(f"a parenthesis is not closed in {text[:80]!r}")


def _instruction(line: str) -> Instruction:
    left, _, right = line.strip().removeprefix("ROOT ").partition(" = ")
    right = re.sub(r"/\*.*?\*/", "", right)
    end = _balanced(right, 0) if right.startswith("(") else right.index(" ")
    kind, rest = right[:end], right[end:].lstrip()
    opening = rest.index("(")
    closing = _balanced(rest, opening)
    inside = rest[opening + 1 : closing - 1]
    return Instruction(
        left.removeprefix("%"),
        rest[:opening],
        tuple(_array(match) for match in _ARRAY.finditer(kind)),
        tuple(_NAMES.findall(inside)),
        inside,
        rest[closing:],
    )


def _array(match: re.Match[str]) -> Array:
    dtype, sizes, layout = match.groups()
    shape = tuple(int(size.strip().removeprefix("<=")) for size in sizes.split(",") if size.strip())
    order, _, tiles = (layout or "{}")[1:-1].partition(":")
    axes = tuple(int(axis) for axis in order.split(",") if axis)
    tile = re.search(r"T\(([\d,]+)\)", tiles)
    space = re.search(r"S\((\d+)\)", tiles)
    return Array(
        dtype,
        shape,
        axes or tuple(reversed(range(len(shape)))),
        tuple(map(int, tile.group(1).split(","))) if tile else (),
        int(space.group(1)) if space else _HBM,
    )
