"""Measurements of one accelerator: machine rates, decode steps, attention, belief, training.

Each section is a function of a `Bench` that returns numbers for JSON. Weights are random and are
made on the device. Shapes are those of the released models, or small ones for a trial on a CPU.
"""

from __future__ import annotations

import dataclasses
import gc
import os
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeAlias, cast

import jax
import jax.numpy as jnp
import numpy as np

from xflow_jax.benchmarks.decode_bench import measure_decode
from xflow_jax.benchmarks.kernel_profile import profile_kernels
from xflow_jax.benchmarks.timer import (
    copy_rate,
    matmul_rate,
    peak_memory,
    run_seconds,
    time_in_turns,
)
from xflow_jax.benchmarks.workload import RANDOM_MODELS, load_or_make, random_prompts
from xflow_jax.decoding import (
    BeliefOptions,
    CacheOptions,
    DecodeConfig,
    Rule,
    compute_belief,
    decode_batch,
    generate,
    make_decode_config,
    parse_rule,
    pass_positions,
)
from xflow_jax.lm import LM, load
from xflow_jax.models import Head, attend, build, forward_flops, make_head, matrix_parameters
from xflow_jax.parallel import make_mesh
from xflow_jax.tasks import microcode
from xflow_jax.training import AlignmentConfig, align_program
from xflow_jax.types import Backbone, Params

Numbers: TypeAlias = dict[str, object]
Section: TypeAlias = Callable[["Bench"], Numbers]


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Models and lengths of the measurements.

    Attributes:
        llada: bidirectional model: key of RANDOM_MODELS.
        llada2: block-causal mixture of experts: key of RANDOM_MODELS.
        prompt: tokens of a prompt.
        response: tokens of a response.
        block: positions of a block.
        passes: forward passes of a block.
        batches: batch sizes of decodes.
        train_batches: batch sizes of the alignment step, of which the largest that fits counts.
        copy_bytes: size of the array that is copied.
        rounds: least rounds of each measurement.
    """

    llada: str
    llada2: str
    prompt: int
    response: int
    block: int
    passes: int
    batches: tuple[int, ...]
    train_batches: tuple[int, ...]
    copy_bytes: int
    rounds: int


SHAPES = {
    "released": Shapes(
        "llada-8b", "llada2-mini", 128, 512, 32, 12, (1, 8, 32), (32, 16, 8, 4), 2**31, 3
    ),
    "small": Shapes("small", "llada2-20m", 16, 32, 16, 2, (1, 2), (2,), 2**24, 1),
}
LONG_MEASUREMENT = 3.0  # seconds of runs after which none is repeated
MEMORY_SHARE = 0.97  # largest part of the memory that a program may need
SCHEDULE_STEPS = 2  # steps of a decode without cache, whose steps all cost the same


@dataclasses.dataclass
class Bench:
    """State of one run: shapes, time left, and the model in memory.

    Attributes:
        shapes: models and lengths.
        deadline: time.monotonic() at which no measurement may begin.
        dtype: dtype of the models.
        report: receives a line of progress.
    """

    shapes: Shapes
    deadline: float
    dtype: str
    report: Callable[[str], None]
    _lm: LM | None = None
    _name: str = ""
    _rate: float = 0.0

    def model(self, name: str) -> LM:
        """Makes a model with random weights, and frees the one before."""
        if name != self._name:
            self.free()
            began = time.perf_counter()
            self._lm, self._name = load_or_make(name, self.dtype), name
            jax.block_until_ready(self._lm.params)
            self.report(f"{name}: weights made in {time.perf_counter() - began:.1f} s")
        assert self._lm is not None
        return self._lm

    def free(self) -> None:
        """Frees the model in memory and all compiled programs."""
        self._lm, self._name = None, ""
        jax.clear_caches()
        gc.collect()

    @property
    def rate(self) -> float:
        """FLOP/s of large matrix products, measured once."""
        self._rate = self._rate or matmul_rate(jnp.dtype(self.dtype))
        return self._rate

    def has_time(self, label: str, seconds: float = 20.0) -> bool:
        """Returns True if there is time for a measurement."""
        enough = time.monotonic() + seconds < self.deadline
        self.report(label if enough else f"{label}: left out, since the time is up")
        return enough


def measure_machine(bench: Bench) -> Numbers:
    """Measures the rates of matrix products and of memory."""
    return {
        "device": jax.devices()[0].device_kind,
        "memory_bytes": memory_limit(),
        "jax": jax.__version__,
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "matmul_flops_per_second": bench.rate,
        "copy_bytes_per_second": copy_rate(bench.shapes.copy_bytes),
    }


def measure_steps(bench: Bench) -> Numbers:
    """Measures the step of a decode without a cache, and its parts."""
    shapes, results = bench.shapes, []
    lm = bench.model(shapes.llada)
    rule = parse_rule("flow")[1]
    config = make_decode_config(
        lm, shapes.prompt, shapes.response, SCHEDULE_STEPS, None, shapes.response
    )
    per_response = shapes.response // shapes.block * shapes.passes
    for batch in shapes.batches:
        if not bench.has_time(f"step of {shapes.llada} at batch {batch}"):
            break
        timing = measure_decode(
            lm, rule, config, batch, shapes.prompt, bench.rate, shapes.rounds, seconds=1.0
        )
        numbers = dataclasses.asdict(timing)
        numbers["tokens_per_second"] = batch * shapes.response / (timing.step * per_response)
        results.append(numbers)
    return {"passes_per_block": shapes.passes, "batches": results}


def measure_caches(bench: Bench) -> Numbers:
    """Measures whole decodes with the dual and the prefix cache."""
    shapes, results = bench.shapes, []
    lm = bench.model(shapes.llada)
    rule, bandwidth = parse_rule("flow")[1], copy_rate(shapes.copy_bytes)
    runs = [("dual", batch) for batch in shapes.batches]
    runs.append(("prefix", shapes.batches[0]))
    for cache, batch in runs:
        if not bench.has_time(f"decode with the {cache} cache at batch {batch}", 40.0):
            break
        config = _cached_config(lm, shapes, cache)
        decode = _decode_program(lm, rule, config, batch, shapes.prompt)
        with lm.scope():
            cold = run_seconds(decode)
            warm = _best_seconds(decode)
        floor = _decode_floor(lm, config, batch, shapes.prompt, bench.rate, bandwidth)
        results.append(
            {
                "cache": cache,
                "batch": batch,
                "cold": cold,
                "warm": warm,
                "floor_share": floor / warm,
                "tokens_per_second": batch * shapes.response / warm,
                "bound_tokens_per_second": batch * shapes.response / floor,
                "peak_memory": peak_memory(),
            }
        )
    return {"passes_per_block": shapes.passes, "decodes": results}


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
    read = lm.dtype.itemsize * (matrix_parameters(model)[1] + head)
    products = 2.0 * batch * config.block_length * head
    return sum(
        max((forward_flops(model, batch, n, length) + products) / rate, read / bandwidth)
        for n in pass_positions(config, prompt).ravel().tolist()
    )


def measure_profile(bench: Bench) -> Numbers:
    """Profiles decodes without a cache and with the dual one."""
    shapes = bench.shapes
    lm = bench.model(shapes.llada)
    full = make_decode_config(
        lm, shapes.prompt, shapes.response, SCHEDULE_STEPS, None, shapes.response
    )
    decodes = {"none": (full, shapes.batches[1])}
    decodes["dual"] = (_cached_config(lm, shapes, "dual"), shapes.batches[0])
    results: Numbers = {}
    for cache, (config, batch) in decodes.items():
        if not bench.has_time(f"profile with cache {cache} at batch {batch}", 30.0):
            break
        decode = _decode_program(lm, parse_rule("flow")[1], config, batch, shapes.prompt)
        with lm.scope():
            run_seconds(decode)
            profile = profile_kernels(decode, run_seconds)
        results[cache] = {
            "batch": batch,
            "steps": config.blocks * config.steps,
            "text": profile.text().splitlines(),
        }
    return results


def measure_belief(bench: Bench) -> Numbers:
    """Measures the belief by chunk size, beside the head's matrix product."""
    shapes, results = bench.shapes, []
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
        results.append(
            {
                "positions": positions,
                "floor": floor,
                **{name: statistics.median(each) for name, each in times.items()},
            }
        )
    return {"seconds": results}


def measure_short_pass(bench: Bench) -> Numbers:
    """Measures a pass over one block, which reads every weight.

    Its floor is the time of reading the layers' matrices once at the measured rate of copies.
    """
    shapes = bench.shapes
    lm = bench.model(shapes.llada)
    read = jnp.dtype(bench.dtype).itemsize * matrix_parameters(lm.config)[1]
    floor, results = read / copy_rate(shapes.copy_bytes), []

    @partial(jax.jit, static_argnames="model")
    def one_pass(model: Backbone, params: Params, x: jax.Array) -> jax.Array:
        return model.apply({"params": params}, x, method="hidden")

    for batch in shapes.batches:
        if not bench.has_time(f"pass of {batch} x {shapes.block} positions", 10.0):
            break
        x = jnp.ones((batch, shapes.block, lm.config.hidden_size), lm.dtype)
        program = partial(one_pass, lm.model, lm.params, x)
        run_seconds(program)
        seconds = statistics.median(run_seconds(program) for _ in range(4 * shapes.rounds))
        results.append({"batch": batch, "seconds": seconds, "floor_share": floor / seconds})
    return {"positions": shapes.block, "floor": floor, "batches": results}


def measure_attention(bench: Bench) -> Numbers:
    """Measures the platform's attention kernels on a decode's shapes."""
    shapes, results = bench.shapes, []
    config = bench.model(shapes.llada).config
    names = ("cudnn", "xla") if jax.default_backend() == "gpu" else ("einsum", "xla")
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
        results.append(
            {
                "batch": batch,
                "queries": queries,
                "keys": length,
                "floor": flops / bench.rate,
                **{name: statistics.median(each) for name, each in times.items()},
            }
        )
    return {"seconds": results}


def measure_experts(bench: Bench) -> Numbers:
    """Measures the step of a mixture of experts with the exact cache."""
    shapes, results = bench.shapes, []
    lm = bench.model(shapes.llada2)
    rule = parse_rule("flow")[1]
    blocks = shapes.response // shapes.block
    config = make_decode_config(lm, shapes.prompt, shapes.response, 1, shapes.passes, shapes.block)
    config = dataclasses.replace(config, stop_at_eos=False)
    for batch in shapes.batches[:2]:
        if not bench.has_time(f"step of {shapes.llada2} at batch {batch}", 30.0):
            break
        decode = _decode_program(lm, rule, config, batch, shapes.prompt)
        with lm.scope():
            cold = run_seconds(decode)
            warm = _best_seconds(decode)
        results.append(
            {
                "batch": batch,
                "cold": cold,
                "warm": warm,
                "step": warm / (config.blocks * config.steps),
                "tokens_per_second": batch * shapes.response / warm,
                "peak_memory": peak_memory(),
            }
        )
    return {"blocks": blocks, "passes_per_block": shapes.passes, "batches": results}


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


def memory_limit() -> int | None:
    """Returns the memory of the first device in bytes, if known."""
    return (jax.devices()[0].memory_stats() or {}).get("bytes_limit")


def _decode_program(
    lm: LM, rule: Rule, config: DecodeConfig, batch: int, prompt_length: int
) -> Callable[[], tuple[jax.Array, ...]]:
    """Builds a decode of random prompts."""
    arrays = random_prompts(lm, batch, prompt_length)

    def decode() -> tuple[jax.Array, ...]:
        return decode_batch(lm.model, lm.params, rule, config, *arrays)[:3]

    return decode


def _best_seconds(program: Callable[[], object]) -> float:
    """Measures the fastest of up to three runs.

    Long runs are not repeated.
    """
    times: list[float] = []
    while len(times) < 3 and sum(times) < LONG_MEASUREMENT:
        times.append(run_seconds(program))
    return min(times)


SECTIONS: dict[str, Section] = {
    "machine": measure_machine,
    "agreement": measure_agreement,
    "steps": measure_steps,
    "caches": measure_caches,
    "profile": measure_profile,
    "short_pass": measure_short_pass,
    "belief": measure_belief,
    "attention": measure_attention,
    "experts": measure_experts,
    "training": measure_training,
}


def run_sections(
    shapes: Shapes,
    seconds: float,
    sections: Sequence[str],
    dtype: str,
    report: Callable[[str], None],
    keep: Callable[[Numbers], None],
) -> Numbers:
    """Runs sections until the time is up.

    A section that fails, for example for lack of memory, has its error in its place.

    Args:
        shapes: models and lengths.
        seconds: time after which no further measurement begins.
        sections: names in SECTIONS.
        dtype: dtype of the models.
        report: receives lines of progress.
        keep: receives the numbers so far after each section.

    Returns:
        Section -> its numbers.
    """
    bench = Bench(shapes, time.monotonic() + seconds, dtype, report)
    numbers: Numbers = {}
    for name in sections:
        began = time.monotonic()
        try:
            numbers[name] = SECTIONS[name](bench)
        except Exception as error:  # noqa: BLE001 - the other sections still count
            numbers[name] = {"error": f"{type(error).__name__}: {error}"[:2000]}
            report(f"{name} failed: {error!r:.200}")
            bench.free()
        report(f"{name}: {time.monotonic() - began:.0f} s")
        keep(numbers)
    return numbers
