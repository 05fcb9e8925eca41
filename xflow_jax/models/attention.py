"""Attention masks, and attention by several kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp

from xflow_jax.errors import UserError, require
from xflow_jax.models.products import batched_product, rounds_factors
from xflow_jax.models.rounded_attention import rounded_attention
from xflow_jax.parallel import platform
from xflow_jax.types import Array, Bool, Float

Kernel: TypeAlias = Callable[[jax.Array, jax.Array, jax.Array, jax.Array | None], jax.Array]


def attention_mask(
    length: int,
    mask: Bool[Array, "B L"] | None = None,
    block_length: int | None = None,
    allowed: Bool[Array, "#B L L"] | None = None,
) -> Bool[Array, "_ 1 _ L"] | None:
    """Builds the attention mask of a whole sequence.

    Args:
        length: L.
        mask: real tokens. Padding is on the left.
        block_length: positions of a block, for block-causal attention: i attends to j if
            block(j) <= block(i). The grid of each row counts from its own first real token, so
            padding does not shift it.
        allowed: pairs (query, key) that may attend.

    Returns:
        `allowed` of `attend`: bool, broadcastable to [B, 1, L, L], or None without any limit.
    """
    keys = None if mask is None else mask[:, None, None, :]
    parts = [] if keys is None else [keys]
    if block_length is not None:
        first = (
            jnp.zeros((1, 1), jnp.int32)
            if mask is None
            else jnp.argmax(mask, axis=1, keepdims=True)
        )
        block = (jnp.arange(length)[None, :] - first) // block_length
        parts.append((block[:, None, :] <= block[:, :, None])[:, None])
    if allowed is not None:
        parts.append(allowed[:, None])
    out = None
    for part in parts:
        out = part if out is None else out & part
    return out


def attend(
    q: Float[Array, "B L H D"],
    k: Float[Array, "B M K D"],
    v: Float[Array, "B M K D"],
    allowed: Bool[Array, "#B 1 #L M"] | None = None,
    kernel: str | None = None,
) -> Float[Array, "B L H D"]:
    """Computes softmax attention with grouped heads.

    Key/value head j serves query heads j * H/K ... (j + 1) * H/K - 1. Scores and softmax are
    float32. A query that may attend to nothing (padding) gets a meaningless but finite result.

    Args:
        q: queries.
        k: keys.
        v: values.
        allowed: pairs (query, key) that may attend, broadcastable to [B, 1, L, M]. None: all.
        kernel: a name in KERNELS. None: the best one for the platform and these arguments.

    Returns:
        The weighted sums of values.

    Raises:
        UserError: if there is no such kernel, or it cannot compute these arguments.
    """
    kernel = kernel or default_kernel(q, k, allowed)
    require(
        kernel in KERNELS, f"attention is {kernel!r}, but it must be one of {', '.join(KERNELS)}"
    )
    if why := missing_requirement(kernel, q, k, allowed):
        raise UserError(f"the attention kernel {kernel} needs {why}. Leave attention out.")
    return KERNELS[kernel](q, k, v, allowed)


def _einsum(q: jax.Array, k: jax.Array, v: jax.Array, allowed: jax.Array | None) -> jax.Array:
    b, length, h, d = q.shape
    kv, keys = k.shape[2], k.shape[1]
    if h == kv and rounds_factors(q.dtype):
        return rounded_attention(q, k, v, allowed)
    # XLA on CPUs multiplies batches fast only if they lead. The query heads of one key/value head
    # become one long query.
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q * d**-0.5, k, v))
    q = q.reshape(b, kv, -1, d)
    scores = batched_product(q, k.swapaxes(2, 3))
    if allowed is not None:
        scores = scores.reshape(b, h, length, keys)
        scores = jnp.where(allowed, scores, jnp.finfo(jnp.float32).min).reshape(b, kv, -1, keys)
    # The softmax's division comes last, on [..., D] instead of [..., M].
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    out = batched_product(weights.astype(v.dtype), v)
    out = (out / weights.sum(axis=-1, keepdims=True)).astype(v.dtype)
    return out.reshape(b, h, length, d).transpose(0, 2, 1, 3)


def _xla(q: jax.Array, k: jax.Array, v: jax.Array, allowed: jax.Array | None) -> jax.Array:
    return jax.nn.dot_product_attention(q, k, v, mask=allowed, implementation="xla")


def _cudnn(q: jax.Array, k: jax.Array, v: jax.Array, allowed: jax.Array | None) -> jax.Array:
    if allowed is not None:
        allowed = jnp.broadcast_to(allowed, (*allowed.shape[:2], q.shape[1], k.shape[1]))
    return jax.nn.dot_product_attention(q, k, v, mask=allowed, implementation="cudnn")


def _splash(q: jax.Array, k: jax.Array, v: jax.Array, allowed: jax.Array | None) -> jax.Array:
    from xflow_jax.models import splash_attention  # it imports Pallas

    return splash_attention.splash_attend(q, k, v, None if allowed is None else allowed[:, 0, 0])


KERNELS: dict[str, Kernel] = {"einsum": _einsum, "xla": _xla, "cudnn": _cudnn, "splash": _splash}


def default_kernel(q: jax.Array, k: jax.Array, allowed: jax.Array | None = None) -> str:
    """Selects the kernel for the platform and the arguments of `attend`.

    Returns:
        "einsum" on CPUs, "cudnn" on GPUs if it can compute the arguments, otherwise "xla".
    """
    if platform() == "cpu":
        return "einsum"
    if platform() == "gpu" and not missing_requirement("cudnn", q, k, allowed):
        return "cudnn"
    return "xla"


def missing_requirement(
    kernel: str, q: jax.Array, k: jax.Array, allowed: jax.Array | None = None
) -> str | None:
    """Describes a requirement of a kernel that the arguments do not meet.

    Args:
        kernel: a name in KERNELS.
        q: as in `attend`.
        k: as in `attend`.
        allowed: as in `attend`.

    Returns:
        The requirement in words, or None if the kernel can compute the arguments.
    """
    (_, length, _, width), keys = q.shape, k.shape[1]
    if kernel == "cudnn":
        if not has_cudnn():
            return "an NVIDIA GPU of compute capability 8.0 or more"
        if q.dtype not in (jnp.bfloat16, jnp.float16):
            return f"bfloat16 or float16, not {q.dtype}"
        if width % 8 or width > 128:
            return f"heads of 8, 16, ... 128 dims, not {width}"
        if allowed is not None and (length % 2 or keys % 2):  # for the mask's backward pass
            return f"even lengths, not {length} and {keys}"
    if kernel == "splash":
        if platform() == "gpu":
            return "a TPU"
        if width % 128:
            return f"heads of 128, 256, ... dims, not {width}"
        if allowed is not None and allowed.shape[1:3] != (1, 1):
            return "the same keys for all queries of a row, not blocks"
    return None


def has_cudnn() -> bool:
    """Returns True if the default device can run cuDNN's attention."""
    if jax.default_backend() != "gpu":
        return False
    device = jax.local_devices()[0]
    return "cuda" in device.client.platform_version and float(device.compute_capability) >= 8.0
