"""The loss of trajectory alignment, which also moves the live decodes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp

from xflow_jax.decoding import DecodeConfig, adapt_loop, compute_belief, embed
from xflow_jax.errors import require
from xflow_jax.models import Head, make_head
from xflow_jax.training import alignment_loss, losses
from xflow_jax.training.alignment import (
    AlignmentConfig,
    draw_noise,
    model_variables,
    response_hidden,
)
from xflow_jax.training.block_copies import block_hidden, decode_rows
from xflow_jax.training.state import Batch
from xflow_jax.training.trajectory import (
    LiveDecodes,
    Schedule,
    StateMaker,
    advance_decodes,
    begin_decodes,
    join_groups,
    parse_makers,
    replace_finished,
    split_groups,
)
from xflow_jax.types import Array, Backbone, Bool, Float, Metrics, ModelConfig, Params

Live: TypeAlias = tuple[LiveDecodes | None, ...]
# (params, batch, live decodes, key, base) -> (loss, (metrics, live decodes))
TrajectoryLoss: TypeAlias = Callable[..., tuple[Float[Array, ""], tuple[Metrics, Live]]]


@dataclasses.dataclass(frozen=True)
class _States:
    """Inputs of one group of rows.

    Attributes:
        batch: requests and targets.
        x: states, float32 [B, N, E].
        counted: positions that count in the loss, bool [B, N]. N has whole blocks, as from
            `decode_rows`.
        masked: mask tokens of a group of masked states, or None.
        live: the decodes of a group with a rule, or None.
    """

    batch: Batch
    x: Float[Array, "B N E"]
    counted: Bool[Array, "B N"]
    masked: Bool[Array, "B N"] | None = None
    live: LiveDecodes | None = None


def make_schedules(model: ModelConfig, config: AlignmentConfig) -> list[Schedule]:
    """Returns blocks and passes of the live decodes of each rule."""
    options, block = config.trajectory, config.block_length
    sizes = options.block_lengths * (len(options.rules) // len(options.block_lengths))
    length = block or config.gen_length
    return [
        Schedule(
            DecodeConfig(length, block or size or length, options.passes, block_causal=bool(block)),
            model.eos_id,
            model.mask_id,
            options.most_wrong,
        )
        for size in sizes
    ]


def make_makers(
    model: ModelConfig, config: AlignmentConfig
) -> list[tuple[StateMaker | None, Schedule]]:
    """Returns the maker of each group's states, with its blocks and passes.

    Raises:
        UserError: as `parse_makers`, or for a rule that cannot decode with these blocks.
    """
    texts = config.trajectory.rules
    makers, schedules = parse_makers(texts, model), make_schedules(model, config)
    for text, maker, schedule in zip(texts, makers, schedules, strict=True):
        require(
            maker is None or adapt_loop(maker.rule, schedule.config).eps is None,
            f"the rule {text} has times of its own, which live decodes have not. Leave it out.",
        )
    return list(zip(makers, schedules, strict=True))


def make_trajectory_loss(model: Backbone, config: AlignmentConfig) -> TrajectoryLoss:
    """Builds the loss at the states of live decodes.

    It is the mean cross-entropy to the target, plus `trajectory.error` times the squared error of
    Eq. 12, over all response positions. The states are constants of the loss. The blocks of a
    block-causal model decode at once, each behind the clean target, and those that are over do not
    count.

    Args:
        model: the model.
        config: the configuration, with states = "trajectory".

    Returns:
        loss(params, batch, live, key, base=None) -> (loss, (metrics, live)). Rows of the batch take
        the places of decodes that are over. The metrics are the cross-entropy at the states of
        decodes (state_nll) and at the masks of masked states (masked_nll), the share of
        predictions that are the target, and the share of decodes that a pass ends.
    """
    makers, schedules = zip(*make_makers(model.config, config), strict=True)

    def loss_fn(
        params: Params, batch: Batch, live: Live, key: jax.Array, base: Params | None = None
    ) -> tuple[Float[Array, ""], tuple[Metrics, Live]]:
        variables = model_variables(model, config, params, base)
        constant = jax.lax.stop_gradient(variables["params"])
        keys, draw_keys = jax.random.split(key, (2, len(makers)))
        groups = [
            _group_states(config, *parts, constant)
            for parts in zip(
                schedules, makers, split_groups(batch, len(makers)), live, keys, strict=True
            )
        ]
        joined = jax.tree.map(lambda *x: join_groups(x), *(g.batch for g in groups))
        counted = join_groups([g.counted for g in groups])
        x = join_groups([g.x for g in groups])
        if config.block_length:
            text = jnp.concatenate([joined["prompt"], joined["response"]], axis=1)
            real = jnp.concatenate([joined["prompt_mask"], jnp.ones_like(counted)], axis=1)
            places = jnp.arange(text.shape[1])[None, :] - joined["prompt"].shape[1]
            blocks = places // config.block_length  # the response begins with block 0
            hidden = block_hidden(model, variables, x, text, blocks, real)
        else:
            hidden = response_hidden(model, variables, joined, x, 0)
        head, table = make_head(variables["params"]), variables["params"]["wte"]["embedding"]
        error, nll = alignment_loss.alignment_errors(
            hidden, head.kernel, table, joined["response"], head.bias, config.chunk
        )
        loss = losses.masked_mean(nll + config.trajectory.error * error, counted)
        after, right = _advance(
            model, schedules, makers, groups, make_head(constant), hidden, constant, draw_keys
        )
        metrics = {"loss": loss} | _metrics(groups, split_groups({"nll": nll}, len(makers)), right)
        return loss, (metrics | _ended(after), after)

    return loss_fn


def _group_states(
    config: AlignmentConfig,
    schedule: Schedule,
    maker: StateMaker | None,
    batch: Batch,
    live: LiveDecodes | None,
    key: jax.Array,
    params: Params,
) -> _States:
    """Returns the states of one group, after new requests came in."""
    batch = decode_rows(batch, config.block_length, schedule.eos_id)
    if maker is None or live is None:
        if config.block_length:
            masked = losses.draw_response_noise(key, batch["fill"], config.block_length)[0]
        else:
            masked = draw_noise(key, batch, 0)[0]
        tokens = jnp.where(masked, schedule.mask_id, batch["response"])
        return _States(batch, embed(params, tokens), batch["fill"], masked)
    fresh = begin_decodes(
        maker,
        batch,
        key,
        params,
        schedule.mask_id,
        config.trajectory.revealed,
        config.block_length,
    )
    live = replace_finished(live, fresh)
    shape = live.batch["response"].shape
    counted = (live.fill & ~live.over[:, None]).reshape(shape)
    return _States(live.batch, live.state.x.reshape(*shape, -1), counted, live=live)


def _advance(
    model: Backbone,
    schedules: Sequence[Schedule],
    makers: Sequence[StateMaker | None],
    groups: Sequence[_States],
    head: Head,
    hidden: Float[Array, "B N E"],
    params: Params,
    keys: jax.Array,
) -> tuple[Live, list[Bool[Array, "rows N"]]]:
    """Moves the decodes by the pass that the loss used.

    Returns:
        The decodes of each group, and where its predictions are the target.
    """
    after: list[LiveDecodes | None] = []
    right = []
    parts = split_groups({"hidden": jax.lax.stop_gradient(hidden)}, len(makers))
    for schedule, maker, group, part, key in zip(
        schedules, makers, groups, parts, keys, strict=True
    ):
        if maker is None or group.live is None:
            after.append(None)
            right.append(jnp.zeros_like(group.counted))
            continue
        decodes, positions = group.live.target.shape
        row_keys = jax.random.split(key, decodes) if maker.rule.needs_keys else None
        belief = compute_belief(
            head,
            part["hidden"].reshape(decodes, positions, -1),
            model.config.vocab_rows,
            maker.options,
            row_keys,
        )
        right.append((belief.tokens == group.live.target).reshape(group.counted.shape))
        after.append(advance_decodes(maker, schedule, group.live, belief, params, row_keys))
    return tuple(after), right


def _metrics(
    groups: Sequence[_States], nlls: Sequence[Batch], right: Sequence[Bool[Array, "rows N"]]
) -> Metrics:
    """Computes means over groups with a rule, and masked ones."""
    rules = [i for i, group in enumerate(groups) if group.live is not None]
    masked = [i for i, group in enumerate(groups) if group.live is None]
    metrics = {}
    if rules:
        counted = jnp.stack([groups[i].counted for i in rules])
        nll = jnp.stack([nlls[i]["nll"] for i in rules])
        metrics["state_nll"] = losses.masked_mean(nll, counted)
        metrics["right"] = losses.masked_mean(jnp.stack([right[i] for i in rules]), counted)
    if masked:
        where = jnp.stack([jnp.asarray(groups[i].masked) for i in masked])
        metrics["masked_nll"] = losses.masked_mean(
            jnp.stack([nlls[i]["nll"] for i in masked]), where
        )
    return metrics


def _ended(live: Live) -> Metrics:
    """Returns the share of rows whose decodes are over."""
    over = [decodes.row_over for decodes in live if decodes is not None]
    return {"ended": jnp.mean(jnp.stack(over))} if over else {}
