"""Evaluation from problems to rows: batches, stored answers, continued runs and errors."""

from __future__ import annotations

import contextlib
import copy
import csv
import dataclasses
import json
import os
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import TOKENIZER, tiny_lm
from xflow_jax.cli import evaluate as cli_evaluate
from xflow_jax.cli import evaluate_run
from xflow_jax.decoding.policy import init_policy
from xflow_jax.decoding.rules.flow import Flow
from xflow_jax.decoding.rules.mask_prediction import MaskPrediction
from xflow_jax.decoding.rules.parsing import parse_rules
from xflow_jax.errors import UserError
from xflow_jax.evaluation import outside_answers, runner
from xflow_jax.evaluation.answers import Answers
from xflow_jax.evaluation.fingerprint import (
    describe_rule,
    describe_task,
    fingerprint,
    hash_file,
)
from xflow_jax.tasks import get_task, microcode
from xflow_jax.tokenizer import chat_ids

TASK = microcode.TASK
SHORT = dataclasses.replace(
    TASK, config=dataclasses.replace(TASK.config, gen_length=8, block_length=4)
)
RULES = parse_rules("mask,flow:power=4")
BUDGETS = [Fraction(1), Fraction(1, 2)]
RULES_OF_ALL_KINDS = (
    *("mask", "mask:order=entropy", "mask:order=margin", "mask:temperature=0.5"),
    *("mask:cfg_scale=1", "threshold", "factor", "eb", "klass:tau=0.5", "softmask", "edit"),
    *("flow", "flow:jump=0.9"),
)
OWN_RULE = """
import numpy as np
from flax import struct
from xflow_jax.decoding import Action, TokenConstraints, static_field

@struct.dataclass
class Own(TokenConstraints):
    weights: object = static_field((1, 2))
    table: object = struct.field(default_factory=lambda: np.arange(3.0))

    def __call__(self, belief, state, step):
        return Action.unmask(step.candidates & (state.t < 1))
"""


@pytest.fixture
def oracle(monkeypatch):
    """Replaces decoding: even problems get right answers, odd ones wrong. Counts its calls."""
    problems = TASK.problems(None, 20)
    texts = {}
    for number, problem in enumerate(problems):
        wrong = "def f(xs):\n    return None"
        texts[tuple(chat_ids(TOKENIZER, problem.prompt))] = (
            wrong if number % 2 else TASK.canonical(problem)
        )
    calls = SimpleNamespace(sizes=[], refresh=[], caches=[], stop_after=None)

    def generate(lm, prompts, rule, gen_length, steps, block_length, seed, refresh, **cache):
        if len(calls.sizes) == calls.stop_after:
            raise KeyboardInterrupt
        calls.sizes.append(len(prompts))
        calls.refresh.append(refresh)
        calls.caches.append(cache)
        passes = np.full(len(prompts), steps)
        rows = [TOKENIZER.encode(texts[tuple(p)], add_special_tokens=False) for p in prompts]
        longest = max(map(len, rows))
        rows = [row + [TOKENIZER.eos_token_id] * (longest - len(row)) for row in rows]
        return SimpleNamespace(tokens=np.asarray(rows), forward_passes=passes)

    monkeypatch.setattr(runner, "generate", generate)
    return calls


def test_every_rule_at_every_budget(oracle):
    lm = tiny_lm()
    cells = runner.make_cells(lm, TASK, RULES, BUDGETS)
    assert [(c.label, c.steps) for c in cells] == [
        (rule, n) for rule in ("mask", "flow:power=4") for n in (48, 24)
    ]
    answers = Answers(None, {})
    rows = runner.evaluate(lm, TASK, TASK.problems(None, 10), cells, answers, batch_size=4)
    assert [(r.rule, r.budget, r.n, r.accuracy, r.forward_passes) for r in rows] == [
        (c.label, str(c.budget), 10, 50.0, c.steps) for c in cells
    ]
    assert oracle.sizes == [4] * 12  # the last batch is filled up: one size, one compilation
    one = answers.select("mask", "1", [TASK.task_id(p) for p in TASK.problems(None, 10)])
    assert [a.passed for a in one] == [True, False] * 5
    assert one[0].reason == "passed" and one[1].reason.startswith("wrong answer")


@pytest.mark.parametrize("after_eos", [False, True])
def test_text_after_eos_counts_only_where_the_protocol_keeps_it(monkeypatch, after_eos):
    problem = TASK.problems(None, 1)[0]
    right = TOKENIZER.encode(TASK.canonical(problem), add_special_tokens=False)
    # The response begins with EOS, so only a protocol that keeps the rest finds the code.
    tokens = np.asarray([[TOKENIZER.eos_token_id, *right]])

    def generate(*_, **__):
        return SimpleNamespace(texts=[""], tokens=tokens, forward_passes=np.ones(1))

    monkeypatch.setattr(runner, "generate", generate)
    task = get_task("microcode", [f"after_eos={str(after_eos).lower()}"])
    cells = runner.make_cells(tiny_lm(), task, parse_rules("mask"), [Fraction(1)])
    rows = runner.evaluate(tiny_lm(), task, [problem], cells, Answers(None, {}), batch_size=1)
    assert rows[0].accuracy == 100.0 * after_eos


def test_a_stopped_run_continues(oracle, tmp_path):
    lm, problems = tiny_lm(), TASK.problems(None, 10)
    cells = runner.make_cells(lm, TASK, RULES, BUDGETS)
    straight = runner.evaluate(lm, TASK, problems, cells, Answers(None, {}), batch_size=4)
    oracle.sizes.clear()
    oracle.stop_after = 5
    with pytest.raises(KeyboardInterrupt):
        runner.evaluate(lm, TASK, problems, cells, Answers(tmp_path, {}), batch_size=4)
    with (tmp_path / "answers.jsonl").open("a") as file:
        file.write('{"task_id": "half a li')
    oracle.stop_after = None
    resumed = runner.evaluate(lm, TASK, problems, cells, Answers(tmp_path, {}), batch_size=4)
    assert len(oracle.sizes) == 12
    again = runner.evaluate(lm, TASK, problems, cells, Answers(tmp_path, {}), batch_size=4)
    assert len(oracle.sizes) == 12 and again == resumed

    def untimed(rows):
        return [dataclasses.replace(row, seconds=0.0, tokens_per_second=0.0) for row in rows]

    assert untimed(resumed) == untimed(straight)
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert len(lines) == len({(a["task_id"], a["rule"], a["budget"]) for a in lines}) == 40


@pytest.mark.slow
def test_a_continued_batch_has_the_shape_of_a_straight_one(oracle, monkeypatch):
    """In bfloat16 the lengths of the other prompts change how sums are rounded."""
    lm, problems = tiny_lm(), TASK.problems(None, 10)
    cells = runner.make_cells(lm, TASK, parse_rules("mask"), [Fraction(1)])
    batches, plain = [], runner.generate

    def generate(lm, prompts, *args, **options):
        batches.append([tuple(prompt) for prompt in prompts])
        return plain(lm, prompts, *args, **options)

    monkeypatch.setattr(runner, "generate", generate)
    answers = Answers(None, {})
    runner.evaluate(lm, TASK, problems, cells, answers, batch_size=4)
    straight = list(batches)
    kept = answers.select("mask", "1", [TASK.task_id(p) for p in problems])
    for missing in (kept[3:], kept[:1] + kept[5:6], kept[9:]):
        batches.clear()
        part = Answers(None, {})
        part.add([answer for answer in kept if answer not in missing])
        runner.evaluate(lm, TASK, problems, cells, part, batch_size=4)
        assert len(part.all()) == 10
        prompts = {tuple(chat_ids(TOKENIZER, p.prompt)): TASK.task_id(p) for p in problems}
        names = {answer.task_id for answer in missing}
        assert batches == [b for b in straight if names & {prompts[row] for row in b}]


def arguments(**given) -> SimpleNamespace:
    """Returns arguments as the command line would parse them."""
    defaults = {
        "task": "microcode",
        "data": None,
        "limit": None,
        "canonical": False,
        "answers": None,
        "out": None,
    }
    defaults |= {
        "model": None,
        "rules": "mask,flow",
        "budgets": "1,1/2",
        "seed": 0,
        "samples": 1,
        "k": 1,
    }
    defaults |= {
        "batch_size": 64,
        "mesh": "1,1,1",
        "dtype": "float32",
        "ablate": False,
        "set": [],
        "base": None,
        "mask_id": None,
        "cache": None,
        "refresh": 0,
        "window": 0,
        "prompt_every": 1,
        "shard": "",
    }
    return SimpleNamespace(**defaults | given)


def answers_of(lm, batch_size: int, rules: str = "mask:order=random") -> dict:
    problems, answers = SHORT.problems(None, 13), Answers(None, {})
    cells = runner.make_cells(lm, SHORT, parse_rules(rules), [Fraction(1, 2)])
    runner.evaluate(lm, SHORT, problems, cells, answers, batch_size=batch_size, seed=3)
    ids = [SHORT.task_id(p) for p in problems]
    kept = [a for c in cells for a in answers.select(c.label, "1/2", ids)]
    return {(a.rule, a.task_id): (a.text, a.passed, a.forward_passes) for a in kept}


@pytest.mark.slow
def test_answers_depend_on_neither_batch_nor_mesh():
    alone = answers_of(tiny_lm(), 1)
    assert len(alone) == 13 and len(set(alone.values())) > 10
    assert answers_of(tiny_lm(), 7) == alone
    assert answers_of(tiny_lm("1,8,1"), 32) == alone


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES_OF_ALL_KINDS)
def test_no_rules_answers_depend_on_batch_or_mesh(rule):
    alone = answers_of(tiny_lm(), 1, rule)
    assert len(alone) == 13 and len(set(alone.values())) > 3
    assert answers_of(tiny_lm(), 7, rule) == answers_of(tiny_lm(), 32, rule) == alone
    assert answers_of(tiny_lm("1,8,1"), 32, rule) == answers_of(tiny_lm("2,2,2"), 7, rule) == alone


def test_several_answers_to_a_problem(oracle):
    """A rule that draws makes `samples` answers, another rule one. pass@k counts them."""
    lm, problems = tiny_lm(), TASK.problems(None, 4)
    cells = runner.make_cells(lm, TASK, parse_rules("mask:order=random,flow"), [Fraction(1)])
    answers = Answers(None, {})
    rows = runner.evaluate(lm, TASK, problems, cells, answers, batch_size=4, seed=5, samples=3, k=2)
    ids = [TASK.task_id(p) for p in problems]
    assert [a.seed for a in answers.select("mask:order=random", "1", ids)] == [5, 6, 7] * 4
    assert [a.seed for a in answers.select("flow", "1", ids)] == [5] * 4 and len(oracle.sizes) == 4
    assert [(row.k, row.accuracy, row.pass_at_k) for row in rows] == [
        (2, 50.0, 50.0),
        (2, 50.0, None),
    ]


@pytest.mark.slow
def test_several_answers_to_a_problem_continue_at_their_seeds(oracle, tmp_path):
    """An answer of one seed is none of another: a stopped run makes each of them once."""
    lm, problems = tiny_lm(), TASK.problems(None, 4)
    cells = runner.make_cells(lm, TASK, parse_rules("mask:order=random"), [Fraction(1)])
    options = {"batch_size": 2, "seed": 5, "samples": 3, "k": 2}
    straight = Answers(tmp_path / "straight", {})
    row = runner.evaluate(lm, TASK, problems, cells, straight, **options)[0]
    oracle.sizes.clear()
    for stop_after in (1, 3, 5, None):  # within a seed, each time
        oracle.stop_after = stop_after
        answers = Answers(tmp_path / "stopped", {})
        with contextlib.nullcontext() if stop_after is None else pytest.raises(KeyboardInterrupt):
            again = runner.evaluate(lm, TASK, problems, cells, answers, **options)[0]
    assert len(oracle.sizes) == 6
    kept = [
        [dataclasses.replace(answer, seconds=0.0) for answer in given.all()]
        for given in (straight, answers)
    ]
    assert kept[0] == kept[1] and {answer.seed for answer in kept[1]} == {5, 6, 7}
    assert (again.accuracy, again.pass_at_k) == (row.accuracy, row.pass_at_k)


def test_compilation_time_is_separate():
    @jax.jit
    def f(x):
        return jax.lax.fori_loop(0, 3, lambda _, y: jnp.sin(y @ y), x)

    spans = []
    for _ in range(2):
        with runner.compile_spans() as seen:
            f(jnp.ones((7, 7)))
        spans.append(runner.covered_seconds(seen))
    assert spans[0] > 0 and spans[1] < spans[0]
    assert (
        runner.covered_seconds([(0, 4), (1, 2), (3, 5), (7, 8)]) == 6
        and runner.covered_seconds([]) == 0
    )


def test_fingerprint():
    params = tiny_lm().params
    same = fingerprint(params)
    assert (
        same
        == fingerprint(tiny_lm("1,8,1").params)
        == fingerprint(jax.tree.map(np.asarray, params))
    )
    flipped = {**params, "ln_f": {"scale": params["ln_f"]["scale"].at[3].add(1e-6)}}
    swapped = {**params, "wte": {"embedding": params["wte"]["embedding"][::-1]}}
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    assert len({same, *map(fingerprint, (flipped, swapped, half))}) == 4


def test_descriptions_of_rules():
    assert describe_rule(MaskPrediction(temperature=0.5))["temperature"] == 0.5
    policies = [describe_rule(Flow(init_policy(jax.random.key(k), 8))) for k in (0, 0, 1)]
    assert policies[0] == policies[1] != policies[2]
    about = {**describe_task(TASK, None), "rules": policies}
    assert json.loads(json.dumps(about)) == about


def test_two_evaluations_never_share_a_folder(oracle, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate_run, "load", lambda name, dtype, mesh, mask_id=None: tiny_lm())
    args = arguments(model="tiny", limit=2, budgets="1", out=str(tmp_path / "out"))
    with runner.open_answers(tmp_path / "out", {"another": "run"}):
        before = {file: file.read_bytes() for file in (tmp_path / "out").iterdir()}
        with pytest.raises(UserError, match=f"out: process {os.getpid()} on .* is writing it"):
            cli_evaluate.run(args)
        assert {file: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before
    assert not oracle.sizes
    with pytest.raises(UserError, match="holds another run"):
        cli_evaluate.run(args)


def test_an_edited_rule_file_is_another_run(oracle, tmp_path, monkeypatch):
    """run.json has a hash of the file of a rule that is not part of the package."""
    monkeypatch.setattr(evaluate_run, "load", lambda name, dtype, mesh, mask_id=None: tiny_lm())
    file = tmp_path / "own.py"
    file.write_text(OWN_RULE)
    args = arguments(
        model="tiny", limit=2, rules=f"mask,{file}:Own", budgets="1", out=str(tmp_path / "out")
    )
    cli_evaluate.run(args)
    cli_evaluate.run(args)
    assert len(oracle.sizes) == 2  # the second call continued the run
    rules = json.loads((tmp_path / "out" / "run.json").read_text())["rules"]
    described = rules[f"{file}:Own"]
    assert described["source"] == hash_file(file) and "source" not in rules["mask"]
    assert described["weights"] == [1, 2] and len(described["table"]) == 16
    file.write_text(OWN_RULE.replace("< 1", "< 0.5"))
    with pytest.raises(
        UserError,
        match=r"differs in rules \(the file of .*own.py:Own has changed\). Choose another folder",
    ):
        cli_evaluate.run(args)
    assert len(oracle.sizes) == 2


def test_reference_answers_and_answers_made_elsewhere(tmp_path, capsys):
    problems = TASK.problems(None, 6)
    texts = [(TASK.task_id(p), TASK.canonical(p)) for p in problems]
    row, failed = outside_answers.score_answers(
        TASK, problems, texts, "canonical", Answers(None, {})
    )
    assert (row.n, row.accuracy, failed) == (6, 100.0, [])
    file = tmp_path / "answers.jsonl"
    wrong = (texts[0][0], "def f(xs):\n    return None")
    file.write_text(
        "".join(json.dumps({"task_id": i, "completion": c}) + "\n" for i, c in [*texts, wrong])
    )
    args = arguments(limit=4, answers=str(file), out=str(tmp_path / "out"))
    cli_evaluate.run(args)
    printed = capsys.readouterr().out
    assert (
        "87.5 %" in printed and f"failed: {wrong[0]}: wrong answer" in printed
    )  # one of two answers to a problem
    names = ["answers.jsonl", "results.csv", "run.json", "table.md"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == names
    cli_evaluate.run(args)  # a second call runs nothing
    assert capsys.readouterr().out == printed


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        ("nonsense\n", "line 1 is no JSON"),
        ('{"task_id": "a"}\n', "line 1 must look like"),
        (
            '{"task_id": "a", "completion": "x"}\n\n{"task_id": "z", "completion": "x"}\n',
            "the task has no problem z",
        ),
        ('{"task_id": "a", "completion": "x"}\n', "has no answer to 1 of 2 problems, b for one"),
    ],
)
def test_wrong_answer_files(tmp_path, lines, sentence):
    file = tmp_path / "answers.jsonl"
    file.write_text(lines)
    with pytest.raises(UserError) as error:
        outside_answers.read_answers(file, ["a", "b"], ["a", "b", "c"])
    assert sentence in str(error.value)
    with pytest.raises(UserError, match="cannot be read"):
        outside_answers.read_answers(tmp_path / "nowhere", ["a"], ["a"])


@pytest.mark.parametrize("stored", [0, 1, 2, 3, 4])
def test_several_answers_to_a_problem_are_resumed_one_by_one(tmp_path, monkeypatch, stored):
    """Wherever a run was stopped, the same command gives the same accuracy."""
    problems = TASK.problems(None, 2)
    first, second = (TASK.task_id(problem) for problem in problems)
    right = TASK.canonical(problems[0])
    texts = [(first, right), (first, "wrong"), (second, "wrong"), (second, "wrong")]
    file = tmp_path / "answers.jsonl"
    lines = [json.dumps({"task_id": i, "completion": text}) + "\n" for i, text in texts]
    file.write_text("".join(lines))
    assert outside_answers.read_answers(file, [first, second], [first, second]) == texts

    def judge(task, given, answers):
        return [(text == right, "") for _, text in given]

    monkeypatch.setattr(runner, "judge_answers", judge)
    run = {"source": "answers"}
    outside_answers.score_answers(TASK, problems, texts, "answers", Answers(tmp_path / "out", run))
    kept = tmp_path / "out" / "answers.jsonl"
    whole = kept.read_bytes()
    kept.write_bytes(b"".join(whole.splitlines(keepends=True)[:stored]))
    again = Answers(tmp_path / "out", run)
    row, failed = outside_answers.score_answers(TASK, problems, texts, "answers", again)
    assert (row.n, row.accuracy, len(failed)) == (2, 25.0, 3) and kept.read_bytes() == whole
    row, _ = outside_answers.score_answers(TASK, problems, texts, "answers", again)
    assert row.accuracy == 25.0 and kept.read_bytes() == whole


def test_two_problems_of_one_name_are_refused():
    problems = TASK.problems(None, 2)[:1] * 2
    with pytest.raises(
        UserError, match=f"^2 problems of the task have the name {problems[0].task_id}"
    ):
        outside_answers.score_answers(TASK, problems, [], "answers", Answers(None, {}))
    with pytest.raises(UserError, match="^2 problems of the task have the name"):
        runner.evaluate(tiny_lm(), TASK, problems, [], Answers(None, {}))


def test_bad_input():
    lm = tiny_lm()
    with pytest.raises(
        UserError, match="makes 14.4 steps, which is not .* for each of 3 blocks. Use 1/4 or 5/16"
    ):
        runner.make_cells(lm, TASK, RULES, [Fraction(3, 10)])
    with pytest.raises(UserError, match="no tokenizer.json"):
        runner.evaluate(
            dataclasses.replace(lm, tokenizer=None),
            TASK,
            TASK.problems(None, 1),
            [],
            Answers(None, {}),
        )
    for options, sentence in (
        ({"batch_size": 0}, "batch_size must be at least 1, not 0"),
        ({"samples": 0}, "samples must be at least 1, not 0"),
        (
            {"samples": 2, "k": 3},
            "pass@3 needs at least 3 answers to each problem, but samples is 2",
        ),
    ):
        with pytest.raises(UserError, match=sentence):
            runner.evaluate(lm, TASK, TASK.problems(None, 1), [], Answers(None, {}), **options)


def test_a_whole_run_with_its_tables(oracle, tmp_path, monkeypatch, capsys):
    """One command makes every table. A second call reads them. Other arguments are another run."""
    loaded = []
    monkeypatch.setattr(
        evaluate_run,
        "load",
        lambda name, dtype, mesh, mask_id=None: loaded.append(name) or tiny_lm(),
    )
    args = arguments(model="tiny", limit=6, ablate=True, out=str(tmp_path / "out"))
    cli_evaluate.run(args)
    assert loaded == ["tiny", "tiny-base"]
    text = (tmp_path / "out" / "table.md").read_text()
    titles = (
        "By budget",
        "The parts of the flow",
        "Against mask, problem by problem",
        "Accuracy under",
        "All figures",
    )
    for title in titles:
        assert f"## {title}" in text
    for part in ("asynchronous schedule", "re-editing", "hard commitment", "alignment"):
        assert f"| flow without {part} | 50.0 (18.8-81.2) | 50.0 (18.8-81.2) |" in text
    assert "| 1/2 | flow | 50.0 | 18.8-81.2 | 24.0 |" in text and "| 1 | flow | 0 | 0 | 1 |" in text
    assert "arXiv" not in text  # no figures of the paper's for this task
    assert "| flow | 100.0 | 2.0 |" in text  # 1 * 50 + (2 - 1) * (50 + 50) / 2
    calls = len(oracle.sizes)
    printed = capsys.readouterr().out
    cli_evaluate.run(args)
    assert len(oracle.sizes) == calls and capsys.readouterr().out == printed
    with pytest.raises(
        UserError, match="holds another run, which differs in rules, base. Choose another folder"
    ):
        cli_evaluate.run(arguments(model="tiny", limit=6, out=str(tmp_path / "out")))
    with pytest.raises(UserError, match="--ablate takes the parts from a flow"):
        cli_evaluate.run(arguments(model="tiny", limit=6, ablate=True, rules="mask"))
    with pytest.raises(
        UserError, match=r"with steps, which flow:reedit=always has not\. Leave out"
    ):
        cli_evaluate.run(arguments(model="tiny", limit=6, ablate=True, rules="flow:reedit=always"))
    with pytest.raises(UserError, match="there is nothing to score"):
        cli_evaluate.run(arguments())


@pytest.mark.slow
def test_shares_of_workers_are_merged(oracle, tmp_path, monkeypatch, capsys):
    """The batches and the answers are those of a single process, and merging decodes nothing."""
    monkeypatch.setattr(evaluate_run, "load", lambda name, dtype, mesh, mask_id=None: tiny_lm())
    given = {"model": "tiny", "limit": 7, "batch_size": 2}
    cli_evaluate.run(arguments(**given, out=str(tmp_path / "one")))
    straight = list(oracle.sizes)
    shares = str(tmp_path / "shares")
    with pytest.raises(UserError, match="no shares of workers are in it"):
        cli_evaluate.run(arguments(**given, out=shares, shard="merge"))
    for index in range(3):
        oracle.sizes.clear()
        cli_evaluate.run(arguments(**given, out=shares, shard=f"{index}/3"))
        assert len(oracle.sizes) == (8 if index == 0 else 4)  # of 4 batches in each of 4 cells
        assert not (tmp_path / "shares" / "table.md").exists()
    oracle.sizes.clear()
    cli_evaluate.run(arguments(**given, out=shares, shard="merge"))
    assert oracle.sizes == [] and len(straight) == 16

    def answers(folder: str) -> list[str]:
        lines = (tmp_path / folder / "answers.jsonl").read_text().splitlines()
        values = [{**json.loads(line), "seconds": 0} for line in lines]
        return sorted(json.dumps(value) for value in values)

    assert answers("shares") == answers("one") and len(answers("one")) == 28
    with pytest.raises(UserError, match="holds another run, which differs in seed"):
        cli_evaluate.run(arguments(**given, out=shares, shard="0/3", seed=1))
    with pytest.raises(UserError, match="--shard is for independent workers with --model and"):
        cli_evaluate.run(arguments(**given, shard="0/3"))


@pytest.mark.slow
def test_an_approximate_run_is_marked(oracle, tmp_path, monkeypatch, capsys):
    """Its tables and its run.json name the approximation, since its answers differ."""
    lm = tiny_lm()
    monkeypatch.setattr(evaluate_run, "load", lambda name, dtype, mesh, mask_id=None: lm)
    sentence = "The prompt's keys and values were read anew every 4 steps of a block only."
    given = {"model": "tiny", "limit": 3, "rules": "mask", "budgets": "1/2"}
    for name, refresh in (("exact", 0), ("old", 4)):
        cli_evaluate.run(arguments(**given, out=str(tmp_path / name), refresh=refresh))
        texts = capsys.readouterr().out, (tmp_path / name / "table.md").read_text()
        assert [sentence in text for text in texts] == [refresh > 1] * 2
    assert oracle.refresh == [0, 4]
    cli_evaluate.run(arguments(**given, out=str(tmp_path / "exact"), refresh=1))  # the same run
    assert oracle.refresh == [0, 4]
    for name, refresh in (("exact", 4), ("old", 0), ("old", 8)):
        with pytest.raises(
            UserError, match="holds another run, which differs in refresh. Choose another folder"
        ):
            cli_evaluate.run(arguments(**given, out=str(tmp_path / name), refresh=refresh))
    dual = {"cache": "dual", "window": 2, "prompt_every": 3, "out": str(tmp_path / "dual")}
    cli_evaluate.run(arguments(**given | dual))
    sentence = "a cache, an approximation: dual, window 2, prompt_every 3."
    assert sentence in capsys.readouterr().out
    assert oracle.caches[-1] == {"cache": "dual", "window": 2, "prompt_every": 3}
    with pytest.raises(UserError, match="differs in window. Choose another folder"):
        cli_evaluate.run(arguments(**given | dual | {"window": 3}))
    with pytest.raises(UserError, match="refresh 9 exceeds the 8 steps of a block"):
        cli_evaluate.run(arguments(**given, refresh=9))
    with pytest.raises(UserError, match="refresh must be a whole number of at least 0, not -2"):
        cli_evaluate.run(arguments(**given, refresh=-2))


def test_another_chat_template_or_configuration_is_another_run(oracle, tmp_path, monkeypatch):
    """The parameters stay the same, and the answers do not."""
    lm, tokenizer = tiny_lm(), copy.deepcopy(TOKENIZER)
    tokenizer.chat_template = tokenizer.chat_template.replace("{{", "{{ ' ' + ", 1)
    others = {
        "prompts": dataclasses.replace(lm, tokenizer=tokenizer),
        "config": dataclasses.replace(lm, config=dataclasses.replace(lm.config, rope_theta=9.0)),
    }
    given = {"model": "tiny", "limit": 3, "rules": "mask", "budgets": "1", "out": str(tmp_path)}
    monkeypatch.setattr(evaluate_run, "load", lambda name, dtype, mesh, mask_id=None: lm)
    cli_evaluate.run(arguments(**given))
    for key, other in others.items():
        monkeypatch.setattr(
            evaluate_run, "load", lambda name, dtype, mesh, mask_id=None, other=other: other
        )
        with pytest.raises(UserError, match=f"holds another run, which differs in {key}. Choose"):
            cli_evaluate.run(arguments(**given))


@pytest.mark.slow
def test_the_batch_size_belongs_to_a_run_in_bfloat16(oracle, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate_run, "load", lambda name, dtype, mesh, mask_id=None: tiny_lm())
    given = {"model": "tiny", "limit": 3, "rules": "mask", "budgets": "1/2"}
    for dtype in ("float32", "bfloat16"):
        out = str(tmp_path / dtype)
        cli_evaluate.run(arguments(**given, dtype=dtype, out=out, batch_size=2))
    cli_evaluate.run(arguments(**given, dtype="float32", out=str(tmp_path / "float32")))
    with pytest.raises(UserError, match="which differs in batch_size. Choose another folder"):
        cli_evaluate.run(arguments(**given, dtype=dtype, out=out))


@pytest.mark.slow
def test_a_killed_run_ends_in_the_same_table(tmp_path):
    """After SIGKILL, the same command again gives the tables of an uninterrupted run."""

    def command(folder: str) -> list[str]:
        rules, budgets = "mask:order=random,threshold", "1/4,1/8"
        argv = ["--model", "tiny", "--task", "microcode", "--rules", rules, "--budgets", budgets]
        argv += ["--limit", "12", "--batch-size", "5", "--samples", "2", "--k", "2"]
        out = ["--out", str(tmp_path / folder)]
        return [sys.executable, "-m", "xflow_jax", "evaluate", *argv, *out]

    def tables(folder: str) -> tuple[str, list[dict[str, str]]]:
        """Returns all tables without seconds: the text before the last one, and its rows."""
        rows = list(csv.DictReader((tmp_path / folder / "results.csv").read_text().splitlines()))
        untimed = [
            {k: v for k, v in row.items() if k not in ("seconds", "tokens_per_second")}
            for row in rows
        ]
        return (tmp_path / folder / "table.md").read_text().partition("## All figures")[0], untimed

    where = {
        "cwd": Path(__file__).parents[2],
        "stdout": subprocess.DEVNULL,
        "stderr": subprocess.DEVNULL,
    }
    subprocess.run(command("straight"), check=True, **where)
    killed = subprocess.Popen(command("killed"), **where)
    kept = tmp_path / "killed" / "answers.jsonl"
    while not kept.exists() or kept.read_bytes().count(b"\n") < 10:
        assert killed.poll() is None, "it ended before it could be killed"
        time.sleep(0.05)
    killed.kill()
    killed.wait()
    before = kept.read_bytes().count(b"\n")
    subprocess.run(command("killed"), check=True, **where)
    lines = kept.read_text().splitlines()
    assert before < len(lines) == 12 * (2 + 1) * 2 and len(set(lines)) == len(lines)
    assert tables("killed") == tables("straight") and len(tables("killed")[1]) == 4
