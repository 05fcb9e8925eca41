"""`generate`: independence of the batch, results, and messages about bad input."""

from __future__ import annotations

import dataclasses
import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import TOKENIZER, TOY, eight, llada_tiny, random_prompts, toy
from xflow_jax.decoding.generate import generate, pad_prompts
from xflow_jax.decoding.policy_io import load_policy
from xflow_jax.decoding.rules.baselines import Threshold
from xflow_jax.decoding.rules.flow import Flow
from xflow_jax.decoding.rules.mask_prediction import MaskPrediction
from xflow_jax.errors import UserError
from xflow_jax.models.factory import build

LENGTHS = [3, 20, 7, 1, 12, 16, 9]
RULES = {
    "flow": Flow(),
    "jump": Flow(jump=0.7, early_exit=True),
    "synchronous": Flow(synchronous=True, commit=False, reedit_margin=None),
    "mask": MaskPrediction(),
    "entropy": MaskPrediction(order="entropy", cfg_scale=0.5),
    "random": MaskPrediction(order="random", temperature=0.8),
    "margin with threshold": MaskPrediction(order="margin", threshold=0.6),
    "threshold": Threshold(0.5),
}
run = functools.partial(generate, gen_length=6, steps=6, block_length=3)


def decode_all(rule, lm=None, prompts=None, seed=3):
    return run(lm or toy(), prompts or random_prompts(LENGTHS), rule, seed=seed)


QUICK = ("flow", "random", "threshold")  # one that moves, one that draws, one that ends early


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in QUICK else [pytest.mark.slow]) for n in RULES]
)
def test_a_prompt_does_not_depend_on_its_batch(name):
    """Alone (padded to 16), among seven (padded to 32), and in another order."""
    rule, prompts = RULES[name], random_prompts(LENGTHS)
    together = decode_all(rule)
    for row in (0, 4):
        alone = decode_all(rule, prompts=[prompts[row]])
        np.testing.assert_array_equal(alone.tokens[0], together.tokens[row])
        np.testing.assert_allclose(alone.progress[0], together.progress[row], atol=1e-4)
        assert alone.forward_passes[0] == together.forward_passes[row]
    backwards = decode_all(rule, prompts=prompts[::-1])
    np.testing.assert_array_equal(backwards.tokens[::-1], together.tokens)
    np.testing.assert_array_equal(backwards.forward_passes[::-1], together.forward_passes)


@pytest.mark.slow
def test_in_bfloat16_a_prompt_depends_on_the_shape_of_its_batch_alone():
    """Neither the neighbours nor the row matter while B and the padded length stay."""
    lm = toy()
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), lm.params)
    lm = dataclasses.replace(lm, model=build(lm.config, jnp.bfloat16), params=half)
    prompts, others = random_prompts(LENGTHS), random_prompts([30, 2, 17, 5, 1, 31, 8], seed=5)
    for rule in (RULES["flow"], RULES["random"]):
        together = decode_all(rule, lm, prompts)
        for row, place in ((0, 6), (4, 0), (1, 1)):
            batch = others[:place] + [prompts[row]] + others[place + 1 :]
            out = decode_all(rule, lm, batch)
            np.testing.assert_array_equal(out.tokens[place], together.tokens[row])
            np.testing.assert_array_equal(out.progress[place], together.progress[row])


@pytest.mark.slow
def test_a_prompt_that_needs_no_padding():
    """A prompt of 16 tokens has no padding alone, and some beside a longer one."""
    prompts = random_prompts([16, 20])
    for rule in (RULES["flow"], RULES["mask"]):
        both, alone = decode_all(rule, prompts=prompts), decode_all(rule, prompts=prompts[:1])
        np.testing.assert_array_equal(both.tokens[0], alone.tokens[0])


def test_seeds():
    """Equal seeds repeat, others differ, and rules that draw nothing ignore them."""
    prompts = random_prompts(LENGTHS)
    first, again, other = (
        decode_all(RULES["random"], prompts=prompts, seed=seed) for seed in (3, 3, 4)
    )
    np.testing.assert_array_equal(first.tokens, again.tokens)
    assert (first.tokens != other.tokens).any()
    np.testing.assert_array_equal(
        decode_all(RULES["mask"]).tokens, decode_all(RULES["mask"], seed=4).tokens
    )


def test_the_same_prompt_twice_draws_twice():
    out = decode_all(RULES["random"], prompts=[random_prompts([5])[0]] * 7)
    assert len({tuple(row) for row in out.tokens.tolist()}) > 1


def test_shapes_and_types():
    out = run(toy(), random_prompts([3, 20]), Flow(), trace=True)
    assert out.tokens.shape == out.progress.shape == (2, 6) and out.forward_passes.shape == (2,)
    assert out.texts is None and np.issubdtype(out.tokens.dtype, np.integer)
    assert out.trace.notes is None
    for name in (f.name for f in dataclasses.fields(out.trace) if f.name != "notes"):
        part = getattr(out.trace, name)
        assert part.shape == (6, 2, 6, 4)[: 4 if "top" in name else 3] and isinstance(
            part, np.ndarray
        )
    assert out.trace.reedited.dtype == bool
    assert run(toy(), random_prompts([3, 20]), Flow()).trace is None


def test_prompts_may_be_arrays():
    rows = random_prompts([4, 4])
    wanted = decode_all(RULES["mask"], prompts=rows).tokens
    for prompts in (
        np.asarray(rows),
        [np.asarray(row) for row in rows],
        tuple(tuple(row) for row in rows),
    ):
        np.testing.assert_array_equal(run(toy(), prompts, RULES["mask"], seed=3).tokens, wanted)


def test_texts():
    """A text gets the chat template, and a response ends at its first EOS."""
    lm = llada_tiny()
    ids = lm.tokenizer.apply_chat_template([{"role": "user", "content": "Add."}], return_dict=False)
    short = functools.partial(generate, lm, rule=MaskPrediction(), gen_length=6, steps=2)
    out, same = short(["Add."]), short([ids])
    np.testing.assert_array_equal(out.tokens, same.tokens)
    ids = out.tokens[0].tolist()
    ids = ids[: ids.index(lm.config.eos_id)] if lm.config.eos_id in ids else ids
    assert out.texts == same.texts == [lm.tokenizer.decode(ids, skip_special_tokens=True)]


def test_chats():
    """A list of messages gets the chat template, beside texts and ids in one call."""
    lm = llada_tiny()
    chat = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Add."}]
    ids = lm.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    tokens = generate(lm, [chat, ids, "Add."], MaskPrediction(), 6, 2).tokens
    np.testing.assert_array_equal(tokens[0], tokens[1])
    for wrong, sentence in (
        ([[*chat, {"role": "assistant", "content": "b"}]], "prompt 0: the last message is of the"),
        (["a", [{"role": "user"}]], "prompt 1: message 1 has no content"),
        (chat, "prompt 0 is one message: a chat is a list of messages"),
    ):
        with pytest.raises(UserError, match=f"^{re.escape(sentence)}"):
            generate(lm, wrong, MaskPrediction(), 6, 2)


@pytest.mark.slow
@eight
@pytest.mark.parametrize(
    "mesh, name", [("2,2,2", "flow"), ("1,8,1", "random"), ("2,1,1", "threshold")]
)
def test_a_mesh_changes_no_token(mesh, name):
    sharded, plain = (decode_all(RULES[name], lm) for lm in (toy(mesh), toy()))
    np.testing.assert_array_equal(sharded.tokens, plain.tokens)
    np.testing.assert_array_equal(sharded.forward_passes, plain.forward_passes)
    np.testing.assert_allclose(sharded.progress, plain.progress, atol=1e-4)


@pytest.mark.slow
@eight
def test_a_mesh_that_does_not_divide_the_batch():
    prompts = random_prompts([4, 9, 5])
    sharded, plain = (run(lm, prompts, Flow(), trace=True) for lm in (toy("2,2,2"), toy()))
    assert sharded.trace.tokens.shape == (6, 3, 6)
    np.testing.assert_array_equal(sharded.trace.tokens, plain.trace.tokens)


BAD = [
    ({"prompts": []}, "prompts is empty: give at least one text or list of token ids"),
    ({"prompts": "Add."}, "prompts must be a list of texts or of lists of token ids, not one text"),
    ({"prompts": 7}, "prompts must be a list of texts or of lists of token ids, not int"),
    (
        {"prompts": ["Add."]},
        "the model's directory has no tokenizer.json, so prompts must be lists of token ids",
    ),
    ({"prompts": [1, 2]}, "prompt 0 must be a text or a list of token ids, not 1"),
    ({"prompts": [[1], [2.5]]}, "prompt 1 must be a text or a list of token ids, not [2.5]"),
    ({"prompts": [[1], []]}, "prompt 1 is empty: give at least one token id"),
    ({"prompts": [[1], [2, 24]]}, "prompt 1 holds the id 24. The vocabulary has ids 0 to 23."),
    ({"prompts": [[-1]]}, "prompt 0 holds the id -1. The vocabulary has ids 0 to 23."),
    ({"gen_length": 0}, "gen_length must be a whole number of at least 1, not 0"),
    ({"gen_length": 8.0}, "gen_length must be a whole number of at least 1, not 8.0"),
    ({"steps": 0}, "steps must be a whole number of at least 1, not 0"),
    ({"steps": -3}, "steps must be a whole number of at least 1, not -3"),
    ({"steps_per_block": 0}, "steps_per_block must be a whole number of at least 1, not 0"),
    ({"block_length": 0}, "block_length must be a whole number of at least 1, not 0"),
    ({"block_length": 3}, "gen_length 8 is not a whole number of blocks of 3. Use 6 or 9."),
    ({"block_length": 16}, "gen_length 8 is not a whole number of blocks of 16. Use 16."),
    ({"block_length": 4, "steps": 5}, "5 steps do not divide over 2 blocks. Use 4 or 6."),
    ({"block_length": 4, "steps": 1}, "1 steps do not divide over 2 blocks. Use 2."),
    (
        {"steps": 33},
        "33 steps for a block of 8 tokens: it must be 1 to 32 "
        "(for the response of 8 tokens, at most 32)",
    ),
    (
        {"block_length": 4, "steps_per_block": 17},
        "17 steps for a block of 4 tokens: it must be 1 to 16 "
        "(for the response of 8 tokens, at most 32)",
    ),
    (
        {"prompts": [[1], [2] * 121]},
        "a prompt of 121 tokens and a response of 8 exceed the model's 128 positions. "
        "Shorten one of them.",
    ),
]


@pytest.mark.parametrize("arguments, sentence", BAD, ids=[sentence[:40] for _, sentence in BAD])
def test_bad_input(arguments, sentence):
    good = {"prompts": [[1, 2]], "rule": Flow(), "gen_length": 8, "steps": 8}
    with pytest.raises(UserError) as error:
        generate(toy(), **good | arguments)
    assert str(error.value) == sentence


def test_lengths_may_be_numpy_integers():
    n, block = np.int64(6), np.int32(3)
    ours = generate(toy(), random_prompts([5]), RULES["mask"], n, n, block_length=block)
    np.testing.assert_array_equal(
        ours.tokens, run(toy(), random_prompts([5]), RULES["mask"]).tokens
    )


def test_a_prompt_that_just_fits():
    out = generate(toy(), [[1] * 120], MaskPrediction(), gen_length=8, steps=1)
    assert out.tokens.shape == (1, 8) and TOY.max_length == 128


def test_a_tokenizer_of_a_larger_model_is_refused():
    """Rows beyond the table read as the last one, so the answer would be to another prompt."""
    lm = dataclasses.replace(toy(), tokenizer=TOKENIZER)
    with pytest.raises(UserError) as error:
        run(lm, ["Add."], Flow())
    sentence = r"prompt 0 holds the id \d+\. The vocabulary has ids 0 to 23\."
    assert re.fullmatch(sentence + " The tokenizer belongs to another model.", str(error.value))


def test_rows_are_checked_wherever_they_are_padded():
    """Rollouts pad prompts of a tokenizer without `generate`."""
    for row in ([1, 24], [-1, 2]):
        with pytest.raises(UserError, match="prompt 1 holds ids outside the vocabulary, 0 to 23"):
            pad_prompts(toy(), [[1], row])


@pytest.mark.parametrize("name", ["flow", "mask", "random"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_refused(name, value):
    """Their argmax is token 0 at every position."""
    lm = toy()
    params = jax.tree.map(lambda x: x, lm.params)
    params["ff_out"] = {"kernel": params["ff_out"]["kernel"].at[0, 3].set(value)}
    with pytest.raises(UserError) as error:
        decode_all(RULES[name], dataclasses.replace(lm, params=params))
    assert str(error.value) == (
        "the model's logits are NaN or infinite: its weights are damaged, or too large for float32."
    )


def test_a_tokenizer_without_a_chat_template():
    lm = llada_tiny()

    class Plain:
        chat_template = None

    with pytest.raises(UserError, match="no chat template, so prompts must be lists of token ids"):
        generate(dataclasses.replace(lm, tokenizer=Plain()), ["Add."], Flow(), 4, 4)


@pytest.mark.parametrize(
    ("rule", "sentence"),
    [
        ("flow", "rule must be a rule such as xflow_jax.Flow(), not 'flow'"),
        (None, "rule must be a rule such as xflow_jax.Flow(), not None"),
        ({"power": 2}, "rule must be a rule such as xflow_jax.Flow(), not {'power': 2}"),
        (Flow, "the rule is the class Flow: write Flow()"),
    ],
)
def test_rules_of_a_wrong_type(rule, sentence):
    with pytest.raises(UserError, match=f"^{re.escape(sentence)}$"):
        run(toy(), [[1]], rule)


@pytest.mark.parametrize("seed", [-1, 2**32, 2**64, 10**30, 1.5, "1", None])
def test_wrong_seeds(seed):
    with pytest.raises(UserError, match="^seed must be a whole number from 0 to 4294967295, not "):
        run(toy(), [[1]], Flow(), seed=seed)


def test_a_model_of_a_wrong_type():
    with pytest.raises(UserError, match="^lm must be a model from xflow_jax.load, not 'tiny'$"):
        run("tiny", [[1]], Flow())


@pytest.mark.parametrize("policy", ["tiny", {"w1": 1}, dict, Flow])
def test_policies_of_a_wrong_type(policy):
    # Called by itself, since the checks of types in the tests would be first.
    flow = types.SimpleNamespace(policy=policy, sample=False)
    with pytest.raises(UserError, match="policy must be a policy from xflow_jax.load_policy, not "):
        Flow.__post_init__(flow)


@pytest.mark.slow
def test_64_bit_types_and_strict_promotion_change_nothing():
    """Both are settings of the caller's own programs."""
    lm, ids = toy(), np.array([[1, 2, 3]])

    def decode():
        rule = Flow(policy=load_policy("tiny"))
        return generate(lm, [[1, 2]], rule, gen_length=2, steps=1)

    expected, logits = decode(), lm.logits(ids)
    jax.clear_caches()
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        found = decode()
        np.testing.assert_array_equal(lm.logits(ids), logits)
        x = lm.embed(ids)
        np.testing.assert_array_equal(lm.logits_from_embeddings(np.asarray(x, np.float64)), logits)
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_array_equal(found.progress, expected.progress)
