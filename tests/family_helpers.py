"""Golden checkpoints of the families, and small random models of them."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import numpy as np

from tests.helpers import GOLDENS, read_arrays
from xflow_jax.checkpoints import read_hf_config
from xflow_jax.lm import LM, load
from xflow_jax.types import ModelConfig

FAMILY = GOLDENS / "family"


@dataclasses.dataclass(frozen=True)
class Golden:
    """A golden checkpoint.

    Attributes:
        family: name of the family.
        tolerance: of logits in float32.
        mask_id: id of the mask token, if config.json lacks it.
    """

    family: str
    tolerance: float = 3e-4
    mask_id: int | None = None


GOLDEN_MODELS = {
    "illada_tiny": Golden("illada", mask_id=5),
    "dream_tiny": Golden("dream"),
    "sdar_tiny": Golden("sdar"),
    "fastdllm2_tiny": Golden("fast_dllm", mask_id=305),
    "lladamoe_tiny": Golden("lladamoe", 5e-4, mask_id=310),
    "llada21_tiny": Golden("llada2", 5e-4, mask_id=310),
}


def directory(name: str) -> Path:
    """Returns the directory of a golden checkpoint."""
    return FAMILY / name


def family_config(family: str) -> ModelConfig:
    """Returns the configuration of a family's golden checkpoint."""
    return golden_config(next(n for n, g in GOLDEN_MODELS.items() if g.family == family))


def golden_config(name: str) -> ModelConfig:
    """Returns the configuration of a golden checkpoint."""
    return read_hf_config(directory(name))


@functools.cache
def golden_lm(name: str, mesh: str | None = None) -> LM:
    """Loads a golden checkpoint in float32, with its mask token."""
    return load(directory(name), mesh=mesh, mask_id=GOLDEN_MODELS[name].mask_id)


@functools.cache
def golden_arrays(name: str) -> dict[str, np.ndarray]:
    """Reads what the original code computes from a golden checkpoint."""
    return read_arrays(directory(name) / "golden.npz")


@functools.cache
def decode_cases(kind: str, checkpoint: str | None) -> dict[str, dict[str, Any]]:
    """Reads the decodes of an original decoder from a golden checkpoint, by name."""
    groups = json.loads((FAMILY / "decode_golden.json").read_text())["groups"]
    return {
        case.get("name", str(number)): case
        for group in groups
        if (group["kind"], group["checkpoint"]) == (kind, checkpoint)
        for number, case in enumerate(group["cases"])
    }


def unpadded(case: dict[str, Any]) -> list[list[int]]:
    """Returns the prompts of a case without their padding."""
    mask = np.asarray(case.get("attention_mask") or np.ones_like(case["prompt"]), bool)
    return [row[real].tolist() for row, real in zip(np.asarray(case["prompt"]), mask, strict=True)]
