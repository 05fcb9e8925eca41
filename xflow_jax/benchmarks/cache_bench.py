"""What reading less in a step saves, beside the same decode without it: `xflow bench --cache-ratio`, of the exact cache
of block-causal decoding, and `xflow bench --refresh R`, of a prompt that is read in every R-th step only.

Both ways are timed in turns, so that another load on the machine falls on them alike.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from xflow_jax.decoding import DecodeConfig, Rule, check_refresh, decode_batch, pad_prompts
from xflow_jax.errors import UserError
from xflow_jax.lm import LM


@dataclasses.dataclass(frozen=True)
class CacheRatio:
    """plain, saving: seconds of a step, medians of whole decodes over their steps; what the saving costs besides (a
    cache reads the prompt, and each finished block once) is in it. ratio: the median of the rounds' own. agreement:
    the share of equal tokens."""

    steps: int
    plain: float
    saving: float
    ratio: float
    agreement: float


def cache_variants(
    lm: LM, decode_config: DecodeConfig, refresh: int
) -> tuple[DecodeConfig, DecodeConfig]:
    """The decode that reads all in every step, and the one that does not; no step is skipped, an EOS stops nothing.

    refresh: read the prompt in every so many steps; 0: with the exact cache. UserError where there is none.
    """
    decode_config = dataclasses.replace(decode_config, stop_at_eos=False, early_exit=False)
    if refresh:
        check_refresh(lm, refresh)
        return decode_config, dataclasses.replace(decode_config, refresh=refresh)
    if not decode_config.cache:
        raise UserError(
            f"{lm.config.family} attends to later blocks, so it has no exact cache; choose a llada2 model"
        )
    return dataclasses.replace(decode_config, cache=False), decode_config


def measure_variants(
    lm: LM,
    rule: Rule,
    ways: tuple[DecodeConfig, DecodeConfig],
    batch: int,
    prompt_length: int,
    rounds: int,
    seconds: Callable[[Callable[[], Any]], float],
) -> CacheRatio:
    """Times decodes of `batch` random prompts in both ways.

    seconds: runs a program to its end and says how long it took.
    """
    rows = (
        np.random.default_rng(0).integers(0, lm.config.vocab_size, (batch, prompt_length)).tolist()
    )
    ids, mask = jax.device_put(pad_prompts(lm, rows))
    keys = jax.random.split(jax.random.key(0), batch)
    with lm.scope():
        # The first run compiles.
        outs = [decode_batch(lm.model, lm.params, rule, way, ids, mask, keys) for way in ways]
        tokens, passes = zip(*(jax.device_get((out[0], out[2])) for out in outs), strict=True)
        times = [
            [
                seconds(
                    lambda way=way: decode_batch(lm.model, lm.params, rule, way, ids, mask, keys)
                )
                for way in ways
            ]
            for _ in range(rounds)
        ]
    steps = int(passes[0].max())
    plain, saving = (statistics.median(column) / steps for column in zip(*times, strict=True))
    ratio = statistics.median(without / with_ for without, with_ in times)
    return CacheRatio(steps, plain, saving, ratio, float(np.mean(tokens[0] == tokens[1])))


def ratio_sentence(result: CacheRatio, refresh: int = 0) -> str:
    """A measurement in words."""
    less = f"the prompt read every {refresh} steps" if refresh else "the cache"
    times = f"{1e3 * result.plain:.1f} ms without and {1e3 * result.saving:.1f} ms with {less}"
    same = (
        "the same tokens"
        if result.agreement == 1
        else f"{100 * result.agreement:.2f} % of the tokens are equal"
    )
    return f"a step takes {times}, {result.ratio:.2f} times less, over {result.steps} steps; {same}"
