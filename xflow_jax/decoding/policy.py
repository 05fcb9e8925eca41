"""Step-size policy: a Beta distribution over step fractions (Eqs. 13-17).

Eight features of a position give mu and kappa. y ~ Beta(mu kappa, (1 - mu) kappa) is a place on the
logarithmic scale between the smallest and the largest step, a = a_min (a_max / a_min)^y.
Deterministic decoding takes the expectation of a, which is Kummer's function of mu and kappa.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import struct

from xflow_jax.decoding.belief import Belief
from xflow_jax.decoding.state import Step
from xflow_jax.types import Array, Float, Key, Params

FEATURES = 8  # of a position (Eq. 13)
MU_LOW, MU_SPAN = 0.05, 0.9  # mu is in (0.05, 0.95)

# Distance that y keeps from 0 and 1. Below it float32 cannot separate 1 - y from 1, and
# log-densities lose their meaning.
_EDGE = 1e-6


@struct.dataclass
class Policy:
    """Two-layer SiLU perceptron with heads for mu and kappa.

    mu stays below 0.95. With the paper's a_max = 1 no expected step is therefore above about 0.77,
    and a position needs four steps to settle. With an a_max above 1, cut off at 1, a policy can
    settle a position at once.

    Attributes:
        params: weights w1 [8, d], b1 [d], w2 [d, d], b2 [d], w_mu [d, 1], b_mu [1], w_kappa [d, 1]
            and b_kappa [1].
        a_min, a_max: range of the step fraction.
        kappa_min, kappa_max: range of kappa.
    """

    params: Params
    a_min: float = struct.field(pytree_node=False, default=1 / 256)
    a_max: float = struct.field(pytree_node=False, default=1.0)
    kappa_min: float = struct.field(pytree_node=False, default=2.0)
    kappa_max: float = struct.field(pytree_node=False, default=50.0)

    def __repr__(self) -> str:
        """Describes the policy in one line, without its weights."""
        width = getattr(self.params["b1"], "size", "?") if "b1" in self.params else "?"
        return (
            f"Policy(width={width}, a_min={self.a_min:g}, a_max={self.a_max:g}, "
            f"kappa_min={self.kappa_min:g}, kappa_max={self.kappa_max:g})"
        )

    def observe(self, belief: Belief, t: Float[Array, "B N"], step: Step) -> Float[Array, "B N 8"]:
        """Returns the features of a step (Eq. 13)."""
        return features(belief.top, t, step.rho)

    def beta(self, s: Float[Array, "*B 8"]) -> tuple[Float[Array, "*B"], Float[Array, "*B"]]:
        """Returns (mu, kappa) at features s (Eqs. 14, 15)."""
        p = self.params
        flat = s.reshape(-1, FEATURES)
        h = jax.nn.silu(flat @ p["w1"] + p["b1"][None, :])
        h = jax.nn.silu(h @ p["w2"] + p["b2"][None, :])
        mu = MU_LOW + MU_SPAN * jax.nn.sigmoid(h @ p["w_mu"] + p["b_mu"].reshape(1, 1))
        kappa = jax.nn.sigmoid(h @ p["w_kappa"] + p["b_kappa"].reshape(1, 1))
        kappa = self.kappa_min + (self.kappa_max - self.kappa_min) * kappa
        return mu.reshape(s.shape[:-1]), kappa.reshape(s.shape[:-1])

    def step_of(self, y: Float[Array, "*B"]) -> Float[Array, "*B"]:
        """Returns a, at most 1, for y in [0, 1] (Eq. 17)."""
        return jnp.minimum(self.a_min * jnp.exp(y * math.log(self.a_max / self.a_min)), 1.0)

    def expected_step(self, s: Float[Array, "*B 8"]) -> Float[Array, "*B"]:
        """Returns E[a], at most 1: a_min 1F1(mu kappa, kappa, ln(a_max / a_min))."""
        mu, kappa = self.beta(s)
        z = math.log(self.a_max / self.a_min)
        return jnp.minimum(self.a_min * kummer(mu * kappa, kappa, z), 1.0)

    def sample(
        self, key: Key[Array, ""], s: Float[Array, "*B 8"]
    ) -> tuple[Float[Array, "*B"], Float[Array, "*B"], Float[Array, "*B"]]:
        """Draws y at features s.

        Returns:
            y in (0, 1), the step fraction a, and the log-density of y.
        """
        mu, kappa = self.beta(s)
        y = jnp.clip(jax.random.beta(key, mu * kappa, (1 - mu) * kappa), _EDGE, 1 - _EDGE)
        return y, self.step_of(y), _log_density(y, mu, kappa)

    def log_prob(self, s: Float[Array, "*B 8"], y: Float[Array, "*B"]) -> Float[Array, "*B"]:
        """Returns the log-density of y in [0, 1].

        The value and its gradients are finite.
        """
        return _log_density(jnp.clip(y, _EDGE, 1 - _EDGE), *self.beta(s))


def features(
    top: Float[Array, "*B 4"], t: Float[Array, "*B"], rho: Float[Array, ...] | float
) -> Float[Array, "*B 8"]:
    """Computes the features of each position (Eq. 13).

    They are p1, p2, p3, p4, H4, p1 - p2, t and rho. H4 is the entropy of the four renormalised
    probabilities, divided by log 4.

    Args:
        top: the four largest probabilities in descending order.
        t: progress.
        rho: position in the steps of the block, a scalar or one for each position.
    """
    share = top / jnp.sum(top, axis=-1, keepdims=True)
    surprise = jnp.where(share > 0, share * jnp.log(jnp.where(share > 0, share, 1.0)), 0.0)
    entropy = -jnp.sum(surprise, axis=-1)
    rest = [entropy / math.log(4), top[..., 0] - top[..., 1], t, jnp.broadcast_to(rho, t.shape)]
    return jnp.concatenate([top, jnp.stack(rest, axis=-1)], axis=-1)


def kummer(a: Float[Array, "*B"], b: Float[Array, "*B"], z: float) -> Float[Array, "*B"]:
    """Computes Kummer's function 1F1(a, b, z) by its power series, in float32.

    All terms are positive, so nothing cancels. The n-th is below z^n / n!, and terms beyond
    2 z + 25 do not reach the last bit of float32.

    jax.scipy.special.hyp1f1 has equal values, but its derivatives are 7 times (in a) and 24 times
    (in b) less accurate. On [64, 512] values it takes twice the time, and 10 times with the
    gradient (measured in float32 on a CPU, against float64).

    Args:
        a: first parameter, above 0.
        b: second parameter, above a.
        z: argument in [0, 20].
    """
    term = total = jnp.ones_like(a)
    for n in range(int(2 * z) + 25):
        term = term * (a + n) / (b + n) * (z / (n + 1))
        total = total + term
    return total


def _log_density(
    y: Float[Array, "*B"], mu: Float[Array, "*B"], kappa: Float[Array, "*B"]
) -> Float[Array, "*B"]:
    return jax.scipy.stats.beta.logpdf(y, mu * kappa, (1 - mu) * kappa)


def init_policy(key: Key[Array, ""], width: int = 64, **ranges: float) -> Policy:
    """Creates a policy that is the same at all features.

    mu is 1/2, and kappa is in the middle of its range.

    Args:
        key: a random key for the hidden layers. Both heads are zero.
        width: d, neurons of a hidden layer.
        **ranges: a_min, a_max, kappa_min and kappa_max of the policy.
    """
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
    policy: Policy,
    step_of: Callable[[jax.Array], jax.Array],
    key: Key[Array, ""],
    updates: int = 2000,
) -> Policy:
    """Trains mu to give the steps of a fixed rule.

    Steps outside the range of the policy are clipped. kappa keeps its value, so that a fitted
    policy explores as much as a new one. Its training begins there.

    Args:
        policy: the policy to begin with.
        step_of: step fraction of the rule for a confidence, float32 [...] -> [...].
        key: a random key for the features, which are drawn from all that a decode can meet.
        updates: number of Adam updates.
    """
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, updates))

    def loss(params: Params, s: jax.Array) -> jax.Array:
        u = jnp.log(step_of(s[..., 0]) / policy.a_min) / math.log(policy.a_max / policy.a_min)
        mu, _ = dataclasses.replace(policy, params=params).beta(s)
        return jnp.mean((mu - jnp.clip(u, MU_LOW, MU_LOW + MU_SPAN)) ** 2)

    def update(
        carry: tuple[Params, optax.OptState], key: jax.Array
    ) -> tuple[tuple[Params, optax.OptState], None]:
        params, state = carry
        grads = jax.grad(loss)(params, _draw_features(key, 1024))
        grads |= {name: jnp.zeros_like(grads[name]) for name in ("w_kappa", "b_kappa")}
        updates, state = optimizer.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    start = (policy.params, optimizer.init(policy.params))
    keys = jax.random.split(key, updates)
    (params, _), _ = jax.jit(lambda start, keys: jax.lax.scan(update, start, keys))(start, keys)
    return dataclasses.replace(policy, params=params)


def _draw_features(key: Key[Array, ""], count: int) -> Float[Array, "count 8"]:
    """Draws features of `count` positions, with many confidences close to 1."""
    keys = jax.random.split(key, 4)
    c = jax.nn.sigmoid(jax.random.uniform(keys[0], (count,), minval=-4.0, maxval=10.0))
    # The rest of 1 goes to the three others in falling shares, none above the first.
    left, top = 1 - c, [c]
    shares = jax.random.uniform(keys[1], (3, count), minval=0.3, maxval=1.0)
    for share in jnp.sort(shares, axis=0)[::-1]:
        top.append(jnp.minimum(share * left, top[-1]))
        left = left - top[-1]
    t, rho = jax.random.uniform(keys[2], (2, count))
    return features(jnp.stack(top, axis=-1), t, rho)
