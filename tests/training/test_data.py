"""Tests of training data: pairs of tasks, and responses of files."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.helpers import TOKENIZER, TOY
from xflow_jax.errors import UserError
from xflow_jax.tasks import get_task, microcode
from xflow_jax.training.batches import batch_iterator
from xflow_jax.training.data import MixedPairs, Responses, TaskPairs, read_lines, read_records

ROOT = Path(__file__).parents[2]


def write_responses(path: Path, rows: int) -> Path:
    lines = [{"prompt_ids": [i % 20], "response_ids": [i % 20, 3]} for i in range(rows)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_training_is_imported_without_grain():
    code = "import sys; sys.modules['grain'] = None; import xflow_jax.training"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_microcode_pairs_fit_and_are_distinct():
    source = TaskPairs(microcode.TASK, 0, TOKENIZER, prompt_length=24, gen_length=32, early=5)
    examples = [source[i] for i in range(20)]
    for example in examples:
        assert example["prompt"].shape == example["prompt_mask"].shape == (24,)
        assert example["response"].shape == (32,)
        assert example["response"][-1] == TOKENIZER.eos_token_id
    texts = {example["prompt"].tobytes() + example["response"].tobytes() for example in examples}
    assert len(texts) == 20


def test_pairs_that_do_not_fit_are_refused_at_the_start():
    task = get_task("microcode-long")
    TaskPairs(task, 0, TOKENIZER, 96, 128).check_lengths(20)
    for lengths in ((60, 128), (96, 80)):
        with pytest.raises(UserError) as error:
            TaskPairs(task, 0, TOKENIZER, *lengths).check_lengths(20)
        needs = re.search(r"They need (\d+) and (\d+)\.$", str(error.value))
        assert str(error.value).startswith("microcode-long: ") and needs
        TaskPairs(task, 0, TOKENIZER, int(needs[1]), int(needs[2])).check_lengths(20)
    with pytest.raises(UserError, match="the task mbpp has no endless training set"):
        TaskPairs(get_task("mbpp"), 0, TOKENIZER, 96, 128)


def test_every_batch_of_a_mixture_is_of_one_task():
    tasks = [get_task("microcode"), get_task("latin-square")]
    sources = [
        TaskPairs(task, 3, TOKENIZER, prompt, 48)
        for task, prompt in zip(tasks, (40, 64), strict=True)
    ]
    mixed = MixedPairs(sources, [1.0, 3.0], batch_size=4, seed=3)
    data = batch_iterator(mixed, 4)
    order = [mixed.choose(batch) for batch in range(400)]
    assert 250 < sum(order) < 350
    for number in order[:8]:
        batch = next(data)
        assert batch["prompt"].shape == (4, (40, 64)[number])
        assert batch["response"].shape == (4, 48)
    after = batch_iterator(mixed, 4)
    after.set_state(data.get_state())
    np.testing.assert_array_equal(next(after)["prompt"], next(data)["prompt"])
    # A pair of a mixture is the pair of its task at the same index.
    first = order.index(1) * 4
    np.testing.assert_array_equal(mixed[first]["prompt"], sources[1][first]["prompt"])
    assert [MixedPairs(sources, [1.0, 3.0], 4, 4).choose(batch) for batch in range(400)] != order


def test_responses_are_padded_with_eos(tmp_path):
    source = Responses([write_responses(tmp_path / "a.jsonl", 3)], TOY, 4, 5)
    example = source[1]
    assert example["prompt"].tolist() == [TOY.pad_id] * 3 + [1]
    assert example["prompt_mask"].tolist() == [False] * 3 + [True]
    assert example["response"].tolist() == [1, 3] + [TOY.eos_id] * 3


def test_answers_of_a_task_follow_those_of_files(tmp_path):
    file = write_responses(tmp_path / "a.jsonl", 3)
    pairs = TaskPairs(microcode.TASK, 1, TOKENIZER, prompt_length=24, gen_length=32)
    source = Responses([file], TOY, 24, 32, limit=6, pairs=pairs)
    assert len(source) == 9
    np.testing.assert_array_equal(source[4]["response"], pairs[1]["response"])
    every = [source[i]["prompt"].tobytes() for i in range(9)]
    (held_out,) = source.hold_out(3, 3)
    left = [source[i]["prompt"].tobytes() for i in range(6)]
    assert sorted(left + [example["prompt"].tobytes() for example in held_out]) == sorted(every)


def test_patterns_name_files_in_order(tmp_path):
    for name, rows in (("b.jsonl", 2), ("a.jsonl", 1)):
        write_responses(tmp_path / name, rows)
    assert len(Responses([tmp_path / "*.jsonl"], TOY, 4, 5)) == 3
    with pytest.raises(UserError, match="cannot be read"):
        Responses([tmp_path / "none*.jsonl"], TOY, 4, 5)


def test_workers_files_beside_the_merged_one_are_refused(tmp_path):
    share, merged = tmp_path / "a.00000-of-00002.jsonl", tmp_path / "a.jsonl"
    for file in (share, merged):
        file.write_text('{"prompt_ids": [1], "response_ids": [2]}\n')
    sentence = f"^{merged} is made of {share}, so their responses would count twice. "
    with pytest.raises(UserError, match=sentence):
        Responses([tmp_path / "a*.jsonl"], TOY, 4, 5)
    assert len(Responses([tmp_path / "a.*-of-*.jsonl"], TOY, 4, 5)) == 1


def test_a_cut_last_line_is_left_out_but_a_bad_line_is_not(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"a": 1}\n{"a": 2')
    assert read_lines(file) == ['{"a": 1}']
    assert list(read_records(file)) == [(f"{file}, line 1", {"a": 1})]
    file.write_text('{"a": 1}\n{"a": 2\n')
    with pytest.raises(UserError, match="a.jsonl, line 2 is no JSON"):
        list(read_records(file))
