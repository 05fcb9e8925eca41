"""Losses as functions of arrays. Shapes: B batch, N response length, V vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

MIN_SIGMA = 1e-3  # the official LLaDA training code's floor: 1/sigma stays finite


def masked_mean(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean of x where mask (bool, the shape of x) is true, 0 where it is true nowhere; a float32 scalar."""
    total = jnp.sum(jnp.where(mask, x, 0), dtype=jnp.float32)
    return total / jnp.maximum(jnp.sum(mask), 1)


def mask_ratios(key: jax.Array, batch: int, largest: float | jax.Array = 1.0) -> jax.Array:
    """Masking ratios sigma float32 [B], each uniform on (0, largest], together spread evenly over it.

    One uniform offset and B equal strides: the same marginals as independent draws (Eq. 1) at a lower variance.
    """
    offset = jax.random.uniform(key, ())
    u = (offset + jnp.arange(batch) / batch) % 1.0
    return largest * (MIN_SIGMA + (1 - MIN_SIGMA) * (1 - u))


def draw_masks(key: jax.Array, sigma: jax.Array, length: int) -> jax.Array:
    """bool [B, N]: each response position of row b masked with probability sigma[b]."""
    return jax.random.uniform(key, (sigma.shape[0], length)) < sigma[:, None]


def cross_entropy(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """-log p(token), float32 [B, N], of logits [B, N, V] and tokens int [B, N]."""
    logits = logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen


def diffusion_loss(nll: jax.Array, masked: jax.Array, sigma: jax.Array) -> jax.Array:
    """Eq. 1: sum over masked positions of -log p, each row weighted with 1/sigma, averaged over tokens.

    nll float32 [B, N], masked bool [B, N], sigma float32 [B] -> scalar.
    """
    return jnp.mean(jnp.where(masked, nll, 0) / sigma[:, None])


Head = Callable[[jax.Array], jax.Array]


def alignment_errors(
    head: Head,
    hidden: jax.Array,
    table: jax.Array,
    tokens: jax.Array,
    chunk: int = 16,
    frozen: tuple[Head, jax.Array] | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What Eq. 12 averages: |softmax(Z) W_in - X_0|^2 summed over E; -log p(token); KL(frozen | ours), or 0 without.

    All three float32 [B, N]. head: hidden [B, n, E] -> logits [B, n, V]. table [V, E]: W_in; tokens int [B, N]: the
    clean response, X_0 its rows. frozen: head and hidden of the model that the divergence is measured from. Table, X_0
    and the frozen belief are constants of the loss, or the embedding would collapse. Works on `chunk` positions at a
    time and recomputes them for the backward pass, so [B, N, V] never stands in memory; the vocabulary may be sharded.
    """
    table = jax.lax.stop_gradient(table)
    b, n, _ = hidden.shape
    chunk = min(chunk, n)
    fill = -n % chunk

    def cut(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (0, fill)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(b, -1, chunk, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def visit(carry: None, part: tuple[Any, ...]) -> tuple[None, tuple[jax.Array, ...]]:
        h, token, *other = part
        log_p = jax.nn.log_softmax(head(h).astype(jnp.float32), axis=-1)
        p = jnp.exp(log_p).astype(table.dtype)
        x_pred = jnp.einsum("bnv,ve->bne", p, table, preferred_element_type=jnp.float32)
        error = jnp.sum((x_pred - table[token].astype(jnp.float32)) ** 2, axis=-1)
        nll = -jnp.take_along_axis(log_p, token[..., None], axis=-1)[..., 0]
        if frozen is None:
            return carry, (error, nll, jnp.zeros_like(nll))
        log_q = jax.lax.stop_gradient(jax.nn.log_softmax(frozen[0](other[0]).astype(jnp.float32), axis=-1))
        return carry, (error, nll, jnp.sum(jnp.exp(log_q) * (log_q - log_p), axis=-1))

    parts = (cut(hidden), cut(tokens)) + (() if frozen is None else (cut(frozen[1]),))
    _, kept = jax.lax.scan(visit, None, parts)
    return tuple(jnp.moveaxis(x, 0, 1).reshape(b, -1)[:, :n] for x in kept)
