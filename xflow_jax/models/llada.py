"""LLaDA: a bidirectional Llama-like transformer, its layers stacked and scanned."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from xflow_jax.errors import require
from xflow_jax.models import kv_cache
from xflow_jax.models.attention import attend, attention_mask
from xflow_jax.models.config import LLaDAConfig
from xflow_jax.models.layers import REMAT, Linear, RMSNorm, apply_rope, rope_tables
from xflow_jax.parallel import constrain_batch, constrain_lookup


class Block(nn.Module):
    """One pre-norm layer: x [B, L, E] -> (x [B, L, E], its new keys and values where there is a cache)."""

    config: LLaDAConfig
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32
    attention: str | None = None

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        rope: tuple[jax.Array, jax.Array],
        allowed: jax.Array | None,
        cached: kv_cache.Layer | None,
    ) -> tuple[jax.Array, kv_cache.Layer | None]:
        c, types = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        residual_std = 0.02 / (2 * c.num_layers) ** 0.5
        b, length, _ = x.shape

        def heads(name: str, n: int, h: jax.Array) -> jax.Array:
            y = Linear(n * c.head_dim, use_bias=c.qkv_bias, name=name, **types)(h)
            return y.reshape(b, length, n, c.head_dim)

        h = RMSNorm(c.rms_norm_eps, name="attn_norm", **types)(x)
        q = apply_rope(heads("q_proj", c.num_heads, h), *rope)
        k = apply_rope(heads("k_proj", c.num_kv_heads, h), *rope)
        v = heads("v_proj", c.num_kv_heads, h)
        keys, values, new = kv_cache.extend_keys(cached, k, v)
        h = attend(q, keys, values, allowed, self.attention).reshape(b, length, -1)
        x = x + Linear(
            c.hidden_size, c.include_bias, init_std=residual_std, name="attn_out", **types
        )(h)
        h = RMSNorm(c.rms_norm_eps, name="ff_norm", **types)(x)
        gate = Linear(c.mlp_dim, c.include_bias, name="ff_proj", **types)(h)
        up = Linear(c.mlp_dim, c.include_bias, name="up_proj", **types)(h)
        h = nn.silu(gate) * up
        x = x + Linear(
            c.hidden_size, c.include_bias, init_std=residual_std, name="ff_out", **types
        )(h)
        return constrain_batch(x), new


class LLaDA(nn.Module):
    """The model: tokens int [B, L] -> logits [B, L, V]; `embed`, `hidden` and `head` are its three parts.

    dtype: of the computation; param_dtype: of fresh parameters (given ones keep theirs). remat: what the backward pass
    recomputes: None = nothing, "dots" = all but matrix products, "full" = whole layers (on CPUs also the fastest: there
    is less memory to touch). attention: a name in `attention.KERNELS`. unroll: layers per turn of the scan's loop.
    """

    config: LLaDAConfig
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32
    remat: str | None = None
    attention: str | None = None
    unroll: int = 1

    def setup(self) -> None:
        c, types = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        require(
            self.remat is None or self.remat in REMAT,
            f"remat is {self.remat!r}, but it must be {' or '.join(REMAT)}",
        )
        block = (
            Block
            if self.remat is None
            else nn.remat(Block, policy=REMAT[self.remat], prevent_cse=False)
        )
        stack = nn.scan(
            block,
            variable_axes={"params": 0, "lora": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, nn.broadcast, 0),
            length=c.num_layers,
            unroll=self.unroll,
        )
        self.wte = nn.Embed(
            c.vocab_rows, c.hidden_size, embedding_init=nn.initializers.normal(0.02), **types
        )
        self.blocks = stack(c, attention=self.attention, **types)
        self.ln_f = RMSNorm(c.rms_norm_eps, **types)
        if not c.weight_tying:
            self.ff_out = Linear(c.vocab_rows, c.include_bias, **types)

    def embed(self, tokens: jax.Array) -> jax.Array:
        """tokens int [B, L] -> rows of the embedding table, as they are, [B, L, E] in `dtype`."""
        return constrain_lookup(self.wte.embedding[tokens].astype(self.dtype))

    def hidden(
        self,
        x: jax.Array,
        mask: jax.Array | None = None,
        block_length: int | None = None,
        allowed: jax.Array | None = None,
    ) -> jax.Array:
        """x [B, L, E] -> [B, L, E] after the final norm; mask, block_length, allowed as in `attention_mask`."""
        return self._run(x, 0, attention_mask(x.shape[1], mask, block_length, allowed), None)[0]

    def hidden_cached(
        self,
        x: jax.Array,
        cache: kv_cache.Cache,
        start: jax.Array | int,
        mask: jax.Array | None = None,
        block_length: int | None = None,
    ) -> tuple[jax.Array, kv_cache.Cache]:
        """x [B, n, E] at the positions start ... start + n - 1 -> (as `hidden`, their keys and values); see cache.py.

        start: int or int [B]. mask bool [B, n] or [B, M + n] and block_length as in `cache.visible`.
        """
        start = jnp.broadcast_to(start, x.shape[:1])
        return self._run(
            x, start, kv_cache.cache_mask(cache, start, x.shape[1], mask, block_length), cache
        )

    @nn.nowrap
    def empty_cache(self, batch: int, positions: int) -> kv_cache.Cache:
        """A key/value cache for so many positions (see cache.py)."""
        c = self.config
        return kv_cache.empty_cache(
            {"blocks": c.num_layers}, batch, positions, c.num_kv_heads, c.head_dim, self.dtype
        )

    def _run(
        self,
        x: jax.Array,
        start: jax.Array | int,
        allowed: jax.Array | None,
        cache: kv_cache.Cache | None,
    ) -> tuple[jax.Array, kv_cache.Cache | None]:
        c = self.config
        rope = rope_tables(x.shape[1], c.head_dim, c.rope_theta, start)
        if not c.rope_full_precision:
            rope = tuple(table.astype(self.dtype) for table in rope)
        x = constrain_batch(x.astype(self.dtype))
        x, new = self.blocks(x, rope, allowed, None if cache is None else cache["blocks"])
        return self.ln_f(x), None if cache is None else {"blocks": new}

    def head(self, h: jax.Array) -> jax.Array:
        """h [..., E] -> logits [..., V] in `dtype`, V = vocab_rows."""
        if self.config.weight_tying:
            return h.astype(self.dtype) @ self.wte.embedding.astype(self.dtype).T
        return self.ff_out(h)

    def __call__(
        self, tokens: jax.Array, mask: jax.Array | None = None, block_length: int | None = None
    ) -> jax.Array:
        """tokens int [B, L], mask bool [B, L] -> logits [B, L, V] in `dtype`."""
        return self.head(self.hidden(self.embed(tokens), mask, block_length))
