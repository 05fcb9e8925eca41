"""Losses and their parts as functions of arrays."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
import optax

from xflow_jax.types import Array, Bool, Float, Int, Key, Metrics

RewardScale = Literal["group", "batch", "none"]

MIN_SIGMA = 1e-3  # the minimum of LLaDA's official training code, which keeps 1 / sigma finite


def masked_mean(
    x: Float[Array, "*shape"] | Bool[Array, "*shape"], mask: Bool[Array, "*shape"]
) -> Float[Array, ""]:
    """Computes the mean of x over the positions where mask is True.

    Args:
        x: values. Those outside the mask may be infinite or NaN.
        mask: positions to average over.

    Returns:
        The mean, a float32 scalar. It is 0 if mask is False everywhere.
    """
    total = jnp.sum(jnp.where(mask, x, 0), dtype=jnp.float32)
    return total / jnp.maximum(jnp.sum(mask), 1)


def mask_ratios(
    key: Key[Array, ""], batch: int, largest: float | Float[Array, ""] = 1.0
) -> Float[Array, " B"]:
    """Draws masking ratios that are spread evenly over (0, largest].

    One uniform offset and B equal strides have the same marginals as independent draws (Eq. 1),
    with a lower variance.

    Args:
        key: a random key.
        batch: B, number of ratios.
        largest: upper end of the range.

    Returns:
        Ratios sigma, float32. Each of them is uniform on (0, largest].
    """
    offset = jax.random.uniform(key, ())
    u = (offset + jnp.arange(batch) / batch) % 1.0
    return largest * (MIN_SIGMA + (1 - MIN_SIGMA) * (1 - u))


def draw_masks(key: Key[Array, ""], sigma: Float[Array, " B"], length: int) -> Bool[Array, "B N"]:
    """Masks each response position of row b with probability sigma[b].

    Args:
        key: a random key.
        sigma: masking ratios.
        length: N, positions of a response.

    Returns:
        True at masked positions.
    """
    return jax.random.uniform(key, (sigma.shape[0], length)) < sigma[:, None]


def draw_response_noise(
    key: Key[Array, ""], response: Bool[Array, "B L"], block_length: int
) -> tuple[Bool[Array, "B L"], Float[Array, "B L"]]:
    """Draws masks of response positions.

    Args:
        key: a random key.
        response: positions that may be masked.
        block_length: positions of a block, 0 for one masking ratio in the complete row.

    Returns:
        (masked, sigma): the masks, and the masking ratio of each position.
    """
    rows, length = response.shape
    ratio_key, mask_key = jax.random.split(key)
    blocks = length // block_length if block_length else 1
    # The ratios of all blocks together are spread evenly, and so are those of each row.
    sigma = mask_ratios(ratio_key, rows * blocks).reshape(blocks, rows).T
    sigma = jnp.repeat(sigma, length // blocks, axis=1)
    return response & (jax.random.uniform(mask_key, response.shape) < sigma), sigma


def cross_entropy(
    logits: Float[Array, "*batch V"], tokens: Int[Array, "*batch"]
) -> Float[Array, "*batch"]:
    """Computes -log p(token) in float32.

    Args:
        logits: logits of any float dtype.
        tokens: token ids.

    Returns:
        The cross-entropy of each token, float32.
    """
    return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), tokens)


def diffusion_loss(
    nll: Float[Array, "B N"], masked: Bool[Array, "B N"], sigma: Float[Array, " B"]
) -> Float[Array, ""]:
    """Computes the masked diffusion loss (Eq. 1).

    Args:
        nll: -log p of each response token.
        masked: True at masked positions. Only these count.
        sigma: masking ratio of each row. A row has the weight 1 / sigma.

    Returns:
        The weighted sum over masked positions, divided by B N.
    """
    return jnp.mean(jnp.where(masked, nll, 0) / sigma[:, None])


def response_loss(
    nll: Float[Array, "B L"],
    masked: Bool[Array, "B L"],
    sigma: Float[Array, "B L"],
    response: Bool[Array, "B L"],
) -> Float[Array, ""]:
    """Computes the masked diffusion loss (Eq. 1) of responses in rows.

    Args:
        nll: -log p of each token.
        masked: True at masked positions, all of them of the response.
        sigma: masking ratio of each position.
        response: positions of the response.

    Returns:
        The mean over rows of the sum of nll / sigma over masks, divided by the length of the row's
        response. Rows of other lengths thus have the same weight.
    """
    total = jnp.sum(jnp.where(masked, nll, 0) / sigma, axis=1)
    return jnp.mean(total / jnp.maximum(jnp.sum(response, axis=1), 1))


def group_advantages(
    rewards: Float[Array, "B G N"],
    per_position: bool = False,
    scale: RewardScale = "group",
    floor: float = 1e-4,
) -> Float[Array, "B G N"]:
    """Computes GRPO's advantages: centred rewards divided by a standard deviation.

    Args:
        rewards: reward of each position of the G responses to each of B prompts.
        per_position: compare a position with the same position of its group, not with all G N
            rewards of the prompt.
        scale: which standard deviation divides: "group" for that of the same rewards (Eq. 18),
            "batch" for that of all centred rewards, so that small differences in a unanimous group
            stay small, or "none".
        floor: added to the standard deviation.

    Returns:
        The advantages.
    """
    axes = (1,) if per_position else (1, 2)
    centred = rewards - rewards.mean(axis=axes, keepdims=True)
    if scale == "none":
        return centred
    return centred / (centred.std(axis=axes if scale == "group" else None, keepdims=True) + floor)


def clipped_surrogate(
    log_prob: Float[Array, "T R N"],
    old_log_prob: Float[Array, "T R N"],
    advantages: Float[Array, "R N"],
    acted: Bool[Array, "T R N"],
    epsilon: float,
) -> tuple[Float[Array, ""], Metrics]:
    """Computes the clipped policy loss of GRPO (Eq. 18), to be minimised.

    The loss is the mean over actions of -min(r A, clip(r, 1 - epsilon, 1 + epsilon) A), with the
    ratio r = exp(log_prob - old_log_prob) and the advantage A.

    Args:
        log_prob: log-density of each action under the current policy.
        old_log_prob: log-density under the policy that sampled it.
        advantages: advantage of each position, the same in all T steps.
        acted: True for the actions that count.
        epsilon: half width of the clipping range.

    Returns:
        The loss, and as metrics the mean ratio and the clipped shares under TRL's names.
    """
    a = advantages[None]
    # Ratios above e^20 need no distinction, and the limit keeps the gradient finite.
    ratio = jnp.exp(jnp.clip(log_prob - old_log_prob, -20.0, 20.0))
    gain = jnp.minimum(ratio * a, jnp.clip(ratio, 1 - epsilon, 1 + epsilon) * a)
    low, high = (ratio < 1 - epsilon) & (a < 0), (ratio > 1 + epsilon) & (a > 0)
    shares = {"low_mean": low, "high_mean": high, "region_mean": low | high}
    metrics = {f"clip_ratio/{name}": masked_mean(share, acted) for name, share in shares.items()}
    return -masked_mean(gain, acted), metrics | {"ratio": masked_mean(ratio, acted)}
