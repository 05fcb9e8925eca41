"""Tokenizer, chat template and padding against those of the original."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.helpers import GOLDENS
from xflow_jax.errors import UserError
from xflow_jax.tokenizer import chat_ids, decode_responses, load_tokenizer, pad_left

DIR = GOLDENS / "llada_tiny"


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(DIR)


@pytest.fixture(scope="module")
def golden():
    return json.loads((DIR / "tokenizer_golden.json").read_text())


def test_sizes_and_special_ids(tokenizer, golden):
    assert len(tokenizer) == golden["len_tokenizer"]
    assert {
        name: tokenizer.convert_tokens_to_ids(name) for name in golden["special_ids"]
    } == golden["special_ids"]
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == 481


def test_encodings(tokenizer, golden):
    for case in golden["encodings"]:
        assert tokenizer(case["text"])["input_ids"] == case["ids"]
        assert tokenizer.decode(case["ids"]) == case["decoded"]
        assert (
            tokenizer.decode(case["ids"], skip_special_tokens=True) == case["decoded_skip_special"]
        )


def test_chats(tokenizer, golden):
    assert golden["chats"]
    for case in golden["chats"]:
        assert chat_ids(tokenizer, case["messages"]) == case["ids"]
        if len(case["messages"]) == 1 and case["messages"][0]["role"] == "user":
            assert chat_ids(tokenizer, case["messages"][0]["content"]) == case["ids"]


def test_left_padding(tokenizer, golden):
    wanted = golden["left_padded"]
    rows = [tokenizer(text)["input_ids"] for text in wanted["texts"]]
    ids, mask = pad_left(rows, tokenizer.pad_token_id)
    np.testing.assert_array_equal(ids, wanted["input_ids"])
    np.testing.assert_array_equal(mask, wanted["attention_mask"])
    assert ids.dtype == np.int32 and mask.dtype == bool
    wide, mask = pad_left(rows, 5, length=11)
    assert wide.shape == (2, 11) and (wide[:, :3] == 5).all()
    np.testing.assert_array_equal(mask.sum(1), [len(row) for row in rows])


def test_responses_end_at_their_first_eos(tokenizer, golden):
    ids = golden["encodings"][0]["ids"][:6]
    eot = golden["special_ids"]["<|eot_id|>"]
    rows = np.array([[*ids, 481, 481], [*ids, eot, 7], [481] * 8, [*ids, 7, 7]])
    text = tokenizer.decode(ids)
    more = [text + tokenizer.decode([7] * n) for n in (1, 2)]
    assert decode_responses(tokenizer, rows, (481,)) == [text, more[0], "", more[1]]
    assert decode_responses(tokenizer, rows, (481, eot)) == [text, text, "", more[1]]


def test_a_directory_without_one(tmp_path):
    assert load_tokenizer(tmp_path) is None


@pytest.mark.parametrize("content", ["", "{", '{"model": 3}'])
def test_a_broken_file_is_an_error(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match="tokenizer.json cannot be read as a tokenizer"):
        load_tokenizer(tmp_path)


def test_a_missing_template_is_an_error(tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((DIR / "tokenizer.json").read_bytes())
    with pytest.raises(UserError, match="no chat template"):
        chat_ids(load_tokenizer(tmp_path), "hello")
