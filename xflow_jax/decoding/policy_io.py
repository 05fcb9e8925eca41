"""Files of policies: safetensors with ranges in the metadata.

The names of the tensors tell the two kinds apart.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from xflow_jax.decoding.entry_policy import HEADS, EntryPolicy, entry_shapes
from xflow_jax.decoding.policy import FEATURES, Policy
from xflow_jax.errors import UserError, describe, disk_errors, require
from xflow_jax.input_files import (
    is_cloud,
    local_file,
    open_regular,
    parse_json,
    to_path,
    write_object,
)
from xflow_jax.toml_config import coerce

BUNDLED = Path(__file__).parents[1] / "tiny" / "policy.safetensors"
A_LIMIT = 4.0  # largest a_max

_TENSORS = ("w1", "b1", "w2", "b2", "w_mu", "b_mu", "w_kappa", "b_kappa")
_RANGES = ("a_min", "a_max", "kappa_min", "kappa_max")
_ENTRY_TENSORS = tuple(entry_shapes(HEADS))
_ENTRY_RANGES = ("above", "temperature")
_CHECKSUM = "crc32"  # key of the metadata. Files of other programs may lack it.


def load_policy(path: str | os.PathLike[str]) -> Policy | EntryPolicy:
    """Reads a policy from a safetensors file.

    Args:
        path: the file, or "tiny" for the policy of the bundled model.

    Raises:
        UserError: if the file is missing, incomplete, or not a policy.
    """
    return read_policy(path)[0]


def read_policy(path: str | os.PathLike[str]) -> tuple[Policy | EntryPolicy, str]:
    """Reads a policy and the options of its training.

    Args:
        path: the file, or "tiny" for the policy of the bundled model.

    Returns:
        The policy, and the options of the flow as in the text of a rule, such as
        "early_exit=true,creep=0.2".

    Raises:
        UserError: if the file is missing, incomplete, or not a policy.
    """
    path = BUNDLED if str(path) == "tiny" else path
    tensors, metadata = _read_tensors(path)
    if metadata.get(_CHECKSUM) not in (None, _compute_checksum(tensors, metadata)):
        raise UserError(f"{path}: its checksum is wrong, so it is damaged. Copy it again.")
    switches = metadata.get("switches", "")
    if "w_in" in tensors:
        width = max(tensors["b_in"].size, 1)
        require(width % HEADS == 0, f"{path}: b_in has {width} numbers, no multiple of {HEADS}")
        params = _check_tensors(path, tensors, entry_shapes(width))
        ranges = _read_ranges(path, metadata, _ENTRY_RANGES, check_entry_ranges)
        return EntryPolicy(params, ranges["above"], ranges["temperature"]), switches
    params = _check_tensors(path, tensors, _step_shapes(max(tensors["b1"].size, 1)))
    ranges = _read_ranges(path, metadata, _RANGES, check_policy_ranges)
    return Policy(params, **ranges), switches


def _compute_checksum(
    tensors: Mapping[str, jax.Array | np.ndarray], metadata: Mapping[str, str]
) -> str:
    """Computes the CRC-32 of the float32 tensors and the metadata."""
    entries = {key: text for key, text in metadata.items() if key != _CHECKSUM}
    checksum = zlib.crc32(json.dumps(entries, sort_keys=True).encode())
    for name in _ENTRY_TENSORS if "w_in" in tensors else _TENSORS:
        checksum = zlib.crc32(np.asarray(tensors[name], np.float32).tobytes(), checksum)
    return f"{checksum:08x}"


def _read_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, jax.Array], dict[str, str]]:
    """Reads the tensors of a policy as float32, and the metadata."""
    from safetensors import SafetensorError, safe_open

    if not is_cloud(path) and not to_path(path).exists():
        raise UserError(f"{path}: no such file. A policy is a .safetensors file.")
    open_regular(path).close()  # safe_open would wait for a pipe
    try:
        # As JAX arrays, since NumPy alone has no bfloat16.
        with local_file(path) as local, safe_open(str(local), framework="flax") as file:
            names, metadata = set(file.keys()), file.metadata() or {}
            wanted = _ENTRY_TENSORS if "w_in" in names else _TENSORS
            if missing := sorted(set(wanted) - names):
                raise UserError(f"{path} is no policy: it lacks the tensors {', '.join(missing)}")
            tensors = {name: jnp.asarray(file.get_tensor(name), jnp.float32) for name in wanted}
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    except SafetensorError as error:
        raise UserError(f"{path} is not a whole safetensors file: {error}") from error
    except (TypeError, KeyError, ValueError, AttributeError) as error:  # a dtype that JAX lacks
        raise UserError(f"{path}: its tensors cannot be read: {describe(error)}") from error
    return tensors, metadata


def _step_shapes(width: int) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of a step-size policy's weights."""
    return {
        "w1": (FEATURES, width),
        "b1": (width,),
        "w2": (width, width),
        "b2": (width,),
        "w_mu": (width, 1),
        "b_mu": (1,),
        "w_kappa": (width, 1),
        "b_kappa": (1,),
    }


def _check_tensors(
    path: str | os.PathLike[str],
    tensors: dict[str, jax.Array],
    shapes: Mapping[str, tuple[int, ...]],
) -> dict[str, jax.Array]:
    """Returns the tensors in their shapes, or raises UserError."""
    for name, shape in shapes.items():
        # Axes of one do not matter. [d, 8] is the transposed matrix, and not to be reshaped.
        axes = [tuple(n for n in sizes if n != 1) for sizes in (tensors[name].shape, shape)]
        if axes[0] != axes[1] or tensors[name].size != math.prod(shape):
            raise UserError(
                f"{path}: {name} has shape {list(tensors[name].shape)}, not {list(shape)}"
            )
        if not bool(jnp.isfinite(tensors[name]).all()):
            raise UserError(f"{path}: {name} holds numbers that are not finite")
    return {name: tensors[name].reshape(shape) for name, shape in shapes.items()}


def _read_ranges(
    path: str | os.PathLike[str],
    metadata: Mapping[str, str],
    names: Sequence[str],
    check: Callable[..., None],
) -> dict[str, float]:
    """Returns the ranges in the metadata, or raises UserError."""
    if missing := [name for name in names if name not in metadata]:
        raise UserError(f"{path} is no policy: its metadata lack {', '.join(missing)}")
    try:
        ranges = {
            name: coerce(parse_json(metadata[name], f"{path}: {name}"), float) for name in names
        }
    except (TypeError, UserError) as error:
        given = {name: metadata[name] for name in names}
        raise UserError(
            f"{path}: {', '.join(names)} in the metadata must be numbers, not {given}"
        ) from error
    try:
        check(**ranges)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return ranges


def check_policy_ranges(a_min: float, a_max: float, kappa_min: float, kappa_max: float) -> None:
    """Checks the ranges of a policy.

    Args:
        a_min: smallest step fraction.
        a_max: largest step fraction.
        kappa_min: smallest kappa.
        kappa_max: largest kappa.

    Raises:
        UserError: if they are impossible.
    """
    is_a_range = 0 < a_min < a_max <= A_LIMIT and a_min < 1
    if not (is_a_range and 0 < kappa_min <= kappa_max < math.inf):
        ranges = {"a_min": a_min, "a_max": a_max, "kappa_min": kappa_min, "kappa_max": kappa_max}
        right = f"0 < a_min < a_max <= {A_LIMIT:g}, a_min < 1 and 0 < kappa_min <= kappa_max"
        raise UserError(f"its ranges {ranges} must be {right}")


def check_entry_ranges(above: float, temperature: float) -> None:
    """Checks the numbers of an entry policy.

    Args:
        above: learned confidence above which a mask enters.
        temperature: of the draws.

    Raises:
        UserError: if they are impossible.
    """
    require(0 < above < 1, f"above is {above}, but it must be above 0 and below 1")
    require(0 < temperature < math.inf, f"temperature is {temperature}, but it must be above 0")


def save_policy(
    path: str | os.PathLike[str], policy: Policy | EntryPolicy, **metadata: object
) -> None:
    """Writes a file for `load_policy`.

    The file is complete as soon as it exists. Equal policies have equal bytes.

    Args:
        path: the file. Missing directories are created.
        policy: the policy.
        **metadata: further entries, written as text. `switches` are the options of the flow for
            `read_policy`.

    Raises:
        UserError: if it cannot be written.
    """
    from safetensors.numpy import save

    path = to_path(path)
    ranges = _ENTRY_RANGES if isinstance(policy, EntryPolicy) else _RANGES
    text = {name: json.dumps(getattr(policy, name)) for name in ranges}
    text |= {name: str(value) for name, value in metadata.items()}
    tensors = {name: np.asarray(value, np.float32) for name, value in policy.params.items()}
    text[_CHECKSUM] = _compute_checksum(tensors, text)
    data = _sort_header(save(tensors, text))
    temporary = path.with_name(path.name + ".tmp")
    with disk_errors(path):
        if is_cloud(path):
            write_object(path, data)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(data)
            temporary.replace(path)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def _sort_header(data: bytes) -> bytes:
    """Sorts the keys of a safetensors header, which have no order."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8:end]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data[end:]
