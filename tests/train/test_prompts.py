"""Tests of the prompts of self-generation: formats and bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from train import prompts, self_generate
from train.prompts import read_conversations, read_dialogues
from xflow_jax.errors import UserError

CONFIG = Path(__file__).parents[2] / "configs/self_generate_tiny.toml"
ASKED = [{"role": "user", "content": "Why?"}]


def write(path, *records):
    path.parent.mkdir(exist_ok=True)
    path.write_text(
        "".join(
            record if isinstance(record, str) else json.dumps(record) + "\n" for record in records
        )
    )
    return str(path)


def test_prompts_and_messages_up_to_the_assistants_turn(tmp_path):
    # As in the files of Tulu 3: an id, the prompt, and a conversation with an answer.
    tulu = {
        "id": "a",
        "prompt": "Why?",
        "messages": [*ASKED, {"role": "assistant", "content": "Because."}],
    }
    turns = [*ASKED, {"role": "assistant", "content": "Because."}, *ASKED]
    file = write(
        tmp_path / "a.jsonl",
        {"prompt": "How?"},
        tulu,
        {"messages": turns, "prompt": "no"},
        {"prompt": turns},
    )
    assert list(read_conversations(file)) == [
        [{"role": "user", "content": "How?"}],
        ASKED,
        turns,
        turns,
    ]


def test_parquet_and_folders(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (tmp_path / "data").mkdir()
    messages = [[*ASKED, {"role": "assistant", "content": "Because."}], ASKED]
    parquet.write_table(pyarrow.table({"messages": messages}), tmp_path / "data/train-0.parquet")
    write(tmp_path / "data/train-1.jsonl", {"prompt": "How?"})
    (tmp_path / "README.md").write_text("not data")
    assert list(read_conversations(str(tmp_path))) == [
        ASKED,
        ASKED,
        [{"role": "user", "content": "How?"}],
    ]


def test_a_name_of_the_hub_is_its_jsonl_and_parquet_files(tmp_path, monkeypatch):
    write(tmp_path / "b/test.jsonl", {"prompt": "How?", "response": "So."})
    (tmp_path / "README.md").write_text("not data")
    calls = []
    monkeypatch.setattr(prompts, "download_from_hub", lambda *a: calls.append(a) or tmp_path)
    ((where, turns),) = read_dialogues("someone/talks")
    assert where == f"{tmp_path / 'b/test.jsonl'}, line 1"
    assert [turn["content"] for turn in turns] == ["How?", "So."]
    assert calls == [("someone/talks", "dataset", "file", ["*.jsonl", "*.parquet"])]


def test_bad_parquet_files_are_named_with_their_record(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    file = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"prompt": ["a", "b"], "response": ["c", None]}), file)
    with pytest.raises(UserError, match="a.parquet, record 2 has a `prompt`, but no text under"):
        list(read_dialogues(str(file)))
    file.write_bytes(b"PAR1")
    with pytest.raises(UserError, match="a.parquet: cannot be read after 0 records: "):
        list(read_dialogues(str(file)))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "no prompts in it"),
        ('{"prompt": "a"}\nnot json\n{"prompt": "b"}\n', "a.jsonl, line 2 is no JSON"),
        ('{"text": "a"}\n', "line 1 has neither `messages` nor `prompt`"),
        ('["a"]\n', "line 1 has neither `messages` nor `prompt`"),
        ('{"prompt": ["a"]}\n', "line 1: each of its messages must have a role and a content"),
        (
            '{"messages": [{"role": "user"}]}\n',
            "line 1: each of its messages must have a role and a content",
        ),
        (
            '{"messages": [{"role": "assistant", "content": "a"}]}\n',
            "line 1: its messages hold no request",
        ),
    ],
)
def test_bad_files(tmp_path, text, sentence):
    with pytest.raises(UserError) as error:
        list(read_conversations(write(tmp_path / "a.jsonl", text)))
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_missing_files(tmp_path):
    with pytest.raises(UserError, match="none.jsonl: there is no such file"):
        list(read_conversations(str(tmp_path / "none.jsonl")))
    with pytest.raises(UserError, match="there is no .jsonl or .parquet file in it"):
        list(read_conversations(str(tmp_path)))
    # Tests have no network, which is one sentence and no traceback of a library.
    with pytest.raises(
        UserError, match="allenai/tulu.*: there is no such file here, and the hub cannot be reached"
    ):
        list(read_conversations("allenai/tulu-3-sft-personas-code"))


def test_prompts_that_are_too_long_are_left_out(tmp_path, capsys):
    class Words:
        chat_template = "x"

        def apply_chat_template(self, messages, **_):
            return [len(word) for word in messages[0]["content"].split()]

    file = write(
        tmp_path / "a.jsonl",
        {"prompt": "one two three"},
        {"prompt": "four"},
        {"prompt": "five six"},
    )
    config = self_generate.SelfGenerateConfig("tiny", file, "out.jsonl", longest_prompt=2)
    assert self_generate.read_prompts(config, Words()) == {1: [4], 2: [4, 3]}
    assert "1 of 3 prompts have more than 2 tokens" in capsys.readouterr().out
    config = self_generate.SelfGenerateConfig("tiny", file, "out.jsonl", limit=1, longest_prompt=2)
    with pytest.raises(UserError, match="all of its 1 prompts are longer than 2 tokens"):
        self_generate.read_prompts(config, Words())


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("prompts=none.jsonl", "none.jsonl: there is no such file"),
        ("gen_length=0", "gen_length is 0, but it must be at least 1"),
        ("limit=0", "microcode's training set has no end"),
        ("dtype=int8", 'dtype is "int8", but it must be one of "float32", "bfloat16"'),
        ("gen_length=256", "exceed the model's 256 positions"),
        ("block_length=10", "gen_length 48 is not a whole number of blocks of 10"),
        ("model=none/such", "none/such: there is no such directory here"),
    ],
)
def test_a_bad_configuration_is_one_sentence_before_any_device_work(
    tmp_path, monkeypatch, override, sentence
):
    monkeypatch.setattr(
        self_generate, "load", lambda *_, **__: pytest.fail("the parameters were read")
    )
    with pytest.raises(UserError) as error:
        self_generate.main(str(CONFIG), [f"out={tmp_path / 'a.jsonl'}", "limit=4", override])
    assert sentence in str(error.value) and "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_another_number_of_processes_does_not_answer_again(tmp_path):
    (tmp_path / "a.00000-of-00002.jsonl").write_text("")
    with pytest.raises(UserError, match="was written by another number of processes than 1"):
        self_generate.main(str(CONFIG), [f"out={tmp_path / 'a.jsonl'}", "limit=2"])
