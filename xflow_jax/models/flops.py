"""The programs that `xflow plan` compiles, which are the ones that run, and what they must cost at the least."""

from __future__ import annotations

from typing import Any


def forward_flops(config: Any, rows: float, queries: float, keys: float) -> float:
    """FLOPs of the matrix products of all layers, for rows x queries tokens that attend to `keys` each; with a mixture
    of experts, of the experts that a token is sent to."""
    attention = (
        4 * rows * queries * keys * head_width(config) * num_heads(config) * config.num_layers
    )
    return 2 * rows * queries * matrix_parameters(config)[0] + attention


def touched_parameters(config: Any, tokens: float) -> float:
    """Parameters of the layers' matrices that so many tokens meet."""
    active, every = matrix_parameters(config)
    if active == every:
        return every
    k, experts = config.num_experts_per_tok, config.num_experts
    routed = (every - active) / (experts - k) * experts
    return every - routed * (1 - k / experts) ** tokens


def matrix_parameters(config: Any) -> tuple[int, int]:
    """Parameters of the layers' matrices: (those that each token meets, all of them)."""
    e = config.hidden_size
    if config.family == "llada":
        kv = config.kv_heads * config.head_dim
        each = config.num_layers * (2 * e * e + 2 * e * kv + 3 * e * config.mlp_width)
        return each, each
    width = config.head_width
    attention = 2 * e * width * (config.num_attention_heads + config.kv_heads)
    dense, sparse = config.dense_layers, config.num_layers - config.dense_layers
    shared = config.num_layers * attention + dense * 3 * e * config.intermediate_size
    if sparse:
        shared += sparse * (e * config.num_experts + 3 * e * config.shared_width)
    expert = 3 * e * (config.moe_intermediate_size or 0)
    met = config.num_experts_per_tok if sparse else 0
    return shared + sparse * met * expert, shared + sparse * (config.num_experts or 0) * expert


def num_heads(config: Any) -> int:
    return config.n_heads if config.family == "llada" else config.num_attention_heads


def head_width(config: Any) -> int:
    return config.head_dim if config.family == "llada" else config.head_width


def mlp_width(config: Any) -> int:
    if config.family == "llada":
        return config.mlp_width
    return max(
        config.intermediate_size or 0,
        config.num_experts_per_tok * (config.moe_intermediate_size or 0),
    )


def tensor_split_sizes(config: Any) -> list[int]:
    if config.family == "llada":
        return [config.n_heads, config.kv_heads, config.mlp_width]
    sizes = [config.num_attention_heads, config.kv_heads]
    sizes += [config.intermediate_size] if config.dense_layers else []
    return sizes + (
        [config.num_experts, config.shared_width] if config.dense_layers < config.num_layers else []
    )
