"""Forward passes for one step, without or with a cache.

Each class turns the canvas, x [B, N, E], into hidden states. Its cache is in the carry of the
decoder's scans: `init_cache` makes it, `begin_block` updates it once a block, `hidden` reads it in
every step and may replace it. B counts the copies for guidance too.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, TypeAlias, no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import PartitionSpec as P

from xflow_jax.decoding.blocks import cache_passes, prefix_spans
from xflow_jax.decoding.state import RENEW, RENEW_CANVAS, REUSE, DecodeConfig, Step
from xflow_jax.models import kv_cache, shift_rows
from xflow_jax.parallel import BATCH, LOGICAL, divides
from xflow_jax.types import Array, Backbone, Bool, Cache, Float, Int, Params


@no_type_check  # of the fields, since transforms of trees put other leaves there
@struct.dataclass
class ExactCache:
    """Exact cache of a model with `logits_shift`: everything before the active block.

    Attributes:
        kv: keys and values of its positions.
        last: hidden states of its last position [B, E], which predict the block's first one.
    """

    kv: Cache
    last: jax.Array


Carry: TypeAlias = Cache | ExactCache | None
# The active block: of all rows, or of each one.
Block: TypeAlias = Int[Array, ""] | Int[Array, "B 1"]


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

    def block_columns(self, block: Block) -> Int[Array, "B block"]:
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

    def init_cache(self) -> Carry:
        """Returns the keys and values of the prompts' whole blocks."""
        size, (batch, padded) = self.config.block_length, self.prompt_mask.shape
        # The rest of the longest prompt belongs to its first active block.
        whole = padded // size * size
        # The last block is never read, so it has no place in the cache.
        cache = self.model.empty_cache(batch, whole + (self.config.blocks - 1) * size)
        last = self.prompt_x[:, 0]
        if whole:
            x = kv_cache.align_left(self.prompt_x, self.prompt_mask)[:, :whole]
            mask = jnp.arange(whole)[None, :] < self.length
            empty = self.model.empty_cache(batch, 0)
            h, new = self._apply("hidden_cached", x, empty, 0, mask, size)
            cache = kv_cache.write_cache(cache, new, 0)
            last = _columns(h, self.length // size * size - 1)[:, 0]
        cache = constrain_cache(cache)
        return ExactCache(cache, last) if self.shift else cache

    def begin_block(
        self,
        cache: Carry,
        x: Float[Array, "B N E"],
        block: Int[Array, ""],
        any_active: Bool[Array, ""],
    ) -> Carry:
        """Adds the block before `block` to the cache."""

        def write(cache: Carry) -> Carry:
            h, new = self._read(cache, x, block - 1)
            cache = kv_cache.write_cache(_keys(cache), new, self._first(block - 1))
            cache = constrain_cache(cache)
            return ExactCache(cache, h[:, -1]) if self.shift else cache

        return jax.lax.cond((block > 0) & any_active, write, lambda cache: cache, cache)

    def hidden(
        self, cache: Carry, x: Float[Array, "B N E"], step: Step
    ) -> tuple[Float[Array, "B n E"], Carry]:
        """Computes hidden states of the active block, [B, block_length, E]."""
        h = self._read(cache, x, step.block)[0]
        if isinstance(cache, ExactCache):
            h = jnp.concatenate([cache.last[:, None], h[:, :-1]], axis=1)
        return h, cache

    def first_hidden(
        self, cache: Carry, x: Float[Array, "B N E"], step: Step
    ) -> Float[Array, "B 1 E"]:
        """Returns the hidden states of the pass that wrote the block before."""
        assert isinstance(cache, ExactCache)
        return cache.last[:, None]

    def _read(self, cache: Carry, x: Float[Array, "B N E"], block: Block) -> tuple[Array, Cache]:
        tail = self.prompt_x[:, -self.config.block_length :]
        both = jnp.concatenate([tail, x.astype(tail.dtype)], axis=1)
        part = _columns(both, tail.shape[1] + self.block_columns(block))
        return self._apply("hidden_cached", part, _keys(cache), self._first(block))

    def _first(self, block: Block) -> Int[Array, " B"]:
        """Position of a block's start, counted from the row's first token."""
        size, block = self.config.block_length, block[:, 0] if block.ndim else block
        return (self.length[:, 0] // size + block) * size


class PromptCacheForward(FullForward):
    """Forward pass over the canvas, on a stale cache of the prompt.

    For models that attend both ways, which have no exact cache. A full pass covers all positions
    and renews the cache. It is the first of a block, or of every `prompt_every`-th block, and comes
    again every `refresh` steps (blocks.cache_passes).
    """

    @property
    def positions(self) -> int:
        """Positions of the cache."""
        return self.prompt_x.shape[1]

    def init_cache(self) -> Cache:
        """Returns a cache with room for all that is kept."""
        return constrain_cache(self.model.empty_cache(self.prompt_x.shape[0], self.positions))

    def hidden(
        self, cache: Carry, x: Float[Array, "B N E"], step: Step
    ) -> tuple[Float[Array, "B n E"], Carry]:
        """Computes hidden states of the canvas or the active block."""
        passes = {REUSE: self._reuse, RENEW: self._renew, RENEW_CANVAS: self._renew_canvas}
        used = np.unique(cache_passes(self.config))
        x = x.astype(self.prompt_x.dtype)
        branches = [functools.partial(passes[int(kind)], x, step) for kind in used]
        with jax.named_scope("cache_pass"):
            return jax.lax.switch(jnp.searchsorted(used, step.cache_pass), branches, cache)

    def _renew(
        self, x: Float[Array, "B N E"], step: Step, cache: Cache
    ) -> tuple[Float[Array, "B n E"], Cache]:
        """Runs the full pass."""
        both = jnp.concatenate([self.prompt_x, x], axis=1)
        empty = self.model.empty_cache(both.shape[0], 0)
        h, new = self._apply("hidden_cached", both, empty, 0, self.mask)
        h = self._predicting(h, self.mask)
        new = jax.tree.map(lambda part: part[:, :, : self.positions], new)
        h = self._active(h[:, self.prompt_x.shape[1] :], step)
        return h, self._write(cache, new, 0, step)

    def _renew_canvas(
        self, x: Float[Array, "B N E"], step: Step, cache: Cache
    ) -> tuple[Float[Array, "B n E"], Cache]:
        """Runs the first pass of a block without the prompt."""
        return self._reuse(x, step, cache)

    def _reuse(
        self, x: Float[Array, "B N E"], step: Step, cache: Cache
    ) -> tuple[Float[Array, "B n E"], Cache]:
        """Runs a pass on the cache."""
        first = self.prompt_x.shape[1] - self.shift  # the row that predicts the first position
        part = jnp.concatenate([self.prompt_x[:, first:], x], axis=1)
        mask = jnp.concatenate([self.prompt_mask, self.mask[:, first:]], axis=1)
        h = self._apply("hidden_cached", part, cache, first, mask)[0]
        return self._predicting(h, self.mask[:, first:])[:, self.shift :], cache

    def _active(self, h: Float[Array, "B N E"], step: Step) -> Float[Array, "B n E"]:
        """Selects the hidden states that the step needs."""
        return h

    def _write(self, cache: Cache, new: Cache, start: int | Int[Array, ""], step: Step) -> Cache:
        """Writes keys and values of consecutive positions.

        A row that skips the step keeps its own, if a later block could read them: those of the
        prompt, after another step than the first of a block.
        """
        config = self.config
        outlive = config.prompt_every > 1 and bool(config.refresh or config.window)
        if outlive and step.candidates is not None:
            busy = jnp.any(step.candidates, axis=-1)
            busy = jnp.tile(busy, self.prompt_x.shape[0] // busy.shape[0])[:, None, None, None]

            def merge(old: Array, part: Array) -> Array:
                old = jax.lax.dynamic_slice_in_dim(old, start, part.shape[2], axis=2)
                return jnp.where(busy[None], part, old)

            new = jax.tree.map(merge, cache, new)
        return constrain_cache(kv_cache.write_cache(cache, new, start))


class PrefixCacheForward(PromptCacheForward):
    """Forward pass from the block on, on a stale cache before it.

    This is the prefix cache of Fast-dLLM (arXiv:2505.22618). Passes have one of a few lengths, and
    the surplus is masked positions behind the canvas.
    """

    @property
    def surplus(self) -> int:
        """Most positions behind the canvas that a pass reads."""
        ends = np.arange(self.config.blocks) + prefix_spans(self.config)
        return int(max(ends) - self.config.blocks) * self.config.block_length

    @property
    def positions(self) -> int:
        """Positions of the cache: all, with the surplus."""
        return _round_up(self.prompt_x.shape[1] + self.config.canvas + self.surplus)

    def _renew_canvas(
        self, x: Float[Array, "B N E"], step: Step, cache: Cache
    ) -> tuple[Float[Array, "B n E"], Cache]:
        h, new = self._read(cache, x, 0, self.config.canvas)
        return self._active(h, step), self._write(cache, new, self._column(0), step)

    def _reuse(
        self, x: Float[Array, "B N E"], step: Step, cache: Cache
    ) -> tuple[Float[Array, "B n E"], Cache]:
        size, spans = self.config.block_length, prefix_spans(self.config)

        def run(count: int, cache: Cache) -> Array:
            h = self._read(cache, x, step.block * size, count * size)[0]
            return h[:, :size]

        counts, index = np.unique(spans, return_inverse=True)
        branches = [functools.partial(run, int(count)) for count in counts]
        with jax.named_scope("prefix_span"):
            return jax.lax.switch(jnp.asarray(index)[step.block], branches, cache), cache

    def _active(self, h: Float[Array, "B N E"], step: Step) -> Float[Array, "B n E"]:
        size = self.config.block_length
        return jax.lax.dynamic_slice_in_dim(h, step.block * size, size, axis=1)

    def _read(
        self, cache: Cache, x: Float[Array, "B N E"], first: int | Int[Array, ""], count: int
    ) -> tuple[Array, Cache]:
        """Runs consecutive positions, whose keys and values replace those of the cache.

        The position before them runs as well if it predicts the first one.

        Args:
            cache: keys and values of all positions.
            x: the canvas.
            first: canvas position of the first one, at least -window.
            count: number of positions.

        Returns:
            Hidden states that predict these positions, and all new keys and values.
        """
        prompt, before = self.prompt_x.shape[1], self.config.window + self.shift
        row = jnp.concatenate([self.prompt_x[:, prompt - before :], x], axis=1)
        row = jnp.pad(row, ((0, 0), (0, self.surplus), (0, 0)))
        more, cut = count + self.shift, jax.lax.dynamic_slice_in_dim
        part = cut(row, before + first - self.shift, more, axis=1)
        mask = jnp.pad(self.mask, ((0, 0), (0, self.positions - self.mask.shape[1])))
        start = self._column(first)
        h, new = self._apply("hidden_cached", part, cache, start, mask, None, True)
        return self._predicting(h, cut(mask, start, more, axis=1))[:, self.shift :], new

    def _column(self, first: int | Int[Array, ""]) -> int | Int[Array, ""]:
        """Returns the position of the first one that `_read` runs."""
        return self.prompt_x.shape[1] + first - self.shift


class DualCacheForward(PrefixCacheForward):
    """Forward pass over the active block, on a stale cache elsewhere.

    This is the dual cache of Fast-dLLM (arXiv:2505.22618). With `window` a pass also covers that
    many positions on both sides. The keys and values of a pass replace those of the cache.
    """

    @property
    def surplus(self) -> int:
        """Most positions behind the canvas that a pass reads."""
        return self.config.window

    def _reuse(
        self, x: Float[Array, "B N E"], step: Step, cache: Cache
    ) -> tuple[Float[Array, "B n E"], Cache]:
        size, window = self.config.block_length, self.config.window
        first = step.block * size - window
        h, new = self._read(cache, x, first, size + 2 * window)
        # The next pass computes the same positions again, or all of the canvas. So only what a
        # window holds of the prompt can be read later.
        if window and self.config.prompt_every > 1:
            cache = self._write(cache, new, self._column(first), step)
        return h[:, window : window + size], cache


FORWARDS: dict[str, type[FullForward]] = {
    "none": FullForward,
    "exact": CachedForward,
    "prompt": PromptCacheForward,
    "prefix": PrefixCacheForward,
    "dual": DualCacheForward,
}


def make_forward(
    model: Backbone,
    params: Params,
    config: DecodeConfig,
    prompt_x: Float[Array, "B P E"],
    prompt_mask: Bool[Array, "B P"],
    on_canvas: Bool[Array, "B N"],
) -> FullForward:
    """Builds the forward pass that a decode's configuration selects."""
    before = config.window + int(model.config.logits_shift)
    if (more := before - prompt_x.shape[1]) > 0:  # what a pass reads before the first block
        prompt_x = jnp.pad(prompt_x, ((0, 0), (more, 0), (0, 0)))
        prompt_mask = jnp.pad(prompt_mask, ((0, 0), (more, 0)))
    return FORWARDS[config.cache](model, params, config, prompt_x, prompt_mask, on_canvas)


def _round_up(positions: int) -> int:
    """Rounds up to a multiple of 8, as attention kernels like it."""
    return -(-positions // 8) * 8


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


def _keys(cache: Carry) -> Cache:
    """Returns the keys and values of an exact cache."""
    kept = cache.kv if isinstance(cache, ExactCache) else cache
    assert kept is not None
    return kept
