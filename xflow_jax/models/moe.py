"""Mixture of experts: router, and grouped products over sorted tokens."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from xflow_jax.models.llada2_config import LLaDA2Config
from xflow_jax.models.lladamoe_config import LLaDAMoEConfig
from xflow_jax.models.lora import Adapter
from xflow_jax.models.quantization import SCALE, rescale
from xflow_jax.parallel import BATCH, LOGICAL, MESH_AXES, divides, platform
from xflow_jax.types import Array, Float, Int

# (x [A, E], w [X, E, F], group sizes int [X]) -> [A, F], the rows of group i times w[i].
Kernel: TypeAlias = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
# "gate", "up", "down", and the scales of each if they are int8 (quantization.py).
Matrices: TypeAlias = dict[str, jax.Array]
Adapters: TypeAlias = dict[str, Adapter]


MoEConfig: TypeAlias = LLaDA2Config | LLaDAMoEConfig


def route_softmax(
    logits: Float[Array, "*B X"], bias: Float[Array, " X"] | None, k: int
) -> tuple[Int[Array, "*B k"], Float[Array, "*B k"]]:
    """Chooses the experts of each token by a softmax (LLaDA-MoE).

    The probabilities of the chosen ones are the weights as they are, with the bias in them.

    Args:
        logits: the router's, float32.
        bias: added to each expert's probability, or None.
        k: experts of a token.

    Returns:
        (experts int32, weights float32), [..., k] each, in descending order.
    """
    score = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    if bias is not None:
        score = score + bias.reshape((1,) * (score.ndim - 1) + (-1,))
    weights, experts = jax.lax.top_k(score, k)
    return experts.astype(jnp.int32), weights


def route(
    logits: Float[Array, "*B X"], bias: Float[Array, " X"], config: LLaDA2Config
) -> tuple[Int[Array, "*B k"], Float[Array, "*B k"]]:
    """Chooses the experts of each token by sigmoids in groups (LLaDA2.0).

    Groups of experts are chosen first, by the sum of their two best biased scores, then experts
    within these, in descending order. Ties go to the lowest index. The bias affects the choice
    only, not the weights.

    Args:
        logits: the router's, float32.
        bias: added to each expert's score, float32.
        config: number of groups, of chosen groups and of experts per token (k).

    Returns:
        (experts int32, weights float32), [..., k] each.
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
    """Scores the experts.

    Attributes:
        experts: X.
        param_dtype: dtype of a fresh kernel. The bias is float32.
        use_bias: True if there is a bias.
        dtype: dtype of the product.
    """

    experts: int
    param_dtype: DTypeLike = jnp.float32
    use_bias: bool = True
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "*B E"]
    ) -> tuple[Float[Array, "*B X"], Float[Array, " X"] | None]:
        """Returns the float32 logits, and the bias or None, for `route`."""
        shape = (x.shape[-1], self.experts)
        kernel = self.param("kernel", nn.initializers.normal(0.02), shape, self.param_dtype)
        bias = None
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.experts,), jnp.float32)
            bias = jnp.asarray(bias, jnp.float32)
        logits = jnp.matmul(x.astype(self.dtype), kernel.astype(self.dtype), precision="highest")
        return logits.astype(jnp.float32), bias


class Experts(nn.Module):
    """MLPs of the experts. Every token reaches all of its experts.

    On a mesh each device computes its own experts, on its own part of the batch.

    Attributes:
        experts: X.
        width: width of each expert's MLP.
        dtype: dtype of the computation.
        param_dtype: dtype of fresh matrices.
        out_std: standard deviation of fresh output matrices.
        kernel: a name in KERNELS. None: the platform's.
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
        x: Float[Array, "B L E"],
        experts: Int[Array, "B L k"],
        weights: Float[Array, "B L k"],
        stack: Matrices | None = None,
        layer: Int[Array, ""] | None = None,
    ) -> Float[Array, "B L E"]:
        """Computes the weighted sums of the experts' outputs.

        Args:
            x: inputs.
            experts: the experts of each token.
            weights: their weights, float32.
            stack: the matrices of all layers, [layers, X, ...], to use instead of its own.
            layer: index of this layer in `stack`.

        Returns:
            The sums, in `dtype`.
        """
        e, wide = x.shape[-1], (self.experts, x.shape[-1], self.width)
        matrices: Matrices = {}
        adapters: Adapters = {}
        for name, shape, std in (
            ("gate", wide, 0.02),
            ("up", wide, 0.02),
            ("down", (self.experts, self.width, e), self.out_std),
        ):
            matrix = self.param(name, nn.initializers.normal(std), shape, self.param_dtype)
            if self.has_variable("params", name + SCALE):
                matrices[name] = jnp.asarray(matrix)
                matrices[name + SCALE] = self.get_variable("params", name + SCALE)
            else:
                matrices[name] = jnp.asarray(matrix, self.dtype)
            if self.has_variable("lora", name):
                adapters[name] = self.get_variable("lora", name)
        mlp = partial(apply_experts, kernel=KERNELS[self.kernel or default_kernel()])
        if stack is None:
            stack, layer = matrices, None
        y = _over_mesh(mlp, x.astype(self.dtype), experts, weights, (stack, adapters), layer)
        return y.astype(self.dtype)


def _over_mesh(
    mlp: Callable[..., jax.Array],
    x: jax.Array,
    experts: jax.Array,
    weights: jax.Array,
    tree: tuple[Matrices, Adapters],
    layer: jax.Array | None,
) -> jax.Array:
    """Calls `mlp` on each device for its experts, and sums the results."""
    mesh, axis, count = (
        jax.sharding.get_abstract_mesh(),
        LOGICAL["expert"],
        tree[0]["gate"].shape[-3],
    )
    if mesh.empty or not set(MESH_AXES) <= set(mesh.axis_names):
        return mlp(x, experts, weights, *tree, first=0, layer=layer)
    batch = BATCH if divides(x.shape[0], BATCH) else None
    split = axis if axis and divides(count, (axis,)) else None

    def local(
        x: jax.Array,
        experts: jax.Array,
        weights: jax.Array,
        tree: tuple[Matrices, Adapters],
        layer: jax.Array | None,
    ) -> jax.Array:
        first = 0 if split is None else jax.lax.axis_index(split) * tree[0]["gate"].shape[-3]
        y = mlp(x, experts, weights, *tree, first=first, layer=layer)
        return y if split is None else jax.lax.psum(y, split)

    held = P(split) if layer is None else P(None, split)
    specs = (P(batch), P(batch), P(batch), (held, P(split)), P())
    return jax.shard_map(local, in_specs=specs, out_specs=P(batch), check_vma=False)(
        x, experts, weights, tree, layer
    )


def apply_experts(
    x: Float[Array, "B L E"],
    experts: Int[Array, "B L k"],
    weights: Float[Array, "B L k"],
    matrices: Matrices,
    adapters: Adapters,
    first: int | Int[Array, ""],
    kernel: Kernel,
    layer: Int[Array, ""] | None = None,
) -> Float[Array, "B L E"]:
    """Computes the weighted sum of some of the experts.

    Args:
        x: inputs.
        experts: the experts of each token.
        weights: their weights.
        matrices: those of the experts first ... first + X - 1: [X, ...], or [layers, X, ...].
        adapters: of the matrices that have one, [X, ...].
        first: the first expert in `matrices`.
        kernel: the grouped product.
        layer: index of the layer, if `matrices` holds all layers.

    Returns:
        The sums in float32, without experts that are held elsewhere.
    """
    k, count = experts.shape[-1], matrices["gate"].shape[-3]
    local = experts.reshape(-1) - first
    held = (local >= 0) & (local < count)
    # Rows of experts that are held elsewhere come last, behind all groups.
    key = jnp.where(held, local, count)
    order = jnp.argsort(key, stable=True)
    row_group = jnp.minimum(key[order], count - 1)
    inverse = jnp.argsort(order)
    # Another method of searchsorted would be a loop.
    ends = jnp.searchsorted(key[order], jnp.arange(count + 1), method="compare_all")
    sizes = groups = jnp.diff(ends).astype(jnp.int32)
    if layer is not None:
        # One list of all layers' experts, the other layers' without a row. The kernel skips those,
        # whereas a slice of the stack would be copied for it.
        groups = jnp.zeros(matrices["gate"].shape[0] * count, jnp.int32)
        groups = jax.lax.dynamic_update_slice_in_dim(groups, sizes, layer * count, 0)
        row_group = row_group + layer * count
        matrices = {
            name: matrix.reshape(-1, *matrix.shape[2:]) for name, matrix in matrices.items()
        }

    def dot(name: str, x: jax.Array) -> jax.Array:
        y = kernel(x, matrices[name], groups)
        if name + SCALE in matrices:
            y = rescale(y, matrices[name + SCALE][row_group])
        if name in adapters:
            a, b = (m.astype(x.dtype) for m in (adapters[name].a, adapters[name].b))
            y = y + kernel(kernel(x, a, sizes), b, sizes) * adapters[name].scale
        return y

    rows = _take_rows(x.reshape(-1, x.shape[-1]), order // k, inverse.reshape(-1, k))
    y = dot("down", nn.silu(dot("gate", rows)) * dot("up", rows))
    y = _take_rows(y, inverse, order[:, None])
    y = jnp.where(held[:, None], y, 0).astype(jnp.float32).reshape(*experts.shape, -1)
    return jnp.sum(y * weights[..., None], axis=-2)


@jax.custom_vjp
def _take_rows(x: jax.Array, index: jax.Array, back: jax.Array) -> jax.Array:
    """Returns x[index]. back[i] lists the places of row i."""
    return x[index]


# With `back` the gradient is a gather too, not a scatter.
_take_rows.defvjp(
    lambda x, index, back: (x[index], back),
    lambda back, g: (g[back].sum(axis=1), None, None),
)


def _ragged(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
    return jax.lax.ragged_dot(x, w.astype(x.dtype), sizes)


def _stacked(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
    # With a cast, TPUs would write a converted copy of int8 matrices.
    return jax.lax.ragged_dot(x, w, sizes, preferred_element_type=x.dtype)


@jax.custom_vjp
def _tiles(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
    """Computes the grouped product in a loop over tiles of rows.

    Each tile belongs to one expert. On CPUs ragged_dot multiplies every row by every expert's
    matrix. Rows behind all groups are undefined, as in ragged_dot.
    """
    size = _tile_size(x.shape[0], w.shape[0])
    expert, start, _, used = _tiling(sizes, x.shape[0], size)
    x = jnp.pad(x, ((0, size), (0, 0)))

    def tile(i: jax.Array, y: jax.Array) -> jax.Array:
        # Rows of the next expert at the tile's end are overwritten by the next tile.
        matrix = jnp.asarray(w)[expert[i]].astype(x.dtype)
        part = jax.lax.dynamic_slice_in_dim(x, start[i], size) @ matrix
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
    """Returns the rows of a tile."""
    # A power of two near half the mean group wastes few rows.
    size = 8
    while size < 64 and 4 * size * experts <= rows:
        size *= 2
    return size


def _tiling(
    sizes: jax.Array, rows: int, size: int
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Returns (expert, first row, end row) of each tile, and their number."""
    last, ends = jnp.cumsum(-(-sizes // size)), jnp.cumsum(sizes)
    tile = jnp.arange((rows + min(rows, sizes.shape[0]) * (size - 1)) // size)
    expert = jnp.minimum(jnp.searchsorted(last, tile, side="right"), sizes.shape[0] - 1)
    nth = tile - jnp.where(expert > 0, last[expert - 1], 0)
    start = ends[expert] - sizes[expert] + nth * size
    return expert, start, ends[expert], last[-1]


# stacked: XLA's grouped product. Decoding with a cache passes it all layers' experts at once (see
# `apply_experts`). On TPUs it visits only the tiles of groups that have rows. Other platforms
# would multiply the whole stack.
KERNELS: dict[str, Kernel] = {"ragged": _ragged, "stacked": _stacked, "tiles": _tiles}


def default_kernel() -> str:
    """Selects the kernel for the platform: tiles on CPUs, otherwise XLA's."""
    return {"cpu": "tiles", "tpu": "stacked"}.get(platform(), "ragged")
