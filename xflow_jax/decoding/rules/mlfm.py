"""The sampler of masked language flow models."""

from __future__ import annotations

import jax.numpy as jnp
from flax import struct

from xflow_jax.decoding.belief import Belief
from xflow_jax.decoding.rules.base import (
    Action,
    TokenConstraints,
    check_ranges,
    select_highest,
    static_field,
)
from xflow_jax.decoding.rules.revision import Revision
from xflow_jax.decoding.state import DecodeState, Step
from xflow_jax.errors import require


@struct.dataclass
class MLFM(TokenConstraints):
    """Sampler of masked language flow models (arXiv:2606.27617), without noise.

    It alternates between denoising and unmasking. For `denoising_steps` passes all masks move along
    the straight line to the mean embedding of their likely tokens. The last of these passes writes
    the masks with confidence of at least tau, and at least the most confident one. The others
    become masks again. One denoising step is threshold decoding. The original draws noise on the
    way, has guidance, and needs a model that was trained on such inputs and knows the time.

    Attributes:
        tau: confidence threshold, in [0, 1].
        denoising_steps: passes for each unmasking.
        suppress_mask: predict neither the mask token nor a row without a token.
        early_exit: skip steps of blocks without masks.

    Raises:
        UserError: if a number is out of range.
    """

    tau: float = static_field(0.8)
    denoising_steps: int = static_field(4)
    suppress_mask: bool = static_field(True, kw_only=True)
    early_exit: bool = static_field(True)

    def __post_init__(self) -> None:
        check_ranges(self, tau=1.0)
        steps = self.denoising_steps
        require(steps >= 1, f"denoising_steps must be at least 1, not {steps}")

    def init_memory(self, batch: int, canvas: int) -> Revision:
        """Returns the memory before the first step, which counts passes."""
        return Revision.first(batch)

    def __call__(self, belief: Belief, state: DecodeState, step: Step) -> Action:
        """Moves all masks, or writes some and takes the others back."""
        masked = step.candidates & (state.t < 1)
        passes = state.memory.count_pass(step)
        left = (self.denoising_steps - 1 - (passes - 1) % self.denoising_steps)[:, None]
        best = select_highest(belief.confidence, masked, 1)
        written = masked & (left == 0) & (best | (belief.confidence >= self.tau))
        a = jnp.where(masked & (left > 0), 1.0 / (left + 1), written.astype(jnp.float32))
        no = jnp.zeros_like(masked)
        memory = Revision(state.memory.over, passes)
        remask = masked & (left == 0) & ~written
        return Action(a, no, no, memory=memory, expected=True, remask=remask)
