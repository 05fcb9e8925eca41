"""Forward passes of rows at their own blocks and steps (slots.py).

A pass has one shape for all rows. With an approximate cache every row takes the pass on its cache.
Rows whose step is a full one take the full pass before it, one at a time, which renews their cache.
Right after it both passes have the same hidden states, so a row's steps are those of `generate`.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from xflow_jax.decoding.blocks import cache_passes
from xflow_jax.decoding.cached_forward import (
    CachedForward,
    DualCacheForward,
    PrefixCacheForward,
    PromptCacheForward,
    constrain_cache,
)
from xflow_jax.decoding.forward import Carry, ExactCache, FullForward
from xflow_jax.decoding.state import RENEW, RENEW_CANVAS, Step
from xflow_jax.models import kv_cache
from xflow_jax.parallel import batch_shards
from xflow_jax.types import Array, Bool, Cache, Float, Int


class SlotExactForward(CachedForward):
    """Forward pass over each row's active block, with an exact cache.

    Rows are at different blocks. Every pass writes its keys and values, so a finished block takes
    one more pass, with its final tokens. What earlier passes wrote is overwritten before a query
    attends to it. The cache has a place for the last block too, since every block is written.
    """

    @property
    def whole(self) -> int:
        """Positions of the whole blocks of the longest prompt."""
        size = self.config.block_length
        return self.prompt_x.shape[1] // size * size

    def init_cache(self) -> Carry:
        """Returns an empty cache."""
        batch = self.prompt_x.shape[0]
        positions = self.whole + self.config.blocks * self.config.block_length
        cache = constrain_cache(self.model.empty_cache(batch, positions))
        return ExactCache(cache, jnp.zeros_like(self.prompt_x[:, 0])) if self.shift else cache

    def write_prompt(self, cache: Carry, slot: Int[Array, ""]) -> Carry:
        """Writes the prompt of one sequence, the only one here.

        Args:
            cache: the cache of all slots.
            slot: number of the sequence's slot.

        Returns:
            The new cache.
        """
        if not self.whole:
            return cache
        new, copies = super().init_cache(), self.prompt_x.shape[0]

        def write(old: Array, part: Array) -> Array:
            rows = old.reshape(old.shape[0], copies, -1, *old.shape[2:])
            part = part[:, :, None, : self.whole]
            return jax.lax.dynamic_update_slice(rows, part, [0, 0, slot, 0, 0, 0]).reshape(
                old.shape
            )

        if isinstance(cache, ExactCache) and isinstance(new, ExactCache):
            last = cache.last.reshape(copies, -1, cache.last.shape[-1])
            last = jax.lax.dynamic_update_slice_in_dim(last, new.last[:, None], slot, axis=1)
            kv = jax.tree.map(write, cache.kv, new.kv)
            return ExactCache(constrain_cache(kv), last.reshape(cache.last.shape))
        return constrain_cache(jax.tree.map(write, cache, new))

    def hidden(
        self, cache: Carry, x: Float[Array, "B N E"], step: Step
    ) -> tuple[Float[Array, "B n E"], Carry]:
        """Computes hidden states of the active blocks, [B, block_length, E]."""
        h, new = self._read(cache, x, step.block)
        kept = cache.kv if isinstance(cache, ExactCache) else cache
        assert kept is not None and step.writes is not None
        kept = constrain_cache(kv_cache.write_cache(kept, new, self._first(step.block)))
        if not isinstance(cache, ExactCache):
            return h, kept
        writes = jnp.tile(step.writes, x.shape[0] // step.writes.shape[0])
        last = jnp.where(writes[:, None], h[:, -1], cache.last)
        return jnp.concatenate([cache.last[:, None], h[:, :-1]], axis=1), ExactCache(kept, last)


class RenewedByRow(PromptCacheForward):
    """Forward pass on an approximate cache, which rows renew by turns.

    With a mesh each shard of the batch renews a row of its own at the same time.

    Attributes:
        renewals: kinds of steps that renew something.
    """

    renewals: ClassVar[tuple[int, ...]] = (RENEW, RENEW_CANVAS)

    def hidden(
        self, cache: Carry, x: Float[Array, "B N E"], step: Step
    ) -> tuple[Float[Array, "B n E"], Carry]:
        """Renews the rows that are due, and runs the pass."""
        assert isinstance(cache, dict)
        x = x.astype(self.prompt_x.dtype)
        busy = jnp.any(step.candidates, axis=-1)
        for kind in sorted({*np.unique(cache_passes(self.config)).tolist()} & {*self.renewals}):
            due = busy & (step.cache_pass[:, 0] == kind)
            with jax.named_scope("renew_rows"):
                cache = self._renew_rows(kind, due, cache, x, step)
        return self._reuse(x, step, cache)

    def _renew_rows(
        self, kind: int, due: Bool[Array, " S"], cache: Cache, x: Float[Array, "B N E"], step: Step
    ) -> Cache:
        """Runs the pass of one kind for the rows that are due."""
        shards = batch_shards(due.shape[0])
        due = due.reshape(shards, -1)

        def take(part: Array, at: Array, axis: int = 0) -> Array:
            return take_rows(part, at, due.shape[1], axis)

        def renew(carry: tuple[Array, Cache]) -> tuple[Array, Cache]:
            due, cache = carry
            at, found = jnp.argmax(due, axis=1), jnp.any(due, axis=1)
            part = dataclasses.replace(
                self,
                prompt_x=take(self.prompt_x, at),
                prompt_mask=take(self.prompt_mask, at),
                on_canvas=take(self.on_canvas, at),
            )
            own = dataclasses.replace(
                step, block=take(step.block, at), candidates=take(step.candidates, at)
            )
            run = part._renew if kind == RENEW else part._renew_canvas
            new = run(take(x, at), own, jax.tree.map(lambda old: take(old, at, 1), cache))[1]
            cache = jax.tree.map(lambda old, row: put_rows(old, row, at, found), cache, new)
            return due & (jnp.arange(due.shape[1])[None, :] != at[:, None]), constrain_cache(cache)

        return jax.lax.while_loop(lambda carry: jnp.any(carry[0]), renew, (due, cache))[1]


def take_rows(x: Array, at: Int[Array, " D"], size: int, axis: int = 0) -> Array:
    """Takes one row of each shard.

    Args:
        x: rows at `axis`: for each copy of the batch, for each of D shards, `size` rows.
        at: number of the row within each shard.
        size: rows of a shard.
        axis: the axis.

    Returns:
        Rows in the order of `x`, for each copy one of each shard.
    """
    before, after = x.shape[:axis], x.shape[axis + 1 :]
    index = functools.partial(jax.lax.dynamic_index_in_dim, axis=axis + 1, keepdims=False)
    if at.shape[0] == 1:  # a slice, where the general form is a gather
        return index(x.reshape(*before, -1, size, *after), at[0])
    split = x.reshape(*before, -1, at.shape[0], size, *after)
    picked = jax.vmap(index, in_axes=(axis + 1, 0), out_axes=axis + 1)(split, at)
    return picked.reshape(*before, -1, *after)


def put_rows(
    x: Float[Array, "layers B M K D"],
    rows: Float[Array, "layers R M K D"],
    at: Int[Array, " shards"],
    found: Bool[Array, " shards"],
) -> Float[Array, "layers B M K D"]:
    """Puts the rows of `take_rows` back, for shards with `found`.

    Args:
        x: keys or values of all rows.
        rows: those of one row of each shard, for each copy of the batch.
        at: number of the row within each shard.
        found: False for shards whose row stays.

    Returns:
        The new keys or values.
    """
    layers, shards, rest = len(x), at.shape[0], x.shape[2:]
    update = functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=2)
    if shards == 1:
        copies = rows.shape[1]
        split = x.reshape(layers, copies, -1, *rest)
        return update(split, rows[:, :, None], at[0]).reshape(x.shape)

    def put(old: Array, part: Array, row: Array, is_new: Array) -> Array:
        kept = jax.lax.dynamic_slice_in_dim(old, row, 1, axis=2)
        return update(old, jnp.where(is_new, part, kept), row)

    new = rows.reshape(layers, -1, shards, 1, *rest)
    split = x.reshape(layers, new.shape[1], shards, -1, *rest)
    return jax.vmap(put, in_axes=(2, 2, 0, 0), out_axes=2)(split, new, at, found).reshape(x.shape)


class SlotPromptForward(RenewedByRow):
    """Forward pass over the canvas, on a stale cache of the prompt."""

    renewals = (RENEW,)  # a pass over the canvas alone keeps nothing


class SlotPrefixForward(RenewedByRow, PrefixCacheForward):
    """Forward pass from each row's block on, on a stale cache.

    All passes have the length of the canvas. A shorter one would fit the rows at late blocks, but
    then a row's rounding would depend on its neighbours.
    """

    @property
    def surplus(self) -> int:
        """Most positions behind the canvas that a pass reads."""
        return self.config.canvas - self.config.block_length

    def _reuse(
        self, x: Float[Array, "B N E"], step: Step, cache: Cache
    ) -> tuple[Float[Array, "B n E"], Cache]:
        size = self.config.block_length
        first = self.row_blocks(step.block) * size
        return self._read(cache, x, first, self.config.canvas)[0][:, :size], cache


class SlotDualForward(RenewedByRow, DualCacheForward):
    """Forward pass over each row's active block, on its stale cache elsewhere."""


SLOT_FORWARDS: dict[str, type[FullForward]] = {
    "none": FullForward,
    "exact": SlotExactForward,
    "prompt": SlotPromptForward,
    "prefix": SlotPrefixForward,
    "dual": SlotDualForward,
}
