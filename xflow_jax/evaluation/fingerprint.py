"""What a run is, in JSON's types: fingerprints of parameters and policies, hashes of files, rules by their options."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xflow_jax.decoding import Rule
from xflow_jax.errors import UserError
from xflow_jax.tasks import Task


@jax.jit
def _checksum(x: jax.Array) -> jax.Array:
    """Two sums of the bits of x, uint32 [2], the second weighted by position: the same on every mesh."""
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")).astype(
        jnp.uint32
    )
    place = jnp.zeros_like(bits)
    for axis in range(x.ndim):
        place = place * jnp.uint32(2654435761) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    return jnp.stack(
        [jnp.sum(bits, dtype=jnp.uint32), jnp.sum(bits * (2 * place + 1), dtype=jnp.uint32)]
    )


def fingerprint(tree: Any) -> str:
    """A short hash of a tree of arrays: of their paths, shapes, types and bits, wherever they are."""
    digest = hashlib.sha256()
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        x = jnp.asarray(x)
        sums = np.asarray(_checksum(x)).tolist()
        digest.update(f"{jax.tree_util.keystr(path)} {x.shape} {x.dtype} {sums}\n".encode())
    return digest.hexdigest()[:16]


def describe_rule(rule: Rule) -> dict[str, Any]:
    """A rule in JSON's types: its class, its options, and the fingerprint of its policy where it has one."""
    options = {f.name: getattr(rule, f.name) for f in dataclasses.fields(rule)}
    policy = options.pop("policy", None)
    if policy is not None:
        options["policy"] = fingerprint(policy.params)
        options |= {
            f.name: getattr(policy, f.name)
            for f in dataclasses.fields(policy)
            if f.name != "params"
        }
    return {"kind": type(rule).__name__, **options}


def describe_task(task: Task, data: Path | None) -> dict[str, Any]:
    """A task in JSON's types: its name, its settings, and the hash of its data file."""
    settings = json.loads(json.dumps(dataclasses.asdict(task.config)))
    return {
        "task": task.name,
        "settings": settings,
        "data": None if data is None else hash_file(data),
    }


def hash_file(path: Path) -> str:
    """A short hash of a file's bytes; UserError where it cannot be read."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
