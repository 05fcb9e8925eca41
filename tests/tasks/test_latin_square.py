"""Latin squares: their split, solver, words, and checks."""

from __future__ import annotations

import collections
import hashlib
import random

import pytest

from tests.helpers import TOKENIZER
from xflow_jax.cli import main
from xflow_jax.decoding import Threshold, generate
from xflow_jax.errors import UserError
from xflow_jax.lm import load
from xflow_jax.sandbox.pool import run_many
from xflow_jax.tasks import latin_square
from xflow_jax.tasks.base import find_problem, find_tasks, get_task
from xflow_jax.tasks.generated import is_held_out
from xflow_jax.tasks.microcode.words import split_words
from xflow_jax.tokenizer import chat_ids

TASK = latin_square.TASK
PROMPT_LENGTH = 64  # of configs/pretrain_small.toml
FEWEST = 13  # of 16 requests: tiny-squares solves 95.9 % of 2,048 at full budget
# Two of its blanks are 1 and 2 in either order.
TWO_SOLUTIONS = latin_square.Problem(((0, 0, 3, 4), (0, 0, 4, 3), (3, 4, 1, 2), (4, 3, 2, 1)))


@pytest.fixture(scope="module")
def held_out():
    return TASK.problems(None, 300)


@pytest.fixture(scope="module")
def pairs():
    return [latin_square.training_pair(0, index) for index in range(300)]


def blanks(prompt: str) -> tuple[int, int]:
    """Returns (size, number of blanks)."""
    rows = prompt.splitlines()[1:]
    return len(rows), sum(row.count("0") for row in rows)


def assert_latin(rows: list[str]) -> None:
    digits = "".join(map(str, range(1, len(rows) + 1)))
    for line in (*rows, *map("".join, zip(*rows, strict=True))):
        assert "".join(sorted(line)) == digits


def test_the_training_set_stays_as_it_is(pairs):
    digest = "bd2a2cde8bb13ed26cd7c081ee2543ca578bddfa6ec19c5fa5a38a7a0b3ba19b"
    assert hashlib.sha256(repr(pairs[:100]).encode()).hexdigest() == digest


def test_training_pairs_are_solved_squares(pairs):
    for request, answer in pairs:
        rows, solved = request.splitlines()[1:], answer.splitlines()
        assert_latin(solved)
        for row, full in zip(rows, solved, strict=True):
            assert all(a in ("0", b) for a, b in zip(row, full, strict=True))


def test_sizes_and_blanks_are_spread_evenly(pairs):
    found = collections.Counter(blanks(request)[0] for request, _ in pairs)
    assert set(found) == {4, 5, 6} and min(found.values()) > 70
    shares = [count / size**2 for size, count in (blanks(request) for request, _ in pairs)]
    assert 0.2 < min(shares) < 0.27 and 0.85 < max(shares) <= 0.9
    assert 0.53 < sum(shares) / len(shares) < 0.62
    early = [blanks(latin_square.training_pair(0, index, True)[0]) for index in range(100)]
    assert {1, 4} <= {count for size, count in early if size == 4} <= {1, 2, 3, 4}
    assert all(1 <= count <= size**2 // 4 for size, count in early)


def test_words_are_tokens_and_lengths_fit(held_out, pairs):
    texts = [problem.prompt for problem in held_out] + [text for pair in pairs for text in pair]
    words = {word for text in texts for word in split_words(text)}
    assert not [word for word in words if len(TOKENIZER(word)["input_ids"]) > 1]
    longest = max(texts, key=lambda text: len(split_words(text)))
    assert len(TOKENIZER(longest)["input_ids"]) == len(split_words(longest))
    assert len(chat_ids(TOKENIZER, longest)) == 63 < PROMPT_LENGTH
    assert max(len(split_words(answer)) for _, answer in pairs) < 48


def test_held_out_problems_are_never_trained_on(held_out, pairs):
    assert all(is_held_out(problem.prompt) for problem in held_out)
    assert not any(is_held_out(request) for request, _ in pairs)
    assert not any(is_held_out(p.prompt) for p in TASK.training(None, 50))
    ids = {TASK.task_id(problem) for problem in held_out}
    assert len(ids) == len({problem.prompt for problem in held_out}) == len(held_out)
    assert TASK.problems(None, 10) == held_out[:10]


def test_there_are_2048_held_out_problems():
    assert len({problem.prompt for problem in TASK.problems(None, None)}) == 2048


def test_the_solver():
    empty = ((0,) * 5,) * 5
    assert latin_square.complete(empty) == latin_square.complete(empty)
    drawn = {latin_square.complete(empty, random.Random(seed)) for seed in range(20)}
    assert len(drawn) == 20
    for square in drawn:
        assert_latin(["".join(map(str, row)) for row in square])
    # A digit twice in a line, or a blank that no digit can fill.
    for wrong in (
        ((1, 1, 0, 0), (0,) * 4, (0,) * 4, (0,) * 4),
        ((1, 0, 0, 0), (1, 0, 0, 0), (0,) * 4, (0,) * 4),
        ((1, 2, 3, 0), (0, 0, 0, 4), (0,) * 4, (0,) * 4),
    ):
        assert latin_square.complete(wrong) is None
    # Every square of size 4 is drawn.
    squares = {latin_square.draw_square(random.Random(seed), 4) for seed in range(4000)}
    assert len(squares) > 570


def test_every_solution_is_accepted_and_nothing_else():
    problem = TWO_SOLUTIONS
    first = "1234\n2143\n3412\n4321"
    second = first.replace("1234\n2143", "2134\n1243")
    assert TASK.canonical(problem) in (first, second)
    answers = {
        first: "passed",
        second: "passed",
        f"```\n{first}\n```": "passed",
        "\n" + first.replace("\n", "  \n\n") + "\n": "passed",
        "1 2 3 4\n2 1 4 3\n3 4 1 2\n4 3 2 1": "passed",
        first.replace("2143", "1243"): "wrong answer: [1, 1, 3, 4] in a column",
        first.replace("2143", "2243"): "wrong answer: [2, 2, 4, 3] in a row",
        # A Latin square with other digits than the given ones.
        "2143\n1234\n3412\n4321": "wrong answer: a given digit has changed in",
        first[:-1]: "wrong answer: the answer has no 4 rows of 4 digits",
        first + "1": "wrong answer: the answer has no 4 rows of 4 digits",
        first + "\n1234": "wrong answer: the answer has no 4 rows of 4 digits",
        first.replace("1", "x"): "error: ValueError",
        "": "wrong answer: the answer has no 4 rows",
        "']\nimport os\n['": "error",
    }
    results = run_many([TASK.job(problem, text) for text in answers])
    for (text, reason), result in zip(answers.items(), results, strict=True):
        assert result.reason.startswith(reason), (text, result)
    parts = TASK.parts(problem, first.replace("2143", "1243"))
    passed = [result.passed for result in run_many(parts)]
    assert len(passed) == 9 and passed.count(False) == 2 and passed[0]


def test_prompts_are_read_back(held_out):
    for problem in held_out[:100]:
        assert latin_square.parse(problem.prompt.upper().replace("\n", "  ")) == problem
        assert TASK.respell(problem.prompt.lower()) == problem.prompt
    assert find_problem(held_out[0].prompt) == (TASK, held_out[0])
    begin = "Make a square of distinct numbers from 1 to "
    assert latin_square.parse(f"{begin}4:\n1 2 3 4 0000 0000 0000") is not None
    for other in (
        "",
        "Make a joke.",
        f"{begin}3:\n000\n000\n000",
        f"{begin}4:\n0000\n0000\n0000",
        f"{begin}4:\n0000\n0000\n0000\n0005",
        f"{begin}4:\n0000\n0000\n0000\n000x",
        f"{begin}5:\n0000\n0000\n0000\n0000",
    ):
        assert latin_square.parse(other) is None and TASK.respell(other) is None


def test_a_request_without_a_solution_has_no_case():
    assert TASK.case(TWO_SOLUTIONS)[0] == ["0034", "0043", "3412", "4321"]
    impossible = latin_square.parse(
        "Make a square of distinct numbers from 1 to 4: 1100 0000 0000 0000"
    )
    assert TASK.case(impossible) is None and TASK.canonical(impossible) == ""


def test_the_example_is_held_out_and_has_one_solution():
    problem = latin_square.parse(TASK.example)
    assert problem.prompt == TASK.example and is_held_out(TASK.example)
    solutions = {latin_square.complete(problem.clues, random.Random(seed)) for seed in range(20)}
    assert len(solutions) == 1 and None not in solutions


def test_the_bundled_model_answers_held_out_requests(held_out):
    lm, problems, length = load("tiny-squares"), held_out[:16], TASK.config.gen_length
    assert TASK in find_tasks(lm.tasks)
    prompts = [chat_ids(TOKENIZER, problem.prompt) for problem in problems]
    rule = Threshold(tau=0.95, early_exit=True)  # at most 27 passes here
    out = generate(lm, prompts, rule, length, length, block_length=length)
    jobs = [TASK.job(*pair) for pair in zip(problems, out.texts, strict=True)]
    assert sum(result.passed for result in run_many(jobs)) >= FEWEST


def test_bad_input():
    assert get_task("latin-square") is TASK
    hash(TASK)
    with pytest.raises(UserError, match="did you mean latin-square"):
        get_task("latin")
    with pytest.raises(UserError, match="latin-square generates its problems"):
        TASK.problems("f.jsonl", None)


@pytest.mark.parametrize("limit", ["64", pytest.param("2048", marks=pytest.mark.slow)])
def test_all_reference_answers_pass(capsys, limit):
    command = ["evaluate", "--task", "latin-square", "--canonical", "--limit", limit]
    assert main.main(command) == 0
    printed = capsys.readouterr().out
    assert "100.0" in printed and "failed" not in printed
