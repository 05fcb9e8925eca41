"""LLaDA, and every other dense Llama-like transformer: one stack of scanned layers."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from xflow_jax.models import kv_cache
from xflow_jax.models.attention import attend
from xflow_jax.models.base import BackboneBase
from xflow_jax.models.config_base import DenseConfig
from xflow_jax.models.layers import Linear, RMSNorm, RopeTables, apply_rope
from xflow_jax.parallel import constrain_batch
from xflow_jax.types import Array, Bool, Float


class Block(nn.Module):
    """Pre-norm layer. The fields are those of `BackboneBase`.

    Biases and norms of heads are properties of the configuration.
    """

    config: DenseConfig
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
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        linear = partial(Linear, dtype=self.dtype, param_dtype=self.param_dtype)
        norm = partial(RMSNorm, c.rms_norm_eps, c.norm_full_precision, **types)
        residual_std = 0.02 / (2 * c.num_layers) ** 0.5
        b, length, _ = x.shape

        def heads(name: str, n: int, h: jax.Array) -> jax.Array:
            y = linear(n * c.head_dim, use_bias=c.qkv_bias, name=name)(h)
            return y.reshape(b, length, n, c.head_dim)

        def output(name: str, use_bias: bool, h: jax.Array) -> jax.Array:
            layer = linear(c.hidden_size, use_bias, init_std=residual_std, name=name)
            return layer(h)

        h = norm(name="attn_norm")(x)
        q, k = heads("q_proj", c.num_heads, h), heads("k_proj", c.num_kv_heads, h)
        v = heads("v_proj", c.num_kv_heads, h)
        if c.qk_norm:
            q, k = norm(name="q_norm")(q), norm(name="k_norm")(k)
        q, k = apply_rope(q, *rope), apply_rope(k, *rope)
        keys, values, new = kv_cache.extend_keys(cached, k, v)
        h = attend(q, keys, values, allowed, self.attention).reshape(b, length, -1)
        x = x + output("attn_out", c.attn_out_bias, h)
        h = norm(name="ff_norm")(x)
        gate = linear(c.mlp_dim, c.mlp_bias, name="ff_proj")(h)
        up = linear(c.mlp_dim, c.mlp_bias, name="up_proj")(h)
        return constrain_batch(x + output("ff_out", c.mlp_bias, nn.silu(gate) * up)), new


class LLaDA(BackboneBase):
    """Dense backbone of all families, with the fields and methods of `BackboneBase`."""

    config: DenseConfig
    layer_class = Block
