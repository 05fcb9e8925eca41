"""Supervised training of entry policies, from decodes whose end is known.

There are two kinds of labels. "target": a right answer to each request is its target, and a decode
lets only those masks enter whose prediction is the target's token. At each of its states it is
known which predictions are right (Learn2PD, arXiv:2509.25188). "verdict": decodes let masks enter
at many thresholds, and their answers are judged. An answer is right if none of the entries of its
decode was a mistake, so the logarithm of its probability is a sum over them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from xflow_jax.decoding import Belief, EntryPolicy, Step, confidence_log_odds
from xflow_jax.training.losses import masked_mean
from xflow_jax.training.rollout import Rollout
from xflow_jax.training.state import Batch, TrainState
from xflow_jax.types import Array, Bool, Float, Int, Key, Metrics, Params

EntryLabels = Literal["target", "verdict"]
LEAST_RISK = 1e-4  # that a decode fails, so that its logarithm is finite


@struct.dataclass(kw_only=True)
class Explorer(EntryPolicy):
    """Entry policy with a threshold of its own for each row.

    Attributes:
        least: learned confidences above which masks enter, float32 [B, 1].
    """

    least: Array

    def draw(self, keys: Key[Array, " B"], s: Float[Array, "B N 13"]) -> Bool[Array, "B N"]:
        """Draws masks around the threshold of each row."""
        z = (self.log_odds(s) - jnp.log(self.least / (1 - self.least))) / self.temperature
        return jax.vmap(jax.random.bernoulli)(keys, jax.nn.sigmoid(z))


@struct.dataclass(kw_only=True)
class Teacher(EntryPolicy):
    """Policy that lets only right predictions enter.

    Attributes:
        target: the right answers, int [B, N].
        least: confidence that an entry needs, float32 [B, 1]. The surest right prediction enters
            in any case.
    """

    target: Array
    least: Array

    def observe(self, belief: Belief, t: Float[Array, "B N"], step: Step) -> Float[Array, "B N 14"]:
        """Returns the features of a step, and whether each prediction is right."""
        right = jnp.equal(belief.tokens, self.target).astype(jnp.float32)
        s = EntryPolicy.observe(self, belief, t, step)
        return jnp.concatenate([s, right[..., None]], axis=-1)

    def expected_step(self, s: Float[Array, "B N 14"]) -> Float[Array, "B N"]:
        """Returns a score that puts right predictions first, and then the surest."""
        return s[..., -1] + s[..., 0]

    def draw(self, keys: Key[Array, " B"], s: Float[Array, "B N 14"]) -> Bool[Array, "B N"]:
        """Selects the right predictions that are sure enough."""
        return (s[..., -1] > 0) & (s[..., 0] >= self.least)

    def log_prob(self, s: Float[Array, "B N 14"], y: Float[Array, "B N"]) -> Float[Array, "B N"]:
        """Returns zeros, since a teacher does not draw."""
        return jnp.zeros_like(y)


def target_states(rollouts: Rollout, target: Int[np.ndarray, "R N"]) -> dict[str, np.ndarray]:
    """Returns the states of a teacher's decodes with their labels.

    Args:
        rollouts: the decodes.
        target: the right answers.

    Returns:
        "features" float32 [S, N, 13], "counts" and "right" bool [S, N], and "decode" int [S], the
        row of each state. Only masks that may enter count. Decodes that left their target are
        dropped, which happens if no prediction is right.
    """
    counts = np.array(rollouts.acted)
    counts &= np.all(np.asarray(rollouts.tokens) == target, axis=-1)[None, :, None]
    _, rows = kept = np.nonzero(counts.any(axis=-1))
    s = np.asarray(rollouts.features)[kept]
    return {
        "features": s[..., :-1],
        "counts": counts[kept],
        "right": s[..., -1] > 0,
        "decode": rows,
    }


def verdict_states(rollouts: Rollout, scores: Float[np.ndarray, " R"]) -> dict[str, np.ndarray]:
    """Returns the states of judged decodes with their entries.

    Args:
        rollouts: the decodes.
        scores: verdicts, 0 to 1.

    Returns:
        As `target_states`. The masks that count are those that entered, and "right" is the verdict
        at all of them.
    """
    counts = np.asarray(rollouts.acted) & (np.asarray(rollouts.y) > 0)
    _, rows = kept = np.nonzero(counts.any(axis=-1))
    right = np.broadcast_to(scores[rows, None] > 0.5, counts[kept].shape)
    return {
        "features": np.asarray(rollouts.features)[kept],
        "counts": counts[kept],
        "right": right,
        "decode": rows,
    }


def target_loss(z: Float[Array, "S N"], batch: Batch) -> Float[Array, ""]:
    """Computes the cross-entropy of single predictions.

    Args:
        z: log-odds of each prediction.
        batch: states with "counts" and "right".

    Returns:
        The mean over the masks that count.
    """
    loss = jax.nn.softplus(jnp.where(batch["right"], -z, z))
    return masked_mean(loss, batch["counts"])


def verdict_loss(z: Float[Array, "S N"], batch: Batch) -> Float[Array, ""]:
    """Computes the cross-entropy of verdicts.

    The chance of a right answer is the product over all entries of its decode.

    Args:
        z: log-odds that an entry is no mistake.
        batch: states with "counts", "right" and "decode", the states of complete decodes.

    Returns:
        The mean over decodes.
    """
    states, decode = z.shape[0], batch["decode"]

    def of_decode(x: Array) -> Array:
        return jax.ops.segment_sum(x, decode, states)  # there are at most as many decodes

    log_chance = of_decode(-jnp.sum(jnp.where(batch["counts"], jax.nn.softplus(-z), 0.0), axis=1))
    log_chance = jnp.minimum(log_chance, -LEAST_RISK)
    entries = of_decode(jnp.sum(batch["counts"], axis=1))
    right = of_decode(jnp.sum(batch["counts"] & batch["right"], axis=1)) > 0
    loss = jnp.where(right, -log_chance, -jnp.log(-jnp.expm1(log_chance)))
    return masked_mean(loss, entries > 0)


LOSSES: Mapping[str, Callable[[Array, Batch], Array]] = {
    "target": target_loss,
    "verdict": verdict_loss,
}


def make_entry_step(
    policy: EntryPolicy, optimizer: optax.GradientTransformation, labels: EntryLabels
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Builds the step of supervised training.

    Args:
        policy: the policy. Its parameters are those of the state.
        optimizer: the optimiser.
        labels: the kind of labels.

    Returns:
        step(state, batch) -> (state, metrics). "confidence_loss" is the loss of the confidence
        itself, without what is learned.
    """

    def loss(params: Params, batch: Batch) -> Float[Array, ""]:
        z = dataclasses.replace(policy, params=params).log_odds(batch["features"])
        return LOSSES[labels](z, batch)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        value, grads = jax.value_and_grad(loss)(state.params, batch)
        plain = LOSSES[labels](confidence_log_odds(batch["features"][..., 0]), batch)
        metrics = {"loss": value, "confidence_loss": plain, "grad_norm": optax.tree.norm(grads)}
        return state.update(grads, optimizer), metrics

    return step
