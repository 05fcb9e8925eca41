"""Temperature, top-k and top-p, applied before probabilities are read from logits."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from xflow_jax.types import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class Filters:
    """Tokens that a sampler may draw, and their distribution.

    Attributes:
        temperature: divisor of the logits, above 0.
        top_k: the likeliest tokens that stay, and others with the last one's logit. 0 keeps all.
        top_p: a token stays if all likelier ones together have at most this probability. 1 keeps
            all.
        top_p_first: probabilities of top_p count all tokens, not those of top_k alone.
        draws_only: probabilities are those of all tokens, and top_k and top_p restrict draws.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    top_p_first: bool = False
    draws_only: bool = False

    def apply(self, z: Float[Array, "B N v"], axis: str | None = None) -> Float[Array, "B N v"]:
        """Returns scaled logits, with -inf for the tokens that do not stay.

        Args:
            z: logits of all tokens, float32, -inf for those that are impossible.
            axis: mesh axis over which the vocabulary is sharded, or None.
        """
        z = z / self.temperature
        order, kept = _sortable(z), jnp.ones(z.shape, bool)
        if self.top_k:
            count = jnp.full(z.shape[:2], self.top_k - 1, jnp.float32)
            kept = order >= _lowest(order, jnp.ones_like(z), count, axis)[..., None]
        if self.top_p < 1:
            among = jnp.ones_like(kept) if self.top_p_first else kept
            largest = z.max(-1) if axis is None else jax.lax.pmax(z.max(-1), axis)
            mass = jnp.where(among, jnp.exp(z - largest[..., None]), 0.0)
            share = self.top_p * _total(mass, axis)
            kept &= order >= _lowest(order, mass, share, axis)[..., None]
        return jnp.where(kept, z, -jnp.inf)


def _total(x: Float[Array, "B N v"], axis: str | None) -> Float[Array, "B N"]:
    """Sums over the vocabulary, on all devices."""
    return x.sum(-1) if axis is None else jax.lax.psum(x.sum(-1), axis)


def _sortable(z: Float[Array, "*shape"]) -> Int[Array, "*shape"]:
    """Converts float32 numbers to integers of the same order."""
    bits = jax.lax.bitcast_convert_type(z.astype(jnp.float32), jnp.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _lowest(
    order: Int[Array, "B N v"],
    weights: Float[Array, "B N v"],
    most: Float[Array, "B N"],
    axis: str | None,
) -> Int[Array, "B N"]:
    """Finds the smallest number above which at most `most` weighs.

    A bisection over all 32 bits finds it exactly, without a sort of the vocabulary.
    """

    def halve(_: jax.Array, ends: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = ends
        middle = (low & high) + ((low ^ high) >> 1)  # of integers whose sum may overflow
        above = _total(jnp.where(order > middle[..., None], weights, 0.0), axis)
        fits = above <= most
        return jnp.where(fits, low, middle + 1), jnp.where(fits, middle, high)

    bounds = jnp.iinfo(jnp.int32)
    start = tuple(jnp.full(most.shape, end, jnp.int32) for end in (bounds.min, bounds.max))
    return jax.lax.fori_loop(0, 32, halve, (start[0], start[1]))[1]
