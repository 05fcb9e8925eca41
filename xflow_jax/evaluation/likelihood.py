"""Likelihood of given responses: the Monte-Carlo bound of LLaDA's code.

Each response is masked at many levels, spread evenly over its draws. The cross-entropy at masked
positions is weighted by length / masked. Rows of all responses share batches.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from xflow_jax.decoding import PROMPT_MULTIPLE, require_finite
from xflow_jax.errors import UserError
from xflow_jax.input_files import read_jsonl
from xflow_jax.models import shift_rows
from xflow_jax.parallel import batch_sharding, count_shards, multihost
from xflow_jax.tokenizer import chat_ids, pad_left
from xflow_jax.toml_config import format_value
from xflow_jax.training import cross_entropy
from xflow_jax.types import Backbone, LanguageModel, Params

CHUNK = 16  # response positions whose logits are in memory at the same time
LARGEST_GROUP = 16
MOST_SAMPLES = 100_000  # of a response


@dataclasses.dataclass(frozen=True)
class MaskedRow:
    """A response with masked positions, one row of a batch.

    Attributes:
        prompt: token ids.
        response: token ids.
        masked: bool [len(response)], at least one True.
    """

    prompt: tuple[int, ...]
    response: tuple[int, ...]
    masked: np.ndarray


def draw_masks(rng: np.random.Generator, length: int, count: int) -> np.ndarray:
    """Draws masks as the official code does.

    With k ~ U{1 ... length}, mask j covers round(k + j * length / count) random positions, wrapped
    into 1 ... length.

    Args:
        rng: source of the draws.
        length: positions of the response.
        count: number of masks, spread over the levels together.

    Returns:
        bool [count, length].
    """
    k = rng.integers(1, length + 1)
    levels = np.rint(np.linspace(k, k + (count - 1) * (length / count), count)).astype(int)
    levels = (levels - 1) % length + 1
    return rng.permuted(np.arange(length)[None] < levels[:, None], axis=1)


def log_likelihoods(
    lm: LanguageModel,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    samples: int = 128,
    group: int | None = None,
    cfg_scale: float = 0.0,
    batch_size: int = 16,
    seed: int = 0,
    progress: bool = False,
) -> np.ndarray:
    """Estimates a lower bound of log p(response | prompt) for each pair.

    A value depends on the pair and the seed alone, and not on the rest of its batch, but for
    rounding.

    Args:
        lm: a LLaDA model.
        pairs: (prompt ids, response ids).
        samples: masks of each response.
        group: masks that spread over the levels together. None means the largest divisor of
            `samples` up to 16.
        cfg_scale: weight w of classifier-free guidance.
        batch_size: rows of a batch.
        seed: of the masks.
        progress: show a progress bar.

    Returns:
        Nats, float64 [len(pairs)].

    Raises:
        UserError: for bad input.
    """
    for name, value in (("samples", samples), ("group", group), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise UserError(f"{name} must be at least 1, not {value}")
    if samples > MOST_SAMPLES:
        raise UserError(f"samples must be at most {MOST_SAMPLES}, not {samples}")
    if group is None:
        group = next(g for g in range(min(LARGEST_GROUP, samples), 0, -1) if samples % g == 0)
    if samples % group:
        raise UserError(f"{samples} samples are not a whole number of groups of {group}")
    rows = []
    for number, (prompt, response) in enumerate(pairs):
        if len(response) == 0:
            raise UserError(f"response {number} is empty, so it has no likelihood")
        salt = zlib.crc32(np.asarray([*prompt, -1, *response], np.int32).tobytes())
        rng = np.random.default_rng([seed, salt])
        for _ in range(samples // group):
            masks = draw_masks(rng, len(response), group)
            rows += [MaskedRow(tuple(prompt), tuple(response), mask) for mask in masks]
    losses = row_losses(lm, rows, cfg_scale, batch_size, progress)
    return -losses.reshape(len(pairs), samples).mean(axis=1)


def row_losses(
    lm: LanguageModel,
    rows: Sequence[MaskedRow],
    cfg_scale: float = 0.0,
    batch_size: int = 16,
    progress: bool = False,
) -> np.ndarray:
    """Computes the weighted cross-entropy of each row at its masked positions.

    The weight is length / masked. Rows of similar length share a batch.

    Args:
        lm: a LLaDA model.
        rows: masked responses.
        cfg_scale: weight w of classifier-free guidance.
        batch_size: rows of a batch.
        progress: show a progress bar.

    Returns:
        Nats, float64 [len(rows)].

    Raises:
        UserError: if the model is block-causal, if a row is longer than the model allows or holds
            an id outside the vocabulary, or if the logits are NaN or infinite.
    """
    if lm.config.is_block_causal:
        raise UserError(
            "the likelihood is defined for LLaDA, whose attention covers the whole response"
        )
    order = sorted(range(len(rows)), key=lambda i: (len(rows[i].response), len(rows[i].prompt)))
    out = np.zeros(len(rows))
    fill = count_shards(lm.mesh)
    size = -(-min(batch_size, len(rows)) // fill) * fill
    starts = range(0, len(rows), size)
    for first in tqdm(starts, unit="batch", dynamic_ncols=True, disable=not progress):
        batch = order[first : first + size]
        # The last batch is filled up: one size, few compilations.
        filled = batch + batch[-1:] * (size - len(batch))
        arrays = _batch_arrays(lm, [rows[i] for i in filled])
        if lm.mesh is not None:
            arrays = multihost.put_sharded(arrays, batch_sharding(lm.mesh))
        with lm.scope():
            losses = multihost.fetch_to_host(_losses(lm.model, lm.params, cfg_scale, *arrays))
        out[batch] = losses[: len(batch)]
    require_finite(lm, out)
    return out


def _batch_arrays(lm: LanguageModel, rows: Sequence[MaskedRow]) -> tuple[np.ndarray, ...]:
    """Builds the arrays of a batch.

    They are prompts [B, P], real [B, P], responses [B, R], real [B, R] and masked [B, R].
    `real` is False at padding. Prompts are padded on the left and responses on the right, each to
    a length that many batches share.
    """
    most = lm.config.max_length
    tokens = max(len(row.prompt) + len(row.response) for row in rows)
    if tokens > most:
        raise UserError(
            f"a prompt and a response of {tokens} tokens exceed the model's {most} positions"
        )
    longest = [max(len(getattr(row, name)) for row in rows) for name in ("prompt", "response")]
    p, r = (-(-n // PROMPT_MULTIPLE) * PROMPT_MULTIPLE for n in longest)
    prompts, prompt_real = pad_left([row.prompt for row in rows], lm.config.pad_id, p)
    # Reversed rows that are padded on the left are padded on the right once reversed again.
    responses, real = (
        x[:, ::-1] for x in pad_left([row.response[::-1] for row in rows], lm.config.pad_id, r)
    )
    last = lm.config.vocab_rows - 1
    for ids in (prompts, responses):
        if (bad := ids[(ids < 0) | (ids > last)]).size:
            raise UserError(
                f"a prompt or a response holds the id {bad[0]}. The vocabulary has ids 0 to {last}."
            )
    masked = np.stack([np.pad(row.masked, (0, r - len(row.masked))) for row in rows])
    return prompts, prompt_real, np.ascontiguousarray(responses), np.ascontiguousarray(real), masked


@partial(jax.jit, static_argnames=("model", "cfg_scale"))
def _losses(
    model: Backbone,
    params: Params,
    cfg_scale: float,
    prompts: jax.Array,
    prompt_real: jax.Array,
    responses: jax.Array,
    real: jax.Array,
    masked: jax.Array,
) -> jax.Array:
    """Computes the losses float32 [B] of the arrays of `_batch_arrays`."""
    mask_id, n = model.config.mask_id, responses.shape[1]

    def hidden(prompts: jax.Array) -> jax.Array:
        x = jnp.concatenate([prompts, jnp.where(masked, mask_id, responses)], axis=1)
        x = model.apply({"params": params}, x, method="embed")
        attend = jnp.concatenate([prompt_real, real], axis=1)
        h = model.apply({"params": params}, x, attend, None, method="hidden")
        return (shift_rows(h, attend) if model.config.logits_shift else h)[:, -n:]

    states = [hidden(prompts)]
    if cfg_scale:
        states.append(hidden(jnp.full_like(prompts, mask_id)))

    def add_chunk(
        total: jax.Array, chunk: tuple[tuple[jax.Array, ...], jax.Array, jax.Array]
    ) -> tuple[jax.Array, None]:
        h, tokens, masked = chunk
        logits = [model.apply({"params": params}, x, method="head").astype(jnp.float32) for x in h]
        z = logits[0] if len(logits) == 1 else logits[1] + (cfg_scale + 1) * (logits[0] - logits[1])
        return total + jnp.sum(jnp.where(masked, cross_entropy(z, tokens), 0.0), axis=-1), None

    chunks = (tuple(_chunks(x) for x in states), _chunks(responses), _chunks(masked))
    total, _ = jax.lax.scan(add_chunk, jnp.zeros(responses.shape[0]), chunks)
    return total * jnp.sum(real, axis=-1) / jnp.maximum(jnp.sum(masked, axis=-1), 1)


def _chunks(x: jax.Array) -> jax.Array:
    """Splits [B, R, ...] into chunks, [R / CHUNK, B, CHUNK, ...].

    There is one chunk if CHUNK does not divide R.
    """
    size = CHUNK if x.shape[1] % CHUNK == 0 else x.shape[1]
    return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)


def read_pairs(
    path: Path, lm: LanguageModel, limit: int | None = None
) -> list[tuple[list[int], list[int]]]:
    """Reads pairs of a prompt and a response from jsonl.

    Args:
        path: the file. Each line is a pair with "prompt" and "response", texts or lists of token
            ids. The text of a prompt gets the chat template, and that of a response ends with EOS.
        lm: the model, for its tokenizer and vocabulary.
        limit: number of pairs to read, or None for all.

    Returns:
        (prompt ids, response ids) of each pair.

    Raises:
        UserError: for a line of another form, or if there are no pairs.
    """
    pairs = []
    for number, record in read_jsonl(path):
        if not isinstance(record, dict) or not {"prompt", "response"} <= record.keys():
            raise UserError(
                f'{path}, line {number} must look like {{"prompt": "...", "response": "..."}}'
            )
        where = f"{path}, line {number}"
        prompt, response = (
            _token_ids(record[name], name, lm, where) for name in ("prompt", "response")
        )
        pairs.append((prompt, response))
        if len(pairs) == limit:
            break
    if not pairs:
        raise UserError(f"{path} holds no pairs of a prompt and a response")
    return pairs


def _token_ids(value: object, name: str, lm: LanguageModel, where: str) -> list[int]:
    """Returns the ids of a prompt or a response, by its name."""
    if isinstance(value, str):
        if lm.tokenizer is None:
            raise UserError(
                f"{where}: {name} is a text, but the model's directory has no tokenizer"
            )
        if name == "prompt":
            return list(chat_ids(lm.tokenizer, value))
        return [*lm.tokenizer.encode(value, add_special_tokens=False), lm.config.eos_id]
    rows = lm.config.vocab_rows
    if isinstance(value, list) and all(type(i) is int and 0 <= i < rows for i in value):
        return value
    raise UserError(
        f"{where}: {name} is {format_value(value)[:40]}, "
        f"but it must be a text or a list of ids from 0 to {rows - 1}"
    )
