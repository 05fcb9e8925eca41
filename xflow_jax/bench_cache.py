"""What the exact cache of block-causal decoding saves: `xflow bench --model llada2-20m --cache-ratio --gen-length 512`.

The same decode is timed with and without the cache, in turns, so that another load on the machine falls on both alike.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from xflow_jax.decode import Settings
from xflow_jax.generate import decode_batch, pad_prompts
from xflow_jax.lm import LM
from xflow_jax.rules import Rule
from xflow_jax.strict import UserError


@dataclasses.dataclass(frozen=True)
class Ratio:
    """whole, cached: seconds of a step without and with the cache, medians of whole decodes over their steps; what the
    cache costs besides (reading the prompt, and each finished block once) is in it. ratio: the median of the rounds'
    own. same: whether the tokens were the same."""

    steps: int
    whole: float
    cached: float
    ratio: float
    same: bool


def measure(
    lm: LM,
    rule: Rule,
    settings: Settings,
    batch: int,
    prompt_length: int,
    rounds: int,
    seconds: Callable[[Callable[[], Any]], float],
) -> Ratio:
    """Times decodes of `batch` random prompts in both ways; no step is skipped, and an EOS stops nothing.

    seconds: runs a program to its end and says how long it took. Raises UserError for a model without an exact cache.
    """
    if not settings.cache:
        raise UserError(f"{lm.config.family} attends to later blocks, so it has no exact cache; choose a llada2 model")
    rows = np.random.default_rng(0).integers(0, lm.config.vocab_size, (batch, prompt_length)).tolist()
    ids, mask = jax.device_put(pad_prompts(lm, rows))
    keys = jax.random.split(jax.random.key(0), batch)
    settings = dataclasses.replace(settings, stop_at_eos=False, early_exit=False)
    ways = [dataclasses.replace(settings, cache=cache) for cache in (False, True)]
    with lm.scope():
        # The first run compiles.
        outs = [decode_batch(lm.model, lm.params, rule, way, ids, mask, keys) for way in ways]
        tokens, passes = zip(*(jax.device_get((out[0], out[2])) for out in outs), strict=True)
        times = [
            [seconds(lambda way=way: decode_batch(lm.model, lm.params, rule, way, ids, mask, keys)) for way in ways]
            for _ in range(rounds)
        ]
    steps = int(passes[0].max())
    whole, cached = (statistics.median(column) / steps for column in zip(*times, strict=True))
    ratio = statistics.median(without / with_ for without, with_ in times)
    return Ratio(steps, whole, cached, ratio, bool((tokens[0] == tokens[1]).all()))


def sentence(result: Ratio) -> str:
    """A measurement in words."""
    same = "the same tokens" if result.same else "OTHER TOKENS"
    return (
        f"a step takes {1e3 * result.whole:.1f} ms without the cache and {1e3 * result.cached:.1f} ms with it, "
        f"{result.ratio:.1f} times less, over {result.steps} steps; {same}"
    )
