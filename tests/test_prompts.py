"""Prompts of README, docs, help and demo: the bundled model answers each of them rightly."""

from __future__ import annotations

import ast
import inspect
import json
from fractions import Fraction

import pytest

import xflow_jax as xf
from tests.test_docs import DOCS, PAGES, README, TUTORIALS, commands, fences, page_id
from xflow_jax.cli import demo_run, main
from xflow_jax.decoding import parse_rule, resolve_steps
from xflow_jax.decoding.rules.parsing import RULES
from xflow_jax.evaluation import judge_prompts
from xflow_jax.tasks import microcode

EXAMPLE = microcode.TASK.example


def documented_commands() -> list[list[str]]:
    """Returns the words of each documented `xflow generate` with the bundled model."""
    return [
        words
        for page in PAGES
        for words in commands(page.read_text())
        if words[:1] == ["generate"] and words[words.index("--model") + 1] == "tiny"
    ]


def python_prompts(code: str) -> list[str]:
    """Returns the texts that Python code assigns to `prompt` or `prompts`."""
    found = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in ("prompt", "prompts"):
            value = ast.literal_eval(node.value)
            found += [value] if isinstance(value, str) else value
    return found


def snippets() -> list[str]:
    """Returns the Python blocks of README and docs that load the bundled model."""
    blocks = [block for page in PAGES for block in fences(page.read_text(), "python")]
    return [block for block in blocks if 'xf.load("tiny")' in block and "xf.generate(" in block]


def options(words: list[str], name: str) -> list[str]:
    """Returns the values of an option that may be repeated."""
    return [value for option, value in zip(words, words[1:], strict=False) if option == name]


def assert_right(prompts: list[str], texts: list[str]) -> None:
    """Fails unless each answer returns the right results."""
    for prompt, text, verdict in zip(prompts, texts, judge_prompts(prompts, texts), strict=True):
        assert verdict["judged"] and verdict["passed"], f"{prompt}\n{text}\n{verdict['reason']}"


def test_every_prompt_for_the_bundled_model_is_a_request_of_its_language(capsys):
    prompts = [prompt for words in documented_commands() for prompt in options(words, "--prompt")]
    assert len(prompts) >= 3  # README, index and the guide to rules
    for code in [*snippets(), *(path.read_text() for path in TUTORIALS)]:
        prompts += python_prompts(code)
    assert len(prompts) >= 8
    with pytest.raises(SystemExit):
        main.main(["generate", "--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert f'xflow generate --model tiny --prompt "{EXAMPLE}"' in printed
    suggestion = inspect.getsource(demo_run.run_demo)
    assert "--prompt" in suggestion and "{task.example}" in suggestion
    for prompt in {EXAMPLE, *prompts}:
        assert microcode.TASK.respell(prompt) == prompt


def test_the_example_is_of_a_held_out_composition():
    problem = microcode.parse(EXAMPLE)
    assert problem is not None and problem.is_sound()
    assert problem.composition in microcode.compositions(held_out=True)
    assert main.build_parser("generate").parse_all(["generate", "--model=tiny", "--prompt=x"])


def test_what_the_language_holds():
    respell = microcode.TASK.respell
    assert respell("keep the even  numbers AND return the sum") == (
        "Keep the even numbers and return the sum."
    )
    assert respell(" write python code to Sort them\nand return the first..") == (
        "Write Python code to sort them and return the first."
    )
    for problem in microcode.problems("test", 300):
        assert respell(problem.prompt) == problem.prompt
        assert respell(problem.prompt.lower()[:-1]) == problem.prompt
    three = "Square them, then sort them, then take the first 2 and return the sum."
    for prompt in ("Write a haiku.", "", "Return the sum.", "Keep values above 99.", three):
        assert respell(prompt) is None, prompt


@pytest.mark.slow
def test_documented_commands_answer_rightly(capsys, tmp_path, monkeypatch):
    (block,) = [
        b for b in fences((DOCS / "guides/own-rule.md").read_text(), "python") if "MyRule" in b
    ]
    (tmp_path / "my_rule.py").write_text(block)
    monkeypatch.chdir(tmp_path)
    plain = ["generate", "--model", "tiny", "--prompt", EXAMPLE]  # of the demo and the help
    for words in [plain, *documented_commands()]:
        for option in {"--trace", "--beside"}.intersection(words):  # of the page alone
            at = words.index(option)
            words = words[:at] + words[at + 2 :]
        assert main.main([*words, "--json", "--mesh", "1,1,1"]) == 0
        captured = capsys.readouterr()
        (line,) = [json.loads(text) for text in captured.out.splitlines()]
        assert line["passed"] is True and line["note"] is None, (words, line["text"])
        assert captured.err == ""


def test_documented_snippets_answer_rightly(capsys):
    assert any(block in README.read_text() for block in snippets())
    for block in snippets():
        names: dict[str, object] = {}
        # The tests check types at run time, where a whole number is no float.
        exec(block.replace("power=8)", "power=8.0)"), names)
        out = names["out"]
        assert isinstance(out, xf.Generation) and out.texts is not None
        assert_right(python_prompts(block), out.texts)


@pytest.mark.slow
@pytest.mark.parametrize("path", TUTORIALS, ids=page_id)
def test_prompts_of_tutorials_are_answered_rightly(path):
    code = path.read_text()
    prompts = python_prompts(code)
    if not prompts:
        return
    # Every decode of the tutorial is recorded. Its pictures are not drawn.
    texts: list[list[str]] = []
    generate = xf.generate

    def record(*args, **options):
        out = generate(*args, **options)
        texts.append(out.texts)
        return out

    tree = ast.parse(code)
    kept = [
        node
        for node in tree.body
        if not any(name in ast.unparse(node) for name in ("plt", "axes", "figure", "print"))
    ]
    source = ast.unparse(ast.Module(kept, [])).replace("xf.generate(", "record_(")
    exec(source.replace("power=8)", "power=8.0)"), {"record_": record})
    assert texts
    for answers in texts:
        assert_right(prompts, answers)


@pytest.mark.slow
@pytest.mark.parametrize("budget", ["1", "1/2", "1/4"])
@pytest.mark.parametrize("name", [*RULES, "flow:power=8", "flow:policy=tiny"])
def test_every_rule_answers_the_example_rightly(name, budget):
    lm, config = xf.load("tiny"), microcode.TASK.config
    steps = resolve_steps(lm.config, Fraction(budget), config.gen_length, config.block_length)
    out = xf.generate(
        lm,
        [EXAMPLE],
        parse_rule(name)[1],
        gen_length=config.gen_length,
        steps=steps,
        block_length=config.block_length,
    )
    assert_right([EXAMPLE], out.texts)
