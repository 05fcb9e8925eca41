"""State of a training run, and the types of batches and steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TypeAlias, no_type_check

import jax
import jax.numpy as jnp
import optax
from flax import struct

from xflow_jax.models import require_float
from xflow_jax.types import Metrics, Params

Batch: TypeAlias = dict[str, jax.Array]


@no_type_check  # of the fields, since transforms of trees put other leaves there
@struct.dataclass
class TrainState:
    """Step, parameters and optimiser state of a run.

    Attributes:
        step: number of updates so far, an int32 scalar.
        params: the parameters that are trained.
        opt_state: state of their optimiser.
    """

    step: jax.Array
    params: Params
    opt_state: optax.OptState

    @classmethod
    def create(cls, params: Params, optimizer: optax.GradientTransformation) -> TrainState:
        """Returns the state before the first step.

        Raises:
            UserError: if the matrices of the parameters are int8.
        """
        require_float(params, "training")
        return cls(jnp.zeros((), jnp.int32), params, optimizer.init(params))

    def update(self, grads: Params, optimizer: optax.GradientTransformation) -> TrainState:
        """Returns the state after one update with the gradients."""
        updates, opt_state = optimizer.update(grads, self.opt_state, self.params)
        params = optax.apply_updates(self.params, updates)
        return dataclasses.replace(self, step=self.step + 1, params=params, opt_state=opt_state)


TrainStep: TypeAlias = Callable[[TrainState, Batch, jax.Array], tuple[TrainState, Metrics]]
