"""Descriptions of runs in JSON's types.

Fingerprints of arrays, hashes of files, and descriptions of rules and tasks.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from xflow_jax.decoding import EntryPolicy, Policy, Rule, source_hash
from xflow_jax.errors import UserError
from xflow_jax.tasks import Task
from xflow_jax.tokenizer import chat_ids
from xflow_jax.types import LanguageModel, PyTree

ProblemT = TypeVar("ProblemT")


@jax.jit
def _checksum(x: jax.Array) -> jax.Array:
    """Computes two sums of the bits of x, uint32 [2].

    The second is weighted by position. Sums of integers do not depend on their order, so the result
    is the same on every mesh.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
    bits = bits.astype(jnp.uint32)
    place = jnp.zeros_like(bits)
    for axis in range(x.ndim):
        place = place * jnp.uint32(2654435761) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    plain = jnp.sum(bits, dtype=jnp.uint32)
    return jnp.stack([plain, jnp.sum(bits * (2 * place + 1), dtype=jnp.uint32)])


def fingerprint(tree: PyTree) -> str:
    """Computes a short hash of a tree of arrays.

    It depends on paths, shapes, dtypes and bits, and not on devices or sharding.
    """
    digest = hashlib.sha256()
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        x = jnp.asarray(x)
        sums = np.asarray(_checksum(x)).tolist()
        digest.update(f"{jax.tree_util.keystr(path)} {x.shape} {x.dtype} {sums}\n".encode())
    return digest.hexdigest()[:16]


def describe_rule(rule: Rule) -> dict[str, Any]:
    """Describes a rule in JSON's types.

    A run continues only if its rules have the same descriptions.

    Args:
        rule: a frozen dataclass.

    Returns:
        "kind", the name of the class, and its options. A policy becomes its fingerprint and its
        ranges. For a rule from outside the package, "source" is a hash of its file.
    """
    assert dataclasses.is_dataclass(rule)
    options = {f.name: getattr(rule, f.name) for f in dataclasses.fields(rule)}
    policy = options.pop("policy", None)
    if isinstance(policy, Policy | EntryPolicy):
        ranges = [f.name for f in dataclasses.fields(policy) if f.name != "params"]
        options |= {name: getattr(policy, name) for name in ranges}
        options["policy"] = fingerprint(policy.params)
    elif policy is not None:
        options["policy"] = policy
    if (source := source_hash(type(rule))) is not None:
        options["source"] = source
    described = {"kind": type(rule).__name__, **options}
    return json.loads(json.dumps(described, default=_describe_option))


def _describe_option(value: object) -> str:
    """Returns the fingerprint of a value with arrays, otherwise its text."""
    holds_arrays = any(isinstance(x, jax.Array | np.ndarray) for x in jax.tree.leaves(value))
    return fingerprint(value) if holds_arrays else repr(value)


def describe_task(task: Task, data: Path | None) -> dict[str, Any]:
    """Describes a task in JSON's types.

    Args:
        task: the task.
        data: its data file, or None.

    Returns:
        Its name, its settings, and the hash of its data file.
    """
    settings = json.loads(json.dumps(dataclasses.asdict(task.config)))
    return {
        "task": task.name,
        "settings": settings,
        "data": None if data is None else hash_file(data),
    }


def describe_inputs(
    lm: LanguageModel, task: Task[ProblemT], problems: Sequence[ProblemT]
) -> dict[str, str]:
    """Describes what a model reads beside its parameters.

    Args:
        lm: the model.
        task: the task.
        problems: problems of the task.

    Returns:
        The hash of the configuration, and that of the token ids of all prompts, which depend on the
        tokenizer and its chat template.
    """
    described = {"config": _hash_json(lm.config.to_hf())}
    if (tokenizer := lm.tokenizer) is not None:
        described["prompts"] = _hash_json([chat_ids(tokenizer, task.prompt(p)) for p in problems])
    return described


def _hash_json(value: object) -> str:
    text = json.dumps(value, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def hash_file(path: Path) -> str:
    """Computes a short hash of the bytes of a file.

    Raises:
        UserError: if the file cannot be read.
    """
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
