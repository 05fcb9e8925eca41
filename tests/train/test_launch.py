"""Tests that the files in configs/launch/ are well formed and name commands that exist."""

from __future__ import annotations

import importlib
import math
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
from jax.sharding import AbstractMesh

from tests.train.test_configs import config_class
from xflow_jax.cli.main import build_parser
from xflow_jax.decoding import parse_rules
from xflow_jax.models import PRESETS, tensor_split_sizes
from xflow_jax.parallel import parse_mesh
from xflow_jax.parallel.mesh import MESH_AXES
from xflow_jax.toml_config import load_toml
from xflow_jax.training import check_batch

ROOT = Path(__file__).parents[2]
LAUNCH = sorted((ROOT / "configs" / "launch").iterdir())
CHIPS = {"tpu_pod.sh": 64, "gke_align.yaml": 64, "gke_self_generate.yaml": 8, "gke_serve.yaml": 8}
CHIPS |= {"slurm_grpo.sbatch": 16, "skypilot_align.yaml": 16}
MODELS = {"llada-8b": PRESETS["llada-8b"], "llada2.1-mini": PRESETS["llada2.1-mini"]}


def commands(text: str) -> list[list[str]]:
    """Returns the words of the commands of this project in a file, without python -m.

    Those of other models are in comments.
    """
    text = re.sub(r"\\\n(?:# *)?", " ", text).replace("$SCRATCH", "/scratch")
    lists = re.findall(r"- -m\n((?: +- .+\n)+)", text)  # a YAML list of words
    found = [[line.strip()[2:].strip('"') for line in block.splitlines()] for block in lists]
    lines = re.findall(r"-m ((?:train\.\w+|convert\.\w+|xflow_jax) .+)", text)
    return found + [shlex.split(line) for line in lines]


def documents(file: Path) -> list[dict[str, Any]]:
    return list(pytest.importorskip("yaml").safe_load_all(file.read_text()))


@pytest.mark.parametrize("file", LAUNCH, ids=lambda file: file.name)
def test_it_is_well_formed(file):
    if file.suffix != ".yaml":
        subprocess.run(["bash", "-n", file], check=True)
        return
    for document in documents(file):
        if "apiVersion" in document:
            assert {"kind", "metadata", "spec"} <= document.keys()
        else:
            assert {"resources", "setup", "run"} <= document.keys()


@pytest.mark.parametrize("file", [f for f in LAUNCH if f.name.startswith("gke")], ids=str)
def test_it_fits_the_schema_of_kubernetes(file):
    kubernetes = pytest.importorskip("kubernetes_validate")
    for document in documents(file):
        jobs = [document]
        if document["kind"] == "JobSet":  # which is no part of Kubernetes, but its jobs are
            about = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "slice"}}
            replicated = document["spec"]["replicatedJobs"]
            jobs = [about | {"spec": job["template"]["spec"]} for job in replicated]
        for job in jobs:
            kubernetes.validate(job, "1.34", strict=True)


def test_both_models_have_files_of_every_program():
    """LLaDA-8B and LLaDA2.1-mini: convert, align, GRPO, evaluate and serve."""
    covered = set()
    for file in LAUNCH:
        for words in commands(file.read_text()):
            program = words[1] if words[0] == "xflow_jax" else words[0]
            name = re.sub("[^a-z0-9]", "", " ".join(words).lower())
            covered.add((program, "llada21mini" in name or "llada8b" not in name))
    programs = ("convert.from_hf", "train.self_generate", "train.align", "train.grpo")
    assert covered == {(p, mini) for p in (*programs, "evaluate", "serve") for mini in (0, 1)}


@pytest.mark.parametrize("file", LAUNCH, ids=lambda file: file.name)
def test_its_commands_are_read_by_their_programs(file):
    found = commands(file.read_text())
    assert found
    for words in found:
        check_command(words, CHIPS.get(file.name, 1))


def check_command(words: list[str], chips: int) -> None:
    """Checks that a program takes the words, and that its mesh has the chips of the file."""
    if words[0] == "convert.from_hf":
        assert len(words) == 5 and words[3:] == ["--dtype", "bfloat16"]
        return
    if words[0] == "xflow_jax":
        args = build_parser(words[1]).parse_all(words[1:])
        assert words[1] == "serve" or args.shard == "auto"
        sizes = parse_mesh(args.mesh or "1,1,1")
        parse_rules(args.rules)
    else:
        program = importlib.import_module(words[0])
        config = load_toml(ROOT / words[1], config_class(program), words[2:])
        sizes = parse_mesh(config.mesh)
        if words[0] == "train.align":
            check_batch(config, AbstractMesh(sizes, MESH_AXES))
    assert math.prod(sizes) == chips
    (model,) = (m for name, m in MODELS.items() if name in " ".join(words).replace("_", "-"))
    assert all(size % sizes[2] == 0 for size in tensor_split_sizes(model))
