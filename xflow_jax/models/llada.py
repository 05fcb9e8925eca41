"""LLaDA: a bidirectional Llama-like transformer with one stack of scanned layers."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from xflow_jax.models import kv_cache
from xflow_jax.models.attention import attend
from xflow_jax.models.base import BackboneBase
from xflow_jax.models.layers import Linear, RMSNorm, RopeTables, apply_rope
from xflow_jax.models.llada_config import LLaDAConfig
from xflow_jax.parallel import constrain_batch
from xflow_jax.types import Array, Bool, Float


class Block(nn.Module):
    """Pre-norm layer. The fields are those of `BackboneBase`."""

    config: LLaDAConfig
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32
    attention: str | None = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B L E"],
        rope: RopeTables,
        allowed: Bool[Array, "#B 1 #L M"] | None,
        cached: kv_cache.LayerCache | None,
    ) -> tuple[Float[Array, "B L E"], kv_cache.LayerCache | None]:
        """Applies attention and the MLP.

        Args:
            x: the residual stream.
            rope: cos and sin of the positions.
            allowed: pairs (query, key) that may attend. None: all.
            cached: keys and values of earlier positions, or None.

        Returns:
            (residual stream, the new keys and values or None without a cache).
        """
        c = self.config
        linear = partial(Linear, dtype=self.dtype, param_dtype=self.param_dtype)
        norm = partial(RMSNorm, c.rms_norm_eps, dtype=self.dtype, param_dtype=self.param_dtype)
        residual_std = 0.02 / (2 * c.num_layers) ** 0.5
        b, length, _ = x.shape

        def heads(name: str, n: int, h: jax.Array) -> jax.Array:
            y = linear(n * c.head_dim, use_bias=c.qkv_bias, name=name)(h)
            return y.reshape(b, length, n, c.head_dim)

        def output(name: str, h: jax.Array) -> jax.Array:
            layer = linear(c.hidden_size, c.include_bias, init_std=residual_std, name=name)
            return layer(h)

        h = norm(name="attn_norm")(x)
        q = apply_rope(heads("q_proj", c.num_heads, h), *rope)
        k = apply_rope(heads("k_proj", c.num_kv_heads, h), *rope)
        v = heads("v_proj", c.num_kv_heads, h)
        keys, values, new = kv_cache.extend_keys(cached, k, v)
        h = attend(q, keys, values, allowed, self.attention).reshape(b, length, -1)
        x = x + output("attn_out", h)
        h = norm(name="ff_norm")(x)
        gate = linear(c.mlp_dim, c.include_bias, name="ff_proj")(h)
        up = linear(c.mlp_dim, c.include_bias, name="up_proj")(h)
        return constrain_batch(x + output("ff_out", nn.silu(gate) * up)), new


class LLaDA(BackboneBase):
    """LLaDA, with the fields and methods of `BackboneBase`."""

    config: LLaDAConfig
    layer_class = Block
