"""The compiled functions of a training, with all shardings."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AbstractMesh, Mesh, Sharding

from xflow_jax.errors import require
from xflow_jax.models import abstract_params, build, lora_init, shardings, state_shardings
from xflow_jax.parallel import computation_scope, count_shards, replicated
from xflow_jax.training.config import TrainingConfig
from xflow_jax.training.optimizers import make_optimizer
from xflow_jax.training.state import TrainState
from xflow_jax.types import Backbone, Metrics, ModelConfig, Params

# (state, batch, key, base) -> (state, metrics)
StepFn: TypeAlias = Callable[..., tuple[TrainState, Metrics]]
# The arguments of the step (state, batch, key, base), as jax.ShapeDtypeStruct with shardings.
StepArguments: TypeAlias = tuple[
    TrainState, dict[str, jax.ShapeDtypeStruct], jax.ShapeDtypeStruct, Params | None
]


@dataclass(frozen=True, eq=False)
class TrainProgram:
    """The jitted functions of an alignment or a fine-tuning.

    They are run or lowered inside `scope()`.

    Attributes:
        mesh: the mesh.
        step: (state, batch, key, base) -> (state, metrics). It donates the state.
        measure: (params, batch, key, base) -> metrics.
        begin: params -> (state, base), from the parameters of the model in the dtype
            `TrainingConfig.param_dtype`. It donates them. `base` is the frozen parameters with
            LoRA, or None.
        arguments: the abstract arguments of `step`, with their shardings.
        dtype: dtype of the computation.
        flops: tokens of a row -> model FLOPs of an update (`models.update_flops`).
    """

    mesh: Mesh
    step: StepFn = field(repr=False)
    measure: Callable[..., Metrics] = field(repr=False)
    begin: Callable[[Params], tuple[TrainState, Params | None]] = field(repr=False)
    arguments: StepArguments = field(repr=False)
    dtype: np.dtype
    flops: Callable[[int], float] = field(repr=False)

    def scope(self) -> contextlib.AbstractContextManager[None]:
        """Returns the context in which the functions run (`computation_scope`)."""
        return computation_scope(self.mesh, self.dtype)


def training_model(model_config: ModelConfig, config: TrainingConfig) -> Backbone:
    """Builds the module that is trained.

    Args:
        model_config: configuration of the model.
        config: configuration of the training.
    """
    return build(
        model_config,
        dtype=jnp.dtype(config.dtype),
        remat=None if config.remat == "none" else config.remat,
        param_dtype=jnp.dtype(config.param_dtype),
    )


def training_optimizer(config: TrainingConfig) -> optax.GradientTransformation:
    """Builds the optimiser of the trained parameters.

    Args:
        config: configuration of the training.
    """
    frozen = ("wte",) if config.freeze_embedding and config.tune == "all" else ()
    return make_optimizer(config.optimizer, config.steps, frozen, config.storage, config.seed)


def make_program(
    model: Backbone,
    config: TrainingConfig,
    mesh: Mesh,
    optimizer: optax.GradientTransformation,
    step: StepFn,
    measure: Callable[..., Metrics],
    batch: dict[str, jax.ShapeDtypeStruct],
    flops: Callable[[int], float],
    extend: Callable[[TrainState, Params], TrainState] = lambda state, params: state,
    place: Callable[[TrainState, Mesh, str], TrainState] = state_shardings,
) -> TrainProgram:
    """Builds the program of a training.

    Args:
        model: the model (`training_model`).
        config: configuration of the training.
        mesh: a mesh of any size. Its devices may be descriptions only
            (`jax.experimental.topologies`).
        optimizer: the optimiser (`training_optimizer`).
        step: the step, not compiled.
        measure: (params, batch, key, base) -> metrics, not compiled.
        batch: the shapes of a batch, with shardings.
        flops: tokens of a row -> model FLOPs of an update.
        extend: (state, params of the model) -> state with what the training adds to it.
        place: (state, mesh, family) -> shardings of the state.

    Returns:
        The program. Nothing is compiled yet.

    Raises:
        UserError: if the mesh does not divide the model, or if a LoRA target is not a matrix of it.
    """
    use_lora = config.tune == "lora"

    def begin(params: Params) -> tuple[TrainState, Params | None]:
        key = jax.random.fold_in(jax.random.key(config.seed), 2**31)
        trained = lora_init(key, params, config.lora) if use_lora else params
        base = params if use_lora else None
        return extend(TrainState.create(trained, optimizer), params), base

    state, base = jax.eval_shape(begin, abstract_params(model))
    family, everywhere = model.config.family, replicated(mesh)
    state_sharding = place(state, mesh, family)
    base_sharding = shardings(base, mesh, family) if use_lora else None
    arguments = (
        jax.tree.map(_with_sharding, state, state_sharding),
        batch,
        _with_sharding(jax.eval_shape(jax.random.key, 0), everywhere),
        jax.tree.map(_with_sharding, base, base_sharding) if use_lora else None,
    )
    return TrainProgram(
        mesh,
        step=jax.jit(step, donate_argnums=0, out_shardings=(state_sharding, everywhere)),
        measure=jax.jit(measure, out_shardings=everywhere),
        begin=jax.jit(begin, out_shardings=(state_sharding, base_sharding), donate_argnums=0),
        arguments=arguments,
        dtype=np.dtype(model.dtype),
        flops=flops,
    )


def check_batch(config: TrainingConfig, mesh: Mesh | AbstractMesh) -> None:
    """Checks that the devices divide each part of a batch equally.

    Args:
        config: configuration of the training.
        mesh: the mesh.

    Raises:
        UserError: if it does not.
    """
    devices = count_shards(mesh)
    parts = config.accumulate * config.groups
    require(
        config.batch_size // parts % devices == 0,
        f"batch_size {config.batch_size} in {parts} parts does not divide over the "
        f"{devices} devices of data and fsdp. Use a multiple of {parts * devices}.",
    )


def _with_sharding(x: jax.ShapeDtypeStruct, sharding: Sharding) -> jax.ShapeDtypeStruct:
    """Returns the abstract array with a sharding."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
