"""Memory and speed of a program, by the TPU compiler.

The compiler is in the package libtpu and needs no TPU. It reports the memory of the program. FLOPs,
memory traffic and collectives are counted in the program that it returns.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

import jax
import numpy as np
from jax.sharding import Mesh

from xflow_jax.checkpoints import make_directory, write_atomic
from xflow_jax.errors import UserError, disk_errors
from xflow_jax.parallel import LOGICAL
from xflow_jax.planning.cost_model import (
    MeshShape,
    PlanRow,
    Workload,
    estimate_cost,
    step_speed,
)
from xflow_jax.planning.hardware import Topology, link_seconds
from xflow_jax.planning.hlo_cost import (
    Collective,
    Cost,
    part_cycles,
    program_cost,
    sum_collectives,
)
from xflow_jax.planning.hlo_flops import ExpertCount
from xflow_jax.planning.programs import make_lowerable
from xflow_jax.types import ModelConfig

# Parts of a decode, by the op_names that the compiler keeps. The rest is the decoder.
PARTS = {"backbone": r"\.(hidden\w*|embed)/|/(blocks|dense)/", "head": r"belief/.*head/"}

_TOPOLOGY_DEVICES: dict[str, list[jax.Device]] = {}


def compile_row(
    config: ModelConfig,
    work: Workload,
    topology: Topology,
    mesh: Mesh,
    hlo_file: Path | None = None,
) -> PlanRow:
    """Compiles a program and reads its cost.

    Args:
        config: the model.
        work: the program.
        topology: the slice.
        mesh: a mesh of the slice's devices.
        hlo_file: new file for the compiled program's text, or None.

    Returns:
        Memory, cost per step and chip, and speed, with "compiled" True. "fits" is False if the
        compiler finds the program too large, and then the row has no cost.
    """
    began = time.perf_counter()
    program = make_lowerable(config, work, mesh)
    least = estimate_cost(config, work, cast(MeshShape, tuple(mesh.shape.values())))
    row: PlanRow = {
        "compiled": True,
        "analytic_flops": least.flops,
        "analytic_bytes": least.bytes,
    }
    try:
        compiled = program.compile()
    except jax.errors.JaxRuntimeError as error:
        too_large = _memory_of_error(str(error))
        if too_large is None:
            raise
        seconds = time.perf_counter() - began
        return row | {"fits": False, "memory": too_large, "compile_seconds": seconds}
    text = compiled.as_text() or ""
    if hlo_file:
        with disk_errors(hlo_file.parent):
            make_directory(hlo_file.parent)
        write_atomic(hlo_file, text)
    cost = program_cost(text, _expert_count(config, mesh), program.branch_shares)
    memory = _memory_of_program(compiled) | {"capacity": topology.chip.memory}
    row |= {"memory": memory, "fits": memory["total"] <= topology.chip.memory}
    row |= step_costs(cost, work, topology, mesh, program.steps)
    return row | {
        "unknown_loops": cost.unknown_loops,
        "compile_seconds": time.perf_counter() - began,
    }


def _expert_count(config: ModelConfig, mesh: Mesh) -> ExpertCount | None:
    total = config.num_experts
    return ExpertCount(total, total // mesh.shape[LOGICAL["expert"]]) if total else None


def _memory_of_program(compiled: jax.stages.Compiled) -> dict[str, float]:
    """Reads the bytes of a program on one chip by use."""
    stats = compiled.memory_analysis()
    assert stats is not None, "the TPU compiler always reports memory"
    memory = {
        "arguments": stats.argument_size_in_bytes,
        "outputs": stats.output_size_in_bytes - stats.alias_size_in_bytes,
        "temporary": stats.temp_size_in_bytes,
        "code": stats.generated_code_size_in_bytes,
    }
    return memory | {"total": sum(memory.values())}


def _memory_of_error(message: str) -> dict[str, float] | None:
    """Reads the memory from the error for a too large program.

    Returns:
        Bytes in "total" and in "capacity", or None for any other error. Some of these errors name
        the temporary arrays alone. Then "total" is theirs.
    """
    size = r"([\d.]+)([KMGT]?)"
    for pattern in (
        rf"Used {size} of {size} hbm",
        rf"temporaries \({size}\) exceeds available HBM \({size}\)",
    ):
        if found := re.search(pattern, message):
            used, used_unit, limit, limit_unit = found.groups()
            return {"total": _bytes(used, used_unit), "capacity": _bytes(limit, limit_unit)}
    return None


def _bytes(number: str, unit: str) -> float:
    return float(number) * 1024 ** " KMGT".index(unit or " ")


def step_costs(cost: Cost, work: Workload, topology: Topology, mesh: Mesh, steps: int) -> PlanRow:
    """Computes the cost per step and chip, and the speed."""
    chip = topology.chip
    links = sum(c.count * _collective_seconds(c, mesh, topology) for c in cost.collectives) / steps
    row: PlanRow = {"flops": cost.flops / steps, "bytes": cost.bytes / steps}
    row["collectives"] = [
        dict(kind, count=kind["count"] / steps, bytes=kind["bytes"] / steps)
        for kind in sum_collectives(cost.collectives)
    ]
    cycles = part_cycles(cost, PARTS)
    # The compiler gives no estimate for grouped products. They count with the least possible time.
    grouped = max(cost.grouped_flops / chip.flops, cost.grouped_bytes / chip.bandwidth) * chip.clock
    total = sum(cycles.values()) + grouped
    if total and work.program != "align":
        row["decoder_share"] = cycles["rest"] / total
    compute, memory = row["flops"] / chip.flops, row["bytes"] / chip.bandwidth
    return row | step_speed(work, steps, compute, memory, links)


def _collective_seconds(collective: Collective, mesh: Mesh, topology: Topology) -> float:
    """Computes the least time of a collective.

    It depends on the position of the groups on the torus.
    """
    coords = [device.coords for device in mesh.devices.ravel()]
    if collective.kind == "collective-permute":
        hops = (_hops(coords[a], coords[b], topology.shape) for a, b in collective.groups)
        return collective.bytes * max(hops, default=0) / topology.chip.link
    spanned, closed = 0, True
    group = np.array([coords[n] for n in collective.groups[0]])
    for axis, size in enumerate(topology.shape):
        span = len(set(group[:, axis].tolist()))
        if span > 1:
            spanned += 1
            closed &= span == size and size % (4 if topology.chip.axes == 3 else 16) == 0
    # Chips of a plane can always be walked in a ring.
    return link_seconds(
        collective.kind, collective.bytes, collective.size, spanned, closed, topology.chip.link
    )


def _hops(a: Sequence[int], b: Sequence[int], shape: Sequence[int]) -> int:
    """Counts the links between two chips of a torus."""
    return sum(min(abs(x - y), size - abs(x - y)) for x, y, size in zip(a, b, shape, strict=False))


def topology_devices(topology: Topology) -> list[jax.Device]:
    """Returns the compiler's description of the devices of a slice.

    Raises:
        UserError: if the compiler does not know the slice.
    """
    if topology.text not in _TOPOLOGY_DEVICES:
        from jax.experimental import topologies

        # By default a host has four chips.
        single = {"chips_per_host_bounds": (1, 1, 1)} if topology.chips == 1 else {}
        with _compiler_environment():
            try:
                description = topologies.get_topology_desc(topology.text, "tpu", **single)
            except jax.errors.JaxRuntimeError as error:
                reason = str(error).partition(": ")[2].split("\n")[0] or str(error)
                raise UserError(
                    f"the TPU compiler does not know the topology {topology.text!r}: {reason}"
                ) from None
        _TOPOLOGY_DEVICES[topology.text] = list(description.devices)
    return _TOPOLOGY_DEVICES[topology.text]


@contextlib.contextmanager
def _compiler_environment() -> Iterator[None]:
    """Sets the environment variables of libtpu.

    With them it looks for no TPU, and runs in several processes at once.
    """
    wanted = {
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",
        "TPU_STDERR_LOG_LEVEL": "3",
        "TPU_MIN_LOG_LEVEL": "3",
    }
    missing = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(missing)
    on_terminate = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        # libtpu installs a handler that prints a stack trace.
        if threading.current_thread() is threading.main_thread() and on_terminate is not None:
            signal.signal(signal.SIGTERM, on_terminate)
        for name in missing:
            del os.environ[name]
