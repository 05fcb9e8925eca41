# %% [markdown]
# # A rule of your own
#
# A rule is a frozen dataclass. In each pass it receives three things:
#
# - `belief`, what the model predicts: `tokens`, `confidence`, `entropy` and the four largest
#   probabilities `top`,
# - `state`, where the positions stand: progress `t`, state `x`, `tokens`,
# - `step`, a slice of the schedule: `candidates` (positions that may move), `quota`, `rho`,
#   `steps_left`.
#
# It returns an `Action`: the step fraction `a` of each position, and which positions to re-edit
# or to commit.
#
# This rule commits every position whose margin, the first probability minus the second, reaches a
# threshold that falls during the block. The most confident position is always committed, so that
# each pass makes progress.

# %%
import jax.numpy as jnp
from flax import struct

import xflow_jax as xf
from xflow_jax.decoding import Action, TokenConstraints, order_score, select_highest, static_field


@struct.dataclass
class FallingMargin(TokenConstraints):
    """Commits positions whose margin p1 - p2 reaches a falling threshold."""

    high: float = static_field(0.95)
    low: float = static_field(0.5)
    early_exit: bool = static_field(True)

    def __call__(self, belief, state, step):
        masked = step.candidates & (state.t < 1)
        margin = order_score(belief, "margin")
        threshold = self.high + step.rho * (self.low - self.high)
        best = select_highest(belief.confidence, masked, 1)
        return Action.unmask((masked & (margin >= threshold)) | best)


# %% [markdown]
# The class derives from `TokenConstraints`, which answers the other questions of the decoder, for
# example which tokens may never be predicted. `static_field` declares an option. `Action.unmask`
# is an action of whole steps: `a` is 1 at the chosen positions and 0 elsewhere.

# %%
lm = xf.load("tiny")
prompts = [
    "Square them, then drop the even numbers and return the largest.",
    "Sort the numbers, then drop the first 2 and return the smallest.",
]
out = xf.generate(lm, prompts, FallingMargin(), gen_length=48, steps=24, block_length=16)
for text, passes in zip(out.texts, out.forward_passes, strict=True):
    print(f"{text}\n[{passes} forward passes]\n")

# %% [markdown]
# ## Steps between 0 and 1
#
# A rule may also move a position part of the way. This one goes all the way at a confidence above
# `sure`, and otherwise a small step that shrinks during the block. It is a small flow.


# %%
@struct.dataclass
class TwoSpeeds(TokenConstraints):
    """Moves sure positions all the way and the others by a step that shrinks to 0."""

    sure: float = static_field(0.98)
    creep: float = static_field(0.2)
    early_exit: bool = static_field(True)

    def __call__(self, belief, state, step):
        c = belief.confidence
        a = jnp.where(c > self.sure, 1.0, self.creep * (1 - step.rho))
        best = select_highest(c, step.candidates & (state.t < 0.99), 1)
        return Action(a, reset=jnp.zeros_like(best), commit=best)


out = xf.generate(lm, prompts, TwoSpeeds(), gen_length=48, steps=24, block_length=16)
for text, passes in zip(out.texts, out.forward_passes, strict=True):
    print(f"{text}\n[{passes} forward passes]\n")

# %% [markdown]
# ## In the commands
#
# Save a rule as `my_rule.py` and name it with its options wherever a command takes a rule:
#
# ```bash
# xflow evaluate --model tiny --task microcode --limit 64 --budgets 1/4 \
#   --rules "mask,my_rule.py:FallingMargin(low=0.3)"
# ```
#
# The [guide](../guides/own-rule.md) has the options of that text and what the checks of a rule
# are.
