"""Slots: rows that are each at their own block and step.

A lane is a program with S slots. Each slot decodes one request with its own prompt, canvas, steps,
key and numbers of the rule. `admit` puts a request into a slot. `run_passes` takes some steps with
all slots, by the step of decode.py. A row that ends is frozen until its slot is filled again.

The shape of a lane's batch is constant, so a row has the same tokens whatever the other slots do.
"""

from __future__ import annotations

import dataclasses
import functools
from functools import partial
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from xflow_jax.decoding.belief import TOP
from xflow_jax.decoding.blocks import cache_passes
from xflow_jax.decoding.canvas import start_state
from xflow_jax.decoding.context import DecodeContext, make_context
from xflow_jax.decoding.decode import begin_block, decode_step, write_start
from xflow_jax.decoding.forward import Carry
from xflow_jax.decoding.rules.base import Rule
from xflow_jax.decoding.rules.numbers import with_numbers
from xflow_jax.decoding.slot_forward import SLOT_FORWARDS, SlotExactForward
from xflow_jax.decoding.slot_rows import Lane, Rows, make_row
from xflow_jax.decoding.state import DecodeConfig, DecodeState, Step
from xflow_jax.parallel import constrain_batch
from xflow_jax.types import Array, Backbone, Bool, Int, Key, LanguageModel, Params


@no_type_check  # of the fields, since transforms of trees put other leaves there
@struct.dataclass
class Slots:
    """State of a lane.

    Attributes:
        rows: the requests.
        state: the decodes.
        cache: keys and values, or None.
        block: the active block, int [S, 1]. It equals rows.blocks at the end.
        local: steps in it so far, int [S, 1].
        writing: True if the next pass only writes the block's keys and values, bool [S].
        active: True if the row takes further passes, bool [S].
        confidence: of each position's last prediction, float32 [S, N].
        top, top_tokens: its four likeliest tokens, [S, N, 4].
        edits: re-edits of each position, modulo 256, uint8 [S, N].
    """

    rows: Any
    state: DecodeState
    cache: Any
    block: jax.Array
    local: jax.Array
    writing: jax.Array
    active: jax.Array
    confidence: jax.Array
    top: jax.Array
    top_tokens: jax.Array
    edits: jax.Array


@no_type_check  # as above
@struct.dataclass
class Snapshot:
    """State of a lane as the host reads it.

    It has 6 bytes a position.

    Attributes:
        tokens: token ids, and in the upper 8 bits the re-edits modulo 256, uint32 [S, N].
        levels: t and the confidence from 0 to 255, uint8 [S, N, 2]. 255 is 1 exactly.
        rows: finished blocks, forward passes, and 1 if active and 1 if all logits were finite,
            int [S, 4].
        top, top_tokens: those of Slots. They are fetched only if a request needs them.
    """

    tokens: jax.Array
    levels: jax.Array
    rows: jax.Array
    top: jax.Array
    top_tokens: jax.Array


def init_slots(lm: LanguageModel, rule: Rule, lane: Lane) -> Slots:
    """Makes the state of a lane without requests.

    Args:
        lm: the model. With a mesh, slots are sharded over it as a batch is.
        rule: the rule.
        lane: the lane.
    """
    row = make_row(lane, lm.config.pad_id, [lm.config.pad_id], rule, _one_step(lane.config))
    rows = jax.tree.map(lambda x: np.repeat(x, lane.slots, axis=0), row)
    with lm.scope():
        return _init(lm.model, lm.params, rule, lane, rows)


def _one_step(config: DecodeConfig) -> DecodeConfig:
    return dataclasses.replace(config, steps=config.extra_steps + 1)


@partial(jax.jit, static_argnames=("model", "lane"))
def _init(model: Backbone, params: Params, rule: Rule, lane: Lane, rows: Rows) -> Slots:
    rows = jax.tree.map(jnp.asarray, rows)
    context = _make_context(model, params, rule, lane, rows)
    fresh = _fresh(context, rows, context.forward.init_cache())
    return _constrain(dataclasses.replace(fresh, active=jnp.zeros(lane.slots, bool)))


def _constrain(slots: Slots) -> Slots:
    """Shards slots as a batch, but for the cache."""
    rest = jax.tree.map(constrain_batch, dataclasses.replace(slots, cache=None))
    return dataclasses.replace(rest, cache=slots.cache)


def _fresh(context: DecodeContext, rows: Rows, cache: Carry) -> Slots:
    """Returns decodes before their first pass."""
    parts = (context.model, context.params, context.rule, context.config)
    state, _ = start_state(*parts, rows.prompt, rows.prompt_mask)
    zero, no = jnp.zeros_like(state.t), jnp.zeros_like(state.finished)
    start = jnp.zeros((len(no), 1), jnp.int32)
    four = jnp.zeros((*zero.shape, TOP))
    edits, tokens = zero.astype(jnp.uint8), four.astype(jnp.int32)
    return Slots(rows, state, cache, start, start, no, ~no, zero, four, tokens, edits)


@partial(jax.jit, static_argnames=("model", "lane"), donate_argnames="slots")
def admit(
    model: Backbone,
    params: Params,
    rule: Rule,
    lane: Lane,
    slots: Slots,
    row: Rows,
    slot: Int[Array, ""],
) -> Slots:
    """Puts a request into a slot, with its prompt in the cache.

    Args:
        model: the backbone.
        params: its parameters.
        rule: the lane's rule.
        lane: the lane.
        slots: the state, which is donated.
        row: the request, from `make_row`.
        slot: number of the slot.

    Returns:
        The new state.
    """
    row = jax.tree.map(jnp.asarray, row)
    context = _make_context(model, params, rule, lane, row)
    cache = slots.cache
    if isinstance(context.forward, SlotExactForward):
        cache = context.forward.write_prompt(cache, slot)
    fresh, rest = _fresh(context, row, None), dataclasses.replace(slots, cache=None)
    update = jax.lax.dynamic_update_slice_in_dim
    rest = jax.tree.map(lambda old, new: update(old, new.astype(old.dtype), slot, 0), rest, fresh)
    return _constrain(dataclasses.replace(rest, cache=cache))


@partial(jax.jit, static_argnames=("model", "lane", "passes"), donate_argnames="slots")
def run_passes(
    model: Backbone,
    params: Params,
    rule: Rule,
    lane: Lane,
    slots: Slots,
    live: Bool[Array, " S"],
    passes: int,
) -> tuple[Slots, Snapshot]:
    """Takes some steps with all slots.

    Args:
        model: the backbone.
        params: its parameters.
        rule: the lane's rule.
        lane: the lane.
        slots: the state, which is donated.
        live: False for slots whose request was given up.
        passes: number of steps.

    Returns:
        The new state, and the snapshot after the last step.
    """
    slots = dataclasses.replace(slots, active=slots.active & live)
    context = _make_context(model, params, rule, lane, slots.rows)
    rows, slots = slots.rows, dataclasses.replace(slots, rows=None)

    def one(slots: Slots, _: None) -> tuple[Slots, None]:
        return _pass(context, lane, rows, slots), None

    slots = jax.lax.scan(one, slots, None, length=passes)[0]
    return _constrain(dataclasses.replace(slots, rows=rows)), take_snapshot(slots)


def _make_context(
    model: Backbone, params: Params, rule: Rule, lane: Lane, rows: Rows
) -> DecodeContext:
    """Builds the context of the decoder's step."""
    rule, keys = with_numbers(rule, rows.numbers), jax.vmap(_row_key)(rows.salts)
    return make_context(
        model,
        params,
        rule,
        lane.config,
        rows.prompt,
        rows.prompt_mask,
        keys,
        forwards=SLOT_FORWARDS,
        positions=rows.positions,
    )


def _row_key(salts: Array) -> Key[Array, ""]:
    """Derives a row's key, as generate.row_keys does."""
    fold = jax.random.fold_in
    return fold(fold(jax.random.key(salts[0]), salts[1]), salts[2])


def _row_step(config: DecodeConfig, rows: Rows, slots: Slots) -> Step:
    """Returns the step of each row, with arrays [S, 1]."""
    at = jnp.minimum(slots.local, rows.schedule.rho.shape[1] - 1)
    step = jax.tree.map(lambda x: jnp.take_along_axis(x, at, axis=1), rows.schedule)
    return dataclasses.replace(
        step,
        index=slots.block * rows.steps + slots.local,
        block=slots.block,
        cache_pass=jnp.asarray(cache_passes(config))[slots.block, at],
    )


def _pass(context: DecodeContext, lane: Lane, rows: Rows, slots: Slots) -> Slots:
    """Takes one step with each row."""
    old, exact = slots.state, lane.config.cache == "exact"
    frozen = old.finished | ~slots.active | slots.writing
    step = _row_step(lane.config, rows, slots)
    if exact:
        step = dataclasses.replace(step, writes=slots.writing & slots.active)
    state = old
    if context.starts is not None:
        goes_on = dataclasses.replace(old, finished=frozen | (slots.local[:, 0] > 0))
        state = write_start(context, step, slots.cache, goes_on)
    state = dataclasses.replace(state, finished=frozen)
    (state, cache), trace = decode_step(context, (state, slots.cache), step)
    assert trace is not None
    state = dataclasses.replace(state, finished=jnp.where(frozen, old.finished, state.finished))
    here = (context.block_of == slots.block) & context.on_canvas
    moved = here & (state.forward_passes > old.forward_passes)[:, None]
    slots = dataclasses.replace(
        slots,
        state=state,
        cache=cache,
        confidence=jnp.where(moved, trace.confidence, slots.confidence),
        top=jnp.where(moved[..., None], trace.top, slots.top),
        top_tokens=jnp.where(moved[..., None], trace.top_tokens, slots.top_tokens),
        edits=slots.edits + (trace.reedited & moved).astype(jnp.uint8),
    )
    return _next_step(context, rows, slots, exact)


def _next_step(context: DecodeContext, rows: Rows, slots: Slots, exact: bool) -> Slots:
    """Moves each row to its next step, or to its next block."""
    state, wrote = slots.state, slots.writing
    is_over = slots.local + 1 >= rows.steps
    if context.config.early_exit:
        needed = context.positions(slots.block, state.t) & context.rule.is_open(state)
        is_over |= ~jnp.any(needed, axis=-1, keepdims=True)
    ends = is_over & (slots.active & ~wrote)[:, None]
    goes_on = ends & (slots.block + 1 < rows.blocks)
    # A decode does not commit its last block, and rows that are over stay as they are.
    first_open = jnp.minimum(slots.block + goes_on, rows.blocks - 1)
    begin = functools.partial(begin_block, context, block=first_open)
    state = jax.lax.cond(jnp.any(goes_on), begin, lambda state: state, state)
    writing = goes_on[:, 0] & ~state.finished if exact else jnp.zeros_like(wrote)
    leaves = (ends | wrote[:, None]) & ~writing[:, None]
    block = slots.block + leaves
    return dataclasses.replace(
        slots,
        state=state,
        block=block,
        local=jnp.where(leaves, 0, slots.local + 1),
        writing=writing,
        active=slots.active & ~state.finished & (block < rows.blocks)[:, 0],
    )


def take_snapshot(slots: Slots) -> Snapshot:
    """Packs what the host reads.

    Args:
        slots: the state of a lane.
    """
    state = slots.state
    edits = slots.edits.astype(jnp.uint32) << 24
    levels = jnp.stack([state.t, slots.confidence], axis=-1)
    rows = [slots.block[:, 0] + slots.writing, state.forward_passes, slots.active, state.finite]
    return Snapshot(
        tokens=state.tokens.astype(jnp.uint32) | edits,
        levels=jnp.floor(jnp.nan_to_num(levels) * 255).astype(jnp.uint8),
        rows=jnp.stack([row.astype(jnp.int32) for row in rows], axis=-1),
        top=slots.top,
        top_tokens=slots.top_tokens,
    )
