"""JAX's splash attention, a Pallas kernel of TPUs, as `attention.attend` wants it: no row of scores reaches memory."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import PartitionSpec as P

from xflow_jax.parallel import BATCH, LOGICAL, divides, platform

LANES = 128  # lengths are padded to a multiple of it, and a head's width must be one


LARGEST = 1024  # positions of a tile: its scores, float32, are in the chip's fast memory


def splash_attend(q: jax.Array, k: jax.Array, v: jax.Array, seen: jax.Array | None) -> jax.Array:
    """q [B, L, H, D], k and v [B, M, K, D], seen bool [B or 1, M], None = all keys -> [B, L, H, D].

    Where a mesh is set, each device computes its own rows, and its own heads where `tensor` divides those of the keys.
    """
    ids = None
    if seen is not None or k.shape[1] % LANES:
        ids = jnp.ones(k.shape[:2], jnp.int32) * (1 if seen is None else seen)
    if jax.sharding.get_abstract_mesh().empty:
        return _local(q, k, v, ids)
    rows = BATCH if divides(k.shape[0], BATCH) else None
    heads = LOGICAL["kv_heads"] if divides(k.shape[2], (LOGICAL["kv_heads"],)) else None
    whole = P(rows, None, heads, None)
    specs = (whole, whole, whole, None if ids is None else P(rows, None))
    return jax.shard_map(_local, in_specs=specs, out_specs=whole, check_vma=False)(q, k, v, ids)


def _local(q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array | None) -> jax.Array:
    """On one device; ids int32 [B, M]: 1 where a key is seen, else 0; None = all are."""
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
    """Every query may see every key; which are there, the segments say."""
    q, kv = (
        max(n for n in range(LANES, LARGEST + 1, LANES) if size % n == 0) for size in (length, keys)
    )
    sizes = splash.BlockSizes(q, kv, block_q_dkv=q, block_kv_dkv=kv, block_q_dq=q, block_kv_dq=kv)
    mask = splash.MultiHeadMask([splash.FullMask((length, keys))] * heads)
    shards = {"head_shards": 1, "q_seq_shards": 1}
    return splash.make_splash_mha(mask, block_sizes=sizes, interpret=platform() == "cpu", **shards)
