"""Plans: every requested program on every requested slice, as one row each."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from xflow_jax.decoding import CacheOptions
from xflow_jax.errors import require
from xflow_jax.models import PRESETS
from xflow_jax.parallel import MESH_AXES, make_mesh, parse_mesh
from xflow_jax.planning.compiled_cost import compile_row, topology_devices
from xflow_jax.planning.cost_model import TRAINING, MeshShape, PlanRow, Workload
from xflow_jax.planning.hardware import Chip, parse_device, parse_topology
from xflow_jax.planning.mesh_search import best_meshes, largest_batch, predict_row


@dataclasses.dataclass(frozen=True)
class PlanRequest:
    """Programs to plan, and the hardware to plan them for.

    Attributes:
        presets: names of models in PRESETS.
        topologies: TPU slices to compile for, like "v5e-8". Empty if `device` is set.
        device: chips like "gpu:h200:8", planned by arithmetic alone, or None.
        programs: names in PROGRAMS.
        batches: rows of a decode. "max" means as many as fit.
        train_batch: rows of an alignment, a fine-tuning or a rollout.
        mesh: sizes of data, fsdp and tensor, like "1,8,1", or None for the fastest mesh that fits.
        sweep: plan several meshes instead of the fastest one.
        max_meshes: largest number of meshes of a sweep.
        prompt_length: P, in tokens.
        gen_length: N, in tokens.
        steps: forward passes of a decode, or None for N / 4.
        overrides: overrides of a training's configuration, as "name=value".
        hlo_folder: folder for the text of the compiled programs, or None.
        block_length: positions of a block, or None for the default of the model.
        cache: keys and values that a decode keeps.
        dtype: dtype of the weights of a decode, bfloat16 or int8.
    """

    presets: tuple[str, ...]
    topologies: tuple[str, ...] = ()
    device: str | None = None
    programs: tuple[str, ...] = ("decode",)
    batches: tuple[int | Literal["max"], ...] = (1,)
    train_batch: int = 64
    mesh: str | None = None
    sweep: bool = False
    max_meshes: int = 8
    prompt_length: int = 128
    gen_length: int = 512
    steps: int | None = None
    overrides: tuple[str, ...] = ()
    hlo_folder: Path | None = None
    block_length: int | None = None
    cache: CacheOptions = dataclasses.field(default_factory=CacheOptions)
    dtype: str = "bfloat16"


@dataclasses.dataclass(frozen=True)
class _Job:
    """Model, program, batch and hardware of one row."""

    request: PlanRequest
    preset: str
    hardware: str  # a topology, or a device if the request has one
    program: str
    batch: int | Literal["max"]

    @property
    def key(self) -> PlanRow:
        """The part of a row that tells whether it was planned before."""
        work = self.workload
        return {
            "preset": self.preset,
            "topology": self.hardware,
            "program": self.program,
            "asked_batch": self.batch,
            "asked_mesh": self.request.mesh,
            "prompt": work.prompt_length,
            "response": work.gen_length,
            "steps": work.steps,
            "overrides": list(work.overrides),
            "block_length": work.block_length,
            "cache": dataclasses.asdict(work.cache),
            "dtype": work.dtype,
        }

    @property
    def workload(self) -> Workload:
        """The program with a batch of one row."""
        request = self.request
        return Workload(
            self.program,
            1,
            request.prompt_length,
            request.gen_length,
            request.steps or request.gen_length // 4,
            request.overrides,
            request.block_length,
            request.cache,
            request.dtype,
        )

    @property
    def chips(self) -> tuple[Chip, int]:
        """The chip and the number of them."""
        if self.request.device:
            return parse_device(self.hardware)
        topology = parse_topology(self.hardware)
        return topology.chip, topology.chips


def plan_rows(request: PlanRequest, previous_rows: Sequence[PlanRow]) -> Iterator[PlanRow]:
    """Plans the programs of a request one by one.

    Args:
        request: the programs and the hardware.
        previous_rows: rows of an earlier call. A row that is among them is not planned again,
            except in a sweep.

    Yields:
        A row for each program: what was requested, "batch", "mesh" and "chip", whether it "fits",
        "memory" in bytes, "flops", "bytes" and "collectives" per step and chip, "seconds" of a
        step by resource, the resource that is the "bound", and "tokens_per_second".

    Raises:
        UserError: if a program cannot be made on the hardware.
    """
    for preset in request.presets:
        for hardware in [request.device] if request.device else request.topologies:
            for program in request.programs:
                train = (request.train_batch,)
                for batch in request.batches if program == "decode" else train:
                    job = _Job(request, preset, hardware, program, batch)
                    yield from _rows_of(job, previous_rows)


def _rows_of(job: _Job, previous_rows: Sequence[PlanRow]) -> Iterator[PlanRow]:
    """Yields the row of a job, or the rows of a sweep."""
    key = job.key
    # Rows of older versions lack these keys.
    older = {"block_length": None, "cache": dataclasses.asdict(CacheOptions()), "dtype": "bfloat16"}
    previous = next((row for row in previous_rows if (older | row).items() >= key.items()), None)
    if previous is not None and not job.request.sweep:
        yield previous
        return
    chip = job.chips[0]
    batch = _first_batch(job)
    while True:
        for shape in _meshes(job, batch):
            row = _plan_row(job, batch, shape)
            # "max" tries half as many rows until the compiler agrees.
            final = row["fits"] or job.batch != "max" or batch == 1
            if final:
                mesh = dict(zip(MESH_AXES, shape, strict=True))
                yield key | {"batch": batch, "mesh": mesh, "chip": chip.name} | row
        if final:
            return
        batch //= 2


def _first_batch(job: _Job) -> int:
    """Returns the requested rows. For "max" the largest number that should fit."""
    chip, devices = job.chips
    if job.batch == "max":
        return largest_batch(PRESETS[job.preset], job.workload, chip, devices)
    if job.program in TRAINING:
        return -(-job.batch // devices) * devices  # each device needs a row
    return job.batch


def _meshes(job: _Job, batch: int) -> list[MeshShape]:
    """Returns the meshes to plan, the fastest one first."""
    request, (chip, devices) = job.request, job.chips
    if request.mesh:
        shape = parse_mesh(request.mesh)
        count = math.prod(shape)
        require(
            count == devices, f"mesh {request.mesh} is of {count} devices, but there are {devices}"
        )
        return [shape]
    work = dataclasses.replace(job.workload, batch=batch)
    shapes = best_meshes(PRESETS[job.preset], work, chip, devices)
    return shapes[: request.max_meshes if request.sweep else 1]


def _plan_row(job: _Job, batch: int, shape: MeshShape) -> PlanRow:
    """Plans a program on one mesh."""
    config = PRESETS[job.preset]
    work = dataclasses.replace(job.workload, batch=batch)
    if job.request.device:
        return predict_row(config, work, job.chips[0], shape)
    topology = parse_topology(job.hardware)
    mesh = make_mesh(",".join(map(str, shape)), topology_devices(topology))
    folder, hlo_file = job.request.hlo_folder, None
    if folder is not None:
        sizes = "x".join(map(str, shape))
        name = f"{job.preset}-{job.hardware}-{job.program}-{batch}-{sizes}-{work.dtype}.hlo"
        hlo_file = folder / name.replace(":", "-")
    return compile_row(config, work, topology, mesh, hlo_file)
