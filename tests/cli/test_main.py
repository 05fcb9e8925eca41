"""The command `xflow`: its help, one sentence for a mistake, and the files of each command."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import xflow_jax as xf
from tests.helpers import llada_tiny, tiny_lm
from xflow_jax.checkpoints.hf_export import write_hf
from xflow_jax.cli import demo, demo_run, generate_run, likelihood, main
from xflow_jax.cli.arguments import RULE
from xflow_jax.cli.generate_run import chat_note, decode_lengths, foreign_note, longest_task
from xflow_jax.decoding.rules.flow import Flow
from xflow_jax.decoding.rules.parsing import RULES
from xflow_jax.evaluation.verdicts import judge_prompts, verdict_sentence
from xflow_jax.lm import load
from xflow_jax.tasks import find_tasks, microcode

TOKENIZER = Path(xf.__file__).parent / "tiny"
PROMPT = "Keep the even numbers and return the count."


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """A directory with a random model and microcode's tokenizer."""
    path = tmp_path_factory.mktemp("model") / "random"
    lm = tiny_lm()
    write_hf(path, lm.params, lm.config, tokenizer_dir=TOKENIZER)
    return str(path)


def refused(capsys, *argv: str) -> str:
    """Runs a command that must fail, and returns its error message."""
    try:
        status = main.main(argv)
    except SystemExit as leave:
        status = leave.code
    captured = capsys.readouterr()
    assert status == 2 and captured.out == ""
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    return captured.err


WITHOUT_JAX = """
import sys
from xflow_jax.cli.main import main
try:
    main(sys.argv[1:])
finally:
    assert "jax" not in sys.modules
"""


@pytest.mark.parametrize(
    ("argv", "status"),
    [
        (["--help"], 0),
        (["--version"], 0),
        (["generat"], 2),
        (["demo", "--help"], 0),
        (["generate", "--help"], 0),
        (["evaluate", "--help"], 0),
        (["generate", "--model=tiny", "--prompt=x", "--rulse=flow"], 2),
    ],
)
def test_help_and_typing_mistakes_do_not_load_jax(argv, status):
    done = subprocess.run([sys.executable, "-c", WITHOUT_JAX, *argv], capture_output=True)
    assert done.returncode == status, done.stderr


def test_the_module_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "xflow_jax", "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in main.COMMANDS)


@pytest.mark.parametrize("command", [None, *main.COMMANDS])
def test_help_fits_a_terminal(capsys, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as leave:
        main.main([command, "--help"] if command else ["--help"])
    assert leave.value.code == 0
    printed = capsys.readouterr().out
    assert printed.startswith("usage: xflow") and max(map(len, printed.splitlines())) <= 80


def test_without_arguments_the_help_is_printed(capsys):
    assert main.main([]) == 0
    assert capsys.readouterr().out.startswith("usage: xflow [-h]")


def test_the_help_names_every_rule():
    assert all(name in RULE for name in RULES)


def test_public_names():
    module = importlib.import_module("xflow_jax.decoding.generate")
    assert callable(xf.generate) and xf.generate is module.generate
    assert xf.Flow is Flow and set(xf.__all__) <= set(dir(xf))
    assert all(getattr(xf, name) is not None for name in xf.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Flwo'"):
        _ = xf.Flwo


GENERATE = ("generate", "--prompt", PROMPT)
EVALUATE = ("evaluate", "--task", "microcode", "--model", "{model}")


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (("generat",), "there is no command 'generat', did you mean generate?"),
        (("xyz",), "there is no command 'xyz'. There are demo, generate"),
        ((*GENERATE, "--model", "tiny", "--steps", "x"), "must be a whole number, not 'x'"),
        (
            ("generate", "--model", "tiny"),
            "one of the arguments --prompt --messages is required",
        ),
        ((*GENERATE, "--model=tiny", "--messages=x"), "argument --messages: not allowed with"),
        (("generate", "--model=tiny", "--messages=none.json"), "none.json: cannot be read"),
        ((*GENERATE, "--model=tiny", "--system", " "), "the system prompt is empty"),
        (
            (*GENERATE, "--model", "{model}", "--rulse", "flow"),
            "unknown argument '--rulse', did you mean --rule?",
        ),
        ((*GENERATE, "--model", "{model}", "--rule", "flwo"), "did you mean flow?"),
        ((*GENERATE, "--model", "{model}", "--budget", "1.5"), "must be above 0 and at most 1"),
        (
            (*GENERATE, "--model", "{model}", "--gen-length", "48", "--budget", "0.3"),
            "Use 7/24 or 5/16",
        ),
        (
            (*GENERATE, "--model", "{model}", "--gen-length", "0"),
            "gen_length must be a whole number",
        ),
        (
            (*GENERATE, "--model", "{model}", "--gen-length", "9", "--block-length", "2"),
            "Use 8 or 10",
        ),
        (
            (*GENERATE, "--model", "{model}", "--block-length", "-2"),
            "block_length must be a whole number of at least 1, not -2",
        ),
        (
            (*GENERATE, "--model", "{model}", "--gen-length", "8", "--steps", "0"),
            "steps must be a whole number",
        ),
        (
            (*GENERATE, "--model", "{model}", "--gen-length", "8", "--steps", "1", "--budget", "1"),
            "not allowed with",
        ),
        (
            (*GENERATE, "--model", "{model}", "--gen-length", "4096"),
            "exceed the model's 128 positions",
        ),
        ((*GENERATE, "--model", "{model}", "--prompt", " "), "a prompt is empty"),
        (
            (*GENERATE, "--model", "{model}", "--prompt", "b", "--trace", "x.html"),
            "--trace shows one decode",
        ),
        (
            (*GENERATE, "--model", "{model}", "--beside", "mask"),
            "--beside is for the page of --trace, so give --trace FILE.html too",
        ),
        (
            (*GENERATE, "--model={model}", "--beside", "flwo", "--trace", "x.html"),
            "did you mean flow?",
        ),
        (
            (*GENERATE, "--model", "{model}", "--dtype", "float16"),
            "it must be float32, bfloat16 or int8",
        ),
        ((*GENERATE, "--model", "{model}", "--mesh", "1,2"), "three positive sizes"),
        (
            (*GENERATE, "--model", "{model}", "--refresh", "-1"),
            "refresh must be a whole number of at least 0, not -1",
        ),
        (
            (*GENERATE, "--model", "{model}", "--cache", "duel"),
            "there is no cache 'duel'. There are none, exact, prompt, prefix and dual.",
        ),
        (
            (*GENERATE, "--model", "{model}", "--cache=dual", "--window=33", "--gen-length=32"),
            "window 33 exceeds the response of 32 tokens",
        ),
        ((*GENERATE, "--model", "./nowhere"), "no such directory"),
        (
            ("evaluate", "--task", "microcode"),
            "one of the arguments --model --canonical --answers is required",
        ),
        (("evaluate", "--task", "micorcode", "--canonical"), "did you mean microcode?"),
        (
            ("evaluate", "--task", "microcode", "--canonical", "--limit", "0"),
            "--limit must be at least 1",
        ),
        (
            ("evaluate", "--task", "microcode", "--canonical", "--data", "x"),
            "reads no data file, so leave x out",
        ),
        (
            ("evaluate", "--task", "microcode", "--answers", "nowhere.jsonl"),
            "nowhere.jsonl: cannot be read",
        ),
        (
            ("evaluate", "--task", "humaneval", "--canonical", "--set", "body=true"),
            "there is no key body. Did you mean body_only?",
        ),
        (
            ("evaluate", "--task=likelihood", "--model=tiny", "--data=x", "--set=shots=1"),
            "--set changes the protocol of a task, and likelihood has none",
        ),
        ((*EVALUATE, "--budgets", "1/4,1/5"), "the budget 1/5"),
        ((*EVALUATE, "--rules", "mask,trheshold"), "did you mean threshold?"),
        ((*EVALUATE, "--batch-size", "0"), "batch_size must be at least 1"),
        (("demo", "--limit", "0"), "--limit must be at least 1"),
        (("demo", "--out", __file__), "cannot be made an output folder"),
    ],
)
def test_mistakes_are_one_sentence(capsys, model, argv, sentence):
    assert sentence in refused(capsys, *(part.replace("{model}", model) for part in argv))


def test_interruption(monkeypatch, capsys):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run", interrupt)
    assert main.main(["demo"]) == 130 and capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize(
    ("model", "given", "lengths"),
    [
        ("tiny", (None, None), (48, 16)),
        ("tiny", (48, None), (48, 16)),
        ("tiny-base", (32, None), (32, 16)),
        ("tiny-long", (None, None), (128, 16)),
        ("tiny-squares", (None, None), (48, 48)),
        ("tiny", (8, None), (8, None)),
        ("tiny", (40, None), (40, 16)),  # which `generate` refuses
        ("tiny", (48, 48), (48, 48)),
        ("tiny", (None, 0), (48, 0)),
        ("golden", (None, None), (128, None)),
        ("golden", (48, None), (48, None)),
    ],
)
def test_a_length_by_hand_keeps_the_blocks_of_the_bundled_models(model, given, lengths):
    lm = llada_tiny() if model == "golden" else load(model)
    task = longest_task(find_tasks(lm.tasks), [])
    assert decode_lengths(task, *given) == lengths


@pytest.mark.slow
def test_a_request_outside_the_language_of_the_model_is_noted_before_its_answer(
    capsys, model, tmp_path
):
    trained = tmp_path / "trained"
    shutil.copytree(model, trained)
    argv = ["generate", "--gen-length", "8", "--steps", "2", "--mesh", "1,1,1", "--rule"]
    argv += ["threshold:tau=0.5", "--prompt", PROMPT, "--prompt", "A\njoke!", "--json", "--model"]
    for text, noted in (
        ('{"task": "microcode"}', True),
        ('{"task": "unknown"}', False),
        ('{"task": 1}', False),
        ('{"tasks": ["microcode", "unknown"]}', False),
        ('{"tasks": "microcode"}', False),
        ("{}", False),
        ("not JSON", False),
    ):
        (trained / "provenance.json").write_text(text)
        assert main.main([*argv, str(trained)]) == 0
        captured = capsys.readouterr()
        lines = [json.loads(line) for line in captured.out.splitlines()]
        assert lines[0]["note"] is None and (lines[1]["note"] is not None) == noted
        if noted:
            assert captured.err == f"note: 'A joke!': {lines[1]['note']}\n"
            assert "trained on requests of microcode alone" in captured.err
            assert microcode.TASK.example in captured.err
        else:
            assert captured.err == ""
    assert foreign_note([microcode.TASK], PROMPT) is None
    note = foreign_note([microcode.TASK], PROMPT.lower().rstrip("."))
    assert note is not None and note.endswith(f"another spelling, so write it as {PROMPT!r}")


def test_a_model_of_several_tasks_takes_the_lengths_of_its_prompts():
    tasks = find_tasks(("microcode", "latin-square", "microcode-long"))
    short, square, long = tasks
    assert foreign_note(tasks, square.example) is None
    assert longest_task(tasks, [square.example]) is square
    assert longest_task(tasks, [square.example.replace("\n", " "), PROMPT, "A joke!"]) is square
    assert longest_task(tasks, [PROMPT]) is short
    assert longest_task(tasks, ["A joke!"]) is long
    assert longest_task([], [PROMPT]) is None
    note = foreign_note(tasks, "A joke!")
    assert "microcode and latin-square and microcode-long alone" in note
    assert foreign_note(tasks, square.example.replace("\n", " ")).endswith(repr(square.example))


@pytest.mark.parametrize(("given", "samples"), [([], 128), (["--samples", "1"], 1)])
def test_one_mask_by_hand_is_one_mask(monkeypatch, model, tmp_path, given, samples):
    taken = []

    def bounds(lm, pairs, samples, **_):
        taken.append(samples)
        return np.zeros(len(pairs))

    monkeypatch.setattr(likelihood, "log_likelihoods", bounds)
    (tmp_path / "pairs.jsonl").write_text('{"prompt": [1], "response": [2]}\n')
    argv = ["evaluate", "--task", "likelihood", "--model", model, "--mesh", "1,1,1", *given]
    assert main.main([*argv, "--data", str(tmp_path / "pairs.jsonl")]) == 0 and taken == [samples]


def test_generate(capsys, model, tmp_path):
    common = ["generate", "--model", model, "--gen-length", "8", "--steps", "2", "--mesh", "1,1,1"]
    common += ["--rule", "threshold:tau=0.5"]
    assert main.main([*common, "--prompt", PROMPT, "--prompt", "A joke!", "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["prompt"] for line in lines] == [PROMPT, "A joke!"]
    assert [line["judged"] for line in lines] == [True, False] and lines[0]["passed"] is False
    assert lines[0]["rule"] == "threshold:tau=0.5" and 1 <= lines[0]["forward_passes"] <= 2
    page = tmp_path / "page.html"
    argv = [*common, "--prompt", PROMPT, "--trace", str(page), "--beside", "mask"]
    assert main.main(argv) == 0
    printed = capsys.readouterr().out
    assert "[failed: " in printed and f"[wrote {page}]" in printed and PROMPT in page.read_text()
    labels = re.findall(r'"label":"(.*?)","facts":\{"forward passes":"(\d) for 8', page.read_text())
    assert labels[1] == ("mask", "2") and labels[0][0] == "threshold:tau=0.5"


def test_generate_continues_a_chat(capsys, model, tmp_path, monkeypatch):
    chats = []

    def record(lm, prompts, *args, **options):
        chats.append([lm.tokenizer.decode(ids) for ids in prompts])
        return xf.generate(lm, prompts, *args, **options)

    monkeypatch.setattr(generate_run, "generate", record)
    chat = [
        {"role": "user", "content": "A joke!"},
        {"role": "assistant", "content": "No."},
        {"role": "user", "content": PROMPT},
    ]
    (tmp_path / "chat.json").write_text(json.dumps(chat))
    common = ["generate", "--model", model, "--gen-length=8", "--steps=2", "--mesh=1,1,1", "--json"]
    argv = [*common, "--messages", str(tmp_path / "chat.json"), "--system", "Be short."]
    assert main.main(argv) == 0
    line = json.loads(capsys.readouterr().out)
    assert line["prompt"] == PROMPT and line["judged"] is True and line["note"] is None
    assert line["messages"] == [{"role": "system", "content": "Be short."}, *chat]
    places = [chats[0][0].find(m["content"]) for m in line["messages"]]
    assert places == sorted(places) and places[0] > 0
    note = chat_note([microcode.TASK], line["messages"])
    assert note is not None and "trained on single requests alone" in note
    assert chat_note([], line["messages"]) is None


def test_answers_to_typed_prompts_are_run():
    right = "def f(xs):\n    return len([x for x in xs if x % 2 == 0])"
    prompts = [
        PROMPT,
        PROMPT,
        "A joke!",
        "Take absolute values, keep values below 0 and return the largest.",
    ]
    verdicts = judge_prompts(prompts, [right, "def f(xs):\n    return 0.5", right, right])
    assert [v["judged"] for v in verdicts] == [True, True, False, False]
    assert verdicts[0][
        "passed"
    ] and f"{verdicts[0]['input']} -> {verdicts[0]['output']}" in verdict_sentence(verdicts[0])
    assert verdicts[0]["output"] == len([x for x in verdicts[0]["input"] if x % 2 == 0])
    assert verdict_sentence(verdicts[1]).startswith("failed: wrong answer: ")
    square, long = find_tasks(("latin-square", "microcode-long"))
    for task in (square, long):
        (problem,) = task.problems(None, 1)
        prompt, text = task.prompt(problem), task.canonical(problem)
        right, wrong = judge_prompts([prompt.lower(), prompt], [text, text[:-1]])
        assert right["passed"] and not wrong["passed"] and str(right["input"]) != ""
    (impossible,) = judge_prompts(
        ["Make a square of distinct numbers from 1 to 4: 1100 0000 0000 0000"], ["1234\n"]
    )
    assert "no right answer" in verdict_sentence(impossible)
    assert "is no request of a task" in verdict_sentence(verdicts[2]) and not verdicts[3]["judged"]


def test_evaluate_and_its_files(capsys, model, tmp_path):
    out = tmp_path / "out"
    common = [
        "evaluate",
        "--model",
        model,
        "--task",
        "microcode",
        "--budgets",
        "1/16",
        "--limit",
        "3",
    ]
    common += ["--out", str(out), "--mesh", "1,1,1"]
    assert main.main([*common, "--rules", "mask,flow:power=4"]) == 0
    printed = capsys.readouterr().out
    assert "flow:power=4" in printed and "0-shot, 48 response tokens, blocks of 16" in printed
    names = ["accuracy-over-budget.png", "answers.jsonl", "results.csv", "run.json", "table.md"]
    assert sorted(p.name for p in out.iterdir()) == names
    assert len((out / "answers.jsonl").read_text().splitlines()) == 6
    assert main.main([*common, "--rules", "mask,flow:power=4"]) == 0  # nothing left to do
    assert capsys.readouterr().out == printed
    assert "differs in rules. Choose another folder" in refused(capsys, *common, "--rules", "mask")


def test_canonical(capsys):
    assert main.main(["evaluate", "--task", "microcode", "--canonical", "--limit", "5"]) == 0
    assert "100.0 %" in capsys.readouterr().out


BODIES = [{"task_id": "HumanEval/0", "completion": text} for text in ("    return x\n", "f = 1")]
ONE_PROBLEM = {
    "task_id": "HumanEval/0",
    "prompt": 'def f(x):\n    """ the same """\n',
    "entry_point": "f",
    "canonical_solution": "    return x\n",
    "test": "def check(c):\n    assert c(1) == 1\n",
}


def test_the_protocol_of_a_task_is_set_by_key(capsys, tmp_path):
    data, answers, out = (tmp_path / name for name in ("data.jsonl", "answers.jsonl", "out"))
    data.write_text(json.dumps(ONE_PROBLEM))
    answers.write_text("".join(json.dumps(row) + "\n" for row in BODIES))
    command = ["evaluate", "--task", "humaneval", "--data", str(data), "--answers", str(answers)]
    command += ["--out", str(out)]
    assert main.main(command) == 0
    printed = capsys.readouterr().out
    assert " 0.0 %" in printed and "opencompass-humaneval-v2" in printed
    assert "\n1 of the failed answers: only the body of the function" in printed
    assert "differs in settings" in refused(capsys, *command, "--set", "body_only=true")
    command[-1] = str(tmp_path / "other")
    assert main.main([*command, "--set", "body_only=true"]) == 0
    printed = capsys.readouterr().out
    assert "50.0 %" in printed and "body_only=True" in printed and "only the body" not in printed


def test_demo(capsys, model, tmp_path, monkeypatch):
    monkeypatch.setattr("xflow_jax.lm.BUNDLED", {"tiny": Path(model), "tiny-base": Path(model)})
    monkeypatch.setattr(demo_run, "BUNDLED", {"tiny": Path(model)})
    monkeypatch.setattr(demo_run, "BUDGETS", demo_run.BUDGETS[-1:])
    assert main.main(["demo", "--out", str(tmp_path / "demo"), "--limit", "2"]) == 0
    printed = capsys.readouterr().out
    assert (
        all(rule in printed for rule in (*demo_run.RULES, demo_run.BASE)) and "8 devices" in printed
    )
    assert f'--model tiny --prompt "{microcode.TASK.example}"' in printed
    made = ["accuracy-over-budget.png", "results.csv", "table.md", "trajectory.html"]
    assert sorted(p.name for p in (tmp_path / "demo").iterdir()) == made
    assert (
        main.main(["demo", "--out", str(tmp_path / "demo"), "--limit", "2"]) == 0
    )  # again, over the same files


OWN_RULE = """
import flax.struct

from xflow_jax.decoding import Threshold


@flax.struct.dataclass
class MyRule(Threshold):
    limit: float = 0.5
"""


@pytest.mark.slow
def test_a_rule_from_a_file(capsys, model, tmp_path, monkeypatch):
    (tmp_path / "my_rule.py").write_text(OWN_RULE)
    monkeypatch.chdir(tmp_path)
    rule, small = "my_rule.py:MyRule(tau=0.3)", ["--model", model, "--mesh", "1,1,1"]
    lengths = ["--gen-length", "8", "--steps", "2"]
    assert main.main(["generate", *small, *lengths, "--prompt", PROMPT, "--rule", rule]) == 0
    assert f"[{rule}, " in capsys.readouterr().out
    evaluate = ["evaluate", *small, "--task", "microcode", "--limit", "2", "--budgets", "1/16"]
    assert main.main([*evaluate, "--rules", f"mask,{rule}"]) == 0
    assert rule in capsys.readouterr().out
    bench = ["bench", *small, *lengths, "--batch-sizes", "1", "--rounds", "1"]
    assert main.main([*bench, "--rule", rule]) == 0
    assert f"{rule}: prompts of 40 tokens" in capsys.readouterr().out
