"""Peak rates of chips, and the topologies of TPU slices."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from xflow_jax.errors import UserError, require

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """Peak rates of a chip.

    Attributes:
        name: the maker's name.
        flops: FLOP/s in bfloat16.
        memory: bytes that a program can have.
        bandwidth: bytes/s of the memory.
        link: bytes/s of one link in one direction.
        axes: axes of the torus. A chip has a link to both neighbours on each axis.
        pod: largest number of chips on one torus.
        clock: Hz at which the matrix units that the maker names reach the peak. The clock itself
            is not published.
    """

    name: str
    flops: float
    memory: float
    bandwidth: float
    link: float
    axes: int
    pod: int
    clock: float = 0.0


# Google Cloud's page of each TPU version: peak compute, memory bandwidth, interconnect bandwidth
# per chip over its ports, pod size. The memory is what the compiler leaves to programs.
CHIPS: dict[str, Chip] = {
    "v5e": Chip("TPU v5e", 197e12, 15.75 * GIB, 819e9, 50e9, 2, 256, 1.5e9),
    "v5p": Chip("TPU v5p", 459e12, 95.74 * GIB, 2765e9, 100e9, 3, 8960, 1.75e9),
    "v6e": Chip("TPU v6e", 918e12, 31.25 * GIB, 1638e9, 100e9, 2, 256, 1.75e9),
}

# NVIDIA's data sheets, dense bfloat16. NVLink counts as one axis.
GPUS: dict[str, Chip] = {
    "a100": Chip("A100 80GB SXM", 312e12, 80e9, 2039e9, 300e9, 1, 8),
    "h100": Chip("H100 SXM", 989e12, 80e9, 3350e9, 450e9, 1, 8),
    "h200": Chip("H200 SXM", 989e12, 141e9, 4800e9, 450e9, 1, 8),
    "b200": Chip("B200", 2250e12, 180e9, 8000e9, 900e9, 1, 8),
}

# Names of the chips that are planned by arithmetic alone.
DEVICES: dict[str, Chip] = {f"gpu:{name}": chip for name, chip in GPUS.items()} | {
    f"tpu:{name}": chip for name, chip in CHIPS.items()
}

# Names of devices in JAX. The memory of an A100 does not change its FLOP/s.
_KINDS = (
    (r"TPU v5 ?(lite|e)", CHIPS["v5e"]),
    (r"TPU v5p?", CHIPS["v5p"]),
    (r"TPU v6 ?(lite|e)", CHIPS["v6e"]),
    (r"NVIDIA A100-SXM.*", GPUS["a100"]),
    (r"NVIDIA H100( 80GB HBM3)?", GPUS["h100"]),
    (r"NVIDIA H200", GPUS["h200"]),
    (r"NVIDIA B200", GPUS["b200"]),
)

# Number of chips -> shape of the slices on sale, for 2D and for 3D pods.
_SLICES_2D = {
    1: "1x1",
    4: "2x2",
    8: "2x4",
    16: "4x4",
    32: "4x8",
    64: "8x8",
    128: "8x16",
    256: "16x16",
}
_SLICES_3D = {
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
    """A TPU slice.

    Attributes:
        chip: its chips.
        text: the compiler's name of the slice, like "v5e:2x4".
        shape: chips along each axis.
    """

    chip: Chip
    text: str
    shape: tuple[int, ...]

    @property
    def chips(self) -> int:
        """Number of chips."""
        return math.prod(self.shape)


def find_chip(device_kind: str) -> Chip | None:
    """Finds the chip of a device.

    Args:
        device_kind: the name that JAX gives it (`jax.Device.device_kind`).

    Returns:
        The chip, or None for an unknown one. Cards in PCIe slots are unknown, since their clocks
        are lower.
    """
    for pattern, chip in _KINDS:
        if re.fullmatch(pattern, device_kind):
            return chip
    return None


def parse_topology(text: str) -> Topology:
    """Parses the name of a TPU slice.

    Args:
        text: a shape like "v5p:4x4x4", or a product name like "v5e-8" or "v5p-128". The number in
            a product name counts chips, but for v5p TensorCores, two per chip.

    Raises:
        UserError: for an unknown slice, with the known ones.
    """
    found = re.fullmatch(r"(v\d\w*?)(?::([0-9]{1,9}(?:x[0-9]{1,9})*)|-([0-9]{1,9}))", text.strip())
    if not found or found[1] not in CHIPS:
        raise UserError(
            f"there is no topology {text!r}. There are {', '.join(CHIPS)}, "
            "with a shape as in v5e:2x4 or v5p:4x4x4, or as a product like v6e-64."
        )
    version, shape, count = found.groups()
    chip = CHIPS[version]
    if count:
        shape = _product_shape(text, version, int(count))
    sizes = tuple(int(n) for n in shape.split("x"))
    example = "4x4x4" if chip.axes == 3 else "4x4"
    require(
        len(sizes) == chip.axes and min(sizes) > 0,
        f"the topology {text!r} needs {chip.axes} sizes, of a {chip.axes}D torus, "
        f"like {version}:{example}",
    )
    require(
        math.prod(sizes) <= chip.pod,
        f"the topology {text!r} has {math.prod(sizes)} chips, "
        f"but a pod of {version} has {chip.pod}",
    )
    return Topology(chip, f"{version}:{shape}", sizes)


def _product_shape(text: str, version: str, count: int) -> str:
    """Returns the shape of a product, like "2x4" of v5e-8."""
    is_3d = CHIPS[version].axes == 3
    cores = 2 if is_3d else 1  # TensorCores that the name counts for each chip
    shapes = _SLICES_3D if is_3d else _SLICES_2D
    require(
        count % cores == 0,
        f"{text}: {version} counts TensorCores, two per chip, so the number must be even",
    )
    if count // cores not in shapes:
        names = ", ".join(f"{version}-{chips * cores}" for chips in shapes)
        raise UserError(
            f"there is no slice {text!r}. There are {names}, or a shape like {version}:{shapes[8]}."
        )
    return shapes[count // cores]


def parse_device(text: str) -> tuple[Chip, int]:
    """Parses "gpu:h200:8" or "tpu:v5e:8", chips of one domain.

    Returns:
        The chip and the number of devices.

    Raises:
        UserError: for an unknown device or more devices than a domain has.
    """
    name, _, count = text.partition(":")[2].partition(":")
    chip = DEVICES.get(f"{text.partition(':')[0]}:{name}")
    if chip is None or re.fullmatch("[0-9]{0,9}", count) is None:
        raise UserError(
            f"there is no device {text!r}. There are {', '.join(DEVICES)}, "
            "with a count as in gpu:h200:8."
        )
    number, domain = int(count or 1), "NVLink domain" if text.startswith("gpu") else "pod"
    require(1 <= number <= chip.pod, f"{text}: one {domain} has 1 to {chip.pod} devices")
    return chip, number


def link_seconds(kind: str, size: float, group: int, axes: int, closed: bool, link: float) -> float:
    """Computes the least time of a collective.

    A ring moves (g - 1) / g of the data past each chip, and twice that for an all-reduce.

    Args:
        kind: HLO's name of the collective.
        size: bytes, as `hlo_cost.Collective` counts them.
        group: number of chips that take part together.
        axes: axes of the torus that the group spans. All are used at once.
        closed: True if each axis is a ring, so that both directions carry data.
        link: bytes/s of one link in one direction.

    Returns:
        Seconds.
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
