"""Trajectory alignment: the states of live decodes as training inputs.

The paper's alignment trains on masked states alone, which no fast decoder visits. Here a batch
holds decodes that are under way. Each update takes the loss at their states as they are, then moves
the states by the same forward pass. A decode that is over is replaced by a new request.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar, no_type_check

import jax
import jax.numpy as jnp
from flax import struct

from xflow_jax.decoding import (
    Belief,
    BeliefOptions,
    DecodeConfig,
    DecodeState,
    Rule,
    Step,
    commit_tokens,
    embed,
    make_schedule,
    move_positions,
    parse_rule_ranges,
    takes_arrays,
    with_numbers,
)
from xflow_jax.errors import require
from xflow_jax.training.state import Batch, TrainState
from xflow_jax.types import Array, Bool, Float, Int, Key, ModelConfig, Params

T = TypeVar("T")

MASKED = "masked"  # a group of rows whose states are those of Eq. 11


@dataclass(frozen=True, kw_only=True)
class TrajectoryConfig:
    """Makers of the states, and what is trained at them.

    Attributes:
        rules: one rule for each equal group of the batch's rows, as text. Instead of a number it
            may have a range, "flow:reedit=always,jump=0.3..0.9". Each decode draws its own number
            from it. "masked" stands for the states of Eq. 11.
        block_lengths: positions of a block of the decodes, one number for all rules or one for
            each. 0 stands for one block. A block-causal model has its own.
        passes: most passes of a block.
        error: weight of the squared error of Eq. 12 beside the cross-entropy.
        revealed: smallest and largest share of the target that stands when a decode begins. Each
            decode draws its own share.
        most_wrong: share of the positions whose tokens may differ from the target. A decode with
            more of them is over, since its state has begun another answer.

    Raises:
        UserError: if a value is out of range.
    """

    rules: tuple[str, ...] = ("flow:reedit=always,jump=0.3..0.95", MASKED)
    block_lengths: tuple[int, ...] = (0,)
    passes: int = 8
    error: float = 0.0
    revealed: tuple[float, float] = (0.0, 0.0)
    most_wrong: float = 1.0

    def __post_init__(self) -> None:
        require(bool(self.rules), "trajectory.rules is empty, but it must name a rule")
        require(self.passes >= 1, f"trajectory.passes is {self.passes}, but it must be at least 1")
        require(self.error >= 0, f"trajectory.error is {self.error}, but it must not be negative")
        require(
            len(self.block_lengths) in (1, len(self.rules)) and min(self.block_lengths) >= 0,
            f"trajectory.block_lengths is {list(self.block_lengths)}, but it must be one length or "
            f"{len(self.rules)}, none of them negative",
        )
        low, high = self.revealed
        require(
            0 <= low <= high < 1,
            f"trajectory.revealed is {list(self.revealed)}, but it must be two shares from 0 to "
            "below 1, the smaller one first",
        )
        require(
            0 <= self.most_wrong <= 1,
            f"trajectory.most_wrong is {self.most_wrong}, but it must be a share from 0 to 1",
        )


@dataclass(frozen=True)
class StateMaker:
    """A rule with the ranges of its numbers.

    Attributes:
        rule: the rule.
        ranges: (option, smallest, largest) of the numbers that each decode draws.
        options: the rule's constraints of the belief.
    """

    rule: Rule
    ranges: tuple[tuple[str, float, float], ...]
    options: BeliefOptions

    def rule_of(self, numbers: dict[str, Float[Array, "B 1"]]) -> Rule:
        """Returns the rule with the numbers of each decode."""
        return with_numbers(self.rule, numbers)

    def draw(self, key: Key[Array, ""], batch: int) -> dict[str, Float[Array, "B 1"]]:
        """Draws the numbers of new decodes."""
        keys = jax.random.split(key, max(len(self.ranges), 1))
        return {
            name: jax.random.uniform(k, (batch, 1), minval=low, maxval=high)
            for k, (name, low, high) in zip(keys, self.ranges, strict=False)
        }


def parse_makers(texts: Sequence[str], model: ModelConfig) -> list[StateMaker | None]:
    """Parses the rules of a TrajectoryConfig.

    Args:
        texts: the rules.
        model: configuration of the model.

    Returns:
        A maker for each, or None for masked states.

    Raises:
        UserError: for an unknown rule, an impossible range, or a rule with guidance.
    """
    makers: list[StateMaker | None] = []
    for text in texts:
        if text.strip() == MASKED:
            makers.append(None)
            continue
        rule, upper, names = parse_rule_ranges(text)
        options = rule.belief_options(model, None)
        require(
            upper.belief_options(model, None) == options,
            f"the rule {text} has a range for a number that all rows share. Write one number.",
        )
        require(
            not options.guidance,
            f"the rule {text} has guidance, which needs a second pass. Leave it out.",
        )
        ranges = tuple((name, getattr(rule, name), getattr(upper, name)) for name in names)
        maker = StateMaker(rule, ranges, options)
        _check_numbers(text, maker)
        makers.append(maker)
    return makers


def _check_numbers(text: str, maker: StateMaker) -> None:
    """Raises UserError for a rule that cannot compute with arrays."""
    names = [name for name, _, _ in maker.ranges]
    require(
        takes_arrays(maker.rule, names),
        f"the rule {text} decides by {' and '.join(names)} which program runs, so it takes no "
        "range there",
    )


@no_type_check  # of the fields, since transforms of trees put other leaves there
@struct.dataclass
class LiveDecodes:
    """Decodes under way.

    A row of the batch is one decode of its N positions. With a block-causal model it is K of them,
    one for each block, and N is the length of a block. R = B K.

    Attributes:
        batch: requests and targets, as from `decode_rows`.
        state: the states, [R, N].
        block: the active block, int [R, 1].
        index: steps in it so far, int [R, 1].
        numbers: option of the rule -> number of each decode, float32 [R, 1].
        over: True at decodes that have ended, bool [R].
    """

    batch: Batch
    state: DecodeState
    block: jax.Array
    index: jax.Array
    numbers: dict[str, jax.Array]
    over: jax.Array

    @property
    def target(self) -> Int[Array, "R N"]:
        """The tokens that the decodes should write."""
        return self.batch["response"].reshape(self.over.shape[0], -1)

    @property
    def fill(self) -> Bool[Array, "R N"]:
        """True at positions that the decodes fill."""
        return self.batch["fill"].reshape(self.over.shape[0], -1)

    @property
    def row_over(self) -> Bool[Array, " B"]:
        """True at rows that are over, which take a new request."""
        return jnp.all(self.over.reshape(self.batch["response"].shape[0], -1), axis=1)


@no_type_check  # of the fields, since transforms of trees put other leaves there
@struct.dataclass
class TrajectoryState(TrainState):
    """State of a run of trajectory alignment.

    Attributes:
        live: the live decodes of each group, or None for masked states.
    """

    live: tuple[LiveDecodes | None, ...] = ()


def begin_decodes(
    maker: StateMaker,
    batch: Batch,
    key: Key[Array, ""],
    params: Params,
    mask_id: int,
    revealed: tuple[float, float] = (0.0, 0.0),
    block_length: int = 0,
) -> LiveDecodes:
    """Begins a decode for each request of a batch.

    With a block-causal model each block of a request has one.

    Args:
        maker: the rule.
        batch: requests and targets, as from `decode_rows`.
        key: a random key.
        params: parameters of the model, of which the embedding table is read.
        mask_id: id of the mask token.
        revealed: smallest and largest share of the target that stands from the beginning.
        block_length: positions of a block of a block-causal model, or 0.

    Returns:
        The decodes before their first pass.
    """
    n = block_length or batch["response"].shape[1]
    target, fill = batch["response"].reshape(-1, n), batch["fill"].reshape(-1, n)
    rows = len(target)
    share_key, token_key = jax.random.split(jax.random.fold_in(key, 1))
    share = jax.random.uniform(share_key, (rows, 1), minval=revealed[0], maxval=revealed[1])
    stands = (jax.random.uniform(token_key, (rows, n)) < share) | ~fill
    tokens = jnp.where(stands, target, mask_id)
    zero = jnp.zeros((rows, 1), jnp.int32)
    state = DecodeState(
        x=embed(params, tokens),
        t=stands.astype(jnp.float32),
        tokens=tokens,
        forward_passes=jnp.zeros(rows, jnp.int32),
        finished=jnp.zeros(rows, bool),
        memory=maker.rule.init_memory(rows, n),
    )
    return LiveDecodes(batch, state, zero, zero, maker.draw(key, rows), ~jnp.any(fill, axis=1))


def replace_finished(live: LiveDecodes, fresh: LiveDecodes) -> LiveDecodes:
    """Replaces the rows whose decodes are over by new ones."""
    return _choose(live.row_over, fresh, live)


def _choose(where: Bool[Array, " B"], new: T, old: T) -> T:
    """Chooses rows of two trees.

    Leaves may have several rows for each of `where`.
    """

    def choose(new: Array, old: Array) -> Array:
        rows = jnp.repeat(where, len(old) // len(where))
        return jnp.where(rows.reshape(-1, *(1,) * (old.ndim - 1)), new, old)

    return jax.tree.map(choose, new, old)


@dataclass(frozen=True)
class Schedule:
    """Blocks, passes and ends of the live decodes.

    Attributes:
        config: the configuration of a decode with these blocks. Its steps are the most passes of a
            block. That of a block-causal model has one block.
        eos_id: id of EOS.
        mask_id: id of the mask token.
        most_wrong: share of the positions whose tokens may differ from the target.
    """

    config: DecodeConfig
    eos_id: int
    mask_id: int
    most_wrong: float = 1.0

    @property
    def blocks(self) -> Int[Array, "1 N"]:
        """The block of each position of a decode."""
        return jnp.arange(self.config.gen_length)[None, :] // self.config.block_length

    def step(self, live: LiveDecodes, keys: Key[Array, " R"] | None) -> Step:
        """Returns the step of each decode, with arrays [R, 1]."""
        at = live.block * self.config.steps + live.index
        step = jax.tree.map(lambda x: x[at], make_schedule(self.config))
        candidates = (self.blocks == live.block) & live.fill
        return dataclasses.replace(step, candidates=candidates, keys=keys)


def advance_decodes(
    maker: StateMaker,
    schedule: Schedule,
    live: LiveDecodes,
    belief: Belief,
    params: Params,
    keys: Key[Array, " R"] | None,
) -> LiveDecodes:
    """Moves each decode by one pass, if it is not over.

    A block ends if the rule leaves no position open, or after its last pass. Its tokens are
    committed then, as in a decode. A decode that has left its target is over.

    Args:
        maker: the rule.
        schedule: blocks and passes.
        live: the decodes.
        belief: predictions at their states.
        params: parameters of the model, of which the embedding table is read.
        keys: one random key per decode, if the rule draws.

    Returns:
        The decodes after the pass.
    """
    rule, step, blocks = maker.rule_of(live.numbers), schedule.step(live, keys), schedule.blocks
    action = rule(belief, live.state, step)
    state = move_positions(params, schedule.mask_id, step.candidates, live.state, belief, action)
    if action.memory is not None:
        state = dataclasses.replace(state, memory=action.memory)
    open_here = jnp.any(step.candidates & rule.is_open(state), axis=1, keepdims=True)
    ends = ~open_here | (live.index + 1 >= schedule.config.steps)
    last = live.block >= blocks[:, -1:]
    wrong = jnp.mean((state.t > 0) & (state.tokens != live.target), axis=1)
    state = commit_tokens(params, state, ends & (blocks <= live.block))
    moved = dataclasses.replace(
        live,
        state=state,
        block=live.block + ends,
        index=jnp.where(ends, 0, live.index + 1),
        over=(ends & last)[:, 0] | (wrong > schedule.most_wrong),
    )
    old, new = (dataclasses.replace(decodes, batch={}) for decodes in (live, moved))
    return dataclasses.replace(_choose(live.over, old, new), batch=live.batch)


def split_groups(batch: Batch, count: int) -> list[Batch]:
    """Splits the rows of a batch into groups.

    Row i belongs to group i % count, so each group is sharded as the batch is.
    """
    return [
        jax.tree.map(lambda x, g=group: x.reshape(-1, count, *x.shape[1:])[:, g], batch)
        for group in range(count)
    ]


def join_groups(groups: Sequence[Array]) -> Array:
    """Joins arrays of groups, the inverse of `split_groups`."""
    joined = jnp.stack(groups, axis=1)
    return joined.reshape(-1, *joined.shape[2:])
