"""The step of an alignment, on either kind of states."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TypeAlias

import jax
import optax

from xflow_jax.training.alignment import AlignmentConfig, make_alignment_loss
from xflow_jax.training.gradients import mean_gradients
from xflow_jax.training.state import Batch, TrainState
from xflow_jax.training.trajectory import LiveDecodes, TrajectoryState
from xflow_jax.training.trajectory_loss import make_trajectory_loss
from xflow_jax.types import Backbone, Metrics, Params

Live: TypeAlias = tuple[LiveDecodes | None, ...]
# (params, batch, live decodes, key, base) -> (gradients, (metrics, live decodes))
GradFn: TypeAlias = Callable[
    [Params, Batch, Live, jax.Array, Params | None], tuple[Params, tuple[Metrics, Live]]
]
AlignStep: TypeAlias = Callable[..., tuple[TrainState, Metrics]]


def make_align_step(
    model: Backbone, optimizer: optax.GradientTransformation, config: AlignmentConfig
) -> AlignStep:
    """Builds the step of an alignment.

    Args:
        model: the model.
        optimizer: the optimiser of the trained parameters.
        config: the configuration.

    Returns:
        step(state, batch, key, base=None) -> (state, metrics), with `base` as in
        `make_alignment_loss`. The gradients of the `accumulate` parts are averaged in float32
        before the one update. With states = "trajectory" the state is a TrajectoryState, and a row
        of the batch is used if the live decode in its place is over.
    """
    grad_fn = _grad_fn(model, config)

    def step(
        state: TrainState, batch: Batch, key: jax.Array, base: Params | None = None
    ) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(key, state.step)
        live = state.live if isinstance(state, TrajectoryState) else ()
        grads, (metrics, live) = mean_gradients(
            lambda params, part, key: grad_fn(params, *part, key, base),
            state.params,
            (batch, live),
            key,
            config.accumulate,
        )
        state = state.update(grads, optimizer)
        if isinstance(state, TrajectoryState):
            state = dataclasses.replace(state, live=live)
        return state, metrics | {"grad_norm": optax.tree.norm(grads)}

    return step


def _grad_fn(model: Backbone, config: AlignmentConfig) -> GradFn:
    """Returns the gradient of the loss that the states need."""
    if config.states == "trajectory":
        return jax.grad(make_trajectory_loss(model, config), has_aux=True)
    masked = jax.grad(make_alignment_loss(model, config), has_aux=True)

    def grad_fn(
        params: Params, batch: Batch, live: Live, key: jax.Array, base: Params | None
    ) -> tuple[Params, tuple[Metrics, Live]]:
        grads, metrics = masked(params, batch, key, base)
        return grads, (metrics, live)

    return grad_fn
