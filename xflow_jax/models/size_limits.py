"""Limits on the sizes of a model, checked before it is traced."""

from __future__ import annotations

from xflow_jax.errors import require
from xflow_jax.types import ModelConfig

# Far above every model, and low enough that shapes and lists of tensors stay small.
MOST_LAYERS = 10_000
MOST_WIDTH = 2**24
MOST_EXPERTS = 2**20  # of all layers together


def check_sizes(config: ModelConfig, where: str = "") -> None:
    """Checks that the sizes of a model are possible.

    Args:
        config: the configuration.
        where: the file, for the message.

    Raises:
        UserError: if there are too many layers or experts, or if a width is too large.
    """
    experts = (config.num_experts or 0) * max(config.num_layers - config.num_dense_layers, 0)
    sizes = {
        "number of layers": (config.num_layers, MOST_LAYERS),
        "number of heads": (config.num_heads, MOST_WIDTH),
        "width of a head": (config.head_dim, MOST_WIDTH),
        "width of the model": (config.hidden_size, MOST_WIDTH),
        "width of the MLP": (max(config.mlp_dim, config.dense_mlp_dim), MOST_WIDTH),
        "width of an expert": (max(config.moe_mlp_dim, config.shared_mlp_dim), MOST_WIDTH),
        "size of the vocabulary": (config.vocab_rows, MOST_WIDTH),
        "number of positions": (config.max_length, MOST_WIDTH),
        "number of experts in all layers": (experts, MOST_EXPERTS),
    }
    prefix = f"{where}: " if where else ""
    for name, (size, most) in sizes.items():
        # The number may have thousands of digits.
        require(size <= most, f"{prefix}the {name} is more than {most}, which is not possible")
