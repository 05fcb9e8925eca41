"""The programs that `xflow plan` compiles, which are the ones that run, and what they must cost at the least."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from xflow_jax.generate import decode_batch, settings_of
from xflow_jax.lm import LM
from xflow_jax.models import abstract_params, build
from xflow_jax.policy import init_policy
from xflow_jax.rollout import rollout
from xflow_jax.rules import Flow
from xflow_jax.sharding import BATCH, batch_sharding, divides, replicated, shardings

PROGRAMS = ("decode", "align", "rollout")
BLOCK = 32  # of LLaDA2.0


@dataclass(frozen=True)
class Work:
    """What is to be planned: a program at a batch (rows; rollout: prompts x G of them), with its lengths in tokens.

    steps: forward passes of a decode, for the whole response. overrides: of the alignment's settings, name=value.
    """

    program: str
    batch: int
    prompt: int = 128
    response: int = 512
    steps: int = 128
    overrides: tuple[str, ...] = ()


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


def lowerable(config: Any, work: Work, mesh: Mesh) -> Lowerable:
    """The program on a mesh, whose devices need not be here. UserError where it cannot be."""
    if work.program == "align":
        from xflow_jax.alignment import align_program

        program = align_program(config, align_settings(config, work), mesh)
        return Lowerable(program.step, program.arguments, program.scope)
    model = build(config, jnp.bfloat16, param_dtype=jnp.bfloat16)
    params = abstract_params(model)
    placed = jax.tree.map(_placed, params, shardings(params, mesh, config.family))
    lm = LM(model, config, placed, None, mesh)
    settings = settings_of(lm, work.prompt, work.response, work.steps, None, None)
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
    return Lowerable(fn, (model, placed, flow, settings, *batch), lm.scope, settings.blocks * settings.steps)


def passes(config: Any, work: Work) -> int:
    """Forward passes of a decode, those of surplus blocks included; 1 for an alignment's step."""
    if work.program == "align":
        return 1
    settings = settings_of(LM(None, config, None, None), work.prompt, work.response, work.steps, None, None)
    return settings.blocks * settings.steps


def align_settings(config: Any, work: Work) -> Any:
    """Settings of an alignment at scale: bfloat16; all of a LLaDA with Adafactor, LoRA beside a LLaDA2.0."""
    from xflow_jax.alignment import AlignSettings
    from xflow_jax.strict import with_overrides

    causal = config.family == "llada2"
    base = {
        "prompt_length": work.prompt,
        "gen_length": work.response,
        "batch_size": work.batch,
        "block_length": BLOCK if causal else 0,
        "dtype": "bfloat16",
        **({"tune": "lora"} if causal else {"storage": "stochastic", "optimizer": {"name": "adafactor"}}),
    }
    return with_overrides(AlignSettings, base, work.overrides)


def _placed(x: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


@dataclass(frozen=True)
class Analytic:
    """What a step must cost at the least on one chip, by arithmetic alone.

    flops: of the matrix products. weights: bytes of the model's parameters there. bytes: of memory traffic, every
    weight that is used once and every layer's activations written and read once. links: bytes of the activations that
    the all-reduces over `tensor` move. memory: weights, optimiser, and what grows with the batch.
    """

    flops: float
    weights: float
    bytes: float
    links: float
    memory: float


def analytic(config: Any, work: Work, shape: tuple[int, int, int], itemsize: int = 2) -> Analytic:
    """The least cost of a step on a mesh of (data, fsdp, tensor); with a mixture of experts, at balanced routing.

    A decode of LLaDA2.0 passes its active block only, on a cache, and each block once more for the cache's sake.
    """
    data, fsdp, tensor = shape
    spread = data * fsdp if work.batch % (data * fsdp) == 0 else 1
    rows, cached = work.batch / spread, config.family == "llada2" and work.program != "align"
    e, layers, head = config.hidden_size, config.num_layers, config.hidden_size * config.vocab_rows
    queries = keys = work.prompt + work.response
    headed, held = work.response, 0.0
    if cached:
        count, size = passes(config, work), BLOCK
        blocks = -(-(work.response + size - 1) // size)
        prompt = work.prompt // size * size
        keys = prompt + blocks * size
        queries = (prompt * prompt / keys + size * (count + blocks - 1)) / count
        headed, held = size, itemsize * 2 * layers * rows * keys * config.kv_heads * config.head_width / tensor
    every = _matrices(config)[1]
    tokens, scores = rows * queries, rows * queries * keys
    forward = forward_flops(config, rows, queries, keys)
    heading = 2 * rows * headed * head
    weights = itemsize * (every + 2 * head) / (tensor * fsdp)
    activations = itemsize * tokens * e * layers * 8
    reduced = 2 * layers * itemsize * tokens * e if tensor > 1 else 0.0
    if work.program == "align":
        # Forward, recomputed, backward twice, where LoRA spares the gradients of the matrices; the loss multiplies by
        # the head and by the embedding table, again forward, recomputed, and backward.
        lora = config.family == "llada2"
        flops = forward * (3 if lora else 4) + heading * (6 if lora else 7)
        memory = weights * (1 if lora else 2.2) + itemsize * tokens * e * layers + 8 * scores * _heads(config) / tensor
        return Analytic(flops / tensor, weights, 3 * (weights + activations), 2 * reduced, memory)
    read = itemsize * (_met(config, tokens) + head) / tensor
    state = rows * work.response * e * 8 + itemsize * rows * (work.prompt + work.response) * e * 4
    wide = (itemsize * tokens * 3 * _mlp_width(config) + 6 * scores * _heads(config)) / tensor
    memory = weights + state + wide + held
    stepping = 2 * rows * work.response * sum(x.size for x in jax.tree.leaves(_policy().params) if x.ndim == 2)
    flops = (forward + heading) / tensor + stepping
    return Analytic(flops, weights, read + activations + held, reduced, memory)


def forward_flops(config: Any, rows: float, queries: float, keys: float) -> float:
    """FLOPs of the matrix products of all layers, for rows x queries tokens that attend to `keys` each; with a mixture
    of experts, of the experts that a token is sent to."""
    attention = 4 * rows * queries * keys * _head_width(config) * _heads(config) * config.num_layers
    return 2 * rows * queries * _matrices(config)[0] + attention


def _policy() -> Any:
    return jax.eval_shape(init_policy, jax.random.key(0))


def _met(config: Any, tokens: float) -> float:
    """Parameters of the layers' matrices that so many tokens meet."""
    active, every = _matrices(config)
    if active == every:
        return every
    k, experts = config.num_experts_per_tok, config.num_experts
    routed = (every - active) / (experts - k) * experts
    return every - routed * (1 - k / experts) ** tokens


def _matrices(config: Any) -> tuple[int, int]:
    """Parameters of the layers' matrices: (those that each token meets, all of them)."""
    e = config.hidden_size
    if config.family == "llada":
        kv = config.kv_heads * config.head_dim
        each = config.num_layers * (2 * e * e + 2 * e * kv + 3 * e * config.mlp_width)
        return each, each
    width = config.head_width
    attention = 2 * e * width * (config.num_attention_heads + config.kv_heads)
    dense, sparse = config.dense_layers, config.num_layers - config.dense_layers
    shared = config.num_layers * attention + dense * 3 * e * config.intermediate_size
    if sparse:
        shared += sparse * (e * config.num_experts + 3 * e * config.shared_width)
    expert = 3 * e * (config.moe_intermediate_size or 0)
    met = config.num_experts_per_tok if sparse else 0
    return shared + sparse * met * expert, shared + sparse * (config.num_experts or 0) * expert


def _heads(config: Any) -> int:
    return config.n_heads if config.family == "llada" else config.num_attention_heads


def _head_width(config: Any) -> int:
    return config.head_dim if config.family == "llada" else config.head_width


def _mlp_width(config: Any) -> int:
    if config.family == "llada":
        return config.mlp_width
    return max(config.intermediate_size or 0, config.num_experts_per_tok * (config.moe_intermediate_size or 0))


def meshes(config: Any, devices: int) -> list[tuple[int, int, int]]:
    """All (data, fsdp, tensor) of so many devices whose tensor axis divides heads, experts, widths and vocabulary."""
    sizes = [config.vocab_rows, *_split_sizes(config)]
    splits = [t for t in range(1, devices + 1) if devices % t == 0 and all(size % t == 0 for size in sizes)]
    return [
        (devices // t // f, f, t)
        for t in splits
        for f in range(1, devices // t + 1)
        if devices // t % f == 0 and config.hidden_size % f == 0
    ]


def _split_sizes(config: Any) -> list[int]:
    if config.family == "llada":
        return [config.n_heads, config.kv_heads, config.mlp_width]
    sizes = [config.num_attention_heads, config.kv_heads]
    sizes += [config.intermediate_size] if config.dense_layers else []
    return sizes + ([config.num_experts, config.shared_width] if config.dense_layers < config.num_layers else [])
