"""The likelihood against the numbers of the official code, and its independence of the batch."""

from __future__ import annotations

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import decode_golden, llada_tiny, random_prompts, toy
from tests.llada2_helpers import TINY2
from xflow_jax.errors import UserError
from xflow_jax.evaluation.likelihood import (
    MaskedRow,
    draw_masks,
    log_likelihoods,
    read_pairs,
    row_losses,
)

CASES = {case["name"]: case for case in decode_golden()["llada_likelihood"]}


@pytest.mark.parametrize("name", CASES)
def test_numbers_of_the_official_code(name):
    """Recomputes the loss of every batch from its masks, all of a case at once in batches of 3."""
    case = CASES[name]
    start, answer = len(case["prompt"]), case["answer"]
    rows = [
        MaskedRow(tuple(case["prompt"]), tuple(answer), np.asarray(row)[start:] == case["mask_id"])
        for batch in case["batches"]
        for row in batch["perturbed"]
    ]
    losses = row_losses(llada_tiny(), rows, case["cfg_scale"], batch_size=3)
    by_batch = losses.reshape(len(case["batches"]), -1).mean(axis=1)
    np.testing.assert_allclose(by_batch, [batch["loss"] for batch in case["batches"]], atol=1e-3)
    assert -by_batch.mean() == pytest.approx(case["log_likelihood"], abs=1e-3)


def test_masks_are_spread_over_the_levels():
    for name, case in CASES.items():
        length = len(case["answer"])
        # The levels of the official code are among those that can be drawn.
        for batch in case["batches"]:
            found = [
                draw_masks(np.random.default_rng(s), length, case["batch_size"]).sum(1).tolist()
                for s in range(200)
            ]
            assert batch["number_masked"] in found, name
    drawn = draw_masks(np.random.default_rng(0), 64, 16)
    assert drawn.shape == (16, 64) and len(set(drawn.sum(1).tolist())) == 16
    where = np.mean([draw_masks(np.random.default_rng(s), 8, 8) for s in range(300)], axis=(0, 1))
    np.testing.assert_allclose(where, 4.5 / 8, atol=0.03)  # all positions are equally likely


def pairs_of(lengths):
    prompts, responses = zip(*lengths, strict=True)
    return list(
        zip(random_prompts(list(prompts)), random_prompts(list(responses), seed=1), strict=True)
    )


@pytest.mark.slow
def test_batch_and_mesh_do_not_matter():
    pairs = pairs_of([(3, 5), (17, 2), (1, 20), (0, 4), (9, 5)])
    options = {"samples": 4, "group": 4, "seed": 7}
    alone = [log_likelihoods(toy(), [pair], **options)[0] for pair in pairs]
    together = log_likelihoods(toy(), pairs, batch_size=7, **options)
    np.testing.assert_allclose(together, alone, rtol=1e-5)
    np.testing.assert_allclose(
        log_likelihoods(toy("1,4,2"), pairs, batch_size=5, **options), alone, rtol=1e-4
    )
    assert (log_likelihoods(toy(), pairs, samples=4, group=4, seed=8) != together).all()
    assert (together < 0).all()


def test_one_token_has_its_log_probability():
    """With all positions masked, the bound of a one-token response is log p itself."""
    lm, prompt = toy(), random_prompts([6])[0]
    z = np.asarray(lm.logits([[*prompt, lm.config.mask_id]]))[0, -1].astype(np.float64)
    log_p = z - np.log(np.exp(z - z.max()).sum()) - z.max()
    for token in (int(z.argmax()), int(z.argmin())):
        assert log_likelihoods(lm, [(prompt, [token])], 2, 2)[0] == pytest.approx(
            log_p[token], abs=1e-3
        )


def test_bad_input(tmp_path):
    lm = toy()
    for arguments, sentence in (
        ({"samples": 5, "group": 2}, "5 samples are not a whole number of groups of 2"),
        ({"samples": 0}, "samples must be at least 1, not 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, not 0"),
    ):
        with pytest.raises(UserError, match=sentence):
            log_likelihoods(lm, pairs_of([(2, 2)]), **arguments)
    with pytest.raises(UserError, match="response 1 is empty"):
        log_likelihoods(lm, [([1], [2]), ([1], [])], 1, 1)
    for pair in (([24], [2]), ([1], [2, -1])):
        with pytest.raises(UserError, match="holds the id (24|-1). The vocabulary has ids 0 to 23"):
            log_likelihoods(lm, [pair], 1, 1)
    params = {**lm.params, "ln_f": {"scale": lm.params["ln_f"]["scale"].at[0].set(jnp.nan)}}
    with pytest.raises(UserError, match="the model's logits are NaN or infinite"):
        log_likelihoods(dataclasses.replace(lm, params=params), [([1], [2])], 1, 1)
    # Rows of one batch: each fits, while the longest prompt and the longest response do not.
    unlike = [(list(range(18)) * 6, [1, 2, 3]), ([1], list(range(18)) * 6)]
    together = log_likelihoods(lm, unlike, 2, batch_size=4)
    alone = [log_likelihoods(lm, [pair], 2)[0] for pair in unlike]
    np.testing.assert_allclose(together, alone, rtol=1e-4)
    with pytest.raises(UserError, match="of 130 tokens exceed the model's 128 positions"):
        log_likelihoods(lm, pairs_of([(100, 30)]), 1, 1)
    with pytest.raises(UserError, match="defined for LLaDA"):
        log_likelihoods(dataclasses.replace(lm, config=TINY2), [([1], [2])], 1, 1)


def test_files_of_pairs(tmp_path):
    file, lm = tmp_path / "pairs.jsonl", llada_tiny()
    file.write_text(
        json.dumps({"prompt": [1, 2], "response": [3]})
        + '\n\n{"prompt": "a b", "response": "a b"}\n'
    )
    ids, texts = read_pairs(file, lm)
    assert (
        ids == ([1, 2], [3]) and texts[1][-1] == lm.config.eos_id and len(texts[0]) > len(texts[1])
    )
    assert len(read_pairs(file, lm, 1)) == 1
    for line, sentence in (
        ("nonsense", "line 1 is no JSON"),
        ('{"prompt": "a"}', 'line 1 must look like {"prompt"'),
        (
            '{"prompt": [1], "response": [9999]}',
            "line 1: response is .*, but it must be a text or a list of ids",
        ),
        ("", "holds no pairs"),
    ):
        file.write_text(line + "\n")
        with pytest.raises(UserError, match=sentence):
            read_pairs(file, lm)
    file.write_text('{"prompt": "a", "response": [1]}\n')
    with pytest.raises(
        UserError, match="line 1: prompt is a text, but the model's directory has no tokenizer"
    ):
        read_pairs(file, toy())
    with pytest.raises(UserError, match="cannot be read"):
        read_pairs(tmp_path / "nowhere", lm)
