"""The measurement of what the cache saves, on a toy."""

import dataclasses

import jax
import pytest

from tests.helpers import stub
from tests.llada2_helpers import TINY2, toy2
from xflow_jax import bench, bench_cache
from xflow_jax.config import PRESETS, UserError
from xflow_jax.generate import settings_of
from xflow_jax.models import abstract_params, build
from xflow_jax.rules import MaskPrediction


@pytest.mark.slow
def test_both_ways_are_timed_and_agree():
    config = dataclasses.replace(TINY2, num_experts=None, num_hidden_layers=1)
    lm, ticks = toy2(0, config), iter([8.0, 2.0, 6.0, 1.0, 9.0, 3.0])
    settings = settings_of(lm, 4, 8, 4, None, 4)
    result = bench_cache.measure(lm, MaskPrediction(), settings, 2, 4, 3, seconds=lambda program: next(ticks))
    assert result == bench_cache.Ratio(steps=4, whole=2.0, cached=0.5, ratio=4.0, same=True)
    said = bench_cache.sentence(result)
    assert said.startswith("a step takes 2000.0 ms without the cache and 500.0 ms with it, 4.0 times less")


def test_a_model_without_an_exact_cache():
    lm = stub()
    with pytest.raises(UserError, match="^llada attends to later blocks, so it has no exact cache; choose a llada2"):
        bench_cache.measure(lm, MaskPrediction(), settings_of(lm, 4, 8, 4, None, 4), 1, 4, 1, bench.seconds)


def test_the_middle_size():
    parameters = jax.tree.leaves(abstract_params(build(PRESETS["llada2-20m"])))
    assert sum(x.size for x in parameters) / 1e6 == pytest.approx(20, abs=1)
