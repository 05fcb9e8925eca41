"""What a step looks at: the whole sequence; or the active block, with the finished ones in a cache, which is the same;
or the canvas alone, with the prompt as it was some steps ago, which is an approximation.

A sight turns the canvas, x [B, N, E], into hidden states. What it keeps is in the carry of the decoder's scans: `start`
makes it, `keep` is called once when a block begins, and `hidden` reads it in every step, and may change it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from xflow_jax.decoding.state import DecodeConfig, Step
from xflow_jax.models import kv_cache
from xflow_jax.parallel import BATCH, LOGICAL, divides
from xflow_jax.types import Backbone


@dataclasses.dataclass(frozen=True, eq=False)
class FullForward:
    """A forward pass of prompt and canvas.

    prompt_x [B, P, E] with its padding, on the left, False in prompt_mask bool [B, P]; on_canvas bool [B, N].
    """

    model: Backbone
    params: Any
    settings: DecodeConfig
    prompt_x: jax.Array
    prompt_mask: jax.Array
    on_canvas: jax.Array

    def start(self) -> Any:
        """What is kept before the first block."""
        return None

    def keep(self, kept: Any, x: jax.Array, block: jax.Array, going_on: jax.Array) -> Any:
        """What is kept from when `block` begins, and x [B, N, E] of the blocks before is final; going_on: scalar bool,
        whether any sequence decodes it."""
        return kept

    def hidden(self, kept: Any, x: jax.Array, step: Step) -> tuple[jax.Array, Any]:
        """x [B, N, E] -> hidden states of the canvas [B, N, E], or of the active block [B, block_length, E] where
        attention is block-causal: the rest has no say in the step, and the head is the dearer part; and what is kept
        from now on."""
        both = jnp.concatenate([self.prompt_x, x.astype(self.prompt_x.dtype)], axis=1)
        if not self.settings.block_causal:
            return self._apply("hidden", both, self.mask, None)[:, self.prompt_x.shape[1] :], kept
        h = self._apply("hidden", both, self.mask, self.settings.block_length)
        return _columns(h, self.prompt_x.shape[1] + self.window(step.block)), kept

    def window(self, block: jax.Array) -> jax.Array:
        """The canvas positions of a block, int [B, block_length]: the grid is each row's own, and those of the first
        block are negative as far as the prompt reaches into it."""
        size = self.settings.block_length
        return block * size - self.length % size + jnp.arange(size)[None, :]

    @property
    def mask(self) -> jax.Array:
        """Which positions of prompt and canvas are real, bool [B, P + N]."""
        return jnp.concatenate([self.prompt_mask, self.on_canvas], axis=1)

    @property
    def length(self) -> jax.Array:
        """Of each prompt, int [B, 1]."""
        return jnp.sum(self.prompt_mask, axis=-1, keepdims=True)

    def _apply(self, method: str, *args: Any) -> Any:
        return self.model.apply({"params": self.params}, *args, method=method)


class CachedForward(FullForward):
    """A forward pass of the active block alone, on keys and values of all before it (models/cache.py).

    Rows are aligned to the left in the cache. The prompt's whole blocks are read at the start, all at once; a block is
    read once more when the next one begins, with the tokens that it ended with.
    """

    def start(self) -> kv_cache.Cache:
        """The keys and values of the prompts' whole blocks."""
        size, (batch, padded) = self.settings.block_length, self.prompt_mask.shape
        whole = (
            padded // size * size
        )  # what is left of the longest prompt is in its first active block
        # The last block need not be kept.
        cache = self.model.empty_cache(batch, whole + (self.settings.blocks - 1) * size)
        if whole:
            x = kv_cache.align_left(self.prompt_x, self.prompt_mask)[:, :whole]
            mask = jnp.arange(whole)[None, :] < self.length
            nothing = self.model.empty_cache(batch, 0)
            cache = kv_cache.write_cache(
                cache, self._apply("hidden_cached", x, nothing, 0, mask, size)[1], 0
            )
        return _constrain(cache)

    def keep(
        self, kept: kv_cache.Cache, x: jax.Array, block: jax.Array, going_on: jax.Array
    ) -> kv_cache.Cache:
        """The cache with the block before `block`."""

        def write(cache: kv_cache.Cache) -> kv_cache.Cache:
            new = self._read(cache, x, block - 1)[1]
            return _constrain(kv_cache.write_cache(cache, new, self._first(block - 1)))

        return jax.lax.cond((block > 0) & going_on, write, lambda cache: cache, kept)

    def hidden(
        self, kept: kv_cache.Cache, x: jax.Array, step: Step
    ) -> tuple[jax.Array, kv_cache.Cache]:
        """x [B, N, E] -> hidden states of the active block [B, block_length, E]."""
        return self._read(kept, x, step.block)[0], kept

    def _read(
        self, cache: kv_cache.Cache, x: jax.Array, block: jax.Array
    ) -> tuple[jax.Array, kv_cache.Cache]:
        tail = self.prompt_x[:, -self.settings.block_length :]
        both = jnp.concatenate([tail, x.astype(tail.dtype)], axis=1)
        part = _columns(both, tail.shape[1] + self.window(block))
        return self._apply("hidden_cached", part, cache, self._first(block))

    def _first(self, block: jax.Array) -> jax.Array:
        """The position at which each row's block begins, counted from the row's first token, int [B]."""
        size = self.settings.block_length
        return (self.length[:, 0] // size + block) * size


class StalePromptForward(FullForward):
    """A forward pass of the canvas alone, on keys and values of the prompt that are some steps old: where the prompt
    attends to the response there is no exact cache.

    In the first step of a block, and every `settings.refresh` steps of it, all is read as `Whole` does, and the
    prompt's keys and values stay. Steps count within the block: a row that is done with a block early may skip its last
    steps or sit through them with the others of its batch, and in the next block must find the same either way.
    """

    def start(self) -> kv_cache.Cache:
        """Room for the prompts' keys and values."""
        return _constrain(self.model.empty_cache(*self.prompt_mask.shape))

    def hidden(
        self, kept: kv_cache.Cache, x: jax.Array, step: Step
    ) -> tuple[jax.Array, kv_cache.Cache]:
        """x [B, N, E] -> hidden states of the canvas [B, N, E]."""
        batch, prompt = self.prompt_mask.shape
        x = x.astype(self.prompt_x.dtype)

        def anew(kept: kv_cache.Cache) -> tuple[jax.Array, kv_cache.Cache]:
            both, nothing = (
                jnp.concatenate([self.prompt_x, x], axis=1),
                self.model.empty_cache(batch, 0),
            )
            h, new = self._apply("hidden_cached", both, nothing, 0, self.mask)
            return h[:, prompt:], _constrain(jax.tree.map(lambda part: part[:, :, :prompt], new))

        def between(kept: kv_cache.Cache) -> tuple[jax.Array, kv_cache.Cache]:
            return self._apply("hidden_cached", x, kept, prompt, self.mask)[0], kept

        due = step.index % self.settings.steps % self.settings.refresh == 0
        return jax.lax.cond(due, anew, between, kept)


def _columns(x: jax.Array, columns: jax.Array) -> jax.Array:
    """x [B, L, E] at columns int [B, n] -> [B, n, E]; behind a row's canvas stands something, which nobody uses."""
    return jnp.take_along_axis(x, jnp.clip(columns, 0, x.shape[1] - 1)[..., None], axis=1)


def _constrain(cache: kv_cache.Cache) -> kv_cache.Cache:
    """Keeps a cache [layers, B, M, K, D] on the devices that compute it, where a mesh is set."""

    def leaf(x: jax.Array) -> jax.Array:
        batch = BATCH if divides(x.shape[1], BATCH) else None
        heads = LOGICAL["kv_heads"] if divides(x.shape[3], (LOGICAL["kv_heads"],)) else None
        if batch is None and heads is None:
            return x
        return jax.lax.with_sharding_constraint(x, P(None, batch, None, heads))

    return jax.tree.map(leaf, cache)
