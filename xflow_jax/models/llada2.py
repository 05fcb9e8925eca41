"""LLaDA2.0, and LLaDA-MoE: transformers with a mixture of experts.

Some dense layers come first, then sparse ones. Both stacks are scanned.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import ArrayLike, DTypeLike

from xflow_jax.models import kv_cache
from xflow_jax.models.attention import attend
from xflow_jax.models.base import BackboneBase
from xflow_jax.models.layers import Linear, RMSNorm, RopeTables, apply_rope
from xflow_jax.models.lladamoe_config import LLaDAMoEConfig
from xflow_jax.models.moe import (
    Experts,
    Matrices,
    MoEConfig,
    Router,
    default_kernel,
    route,
    route_softmax,
)
from xflow_jax.models.quantization import INT8, SCALE
from xflow_jax.parallel import LOGICAL, constrain_batch
from xflow_jax.types import Array, Bool, Float, Int


class SharedMLP(nn.Module):
    """Shared experts: one MLP that every token passes.

    Attributes:
        width: width of the MLP.
        out_std: standard deviation of a fresh output matrix.
        dtype: dtype of the computation.
        param_dtype: dtype of fresh parameters.
    """

    width: int
    out_std: float
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*B E"]) -> Float[Array, "*B E"]:
        """Applies the gated MLP."""
        linear = partial(Linear, dtype=self.dtype, param_dtype=self.param_dtype)
        gate = linear(self.width, name="ff_proj")(x)
        up = linear(self.width, name="up_proj")(x)
        return linear(x.shape[-1], init_std=self.out_std, name="ff_out")(nn.silu(gate) * up)


class Block(nn.Module):
    """Pre-norm layer. The other fields are those of `LLaDA2`.

    Attributes:
        sparse: True for experts, False for a dense MLP.
    """

    config: MoEConfig
    sparse: bool
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32
    attention: str | None = None
    experts_kernel: str | None = None

    def setup(self) -> None:
        """Makes the submodules."""
        c = self.config
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        linear = partial(Linear, dtype=self.dtype, param_dtype=self.param_dtype)
        norm = partial(RMSNorm, c.rms_norm_eps, c.norm_full_precision, **types)
        out_std = 0.02 / (2 * c.num_layers) ** 0.5
        self.attn_norm = norm()
        self.q_proj = linear(c.num_heads * c.head_dim, c.use_qkv_bias)
        self.k_proj = linear(c.num_kv_heads * c.head_dim, c.use_qkv_bias)
        self.v_proj = linear(c.num_kv_heads * c.head_dim, c.use_qkv_bias)
        if c.use_qk_norm:
            self.q_norm, self.k_norm = norm(), norm()
        self.attn_out = linear(c.hidden_size, c.use_bias, init_std=out_std)
        self.ff_norm = norm()
        if self.sparse:
            experts, kernel = c.num_experts or 0, self.experts_kernel
            scored_in = self.dtype if c.softmax_router else jnp.float32
            self.router = Router(experts, self.param_dtype, c.router_bias, scored_in)
            self.experts = Experts(experts, c.moe_mlp_dim, out_std=out_std, kernel=kernel, **types)
            if c.shared_mlp_dim:
                self.shared = SharedMLP(c.shared_mlp_dim, out_std, **types)
        else:
            self.ff_proj, self.up_proj = linear(c.dense_mlp_dim), linear(c.dense_mlp_dim)
            self.ff_out = linear(c.hidden_size, init_std=out_std)

    def __call__(
        self,
        x: Float[Array, "B L E"],
        rope: RopeTables,
        allowed: Bool[Array, "#B 1 #L M"] | None,
        cached: kv_cache.LayerCache | None,
        experts: Matrices | None,
        layer: Int[Array, ""],
    ) -> tuple[Float[Array, "B L E"], kv_cache.LayerCache | None]:
        """Applies attention and the MLP.

        Args:
            x: the residual stream.
            rope: cos and sin of the positions.
            allowed: pairs (query, key) that may attend. None: all.
            cached: keys and values of earlier positions, or None.
            experts: the experts' matrices of all layers (`moe.Experts`), or None.
            layer: index of this layer in its stack.

        Returns:
            (residual stream, the new keys and values or None without a cache).
        """
        h = self.attn_norm(x)
        q, k, v = (self._heads(proj(h)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if self.config.use_qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if (bound := self.config.clip_qkv) is not None:
            q, k, v = (jnp.clip(x, -bound, bound) for x in (q, k, v))
        q, k = apply_rope(q, *rope), apply_rope(k, *rope)
        keys, values, new = kv_cache.extend_keys(cached, k, v)
        h = attend(q, keys, values, allowed, self.attention)
        x = x + self.attn_out(h.reshape(*h.shape[:2], -1))
        return constrain_batch(x + self.mlp(self.ff_norm(x), experts, layer)), new

    def _heads(self, x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:2], -1, self.config.head_dim)

    def mlp(
        self,
        x: Float[Array, "B L E"],
        experts: Matrices | None = None,
        layer: Int[Array, ""] | None = None,
    ) -> Float[Array, "B L E"]:
        """Applies the dense MLP, or the routed and shared experts."""
        if not self.sparse:
            return self.ff_out(nn.silu(self.ff_proj(x)) * self.up_proj(x))
        y = self.experts(x, *self.route(x), experts, layer)
        return y + self.shared(x) if self.config.shared_mlp_dim else y

    def route(self, x: Float[Array, "B L E"]) -> tuple[Int[Array, "B L k"], Float[Array, "B L k"]]:
        """Chooses the experts of each token, and their weights."""
        logits, bias = self.router(x)
        if isinstance(self.config, LLaDAMoEConfig):
            return route_softmax(logits, bias, self.config.num_experts_per_tok)
        assert bias is not None
        return route(logits, bias, self.config)


class LLaDA2(BackboneBase):
    """LLaDA2.0, with the fields and methods of `BackboneBase`.

    Attributes:
        experts_kernel: a name in `moe.KERNELS`. None: the platform's.
    """

    config: MoEConfig
    experts_kernel: str | None = None

    layer_class = Block
    layer_axes = (nn.broadcast, 0)

    @property
    def stacks(self) -> dict[str, int]:
        """Number of layers of each stack, in order, without empty stacks."""
        dense, layers = self.config.num_dense_layers, self.config.num_layers
        counts = {"dense": dense, "blocks": layers - dense}
        return {name: count for name, count in counts.items() if count}

    def layer_fields(self, stack: str) -> dict[str, Any]:
        """Returns further fields of the layers of a stack."""
        return {"sparse": stack == "blocks", "experts_kernel": self.experts_kernel}

    def layer_inputs(self, stack: str, has_cache: bool) -> tuple[Matrices | None, jax.Array]:
        """Returns the experts' matrices or None, and each layer's index.

        The matrices of all layers are passed only in decoding, since the gradient of a layer would
        be as large as the stack. No device may have to gather or cast more than it holds.
        """
        experts = self._stacked_experts() if stack == "blocks" and has_cache else None
        return experts, jnp.arange(self.stacks[stack])

    def _stacked_experts(self) -> Matrices | None:
        mesh = jax.sharding.get_abstract_mesh()
        is_gathered = mesh.shape.get(LOGICAL["embed"], 1) > 1
        if (self.experts_kernel or default_kernel()) != "stacked" or is_gathered:
            return None
        stack = self.variables["params"]["blocks"]["experts"]
        matrices = [x for name, x in stack.items() if not name.endswith(SCALE)]
        return dict(stack) if all(x.dtype in (self.dtype, INT8) for x in matrices) else None


class LLaDAMoE(LLaDA2):
    """LLaDA-MoE, with the fields and methods of `LLaDA2`.

    Attributes:
        as_released: ignore padding, as the released code does, to compare with it.
    """

    as_released: bool = False

    def hidden(
        self,
        x: Float[ArrayLike, "B L E"],
        mask: Bool[ArrayLike, "B L"] | None = None,
        block_length: int | None = None,
        allowed: Bool[ArrayLike, "#B L L"] | None = None,
        positions: Int[ArrayLike, " L"] | None = None,
    ) -> Float[Array, "B L E"]:
        """Computes hidden states after the final norm, as `BackboneBase.hidden`."""
        mask = None if self.as_released else mask
        return super().hidden(x, mask, block_length, allowed, positions)
