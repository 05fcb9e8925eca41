"""The arithmetic by hand and against compiled programs, and the meshes that it chooses."""

from __future__ import annotations

import dataclasses

import pytest

from tests.helpers import toy
from xflow_jax.decoding.cache_options import CacheOptions
from xflow_jax.models.flops import matrix_parameters
from xflow_jax.models.presets import PRESETS
from xflow_jax.parallel.mesh import make_mesh
from xflow_jax.planning.cost_model import Workload, estimate_cost
from xflow_jax.planning.hardware import CHIPS
from xflow_jax.planning.hlo_cost import program_cost
from xflow_jax.planning.mesh_search import candidate_meshes, largest_batch, predict_row
from xflow_jax.planning.programs import make_lowerable


def test_a_decode_counts_what_arithmetic_says():
    """The program that runs, compiled for CPUs. The chunks of the head overlap a little."""
    lm = toy()
    work = Workload("decode", 4, prompt_length=16, gen_length=8, steps=4)
    program = make_lowerable(lm.config, work, make_mesh("1,1,1"))
    assert program.steps == 4
    found = program_cost(program.compile().as_text())
    least = estimate_cost(lm.config, work, (1, 1, 1)).flops
    assert not found.unknown_loops
    assert 1 <= found.flops / 4 / least < 1.1


def test_analytic_by_hand():
    c = PRESETS["llada-8b"]
    found = estimate_cost(c, Workload("decode", 8, prompt_length=128, gen_length=512), (4, 1, 2))
    layer = 4 * 4096**2 + 3 * 4096 * 12288
    wanted = 2 * 640 * 32 * layer + 4 * 640**2 * 4096 * 32 + 2 * 512 * 4096 * 126464
    policy = 2 * 512 * (8 * 64 + 64 * 64 + 2 * 64)
    assert found.flops == pytest.approx(2 * (wanted / 2 + policy))
    assert found.weights == pytest.approx((32 * layer + 2 * 4096 * 126464) * 2 / 2)
    mini = estimate_cost(PRESETS["llada2-mini"], Workload("decode", 1), (1, 1, 1))
    assert 30e9 < mini.weights < 34e9  # 16 B parameters
    assert (
        estimate_cost(PRESETS["llada2-mini"], Workload("decode", 1), (1, 1, 4)).weights
        == mini.weights / 4
    )


@pytest.mark.parametrize(("preset", "copies"), [("dream-7b", 1), ("sdar-4b", 2)])
def test_a_fine_tuning_by_hand(preset, copies):
    """Forward, recomputed, and twice that backward. Block-causal models pass two copies."""
    c = PRESETS[preset]
    found = estimate_cost(c, Workload("sft", 2, prompt_length=128, gen_length=384), (1, 1, 1))
    length = 512 * copies
    layers = 2 * length * matrix_parameters(c)[0]
    layers += 4 * length**2 * c.head_dim * c.num_heads * c.num_layers
    head = 2 * 512 * c.hidden_size * c.vocab_rows
    assert found.flops == pytest.approx(2 * 4 * (layers + head), rel=1e-6)


def test_an_exact_cache_reads_each_finished_block_once_more():
    """Three blocks of four passes, two more passes for finished blocks, and one of the prompt."""
    c = PRESETS["llada2-mini"]
    work = Workload("decode", 1, prompt_length=64, gen_length=64, steps=8, block_length=32)
    # The prompt attends to itself alone, the others to all 160 positions.
    tokens = (64 * 64 / 160 + 32 * (12 + 2)) / 12
    layers = 2 * tokens * matrix_parameters(c)[0]
    layers += 4 * tokens * 160 * c.head_dim * c.num_heads * c.num_layers
    head = 2 * 32 * c.hidden_size * c.vocab_rows
    policy = 2 * 64 * (8 * 64 + 64 * 64 + 2 * 64)
    found = estimate_cost(c, work, (1, 1, 1)).flops
    assert found == pytest.approx(layers + head + policy, rel=1e-6)


def test_a_cached_decode_by_hand():
    """TFLOP of a pass at 128 + 512 tokens, and the bounds of a chip of 790 TFLOP/s and 4.3 TB/s."""
    c, chip = PRESETS["llada-8b"], dataclasses.replace(CHIPS["v6e"], flops=790e12, bandwidth=4.3e12)

    def work(cache, batch=1):
        sizes = {"prompt_length": 128, "gen_length": 512, "steps": 12 * 16, "block_length": 32}
        return Workload("decode", batch, **sizes, cache=CacheOptions(cache))

    full, reuse = (estimate_cost(c, work("dual"), (1, 1, 1)).passes[step][0] for step in (0, 1))
    assert full == pytest.approx(9.2e12, rel=0.01) and reuse == pytest.approx(0.49e12, rel=0.02)
    dual, prefix, eight = (
        predict_row(c, w, chip, (1, 1, 1))["tokens_per_second"]
        for w in (work("dual"), work("prefix"), work("dual", 8))
    )
    assert dual == pytest.approx(629, rel=0.02)
    assert 0.9 * 442 < prefix < 442  # a pass has one of four lengths
    assert eight == pytest.approx(1734, rel=0.02)
    kept = estimate_cost(c, work("dual"), (1, 1, 1)).memory
    assert kept - estimate_cost(c, work("none"), (1, 1, 1)).memory == 2 * 2 * 32 * 640 * 4096


def test_int8_halves_the_matrices_alone():
    c = PRESETS["llada-8b"]
    work = Workload("decode", 1, prompt_length=128, gen_length=512, cache=CacheOptions("none"))
    wide, narrow = (
        estimate_cost(c, dataclasses.replace(work, dtype=dtype), (1, 1, 1))
        for dtype in ("bfloat16", "int8")
    )
    matrices = matrix_parameters(c)[1]
    for name in ("weights", "bytes", "memory"):
        assert getattr(wide, name) - getattr(narrow, name) == matrices, name
    assert wide.flops == narrow.flops


@pytest.mark.slow
def test_a_compiled_cached_decode_counts_its_passes():
    """The branches of the program count as often as the schedule takes them."""
    lm, lengths = toy(), {"prompt_length": 16, "gen_length": 32, "steps": 16, "block_length": 8}
    for cache in ("dual", "prefix"):
        work = Workload("decode", 4, **lengths, cache=CacheOptions(cache))
        program = make_lowerable(lm.config, work, make_mesh("1,1,1"))
        found = program_cost(program.compile().as_text(), None, program.branch_shares)
        least = estimate_cost(lm.config, work, (1, 1, 1)).flops
        assert 0.95 <= found.flops / 16 / least < 1.1


def test_meshes_divide_heads_and_vocabulary():
    shapes = candidate_meshes(PRESETS["llada2-mini"], 8)
    assert {t for *_, t in shapes} == {1, 2, 4}  # four key/value heads
    assert all(d * f * t == 8 for d, f, t in shapes)
    assert {t for *_, t in candidate_meshes(PRESETS["llada-8b"], 64)} == {1, 2, 4, 8, 16, 32}


def test_the_largest_batch_fits_and_its_double_does_not():
    config, chip = PRESETS["llada-8b"], CHIPS["v6e"]
    work = Workload("decode", 1)
    most = largest_batch(config, work, chip, 8)
    fits = [
        any(
            predict_row(config, dataclasses.replace(work, batch=batch), chip, s)["memory"]["total"]
            < 0.85 * chip.memory
            for s in candidate_meshes(config, 8)
            if batch % (s[0] * s[1]) == 0
        )
        for batch in (most, 2 * most)
    ]
    assert fits == [True, False]
