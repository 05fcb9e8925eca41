"""Memory traffic of an HLO instruction."""

from __future__ import annotations

from xflow_jax.planning.hlo_flops import ExpertCount, grouped_operands, is_grouped_product
from xflow_jax.planning.hlo_parser import (
    COLLECTIVES,
    Computation,
    HloModule,
    Instruction,
    arrays_of,
    operand_arrays,
    root_of,
)

_SLICES = ("dynamic-slice", "gather", "slice")


def instruction_traffic(
    i: Instruction, computation: Computation, module: HloModule, experts: ExpertCount | None
) -> float:
    """Computes the bytes that an instruction reads and writes.

    Args:
        i: the instruction.
        computation: the computation that holds it.
        module: the program.
        experts: experts of a layer. A grouped product reads the matrices of the chip's own
            experts, even if its operand is the stack of all layers. None means that it reads all.
    """
    written = sum(a.traffic for a in i.arrays)
    if i.opcode == "fusion":
        return _fusion_traffic(i, computation, module, written)
    if i.opcode in _SLICES:
        return 2 * written
    if i.opcode == "dynamic-update-slice":
        return 2 * sum(a.traffic for a in arrays_of(computation, i.operands[1]))
    if i.opcode.endswith("-start") and len(i.arrays) > 1:
        # (result, operand, ...): one of the two may be on the chip.
        return sum(a.traffic for a in i.arrays[:2])
    unread = 0.0
    if is_grouped_product(i) and experts:
        stack = computation[grouped_operands(i, computation)[1]].arrays[0]
        unread = stack.traffic * max(1 - experts.local / stack.shape[0], 0.0)
    return written + sum(a.traffic for a in operand_arrays(i, computation)) - unread


def _fusion_traffic(
    i: Instruction, computation: Computation, module: HloModule, written: float
) -> float:
    """Computes the bytes of a fusion, without those of split collectives.

    The operand and the result of such a collective pass through several fusions. They count once,
    with the collective.
    """
    body = module.computations[i.called[0]]
    passed = [
        a
        for part in _chained_collectives(body)
        for a in (*part.arrays, *operand_arrays(part, body))
    ]
    read = sum(
        _bytes_read(
            module,
            i.called[0],
            number,
            sum(a.traffic for a in arrays_of(computation, name) if a not in passed),
        )
        for number, name in enumerate(i.operands)
    )
    return read + _bytes_written(body, written - sum(a.traffic for a in i.arrays if a in passed))


def _chained_collectives(computation: Computation) -> list[Instruction]:
    """Returns collectives that are split over several fusions.

    The compiler does so to hide them behind matrix products.
    """
    return [i for i in computation.values() if i.opcode in COLLECTIVES and "chain_id=" in i.rest]


def _bytes_read(module: HloModule, computation: str, number: int, whole: float) -> float:
    """Computes the bytes that a fusion reads of an operand.

    If it only slices the operand, the slices count.

    Args:
        module: the program.
        computation: the fusion's computation.
        number: number of its parameter.
        whole: bytes of the whole operand.
    """
    body = module.computations[computation]
    names = [i.name for i in body.values() if i.opcode == "parameter" and i.literal == str(number)]
    if not whole or not names:
        return whole
    slices = 0.0
    while names:
        name = names.pop()
        for user in (i for i in body.values() if name in i.operands):
            if user.opcode in _SLICES and user.operands[0] == name:
                slices += sum(a.bytes for a in user.arrays)
            elif user.opcode == "dynamic-update-slice" and user.operands[0] == name:
                slices += sum(a.bytes for a in arrays_of(body, user.operands[1]))
            elif user.opcode in ("bitcast", "reshape") or _is_other_layout(user):
                names.append(user.name)
            elif user.opcode == "fusion":
                slices += _bytes_read(module, user.called[0], user.operands.index(name), whole)
            else:
                return whole
    return min(slices, whole)


def _is_other_layout(i: Instruction) -> bool:
    """Returns True for an inner fusion that changes only the layout.

    TPUs read the 8-bit matrices of a stack through such a change of their tiles.
    """
    return i.opcode == "fusion" and "output_to_operand_aliasing={{}: (0, {})}" in i.rest


def _bytes_written(body: Computation, whole: float) -> float:
    """Computes the bytes that a fusion writes.

    Of an updated buffer only the update counts.
    """
    root = root_of(body)
    while root.opcode == "bitcast":
        root = body[root.operands[0]]
    if whole and root.opcode == "dynamic-update-slice":
        return min(whole, sum(a.bytes for a in arrays_of(body, root.operands[1])))
    return whole
