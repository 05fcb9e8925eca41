"""LLaDA2.0: some dense layers, then a mixture of experts, made for block-causal decoding; both stacks are scanned."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from xflow_jax.errors import require
from xflow_jax.models import kv_cache
from xflow_jax.models.attention import attend, attention_mask
from xflow_jax.models.config import LLaDA2Config
from xflow_jax.models.layers import REMAT, Linear, RMSNorm, apply_rope, rope_tables
from xflow_jax.models.moe import Experts, Router, default_kernel, route
from xflow_jax.parallel import LOGICAL, constrain_batch, constrain_lookup


class SharedMLP(nn.Module):
    """The shared experts, one MLP that every token passes: x [..., E] -> [..., E]."""

    width: int
    out_std: float
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        gate = Linear(self.width, name="ff_proj", **types)(x)
        up = Linear(self.width, name="up_proj", **types)(x)
        return Linear(x.shape[-1], init_std=self.out_std, name="ff_out", **types)(
            nn.silu(gate) * up
        )


class Block(nn.Module):
    """One pre-norm layer: x [B, L, E] -> (x [B, L, E], its new keys and values where there is a cache)."""

    config: LLaDA2Config
    sparse: bool
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32
    attention: str | None = None
    experts_kernel: str | None = None

    def setup(self) -> None:
        c, types = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        out_std = 0.02 / (2 * c.num_layers) ** 0.5
        self.attn_norm = RMSNorm(c.rms_norm_eps, **types)
        self.q_proj = Linear(c.num_heads * c.head_dim, c.use_qkv_bias, **types)
        self.k_proj = Linear(c.num_kv_heads * c.head_dim, c.use_qkv_bias, **types)
        self.v_proj = Linear(c.num_kv_heads * c.head_dim, c.use_qkv_bias, **types)
        self.q_norm, self.k_norm = (
            RMSNorm(c.rms_norm_eps, **types),
            RMSNorm(c.rms_norm_eps, **types),
        )
        self.attn_out = Linear(c.hidden_size, c.use_bias, init_std=out_std, **types)
        self.ff_norm = RMSNorm(c.rms_norm_eps, **types)
        if self.sparse:
            self.router = Router(c.num_experts, self.param_dtype)
            self.experts = Experts(
                c.num_experts,
                c.moe_intermediate_size,
                out_std=out_std,
                kernel=self.experts_kernel,
                **types,
            )
            if c.shared_mlp_dim:
                self.shared = SharedMLP(c.shared_mlp_dim, out_std, **types)
        else:
            self.ff_proj, self.up_proj = (
                Linear(c.intermediate_size, **types),
                Linear(c.intermediate_size, **types),
            )
            self.ff_out = Linear(c.hidden_size, init_std=out_std, **types)

    def __call__(
        self,
        x: jax.Array,
        rope: tuple[jax.Array, jax.Array],
        allowed: jax.Array | None,
        cached: kv_cache.Layer | None,
        experts: dict[str, jax.Array] | None,
        layer: jax.Array,
    ) -> tuple[jax.Array, kv_cache.Layer | None]:
        h = self.attn_norm(x)
        q, k, v = (self._heads(proj(h)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = apply_rope(self.q_norm(q), *rope), apply_rope(self.k_norm(k), *rope)
        keys, values, new = kv_cache.extend_keys(cached, k, v)
        h = attend(q, keys, values, allowed, self.attention)
        x = x + self.attn_out(h.reshape(*h.shape[:2], -1))
        return constrain_batch(x + self.mlp(self.ff_norm(x), experts, layer)), new

    def _heads(self, x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:2], -1, self.config.head_dim)

    def mlp(
        self,
        x: jax.Array,
        experts: dict[str, jax.Array] | None = None,
        layer: jax.Array | None = None,
    ) -> jax.Array:
        """x [B, L, E], normed -> [B, L, E]: the dense MLP, or the experts (moe.Experts' stack) and the shared ones."""
        if not self.sparse:
            return self.ff_out(nn.silu(self.ff_proj(x)) * self.up_proj(x))
        y = self.experts(x, *route(*self.router(x), self.config), experts, layer)
        return y + self.shared(x) if self.config.shared_mlp_dim else y


class LLaDA2(nn.Module):
    """The model: tokens int [B, L] -> logits [B, L, V]; its methods and fields are those of `llada.LLaDA`.

    experts_kernel: a name in `moe.KERNELS`.
    """

    config: LLaDA2Config
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32
    remat: str | None = None
    attention: str | None = None
    unroll: int = 1
    experts_kernel: str | None = None

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

        def stack(length: int, sparse: bool) -> nn.Module:
            scanned = nn.scan(
                block,
                variable_axes={"params": 0, "lora": 0},
                split_rngs={"params": True},
                in_axes=(nn.broadcast, nn.broadcast, 0, nn.broadcast, 0),
                length=length,
                unroll=self.unroll,
            )
            return scanned(
                c, sparse, attention=self.attention, experts_kernel=self.experts_kernel, **types
            )

        self.wte = nn.Embed(
            c.vocab_rows, c.hidden_size, embedding_init=nn.initializers.normal(0.02), **types
        )
        layers = self.layers
        if "dense" in layers:
            self.dense = stack(layers["dense"], sparse=False)
        if "blocks" in layers:
            self.blocks = stack(layers["blocks"], sparse=True)
        self.ln_f = RMSNorm(c.rms_norm_eps, **types)
        if not c.tie_word_embeddings:
            self.ff_out = Linear(c.vocab_rows, **types)

    @property
    def layers(self) -> dict[str, int]:
        """How many layers each stack has, in order, without empty ones."""
        counts = {
            "dense": self.config.num_dense_layers,
            "blocks": self.config.num_layers - self.config.num_dense_layers,
        }
        return {name: count for name, count in counts.items() if count}

    @nn.nowrap
    def empty_cache(self, batch: int, positions: int) -> kv_cache.Cache:
        """A key/value cache for so many positions (see cache.py)."""
        return kv_cache.empty_cache(
            self.layers,
            batch,
            positions,
            self.config.num_kv_heads,
            self.config.head_dim,
            self.dtype,
        )

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

    def _run(
        self,
        x: jax.Array,
        start: jax.Array | int,
        allowed: jax.Array | None,
        cache: kv_cache.Cache | None,
    ) -> tuple[jax.Array, kv_cache.Cache | None]:
        # The originals turn in the dtype of the computation.
        rope = rope_tables(x.shape[1], self.config.rotary_dim, self.config.rope_theta, start)
        rope = tuple(table.astype(self.dtype) for table in rope)
        x, new = constrain_batch(x.astype(self.dtype)), {}
        for name, count in self.layers.items():
            cached = None if cache is None else cache[name]
            experts = self._stacked_experts() if name == "blocks" and cache is not None else None
            x, new[name] = getattr(self, name)(x, rope, allowed, cached, experts, jnp.arange(count))
        return self.ln_f(x), None if cache is None else new

    def _stacked_experts(self) -> dict[str, jax.Array] | None:
        """All layers' experts, where the layers take them so: only in decoding, since the gradient of a layer would be
        as large as the stack, and where no device has to gather or cast more than it holds."""
        mesh = jax.sharding.get_abstract_mesh()
        if (self.experts_kernel or default_kernel()) != "stacked" or mesh.shape.get(
            LOGICAL["embed"], 1
        ) > 1:
            return None
        stack = self.variables["params"]["blocks"]["experts"]
        return stack if all(x.dtype == self.dtype for x in stack.values()) else None

    def head(self, h: jax.Array) -> jax.Array:
        """h [..., E] -> logits [..., V] in `dtype`, V = vocab_rows."""
        if self.config.tie_word_embeddings:
            return h.astype(self.dtype) @ self.wte.embedding.astype(self.dtype).T
        return self.ff_out(h)

    def __call__(
        self, tokens: jax.Array, mask: jax.Array | None = None, block_length: int | None = None
    ) -> jax.Array:
        """tokens int [B, L], mask bool [B, L] -> logits [B, L, V] in `dtype`."""
        return self.head(self.hidden(self.embed(tokens), mask, block_length))
