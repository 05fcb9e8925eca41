"""Measures the time that checksums of several kinds add to loads of a converted checkpoint.

    python docs/scripts/measure_checksums.py [LOADS]

It makes a checkpoint of 1.08 GB of random bfloat16 in the temporary folder. Loads without checksums
and with each kind alternate. XXH3 is measured if the package xxhash is installed.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from xflow_jax.checkpoints import CHECKSUM_FILE, save_params
from xflow_jax.checkpoints import checksums as module
from xflow_jax.evaluation.tables import markdown_table
from xflow_jax.lm import load
from xflow_jax.models import LLaDAConfig, abstract_params, build

MODEL = LLaDAConfig(
    d_model=2048,
    n_layers=8,
    n_heads=16,
    vocab_size=32000,
    mlp_hidden_size=5632,
    mask_token_id=39,
    eos_token_id=1,
)
HEADER = ("checksum", "GB/s", "CPU s of a load", "CPU", "wall s of a load", "wall")


def of_library(kind: str) -> Callable[..., str]:
    """Returns the library's own checksum of one kind, whichever kind a caller names."""
    own = module.file_checksum  # before `time_load` replaces it
    return lambda path, _="": own(path, kind)


def xxh3(path: Path, kind: str = "") -> str:
    """Returns the XXH3 of xxhash."""
    import xxhash

    checksum = xxhash.xxh3_64()
    with path.open("rb") as file:
        while block := file.read(module.BLOCK):
            checksum.update(block)
    return checksum.hexdigest()


def time_load(folder: Path, kind: Callable[..., str] | None) -> tuple[float, float]:
    """Loads a checkpoint. Returns the seconds of CPU and wall time."""
    os.environ[module.SWITCH] = "0" if kind is None else "1"
    if kind is not None:
        module.file_checksum = kind
        listed = json.loads((folder / CHECKSUM_FILE).read_text())
        listed = {name: [size, kind(folder / name)] for name, (size, _) in listed.items()}
        (folder / CHECKSUM_FILE).write_text(json.dumps(listed))
    start = time.process_time(), time.perf_counter()
    jax.block_until_ready(load(folder, dtype="bfloat16").params)
    return time.process_time() - start[0], time.perf_counter() - start[1]


def write_random(folder: Path) -> None:
    """Writes a checkpoint of random bits, which hardly compress."""
    rng = np.random.default_rng(0)

    def draw(x: jax.ShapeDtypeStruct) -> jax.Array:
        bits = np.frombuffer(rng.bytes(2 * x.size), np.uint16) & 0xBFFF  # finite
        return jnp.asarray(bits.view(jnp.bfloat16).reshape(x.shape))

    save_params(folder, jax.tree.map(draw, abstract_params(build(MODEL))), MODEL)


def main(loads: int) -> None:
    """Prints one row for each kind, with medians and the median of the ratios."""
    kinds: dict[str, Callable[..., str] | None] = {
        "none": None,
        "CRC-32 (zlib)": of_library(""),
        "CRC-32C (google-crc32c)": of_library(module.CRC32C),
    }
    try:
        import xxhash  # noqa: F401
    except ImportError:
        print("xxhash is not installed", file=sys.stderr)
    else:
        kinds |= {"XXH3 (xxhash)": xxh3}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        write_random(folder)
        files = [file for file in folder.rglob("*") if file.is_file()]
        size = sum(file.stat().st_size for file in files)
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in kinds}
        fastest = dict.fromkeys(kinds, np.inf)
        for number in range(loads + 1):  # the first round fills the cache of the disk
            for name, kind in kinds.items():
                took = time_load(folder, kind)
                if number:
                    times[name].append(took)
                if kind is not None:
                    start = time.perf_counter()
                    for file in files:
                        kind(file)
                    fastest[name] = min(fastest[name], time.perf_counter() - start)
    base, rows = np.array(times["none"]), []
    for name, pairs in times.items():
        (cpu, wall), ratios = np.median(pairs, axis=0), np.median(np.array(pairs) / base, axis=0)
        rate = f"{size / fastest[name] / 1e9:.1f}" if name != "none" else ""
        more = [f"{100 * (ratio - 1):+.1f} %" if name != "none" else "" for ratio in ratios]
        rows.append([name, rate, f"{cpu:.2f}", more[0], f"{wall:.2f}", more[1]])
    print(f"{size / 1e9:.2f} GB, {loads} loads of each kind\n")
    print(markdown_table(HEADER, rows, left=1))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
