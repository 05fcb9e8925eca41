"""Lanes, and the requests in them as arrays of one row."""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from flax import struct

from xflow_jax.decoding.blocks import schedule_arrays
from xflow_jax.decoding.rules.base import Rule
from xflow_jax.decoding.state import DecodeConfig, Step
from xflow_jax.errors import require
from xflow_jax.tokenizer import pad_left


@dataclasses.dataclass(frozen=True)
class Lane:
    """Static part of a lane.

    Attributes:
        config: lengths and steps of the largest request, and switches of all.
        slots: S.
        prompt_length: P, positions of the longest prompt.
        numbers: options of the rule that each row has for itself.
    """

    config: DecodeConfig
    slots: int
    prompt_length: int
    numbers: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, config: DecodeConfig, slots: int, prompt_length: int, numbers: Sequence[str] = ()
    ) -> Lane:
        """Makes the lane of a decode's configuration."""
        return cls(dataclasses.replace(config, trace=True), slots, prompt_length, tuple(numbers))


@struct.dataclass
class Rows:
    """Requests in the slots, as arrays of JAX or NumPy.

    Attributes:
        prompt, prompt_mask: token ids, padded on the left, and False at padding, [S, P].
        salts: seed, hash of the prompt, and number of the same prompt, uint32 [S, 3].
        positions: canvas positions that the row decodes, int [S].
        blocks: blocks that these touch, int [S, 1].
        steps: steps of a block, int [S, 1].
        schedule: steps of one block, arrays [S, T].
        numbers: option of the rule -> its number, float32 [S, 1].
    """

    prompt: Any
    prompt_mask: Any
    salts: Any
    positions: Any
    blocks: Any
    steps: Any
    schedule: Any
    numbers: dict[str, Any]


@functools.lru_cache(maxsize=1024)
def _block_schedule(config: DecodeConfig, length: int) -> Step:
    """Returns the schedule of one block, arrays [1, length]."""
    steps = schedule_arrays(config)

    def pad(x: np.ndarray | None) -> np.ndarray | None:
        return None if x is None else np.pad(x[: config.steps], (0, length - config.steps))[None]

    names = ("rho", "quota", "steps_left", "share")
    parts: dict[str, Any] = {name: pad(steps[name]) for name in names}
    parts |= {"index": None, "block": None}
    return Step(**parts)


def make_row(
    lane: Lane,
    pad_id: int,
    prompt: Sequence[int],
    rule: Rule,
    config: DecodeConfig,
    seed: int = 0,
    repeat: int = 0,
) -> Rows:
    """Builds a request of a lane, as NumPy arrays of one row.

    Args:
        lane: the lane.
        pad_id: id of the padding.
        prompt: token ids, at most lane.prompt_length.
        rule: a rule that differs from the lane's in `lane.numbers` alone.
        config: lengths and steps, within those of the lane.
        seed: of rules that draw.
        repeat: number of an equal prompt with the same seed, for draws of its own.

    Returns:
        The row.

    Raises:
        UserError: if the request does not fit the lane.
    """
    most, size = lane.config, lane.config.block_length
    require(
        len(prompt) <= lane.prompt_length,
        f"the prompt has {len(prompt)} tokens, but there is room for {lane.prompt_length}",
    )
    require(
        config.gen_length <= most.gen_length and config.steps <= most.steps,
        f"the canvas of {config.gen_length} positions with {config.steps} steps for each block "
        f"exceeds {most.gen_length} positions with {most.steps} steps",
    )
    ids, mask = pad_left([list(prompt)], pad_id, lane.prompt_length)
    positions, before = config.gen_length, 0
    if config.block_causal:
        before = len(prompt) % size
        positions = -(-(before + config.gen_length) // size) * size - before
    digest = zlib.crc32(np.asarray(prompt, np.int32).tobytes())
    return Rows(
        prompt=ids,
        prompt_mask=mask,
        salts=np.asarray([[seed, digest, repeat]], np.uint32),
        positions=np.asarray([positions], np.int32),
        blocks=np.asarray([[-(-(before + positions) // size)]], np.int32),
        steps=np.asarray([[config.steps]], np.int32),
        schedule=_block_schedule(config, most.steps),
        numbers={n: np.asarray([[getattr(rule, n)]], np.float32) for n in lane.numbers},
    )
