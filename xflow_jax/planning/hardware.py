"""What the planner knows of chips: makers' peak rates, memory, links, and the topologies of TPU slices by name."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from xflow_jax.errors import UserError, require

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """A chip's peaks: bfloat16 FLOP/s, bytes of memory that a program can have, bytes/s of memory and of a link in one
    direction. axes: of the torus, with a link to both neighbours on each; pod: the most chips on one torus. clock: in
    Hz, what the peak takes of the matrix units that the maker names (the rate itself is not published)."""

    name: str
    flops: float
    memory: float
    bandwidth: float
    link: float
    axes: int
    pod: int
    clock: float = 0.0


# TPUs: Google Cloud's pages of each version (peak compute, memory bandwidth, interconnect bandwidth per chip over its
# ports, pod size), memory as the compiler leaves it to programs. GPUs: NVIDIA's data sheets, dense bfloat16; NVLink is
# taken as one axis.
CHIPS: dict[str, Chip] = {
    "v5e": Chip("TPU v5e", 197e12, 15.75 * GIB, 819e9, 50e9, 2, 256, 1.5e9),
    "v5p": Chip("TPU v5p", 459e12, 95.74 * GIB, 2765e9, 100e9, 3, 8960, 1.75e9),
    "v6e": Chip("TPU v6e", 918e12, 31.25 * GIB, 1638e9, 100e9, 2, 256, 1.75e9),
}


GPUS: dict[str, Chip] = {
    "a100": Chip("A100 80GB SXM", 312e12, 80e9, 2039e9, 300e9, 1, 8),
    "h100": Chip("H100 SXM", 989e12, 80e9, 3350e9, 450e9, 1, 8),
    "h200": Chip("H200 SXM", 989e12, 141e9, 4800e9, 450e9, 1, 8),
    "b200": Chip("B200", 2250e12, 180e9, 8000e9, 900e9, 1, 8),
}


# Slices of 2D pods by the number of their chips, as they are sold; the others are cubes of 3D.
_FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}


_CUBES = {
    4: "2x2x1",
    8: "2x2x2",
    16: "2x2x4",
    32: "2x4x4",
    64: "4x4x4",
    128: "4x4x8",
    256: "4x8x8",
    512: "8x8x8",
}


@dataclass(frozen=True)
class Topology:
    """A slice: `text` is the compiler's name of it, like v5e:2x4."""

    chip: Chip
    text: str
    shape: tuple[int, ...]

    @property
    def chips(self) -> int:
        return math.prod(self.shape)


def parse_topology(text: str) -> Topology:
    """The topology that "v5p:4x4x4" or, as slices are sold, "v5e-8" or "v5p-128" says.

    The number after a dash counts chips, but for v5p TensorCores, two per chip. UserError with what is known otherwise.
    """
    found = re.fullmatch(r"(v\d\w*?)(?::(\d+(?:x\d+)*)|-(\d+))", text.strip())
    known = f"known are {', '.join(CHIPS)}, with a shape like v5e:2x4 or v5p:4x4x4, or as sold, like v6e-64"
    require(bool(found) and found[1] in CHIPS, f"there is no topology {text!r}; {known}")
    version, shape, count = found.groups()
    chip = CHIPS[version]
    if count:
        chips, sizes = int(count), _CUBES if chip.axes == 3 else _FLAT
        if chip.axes == 3:
            require(
                chips % 2 == 0,
                f"{text}: {version} counts TensorCores, two per chip, so the number must be even",
            )
            chips //= 2
        if chips not in sizes:
            sold = ", ".join(f"{version}-{n * (2 if chip.axes == 3 else 1)}" for n in sizes)
            raise UserError(
                f"there is no slice {text!r}; there are {sold}, or a shape like {version}:{sizes[8]}"
            )
        shape = sizes[chips]
    sizes = tuple(int(n) for n in shape.split("x"))
    example = "4x4x4" if chip.axes == 3 else "4x4"
    require(
        len(sizes) == chip.axes and min(sizes) > 0,
        f"the topology {text!r} needs {chip.axes} sizes, of a {chip.axes}D torus, like {version}:{example}",
    )
    require(
        math.prod(sizes) <= chip.pod,
        f"the topology {text!r} has {math.prod(sizes)} chips, but a pod of {version} has {chip.pod}",
    )
    return Topology(chip, f"{version}:{shape}", sizes)


def parse_device(text: str) -> tuple[Chip, int]:
    """(chip, how many) of "gpu:h200" or "gpu:h200:8", the devices of one NVLink domain; UserError otherwise."""
    kind, _, rest = text.partition(":")
    name, _, count = rest.partition(":")
    require(
        kind == "gpu" and name in GPUS and (not count or count.isdigit()),
        f"there is no device {text!r}; known are {', '.join(f'gpu:{n}' for n in GPUS)}, with a count like gpu:h200:8",
    )
    number = int(count or 1)
    require(
        1 <= number <= GPUS[name].pod,
        f"{text}: one NVLink domain has 1 to {GPUS[name].pod} devices",
    )
    return GPUS[name], number


def link_seconds(kind: str, size: float, group: int, axes: int, closed: bool, link: float) -> float:
    """The least time of a collective of `size` bytes (as plan_hlo.Collective counts) over a group of so many chips.

    axes: of the torus that the group spans, all used at once; closed: whether each is a ring, so that both directions
    of it carry. A ring moves (g - 1) / g of the data past each chip, twice for an all-reduce.
    """
    if group < 2:
        return 0.0
    rate = link * max(axes, 1) * (2 if closed else 1)
    share = (group - 1) / group
    times = {
        "all-reduce": 2 * share,
        "all-gather": share,
        "reduce-scatter": share,
        "all-to-all": share / 4,
    }
    return times.get(kind, 1.0) * size / rate
