"""The parts that all backbones share, and the protocols that they satisfy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import TOY, apply
from tests.llada2_helpers import TINY2, random_params
from xflow_jax.models.base import BackboneBase
from xflow_jax.models.config import LLaDA2Config, LLaDAConfig
from xflow_jax.models.factory import abstract_params, build
from xflow_jax.models.lm_head import make_head
from xflow_jax.models.presets import PRESETS
from xflow_jax.types import Backbone, ModelConfig

CONFIGS = {
    "llada": TOY,
    "llada, biases": dataclasses.replace(TOY, include_bias=True),
    "llada, tied": dataclasses.replace(TOY, weight_tying=True),
    "llada2": TINY2,
    "llada2, tied": dataclasses.replace(TINY2, tie_word_embeddings=True),
}


@pytest.mark.parametrize("config", [*PRESETS.values(), *CONFIGS.values()])
def test_backbones_and_configs_satisfy_the_protocols(config):
    assert isinstance(config, ModelConfig)
    model = build(config)
    assert isinstance(model, Backbone) and isinstance(model, BackboneBase)
    assert model.clone(param_dtype=jnp.bfloat16).param_dtype == jnp.bfloat16


def test_a_protocol_computes_no_property():
    without_mask = dataclasses.replace(TINY2, mask_token_id=None)
    assert isinstance(without_mask, ModelConfig) and isinstance(build(without_mask), Backbone)
    assert not isinstance(object(), ModelConfig)


def test_dense_families_have_the_vocabulary_of_experts():
    def expert_sizes(config: LLaDAConfig | LLaDA2Config) -> tuple[int | None, ...]:
        sizes = (config.num_experts, config.moe_mlp_dim, config.shared_mlp_dim)
        return (config.num_dense_layers, config.dense_mlp_dim, *sizes)

    assert expert_sizes(TOY) == (2, 24, None, 0, 0) and TOY.num_experts_per_tok == 0
    assert expert_sizes(TINY2) == (1, 48, 8, 24, 24) and TINY2.num_experts_per_tok == 2
    dense = dataclasses.replace(TINY2, num_experts=None)
    assert expert_sizes(dense)[:3] == (3, 48, None)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_decoders_head_is_the_models(name):
    config = CONFIGS[name]
    model = build(config)
    params = random_params(model)
    head = make_head(params)
    assert (head.rows, head.tied) == (config.vocab_rows, config.tie_embeddings)
    assert head.kernel.shape == (config.hidden_size, config.vocab_rows)
    assert (head.bias is not None) == config.head_bias
    h = jax.random.normal(jax.random.key(0), (2, 3, config.hidden_size))
    logits = apply(model, params, h, method="head")
    np.testing.assert_allclose(head(h, 0, head.rows), logits, atol=1e-5)
    np.testing.assert_allclose(head(h, 3, 5), logits[..., 3:8], atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_parts_take_numpy_arrays(name):
    model = build(CONFIGS[name])
    params = jax.tree.map(np.asarray, random_params(model))
    tokens, mask = np.arange(12).reshape(2, 6), np.ones((2, 6), bool)
    x = apply(model, params, tokens, method="embed")
    h = apply(model, params, np.asarray(x), mask, method="hidden")
    logits = apply(model, params, h, method="head")
    whole = apply(model, params, tokens, mask)
    np.testing.assert_allclose(logits, whole, atol=1e-5)


def test_parameters_of_a_stack_lead_with_the_layers():
    tree = abstract_params(build(TINY2))
    assert {leaf.shape[0] for leaf in jax.tree.leaves(tree["dense"])} == {1}
    assert {leaf.shape[0] for leaf in jax.tree.leaves(tree["blocks"])} == {2}
    assert build(TINY2).stacks == {"dense": 1, "blocks": 2}
    assert build(TOY).stacks == {"blocks": 2}
