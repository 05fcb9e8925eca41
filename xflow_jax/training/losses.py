"""Losses as functions of arrays. Shapes: B batch, N response length, V vocabulary."""

from __future__ import annotations

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


def group_advantages(
    rewards: jax.Array, per_position: bool = False, scale: str = "group", floor: float = 1e-4
) -> jax.Array:
    """GRPO's advantages of rewards float32 [B, G, N]: less the group's mean, by a standard deviation plus `floor`.

    A group is all G x N rewards of a prompt, or with per_position the G of each of its positions. scale: whose standard
    deviation: "group" (Eq. 18), "batch" (of all that is left after the means: small differences of a unanimous group
    then stay small), or "none" = 1.
    """
    axes = (1,) if per_position else (1, 2)
    centred = rewards - rewards.mean(axis=axes, keepdims=True)
    if scale == "none":
        return centred
    return centred / (centred.std(axis=axes if scale == "group" else None, keepdims=True) + floor)


def clipped_surrogate(
    log_prob: jax.Array,
    old_log_prob: jax.Array,
    advantages: jax.Array,
    acted: jax.Array,
    epsilon: float,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Eq. 18, negated to be minimised: the mean over actions of -min(r A, clip(r, 1 - epsilon, 1 + epsilon) A).

    r = exp(log_prob - old_log_prob), all float32 [T, R, N]; advantages [R, N], the same in every step; acted bool
    [T, R, N]: the actions that mattered. The metrics are shares of these, under TRL's names, and the mean ratio.
    """
    a = advantages[None]
    # Beyond e^20 nothing is told apart anyway, and the gradient stays finite.
    ratio = jnp.exp(jnp.clip(log_prob - old_log_prob, -20.0, 20.0))
    gain = jnp.minimum(ratio * a, jnp.clip(ratio, 1 - epsilon, 1 + epsilon) * a)
    low, high = (ratio < 1 - epsilon) & (a < 0), (ratio > 1 + epsilon) & (a > 0)
    shares = {"low_mean": low, "high_mean": high, "region_mean": low | high}
    metrics = {f"clip_ratio/{name}": masked_mean(share, acted) for name, share in shares.items()}
    return -masked_mean(gain, acted), metrics | {"ratio": masked_mean(ratio, acted)}
