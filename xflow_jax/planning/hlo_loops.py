"""Trip counts of the loops in HLO text."""

from __future__ import annotations

import re
from typing import NamedTuple, TypeAlias

from xflow_jax.planning.hlo_parser import Computation, HloModule, Instruction, root_of


class LoopState(NamedTuple):
    """An integer of a loop's state, plus a constant."""

    element: int  # place in the tuple of the state
    offset: int


class Comparison(NamedTuple):
    """A comparison of two scalars."""

    direction: str  # LT, LE, GT, GE, EQ or NE
    left: int | LoopState
    right: int | LoopState


Scalar: TypeAlias = int | LoopState | Comparison | None  # None: unknown

_MIRRORED = {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE"}


def trip_count(loop: Instruction, computation: Computation, module: HloModule) -> int | None:
    """Reads how often a while loop runs.

    Args:
        loop: the `while` instruction.
        computation: the computation that holds it.
        module: the program.

    Returns:
        The trip count of a loop that counts an integer of its state up or down to a constant, or
        None for any other loop.
    """
    if found := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest):
        return int(found[1])
    condition = module.computations[loop.computation_name("condition")]
    test = _scalar(module, condition, root_of(condition).name)
    if not isinstance(test, Comparison) or test.direction not in (*_MIRRORED, "NE"):
        return None
    direction, left, right = test
    if isinstance(left, int):
        left, right, direction = right, left, _MIRRORED.get(direction, "NE")
    if not (isinstance(left, LoopState) and isinstance(right, int)):
        return None
    body = module.computations[loop.computation_name("body")]
    after_step, initial = root_of(body), computation[loop.operands[0]]
    if after_step.opcode != "tuple" or initial.opcode != "tuple":
        return None
    first = _scalar(module, computation, initial.operands[left.element])
    after = _scalar(module, body, after_step.operands[left.element])
    if not isinstance(first, int) or not isinstance(after, LoopState):
        return None
    if after.element != left.element or not after.offset:
        return None
    end = right - left.offset + {"LE": 1, "GE": -1}.get(direction, 0)
    return max(-(-(end - first) // after.offset), 0)


def _scalar(
    module: HloModule, computation: Computation, name: str, arguments: tuple[Scalar, ...] = ()
) -> Scalar:
    """Evaluates a scalar made of constants and a loop's state.

    Args:
        module: the program.
        computation: the computation that holds the scalar.
        name: the scalar's instruction.
        arguments: values of the computation's parameters, inside a fusion.
    """
    i = computation[name]
    if i.opcode == "constant" and re.fullmatch(r"-?\d+", i.literal):
        return int(i.literal)
    if i.opcode == "parameter" and int(i.literal) < len(arguments):
        return arguments[int(i.literal)]
    if i.opcode == "get-tuple-element" and not arguments:
        is_state = computation[i.operands[0]].opcode == "parameter"
        return LoopState(int(i.attribute("index")), 0) if is_state else None
    if i.opcode in ("copy", "bitcast", "convert", "reshape"):
        return _scalar(module, computation, i.operands[0], arguments)
    if i.opcode == "fusion" and len(i.arrays) == 1:
        given = tuple(_scalar(module, computation, name, arguments) for name in i.operands)
        inner = module.computations[i.called[0]]
        return _scalar(module, inner, root_of(inner).name, given)
    if i.opcode in ("add", "subtract", "compare"):
        left, right = (_scalar(module, computation, name, arguments) for name in i.operands)
        if isinstance(left, int | LoopState) and isinstance(right, int | LoopState):
            if i.opcode == "compare":
                return Comparison(i.attribute("direction"), left, right)
            return _add(left, right, 1 if i.opcode == "add" else -1)
    return None


def _add(left: int | LoopState, right: int | LoopState, sign: int) -> int | LoopState | None:
    """Adds two scalars, or subtracts the right one if `sign` is -1."""
    if isinstance(left, int) and isinstance(right, int):
        return left + sign * right
    if isinstance(left, LoopState) and isinstance(right, int):
        return LoopState(left.element, left.offset + sign * right)
    if isinstance(left, int) and isinstance(right, LoopState) and sign == 1:
        return LoopState(right.element, right.offset + left)
    return None
