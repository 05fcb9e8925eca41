"""Batches of rows of similar lengths, with little padding."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from xflow_jax.errors import require
from xflow_jax.training.batches import BatchIterator, Example, stack_examples

MULTIPLE = 16  # lengths of the batches, so that there are few shapes


class LengthGroups:
    """Exchanges rows of nearby batches, so that each has similar lengths.

    Batches after the last grouped one are as they were.

    Args:
        batches: the batches, of equal numbers of rows.
        kind: number of a batch -> what it holds, or None for one that stays as it is. Rows go to
            batches of their kind only.
        window: batches that exchange rows. 1 leaves all as they are.
        until: number of batches that are grouped.
        eos_id: the token after the end of a response.
    """

    def __init__(
        self,
        batches: BatchIterator,
        kind: Callable[[int], int | None],
        window: int,
        until: int,
        eos_id: int,
    ):
        self.batches, self.kind = batches, kind
        self.window, self.until, self.eos_id = window, until if window > 1 else 0, eos_id
        self.given = 0
        self.current: list[Example] = []  # the window
        self.ahead: list[Example] = []  # what is read of the next one
        self.begin = self.ahead_begin = batches.get_state()

    def __iter__(self) -> Iterator[Example]:
        return self

    def __next__(self) -> Example:
        place = self.given % self.window
        if self.given >= self.until:
            batch = next(self.batches)
        else:
            if place == 0:
                self._open_window()
            elif len(self.ahead) < self._size(self.given - place + self.window):
                self.ahead.append(next(self.batches))  # one for each, so that no batch waits
            batch = self.current[place]
        self.given += 1
        return batch

    def _size(self, first: int) -> int:
        """Returns the number of batches of the window from a first one."""
        return max(0, min(self.window, self.until - first))

    def _open_window(self) -> None:
        first = self.given - self.given % self.window
        while len(self.ahead) < self._size(first):
            self.ahead.append(next(self.batches))
        kinds = [self.kind(first + i) for i in range(len(self.ahead))]
        self.current = group_rows(self.ahead, kinds, self.eos_id, seed=first)
        self.begin, self.ahead, self.ahead_begin = self.ahead_begin, [], self.batches.get_state()

    def get_state(self) -> dict[str, Any]:
        """Returns the position: batches that were given, and where their window begins."""
        if self.given >= self.until:
            begin = self.batches.get_state()
        else:
            begin = self.begin if self.given % self.window else self.ahead_begin
        return {"given": self.given, "window": self.window, "until": self.until, "begin": begin}

    def set_state(self, state: dict[str, Any]) -> None:
        """Moves to a position. The window is read again.

        Raises:
            UserError: if the position is that of another window.
        """
        window = state.get("window", 1)  # the position of plain batches has none
        require(
            window == self.window,
            f"the run goes on in groups of {window} batches, and not of {self.window}. "
            "Give it the same clean_window.",
        )
        self.given, self.ahead_begin = state.get("given", 0), state.get("begin", state)
        until = state.get("until", self.until)
        require(
            until == self.until
            or self.given % self.window == 0
            or self.given >= max(until, self.until),
            f"the run is inside a group of {window} batches, and {until} batches were to be "
            f"grouped, not {self.until}. Give it the same clean_steps.",
        )
        self.batches.set_state(self.ahead_begin)
        self.ahead = []
        if self.given < self.until and self.given % self.window:
            self._open_window()


def group_rows(
    batches: list[Example], kinds: list[int | None], eos_id: int, seed: int
) -> list[Example]:
    """Sorts the rows of batches of each kind by length.

    Args:
        batches: arrays [B, ...] of "prompt", "prompt_mask" and "response".
        kinds: kind of each batch, or None for one that stays as it is.
        eos_id: the token after the end of a response.
        seed: seed of the order of the new batches.

    Returns:
        As many batches of each kind, without padding that none of their rows needs.
    """
    grouped = list(batches)
    for kind in sorted({kind for kind in kinds if kind is not None}):
        places = [i for i, other in enumerate(kinds) if other == kind]
        rows = [
            {name: x[row] for name, x in batches[i].items()}
            for i in places
            for row in range(len(batches[i]["response"]))
        ]
        # A clean copy counts the response twice.
        rows.sort(key=lambda row: row["prompt_mask"].sum() + 2 * (row["response"] != eos_id).sum())
        count = len(rows) // len(places)
        order = np.random.default_rng([seed, kind]).permutation(len(places))
        for place, part in zip(places, order, strict=True):
            batch = stack_examples(rows[part * count : (part + 1) * count])
            grouped[place] = cut_padding(batch, eos_id)
    return grouped


def cut_padding(batch: Example, eos_id: int) -> Example:
    """Cuts a batch to the longest prompt and response in it.

    Args:
        batch: "prompt" int [B, P], "prompt_mask" bool [B, P], False at the padding on the left,
            and "response" int [B, N].
        eos_id: the token after the end of a response. Each keeps at least one.

    Returns:
        The batch with lengths that are multiples of MULTIPLE, or as before where it is shorter.
    """
    prompt = _round_up(batch["prompt_mask"].sum(axis=1).max())
    text = _round_up((batch["response"] != eos_id).sum(axis=1).max() + 1)
    return {
        "prompt": batch["prompt"][:, -prompt:],
        "prompt_mask": batch["prompt_mask"][:, -prompt:],
        "response": batch["response"][:, :text],
    }


def _round_up(length: np.integer) -> int:
    return -(-int(length) // MULTIPLE) * MULTIPLE
