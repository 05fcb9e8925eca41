"""The programs that `xflow plan` compiles, which are the ones that run, and what they must cost at the least."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax

from xflow_jax.decoding import init_policy, make_decode_config
from xflow_jax.lm import LM
from xflow_jax.models import (
    forward_flops,
    matrix_parameters,
    touched_parameters,
)

PROGRAMS = ("decode", "align", "rollout")


BLOCK = 32  # of LLaDA2.0


@dataclass(frozen=True)
class Workload:
    """What is to be planned: a program at a batch (rows; rollout: prompts x G of them), with its lengths in tokens.

    steps: forward passes of a decode, for the whole response. overrides: of the alignment's settings, name=value.
    """

    program: str
    batch: int
    prompt: int = 128
    response: int = 512
    steps: int = 128
    overrides: tuple[str, ...] = ()


def decode_passes(config: Any, work: Workload) -> int:
    """Forward passes of a decode, those of surplus blocks included; 1 for an alignment's step."""
    if work.program == "align":
        return 1
    settings = make_decode_config(
        LM(None, config, None, None), work.prompt, work.response, work.steps, None, None
    )
    return settings.blocks * settings.steps


@dataclass(frozen=True)
class CostEstimate:
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


def estimate_cost(
    config: Any, work: Workload, shape: tuple[int, int, int], itemsize: int = 2
) -> CostEstimate:
    """The least cost of a step on a mesh of (data, fsdp, tensor); with a mixture of experts, at balanced routing.

    A decode of LLaDA2.0 passes its active block only, on a cache, and each block once more for the cache's sake.
    """
    data, fsdp, tensor = shape
    spread = data * fsdp if work.batch % (data * fsdp) == 0 else 1
    rows, cached = work.batch / spread, config.is_block_causal and work.program != "align"
    e, layers, head = config.hidden_size, config.num_layers, config.hidden_size * config.vocab_rows
    queries = keys = work.prompt + work.response
    headed, held = work.response, 0.0
    if cached:
        count, size = decode_passes(config, work), BLOCK
        blocks = -(-(work.response + size - 1) // size)
        prompt = work.prompt // size * size
        keys = prompt + blocks * size
        queries = (prompt * prompt / keys + size * (count + blocks - 1)) / count
        headed, held = (
            size,
            itemsize * 2 * layers * rows * keys * config.num_kv_heads * config.head_dim / tensor,
        )
    every = matrix_parameters(config)[1]
    tokens, scores = rows * queries, rows * queries * keys
    forward = forward_flops(config, rows, queries, keys)
    heading = 2 * rows * headed * head
    weights = itemsize * (every + 2 * head) / (tensor * fsdp)
    activations = itemsize * tokens * e * layers * 8
    reduced = 2 * layers * itemsize * tokens * e if tensor > 1 else 0.0
    if work.program == "align":
        # Forward, recomputed, backward twice, where LoRA spares the gradients of the matrices; the loss multiplies by
        # the head and by the embedding table, again forward, recomputed, and backward.
        lora = config.is_block_causal
        flops = forward * (3 if lora else 4) + heading * (6 if lora else 7)
        memory = (
            weights * (1 if lora else 2.2)
            + itemsize * tokens * e * layers
            + 8 * scores * config.num_heads / tensor
        )
        return CostEstimate(
            flops / tensor, weights, 3 * (weights + activations), 2 * reduced, memory
        )
    read = itemsize * (touched_parameters(config, tokens) + head) / tensor
    state = rows * work.response * e * 8 + itemsize * rows * (work.prompt + work.response) * e * 4
    wide = (itemsize * tokens * 3 * config.mlp_dim + 6 * scores * config.num_heads) / tensor
    memory = weights + state + wide + held
    stepping = (
        2
        * rows
        * work.response
        * sum(x.size for x in jax.tree.leaves(_policy().params) if x.ndim == 2)
    )
    flops = (forward + heading) / tensor + stepping
    return CostEstimate(flops, weights, read + activations + held, reduced, memory)


def _policy() -> Any:
    return jax.eval_shape(init_policy, jax.random.key(0))
