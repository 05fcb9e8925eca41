"""Requests in the engine, and their states."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Sequence

import numpy as np

from xflow_jax.decoding import DecodeConfig, Rule
from xflow_jax.serving.errors import ApiError
from xflow_jax.serving.lanes import RuleKind

SETTLED = 255  # level of t = 1
EDITS, IDS = 24, 0xFFFFFF  # parts of a snapshot's token


@dataclasses.dataclass(frozen=True, eq=False)
class RowState:
    """State of a request after a call, arrays over its canvas.

    Attributes:
        version: number of the state, from 1.
        tokens: token ids, int [n].
        t, c: progress and confidence from 0 to 255, uint8 [n].
        edits: re-edits modulo 256, uint8 [n].
        blocks: finished blocks.
        passes: forward passes.
        final: positions from the start whose tokens stay.
        top, top_tokens: the four likeliest tokens [n, 4], if the request needs them.
    """

    version: int
    tokens: np.ndarray
    t: np.ndarray
    c: np.ndarray
    edits: np.ndarray
    blocks: int
    passes: int
    final: int
    top: np.ndarray | None = None
    top_tokens: np.ndarray | None = None


class Ticket:
    """A request in the engine.

    The engine's thread writes it, and others read it.

    Attributes:
        prompt: token ids.
        max_tokens: most tokens of the answer.
        state: the latest state, or None before the first call.
        finish_reason: "stop", "length" or "cancelled" at the end, else None.
        end: tokens of the answer, known at the end.
        error: the failure, if any.
        created, started, settled, ended: times of time.monotonic, or None.
    """

    _numbers = itertools.count()

    def __init__(
        self,
        prompt: Sequence[int],
        label: str,
        kind: RuleKind,
        rule: Rule,
        config: DecodeConfig,
        max_tokens: int,
        seed: int = 0,
        repeat: int = 0,
        needs_top: bool = False,
        notify: Callable[[], None] = lambda: None,
    ) -> None:
        """Makes a request that is not yet in the engine."""
        self.number = next(self._numbers)
        self.prompt, self.label, self.kind, self.rule = list(prompt), label, kind, rule
        self.config, self.max_tokens = config, max_tokens
        self.seed, self.repeat, self.needs_top, self.notify = seed, repeat, needs_top, notify
        self.state: RowState | None = None
        self.finish_reason: str | None = None
        self.end = 0
        self.error: ApiError | None = None
        self.created = time.monotonic()
        self.started: float | None = None
        self.settled: float | None = None
        self.ended: float | None = None
        self.is_given_up = False
        self.place: object = None  # the engine's lane
        self.block_of = self._layout()

    def _layout(self) -> np.ndarray:
        """Returns the block of each position, as decoding.block_layout."""
        size, before = self.config.block_length, 0
        if self.config.block_causal:
            before = len(self.prompt) % size
        return (before + np.arange(self.config.gen_length)) // size

    @property
    def is_over(self) -> bool:
        """True after the end or a failure."""
        return self.finish_reason is not None or self.error is not None


def read_state(ticket: Ticket, parts: Sequence[np.ndarray]) -> tuple[RowState, bool, bool]:
    """Reads the state of a request from a snapshot.

    Args:
        ticket: the request.
        parts: its rows of the snapshot's arrays.

    Returns:
        The state, True if the decode goes on, and True if all logits were finite.
    """
    n, (packed, levels, row) = ticket.config.gen_length, parts[:3]
    blocks, passes, active, finite = map(int, row)
    t = levels[:n, 0]
    is_final = ticket.block_of < blocks
    if not ticket.rule.revises:
        is_final |= t == SETTLED
    final = n if not active or is_final.all() else int(np.argmin(is_final))
    tokens, edits = (packed[:n] & IDS).astype(np.int32), (packed[:n] >> EDITS).astype(np.uint8)
    top = [part[:n] for part in parts[3:]] if ticket.needs_top else []
    version = 1 if ticket.state is None else ticket.state.version + 1
    state = RowState(version, tokens, t, levels[:n, 1], edits, blocks, passes, final, *top)
    return state, bool(active), bool(finite)
