"""Least cost of one step of a program, by arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import jax

from xflow_jax.decoding import Policy, init_policy, make_decode_config
from xflow_jax.lm import LM
from xflow_jax.models import build, forward_flops, matrix_parameters, touched_parameters
from xflow_jax.types import ModelConfig

PROGRAMS = ("decode", "align", "rollout")

MeshShape: TypeAlias = tuple[int, int, int]  # sizes of data, fsdp and tensor
PlanRow: TypeAlias = dict[str, Any]  # one planned program, in JSON's types


@dataclass(frozen=True)
class Workload:
    """A program to plan, with the sizes of its batch.

    Attributes:
        program: one of PROGRAMS.
        batch: rows. For a rollout, prompts x group size.
        prompt_length: P, in tokens.
        gen_length: N, in tokens.
        steps: forward passes of a decode, for the whole response.
        overrides: overrides of the alignment's configuration, as "name=value".
    """

    program: str
    batch: int
    prompt_length: int = 128
    gen_length: int = 512
    steps: int = 128
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class CostEstimate:
    """Least cost of a step on one chip.

    Attributes:
        flops: FLOPs of the matrix products.
        weights: bytes of the model's parameters.
        bytes: bytes of memory traffic. Every weight that is used counts once. The activations of
            every layer count as written and read once.
        links: bytes of the activations that the all-reduces over `tensor` move.
        memory: bytes of weights, optimizer state, and all that grows with the batch.
    """

    flops: float
    weights: float
    bytes: float
    links: float
    memory: float


def decode_passes(config: ModelConfig, work: Workload) -> int:
    """Returns the forward passes of a program.

    Those of surplus blocks count too. An alignment has one.
    """
    if work.program == "align":
        return 1
    lm = LM(build(config), config, {}, None)
    decode_config = make_decode_config(
        lm, work.prompt_length, work.gen_length, work.steps, None, None
    )
    return decode_config.blocks * decode_config.steps


def estimate_cost(
    config: ModelConfig, work: Workload, shape: MeshShape, itemsize: int = 2
) -> CostEstimate:
    """Computes the least cost of a step.

    A mixture of experts has balanced routing. The decode of a block-causal model passes its active
    block on a cache, and each block once more to add it to the cache.

    Args:
        config: the model.
        work: the program.
        shape: the mesh.
        itemsize: bytes of a parameter and of an activation.
    """
    data, fsdp, tensor = shape
    shards = data * fsdp if work.batch % (data * fsdp) == 0 else 1
    rows = work.batch / shards
    if work.program == "align":
        return _alignment_cost(config, work, rows, fsdp, tensor, itemsize)
    return _decode_cost(config, work, rows, fsdp, tensor, itemsize)


def _alignment_cost(
    config: ModelConfig, work: Workload, rows: float, fsdp: int, tensor: int, itemsize: int
) -> CostEstimate:
    """Computes the cost of an update.

    It is the forward pass, the same recomputed, and twice that for the backward pass.

    LoRA needs no gradients of the matrices. The loss multiplies by the head and by the embedding
    table, and both products count like those of the layers.
    """
    length = work.prompt_length + work.gen_length
    tokens, scores = rows * length, rows * length * length
    lora = uses_lora(config)
    forward = forward_flops(config, rows, length, length)
    head = 2 * rows * work.gen_length * _head_parameters(config)
    flops = forward * (3 if lora else 4) + head * (6 if lora else 7)
    weights = _weight_bytes(config, fsdp, tensor, itemsize)
    activations = _activation_bytes(config, tokens, itemsize)
    memory = (
        weights * (1 if lora else 2.2)
        + itemsize * tokens * config.hidden_size * config.num_layers
        + 8 * scores * config.num_heads / tensor
    )
    links = 2 * _reduced_bytes(config, tokens, tensor, itemsize)
    return CostEstimate(flops / tensor, weights, 3 * (weights + activations), links, memory)


def _decode_cost(
    config: ModelConfig, work: Workload, rows: float, fsdp: int, tensor: int, itemsize: int
) -> CostEstimate:
    """Computes the cost of one step of a decode."""
    e, length = config.hidden_size, work.prompt_length + work.gen_length
    queries: float = length  # positions that a pass computes, on average
    keys, logit_positions, cache = length, work.gen_length, 0.0
    if config.is_block_causal:
        passes, size = decode_passes(config, work), config.default_block_length or work.gen_length
        blocks = -(-(work.gen_length + size - 1) // size)
        prompt = work.prompt_length // size * size
        keys = prompt + blocks * size
        queries = (prompt * prompt / keys + size * (passes + blocks - 1)) / passes
        logit_positions = size
        cached = config.num_layers * rows * keys * config.num_kv_heads * config.head_dim
        cache = itemsize * 2 * cached / tensor
    tokens, scores = rows * queries, rows * queries * keys
    head = _head_parameters(config)
    products = forward_flops(config, rows, queries, keys) + 2 * rows * logit_positions * head
    policy = sum(x.size for x in jax.tree.leaves(abstract_policy().params) if x.ndim == 2)
    flops = products / tensor + 2 * rows * work.gen_length * policy
    read = itemsize * (touched_parameters(config, tokens) + head) / tensor
    traffic = read + _activation_bytes(config, tokens, itemsize) + cache
    state = rows * work.gen_length * e * 8 + itemsize * rows * length * e * 4
    temporary = (itemsize * tokens * 3 * config.mlp_dim + 6 * scores * config.num_heads) / tensor
    weights = _weight_bytes(config, fsdp, tensor, itemsize)
    memory = weights + state + temporary + cache
    return CostEstimate(
        flops, weights, traffic, _reduced_bytes(config, tokens, tensor, itemsize), memory
    )


def _head_parameters(config: ModelConfig) -> int:
    return config.hidden_size * config.vocab_rows


def _weight_bytes(config: ModelConfig, fsdp: int, tensor: int, itemsize: int) -> float:
    """Bytes of the parameters on a chip, embeddings and head included."""
    every = matrix_parameters(config)[1]
    return itemsize * (every + 2 * _head_parameters(config)) / (tensor * fsdp)


def _activation_bytes(config: ModelConfig, tokens: float, itemsize: int) -> float:
    """Bytes of activations that all layers write and read."""
    return itemsize * tokens * config.hidden_size * config.num_layers * 8


def _reduced_bytes(config: ModelConfig, tokens: float, tensor: int, itemsize: int) -> float:
    """Bytes of the two all-reduces of each layer."""
    if tensor == 1:
        return 0.0
    return 2 * config.num_layers * itemsize * tokens * config.hidden_size


def uses_lora(config: ModelConfig) -> bool:
    """Returns True if the alignment trains adapters: with experts."""
    return config.num_experts is not None


def abstract_policy() -> Policy:
    """Builds the shapes of a step-size policy."""
    return jax.eval_shape(init_policy, jax.random.key(0))


def step_speed(work: Workload, passes: int, compute: float, memory: float, links: float) -> PlanRow:
    """Computes the bound on the speed of a step.

    Args:
        work: the program.
        passes: steps of the whole program.
        compute: least seconds that a step takes for its FLOPs.
        memory: least seconds for its memory traffic.
        links: least seconds for its collectives.

    Returns:
        "seconds" of each resource, "bound" with the name of the slowest one, and
        "tokens_per_second", response tokens of all rows.
    """
    seconds = {"compute": compute, "memory": memory, "links": links}
    bound = max(seconds, key=lambda name: seconds[name])
    tokens = work.batch * work.gen_length / passes
    return {"seconds": seconds, "bound": bound, "tokens_per_second": tokens / seconds[bound]}
