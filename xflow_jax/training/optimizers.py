"""Optimisers by name, and optimisers for bfloat16 parameters that lose no updates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from xflow_jax.errors import require
from xflow_jax.types import Array, Float, Key, PyTree

Rounding = Literal["stochastic", "kahan"]
Storage = Literal["float32", "stochastic", "kahan"]


@dataclass(frozen=True)
class OptimizerConfig:
    """An optax chain: clipping of the global norm, then an optimiser.

    Attributes:
        name: the optimiser. Adafactor keeps sums over rows and columns instead of two moments, so
            its state needs almost no memory.
        rate: largest learning rate. That of Adafactor is relative to the size of the parameters,
            because its updates are scaled by their RMS.
        schedule: shape of the rate after the warm-up.
        warmup_steps: steps of the linear warm-up.
        weight_decay: decay of the weights, 0 for none.
        b1, b2: decay rates of the moments of AdamW.
        clip: largest global norm of the gradients, 0 for no clipping.

    Raises:
        UserError: if a value is out of range.
    """

    name: Literal["adamw", "adafactor"] = "adamw"
    rate: float = 3e-4
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: int = 10
    weight_decay: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    clip: float = 1.0

    def __post_init__(self) -> None:
        require(self.rate > 0, f"optimizer.rate is {self.rate}, but it must be positive")
        for name in ("warmup_steps", "weight_decay", "clip"):
            value = getattr(self, name)
            hint = ". 0 turns it off." if name == "clip" else ""
            require(value >= 0, f"optimizer.{name} is {value}, but it must not be negative{hint}")
        for name in ("b1", "b2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"optimizer.{name} is {value}, but it must be in [0, 1)")


def make_optimizer(
    config: OptimizerConfig,
    steps: int,
    frozen: tuple[str, ...] = (),
    storage: Storage = "float32",
    seed: int = 0,
) -> optax.GradientTransformation:
    """Builds the optimiser of a run.

    Args:
        config: the configuration.
        steps: updates of the run, for the schedule.
        frozen: top-level names of parameters that get no update and no optimiser state.
        storage: storage of the parameters: float32, or bfloat16 with a rounding of `compact`.
        seed: seed of stochastic rounding.

    Returns:
        The optax transformation.
    """
    warmup = config.warmup_steps
    if config.schedule == "cosine":
        # At least one step of decay, because optax divides by their number.
        rate = optax.warmup_cosine_decay_schedule(0.0, config.rate, warmup, max(steps, warmup + 1))
    else:  # with a warm-up of 0 steps, optax's rate would stay at its first value, 0
        rate = optax.warmup_constant_schedule(0.0, config.rate, warmup) if warmup else config.rate
    if config.name == "adamw":
        inner = optax.adamw(rate, b1=config.b1, b2=config.b2, weight_decay=config.weight_decay)
    else:
        inner = optax.adafactor(rate, weight_decay_rate=config.weight_decay or None)
    chain = optax.chain(optax.clip_by_global_norm(config.clip), inner) if config.clip else inner
    if storage != "float32":
        chain = compact(chain, storage, seed)
    if not frozen:
        return chain

    def labels(params: Mapping[str, object]) -> dict[str, str]:  # a prefix of the tree
        return {name: "frozen" if name in frozen else "trained" for name in params}

    return optax.multi_transform({"trained": chain, "frozen": optax.set_to_zero()}, labels)


class CompactState(NamedTuple):
    """State of `compact`.

    Attributes:
        count: number of updates, int32.
        inner: state of the inner optimiser, float32.
        compensation: sum of what rounding left out, a tree like the parameters, or () without
            Kahan compensation.
    """

    # The name is part of the format of checkpoints, although it hides a method of tuples.
    count: jax.Array  # type: ignore[assignment]
    inner: optax.OptState
    compensation: PyTree


def compact(
    inner: optax.GradientTransformation, rounding: Rounding, seed: int = 0
) -> optax.GradientTransformation:
    """Wraps an optimiser for parameters in bfloat16.

    The eight bits of bfloat16 would lose most updates. So the inner optimiser works in float32, and
    each update leads exactly to the bfloat16 number to which the parameter is rounded. Parameters
    in float32 get the updates of the inner optimiser unchanged.

    Args:
        inner: the optimiser.
        rounding: "stochastic" rounds up or down at random, so that the expectation is exact, and
            stores nothing. "kahan" rounds to the nearest number, stores the remainder in bfloat16
            and adds it to the next update.
        seed: seed of stochastic rounding.

    Returns:
        The wrapped optimiser.
    """

    def init(params: PyTree) -> CompactState:
        remainder = jax.tree.map(jnp.zeros_like, params) if rounding == "kahan" else ()
        return CompactState(jnp.zeros((), jnp.int32), inner.init(_to_float32(params)), remainder)

    def update(grads: PyTree, state: CompactState, params: PyTree) -> tuple[PyTree, CompactState]:
        wide = _to_float32(params)
        updates, inner_state = inner.update(_to_float32(grads), state.inner, wide)
        structure = jax.tree.structure(params)
        if rounding == "kahan":
            pairs = jax.tree.map(_kahan_update, params, updates, state.compensation)
            updates, remainder = jax.tree.transpose(structure, jax.tree.structure((0, 0)), pairs)
        else:
            key = jax.random.fold_in(jax.random.key(seed), state.count)
            keys = list(jax.random.split(key, len(jax.tree.leaves(params))))
            updates = jax.tree.map(
                _stochastic_update, params, updates, jax.tree.unflatten(structure, keys)
            )
            remainder = ()
        return updates, CompactState(state.count + 1, inner_state, remainder)

    return optax.GradientTransformation(init, update)


def _to_float32(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def _stochastic_update(p: jax.Array, update: jax.Array, key: Key[Array, ""]) -> jax.Array:
    """Returns the update from p to the stochastically rounded sum."""
    if p.dtype != jnp.bfloat16:
        return update
    wide = p.astype(jnp.float32)
    return stochastic_round(wide + update, key).astype(jnp.float32) - wide


def _kahan_update(
    p: jax.Array, update: jax.Array, remainder: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns (update to the nearest bfloat16 number, new remainder)."""
    if p.dtype != jnp.bfloat16:
        return update, remainder
    wide = p.astype(jnp.float32)
    exact = update + remainder.astype(jnp.float32)
    rounded = (wide + exact).astype(jnp.bfloat16).astype(jnp.float32)
    # The difference `rounded - wide` is exact in float32.
    return rounded - wide, (exact - (rounded - wide)).astype(jnp.bfloat16)


def stochastic_round(x: Float[Array, "*shape"], key: Key[Array, ""]) -> Float[Array, "*shape"]:
    """Rounds float32 to bfloat16 at random, so that the expectation is exact.

    Args:
        x: numbers, float32.
        key: a random key.

    Returns:
        One of the two neighbours of each number, bfloat16. Infinities and NaN stay.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    rounded = (bits + noise) & jnp.uint32(0xFFFF0000)
    finite = jnp.where(jnp.isfinite(x), jax.lax.bitcast_convert_type(rounded, jnp.float32), x)
    return finite.astype(jnp.bfloat16)
