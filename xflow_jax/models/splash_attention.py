"""Splash attention, a Pallas kernel of JAX for TPUs.

No row of scores reaches memory.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import PartitionSpec as P

from xflow_jax.parallel import BATCH, LOGICAL, divides, platform
from xflow_jax.types import Array, Bool, Float

LANES = 128  # lengths are padded to a multiple of it, and a head's width must be one
MAX_TILE = 1024  # positions of a tile: its float32 scores must fit into the chip's fast memory


def splash_attend(
    q: Float[Array, "B L H D"],
    k: Float[Array, "B M K D"],
    v: Float[Array, "B M K D"],
    visible: Bool[Array, "#B M"] | None,
) -> Float[Array, "B L H D"]:
    """Computes softmax attention with the same keys for all queries.

    On a mesh each device computes its own rows, and its own heads if `tensor` divides those of the
    keys.

    Args:
        q: queries.
        k: keys.
        v: values.
        visible: keys to attend to. None: all.

    Returns:
        The weighted sums of values.
    """
    ids = None
    if visible is not None or k.shape[1] % LANES:
        ids = jnp.ones(k.shape[:2], jnp.int32) * (1 if visible is None else visible)
    if jax.sharding.get_abstract_mesh().empty:
        return _local(q, k, v, ids)
    rows = BATCH if divides(k.shape[0], BATCH) else None
    axis = LOGICAL["kv_heads"]
    heads = axis if axis and divides(k.shape[2], (axis,)) else None
    whole = P(rows, None, heads, None)
    specs = (whole, whole, whole, None if ids is None else P(rows, None))
    return jax.shard_map(_local, in_specs=specs, out_specs=whole, check_vma=False)(q, k, v, ids)


def _local(q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array | None) -> jax.Array:
    """Attends on one device. ids: int32 [B, M], 1 for visible keys."""
    length = q.shape[1]
    q, k, v = (_pad(x).transpose(0, 2, 1, 3) for x in (q * q.shape[-1] ** -0.5, k, v))
    segments = None
    if ids is not None:
        segments = splash.SegmentIds(q=jnp.ones((q.shape[0], q.shape[2]), jnp.int32), kv=_pad(ids))
    kernel = _kernel(q.shape[1], q.shape[2], k.shape[2])
    return jax.vmap(kernel)(q, k, v, segments).transpose(0, 2, 1, 3)[:, :length]


def _pad(x: jax.Array) -> jax.Array:
    more = -x.shape[1] % LANES
    return jnp.pad(x, [(0, 0), (0, more), *[(0, 0)] * (x.ndim - 2)]) if more else x


def _kernel(heads: int, length: int, keys: int) -> splash.SplashAttentionKernel:
    """Builds the kernel with a full mask. Segments select the visible keys."""
    q, kv = (
        max(n for n in range(LANES, MAX_TILE + 1, LANES) if size % n == 0)
        for size in (length, keys)
    )
    sizes = splash.BlockSizes(q, kv, block_q_dkv=q, block_kv_dkv=kv, block_q_dq=q, block_kv_dq=kv)
    mask = splash.MultiHeadMask([splash.FullMask((length, keys))] * heads)
    return splash.make_splash_mha(
        mask,
        block_sizes=sizes,
        interpret=platform() == "cpu",
        head_shards=1,
        q_seq_shards=1,
    )
