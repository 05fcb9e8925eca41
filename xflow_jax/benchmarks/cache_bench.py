"""Time of a step with a cache and without it.

The cache is the exact one of block-causal decoding, or an approximate one of the other models.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable

import jax
import numpy as np

from xflow_jax.benchmarks.timer import median_ratio, run_seconds, time_in_turns
from xflow_jax.benchmarks.workload import random_prompts
from xflow_jax.decoding import CacheOptions, DecodeConfig, Rule, decode_batch
from xflow_jax.errors import UserError
from xflow_jax.lm import LM


@dataclasses.dataclass(frozen=True)
class CacheRatio:
    """Time of a step without and with a cache.

    Both are medians of whole decodes divided by their steps. The time with the cache includes what
    the cache costs: the pass of the prompt, and one more pass of each finished block.

    Attributes:
        steps: steps of a decode.
        without: seconds of a step without the cache.
        cached: seconds of a step with the cache.
        ratio: without / cached, as the median of the rounds' own ratios.
        agreement: share of equal tokens.
    """

    steps: int
    without: float
    cached: float
    ratio: float
    agreement: float


def cache_variants(
    lm: LM, decode_config: DecodeConfig, cache: CacheOptions
) -> tuple[DecodeConfig, DecodeConfig]:
    """Returns the decode without and with a cache.

    All steps run, and EOS ends no sequence.

    Args:
        lm: the model.
        decode_config: lengths and steps.
        cache: the cache.

    Raises:
        UserError: if the model does not have such a cache.
    """
    decode_config = dataclasses.replace(decode_config, stop_at_eos=False, early_exit=False)
    if cache.resolve(lm.config) == "none":
        raise UserError(
            f"{lm.config.family} attends to later blocks, so it has no exact cache. "
            "Choose a block-causal model, like LLaDA2.0, or another cache, like dual."
        )
    without = dataclasses.replace(decode_config, cache="none")
    return without, cache.apply(lm.config, decode_config)


def measure_variants(
    lm: LM,
    rule: Rule,
    variants: tuple[DecodeConfig, DecodeConfig],
    batch: int,
    prompt_length: int,
    rounds: int,
    timer: Callable[[Callable[[], object]], float] = run_seconds,
) -> CacheRatio:
    """Times decodes of random prompts without and with a cache, in turns.

    Args:
        lm: the model.
        rule: the rule.
        variants: the decodes of `cache_variants`.
        batch: number of prompts.
        prompt_length: tokens of each prompt.
        rounds: number of rounds.
        timer: measures the seconds of one run.
    """
    ids, mask, keys = random_prompts(lm, batch, prompt_length)

    def program(
        decode_config: DecodeConfig,
    ) -> Callable[[], tuple[jax.Array, jax.Array, jax.Array, object]]:
        return lambda: decode_batch(lm.model, lm.params, rule, decode_config, ids, mask, keys)

    without, cached = map(program, variants)
    with lm.scope():
        # The first runs compile.
        tokens, _, passes, _ = jax.device_get(without())
        same = tokens == jax.device_get(cached()[0])
        times = time_in_turns({"without": without, "cached": cached}, rounds, timer)
    steps = int(passes.max())
    return CacheRatio(
        steps,
        statistics.median(times["without"]) / steps,
        statistics.median(times["cached"]) / steps,
        median_ratio(times["without"], times["cached"]),
        float(np.mean(same)),
    )


def ratio_sentence(result: CacheRatio, name: str = "the cache") -> str:
    """Formats a measurement as a sentence, with the name of the cache."""
    times = f"{1e3 * result.without:.1f} ms without and {1e3 * result.cached:.1f} ms with {name}"
    tokens = "the same tokens"
    if result.agreement != 1:
        tokens = f"{100 * result.agreement:.2f} % of the tokens are equal"
    return (
        f"a step takes {times}, {result.ratio:.2f} times less, over {result.steps} steps, {tokens}"
    )
