"""Equal results on any mesh, in one process or several, and the compilation cache."""

from __future__ import annotations

import functools
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.helpers import eight, random_prompts, toy
from xflow_jax.decoding.generate import generate
from xflow_jax.decoding.rules.flow import Flow
from xflow_jax.decoding.rules.mask_prediction import MaskPrediction
from xflow_jax.errors import UserError
from xflow_jax.models.logical_axes import state_shardings
from xflow_jax.parallel.multihost import enable_compilation_cache, initialize_processes
from xflow_jax.parallel.partitioning import batch_sharding, replicated
from xflow_jax.tokenizer import pad_left
from xflow_jax.training.pretraining import make_pretrain_step
from xflow_jax.training.state import TrainState

SIZES = (1, 2, 4, 8)
MESHES = [f"{d},{f},{t}" for d in SIZES for f in SIZES for t in SIZES if d * f * t == 8]
ROOT = Path(__file__).parents[2]


@functools.cache
def results(mesh: str | None):
    """Runs a model with eight heads.

    Returns:
        (tokens of Flow, tokens of random sampling, parameters after three updates).
    """
    lm = toy(mesh, n_heads=8)
    prompts = random_prompts([5, 3, 7, 2, 4, 6, 1, 5])
    rules = (Flow(), MaskPrediction(order="random", temperature=0.7))
    tokens = [generate(lm, prompts, rule, gen_length=8, steps=4).tokens for rule in rules]
    ids, mask = pad_left(prompts, lm.config.pad_id)
    rng = np.random.default_rng(0)
    batch = {"prompt": ids, "prompt_mask": mask, "response": rng.integers(0, 20, (8, 6))}
    optimizer = optax.adam(1e-3)
    state = TrainState.create(jax.tree.map(jnp.copy, lm.params), optimizer)
    step = make_pretrain_step(lm.model, optimizer, optax.constant_schedule(1.0))
    if lm.mesh is not None:
        placed = state_shardings(state, lm.mesh, "llada")
        state, batch = jax.device_put((state, batch), (placed, batch_sharding(lm.mesh)))
        step = jax.jit(step, out_shardings=(placed, replicated(lm.mesh)))
    with lm.scope():
        step = jax.jit(step)
        for _ in range(3):
            state, _ = step(state, batch, jax.random.key(3))
    return *tokens, jax.device_get(state.params)


@pytest.mark.slow
@eight
@pytest.mark.parametrize("mesh", MESHES)
def test_every_mesh_of_eight_is_one_device(mesh):
    flow, drawn, params = results(mesh)
    wanted_flow, wanted_drawn, wanted = results(None)
    np.testing.assert_array_equal(flow, wanted_flow)
    np.testing.assert_array_equal(drawn, wanted_drawn)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-5), params, wanted)
    start = jax.device_get(toy(n_heads=8).params)
    assert (
        max(jax.tree.leaves(jax.tree.map(lambda a, b: np.abs(a - b).max(), wanted, start))) > 1e-3
    )


def run_processes(count: int, *argv: str) -> list[subprocess.CompletedProcess]:
    """Runs the command in `count` processes with eight devices together."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={8 // count}"}
    env |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    started = []
    for rank in range(count):
        variables = {
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
            "JAX_NUM_PROCESSES": count,
            "JAX_PROCESS_ID": rank,
        }
        mine = env | ({name: str(value) for name, value in variables.items()} if count > 1 else {})
        pipe = subprocess.PIPE
        command = [sys.executable, "-m", "xflow_jax", *argv]
        started.append(
            subprocess.Popen(command, env=mine, stdout=pipe, stderr=pipe, text=True, cwd=ROOT)
        )
    out = [process.communicate(timeout=500) for process in started]
    return [
        subprocess.CompletedProcess(argv, p.returncode, *o)
        for p, o in zip(started, out, strict=True)
    ]


@pytest.mark.slow
def test_two_processes_of_four_devices_are_one_of_eight():
    prompts = ("--prompt=keep the even numbers of x", "--prompt=sum of the squares of x")
    argv = (
        "generate",
        "--model=tiny",
        "--mesh=2,2,2",
        "--gen-length=16",
        "--steps=4",
        "--json",
        *prompts,
    )
    (single,), (first, second) = (run_processes(count, *argv, "--rule=flow") for count in (1, 2))
    assert single.returncode == first.returncode == second.returncode == 0, (
        first.stderr + second.stderr
    )
    # The transport of CPUs also prints on stdout.
    one, two, none = (
        [json.loads(x) for x in p.stdout.splitlines() if x[0] == "{"]
        for p in (single, first, second)
    )
    assert len(one) == 2 and two == one and none == []


def test_a_single_process_connects_to_no_others(monkeypatch):
    monkeypatch.delenv("JAX_COORDINATOR_ADDRESS", raising=False)
    monkeypatch.delenv("XFLOW_DISTRIBUTED", raising=False)
    initialize_processes()
    assert jax.process_count() == 1


def test_a_process_with_a_bad_count_is_an_error(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "127.0.0.1:1")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    with pytest.raises(UserError, match="the processes cannot find each other: invalid literal"):
        initialize_processes()


def test_the_compilation_cache_respects_the_variables_of_jax(monkeypatch, tmp_path):
    before = jax.config.jax_compilation_cache_dir
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        enable_compilation_cache()
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "xflow_jax" / "programs")
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "elsewhere")
        jax.config.update("jax_compilation_cache_dir", None)
        enable_compilation_cache()
        assert jax.config.jax_compilation_cache_dir is None
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
