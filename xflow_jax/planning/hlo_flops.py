"""FLOPs of the matrix products of an HLO instruction."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import numpy as np

from xflow_jax.planning.hlo_parser import (
    Computation,
    HloModule,
    Instruction,
    arrays_of,
    parse_ints,
)


@dataclass(frozen=True)
class ExpertCount:
    """Experts of one layer.

    Attributes:
        total: in the whole layer.
        local: on one chip.
    """

    total: int
    local: int


def instruction_flops(
    i: Instruction, computation: Computation, module: HloModule, experts: ExpertCount | None
) -> float:
    """Computes the FLOPs of the matrix products that an instruction runs.

    Args:
        i: the instruction.
        computation: the computation that holds it.
        module: the program.
        experts: experts of a layer. A grouped product computes the rows of the chip's own experts,
            with tokens spread evenly over all. None means that it computes all rows.
    """
    if i.opcode == "dot":
        lhs = computation[i.operands[0]].arrays[0].shape
        contracted = parse_ints(i.attribute("lhs_contracting_dims"))
        return 2.0 * math.prod(i.arrays[0].shape) * math.prod(lhs[d] for d in contracted)
    if i.opcode == "convolution":
        lhs, rhs = (computation[name].arrays[0].shape for name in i.operands[:2])
        return _convolution_flops(i, lhs, rhs)
    if is_grouped_product(i):
        rows, matrices = (
            computation[name].arrays[0].shape for name in grouped_operands(i, computation)
        )
        share = experts.local / experts.total if experts else 1.0
        return 2.0 * rows[0] * math.prod(matrices[1:]) * share
    if i.opcode == "fusion":
        inner = module.computations[i.called[0]]
        return sum(instruction_flops(part, inner, module, experts) for part in inner.values())
    return 0.0


def is_grouped_product(i: Instruction) -> bool:
    """Returns True for a grouped product: HLO's own or the compiler's kernel."""
    return i.opcode == "ragged-dot" or (
        i.opcode == "custom-call" and i.name.startswith("ragged-dot-none")
    )


def grouped_operands(i: Instruction, computation: Computation) -> list[str]:
    """Returns the two operands of a grouped product.

    They are rows [A, E] and a stack of matrices [X, E, F]. The operands of the compiler's
    kernel begin with the positions of the groups.
    """
    if i.opcode != "custom-call":
        return list(i.operands[:2])
    arrays = {name: arrays_of(computation, name) for name in i.operands}
    return [name for name in i.operands if any(len(a.shape) >= 2 for a in arrays[name])][-2:]


def _convolution_flops(i: Instruction, lhs: tuple[int, ...], rhs: tuple[int, ...]) -> float:
    """Counts products with real input, without padding and holes.

    TPUs write batched matrix products as dilated or padded convolutions.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.rest)
    assert labels is not None, f"the convolution {i.name} has no dim_labels"
    left, kernel, out = labels.groups()
    window = dict(part.split("=") for part in i.attribute("window").split() if "=" in part)

    def field(name: str, default: str, axis: int) -> str:
        return window[name].split("x")[axis] if name in window else default

    pairs = 1
    for axis, dim in enumerate(sorted(c for c in kernel if c.isdigit())):
        size, count = rhs[kernel.index(dim)], lhs[left.index(dim)]
        outputs = i.arrays[0].shape[out.index(dim)]
        stride, low = int(field("stride", "1", axis)), int(field("pad", "0_0", axis).split("_")[0])
        dilate_in = int(field("lhs_dilate", "1", axis))
        dilate = int(field("rhs_dilate", "1", axis))
        position = np.arange(outputs)[:, None] * stride - low + np.arange(size)[None, :] * dilate
        inside = (position >= 0) & (position <= (count - 1) * dilate_in)
        pairs *= int(np.sum(inside & (position % dilate_in == 0)))
    batch, features = i.arrays[0].shape[out.index("b")], i.arrays[0].shape[out.index("f")]
    inputs = rhs[kernel.index("i")] / int(i.attribute("batch_group_count") or 1)
    return 2.0 * batch * features * inputs * pairs
