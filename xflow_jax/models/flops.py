"""The programs that `xflow plan` compiles, which are the ones that run, and what they must cost at the least."""

from __future__ import annotations

from typing import Any


def forward_flops(config: Any, rows: float, queries: float, keys: float) -> float:
    """FLOPs of the matrix products of all layers, for rows x queries tokens that attend to `keys` each; with a mixture
    of experts, of the experts that a token is sent to."""
    attention = 4 * rows * queries * keys * config.head_dim * config.num_heads * config.num_layers
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
        kv = config.num_kv_heads * config.head_dim
        each = config.num_layers * (2 * e * e + 2 * e * kv + 3 * e * config.mlp_dim)
        return each, each
    width = config.head_dim
    attention = 2 * e * width * (config.num_attention_heads + config.num_kv_heads)
    dense, sparse = config.num_dense_layers, config.num_layers - config.num_dense_layers
    shared = config.num_layers * attention + dense * 3 * e * config.intermediate_size
    if sparse:
        shared += sparse * (e * config.num_experts + 3 * e * config.shared_mlp_dim)
    expert = 3 * e * (config.moe_intermediate_size or 0)
    met = config.num_experts_per_tok if sparse else 0
    return shared + sparse * met * expert, shared + sparse * (config.num_experts or 0) * expert


def tensor_split_sizes(config: Any) -> list[int]:
    if config.family == "llada":
        return [config.n_heads, config.num_kv_heads, config.mlp_dim]
    sizes = [config.num_attention_heads, config.num_kv_heads]
    sizes += [config.intermediate_size] if config.num_dense_layers else []
    return sizes + (
        [config.num_experts, config.shared_mlp_dim]
        if config.num_dense_layers < config.num_layers
        else []
    )
