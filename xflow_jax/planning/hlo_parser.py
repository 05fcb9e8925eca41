"""HLO text, as XLA prints a compiled program: its instructions, their arrays, the groups of its collectives."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator

import numpy as np

_BYTES = {
    "pred": 1,
    "s4": 0.5,
    "u4": 0.5,
    "s8": 1,
    "u8": 1,
    "s16": 2,
    "u16": 2,
    "s32": 4,
    "u32": 4,
    "s64": 8,
    "u64": 8,
}


_BYTES |= {
    "f8e4m3fn": 1,
    "f8e5m2": 1,
    "bf16": 2,
    "f16": 2,
    "f32": 4,
    "f64": 8,
    "c64": 8,
    "c128": 16,
}


_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\](?:\{([^}]*)\})?")


_NAME = re.compile(r"%([\w.\-]+)")


HEAD = re.compile(r"^(ENTRY\s+)?%?([\w.\-]+)\s*\(.*->.*\{\s*$")


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of a type; on_chip: it lies in the chip's scratch memory and costs no traffic."""

    dtype: str
    shape: tuple[int, ...]
    on_chip: bool = False

    @property
    def bytes(self) -> float:
        return math.prod(self.shape) * _BYTES.get(self.dtype, 4)

    @property
    def traffic(self) -> float:
        """Its bytes, if it lies in the memory that counts."""
        return 0.0 if self.on_chip else self.bytes


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of HLO. `rest` is what stands after the operands: attributes, metadata, backend_config."""

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    literal: str
    rest: str
    root: bool

    def attribute(self, name: str) -> str | None:
        """The value of name=value or name={...}, without braces."""
        found = re.search(rf"\b{name}=(\{{[^}}]*\}}|[^\s,]+)", self.rest)
        return found and found[1].strip("{}")

    @property
    def called(self) -> list[str]:
        """The computations that it runs."""
        one = re.findall(
            r"\b(?:calls|body|to_apply|true_computation|false_computation)=%?([\w.\-]+)", self.rest
        )
        branches = re.search(r"\bbranch_computations=\{([^}]*)\}", self.rest)
        return one + (_NAME.findall(branches[1]) if branches else [])

    @property
    def op_name(self) -> str:
        """Where in the program it comes from, as the compiler noted it."""
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found[1] if found else ""


def instruction(line: str) -> Instruction | None:
    """What a line "name = type opcode(operands), ..." says; None where it is no instruction."""
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
        name, opcode, tuple(_types(type_)), operands, inside.strip(), after[close + 1 :], root
    )


def _closing(text: str, start: int) -> int:
    """Where the parenthesis at `start` closes."""
    depth = 0
    for place in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if not depth:
            return place
    return len(text)


def _types(text: str) -> Iterator[Array]:
    for dtype, shape, layout in _ARRAY.findall(text):
        space = re.search(r"S\((\d+)\)", layout or "")
        yield Array(dtype, ints(shape), bool(space and space[1] != "0"))


def ints(text: str | None) -> tuple[int, ...]:
    """ "1,2,3" as numbers; none of nothing."""
    return tuple(int(n) for n in text.split(",") if n) if text else ()


def groups_of(i: Instruction, devices: int) -> tuple[tuple[int, ...], ...]:
    """The devices of each group; all of them where none are named."""
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}(?:,|$|\s)", i.rest):
        return tuple(
            tuple(map(int, pair.split(","))) for pair in re.findall(r"(\d+,\d+)", pairs[1])
        )
    mesh = r"(?:replica|device)_groups=mesh\[(.*?)\](?:,\s*device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))?\s*\{(.*?)\}"
    if found := re.search(mesh, i.rest):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", found[1])}
        return _mesh_groups(
            sizes, re.findall(r"'([^']+)'", found[4]), ints(found[2]), ints(found[3])
        )
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", i.rest):
        shape, source, turn = (ints(part) for part in iota.groups())
        ids = np.arange(math.prod(source)).reshape(source)
        ids = (ids.transpose(turn) if turn else ids).reshape(shape)
        return tuple(map(tuple, ids.tolist()))
    if listed := re.search(r"replica_groups=\{(\{.*?\})\}", i.rest):
        return tuple(ints(group) for group in re.findall(r"\{([\d,]+)\}", listed[1]))
    return (tuple(range(devices)),)


def _mesh_groups(
    sizes: dict[str, int], along: list[str], source: tuple[int, ...], turn: tuple[int, ...]
) -> tuple[tuple[int, ...], ...]:
    """Groups along axes of a mesh of these sizes; source and turn: shape and order of its devices, if not 0, 1, ..."""
    ids = np.arange(math.prod(sizes.values()))
    if source:
        ids = ids.reshape(source)
        ids = (ids.transpose(turn) if turn else ids).reshape(-1)
    ids, names = ids.reshape(tuple(sizes.values())), list(sizes)
    last = [names.index(name) for name in along]
    first = [n for n in range(len(names)) if n not in last]
    count = math.prod(ids.shape[n] for n in last)
    return tuple(map(tuple, ids.transpose(first + last).reshape(-1, count).tolist()))
