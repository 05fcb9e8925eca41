"""The compiled program of a supervised fine-tuning.

`train.sft` runs the result of `sft_program`, and `xflow plan` lowers the same program.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from xflow_jax.errors import require
from xflow_jax.models import update_flops
from xflow_jax.parallel import batch_sharding
from xflow_jax.training.program import (
    TrainProgram,
    check_batch,
    make_program,
    training_model,
    training_optimizer,
)
from xflow_jax.training.sft import SFTConfig, find_block_length, make_sft_loss, make_sft_step
from xflow_jax.types import ModelConfig


def sft_program(model_config: ModelConfig, config: SFTConfig, mesh: Mesh) -> TrainProgram:
    """Builds the program of a supervised fine-tuning.

    Args:
        model_config: configuration of the model.
        config: configuration of the fine-tuning.
        mesh: a mesh of any size. Its devices may be descriptions only
            (`jax.experimental.topologies`).

    Returns:
        The program. Nothing is compiled yet. Its functions take batches of every length, and its
        abstract arguments have the longest one.

    Raises:
        UserError: if the lengths do not fit the model, if the mesh does not divide the batch or
            the model, or if a LoRA target is not a matrix of the model.
    """
    check_canvas(model_config, config)
    check_batch(config, mesh)
    model, optimizer = training_model(model_config, config), training_optimizer(config)
    loss_fn = make_sft_loss(model, config)
    copies = 2 if model_config.is_block_causal else 1  # a noised and a clean one pass
    shape, sharding = (config.batch_size, config.lengths[-1]), batch_sharding(mesh)
    return make_program(
        model,
        config,
        mesh,
        optimizer,
        step=make_sft_step(model, optimizer, config),
        measure=lambda *args: loss_fn(*args)[1],
        batch={
            "tokens": jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding),
            "response": jax.ShapeDtypeStruct(shape, jnp.bool, sharding=sharding),
        },
        flops=lambda length: update_flops(
            model_config, config.batch_size, length * copies, length, 3, config.tune == "lora"
        ),
    )


def check_canvas(model_config: ModelConfig, config: SFTConfig) -> None:
    """Checks that the lengths and blocks fit the model.

    Args:
        model_config: configuration of the model.
        config: configuration of the fine-tuning.

    Raises:
        UserError: if they do not.
    """
    find_block_length(model_config, config)
    longest = config.lengths[-1]
    require(
        longest <= model_config.max_length,
        f"the {longest} of lengths exceeds the model's {model_config.max_length} positions",
    )
