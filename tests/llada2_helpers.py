"""A small LLaDA2.0 configuration and parameters for it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from xflow_jax.config import LLaDA2Config
from xflow_jax.models import abstract_params
from xflow_jax.sharding import path_name

TINY2 = LLaDA2Config(
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=40,
    mask_token_id=39,
    pad_token_id=1,
    intermediate_size=48,
    first_k_dense_replace=1,
    num_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=24,
    num_shared_experts=1,
    n_group=4,
    topk_group=2,
)


def random_params(model: nn.Module, seed: int = 0) -> dict[str, Any]:
    """Parameters of some strength, drawn by NumPy, which does not have to be compiled."""
    rng = np.random.default_rng(seed)

    def leaf(path: tuple[Any, ...], x: jax.ShapeDtypeStruct) -> jax.Array:
        draw = 0.2 * rng.normal(size=x.shape)
        return jnp.asarray(draw + 1 if path_name(path).endswith("scale") else draw, x.dtype)

    return jax.tree_util.tree_map_with_path(leaf, abstract_params(model))
