"""x-prediction alignment (Eqs. 11, 12): `python -m train.align configs/align_tiny.toml`.

Teaches a masked diffusion model that softmax(Z) W_in is the clean state, at masked and at clean positions, on responses
of its own (train.self_generate). Everything is resumed from the run's folder.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from train.setup import Run, export, run_program, tokenizer_folder
from xflow_jax.config import UserError, load_toml
from xflow_jax.data import Responses, shuffled_batches
from xflow_jax.lm import load
from xflow_jax.models import build
from xflow_jax.plot import alignment_losses
from xflow_jax.steps import TrainState, make_align_step, make_alignment_loss


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The optax chain: clipping, then `name` on a warm-up and a constant or cosine rate."""

    name: Literal["adamw", "adafactor"] = "adamw"
    rate: float = 3e-4
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: int = 10
    weight_decay: float = 0.0
    b2: float = 0.999
    clip: float = 1.0


@dataclasses.dataclass(frozen=True)
class AlignConfig:
    """A run of alignment. data: jsonl of train.self_generate; `held_out` of its lines are only measured.

    only_passed: leave out answers that were judged and are wrong. chunk: response positions whose logits stand in
    memory at a time. remat: what the backward pass recomputes.
    """

    model: str
    data: tuple[str, ...]
    out: str
    only_passed: bool = False
    prompt_length: int = 40
    gen_length: int = 48
    batch_size: int = 64
    accumulate: int = 1
    steps: int = 200
    optimizer: OptimizerConfig = OptimizerConfig()
    freeze_embedding: bool = True
    held_out: int = 256
    chunk: int = 16
    remat: Literal["none", "dots", "full"] = "full"
    dtype: str = "float32"
    seed: int = 0
    log_every: int = 10
    save_every: int = 50
    export_dtype: Literal["bfloat16", "float32"] = "bfloat16"


def make_optimizer(config: AlignConfig, params: Any) -> optax.GradientTransformation:
    """The configured chain; a frozen embedding table gets no update and no optimiser state."""
    o = config.optimizer
    if o.schedule == "cosine":
        rate = optax.warmup_cosine_decay_schedule(0.0, o.rate, o.warmup_steps, config.steps)
    else:
        rate = optax.linear_schedule(0.0, o.rate, o.warmup_steps)
    if o.name == "adamw":
        inner = optax.adamw(rate, b2=o.b2, weight_decay=o.weight_decay)
    else:
        inner = optax.adafactor(rate, weight_decay_rate=o.weight_decay or None)
    chain = optax.chain(optax.clip_by_global_norm(o.clip), inner)
    if not config.freeze_embedding:
        return chain
    labels = {name: "frozen" if name == "wte" else "trained" for name in params}  # a prefix of the tree
    return optax.multi_transform({"trained": chain, "frozen": optax.set_to_zero()}, labels)


def main(path: str, overrides: list[str]) -> None:
    """Trains to the configured step, then writes `out`/hf in the Hugging Face format and a picture of the losses."""
    config = load_toml(path, AlignConfig, overrides)
    lm = load(config.model, dtype=config.dtype)
    source = Responses(config.data, lm.config, config.prompt_length, config.gen_length, config.only_passed)
    held_out = _hold_out(source, config)
    model = build(lm.config, dtype=jnp.dtype(config.dtype), remat=None if config.remat == "none" else config.remat)
    optimizer = make_optimizer(config, lm.params)
    step_fn = jax.jit(make_align_step(model, optimizer, config.chunk, config.accumulate), donate_argnums=0)
    loss_fn = jax.jit(make_alignment_loss(model, config.chunk))
    key, eval_key = jax.random.split(jax.random.key(config.seed))

    def measure(params: Any) -> dict[str, float]:
        """The metrics on the held-out responses, always under the same masks."""
        kept = [loss_fn(params, batch, jax.random.fold_in(eval_key, i))[1] for i, batch in enumerate(held_out)]
        return {f"held_out_{name}": float(sum(m[name] for m in kept) / len(kept)) for name in kept[0]}

    run = Run(config.out)
    data = shuffled_batches(source, config.batch_size, config.seed)
    frozen_nll = measure(lm.params)["held_out_masked_nll"]
    # The state's buffers are donated from step to step, so it must not share any with the model as it was loaded.
    state = run.restore(TrainState.create(jax.tree.map(jnp.copy, lm.params), optimizer), data)
    first, began = int(state.step), time.perf_counter()
    if first == 0:
        run.log(0, measure(state.params) | {"frozen_masked_nll": frozen_nll})
    for step in run.steps(first, config.steps, "align"):
        state, metrics = step_fn(state, jax.tree.map(jnp.asarray, next(data)), key)
        done = step + 1
        if done % config.log_every == 0 or done == config.steps:
            seconds = (time.perf_counter() - began) / (done - first)
            kept = measure(state.params) | {"frozen_masked_nll": frozen_nll, "seconds_per_step": seconds}
            run.log(done, metrics | kept)
            run.bar.set_postfix(loss=f"{float(metrics['loss']):.4f}")
        if done % config.save_every == 0 or done == config.steps or run.stopped:
            run.save(done, state, data)
    run.close()
    if int(state.step) == config.steps:
        made_by = {"command": "python -m train.align", "config": dataclasses.asdict(config)}
        folder = Path(config.out) / "hf"
        export(folder, state.params, lm.config, tokenizer_folder(config.model), made_by, config.export_dtype)
        alignment_losses(run.metrics(), Path(config.out) / "alignment.png")


def _hold_out(source: Responses, config: AlignConfig) -> list[dict[str, jax.Array]]:
    """Takes `held_out` responses, spread evenly over the file, out of `source`, as whole batches."""
    count = config.held_out // config.batch_size
    if not count or len(source) <= config.held_out:
        raise UserError(
            f"held_out {config.held_out} must be at least one batch of {config.batch_size} and leave some of the "
            f"{len(source)} responses to train on"
        )
    size = count * config.batch_size
    taken = {i * len(source) // size for i in range(size)}  # the file goes by prompt length: its end is no fair sample
    rows = [source[i] for i in sorted(taken)]
    source.rows = [row for i, row in enumerate(source.rows) if i not in taken]
    cut = [rows[i : i + config.batch_size] for i in range(0, len(rows), config.batch_size)]
    return [{name: jnp.stack([row[name] for row in part]) for name in part[0]} for part in cut]


if __name__ == "__main__":
    run_program(main, "python -m train.align CONFIG [key=value ...]")
