"""Forward passes for one step: full, block-cached (exact) or stale-prompt (approximate).

Each class turns the canvas, x [B, N, E], into hidden states. Its cache is in the carry of the
decoder's scans: `init_cache` makes it, `begin_block` updates it once a block, `hidden` reads it in
every step and may replace it. B counts the copies for guidance too.
"""

from __future__ import annotations

import dataclasses
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from xflow_jax.decoding.state import DecodeConfig, Step
from xflow_jax.models import kv_cache
from xflow_jax.parallel import BATCH, LOGICAL, divides
from xflow_jax.types import Array, Backbone, Bool, Cache, Float, Int, Params

Carry: TypeAlias = Cache | None


@dataclasses.dataclass(frozen=True, eq=False)
class FullForward:
    """Forward pass over prompt and canvas.

    Attributes:
        model, params: the backbone and its parameters.
        config: static lengths and switches of the decode.
        prompt_x: embeddings of the prompt, [B, P, E], padded on the left.
        prompt_mask: False at padding, bool [B, P].
        on_canvas: True at positions that the row decodes, bool [B, N].
    """

    model: Backbone
    params: Params
    config: DecodeConfig
    prompt_x: Float[Array, "B P E"]
    prompt_mask: Bool[Array, "B P"]
    on_canvas: Bool[Array, "B N"]

    def init_cache(self) -> Carry:
        """Returns the cache before the first block."""
        return None

    def begin_block(
        self,
        cache: Carry,
        x: Float[Array, "B N E"],
        block: Int[Array, ""],
        any_active: Bool[Array, ""],
    ) -> Carry:
        """Updates the cache when a block begins.

        Args:
            cache: the cache so far.
            x: the canvas, final in the blocks before `block`.
            block: index of the block that begins.
            any_active: True if any sequence decodes this block.

        Returns:
            The cache for the steps of the block.
        """
        return cache

    def hidden(
        self, cache: Carry, x: Float[Array, "B N E"], step: Step
    ) -> tuple[Float[Array, "B n E"], Carry]:
        """Computes hidden states.

        Under block-causal attention the result covers the active block alone. The other positions
        have no part in the step, and the head is the more expensive part of it.

        Args:
            cache: the cache of the block.
            x: the canvas.
            step: slice of the schedule.

        Returns:
            Hidden states of the canvas [B, N, E] or of the active block [B, block_length, E], and
            the cache for the next step.
        """
        both = jnp.concatenate([self.prompt_x, x.astype(self.prompt_x.dtype)], axis=1)
        prompt = self.prompt_x.shape[1]
        if not self.config.block_causal:
            return self._apply("hidden", both, self.mask, None)[:, prompt:], cache
        h = self._apply("hidden", both, self.mask, self.config.block_length)
        return _columns(h, prompt + self.block_columns(step.block)), cache

    def block_columns(self, block: Int[Array, ""]) -> Int[Array, "B block"]:
        """Returns the canvas positions of a block.

        The block grid counts from each row's first token. Positions of the first block are
        negative as far as the prompt reaches into it.
        """
        size = self.config.block_length
        return block * size - self.length % size + jnp.arange(size)[None, :]

    @property
    def mask(self) -> Bool[Array, "B L"]:
        """True at real positions of prompt and canvas."""
        return jnp.concatenate([self.prompt_mask, self.on_canvas], axis=1)

    @property
    def length(self) -> Int[Array, "B 1"]:
        """Tokens of each prompt."""
        return jnp.sum(self.prompt_mask, axis=-1, keepdims=True)

    def _apply(self, method: str, *args: object) -> Any:
        return self.model.apply({"params": self.params}, *args, method=method)


class CachedForward(FullForward):
    """Forward pass over the active block, with an exact cache.

    The cache holds everything before the block (models/kv_cache.py). Rows are aligned to the left
    in the cache. The prompt's whole blocks are read at the start, all at once. A block is read once
    more when the next one begins, with its final tokens.
    """

    def init_cache(self) -> Cache:
        """Returns the keys and values of the prompts' whole blocks."""
        size, (batch, padded) = self.config.block_length, self.prompt_mask.shape
        # The rest of the longest prompt belongs to its first active block.
        whole = padded // size * size
        # The last block is never read, so it has no place in the cache.
        cache = self.model.empty_cache(batch, whole + (self.config.blocks - 1) * size)
        if whole:
            x = kv_cache.align_left(self.prompt_x, self.prompt_mask)[:, :whole]
            mask = jnp.arange(whole)[None, :] < self.length
            empty = self.model.empty_cache(batch, 0)
            new = self._apply("hidden_cached", x, empty, 0, mask, size)[1]
            cache = kv_cache.write_cache(cache, new, 0)
        return _constrain(cache)

    def begin_block(
        self,
        cache: Carry,
        x: Float[Array, "B N E"],
        block: Int[Array, ""],
        any_active: Bool[Array, ""],
    ) -> Carry:
        """Adds the block before `block` to the cache."""

        def write(cache: Cache) -> Cache:
            new = self._read(cache, x, block - 1)[1]
            return _constrain(kv_cache.write_cache(cache, new, self._first(block - 1)))

        return jax.lax.cond((block > 0) & any_active, write, lambda cache: cache, cache)

    def hidden(
        self, cache: Carry, x: Float[Array, "B N E"], step: Step
    ) -> tuple[Float[Array, "B n E"], Carry]:
        """Computes hidden states of the active block, [B, block_length, E]."""
        return self._read(cache, x, step.block)[0], cache

    def _read(
        self, cache: Carry, x: Float[Array, "B N E"], block: Int[Array, ""]
    ) -> tuple[Array, Cache]:
        tail = self.prompt_x[:, -self.config.block_length :]
        both = jnp.concatenate([tail, x.astype(tail.dtype)], axis=1)
        part = _columns(both, tail.shape[1] + self.block_columns(block))
        return self._apply("hidden_cached", part, cache, self._first(block))

    def _first(self, block: Int[Array, ""]) -> Int[Array, " B"]:
        """Position of a block's start, counted from the row's first token."""
        size = self.config.block_length
        return (self.length[:, 0] // size + block) * size


class StalePromptForward(FullForward):
    """Forward pass over the canvas, with stale prompt keys and values.

    For models whose prompt attends to the response, which have no exact cache. In the first step
    of a block, and every `config.refresh` steps of it, the pass covers all positions and renews
    the prompt's keys and values.

    Steps count within the block. A row that finishes a block early may skip its last steps or run
    through them with the rest of its batch, and the next block must be the same in both cases.
    """

    def init_cache(self) -> Cache:
        """Returns a cache with room for the prompts' keys and values."""
        return _constrain(self.model.empty_cache(*self.prompt_mask.shape))

    def hidden(
        self, cache: Carry, x: Float[Array, "B N E"], step: Step
    ) -> tuple[Float[Array, "B n E"], Carry]:
        """Computes hidden states of the canvas, [B, N, E]."""
        batch, prompt = self.prompt_mask.shape
        x = x.astype(self.prompt_x.dtype)

        def renew(cache: Cache) -> tuple[Array, Cache]:
            both = jnp.concatenate([self.prompt_x, x], axis=1)
            empty = self.model.empty_cache(batch, 0)
            h, new = self._apply("hidden_cached", both, empty, 0, self.mask)
            return h[:, prompt:], _constrain(jax.tree.map(lambda part: part[:, :, :prompt], new))

        def reuse(cache: Cache) -> tuple[Array, Cache]:
            return self._apply("hidden_cached", x, cache, prompt, self.mask)[0], cache

        due = step.index % self.config.steps % self.config.refresh == 0
        return jax.lax.cond(due, renew, reuse, cache)


def make_forward(
    model: Backbone,
    params: Params,
    config: DecodeConfig,
    prompt_x: Float[Array, "B P E"],
    prompt_mask: Bool[Array, "B P"],
    on_canvas: Bool[Array, "B N"],
) -> FullForward:
    """Builds the forward pass that a decode's configuration selects."""
    kind = FullForward
    if config.cache:
        kind = CachedForward
    elif config.refresh > 1:
        kind = StalePromptForward
    return kind(model, params, config, prompt_x, prompt_mask, on_canvas)


def _columns(x: Float[Array, "B L E"], columns: Int[Array, "B n"]) -> Float[Array, "B n E"]:
    """Gathers positions of each row.

    Columns outside the row are clipped, and their values are never used.
    """
    return jnp.take_along_axis(x, jnp.clip(columns, 0, x.shape[1] - 1)[..., None], axis=1)


def _constrain(cache: Cache) -> Cache:
    """Shards a cache [layers, B, M, K, D] like its computation."""
    axis = LOGICAL["kv_heads"]

    def leaf(x: Array) -> Array:
        batch = BATCH if divides(x.shape[1], BATCH) else None
        heads = axis if axis and divides(x.shape[3], (axis,)) else None
        if batch is None and heads is None:
            return x
        return jax.lax.with_sharding_constraint(x, P(None, batch, None, heads))

    return jax.tree.map(leaf, cache)
