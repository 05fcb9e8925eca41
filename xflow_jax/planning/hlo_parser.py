"""Parser of HLO text, XLA's print of a compiled program."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator, Sequence
from typing import TypeAlias

import numpy as np

# Bytes of one element.
_BYTES = {
    **dict.fromkeys(("s4", "u4"), 0.5),
    **dict.fromkeys(("pred", "s8", "u8", "f8e4m3fn", "f8e5m2"), 1),
    **dict.fromkeys(("s16", "u16", "bf16", "f16"), 2),
    **dict.fromkeys(("s32", "u32", "f32"), 4),
    **dict.fromkeys(("s64", "u64", "f64", "c64"), 8),
    "c128": 16,
}
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_COMPUTATION_HEAD = re.compile(r"^(ENTRY\s+)?%?([\w.\-]+)\s*\(.*->.*\{\s*$")

Groups: TypeAlias = tuple[tuple[int, ...], ...]  # ids of the devices of each group


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of an instruction's result.

    Attributes:
        dtype: HLO's name of the element type, like "bf16".
        shape: sizes of the axes.
        on_chip: True if the array is in the chip's scratch memory, where it costs no traffic.
    """

    dtype: str
    shape: tuple[int, ...]
    on_chip: bool = False

    @property
    def bytes(self) -> float:
        """Bytes of the elements."""
        return math.prod(self.shape) * _BYTES.get(self.dtype, 4)

    @property
    def traffic(self) -> float:
        """Bytes of the elements, or 0 on the chip."""
        return 0.0 if self.on_chip else self.bytes


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of HLO.

    Attributes:
        name: unique in the module.
        opcode: like "dot" or "fusion".
        arrays: arrays of the result. A tuple has several.
        operands: names of the operands.
        literal: text between the parentheses. For a constant its value, for a parameter its number.
        rest: text after the operands: attributes, metadata and backend_config.
        root: True for the result of the computation.
    """

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    literal: str
    rest: str
    root: bool

    def attribute(self, name: str) -> str:
        """Returns the value of name=value or name={...}.

        Braces are left out. An absent attribute is "".
        """
        found = re.search(rf"\b{name}=(\{{[^}}]*\}}|[^\s,]+)", self.rest)
        return found[1].strip("{}") if found else ""

    def computation_name(self, attribute: str) -> str:
        """Returns the computation that an attribute names, like a loop's `body`."""
        return self.attribute(attribute).lstrip("%")

    @property
    def called(self) -> list[str]:
        """Names of the computations that the instruction runs."""
        single = re.findall(
            r"\b(?:calls|body|to_apply|true_computation|false_computation)=%?([\w.\-]+)", self.rest
        )
        branches = re.search(r"\bbranch_computations=\{([^}]*)\}", self.rest)
        return single + (_NAME.findall(branches[1]) if branches else [])

    @property
    def op_name(self) -> str:
        """Place in the traced program that the compiler recorded, or ""."""
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found[1] if found else ""


Computation: TypeAlias = dict[str, Instruction]  # name -> instruction, in order


class HloModule:
    """Computations of one program.

    Attributes:
        computations: name -> computation.
        entry: name of the computation that the program starts with.
        partitions: number of devices that run the program together.
    """

    def __init__(self, text: str):
        """Parses the text of a module."""
        self.computations: dict[str, Computation] = {}
        self.entry = ""
        current: Computation | None = None
        for line in text.splitlines():
            if head := _COMPUTATION_HEAD.match(line):
                current = self.computations.setdefault(head[2], {})
                self.entry = head[2] if head[1] else self.entry
            elif current is not None and " = " in line and (parsed := parse_instruction(line)):
                current[parsed.name] = parsed
        found = re.search(r"num_partitions=(\d+)", text[:100_000])
        self.partitions = int(found[1]) if found else 1


def root_of(computation: Computation) -> Instruction:
    """Returns the instruction whose result is the computation's."""
    return next(i for i in computation.values() if i.root)


def arrays_of(computation: Computation, name: str) -> tuple[Array, ...]:
    """Returns the arrays of an instruction, or none if it is unknown."""
    return computation[name].arrays if name in computation else ()


def operand_arrays(i: Instruction, computation: Computation) -> Iterator[Array]:
    """Yields the arrays of all operands of an instruction."""
    return itertools.chain.from_iterable(arrays_of(computation, name) for name in i.operands)


def parse_instruction(line: str) -> Instruction | None:
    """Parses a line "name = type opcode(operands), ...".

    Returns None for any other line.
    """
    left, right = line.split(" = ", 1)
    root = left.lstrip().startswith("ROOT ")
    name = left.strip().removeprefix("ROOT ").lstrip("%")
    end = _closing(right, 0) + 1 if right.startswith("(") else right.find(" ")
    type_, after = right[:end], right[end:].lstrip()
    opcode, paren, _ = after.partition("(")
    if end <= 0 or not paren or not re.fullmatch(r"[a-z][\w\-]*", opcode):
        return None
    close = _closing(after, len(opcode))
    inside = after[len(opcode) + 1 : close]
    operands = tuple(_NAME.findall(inside)) if opcode not in ("constant", "parameter") else ()
    return Instruction(
        name, opcode, tuple(_arrays(type_)), operands, inside.strip(), after[close + 1 :], root
    )


def _closing(text: str, start: int) -> int:
    """Returns the position at which the parenthesis at `start` closes."""
    depth = 0
    for position in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[position], 0)
        if not depth:
            return position
    return len(text)


def _arrays(type_: str) -> Iterator[Array]:
    """Yields the arrays of a type.

    Memory space 0, the default, is the chip's main memory.
    """
    for dtype, shape, layout in _ARRAY.findall(type_):
        space = re.search(r"S\((\d+)\)", layout or "")
        yield Array(dtype, parse_ints(shape), bool(space and space[1] != "0"))


def parse_ints(text: str | None) -> tuple[int, ...]:
    """Converts "1,2,3" to numbers. None and "" have none."""
    return tuple(int(n) for n in text.split(",") if n) if text else ()


def device_groups(i: Instruction, devices: int) -> Groups:
    """Reads the groups of a collective, in any of HLO's notations.

    Args:
        i: the collective.
        devices: number of devices of the program.

    Returns:
        Devices of each group. For a collective-permute the pairs (source, target). All devices in
        one group if the instruction names no groups.
    """
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}(?:,|$|\s)", i.rest):
        return tuple(
            tuple(map(int, pair.split(","))) for pair in re.findall(r"(\d+,\d+)", pairs[1])
        )
    # A mesh with named axes, the order of its devices if that is not 0, 1, ..., and the axes.
    mesh = (
        r"(?:replica|device)_groups=mesh\[(.*?)\]"
        r"(?:,\s*device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))?\s*\{(.*?)\}"
    )
    if found := re.search(mesh, i.rest):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", found[1])}
        axes = re.findall(r"'([^']+)'", found[4])
        return _mesh_groups(sizes, axes, parse_ints(found[2]), parse_ints(found[3]))
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", i.rest):
        shape, source, order = (parse_ints(part) for part in iota.groups())
        return tuple(map(tuple, _device_ids(source, order).reshape(shape).tolist()))
    if listed := re.search(r"replica_groups=\{(\{.*?\})\}", i.rest):
        return tuple(parse_ints(group) for group in re.findall(r"\{([\d,]+)\}", listed[1]))
    return (tuple(range(devices)),)


def _device_ids(shape: Sequence[int], order: Sequence[int]) -> np.ndarray:
    """Returns the ids 0, 1, ... in a shape, with axes reordered."""
    ids = np.arange(math.prod(shape)).reshape(shape)
    return ids.transpose(order) if order else ids


def _mesh_groups(
    sizes: dict[str, int], axes: list[str], source: tuple[int, ...], order: tuple[int, ...]
) -> Groups:
    """Returns the groups along some axes of a mesh.

    Args:
        sizes: axis -> size.
        axes: the axes that a group spans.
        source: shape of the device ids, or empty for 0, 1, ...
        order: order of the axes of that shape, or empty.
    """
    ids = _device_ids(source or (math.prod(sizes.values()),), order)
    ids, names = ids.reshape(tuple(sizes.values())), list(sizes)
    last = [names.index(name) for name in axes]
    first = [n for n in range(len(names)) if n not in last]
    count = math.prod(ids.shape[n] for n in last)
    return tuple(map(tuple, ids.transpose(first + last).reshape(-1, count).tolist()))
