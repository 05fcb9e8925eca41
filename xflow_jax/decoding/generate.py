"""Prompts in, responses out: checks, padding and batching around one jitted decode.

The shape [B, P] of a batch decides how sums are rounded. P is the length of the longest prompt,
rounded up to a multiple of PROMPT_MULTIPLE. In float32 the rounding changes no token, but for near
ties. In bfloat16 it can, so there a prompt has the same tokens only in batches of one shape.

One compilation serves all calls of `generate` with equal batch shape, rule and lengths.
"""

from __future__ import annotations

import dataclasses
import operator
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, SupportsIndex, TypeAlias, cast

import jax
import jax.numpy as jnp
import numpy as np

from xflow_jax.decoding.blocks import (
    Count,
    count_blocks,
    nearest_multiples,
    require_count,
    resolve_block_length,
)
from xflow_jax.decoding.cache_options import CacheOptions
from xflow_jax.decoding.decode import decode
from xflow_jax.decoding.rules.base import Rule
from xflow_jax.decoding.rules.own_loop import adapt_loop
from xflow_jax.decoding.state import DecodeConfig, Trace, read_out
from xflow_jax.errors import UserError, check_seed, describe, require
from xflow_jax.parallel import batch_sharding, count_shards, fetch_to_host, put_sharded
from xflow_jax.tokenizer import chat_ids, check_messages, decode_responses, pad_left
from xflow_jax.types import Array, Backbone, Bool, Float, Int, Key, LanguageModel, Params

# Anything can arrive at run time, and `generate` checks it.
if TYPE_CHECKING:
    Prompts: TypeAlias = (
        Sequence[str] | Sequence[Sequence[dict[str, str]]] | Sequence[Sequence[int]] | np.ndarray
    )
    AnyModel: TypeAlias = LanguageModel
    AnyRule: TypeAlias = Rule
    Seed: TypeAlias = int
else:
    Prompts = AnyModel = AnyRule = Seed = object

# Prompts are padded to a multiple of this, so that most new lengths need no new compilation.
PROMPT_MULTIPLE = 16
# Most forward passes per position. More can only be a mistake.
MOST_STEPS = 4


@dataclasses.dataclass(frozen=True)
class Generation:
    """Result of `generate`, as NumPy arrays.

    Attributes:
        tokens: int [B, N].
        texts: the responses up to their first stop id, or None without a tokenizer.
        progress: final t, float [B, N].
        forward_passes: passes that each sequence took part in, int [B].
        trace: every step, arrays [T, B, N], if asked for.
        prompts: the prompts with their masks replaced, with `infill`. Otherwise None.
    """

    tokens: np.ndarray
    texts: list[str] | None
    progress: np.ndarray
    forward_passes: np.ndarray
    trace: Trace | None = None
    prompts: list[list[int]] | None = None


def generate(
    lm: AnyModel,
    prompts: Prompts,
    rule: AnyRule,
    gen_length: Count = 64,
    steps: Count = 16,
    *,
    steps_per_block: Count | None = None,
    block_length: Count | None = None,
    eos_early_stop: bool = False,
    seed: Seed = 0,
    trace: bool = False,
    early_exit: bool | None = None,
    cache: str | bool | None = None,
    refresh: Count = 0,
    window: Count = 0,
    prompt_every: Count = 1,
    infill: bool = False,
) -> Generation:
    """Decodes a response of up to `gen_length` tokens to each prompt.

    Args:
        lm: the model, from `load`.
        prompts: texts or lists of chat messages, which get the chat template, or token ids.
        rule: how far each position moves in a step.
        gen_length: N, positions of the response.
        steps: forward passes for the whole response.
        steps_per_block: forward passes for each block, instead of `steps`.
        block_length: positions of a block, or None for the default of the model.
        eos_early_stop: stop a sequence when everything up to its first EOS is settled.
        seed: of rules that draw. Draws depend on the seed and the sequence's own prompt alone.
        trace: return every step.
        early_exit: skip passes that can change nothing, or None for the default of the rule.
        cache: one of CACHES, or None for "exact" if the model has it (see `CacheOptions`).
        refresh: steps after which an approximate cache is renewed.
        window: further positions on each side of a block.
        prompt_every: blocks after which the prompt is read again.
        infill: predict the mask tokens of the prompts too. Otherwise they are context.

    Returns:
        Tokens, texts, final progress, and forward passes of each sequence.

    Raises:
        UserError: for bad input.
    """
    check_kinds(lm, rule, seed)
    options = CacheOptions(cache, refresh, window, prompt_every)
    used = options.resolve(lm.config)
    rows = token_rows(lm, prompts)
    longest = max(map(len, rows))
    config = make_decode_config(lm, longest, gen_length, steps, steps_per_block, block_length)
    config = dataclasses.replace(
        options.apply(lm.config, config),
        early_exit=rule.early_exit if early_exit is None else early_exit,
        eos_early_stop=eos_early_stop,
        trace=trace,
        infill=_infill_length(lm, used, longest) if infill else 0,
    )
    return _decode_rows(lm, rows, rule, adapt_loop(rule, config), seed)


def _infill_length(lm: LanguageModel, cache: str, longest: int) -> int:
    """Returns the positions of the padded prompts, which stand on the canvas."""
    require(
        not lm.config.is_block_causal,
        f"{lm.config.family} attends to earlier blocks only, so masks in a prompt cannot be "
        "predicted from what follows. Leave infill out.",
    )
    require(cache == "none", f"infill works with cache none, not with {cache}")
    return padded_length(longest)


def check_kinds(lm: object, rule: object, seed: object) -> None:
    """Raises UserError for a model, rule or seed of a wrong type."""
    if not isinstance(lm, LanguageModel):
        raise UserError(f"lm must be a model from xflow_jax.load, not {describe(lm)}")
    if isinstance(rule, type):
        raise UserError(f"the rule is the class {rule.__name__}: write {rule.__name__}()")
    require(
        isinstance(rule, Rule),
        f"rule must be a rule such as xflow_jax.Flow(), not {describe(rule)}",
    )
    check_seed(seed)


def _decode_rows(
    lm: LanguageModel, rows: list[list[int]], rule: Rule, config: DecodeConfig, seed: int
) -> Generation:
    """Pads the rows, runs the jitted decode, and fetches the result."""
    ids, mask = pad_prompts(lm, rows)
    take = np.arange(len(rows))
    # Every device needs equally many rows. The last row is repeated, and the copies dropped.
    fill = -len(rows) % count_shards(lm.mesh)
    take = np.concatenate([take, np.full(fill, len(rows) - 1)])
    with lm.scope():
        arrays = (ids[take], mask[take], row_keys(jax.random.key(seed), rows)[take])
        if lm.mesh is not None:
            arrays = put_sharded(arrays, batch_sharding(lm.mesh))
        out = decode_batch(lm.model, lm.params, rule, config, *arrays)
    tokens, progress, passes, trace = fetch_to_host(out)
    tokens, progress, passes = (x[: len(rows)] for x in (tokens, progress, passes))
    require_finite(lm, progress)
    start, end, prompts = config.infill, config.infill + config.gen_length, None
    if config.infill:
        filled = zip(tokens[:, :start].tolist(), rows, strict=True)
        prompts = [row[start - len(prompt) :] for row, prompt in filled]
        tokens, progress = tokens[:, start:], progress[:, start:]
    if trace is not None:
        trace = jax.tree.map(lambda x: x[:, : len(rows), start:end], trace)
    texts = None
    if lm.tokenizer is not None:
        texts = decode_responses(lm.tokenizer, tokens, lm.config.stop_ids)
    return Generation(tokens, texts, progress, passes, trace, prompts)


def require_finite(lm: LanguageModel, results: np.ndarray) -> None:
    """Checks numbers that are NaN or infinite if the logits are.

    Args:
        lm: the model, for the message.
        results: the numbers.

    Raises:
        UserError: if one is not finite.
    """
    require(
        bool(np.isfinite(results).all()),
        "the model's logits are NaN or infinite: its weights are damaged, or too large for "
        f"{np.dtype(lm.model.dtype).name}.",
    )


@partial(jax.jit, static_argnames=("model", "config"))
def decode_batch(
    model: Backbone,
    params: Params,
    rule: Rule,
    config: DecodeConfig,
    prompt: Int[Array, "B P"],
    prompt_mask: Bool[Array, "B P"],
    keys: Key[Array, " B"],
) -> tuple[Int[Array, "B N"], Float[Array, "B N"], Int[Array, " B"], Trace | None]:
    """Runs the one jitted program of a decode.

    Arguments are those of `decode`.

    Returns:
        Tokens, final progress, forward passes, and the trace [T, B, canvas] or None.
    """
    state, trace = decode(model, params, rule, config, prompt, prompt_mask, keys)
    return *read_out(config, state, model.config.stop_ids), state.forward_passes, trace


def token_rows(lm: LanguageModel, prompts: Prompts) -> list[list[int]]:
    """Converts prompts to lists of token ids, and checks them."""
    if isinstance(prompts, str) or not isinstance(prompts, Sequence | np.ndarray | jax.Array):
        what = "one text" if isinstance(prompts, str) else type(prompts).__name__
        raise UserError(f"prompts must be a list of texts or of lists of token ids, not {what}")
    if len(prompts) == 0:
        raise UserError("prompts is empty: give at least one text or list of token ids")
    return [_token_row(lm, number, prompt) for number, prompt in enumerate(prompts)]


def _token_row(lm: LanguageModel, number: int, prompt: object) -> list[int]:
    """Converts prompt `number` to token ids."""
    if isinstance(prompt, dict):
        raise UserError(f"prompt {number} is one message: a chat is a list of messages")
    is_chat = isinstance(prompt, list | tuple) and any(isinstance(x, dict) for x in prompt)
    if is_text := isinstance(prompt, str) or is_chat:
        if lm.tokenizer is None:
            raise UserError(
                "the model's directory has no tokenizer.json, so prompts must be lists of token ids"
            )
        text = prompt if isinstance(prompt, str) else check_messages(prompt, f"prompt {number}")
        row = chat_ids(lm.tokenizer, text)
    else:
        try:
            row = [operator.index(token) for token in cast(Iterable[SupportsIndex], prompt)]
        except TypeError:
            raise UserError(
                f"prompt {number} must be a text or a list of token ids, not {describe(prompt)}"
            ) from None
    if not row:
        raise UserError(f"prompt {number} is empty: give at least one token id")
    if bad := [token for token in row if not 0 <= token < lm.config.vocab_rows]:
        last = lm.config.vocab_rows - 1
        hint = " The tokenizer belongs to another model." if is_text else ""
        raise UserError(
            f"prompt {number} holds the id {describe(bad[0])}. "
            f"The vocabulary has ids 0 to {last}.{hint}"
        )
    return row


def pad_prompts(lm: LanguageModel, rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Pads rows of ids on the left, to a multiple of PROMPT_MULTIPLE.

    Returns:
        Token ids int32 [B, P], and a mask bool [B, P] that is False at padding.

    Raises:
        UserError: for an id outside the vocabulary.
    """
    longest = max(len(row) for row in rows)
    last = lm.config.vocab_rows - 1
    for number, row in enumerate(rows):
        inside = all(0 <= token <= last for token in row)
        require(inside, f"prompt {number} holds ids outside the vocabulary, 0 to {last}")
    return pad_left(rows, lm.config.pad_id, padded_length(longest))


def padded_length(longest: int) -> int:
    """Returns P for the longest prompt: the next multiple of PROMPT_MULTIPLE."""
    return -(-longest // PROMPT_MULTIPLE) * PROMPT_MULTIPLE


def make_decode_config(
    lm: LanguageModel,
    longest: int,
    gen_length: Count,
    steps: Count,
    steps_per_block: Count | None,
    block_length: Count | None,
) -> DecodeConfig:
    """Builds the DecodeConfig of a call of `generate`.

    Args:
        lm: the model.
        longest: tokens of the longest prompt.
        gen_length: N, positions of the response.
        steps: forward passes for the whole response.
        steps_per_block: forward passes for each block, instead of `steps`.
        block_length: positions of a block, or None for the default of the model.

    Raises:
        UserError: if lengths or steps are invalid, or exceed the model's positions.
    """
    causal = lm.config.is_block_causal
    require_count("steps", steps)
    require_count("steps_per_block", steps_per_block)
    size = resolve_block_length(lm.config, gen_length, block_length)
    if steps_per_block is None:
        blocks = count_blocks(lm.config, gen_length, block_length)
        if steps % blocks:
            raise UserError(
                f"{steps} steps do not divide over {blocks} blocks. "
                f"{nearest_multiples(steps, blocks)}"
            )
        steps_per_block = steps // blocks
    if steps_per_block > MOST_STEPS * size:
        most = MOST_STEPS * gen_length
        raise UserError(
            f"{steps_per_block} steps for a block of {size} tokens: it must be 1 to "
            f"{MOST_STEPS * size} (for the response of {gen_length} tokens, at most {most})"
        )
    config = DecodeConfig(
        gen_length=int(gen_length),
        block_length=size,
        steps=int(steps_per_block),
        block_causal=causal,
        cache="exact" if causal else "none",
        stop_at_eos=causal,
        eot_id=find_eot_id(lm),
    )
    if longest + config.canvas > lm.config.max_length:
        raise UserError(
            f"a prompt of {longest} tokens and a response of {config.canvas} exceed the model's "
            f"{lm.config.max_length} positions. Shorten one of them."
        )
    return config


def find_eot_id(lm: LanguageModel) -> int | None:
    """Returns the end-of-turn token if the tokenizer has one."""
    if lm.tokenizer is None:
        return None
    token = lm.tokenizer.get_vocab().get("<|eot_id|>")
    return None if token is None else int(token)


def row_keys(key: Key[Array, ""], rows: Sequence[Sequence[int]]) -> Key[Array, " B"]:
    """Derives a key for each row from its prompt.

    Equal prompts are counted, so that their keys differ. The other rows of a batch do not change a
    row's draws.
    """
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
