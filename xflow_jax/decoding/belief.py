"""From hidden states to what a decoder believes: the likeliest token of each position and how sure the model is.

One pass over chunks of the vocabulary with a running maximum, log-sum-exp, entropy and top 4: the logits of a large
vocabulary never stand in memory as a whole. Where a mesh is set, each device does so for its own part of the
vocabulary, and what all of them found, a dozen numbers per position, is gathered at once. Everything after the matrix
product is float32 (SPEC of the decoders: ties go to the lowest index, which only exact comparisons in one dtype keep).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec as P

from xflow_jax.decoding.topk import merge_top_k, top_k
from xflow_jax.models import Head, LogitsFn
from xflow_jax.parallel import BATCH, LOGICAL, MESH_AXES, divides, platform

TOP = 4  # how many of the largest probabilities are kept: the policy's features need four


CHUNK = 16_384  # vocabulary entries at a time, at most


LOGITS = 2**22  # logits at a time: in float32 they stay in an accelerator's scratch memory


CHUNK_CPU, LOGITS_CPU = 4096, 2**20  # the same in the caches of a CPU


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


def compute_belief(
    head: LogitsFn,
    hidden: jax.Array,
    rows: int,
    options: BeliefOptions = BeliefOptions(),
    keys: jax.Array | None = None,
    unconditional: jax.Array | None = None,
    chunk: int | None = None,
) -> Belief:
    """The belief at hidden states [B, N, E]; `rows` is the height of the head's table.

    head(hidden, start, size) gives the logits [B, N, size] of the vocabulary entries start ... start + size - 1; a
    `Head` is spread over the mesh that is set. keys [B]: one random key per sequence, needed where the temperature is
    not 0. unconditional [B, N, E]: hidden states of the pass without a prompt, for guidance. chunk: vocabulary entries
    at a time (None: as many as memory close to the processor can hold). Neither chunks nor a mesh change a draw.
    """
    with jax.named_scope("belief"):
        if isinstance(head, Head) and _is_sharded(head):
            return _over_mesh(head, hidden, options, keys, unconditional, chunk)
        return _finish(_run(head, hidden, rows, 0, options, keys, unconditional, chunk))


@struct.dataclass
class _Running:
    """What is known after some chunks, [B, N], and top, top_tokens [4, B, N]; `total` and `weighted` are sums of
    e^(z - top[0]) and of z e^(z - top[0])."""

    best: jax.Array
    best_logit: jax.Array
    tokens: jax.Array
    top: jax.Array
    top_tokens: jax.Array
    total: jax.Array
    weighted: jax.Array


def _run(
    head: LogitsFn,
    hidden: jax.Array,
    rows: int,
    first: int | jax.Array,
    options: BeliefOptions,
    keys: jax.Array | None,
    unconditional: jax.Array | None,
    chunk: int | None,
) -> _Running:
    """Visits the entries first ... first + rows - 1, which are the head's 0 ... rows - 1."""
    b, n = hidden.shape[:2]
    size = min(_chunk(b * n, rows) if chunk is None else chunk, rows)
    starts = jnp.arange(0, rows, size)
    nothing = _Running(
        best=jnp.full((b, n), -jnp.inf),
        best_logit=jnp.full((b, n), -jnp.inf),
        tokens=jnp.zeros((b, n), jnp.int32),
        top=jnp.full((TOP, b, n), -jnp.inf),
        top_tokens=jnp.zeros((TOP, b, n), jnp.int32),
        total=jnp.zeros((b, n)),
        weighted=jnp.zeros((b, n)),
    )

    def visit(state: _Running, start: jax.Array) -> tuple[_Running, None]:
        # The last chunk is moved left to fit; what it sees twice counts once.
        shifted = jnp.minimum(start, rows - size)
        local = shifted + jnp.arange(size)
        ids = first + local
        raw = head(hidden, shifted, size)
        if unconditional is not None:
            free = head(unconditional, shifted, size).astype(jnp.float32)
            raw = free + (options.guidance + 1) * (raw.astype(jnp.float32) - free)
        possible = local >= start
        if options.vocab_size is not None:
            possible &= ids < options.vocab_size
        raw = jnp.where(_without(ids, possible, options.never)[None, None, :], raw, -jnp.inf)
        if options.temperature > 0 or options.doubted:
            raw = raw.astype(jnp.float32)
        logits = noisy = raw
        if options.temperature > 0:
            noisy = logits + options.temperature * jax.vmap(_noise, (0, None, None))(keys, ids, n)
        if options.doubted:
            logits = jnp.where(
                _without(ids, possible, options.doubted)[None, None, :], logits, -jnp.inf
            )
        return _merge(state, noisy, logits, first + shifted, guided=unconditional is not None), None

    if starts.size == 1:
        return visit(nothing, starts[0])[0]
    return jax.lax.scan(visit, nothing, starts)[0]


def _chunk(positions: int, rows: int) -> int:
    """Entries per chunk for so many positions: equal chunks, so that little is seen twice, of whole lanes."""
    if platform() != "cpu":
        most = min(CHUNK, max(LOGITS // positions, 512))
    elif positions * rows <= LOGITS:
        most = rows  # a chunk of the head would be copied for its product, and few positions do not repay that
    else:
        most = min(CHUNK_CPU, max(LOGITS_CPU // positions, 512))
    return -(-rows // -(-rows // most) // 128) * 128


def _noise(key: jax.Array, ids: jax.Array, n: int) -> jax.Array:
    """Gumbel noise [n, V'] of one sequence: an entry's own, whatever chunk or device it is computed in."""
    draw = jax.vmap(
        lambda token: jax.random.gumbel(jax.random.fold_in(key, token), (n,), mode="high"),
        out_axes=1,
    )
    return draw(ids)


def _finish(state: _Running) -> Belief:
    log_sum = state.top[0] + jnp.log(state.total)
    return Belief(
        tokens=state.tokens,
        confidence=jnp.exp(state.best_logit - log_sum),
        top=jnp.moveaxis(jnp.exp(state.top - log_sum[None]), 0, -1),
        top_tokens=jnp.moveaxis(state.top_tokens, 0, -1),
        entropy=jnp.maximum(log_sum - state.weighted / state.total, 0.0),
    )


def _is_sharded(head: Head) -> bool:
    """Whether there is a mesh set, of several devices, whose axes divide the table's."""
    mesh, axes = jax.sharding.get_abstract_mesh(), (LOGICAL["vocab"], LOGICAL["embed"])
    if mesh.empty or not set(MESH_AXES) <= set(mesh.axis_names) or mesh.size == 1:
        return False
    width = head.table.shape[1 if head.tied else 0]
    return all(divides(size, (axis,)) for size, axis in zip((head.rows, width), axes, strict=True))


def _over_mesh(
    head: Head,
    hidden: jax.Array,
    options: BeliefOptions,
    keys: jax.Array | None,
    unconditional: jax.Array | None,
    chunk: int | None,
) -> Belief:
    """`_run` on each device for its part of the vocabulary and of the batch, and one gather of what they found.

    Where the table's dimension E is spread, too (fsdp), it is gathered for a chunk at a time.
    """
    mesh, vocab, embed = jax.sharding.get_abstract_mesh(), LOGICAL["vocab"], LOGICAL["embed"]
    batch = P(BATCH) if divides(hidden.shape[0], BATCH) else P()
    table = P(vocab, embed) if head.tied else P(embed, vocab)
    head = head.replace(gather=embed if mesh.shape[embed] > 1 else None)

    def local(head: Head, hidden: jax.Array, keys: Any, unconditional: Any) -> Belief:
        first = jax.lax.axis_index(vocab) * head.rows
        mine = _run(head, hidden, head.rows, first, options, keys, unconditional, chunk)
        return _finish(mine if mesh.shape[vocab] == 1 else _gather(mine, vocab))

    specs = (
        head.replace(table=table, bias=None if head.bias is None else P(vocab)),
        batch,
        batch,
        batch,
    )
    spread = jax.shard_map(local, in_specs=specs, out_specs=batch, check_vma=False)
    return spread(head, hidden, keys, unconditional)


def _gather(mine: _Running, axis: str) -> _Running:
    """What the devices of an axis found, each in its part of the vocabulary, in one collective operation."""
    leaves, tree = jax.tree.flatten(mine)
    bits = [
        jax.lax.bitcast_convert_type(x, jnp.int32).reshape(-1, *mine.best.shape) for x in leaves
    ]
    every = jax.lax.all_gather(jnp.concatenate(bits), axis)
    cuts = [sum(len(x) for x in bits[: i + 1]) for i in range(len(bits) - 1)]
    parts = zip(jnp.split(every, cuts, axis=1), leaves, strict=True)
    found = [jax.lax.bitcast_convert_type(part, x.dtype).reshape(-1, *x.shape) for part, x in parts]
    return _combine(jax.tree.unflatten(tree, found))


def _combine(parts: _Running) -> _Running:
    """The state after all parts of the vocabulary from theirs, [parts, ...] in the vocabulary's order."""
    top, ids = merge_top_k(
        *(x.reshape(-1, *x.shape[2:]) for x in (parts.top, parts.top_tokens)), TOP
    )
    rescale = jnp.exp(parts.top[:, 0] - _finite(top[0])[None])
    best = parts.best.max(axis=0)
    winner = jnp.argmax(parts.best == best[None], axis=0)[None]
    return _Running(
        best=best,
        best_logit=jnp.take_along_axis(parts.best_logit, winner, axis=0)[0],
        tokens=jnp.take_along_axis(parts.tokens, winner, axis=0)[0],
        top=top,
        top_tokens=ids,
        total=jnp.sum(parts.total * rescale, axis=0),
        weighted=jnp.sum(parts.weighted * rescale, axis=0),
    )


def _without(ids: jax.Array, possible: jax.Array, banned: tuple[int, ...]) -> jax.Array:
    for token in banned:
        possible &= ids != token
    return possible


def _merge(
    state: _Running, noisy: jax.Array, logits: jax.Array, start: int | jax.Array, guided: bool
) -> _Running:
    """The state after a chunk; logits and noisy float32, or the same array in the model's dtype."""
    # Taken of plain logits: behind a softmax the compiler would fuse the two and be many times slower.
    chunk_top, chunk_tokens = top_k(logits, min(TOP, logits.shape[-1]), rounded=guided)
    plain, logits = noisy is logits, logits.astype(jnp.float32)
    # The earlier chunk stands first, so that among equals the lower id does.
    both = ((state.top, chunk_top), (state.top_tokens, chunk_tokens + start))
    top, ids = merge_top_k(*map(jnp.concatenate, both), TOP)
    finite = _finite(top[0])
    total, weighted = _sums(logits, finite)
    rescale = jnp.exp(state.top[0] - finite)
    if plain:
        best = best_logit = chunk_top[0]
        index = chunk_tokens[0]
    else:
        best, index = (x[0] for x in top_k(noisy, 1, rounded=True))
        best_logit = jnp.take_along_axis(logits, index[..., None], axis=-1)[..., 0]
    better = (
        best > state.best
    )  # strictly: of equals the earlier chunk, hence the lower index, stays
    return _Running(
        best=jnp.where(better, best, state.best),
        best_logit=jnp.where(better, best_logit, state.best_logit),
        tokens=jnp.where(better, index + start, state.tokens),
        top=top,
        top_tokens=ids,
        total=state.total * rescale + total,
        weighted=state.weighted * rescale + weighted,
    )


def _sums(z: jax.Array, shift: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sums of e^(z - shift) and of z e^(z - shift) over z [..., V], shift [...]; z may be -inf."""
    weights = jnp.exp(z - shift[..., None])
    # With z clipped instead, XLA does not vectorise the loop on CPUs, which then takes several times as long.
    return weights.sum(-1), jnp.where(weights > 0, weights * z, 0.0).sum(-1)


def _finite(largest: jax.Array) -> jax.Array:
    """What is subtracted before exponentials: 0 where nothing is possible."""
    return jnp.where(jnp.isfinite(largest), largest, 0.0)
