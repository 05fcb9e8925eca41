"""Rows from the TPU compiler."""

from __future__ import annotations

import dataclasses
import importlib.util
import signal

import pytest

from tests.helpers import TOY
from xflow_jax.decoding.cache_options import CacheOptions
from xflow_jax.errors import UserError
from xflow_jax.models.presets import PRESETS
from xflow_jax.planning import PlanRequest, plan_rows
from xflow_jax.planning.compiled_cost import _compiler_environment, _memory_of_error

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs the extra [plan]"
)


@pytest.mark.slow
@needs_libtpu
def test_the_tpu_compiler_and_the_arithmetic_agree(monkeypatch):
    """A small model compiled for four chips: FLOPs near the arithmetic, and no gathered head."""
    config = dataclasses.replace(
        TOY, d_model=512, n_layers=4, n_heads=4, mlp_hidden_size=1024, embedding_size=4096
    )
    monkeypatch.setitem(PRESETS, "small", config)
    request = PlanRequest(
        presets=("small",),
        topologies=("v5e:2x2",),
        batches=(4,),
        mesh="1,1,4",
        prompt_length=64,
        gen_length=64,
        steps=4,
    )
    (row,) = plan_rows(request, [])
    assert row["fits"] and row["compiled"] and not row["unknown_loops"]
    assert 0.99 < row["flops"] / row["analytic_flops"] < 1.1
    kinds = {c["kind"]: c for c in row["collectives"]}
    assert kinds["all-reduce"]["count"] >= 2 * config.n_layers
    assert kinds.get("all-gather", {"bytes": 0})["bytes"] < 1e6  # of the belief alone


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize("preset", ["llada-8b", "llada2-mini"])
def test_int8_is_read_without_a_converted_copy(monkeypatch, tmp_path, preset):
    """Traffic near the arithmetic of int8, which is about half of that of bfloat16."""
    layers = {"llada-8b": "n_layers", "llada2-mini": "num_hidden_layers"}[preset]
    monkeypatch.setitem(PRESETS, preset, dataclasses.replace(PRESETS[preset], **{layers: 3}))
    request = PlanRequest(
        presets=(preset,),
        topologies=("v5e-1",),
        gen_length=64,
        block_length=32,
        steps=32,
        cache=CacheOptions("dual" if preset == "llada-8b" else None),
        dtype="int8",
        hlo_folder=tmp_path,
    )
    (row,) = plan_rows(request, [])
    assert row["fits"] and 0.9 < row["bytes"] / row["analytic_bytes"] < 1.25
    (file,) = tmp_path.iterdir()
    sizes = "4096,12288" if preset == "llada-8b" else "256,2048,512"
    assert f"s8[3,{sizes}]" in file.read_text() or f"s8[2,{sizes}]" in file.read_text()
    assert f"bf16[{sizes}]" not in file.read_text() and f"bf16[1,{sizes}]" not in file.read_text()


@pytest.mark.slow
@needs_libtpu
def test_a_topology_that_the_compiler_does_not_know():
    with pytest.raises(UserError, match="the TPU compiler does not know the topology 'v5e:3x7': "):
        list(plan_rows(PlanRequest(presets=("llada-8b",), topologies=("v5e:3x7",)), []))


@pytest.mark.parametrize(
    ("message", "memory"),
    [
        (
            "Ran out of memory in memory space hbm. Used 18.50G of 15.75G hbm. Exceeded",
            (18.5, 15.75),
        ),
        ("required for HLO temporaries (16.09G) exceeds available HBM (15.75G).", (16.09, 15.75)),
        ("the compiler ran out of its own memory", None),
    ],
)
def test_the_memory_in_the_compilers_error(message: str, memory: tuple[float, float] | None):
    wanted = memory and {"total": memory[0] * 2**30, "capacity": memory[1] * 2**30}
    assert _memory_of_error(message) == wanted


def test_the_compiler_leaves_the_handler_of_sigterm():
    """Libtpu would print a stack trace at the end of a command."""
    before = signal.getsignal(signal.SIGTERM)
    with _compiler_environment():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    assert signal.getsignal(signal.SIGTERM) == before
