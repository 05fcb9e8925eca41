"""Cost of a compiled program, counted in its HLO text.

Every loop counts as often as it runs. XLA's own cost analysis counts the body of a loop once.
Matrix products are counted exactly. Elementwise work is not counted: on accelerators it hides
behind memory traffic, which is counted.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TypedDict

from xflow_jax.planning.hlo_flops import ExpertCount, instruction_flops, is_grouped_product
from xflow_jax.planning.hlo_loops import trip_count
from xflow_jax.planning.hlo_parser import (
    COLLECTIVES,
    Computation,
    Groups,
    HloModule,
    Instruction,
    device_groups,
    operand_arrays,
)
from xflow_jax.planning.hlo_traffic import instruction_traffic

# Operations that move no bytes: they name parts of arrays that are there already.
_FREE = {
    "after-all",
    "bitcast",
    "call",
    "conditional",
    "constant",
    "domain",
    "get-tuple-element",
    "iota",
    "opt-barrier",
    "parameter",
    "partition-id",
    "replica-id",
    "tuple",
    "while",
}


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective operation.

    Attributes:
        kind: one of COLLECTIVES.
        bytes: bytes of the operand on one chip, for an all-gather of the result.
        groups: devices that take part together. For a collective-permute the pairs (from, to).
        count: number of times that it runs.
        op_name: place in the traced program.
        channel: id of a collective that is split over several fusions, or "".
    """

    kind: str
    bytes: float
    groups: Groups
    count: float
    op_name: str = ""
    channel: str = ""

    @property
    def size(self) -> int:
        """Number of devices in a group."""
        return max(map(len, self.groups), default=1)


@dataclasses.dataclass
class Cost:
    """Cost of a program on one chip.

    Attributes:
        flops: FLOPs of the matrix products.
        bytes: bytes of memory traffic.
        grouped_flops, grouped_bytes: the part of grouped matrix products, for which the TPU
            compiler estimates no cycles.
        collectives: all collectives.
        cycles: op_name -> the compiler's own estimate.
        unknown_loops: loops of unknown length. Their body counts once.
        unknown_kernels: name of a kernel that is not counted -> number of times that it runs.
    """

    flops: float = 0.0
    bytes: float = 0.0
    grouped_flops: float = 0.0
    grouped_bytes: float = 0.0
    collectives: list[Collective] = dataclasses.field(default_factory=list)
    cycles: dict[str, float] = dataclasses.field(default_factory=dict)
    unknown_loops: list[str] = dataclasses.field(default_factory=list)
    unknown_kernels: dict[str, float] = dataclasses.field(default_factory=dict)

    def add(self, other: Cost, times: float) -> None:
        """Adds the cost of a computation that runs `times` times."""
        self.flops += times * other.flops
        self.bytes += times * other.bytes
        self.grouped_flops += times * other.grouped_flops
        self.grouped_bytes += times * other.grouped_bytes
        self.collectives += [
            dataclasses.replace(c, count=c.count * times) for c in other.collectives
        ]
        _add_counts(self.cycles, other.cycles, times)
        _add_counts(self.unknown_kernels, other.unknown_kernels, times)
        self.unknown_loops += [
            name for name in other.unknown_loops if name not in self.unknown_loops
        ]


def _add_counts(counts: dict[str, float], other: Mapping[str, float], times: float = 1) -> None:
    for key, value in other.items():
        counts[key] = counts.get(key, 0.0) + times * value


def program_cost(
    text: str,
    experts: ExpertCount | None = None,
    branch_shares: Mapping[str, Sequence[float]] | None = None,
) -> Cost:
    """Counts the cost of a program from its HLO text.

    A loop counts as often as it runs. A conditional counts its most expensive branch, or the mean
    of its branches if their shares are known.

    Args:
        text: the program, as `jax.stages.Compiled.as_text` returns it.
        experts: experts of a layer, if the model is a mixture of experts. Tokens are taken to be
            spread evenly over them.
        branch_shares: named scope right around a conditional -> share of each branch.
    """
    module = HloModule(text)
    return _CostCounter(module, experts, branch_shares or {}).cost(module.entry)


class _CostCounter:
    """Walk over the computations of a module. Each is counted once."""

    def __init__(
        self,
        module: HloModule,
        experts: ExpertCount | None,
        branch_shares: Mapping[str, Sequence[float]],
    ):
        self.module = module
        self.experts = experts
        self.branch_shares = branch_shares
        self._costs: dict[str, Cost] = {}

    def cost(self, name: str) -> Cost:
        """Counts the cost of a computation with all that it calls."""
        if name not in self._costs:
            total = Cost()
            for i in self.module.computations[name].values():
                self._count(i, self.module.computations[name], total)
            self._costs[name] = total
        return self._costs[name]

    def _count(self, i: Instruction, computation: Computation, total: Cost) -> None:
        """Adds the cost of an instruction to `total`."""
        if i.opcode == "while":
            trips = trip_count(i, computation, self.module)
            if trips is None:
                total.unknown_loops.append(i.op_name or i.name)
            total.add(self.cost(i.computation_name("body")), 1 if trips is None else trips)
        elif i.opcode == "conditional":
            self._count_conditional(i, total)
        elif i.opcode == "call" or (i.opcode == "async-start" and i.called):
            total.add(self.cost(i.called[0]), 1)
        elif i.opcode not in _FREE and not i.opcode.endswith(("-done", "-update")):
            self._count_operation(i, computation, total)

    def _count_conditional(self, i: Instruction, total: Cost) -> None:
        branches = [self.cost(name) for name in i.called]
        shares = self.branch_shares.get((["", *i.op_name.split("/")])[-2], ())
        if len(shares) != len(branches):
            total.add(max(branches, key=lambda c: (c.flops, c.bytes)), 1)
            return
        for branch, share in zip(branches, shares, strict=True):
            total.add(branch, share)

    def _count_operation(self, i: Instruction, computation: Computation, total: Cost) -> None:
        flops = instruction_flops(i, computation, self.module, self.experts)
        moved = instruction_traffic(i, computation, self.module, self.experts)
        total.flops += flops
        total.bytes += moved
        if is_grouped_product(i):
            total.grouped_flops += flops
            total.grouped_bytes += moved
        self._count_collective(i, computation, total)
        if found := re.search(r'"estimated_cycles":"(\d+)"', i.rest):
            _add_counts(total.cycles, {i.op_name: float(found[1])})
        is_kernel = i.opcode == "custom-call" and not i.name.startswith("ragged-dot")
        if is_kernel and i.attribute("custom_call_target").strip('"') == "tpu_custom_call":
            _add_counts(total.unknown_kernels, {i.name: 1})

    def _count_collective(self, i: Instruction, computation: Computation, total: Cost) -> None:
        kind = next((k for k in COLLECTIVES if i.opcode in (k, f"{k}-start")), None)
        if kind is None:
            # The compiler also hides a collective inside a fusion of its own.
            for name in i.called if i.opcode == "fusion" else ():
                inner = self.module.computations.get(name, {})
                for part in inner.values():
                    self._count_collective(part, inner, total)
            return
        # A collective may be spread over several fusions, from its start to its end.
        channel = i.attribute("channel_id") if "chain_id=" in i.rest else ""
        if channel and any(c.channel == channel for c in total.collectives):
            return
        if channel:
            total.bytes += sum(a.traffic for a in (*i.arrays, *operand_arrays(i, computation)))
        size = sum(a.bytes for a in operand_arrays(i, computation))
        if kind == "all-gather":
            # The result of all-gather-start begins with the operands.
            arrays = i.arrays[len(i.operands) :] if i.opcode.endswith("-start") else i.arrays
            size = sum(a.bytes for a in arrays)
        groups = device_groups(i, self.module.partitions)
        total.collectives.append(Collective(kind, size, groups, 1.0, i.op_name, channel))


def part_cycles(cost: Cost, parts: Mapping[str, str]) -> dict[str, float]:
    """Sums the compiler's cycles by part of the program.

    Args:
        cost: cost of the program.
        parts: label -> regular expression for op_names. The first one that matches counts.

    Returns:
        Label -> cycles, and "rest" -> cycles of all other op_names.
    """
    sums = dict.fromkeys([*parts, "rest"], 0.0)
    for name, cycles in cost.cycles.items():
        label = next((part for part, pattern in parts.items() if re.search(pattern, name)), "rest")
        sums[label] += cycles
    return sums


class CollectiveSum(TypedDict):
    """Number and total bytes of collectives with one kind and group size."""

    kind: str
    group: int
    count: float
    bytes: float


def sum_collectives(collectives: Iterable[Collective]) -> list[CollectiveSum]:
    """Sums collectives by kind and group size, most bytes first."""
    sums: dict[tuple[str, int], CollectiveSum] = {}
    for c in collectives:
        empty: CollectiveSum = {"kind": c.kind, "group": c.size, "count": 0.0, "bytes": 0.0}
        row = sums.setdefault((c.kind, c.size), empty)
        row["count"] += c.count
        row["bytes"] += c.count * c.bytes
    return sorted(sums.values(), key=lambda row: -row["bytes"])
