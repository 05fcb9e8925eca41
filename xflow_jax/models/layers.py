"""Parts of every model: linear map, RMS norm, rotary positions."""

from __future__ import annotations

from typing import TypeAlias

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from xflow_jax.models.lora import adapted
from xflow_jax.models.products import linear_product
from xflow_jax.models.quantization import SCALE, rescale
from xflow_jax.types import Array, Float

# cos and sin, [L, rotary_dim / 2] or [B, L, rotary_dim / 2]
RopeTables: TypeAlias = tuple[jax.Array, jax.Array]


class Linear(nn.Module):
    """Linear map with an optional bias and an optional adapter (lora.py).

    The kernel may be int8 (quantization.py).

    Attributes:
        features: width of the output.
        use_bias: True if a bias is added.
        dtype: dtype of the computation. Parameters are cast to it where they are used.
        param_dtype: dtype of fresh parameters.
        init_std: standard deviation of a fresh kernel.
    """

    features: int
    use_bias: bool = False
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32
    init_std: float = 0.02

    @nn.compact
    def __call__(self, x: Float[Array, "*B E"]) -> Float[Array, "*B F"]:
        """Maps [..., in] to [..., features] in `dtype`."""
        shape = (x.shape[-1], self.features)
        kernel = self.param(
            "kernel", nn.initializers.normal(self.init_std), shape, self.param_dtype
        )
        x = x.astype(self.dtype)
        y = linear_product(x, jnp.asarray(kernel))
        if self.has_variable("params", "kernel" + SCALE):
            y = rescale(y, self.get_variable("params", "kernel" + SCALE))
        if self.has_variable("lora", "kernel"):
            y = y + adapted(x, self.get_variable("lora", "kernel"))
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,), self.param_dtype)
            y = y + bias.astype(self.dtype).reshape((1,) * (y.ndim - 1) + (-1,))
        return y


class RMSNorm(nn.Module):
    """RMS norm in float32.

    The result is cast to `dtype` before it is scaled, as in most original code.

    Attributes:
        eps: added to the mean square.
        full_precision: scale before the cast instead.
        dtype: dtype of the result.
        param_dtype: dtype of a fresh scale.
    """

    eps: float
    full_precision: bool = False
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*B E"]) -> Float[Array, "*B E"]:
        """Normalises the last axis."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.param_dtype)
        x32 = x.astype(jnp.float32)
        y = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        scaled_in = jnp.float32 if self.full_precision else self.dtype
        scale = scale.astype(scaled_in).reshape((1,) * (x.ndim - 1) + (-1,))
        return (y.astype(scaled_in) * scale).astype(self.dtype)


def rope_tables(
    length: int, rotary_dim: int, theta: float, start: int | jax.Array = 0
) -> RopeTables:
    """Computes the cosines and sines of rotary positions.

    Frequency i is theta^(-2i / rotary_dim).

    Args:
        length: L, number of positions.
        rotary_dim: dims of a head that are rotated.
        theta: base of the frequencies.
        start: first position: an integer, or int [B] with one for each row.

    Returns:
        cos and sin, float32 [L, rotary_dim / 2], or [B, L, rotary_dim / 2] if start is [B].
    """
    frequency = theta ** (-jnp.arange(0, rotary_dim, 2, dtype=jnp.float32) / rotary_dim)
    start = jnp.asarray(start)
    position = start[..., None] + jax.lax.broadcasted_iota(
        jnp.int32, (*start.shape, length), start.ndim
    )
    angle = jnp.multiply.outer(position.astype(jnp.float32), frequency)
    return jnp.cos(angle), jnp.sin(angle)


def apply_rope(
    x: Float[Array, "B L H D"], cos: jax.Array, sin: jax.Array
) -> Float[Array, "B L H D"]:
    """Rotates the first dims of each head, by halves.

    Dim i pairs with dim i + rotary_dim / 2. Dims from rotary_dim on stay as they are.

    Args:
        x: queries or keys.
        cos: [L, rotary_dim / 2] or [B, L, rotary_dim / 2]. The rotation runs in its dtype.
        sin: as `cos`.

    Returns:
        The rotated x, in the dtype of x.
    """
    half = cos.shape[-1]
    cos, sin = (jnp.expand_dims(table, (0, 2) if table.ndim == 2 else 2) for table in (cos, sin))
    first, second = x[..., :half].astype(cos.dtype), x[..., half : 2 * half].astype(cos.dtype)
    rotated = (
        (first * cos - second * sin).astype(x.dtype),
        (second * cos + first * sin).astype(x.dtype),
    )
    return jnp.concatenate((*rotated, x[..., 2 * half :]), axis=-1)
