"""Decoding as a flow: one state, one step, one scan. Start reading here: it is the paper.

Each response position carries a progress t in [0, 1] and a state x in the space of input embeddings, which starts at
the mask embedding m and moves toward the embedding of the token that the model now predicts. A rule (rules.py) says how
far. With steps of 0 and 1 only, the same loop is mask prediction; the schedule is data. Blocks are an outer scan, and
what the model is shown of them is in sight.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from xflow_jax.belief import TOP, Belief, believe, model_head
from xflow_jax.rules import SETTLED, Action, Rule
from xflow_jax.sight import Cached, Refreshed, Whole

if TYPE_CHECKING:
    from flax import linen as nn


@dataclasses.dataclass(frozen=True)
class Settings:
    """The static part of a decode: what a compilation is for.

    gen_length N; block_length must divide it where `block_causal` is off. steps: forward passes in each block.
    block_causal: LLaDA2.0's blocks, aligned to each sequence's first token and seen only backwards. cache: with it,
    finished blocks are read once and kept; the result is the same. refresh: the prompt's keys and values are read anew
    in every so many steps of a block only, an approximation; 0 or 1 = in every step, and only without block_causal.
    early_exit: skip passes of blocks whose positions all have a progress of at least `settled` (or of which the rule's
    own `open` says that nothing more can happen).
    stop_at_eos: no further blocks after one that holds EOS. eos_early_stop: stop as soon as everything up to the first
    EOS is settled. trace: keep every step; notes: with it what the rule noted. eot_id: the end-of-turn token, where it
    matters.
    """

    gen_length: int
    block_length: int
    steps: int
    block_causal: bool = False
    cache: bool = False
    refresh: int = 0
    early_exit: bool = False
    settled: float = SETTLED
    stop_at_eos: bool = False
    eos_early_stop: bool = False
    trace: bool = False
    notes: bool = False
    eot_id: int | None = None

    @property
    def canvas(self) -> int:
        """Response positions that are decoded: N, and what rounding up to a whole block can add."""
        return self.gen_length + (self.block_length - 1 if self.block_causal else 0)

    @property
    def blocks(self) -> int:
        """How many blocks the canvas can touch."""
        return -(-self.canvas // self.block_length)


@struct.dataclass
class DecodeState:
    """The carry of the scan.

    x float32 [B, N, E] and t float32 [B, N]: the flow. tokens int [B, N]: where t = 1 the token that stands there,
    elsewhere the last prediction (the mask token where nothing was predicted yet): at the end, the read-out.
    forward_passes int [B]: passes that the sequence took part in. finished bool [B]: ended by its EOS. memory: what the
    rule keeps from step to step, a tree of arrays [B, ...] of its `init_memory(batch, canvas)`; None where it has none.
    """

    x: jax.Array
    t: jax.Array
    tokens: jax.Array
    forward_passes: jax.Array
    finished: jax.Array
    memory: Any = None


@struct.dataclass
class Trace:
    """One step as it went, [B, N] each; stacked to [T, B, N] by the scan.

    tokens: the step's predictions. progress: t after the step. confidence: of the predictions. step_fraction: the
    rule's a. reedited: where it was reset. top, top_tokens [B, N, 4]: the belief's. notes: what the rule handed out,
    arrays [B, ...], where Settings.notes asks. Steps that were skipped have confidence, step_fraction, top and notes 0.
    Outside the active block of block-causal attention the model is not asked: there tokens are those that stand there,
    and confidence is 0.
    """

    tokens: jax.Array
    progress: jax.Array
    confidence: jax.Array
    step_fraction: jax.Array
    reedited: jax.Array
    top: jax.Array
    top_tokens: jax.Array
    notes: Any = None


@struct.dataclass
class Step:
    """What a rule is told of a step: a slice of the schedule, and which positions it is about.

    index, block, rho (position in the block's steps, 0 ... 1), quota (how many masks mask prediction writes),
    steps_left (in the block, this one included): scalars. candidates bool [B, N]: the positions of the active block.
    keys [B]: a random key per sequence, for rules that draw.
    """

    index: jax.Array
    block: jax.Array
    rho: jax.Array
    quota: jax.Array
    steps_left: jax.Array
    candidates: Any = None
    keys: Any = None


def schedule(settings: Settings) -> Step:
    """The steps of all blocks in order, [T] each. Quotas: block_length masks over the steps, the remainder first."""
    s = settings.steps
    local = np.tile(np.arange(s), settings.blocks)
    quota = settings.block_length // s + (local < settings.block_length % s)
    return Step(
        index=np.arange(local.size, dtype=np.int32),
        block=np.repeat(np.arange(settings.blocks, dtype=np.int32), s),
        rho=(local / max(s - 1, 1)).astype(np.float32),
        quota=quota.astype(np.int32),
        steps_left=(s - local).astype(np.float32),
    )


def decode(
    model: nn.Module,
    params: Any,
    rule: Rule,
    settings: Settings,
    prompt: jax.Array,
    prompt_mask: jax.Array,
    keys: jax.Array,
    scan: Callable[..., Any] = jax.lax.scan,
) -> tuple[DecodeState, Trace | None]:
    """Decodes responses to prompts int [B, P] whose padding, on the left, is False in prompt_mask bool [B, P].

    keys [B]: one random key per sequence (unused by rules that draw nothing). The state is that of the whole canvas,
    [B, settings.canvas]. `scan` is jax.lax.scan or a plain loop of its signature.
    """
    canvas, config = settings.canvas, model.config
    batch, index = prompt.shape[0], jnp.arange(canvas)[None, :]
    block_of, on_canvas = layout(settings, prompt_mask)
    table = params["wte"]["embedding"]
    m = table[config.mask_id].astype(jnp.float32)[None, None, :]
    prompt_x = model.apply({"params": params}, prompt, method="embed")
    options = rule.belief_options(config, settings.eot_id)
    copies = 2 if options.guidance else 1  # the second one sees no prompt
    if options.guidance:
        prompt_x = jnp.concatenate([prompt_x, jnp.broadcast_to(m, prompt_x.shape).astype(prompt_x.dtype)])
    seen = Cached if settings.cache else Refreshed if settings.refresh > 1 else Whole
    masks = (jnp.tile(mask, (copies, 1)) for mask in (prompt_mask, on_canvas))
    sight = seen(model, params, settings, prompt_x, *masks)

    def embed(tokens: jax.Array) -> jax.Array:
        return table[tokens].astype(jnp.float32)

    def look(kept: Any, state: DecodeState, step: Step) -> tuple[Belief, Any]:
        h, kept = sight.hidden(kept, jnp.tile(state.x, (copies, 1, 1)), step)
        unconditional = h[batch:] if options.guidance else None
        belief = believe(model_head(model, params), h[:batch], config.vocab_rows, options, step.keys, unconditional)
        if not settings.block_causal:
            return belief, kept
        here = (block_of == step.block) & on_canvas
        return _onto_canvas(belief, sight.window(step.block)[:batch, :1], here, state.tokens), kept

    def one_block(carry: tuple[DecodeState, Any], steps: Step) -> tuple[tuple[DecodeState, Any], Trace | None]:
        state, kept = carry
        block = steps.block[0]
        if settings.blocks > 1:
            state = begin_block(state, block)
            going_on = jnp.any((block_of == block) & on_canvas & ~state.finished[:, None])
            kept = sight.keep(kept, jnp.tile(state.x, (copies, 1, 1)), block, going_on)
        return scan(one_step, (state, kept), steps)

    def one_step(carry: tuple[DecodeState, Any], step: Step) -> tuple[tuple[DecodeState, Any], Trace | None]:
        state = carry[0]
        here = (block_of == step.block) & on_canvas
        moving = rule.open(state) if hasattr(rule, "open") else state.t < settings.settled
        busy = ~state.finished & jnp.any(here & moving if settings.early_exit else here, axis=-1)
        candidates = here & busy[:, None]

        def forward(state: DecodeState, kept: Any) -> tuple[tuple[DecodeState, Any], Trace | None]:
            row_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, step.index) if rule.needs_keys else None
            told = step.replace(candidates=candidates, keys=row_keys)
            belief, kept = look(kept, state, told)
            action = rule(belief, state, told)
            after = advance(state, belief, action, candidates, embed(belief.tokens), m, config.mask_id)
            if action.mixture is not None:
                mixed = jnp.einsum("bnk,bnke->bne", action.mixture, embed(belief.top_tokens))
                mixed += (1 - action.mixture.sum(-1, keepdims=True)) * m
                after = after.replace(x=jnp.where((candidates & (after.t < 1))[..., None], mixed, after.x))
            if action.memory is not None:
                after = after.replace(memory=action.memory)
            finished = ended(state, after) if settings.eos_early_stop else state.finished
            after = after.replace(forward_passes=state.forward_passes + busy, finished=finished)
            a = jnp.where(candidates, action.a, 0.0)
            notes = action.notes if settings.notes else None
            reset, top = action.reset & candidates, (belief.top, belief.top_tokens)
            trace = Trace(belief.tokens, after.t, belief.confidence, a, reset, *top, notes)
            return (after, kept), trace if settings.trace else None

        def skip(state: DecodeState, kept: Any) -> tuple[tuple[DecodeState, Any], Trace | None]:
            nothing = jnp.zeros_like(state.t)
            notes = jax.eval_shape(forward, state, kept)[1].notes if settings.notes else None
            notes = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), notes)
            top = (jnp.zeros((*nothing.shape, TOP)), jnp.zeros((*nothing.shape, TOP), jnp.int32))
            trace = Trace(state.tokens, state.t, nothing, nothing, jnp.zeros_like(candidates), *top, notes)
            return (state, kept), trace if settings.trace else None

        return jax.lax.cond(jnp.any(busy), forward, skip, *carry)

    def begin_block(state: DecodeState, block: jax.Array) -> DecodeState:
        """Hardens the tokens of the blocks before."""
        old = (block_of < block) & on_canvas
        x = jnp.where((old & (state.t < 1))[..., None], embed(state.tokens), state.x)
        finished = state.finished
        if settings.stop_at_eos:
            answer = old & (index < settings.gen_length)
            finished |= jnp.any(answer & (state.tokens == config.eos_id), axis=-1)
        return state.replace(x=x, t=jnp.where(old, 1.0, state.t), finished=finished)

    def ended(before: DecodeState, after: DecodeState) -> jax.Array:
        """Rows whose positions up to their first settled EOS are all settled.

        LLaDA2.0's own loop looks only in steps that write an EOS; so do we under its block-causal blocks.
        """
        settled = after.t >= SETTLED
        end = settled & (after.tokens == config.eos_id) & (index < settings.gen_length)
        first = jnp.argmax(end, axis=-1, keepdims=True)
        ended = jnp.any(end, axis=-1) & jnp.all(settled | (index > first), axis=-1)
        if settings.block_causal:
            ended &= jnp.any(end & (before.t < SETTLED), axis=-1)
        return before.finished | ended

    start = DecodeState(
        x=jnp.broadcast_to(m, (batch, canvas, m.shape[-1])),
        t=jnp.zeros((batch, canvas)),
        tokens=jnp.full((batch, canvas), config.mask_id, jnp.int32),
        forward_passes=jnp.zeros(batch, jnp.int32),
        finished=jnp.zeros(batch, bool),
        memory=rule.init_memory(batch, canvas) if hasattr(rule, "init_memory") else None,
    )
    by_block = jax.tree.map(lambda x: jnp.reshape(x, (settings.blocks, settings.steps)), schedule(settings))
    (state, _), trace = scan(one_block, (start, sight.start()), by_block)
    return state, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), trace)


def advance(
    state: DecodeState,
    belief: Belief,
    action: Action,
    candidates: jax.Array,
    x_pred: jax.Array,
    m: jax.Array,
    mask_id: int,
) -> DecodeState:
    """The flow's step (Eqs. 4-8, 10) at `candidates` bool [B, N]; x_pred float32 [B, N, E], m float32 [1, 1, E].

    The velocity (x_pred - x) / (1 - t) times the time a (1 - t) is a (x_pred - x): the division cancels and is never
    made. A prediction of the mask token changes nothing.
    """
    c, a = belief.confidence, action.a
    real = candidates & (belief.tokens != mask_id)
    whole = action.commit | (a >= 1)  # written out: x + 1 (x_pred - x) is not x_pred in floating point
    ahead = jnp.where(whole[..., None], x_pred, state.x + a[..., None] * (x_pred - state.x))
    t_ahead = jnp.where(whole, 1.0, state.t + a * (1 - state.t))
    back = action.reset & ~action.commit
    moving = real & (state.t < 1) | real & action.commit
    x = jnp.where(moving[..., None], ahead, state.x)
    x = jnp.where((real & back)[..., None], c[..., None] * x_pred + (1 - c[..., None]) * m, x)
    t = jnp.where(real & back, c, jnp.where(moving, t_ahead, state.t))
    tokens = jnp.where(candidates & (state.t < 1) | real & action.reset, belief.tokens, state.tokens)
    return state.replace(x=x, t=t, tokens=tokens)


def _onto_canvas(belief: Belief, first: jax.Array, here: jax.Array, tokens: jax.Array) -> Belief:
    """A belief of a block [B, block_length, ...] that begins at the canvas position `first` int [B, 1], on the canvas.

    here bool [B, N]: the block's positions. Elsewhere the model was not asked: what stands there, with confidence 0.
    """
    slot = jnp.clip(jnp.arange(here.shape[1])[None, :] - first, 0, belief.tokens.shape[1] - 1)

    def spread(x: jax.Array) -> jax.Array:
        rest = (...,) + (None,) * (x.ndim - 2)
        return jnp.where(here[rest], jnp.take_along_axis(x, slot[rest], axis=1), jnp.zeros((), x.dtype))

    belief = jax.tree.map(spread, belief)
    certain = jnp.arange(belief.top.shape[-1])[None, None, :] == 0  # so that nobody divides by zero
    top = jnp.where(here[..., None], belief.top, certain)
    return belief.replace(tokens=jnp.where(here, belief.tokens, tokens), top=top)


def layout(settings: Settings, prompt_mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(block of each canvas position int [B, N], whether the position is on the row's canvas bool [B, N])."""
    index = jnp.arange(settings.canvas)[None, :]
    batch = prompt_mask.shape[0]
    if not settings.block_causal:
        shape = (batch, settings.canvas)
        return jnp.broadcast_to(index // settings.block_length, shape), jnp.ones(shape, bool)
    length = jnp.sum(prompt_mask, axis=-1, keepdims=True)
    size = settings.block_length
    end = -(-(length + settings.gen_length) // size) * size
    return (length + index) // size - length // size, length + index < end


def read_out(settings: Settings, state: DecodeState, eos_id: int) -> tuple[jax.Array, jax.Array]:
    """(tokens int [B, N], final progress float32 [B, N]) of a decode; behind a sequence's end there is only EOS."""
    tokens, n = state.tokens[:, : settings.gen_length], settings.gen_length
    if settings.stop_at_eos or settings.eos_early_stop:
        is_eos = tokens == eos_id
        after = jnp.cumsum(is_eos, axis=-1) - is_eos > 0
        cut = after if settings.stop_at_eos else after & state.finished[:, None]
        tokens = jnp.where(cut, eos_id, tokens)
    return tokens, state.t[:, :n]
