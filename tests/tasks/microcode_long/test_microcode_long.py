"""Microcode-long: its split, its many right answers, its words, and its checks."""

from __future__ import annotations

import dataclasses
import hashlib
import random

import pytest

from tests.helpers import TOKENIZER
from xflow_jax.cli import main
from xflow_jax.decoding import Threshold, generate
from xflow_jax.errors import UserError
from xflow_jax.lm import BUNDLED, load
from xflow_jax.sandbox.pool import run_many
from xflow_jax.tasks import microcode_long
from xflow_jax.tasks.base import find_problem, find_tasks, get_task
from xflow_jax.tasks.generated import is_held_out
from xflow_jax.tasks.microcode.words import split_words
from xflow_jax.tasks.microcode_long.language import CASES, NUMBERS
from xflow_jax.tokenizer import chat_ids

TASK = microcode_long.TASK
TOKENIZER_DIGEST = "10c2178f07a7617cd43426e0e0f8e4808016bb1027dddfd37064ff86c13b74ca"
PROMPT_LENGTH = 96  # of configs/pretrain_small.toml
FEWEST = 12  # of 16 requests: tiny-long solves 91 % of 512


def result(problem: microcode_long.Problem, xs: list[int]) -> object:
    try:
        return problem.solve(xs)
    except (IndexError, ValueError):
        return "none"


@pytest.fixture(scope="module")
def held_out():
    return TASK.problems(None, 220)


@pytest.fixture(scope="module")
def pairs():
    return [microcode_long.training_pair(0, index) for index in range(120)]


@pytest.mark.parametrize(
    ("early", "digest"),
    [
        (False, "4d60a5584297168d1499f6c6303b33525d39a864040eaecb372b1ac622edd17e"),
        (True, "46c43b78ccc9db0ab81d7accd4aea073c3e3c15819b23da478e3b23d96e3d6db"),
    ],
)
def test_the_training_set_stays_as_it_is(early, digest):
    pairs = [microcode_long.training_pair(0, index, early) for index in range(40)]
    assert hashlib.sha256(repr(pairs).encode()).hexdigest() == digest
    assert microcode_long.training_pair(1, 0, early) != pairs[0]


def test_pairs_of_the_usual_style_follow_their_request(pairs):
    """A statement for each operation, in its order, and f before solve."""
    for _, answer in pairs[:20]:
        assert answer.startswith("def f(x):") and "\n\ndef solve(xs):" in answer
        assert "for" not in answer.replace(" for x in xs", "")
    jobs = [TASK.job(microcode_long.parse(request), answer) for request, answer in pairs[:20]]
    assert all(result.passed for result in run_many(jobs))


def test_the_tokenizer_of_the_bundled_models_stays_as_it_is():
    for folder in BUNDLED.values():
        content = (folder / "tokenizer.json").read_bytes()
        assert hashlib.sha256(content).hexdigest() == TOKENIZER_DIGEST


def test_the_bundled_model_answers_held_out_requests(held_out):
    """Its defaults are the lengths and blocks that the task gives."""
    lm, problems, length = load("tiny-long"), held_out[:16], TASK.config.gen_length
    assert TASK in find_tasks(lm.tasks)
    assert lm.config.default_block_length == TASK.config.block_length
    prompts = [chat_ids(TOKENIZER, problem.prompt) for problem in problems]
    out = generate(lm, prompts, Threshold(tau=0.98), length, length)
    jobs = [TASK.job(*pair) for pair in zip(problems, out.texts, strict=True)]
    assert sum(result.passed for result in run_many(jobs)) >= FEWEST


def test_words_are_tokens_and_lengths_fit(held_out, pairs):
    answers = [TASK.canonical(problem) for problem in held_out]
    requests = [problem.prompt for problem in held_out] + [request for request, _ in pairs]
    answers += [answer for _, answer in pairs]
    words = {word for text in (*requests, *answers) for word in split_words(text)}
    assert len(words) > 150
    assert not [word for word in words if len(TOKENIZER(word)["input_ids"]) > 1]
    for text in (requests[0], answers[0]):
        assert len(TOKENIZER(text)["input_ids"]) == len(split_words(text))
    assert all(60 <= len(split_words(answer)) < TASK.config.gen_length for answer in answers)
    assert max(len(chat_ids(TOKENIZER, request)) for request in requests) <= PROMPT_LENGTH


def test_held_out_compositions_are_many_and_never_trained_on(held_out, pairs):
    compositions = {problem.composition for problem in held_out}
    assert len(compositions) >= 200 and all(map(is_held_out, compositions))
    trained = {microcode_long.parse(request).composition for request, _ in pairs}
    assert not any(map(is_held_out, trained)) and len(trained) > 100
    ids = {TASK.task_id(problem) for problem in held_out}
    assert len(ids) == len({problem.prompt.lower() for problem in held_out}) == len(held_out)
    assert TASK.problems(None, 10) == held_out[:10]
    assert TASK.training(None, 10) != held_out[:10]


def test_requests_have_three_or_four_operations_and_two_functions(held_out):
    kinds = {"variable": 0, "guard": 0, "condition": 0, "four": 0}
    for problem in held_out:
        operations = [kind for kind, _ in problem.steps if not kind.startswith("let ")]
        assert len(operations) in (3, 4) and operations.count("call") == 1
        assert problem.guard or problem.condition
        kinds["variable"] += len(problem.steps) > len(operations)
        kinds["guard"] += problem.guard is not None
        kinds["condition"] += problem.condition is not None
        kinds["four"] += len(operations) == 4
    assert all(count > 0.25 * len(held_out) for count in kinds.values()), kinds


def test_reference_answers_pass_and_wrong_ones_fail(held_out):
    jobs = [TASK.job(problem, TASK.canonical(problem)) for problem in held_out[:60]]
    assert [result.reason for result in run_many(jobs)] == ["passed"] * len(jobs)
    problem = microcode_long.parse(TASK.example)
    right = (
        "def f(x):\n    if x % 2 == 1:\n        return x\n    return x * 4\n\n"
        "def solve(xs):\n    n = min(xs)\n    return [f(x - 3) for x in xs if x > n]"
    )
    first, second = right.split("\n\n")
    answers = {
        right: "passed",
        f"{second}\n\n{first}": "passed",  # in the other order
        right.replace("> n", "> 2"): "wrong answer",
        right.replace("x - 3", "x"): "wrong answer",
        # Each function is judged, also if the other one does not need it.
        right.replace("return x * 4", "return x * 5"): "wrong answer: for",
        first: "wrong answer: the answer defines no function solve",
        second: "wrong answer: the answer defines no function f",
        second.replace("n = min(xs)", "n = total"): "wrong answer: the answer defines no",
        right.replace("def f(", "def solve("): "wrong answer: the answer defines no function f",
        right.replace("n = min(xs)", "n = total"): "error: NameError",
        "": "wrong answer",
    }
    results = run_many([TASK.job(problem, text) for text in answers])
    for (text, reason), result in zip(answers.items(), results, strict=True):
        assert result.reason.startswith(reason), (text, result)
    parts = TASK.parts(problem, right.replace("> n", "> 2"))
    passed = [result.passed for result in run_many(parts)]
    assert len(passed) == CASES + 1 and passed[0] and 0 < sum(passed) < len(passed)


def test_a_problem_has_many_right_answers(held_out):
    problem = held_out[0]
    answers = {microcode_long.sample_answer(random.Random(seed), problem) for seed in range(60)}
    assert len(answers) > 50
    assert all(result.passed for result in run_many([TASK.job(problem, a) for a in answers]))
    firsts = {answer.splitlines()[0].partition("(")[0] for answer in answers}
    assert firsts == {"def f", "def solve"}
    assert any("append" in answer for answer in answers)


def test_every_part_of_a_problem_counts(held_out):
    for problem in held_out[:60]:
        assert problem.is_sound() and len(problem.cases()) == CASES
        results = {repr(want) for _, want in problem.cases()}
        assert len(results) >= 4
        for name in ("guard", "condition"):
            if getattr(problem, name) is not None:
                without = dataclasses.replace(problem, **{name: None})
                both = [(problem.call(x), without.call(x)) for x in NUMBERS]
                both += [(want, result(without, xs)) for xs, want in problem.cases()]
                assert sum(a != b for a, b in both) > 1, problem.prompt


def test_prompts_are_read_back(held_out):
    fields = ("maps", "guard", "steps", "condition", "reduction")
    for problem in held_out:
        read = microcode_long.parse("  " + problem.prompt.upper().replace(" ", "\n ") + " ")
        assert [getattr(read, f) for f in fields] == [getattr(problem, f) for f in fields]
        assert TASK.respell(problem.prompt.lower().rstrip(".")) == problem.prompt
        assert find_problem(problem.prompt)[0] is TASK
    begin = "Write a function f to square a number, and a function solve to "
    steps = "sort them, take f of each number, take the first 2"
    assert microcode_long.parse(f"{begin}{steps} and return the sum.") is not None
    for other in (
        "",
        "A joke, please.",
        "Keep the odd numbers and return the sum.",
        f"{begin}sort them and take the first 2 and return the sum.",
        f"{begin}{steps}.",
        f"{begin}{steps}, add n to each number and return the sum.",
        f"{begin}make n the sum, {steps}, take remainders by n and return the sum.",
        f"{begin}make n the sum, make n the count, {steps} and return the sum.",
        f"{begin}{steps}, for a sum above 5 return n, then return the sum.",
        f"{begin}{steps.replace('2', '9')} and return the sum.",
        f"{begin.replace('square a number', 'double a number')}{steps} and return the sum.",
        f"{begin.replace('number,', 'number, and to return 7 for odd numbers,')}{steps} and return"
        " the sum.",
    ):
        assert microcode_long.parse(other) is None, other
        assert TASK.respell(other) is None


def test_the_example_is_held_out():
    problem = microcode_long.parse(TASK.example)
    assert problem.is_sound() and is_held_out(problem.composition)
    assert TASK.respell(TASK.example) == TASK.example


def test_the_task_has_a_name_with_a_dash():
    assert get_task("microcode-long") is TASK
    hash(TASK)
    with pytest.raises(UserError, match="did you mean microcode-long"):
        get_task("microcode_lng")
    with pytest.raises(UserError, match="microcode-long generates its problems"):
        TASK.problems("f.jsonl", None)


@pytest.mark.parametrize("limit", ["64", pytest.param("2048", marks=pytest.mark.slow)])
def test_all_reference_answers_pass(capsys, limit):
    command = ["evaluate", "--task", "microcode-long", "--canonical", "--limit", limit]
    assert main.main(command) == 0
    printed = capsys.readouterr().out
    assert "100.0" in printed and "failed" not in printed
