"""The step-size policy (Eqs. 13-17): eight features of a position -> a Beta distribution over how far it moves.

y ~ Beta(mu kappa, (1 - mu) kappa) lies on a logarithmic scale between the smallest and the largest step:
a = a_min (a_max / a_min)^y. Deterministic decoding takes the expectation of a, Kummer's function of the Beta's shape.

mu stays below 0.95, so with the paper's a_max = 1 no step is expected to be larger than about 0.77, and a position
needs four of them to settle. An a_max above 1, cut off at 1, lets a policy settle a position at once.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from xflow_jax.decoding.policy import FEATURES, Policy
from xflow_jax.errors import UserError

BUNDLED = Path(__file__).parents[1] / "tiny" / "policy.safetensors"


A_LIMIT = 4.0  # of a_max


_TENSORS = ("w1", "b1", "w2", "b2", "w_mu", "b_mu", "w_kappa", "b_kappa")


_RANGES = ("a_min", "a_max", "kappa_min", "kappa_max")


def load_policy(path: str | Path) -> Policy:
    """Reads a policy from safetensors with its ranges in the metadata, "tiny": that of the bundled model.

    UserError where the file is not one.
    """
    return read_policy(path)[0]


def read_policy(path: str | Path) -> tuple[Policy, str]:
    """As `load_policy`, with the options of the flow that the policy was trained under, as in a rule's text."""
    from safetensors import SafetensorError, safe_open

    path = BUNDLED if str(path) == "tiny" else path
    try:
        # As jax arrays: NumPy alone knows no bfloat16.
        with safe_open(str(path), framework="flax") as file:
            names, metadata = set(file.keys()), file.metadata() or {}
            if missing := sorted(set(_TENSORS) - names):
                raise UserError(f"{path} is no policy: it lacks the tensors {', '.join(missing)}")
            params = {name: jnp.asarray(file.get_tensor(name), jnp.float32) for name in _TENSORS}
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; a policy is a .safetensors file") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    except SafetensorError as error:
        raise UserError(f"{path} is not a whole safetensors file: {error}") from error
    width = params["b1"].size
    wanted = {
        "w1": (FEATURES, width),
        "b1": (width,),
        "w2": (width, width),
        "b2": (width,),
        "w_mu": (width, 1),
    }
    wanted |= {"b_mu": (1,), "w_kappa": (width, 1), "b_kappa": (1,)}
    for name, shape in wanted.items():
        if params[name].size != math.prod(shape):
            raise UserError(
                f"{path}: {name} has shape {list(params[name].shape)}, not {list(shape)}"
            )
        if not bool(jnp.isfinite(params[name]).all()):
            raise UserError(f"{path}: {name} holds numbers that are not finite")
    if missing := [name for name in _RANGES if name not in metadata]:
        raise UserError(f"{path} is no policy: its metadata lack {', '.join(missing)}")
    try:
        ranges = {name: float(json.loads(metadata[name])) for name in _RANGES}
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{path}: {', '.join(_RANGES)} in the metadata must be numbers, not {metadata}"
        ) from error
    a_ranges = 0 < ranges["a_min"] < ranges["a_max"] <= A_LIMIT and ranges["a_min"] < 1
    if not (a_ranges and 0 < ranges["kappa_min"] <= ranges["kappa_max"] < math.inf):
        right = f"0 < a_min < a_max <= {A_LIMIT:g}, a_min < 1 and 0 < kappa_min <= kappa_max"
        raise UserError(f"{path}: its ranges {ranges} must be {right}")
    policy = Policy({name: params[name].reshape(shape) for name, shape in wanted.items()}, **ranges)
    return policy, metadata.get("switches", "")


def save_policy(path: str | Path, policy: Policy, **metadata: Any) -> None:
    """Writes what `load_policy` reads, in one move; further metadata (what made it) goes along as text."""
    import numpy as np
    from safetensors.numpy import save_file

    path = Path(path)
    text = {name: json.dumps(getattr(policy, name)) for name in _RANGES} | {
        k: str(v) for k, v in metadata.items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        save_file(
            {k: np.asarray(v, np.float32) for k, v in policy.params.items()}, str(temporary), text
        )
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
