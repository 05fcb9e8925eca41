"""Lanes of a server: kinds of rules, lengths, and state."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Mapping, Sequence
from fractions import Fraction

import jax.numpy as jnp
import numpy as np

from xflow_jax.decoding import (
    CacheOptions,
    DecodeConfig,
    Lane,
    Rows,
    Rule,
    Slots,
    Snapshot,
    adapt_loop,
    admit,
    init_slots,
    make_decode_config,
    make_row,
    nearest_multiples,
    parse_rule,
    resolve_steps,
    row_numbers,
    run_passes,
    slot_config,
)
from xflow_jax.errors import UserError, require
from xflow_jax.lm import LM
from xflow_jax.parallel import count_shards, platform

# Defaults of a server.
GEN_LENGTHS, PROMPT_LENGTHS = (64, 256, 512), (128, 512, 1024)
SLOTS, SLOTS_CPU = 32, 8
CALL_SECONDS, MOST_PASSES = 0.05, 8  # a call takes about this long
# A rule in a request: a built-in name, and options with plain values. No file is ever read for it.
_PLAIN_RULE = re.compile(
    r"[a-z]{1,20}(:[\w.+-]{1,30}=[\w.+-]{1,30}(,[\w.+-]{1,30}=[\w.+-]{1,30})*)?"
)


@dataclasses.dataclass(frozen=True, eq=False)
class RuleKind:
    """A rule of the server, with those that differ in numbers alone.

    Attributes:
        label: its text.
        rule: the rule. Lanes are compiled for it.
        numbers: options that a request may choose freely.
    """

    label: str
    rule: Rule
    numbers: tuple[str, ...]

    def includes(self, rule: Rule) -> bool:
        """Returns True if the rule differs from this one in `numbers` alone."""
        if type(rule) is not type(self.rule) or not dataclasses.is_dataclass(rule):
            return False
        for field in dataclasses.fields(rule):
            mine, other = getattr(self.rule, field.name), getattr(rule, field.name)
            if field.name in self.numbers:
                if not isinstance(other, float):
                    return False
            elif mine is not other and not (type(mine) is type(other) and mine == other):
                return False
        return True


def make_kinds(rules: Mapping[str, Rule], lm: LM) -> list[RuleKind]:
    """Returns the kinds of a server's rules.

    Args:
        rules: label -> rule.
        lm: the model.
    """
    return [RuleKind(label, rule, row_numbers(rule, lm.config)) for label, rule in rules.items()]


def find_rule(kinds: Sequence[RuleKind], text: str | None) -> tuple[str, RuleKind, Rule]:
    """Finds the rule of a request.

    Args:
        kinds: the kinds of the server, the default first.
        text: the rule as text, or None for the default.

    Returns:
        Its label, its kind, and the rule.

    Raises:
        UserError: if the server has no such kind, or the text names a file.
    """
    if text is None:
        return kinds[0].label, kinds[0], kinds[0].rule
    text = "".join(text.split())
    for kind in kinds:
        if text == kind.label:
            return kind.label, kind, kind.rule
    known = " and ".join(kind.label for kind in kinds)
    require(
        bool(_PLAIN_RULE.fullmatch(text)) and "policy=" not in text,
        f"a rule of a request is a name with numbers, like threshold:tau=0.7, or one of {known}",
    )
    label, rule = parse_rule(text)
    for kind in kinds:
        if kind.includes(rule):
            return label, kind, rule
    raise UserError(
        f"the server has no program for the rule {label}. It has {known}, whose decimal numbers "
        "are free."
    )


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Lengths of a server's lanes.

    Attributes:
        gen_lengths: largest canvas of each lane, ascending.
        prompt_lengths: longest prompt of each lane, ascending.
        block_length: positions of a block, or None if the canvas is one block.
        slots: S of each lane.
        cache: keys and values that are kept.
    """

    gen_lengths: tuple[int, ...]
    prompt_lengths: tuple[int, ...]
    block_length: int | None
    slots: int
    cache: CacheOptions = CacheOptions()

    def round_up(self, tokens: int) -> int:
        """Returns a canvas of whole blocks that holds this many tokens."""
        size = self.block_length or tokens
        return -(-tokens // size) * size


def make_lengths(
    lm: LM,
    gen_lengths: Sequence[int] | None,
    prompt_lengths: Sequence[int] | None,
    block_length: int | None,
    slots: int | None,
    cache: CacheOptions,
) -> Lengths:
    """Chooses the lengths that a user leaves open.

    Args:
        lm: the model.
        gen_lengths: canvases, or None for those of GEN_LENGTHS that the model has room for.
        prompt_lengths: prompts, or None for those of PROMPT_LENGTHS.
        block_length: positions of a block, or None for the model's default.
        slots: S, or None for SLOTS_CPU on CPUs and SLOTS elsewhere, rounded up for the mesh.
        cache: keys and values that are kept.

    Raises:
        UserError: if there is no room for any, or the mesh does not divide the slots.
    """
    most, size = lm.config.max_length, block_length or lm.config.default_block_length
    shortest = min(prompt_lengths or PROMPT_LENGTHS[:1])
    if gen_lengths is None:
        whole = [n - n % (size or 1) for n in GEN_LENGTHS]
        gen_lengths = [n for n in whole if n and n + shortest + (size or 0) <= most]
        require(
            bool(gen_lengths),
            f"the model has {most} positions, which no default length fits. Give --gen-lengths and "
            "--prompt-lengths.",
        )
    if prompt_lengths is None:
        room = most - max(gen_lengths) - (size or 0 if lm.config.is_block_causal else 0)
        prompt_lengths = [p for p in PROMPT_LENGTHS if p <= room] or [max(room, 1)]
    shards = count_shards(lm.mesh)
    if slots is None:
        slots = SLOTS_CPU if platform() == "cpu" else SLOTS
        slots += -slots % shards
    require(
        slots % shards == 0,
        f"{slots} slots do not divide over the {shards} parts of the mesh's axes data and fsdp. "
        f"{nearest_multiples(slots, shards)}",
    )
    sizes = (tuple(sorted(set(gen_lengths))), tuple(sorted(set(prompt_lengths))))
    return Lengths(*sizes, size, slots, cache)


class DeviceLane:
    """A lane with its state on the device.

    Attributes:
        kind: the kind of its rule.
        lane: lengths and slots.
        passes: steps of a call.
    """

    def __init__(self, lm: LM, kind: RuleKind, config: DecodeConfig, lengths: Lengths, p: int):
        """Makes the state. Nothing is compiled for the passes yet."""
        self.lm, self.kind, self.passes = lm, kind, 1
        self.lane = Lane.of(config, lengths.slots, p, kind.numbers)
        self._slots: Slots = init_slots(lm, kind.rule, self.lane)

    def fits(self, kind: RuleKind, prompt: int, config: DecodeConfig) -> bool:
        """Returns True if the lane can decode a request."""
        most = self.lane.config
        return (
            kind is self.kind
            and prompt <= self.lane.prompt_length
            and config.gen_length <= most.gen_length
            and config.steps <= most.steps
        )

    def row(
        self, prompt: Sequence[int], rule: Rule, config: DecodeConfig, salts: tuple[int, int]
    ) -> Rows:
        """Builds a request of this lane (`decoding.make_row`)."""
        return make_row(self.lane, self.lm.config.pad_id, prompt, rule, config, *salts)

    def admit(self, slot: int, row: Rows) -> None:
        """Puts a request into a slot."""
        with self.lm.scope():
            parts = (self.lm.model, self.lm.params, self.kind.rule, self.lane, self._slots)
            self._slots = admit(*parts, row, jnp.int32(slot))

    def run(self, live: np.ndarray) -> Snapshot:
        """Dispatches one call, and returns its snapshot before it is done."""
        with self.lm.scope():
            parts = (self.lm.model, self.lm.params, self.kind.rule, self.lane, self._slots)
            self._slots, snapshot = run_passes(*parts, live, self.passes)
        for array in (snapshot.tokens, snapshot.levels, snapshot.rows):
            array.copy_to_host_async()
        return snapshot

    def warm_up(self, passes: int | None) -> None:
        """Compiles the programs.

        Args:
            passes: steps of a call, or None for as many as take about CALL_SECONDS.
        """
        config = dataclasses.replace(self.lane.config, trace=False)
        row = self.row([self.lm.config.pad_id], self.kind.rule, config, (0, 0))
        live = np.ones(self.lane.slots, bool)
        self.admit(0, row)
        if passes is None:
            np.asarray(self.run(live).rows)
            began = time.perf_counter()
            np.asarray(self.run(live).rows)
            seconds = time.perf_counter() - began
            passes = int(np.clip(CALL_SECONDS / max(seconds, 1e-4), 1, MOST_PASSES))
        self.passes = passes
        self.admit(0, row)
        self.run(live)
        np.asarray(self.run(~live).rows)

    def reset(self) -> None:
        """Makes the state anew, after a failed call."""
        self._slots = init_slots(self.lm, self.kind.rule, self.lane)


def request_config(
    lm: LM,
    rule: Rule,
    lengths: Lengths,
    canvas: int,
    steps: int | None = None,
    budget: Fraction | None = None,
) -> DecodeConfig:
    """Returns the configuration of a request's decode.

    Args:
        lm: the model.
        rule: the rule.
        lengths: lengths of the server.
        canvas: positions of the canvas, whole blocks.
        steps: passes for the whole canvas, or None for those of the budget.
        budget: share of the full number of steps. None is 1.

    Raises:
        UserError: if the steps do not divide over the blocks.
    """
    if steps is None:
        share = Fraction(1) if budget is None else budget
        steps = resolve_steps(lm.config, share, canvas, lengths.block_length)
    config = make_decode_config(lm, 1, canvas, steps, None, lengths.block_length)
    # The cache is that of the lane, whose numbers may exceed a short request.
    return adapt_loop(rule, slot_config(lm, rule, config, lengths.cache.within(config)))


def make_lanes(lm: LM, kinds: Sequence[RuleKind], lengths: Lengths) -> list[DeviceLane]:
    """Makes the lanes of a server, small ones first.

    Args:
        lm: the model.
        kinds: kinds of rules.
        lengths: lengths and slots.

    Raises:
        UserError: if a canvas with a prompt exceeds the model's positions.
    """
    lanes = []
    for kind in kinds:
        for n in lengths.gen_lengths:
            config = request_config(lm, kind.rule, lengths, n, n)
            lengths.cache.apply(lm.config, config)  # raises UserError for numbers beyond it
            for p in lengths.prompt_lengths:
                require(
                    p + config.canvas <= lm.config.max_length,
                    f"a prompt of {p} tokens and a canvas of {config.canvas} exceed the model's "
                    f"{lm.config.max_length} positions. Lower --prompt-lengths or --gen-lengths.",
                )
                lanes.append(DeviceLane(lm, kind, config, lengths, p))
    return lanes
