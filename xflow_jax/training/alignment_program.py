"""x-prediction alignment as one program: settings, what is trained, and the compiled step with all its shardings.

`train.align` runs what `align_program` returns, and `xflow plan` lowers the very same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from xflow_jax.errors import UserError, require
from xflow_jax.models import abstract_params, build, lora_init, shardings, state_shardings
from xflow_jax.parallel import batch_sharding, replicated
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
    exact: bool

    @contextlib.contextmanager
    def scope(self) -> Iterator[None]:
        """Its mesh is set, and float32 means float32, not TF32 or bfloat16 passes."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(jax.set_mesh(self.mesh))
            if self.exact:
                stack.enter_context(jax.default_matmul_precision("highest"))
            yield


def align_program(model_config: Any, settings: AlignmentConfig, mesh: Mesh) -> AlignProgram:
    """The program of an alignment on a mesh of any size; its devices need not be here (`jax.experimental.topologies`).

    Raises UserError for lengths that the model does not have, a batch or a model that the mesh does not divide, and
    LoRA targets that are no matrices of the model.
    """
    check_lengths(model_config, settings)
    check_batch(settings, mesh)
    remat = None if settings.remat == "none" else settings.remat
    model = build(
        model_config,
        dtype=jnp.dtype(settings.dtype),
        remat=remat,
        param_dtype=jnp.dtype(settings.kept),
    )
    frozen = ("wte",) if settings.freeze_embedding and settings.tune == "all" else ()
    optimizer = make_optimizer(
        settings.optimizer, settings.steps, frozen, settings.storage, settings.seed
    )
    own = abstract_params(model)
    adapters = settings.tune == "lora"

    def start(params: Any) -> tuple[TrainState, Any]:
        key = jax.random.fold_in(jax.random.key(settings.seed), 2**31)
        trained, base = (
            (lora_init(key, params, settings.lora), params) if adapters else (params, None)
        )
        return TrainState.create(trained, optimizer), base

    state, base = jax.eval_shape(start, own)
    family, everywhere = model_config.family, replicated(mesh)
    placed = (
        state_shardings(state, mesh, family),
        shardings(base, mesh, family) if adapters else None,
    )
    begin = jax.jit(start, out_shardings=placed, donate_argnums=0)
    loss_fn = make_alignment_loss(model, settings)
    step = jax.jit(
        make_align_step(model, optimizer, settings),
        donate_argnums=0,
        out_shardings=(placed[0], everywhere),
    )
    measure = jax.jit(lambda *args: loss_fn(*args)[1], out_shardings=everywhere)
    rows, batch = settings.batch_size, batch_sharding(mesh)
    arguments = (
        jax.tree.map(_placed, state, placed[0]),
        {
            "prompt": jax.ShapeDtypeStruct(
                (rows, settings.prompt_length), jnp.int32, sharding=batch
            ),
            "prompt_mask": jax.ShapeDtypeStruct(
                (rows, settings.prompt_length), jnp.bool, sharding=batch
            ),
            "response": jax.ShapeDtypeStruct(
                (rows, settings.gen_length), jnp.int32, sharding=batch
            ),
        },
        _placed(jax.eval_shape(jax.random.key, 0), everywhere),
        jax.tree.map(_placed, base, placed[1]) if adapters else None,
    )
    return AlignProgram(mesh, step, measure, begin, arguments, np.dtype(model.dtype) == np.float32)


def check_lengths(model_config: Any, settings: AlignmentConfig) -> None:
    """UserError where prompt and response together exceed the model's positions."""
    total = settings.prompt_length + settings.gen_length
    require(
        total <= model_config.max_length,
        f"prompt_length {settings.prompt_length} and gen_length {settings.gen_length} exceed the model's "
        f"{model_config.max_length} positions; lower one of them",
    )


def check_batch(settings: AlignmentConfig, mesh: Mesh) -> None:
    """UserError unless every device gets as many rows of each part of the batch as the others."""
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    if settings.batch_size // settings.accumulate % devices:
        raise UserError(
            f"batch_size {settings.batch_size} in {settings.accumulate} parts does not divide over the {devices} "
            f"devices of data and fsdp; use a multiple of {settings.accumulate * devices}"
        )


def _placed(x: jax.ShapeDtypeStruct, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
