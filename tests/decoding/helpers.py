"""Beliefs, states and steps written by hand, and plain loops, for the tests of decoding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from tests.helpers import random_prompts
from xflow_jax.decoding.belief import Belief
from xflow_jax.decoding.rules.base import Rule
from xflow_jax.decoding.state import DecodeState, Step
from xflow_jax.lm import LM
from xflow_jax.tokenizer import pad_left

YES, NO = True, False


def belief_of(
    c: ArrayLike,
    second: ArrayLike = 0.0,
    entropy: ArrayLike = 0.0,
    tokens: ArrayLike | None = None,
) -> Belief:
    """Builds the belief of one row from confidences [N]. By default position i predicts token i."""
    c = jnp.asarray(c, jnp.float32)[None]
    rest = jnp.broadcast_to(jnp.asarray(second, jnp.float32), c.shape)
    top = jnp.stack([c, rest, jnp.zeros_like(c), jnp.zeros_like(c)], axis=-1)
    tokens = jnp.arange(c.shape[1]) if tokens is None else jnp.asarray(tokens)
    ids = jnp.broadcast_to(jnp.arange(4), top.shape)
    entropy = jnp.broadcast_to(jnp.asarray(entropy, jnp.float32), c.shape)
    return Belief(tokens[None], c, top, ids, entropy)


def belief_of_four(p: ArrayLike, ids: ArrayLike) -> Belief:
    """Builds the belief of one row from the four likeliest tokens of each position, [N, 4]."""
    p, ids = jnp.asarray(p, jnp.float32)[None], jnp.asarray(ids)[None]
    return Belief(ids[..., 0], p[..., 0], p, ids, jnp.zeros(p.shape[:2]))


def state_of(
    t: ArrayLike, x: ArrayLike | None = None, tokens: ArrayLike | None = None
) -> DecodeState:
    """Builds the state of one row in one dimension, from progress [N]."""
    t = jnp.asarray(t, jnp.float32)[None]
    x = jnp.zeros((*t.shape, 1)) if x is None else jnp.asarray(x, jnp.float32)[None, :, None]
    tokens = jnp.full(t.shape, 9) if tokens is None else jnp.asarray(tokens)[None]
    return DecodeState(x, t, tokens, jnp.zeros(1, jnp.int32), jnp.zeros(1, bool))


def step_of(
    n: int,
    quota: int = 1,
    candidates: Sequence[bool] | None = None,
    steps_left: float = 4.0,
    rho: float = 0.0,
    key: int = 0,
) -> Step:
    """Builds a step for one row of `n` positions. By default all may move."""
    chosen = jnp.ones((1, n), bool) if candidates is None else jnp.asarray(candidates)[None]
    return Step(
        index=jnp.int32(0),
        block=jnp.int32(0),
        rho=jnp.float32(rho),
        quota=jnp.int32(quota),
        steps_left=jnp.float32(steps_left),
        candidates=chosen,
        keys=jax.random.split(jax.random.key(key), 1),
    )


def act(rule: Rule, c: Sequence[float], t: Sequence[float], **options: Any) -> tuple[list, ...]:
    """Returns a rule's (a, reset, commit) for one row. Options are those of the helpers above."""
    belief = {k: options.pop(k) for k in ("second", "entropy") if k in options}
    action = rule(belief_of(c, **belief), state_of(t), step_of(len(c), **options))
    return tuple(np.asarray(part[0]).tolist() for part in (action.a, action.reset, action.commit))


def committed(rule: Rule, c: Sequence[float], t: Sequence[float], **options: Any) -> list[int]:
    """Returns the positions to which a rule gives a step fraction above 0."""
    return np.flatnonzero(act(rule, c, t, **options)[0]).tolist()


def python_scan(f: Callable[..., Any], init: Any, xs: Any) -> tuple[Any, Any]:
    """Runs jax.lax.scan as the plain loop that defines it."""
    ys = []
    for i in range(len(jax.tree.leaves(xs)[0])):
        init, y = f(init, jax.tree.map(lambda x, i=i: x[i], xs))
        ys.append(y)
    return init, jax.tree.map(lambda *y: jnp.stack(y), *ys)


def prompt_arrays(
    lm: LM, lengths: Sequence[int], seed: int = 0
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns (ids, mask, keys) of random prompts, as `decode` takes them."""
    ids, mask = pad_left(random_prompts(lengths, seed, 8), lm.config.pad_id)
    return jnp.asarray(ids), jnp.asarray(mask), jax.random.split(jax.random.key(seed), len(lengths))
