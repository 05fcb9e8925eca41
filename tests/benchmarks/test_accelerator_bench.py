"""Sections, time limit and errors of the measurements of one accelerator."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from tests.helpers import toy
from xflow_jax.benchmarks import accelerator, accelerator_bench, kernel_profile, timer
from xflow_jax.cli import bench_device
from xflow_jax.errors import UserError


def arguments(*argv):
    parser = argparse.ArgumentParser()
    bench_device.add_arguments(parser)
    return parser.parse_args(argv)


def test_a_failing_section_leaves_its_error_and_the_others_count(monkeypatch, tmp_path, capsys):
    def fail(bench):
        raise MemoryError("out of memory")

    sections = {"bad": fail, "good": lambda bench: {"seconds": 1.5}}
    monkeypatch.setattr(bench_device, "SECTIONS", sections)
    monkeypatch.setattr(accelerator_bench, "SECTIONS", sections)
    file = tmp_path / "device.json"
    bench_device.run(arguments(f"--json={file}", "--shapes=small", "--sections=bad,good"))
    kept = json.loads(file.read_text())
    assert kept["bad"] == {"error": "MemoryError: out of memory"} and kept["good"]["seconds"] == 1.5
    assert kept["shapes"] == "small" and kept["dtype"] == "bfloat16"
    assert "bad failed" in capsys.readouterr().err


def test_no_measurement_begins_when_the_time_is_up():
    lines = []
    bench = accelerator.Bench(accelerator.SHAPES["small"], 0.0, "float32", lines.append)
    assert not bench.has_time("step")
    assert lines == ["step: left out, since the time is up"]


def test_bad_options_are_one_sentence(tmp_path):
    with pytest.raises(UserError, match="--sections has 'speed', but it must be some of machine"):
        bench_device.run(arguments(f"--json={tmp_path / 'a'}", "--sections=speed"))
    with pytest.raises(UserError, match="--minutes must be at least 1"):
        bench_device.run(arguments(f"--json={tmp_path / 'a'}", "--minutes=0"))
    with pytest.raises(UserError, match="int8 is a section of its own"):
        bench_device.run(arguments(f"--json={tmp_path / 'a'}", "--dtype=int8"))
    (tmp_path / "a").write_text("{}")
    with pytest.raises(UserError, match="exists"):
        bench_device.run(arguments(f"--json={tmp_path / 'a'}"))


def test_small_sections_give_numbers(monkeypatch):
    monkeypatch.setattr(accelerator, "load_or_make", lambda name, dtype: toy())
    monkeypatch.setattr(accelerator, "matmul_rate", lambda dtype: 1e10)
    shapes = accelerator.Shapes("toy", "toy", 4, 8, 4, 2, (1, 2), (2,), 4096, 1)
    kept, lines = [], []
    numbers = accelerator_bench.run_sections(
        shapes,
        600.0,
        ("machine", "short_pass", "belief", "attention"),
        "float32",
        lines.append,
        kept.append,
    )
    assert numbers["machine"]["matmul_flops_per_second"] == 1e10
    assert numbers["machine"]["copy_bytes_per_second"] > 0
    for row in numbers["belief"]["seconds"]:
        assert row["product"] > 0 and row["chunk default"] > 0
    assert {row["queries"] for row in numbers["attention"]["seconds"]} == {4, 12}
    assert numbers["attention"]["cudnn"] == "left out, since cuDNN needs a GPU"
    assert [row["batch"] for row in numbers["short_pass"]["batches"]] == [1, 2]
    assert len(kept) == 4
    seconds = numbers["short_pass"]["batches"][0]["seconds"]
    assert any(f"batch=1, seconds={seconds:.4g}" in line for line in lines)


@pytest.mark.slow
def test_every_section_runs_with_small_shapes():
    numbers = accelerator_bench.run_sections(
        accelerator.SHAPES["small"],
        3600.0,
        list(accelerator_bench.SECTIONS),
        "float32",
        lambda line: None,
        lambda numbers: None,
    )
    assert not [name for name, each in numbers.items() if "error" in each]
    assert numbers["agreement"]["equal float32 einsum xla"] == 1.0
    assert [row["batch"] for row in numbers["int8"]["decodes"]] == [1, 2]
    assert [row["batch"] for row in numbers["int8"]["short_pass"]["batches"]] == [1, 2]


# What a machine with a plain JAX and Flax may lack.
MISSING = ("grain", "jaxtyping", "beartype", "tqdm", "matplotlib", "safetensors", "chex", "torch")


def test_the_command_needs_only_jax_and_flax():
    """It starts without the other packages, as on a machine that has nothing but the checkout."""
    block = f"import sys; sys.modules.update(dict.fromkeys({MISSING!r}))"
    code = f"{block}; from xflow_jax.cli.main import main; main(['bench-device', '--help'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "--shapes" in done.stdout, done.stderr


def test_a_model_is_made_anew_for_another_dtype(monkeypatch):
    made = []
    monkeypatch.setattr(jax, "clear_caches", lambda: None)  # the other tests need theirs
    monkeypatch.setattr(
        accelerator, "load_or_make", lambda name, dtype: made.append((name, dtype)) or toy()
    )
    bench = accelerator.Bench(accelerator.SHAPES["small"], 0.0, "bfloat16", lambda line: None)
    for dtype in (None, "bfloat16", "int8", "int8", None):
        bench.model("small", dtype)
    assert [dtype for _, dtype in made] == ["bfloat16", "int8", "bfloat16"]


def test_profile_counts_the_programs_own_events():
    product = jax.jit(lambda x: jnp.sort(x @ x, axis=-1))
    x = jnp.ones((256, 256))
    product(x).block_until_ready()
    profile = kernel_profile.profile_kernels(lambda: product(x), timer.run_seconds, runs=2)
    assert profile.seconds > 0 and profile.kernels and profile.busy > 0
    assert sum(profile.kinds.values()) == pytest.approx(profile.busy)
    text = profile.text()
    assert "longest kernels:" in text and max(map(len, text.splitlines())) < 130


def test_kinds_of_kernels():
    kind = kernel_profile._kind_of
    assert kind("nvjet_hsh_128x256_64x4_1x2") == "matrix products"
    assert kind("cudnn_generated_fort_native_sdpa_sm90") == "attention"
    assert kind("input_reduce_fusion") == "reductions"
    assert kind("loop_multiply_fusion") == "other fusions"
