"""Tests that each file in configs/ is read by the program in its first line."""

from __future__ import annotations

import dataclasses
import importlib
import re
from pathlib import Path
from types import ModuleType

import pytest
from jax.sharding import AbstractMesh

from train.align import AlignRunConfig
from train.grpo_config import GrpoConfig
from xflow_jax.models.presets import PRESETS
from xflow_jax.parallel.mesh import MESH_AXES
from xflow_jax.toml_config import load_toml
from xflow_jax.training.alignment_program import check_lengths
from xflow_jax.training.program import check_batch

ROOT = Path(__file__).parents[2]
CONFIGS = sorted(path.name for path in (ROOT / "configs").glob("*.toml"))


def config_class(program: ModuleType) -> type:
    """Returns the dataclass of a program's configuration, the only one with an output folder."""
    classes = [x for x in vars(program).values() if isinstance(x, type)]
    configs = [cls for cls in classes if dataclasses.is_dataclass(cls)]
    (found,) = [cls for cls in configs if "out" in {f.name for f in dataclasses.fields(cls)}]
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_it_parses(name):
    first = (ROOT / "configs" / name).read_text().splitlines()[0]
    command = re.fullmatch(rf"# python -m (train\.\w+) configs/{re.escape(name)}", first)
    assert command, f"line 1 must be the command that runs it, not {first!r}"
    load_toml(ROOT / "configs" / name, config_class(importlib.import_module(command[1])))


@pytest.mark.parametrize(
    ("name", "preset", "chips"),
    [
        ("llada_8b", "llada-8b", 64),
        ("llada2_mini", "llada2-mini", 16),
        ("dream_7b", "dream-7b", 64),
        ("llada21_mini", "llada2.1-mini", 16),
        ("trajectory_llada_8b", "llada-8b", 64),
        ("trajectory_llada2_mini", "llada2-mini", 16),
    ],
)
def test_large_runs_fit_their_model_and_their_pod(name, preset, chips):
    config = load_toml(ROOT / f"configs/align_{name}.toml", AlignRunConfig)
    check_lengths(PRESETS[preset], config)
    mesh = AbstractMesh(tuple(map(int, config.mesh.split(","))), MESH_AXES)
    check_batch(config, mesh)
    data, fsdp, tensor = mesh.shape.values()
    assert data * fsdp * tensor == chips


@pytest.mark.parametrize(
    ("name", "preset"),
    [("llada_8b", "llada-8b"), ("dream_7b", "dream-7b"), ("llada21_mini", "llada2.1-mini")],
)
def test_large_policies_fit_their_model_and_their_pod(name, preset):
    config = load_toml(ROOT / f"configs/grpo_{name}.toml", GrpoConfig)
    mesh = AbstractMesh(tuple(map(int, config.mesh.split(","))), MESH_AXES)
    assert PRESETS[preset].num_heads % mesh.shape["tensor"] == 0
    assert mesh.size == 64
    assert (
        config.prompts_per_step * config.group_size % (mesh.shape["data"] * mesh.shape["fsdp"]) == 0
    )
