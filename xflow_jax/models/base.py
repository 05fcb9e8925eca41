"""Base class of all backbones: embedding, scanned layers, norm and head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import ArrayLike, DTypeLike

from xflow_jax.errors import require
from xflow_jax.models import kv_cache
from xflow_jax.models.attention import attention_mask
from xflow_jax.models.layers import Linear, RMSNorm, RopeTables, rope_tables
from xflow_jax.models.lm_head import make_head
from xflow_jax.parallel import constrain_batch, constrain_lookup
from xflow_jax.types import Array, Bool, Cache, Float, Int, ModelConfig

# Policies of the backward pass: "full" recomputes whole layers, "dots" all but matrix products.
REMAT: dict[str, Callable[..., Any] | None] = {
    "full": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class BackboneBase(nn.Module):
    """Transformer from tokens int [B, L] to logits [B, L, V].

    A family sets `layer_class`. It overrides `stacks`, `layer_fields`, `layer_axes` and
    `layer_inputs` if it has several stacks, or its layers have further fields or inputs.

    Attributes:
        config: the configuration.
        dtype: dtype of the computation.
        param_dtype: dtype of fresh parameters. Given ones keep theirs.
        remat: parts that the backward pass recomputes: None for nothing, or a name in REMAT. On
            CPUs "full" is also the fastest, since there is less memory to touch.
        attention: a name in `attention.KERNELS`. None: the best one for the platform.
        unroll: layers in one turn of the scan's loop.
    """

    config: ModelConfig
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32
    remat: str | None = None
    attention: str | None = None
    unroll: int = 1

    # One layer: (x, rope, allowed, cached, *layer_inputs) -> (x, its new keys and values or None).
    layer_class: ClassVar[type[nn.Module]]
    # Scanned axis of each further input of a layer, or nn.broadcast.
    layer_axes: ClassVar[tuple[Any, ...]] = ()

    @property
    def stacks(self) -> dict[str, int]:
        """Number of layers of each stack, in order, without empty stacks."""
        return {"blocks": self.config.num_layers}

    def layer_fields(self, stack: str) -> dict[str, Any]:
        """Returns further fields of the layers of a stack."""
        return {}

    def layer_inputs(self, stack: str, has_cache: bool) -> tuple[Any, ...]:
        """Returns further inputs of the layers of a stack, as in `layer_axes`."""
        return ()

    def setup(self) -> None:
        """Makes the submodules."""
        c = self.config
        require(
            self.remat is None or self.remat in REMAT,
            f"remat is {self.remat!r}, but it must be {' or '.join(REMAT)}",
        )
        self.wte = nn.Embed(
            c.vocab_rows,
            c.hidden_size,
            embedding_init=nn.initializers.normal(0.02),
            dtype=self.dtype,
            param_dtype=self.param_dtype,
        )
        for stack, count in self.stacks.items():
            setattr(self, stack, self._make_stack(stack, count))
        self.ln_f = RMSNorm(
            c.rms_norm_eps, c.norm_full_precision, dtype=self.dtype, param_dtype=self.param_dtype
        )
        if not c.tie_embeddings:
            self.ff_out = Linear(
                c.vocab_rows, c.head_bias, dtype=self.dtype, param_dtype=self.param_dtype
            )

    def _make_stack(self, stack: str, count: int) -> nn.Module:
        layer = self.layer_class
        if self.remat is not None:
            layer = nn.remat(layer, policy=REMAT[self.remat], prevent_cse=False)
        scanned = nn.scan(
            layer,
            variable_axes={"params": 0, "lora": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, nn.broadcast, 0, *self.layer_axes),
            length=count,
            unroll=self.unroll,
        )
        return scanned(
            self.config,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            attention=self.attention,
            **self.layer_fields(stack),
        )

    def __call__(
        self,
        tokens: Int[ArrayLike, "B L"],
        mask: Bool[ArrayLike, "B L"] | None = None,
        block_length: int | None = None,
    ) -> Float[Array, "B L V"]:
        """Computes logits of tokens, in `dtype`.

        Args:
            tokens: as in `embed`.
            mask: as in `hidden`.
            block_length: as in `hidden`.

        Returns:
            The logits.
        """
        return self.head(self.hidden(self.embed(tokens), mask, block_length))

    def embed(self, tokens: Int[ArrayLike, "B L"]) -> Float[Array, "B L E"]:
        """Reads the rows of tokens from the embedding table, in `dtype`."""
        table = jnp.asarray(self.wte.embedding)
        return constrain_lookup(table[jnp.asarray(tokens)].astype(self.dtype))

    def hidden(
        self,
        x: Float[ArrayLike, "B L E"],
        mask: Bool[ArrayLike, "B L"] | None = None,
        block_length: int | None = None,
        allowed: Bool[ArrayLike, "#B L L"] | None = None,
        positions: Int[ArrayLike, " L"] | None = None,
    ) -> Float[Array, "B L E"]:
        """Computes hidden states after the final norm.

        Args:
            x: input embeddings.
            mask: real tokens. Padding is on the left.
            block_length: positions of a block, for block-causal attention.
            allowed: pairs (query, key) that may attend.
            positions: places of the inputs in the text, for the rotary angles. None: 0 to L - 1.

        Returns:
            Hidden states in `dtype`.
        """
        x = jnp.asarray(x)
        mask = None if mask is None else jnp.asarray(mask)
        allowed = None if allowed is None else jnp.asarray(allowed)
        attended = attention_mask(x.shape[1], mask, block_length, allowed)
        if positions is None:
            rope = self._rope_tables(x.shape[1], 0)
        else:  # each position is the start of a row of length 1
            cos, sin = self._rope_tables(1, jnp.asarray(positions))
            rope = cos[:, 0], sin[:, 0]
        return self._run_layers(x, rope, attended, None)[0]

    def hidden_cached(
        self,
        x: Float[ArrayLike, "B N E"],
        cache: Cache,
        start: int | Int[ArrayLike, ""] | Int[ArrayLike, " B"],
        mask: Bool[ArrayLike, "B _"] | None = None,
        block_length: int | None = None,
        replace: bool = False,
    ) -> tuple[Float[Array, "B N E"], Cache]:
        """Computes hidden states of consecutive positions, on a cache of others.

        Args:
            x: input embeddings of the positions start ... start + N - 1.
            cache: keys and values of M positions (kv_cache.py).
            start: the first position, or int [B] with one for each row.
            mask: real positions, [B, N] or [B, M + N], as in `kv_cache.cache_mask`.
            block_length: positions of a block, for block-causal attention among the N positions.
            replace: use the cache at all positions but these N, so also at later ones. The cache
                then has a place for them, and `mask` is [B, M].

        Returns:
            (hidden states after the final norm, keys and values of the N positions).
        """
        x = jnp.asarray(x)
        mask = None if mask is None else jnp.asarray(mask)
        if replace:
            first = jnp.asarray(start)
            attended = None if mask is None else mask[:, None, None, :]
            rope = self._rope_tables(x.shape[1], first)
            return self._run_layers(x, rope, attended, kv_cache.replace_keys(cache, first))
        start = jnp.broadcast_to(start, x.shape[:1])
        attended = kv_cache.cache_mask(cache, start, x.shape[1], mask, block_length)
        return self._run_layers(x, self._rope_tables(x.shape[1], start), attended, cache)

    def head(self, h: Float[Array, "*B E"]) -> Float[Array, "*B V"]:
        """Computes the logits of hidden states, in `dtype`."""
        if self.is_initializing() and not self.config.tie_embeddings:
            return self.ff_out(h)  # creates the parameters that make_head reads
        return make_head(self.variables["params"]).project(h.astype(self.dtype))

    @nn.nowrap
    def empty_cache(self, batch: int, positions: int) -> Cache:
        """Makes a key/value cache of zeros (kv_cache.py).

        Args:
            batch: B.
            positions: M.

        Returns:
            The cache.
        """
        c = self.config
        return kv_cache.empty_cache(
            self.stacks, batch, positions, c.num_kv_heads, c.head_dim, self.dtype
        )

    def _run_layers(
        self,
        x: jax.Array,
        rope: RopeTables,
        allowed: jax.Array | None,
        cache: Cache | None,
    ) -> tuple[jax.Array, Cache]:
        """Runs all layers and the final norm.

        The new keys and values are an empty dict without a cache.
        """
        x = constrain_batch(x.astype(self.dtype))
        new: Cache = {}
        for stack in self.stacks:
            cached = None if cache is None else cache[stack]
            inputs = self.layer_inputs(stack, cache is not None)
            x, kept = getattr(self, stack)(x, rope, allowed, cached, *inputs)
            if cache is not None:
                new[stack] = kept
        return self.ln_f(x), new

    def _rope_tables(self, length: int, start: int | jax.Array) -> RopeTables:
        c = self.config
        cos, sin = rope_tables(length, c.rotary_dim, c.rope_theta, start)
        if c.rope_full_precision:
            return cos, sin
        return cos.astype(self.dtype), sin.astype(self.dtype)
