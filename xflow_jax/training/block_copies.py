"""Attention between a noised and a clean copy of a text.

One pass then predicts all blocks of the noised copy, each from the clean blocks before it, as in
BD3-LM (arXiv:2503.09573).
"""

from __future__ import annotations

import jax.numpy as jnp

from xflow_jax.training.state import Batch
from xflow_jax.types import Array, Backbone, Bool, Float, Int, Params


def block_copies_mask(
    noised: Int[Array, "*B N"], clean: Int[Array, "*B L"]
) -> Bool[Array, "*B _ _"]:
    """Builds the attention mask of a noised and a clean copy.

    A noised position attends to its own block in the noised copy, and to earlier blocks of the
    clean one. A clean position attends to its own and earlier blocks of the clean copy.

    Args:
        noised: block number of each noised position.
        clean: block number of each clean position.

    Returns:
        Pairs (query, key) that may attend, bool [*B, N + L, N + L]. Noised positions come first.
    """
    own, source = noised[..., :, None], clean[..., :, None]
    own_key, source_key = noised[..., None, :], clean[..., None, :]
    rows = [
        jnp.concatenate([own == own_key, source_key < own], axis=-1),
        jnp.concatenate([jnp.zeros_like(source == own_key), source_key <= source], axis=-1),
    ]
    return jnp.concatenate(rows, axis=-2)


def block_hidden(
    model: Backbone,
    variables: dict[str, Params],
    x: Float[Array, "B M E"],
    tokens: Int[Array, "B L"],
    blocks: Int[Array, "#B L"],
    mask: Bool[Array, "B L"] | None = None,
) -> Float[Array, "B M E"]:
    """Computes hidden states of the last M positions, block by block.

    A position is predicted from its noised block and the clean blocks before it.

    Args:
        model: the model.
        variables: its variables.
        x: inputs of the noised copy.
        tokens: the clean text.
        blocks: block number of each position of the text.
        mask: real tokens of the clean text.
    """
    first = tokens.shape[1] - x.shape[1]
    clean_x = model.apply(variables, tokens, method="embed")
    both = jnp.concatenate([x.astype(clean_x.dtype), clean_x], axis=1)
    if mask is not None:
        mask = jnp.concatenate([mask[:, first:], mask], axis=1)
    allowed = block_copies_mask(blocks[:, first:], blocks)
    places = jnp.arange(tokens.shape[1])
    positions = jnp.concatenate([places[first:], places])
    hidden = model.apply(variables, both, mask, None, allowed, positions, method="hidden")
    own, clean = hidden[:, : x.shape[1]], hidden[:, x.shape[1] :]
    if not model.config.logits_shift:
        return own
    # The row before a block's first position belongs to a block that is finished, so it is clean.
    starts = (blocks != jnp.roll(blocks, 1, axis=1))[:, first:, None]
    before = jnp.where(starts, jnp.roll(clean, 1, axis=1)[:, first:], jnp.roll(own, 1, axis=1))
    return before if first else before.at[:, 0].set(own[:, 0])


def canvas_length(gen_length: int, block_length: int) -> int:
    """Returns the positions of whole blocks that hold a response.

    Args:
        gen_length: N, positions of the response, which may begin anywhere in a block.
        block_length: positions of a block.
    """
    return (gen_length + 2 * block_length - 2) // block_length * block_length


def decode_rows(batch: Batch, block_length: int, eos_id: int) -> Batch:
    """Finds the positions that decodes fill.

    The blocks of a block-causal model count from the first token of a row. So its rows are moved
    until all responses begin in a block that begins at the same place.

    Args:
        batch: as in `make_pretrain_step`.
        block_length: positions of a block of a block-causal model, or 0.
        eos_id: id of EOS.

    Returns:
        The batch with "fill" bool [B, N], True at positions that a decode fills. With blocks,
        "prompt" ends at the block with which the response begins. "response" is K whole blocks,
        with the end of the prompt in the first one and EOS behind the response. A decode fills the
        blocks up to the first EOS.
    """
    if not block_length:
        return batch | {"fill": jnp.ones_like(batch["response"], bool)}
    (b, n), p = batch["response"].shape, batch["prompt"].shape[1]
    length = canvas_length(n, block_length)
    shared = jnp.sum(batch["prompt_mask"], axis=1, keepdims=True) % block_length
    source = jnp.arange(p + length)[None, :] - shared
    end = jnp.full((b, length - n), eos_id, batch["response"].dtype)
    tokens = jnp.concatenate([batch["prompt"], batch["response"], end], axis=1)
    real = jnp.pad(batch["prompt_mask"], ((0, 0), (0, length)), constant_values=True)
    tokens, real = (jnp.take_along_axis(x, jnp.maximum(source, 0), axis=1) for x in (tokens, real))
    is_end = (tokens == eos_id) & (source >= p)
    # The response ends at `n` if it has no EOS, and then its last block is filled to the end.
    ends = jnp.where(jnp.any(is_end, axis=1), jnp.argmax(is_end, axis=1) - p, length)[:, None]
    ends = jnp.minimum(ends, shared + n - 1)
    places = jnp.arange(length)[None, :]
    return {
        "prompt": tokens[:, :p],
        "prompt_mask": real[:, :p] & (source[:, :p] >= 0),
        "response": tokens[:, p:],
        "fill": (places >= shared) & (places // block_length <= ends // block_length),
    }
