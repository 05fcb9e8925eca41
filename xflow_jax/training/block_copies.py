"""Attention between a noised and a clean copy of a text.

One pass then predicts all blocks of the noised copy, each from the clean blocks before it, as in
BD3-LM (arXiv:2503.09573).
"""

from __future__ import annotations

import jax.numpy as jnp

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
    block_length: int,
    mask: Bool[Array, "B L"] | None = None,
) -> Float[Array, "B M E"]:
    """Computes hidden states of the last M positions, block by block.

    A position is predicted from its noised block and the clean blocks before it.

    Args:
        model: the model.
        variables: its variables.
        x: inputs of the noised copy. A block begins at the first of them.
        tokens: the clean text.
        block_length: positions of a block.
        mask: real tokens of the clean text. Padding is before the M positions.
    """
    length, noised = tokens.shape[1], x.shape[1]
    first = length - noised
    clean_x = model.apply(variables, tokens, method="embed")
    both = jnp.concatenate([x.astype(clean_x.dtype), clean_x], axis=1)
    if mask is not None:
        mask = jnp.concatenate([mask[:, first:], mask], axis=1)
    places = jnp.arange(length)
    blocks = (places - first) // block_length
    allowed = block_copies_mask(blocks[first:], blocks)[None]
    positions = jnp.concatenate([places[first:], places])
    hidden = model.apply(variables, both, mask, None, allowed, positions, method="hidden")
    own, clean = hidden[:, :noised], hidden[:, noised:]
    if not model.config.logits_shift:
        return own
    # The row before a block's first position belongs to a block that is finished, so it is clean.
    starts = jnp.arange(noised) % block_length == 0
    clean = jnp.roll(clean, 1, axis=1)[:, first:]
    before = jnp.where(starts[None, :, None], clean, jnp.roll(own, 1, axis=1))
    return before if first else before.at[:, 0].set(own[:, 0])
