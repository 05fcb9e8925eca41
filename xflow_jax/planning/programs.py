"""The programs that `xflow plan` compiles, which are the ones that run, and what they must cost at the least."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from xflow_jax.decoding import Flow, decode_batch, make_decode_config
from xflow_jax.lm import LM
from xflow_jax.models import abstract_params, build, shardings, tensor_split_sizes
from xflow_jax.parallel import BATCH, batch_sharding, divides, replicated
from xflow_jax.planning.cost_model import BLOCK, Workload, _policy
from xflow_jax.training import rollout


@dataclass(frozen=True, eq=False)
class Lowerable:
    """A jitted function with its abstract arguments, to be lowered inside `scope`; it makes `steps` steps."""

    fn: Any = field(repr=False)
    arguments: tuple[Any, ...] = field(repr=False)
    scope: Callable[[], contextlib.AbstractContextManager] = field(repr=False)
    steps: int = 1

    def compile(self) -> Any:
        """jax.stages.Compiled of it; whatever the compiler raises."""
        with self.scope():
            return self.fn.lower(*self.arguments).compile()


def make_lowerable(config: Any, work: Workload, mesh: Mesh) -> Lowerable:
    """The program on a mesh, whose devices need not be here. UserError where it cannot be."""
    if work.program == "align":
        from xflow_jax.training import align_program

        program = align_program(config, alignment_config(config, work), mesh)
        return Lowerable(program.step, program.arguments, program.scope)
    model = build(config, jnp.bfloat16, param_dtype=jnp.bfloat16)
    params = abstract_params(model)
    placed = jax.tree.map(_placed, params, shardings(params, mesh, config.family))
    lm = LM(model, config, placed, None, mesh)
    settings = make_decode_config(lm, work.prompt, work.response, work.steps, None, None)
    with jax.set_mesh(mesh):
        rows = batch_sharding(mesh) if divides(work.batch, BATCH) else replicated(mesh)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), work.batch))
    batch = (
        _placed(jax.ShapeDtypeStruct((work.batch, work.prompt), jnp.int32), rows),
        _placed(jax.ShapeDtypeStruct((work.batch, work.prompt), jnp.bool), rows),
        _placed(keys, rows),
    )
    flow = Flow(policy=jax.tree.map(lambda x: _placed(x, replicated(mesh)), _policy()))
    fn = decode_batch if work.program == "decode" else rollout
    return Lowerable(
        fn, (model, placed, flow, settings, *batch), lm.scope, settings.blocks * settings.steps
    )


def alignment_config(config: Any, work: Workload) -> Any:
    """Settings of an alignment at scale: bfloat16; all of a LLaDA with Adafactor, LoRA beside a LLaDA2.0."""
    from xflow_jax.toml_config import with_overrides
    from xflow_jax.training import AlignmentConfig as AlignSettings

    causal = config.is_block_causal
    base = {
        "prompt_length": work.prompt,
        "gen_length": work.response,
        "batch_size": work.batch,
        "block_length": BLOCK if causal else 0,
        "dtype": "bfloat16",
        **(
            {"tune": "lora"}
            if causal
            else {"storage": "stochastic", "optimizer": {"name": "adafactor"}}
        ),
    }
    return with_overrides(AlignSettings, base, work.overrides)


def _placed(x: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def candidate_meshes(config: Any, devices: int) -> list[tuple[int, int, int]]:
    """All (data, fsdp, tensor) of so many devices whose tensor axis divides heads, experts, widths and vocabulary."""
    sizes = [config.vocab_rows, *tensor_split_sizes(config)]
    splits = [
        t
        for t in range(1, devices + 1)
        if devices % t == 0 and all(size % t == 0 for size in sizes)
    ]
    return [
        (devices // t // f, f, t)
        for t in splits
        for f in range(1, devices // t + 1)
        if devices // t % f == 0 and config.hidden_size % f == 0
    ]
