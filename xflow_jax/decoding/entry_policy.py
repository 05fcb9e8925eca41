"""Entry policy: a learned confidence that selects the masks to enter.

The confidence c of a prediction says nothing about the other predictions of the same pass. Two
masks with c = 0.9 may contradict each other, and a threshold lets both in. This policy adds a
learned term to the log-odds of c. One attention layer compares the masks of a row: how far apart
they are, how sure each is, and whether they predict equal tokens. A mask enters if its learned
confidence is above a threshold.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import struct

from xflow_jax.decoding.belief import TOP, Belief
from xflow_jax.decoding.policy import FEATURES, features
from xflow_jax.decoding.state import Step
from xflow_jax.types import Array, Bool, Float, Key, Params

HEADS = 4
REACH = 64  # distances beyond it count as equal
ENTRY_FEATURES = FEATURES + TOP + 1  # of Eq. 13, ids of the likeliest tokens, and "may enter"
_LARGEST = 12.0  # of log-odds, which float32 still separates


@struct.dataclass
class EntryPolicy:
    """One attention layer over the masks of a row, and a perceptron.

    A new policy has the confidence itself as its learned confidence, so it decodes as a threshold.

    Attributes:
        params: weights w_in [10, d], b_in [d], w_q, w_k, w_v and w_o [d, d], distance
            [4, 2 x 64 + 1], alike [4], sink [4], w_1 [2 d, d], b_1 [d], w_out [d, 1] and b_out [1].
        above: learned confidence above which a mask enters.
        temperature: of the draws. Near 0, a draw is the decision of the threshold.
        imitate: confidences [B, 1] of rows that do not draw. There the masks with a higher
            confidence enter. Rows with 1 draw. None: all rows draw.
    """

    params: Params
    above: float = struct.field(pytree_node=False, default=0.9)
    temperature: float = struct.field(pytree_node=False, default=1.0)
    imitate: Array | None = None

    def __repr__(self) -> str:
        """Describes the policy in one line, without its weights."""
        width = getattr(self.params["b_in"], "size", "?") if "b_in" in self.params else "?"
        return f"EntryPolicy(width={width}, above={self.above:g}, temperature={self.temperature:g})"

    def observe(self, belief: Belief, t: Float[Array, "B N"], step: Step) -> Float[Array, "B N 13"]:
        """Returns the features of a step.

        Ids of tokens are exact in float32 below 2^24.
        """
        own = features(belief.top, t, step.rho)
        enters = (step.candidates & (t == 0)).astype(jnp.float32)
        return jnp.concatenate(
            [own, belief.top_tokens.astype(jnp.float32), enters[..., None]], axis=-1
        )

    def log_odds(self, s: Float[Array, "*B N 13"]) -> Float[Array, "*B N"]:
        """Returns the log-odds of the learned confidence at features s."""
        if s.ndim > 3:  # one step of a rollout at a time, since N x N numbers a row add up
            return jax.lax.map(jax.checkpoint(self.log_odds), s)
        if s.ndim < 3:
            return self.log_odds(s[None])[0]
        p, may_enter = self.params, s[..., -1] > 0
        odds = confidence_log_odds(s[..., 0])
        own = jnp.concatenate([s[..., :FEATURES], s[..., -1:], odds[..., None] / 4], axis=-1)
        h = jax.nn.silu(own @ p["w_in"] + p["b_in"][None, None, :])
        h = jnp.concatenate([h, self._attend(h, s, may_enter)], axis=-1)
        h = jax.nn.silu(h @ p["w_1"] + p["b_1"][None, None, :])
        return odds + (h @ p["w_out"])[..., 0] + p["b_out"].reshape(1, 1)

    def _attend(
        self, h: Float[Array, "B N d"], s: Float[Array, "B N 13"], may_enter: Bool[Array, "B N"]
    ) -> Float[Array, "B N d"]:
        """Attends to the other masks that may enter."""
        p, (b, n, d) = self.params, h.shape
        q, k, v = ((h @ p[name]).reshape(b, n, HEADS, d // HEADS) for name in ("w_q", "w_k", "w_v"))
        scores = jnp.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(d // HEADS)
        index = jnp.arange(n)
        away = jnp.clip(index[None, :] - index[:, None], -REACH, REACH) + REACH
        scores += p["distance"][:, away][None]
        scores += p["alike"][None, :, None, None] * likeness(s)[:, None]
        others = may_enter[:, None, :] & (index[None, :] != index[:, None])[None]
        scores = jnp.where(others[:, None], scores, -jnp.inf)
        # A score of its own for nothing, since a mask without a rival attends to none.
        sink = jnp.broadcast_to(p["sink"][None, :, None, None], (*scores.shape[:3], 1))
        weights = jax.nn.softmax(jnp.concatenate([scores, sink], axis=-1), axis=-1)[..., :-1]
        mixed = jnp.einsum("bhij,bjhd->bihd", weights, v).reshape(b, n, d)
        return mixed @ p["w_o"]

    def expected_step(self, s: Float[Array, "*B N 13"]) -> Float[Array, "*B N"]:
        """Returns the learned confidence in (0, 1)."""
        return jax.nn.sigmoid(self.log_odds(s))

    def step_of(self, y: Float[Array, "*B"]) -> Float[Array, "*B"]:
        """Returns a for y: an entry goes all the way."""
        return y

    def draw(self, keys: Key[Array, " B"], s: Float[Array, "B N 13"]) -> Bool[Array, "B N"]:
        """Draws the masks that enter.

        Args:
            keys: one random key per row.
            s: features.
        """
        y = jax.vmap(jax.random.bernoulli)(keys, jax.nn.sigmoid(self._draw_odds(s)))
        if self.imitate is None:
            return y
        return jnp.where(self.imitate < 1, s[..., 0] > self.imitate, y)

    def log_prob(self, s: Float[Array, "*B N 13"], y: Float[Array, "*B N"]) -> Float[Array, "*B N"]:
        """Returns the log-probability of y, 1 at an entry and 0 elsewhere."""
        z = self._draw_odds(s)
        return -jax.nn.softplus(jnp.where(y > 0, -z, z))

    def _draw_odds(self, s: Float[Array, "*B N 13"]) -> Float[Array, "*B N"]:
        """Returns the log-odds of drawing an entry."""
        return (self.log_odds(s) - math.log(self.above / (1 - self.above))) / self.temperature


def likeness(s: Float[Array, "B N 13"]) -> Float[Array, "B N N"]:
    """Computes the probability that two positions draw equal tokens.

    Only the four likeliest tokens of each count.

    Args:
        s: features.
    """
    p, tokens = s[..., :TOP], s[..., FEATURES : FEATURES + TOP]
    total = jnp.zeros((*s.shape[:2], s.shape[1]))
    for a in range(TOP):
        for b in range(TOP):
            equal = tokens[:, :, None, a] == tokens[:, None, :, b]
            total += jnp.where(equal, p[:, :, None, a] * p[:, None, :, b], 0.0)
    return total


def confidence_log_odds(c: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """Returns log(c / (1 - c)), limited to what float32 separates."""
    c = jnp.maximum(c, 1e-6)
    return jnp.clip(jnp.log(c) - jnp.log(jnp.maximum(1 - c, 1e-6)), -_LARGEST, _LARGEST)


def init_entry_policy(
    key: Key[Array, ""], width: int = 32, above: float = 0.9, temperature: float = 1.0
) -> EntryPolicy:
    """Creates a policy whose learned confidence is the confidence itself.

    Args:
        key: a random key for the hidden layers. The last layer is zero.
        width: d, neurons of a layer, a multiple of 4.
        above: as in EntryPolicy.
        temperature: as in EntryPolicy.
    """
    shapes = entry_shapes(width)
    keys = dict(zip(shapes, jax.random.split(key, len(shapes)), strict=True))
    params = {
        name: jax.random.normal(keys[name], shape) / math.sqrt(shape[0])
        if len(shape) == 2 and name not in ("distance", "w_out")
        else jnp.zeros(shape)
        for name, shape in shapes.items()
    }
    return EntryPolicy(params, above, temperature)


def entry_shapes(width: int) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the weights."""
    square = dict.fromkeys(("w_q", "w_k", "w_v", "w_o"), (width, width))
    return {
        "w_in": (FEATURES + 2, width),
        "b_in": (width,),
        **square,
        "distance": (HEADS, 2 * REACH + 1),
        "alike": (HEADS,),
        "sink": (HEADS,),
        "w_1": (2 * width, width),
        "b_1": (width,),
        "w_out": (width, 1),
        "b_out": (1,),
    }
