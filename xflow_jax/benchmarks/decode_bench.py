"""Where the time of a decode goes: `xflow bench --model DIR|tiny|PRESET`.

Three programs are timed side by side: the decode itself, its backbone with the head's matrix product, and the backbone
alone. Their rounds alternate and medians are reported, so that another load on the machine falls on all three alike.
"""

from __future__ import annotations

import dataclasses
import resource
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xflow_jax.decoding import (
    CachedForward,
    DecodeConfig,
    MaskPrediction,
    Rule,
    block_layout,
    decode_batch,
    make_schedule,
    pad_prompts,
)
from xflow_jax.errors import UserError
from xflow_jax.lm import DTYPES, LM, load
from xflow_jax.models import (
    PRESETS,
    LLaDAConfig,
    abstract_params,
    build,
    forward_flops,
    init_params,
    make_head,
    shardings,
)
from xflow_jax.parallel import make_mesh

# A vocabulary as large as LLaDA's behind a backbone that a CPU can run: 97 M parameters.
MID = LLaDAConfig(
    d_model=320,
    n_layers=12,
    n_heads=5,
    mlp_hidden_size=960,
    vocab_size=126464,
    mask_token_id=126336,
    eos_token_id=126081,
    rope_theta=500000.0,
)


SHAPES = PRESETS | {"mid": MID}


LEAST_SECONDS = 3.0  # of measurement for each batch size


@dataclasses.dataclass(frozen=True)
class Timing:
    """One batch size, in seconds. A step is one forward pass with all that the decoder does around it.

    tokens_per_second: response tokens of a whole decode. backbone: of a step; head: the matrix product to the logits;
    outside: the rest of the step, belief, rule and update. outside_share: outside / step, a median of its own. floor: a
    step's matrix products at the machine's measured rate; floor_share: floor / step. cold: the first decode of the
    process, compilation included; warm: the median of later ones. peak_memory: in bytes, see `peak_memory`.
    """

    batch: int
    tokens_per_second: float
    step: float
    backbone: float
    head: float
    outside: float
    outside_share: float
    floor: float
    floor_share: float
    cold: float
    warm: float
    peak_memory: int


def measure_decode(
    lm: LM,
    rule: Rule,
    decode_config: DecodeConfig,
    batch: int,
    prompt_length: int,
    rate: float,
    rounds: int,
) -> Timing:
    """Times a decode of `batch` random prompts and its parts; rate: FLOP/s of `matmul_rate`."""
    rng = np.random.default_rng(0)
    rows = rng.integers(0, lm.config.vocab_size, (batch, prompt_length)).tolist()
    ids, mask = (jnp.asarray(x) for x in pad_prompts(lm, rows))
    keys = jax.random.split(jax.random.key(0), batch)
    copies = 2 if rule.belief_options(lm.config, None).guidance else 1  # guidance doubles the batch
    decode_config = dataclasses.replace(decode_config, stop_at_eos=False)

    def decoded() -> Any:
        return decode_batch(lm.model, lm.params, rule, decode_config, ids, mask, keys)

    began = time.perf_counter()
    with lm.scope():
        steps = int(decoded()[2].max())
    cold = time.perf_counter() - began
    width, seen = ids.shape[1] + decode_config.canvas, jnp.tile(mask, (copies, 1))
    if decode_config.cache:
        queries = headed = decode_config.block_length
        passes, given = (
            _cached_passes,
            (steps // decode_config.steps, jnp.tile(ids, (copies, 1)), seen),
        )
    else:
        queries, headed = width, decode_config.canvas
        x = jnp.asarray(
            rng.normal(size=(batch * copies, width, lm.params["wte"]["embedding"].shape[1])),
            lm.dtype,
        )
        passes, given = (
            _passes,
            (x, jnp.pad(seen, ((0, 0), (0, decode_config.canvas)), constant_values=True)),
        )
    programs = {
        "warm": decoded,
        "with_head": lambda: passes(lm.model, lm.params, decode_config, True, *given),
        "backbone": lambda: passes(lm.model, lm.params, decode_config, False, *given),
    }
    with lm.scope():
        times, once = {name: [] for name in programs}, 0.0
        for program in programs.values():
            seconds(program)  # compiles
            once += seconds(program)
        # Short programs need more rounds for a steady median.
        for _ in range(max(rounds, min(99, int(LEAST_SECONDS / once)))):
            for name, program in programs.items():
                times[name].append(seconds(program))
    warm, with_head, backbone = (statistics.median(t) for t in times.values())
    # Of neighbours in time: the median of quotients is steadier than the quotient of medians.
    share = statistics.median(
        1 - part / all_ for part, all_ in zip(times["with_head"], times["warm"], strict=True)
    )
    floor = step_flops(lm.config, batch * copies, queries, width, headed) / rate
    return Timing(
        batch=batch,
        tokens_per_second=batch * decode_config.gen_length / warm,
        step=warm / steps,
        backbone=backbone / steps,
        head=(with_head - backbone) / steps,
        outside=(warm - with_head) / steps,
        outside_share=share,
        floor=floor,
        floor_share=floor * steps / warm,
        cold=cold,
        warm=warm,
        peak_memory=peak_memory(),
    )


@dataclasses.dataclass(frozen=True)
class TorchComparison:
    """The same decode by PyTorch beside ours, medians of alternating rounds.

    tokens_per_second: of both. speedup: ours / theirs, a median of its own. agreement: share of equal tokens.
    """

    batch: int
    ours: float
    theirs: float
    speedup: float
    agreement: float


def compare_with_torch(
    lm: LM, decode_config: DecodeConfig, batch: int, prompt_length: int, rounds: int
) -> TorchComparison:
    """Times mask prediction on random prompts against `bench_torch.torch_decoder` with the same weights."""
    from xflow_jax.benchmarks.torch_baseline import torch_decoder

    theirs = torch_decoder(lm.config, lm.params, str(lm.dtype))
    prompt = np.random.default_rng(0).integers(0, lm.config.vocab_size, (batch, prompt_length))
    ids, mask = jnp.asarray(prompt, jnp.int32), jnp.ones(prompt.shape, bool)
    keys = jax.random.split(jax.random.key(0), batch)
    steps, length = decode_config.blocks * decode_config.steps, decode_config.gen_length
    programs = (
        lambda: np.asarray(
            decode_batch(lm.model, lm.params, MaskPrediction(), decode_config, ids, mask, keys)[0]
        ),
        lambda: theirs(prompt, length, steps),
    )
    with lm.scope():
        ours, wanted = (program() for program in programs)
        times = [[_timed(program) for program in programs] for _ in range(rounds)]
    mine, other = (
        batch * length / statistics.median(column) for column in zip(*times, strict=True)
    )
    speedup = statistics.median(b / a for a, b in times)
    return TorchComparison(batch, mine, other, speedup, float(np.mean(ours == wanted)))


def _timed(program: Callable[[], Any]) -> float:
    began = time.perf_counter()
    program()
    return time.perf_counter() - began


@partial(jax.jit, static_argnames=("model", "decode_config", "head"))
def _passes(
    model: Any, params: Any, decode_config: DecodeConfig, head: bool, x: jax.Array, mask: jax.Array
) -> Any:
    """As many forward passes as a decode makes, each on what the last one left: x [B, L, E] -> the last (x, logits)."""
    logits_of = make_head(model, params)
    rows, canvas = model.config.vocab_rows, decode_config.canvas

    def one(
        carry: tuple[jax.Array, jax.Array], _: None
    ) -> tuple[tuple[jax.Array, jax.Array], None]:
        h = model.apply({"params": params}, carry[0], mask, method="hidden")
        # Kept in the carry: nothing may be cut off as unused.
        return (h, logits_of(h[:, -canvas:], 0, rows) if head else carry[1]), None

    logits = jnp.zeros((x.shape[0], canvas, rows) if head else (), x.dtype)
    return jax.lax.scan(one, (x, logits), None, length=decode_config.blocks * decode_config.steps)[
        0
    ]


@partial(jax.jit, static_argnames=("model", "decode_config", "head", "blocks"))
def _cached_passes(
    model: Any,
    params: Any,
    decode_config: DecodeConfig,
    head: bool,
    blocks: int,
    prompt: jax.Array,
    mask: jax.Array,
) -> Any:
    """The same of a decode with the exact cache: the prompt's pass, those of each block's steps, and the one that reads
    it into the cache. prompt int, mask bool [B, P] -> the last (x [B, canvas, E], cache, logits)."""
    logits_of, rows = make_head(model, params), model.config.vocab_rows
    prompt_x = model.apply({"params": params}, prompt, method="embed")
    sight = CachedForward(
        model, params, decode_config, prompt_x, mask, block_layout(decode_config, mask)[1]
    )

    def one_step(carry: Any, step: Any) -> tuple[Any, None]:
        x, kept, logits = carry
        h, kept = sight.hidden(kept, x, step)
        x = jax.lax.dynamic_update_slice_in_dim(
            x, h, 0, axis=1
        )  # so that each pass is of what the last one left
        return (x, kept, logits_of(h, 0, rows) if head else logits), None

    def one_block(carry: Any, steps: Any) -> tuple[Any, None]:
        x, kept, logits = carry
        kept = sight.begin_block(kept, x, steps.block[0], jnp.array(True))
        return jax.lax.scan(one_step, (x, kept, logits), steps)[0], None

    x = jnp.zeros((prompt.shape[0], decode_config.canvas, prompt_x.shape[-1]), prompt_x.dtype)
    logits = jnp.zeros((x.shape[0], decode_config.block_length, rows) if head else (), x.dtype)
    steps = jax.tree.map(
        lambda part: part.reshape(decode_config.blocks, -1)[:blocks], make_schedule(decode_config)
    )
    return jax.lax.scan(one_block, (x, sight.init_cache(), logits), steps)[0]


def seconds(program: Callable[[], Any]) -> float:
    """Of one run, its results on the device."""
    began = time.perf_counter()
    jax.block_until_ready(program())
    return time.perf_counter() - began


def matmul_rate(dtype: Any, rounds: int = 5) -> float:
    """FLOP/s of square matrix products in `dtype`: the best over sizes and rounds, which nothing else can exceed."""
    product, best = jax.jit(jnp.matmul), 0.0
    for size in (512, 1024, 2048, 4096, 8192):
        a = jnp.ones((size, size), dtype)
        product(a, a).block_until_ready()
        taken = min(seconds(lambda a=a: product(a, a)) for _ in range(rounds))
        best = max(best, 2 * size**3 / taken)
        if taken > 0.02:  # the next one is eight times as much work
            break
    return best


def step_flops(config: Any, rows: int, queries: int, keys: int, headed: int) -> float:
    """FLOPs of the matrix products of one step: the layers on `queries` positions of each row, attention of these to
    `keys` positions, the head on `headed`."""
    return (
        forward_flops(config, rows, queries, keys)
        + 2.0 * rows * headed * config.hidden_size * config.vocab_rows
    )


def peak_memory() -> int:
    """The most bytes so far: of the first device where it says so, else of the process."""
    stats = jax.devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def load_or_make(name: str, dtype: str, mesh: str | None = None) -> LM:
    """The model in a directory, the bundled one ("tiny"), or random weights of a known shape, over a mesh or not."""
    if name not in SHAPES:
        return load(name, dtype, mesh)
    if dtype not in DTYPES:
        raise UserError(f"dtype is {dtype!r}, but it must be {' or '.join(DTYPES)}")
    model, mesh = (
        build(SHAPES[name], jnp.dtype(dtype), param_dtype=jnp.dtype(dtype)),
        mesh and make_mesh(mesh),
    )
    placed = None if mesh is None else shardings(abstract_params(model), mesh, model.config.family)
    params = jax.jit(partial(init_params, model), out_shardings=placed)(jax.random.key(0))
    return LM(model, SHAPES[name], params, None, mesh)


def timing_table(timings: list[Timing]) -> str:
    """A row for each batch size, milliseconds and percent."""
    head = (
        "batch",
        "tokens/s",
        "step ms",
        "backbone",
        "head",
        "outside",
        "outside %",
        "of floor %",
    )
    rows = [(*head, "cold s", "warm s", "peak MB")]
    for t in timings:
        parts = (f"{1e3 * s:.3f}" for s in (t.step, t.backbone, t.head, t.outside))
        shares = (f"{100 * t.outside_share:.1f}", f"{100 * t.floor_share:.1f}")
        ends = (f"{t.cold:.2f}", f"{t.warm:.3f}", f"{t.peak_memory / 1e6:.0f}")
        rows.append((str(t.batch), f"{t.tokens_per_second:.0f}", *parts, *shares, *ends))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )
