"""Configurations of released models, and of a small one for measurements."""

from __future__ import annotations

import dataclasses

from xflow_jax.models.config import Config
from xflow_jax.models.dream_config import DreamConfig
from xflow_jax.models.fast_dllm_config import FastDLLMConfig
from xflow_jax.models.illada_config import ILLaDAConfig
from xflow_jax.models.llada2_config import RELEASED_MASK, RELEASED_ROWS, LLaDA2Config
from xflow_jax.models.llada_config import LLaDAConfig
from xflow_jax.models.lladamoe_config import LLaDAMoEConfig
from xflow_jax.models.sdar_config import SDARConfig

_MINI = LLaDA2Config(
    hidden_size=2048,
    num_hidden_layers=20,
    num_attention_heads=16,
    num_key_value_heads=4,
    head_dim=128,
    intermediate_size=5120,
    first_k_dense_replace=1,
    num_experts=256,
    num_experts_per_tok=8,
    moe_intermediate_size=512,
    num_shared_experts=1,
    n_group=8,
    topk_group=4,
    routed_scaling_factor=2.5,
    vocab_size=RELEASED_ROWS,
    mask_token_id=RELEASED_MASK,
    eos_token_id=156892,
    pad_token_id=156892,
    rope_theta=600000.0,
    rms_norm_eps=1e-6,
)

_FLASH = dataclasses.replace(
    _MINI,
    hidden_size=4096,
    num_hidden_layers=32,
    num_attention_heads=32,
    intermediate_size=9216,
    moe_intermediate_size=1024,
)

_SDAR_4B = SDARConfig(
    hidden_size=2560,
    intermediate_size=9728,
    num_hidden_layers=36,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    vocab_size=151936,
    mask_token_id=151669,
    eos_token_id=151643,
    pad_token_id=151643,
    rope_theta=1000000.0,
    rms_norm_eps=1e-6,
)

_FAST_DLLM = FastDLLMConfig(
    hidden_size=3584,
    intermediate_size=18944,
    num_hidden_layers=28,
    num_attention_heads=28,
    num_key_value_heads=4,
    vocab_size=152064,
    mask_token_id=151665,
    eos_token_id=151645,
    rope_theta=1000000.0,
    rms_norm_eps=1e-6,
)

PRESETS: dict[str, Config] = {
    "llada-8b": LLaDAConfig(
        d_model=4096,
        n_layers=32,
        n_heads=32,
        n_kv_heads=32,
        mlp_hidden_size=12288,
        vocab_size=126464,
        embedding_size=126464,
        mask_token_id=126336,
        eos_token_id=126081,
        pad_token_id=126081,
        max_sequence_length=4096,
        rope_theta=500000.0,
        rms_norm_eps=1e-5,
    ),
    # The width of the MLP follows from the published 7.6 B parameters. The end token, the rotary
    # base and the epsilon, which change no size, are those of a released config.json alone.
    "illada-8b": ILLaDAConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=155136,
        mask_token_id=5,
        eos_token_id=2,
        tie_word_embeddings=True,
        max_position_embeddings=8192,
        rope_theta=500000.0,
        rms_norm_eps=1e-5,
    ),
    # Dream-Coder and DiffuCoder have the same sizes.
    "dream-7b": DreamConfig(
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        vocab_size=152064,
        mask_token_id=151666,
        eos_token_id=151643,
        pad_token_id=151643,
        max_position_embeddings=131072,
        rope_theta=1000000.0,
        rms_norm_eps=1e-6,
    ),
    # The head of SDAR-4B is not tied, unlike that of its base model, and so it is here.
    # TraDo-4B and TraDo-8B have the sizes of SDAR-4B and SDAR-8B.
    "sdar-1.7b": dataclasses.replace(
        _SDAR_4B,
        hidden_size=2048,
        intermediate_size=6144,
        num_hidden_layers=28,
        num_attention_heads=16,
    ),
    "sdar-4b": _SDAR_4B,
    "sdar-8b": dataclasses.replace(_SDAR_4B, hidden_size=4096, intermediate_size=12288),
    "fast-dllm-v2-7b": _FAST_DLLM,
    "fast-dllm-v2-1.5b": dataclasses.replace(
        _FAST_DLLM,
        hidden_size=1536,
        intermediate_size=8960,
        num_attention_heads=12,
        num_key_value_heads=2,
        head_dim=0,
        vocab_size=151936,
        tie_word_embeddings=True,
    ),
    "llada-moe-7b": LLaDAMoEConfig(
        hidden_size=2048,
        num_hidden_layers=16,
        num_attention_heads=16,
        num_key_value_heads=16,
        num_experts=64,
        num_experts_per_tok=8,
        expert_intermediate_size=1024,
        vocab_size=RELEASED_ROWS,
        mask_token_id=RELEASED_MASK,
        eos_token_id=156892,
        pad_token_id=156892,
        rope_theta=50000.0,
        rms_norm_eps=1e-5,
        max_position_embeddings=8192,
    ),
    "llada2-mini": _MINI,
    "llada2-flash": _FLASH,
    # LLaDA2.0-CAP has other weights only, LLaDA2.1 longer texts as well.
    "llada2.1-mini": dataclasses.replace(_MINI, max_position_embeddings=32768),
    "llada2.1-flash": dataclasses.replace(_FLASH, max_position_embeddings=32768),
    # Not a released model: a middle size for measurements on CPUs.
    "llada2-20m": dataclasses.replace(
        _MINI,
        hidden_size=256,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        intermediate_size=1024,
        num_experts=16,
        num_experts_per_tok=2,
        moe_intermediate_size=256,
        n_group=4,
        topk_group=2,
        vocab_size=4096,
        mask_token_id=4095,
        eos_token_id=4094,
        pad_token_id=4094,
    ),
}
