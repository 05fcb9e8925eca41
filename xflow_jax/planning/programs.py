"""Programs that `xflow plan` compiles. They are the ones that run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar, cast

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, Sharding

from xflow_jax.decoding import Flow, branch_shares, decode_batch
from xflow_jax.lm import LM
from xflow_jax.models import abstract_weights, build, shardings
from xflow_jax.parallel import BATCH, batch_sharding, divides, replicated
from xflow_jax.planning.cost_model import (
    TRAINING,
    Workload,
    abstract_policy,
    uses_lora,
    work_decode_config,
)
from xflow_jax.toml_config import with_overrides
from xflow_jax.training import (
    AlignmentConfig,
    SFTConfig,
    TrainingConfig,
    align_program,
    rollout,
    sft_program,
)
from xflow_jax.types import ModelConfig

TrainingT = TypeVar("TrainingT", bound=TrainingConfig)


@dataclass(frozen=True, eq=False)
class Lowerable:
    """A jitted function with its abstract arguments.

    Attributes:
        fn: the function.
        arguments: shapes, dtypes and shardings, and the static arguments.
        scope: makes the context in which the function is lowered.
        steps: number of steps that the function runs.
        branch_shares: share of each branch of the decode's conditionals, by name.
    """

    fn: jax.stages.Wrapped = field(repr=False)
    arguments: tuple[object, ...] = field(repr=False)
    scope: Callable[[], contextlib.AbstractContextManager[None]] = field(repr=False)
    steps: int = 1
    branch_shares: Mapping[str, Sequence[float]] = field(default_factory=dict)

    def compile(self) -> jax.stages.Compiled:
        """Compiles the function, and passes on what the compiler raises."""
        with self.scope():
            return self.fn.lower(*self.arguments).compile()


def make_lowerable(config: ModelConfig, work: Workload, mesh: Mesh) -> Lowerable:
    """Builds a program on a mesh whose devices need not be attached.

    Args:
        config: the model.
        work: the program.
        mesh: the mesh.

    Raises:
        UserError: if the model, the mesh and the lengths do not go together.
    """
    if work.program in TRAINING:
        if work.program == "align":
            program = align_program(config, alignment_config(config, work), mesh)
        else:
            program = sft_program(config, sft_config(config, work), mesh)
        step = cast(jax.stages.Wrapped, program.step)
        return Lowerable(step, program.arguments, program.scope)
    model = build(config, jnp.bfloat16, param_dtype=jnp.bfloat16)
    params = abstract_weights(config, jnp.dtype(work.dtype))
    placed = jax.tree.map(_placed, params, shardings(params, mesh, config.family))
    lm = LM(model, config, placed, None, mesh)
    decode_config = work_decode_config(lm, work)
    with jax.set_mesh(mesh):
        rows = batch_sharding(mesh) if divides(work.batch, BATCH) else replicated(mesh)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), work.batch))
    prompt = (work.batch, work.prompt_length)
    batch = (
        _placed(jax.ShapeDtypeStruct(prompt, jnp.int32), rows),
        _placed(jax.ShapeDtypeStruct(prompt, jnp.bool), rows),
        _placed(keys, rows),
    )
    flow = Flow(policy=jax.tree.map(lambda x: _placed(x, replicated(mesh)), abstract_policy()))
    fn = decode_batch if work.program == "decode" else rollout
    steps = decode_config.blocks * decode_config.steps
    arguments = (model, placed, flow, decode_config, *batch)
    return Lowerable(fn, arguments, lm.scope, steps, branch_shares(decode_config))


def alignment_config(config: ModelConfig, work: Workload) -> AlignmentConfig:
    """Builds the configuration of an alignment at scale, in bfloat16.

    A mixture of experts trains LoRA adapters. Any other model trains all parameters with
    Adafactor.
    """
    values: dict[str, object] = {
        "prompt_length": work.prompt_length,
        "gen_length": work.gen_length,
        "block_length": config.default_block_length or 0,
    }
    return _training_config(AlignmentConfig, config, work, values)


def sft_config(config: ModelConfig, work: Workload) -> SFTConfig:
    """Builds the configuration of a fine-tuning at scale, as `alignment_config`.

    Its rows are as long as prompt and response together.
    """
    values: dict[str, object] = {"lengths": (work.prompt_length + work.gen_length,)}
    return _training_config(SFTConfig, config, work, values)


def _training_config(
    kind: type[TrainingT], config: ModelConfig, work: Workload, values: dict[str, object]
) -> TrainingT:
    """Builds the configuration of a training from its lengths."""
    values = values | {"batch_size": work.batch, "dtype": "bfloat16"}
    if uses_lora(config):
        values |= {"tune": "lora"}
    else:
        values |= {"storage": "stochastic", "optimizer": {"name": "adafactor"}}
    return with_overrides(kind, values, work.overrides)


def _placed(x: jax.ShapeDtypeStruct, sharding: Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
