"""Tests of supervised fine-tuning: the loss against plain loops, the data, and the step."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.family_helpers import family_config, golden_lm
from tests.helpers import TOKENIZER, TOY, random_prompts, toy
from xflow_jax.errors import UserError
from xflow_jax.lm import LM
from xflow_jax.models.lora import LoraConfig, lora_init
from xflow_jax.tokenizer import chat_ids
from xflow_jax.training import alignment_loss, losses
from xflow_jax.training.block_copies import block_copies_mask
from xflow_jax.training.pretraining import response_logits
from xflow_jax.training.sft import (
    SFTConfig,
    find_block_length,
    make_sft_loss,
    make_sft_step,
)
from xflow_jax.training.sft_data import (
    BucketedPairs,
    Canvas,
    TokenizedPair,
    end_of_turn_id,
    split_pairs,
    tokenize_dialogues,
)
from xflow_jax.training.state import TrainState

CONFIG = SFTConfig(lengths=(12,), batch_size=3, chunk=16)


GOLDENS = {
    "shifted logits": "dream_tiny",
    "blocks": "sdar_tiny",
    "blocks of experts": "llada21_tiny",
    "shifted blocks": "fastdllm2_tiny",
    "tied head": "illada_tiny",
    "experts": "lladamoe_tiny",
}
MODELS = {"full attention": toy}
MODELS |= {kind: functools.partial(golden_lm, name) for kind, name in GOLDENS.items()}


def batch_of(lm: LM, block: int) -> dict[str, jax.Array]:
    """Makes rows of 12: prompts of 1, 5 and 6, and responses of 4, 6 and 2 tokens."""
    top = min(lm.config.mask_id, lm.config.eos_id)
    pairs = [
        TokenizedPair(*random_prompts(lengths, seed=i, top=top))
        for i, lengths in enumerate(([1, 4], [5, 6], [6, 2]))
    ]
    canvas = Canvas((12,), 3, lm.config.eos_id, block)
    rows = [canvas.example(pair, 12) for pair in pairs]
    return {name: jnp.stack([row[name] for row in rows]) for name in rows[0]}


def plain_loss(lm: LM, batch: dict[str, jax.Array], key: jax.Array, block: int) -> float:
    """Computes Eq. 1 row by row and block by block, from the logits of the model alone."""
    masked, sigma = (
        np.asarray(x) for x in losses.draw_response_noise(key, batch["response"], block)
    )
    tokens, counted = (np.asarray(batch[name]) for name in ("tokens", "response"))
    rows, length = tokens.shape
    size, total = block or length, 0.0
    for start in range(0, length, size):
        # Blocks before are clean. Later ones change nothing under block-causal attention.
        own = np.arange(length) // size == start // size
        noised = np.where(masked & own[None], lm.config.mask_id, tokens)
        logits = np.asarray(lm.logits(noised, block_length=block or None), np.float64)
        for row in range(rows):
            for i in np.flatnonzero(masked[row] & own):
                z = logits[row, i - 1 if lm.config.logits_shift else i]
                nll = np.log(np.exp(z - z.max()).sum()) + z.max() - z[tokens[row, i]]
                total += nll / sigma[row, i] / counted[row].sum() / rows
    return total


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in list(MODELS)[3:]]


@pytest.mark.parametrize("name", ["full attention", "shifted logits", "blocks", *SLOW])
def test_the_loss_is_that_of_plain_loops(name):
    """One pass over two copies computes what each block's own pass does."""
    lm = MODELS[name]()
    block = 4 if "blocks" in name else 0
    config = dataclasses.replace(CONFIG, block_length=block)
    assert find_block_length(lm.config, config) == block
    batch, key = batch_of(lm, block), jax.random.key(3)
    assert batch["response"].sum() == (20 if block else 24)
    loss, metrics = jax.jit(make_sft_loss(lm.model, config))(lm.params, batch, key)
    np.testing.assert_allclose(loss, plain_loss(lm, batch, key, block), rtol=2e-4)
    assert metrics["text_nll"] != metrics["masked_nll"]


def test_the_loss_is_that_of_pretraining_for_equal_pairs_and_noise():
    """So a base model is not pulled towards another loss."""
    lm, key = toy(), jax.random.key(5)
    prompts, responses = random_prompts([5] * 3), random_prompts([4, 6, 2], seed=1)
    canvas = Canvas((12,), 3, lm.config.eos_id)
    rows = [
        canvas.example(TokenizedPair(*pair), 12) for pair in zip(prompts, responses, strict=True)
    ]
    batch = {name: jnp.stack([row[name] for row in rows]) for name in rows[0]}
    loss, metrics = jax.jit(make_sft_loss(lm.model, CONFIG))(lm.params, batch, key)
    masked, sigma = losses.draw_response_noise(key, batch["response"], 0)
    # The stratified ratios are those that pretraining draws from the first half of the same key.
    ratios = losses.mask_ratios(jax.random.split(key)[0], 3)
    np.testing.assert_allclose(sigma[:, 0], ratios)
    noised = jnp.where(masked, lm.config.mask_id, batch["tokens"])
    logits = jax.jit(response_logits, static_argnums=(0, 4))(
        lm.model, lm.params, noised, jnp.ones_like(masked), 5
    )
    nll = losses.cross_entropy(logits, batch["tokens"][:, 5:])
    np.testing.assert_allclose(loss, losses.diffusion_loss(nll, masked[:, 5:], ratios), rtol=1e-5)
    np.testing.assert_allclose(
        metrics["masked_nll"], losses.masked_mean(nll, masked[:, 5:]), rtol=1e-5
    )


def test_the_mask_of_two_copies():
    wanted = [
        "110000 000000",
        "110000 000000",
        "001100 110000",
        "001100 110000",
        "000011 111100",
        "000011 111100",
        "000000 110000",
        "000000 110000",
        "000000 111100",
        "000000 111100",
        "000000 111111",
        "000000 111111",
    ]
    rows = [[int(c) for c in row.replace(" ", "")] for row in wanted]
    blocks = jnp.arange(6) // 2
    np.testing.assert_array_equal(block_copies_mask(blocks, blocks), np.asarray(rows, bool))


def test_the_cross_entropy_in_chunks_is_the_plain_one_in_value_and_gradient():
    key, tokens = jax.random.key(0), jnp.asarray([[1, 5, 59], [0, 33, 2]])
    hidden, kernel, bias = (
        jax.random.normal(jax.random.fold_in(key, i), shape)
        for i, shape in enumerate([(2, 3, 8), (8, 60), (60,)])
    )
    weight = jnp.asarray([[1.0, 0.0, 2.0], [0.5, 3.0, 1.0]])

    def fused(hidden, kernel, bias):
        nll = alignment_loss.chunked_cross_entropy(hidden, kernel, tokens, bias, chunk=20)
        return jnp.sum(nll * weight)

    def plain(hidden, kernel, bias):
        nll = losses.cross_entropy(hidden @ kernel + bias[None, None], tokens)
        return jnp.sum(nll * weight)

    ours, wanted = (
        jax.jit(jax.value_and_grad(f, (0, 1, 2)))(hidden, kernel, bias) for f in (fused, plain)
    )
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


def test_noise_is_of_responses_alone_and_spread_evenly():
    response = jnp.asarray(np.arange(16) >= np.arange(64)[:, None] % 9)
    for block, parts in ((0, 1), (4, 4)):
        masked, sigma = losses.draw_response_noise(jax.random.key(1), response, block)
        assert not np.any(masked & ~response)
        own = np.asarray(sigma).reshape(64, parts, -1)
        assert (own == own[..., :1]).all()  # one ratio for a row, or for a block
        ratios = np.sort(own[..., 0].ravel())
        np.testing.assert_allclose(ratios, (np.arange(ratios.size) + 0.5) / ratios.size, atol=0.02)
        share = np.asarray(masked)[np.asarray(response)].mean()
        assert abs(share - 0.5) < 0.06
    # The blocks of a row differ, as independent draws would.
    assert (own[..., 0].max(axis=1) - own[..., 0].min(axis=1)).min() > 0.5


def test_a_row_is_divided_by_the_length_of_its_response():
    nll = jnp.asarray([[9.0, 1.0, 2.0, 3.0], [9.0, 9.0, 9.0, 4.0]])
    masked = jnp.asarray([[False, True, False, True], [False, False, False, True]])
    sigma = jnp.asarray([[0.5] * 4, [0.25] * 4])
    response = jnp.asarray([[False, True, True, True], [False, False, False, True]])
    loss = losses.response_loss(nll, masked, sigma, response)
    np.testing.assert_allclose(loss, ((1 + 3) / 0.5 / 3 + 4 / 0.25 / 1) / 2, rtol=1e-6)


@pytest.mark.parametrize(("block", "end"), [(0, 16), (4, 12), (8, 16)])
def test_eos_fills_the_row_and_counts(block, end):
    """All of it counts under full attention, and up to the end of its block otherwise."""
    canvas = Canvas((8, 16), 2, eos_id=99, block_length=block)
    row = canvas.example(TokenizedPair([1, 2, 3], [4, 5, 6, 7, 8]), 16)
    assert row["tokens"].tolist() == [1, 2, 3, 4, 5, 6, 7, 8] + [99] * 8
    assert np.flatnonzero(row["response"]).tolist() == list(range(3, end))


def test_turns_and_their_ends():
    eot, eos = TOKENIZER.convert_tokens_to_ids("<|eot_id|>"), TOKENIZER.eos_token_id
    config = dataclasses.replace(TOY, vocab_size=len(TOKENIZER), embedding_size=None)
    config = dataclasses.replace(config, eos_token_id=eos)
    assert end_of_turn_id(TOKENIZER) == eot
    turns = [
        {"role": role, "content": content}
        for role, content in (
            ("system", "code"),
            ("user", "Square them."),
            ("assistant", "xs"),
            ("user", "Sum them."),
            ("assistant", "sum(xs)"),
        )
    ]
    tokenize = functools.partial(tokenize_dialogues, [("here", turns)], TOKENIZER, config)
    (last,), each = tokenize(), tokenize("each")
    texts = [TOKENIZER(text)["input_ids"] for text in ("xs", "sum(xs)")]
    assert last == TokenizedPair(chat_ids(TOKENIZER, turns[:4]), texts[1] + [eot])
    assert each == [TokenizedPair(chat_ids(TOKENIZER, turns[:2]), texts[0] + [eot]), last]
    assert tokenize(end_of_turn=False)[0].response == texts[1]
    greeted = [("there", [{"role": "assistant", "content": "Hello."}, *turns[1:3]])]
    (only,) = tokenize_dialogues(greeted, TOKENIZER, config, "each")
    assert only == TokenizedPair(chat_ids(TOKENIZER, greeted[0][1][:2]), each[0].response)
    silent = [("there, line 2", [turns[1], {"role": "assistant", "content": " "}])]
    with pytest.raises(UserError, match="there, line 2: a response of the assistant in it is e"):
        tokenize_dialogues(silent, TOKENIZER, config)
    with pytest.raises(UserError, match="here: the tokenizer makes the id .* has ids 0 to 23"):
        tokenize_dialogues([("here", turns)], TOKENIZER, TOY)


def test_batches_have_one_length_each_and_miss_few_pairs():
    rng = np.random.default_rng(0)
    pairs = [TokenizedPair([i], rng.integers(0, 9, n).tolist()) for i, n in enumerate([3, 10] * 9)]
    source = BucketedPairs(pairs, canvas := Canvas((8, 16), 4, 99, group_by_length=True), seed=5)
    assert source.batches == 4
    for first in (0, 4):  # two epochs
        batches = [source[first + i] for i in range(4)]
        lengths = sorted(batch["tokens"].shape for batch in batches)
        assert lengths == [(4, 8), (4, 8), (4, 16), (4, 16)]
        members = np.concatenate([batch["tokens"][:, 0] for batch in batches])
        assert len(set(members.tolist())) == 16  # two of 18 wait for the next epoch
    again = BucketedPairs(pairs, canvas, seed=5, rows=np.asarray([1, 3]))
    np.testing.assert_array_equal(again[6]["tokens"], source[6]["tokens"][[1, 3]])
    assert any(np.any(source[i]["tokens"][:, 0] != source[4 + i]["tokens"][:, 0]) for i in range(4))
    rest, held_out = split_pairs(pairs, 7, 4)
    assert len(held_out) == 4 and len(rest) == 14
    assert sorted(map(id, rest + held_out)) == sorted(map(id, pairs))
    with pytest.raises(UserError, match="held_out 3 must be at least one batch of 4"):
        split_pairs(pairs, 3, 4)


LEARNERS = [
    pytest.param(name, tune, marks=() if (name, tune) == ("blocks", "all") else pytest.mark.slow)
    for name in MODELS
    for tune in ("all", "lora")
]


@pytest.mark.parametrize(("name", "tune"), LEARNERS)
def test_every_family_learns_its_responses_and_compiles_once(name, tune):
    lm = MODELS[name]()
    block = 4 if "blocks" in name else 0
    batch = {name: jnp.concatenate([x, x[:1]]) for name, x in batch_of(lm, block).items()}
    config = dataclasses.replace(
        CONFIG, batch_size=4, block_length=block, tune=tune, lora=LoraConfig(rank=4)
    )
    params, base = lm.params, None
    if tune == "lora":
        params, base = lora_init(jax.random.key(0), lm.params, config.lora), lm.params
    optimizer = optax.adam(0.01 if tune == "lora" else 0.003)
    step = jax.jit(make_sft_step(lm.model, optimizer, config))
    state, nll = TrainState.create(params, optimizer), []
    for _ in range(30):
        state, metrics = step(state, batch, jax.random.key(0), base)
        nll.append(float(metrics["masked_nll"]))
    assert np.mean(nll[-10:]) < 0.8 * np.mean(nll[:10])
    assert step._cache_size() == 1 and state.step == 30


def test_random_batches_give_long_rows_to_short_responses_too():
    """A decode has rows of one length for responses of all lengths, so training needs them too."""
    rng = np.random.default_rng(1)
    sizes = rng.permutation([3] * 150 + [10] * 50)
    pairs = [TokenizedPair([i], [7] * n) for i, n in enumerate(sizes)]
    source = BucketedPairs(pairs, Canvas((8, 16), 2, 99), seed=5)
    batches = [source[i] for i in range(source.batches)]
    found = {8: [], 16: []}
    for batch in batches:
        responses = batch["tokens"][:, 1:] == 7
        found[batch["tokens"].shape[1]] += responses.sum(axis=1).tolist()
    assert set(found[8]) == {3}
    # Short responses have both lengths, so a row of 16 is no sign of a long one.
    assert 20 < found[16].count(3) < 60 and found[16].count(10) == 50
    members = np.concatenate([batch["tokens"][:, 0] for batch in batches])
    assert sorted(members.tolist()) == list(range(200))


@pytest.mark.slow
def test_accumulated_parts_average_their_gradients():
    lm, batch = toy(), batch_of(toy(), 0)
    batch = {name: jnp.concatenate([x, x[:1]]) for name, x in batch.items()}
    optimizer, key = optax.sgd(1.0), jax.random.fold_in(jax.random.key(0), 0)
    config = dataclasses.replace(CONFIG, batch_size=4, accumulate=2)
    grad = jax.jit(jax.grad(make_sft_loss(lm.model, config), has_aux=True))
    grads = [
        grad(lm.params, {name: x[i::2] for name, x in batch.items()}, part)[0]
        for i, part in enumerate(jax.random.split(key, 2))
    ]
    state = TrainState.create(lm.params, optimizer)
    after, _ = jax.jit(make_sft_step(lm.model, optimizer, config))(state, batch, jax.random.key(0))
    wanted = jax.tree.map(lambda p, a, b: p - (a + b) / 2, lm.params, *grads)
    for x, y in zip(jax.tree.leaves(after.params), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["blocks", "shifted blocks"])
def test_the_gradient_through_two_copies_is_that_of_each_block(name):
    """It reaches the clean copy too, whose keys and values the noised blocks read."""
    lm, block = MODELS[name](), 4
    batch, key = batch_of(lm, block), jax.random.key(3)
    config = dataclasses.replace(CONFIG, block_length=block)
    masked, sigma = losses.draw_response_noise(key, batch["response"], block)

    def plain(params):
        total = 0.0
        for start in range(0, 12, block):
            own = masked & (jnp.arange(12) // block == start // block)[None]
            noised = jnp.where(own, lm.config.mask_id, batch["tokens"])
            logits = lm.model.apply({"params": params}, noised, None, block)
            if lm.config.logits_shift:
                logits = jnp.roll(logits, 1, axis=1)
            nll = losses.cross_entropy(logits, batch["tokens"])
            total += losses.response_loss(nll, own, sigma, batch["response"])
        return total

    ours = jax.jit(jax.grad(lambda p: make_sft_loss(lm.model, config)(p, batch, key)[0]))(lm.params)
    wanted = jax.jit(jax.grad(plain))(lm.params)
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-3, atol=2e-5 * float(jnp.abs(y).max() + 1))


@pytest.mark.slow
def test_only_adapters_get_gradients():
    lm, batch = toy(), batch_of(toy(), 0)
    config = dataclasses.replace(CONFIG, tune="lora", lora=LoraConfig(rank=2))
    adapters = lora_init(jax.random.key(0), lm.params, config.lora)
    optimizer = optax.sgd(0.1)
    state = TrainState.create(adapters, optimizer)
    step = jax.jit(make_sft_step(lm.model, optimizer, config))
    after, metrics = step(state, batch, jax.random.key(0), lm.params)
    plain = jax.jit(make_sft_loss(lm.model, CONFIG))
    key = jax.random.fold_in(jax.random.key(0), 0)
    np.testing.assert_allclose(metrics["loss"], plain(lm.params, batch, key)[0], rtol=1e-5)
    moved = jax.tree.map(lambda x, y: bool(np.any(x != y)), after.params, adapters)
    assert jax.tree.structure(moved) == jax.tree.structure(adapters)
    assert any(jax.tree.leaves(moved))
    with pytest.raises(ValueError, match="LoRA needs the frozen parameters"):
        step(state, batch, jax.random.key(0))


@pytest.mark.parametrize(
    ("model", "changes", "sentence"),
    [
        ("toy", {"block_length": 4}, "block_length is 4, but the model attends to all positions"),
        ("sdar", {"lengths": (8, 10)}, "the 10 of lengths is not a whole number of blocks of 4"),
        ("sdar", {"lengths": (8,), "block_length": 16}, "number of blocks of 16"),
    ],
)
def test_blocks_that_do_not_fit(model, changes, sentence):
    config = TOY if model == "toy" else family_config("sdar")
    with pytest.raises(UserError, match=sentence):
        find_block_length(config, dataclasses.replace(CONFIG, **changes))


@pytest.mark.parametrize("lengths", [(), (8, 8), (16, 8), (1,)])
def test_lengths_that_are_no_lengths(lengths):
    with pytest.raises(UserError, match="they must be ascending and at least 2"):
        SFTConfig(lengths=lengths)
