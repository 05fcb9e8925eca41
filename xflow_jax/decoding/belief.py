"""Belief at each position: token, confidence, top 4 and entropy.

One pass over chunks of the vocabulary keeps a running maximum, log-sum-exp, entropy and top 4, so
the logits of a large vocabulary are never in memory at once. With a mesh, each device covers its
own part of the vocabulary, and one gather of a dozen numbers per position joins the parts.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec as P

from xflow_jax.decoding.filters import Filters
from xflow_jax.decoding.topk import merge_top_k, top_k
from xflow_jax.models import Head, LogitsFn
from xflow_jax.parallel import BATCH, LOGICAL, MESH_AXES, divides, platform
from xflow_jax.types import Array, Bool, Float, Int, Key

TOP = 4  # largest probabilities that are kept, since the policy's features need four

# Largest number of vocabulary entries in a chunk, and of logits. In float32 these logits stay in
# the scratch memory of a TPU.
CHUNK, LOGITS = 16_384, 2**22
# A GPU copies each chunk of the head before its product. On an H200, one chunk for all of 126464
# entries took a third of the time at 32 positions, and three quarters at 4096.
LOGITS_GPU = 2**28
CHUNK_CPU, LOGITS_CPU = 4096, 2**20  # the same for the caches of a CPU


@struct.dataclass
class Belief:
    """Predictions of one forward pass.

    Attributes:
        tokens: the chosen tokens, int [B, N]. The argmax, unless tokens are sampled.
        confidence: probability of each chosen token, float32 [B, N].
        top: the four largest probabilities in descending order, float32 [B, N, 4].
        top_tokens: their tokens, int [B, N, 4]. Among equal probabilities the lowest id comes
            first. If fewer than four tokens are possible, the rest has probability 0 and any id.
        entropy: of the complete distribution in nats, float32 [B, N].
    """

    tokens: jax.Array
    confidence: jax.Array
    top: jax.Array
    top_tokens: jax.Array
    entropy: jax.Array


@dataclasses.dataclass(frozen=True)
class BeliefOptions:
    """Constraints, noise and guidance of a belief.

    The official decoders draw from exp(z) / (-log u)^T. The same distribution is the argmax of
    z + T g with Gumbel noise g, which does not overflow. They draw u in float64: in float32 it has
    23 bits, so g ends at 16 and rare tokens of a large vocabulary are never drawn. Such samples are
    colder than T and have a lower perplexity (arXiv:2409.02908). Here g comes from 46 bits (mode
    "high" of jax.random.gumbel), which avoids this in float32.

    Attributes:
        never: ids whose logits count as -inf.
        doubted: ids that can be chosen, but with confidence 0: their logits are -inf in the
            softmax.
        vocab_size: rows of the head from this one on count as -inf. None for no limit.
        temperature: T of the Gumbel noise, at least 0.
        guidance: w of classifier-free guidance, u + (w + 1)(c - u), at least 0.
        filters: distribution from which tokens, probabilities and entropies are read instead of
            the softmax of the logits. All logits of the pass then stand in memory.
    """

    never: tuple[int, ...] = ()
    doubted: tuple[int, ...] = ()
    vocab_size: int | None = None
    temperature: float = 0.0
    guidance: float = 0.0
    filters: Filters | None = None


def compute_belief(
    head: LogitsFn,
    hidden: Float[Array, "B N E"],
    rows: int,
    options: BeliefOptions = BeliefOptions(),
    keys: Key[Array, " B"] | None = None,
    unconditional: Float[Array, "B N E"] | None = None,
    chunk: int | None = None,
) -> Belief:
    """Computes the belief at each position.

    Neither chunks nor a mesh change it. Everything after the head is float32. Ties go to the lowest
    index, and only exact comparisons in one dtype keep them.

    Args:
        head: head(hidden, start, size) returns the logits [B, N, size] of the vocabulary entries
            from `start` on. A `Head` is sharded over the mesh, if one is set.
        hidden: hidden states.
        rows: V, rows of the head.
        options: constraints, noise and guidance.
        keys: one random key per sequence, needed for a temperature above 0.
        unconditional: hidden states of the pass without a prompt, for guidance.
        chunk: vocabulary entries of a chunk, or None for a size that suits the device.
    """
    with jax.named_scope("belief"):
        if isinstance(head, Head) and _is_sharded(head):
            return _compute_sharded(head, hidden, options, keys, unconditional, chunk)
        sums = _visit_vocabulary(head, hidden, rows, 0, options, keys, unconditional, chunk)
        return _to_belief(sums)


@struct.dataclass
class _Running:
    """Maxima and sums over the visited part of the vocabulary, [B, N].

    Attributes:
        best: largest logit with noise.
        best_logit: logit of the same token without noise.
        tokens: its id.
        top, top_tokens: the largest logits and their ids, [4, B, N].
        total: sum of e^(z - top[0]).
        weighted: sum of z e^(z - top[0]).
    """

    best: jax.Array
    best_logit: jax.Array
    tokens: jax.Array
    top: jax.Array
    top_tokens: jax.Array
    total: jax.Array
    weighted: jax.Array

    @classmethod
    def empty(cls, b: int, n: int) -> _Running:
        """Returns the state before the first chunk."""
        return cls(
            best=jnp.full((b, n), -jnp.inf),
            best_logit=jnp.full((b, n), -jnp.inf),
            tokens=jnp.zeros((b, n), jnp.int32),
            top=jnp.full((TOP, b, n), -jnp.inf),
            top_tokens=jnp.zeros((TOP, b, n), jnp.int32),
            total=jnp.zeros((b, n)),
            weighted=jnp.zeros((b, n)),
        )


def _visit_vocabulary(
    head: LogitsFn,
    hidden: Float[Array, "B N E"],
    rows: int,
    first: Int[Array, ""] | int,
    options: BeliefOptions,
    keys: Key[Array, " B"] | None,
    unconditional: Float[Array, "B N E"] | None,
    chunk: int | None,
    axis: str | None = None,
) -> _Running:
    """Visits all rows of the head, which begin at the id `first`.

    With an axis of the mesh they are this device's part of the vocabulary.
    """
    b, n = hidden.shape[:2]
    chunk = rows if options.filters is not None else chunk  # they need the whole distribution
    size = min(_chunk_size(b * n, rows) if chunk is None else chunk, rows)
    starts = jnp.arange(0, rows, size)

    def visit(state: _Running, start: jax.Array) -> tuple[_Running, None]:
        # The last chunk moves left to fit. Entries that it repeats are excluded.
        shifted = jnp.minimum(start, rows - size)
        local = shifted + jnp.arange(size)
        ids = first + local
        z = head(hidden, shifted, size)
        if unconditional is not None:
            free = head(unconditional, shifted, size).astype(jnp.float32)
            z = free + (options.guidance + 1) * (z.astype(jnp.float32) - free)
        possible = local >= start
        if options.vocab_size is not None:
            possible &= ids < options.vocab_size
        noisy, logits = _constrain(z, ids, possible, options, keys, axis)
        guided = unconditional is not None
        return _add_chunk(state, noisy, logits, first + shifted, guided), None

    nothing = _Running.empty(b, n)
    if starts.size == 1:
        return visit(nothing, starts[0])[0]
    return jax.lax.scan(visit, nothing, starts)[0]


def _chunk_size(positions: int, rows: int) -> int:
    """Returns the entries of a chunk.

    Chunks are equal and of whole lanes, so that little is repeated.
    """
    if platform() == "gpu":
        most = max(LOGITS_GPU // positions, 512)
    elif platform() != "cpu":
        most = min(CHUNK, max(LOGITS // positions, 512))
    elif positions * rows <= LOGITS:
        # A chunk of the head is copied for its product. Few positions do not repay the copy.
        most = rows
    else:
        most = min(CHUNK_CPU, max(LOGITS_CPU // positions, 512))
    return -(-rows // -(-rows // most) // 128) * 128


def _constrain(
    z: Float[Array, "B N v"],
    ids: Int[Array, " v"],
    possible: Bool[Array, " v"],
    options: BeliefOptions,
    keys: Key[Array, " B"] | None,
    axis: str | None,
) -> tuple[Float[Array, "B N v"], Float[Array, "B N v"]]:
    """Returns the logits with noise, and those of the softmax.

    Without options both are one array.
    """
    z = jnp.where(_exclude(ids, possible, options.never)[None, None, :], z, -jnp.inf)
    if options.temperature > 0 or options.doubted or options.filters:
        z = z.astype(jnp.float32)
    logits = noisy = z
    if options.filters is not None:
        noisy = options.filters.apply(z, axis)
        logits = z / options.filters.temperature if options.filters.draws_only else noisy
    if options.temperature > 0:
        assert keys is not None
        noise = jax.vmap(lambda key: _gumbel_noise(key, ids, z.shape[1]))(keys)
        noisy = noisy + options.temperature * noise
    if options.doubted:
        allowed = _exclude(ids, possible, options.doubted)
        logits = jnp.where(allowed[None, None, :], logits, -jnp.inf)
    return noisy, logits


def _exclude(
    ids: Int[Array, " v"], possible: Bool[Array, " v"], excluded: tuple[int, ...]
) -> Bool[Array, " v"]:
    """Returns True at possible entries that are not excluded."""
    for token in excluded:
        possible &= ids != token
    return possible


def _gumbel_noise(key: Key[Array, ""], ids: Int[Array, " v"], n: int) -> Float[Array, "n v"]:
    """Draws the noise of one sequence.

    The noise of an entry is the same in any chunk and on any device.
    """

    def draw(token: jax.Array) -> jax.Array:
        return jax.random.gumbel(jax.random.fold_in(key, token), (n,), mode="high")

    return jax.vmap(draw, out_axes=1)(ids)


def _add_chunk(
    state: _Running,
    noisy: Float[Array, "B N v"],
    logits: Float[Array, "B N v"],
    start: Int[Array, ""] | int,
    guided: bool,
) -> _Running:
    """Adds the entries from id `start` on.

    `noisy` and `logits` are float32, or one and the same array in the model's dtype.
    """
    # From plain logits: behind a softmax the compiler fuses the two, which is many times slower.
    chunk_top, chunk_tokens = top_k(logits, min(TOP, logits.shape[-1]), recomputable=guided)
    has_noise, logits = noisy is not logits, logits.astype(jnp.float32)
    # The earlier chunk comes first, so that among equal logits the lower id does.
    values = jnp.concatenate([state.top, chunk_top])
    top, ids = merge_top_k(values, jnp.concatenate([state.top_tokens, chunk_tokens + start]), TOP)
    shift = _finite_or_zero(top[0])
    total, weighted = _exponential_sums(logits, shift)
    rescale = jnp.exp(state.top[0] - shift)
    if has_noise:
        best, index = (x[0] for x in top_k(noisy, 1, recomputable=True))
        best_logit = jnp.take_along_axis(logits, index[..., None], axis=-1)[..., 0]
    else:
        best = best_logit = chunk_top[0]
        index = chunk_tokens[0]
    # Of equal logits the earlier chunk stays, and so the lower index.
    better = best > state.best
    return _Running(
        best=jnp.where(better, best, state.best),
        best_logit=jnp.where(better, best_logit, state.best_logit),
        tokens=jnp.where(better, index + start, state.tokens),
        top=top,
        top_tokens=ids,
        total=state.total * rescale + total,
        weighted=state.weighted * rescale + weighted,
    )


def _exponential_sums(
    z: Float[Array, "B N v"], shift: Float[Array, "B N"]
) -> tuple[Float[Array, "B N"], Float[Array, "B N"]]:
    """Computes the sums of w = e^(z - shift) and z w.

    z may be -inf.
    """
    weights = jnp.exp(z - shift[..., None])
    # With z clipped instead, XLA does not vectorise the loop on CPUs, and is several times slower.
    return weights.sum(-1), jnp.where(weights > 0, weights * z, 0.0).sum(-1)


def _finite_or_zero(largest: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Returns the largest logit, or 0 if no token is possible."""
    return jnp.where(jnp.isfinite(largest), largest, 0.0)


def _to_belief(state: _Running) -> Belief:
    """Normalises the sums over the complete vocabulary."""
    log_sum = state.top[0] + jnp.log(state.total)
    return Belief(
        tokens=state.tokens,
        confidence=jnp.exp(state.best_logit - log_sum),
        top=jnp.moveaxis(jnp.exp(state.top - log_sum[None]), 0, -1),
        top_tokens=jnp.moveaxis(state.top_tokens, 0, -1),
        entropy=jnp.maximum(log_sum - state.weighted / state.total, 0.0),
    )


def _mesh_axis(name: str) -> str:
    """Returns the mesh axis over which a logical axis is sharded."""
    axis = LOGICAL[name]
    assert axis is not None, name
    return axis


def _is_sharded(head: Head) -> bool:
    """Returns True if a mesh is set that shards the head."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not set(MESH_AXES) <= set(mesh.axis_names) or mesh.size == 1:
        return False
    width = head.table.shape[1 if head.tied else 0]
    sizes = {"vocab": head.rows, "embed": width}
    return all(divides(size, (_mesh_axis(name),)) for name, size in sizes.items())


def _compute_sharded(
    head: Head,
    hidden: Float[Array, "B N E"],
    options: BeliefOptions,
    keys: Key[Array, " B"] | None,
    unconditional: Float[Array, "B N E"] | None,
    chunk: int | None,
) -> Belief:
    """Computes the belief on the devices of a mesh.

    Each device covers its part of the vocabulary and of the batch. One gather joins the parts. If
    the table is sharded over E too (fsdp), each chunk of it is gathered.
    """
    mesh, vocab, embed = jax.sharding.get_abstract_mesh(), _mesh_axis("vocab"), _mesh_axis("embed")
    batch = P(BATCH) if divides(hidden.shape[0], BATCH) else P()
    table_spec = P(vocab, embed) if head.tied else P(embed, vocab)
    gather = embed if mesh.shape[embed] > 1 else None

    def local(
        table: jax.Array,
        bias: jax.Array | None,
        hidden: jax.Array,
        keys: jax.Array | None,
        unconditional: jax.Array | None,
    ) -> Belief:
        part = dataclasses.replace(head, table=table, bias=bias, gather=gather)
        first = jax.lax.axis_index(vocab) * part.rows
        mine = _visit_vocabulary(
            part, hidden, part.rows, first, options, keys, unconditional, chunk, vocab
        )
        return _to_belief(mine if mesh.shape[vocab] == 1 else _gather_parts(mine, vocab))

    specs = (table_spec, P(vocab), batch, batch, batch)
    sharded = jax.shard_map(local, in_specs=specs, out_specs=batch, check_vma=False)
    return sharded(head.table, head.bias, hidden, keys, unconditional)


def _gather_parts(mine: _Running, axis: str) -> _Running:
    """Merges the parts of an axis by one collective operation."""
    leaves, tree = jax.tree.flatten(mine)
    bits = [
        jax.lax.bitcast_convert_type(x, jnp.int32).reshape(-1, *mine.best.shape) for x in leaves
    ]
    gathered = jax.lax.all_gather(jnp.concatenate(bits), axis)
    cuts = [sum(len(x) for x in bits[: i + 1]) for i in range(len(bits) - 1)]
    parts = zip(jnp.split(gathered, cuts, axis=1), leaves, strict=True)
    found = [jax.lax.bitcast_convert_type(part, x.dtype).reshape(-1, *x.shape) for part, x in parts]
    return _merge_parts(jax.tree.unflatten(tree, found))


def _merge_parts(parts: _Running) -> _Running:
    """Merges states [parts, ...], in the order of the vocabulary."""
    values, ids = (x.reshape(-1, *x.shape[2:]) for x in (parts.top, parts.top_tokens))
    top, top_tokens = merge_top_k(values, ids, TOP)
    rescale = jnp.exp(parts.top[:, 0] - _finite_or_zero(top[0])[None])
    best = parts.best.max(axis=0)
    winner = jnp.argmax(parts.best == best[None], axis=0)[None]
    return _Running(
        best=best,
        best_logit=jnp.take_along_axis(parts.best_logit, winner, axis=0)[0],
        tokens=jnp.take_along_axis(parts.tokens, winner, axis=0)[0],
        top=top,
        top_tokens=top_tokens,
        total=jnp.sum(parts.total * rescale, axis=0),
        weighted=jnp.sum(parts.weighted * rescale, axis=0),
    )
