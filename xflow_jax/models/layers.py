"""The parts that every model is made of: linear map, RMS norm, rotary positions."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from xflow_jax.models.lora import adapted

# What a backward pass may keep: with "full", whole layers are recomputed, with "dots" all but matrix products.
REMAT = {"full": None, "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}


class Linear(nn.Module):
    """x [..., in] -> [..., features], kernel [in, features]; parameters are cast to `dtype` where they are used.

    An adapter (lora.py) for the kernel is added where the variables have one.
    """

    features: int
    use_bias: bool = False
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32
    init_std: float = 0.02

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (x.shape[-1], self.features)
        kernel = self.param(
            "kernel", nn.initializers.normal(self.init_std), shape, self.param_dtype
        )
        x = x.astype(self.dtype)
        y = x @ kernel.astype(self.dtype)
        if self.has_variable("lora", "kernel"):
            y = y + adapted(x, self.get_variable("lora", "kernel"))
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,), self.param_dtype)
            y = y + bias.astype(self.dtype).reshape((1,) * (y.ndim - 1) + (-1,))
        return y


class RMSNorm(nn.Module):
    """x [..., E] -> [..., E]: normalised in float32, cast to `dtype`, and only then scaled, as the originals do."""

    eps: float
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.param_dtype)
        x32 = x.astype(jnp.float32)
        y = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        return y.astype(self.dtype) * scale.astype(self.dtype).reshape((1,) * (x.ndim - 1) + (-1,))


def rope_tables(
    length: int, rotary_dim: int, theta: float, start: int | jax.Array = 0
) -> tuple[jax.Array, jax.Array]:
    """cos and sin, float32 [L, rotary_dim / 2], of positions start, start + 1, ...; frequency theta^(-2i/dim).

    start: an integer, or one per row, int [B]: the tables are then [B, L, rotary_dim / 2].
    """
    frequency = theta ** (-jnp.arange(0, rotary_dim, 2, dtype=jnp.float32) / rotary_dim)
    start = jnp.asarray(start)
    position = start[..., None] + jax.lax.broadcasted_iota(
        jnp.int32, (*start.shape, length), start.ndim
    )
    angle = jnp.multiply.outer(position.astype(jnp.float32), frequency)
    return jnp.cos(angle), jnp.sin(angle)


def apply_rope(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates x [B, L, H, D] by halves (dim i pairs with i + rotary_dim / 2) in the tables' dtype, and casts back.

    cos, sin: [L, rotary_dim / 2] or [B, L, rotary_dim / 2]. Dims from rotary_dim on pass through.
    """
    half = cos.shape[-1]
    cos, sin = (jnp.expand_dims(table, (0, 2) if table.ndim == 2 else 2) for table in (cos, sin))
    first, second = x[..., :half].astype(cos.dtype), x[..., half : 2 * half].astype(cos.dtype)
    turned = (
        (first * cos - second * sin).astype(x.dtype),
        (second * cos + first * sin).astype(x.dtype),
    )
    return jnp.concatenate((*turned, x[..., 2 * half :]), axis=-1)
