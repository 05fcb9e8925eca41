"""Optimisers by name: optax chains from a configuration, and bfloat16 parameters that lose no updates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from xflow_jax.errors import require

Storage = Literal["float32", "stochastic", "kahan"]


@dataclass(frozen=True)
class OptimizerConfig:
    """The optax chain: clipping of the global norm, then `name` on a warm-up and a constant or cosine rate.

    rate: the highest one; Adafactor's is relative to the parameters' own size (its updates are scaled by their RMS),
    and it keeps sums over rows and columns instead of two moments, so its state takes next to no memory. clip: 0 = none
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
        require(
            self.warmup_steps >= 0,
            f"optimizer.warmup_steps is {self.warmup_steps}, but it must not be negative",
        )
        require(
            self.weight_decay >= 0,
            f"optimizer.weight_decay is {self.weight_decay}, but it must not be negative",
        )
        require(
            self.clip >= 0,
            f"optimizer.clip is {self.clip}, but it must not be negative; 0 turns it off",
        )
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
    """The configured chain for a run of so many steps.

    frozen: top-level names of the tree of parameters that get no update and no optimiser state. storage: how the
    parameters are kept: as float32, or as bfloat16 with stochastic rounding or with Kahan's compensation (`compact`).
    """
    warmup = config.warmup_steps
    if config.schedule == "cosine":
        # One step of decay at least, which optax divides by.
        rate = optax.warmup_cosine_decay_schedule(0.0, config.rate, warmup, max(steps, warmup + 1))
    else:  # a warm-up of no steps would leave optax's rate at its first value, 0
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

    def labels(params: Any) -> dict[str, str]:  # a prefix of the tree
        return {name: "frozen" if name in frozen else "trained" for name in params}

    return optax.multi_transform({"trained": chain, "frozen": optax.set_to_zero()}, labels)


class CompactState(NamedTuple):
    """count: of updates, int32; inner: the state of the inner optimiser, in float32; compensation: what rounding has
    left over so far, like the parameters (Kahan), or nothing."""

    count: jax.Array
    inner: Any
    compensation: Any


def compact(
    inner: optax.GradientTransformation, how: Literal["stochastic", "kahan"], seed: int = 0
) -> optax.GradientTransformation:
    """`inner` for parameters in bfloat16, whose eight bits would swallow most updates: it works in float32, and what it
    returns moves each parameter exactly to the bfloat16 number that it is rounded to.

    stochastic: up or down by chance, so that the expectation is exact; nothing more is stored. kahan: to the nearest,
    and the rest is kept, in bfloat16, and added to the next update. Parameters in float32 are left to `inner`.
    """

    def widen(tree: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(jnp.float32), tree)

    def init(params: Any) -> CompactState:
        rest = jax.tree.map(jnp.zeros_like, params) if how == "kahan" else ()
        return CompactState(jnp.zeros((), jnp.int32), inner.init(widen(params)), rest)

    def update(grads: Any, state: CompactState, params: Any) -> tuple[Any, CompactState]:
        wide = widen(params)
        updates, inner_state = inner.update(widen(grads), state.inner, wide)
        leaves, tree = jax.tree.flatten(params)
        steps = tree.flatten_up_to(updates)
        if how == "kahan":
            rests = tree.flatten_up_to(state.compensation)
            pairs = [_kahan(*leaf) for leaf in zip(leaves, steps, rests, strict=True)]
            steps, rests = ([pair[i] for pair in pairs] for i in (0, 1))
            rest = tree.unflatten(rests)
        else:
            keys = jax.random.split(
                jax.random.fold_in(jax.random.key(seed), state.count), len(leaves)
            )
            steps = [_stochastic(*leaf) for leaf in zip(leaves, steps, keys, strict=True)]
            rest = ()
        return tree.unflatten(steps), CompactState(state.count + 1, inner_state, rest)

    return optax.GradientTransformation(init, update)


def _stochastic(p: jax.Array, update: jax.Array, key: jax.Array) -> jax.Array:
    if p.dtype != jnp.bfloat16:
        return update
    wide = p.astype(jnp.float32)
    return stochastic_round(wide + update, key).astype(jnp.float32) - wide


def _kahan(p: jax.Array, update: jax.Array, rest: jax.Array) -> tuple[jax.Array, jax.Array]:
    if p.dtype != jnp.bfloat16:
        return update, rest
    wide = p.astype(jnp.float32)
    wanted = update + rest.astype(jnp.float32)
    new = (wide + wanted).astype(jnp.bfloat16).astype(jnp.float32)
    # What the step from `p` to `new`, exact in float32, did not cover of what was wanted.
    return new - wide, (wanted - (new - wide)).astype(jnp.bfloat16)


def stochastic_round(x: jax.Array, key: jax.Array) -> jax.Array:
    """float32 -> bfloat16, up or down with the probabilities that make it right on average; infinities and NaN stay."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    rounded = (bits + noise) & jnp.uint32(0xFFFF0000)
    exact = jnp.where(jnp.isfinite(x), jax.lax.bitcast_convert_type(rounded, jnp.float32), x)
    return exact.astype(jnp.bfloat16)
