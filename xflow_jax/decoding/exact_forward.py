"""Exact forward passes: over all positions, or over a block on a cache.

Each class turns the canvas, x [B, N, E], into hidden states. Its cache is in the carry of the
decoder's scans: `init_cache` makes it, `begin_block` updates it once a block, `hidden` reads it in
every step and may replace it. B counts the copies for guidance too.
"""

from __future__ import annotations

import dataclasses
from typing import Any, TypeAlias, no_type_check

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec as P

from xflow_jax.decoding.state import DecodeConfig, Step
from xflow_jax.models import kv_cache, shift_rows
from xflow_jax.parallel import BATCH, LOGICAL, divides
from xflow_jax.types import Array, Backbone, Bool, Cache, Float, Int, Params


@no_type_check  # of the fields, since transforms of trees put other leaves there
@struct.dataclass
class ExactCache:
    """Everything before the active block.

    Attributes:
        kv: keys and values of its positions.
        last: hidden states of its last position [B, E], which predict the block's first one. None
            without `logits_shift`.
    """

    kv: Cache
    last: jax.Array | None


Carry: TypeAlias = Cache | ExactCache | None


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

        With `config.block_only` the result covers the active block alone. The other positions have
        no part in the step, and the head is the more expensive part of it.

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
        size = self.config.block_length if self.config.block_causal else None
        h = self._predicting(self._apply("hidden", both, self.mask, size), self.mask)
        if size is None:
            return h[:, prompt:], cache
        return _columns(h, prompt + self.block_columns(step.block)), cache

    def first_hidden(
        self, cache: Carry, x: Float[Array, "B N E"], step: Step
    ) -> Float[Array, "B 1 E"]:
        """Computes the hidden states that predict the first position of a block.

        With `logits_shift` and block-causal attention they belong to the block before.

        Args:
            cache: the cache of the block.
            x: the canvas, final in the blocks before.
            step: slice of the schedule.
        """
        return self.hidden(cache, x, step)[0][:, :1]

    def block_columns(self, block: Int[Array, ""]) -> Int[Array, "B block"]:
        """Returns the canvas positions of a block.

        Under block-causal attention the block grid counts from each row's first token. Positions
        of the first block are then negative as far as the prompt reaches into it.
        """
        size = self.config.block_length
        shift = self.length % size if self.config.block_causal else jnp.zeros_like(self.length)
        return block * size - shift + jnp.arange(size)[None, :]

    @property
    def shift(self) -> int:
        """Rows by which a prediction is behind its position, 0 or 1."""
        return int(self.model.config.logits_shift)

    def _predicting(self, h: Float[Array, "B L E"], real: Bool[Array, "B L"]) -> Array:
        """Moves hidden states to the positions that they predict."""
        return shift_rows(h, real) if self.shift else h

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

    def init_cache(self) -> ExactCache:
        """Returns the keys and values of the prompts' whole blocks."""
        size, (batch, padded) = self.config.block_length, self.prompt_mask.shape
        # The rest of the longest prompt belongs to its first active block.
        whole = padded // size * size
        # The last block is never read, so it has no place in the cache.
        cache = self.model.empty_cache(batch, whole + (self.config.blocks - 1) * size)
        last = self.prompt_x[:, 0] if self.shift else None
        if whole:
            x = kv_cache.align_left(self.prompt_x, self.prompt_mask)[:, :whole]
            mask = jnp.arange(whole)[None, :] < self.length
            empty = self.model.empty_cache(batch, 0)
            h, new = self._apply("hidden_cached", x, empty, 0, mask, size)
            cache = kv_cache.write_cache(cache, new, 0)
            if self.shift:
                last = _columns(h, self.length // size * size - 1)[:, 0]
        return ExactCache(constrain_cache(cache), last)

    def begin_block(
        self,
        cache: Carry,
        x: Float[Array, "B N E"],
        block: Int[Array, ""],
        any_active: Bool[Array, ""],
    ) -> Carry:
        """Adds the block before `block` to the cache."""
        assert isinstance(cache, ExactCache)

        def write(cache: ExactCache) -> ExactCache:
            h, new = self._read(cache, x, block - 1)
            kv = kv_cache.write_cache(cache.kv, new, self._first(block - 1))
            return ExactCache(constrain_cache(kv), h[:, -1] if self.shift else None)

        return jax.lax.cond((block > 0) & any_active, write, lambda cache: cache, cache)

    def hidden(
        self, cache: Carry, x: Float[Array, "B N E"], step: Step
    ) -> tuple[Float[Array, "B n E"], Carry]:
        """Computes hidden states of the active block, [B, block_length, E]."""
        assert isinstance(cache, ExactCache)
        h = self._read(cache, x, step.block)[0]
        if cache.last is not None:
            h = jnp.concatenate([cache.last[:, None], h[:, :-1]], axis=1)
        return h, cache

    def first_hidden(
        self, cache: Carry, x: Float[Array, "B N E"], step: Step
    ) -> Float[Array, "B 1 E"]:
        """Returns the hidden states of the pass that wrote the block before."""
        assert isinstance(cache, ExactCache) and cache.last is not None
        return cache.last[:, None]

    def _read(
        self, cache: ExactCache, x: Float[Array, "B N E"], block: Int[Array, ""]
    ) -> tuple[Array, Cache]:
        tail = self.prompt_x[:, -self.config.block_length :]
        both = jnp.concatenate([tail, x.astype(tail.dtype)], axis=1)
        part = _columns(both, tail.shape[1] + self.block_columns(block))
        return self._apply("hidden_cached", part, cache.kv, self._first(block))

    def _first(self, block: Int[Array, ""]) -> Int[Array, " B"]:
        """Position of a block's start, counted from the row's first token."""
        size = self.config.block_length
        return (self.length[:, 0] // size + block) * size


def _columns(x: Float[Array, "B L E"], columns: Int[Array, "B n"]) -> Float[Array, "B n E"]:
    """Gathers positions of each row.

    Columns outside the row are clipped, and their values are never used.
    """
    return jnp.take_along_axis(x, jnp.clip(columns, 0, x.shape[1] - 1)[..., None], axis=1)


def constrain_cache(cache: Cache) -> Cache:
    """Shards a cache [layers, B, M, K, D] like its computation."""
    axis = LOGICAL["kv_heads"]

    def leaf(x: Array) -> Array:
        batch = BATCH if divides(x.shape[1], BATCH) else None
        heads = axis if axis and divides(x.shape[3], (axis,)) else None
        if batch is None and heads is None:
            return x
        return jax.lax.with_sharding_constraint(x, P(None, batch, None, heads))

    return jax.tree.map(leaf, cache)
