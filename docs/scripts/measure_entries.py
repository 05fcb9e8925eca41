"""Measures which predictions for squares of digits could enter together.

    python docs/scripts/measure_entries.py MODEL [--limit 256]

A state can be solved if some right answer continues it, which the solver of the task finds out.
The first table has, for thresholds on the confidence, the masks above it and the share of states
that can be solved after all of these have entered. The states are those of threshold 0.9 that can
be solved. The last line is a decode that enters all predictions with which the state can be solved,
the surest first.
"""

from __future__ import annotations

import argparse

import jax
import jax.numpy as jnp
import numpy as np

import xflow_jax as xf
from xflow_jax.decoding import pad_prompts
from xflow_jax.lm import LM
from xflow_jax.tasks import get_task
from xflow_jax.tasks.latin_square import Problem, complete
from xflow_jax.tokenizer import chat_ids
from xflow_jax.training.pretraining import response_logits

THRESHOLDS, MOST_PASSES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95), 24


class Squares:
    """Held-out squares, with states of their answers as token ids [B, N].

    Args:
        lm: the model.
        limit: B, number of squares.
    """

    def __init__(self, lm: LM, limit: int):
        self.lm, task = lm, get_task("latin-square")
        assert lm.tokenizer is not None
        self.problems: list[Problem] = list(task.problems(None, limit))
        prompts = [chat_ids(lm.tokenizer, problem.prompt) for problem in self.problems]
        self.ids, self.real = pad_prompts(lm, prompts)
        length = task.config.gen_length
        answers = [lm.tokenizer(task.canonical(p))["input_ids"] for p in self.problems]
        self.answers = np.full((limit, length), lm.config.eos_id)
        for row, answer in enumerate(answers):
            self.answers[row, : len(answer)] = answer
        self.digits = {lm.tokenizer(str(digit))["input_ids"][0]: digit for digit in range(1, 7)}
        self.masked = np.full((limit, length), lm.config.mask_id)
        self._predict = jax.jit(self._predictions)

    def _predictions(self, state: jax.Array) -> tuple[jax.Array, jax.Array]:
        tokens = jnp.concatenate([jnp.asarray(self.ids), state], axis=1)
        real = jnp.concatenate([jnp.asarray(self.real), jnp.ones_like(state, bool)], axis=1)
        prompt = self.ids.shape[1]
        logits = response_logits(self.lm.model, self.lm.params, tokens, real, prompt)
        shares = jax.nn.softmax(logits.at[..., self.lm.config.mask_id].set(-jnp.inf))
        return shares.argmax(axis=-1), shares.max(axis=-1)

    def predict(self, state: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the likeliest tokens and their confidences."""
        tokens, confidence = self._predict(jnp.asarray(state))
        return np.asarray(tokens), np.asarray(confidence)

    def is_mask(self, state: np.ndarray) -> np.ndarray:
        """Returns True at masks."""
        return state == self.lm.config.mask_id

    def can_be_solved(self, row: int, state: np.ndarray) -> bool:
        """Returns True if a right answer continues the state of a row."""
        clues = self.problems[row].clues
        size, filled = len(clues), [list(line) for line in clues]
        for place in np.flatnonzero(~self.is_mask(state)):
            i, j = divmod(int(place), size + 1)
            if i >= size or j >= size:  # a line break, or behind the answer
                if state[place] != self.answers[row, place]:
                    return False
                continue
            digit = self.digits.get(int(state[place]))
            if digit is None or clues[i][j] not in (0, digit):
                return False
            filled[i][j] = digit
        return complete(tuple(map(tuple, filled))) is not None


def measure_thresholds(squares: Squares) -> None:
    """Prints the first table."""
    state, alive = squares.masked.copy(), set(range(len(squares.problems)))
    masks: dict[float, list[int]] = {above: [] for above in THRESHOLDS}
    solvable: dict[float, list[bool]] = {above: [] for above in THRESHOLDS}
    for _ in range(MOST_PASSES):
        tokens, confidence = squares.predict(state)
        for row in sorted(alive):
            open_here = squares.is_mask(state[row])
            for above in THRESHOLDS:
                enters = open_here & (confidence[row] > above)
                after = np.where(enters, tokens[row], state[row])
                masks[above].append(int(enters.sum()))
                solvable[above].append(squares.can_be_solved(row, after))
            surest = np.where(open_here, confidence[row], -1.0)
            enters = open_here & ((confidence[row] > 0.9) | (surest == surest.max()))
            state[row] = np.where(enters, tokens[row], state[row])
            solved = not squares.is_mask(state[row]).any()
            if solved or not squares.can_be_solved(row, state[row]):
                alive.remove(row)
    print("| confidence above | masks | states that can still be solved, % |")
    print("| ---: | ---: | ---: |")
    for above in THRESHOLDS:
        share = 100 * np.mean(solvable[above])
        print(f"| {above:g} | {np.mean(masks[above]):.1f} | {share:.1f} |")


def measure_oracle(squares: Squares) -> None:
    """Prints the last line."""
    state, passes = squares.masked.copy(), np.zeros(len(squares.problems), int)
    for _ in range(MOST_PASSES):
        tokens, confidence = squares.predict(state)
        for row in np.flatnonzero(squares.is_mask(state).any(axis=1)):
            passes[row] += 1
            for place in np.argsort(-confidence[row], kind="stable"):
                if squares.is_mask(state[row, place]):
                    after = state[row].copy()
                    after[place] = tokens[row, place]
                    if squares.can_be_solved(row, after):
                        state[row] = after
    full = ~squares.is_mask(state).any(axis=1)
    share = 100 * np.mean(full)  # what is full and can be solved is right
    print(f"entries chosen by the solver: {share:.1f} % solved in {passes.mean():.1f} passes")


def main(path: str, limit: int) -> None:
    """Prints both.

    Args:
        path: the model.
        limit: number of squares.
    """
    squares = Squares(xf.load(path), limit)
    measure_thresholds(squares)
    measure_oracle(squares)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--limit", type=int, default=256)
    arguments = parser.parse_args()
    main(arguments.model, arguments.limit)
