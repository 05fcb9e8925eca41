"""Chat messages: one sentence for a wrong one, files, and the chat template."""

from __future__ import annotations

import json
import re

import pytest

from xflow_jax.errors import UserError
from xflow_jax.tokenizer import check_messages, read_messages, with_system

USER = {"role": "user", "content": "a"}
ANSWER = {"role": "assistant", "content": ""}
SYSTEM = {"role": "system", "content": "Be short."}


@pytest.mark.parametrize("chat", [[USER], [SYSTEM, USER], [SYSTEM, USER, ANSWER, USER]])
def test_right_chats_are_returned(chat):
    assert check_messages(tuple(chat), "it") == chat


WRONG = [
    (USER, "it must be a list of messages, not {'role': 'user', 'content': 'a'}"),
    ([], "it is empty: give at least one message of the user"),
    ([USER, ANSWER], "it: the last message is of the role assistant, but must be user"),
    ([SYSTEM], "it: the last message is of the role system, but must be user"),
    ([USER, SYSTEM, USER], "it: message 2 is a system message, but only the first may be one"),
    ([USER, "a"], 'it: message 2 must be an object {"role": ..., "content": ...}, not \'a\''),
    ([{"role": "user"}], "it: message 1 has no content"),
    ([{}], "it: message 1 has no role and no content"),
    ([USER | {"name": "b"}], "it: message 1 has the unknown key 'name': leave it out"),
    (
        [USER | {"role": "tool"}],
        "it: message 1 has the role 'tool', but it must be system, user or assistant",
    ),
    ([USER | {"role": ["user"]}], "it: message 1 has the role ['user'], but it must be system"),
    ([USER | {"content": None}], "it: message 1 has the content None, but it must be a text"),
    ([USER | {"content": " \n"}], "it: message 1 has an empty content"),
]


@pytest.mark.parametrize(("chat", "sentence"), WRONG)
def test_wrong_chats_are_one_sentence(chat, sentence):
    with pytest.raises(UserError, match=f"^{re.escape(sentence)}"):
        check_messages(chat, "it")


def test_files_of_messages(tmp_path):
    chat = [SYSTEM, USER]
    for name, text in {
        "list.json": json.dumps(chat),
        "body.json": json.dumps({"messages": chat, "model": "tiny"}),
        "lines.jsonl": "\n".join(map(json.dumps, chat)),
    }.items():
        (tmp_path / name).write_text(text)
        assert read_messages(tmp_path / name) == chat
    for name, text, sentence in (
        ("a.json", "", "not valid JSON: it is empty"),
        ("b.json", "{}", "b.json must be a list of messages, not {}"),
        ("c.jsonl", "[1", "line 1 is no JSON"),
        ("d.jsonl", json.dumps(ANSWER), "d.jsonl: the last message is of the role assistant"),
        ("e.jsonl", "", "e.jsonl is empty"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=sentence):
            read_messages(tmp_path / name)
    with pytest.raises(UserError, match="cannot be read: No such file"):
        read_messages(tmp_path / "nowhere.json")


def test_a_system_prompt_comes_first_and_once():
    assert with_system([USER], "Be short.") == [SYSTEM, USER] and with_system([USER], None) == [
        USER
    ]
    with pytest.raises(UserError, match="begin with a system prompt already"):
        with_system([SYSTEM, USER], "Be long.")
