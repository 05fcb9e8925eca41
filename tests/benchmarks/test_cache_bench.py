"""Time of a step without and with a cache, of a toy."""

import dataclasses

import jax
import pytest

from tests.benchmarks.test_decode_bench import arguments
from tests.helpers import stub
from tests.llada2_helpers import TINY2, toy2
from xflow_jax.benchmarks import cache_bench
from xflow_jax.cli import bench
from xflow_jax.decoding.cache_options import CacheOptions
from xflow_jax.decoding.generate import make_decode_config
from xflow_jax.decoding.rules.mask_prediction import MaskPrediction
from xflow_jax.errors import UserError
from xflow_jax.models.factory import abstract_params, build
from xflow_jax.models.presets import PRESETS


@pytest.mark.slow
def test_both_variants_are_timed_and_agree():
    config = dataclasses.replace(TINY2, num_experts=None, num_hidden_layers=1)
    lm, ticks = toy2(0, config), iter([8.0, 2.0, 6.0, 1.0, 9.0, 3.0])
    config = make_decode_config(lm, 4, 8, 4, None, 4)
    variants = cache_bench.cache_variants(lm, config, CacheOptions())
    result = cache_bench.measure_variants(
        lm, MaskPrediction(), variants, 2, 4, 3, timer=lambda program: next(ticks)
    )
    assert result == cache_bench.CacheRatio(
        steps=4, without=2.0, cached=0.5, ratio=4.0, agreement=1.0
    )
    said = cache_bench.ratio_sentence(result)
    assert said.startswith(
        "a step takes 2000.0 ms without and 500.0 ms with the cache, 4.00 times less"
    )
    assert said.endswith("over 4 steps, the same tokens")
    almost = cache_bench.ratio_sentence(dataclasses.replace(result, agreement=0.9999))
    assert almost.endswith("99.99 % of the tokens are equal")


@pytest.mark.slow
def test_a_prompt_read_every_other_step(capsys):
    bench.run(
        arguments(
            "--model=tiny",
            "--refresh=2",
            "--gen-length=4",
            "--steps=2",
            "--batch-sizes=1",
            "--rounds=1",
        )
    )
    said = capsys.readouterr().out.splitlines()[-1]
    assert (
        said.startswith("batch 1: a step takes ")
        and " ms with the prompt read every 2 steps, " in said
    )
    assert "over 2 steps" in said


def test_models_without_the_cache():
    lm = stub()
    with pytest.raises(
        UserError,
        match="^llada attends to later blocks, so it has no exact cache. Choose a block-causal",
    ):
        cache_bench.cache_variants(lm, make_decode_config(lm, 4, 8, 4, None, 4), CacheOptions())
    with pytest.raises(UserError, match="^llada2 is block-causal, so its cache is exact"):
        lm = toy2(0, TINY2)
        cache_bench.cache_variants(
            lm, make_decode_config(lm, 4, 8, 4, None, 4), CacheOptions(refresh=2)
        )
    with pytest.raises(
        UserError, match="^--refresh must be at least 2 to differ from every step, not 1"
    ):
        bench.run(arguments("--model=tiny", "--refresh=1"))


def test_the_middle_size():
    parameters = jax.tree.leaves(abstract_params(build(PRESETS["llada2-20m"])))
    assert sum(x.size for x in parameters) / 1e6 == pytest.approx(20, abs=1)
