"""A decode as a stream of its states, for notebooks."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np

from xflow_jax.decoding.blocks import Count, require_count
from xflow_jax.decoding.cache_options import CacheOptions
from xflow_jax.decoding.generate import (
    AnyModel,
    AnyRule,
    Prompts,
    Seed,
    check_kinds,
    make_decode_config,
    padded_length,
    require_finite,
    token_rows,
)
from xflow_jax.decoding.rules.base import Rule
from xflow_jax.decoding.rules.own_loop import adapt_loop
from xflow_jax.decoding.slot_rows import Lane, make_row
from xflow_jax.decoding.slots import Slots, admit, init_slots, run_passes
from xflow_jax.decoding.state import DecodeConfig, read_out
from xflow_jax.parallel import count_shards, fetch_to_host
from xflow_jax.tokenizer import decode_responses
from xflow_jax.types import LanguageModel


@dataclasses.dataclass(frozen=True)
class StreamState:
    """State of a decode under way, as NumPy arrays.

    Attributes:
        tokens: int [B, N]. Positions below progress 1 hold the last prediction, or the mask token.
        progress: t, float32 [B, N].
        confidence: of each position's last prediction, float32 [B, N].
        forward_passes: passes that each sequence took part in, int [B].
        active: True for sequences that go on, bool [B].
        texts: the responses up to their first EOS if no sequence goes on, otherwise None.
    """

    tokens: np.ndarray
    progress: np.ndarray
    confidence: np.ndarray
    forward_passes: np.ndarray
    active: np.ndarray
    texts: list[str] | None = None


def stream(
    lm: AnyModel,
    prompts: Prompts,
    rule: AnyRule,
    gen_length: Count = 64,
    steps: Count = 16,
    *,
    every: Count = 1,
    steps_per_block: Count | None = None,
    block_length: Count | None = None,
    eos_early_stop: bool = False,
    seed: Seed = 0,
    early_exit: bool | None = None,
    cache: str | bool | None = None,
    refresh: Count = 0,
    window: Count = 0,
    prompt_every: Count = 1,
) -> Iterator[StreamState]:
    """Decodes like `generate`, and yields the state after every few passes.

    Each sequence is at its own block and step: one that finishes a block early begins the next one
    at once. The last state has the tokens of `generate`.

    Args:
        lm: the model, from `load`.
        prompts: as for `generate`.
        rule: how far each position moves in a step.
        gen_length: N, positions of the response.
        steps: forward passes for the whole response.
        every: passes between two states.
        steps_per_block: forward passes for each block, instead of `steps`.
        block_length: positions of a block, or None for the default of the model.
        eos_early_stop: stop a sequence when everything up to its first EOS is settled.
        seed: of rules that draw.
        early_exit: skip passes that can change nothing, or None for the default of the rule.
        cache: one of CACHES, or None for "exact" if the model has it (see `CacheOptions`).
        refresh: steps after which an approximate cache is renewed.
        window: further positions on each side of a block.
        prompt_every: blocks after which the prompt is read again.

    Yields:
        The states in order.

    Raises:
        UserError: for bad input.
    """
    check_kinds(lm, rule, seed)
    require_count("every", every)
    rows = token_rows(lm, prompts)
    longest = max(map(len, rows))
    config = make_decode_config(lm, longest, gen_length, steps, steps_per_block, block_length)
    config = slot_config(lm, rule, config, CacheOptions(cache, refresh, window, prompt_every))
    early_exit = rule.early_exit if early_exit is None else early_exit
    config = dataclasses.replace(config, eos_early_stop=eos_early_stop, early_exit=early_exit)
    config = adapt_loop(rule, config)
    # Every device needs equally many rows. Surplus slots stay empty.
    slots = len(rows) + -len(rows) % count_shards(lm.mesh)
    lane = Lane.of(config, slots, padded_length(longest))
    return _run(lm, rule, lane, config, rows, seed, every)


def slot_config(
    lm: LanguageModel, rule: Rule, config: DecodeConfig, options: CacheOptions
) -> DecodeConfig:
    """Returns a decode's configuration in slots, before the rule adapts it.

    Args:
        lm: the model.
        rule: the rule.
        config: lengths and steps.
        options: the cache.

    Raises:
        UserError: for a cache that the model or the lengths cannot have.
    """
    config = options.apply(lm.config, config)
    return dataclasses.replace(config, early_exit=rule.early_exit)


def _run(
    lm: LanguageModel,
    rule: Rule,
    lane: Lane,
    config: DecodeConfig,
    prompts: list[list[int]],
    seed: int,
    every: int,
) -> Iterator[StreamState]:
    """Admits the prompts, and takes passes until all are over."""
    slots = init_slots(lm, rule, lane)
    seen: Counter[tuple[int, ...]] = Counter()
    live = np.ones(lane.slots, bool)
    with lm.scope():
        for slot, prompt in enumerate(prompts):
            repeat = seen[tuple(prompt)]
            seen[tuple(prompt)] += 1
            row = make_row(lane, lm.config.pad_id, prompt, rule, config, seed, repeat)
            slots = admit(lm.model, lm.params, rule, lane, slots, row, jnp.int32(slot))
    is_over = False
    while not is_over:
        with lm.scope():
            slots, _ = run_passes(lm.model, lm.params, rule, lane, slots, live, every)
            state = _read(lm, lane, slots, len(prompts))
        is_over = not state.active.any()
        if is_over and lm.tokenizer is not None:
            texts = decode_responses(lm.tokenizer, state.tokens, lm.config.stop_ids)
            state = dataclasses.replace(state, texts=texts)
        yield state


def _read(lm: LanguageModel, lane: Lane, slots: Slots, count: int) -> StreamState:
    """Fetches the state of the first slots of a lane."""
    n, state = lane.config.gen_length, slots.state
    final, progress = read_out(lane.config, state, lm.config.stop_ids)
    parts = (state.tokens, final, progress, slots.confidence, state.forward_passes, slots.active)
    fetched = (part[:count] for part in fetch_to_host(parts))
    tokens, final, progress, confidence, passes, active = fetched
    require_finite(lm, progress)
    tokens = np.where(active[:, None], tokens[:, :n], final)
    return StreamState(tokens, progress, confidence[:, :n], passes, active)
