"""A mixture of experts: the router, and the experts as grouped matrix products over tokens sorted by expert."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from xflow_jax.models.config import LLaDA2Config
from xflow_jax.parallel import BATCH, LOGICAL, MESH_AXES, divides, platform

Kernel = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def route(logits: jax.Array, bias: jax.Array, config: LLaDA2Config) -> tuple[jax.Array, jax.Array]:
    """Each token's experts: logits float32 [..., X], bias float32 [X] -> (experts int32, weights float32) [..., k].

    Groups of experts are chosen first, by the sum of their two best biased scores, then experts within these, in
    descending order; ties go to the lowest index. The bias steers the choice only, the weights are without it.
    """
    groups, kept, k = config.n_group, config.topk_group, config.num_experts_per_tok
    score = jax.nn.sigmoid(logits)
    biased = score + bias.reshape((1,) * (score.ndim - 1) + (-1,))
    size = biased.shape[-1] // groups
    biased = biased.reshape(*biased.shape[:-1], groups, size)
    best_two = jax.lax.top_k(biased, min(2, size))[0].sum(axis=-1)
    # In ascending order, so that equal scores of different groups still go to the lowest expert.
    group = jnp.sort(jax.lax.top_k(best_two, kept)[1], axis=-1)
    candidates = jnp.take_along_axis(biased, group[..., None], axis=-2).reshape(
        *biased.shape[:-2], kept * size
    )
    place = jax.lax.top_k(candidates, k)[1]
    experts = jnp.take_along_axis(group, place // size, axis=-1) * size + place % size
    weights = jnp.take_along_axis(score, experts, axis=-1)
    if k > 1:
        weights = weights / (weights.sum(axis=-1, keepdims=True) + 1e-20)
    return experts.astype(jnp.int32), weights * config.routed_scaling_factor


class Router(nn.Module):
    """x [..., E] -> the logits of the experts, float32 [..., X], and the bias of their choice, float32 [X]."""

    experts: int
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        shape = (x.shape[-1], self.experts)
        kernel = self.param("kernel", nn.initializers.normal(0.02), shape, self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.experts,), jnp.float32)
        logits = jnp.matmul(x.astype(jnp.float32), kernel.astype(jnp.float32), precision="highest")
        return logits, bias.astype(jnp.float32)


class Experts(nn.Module):
    """The experts' MLPs: x [B, L, E], experts int and weights float32 [B, L, k] -> [B, L, E], their weighted sum.

    Every token reaches all of its experts. Where a mesh is set, each device computes its own experts on its own part of
    the batch. kernel: a name in KERNELS; None = the platform's. stack, layer: in the place of its own matrices those of
    all layers {"gate", "up", "down"}: [layers, X, ...], and which layer this is (int scalar).
    """

    experts: int
    width: int
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32
    out_std: float = 0.02
    kernel: str | None = None

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        experts: jax.Array,
        weights: jax.Array,
        stack: dict[str, jax.Array] | None = None,
        layer: jax.Array | None = None,
    ) -> jax.Array:
        e, wide = x.shape[-1], (self.experts, x.shape[-1], self.width)
        matrices, adapters = {}, {}
        for name, shape, std in (
            ("gate", wide, 0.02),
            ("up", wide, 0.02),
            ("down", (self.experts, self.width, e), self.out_std),
        ):
            matrix = self.param(name, nn.initializers.normal(std), shape, self.param_dtype)
            matrices[name] = jnp.asarray(matrix, self.dtype)
            if self.has_variable("lora", name):
                adapters[name] = self.get_variable("lora", name)
        mlp = partial(_experts, kernel=KERNELS[self.kernel or default_kernel()])
        tree, layer = ((matrices, adapters), None) if stack is None else ((stack, adapters), layer)
        y = _over_mesh(mlp, x.astype(self.dtype), experts, weights, tree, layer)
        return y.astype(self.dtype)


def _over_mesh(
    mlp: Callable[..., jax.Array],
    x: jax.Array,
    experts: jax.Array,
    weights: jax.Array,
    tree: Any,
    layer: jax.Array | None = None,
) -> jax.Array:
    """`mlp`, on each device for the experts and the tokens that it holds; the experts' sums are added up."""
    mesh, axis, count = (
        jax.sharding.get_abstract_mesh(),
        LOGICAL["expert"],
        tree[0]["gate"].shape[-3],
    )
    if mesh.empty or not set(MESH_AXES) <= set(mesh.axis_names):
        return mlp(x, experts, weights, *tree, first=0, layer=layer)
    batch = BATCH if divides(x.shape[0], BATCH) else None
    split = axis if divides(count, (axis,)) else None

    def local(
        x: jax.Array, experts: jax.Array, weights: jax.Array, tree: Any, layer: Any
    ) -> jax.Array:
        first = 0 if split is None else jax.lax.axis_index(split) * tree[0]["gate"].shape[-3]
        y = mlp(x, experts, weights, *tree, first=first, layer=layer)
        return y if split is None else jax.lax.psum(y, split)

    held = P(split) if layer is None else P(None, split)
    specs = (P(batch), P(batch), P(batch), (held, P(split)), P())
    return jax.shard_map(local, in_specs=specs, out_specs=P(batch), check_vma=False)(
        x, experts, weights, tree, layer
    )


def _experts(
    x: jax.Array,
    experts: jax.Array,
    weights: jax.Array,
    matrices: dict[str, jax.Array],
    adapters: dict[str, Any],
    first: int | jax.Array,
    kernel: Kernel,
    layer: jax.Array | None = None,
) -> jax.Array:
    """The weighted sum, float32 [B, L, E], of the experts first ... first + X - 1, X being those in `matrices`.

    layer: which one of `matrices`, where those are of all layers, [layers, X, ...].
    """
    k, count = experts.shape[-1], matrices["gate"].shape[-3]
    local = experts.reshape(-1) - first
    held = (local >= 0) & (local < count)
    # Rows of experts that are held elsewhere come last, behind all groups.
    key = jnp.where(held, local, count)
    order = jnp.argsort(key, stable=True)
    inverse = jnp.argsort(order)
    ends = jnp.searchsorted(
        key[order], jnp.arange(count + 1), method="compare_all"
    )  # a search is a loop
    sizes = groups = jnp.diff(ends).astype(jnp.int32)
    if layer is not None:
        # One list of all layers' experts, the other layers' without a row: the kernel passes over those, whereas a
        # layer's part of the stack would be copied for it.
        groups = jnp.zeros(matrices["gate"].shape[0] * count, jnp.int32)
        groups = jax.lax.dynamic_update_slice_in_dim(groups, sizes, layer * count, 0)
        matrices = {
            name: matrix.reshape(-1, *matrix.shape[2:]) for name, matrix in matrices.items()
        }

    def dot(name: str, x: jax.Array) -> jax.Array:
        y = kernel(x, matrices[name], groups)
        if name in adapters:
            a, b = (m.astype(x.dtype) for m in (adapters[name].a, adapters[name].b))
            y = y + kernel(kernel(x, a, sizes), b, sizes) * adapters[name].scale
        return y

    rows = _take(x.reshape(-1, x.shape[-1]), order // k, inverse.reshape(-1, k))
    y = dot("down", nn.silu(dot("gate", rows)) * dot("up", rows))
    y = _take(y, inverse, order[:, None])
    y = jnp.where(held[:, None], y, 0).astype(jnp.float32).reshape(*experts.shape, -1)
    return jnp.sum(y * weights[..., None], axis=-2)


@jax.custom_vjp
def _take(x: jax.Array, index: jax.Array, back: jax.Array) -> jax.Array:
    """x[index]; back[i] lists the places where row i went, which makes the gradient a gather too, and no scatter."""
    return x[index]


_take.defvjp(
    lambda x, index, back: (x[index], back),
    lambda back, g: (g[back].sum(axis=1), None, None),
)


def _ragged(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
    return jax.lax.ragged_dot(x, w, sizes)


@jax.custom_vjp
def _tiles(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
    """As ragged_dot: x [A, E] in groups of `sizes` [X], w [X, E, F] -> [A, F]; rows behind all groups are undefined.

    A loop over tiles of rows, each of one expert. (On CPUs ragged_dot multiplies every row by every expert's matrix.)
    """
    size = _tile_size(x.shape[0], w.shape[0])
    expert, start, _, used = _tiling(sizes, x.shape[0], size)
    x = jnp.pad(x, ((0, size), (0, 0)))

    def tile(i: jax.Array, y: jax.Array) -> jax.Array:
        # Rows of the next expert at the tile's end are overwritten by the next tile.
        part = jax.lax.dynamic_slice_in_dim(x, start[i], size) @ jnp.asarray(w)[expert[i]]
        return jax.lax.dynamic_update_slice_in_dim(y, part, start[i], 0)

    y = jnp.zeros((x.shape[0], w.shape[2]), x.dtype)
    return jax.lax.fori_loop(0, used, tile, y)[:-size]


def _tiles_backward(
    saved: tuple[jax.Array, ...], g: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    x, w, sizes = saved
    size = _tile_size(x.shape[0], w.shape[0])
    expert, start, stop, used = _tiling(sizes, x.shape[0], size)
    x, g = (jnp.pad(v, ((0, size), (0, 0))) for v in (x, g))

    def tile(i: jax.Array, grads: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        dx, dw = grads
        inside = (start[i] + jnp.arange(size) < stop[i])[:, None]
        xi = jax.lax.dynamic_slice_in_dim(x, start[i], size)
        gi = jnp.where(inside, jax.lax.dynamic_slice_in_dim(g, start[i], size), 0)
        dx = jax.lax.dynamic_update_slice_in_dim(dx, gi @ jnp.asarray(w)[expert[i]].T, start[i], 0)
        # Read and written back: a scatter-add would take ten times as long.
        dwi = dw[expert[i]] + jnp.matmul(xi.T, gi, preferred_element_type=jnp.float32)
        return dx, jax.lax.dynamic_update_index_in_dim(dw, dwi, expert[i], 0)

    dx, dw = jax.lax.fori_loop(0, used, tile, (jnp.zeros_like(x), jnp.zeros(w.shape, jnp.float32)))
    return dx[:-size], dw.astype(w.dtype), None


_tiles.defvjp(lambda x, w, sizes: (_tiles(x, w, sizes), (x, w, sizes)), _tiles_backward)


def _tile_size(rows: int, experts: int) -> int:
    """Rows of a tile: a power of two near half the mean group, so that little of it is wasted."""
    size = 8
    while size < 64 and 4 * size * experts <= rows:
        size *= 2
    return size


def _tiling(
    sizes: jax.Array, rows: int, size: int
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """(expert, first row, row behind the last) of each tile, and the number of tiles in use."""
    last, ends = jnp.cumsum(-(-sizes // size)), jnp.cumsum(sizes)
    tile = jnp.arange((rows + min(rows, sizes.shape[0]) * (size - 1)) // size)
    expert = jnp.minimum(jnp.searchsorted(last, tile, side="right"), sizes.shape[0] - 1)
    nth = tile - jnp.where(expert > 0, last[expert - 1], 0)
    start = ends[expert] - sizes[expert] + nth * size
    return expert, start, ends[expert], last[-1]


# stacked: XLA's own grouped product, in decoding with a cache of all layers' experts at once (see `_experts`). That of
# TPUs lists the tiles of the groups that have rows, and visits these; others would multiply the whole stack.
KERNELS: dict[str, Kernel] = {"ragged": _ragged, "stacked": _ragged, "tiles": _tiles}


def default_kernel() -> str:
    """The kernel for the platform: the loop over tiles on CPUs, XLA's own grouped product elsewhere."""
    return {"cpu": "tiles", "tpu": "stacked"}.get(platform(), "ragged")
