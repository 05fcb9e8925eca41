"""x-prediction alignment as one program: config, what is trained, and the compiled step with all its shardings.

`train.align` runs what `align_program` returns, and `xflow plan` lowers the very same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from xflow_jax.errors import UserError, require
from xflow_jax.models import abstract_params, build, lora_init, shardings, state_shardings
from xflow_jax.parallel import batch_sharding, computation_scope, replicated
from xflow_jax.training.alignment import AlignmentConfig, make_align_step, make_alignment_loss
from xflow_jax.training.optimizers import make_optimizer
from xflow_jax.training.state import TrainState


@dataclass(frozen=True, eq=False)
class AlignProgram:
    """The jitted functions of an alignment and what they take; run and lower them inside `scope()`.

    step(state, batch, key, base) -> (state, metrics): donates the state. arguments: its abstract arguments, with their
    shardings. measure(params, batch, key, base) -> metrics. begin(params) -> (state, base): from the model's own
    parameters, in the dtype `AlignSettings.kept`; it takes them over. base: the frozen parameters that adapters lie
    beside, or None.
    """

    mesh: Mesh
    step: Callable[..., tuple[TrainState, dict[str, jax.Array]]] = field(repr=False)
    measure: Callable[..., dict[str, jax.Array]] = field(repr=False)
    begin: Callable[[Any], tuple[TrainState, Any]] = field(repr=False)
    arguments: tuple[Any, ...] = field(repr=False)
    dtype: np.dtype

    def scope(self) -> contextlib.AbstractContextManager[None]:
        """Returns the context in which its functions run (`computation_scope`)."""
        return computation_scope(self.mesh, self.dtype)


def align_program(model_config: Any, config: AlignmentConfig, mesh: Mesh) -> AlignProgram:
    """The program of an alignment on a mesh of any size; its devices need not be here (`jax.experimental.topologies`).

    Raises UserError for lengths that the model does not have, a batch or a model that the mesh does not divide, and
    LoRA targets that are no matrices of the model.
    """
    check_lengths(model_config, config)
    check_batch(config, mesh)
    remat = None if config.remat == "none" else config.remat
    model = build(
        model_config,
        dtype=jnp.dtype(config.dtype),
        remat=remat,
        param_dtype=jnp.dtype(config.kept),
    )
    frozen = ("wte",) if config.freeze_embedding and config.tune == "all" else ()
    optimizer = make_optimizer(config.optimizer, config.steps, frozen, config.storage, config.seed)
    own = abstract_params(model)
    adapters = config.tune == "lora"

    def start(params: Any) -> tuple[TrainState, Any]:
        key = jax.random.fold_in(jax.random.key(config.seed), 2**31)
        trained, base = (
            (lora_init(key, params, config.lora), params) if adapters else (params, None)
        )
        return TrainState.create(trained, optimizer), base

    state, base = jax.eval_shape(start, own)
    family, everywhere = model_config.family, replicated(mesh)
    placed = (
        state_shardings(state, mesh, family),
        shardings(base, mesh, family) if adapters else None,
    )
    begin = jax.jit(start, out_shardings=placed, donate_argnums=0)
    loss_fn = make_alignment_loss(model, config)
    step = jax.jit(
        make_align_step(model, optimizer, config),
        donate_argnums=0,
        out_shardings=(placed[0], everywhere),
    )
    measure = jax.jit(lambda *args: loss_fn(*args)[1], out_shardings=everywhere)
    rows, batch = config.batch_size, batch_sharding(mesh)
    arguments = (
        jax.tree.map(_placed, state, placed[0]),
        {
            "prompt": jax.ShapeDtypeStruct((rows, config.prompt_length), jnp.int32, sharding=batch),
            "prompt_mask": jax.ShapeDtypeStruct(
                (rows, config.prompt_length), jnp.bool, sharding=batch
            ),
            "response": jax.ShapeDtypeStruct((rows, config.gen_length), jnp.int32, sharding=batch),
        },
        _placed(jax.eval_shape(jax.random.key, 0), everywhere),
        jax.tree.map(_placed, base, placed[1]) if adapters else None,
    )
    return AlignProgram(mesh, step, measure, begin, arguments, np.dtype(model.dtype))


def check_lengths(model_config: Any, config: AlignmentConfig) -> None:
    """UserError where prompt and response together exceed the model's positions."""
    total = config.prompt_length + config.gen_length
    require(
        total <= model_config.max_length,
        f"prompt_length {config.prompt_length} and gen_length {config.gen_length} exceed the model's "
        f"{model_config.max_length} positions; lower one of them",
    )


def check_batch(config: AlignmentConfig, mesh: Mesh) -> None:
    """UserError unless every device gets as many rows of each part of the batch as the others."""
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    if config.batch_size // config.accumulate % devices:
        raise UserError(
            f"batch_size {config.batch_size} in {config.accumulate} parts does not divide over the {devices} "
            f"devices of data and fsdp; use a multiple of {config.accumulate * devices}"
        )


def _placed(x: jax.ShapeDtypeStruct, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
