"""Decoding as a flow: one state, one step, one scan. Start reading here: it is the paper.

Each response position carries a progress t in [0, 1] and a state x in the space of input embeddings, which starts at
the mask embedding m and moves toward the embedding of the token that the model now predicts. A rule (rules.py) says how
far. With steps of 0 and 1 only, the same loop is mask prediction; the schedule is data. Blocks are an outer scan, and
what the model is shown of them is in sight.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from xflow_jax.decoding.belief import TOP, Belief, compute_belief
from xflow_jax.decoding.blocks import block_layout, make_schedule
from xflow_jax.decoding.forward import CachedForward, FullForward, StalePromptForward
from xflow_jax.decoding.rules.base import Action, Rule
from xflow_jax.decoding.state import SETTLED, DecodeConfig, DecodeState, Step, Trace
from xflow_jax.models import make_head
from xflow_jax.types import Backbone


def decode(
    model: Backbone,
    params: Any,
    rule: Rule,
    settings: DecodeConfig,
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
    block_of, on_canvas = block_layout(settings, prompt_mask)
    table = params["wte"]["embedding"]
    m = table[config.mask_id].astype(jnp.float32)[None, None, :]
    prompt_x = model.apply({"params": params}, prompt, method="embed")
    options = rule.belief_options(config, settings.eot_id)
    copies = 2 if options.guidance else 1  # the second one sees no prompt
    if options.guidance:
        prompt_x = jnp.concatenate(
            [prompt_x, jnp.broadcast_to(m, prompt_x.shape).astype(prompt_x.dtype)]
        )
    seen = (
        CachedForward
        if settings.cache
        else StalePromptForward
        if settings.refresh > 1
        else FullForward
    )
    masks = (jnp.tile(mask, (copies, 1)) for mask in (prompt_mask, on_canvas))
    sight = seen(model, params, settings, prompt_x, *masks)

    def embed(tokens: jax.Array) -> jax.Array:
        return table[tokens].astype(jnp.float32)

    def look(kept: Any, state: DecodeState, step: Step) -> tuple[Belief, Any]:
        h, kept = sight.hidden(kept, jnp.tile(state.x, (copies, 1, 1)), step)
        unconditional = h[batch:] if options.guidance else None
        belief = compute_belief(
            make_head(model, params),
            h[:batch],
            config.vocab_rows,
            options,
            step.keys,
            unconditional,
        )
        if not settings.block_causal:
            return belief, kept
        here = (block_of == step.block) & on_canvas
        return _onto_canvas(belief, sight.window(step.block)[:batch, :1], here, state.tokens), kept

    def one_block(
        carry: tuple[DecodeState, Any], steps: Step
    ) -> tuple[tuple[DecodeState, Any], Trace | None]:
        state, kept = carry
        block = steps.block[0]
        if settings.blocks > 1:
            state = begin_block(state, block)
            going_on = jnp.any((block_of == block) & on_canvas & ~state.finished[:, None])
            kept = sight.keep(kept, jnp.tile(state.x, (copies, 1, 1)), block, going_on)
        return scan(one_step, (state, kept), steps)

    def one_step(
        carry: tuple[DecodeState, Any], step: Step
    ) -> tuple[tuple[DecodeState, Any], Trace | None]:
        state = carry[0]
        here = (block_of == step.block) & on_canvas
        moving = rule.open(state) if hasattr(rule, "open") else state.t < settings.settled
        busy = ~state.finished & jnp.any(here & moving if settings.early_exit else here, axis=-1)
        candidates = here & busy[:, None]

        def forward(state: DecodeState, kept: Any) -> tuple[tuple[DecodeState, Any], Trace | None]:
            row_keys = (
                jax.vmap(jax.random.fold_in, (0, None))(keys, step.index)
                if rule.needs_keys
                else None
            )
            told = step.replace(candidates=candidates, keys=row_keys)
            belief, kept = look(kept, state, told)
            action = rule(belief, state, told)
            after = advance(
                state, belief, action, candidates, embed(belief.tokens), m, config.mask_id
            )
            if action.mixture is not None:
                mixed = jnp.einsum("bnk,bnke->bne", action.mixture, embed(belief.top_tokens))
                mixed += (1 - action.mixture.sum(-1, keepdims=True)) * m
                after = after.replace(
                    x=jnp.where((candidates & (after.t < 1))[..., None], mixed, after.x)
                )
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
            trace = Trace(
                state.tokens, state.t, nothing, nothing, jnp.zeros_like(candidates), *top, notes
            )
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
    by_block = jax.tree.map(
        lambda x: jnp.reshape(x, (settings.blocks, settings.steps)), make_schedule(settings)
    )
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
    whole = action.commit | (
        a >= 1
    )  # written out: x + 1 (x_pred - x) is not x_pred in floating point
    ahead = jnp.where(whole[..., None], x_pred, state.x + a[..., None] * (x_pred - state.x))
    t_ahead = jnp.where(whole, 1.0, state.t + a * (1 - state.t))
    back = action.reset & ~action.commit
    moving = real & (state.t < 1) | real & action.commit
    x = jnp.where(moving[..., None], ahead, state.x)
    x = jnp.where((real & back)[..., None], c[..., None] * x_pred + (1 - c[..., None]) * m, x)
    t = jnp.where(real & back, c, jnp.where(moving, t_ahead, state.t))
    tokens = jnp.where(
        candidates & (state.t < 1) | real & action.reset, belief.tokens, state.tokens
    )
    return state.replace(x=x, t=t, tokens=tokens)


def _onto_canvas(belief: Belief, first: jax.Array, here: jax.Array, tokens: jax.Array) -> Belief:
    """A belief of a block [B, block_length, ...] that begins at the canvas position `first` int [B, 1], on the canvas.

    here bool [B, N]: the block's positions. Elsewhere the model was not asked: what stands there, with confidence 0.
    """
    slot = jnp.clip(jnp.arange(here.shape[1])[None, :] - first, 0, belief.tokens.shape[1] - 1)

    def spread(x: jax.Array) -> jax.Array:
        rest = (...,) + (None,) * (x.ndim - 2)
        return jnp.where(
            here[rest], jnp.take_along_axis(x, slot[rest], axis=1), jnp.zeros((), x.dtype)
        )

    belief = jax.tree.map(spread, belief)
    certain = jnp.arange(belief.top.shape[-1])[None, None, :] == 0  # so that nobody divides by zero
    top = jnp.where(here[..., None], belief.top, certain)
    return belief.replace(tokens=jnp.where(here, belief.tokens, tokens), top=top)
