"""A small LLaDA2.0 configuration and parameters for it."""

from __future__ import annotations

import dataclasses
import functools
import random
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.helpers import GOLDENS
from xflow_jax.lm import LM, load
from xflow_jax.models.config import LLaDA2Config
from xflow_jax.models.factory import abstract_params, build
from xflow_jax.parallel.partitioning import path_name
from xflow_jax.types import Backbone

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


def random_config(rng: random.Random) -> LLaDA2Config:
    """Draws a small configuration."""
    groups = rng.choice([1, 2, 4])
    size = rng.choice([2, 4])
    kept = rng.randint(1, groups)
    heads = rng.choice([2, 4])
    dense = rng.choice([0, 1, 2])
    return LLaDA2Config(
        hidden_size=rng.choice([24, 32]),
        num_hidden_layers=dense + rng.choice([0, 1, 2] if dense else [1, 2]),
        num_attention_heads=heads,
        num_key_value_heads=rng.choice([1, 2, heads]),
        head_dim=rng.choice([8, 16]),
        partial_rotary_factor=rng.choice([0.25, 0.5, 1.0]),
        rope_theta=rng.choice([10000.0, 600000.0]),
        vocab_size=40,
        pad_token_id=1,
        mask_token_id=39,
        intermediate_size=40,
        first_k_dense_replace=dense,
        num_experts=groups * size,
        n_group=groups,
        topk_group=kept,
        num_experts_per_tok=rng.randint(1, min(kept * size, 4)),
        moe_intermediate_size=16,
        num_shared_experts=rng.choice([None, 0, 1, 2]),
        use_qkv_bias=rng.random() < 0.3,
    )


def random_params(model: Backbone, seed: int = 0) -> dict[str, Any]:
    """Draws parameters of some strength by NumPy, which needs no compilation."""
    rng = np.random.default_rng(seed)

    def leaf(path: jax.tree_util.KeyPath, x: jax.ShapeDtypeStruct) -> jax.Array:
        draw = 0.2 * rng.normal(size=x.shape)
        return jnp.asarray(draw + 1 if path_name(path).endswith("scale") else draw, x.dtype)

    return jax.tree_util.tree_map_with_path(leaf, abstract_params(model))


@functools.cache
def llada2_tiny() -> LM:
    """Loads the golden checkpoint in float32, with a mask token."""
    lm = load(GOLDENS / "llada2_tiny")
    config = dataclasses.replace(lm.config, mask_token_id=310)
    return dataclasses.replace(lm, config=config, model=build(config))


def toy2(seed: int = 0, config: LLaDA2Config = TINY2, **fields: object) -> LM:
    """Returns a random model with logits that differ enough for every rule."""
    model = build(config, **fields)
    params = random_params(model, seed)
    params["ff_out"]["kernel"] *= 4
    return LM(model, config, params, None)
