"""Will it fit, and how fast can it be? `xflow plan` compiles the real programs for TPU slices that are not there.

The compiler is the one of the TPUs, from the package libtpu (extra [plan]); no TPU is needed. It says what memory the
program takes; FLOPs, memory traffic and collectives are read from what it made (plan_hlo.py), and the peak rates of the
chip (plan_chips.py) turn them into the least time of a step.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from xflow_jax.checkpoints import write_atomic
from xflow_jax.errors import UserError, require
from xflow_jax.models import PRESETS
from xflow_jax.parallel import LOGICAL, MESH_AXES, make_mesh
from xflow_jax.planning.cost_model import CostEstimate, Workload, decode_passes, estimate_cost
from xflow_jax.planning.hardware import Chip, Topology, link_seconds, parse_device, parse_topology
from xflow_jax.planning.hlo_cost import Collective, Cost, Program, by_kind, part_cycles
from xflow_jax.planning.programs import candidate_meshes, make_lowerable

# Parts of a decode by the names that the compiler kept; what the backbone and the head are not is the decoder.
PARTS = {"backbone": r"\.(hidden\w*|embed)/|/(blocks|dense)/", "head": r"belief/.*head/"}


def predict_seconds(
    config: Any, work: Workload, chip: Chip, shape: tuple[int, int, int]
) -> dict[str, Any]:
    """What arithmetic alone says of a program on a mesh (data, fsdp, tensor) of chips: a row without a compilation."""
    cost = estimate_cost(config, work, shape)
    links = _ring_seconds(cost, shape[2], chip)
    row = {"compiled": False, "flops": cost.flops, "bytes": cost.bytes, "collectives": []}
    row["memory"] = {"weights": cost.weights, "total": cost.memory, "capacity": chip.memory}
    row["fits"] = cost.memory <= chip.memory
    return row | _speed(
        work,
        decode_passes(config, work),
        cost.flops / chip.flops,
        cost.bytes / chip.bandwidth,
        links,
    )


def _ring_seconds(cost: CostEstimate, tensor: int, chip: Chip) -> float:
    axes = 1 if tensor <= 16 else chip.axes
    return link_seconds("all-reduce", cost.links, tensor, axes, False, chip.link)


def _speed(
    work: Workload, steps: int, compute: float, memory: float, links: float
) -> dict[str, Any]:
    """The least seconds of a step by each resource, which of them binds, and the response tokens/s that it allows."""
    seconds = {"compute": compute, "memory": memory, "links": links}
    bound = max(seconds, key=seconds.get)
    tokens = work.batch * work.response / steps
    return {"seconds": seconds, "bound": bound, "tokens_per_second": tokens / seconds[bound]}


def compiled_row(
    config: Any, work: Workload, topology: Topology, mesh: Mesh, keep: Path | None = None
) -> dict[str, Any]:
    """Compiles a program and reads what it costs; a program that the compiler finds too large does not fit.

    keep: a new file for the text of what the compiler made.
    """
    began = time.perf_counter()
    program = make_lowerable(config, work, mesh)
    least = estimate_cost(config, work, tuple(mesh.shape.values()))
    row: dict[str, Any] = {
        "compiled": True,
        "analytic_flops": least.flops,
        "analytic_bytes": least.bytes,
    }
    try:
        compiled = program.compile()
    except jax.errors.JaxRuntimeError as error:
        memory = _refused(str(error))
        if memory is None:
            raise
        return row | {
            "fits": False,
            "memory": memory,
            "compile_seconds": time.perf_counter() - began,
        }
    stats, text = compiled.memory_analysis(), compiled.as_text()
    if keep:
        keep.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(keep, text)
    memory = {
        "arguments": stats.argument_size_in_bytes,
        "outputs": stats.output_size_in_bytes - stats.alias_size_in_bytes,
        "temporary": stats.temp_size_in_bytes,
        "code": stats.generated_code_size_in_bytes,
    }
    memory |= {"total": sum(memory.values()), "capacity": topology.chip.memory}
    count = getattr(config, "num_experts", None)
    module = Program(text, experts=count and (count, count // mesh.shape[LOGICAL["expert"]]))
    cost = module.cost()
    row |= {"memory": memory, "fits": memory["total"] <= topology.chip.memory}
    row |= measures(cost, work, topology, mesh, program.steps)
    return row | {
        "unknown_loops": cost.unknown_loops,
        "compile_seconds": time.perf_counter() - began,
    }


def _refused(message: str) -> dict[str, float] | None:
    """The memory wanted (of the temporary arrays alone, where it says no more) and there, in bytes, of a compiler that
    found a program too large; None: that is not what it says."""
    size = r"([\d.]+)([KMGT]?)"
    for form in (
        rf"Used {size} of {size} hbm",
        rf"temporaries \({size}\) exceeds available HBM \({size}\)",
    ):
        if found := re.search(form, message):
            number, unit, limit, its = found.groups()
            total, capacity = (
                float(n) * 1024 ** " KMGT".index(u or " ")
                for n, u in ((number, unit), (limit, its))
            )
            return {"total": total, "capacity": capacity}
    return None


def measures(
    cost: Cost, work: Workload, topology: Topology, mesh: Mesh, steps: int
) -> dict[str, Any]:
    """What a program of so many steps costs, per step and chip."""
    links = sum(c.count * _seconds(c, mesh, topology) for c in cost.collectives) / steps
    chip = topology.chip
    row = {"flops": cost.flops / steps, "bytes": cost.bytes / steps}
    row["collectives"] = [
        dict(kind, count=kind["count"] / steps, bytes=kind["bytes"] / steps)
        for kind in by_kind(cost.collectives)
    ]
    parts = part_cycles(cost, PARTS)
    # Grouped products have no estimate: the least that they can take stands in for it.
    grouped = max(cost.grouped_flops / chip.flops, cost.grouped_bytes / chip.bandwidth) * chip.clock
    total = sum(parts.values()) + grouped
    if total and work.program != "align":
        row["decoder_share"] = parts["rest"] / total
    return row | _speed(
        work, steps, row["flops"] / chip.flops, row["bytes"] / chip.bandwidth, links
    )


def _seconds(collective: Collective, mesh: Mesh, topology: Topology) -> float:
    """The least time of a collective, from where on the torus its groups lie."""
    devices = mesh.devices.ravel()
    if collective.kind == "collective-permute":
        pairs = [(devices[a].coords, devices[b].coords) for a, b in collective.groups]
        far = max((_hops(a, b, topology.shape) for a, b in pairs), default=0)
        return collective.bytes * far / topology.chip.link
    spans, closed = [], True
    coords = np.array([devices[n].coords for n in collective.groups[0]])
    for axis, size in enumerate(topology.shape):
        span = len(set(coords[:, axis].tolist()))
        if span > 1:
            spans.append(span)
            closed &= span == size and size % (4 if topology.chip.axes == 3 else 16) == 0
    # Chips of a plane can always be walked in a ring.
    return link_seconds(
        collective.kind, collective.bytes, collective.size, len(spans), closed, topology.chip.link
    )


def _hops(a: tuple[int, ...], b: tuple[int, ...], shape: tuple[int, ...]) -> int:
    return sum(min(abs(x - y), size - abs(x - y)) for x, y, size in zip(a, b, shape, strict=False))


def best_meshes(
    config: Any, work: Workload, chip: Chip, devices: int
) -> list[tuple[int, int, int]]:
    """The meshes that divide the model, the fastest by arithmetic first, those that should fit before the others."""
    found = []
    for shape in candidate_meshes(config, devices):
        row = predict_seconds(config, work, chip, shape)
        # At equal speed less memory, and rather data than fsdp, which sends weights.
        crowded = row["memory"]["total"] > 0.9 * chip.memory
        step = max(row["seconds"]["compute"], row["seconds"]["memory"]) + row["seconds"]["links"]
        found.append(
            (crowded, step * (1 + 0.02 * math.log2(shape[1])), row["memory"]["total"], shape)
        )
    return [shape for *_, shape in sorted(found)]


def largest_batch(config: Any, work: Workload, chip: Chip, devices: int) -> int:
    """The largest power of two, times the devices of data and fsdp, that should fit a mesh of its own choice."""
    best, batch = 1, 1
    while batch <= 2**16:
        sized = dataclasses.replace(work, batch=batch)
        shapes = [s for s in candidate_meshes(config, devices) if batch % (s[0] * s[1]) == 0]
        if any(
            predict_seconds(config, sized, chip, s)["memory"]["total"] <= 0.85 * chip.memory
            for s in shapes
        ):
            best = batch
        batch *= 2
    return best


def plan_rows(args: argparse.Namespace, kept: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The rows that the arguments ask for; those that are among `kept` are not compiled again."""
    for preset in args.preset:
        for text in [args.device] if args.device else args.topology:
            for program in args.program:
                for batch in args.batch if program == "decode" else [args.train_batch]:
                    yield from _rows_of(args, preset, text, program, batch, kept)


def _rows_of(
    args: argparse.Namespace,
    preset: str,
    text: str,
    program: str,
    batch: Any,
    kept: list[dict[str, Any]],
) -> Iterator[dict[str, Any]]:
    config = PRESETS[preset]
    chip, devices = parse_device(text) if args.device else _chips(text)
    work = Workload(
        program,
        1,
        args.prompt_length,
        args.gen_length,
        args.steps or args.gen_length // 4,
        tuple(args.set),
    )
    rows = largest_batch(config, work, chip, devices) if batch == "max" else int(batch)
    if program == "align":
        rows = -(-rows // devices) * devices  # each device needs a row
    asked = {
        "preset": preset,
        "topology": text,
        "program": program,
        "asked_batch": batch,
        "asked_mesh": args.mesh,
    }
    asked |= {
        "prompt": work.prompt,
        "response": work.response,
        "steps": work.steps,
        "overrides": list(work.overrides),
    }
    if not args.sweep and (old := next((r for r in kept if r.items() >= asked.items()), None)):
        yield old
        return
    while True:
        work = dataclasses.replace(work, batch=rows)
        shapes = (
            [_mesh_of(args.mesh, devices)]
            if args.mesh
            else best_meshes(config, work, chip, devices)
        )
        for shape in shapes[: args.most if args.sweep else 1]:
            if args.device:
                made = predict_seconds(config, work, chip, shape)
            else:
                topology = parse_topology(text)
                mesh = make_mesh(",".join(map(str, shape)), _devices(topology))
                name = f"{preset}-{text}-{program}-{rows}-{'x'.join(map(str, shape))}.hlo".replace(
                    ":", "-"
                )
                keep = Path(args.hlo) / name if args.hlo else None
                made = compiled_row(config, work, topology, mesh, keep)
            row = (
                asked
                | {
                    "batch": rows,
                    "mesh": dict(zip(MESH_AXES, shape, strict=True)),
                    "chip": chip.name,
                }
                | made
            )
            if made["fits"] or batch != "max" or rows == 1:
                yield row
        if made["fits"] or batch != "max" or rows == 1:
            return
        rows //= 2


def _chips(text: str) -> tuple[Chip, int]:
    topology = parse_topology(text)
    return topology.chip, topology.chips


def _mesh_of(text: str, devices: int) -> tuple[int, int, int]:
    try:
        shape = tuple(int(n) for n in text.split(","))
    except ValueError:
        shape = ()
    if len(shape) != 3 or min(shape) < 1:
        raise UserError(
            f"mesh {text!r} must be three positive sizes, of {', '.join(MESH_AXES)}, like 1,8,1"
        )
    wanted = math.prod(shape)
    require(wanted == devices, f"mesh {text} is of {wanted} devices, but there are {devices}")
    return shape


_TOPOLOGIES: dict[str, list[Any]] = {}


def _devices(topology: Topology) -> list[Any]:
    """The devices of a slice, as the compiler describes them; UserError where it does not know the slice."""
    if topology.text not in _TOPOLOGIES:
        from jax.experimental import topologies

        with contextlib.ExitStack() as stack:
            stack.enter_context(_environment())
            try:
                _TOPOLOGIES[topology.text] = list(
                    topologies.get_topology_desc(topology.text, "tpu").devices
                )
            except jax.errors.JaxRuntimeError as error:
                why = str(error).partition(": ")[2].split("\n")[0] or str(error)
                raise UserError(
                    f"the TPU compiler does not know the topology {topology.text!r}: {why}"
                ) from None
    return _TOPOLOGIES[topology.text]


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    """Tells libtpu that no TPU is looked for, and that another process may plan at the same time."""
    wanted = {
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
    }
    wanted |= {
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",
        "TPU_STDERR_LOG_LEVEL": "3",
        "TPU_MIN_LOG_LEVEL": "3",
    }
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update({name: value for name, value in wanted.items() if before[name] is None})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
