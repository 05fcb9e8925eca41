"""Tests that the files in configs/launch/ are well formed and name commands that exist."""

from __future__ import annotations

import importlib
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from tests.train.test_configs import config_class
from xflow_jax.cli.main import build_parser
from xflow_jax.parallel import parse_mesh
from xflow_jax.toml_config import load_toml

ROOT = Path(__file__).parents[2]
LAUNCH = sorted((ROOT / "configs" / "launch").iterdir())
CHIPS = {"tpu_pod.sh": 64, "gke_align.yaml": 64, "gke_self_generate.yaml": 8}
CHIPS |= {"slurm_grpo.sbatch": 16, "skypilot_align.yaml": 16}


def commands(text: str) -> list[list[str]]:
    """Returns the words of the commands of this project in a file, without python -m."""
    text = re.sub(r"\\\n(?:# *)?", " ", text).replace("$SCRATCH", "/scratch")
    lists = re.findall(r"- -m\n((?: +- .+\n)+)", text)  # a YAML list of words
    found = [[line.strip()[2:] for line in block.splitlines()] for block in lists]
    lines = re.findall(r"-m ((?:train\.\w+|xflow_jax) .+)", text)
    return found + [shlex.split(line) for line in lines]


@pytest.mark.parametrize("file", LAUNCH, ids=lambda file: file.name)
def test_it_is_well_formed(file):
    if file.suffix == ".yaml":
        yaml = pytest.importorskip("yaml")
        (document,) = yaml.safe_load_all(file.read_text())
        if "apiVersion" in document:
            assert {"kind", "metadata", "spec"} <= document.keys()
        else:
            assert {"resources", "setup", "run", "num_nodes"} <= document.keys()
    else:
        subprocess.run(["bash", "-n", file], check=True)


@pytest.mark.parametrize("file", LAUNCH, ids=lambda file: file.name)
def test_its_commands_are_read_by_their_programs(file):
    (words,) = commands(file.read_text())
    if words[0] == "xflow_jax":
        args = build_parser(words[1]).parse_all(words[1:])
        assert args.shard == "auto"
        return
    program = importlib.import_module(words[0])
    config = load_toml(ROOT / words[1], config_class(program), words[2:])
    data, fsdp, tensor = parse_mesh(config.mesh)
    assert data * fsdp * tensor == CHIPS[file.name]
    if hasattr(config, "batch_size") and words[0] == "train.align":
        assert config.batch_size % (data * fsdp) == 0
