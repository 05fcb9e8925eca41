"""Every configuration that ships is read by the program that its first line names."""

from __future__ import annotations

import dataclasses
import importlib
import re
from pathlib import Path
from types import ModuleType

import pytest

from train.align import AlignConfig
from xflow_jax.models.presets import PRESETS
from xflow_jax.parallel.mesh import MESH_AXES
from xflow_jax.toml_config import load_toml
from xflow_jax.training.alignment_program import check_batch, check_lengths

ROOT = Path(__file__).parents[2]
CONFIGS = sorted(path.name for path in (ROOT / "configs").glob("*.toml"))


def config_class(program: ModuleType) -> type:
    """The dataclass of a program's whole configuration: the one that says where its results go."""
    own = [
        kind
        for kind in vars(program).values()
        if getattr(kind, "__module__", "") == program.__name__
    ]
    kinds = [kind for kind in own if dataclasses.is_dataclass(kind)]
    (found,) = [kind for kind in kinds if "out" in {f.name for f in dataclasses.fields(kind)}]
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_it_parses(name):
    first = (ROOT / "configs" / name).read_text().splitlines()[0]
    command = re.fullmatch(rf"# python -m (train\.\w+) configs/{re.escape(name)}", first)
    assert command, f"line 1 must be the command that runs it, not {first!r}"
    load_toml(ROOT / "configs" / name, config_class(importlib.import_module(command[1])))


class Sizes:
    """A mesh's shape, without its devices."""

    def __init__(self, spec: str):
        self.shape = dict(zip(MESH_AXES, map(int, spec.split(",")), strict=True))


@pytest.mark.parametrize(
    ("name", "preset", "chips"), [("llada_8b", "llada-8b", 64), ("llada2_mini", "llada2-mini", 16)]
)
def test_large_runs_fit_their_model_and_their_pod(name, preset, chips):
    config = load_toml(ROOT / f"configs/align_{name}.toml", AlignConfig)
    check_lengths(PRESETS[preset], config)
    mesh = Sizes(config.mesh)
    check_batch(config, mesh)
    data, fsdp, tensor = mesh.shape.values()
    assert data * fsdp * tensor == chips
