"""The step of an alignment, on either kind of states."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
import optax

from xflow_jax.training.alignment import AlignmentConfig, make_alignment_loss
from xflow_jax.training.state import Batch, TrainState
from xflow_jax.training.trajectory import LiveDecodes, TrajectoryState
from xflow_jax.training.trajectory_loss import make_trajectory_loss
from xflow_jax.types import Array, Backbone, Key, Metrics, Params

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
        if config.accumulate == 1:
            grads, (metrics, live) = grad_fn(state.params, batch, live, key, base)
        else:
            grads, (metrics, live) = _mean_gradients(
                grad_fn, state.params, batch, live, key, base, config.accumulate
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


def _mean_gradients(
    grad_fn: GradFn,
    params: Params,
    batch: Batch,
    live: Live,
    key: Key[Array, ""],
    base: Params | None,
    count: int,
) -> tuple[Params, tuple[Metrics, Live]]:
    """Averages gradients and metrics over equal parts of a batch.

    Sums are float32. optax.microbatching.microbatch would add bfloat16 gradients in bfloat16, and
    it has no random key for each part.
    """
    # Part i has the rows i, i + count, ..., so each part is sharded as the batch is.
    parts = jax.tree.map(
        lambda x: jnp.swapaxes(x.reshape(-1, count, *x.shape[1:]), 0, 1), (batch, live)
    )

    def visit(
        total: Params, part: tuple[tuple[Batch, Live], jax.Array]
    ) -> tuple[Params, tuple[Metrics, Live]]:
        grads, aux = grad_fn(params, *part[0], part[1], base)
        return jax.tree.map(lambda t, g: t + g / count, total, grads), aux

    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), params)
    grads, (metrics, live) = jax.lax.scan(visit, zero, (parts, jax.random.split(key, count)))
    live = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:]), live)
    return grads, (jax.tree.map(jnp.mean, metrics), live)
