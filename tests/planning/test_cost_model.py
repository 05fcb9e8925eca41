"""The arithmetic by hand and against compiled programs, and the meshes that it chooses."""

from __future__ import annotations

import dataclasses

import pytest

from tests.helpers import toy
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
