"""What a compiled program costs, read from its HLO text: FLOPs, bytes of memory traffic, collectives, loops included.

XLA's own cost analysis counts the body of a loop once. Here every loop counts as often as it runs (its trip count is
read from its condition), and of a conditional the costliest branch. Matrix products are counted exactly, elementwise
work is not: on accelerators it hides behind memory traffic, which is counted.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
from collections.abc import Iterable, Iterator

import numpy as np

from xflow_jax.planning.hlo_parser import HEAD, Array, Instruction, groups_of, instruction, ints

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


# What moves no bytes: names for parts of what is there already.
_FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "after-all",
    "partition-id",
    "replica-id",
}


_FREE |= {"opt-barrier", "iota", "while", "conditional", "call", "domain"}


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective operation. bytes: of its result on one chip, of its operand for a reduce-scatter; count: how often.

    groups: the devices that take part together; of a collective-permute the pairs (from, to).
    """

    kind: str
    bytes: float
    groups: tuple[tuple[int, ...], ...]
    count: float
    op_name: str = ""
    channel: str = ""

    @property
    def size(self) -> int:
        """Devices in a group."""
        return max(map(len, self.groups), default=1)


@dataclasses.dataclass
class Cost:
    """Of a program on one chip. cycles: the compiler's own estimate, where it gives one, by op_name; grouped_flops,
    grouped_bytes: of the grouped matrix products, for which it gives none."""

    flops: float = 0.0
    bytes: float = 0.0
    grouped_flops: float = 0.0
    grouped_bytes: float = 0.0
    collectives: list[Collective] = dataclasses.field(default_factory=list)
    cycles: dict[str, float] = dataclasses.field(default_factory=dict)
    unknown_loops: list[str] = dataclasses.field(default_factory=list)
    unknown_kernels: dict[str, float] = dataclasses.field(default_factory=dict)

    def add(self, other: Cost, times: float) -> None:
        """Adds `other`, done so many times."""
        for name in ("flops", "bytes", "grouped_flops", "grouped_bytes"):
            setattr(self, name, getattr(self, name) + times * getattr(other, name))
        self.collectives += [
            dataclasses.replace(c, count=c.count * times) for c in other.collectives
        ]
        for mine, theirs in (
            (self.cycles, other.cycles),
            (self.unknown_kernels, other.unknown_kernels),
        ):
            for key, value in theirs.items():
                mine[key] = mine.get(key, 0.0) + times * value
        self.unknown_loops += [
            name for name in other.unknown_loops if name not in self.unknown_loops
        ]


class Program:
    """A module of HLO text; `cost()` walks it from its entry.

    experts: (of a layer, of those on a chip). Tokens are taken to be spread evenly; a grouped matrix product computes
    the rows of a chip's own experts, and reads these, even where it is given those of all layers.
    """

    def __init__(self, text: str, experts: tuple[int, int] | None = None):
        self.experts = experts
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry, current = "", None
        for line in text.splitlines():
            if head := HEAD.match(line):
                current = self.computations.setdefault(head[2], {})
                self.entry = head[2] if head[1] else self.entry
            elif current is not None and " = " in line and (made := instruction(line)):
                current[made.name] = made
        found = re.search(r"num_partitions=(\d+)", text[:100_000])
        self.partitions = int(found[1]) if found else 1
        self._costs: dict[str, Cost] = {}

    def cost(self, computation: str | None = None) -> Cost:
        """What a computation costs with all that it calls; None: the whole program."""
        name = self.entry if computation is None else computation
        if name not in self._costs:
            total = Cost()
            for i in self.computations[name].values():
                self._count(i, self.computations[name], total)
            self._costs[name] = total
        return self._costs[name]

    def _count(self, i: Instruction, around: dict[str, Instruction], total: Cost) -> None:
        if i.opcode == "while":
            trips = self.trips(i, around)
            if trips is None:
                total.unknown_loops.append(i.op_name or i.name)
            total.add(self.cost(i.attribute("body").lstrip("%")), 1 if trips is None else trips)
        elif i.opcode == "conditional":
            total.add(
                max((self.cost(name) for name in i.called), key=lambda c: (c.flops, c.bytes)), 1
            )
        elif i.opcode == "call" or (i.opcode == "async-start" and i.called):
            total.add(self.cost(i.called[0]), 1)
        elif i.opcode not in _FREE and not i.opcode.endswith(("-done", "-update")):
            flops, moved = self._flops(i, around), self._traffic(i, around)
            total.flops, total.bytes = total.flops + flops, total.bytes + moved
            if _grouped(i):
                total.grouped_flops, total.grouped_bytes = (
                    total.grouped_flops + flops,
                    total.grouped_bytes + moved,
                )
            self._note_collective(i, around, total)
            self._note_cycles(i, total)
            if i.opcode == "custom-call" and not i.name.startswith("ragged-dot"):
                key = (i.attribute("custom_call_target") or "").strip('"')
                if key == "tpu_custom_call":
                    total.unknown_kernels[i.name] = total.unknown_kernels.get(i.name, 0) + 1

    def _note_cycles(self, i: Instruction, total: Cost) -> None:
        if found := re.search(r'"estimated_cycles":"(\d+)"', i.rest):
            total.cycles[i.op_name] = total.cycles.get(i.op_name, 0.0) + float(found[1])

    def _note_collective(self, i: Instruction, around: dict[str, Instruction], total: Cost) -> None:
        kind = next((k for k in COLLECTIVES if i.opcode in (k, f"{k}-start")), None)
        if kind is None:
            # The compiler also hides one inside a fusion of its own.
            for name in i.called if i.opcode == "fusion" else ():
                inner = self.computations.get(name, {})
                for part in inner.values():
                    self._note_collective(part, inner, total)
            return
        # One may be spread over several fusions, as its start and its end.
        channel = (i.attribute("channel_id") or "") if "chain_id=" in i.rest else ""
        if channel and any(c.channel == channel for c in total.collectives):
            return
        if channel:
            total.bytes += sum(a.traffic for a in (*i.arrays, *_operands(i, around)))
        size = sum(a.bytes for a in _operands(i, around))
        if kind == "all-gather":
            arrays = i.arrays[len(i.operands) :] if i.opcode.endswith("-start") else i.arrays
            size = sum(a.bytes for a in arrays)
        groups = groups_of(i, self.partitions)
        total.collectives.append(Collective(kind, size, groups, 1.0, i.op_name, channel))

    # FLOPs

    def _flops(self, i: Instruction, around: dict[str, Instruction]) -> float:
        if i.opcode == "dot":
            lhs = around[i.operands[0]].arrays[0].shape
            contracted = ints(i.attribute("lhs_contracting_dims"))
            return 2.0 * math.prod(i.arrays[0].shape) * math.prod(lhs[d] for d in contracted)
        if i.opcode == "convolution":
            return _convolution_flops(i, *(around[name].arrays[0].shape for name in i.operands[:2]))
        if _grouped(i):
            rows, matrices = (around[name].arrays[0].shape for name in _matrix_operands(i, around))
            share = self.experts[1] / self.experts[0] if self.experts else 1.0
            return 2.0 * rows[0] * math.prod(matrices[1:]) * share
        if i.opcode == "fusion":
            inner = self.computations[i.called[0]]
            return sum(self._flops(part, inner) for part in inner.values())
        return 0.0

    # memory traffic

    def _traffic(self, i: Instruction, around: dict[str, Instruction]) -> float:
        out = sum(a.traffic for a in i.arrays)
        if i.opcode == "fusion":
            body = self.computations[i.called[0]]
            # What it gathers, and into what, only passes through; both count once, with the collective.
            passed = [a for part in _chained(body) for a in (*part.arrays, *_operands(part, body))]
            read = sum(
                self._read(
                    i.called[0], n, sum(a.traffic for a in _arrays(around, name) if a not in passed)
                )
                for n, name in enumerate(i.operands)
            )
            return read + self._written(body, out - sum(a.traffic for a in i.arrays if a in passed))
        if i.opcode in ("dynamic-slice", "gather", "slice"):
            return 2 * out
        if i.opcode == "dynamic-update-slice":
            return 2 * sum(a.traffic for a in _arrays(around, i.operands[1]))
        if i.opcode.endswith("-start") and len(i.arrays) > 1:
            # (result, operand, ...): one of the two may lie on the chip.
            return sum(a.traffic for a in i.arrays[:2])
        idle = 0.0
        if _grouped(i) and self.experts:
            stack = around[_matrix_operands(i, around)[1]].arrays[0]
            idle = stack.traffic * max(1 - self.experts[1] / stack.shape[0], 0.0)
        return out + sum(a.traffic for a in _operands(i, around)) - idle

    def _read(self, computation: str, number: int, whole: float) -> float:
        """Bytes that a fusion reads of its operand; of one that it only slices, the slices."""
        body = self.computations[computation]
        names = [
            i.name for i in body.values() if i.opcode == "parameter" and i.literal == str(number)
        ]
        if not whole or not names:
            return whole
        slices, todo = 0.0, names
        while todo:
            name = todo.pop()
            for user in (i for i in body.values() if name in i.operands):
                if user.opcode in ("dynamic-slice", "gather", "slice") and user.operands[0] == name:
                    slices += sum(a.bytes for a in user.arrays)
                elif user.opcode == "dynamic-update-slice" and user.operands[0] == name:
                    slices += sum(a.bytes for a in _arrays(body, user.operands[1]))
                elif user.opcode in ("bitcast", "reshape"):
                    todo.append(user.name)
                elif user.opcode == "fusion":
                    slices += self._read(user.called[0], user.operands.index(name), whole)
                else:
                    return whole
        return min(slices, whole)

    def _written(self, body: dict[str, Instruction], whole: float) -> float:
        """Bytes that a fusion writes: of an updated buffer the update."""
        root = next(i for i in body.values() if i.root)
        while root.opcode == "bitcast":
            root = body[root.operands[0]]
        if whole and root.opcode == "dynamic-update-slice":
            return min(whole, sum(a.bytes for a in _arrays(body, root.operands[1])))
        return whole

    # loops

    def trips(self, loop: Instruction, around: dict[str, Instruction]) -> int | None:
        """How often a while loop runs that counts a number of its state up to a constant; None where it does not."""
        if found := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest):
            return int(found[1])
        condition = self.computations[loop.attribute("condition").lstrip("%")]
        test = self._scalar(condition, next(i.name for i in condition.values() if i.root))
        if not isinstance(test, tuple) or test[0] not in ("LT", "LE", "GT", "GE", "NE"):
            return None
        direction, left, right = test
        if isinstance(left, int):  # constant on the left: turned round
            left, right, direction = (
                right,
                left,
                {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE"}.get(direction, "NE"),
            )
        if not (isinstance(left, tuple) and left[0] == "state" and isinstance(right, int)):
            return None
        index, shift = left[1:]
        body = self.computations[loop.attribute("body").lstrip("%")]
        root = next(i for i in body.values() if i.root)
        before = around[loop.operands[0]]
        if root.opcode != "tuple" or before.opcode != "tuple":
            return None
        first = self._scalar(around, before.operands[index])
        after = self._scalar(body, root.operands[index])
        if not isinstance(first, int) or not (
            isinstance(after, tuple) and after[:2] == ("state", index) and after[2]
        ):
            return None
        step = after[2]
        end = right - shift + {"LE": 1, "GE": -1}.get(direction, 0)
        return max(-(-(end - first) // step), 0)

    def _scalar(
        self, body: dict[str, Instruction], name: str, bound: tuple = ()
    ) -> int | tuple | None:
        """An integer, ("state", index, shift) of a loop's state, or (direction, left, right) of a comparison."""
        i = body[name]
        if i.opcode == "constant" and re.fullmatch(r"-?\d+", i.literal):
            return int(i.literal)
        if i.opcode == "parameter" and int(i.literal) < len(bound):
            return bound[int(i.literal)]
        if (
            i.opcode == "get-tuple-element"
            and body[i.operands[0]].opcode == "parameter"
            and not bound
        ):
            return ("state", int(i.attribute("index")), 0)
        if i.opcode in ("copy", "bitcast", "convert", "reshape"):
            return self._scalar(body, i.operands[0], bound)
        if i.opcode == "fusion" and len(i.arrays) == 1:
            given = tuple(self._scalar(body, operand, bound) for operand in i.operands)
            inner = self.computations[i.called[0]]
            return self._scalar(inner, next(x.name for x in inner.values() if x.root), given)
        if i.opcode in ("add", "subtract", "compare"):
            left, right = (self._scalar(body, operand, bound) for operand in i.operands)
            if left is None or right is None:
                return None
            if i.opcode == "compare":
                return (i.attribute("direction"), left, right)
            sign = 1 if i.opcode == "add" else -1
            if isinstance(left, int) and isinstance(right, int):
                return left + sign * right
            if isinstance(right, int):
                return (*left[:2], left[2] + sign * right)
            return (*right[:2], right[2] + left) if isinstance(left, int) and sign == 1 else None
        return None


def part_cycles(cost: Cost, parts: dict[str, str]) -> dict[str, float]:
    """The compiler's cycles by part: label -> sum over op_names that its pattern finds (the first), "rest"."""
    found = dict.fromkeys([*parts, "rest"], 0.0)
    for name, cycles in cost.cycles.items():
        found[
            next((label for label, pattern in parts.items() if re.search(pattern, name)), "rest")
        ] += cycles
    return found


def copies_of(program: Program, shapes: Iterable[tuple[int, ...]]) -> list[str]:
    """Copies and transposes of whole arrays of these shapes (parameters of a model), as lines for a report."""
    wanted, found = set(shapes), []
    for body in program.computations.values():
        for i in body.values():
            if i.opcode in ("copy", "transpose") and any(
                a.shape in wanted and len(a.shape) > 1 for a in i.arrays
            ):
                found.append(f"{i.opcode} of {i.arrays[0].dtype}{list(i.arrays[0].shape)}")
    return found


def _arrays(body: dict[str, Instruction], name: str) -> tuple[Array, ...]:
    return body[name].arrays if name in body else ()


def _chained(body: dict[str, Instruction]) -> list[Instruction]:
    """Collectives of which a fusion does a part: the compiler hides a large one behind several products."""
    return [
        part for part in body.values() if part.opcode in COLLECTIVES and "chain_id=" in part.rest
    ]


def _operands(i: Instruction, around: dict[str, Instruction]) -> Iterator[Array]:
    return itertools.chain.from_iterable(_arrays(around, name) for name in i.operands)


def _grouped(i: Instruction) -> bool:
    """Whether it is a grouped matrix product, HLO's own or the compiler's kernel for it."""
    return i.opcode == "ragged-dot" or (
        i.opcode == "custom-call" and i.name.startswith("ragged-dot-none")
    )


def _matrix_operands(i: Instruction, around: dict[str, Instruction]) -> list[str]:
    """Of a grouped product: rows [A, E] and a stack [X, E, F]; before them the kernel takes the groups' places."""
    found = [name for name in i.operands if any(len(a.shape) >= 2 for a in _arrays(around, name))]
    return found[-2:] if i.opcode == "custom-call" else list(i.operands[:2])


def _convolution_flops(i: Instruction, lhs: tuple[int, ...], rhs: tuple[int, ...]) -> float:
    """2 x products that touch real input: TPUs write batched matrix products as dilated or padded convolutions."""
    left, kernel, out = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.rest).groups()
    window = dict(part.split("=") for part in (i.attribute("window") or "").split() if "=" in part)
    spatial = [c for c in kernel if c.isdigit()]
    pairs = 1
    for n, dim in enumerate(sorted(spatial)):
        size, count, outs = (
            rhs[kernel.index(dim)],
            lhs[left.index(dim)],
            i.arrays[0].shape[out.index(dim)],
        )

        def field(name: str, default: str, n: int = n) -> str:
            return window[name].split("x")[n] if name in window else default

        stride, low = int(field("stride", "1")), int(field("pad", "0_0").split("_")[0])
        dilate_in, dilate = int(field("lhs_dilate", "1")), int(field("rhs_dilate", "1"))
        place = np.arange(outs)[:, None] * stride - low + np.arange(size)[None, :] * dilate
        pairs *= int(
            np.sum((place >= 0) & (place <= (count - 1) * dilate_in) & (place % dilate_in == 0))
        )
    batch, features = i.arrays[0].shape[out.index("b")], i.arrays[0].shape[out.index("f")]
    inputs = rhs[kernel.index("i")] / int(i.attribute("batch_group_count") or 1)
    return 2.0 * batch * features * inputs * pairs


def by_kind(collectives: Iterable[Collective]) -> list[dict]:
    """A row for each kind and group size: how many, and bytes in all, the largest sum first."""
    rows: dict[tuple[str, int], dict] = {}
    for c in collectives:
        row = rows.setdefault(
            (c.kind, c.size), {"kind": c.kind, "group": c.size, "count": 0.0, "bytes": 0.0}
        )
        row["count"] += c.count
        row["bytes"] += c.count * c.bytes
    return json.loads(json.dumps(sorted(rows.values(), key=lambda row: -row["bytes"])))
