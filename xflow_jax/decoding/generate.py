"""Prompts in, answers out: checks, batching and padding around one jitted decode."""

from __future__ import annotations

import dataclasses
import operator
import zlib
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xflow_jax.decoding.decode import decode
from xflow_jax.decoding.rules.base import Rule
from xflow_jax.decoding.state import SETTLED, DecodeConfig, Trace, read_out
from xflow_jax.errors import UserError
from xflow_jax.parallel import batch_sharding, fetch_to_host, put_sharded
from xflow_jax.tokenizer import chat_ids, decode_answers, pad_left

PROMPT_MULTIPLE = (
    16  # prompts are padded to a multiple of this, so that most new lengths need no new compilation
)


MOST_STEPS = 4  # forward passes per position that are let through; more can only be a mistake


@dataclasses.dataclass(frozen=True)
class Generation:
    """What `generate` returns, as NumPy arrays.

    tokens int [B, N]; texts: the answers up to their first EOS, None without a tokenizer; progress float [B, N]: the
    final t; forward_passes int [B]: passes each sequence took part in; trace: arrays [T, B, N] where asked for.
    """

    tokens: np.ndarray
    texts: list[str] | None
    progress: np.ndarray
    forward_passes: np.ndarray
    trace: Trace | None = None


def generate(
    lm: Any,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    rule: Rule,
    gen_length: int = 64,
    steps: int = 16,
    steps_per_block: int | None = None,
    block_length: int | None = None,
    eos_early_stop: bool = False,
    seed: int = 0,
    trace: bool = False,
    early_exit: bool | None = None,
    cache: bool | None = None,
    refresh: int = 0,
) -> Generation:
    """Decodes an answer of up to `gen_length` tokens to each prompt.

    prompts: texts, which get the chat template, or lists of token ids, taken as they are, of any lengths. steps:
    forward passes for the whole response; steps_per_block: for each block, instead of it, as LLaDA2.0's code counts.
    block_length: of the semi-autoregressive blocks; None: one block for LLaDA, 32 for LLaDA2.0. eos_early_stop: stop a
    sequence when everything up to its first EOS is settled. early_exit: skip forward passes that can change nothing
    (None: as the rule's original does). cache: keep finished blocks' keys and values, which changes no token (None:
    wherever there is such a cache, as in LLaDA2.0). refresh: where there is none, read the prompt's keys and values
    anew in every so many steps of a block only, which is cheaper and changes tokens (0 or 1 = in every step, exact).
    seed: of rules that draw; a sequence's draws depend on the seed and its own prompt alone. One compilation per shape
    of the batch, rule and lengths. Raises UserError on bad input.
    """
    check_refresh(lm, refresh)
    rows = _ids(lm, prompts)
    longest = max(len(row) for row in rows)
    settings = make_decode_config(lm, longest, gen_length, steps, steps_per_block, block_length)
    if cache and not settings.cache:
        raise UserError(
            f"{lm.config.family} attends to later blocks, so it has no exact cache; leave cache out"
        )
    settings = dataclasses.replace(
        settings,
        cache=settings.cache if cache is None else cache,
        refresh=int(refresh) if refresh > 1 else 0,
        early_exit=rule.early_exit if early_exit is None else early_exit,
        settled=getattr(rule, "settled", SETTLED),
        eos_early_stop=eos_early_stop,
        trace=trace,
        eot_id=_eot_id(lm),
    )
    ids, mask = pad_prompts(lm, rows)
    take = np.arange(len(rows))
    if lm.mesh is not None:
        # Every device needs as many rows as the others: repeat the last one, and drop its answers.
        fill = -len(rows) % (lm.mesh.shape["data"] * lm.mesh.shape["fsdp"])
        take = np.concatenate([take, np.full(fill, len(rows) - 1)])
    arrays = (ids[take], mask[take], row_keys(jax.random.key(seed), rows)[take])
    if lm.mesh is not None:
        arrays = put_sharded(arrays, batch_sharding(lm.mesh))
    with lm.scope():
        out = decode_batch(lm.model, lm.params, rule, settings, *arrays)
    tokens, progress, passes, kept = fetch_to_host(out)
    tokens, progress, passes = (x[: len(rows)] for x in (tokens, progress, passes))
    if kept is not None:
        kept = jax.tree.map(lambda x: x[:, : len(rows), :gen_length], kept)
    texts = None if lm.tokenizer is None else decode_answers(lm.tokenizer, tokens, lm.config.eos_id)
    return Generation(tokens, texts, progress, passes, kept)


@partial(jax.jit, static_argnames=("model", "settings"))
def decode_batch(
    model: Any,
    params: Any,
    rule: Rule,
    settings: DecodeConfig,
    prompt: jax.Array,
    prompt_mask: jax.Array,
    keys: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, Trace | None]:
    """The one jitted program: (tokens [B, N], progress [B, N], forward passes [B], trace [T, B, canvas] or None)."""
    state, trace = decode(model, params, rule, settings, prompt, prompt_mask, keys)
    return *read_out(settings, state, model.config.eos_id), state.forward_passes, trace


def _ids(lm: Any, prompts: Sequence[Any]) -> list[list[int]]:
    if isinstance(prompts, str) or not isinstance(prompts, Sequence | np.ndarray | jax.Array):
        what = "one text" if isinstance(prompts, str) else type(prompts).__name__
        raise UserError(f"prompts must be a list of texts or of lists of token ids, not {what}")
    if len(prompts) == 0:
        raise UserError("prompts is empty: give at least one text or list of token ids")
    rows = []
    for number, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            if lm.tokenizer is None:
                raise UserError(
                    "the model's directory has no tokenizer.json, so prompts must be lists of token ids"
                )
            rows.append(chat_ids(lm.tokenizer, prompt))
            continue
        try:
            row = [operator.index(token) for token in prompt]
        except TypeError:
            raise UserError(
                f"prompt {number} must be a text or a list of token ids, not {prompt!r:.60}"
            ) from None
        if not row:
            raise UserError(f"prompt {number} is empty: give at least one token id")
        if bad := [token for token in row if not 0 <= token < lm.config.vocab_rows]:
            last = lm.config.vocab_rows - 1
            raise UserError(
                f"prompt {number} holds the id {bad[0]}; the vocabulary has ids 0 to {last}"
            )
        rows.append(row)
    return rows


def pad_prompts(lm: Any, rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Rows of ids, padded on the left to a length that many batches share: (ids int32 [B, P], mask bool [B, P])."""
    longest = max(len(row) for row in rows)
    return pad_left(rows, lm.config.pad_id, -(-longest // PROMPT_MULTIPLE) * PROMPT_MULTIPLE)


def make_decode_config(
    lm: Any,
    longest: int,
    gen_length: int,
    steps: int,
    steps_per_block: int | None,
    block_length: int | None,
) -> DecodeConfig:
    """What `generate`'s arguments come to for prompts of at most `longest` tokens; UserError where they cannot be."""
    causal = lm.config.family == "llada2"
    counts = {"gen_length": gen_length, "block_length": block_length}
    for name, count in (counts | {"steps": steps, "steps_per_block": steps_per_block}).items():
        if count is not None and (not isinstance(count, int | np.integer) or count < 1):
            raise UserError(f"{name} must be a whole number of at least 1, not {count}")
    size = (32 if causal else gen_length) if block_length is None else block_length
    if not causal and gen_length % size:
        near = _nearest(gen_length, size)
        raise UserError(
            f"gen_length {gen_length} is not a whole number of blocks of {size}; {near}"
        )
    if steps_per_block is None:
        blocks = max(gen_length // size, 1)
        if steps % blocks:
            raise UserError(
                f"{steps} steps do not divide over {blocks} blocks; {_nearest(steps, blocks)}"
            )
        steps_per_block = steps // blocks
    if steps_per_block > MOST_STEPS * size:
        most = MOST_STEPS * gen_length
        raise UserError(
            f"{steps_per_block} steps for a block of {size} tokens: it must be 1 to {MOST_STEPS * size} "
            f"(for the response of {gen_length} tokens, at most {most})"
        )
    settings = DecodeConfig(
        gen_length, size, steps_per_block, block_causal=causal, cache=causal, stop_at_eos=causal
    )
    if longest + settings.canvas > lm.config.max_length:
        raise UserError(
            f"a prompt of {longest} tokens and a response of {settings.canvas} exceed the model's "
            f"{lm.config.max_length} positions; shorten one of them"
        )
    return settings


def check_refresh(lm: Any, refresh: int) -> None:
    """UserError where a prompt's keys and values cannot be refreshed every so many steps."""
    if isinstance(refresh, bool) or not isinstance(refresh, int | np.integer) or refresh < 0:
        raise UserError(f"refresh must be a whole number of at least 0, not {refresh}")
    if refresh and lm.config.family == "llada2":
        raise UserError(
            "llada2 is block-causal, so its cache is exact and never refreshed; leave refresh out"
        )


def _nearest(value: int, divisor: int) -> str:
    below = value // divisor * divisor
    return f"use {below + divisor}" if not below else f"use {below} or {below + divisor}"


def _eot_id(lm: Any) -> int | None:
    """The end-of-turn token where the tokenizer has one."""
    if lm.tokenizer is None:
        return None
    token = lm.tokenizer.get_vocab().get("<|eot_id|>")
    return None if token is None else int(token)


def row_keys(key: jax.Array, rows: Sequence[Sequence[int]]) -> jax.Array:
    """A key per row of `key`, the prompt and how often the prompt came before: its neighbours do not matter."""
    seen: Counter[int] = Counter()
    salts = []
    for row in rows:
        digest = zlib.crc32(np.asarray(row, np.int32).tobytes())
        salts.append((digest, seen[digest]))
        seen[digest] += 1
    prompts, repeats = np.asarray(salts, np.uint32).T
    fold = jax.vmap(jax.random.fold_in, (0, 0))
    base = jnp.broadcast_to(key, (len(rows),))
    return fold(fold(base, prompts), repeats)
