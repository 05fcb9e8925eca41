"""From hidden states to what a decoder believes: the likeliest token of each position and how sure the model is.

One pass over chunks of the vocabulary with a running maximum, log-sum-exp, entropy and top 4: the logits of a large
vocabulary never stand in memory as a whole. Everything after the matrix product is float32 (SPEC of the decoders: ties
go to the lowest index, which only exact comparisons in one dtype can keep).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

TOP = 4  # how many of the largest probabilities are kept: the policy's features need four
CHUNK = 16_384  # vocabulary entries at a time


@struct.dataclass
class Belief:
    """What one forward pass says of each response position.

    tokens int [B, N]: the chosen token (argmax, unless it was sampled). confidence float32 [B, N]: its probability.
    top float32 [B, N, 4]: the largest probabilities, descending. top_tokens int [B, N, 4]: whose they are, the lowest
    id first among equals; where fewer than four tokens are possible, the rest has probability 0 and its ids mean
    nothing. entropy float32 [B, N]: in nats, of all of p.
    """

    tokens: jax.Array
    confidence: jax.Array
    top: jax.Array
    top_tokens: jax.Array
    entropy: jax.Array


@dataclasses.dataclass(frozen=True)
class BeliefOptions:
    """What a decoder asks of the belief.

    never: ids whose logits count as -inf. doubted: ids that may be chosen, but whose logits are -inf in the softmax, so
    that choosing one has confidence 0. vocab_size: rows of the head from here on count as -inf (None = none do).
    temperature T: a token is chosen as argmax(z + T g), g Gumbel noise: the originals' exp(z) / (-log u)^T without its
    overflow. They draw u in float64, since in float32 it has 23 bits, g ends at 16, and of a large vocabulary the rare
    tokens are never drawn: samples are colder than asked, and better by perplexity (arXiv:2409.02908). Here g comes
    from 46 bits ("high"), which is as good. guidance: w of u + (w + 1)(c - u).
    """

    never: tuple[int, ...] = ()
    doubted: tuple[int, ...] = ()
    vocab_size: int | None = None
    temperature: float = 0.0
    guidance: float = 0.0


def believe(
    head: Callable[[jax.Array, int | jax.Array, int], jax.Array],
    hidden: jax.Array,
    rows: int,
    options: BeliefOptions = BeliefOptions(),
    keys: jax.Array | None = None,
    unconditional: jax.Array | None = None,
    chunk: int = CHUNK,
) -> Belief:
    """The belief at hidden states [B, N, E]; `rows` is the height of the head's table.

    head(hidden, start, size) gives the logits [B, N, size] of the vocabulary entries start ... start + size - 1.
    keys [B]: one random key per sequence, needed where the temperature is not 0. unconditional [B, N, E]: hidden states
    of the pass without a prompt, for guidance.
    """
    size = min(chunk, rows)
    starts = jnp.arange(0, rows, size)
    b, n = hidden.shape[:2]
    first = _Running(
        best=jnp.full((b, n), -jnp.inf),
        best_logit=jnp.full((b, n), -jnp.inf),
        tokens=jnp.zeros((b, n), jnp.int32),
        top=jnp.full((b, n, TOP), -jnp.inf),
        top_tokens=jnp.zeros((b, n, TOP), jnp.int32),
        total=jnp.zeros((b, n)),
        weighted=jnp.zeros((b, n)),
    )

    def logits_of(h: jax.Array, start: jax.Array) -> jax.Array:
        return head(h, start, size).astype(jnp.float32)

    def visit(state: _Running, start: jax.Array) -> tuple[_Running, None]:
        # The last chunk is moved left to fit; what it sees twice counts once.
        shifted = jnp.minimum(start, rows - size)
        ids = shifted + jnp.arange(size)
        logits = logits_of(hidden, shifted)
        if unconditional is not None:
            free = logits_of(unconditional, shifted)
            logits = free + (options.guidance + 1) * (logits - free)
        possible = ids >= start
        if options.vocab_size is not None:
            possible &= ids < options.vocab_size
        logits = jnp.where(_without(ids, possible, options.never)[None, None, :], logits, -jnp.inf)
        noisy = logits
        if options.temperature > 0:
            noise = jax.vmap(lambda key: jax.random.gumbel(jax.random.fold_in(key, start), (n, size), mode="high"))
            noisy = logits + options.temperature * noise(keys)
        if options.doubted:
            logits = jnp.where(_without(ids, possible, options.doubted)[None, None, :], logits, -jnp.inf)
        return _merge(state, noisy, logits, shifted), None

    if starts.size == 1:
        state, _ = visit(first, starts[0])
    else:
        state, _ = jax.lax.scan(visit, first, starts)
    largest = state.top[..., 0]
    log_sum = largest + jnp.log(state.total)
    return Belief(
        tokens=state.tokens,
        confidence=jnp.exp(state.best_logit - log_sum),
        top=jnp.exp(state.top - log_sum[..., None]),
        top_tokens=state.top_tokens,
        entropy=jnp.maximum(log_sum - state.weighted / state.total, 0.0),
    )


@struct.dataclass
class _Running:
    """What is known after some chunks; `total` and `weighted` are sums of e^(z - top[0]) and of z e^(z - top[0])."""

    best: jax.Array
    best_logit: jax.Array
    tokens: jax.Array
    top: jax.Array
    top_tokens: jax.Array
    total: jax.Array
    weighted: jax.Array


def _without(ids: jax.Array, possible: jax.Array, banned: tuple[int, ...]) -> jax.Array:
    for token in banned:
        possible &= ids != token
    return possible


def _merge(state: _Running, noisy: jax.Array, logits: jax.Array, start: jax.Array) -> _Running:
    # Taken of plain logits: behind a softmax the compiler would fuse the two and be many times slower.
    chunk_top, chunk_tokens = _largest(logits, min(TOP, logits.shape[-1]))
    # The earlier chunk stands first, so that among equals the lower id does.
    top, place = _largest(jnp.concatenate([state.top, chunk_top], axis=-1), TOP)
    ids = jnp.concatenate([state.top_tokens, chunk_tokens + start], axis=-1)
    largest = top[..., 0]
    finite = jnp.where(jnp.isfinite(largest), largest, 0.0)
    weights = jnp.exp(logits - finite[..., None])
    rescale = jnp.exp(state.top[..., 0] - finite)
    best = noisy.max(axis=-1)
    index = _first(noisy, best)
    best_logit = jnp.take_along_axis(logits, index[..., None], axis=-1)[..., 0]
    better = best > state.best  # strictly: of equals the earlier chunk, hence the lower index, stays
    return _Running(
        best=jnp.where(better, best, state.best),
        best_logit=jnp.where(better, best_logit, state.best_logit),
        tokens=jnp.where(better, index + start, state.tokens),
        top=top,
        top_tokens=jnp.take_along_axis(ids, place, axis=-1),
        total=state.total * rescale + weights.sum(-1),
        weighted=state.weighted * rescale + jnp.where(weights > 0, weights * logits, 0.0).sum(-1),
    )


def _first(z: jax.Array, value: jax.Array) -> jax.Array:
    """The lowest index int32 [...] at which z [..., V] is `value` [...]; V - 1 where it is nowhere.

    With value = max(z) this is argmax in two plain reductions, which XLA vectorises on CPUs; an argmax it does not.
    """
    size = z.shape[-1]
    ids = jax.lax.broadcasted_iota(jnp.int32, z.shape, z.ndim - 1)
    return jnp.where(z == value[..., None], ids, size - 1).min(axis=-1)


def _largest(z: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The k largest of z [..., V], descending, and their indices, [..., k] each; of equal ones the lowest index first,
    and each counts."""

    def in_rounds(z: jax.Array) -> tuple[jax.Array, jax.Array]:
        ids, found, places = jax.lax.broadcasted_iota(jnp.int32, z.shape, z.ndim - 1), [], []
        for _ in range(k):
            found.append(z.max(axis=-1))
            places.append(_first(z, found[-1]))
            z = jnp.where(ids == places[-1][..., None], -jnp.inf, z)
        return jnp.stack(found, axis=-1), jnp.stack(places, axis=-1)

    # top_k on a CPU sorts, in one thread, and would take a third as long as the tiny model itself.
    return jax.lax.platform_dependent(z, cpu=in_rounds, default=lambda z: tuple(jax.lax.top_k(z, k)))


def model_head(model: Any, params: Any) -> Callable[[jax.Array, int | jax.Array, int], jax.Array]:
    """The `head` that `believe` wants, of a model with its parameters; products accumulate in float32."""
    table = params["ff_out"]["kernel"] if "ff_out" in params else None
    bias = params["ff_out"].get("bias") if table is not None else None

    def head(hidden: jax.Array, start: int | jax.Array, size: int) -> jax.Array:
        dtype = hidden.dtype
        if table is None:
            part = jax.lax.dynamic_slice_in_dim(params["wte"]["embedding"], start, size, axis=0).T
        elif size == table.shape[1]:
            part = table
        else:
            part = jax.lax.dynamic_slice_in_dim(table, start, size, axis=1)
        logits = jnp.einsum("bne,ev->bnv", hidden, part.astype(dtype), preferred_element_type=jnp.float32)
        # The originals' logits come out in the model's dtype; rounding to it keeps their ties.
        logits = logits.astype(dtype)
        if bias is not None:
            logits += jax.lax.dynamic_slice_in_dim(bias, start, size).astype(dtype)[None, None, :]
        return logits

    return head
