"""Blocks of the response: their length, their number, and the schedule."""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING, Any, TypeAlias

import jax.numpy as jnp
import numpy as np

from xflow_jax.decoding.state import RENEW, RENEW_CANVAS, REUSE, DecodeConfig, Step
from xflow_jax.errors import UserError, require
from xflow_jax.types import Array, Bool, Int, ModelConfig

PREFIX_LENGTHS = 4  # lengths of a pass with the prefix cache, each of which is compiled

# A whole number from a user. Anything can arrive at run time, and the functions here check it.
if TYPE_CHECKING:
    Count: TypeAlias = int
else:
    Count = object


def make_schedule(config: DecodeConfig) -> Step:
    """Builds the steps of all blocks in order, arrays [T].

    A block of block_length masks divides over its steps without the extra ones, the remainder
    first.
    """
    fields: dict[str, Any] = {
        name: None if x is None else jnp.asarray(x) for name, x in _steps(config)
    }
    return Step(**fields)


def schedule_arrays(config: DecodeConfig) -> dict[str, np.ndarray | None]:
    """Returns the fields of `make_schedule` as NumPy arrays.

    Args:
        config: lengths and steps.
    """
    return dict(_steps(config))


def _steps(config: DecodeConfig) -> list[tuple[str, np.ndarray | None]]:
    s, writing = config.steps, config.steps - config.extra_steps
    local = np.tile(np.arange(s), config.blocks)
    quota = config.block_length // writing + (local < config.block_length % writing)
    quota = np.where(local < writing, quota, 0)
    return [
        ("index", np.arange(local.size, dtype=np.int32)),
        ("block", np.repeat(np.arange(config.blocks, dtype=np.int32), s)),
        ("rho", (local / max(s - 1, 1)).astype(np.float32)),
        ("quota", quota.astype(np.int32)),
        ("steps_left", (s - local).astype(np.float32)),
        ("cache_pass", cache_passes(config).ravel()),
        ("share", None if config.eps is None else _shares(config.eps, s)[local]),
    ]


def _shares(eps: float, steps: int) -> np.ndarray:
    """Computes the shares of Dream's steps, float32.

    These are 1 - t[i + 1] / t[i] with times t from 1 to eps, and 1 for the last step.
    """
    t = np.linspace(1, eps, steps + 1).astype(np.float32)
    shares = 1 - t[1:] / t[:-1]
    shares[-1] = 1
    return shares


def cache_passes(config: DecodeConfig) -> np.ndarray:
    """Returns the pass of each step with an approximate cache.

    Steps count within the block. A row that finishes a block early may skip its last steps or run
    through them with the rest of its batch, and the next block must be the same in both cases.

    Returns:
        REUSE, RENEW or RENEW_CANVAS, int [blocks, steps].
    """
    passes = np.full((config.blocks, config.steps), REUSE, np.int32)
    if config.refresh:
        passes[:, :: config.refresh] = RENEW
    passes[:, 0] = RENEW_CANVAS
    passes[:: config.prompt_every, 0] = RENEW
    return passes


def prefix_spans(config: DecodeConfig) -> np.ndarray:
    """Returns the blocks that a pass with the prefix cache covers.

    Returns:
        For each block, a number of blocks from it on, int [blocks]. There are few different ones,
        since each is compiled, so a span may end behind the canvas.
    """
    group = -(-config.blocks // PREFIX_LENGTHS)
    left = config.blocks - np.arange(config.blocks)
    return np.minimum(-(-left // group) * group, config.blocks)


def branch_shares(config: DecodeConfig) -> dict[str, list[float]]:
    """Returns how often a cached decode takes each of its branches.

    Returns:
        Named scope of a conditional in cached_forward.py -> share of each branch.
    """
    renewed = cache_passes(config) == RENEW
    partly = cache_passes(config)[~renewed] == RENEW_CANVAS
    shares = {
        name: [1 - float(taken.mean()), float(taken.mean())]
        for name, taken in (("cache_pass", renewed), ("canvas_pass", partly))
        if taken.size
    }
    spans = np.unique(prefix_spans(config), return_counts=True)[1]
    return shares | {"prefix_span": (spans / spans.sum()).tolist()}


def pass_positions(config: DecodeConfig, prompt_length: int) -> np.ndarray:
    """Returns the positions that each step computes.

    Args:
        config: lengths, steps and cache.
        prompt_length: P.

    Returns:
        int [blocks, steps].
    """
    if config.cache == "exact":
        return np.full((config.blocks, config.steps), config.block_length)
    canvas, passes = config.canvas, cache_passes(config)
    reuse = np.full(config.blocks, prompt_length + canvas)
    if config.cache == "prompt":
        reuse[:] = canvas
    elif config.cache == "prefix":
        reuse[:] = prefix_spans(config) * config.block_length
    elif config.cache == "dual":
        reuse[:] = config.block_length + 2 * config.window
    if config.cache == "none":
        passes[:] = RENEW
    renewed = np.where(passes == RENEW, prompt_length + canvas, canvas)
    return np.where(passes == REUSE, reuse[:, None], renewed)


def block_layout(
    config: DecodeConfig, prompt_mask: Bool[Array, "B P"]
) -> tuple[Int[Array, "B N"], Bool[Array, "B N"]]:
    """Assigns canvas positions to blocks.

    Args:
        config: lengths of the decode.
        prompt_mask: False at padding.

    Returns:
        The block of each canvas position, and True at positions that the row decodes. Under
        block-causal attention the grid counts from each row's first token, so the first block may
        begin inside the prompt.
    """
    index = jnp.arange(config.canvas)[None, :]
    if not config.block_causal:
        shape = (prompt_mask.shape[0], config.canvas)
        block = jnp.maximum(index - config.infill, 0) // config.block_length
        on_canvas = jnp.ones(shape, bool)
        if config.infill:
            on_canvas = jnp.concatenate([prompt_mask, on_canvas[:, config.infill :]], axis=1)
        return jnp.broadcast_to(block, shape), on_canvas
    length = jnp.sum(prompt_mask, axis=-1, keepdims=True)
    size = config.block_length
    end = -(-(length + config.gen_length) // size) * size
    return (length + index) // size - length // size, length + index < end


def block_starts(
    config: DecodeConfig, prompt_mask: Bool[Array, "B P"]
) -> Bool[Array, "B N"] | None:
    """Finds the canvas positions that begin a block under block-causal attention.

    If logits predict the next position, such a position is predicted by the block before, which no
    longer changes.

    Args:
        config: lengths of the decode.
        prompt_mask: False at padding.

    Returns:
        True at these positions, or None without block-causal attention.
    """
    if not config.block_causal:
        return None
    length = jnp.sum(prompt_mask, axis=-1, keepdims=True)
    return (length + jnp.arange(config.canvas)[None, :]) % config.block_length == 0


def resolve_block_length(model: ModelConfig, gen_length: Count, block_length: Count | None) -> int:
    """Returns the positions of a block.

    Args:
        model: the model's configuration, which has the default.
        gen_length: N, positions of the response.
        block_length: positions of a block, or None for the default of the model.

    Raises:
        UserError: if a length is below 1, or if gen_length is not a whole number of blocks of a
            model that is not block-causal.
    """
    for name, count in (("gen_length", gen_length), ("block_length", block_length)):
        require_count(name, count)
    size = int(block_length or model.default_block_length or gen_length)
    if not model.is_block_causal and gen_length % size:
        raise UserError(
            f"gen_length {gen_length} is not a whole number of blocks of {size}. "
            f"{nearest_multiples(gen_length, size)}"
        )
    return size


def count_blocks(model: ModelConfig, gen_length: Count, block_length: Count | None) -> int:
    """Returns the number of blocks that share the steps.

    Arguments and errors are those of `resolve_block_length`.
    """
    size = resolve_block_length(model, gen_length, block_length)
    return max(int(gen_length) // size, 1)


def resolve_steps(
    model: ModelConfig, budget: Fraction, gen_length: Count, block_length: Count | None
) -> int:
    """Returns the forward passes of a whole response: budget * gen_length.

    Args:
        model: the model's configuration.
        budget: share of the full number of steps, in (0, 1].
        gen_length: N, positions of the response.
        block_length: positions of a block, or None for the default of the model.

    Raises:
        UserError: if the steps are no whole number or do not divide over the blocks. It names the
            nearest budgets that are right.
    """
    blocks = count_blocks(model, gen_length, block_length)
    steps = budget * gen_length
    if steps.denominator == 1 and steps % blocks == 0 and steps >= blocks:
        return int(steps)
    below = int(steps // blocks) * blocks
    near = [str(Fraction(n, gen_length)) for n in (below, below + blocks) if 0 < n <= gen_length]
    over = f" for each of {blocks} blocks" if blocks > 1 else ""
    raise UserError(
        f"the budget {budget} of {gen_length} tokens makes {float(steps):g} steps, "
        f"which is not a whole number{over}. Use {' or '.join(near)}."
    )


def require_count(name: str, count: object) -> None:
    """Raises UserError unless a count is None or at least 1."""
    right = isinstance(count, int | np.integer) and not isinstance(count, bool) and bool(count >= 1)
    require(count is None or right, f"{name} must be a whole number of at least 1, not {count}")


def nearest_multiples(value: int, divisor: int) -> str:
    """Returns advice with the multiples near a value: "Use 16 or 32."."""
    below = value // divisor * divisor
    return f"Use {below + divisor}." if not below else f"Use {below} or {below + divisor}."
