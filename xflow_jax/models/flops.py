"""Sizes of a model's matrices, and the FLOPs of a forward pass."""

from __future__ import annotations

from xflow_jax.types import ModelConfig


def forward_flops(
    config: ModelConfig, rows: float | int, queries: float | int, keys: float | int
) -> float | int:
    """Counts the FLOPs of the matrix products of all layers.

    Args:
        config: the model.
        rows: rows of the batch.
        queries: tokens of a row that pass.
        keys: tokens that each of them attends to.

    Returns:
        The FLOPs. For a mixture of experts, only the experts that a token is sent to count.
    """
    attention = 4 * rows * queries * keys * config.head_dim * config.num_heads * config.num_layers
    return 2 * rows * queries * matrix_parameters(config)[0] + attention


def update_flops(
    config: ModelConfig, rows: int, length: int, predicted: int, head_products: int, frozen: bool
) -> float:
    """Counts the model FLOPs of an update.

    These are the matrix products of the forward and the backward pass. What the backward pass
    recomputes to save memory does not count, nor do adapters.

    Args:
        config: the model.
        rows: rows of the batch.
        length: tokens of a row that pass.
        predicted: tokens of a row that the head computes.
        head_products: products of the loss with the matrix of the head or the embedding table, in
            both passes and with the gradient of the head.
        frozen: True if the matrices get no gradients, as with LoRA.
    """
    forward = forward_flops(config, rows, length, length)
    matrices = 2 * rows * length * matrix_parameters(config)[0]
    product = 2 * rows * predicted * config.hidden_size * config.vocab_rows
    return float(3 * forward - frozen * matrices + (head_products - frozen) * product)


def touched_parameters(config: ModelConfig, tokens: float | int) -> float | int:
    """Estimates the number of matrix parameters that a batch of tokens reads.

    Each token is assumed to draw its k of X experts evenly and independently.

    Args:
        config: the model.
        tokens: number of tokens.

    Returns:
        The expected number, of the layers' matrices alone.
    """
    active, every = matrix_parameters(config)
    if config.num_experts is None or active == every:
        return every
    k, experts = config.num_experts_per_tok, config.num_experts
    routed = (every - active) / (experts - k) * experts
    return every - routed * (1 - k / experts) ** tokens


def matrix_parameters(config: ModelConfig) -> tuple[int, int]:
    """Counts the parameters of the layers' matrices.

    Returns:
        (those that each token meets, all).
    """
    e, experts = config.hidden_size, config.num_experts or 0
    attention = 2 * e * config.head_dim * (config.num_heads + config.num_kv_heads)
    dense, sparse = config.num_dense_layers, config.num_layers - config.num_dense_layers
    shared = config.num_layers * attention + dense * 3 * e * config.dense_mlp_dim
    shared += sparse * (e * experts + 3 * e * config.shared_mlp_dim)
    expert = sparse * 3 * e * config.moe_mlp_dim
    return shared + config.num_experts_per_tok * expert, shared + experts * expert


def tensor_split_sizes(config: ModelConfig) -> list[int]:
    """Lists the dimensions that the mesh axis `tensor` splits."""
    sizes = [config.num_heads, config.num_kv_heads]
    if config.num_dense_layers:
        sizes.append(config.dense_mlp_dim)
    if config.num_experts is not None and config.num_dense_layers < config.num_layers:
        sizes += [config.num_experts, config.shared_mlp_dim]
    return sizes
