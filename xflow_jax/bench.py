"""Where the time of a decode goes: `xflow bench --model DIR|tiny|PRESET`.

Three programs are timed side by side: the decode itself, its backbone with the head's matrix product, and the backbone
alone. Their rounds alternate and medians are reported, so that another load on the machine falls on all three alike.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from xflow_jax import bench_cache
from xflow_jax.belief import model_head
from xflow_jax.choices import parse_rule
from xflow_jax.config import PRESETS, LLaDAConfig, UserError
from xflow_jax.decode import Settings, layout, schedule
from xflow_jax.generate import decode_batch, pad_prompts, settings_of
from xflow_jax.lm import DTYPES, LM, load
from xflow_jax.models import abstract_params, build, init_params
from xflow_jax.plan_programs import forward_flops
from xflow_jax.records import write_whole
from xflow_jax.rules import MaskPrediction, Rule
from xflow_jax.sharding import make_mesh, shardings
from xflow_jax.sight import Cached
from xflow_jax.storage import refuse_existing

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


def measure(lm: LM, rule: Rule, settings: Settings, batch: int, prompt_length: int, rate: float, rounds: int) -> Timing:
    """Times a decode of `batch` random prompts and its parts; rate: FLOP/s of `matmul_rate`."""
    rng = np.random.default_rng(0)
    rows = rng.integers(0, lm.config.vocab_size, (batch, prompt_length)).tolist()
    ids, mask = (jnp.asarray(x) for x in pad_prompts(lm, rows))
    keys = jax.random.split(jax.random.key(0), batch)
    copies = 2 if rule.belief_options(lm.config, None).guidance else 1  # guidance doubles the batch
    settings = dataclasses.replace(settings, stop_at_eos=False)

    def decoded() -> Any:
        return decode_batch(lm.model, lm.params, rule, settings, ids, mask, keys)

    began = time.perf_counter()
    with lm.scope():
        steps = int(decoded()[2].max())
    cold = time.perf_counter() - began
    width, seen = ids.shape[1] + settings.canvas, jnp.tile(mask, (copies, 1))
    if settings.cache:
        queries = headed = settings.block_length
        passes, given = _cached_passes, (steps // settings.steps, jnp.tile(ids, (copies, 1)), seen)
    else:
        queries, headed = width, settings.canvas
        x = jnp.asarray(rng.normal(size=(batch * copies, width, lm.params["wte"]["embedding"].shape[1])), lm.dtype)
        passes, given = _passes, (x, jnp.pad(seen, ((0, 0), (0, settings.canvas)), constant_values=True))
    programs = {
        "warm": decoded,
        "with_head": lambda: passes(lm.model, lm.params, settings, True, *given),
        "backbone": lambda: passes(lm.model, lm.params, settings, False, *given),
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
    share = statistics.median(1 - part / all_ for part, all_ in zip(times["with_head"], times["warm"], strict=True))
    floor = step_flops(lm.config, batch * copies, queries, width, headed) / rate
    return Timing(
        batch=batch,
        tokens_per_second=batch * settings.gen_length / warm,
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
class Rival:
    """The same decode by PyTorch beside ours, medians of alternating rounds.

    tokens_per_second: of both. speedup: ours / theirs, a median of its own. agreement: share of equal tokens.
    """

    batch: int
    ours: float
    theirs: float
    speedup: float
    agreement: float


def compare(lm: LM, settings: Settings, batch: int, prompt_length: int, rounds: int) -> Rival:
    """Times mask prediction on random prompts against `bench_torch.torch_decoder` with the same weights."""
    from xflow_jax.bench_torch import torch_decoder

    theirs = torch_decoder(lm.config, lm.params, str(lm.dtype))
    prompt = np.random.default_rng(0).integers(0, lm.config.vocab_size, (batch, prompt_length))
    ids, mask = jnp.asarray(prompt, jnp.int32), jnp.ones(prompt.shape, bool)
    keys = jax.random.split(jax.random.key(0), batch)
    steps, length = settings.blocks * settings.steps, settings.gen_length
    programs = (
        lambda: np.asarray(decode_batch(lm.model, lm.params, MaskPrediction(), settings, ids, mask, keys)[0]),
        lambda: theirs(prompt, length, steps),
    )
    with lm.scope():
        ours, wanted = (program() for program in programs)
        times = [[_timed(program) for program in programs] for _ in range(rounds)]
    mine, other = (batch * length / statistics.median(column) for column in zip(*times, strict=True))
    speedup = statistics.median(b / a for a, b in times)
    return Rival(batch, mine, other, speedup, float(np.mean(ours == wanted)))


def _timed(program: Callable[[], Any]) -> float:
    began = time.perf_counter()
    program()
    return time.perf_counter() - began


@partial(jax.jit, static_argnames=("model", "settings", "head"))
def _passes(model: Any, params: Any, settings: Settings, head: bool, x: jax.Array, mask: jax.Array) -> Any:
    """As many forward passes as a decode makes, each on what the last one left: x [B, L, E] -> the last (x, logits)."""
    logits_of = model_head(model, params)
    rows, canvas = model.config.vocab_rows, settings.canvas

    def one(carry: tuple[jax.Array, jax.Array], _: None) -> tuple[tuple[jax.Array, jax.Array], None]:
        h = model.apply({"params": params}, carry[0], mask, method="hidden")
        # Kept in the carry: nothing may be cut off as unused.
        return (h, logits_of(h[:, -canvas:], 0, rows) if head else carry[1]), None

    logits = jnp.zeros((x.shape[0], canvas, rows) if head else (), x.dtype)
    return jax.lax.scan(one, (x, logits), None, length=settings.blocks * settings.steps)[0]


@partial(jax.jit, static_argnames=("model", "settings", "head", "blocks"))
def _cached_passes(
    model: Any, params: Any, settings: Settings, head: bool, blocks: int, prompt: jax.Array, mask: jax.Array
) -> Any:
    """The same of a decode with the exact cache: the prompt's pass, those of each block's steps, and the one that reads
    it into the cache. prompt int, mask bool [B, P] -> the last (x [B, canvas, E], cache, logits)."""
    logits_of, rows = model_head(model, params), model.config.vocab_rows
    prompt_x = model.apply({"params": params}, prompt, method="embed")
    sight = Cached(model, params, settings, prompt_x, mask, layout(settings, mask)[1])

    def one_step(carry: Any, step: Any) -> tuple[Any, None]:
        x, kept, logits = carry
        h, kept = sight.hidden(kept, x, step)
        x = jax.lax.dynamic_update_slice_in_dim(x, h, 0, axis=1)  # so that each pass is of what the last one left
        return (x, kept, logits_of(h, 0, rows) if head else logits), None

    def one_block(carry: Any, steps: Any) -> tuple[Any, None]:
        x, kept, logits = carry
        kept = sight.keep(kept, x, steps.block[0], jnp.array(True))
        return jax.lax.scan(one_step, (x, kept, logits), steps)[0], None

    x = jnp.zeros((prompt.shape[0], settings.canvas, prompt_x.shape[-1]), prompt_x.dtype)
    logits = jnp.zeros((x.shape[0], settings.block_length, rows) if head else (), x.dtype)
    steps = jax.tree.map(lambda part: part.reshape(settings.blocks, -1)[:blocks], schedule(settings))
    return jax.lax.scan(one_block, (x, sight.start(), logits), steps)[0]


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
    return forward_flops(config, rows, queries, keys) + 2.0 * rows * headed * config.hidden_size * config.vocab_rows


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
    model, mesh = build(SHAPES[name], jnp.dtype(dtype), param_dtype=jnp.dtype(dtype)), mesh and make_mesh(mesh)
    placed = None if mesh is None else shardings(abstract_params(model), mesh, model.config.family)
    params = jax.jit(partial(init_params, model), out_shardings=placed)(jax.random.key(0))
    return LM(model, SHAPES[name], params, None, mesh)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `xflow bench`."""
    models = f"a directory, tiny, or, with random weights, {', '.join(SHAPES)}"
    parser.add_argument("--model", required=True, metavar="DIR", help=models)
    parser.add_argument("--rule", default="flow", metavar="RULE", help="mask, threshold, flow (default: %(default)s)")
    parser.add_argument("--batch-sizes", default="1,8,64", metavar="LIST", help="(default: %(default)s)")
    parser.add_argument("--gen-length", type=int, default=48, metavar="N", help="of responses (default: %(default)s)")
    parser.add_argument("--block-length", type=int, metavar="N", help="of blocks (default: as the model was made for)")
    parser.add_argument("--steps", type=int, metavar="N", help="forward passes (default: a quarter of the tokens)")
    parser.add_argument("--prompt-length", type=int, default=40, metavar="N", help="of prompts (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="repetitions (default: %(default)s)")
    parser.add_argument("--dtype", default="float32", metavar="TYPE", help="float32 or bfloat16 (default: %(default)s)")
    parser.add_argument("--against", choices=("torch",), help="mask prediction beside a plain PyTorch model instead")
    parser.add_argument("--mesh", metavar="D,F,T", help="sizes of data, fsdp and tensor (default: one device)")
    parser.add_argument("--json", metavar="FILE", help="keep every number in a new file")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--cache-ratio", action="store_true", help="only: a step with the exact cache and without it")
    only.add_argument(
        "--refresh", type=int, metavar="R", help="only: a step with the prompt read every R steps and in every one"
    )


def run(args: argparse.Namespace) -> None:
    """Measures and prints a table; every step is taken, early exits are off. UserError on bad input."""
    sizes = _sizes(args.batch_sizes)
    for name, value in (("prompt_length", args.prompt_length), ("rounds", args.rounds)):
        if value < 1:
            raise UserError(f"{name} must be at least 1, not {value}")
    if args.json:
        refuse_existing(Path(args.json))
    label, rule = parse_rule(args.rule)
    lm = load_or_make(args.model, args.dtype, args.mesh)
    steps = max(args.gen_length // 4, 1) if args.steps is None else args.steps
    settings = settings_of(lm, args.prompt_length, args.gen_length, steps, None, args.block_length)
    if args.cache_ratio or args.refresh is not None:
        return _two_ways(args, lm, rule, settings, sizes)
    with lm.scope():
        rate = matmul_rate(lm.dtype)
    device = jax.devices()[0]
    parameters = sum(x.size for x in jax.tree.leaves(lm.params))
    print(
        f"{args.model}: {parameters / 1e6:.2f} M parameters in {lm.dtype}, on {device.device_kind}, which multiplies "
        f"matrices at {rate / 1e9:.0f} GFLOP/s\n{label}: prompts of {args.prompt_length} tokens, responses of "
        f"{args.gen_length} in {steps} steps, none skipped; {args.rounds} rounds or more"
    )
    if args.against:
        print("mask prediction beside PyTorch on the same weights:")
        rivals = []
        for batch in sizes:
            rivals.append(r := compare(lm, settings, batch, args.prompt_length, args.rounds))
            print(
                f"batch {r.batch}: {r.ours:.1f} tokens/s, PyTorch {r.theirs:.1f}: {r.speedup:.2f} times; "
                f"{100 * r.agreement:.1f} % of the tokens are equal",
                flush=True,
            )
        _keep(args, device, parameters, rate, {"rivals": [dataclasses.asdict(r) for r in rivals]})
        return
    timings = []
    for batch in tqdm(sizes, desc="batch sizes", leave=False, disable=None):
        timings.append(measure(lm, rule, settings, batch, args.prompt_length, rate, args.rounds))
    print(table(timings))
    _keep(args, device, parameters, rate, {"timings": [dataclasses.asdict(t) for t in timings]})


def _keep(args: argparse.Namespace, device: Any, parameters: int, rate: float, found: dict[str, Any]) -> None:
    """Writes what was measured, and under what, where --json asks for it."""
    if args.json:
        facts = vars(args) | {"device": device.device_kind, "parameters": parameters, "matmul_flops_per_second": rate}
        facts = {k: v for k, v in facts.items() if isinstance(v, str | int | float | None)}
        write_whole(Path(args.json), json.dumps(facts | found, indent=1) + "\n")


def _two_ways(args: argparse.Namespace, lm: LM, rule: Rule, settings: Settings, sizes: list[int]) -> None:
    if args.refresh is not None and args.refresh < 2:
        raise UserError(f"refresh must be at least 2 to be compared with every step, not {args.refresh}")
    refresh = args.refresh or 0
    ways = bench_cache.ways_of(lm, settings, refresh)
    parameters = sum(x.size for x in jax.tree.leaves(lm.params))
    print(
        f"{args.model}: {parameters / 1e6:.1f} M parameters, prompts of {args.prompt_length} tokens, responses of "
        f"{settings.gen_length} in blocks of {settings.block_length} with {settings.steps} steps each"
    )
    for batch in sizes:
        result = bench_cache.measure(lm, rule, ways, batch, args.prompt_length, args.rounds, seconds)
        print(f"batch {batch}: {bench_cache.sentence(result, refresh)}", flush=True)


def table(timings: list[Timing]) -> str:
    """A row for each batch size, milliseconds and percent."""
    head = ("batch", "tokens/s", "step ms", "backbone", "head", "outside", "outside %", "of floor %")
    rows = [(*head, "cold s", "warm s", "peak MB")]
    for t in timings:
        parts = (f"{1e3 * s:.3f}" for s in (t.step, t.backbone, t.head, t.outside))
        shares = (f"{100 * t.outside_share:.1f}", f"{100 * t.floor_share:.1f}")
        ends = (f"{t.cold:.2f}", f"{t.warm:.3f}", f"{t.peak_memory / 1e6:.0f}")
        rows.append((str(t.batch), f"{t.tokens_per_second:.0f}", *parts, *shares, *ends))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def _sizes(text: str) -> list[int]:
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError:
        sizes = []
    if not sizes or min(sizes) < 1:
        raise UserError(f"the batch sizes must be positive whole numbers with commas between them, not {text!r}")
    return sizes
