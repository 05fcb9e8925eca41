"""Least cost of one step of a program, by arithmetic."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from xflow_jax.decoding import (
    CacheOptions,
    DecodeConfig,
    Policy,
    init_policy,
    make_decode_config,
    pass_positions,
)
from xflow_jax.lm import LM
from xflow_jax.models import build, forward_flops, matrix_parameters, touched_parameters
from xflow_jax.types import ModelConfig

PROGRAMS = ("decode", "align", "sft", "rollout")
TRAINING = ("align", "sft")  # programs of one forward and one backward pass

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
        overrides: overrides of the training's configuration, as "name=value".
        block_length: positions of a block, or None for the default of the model.
        cache: keys and values that a decode keeps.
        dtype: dtype of a decode's weights, bfloat16 or int8.
    """

    program: str
    batch: int
    prompt_length: int = 128
    gen_length: int = 512
    steps: int = 128
    overrides: tuple[str, ...] = ()
    block_length: int | None = None
    cache: CacheOptions = field(default_factory=CacheOptions)
    dtype: str = "bfloat16"

    @property
    def matrix_itemsize(self) -> int:
        """Bytes of a parameter of the layers' matrices."""
        return np.dtype(jnp.dtype(self.dtype)).itemsize


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
        passes: (FLOPs, bytes) of each pass, if a program's passes differ.
    """

    flops: float
    weights: float
    bytes: float
    links: float
    memory: float
    passes: tuple[tuple[float, float], ...] = ()


def decode_passes(config: ModelConfig, work: Workload) -> int:
    """Returns the forward passes of a program.

    Those of surplus blocks count too. A training has one.
    """
    if work.program in TRAINING:
        return 1
    decode_config = work_decode_config(LM(build(config), config, {}, None), work)
    return decode_config.blocks * decode_config.steps


def work_decode_config(lm: LM, work: Workload) -> DecodeConfig:
    """Builds the configuration of a decode or rollout.

    Raises:
        UserError: if the model, the lengths and the cache do not go together.
    """
    decode_config = make_decode_config(
        lm, work.prompt_length, work.gen_length, work.steps, None, work.block_length
    )
    return work.cache.apply(lm.config, decode_config)


def estimate_cost(
    config: ModelConfig, work: Workload, shape: MeshShape, itemsize: int = 2
) -> CostEstimate:
    """Computes the least cost of a step.

    A mixture of experts has balanced routing. The decode of a block-causal model passes its active
    block on a cache, and each block once more to add it to the cache. With an approximate cache the
    passes of a block differ, and the cost is their mean.

    Args:
        config: the model.
        work: the program.
        shape: the mesh.
        itemsize: bytes of an activation, and of a parameter of embedding and head.
    """
    data, fsdp, tensor = shape
    shards = data * fsdp if work.batch % (data * fsdp) == 0 else 1
    rows = work.batch / shards
    if work.program in TRAINING:
        return _training_cost(config, work, rows, fsdp, tensor, itemsize)
    return _decode_cost(config, work, rows, fsdp, tensor, itemsize)


def pass_flops(config: ModelConfig, work: Workload) -> float:
    """Counts the FLOPs of all rows in a mean pass.

    Args:
        config: the model.
        work: the program.
    """
    return estimate_cost(config, work, (1, 1, 1)).flops


def _training_cost(
    config: ModelConfig, work: Workload, rows: float, fsdp: int, tensor: int, itemsize: int
) -> CostEstimate:
    """Computes the cost of an update.

    It is the forward pass, the same recomputed, and twice that for the backward pass.

    LoRA needs no gradients of the matrices. The loss of an alignment multiplies by the head and by
    the embedding table, and both products count like those of the layers. A fine-tuning multiplies
    by the head alone, and passes a noised and a clean copy of the rows of a block-causal model.
    """
    length = work.prompt_length + work.gen_length
    lora, align = uses_lora(config), work.program == "align"
    predicted, products = (work.gen_length, 7) if align else (length, 4)
    length *= 1 if align or not config.is_block_causal else 2
    tokens, scores = rows * length, rows * length * length
    forward = forward_flops(config, rows, length, length)
    head = 2 * rows * predicted * _head_parameters(config)
    flops = forward * (3 if lora else 4) + head * (products - lora)
    weights = _weight_bytes(config, fsdp, tensor, itemsize, itemsize)
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
    """Computes the mean cost of a step of a decode."""
    e, length = config.hidden_size, work.prompt_length + work.gen_length
    queries, keys, logit_positions, kept = _decode_positions(config, work)
    head = _head_parameters(config)
    policy = sum(x.size for x in jax.tree.leaves(abstract_policy().params) if x.ndim == 2)
    policy_flops = 2 * rows * work.gen_length * policy
    head_flops = 2 * rows * logit_positions * head
    key_bytes = itemsize * 2 * config.num_layers * config.num_kv_heads * config.head_dim
    cache = key_bytes * rows * kept / tensor
    passes = []
    for count in queries:
        products = forward_flops(config, rows, count, keys) + head_flops
        touched = touched_parameters(config, rows * count)
        read = (work.matrix_itemsize * touched + itemsize * head) / tensor
        traffic = read + _activation_bytes(config, rows * count, itemsize) + cache
        passes.append((products / tensor + policy_flops, traffic))
    state = rows * work.gen_length * e * 8 + itemsize * rows * length * e * 4
    largest = rows * max(queries)
    temporary = itemsize * largest * 3 * config.mlp_dim + 6 * largest * keys * config.num_heads
    weights = _weight_bytes(config, fsdp, tensor, itemsize, work.matrix_itemsize)
    return CostEstimate(
        flops=sum(flops for flops, _ in passes) / len(passes),
        weights=weights,
        bytes=sum(traffic for _, traffic in passes) / len(passes),
        links=_reduced_bytes(config, rows * sum(queries) / len(queries), tensor, itemsize),
        memory=weights + state + temporary / tensor + cache,
        passes=tuple(passes),
    )


def _decode_positions(config: ModelConfig, work: Workload) -> tuple[list[float], int, int, int]:
    """Counts the positions of the passes of a decode.

    Returns:
        Positions that each pass computes (one number if all passes are alike), positions that they
        attend to, positions that the head computes, and positions in the cache.
    """
    decode_config = work_decode_config(LM(build(config), config, {}, None), work)
    size, blocks = decode_config.block_length, decode_config.blocks
    length = work.prompt_length + work.gen_length
    if decode_config.cache == "none":
        return [length], length, work.gen_length, 0
    if decode_config.cache == "exact":
        passes = blocks * decode_config.steps
        prompt = work.prompt_length // size * size
        keys = prompt + blocks * size
        mean = (prompt * prompt / keys + size * (passes + blocks - 1)) / passes
        return [mean], keys, size, keys
    queries = pass_positions(decode_config, work.prompt_length).ravel().tolist()
    logit_positions = size if decode_config.block_only else work.gen_length
    kept = work.prompt_length if decode_config.cache == "prompt" else length
    return queries, length, logit_positions, kept


def _head_parameters(config: ModelConfig) -> int:
    return config.hidden_size * config.vocab_rows


def _weight_bytes(
    config: ModelConfig, fsdp: int, tensor: int, itemsize: int, matrix_itemsize: int
) -> float:
    """Bytes of the parameters on a chip, embeddings and head included."""
    matrices = matrix_itemsize * matrix_parameters(config)[1]
    return (matrices + itemsize * 2 * _head_parameters(config)) / (tensor * fsdp)


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


def step_speed(
    work: Workload,
    passes: int,
    compute: float,
    memory: float,
    links: float,
    least: float = 0.0,
) -> PlanRow:
    """Computes the bound on the speed of a step.

    Args:
        work: the program.
        passes: steps of the whole program.
        compute: least seconds that a step takes for its FLOPs.
        memory: least seconds for its memory traffic.
        links: least seconds for its collectives.
        least: least seconds for all of it, if more than each of these is known.

    Returns:
        "seconds" of each resource, "bound" with the name of the slowest one, and
        "tokens_per_second", response tokens of all rows.
    """
    seconds = {"compute": compute, "memory": memory, "links": links}
    bound = max(seconds, key=lambda name: seconds[name])
    tokens = work.batch * work.gen_length / passes
    speed = tokens / max(seconds[bound], least)
    return {"seconds": seconds, "bound": bound, "tokens_per_second": speed}
