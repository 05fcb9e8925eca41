"""Attention between a noised and a clean copy of a text.

One pass then predicts all blocks of the noised copy, each from the clean blocks before it, as in
BD3-LM (arXiv:2503.09573).
"""

from __future__ import annotations

import jax.numpy as jnp

from xflow_jax.types import Array, Bool, Int


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
