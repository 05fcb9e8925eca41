"""The compiled programs of an alignment, with all shardings.

`train.align` runs the result of `align_program`, and `xflow plan` lowers the same programs.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, Sharding

from xflow_jax.errors import require
from xflow_jax.models import abstract_params, build, lora_init, shardings, state_shardings
from xflow_jax.parallel import batch_sharding, computation_scope, replicated
from xflow_jax.training.alignment import AlignmentConfig, make_alignment_loss
from xflow_jax.training.alignment_step import AlignStep, make_align_step
from xflow_jax.training.optimizers import make_optimizer
from xflow_jax.training.state import Batch, TrainState
from xflow_jax.training.trajectory import (
    LiveDecodes,
    TrajectoryState,
    begin_decodes,
    parse_makers,
)
from xflow_jax.types import Metrics, ModelConfig, Params

# The arguments of the step (state, batch, key, base), as jax.ShapeDtypeStruct with shardings.
StepArguments: TypeAlias = tuple[
    TrainState, dict[str, jax.ShapeDtypeStruct], jax.ShapeDtypeStruct, Params | None
]


@dataclass(frozen=True, eq=False)
class AlignProgram:
    """The jitted functions of an alignment.

    They are run or lowered inside `scope()`.

    Attributes:
        mesh: the mesh.
        step: (state, batch, key, base) -> (state, metrics). It donates the state.
        measure: (params, batch, key, base) -> metrics.
        begin: params -> (state, base), from the parameters of the model in the dtype
            `AlignmentConfig.param_dtype`. It donates them. `base` is the frozen parameters with
            LoRA, or None.
        arguments: the abstract arguments of `step`, with their shardings.
        dtype: dtype of the computation.
    """

    mesh: Mesh
    step: AlignStep = field(repr=False)
    measure: Callable[..., Metrics] = field(repr=False)
    begin: Callable[[Params], tuple[TrainState, Params | None]] = field(repr=False)
    arguments: StepArguments = field(repr=False)
    dtype: np.dtype

    def scope(self) -> contextlib.AbstractContextManager[None]:
        """Returns the context in which the functions run (`computation_scope`)."""
        return computation_scope(self.mesh, self.dtype)


def align_program(model_config: ModelConfig, config: AlignmentConfig, mesh: Mesh) -> AlignProgram:
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
    model = build(
        model_config,
        dtype=jnp.dtype(config.dtype),
        remat=None if config.remat == "none" else config.remat,
        param_dtype=jnp.dtype(config.param_dtype),
    )
    use_lora = config.tune == "lora"
    frozen = ("wte",) if config.freeze_embedding and not use_lora else ()
    optimizer = make_optimizer(config.optimizer, config.steps, frozen, config.storage, config.seed)

    def begin(params: Params) -> tuple[TrainState, Params | None]:
        key = jax.random.fold_in(jax.random.key(config.seed), 2**31)
        trained, base = (
            (lora_init(key, params, config.lora), params) if use_lora else (params, None)
        )
        state = TrainState.create(trained, optimizer)
        return begin_trajectories(model_config, config, state, params), base

    state, base = jax.eval_shape(begin, abstract_params(model))
    family, everywhere = model_config.family, replicated(mesh)
    state_sharding = _state_sharding(state, mesh, family)
    base_sharding = shardings(base, mesh, family) if use_lora else None
    loss_fn = make_alignment_loss(model, config)
    arguments = (
        jax.tree.map(_with_sharding, state, state_sharding),
        _abstract_batch(config, batch_sharding(mesh)),
        _with_sharding(jax.eval_shape(jax.random.key, 0), everywhere),
        jax.tree.map(_with_sharding, base, base_sharding) if use_lora else None,
    )
    return AlignProgram(
        mesh,
        step=jax.jit(
            make_align_step(model, optimizer, config),
            donate_argnums=0,
            out_shardings=(state_sharding, everywhere),
        ),
        measure=jax.jit(lambda *args: loss_fn(*args)[1], out_shardings=everywhere),
        begin=jax.jit(begin, out_shardings=(state_sharding, base_sharding), donate_argnums=0),
        arguments=arguments,
        dtype=np.dtype(model.dtype),
    )


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
    live: list[LiveDecodes | None] = []
    for maker in parse_makers(config.trajectory.rules, model_config):
        if maker is None:
            live.append(None)
            continue
        decodes = begin_decodes(
            maker, empty, jax.random.key(config.seed), params, model_config.mask_id
        )
        live.append(dataclasses.replace(decodes, over=jnp.ones(rows, bool)))
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
    if config.states == "masked":
        return
    sizes = set(config.trajectory.block_lengths)
    if model_config.is_block_causal:
        require(
            config.block_length > 0 and sizes <= {0, config.block_length},
            f"block_length is {config.block_length} and trajectory.block_lengths {sorted(sizes)}, "
            "but the model is block-causal: set block_length, and leave out the other one",
        )
    else:
        require(
            not config.block_length,
            f"block_length is {config.block_length}, but the model attends to all positions: set "
            "trajectory.block_lengths instead",
        )
        for size in filter(None, sizes):
            require(
                config.gen_length % size == 0,
                f"the {size} of trajectory.block_lengths does not divide gen_length "
                f"{config.gen_length}",
            )
    parse_makers(config.trajectory.rules, model_config)


def check_batch(config: AlignmentConfig, mesh: Mesh | AbstractMesh) -> None:
    """Checks that the devices divide each part of a batch equally.

    Args:
        config: configuration of the alignment.
        mesh: the mesh.

    Raises:
        UserError: if it does not.
    """
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    parts = config.accumulate * config.groups
    require(
        config.batch_size // parts % devices == 0,
        f"batch_size {config.batch_size} in {parts} parts does not divide over the "
        f"{devices} devices of data and fsdp. Use a multiple of {parts * devices}.",
    )


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


def _with_sharding(x: jax.ShapeDtypeStruct, sharding: Sharding) -> jax.ShapeDtypeStruct:
    """Returns the abstract array with a sharding."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
