"""x-prediction alignment as one program: settings, what is trained, and the compiled step with all its shardings.

`train.align` runs what `align_program` returns, and `xflow plan` lowers the very same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from xflow_jax.models import abstract_params, build
from xflow_jax.models.lora import LoraConfig, lora_init
from xflow_jax.optimizers import OptimizerConfig, Storage, make_optimizer
from xflow_jax.sharding import batch_sharding, replicated, shardings, state_shardings
from xflow_jax.steps import TrainState, make_align_step, make_alignment_loss
from xflow_jax.strict import UserError, require


@dataclass(frozen=True, kw_only=True)
class AlignSettings:
    """What an alignment computes. Lengths are in tokens.

    tune: all parameters, or LoRA adapters beside them (`lora`), which are float32. storage: of trained parameters:
    float32, or bfloat16 with stochastic rounding or with Kahan's compensation; frozen ones are in `dtype`, which is
    also the computation's. accumulate: equal parts of a batch that pass one after the other. block_length: 0 for models
    of full attention, the block's for block-causal ones. clean_nll: how much of the cross-entropy at clean positions is
    added to the loss: where softmax gives the right token next to nothing, the squared error has next to no slope.
    chunk: vocabulary rows whose logits stand in memory at a time. remat: what the backward pass recomputes.
    """

    prompt_length: int = 40
    gen_length: int = 48
    block_length: int = 0
    batch_size: int = 64
    accumulate: int = 1
    steps: int = 200
    tune: Literal["all", "lora"] = "all"
    lora: LoraConfig = LoraConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    storage: Storage = "float32"
    freeze_embedding: bool = True
    clean_nll: float = 0.0
    chunk: int = 4096
    remat: Literal["none", "dots", "full"] = "full"
    dtype: Literal["float32", "bfloat16"] = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("prompt_length", "gen_length", "batch_size", "accumulate", "steps", "chunk"):
            require(getattr(self, name) > 0, f"{name} is {getattr(self, name)}, but it must be positive")
        for name in ("block_length", "clean_nll"):
            require(getattr(self, name) >= 0, f"{name} is {getattr(self, name)}, but it must not be negative")
        require(
            self.batch_size % self.accumulate == 0,
            f"accumulate {self.accumulate} does not divide batch_size {self.batch_size}",
        )
        require(
            self.storage == "float32" or (self.dtype == "bfloat16" and self.tune == "all"),
            f'storage is "{self.storage}", which is for dtype = "bfloat16" and tune = "all"; use "float32"',
        )

    @property
    def kept(self) -> str:
        """The dtype in which the model's own parameters are kept."""
        return "float32" if self.tune == "all" and self.storage == "float32" else self.dtype


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


def align_program(model_config: Any, settings: AlignSettings, mesh: Mesh) -> AlignProgram:
    """The program of an alignment on a mesh of any size; its devices need not be here (`jax.experimental.topologies`).

    Raises UserError for lengths that the model does not have, a batch or a model that the mesh does not divide, and
    LoRA targets that are no matrices of the model.
    """
    check_lengths(model_config, settings)
    check_batch(settings, mesh)
    remat = None if settings.remat == "none" else settings.remat
    model = build(model_config, dtype=jnp.dtype(settings.dtype), remat=remat, param_dtype=jnp.dtype(settings.kept))
    frozen = ("wte",) if settings.freeze_embedding and settings.tune == "all" else ()
    optimizer = make_optimizer(settings.optimizer, settings.steps, frozen, settings.storage, settings.seed)
    own = abstract_params(model)
    adapters = settings.tune == "lora"

    def start(params: Any) -> tuple[TrainState, Any]:
        key = jax.random.fold_in(jax.random.key(settings.seed), 2**31)
        trained, base = (lora_init(key, params, settings.lora), params) if adapters else (params, None)
        return TrainState.create(trained, optimizer), base

    state, base = jax.eval_shape(start, own)
    family, everywhere = model_config.family, replicated(mesh)
    placed = state_shardings(state, mesh, family), shardings(base, mesh, family) if adapters else None
    begin = jax.jit(start, out_shardings=placed, donate_argnums=0)
    loss_fn = make_alignment_loss(model, settings)
    step = jax.jit(make_align_step(model, optimizer, settings), donate_argnums=0, out_shardings=(placed[0], everywhere))
    measure = jax.jit(lambda *args: loss_fn(*args)[1], out_shardings=everywhere)
    rows, batch = settings.batch_size, batch_sharding(mesh)
    arguments = (
        jax.tree.map(_placed, state, placed[0]),
        {
            "prompt": jax.ShapeDtypeStruct((rows, settings.prompt_length), jnp.int32, sharding=batch),
            "prompt_mask": jax.ShapeDtypeStruct((rows, settings.prompt_length), jnp.bool, sharding=batch),
            "response": jax.ShapeDtypeStruct((rows, settings.gen_length), jnp.int32, sharding=batch),
        },
        _placed(jax.eval_shape(jax.random.key, 0), everywhere),
        jax.tree.map(_placed, base, placed[1]) if adapters else None,
    )
    return AlignProgram(mesh, step, measure, begin, arguments, np.dtype(model.dtype) == np.float32)


def check_lengths(model_config: Any, settings: AlignSettings) -> None:
    """UserError where prompt and response together exceed the model's positions."""
    total = settings.prompt_length + settings.gen_length
    require(
        total <= model_config.max_length,
        f"prompt_length {settings.prompt_length} and gen_length {settings.gen_length} exceed the model's "
        f"{model_config.max_length} positions; lower one of them",
    )


def check_batch(settings: AlignSettings, mesh: Mesh) -> None:
    """UserError unless every device gets as many rows of each part of the batch as the others."""
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    if settings.batch_size // settings.accumulate % devices:
        raise UserError(
            f"batch_size {settings.batch_size} in {settings.accumulate} parts does not divide over the {devices} "
            f"devices of data and fsdp; use a multiple of {settings.accumulate * devices}"
        )


def _placed(x: jax.ShapeDtypeStruct, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
