"""Measurements of whole decodes on one accelerator, and their profiles."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from xflow_jax.benchmarks.accelerator import (
    Bench,
    Numbers,
    Shapes,
    best_seconds,
    decode_program,
)
from xflow_jax.benchmarks.accelerator_parts import short_passes
from xflow_jax.benchmarks.decode_bench import measure_decode
from xflow_jax.benchmarks.kernel_profile import profile_kernels
from xflow_jax.benchmarks.timer import (
    peak_memory,
    run_seconds,
)
from xflow_jax.decoding import (
    CacheOptions,
    DecodeConfig,
    make_decode_config,
    parse_rule,
    pass_positions,
)
from xflow_jax.lm import LM
from xflow_jax.models import forward_flops, matrix_parameters

SCHEDULE_STEPS = 2  # steps of a decode without cache, whose steps all cost the same


def measure_steps(bench: Bench) -> Numbers:
    """Measures the step of a decode without a cache, and its parts."""
    shapes = bench.shapes
    results: list[Numbers] = []
    lm = bench.model(shapes.llada)
    rule = parse_rule("flow")[1]
    config = _full_config(lm, shapes)
    per_response = shapes.response // shapes.block * shapes.passes
    for batch in shapes.batches:
        if not bench.has_time(f"step of {shapes.llada} at batch {batch}"):
            break
        timing = measure_decode(
            lm, rule, config, batch, shapes.prompt, bench.rate, shapes.rounds, seconds=1.0
        )
        numbers = dataclasses.asdict(timing)
        numbers["tokens_per_second"] = batch * shapes.response / (timing.step * per_response)
        bench.record(results, numbers)
    return {"passes_per_block": shapes.passes, "batches": results}


def measure_caches(bench: Bench) -> Numbers:
    """Measures whole decodes with the dual and the prefix cache."""
    shapes = bench.shapes
    runs = [("dual", batch) for batch in shapes.batches]
    runs.append(("prefix", shapes.batches[0]))
    return _cached_decodes(bench, bench.model(shapes.llada), runs)


def measure_int8(bench: Bench) -> Numbers:
    """Measures decodes and passes over one block with int8 weights."""
    shapes = bench.shapes
    lm = bench.model(shapes.llada, "int8")
    runs = [("dual", batch) for batch in shapes.batches]
    return {"short_pass": short_passes(bench, lm)} | _cached_decodes(bench, lm, runs)


def _cached_decodes(bench: Bench, lm: LM, runs: Sequence[tuple[str, int]]) -> Numbers:
    """Measures whole decodes with (cache, batch)."""
    shapes = bench.shapes
    results: list[Numbers] = []
    rule = parse_rule("flow")[1]
    for cache, batch in runs:
        label = f"decode in {lm.weight_dtype} with the {cache} cache at batch {batch}"
        if not bench.has_time(label, 40.0):
            break
        config = _cached_config(lm, shapes, cache)
        decode = decode_program(lm, rule, config, batch, shapes.prompt)
        with lm.scope():
            cold = run_seconds(decode)
            warm = best_seconds(decode)
        floor = _decode_floor(lm, config, batch, shapes.prompt, bench.rate, bench.bandwidth)
        bench.record(
            results,
            {
                "cache": cache,
                "batch": batch,
                "cold": cold,
                "warm": warm,
                "floor_share": floor / warm,
                "tokens_per_second": batch * shapes.response / warm,
                "bound_tokens_per_second": batch * shapes.response / floor,
                "peak_memory": peak_memory(),
            },
        )
    return {"passes_per_block": shapes.passes, "decodes": results}


def _full_config(lm: LM, shapes: Shapes) -> DecodeConfig:
    """Builds the configuration of a decode in one block, without a cache."""
    return make_decode_config(
        lm, shapes.prompt, shapes.response, SCHEDULE_STEPS, None, shapes.response
    )


def _cached_config(lm: LM, shapes: Shapes, cache: str) -> DecodeConfig:
    """Builds the configuration of a decode in blocks with an approximate cache."""
    config = make_decode_config(lm, shapes.prompt, shapes.response, 1, shapes.passes, shapes.block)
    config = CacheOptions(cache).apply(lm.config, config)
    return dataclasses.replace(config, early_exit=False)


def _decode_floor(
    lm: LM, config: DecodeConfig, batch: int, prompt: int, rate: float, bandwidth: float
) -> float:
    """Computes the least seconds of a decode.

    Each pass takes the longer time of its products and of reading the matrices and the head once.
    """
    model, length = lm.config, prompt + config.canvas
    head = model.hidden_size * model.vocab_rows
    read = lm.weight_dtype.itemsize * matrix_parameters(model)[1] + lm.dtype.itemsize * head
    products = 2.0 * batch * config.block_length * head
    return sum(
        max((forward_flops(model, batch, n, length) + products) / rate, read / bandwidth)
        for n in pass_positions(config, prompt).ravel().tolist()
    )


def measure_profile(bench: Bench) -> Numbers:
    """Profiles decodes without a cache and with the dual one."""
    shapes = bench.shapes
    lm = bench.model(shapes.llada)
    full = _full_config(lm, shapes)
    decodes = {"none": (full, shapes.batches[1])}
    decodes["dual"] = (_cached_config(lm, shapes, "dual"), shapes.batches[0])
    results: Numbers = {}
    for cache, (config, batch) in decodes.items():
        if not bench.has_time(f"profile with cache {cache} at batch {batch}", 30.0):
            break
        decode = decode_program(lm, parse_rule("flow")[1], config, batch, shapes.prompt)
        with lm.scope():
            run_seconds(decode)
            profile = profile_kernels(decode, run_seconds)
        results[cache] = {
            "batch": batch,
            "steps": config.blocks * config.steps,
            "text": profile.text().splitlines(),
        }
    return results


def measure_experts(bench: Bench) -> Numbers:
    """Measures the step of a mixture of experts with the exact cache."""
    shapes = bench.shapes
    results: list[Numbers] = []
    lm = bench.model(shapes.llada2)
    rule = parse_rule("flow")[1]
    blocks = shapes.response // shapes.block
    config = make_decode_config(lm, shapes.prompt, shapes.response, 1, shapes.passes, shapes.block)
    config = dataclasses.replace(config, stop_at_eos=False)
    for batch in shapes.batches[:2]:
        if not bench.has_time(f"step of {shapes.llada2} at batch {batch}", 30.0):
            break
        decode = decode_program(lm, rule, config, batch, shapes.prompt)
        with lm.scope():
            cold = run_seconds(decode)
            warm = best_seconds(decode)
        bench.record(
            results,
            {
                "batch": batch,
                "cold": cold,
                "warm": warm,
                "step": warm / (config.blocks * config.steps),
                "tokens_per_second": batch * shapes.response / warm,
                "peak_memory": peak_memory(),
            },
        )
    return {"blocks": blocks, "passes_per_block": shapes.passes, "batches": results}
