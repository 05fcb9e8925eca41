"""How likely a model finds given responses: the Monte-Carlo bound that the official LLaDA code computes.

Masks at many levels are drawn for each response, all of one response's draws evenly spread over the levels (`draws`),
and the cross-entropy at masked positions is weighted by length / masked. Rows of all responses share batches.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from xflow_jax.decoding import PROMPT_MULTIPLE
from xflow_jax.errors import UserError
from xflow_jax.parallel import batch_sharding, multihost
from xflow_jax.tasks import read_jsonl
from xflow_jax.tokenizer import chat_ids, pad_left
from xflow_jax.toml_config import format_value
from xflow_jax.training import cross_entropy

CHUNK = 16  # response positions whose logits stand in memory at once


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A response with some of its positions masked: a row of a batch. masked: bool [len(response)], at least one."""

    prompt: tuple[int, ...]
    response: tuple[int, ...]
    masked: np.ndarray


def draws(rng: np.random.Generator, length: int, count: int) -> np.ndarray:
    """bool [count, length], as the official code draws them: with k ~ U{1 ... length}, row j masks
    round(k + j * length / count) positions, wrapped into 1 ... length, at random."""
    k = rng.integers(1, length + 1)
    levels = np.rint(np.linspace(k, k + (count - 1) * (length / count), count)).astype(int)
    levels = (levels - 1) % length + 1
    return rng.permuted(np.arange(length)[None] < levels[:, None], axis=1)


def log_likelihoods(
    lm: Any,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    samples: int = 128,
    group: int = 16,
    cfg_scale: float = 0.0,
    batch_size: int = 16,
    seed: int = 0,
    progress: bool = False,
) -> np.ndarray:
    """A lower bound of log p(response | prompt) in nats for each (prompt ids, response ids): float64 [len(pairs)].

    samples: masks per response, drawn in groups of `group` that spread over the levels together. A value depends on the
    pair and the seed alone, not on what shares its batch. cfg_scale: classifier-free guidance w. UserError on bad
    input.
    """
    for name, value in (("samples", samples), ("group", group), ("batch_size", batch_size)):
        if value < 1:
            raise UserError(f"{name} must be at least 1, not {value}")
    if samples % group:
        raise UserError(f"{samples} samples are not a whole number of groups of {group}")
    rows = []
    for number, (prompt, response) in enumerate(pairs):
        if len(response) == 0:
            raise UserError(
                f"response {number} is empty: there is nothing whose likelihood could be told"
            )
        salt = zlib.crc32(np.asarray([*prompt, -1, *response], np.int32).tobytes())
        rng = np.random.default_rng([seed, salt])
        for _ in range(samples // group):
            rows += [
                Drawn(tuple(prompt), tuple(response), m) for m in draws(rng, len(response), group)
            ]
    losses = row_losses(lm, rows, cfg_scale, batch_size, progress)
    return -losses.reshape(len(pairs), samples).mean(axis=1)


def row_losses(
    lm: Any,
    rows: Sequence[Drawn],
    cfg_scale: float = 0.0,
    batch_size: int = 16,
    progress: bool = False,
) -> np.ndarray:
    """The cross-entropy of each row at its masked positions times length / masked, float64 [len(rows)].

    Rows of like length share a batch. UserError for a model that is not LLaDA, and where a row exceeds its positions.
    """
    if lm.config.is_block_causal:
        raise UserError(
            "the likelihood is defined for LLaDA, whose attention sees the whole response at once"
        )
    order = sorted(range(len(rows)), key=lambda i: (len(rows[i].response), len(rows[i].prompt)))
    out = np.zeros(len(rows))
    fill = 1 if lm.mesh is None else lm.mesh.shape["data"] * lm.mesh.shape["fsdp"]
    size = -(-min(batch_size, len(rows)) // fill) * fill
    for first in tqdm(
        range(0, len(rows), size), unit="batch", dynamic_ncols=True, disable=not progress
    ):
        batch = order[first : first + size]
        filled = [
            rows[i] for i in batch + batch[-1:] * (size - len(batch))
        ]  # one size of batch, few compilations
        arrays = _arrays(lm, filled)
        if lm.mesh is not None:
            arrays = multihost.put_sharded(arrays, batch_sharding(lm.mesh))
        with lm.scope():
            losses = multihost.fetch_to_host(_losses(lm.model, lm.params, cfg_scale, *arrays))
        out[batch] = losses[: len(batch)]
    return out


def _arrays(lm: Any, rows: Sequence[Drawn]) -> tuple[np.ndarray, ...]:
    """(prompts [B, P], whether they are real [B, P], responses [B, R], real [B, R], masked [B, R]).

    Prompts are padded on the left and responses on the right, each to a length that many batches share.
    """
    longest = [max(len(getattr(row, name)) for row in rows) for name in ("prompt", "response")]
    if sum(longest) > lm.config.max_length:
        most = lm.config.max_length
        raise UserError(
            f"a prompt and a response of {sum(longest)} tokens exceed the model's {most} positions"
        )
    p, r = (-(-n // PROMPT_MULTIPLE) * PROMPT_MULTIPLE for n in longest)
    prompts, prompt_real = pad_left([row.prompt for row in rows], lm.config.pad_id, p)
    # Turned round, what is padded on the left is padded on the right.
    responses, real = (
        x[:, ::-1] for x in pad_left([row.response[::-1] for row in rows], lm.config.pad_id, r)
    )
    masked = np.stack([np.pad(row.masked, (0, r - len(row.masked))) for row in rows])
    return prompts, prompt_real, np.ascontiguousarray(responses), np.ascontiguousarray(real), masked


@partial(jax.jit, static_argnames=("model", "cfg_scale"))
def _losses(
    model: Any,
    params: Any,
    cfg_scale: float,
    prompts: jax.Array,
    prompt_real: jax.Array,
    responses: jax.Array,
    real: jax.Array,
    masked: jax.Array,
) -> jax.Array:
    """The losses float32 [B] of the rows that `_arrays` made."""
    mask_id, n = model.config.mask_id, responses.shape[1]

    def hidden(prompts: jax.Array) -> jax.Array:
        x = jnp.concatenate([prompts, jnp.where(masked, mask_id, responses)], axis=1)
        x = model.apply({"params": params}, x, method="embed")
        attend = jnp.concatenate([prompt_real, real], axis=1)
        return model.apply({"params": params}, x, attend, None, method="hidden")[:, -n:]

    states = [hidden(prompts)]
    if cfg_scale:
        states.append(hidden(jnp.full_like(prompts, mask_id)))
    size = CHUNK if n % CHUNK == 0 else n

    def cut(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)

    def visit(total: jax.Array, part: tuple[Any, jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        h, tokens, where = part
        logits = [model.apply({"params": params}, x, method="head").astype(jnp.float32) for x in h]
        z = logits[0] if len(logits) == 1 else logits[1] + (cfg_scale + 1) * (logits[0] - logits[1])
        return total + jnp.sum(jnp.where(where, cross_entropy(z, tokens), 0.0), axis=-1), None

    parts = (tuple(cut(x) for x in states), cut(responses), cut(masked))
    total, _ = jax.lax.scan(visit, jnp.zeros(responses.shape[0]), parts)
    return total * jnp.sum(real, axis=-1) / jnp.maximum(jnp.sum(masked, axis=-1), 1)


def read_pairs(path: Path, lm: Any, limit: int | None = None) -> list[tuple[list[int], list[int]]]:
    """(prompt ids, response ids) of a jsonl with "prompt" and "response", texts or lists of ids, a pair a line.

    A prompt's text gets the chat template; a response's ends with EOS, as the model would end it. UserError for a line
    of another form.
    """

    def ids(value: Any, name: str, number: int) -> list[int]:
        if isinstance(value, str):
            if lm.tokenizer is None:
                raise UserError(
                    f"{path}, line {number}: {name} is a text, but the model's directory has no tokenizer"
                )
            if name == "prompt":
                return list(chat_ids(lm.tokenizer, value))
            return [*lm.tokenizer.encode(value, add_special_tokens=False), lm.config.eos_id]
        rows = lm.config.vocab_rows
        if isinstance(value, list) and all(type(i) is int and 0 <= i < rows for i in value):
            return value
        right = f"a text or a list of ids from 0 to {rows - 1}"
        raise UserError(
            f"{path}, line {number}: {name} is {format_value(value)[:40]}, but it must be {right}"
        )

    pairs = []
    for number, record in read_jsonl(path):
        if not isinstance(record, dict) or not {"prompt", "response"} <= record.keys():
            raise UserError(
                f'{path}, line {number} must look like {{"prompt": "...", "response": "..."}}'
            )
        pairs.append(tuple(ids(record[name], name, number) for name in ("prompt", "response")))
        if len(pairs) == limit:
            break
    if not pairs:
        raise UserError(f"{path} holds no pairs of a prompt and a response")
    return pairs
