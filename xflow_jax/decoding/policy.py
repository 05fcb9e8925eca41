"""The step-size policy (Eqs. 13-17): eight features of a position -> a Beta distribution over how far it moves.

y ~ Beta(mu kappa, (1 - mu) kappa) lies on a logarithmic scale between the smallest and the largest step:
a = a_min (a_max / a_min)^y. Deterministic decoding takes the expectation of a, Kummer's function of the Beta's shape.

mu stays below 0.95, so with the paper's a_max = 1 no step is expected to be larger than about 0.77, and a position
needs four of them to settle. An a_max above 1, cut off at 1, lets a policy settle a position at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

FEATURES = 8


MU_LOW, MU_SPAN = 0.05, 0.9


# y is kept off 0 and 1 by this much: below it float32 cannot tell 1 - y from 1, and log-densities lose their meaning.
_EDGE = 1e-6


@struct.dataclass
class Policy:
    """Parameters of the two-layer SiLU perceptron and its two heads, with the ranges of a and kappa (static)."""

    params: dict[str, jax.Array]
    a_min: float = struct.field(pytree_node=False, default=1 / 256)
    a_max: float = struct.field(pytree_node=False, default=1.0)
    kappa_min: float = struct.field(pytree_node=False, default=2.0)
    kappa_max: float = struct.field(pytree_node=False, default=50.0)

    def beta(self, s: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Features s float32 [..., 8] -> (mu, kappa), float32 [...] each (Eqs. 14, 15)."""
        p = self.params
        flat = s.reshape(-1, FEATURES)
        h = jax.nn.silu(flat @ p["w1"] + p["b1"][None, :])
        h = jax.nn.silu(h @ p["w2"] + p["b2"][None, :])
        mu = MU_LOW + MU_SPAN * jax.nn.sigmoid(h @ p["w_mu"] + p["b_mu"].reshape(1, 1))
        kappa = jax.nn.sigmoid(h @ p["w_kappa"] + p["b_kappa"].reshape(1, 1))
        kappa = self.kappa_min + (self.kappa_max - self.kappa_min) * kappa
        return mu.reshape(s.shape[:-1]), kappa.reshape(s.shape[:-1])

    def step_of(self, y: jax.Array) -> jax.Array:
        """y in [0, 1] -> a on the logarithmic scale between a_min and a_max (Eq. 17), at most 1."""
        return jnp.minimum(self.a_min * jnp.exp(y * math.log(self.a_max / self.a_min)), 1.0)

    def expected_step(self, s: jax.Array) -> jax.Array:
        """E[a] float32 [...] at features s [..., 8]: a_min 1F1(mu kappa; kappa; ln(a_max / a_min)), at most 1."""
        mu, kappa = self.beta(s)
        z = math.log(self.a_max / self.a_min)
        return jnp.minimum(self.a_min * kummer(mu * kappa, kappa, z), 1.0)

    def sample(self, key: jax.Array, s: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Draws (y, a, log-density of y), float32 [...] each, at features s [..., 8]."""
        mu, kappa = self.beta(s)
        y = jnp.clip(jax.random.beta(key, mu * kappa, (1 - mu) * kappa), _EDGE, 1 - _EDGE)
        return y, self.step_of(y), _beta_log_density(y, mu, kappa)

    def log_prob(self, s: jax.Array, y: jax.Array) -> jax.Array:
        """Log-density of y [...] in [0, 1] under the Beta at features s [..., 8]; it and its gradients are finite."""
        return _beta_log_density(jnp.clip(y, _EDGE, 1 - _EDGE), *self.beta(s))


def features(top: jax.Array, t: jax.Array, rho: jax.Array | float) -> jax.Array:
    """Eq. 13: [p1, p2, p3, p4, H4, p1 - p2, t, rho], float32 [B, N, 8].

    top float32 [B, N, 4] descending probabilities, t float32 [B, N], rho a scalar or [B, N]. H4 is the entropy of the
    four renormalised, divided by log 4.
    """
    share = top / jnp.sum(top, axis=-1, keepdims=True)
    entropy = -jnp.sum(
        jnp.where(share > 0, share * jnp.log(jnp.where(share > 0, share, 1.0)), 0.0), axis=-1
    )
    rest = [entropy / math.log(4), top[..., 0] - top[..., 1], t, jnp.broadcast_to(rho, t.shape)]
    return jnp.concatenate([top, jnp.stack(rest, axis=-1)], axis=-1)


def kummer(a: jax.Array, b: jax.Array, z: float) -> jax.Array:
    """Kummer's function 1F1(a; b; z) by its power series, float32, for 0 < a < b and 0 <= z <= 20.

    All terms are positive, so nothing cancels; the n-th is below z^n / n!, and terms beyond 2 z + 25 do not reach
    float32's last bit.
    """
    term = total = jnp.ones_like(a)
    for n in range(int(2 * z) + 25):
        term = term * (a + n) / (b + n) * (z / (n + 1))
        total = total + term
    return total


def _beta_log_density(y: jax.Array, mu: jax.Array, kappa: jax.Array) -> jax.Array:
    a, b = mu * kappa, (1 - mu) * kappa
    norm = jax.lax.lgamma(kappa) - jax.lax.lgamma(a) - jax.lax.lgamma(b)
    return norm + (a - 1) * jnp.log(y) + (b - 1) * jnp.log1p(-y)


def init_policy(key: jax.Array, width: int = 64, **ranges: float) -> Policy:
    """A fresh policy: both heads zero, so it is the same everywhere (mu = 1/2, kappa in the middle of its range)."""
    k1, k2 = jax.random.split(key)
    params = {
        "w1": jax.random.normal(k1, (FEATURES, width)) / math.sqrt(FEATURES),
        "b1": jnp.zeros(width),
        "w2": jax.random.normal(k2, (width, width)) / math.sqrt(width),
        "b2": jnp.zeros(width),
        "w_mu": jnp.zeros((width, 1)),
        "b_mu": jnp.zeros(1),
        "w_kappa": jnp.zeros((width, 1)),
        "b_kappa": jnp.zeros(1),
    }
    return Policy(params, **ranges)


def fit_policy(
    policy: Policy, step_of: Callable[[jax.Array], jax.Array], key: jax.Array, updates: int = 2000
) -> Policy:
    """`policy` with mu trained to give the step of a fixed rule, as far as its range allows; kappa stays.

    step_of: confidence float32 [...] -> a. The features are drawn at random, all over what a decode can meet.
    """
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, updates))

    def draw(key: jax.Array) -> jax.Array:
        keys = jax.random.split(key, 4)
        c = jax.nn.sigmoid(jax.random.uniform(keys[0], (1024,), minval=-4.0, maxval=10.0))
        # What is left of 1 goes to the three others in falling shares, none above the first.
        left, top = 1 - c, [c]
        for share in jnp.sort(
            jax.random.uniform(keys[1], (3, 1024), minval=0.3, maxval=1.0), axis=0
        )[::-1]:
            top.append(jnp.minimum(share * left, top[-1]))
            left = left - top[-1]
        t, rho = jax.random.uniform(keys[2], (2, 1024))
        return features(jnp.stack(top, axis=-1), t, rho)

    def loss(params: Any, s: jax.Array) -> jax.Array:
        u = jnp.log(step_of(s[..., 0]) / policy.a_min) / math.log(policy.a_max / policy.a_min)
        mu, _ = policy.replace(params=params).beta(s)
        return jnp.mean((mu - jnp.clip(u, MU_LOW, MU_LOW + MU_SPAN)) ** 2)

    def update(carry: Any, key: jax.Array) -> tuple[Any, None]:
        params, state = carry
        grads = jax.grad(loss)(params, draw(key))
        # The spread of a fitted policy is a fresh one's: what it explores is for training to say.
        grads |= {name: jnp.zeros_like(grads[name]) for name in ("w_kappa", "b_kappa")}
        updates, state = optimizer.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    start = (policy.params, optimizer.init(policy.params))
    keys = jax.random.split(key, updates)
    (params, _), _ = jax.jit(lambda start, keys: jax.lax.scan(update, start, keys))(start, keys)
    return policy.replace(params=params)
