"""Decoding as a flow. Start reading here: it is the paper.

Each response position has a progress t in [0, 1] and a state x in the space of input embeddings.
x starts at the mask embedding m and moves toward the embedding of the predicted token. A rule
(rules/) returns how far. With steps of 0 and 1 only, the same loop is mask prediction.

The loop is an outer scan over blocks and an inner scan over the steps of a block:

    decode -> _decode_block -> decode_step -> _active_step or _skipped_step

The schedule is data (blocks.py). Forward passes are in forward.py and cached_forward.py.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from xflow_jax.decoding.belief import TOP, Belief, BeliefOptions, compute_belief
from xflow_jax.decoding.blocks import make_schedule
from xflow_jax.decoding.canvas import embed, onto_canvas, start_state
from xflow_jax.decoding.context import DecodeContext, Scan, make_context
from xflow_jax.decoding.forward import Block, Carry
from xflow_jax.decoding.rules.base import Action, Rule
from xflow_jax.decoding.state import SETTLED, DecodeConfig, DecodeState, Step, Trace, is_stop
from xflow_jax.models import make_head
from xflow_jax.types import Array, Backbone, Bool, Float, Int, Key, Params


def decode(
    model: Backbone,
    params: Params,
    rule: Rule,
    config: DecodeConfig,
    prompt: Int[Array, "B P"],
    prompt_mask: Bool[Array, "B P"],
    keys: Key[Array, " B"],
    scan: Scan = jax.lax.scan,
) -> tuple[DecodeState, Trace | None]:
    """Decodes responses to a batch of prompts (Algorithm 1).

    Args:
        model: the backbone.
        params: its parameters.
        rule: how far each position moves in a step.
        config: static lengths and switches.
        prompt: token ids, padded on the left.
        prompt_mask: False at padding.
        keys: one random key per sequence. Rules that draw nothing ignore them.
        scan: jax.lax.scan, or a plain loop of its signature for tests.

    Returns:
        The final state over the whole canvas, [B, config.canvas], and the trace of all steps
        [T, B, canvas] if config.trace is set, otherwise None.
    """
    start, fixed = start_state(model, params, rule, config, prompt, prompt_mask)
    context = make_context(
        model, params, rule, config, prompt, prompt_mask, keys, scan, fixed=fixed
    )
    by_block = jax.tree.map(
        lambda x: jnp.reshape(x, (config.blocks, config.steps)), make_schedule(config)
    )
    one_block = functools.partial(_decode_block, context)
    (state, _), trace = scan(one_block, (start, context.forward.init_cache()), by_block)
    return state, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), trace)


def _decode_block(
    context: DecodeContext, carry: tuple[DecodeState, Carry], steps: Step
) -> tuple[tuple[DecodeState, Carry], Trace | None]:
    """Runs the steps of one block, a slice of the schedule."""
    state, cache = carry
    block = steps.block[0]
    if context.config.blocks > 1:
        state = begin_block(context, state, block)
        here = (context.block_of == block) & context.on_canvas
        any_active = jnp.any(here & ~state.finished[:, None])
        cache = context.forward.begin_block(cache, context.model_rows(state.x), block, any_active)
    if context.starts is not None:
        first = jax.tree.map(lambda x: x[0], steps)
        state = write_start(context, first, cache, state)
    return context.scan(functools.partial(decode_step, context), (state, cache), steps)


def begin_block(context: DecodeContext, state: DecodeState, block: Block) -> DecodeState:
    """Commits the blocks before `block`, and finds rows with EOS there."""
    config, model = context.config, context.model.config
    old = (context.block_of < block) & context.on_canvas
    finished = state.finished
    if config.stop_at_eos:
        in_response = old & (jnp.arange(config.canvas)[None, :] < config.gen_length)
        finished |= jnp.any(in_response & is_stop(state.tokens, model.stop_ids), axis=-1)
    if context.fixed is not None:
        old &= state.t > 0  # masks stay open
    return dataclasses.replace(commit_tokens(context.params, state, old), finished=finished)


def write_start(
    context: DecodeContext, step: Step, cache: Carry, state: DecodeState
) -> DecodeState:
    """Writes the first token of a block, the block before's likeliest one.

    Args:
        context: everything that stays the same.
        step: first step of the block.
        cache: the cache of the block.
        state: the state. Rows that are finished stay as they are.

    Returns:
        The new state.
    """
    assert context.starts is not None
    new = context.starts & (context.block_of == step.block) & context.on_canvas
    new &= ~state.finished[:, None]

    def write(state: DecodeState) -> DecodeState:
        h = context.forward.first_hidden(cache, context.model_rows(state.x), step)
        options = dataclasses.replace(context.options, temperature=0.0)
        belief = _belief_of(context, h, options)
        tokens = jnp.where(new, belief.tokens, state.tokens)
        return commit_tokens(context.params, dataclasses.replace(state, tokens=tokens), new)

    return jax.lax.cond(jnp.any(new), write, lambda state: state, state)


def decode_step(
    context: DecodeContext, carry: tuple[DecodeState, Carry], step: Step
) -> tuple[tuple[DecodeState, Carry], Trace | None]:
    """Runs one step, or skips it if no sequence needs it.

    Args:
        context: everything that stays the same.
        carry: the state and the cache.
        step: slice of the schedule. Its numbers are scalars, or arrays [B, 1] with rows that are
            each at their own block and step (slots.py).

    Returns:
        The new state and cache, and the trace or None.
    """
    state = carry[0]
    here = context.positions(step.block, state.t)
    needed = here & context.rule.is_open(state) if context.config.early_exit else here
    busy = ~state.finished & jnp.any(needed, axis=-1)
    step = dataclasses.replace(step, candidates=here & busy[:, None])
    active = functools.partial(_active_step, context, step, busy)
    skipped = functools.partial(_skipped_step, context, step, active)
    needed = busy if step.writes is None else busy | step.writes
    return jax.lax.cond(jnp.any(needed), active, skipped, *carry)


def _active_step(
    context: DecodeContext, step: Step, busy: Bool[Array, " B"], state: DecodeState, cache: Carry
) -> tuple[tuple[DecodeState, Carry], Trace | None]:
    """One forward pass, the rule's action, and the move along the flow."""
    config, candidates = context.config, step.candidates
    if context.rule.needs_keys:
        index = step.index if step.index.ndim == 0 else step.index[:, 0]
        fold = jax.vmap(jax.random.fold_in, (0, 0 if index.ndim else None))
        step = dataclasses.replace(step, keys=fold(context.keys, index))
    belief, cache = _compute_belief(context, step, state, cache)
    action = context.rule(belief, state, step)
    after = _move(context, step, state, belief, action)
    if action.memory is not None:
        after = dataclasses.replace(after, memory=action.memory)
    finished = _find_finished(context, state, after) if config.eos_early_stop else state.finished
    passes = state.forward_passes + busy
    # NaN or infinity among the logits makes every confidence NaN.
    finite = state.finite & jnp.all(jnp.isfinite(belief.confidence) | ~candidates, axis=-1)
    after = dataclasses.replace(after, forward_passes=passes, finished=finished, finite=finite)
    trace = Trace(
        tokens=belief.tokens,
        progress=after.t,
        confidence=belief.confidence,
        step_fraction=jnp.where(candidates, action.a, 0.0),
        reedited=action.reset & candidates & (state.t > 0),
        top=belief.top,
        top_tokens=belief.top_tokens,
        notes=action.notes if config.notes else None,
    )
    return (after, cache), trace if config.trace else None


def _skipped_step(
    context: DecodeContext, step: Step, active: Callable[..., Any], state: DecodeState, cache: Carry
) -> tuple[tuple[DecodeState, Carry], Trace | None]:
    """Keeps the state, with a trace shaped like that of `active`."""
    config, zeros = context.config, jnp.zeros_like(state.t)
    if not config.trace:
        return (state, cache), None
    notes = None
    if config.notes:
        notes = jax.eval_shape(lambda *carry: active(*carry)[1].notes, state, cache)
    trace = Trace(
        tokens=state.tokens,
        progress=state.t,
        confidence=zeros,
        step_fraction=zeros,
        reedited=jnp.zeros_like(step.candidates),
        top=jnp.zeros((*zeros.shape, TOP)),
        top_tokens=jnp.zeros((*zeros.shape, TOP), jnp.int32),
        notes=jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), notes),
    )
    return (state, cache), trace


def _compute_belief(
    context: DecodeContext, step: Step, state: DecodeState, cache: Carry
) -> tuple[Belief, Carry]:
    """One forward pass, and the belief at every canvas position."""
    batch = state.t.shape[0]
    h, cache = context.forward.hidden(cache, context.model_rows(state.x), step)
    belief = _belief_of(context, h, context.options, step.keys)
    if context.config.block_only:
        here = (context.block_of == step.block) & context.on_canvas
        first = context.forward.block_columns(step.block)[:batch, :1]
        belief = onto_canvas(belief, first, here, state.tokens)
    return belief, cache


def _belief_of(
    context: DecodeContext,
    h: Float[Array, "R n E"],
    options: BeliefOptions,
    keys: Key[Array, " B"] | None = None,
) -> Belief:
    """Computes the belief of hidden states [copies B, n, E]."""
    batch = h.shape[0] // context.copies
    guided = h[batch:] if options.guidance else None
    rows = context.model.config.vocab_rows
    return compute_belief(make_head(context.params), h[:batch], rows, options, keys, guided)


def _move(
    context: DecodeContext, step: Step, state: DecodeState, belief: Belief, action: Action
) -> DecodeState:
    """Moves the candidates.

    Blocks that count from the canvas's start are the same columns in all rows. Then only these are
    read and written, since x has E numbers at each position.
    """
    config, candidates = context.config, step.candidates
    action = dataclasses.replace(action, notes=None, memory=None)
    move = functools.partial(move_positions, context.params, context.model.config.mask_id)
    if config.block_causal or config.blocks == 1 or config.infill or step.block.ndim:
        return move(candidates, state, belief, action)
    first, size = step.block * config.block_length, config.block_length

    def cut(x: Array) -> Array:
        return jax.lax.dynamic_slice_in_dim(x, first, size, axis=1)

    moving = {name: getattr(state, name) for name in ("x", "t", "tokens")}
    part = dataclasses.replace(state, **{name: cut(x) for name, x in moving.items()})
    part = move(cut(candidates), part, jax.tree.map(cut, belief), jax.tree.map(cut, action))
    update = jax.lax.dynamic_update_slice_in_dim
    moved = {name: update(x, getattr(part, name), first, axis=1) for name, x in moving.items()}
    return dataclasses.replace(state, **moved)


def move_positions(
    params: Params,
    mask_id: int,
    candidates: Bool[Array, "B n"],
    state: DecodeState,
    belief: Belief,
    action: Action,
) -> DecodeState:
    """Moves the candidates, makes masks, and mixes inputs below t = 1.

    Args:
        params: parameters of the model, of which the embedding table is read.
        mask_id: id of the mask token.
        candidates: positions that may move.
        state: the state before the step.
        belief: predictions and confidences.
        action: the rule's action.

    Returns:
        The state with new x, t and tokens.
    """
    x_pred, m = embed(params, belief.tokens), embed(params, jnp.full((1, 1), mask_id))
    mean = None
    if action.expected:
        shares = belief.top / belief.top.sum(-1, keepdims=True)
        mean = _mix(params, shares, belief.top_tokens)
    after = advance(state, belief, action, candidates, x_pred, m, mask_id, mean)
    if action.remask is not None:
        back = candidates & action.remask
        x, t = jnp.where(back[..., None], m, after.x), jnp.where(back, 0.0, after.t)
        after = dataclasses.replace(after, x=x, t=t)
    if action.mixture is None:
        return after
    mixed = _mix(params, action.mixture, belief.top_tokens)
    mixed += (1 - action.mixture.sum(-1, keepdims=True)) * m
    stays = (candidates & (after.t < 1))[..., None]
    return dataclasses.replace(after, x=jnp.where(stays, mixed, after.x))


def _mix(
    params: Params, shares: Float[Array, "B n k"], tokens: Int[Array, "B n k"]
) -> Float[Array, "B n E"]:
    """Mixes the embeddings of tokens."""
    return jnp.einsum("bnk,bnke->bne", shares, embed(params, tokens))


def advance(
    state: DecodeState,
    belief: Belief,
    action: Action,
    candidates: Bool[Array, "B N"],
    x_pred: Float[Array, "B N E"],
    m: Float[Array, "1 1 E"],
    mask_id: int,
    mean: Float[Array, "B N E"] | None = None,
) -> DecodeState:
    """Moves the candidates (Eqs. 4-8), or re-edits them (Eq. 10).

    The velocity (x_pred - x) / (1 - t) times the time a (1 - t) is a (x_pred - x). The division
    cancels and is never computed. A prediction of the mask token changes nothing.

    Args:
        state: the state before the step.
        belief: predictions and confidences.
        action: the rule's step fractions, resets and commitments.
        candidates: positions that may move.
        x_pred: embeddings of the predicted tokens.
        m: the mask embedding.
        mask_id: id of the mask token.
        mean: the mean embedding of the likely tokens, which replaces x_pred below t = 1.

    Returns:
        The state with new x, t and tokens.
    """
    c, a = belief.confidence, action.a
    if action.floor is not None:
        c = jnp.maximum(c, action.floor)
    target = x_pred if mean is None else mean
    real = candidates & (belief.tokens != mask_id)
    # Written out, since x + 1 (x_pred - x) is not x_pred in floating point.
    whole = action.commit | (a >= 1)
    ahead = jnp.where(whole[..., None], x_pred, state.x + a[..., None] * (target - state.x))
    t_ahead = jnp.where(whole, 1.0, state.t + a * (1 - state.t))
    back = action.reset & ~action.commit
    moving = real & (state.t < 1) | real & action.commit
    x = jnp.where(moving[..., None], ahead, state.x)
    mixed = c[..., None] * target + (1 - c[..., None]) * m
    if action.rescale:
        length = c * _norm(target) + (1 - c) * _norm(m)
        mixed *= (length / (_norm(mixed) + 1e-6))[..., None]
    x = jnp.where((real & back)[..., None], mixed, x)
    t = jnp.where(real & back, c, jnp.where(moving, t_ahead, state.t))
    # A mask shows its prediction. A position on its way that takes no step keeps its token.
    steps = (state.t == 0) | (state.t < 1) & (whole | (a > 0))
    written = candidates & steps | real & action.reset
    tokens = jnp.where(written, belief.tokens, state.tokens)
    return dataclasses.replace(state, x=x, t=t, tokens=tokens)


def _norm(x: Float[Array, "*shape E"]) -> Float[Array, "*shape"]:
    """Returns the Euclidean norm of each vector."""
    return jnp.sqrt(jnp.sum(x * x, axis=-1))


def commit_tokens(params: Params, state: DecodeState, positions: Bool[Array, "B N"]) -> DecodeState:
    """Commits the tokens that stand at some positions.

    They get x = W_in[token] and t = 1.

    Args:
        params: parameters of the model, of which the embedding table is read.
        state: the state.
        positions: True at the positions to commit.

    Returns:
        The new state.
    """
    moving = (positions & (state.t < 1))[..., None]
    x = jnp.where(moving, embed(params, state.tokens), state.x)
    return dataclasses.replace(state, x=x, t=jnp.where(positions, 1.0, state.t))


def _find_finished(
    context: DecodeContext, before: DecodeState, after: DecodeState
) -> Bool[Array, " B"]:
    """Rows whose positions up to their first settled EOS are all settled.

    LLaDA2.0's own loop checks this only in steps that write an EOS. So does this function under
    block-causal attention.
    """
    config, index = context.config, jnp.arange(context.config.canvas)[None, :]
    settled = after.t >= SETTLED
    is_eos = is_stop(after.tokens, context.model.config.stop_ids)
    in_response = (index >= config.infill) & (index < config.infill + config.gen_length)
    end = settled & is_eos & in_response
    first = jnp.argmax(end, axis=-1, keepdims=True)
    finished = jnp.any(end, axis=-1) & jnp.all(settled | (index > first), axis=-1)
    if config.block_causal:
        finished &= jnp.any(end & (before.t < SETTLED), axis=-1)
    return before.finished | finished
