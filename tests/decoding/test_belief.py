"""The chunked belief against a softmax over the whole vocabulary."""

from __future__ import annotations

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xflow_jax.decoding.belief import TOP, BeliefOptions, _chunk_size, compute_belief
from xflow_jax.models.lm_head import Head, make_head
from xflow_jax.models.logical_axes import shardings
from xflow_jax.parallel.mesh import make_mesh
from xflow_jax.parallel.partitioning import batch_sharding

B, N, E, V = 2, 5, 8, 64
PLAIN = BeliefOptions()


@functools.partial(jax.jit, static_argnames=("options", "chunk"))
def run(logits, options=PLAIN, chunk=16_384, keys=None, free=None):
    """Computes the belief of logits [B, N, V], which serve as hidden states."""

    def head(hidden, start, size):
        return jax.lax.dynamic_slice_in_dim(hidden, start, size, axis=-1)

    return compute_belief(head, logits, logits.shape[-1], options, keys, free, chunk)


def reference(logits, options=PLAIN, free=None):
    """Computes (tokens, confidence, top, top_tokens, entropy) in float64 from the definitions."""
    z = np.asarray(logits, np.float64)
    if free is not None:
        free = np.asarray(free, np.float64)
        z = free + (options.guidance + 1) * (z - free)
    z = z.copy()
    z[..., list(options.never)] = -np.inf
    if options.vocab_size is not None:
        z[..., options.vocab_size :] = -np.inf
    tokens = z.argmax(-1)
    z[..., list(options.doubted)] = -np.inf
    p = np.exp(z - z.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    entropy = -np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0).sum(-1)
    confidence = np.take_along_axis(p, tokens[..., None], -1)[..., 0]
    order = np.argsort(-z, axis=-1, kind="stable")[..., :TOP]
    return tokens, confidence, np.take_along_axis(p, order, -1), order, entropy


def assert_equals(ours, wanted):
    tokens, confidence, top, top_tokens, entropy = wanted
    np.testing.assert_array_equal(ours.tokens, tokens)
    np.testing.assert_allclose(ours.confidence, confidence, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(ours.top, top, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(
        np.where(top > 0, ours.top_tokens, -1), np.where(top > 0, top_tokens, -1)
    )
    np.testing.assert_allclose(ours.entropy, entropy, rtol=1e-4, atol=1e-5)


OPTIONS = {
    "plain": PLAIN,
    "suppressed": BeliefOptions(never=(3, 17, 63), vocab_size=50),
    "a whole chunk suppressed": BeliefOptions(never=tuple(range(7))),
    "all but two suppressed": BeliefOptions(never=tuple(range(2, V))),
    "doubted": BeliefOptions(doubted=(0, 21, 40)),
    "everything": BeliefOptions(never=(1, 2), doubted=(5, 9), vocab_size=60),
    "guided": BeliefOptions(guidance=1.5, never=(4,)),
}


@pytest.mark.parametrize("chunk", [7, 16, 63, 64, 1000])
@pytest.mark.parametrize("name", list(OPTIONS))
def test_chunks_equal_the_plain_softmax(name, chunk):
    options = OPTIONS[name]
    logits, free = np.random.default_rng(0).normal(size=(2, B, N, V)).astype(np.float32) * 4
    logits[0, 0, 40] = 30  # a doubted token that wins
    free = free if options.guidance else None
    assert_equals(run(logits, options, chunk, free=free), reference(logits, options, free))


def test_a_doubted_token_wins_with_confidence_0():
    logits = np.zeros((1, 1, V), np.float32)
    logits[..., 9] = 5
    belief = run(logits, BeliefOptions(doubted=(9,)), 7)
    assert belief.tokens[0, 0] == 9 and belief.confidence[0, 0] == 0
    np.testing.assert_allclose(belief.top[0, 0], 1 / (V - 1), rtol=1e-6)


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_ties_go_to_the_lowest_index(chunk):
    logits = np.zeros((1, 3, V), np.float32)
    logits[0, 0, [12, 13, 50]] = 2.0  # inside a chunk and across chunks
    logits[0, 1, [62, 63]] = 1.0  # in the last, moved chunk
    belief = run(logits, chunk=chunk)
    np.testing.assert_array_equal(belief.tokens[0], [12, 62, 0])
    # Equal logits count separately.
    assert_equals(belief, reference(logits))
    assert belief.top[0, 0, 0] == belief.top[0, 0, 2] > belief.top[0, 0, 3]
    np.testing.assert_array_equal(
        belief.top_tokens[0], [[12, 13, 50, 0], [62, 63, 0, 1], [0, 1, 2, 3]]
    )


@pytest.mark.parametrize("size", [2, 3, 5])
def test_vocabularies_of_fewer_than_four_tokens(size):
    logits = np.random.default_rng(1).normal(size=(1, 4, size)).astype(np.float32)
    tokens, confidence, *top, entropy = reference(logits)
    top = [np.pad(x, ((0, 0), (0, 0), (0, max(TOP - size, 0)))) for x in top]
    assert_equals(run(logits), (tokens, confidence, *top, entropy))


@pytest.mark.parametrize("shift", [-90.0, 0.0, 300.0])
def test_extreme_logits_stay_finite(shift):
    logits = np.array([[[0.0, -200.0, 100.0, 99.0] + [-300.0] * 12]], np.float32) + np.float32(
        shift
    )
    belief = run(logits, chunk=5)
    assert_equals(belief, reference(logits))
    certain = run(np.where(np.arange(16) == 3, 0.0, -1e30).astype(np.float32)[None, None], chunk=5)
    assert certain.confidence[0, 0] == 1 and certain.entropy[0, 0] == 0
    uniform = run(np.full((1, 1, 16), shift, np.float32), chunk=5)
    np.testing.assert_allclose(uniform.entropy, math.log(16), rtol=1e-5)


@pytest.mark.parametrize("chunk", [4, 16])
def test_temperature_draws_from_the_tempered_softmax(chunk):
    """With Gumbel noise g, argmax(z + T g) follows softmax(z / T). The confidence has no noise."""
    many, temperature = 20_000, 0.7
    z = np.array([1.0, 0.2, -0.5, 0.0, 0.9, -2.0, 0.4, 5.0, -1.0], np.float32)
    logits = np.broadcast_to(z, (1, many, z.size))
    options = BeliefOptions(never=(7,), temperature=temperature)
    belief = run(logits, options, chunk, keys=jax.random.split(jax.random.key(0), 1))
    z[7] = -np.inf
    share = np.exp(z / temperature) / np.exp(z / temperature).sum()
    counts = np.bincount(belief.tokens[0], minlength=z.size)
    assert counts[7] == 0
    assert (np.abs(counts - many * share) < 5 * np.sqrt(many * share * (1 - share)) + 1e-9).all()
    p = np.exp(z) / np.exp(z).sum()
    np.testing.assert_allclose(belief.confidence[0], p[np.asarray(belief.tokens[0])], rtol=1e-5)
    np.testing.assert_allclose(belief.top[0, 0], -np.sort(-p)[:TOP], rtol=1e-5)


def test_the_draws_of_a_row_depend_on_its_key_alone():
    logits = np.random.default_rng(0).normal(size=(3, N, V)).astype(np.float32)
    options, keys = BeliefOptions(temperature=1.0), jax.random.split(jax.random.key(4), 3)
    together = run(logits, options, keys=keys)
    for row in range(3):
        alone = run(logits[row : row + 1], options, keys=keys[row : row + 1])
        np.testing.assert_array_equal(alone.tokens[0], together.tokens[row])
    other = run(logits, options, keys=jax.random.split(jax.random.key(5), 3))
    assert (np.asarray(other.tokens) != np.asarray(together.tokens)).any()


def test_logits_of_the_whole_vocabulary_are_never_in_memory():
    rows, chunk = 32_768, 512
    params = {"wte": {"embedding": jnp.zeros((rows, E))}}
    hidden = jax.ShapeDtypeStruct((B, 64, E), jnp.float32)
    options = BeliefOptions(never=(1,), doubted=(2,), temperature=1.0, guidance=1.0)

    def everything(params, hidden, free, keys):
        return compute_belief(make_head(params), hidden, rows, options, keys, free, chunk)

    args = (params, hidden, hidden, jax.random.split(jax.random.key(0), B))
    largest = max(sizes(jax.make_jaxpr(everything)(*args).jaxpr))
    assert B * 64 * chunk <= largest <= 2 * B * 64 * chunk
    temporary = jax.jit(everything).lower(*args).compile().memory_analysis().temp_size_in_bytes
    assert temporary < 4 * B * 64 * rows / 3  # bytes of the logits


def sizes(jaxpr):
    """Yields the sizes of all intermediate values in a jaxpr and its inner ones."""
    for eqn in jaxpr.eqns:
        yield from (math.prod(v.aval.shape) for v in eqn.outvars if hasattr(v.aval, "shape"))
        is_jaxpr = lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")  # noqa: E731
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=is_jaxpr):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from sizes(inner)


@pytest.mark.parametrize("kind", ["untied", "tied", "biased"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_head_in_chunks_equals_the_head(kind, dtype):
    rng = np.random.default_rng(0)
    table = jnp.asarray(rng.normal(size=(V, E)), jnp.float32)
    params = {"wte": {"embedding": table}}
    if kind != "tied":
        params["ff_out"] = {"kernel": table.T}
    bias = jnp.asarray(rng.normal(size=V), jnp.float32) if kind == "biased" else jnp.zeros(V)
    if kind == "biased":
        params["ff_out"]["bias"] = bias
    hidden = jnp.asarray(rng.normal(size=(B, N, E)), dtype)
    head = make_head(params)
    whole = head(hidden, 0, V)
    assert whole.dtype == dtype
    parts = jnp.concatenate([head(hidden, start, 16) for start in range(0, V, 16)], axis=-1)
    np.testing.assert_allclose(
        whole.astype(jnp.float32), parts.astype(jnp.float32), rtol=1e-5, atol=1e-5
    )
    wanted = (hidden @ table.T.astype(dtype)) + bias.astype(dtype)[None, None, :]
    error = np.abs(np.asarray(whole - wanted, np.float32))
    assert error.max() < (1e-5 if dtype == jnp.float32 else 0.1)


@pytest.mark.parametrize("chunk", [7, 64])
def test_bfloat16_logits_are_compared_exactly(chunk):
    """Ties, both zeros, infinities and negative logits."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(B, N, V)).astype(np.float32) * 3
    logits[0, 0] = np.where(rng.random(V) < 0.5, 0.0, -0.0)
    logits[0, 1] = -np.abs(np.round(logits[0, 1]))
    logits[0, 2, 5:] = -np.inf
    logits[0, 3, [9, 50]] = 300
    rounded = jnp.asarray(logits, jnp.bfloat16)
    ours = run(rounded, PLAIN, chunk)
    assert_equals(ours, reference(rounded.astype(jnp.float32)))
    options = BeliefOptions(never=(3, 17), doubted=(5,), vocab_size=50)
    wanted = reference(rounded.astype(jnp.float32), options)
    assert_equals(run(rounded, options, chunk), wanted)


@pytest.mark.parametrize("name", ["plain", "everything"])
def test_large_vocabularies_use_groups(name):
    """Groups of 64 keep ties, inside a group and across groups."""
    rng = np.random.default_rng(5)
    logits = np.round(rng.normal(size=(2, 6, 640)).astype(np.float32) * 2)  # many are equal
    logits[0, 0] = 0.0
    logits[0, 1, [64, 127, 128, 639]] = 50.0
    logits[0, 2, 100:105] = [9, 8, 9, 8, 9]
    assert_equals(run(logits, OPTIONS[name], 320), reference(logits, OPTIONS[name]))


@pytest.mark.parametrize(
    "platform, positions, wanted",
    [
        ("cpu", 32, 126464),
        ("cpu", 256, 4096),
        ("cpu", 2048, 512),
        ("tpu", 32, 15872),
        ("tpu", 2048, 2048),
        ("gpu", 512, 126464),
        ("gpu", 4096, 63232),
    ],
)
def test_chunk_size(monkeypatch, platform, positions, wanted):
    """On CPUs few positions use the whole head as one chunk, on GPUs many."""
    monkeypatch.setattr("xflow_jax.decoding.belief.platform", lambda: platform)
    assert _chunk_size(positions, 126464) == wanted


OVER_MESH = {
    "plain": (BeliefOptions(), "untied"),
    "drawn": (BeliefOptions(never=(1, 33), vocab_size=60, temperature=0.8), "tied"),
    "doubted and guided": (BeliefOptions(doubted=(0, 21, 40), guidance=1.5), "biased"),
}


@pytest.mark.parametrize(
    "mesh, name", [("2,2,2", "plain"), ("1,4,2", "drawn"), ("1,1,8", "doubted and guided")]
)
def test_a_mesh_changes_nothing(mesh, name):
    """The parts of all devices together are the belief of one device."""
    options, kind = OVER_MESH[name]
    rng = np.random.default_rng(3)
    # Whole numbers, so that sums are exact and there are ties.
    table = rng.integers(-2, 3, size=(V, E)).astype(np.float32)
    params = {"wte": {"embedding": table}} | (
        {} if kind == "tied" else {"ff_out": {"kernel": table.T}}
    )
    if kind == "biased":
        params["ff_out"]["bias"] = rng.integers(-2, 3, size=V).astype(np.float32)
    hidden, free = rng.integers(-1, 2, size=(2, 4, N, E)).astype(np.float32)
    keys = jax.random.split(jax.random.key(0), 4)

    def everything(params, hidden, free, keys):
        return compute_belief(
            make_head(params), hidden, V, options, keys, free if options.guidance else None, 7
        )

    wanted = jax.jit(everything)(params, hidden, free, keys)
    made = make_mesh(mesh)
    with jax.set_mesh(made):
        placed = jax.device_put(params, shardings(params, made, "llada"))
        ours = jax.jit(everything)(
            placed, *jax.device_put((hidden, free, keys), batch_sharding(made))
        )
    np.testing.assert_array_equal(ours.tokens, wanted.tokens)
    np.testing.assert_array_equal(ours.top_tokens, wanted.top_tokens)
    for part, far in (("confidence", 1e-6), ("top", 1e-6), ("entropy", 1e-5)):
        np.testing.assert_allclose(getattr(ours, part), getattr(wanted, part), rtol=1e-5, atol=far)


def test_a_chunk_is_for_the_positions_of_one_device(monkeypatch):
    """With a mesh that shards nothing but the batch too."""
    counted, mesh = [], make_mesh("8,1,1")
    monkeypatch.setattr(
        "xflow_jax.decoding.belief._chunk_size",
        lambda positions, rows: counted.append(positions) or rows,
    )
    params = {"wte": {"embedding": jnp.zeros((V, E))}}
    hidden = jax.ShapeDtypeStruct((16, N, E), jnp.float32, sharding=batch_sharding(mesh))
    with jax.set_mesh(mesh):
        jax.eval_shape(lambda h: compute_belief(make_head(params), h, V).tokens, hidden)
    assert counted == [2 * N]


def test_a_mesh_costs_one_small_gather_and_no_head():
    """One collective moves a dozen numbers per position. The head and the logits stay."""
    rows, made = 4096, make_mesh("2,1,4")
    params = {
        "wte": {"embedding": jnp.zeros((rows, E))},
        "ff_out": {"kernel": jnp.zeros((E, rows))},
    }
    hidden = jax.ShapeDtypeStruct((4, N, E), jnp.float32, sharding=batch_sharding(made))

    def everything(params, hidden):
        return compute_belief(make_head(params), hidden, rows)

    with jax.set_mesh(made):
        placed = jax.device_put(params, shardings(params, made, "llada"))
        text = jax.jit(everything).lower(placed, hidden).compile().as_text()
    collectives = re.findall(
        r"= (\S+) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)\(", text
    )
    assert [kind for _, kind in collectives] == ["all-gather"]
    (shape,) = re.findall(r"\[([\d,]+)\]", collectives[0][0])
    assert math.prod(map(int, shape.split(","))) == 4 * 2 * N * (5 + 2 * TOP)
    sorted_ = [shape.split(",")[-1] for shape in re.findall(r"\[([\d,]+)\]\S* sort\(", text)]
    assert all(int(width) <= TOP for width in sorted_)


# --- chunks of a head in 16 bits


@pytest.mark.parametrize("tied", [False, True])
def test_no_float32_copy_of_a_bfloat16_head(tied):
    """XLA for CPUs has no slices of bfloat16, and would keep the head in float32 for them."""
    h = jnp.zeros((1, N, E), jnp.bfloat16)
    table = jnp.zeros((V, E) if tied else (E, V), jnp.bfloat16)

    @jax.jit
    def belief(table, h):
        return compute_belief(Head(table, None, tied), h, V, chunk=16)

    text = belief.lower(table, h).compile().as_text()
    assert "bf16[8,64]" in text or "bf16[64,8]" in text
    assert "f32[8,64]" not in text and "f32[64,8]" not in text


def test_a_chunk_of_a_head_has_a_derivative():
    """Bits have none, so it is that of a slice."""
    table = jax.random.normal(jax.random.key(0), (E, V), jnp.bfloat16)
    h = jax.random.normal(jax.random.key(1), (1, N, E), jnp.bfloat16)

    def total(table, start):
        return jnp.sum(Head(table, None)(h, start, 16).astype(jnp.float32) ** 2)

    def wanted(table):
        return jnp.sum((h @ table[:, 32:48]).astype(jnp.float32) ** 2)

    ours = jax.jit(jax.grad(total))(table, 32)
    assert not np.asarray(ours[:, :32]).any() and not np.asarray(ours[:, 48:]).any()
    np.testing.assert_allclose(
        ours.astype(jnp.float32), jax.grad(wanted)(table).astype(jnp.float32), rtol=0.02, atol=0.02
    )
