"""Time of a program's kernels on the device, from a profile."""

from __future__ import annotations

import re
import tempfile
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import jax

# Kind of a kernel -> pattern of its name. The first match counts. cuBLAS and CUTLASS name their
# products nvjet, gemm or cutlass, and cuDNN its attention sdpa, flash or fmha.
KINDS = {
    "attention": r"sdpa|flash|fmha|cudnn",
    "matrix products": r"gemm|nvjet|cutlass|cublas|xmma|ragged|wgmma|\bdot",
    "copies": r"copy|Memcpy|memset|transpose",
    "sorts and selections": r"sort|top_?k|select",
    "reductions": r"reduce",
}


@dataclass(frozen=True)
class KernelProfile:
    """Kernels of some runs of a program.

    Attributes:
        seconds: wall-clock time of a run while it is profiled.
        busy: seconds of a run in which kernels ran.
        kinds: kind of kernel -> its seconds in a run.
        kernels: (name, seconds in a run, calls in a run) of the longest, in descending order.
    """

    seconds: float
    busy: float
    kinds: dict[str, float]
    kernels: list[tuple[str, float, float]]

    def text(self) -> str:
        """Formats the profile for reading, in milliseconds and percent."""
        lines = [f"a run of {1e3 * self.seconds:.2f} ms, kernels {1e3 * self.busy:.2f} ms"]
        for kind, seconds in self.kinds.items():
            share = 100 * seconds / self.busy if self.busy else 0.0
            lines.append(f"{1e3 * seconds:10.3f} ms {share:5.1f} %  {kind}")
        lines.append("longest kernels:")
        for name, seconds, calls in self.kernels:
            lines.append(f"{1e3 * seconds:10.3f} ms {calls:7.1f} x  {name[:90]}")
        return "\n".join(lines)


def profile_kernels(
    program: Callable[[], object],
    timer: Callable[[Callable[[], object]], float],
    runs: int = 2,
    most: int = 16,
) -> KernelProfile:
    """Profiles a program that was compiled before.

    Args:
        program: the program.
        timer: measures the seconds of one run.
        runs: number of runs.
        most: number of kernels to name.
    """
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            seconds = sum(timer(program) for _ in range(runs)) / runs
        times: dict[str, float] = defaultdict(float)
        calls: Counter[str] = Counter()
        with warnings.catch_warnings():
            # Python 3.12 deprecates types without a module, such as those of jaxlib's profiles.
            warnings.simplefilter("ignore", DeprecationWarning)
            for file in Path(folder).rglob("*.xplane.pb"):
                _add_events(file, times, calls)
    kinds: dict[str, float] = defaultdict(float)
    for name, time in times.items():
        kinds[_kind_of(name)] += time / runs
    longest = [(name, times[name] / runs, calls[name] / runs) for name in _longest(times)[:most]]
    by_kind = {kind: kinds[kind] for kind in _longest(kinds)}
    return KernelProfile(seconds, sum(kinds.values()), by_kind, longest)


def _add_events(file: Path, times: dict[str, float], calls: Counter[str]) -> None:
    """Adds the kernels of a profile's file, in seconds.

    Each stream of a GPU is a line. CPUs have no such planes: the events of their own threads count
    that belong to a program.
    """
    profile = jax.profiler.ProfileData.from_file(str(file))
    on_device = [plane for plane in profile.planes if plane.name.startswith("/device:GPU")]
    for plane in on_device or [plane for plane in profile.planes if "CPU" in plane.name]:
        for line in plane.lines:
            if on_device and not line.name.startswith("Stream"):
                continue  # summaries of the same kernels by module and operation
            for event in line.events:
                if on_device or any(key == "hlo_op" for key, _ in event.stats):
                    times[event.name] += event.duration_ns / 1e9
                    calls[event.name] += 1


def _longest(times: Mapping[str, float]) -> list[str]:
    return sorted(times, key=lambda name: -times[name])


def _kind_of(name: str) -> str:
    for kind, pattern in KINDS.items():
        if re.search(pattern, name, re.IGNORECASE):
            return kind
    return "other fusions"
