"""The compiled programs of an alignment, with all shardings.

`train.align` runs the result of `align_program`, and `xflow plan` lowers the same programs.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from xflow_jax.errors import require
from xflow_jax.models import state_shardings, update_flops
from xflow_jax.parallel import batch_sharding
from xflow_jax.training.alignment import AlignmentConfig, make_alignment_loss
from xflow_jax.training.alignment_step import make_align_step
from xflow_jax.training.block_copies import canvas_length, decode_rows
from xflow_jax.training.config import check_block_length
from xflow_jax.training.program import (
    TrainProgram,
    check_batch,
    make_program,
    training_model,
    training_optimizer,
)
from xflow_jax.training.state import Batch, TrainState
from xflow_jax.training.trajectory import (
    LiveDecodes,
    TrajectoryState,
    begin_decodes,
)
from xflow_jax.training.trajectory_loss import make_makers
from xflow_jax.types import ModelConfig, Params


def align_program(model_config: ModelConfig, config: AlignmentConfig, mesh: Mesh) -> TrainProgram:
    """Builds the program of an alignment.

    Args:
        model_config: configuration of the model.
        config: configuration of the alignment.
        mesh: a mesh of any size. Its devices may be descriptions only
            (`jax.experimental.topologies`).

    Returns:
        The program. Nothing is compiled yet.

    Raises:
        UserError: if the lengths exceed the model's positions, if the mesh does not divide the
            batch or the model, or if a LoRA target is not a matrix of the model.
    """
    check_lengths(model_config, config)
    check_batch(config, mesh)
    model, optimizer = training_model(model_config, config), training_optimizer(config)
    loss_fn = make_alignment_loss(model, config)
    return make_program(
        model,
        config,
        mesh,
        optimizer,
        step=make_align_step(model, optimizer, config),
        measure=lambda *args: loss_fn(*args)[1],
        batch=_abstract_batch(config, batch_sharding(mesh)),
        flops=lambda length: _update_flops(model_config, config, length),
        extend=lambda state, params: begin_trajectories(model_config, config, state, params),
        place=_state_sharding,
    )


def _update_flops(model_config: ModelConfig, config: AlignmentConfig, length: int) -> float:
    """Counts the FLOPs of an update on rows of `length` positions."""
    predicted = config.gen_length
    if config.states == "trajectory" and config.block_length:
        predicted = canvas_length(config.gen_length, config.block_length)
        length += 2 * predicted - config.gen_length  # a noised and a clean copy
    # The loss multiplies by the head and by the table: twice forward, three times backward.
    lora = config.tune == "lora"
    return update_flops(model_config, config.batch_size, length, predicted, 5, lora)


def _state_sharding(state: TrainState, mesh: Mesh, family: str) -> TrainState:
    """Places the state of a run on a mesh."""
    placed = state_shardings(state, mesh, family)
    if isinstance(state, TrajectoryState):  # live decodes are rows, as those of a batch
        live = jax.tree.map(lambda _: batch_sharding(mesh), state.live)
        placed = dataclasses.replace(placed, live=live)
    return placed


def begin_trajectories(
    model_config: ModelConfig, config: AlignmentConfig, state: TrainState, params: Params
) -> TrainState:
    """Adds live decodes to the state of a run.

    Args:
        model_config: configuration of the model.
        config: configuration of the alignment.
        state: the state before the first step.
        params: parameters of the model.

    Returns:
        A TrajectoryState whose decodes are all over, so that the first batch takes their places.
        The state as it is with states = "masked".
    """
    if config.states == "masked":
        return state
    rows = config.batch_size // config.groups
    shapes = (rows, config.prompt_length), (rows, config.gen_length)
    empty: Batch = {
        "prompt": jnp.zeros(shapes[0], jnp.int32),
        "prompt_mask": jnp.zeros(shapes[0], bool),
        "response": jnp.zeros(shapes[1], jnp.int32),
    }
    empty = decode_rows(empty, config.block_length, model_config.eos_id)
    live: list[LiveDecodes | None] = []
    for maker, _ in make_makers(model_config, config):
        if maker is None:
            live.append(None)
            continue
        decodes = begin_decodes(
            maker,
            empty,
            jax.random.key(config.seed),
            params,
            model_config.mask_id,
            block_length=config.block_length,
        )
        live.append(dataclasses.replace(decodes, over=jnp.ones_like(decodes.over)))
    return TrajectoryState(state.step, state.params, state.opt_state, tuple(live))


def check_lengths(model_config: ModelConfig, config: AlignmentConfig) -> None:
    """Checks that prompt, response and blocks fit the model.

    Args:
        model_config: configuration of the model.
        config: configuration of the alignment.

    Raises:
        UserError: if they do not.
    """
    require(
        config.prompt_length + config.gen_length <= model_config.max_length,
        f"prompt_length {config.prompt_length} and gen_length {config.gen_length} exceed the "
        f"model's {model_config.max_length} positions. Lower one of them.",
    )
    check_block_length(
        model_config,
        config.block_length,
        " Decodes of trajectories have trajectory.block_lengths.",
    )
    if config.states == "trajectory":
        _check_trajectories(model_config, config)


def _check_trajectories(model_config: ModelConfig, config: AlignmentConfig) -> None:
    """Raises UserError for live decodes that the model cannot have."""
    sizes = set(config.trajectory.block_lengths)
    if model_config.is_block_causal:
        require(
            not model_config.logits_shift,
            f"{model_config.family} writes the first token of a block before its first pass, which "
            'live decodes do not. Use states = "masked".',
        )
        require(
            sizes <= {0, config.block_length},
            f"trajectory.block_lengths is {sorted(sizes)}, but the model is block-causal: its "
            "blocks are those of block_length, so leave it out",
        )
    else:
        for size in filter(None, sizes):
            require(
                config.gen_length % size == 0,
                f"the {size} of trajectory.block_lengths does not divide gen_length "
                f"{config.gen_length}",
            )
    make_makers(model_config, config)


def _abstract_batch(
    config: AlignmentConfig, sharding: NamedSharding
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of a batch as `place_batch` makes it."""
    prompt, response = (
        (config.batch_size, length) for length in (config.prompt_length, config.gen_length)
    )
    return {
        "prompt": jax.ShapeDtypeStruct(prompt, jnp.int32, sharding=sharding),
        "prompt_mask": jax.ShapeDtypeStruct(prompt, jnp.bool, sharding=sharding),
        "response": jax.ShapeDtypeStruct(response, jnp.int32, sharding=sharding),
    }
