"""Matrix products of bfloat16 that accumulate in float32, forward and backward.

XLA for CPUs has fast products of bfloat16 (AMX) only if the result is float32. Other platforms and
float32 have JAX's own products.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from xflow_jax.parallel import platform
from xflow_jax.types import Array, Float

# Values of jax_default_matmul_precision that ask for float32 products of rounded factors.
_ROUNDED = ("bfloat16", "BF16_BF16_F32")


def rounds_factors(dtype: DTypeLike) -> bool:
    """Returns True if products round their factors to bfloat16.

    They do on CPUs, for bfloat16 and for float32 with the matmul precision "bfloat16" of the
    caller (`jax.default_matmul_precision`). The sums are float32.

    Args:
        dtype: dtype of the factors.
    """
    if platform() != "cpu":
        return False
    precision = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    return dtype == jnp.bfloat16 or (dtype == jnp.float32 and precision in _ROUNDED)


def linear_product(x: Float[Array, "*B E"], kernel: jax.Array) -> Float[Array, "*B F"]:
    """Multiplies the last axis by a matrix, in the dtype of `x`.

    Args:
        x: vectors.
        kernel: the matrix [E, F], of any dtype.
    """
    kernel = kernel.astype(x.dtype)
    if not rounds_factors(x.dtype):
        return x @ kernel
    y = rounded_product(x.reshape(-1, x.shape[-1]), kernel)
    return y.reshape(*x.shape[:-1], -1).astype(x.dtype)


def batched_product(a: Float[Array, "*B M K"], b: Float[Array, "*B K N"]) -> Float[Array, "*B M N"]:
    """Multiplies batches of matrices, with a float32 result.

    Args:
        a: left factors.
        b: right factors, of the same dtype.
    """
    if rounds_factors(a.dtype):
        return rounded_product(a, b)
    return jnp.matmul(a, b, preferred_element_type=jnp.float32)


@jax.custom_vjp
def rounded_product(a: Float[Array, "*B M K"], b: Float[Array, "*B K N"]) -> Float[Array, "*B M N"]:
    """Multiplies matrices in bfloat16, with a float32 result.

    Args:
        a: left factors.
        b: right factors.
    """
    return multiply_rounded(a.astype(jnp.bfloat16), b.astype(jnp.bfloat16), b.ndim - 2)


def multiply_rounded(a: jax.Array, b: jax.Array, summed: int) -> jax.Array:
    """Multiplies over the last axis of `a` and one of `b`.

    The result is float32. XLA for CPUs computes products of transposed factors in float32, which
    is slow. So the axis is chosen here.

    Args:
        a: left factors, bfloat16 [*B, M, K].
        b: right factors, bfloat16, with the same axes before the last two.
        summed: the axis of K in `b`, the last one or the one before.

    Returns:
        The products, float32 [*B, M, N].
    """
    batch = tuple(range(a.ndim - 2))
    return jax.lax.dot_general(
        a,
        b,
        (((a.ndim - 1,), (summed,)), (batch, batch)),
        precision=jax.lax.Precision.DEFAULT,
        preferred_element_type=jnp.float32,
    )


def _forward(a: jax.Array, b: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    # Empty arrays keep the dtypes of the factors.
    types = jnp.zeros(0, a.dtype), jnp.zeros(0, b.dtype)
    a, b = a.astype(jnp.bfloat16), b.astype(jnp.bfloat16)
    return rounded_product(a, b), (a, b, *types)


def _backward(kept: tuple[jax.Array, ...], slope: jax.Array) -> tuple[jax.Array, jax.Array]:
    a, b, a_type, b_type = kept
    slope = slope.astype(jnp.bfloat16)
    slope_a = multiply_rounded(slope, b, b.ndim - 1)
    slope_b = rounded_product(jnp.swapaxes(a, -1, -2), slope)
    return slope_a.astype(a_type.dtype), slope_b.astype(b_type.dtype)


rounded_product.defvjp(_forward, _backward)
