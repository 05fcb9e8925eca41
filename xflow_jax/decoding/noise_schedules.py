"""Noise schedules of Gaussian diffusion in embedding space.

A noise level is gamma = log(sigma^2 / alpha^2), the logarithm of the noise-to-signal ratio. The
input of a token with embedding e is alpha e + sigma noise, with alpha^2 = sigmoid(-gamma) and
sigma^2 = sigmoid(gamma). A schedule maps u, the share of the way from clean to noise, to gamma.
Training draws u evenly, and sampling takes equal steps of u from 1 to 0.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import TypeAlias

import jax
import jax.numpy as jnp

from xflow_jax.types import Array, Float

if sys.version_info >= (3, 12):
    from typing import Protocol, runtime_checkable
else:  # as in types.py
    from typing_extensions import Protocol, runtime_checkable

Fit: TypeAlias = dict[str, jax.Array]  # the numbers of a schedule that training fits

CUTOFF = 1e-5  # u stays so far from 0 and 1, where gamma is infinite


@runtime_checkable
class NoiseSchedule(Protocol):
    """A noise schedule, as functions of its fitted numbers.

    `init()` returns the numbers before training, `gamma(fit, u)` the noise levels, increasing in u.
    `expected_loss(fit, gamma)` is the loss of a position by the fit, in nats. Training moves it
    toward the loss of the model.
    """

    def init(self) -> Fit: ...
    def gamma(self, fit: Fit, u: Float[Array, "*u"]) -> Float[Array, "*u"]: ...
    def expected_loss(self, fit: Fit, gamma: Float[Array, "*g"]) -> Float[Array, "*g"]: ...


@dataclasses.dataclass(frozen=True)
class GumbelSchedule:
    """Schedule of LangFlow (arXiv:2604.11748): gamma has a Gumbel distribution.

    The loss over gamma has about the shape of the distribution function of a Gumbel variable. With
    that distribution, equal steps of u change the loss equally. Location, width and height are
    fitted to the losses of the training. Bounds keep levels useful if the fit fails, which happens
    when a model has no loss left.

    Attributes:
        loc: location before training.
        width: width before training, positive.
        height: loss of a position under pure noise before training, in nats.
        low, high: smallest and largest gamma.
    """

    loc: float = 3.5
    width: float = 1.0
    height: float = 3.0
    low: float = -4.0
    high: float = 14.0

    def init(self) -> Fit:
        """Returns location, and the logarithms of width and height."""
        return {
            "loc": jnp.float32(self.loc),
            "log_width": jnp.log(jnp.float32(self.width)),
            "log_height": jnp.log(jnp.float32(self.height)),
        }

    def gamma(self, fit: Fit, u: Float[Array, "*u"]) -> Float[Array, "*u"]:
        """Computes the quantiles of the Gumbel distribution, within the bounds."""
        u = jnp.clip(u, CUTOFF, 1 - CUTOFF)
        gamma = fit["loc"] - jnp.exp(fit["log_width"]) * jnp.log(-jnp.log(u))
        return jnp.clip(gamma, self.low, self.high)

    def expected_loss(self, fit: Fit, gamma: Float[Array, "*g"]) -> Float[Array, "*g"]:
        """Computes the height times the distribution function."""
        place = (gamma - fit["loc"]) / jnp.exp(fit["log_width"])
        return jnp.exp(fit["log_height"] - jnp.exp(-place))


@dataclasses.dataclass(frozen=True)
class PlaidSchedule:
    """Monotone schedule without a given shape, in the place of Plaid's (arXiv:2305.18619).

    Plaid learns gamma by a monotone network, so that its bound has the least variance: all u then
    have an equal part of the bound. Here gamma is linear between knots. The curve of the loss over
    gamma is fitted, and its inverse is the schedule, as in the time warping of CDCD
    (arXiv:2211.15089).

    Attributes:
        low, high: smallest and largest gamma.
        pieces: number of linear pieces.
        height: loss of a position under pure noise before training, in nats.
    """

    low: float = -4.0
    high: float = 12.0
    pieces: int = 32
    height: float = 3.0

    def init(self) -> Fit:
        """Returns equal logits of the pieces, and log(height)."""
        return {
            "rises": jnp.zeros(self.pieces, jnp.float32),
            "log_height": jnp.log(jnp.float32(self.height)),
        }

    def gamma(self, fit: Fit, u: Float[Array, "*u"]) -> Float[Array, "*u"]:
        """Inverts the curve."""
        return jnp.interp(u, _curve(fit), self._knots())

    def expected_loss(self, fit: Fit, gamma: Float[Array, "*g"]) -> Float[Array, "*g"]:
        """Computes the height times the curve."""
        return jnp.exp(fit["log_height"]) * jnp.interp(gamma, self._knots(), _curve(fit))

    def _knots(self) -> Float[Array, " K"]:
        return jnp.linspace(self.low, self.high, self.pieces + 1)


def _curve(fit: Fit) -> Float[Array, " K"]:
    """Returns the values at the knots, from 0 to 1."""
    rises = jnp.cumsum(jax.nn.softmax(fit["rises"]))
    return jnp.concatenate([jnp.zeros(1), rises / rises[-1]])


@dataclasses.dataclass(frozen=True)
class SqrtSchedule:
    """Fixed schedule of Diffusion-LM and DiffuSeq.

    It is alpha^2 = 1 - sqrt(u + shift) (arXiv:2205.14217, arXiv:2210.08933).

    Attributes:
        shift: share of noise, squared, at u = 0.
        least_signal: smallest alpha^2, at u = 1.
    """

    shift: float = 1e-4
    least_signal: float = 1e-4

    def init(self) -> Fit:
        """Returns nothing, since nothing is fitted."""
        return {}

    def gamma(self, fit: Fit, u: Float[Array, "*u"]) -> Float[Array, "*u"]:
        """Computes log((1 - alpha^2) / alpha^2)."""
        signal = jnp.maximum(1 - jnp.sqrt(jnp.clip(u, 0, 1) + self.shift), self.least_signal)
        return jnp.log1p(-signal) - jnp.log(signal)

    def expected_loss(self, fit: Fit, gamma: Float[Array, "*g"]) -> Float[Array, "*g"]:
        """Returns zeros, which no number changes."""
        return jnp.zeros_like(gamma)


NOISE_SCHEDULES: dict[str, NoiseSchedule] = {
    "gumbel": GumbelSchedule(),
    "plaid": PlaidSchedule(),
    "sqrt": SqrtSchedule(),
}
