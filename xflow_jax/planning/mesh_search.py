"""Choice of mesh and batch by arithmetic."""

from __future__ import annotations

import dataclasses
import math

from xflow_jax.models import tensor_split_sizes
from xflow_jax.planning.cost_model import (
    MeshShape,
    PlanRow,
    Workload,
    decode_passes,
    estimate_cost,
    step_speed,
)
from xflow_jax.planning.hardware import Chip, link_seconds
from xflow_jax.types import ModelConfig

# Shares of a chip's memory that the arithmetic may fill. It leaves out what the compiler adds.
COMFORTABLE_SHARE = 0.9
LARGEST_BATCH_SHARE = 0.85
MOST_ROWS = 2**16


def predict_row(config: ModelConfig, work: Workload, chip: Chip, shape: MeshShape) -> PlanRow:
    """Computes the row of a program without compiling it.

    Args:
        config: the model.
        work: the program.
        chip: the chip.
        shape: the mesh of chips.

    Returns:
        Memory, FLOPs, traffic and speed, with "compiled" False.
    """
    cost, tensor = estimate_cost(config, work, shape), shape[2]
    links = link_seconds(
        "all-reduce", cost.links, tensor, 1 if tensor <= 16 else chip.axes, False, chip.link
    )
    row: PlanRow = {
        "compiled": False,
        "flops": cost.flops,
        "bytes": cost.bytes,
        "collectives": [],
        "memory": {"weights": cost.weights, "total": cost.memory, "capacity": chip.memory},
        "fits": cost.memory <= chip.memory,
    }
    compute, memory = cost.flops / chip.flops, cost.bytes / chip.bandwidth
    # Passes of different lengths differ in what bounds them.
    times = [max(flops / chip.flops, moved / chip.bandwidth) for flops, moved in cost.passes]
    least = sum(times) / len(times) if times else 0.0
    return row | step_speed(work, decode_passes(config, work), compute, memory, links, least)


def candidate_meshes(config: ModelConfig, devices: int) -> list[MeshShape]:
    """Lists the meshes of a number of devices that divide the model.

    The tensor axis divides heads, experts, MLP widths and the vocabulary. The fsdp axis divides
    the embedding.
    """
    sizes = [config.vocab_rows, *tensor_split_sizes(config)]
    return [
        (devices // tensor // fsdp, fsdp, tensor)
        for tensor in _divisors(devices)
        if all(size % tensor == 0 for size in sizes)
        for fsdp in _divisors(devices // tensor)
        if config.hidden_size % fsdp == 0
    ]


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def best_meshes(config: ModelConfig, work: Workload, chip: Chip, devices: int) -> list[MeshShape]:
    """Sorts the candidate meshes: fitting ones first, then by time.

    At equal speed less memory comes first, and data before fsdp, which sends weights.
    """
    ranked = []
    for shape in candidate_meshes(config, devices):
        row = predict_row(config, work, chip, shape)
        seconds, memory = row["seconds"], row["memory"]["total"]
        crowded = memory > COMFORTABLE_SHARE * chip.memory
        step = max(seconds["compute"], seconds["memory"]) + seconds["links"]
        ranked.append((crowded, step * (1 + 0.02 * math.log2(shape[1])), memory, shape))
    return [shape for *_, shape in sorted(ranked)]


def largest_batch(config: ModelConfig, work: Workload, chip: Chip, devices: int) -> int:
    """Finds the largest power of two of rows that should fit."""
    best, limit = 1, LARGEST_BATCH_SHARE * chip.memory
    for exponent in range(MOST_ROWS.bit_length()):
        batch = 2**exponent
        sized = dataclasses.replace(work, batch=batch)
        if any(
            predict_row(config, sized, chip, shape)["memory"]["total"] <= limit
            for shape in candidate_meshes(config, devices)
            if batch % (shape[0] * shape[1]) == 0
        ):
            best = batch
    return best
