"""Forward passes for one step on a cache, exact or approximate.

The interface is that of the pass without a cache (forward.py).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from xflow_jax.decoding.blocks import cache_passes, prefix_spans
from xflow_jax.decoding.forward import Block, Carry, ExactCache, FullForward, take_columns
from xflow_jax.decoding.state import RENEW, RENEW_CANVAS, REUSE, DecodeConfig, Step
from xflow_jax.models import kv_cache
from xflow_jax.parallel import BATCH, LOGICAL, divides
from xflow_jax.types import Array, Backbone, Bool, Cache, Float, Int, Params

# Position of the first of some consecutive ones: of all rows, or of each one.
Start: TypeAlias = int | Int[Array, ""] | Int[Array, " B"]
Pass: TypeAlias = Callable[[Cache], tuple[jax.Array, Cache]]  # hidden states and the next cache


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
            last = take_columns(h, self.length // size * size - 1)[:, 0]
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
        part = take_columns(both, tail.shape[1] + self.block_columns(block))
        return self._apply("hidden_cached", part, _keys(cache), self._first(block))

    def _first(self, block: Block) -> Int[Array, " B"]:
        """Position of a block's start, counted from the row's first token."""
        size, block = self.config.block_length, self.row_blocks(block)
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
        used = np.unique(cache_passes(self.config))
        x = x.astype(self.prompt_x.dtype)
        run: Pass | None = None
        # A choice of three copies the whole cache in every step. Two choices of two do not, if the
        # outer one has the full pass, which reads nothing of the cache.
        for kind, scope, method in (
            (REUSE, "", self._reuse),
            (RENEW_CANVAS, "canvas_pass", self._renew_canvas),
            (RENEW, "cache_pass", self._renew),
        ):
            if kind in used:
                branch = functools.partial(method, x, step)
                run = _choose(scope, step.cache_pass == kind, branch, run) if run else branch
        assert run is not None and isinstance(cache, dict)
        return run(cache)

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

    def _write(self, cache: Cache, new: Cache, start: Start, step: Step) -> Cache:
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
                old = jax.vmap(lambda x: cut(x, start, part.shape[2]))(old)
                return jnp.where(busy[None], part, old)

            new = jax.tree.map(merge, cache, new)
        elif isinstance(start, int) and start == 0:
            # Nothing of the old cache remains. XLA would copy it in every step if it were written.
            return constrain_cache(jax.tree.map(self._fill_up, new))
        return constrain_cache(kv_cache.write_cache(cache, new, start))

    def _fill_up(self, part: Float[Array, "layers B n K D"]) -> Float[Array, "layers B M K D"]:
        """Adds empty positions behind those of a full pass."""
        return jnp.pad(part, ((0, 0), (0, 0), (0, self.positions - part.shape[2]), (0, 0), (0, 0)))


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
        return cut(h, self.row_blocks(step.block) * size, size)

    def _read(
        self, cache: Cache, x: Float[Array, "B N E"], first: Start, count: int
    ) -> tuple[Array, Cache]:
        """Runs consecutive positions, whose keys and values replace those of the cache.

        The position before them runs as well if it predicts the first one.

        Args:
            cache: keys and values of all positions.
            x: the canvas.
            first: canvas position of the first one, at least -window, or one for each row.
            count: number of positions.

        Returns:
            Hidden states that predict these positions, and all new keys and values.
        """
        prompt, before = self.prompt_x.shape[1], self.config.window + self.shift
        row = jnp.concatenate([self.prompt_x[:, prompt - before :], x], axis=1)
        row = jnp.pad(row, ((0, 0), (0, self.surplus), (0, 0)))
        more = count + self.shift
        part = cut(row, before + first - self.shift, more)
        mask = jnp.pad(self.mask, ((0, 0), (0, self.positions - self.mask.shape[1])))
        start = self._column(first)
        h, new = self._apply("hidden_cached", part, cache, start, mask, None, True)
        return self._predicting(h, cut(mask, start, more))[:, self.shift :], new

    def _column(self, first: Start) -> Start:
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
        first = self.row_blocks(step.block) * size - window
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
    forwards: Mapping[str, type[FullForward]] = FORWARDS,
) -> FullForward:
    """Builds the forward pass that a decode's configuration selects.

    Args:
        model: the backbone.
        params: its parameters.
        config: lengths, steps and cache.
        prompt_x: embeddings of the prompt, padded on the left.
        prompt_mask: False at padding.
        on_canvas: True at positions that the row decodes.
        forwards: class of each cache.

    Returns:
        The forward pass.
    """
    before = config.window + int(model.config.logits_shift)
    if (more := before - prompt_x.shape[1]) > 0:  # what a pass reads before the first block
        prompt_x = jnp.pad(prompt_x, ((0, 0), (more, 0), (0, 0)))
        prompt_mask = jnp.pad(prompt_mask, ((0, 0), (more, 0)))
    return forwards[config.cache](model, params, config, prompt_x, prompt_mask, on_canvas)


def cut(x: Array, start: Start, count: int) -> Array:
    """Cuts consecutive positions of [B, L, ...], which begin at `start`."""
    if jnp.ndim(start):
        return jax.vmap(lambda row, at: jax.lax.dynamic_slice_in_dim(row, at, count))(x, start)
    return jax.lax.dynamic_slice_in_dim(x, start, count, axis=1)


def _choose(scope: str, condition: Bool[Array, ""], branch: Pass, other: Pass) -> Pass:
    """Returns the pass that runs one of two passes."""

    def run(cache: Cache) -> tuple[jax.Array, Cache]:
        with jax.named_scope(scope):
            return jax.lax.cond(condition, branch, other, cache)

    return run


def _round_up(positions: int) -> int:
    """Rounds up to a multiple of 8, as attention kernels like it."""
    return -(-positions // 8) * 8


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
