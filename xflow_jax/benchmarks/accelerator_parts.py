"""Measurements of an accelerator's rates, a decode's parts, and training."""

from __future__ import annotations

import dataclasses
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np

from xflow_jax.benchmarks.accelerator import (
    Bench,
    Numbers,
    memory_limit,
)
from xflow_jax.benchmarks.timer import (
    run_seconds,
    time_in_turns,
)
from xflow_jax.benchmarks.workload import RANDOM_MODELS, load_or_make
from xflow_jax.decoding import (
    BeliefOptions,
    compute_belief,
    generate,
    parse_rule,
)
from xflow_jax.lm import LM, load
from xflow_jax.models import Head, attend, build, forward_flops, make_head, matrix_parameters
from xflow_jax.parallel import make_mesh
from xflow_jax.tasks import microcode
from xflow_jax.training import AlignmentConfig, align_program
from xflow_jax.types import Backbone, Params

MEMORY_SHARE = 0.97  # largest part of the memory that a program may need
NO_CUDNN = "left out, since cuDNN needs a GPU"


def measure_machine(bench: Bench) -> Numbers:
    """Measures the rates of matrix products and of memory."""
    return {
        "device": jax.devices()[0].device_kind,
        "memory_bytes": memory_limit(),
        "jax": jax.__version__,
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "matmul_flops_per_second": bench.rate,
        "copy_bytes_per_second": bench.bandwidth,
    }


def measure_short_pass(bench: Bench) -> Numbers:
    """Measures a pass over one block, which reads every weight.

    Its floor is the time of reading the layers' matrices once at the measured rate of copies.
    """
    return short_passes(bench, bench.model(bench.shapes.llada))


def short_passes(bench: Bench, lm: LM) -> Numbers:
    """Measures a model's pass over one block at each batch size."""
    shapes = bench.shapes
    read = lm.weight_dtype.itemsize * matrix_parameters(lm.config)[1]
    floor = read / bench.bandwidth
    results: list[Numbers] = []

    @partial(jax.jit, static_argnames="model")
    def one_pass(model: Backbone, params: Params, x: jax.Array) -> jax.Array:
        return model.apply({"params": params}, x, method="hidden")

    for batch in shapes.batches:
        label = f"pass of {batch} x {shapes.block} positions in {lm.weight_dtype}"
        if not bench.has_time(label, 10.0):
            break
        x = jnp.ones((batch, shapes.block, lm.config.hidden_size), lm.dtype)
        program = partial(one_pass, lm.model, lm.params, x)
        run_seconds(program)
        seconds = statistics.median(run_seconds(program) for _ in range(4 * shapes.rounds))
        bench.record(results, {"batch": batch, "seconds": seconds, "floor_share": floor / seconds})
    return {"positions": shapes.block, "floor": floor, "batches": results}


def measure_belief(bench: Bench) -> Numbers:
    """Measures the belief by chunk size, beside the head's matrix product."""
    shapes = bench.shapes
    results: list[Numbers] = []
    lm = bench.model(shapes.llada)
    head, rows = make_head(lm.params), lm.config.vocab_rows
    options = BeliefOptions(never=(lm.config.mask_id,))

    # The head is an argument: as a constant it would be compiled into the program.
    @partial(jax.jit, static_argnames="chunk")
    def belief(head: Head, h: jax.Array, chunk: int | None) -> object:
        return compute_belief(head, h, rows, options, chunk=chunk)

    product = jax.jit(Head.project)
    for positions in sorted({shapes.block, shapes.response, 8 * shapes.response}):
        h = jax.random.normal(jax.random.key(1), (1, positions, lm.config.hidden_size), lm.dtype)
        sizes = [None, *(size for size in (2048, 8192, 32768, 131072) if size // 2 < rows)]
        if not bench.has_time(f"belief at {positions} positions", 15.0):
            break
        programs: dict[str, Callable[[], object]] = {"product": partial(product, head, h)}
        programs |= {f"chunk {size or 'default'}": partial(belief, head, h, size) for size in sizes}
        for program in programs.values():
            run_seconds(program)
        times = time_in_turns(programs, 4 * shapes.rounds)
        floor = 2 * positions * rows * lm.config.hidden_size / bench.rate
        bench.record(
            results,
            {
                "positions": positions,
                "floor": floor,
                **{name: statistics.median(each) for name, each in times.items()},
            },
        )
    return {"seconds": results}


def measure_attention(bench: Bench) -> Numbers:
    """Measures the platform's attention kernels on a decode's shapes."""
    shapes = bench.shapes
    results: list[Numbers] = []
    config = bench.model(shapes.llada).config
    on_gpu = jax.default_backend() == "gpu"
    names = ("cudnn", "xla") if on_gpu else ("einsum", "xla")
    length = shapes.prompt + shapes.response
    for batch, queries in ((shapes.batches[1], length), (shapes.batches[1], shapes.block)):
        if not bench.has_time(f"attention of {queries} queries at batch {batch}", 10.0):
            break
        q, k, v = (
            jax.random.normal(key, (batch, n, heads, config.head_dim), bench.dtype)
            for key, n, heads in zip(
                jax.random.split(jax.random.key(2), 3),
                (queries, length, length),
                (config.num_heads, config.num_kv_heads, config.num_kv_heads),
                strict=True,
            )
        )
        mask = jnp.ones((batch, 1, 1, length), bool).at[:, :, :, 0].set(False)
        programs: dict[str, Callable[[], object]] = {}
        for name in names:
            kernel = jax.jit(partial(attend, kernel=name))
            programs[f"{name}, no mask"] = partial(kernel, q, k, v, None)
            programs[f"{name}, padding mask"] = partial(kernel, q, k, v, mask)
        for program in programs.values():
            run_seconds(program)
        times = time_in_turns(programs, 10 * shapes.rounds)
        flops = 4 * batch * queries * length * config.num_heads * config.head_dim
        bench.record(
            results,
            {
                "batch": batch,
                "queries": queries,
                "keys": length,
                "floor": flops / bench.rate,
                **{name: statistics.median(each) for name, each in times.items()},
            },
        )
    return {"seconds": results} | ({} if on_gpu else {"cudnn": NO_CUDNN})


def measure_training(bench: Bench) -> Numbers:
    """Measures an alignment step with LoRA, at the largest possible batch."""
    shapes = bench.shapes
    bench.free()
    for batch in shapes.train_batches:
        if not bench.has_time(f"alignment step at batch {batch}", 30.0):
            return {}
        numbers = _training_step(bench, batch)
        if numbers:
            return numbers
    return {"error": f"no batch of {shapes.train_batches} fits the memory"}


def _training_step(bench: Bench, batch: int) -> Numbers:
    """Measures the step of one batch size, if it fits."""
    shapes = bench.shapes
    model_config = RANDOM_MODELS[shapes.llada]
    config = AlignmentConfig(
        prompt_length=shapes.prompt,
        gen_length=shapes.response // 2,
        batch_size=batch,
        tune="lora",
        dtype="bfloat16" if bench.dtype == "bfloat16" else "float32",
        chunk=8192,
    )
    program = align_program(model_config, config, make_mesh("1,1,1"))
    with program.scope():
        compiled = cast(jax.stages.Wrapped, program.step).lower(*program.arguments).compile()
        memory = compiled.memory_analysis()
        assert memory is not None
        needed = memory.temp_size_in_bytes + memory.argument_size_in_bytes
        limit = memory_limit()
        if limit is not None and needed > MEMORY_SHARE * limit:
            return {}
        state, base = program.begin(load_or_make(shapes.llada, bench.dtype).params)
        data = _training_batch(config, model_config.vocab_size)
        key, times = jax.random.key(0), []
        for _ in range(1 + shapes.rounds):
            began = time.perf_counter()
            state, metrics = compiled(state, data, key, base)
            jax.block_until_ready(metrics)
            times.append(time.perf_counter() - began)
    seconds, length = statistics.median(times[1:]), config.prompt_length + config.gen_length
    forward = forward_flops(model_config, batch, length, length)
    forward += 2 * batch * config.gen_length * model_config.hidden_size * model_config.vocab_rows
    return {
        "batch": batch,
        "length": length,
        "seconds": seconds,
        "tokens_per_second": batch * length / seconds,
        # Forward pass, its repetition, and the gradients of the activations.
        "floor_share": 3 * forward / bench.rate / seconds,
        "bytes": needed,
        "loss": float(metrics["loss"]),
    }


def _training_batch(config: AlignmentConfig, vocabulary: int) -> dict[str, jax.Array]:
    """Draws a batch of random tokens."""
    rng, rows = np.random.default_rng(0), config.batch_size
    prompt = rng.integers(0, vocabulary, (rows, config.prompt_length), np.int32)
    response = rng.integers(0, vocabulary, (rows, config.gen_length), np.int32)
    mask = np.ones(prompt.shape, bool)
    return jax.device_put({"prompt": prompt, "prompt_mask": mask, "response": response})


def measure_agreement(bench: Bench) -> Numbers:
    """Compares the tokens of the attention kernels on the bundled model.

    In float32 the kernels of XLA must agree. cuDNN has no float32, so it is compared in bfloat16.
    """
    results: Numbers = {}
    pairs = [("float32", ("einsum", "xla"))]
    if jax.default_backend() == "gpu":
        pairs.append(("bfloat16", ("xla", "cudnn")))
    else:
        results["cudnn"] = NO_CUDNN
    for dtype, names in pairs:
        if not bench.has_time(f"tokens of {' and '.join(names)} in {dtype}", 20.0):
            break
        lm = load("tiny", dtype)
        prompts = [problem.prompt for problem in microcode.problems("test", 64, 0)]
        tokens = []
        for name in names:
            model = build(lm.config, lm.dtype, param_dtype=lm.dtype, attention=name)
            one = dataclasses.replace(lm, model=model)
            tokens.append(generate(one, prompts, parse_rule("flow")[1], 48, 12).tokens)
        results[f"equal {dtype} {names[0]} {names[1]}"] = float(np.mean(tokens[0] == tokens[1]))
    return results
