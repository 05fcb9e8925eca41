"""Training steps: pure functions of a state, a batch and a key, to be jitted once."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

Params = Any


Metrics = dict[str, jax.Array]


@struct.dataclass
class TrainState:
    """What a run is, apart from its data: the step it is at, its parameters and its optimiser's state."""

    step: jax.Array
    params: Params
    opt_state: optax.OptState

    @classmethod
    def create(cls, params: Params, optimizer: optax.GradientTransformation) -> TrainState:
        """The state before the first step."""
        return cls(jnp.zeros((), jnp.int32), params, optimizer.init(params))

    def update(self, grads: Params, optimizer: optax.GradientTransformation) -> TrainState:
        """The state after a step along `grads`."""
        updates, opt_state = optimizer.update(grads, self.opt_state, self.params)
        return TrainState(self.step + 1, optax.apply_updates(self.params, updates), opt_state)
