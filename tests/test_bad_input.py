"""Bad input to every program: one sentence and status 2, no traceback, no wait.

Each case is a line of a table. Programs run in this process, as their command would.
"""

from __future__ import annotations

import contextlib
import gzip
import os
import runpy
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import xflow_jax
from tests.helpers import tiny_lm
from xflow_jax.checkpoints.hf_export import write_hf
from xflow_jax.cli import main

TINY = Path(xflow_jax.__file__).parent / "tiny"
SECONDS = 10  # of processor time, which other processes do not lengthen
WAIT = 120  # seconds after which a command waits for something, on a busy machine too
LONG = "9" * 5000
DEEP = "[" * 100_000


@dataclass(frozen=True)
class Case:
    """A command that must be refused.

    Attributes:
        name: name of the test.
        argv: the command. {model} is a directory of a model, {bad} the bad file, {out} a place
            for results that must stay empty, {tmp} a folder.
        make: function that makes the bad file, or None.
    """

    name: str
    argv: tuple[str, ...]
    make: Callable[[Path], object] | None = None


# Bad values of options, without any file

GENERATE = ("xflow", "generate", "--model", "{model}", "--prompt", "Add 1.")
EVALUATE = ("xflow", "evaluate", "--model", "{model}", "--task", "microcode", "--limit", "2")
BENCH = ("xflow", "bench", "--model", "{model}")
PLAN = ("xflow", "plan", "--preset", "llada-8b", "--device", "gpu:h200")
ALIGN = ("train.align", "configs/align_tiny.toml", "out={out}")
GRPO = ("train.grpo", "configs/grpo_tiny.toml", "out={out}")
PRETRAIN = ("train.pretrain", "configs/pretrain_tiny.toml", "out={out}")
SELF = ("train.self_generate", "configs/self_generate_tiny.toml", "out={out}/x.jsonl", "limit=2")
FROM_HF = ("convert.from_hf", "{model}", "{out}")

NUMBERS = ("x", "", "1.5", "nan", "-1", LONG, "1e3")
SEEDS = ("-1", "4294967296", "18446744073709551616", LONG, "x")
BUDGETS = ("0", "-1/2", "1.5", "nan", "inf", "1/0", "", "a/b", "1e999999999", "1e-999999999", "1/7")
BUDGETS += (LONG, f"1/{LONG}", "0." + LONG)
MESHES = ("1", "a,b,c", "0,1,1", "-1,1,1", "1,1,1,1", "1,99999999999,1", f"{LONG},1,1", "1,,1")
RULES = ("", "flwo", "flow:", "flow:power", "flow:power=", "flow:power=nan", "flow:power=inf")
RULES += (f"flow:power={LONG}", "flow:power=1e999", "flow:power=-1", "flow:policy=/no/such/file")
RULES += ("flow:policy=.", "flow:policy=/dev/zero", "flow:sample=true", "flow:power=2,power")
RULES += ("mask:order=best", "threshold:tau=2", "flow(power=2)", ":::", "none.py:Rule", "..:Rule")
RULES += ("no.such.module:Rule", "json:Rule", "json:JSONDecoder", "/dev/zero.py:Rule", "x" * 10**5)
RULES += ("flow:\x1b[2J=1", "mask:temperature=-1")
DEVICES = ("", "gpu", "gpu:x", "gpu:h200:0", "gpu:h200:x", "gpu:h200:-1", "cpu", "::")
DEVICES += (f"gpu:h200:{LONG}", "gpu:h200:\u00b2")
SLICES = ("", "v5p", "v5p:0x1x1", "v9z:2x2", f"v5p:{LONG}x1x1", "v5e-x", "v5e-3", ":")
VALUES: dict[tuple[str, ...], dict[str, tuple[str, ...]]] = {
    GENERATE: {
        "--steps": (*NUMBERS, "0"),
        "--gen-length": (*NUMBERS, "0", "99999999"),
        "--block-length": (*NUMBERS, "0", "7"),
        "--refresh": NUMBERS,
        "--seed": SEEDS,
        "--budget": BUDGETS,
        "--mesh": MESHES,
        "--rule": RULES,
        "--dtype": ("", "float16", "int32", "float33"),
        "--trace": ("x.png", "/no/such/folder/x.html", "{tmp}", "/dev/zero"),
        "--prompt": ("", " \n", "\udcff"),
        "--system": ("", " \n", "\udcff"),
        "--messages": ("chat.json",),
        "--model": ("tinny", "", "./none", "a\0b", "x" * 5000, "~nobody/x", "/etc/passwd", "a b"),
    },
    EVALUATE: {
        "--task": ("micorcode", "", "../microcode", "x" * 5000),
        "--limit": (*NUMBERS, "0"),
        "--budgets": ("", "1,", "1/4;1/2", "1/7", "1e999999999"),
        "--rules": ("", ",", "mask,", "mask,flow:power=x", "mask,flow(power=2"),
        "--samples": (*NUMBERS, "0"),
        "--k": (*NUMBERS, "0"),
        "--batch-size": (*NUMBERS, "0"),
        "--seed": SEEDS,
        "--out": ("/dev/null", "/dev/null/x", "a\0b"),
        "--data": ("/no/such/file",),
    },
    BENCH: {
        "--batch-sizes": ("", "x", "0", "1,", "-1", LONG, "1.5"),
        "--prompt-length": (*NUMBERS, "0", "99999999"),
        "--gen-length": (*NUMBERS, "0", "99999999"),
        "--steps": (*NUMBERS, "0", "99999999"),
        "--rounds": (*NUMBERS, "0"),
        "--json": ("/no/such/folder/x.json", "/dev/null", "{tmp}"),
        "--refresh": ("1", "x", "-1"),
        "--against": ("jax",),
    },
    PLAN: {
        "--preset": ("", "llama", "llada-8b,"),
        "--program": ("", "decoed", "decode,"),
        "--batch": ("", "0", "x", "-1", "1,,2", LONG, "\u00b2"),
        "--most": (*NUMBERS, "0"),
        "--steps": (*NUMBERS, "0"),
        "--gen-length": (*NUMBERS, "0"),
        "--mesh": ("1", "a,b,c", "0,1,1", f"{LONG},1,1"),
        "--set": ("steps=3", "x", f"steps={LONG}"),
        "--json": ("/no/such/folder/x", "/dev/null", "{tmp}"),
        "--markdown": ("/no/such/folder/x", "{tmp}"),
    },
    ("xflow", "plan", "--preset", "llada-8b"): {"--device": DEVICES, "--topology": SLICES},
    ("xflow", "demo"): {"--limit": (*NUMBERS, "0"), "--out": ("/dev/null/x", "/etc/passwd")},
    ("xflow",): {"generat": ("x",), "\x1b[2J": ("x",), "--nosuch": ("x",)},
    FROM_HF: {"--dtype": ("float16",), "--mesh": MESHES},
}


def overrides(command: tuple[str, ...], *texts: str) -> Iterator[Case]:
    """Cases of a training program with a bad key=value."""
    for text in texts:
        yield Case(f"{command[0]} {text[:40]!r}", (*command, text))


SHARED = ("steps=0", "steps=x", "steps=1.5", f"steps={LONG}", "nosuch=1", "=", "x", "seed=-1")
SHARED += ("seed=4294967296", "seed=1e3", "steps.a=1", "a" + ".a" * 10**5 + "=1", f"steps={DEEP}")
SHARED += (
    "batch_size=0",
    "save_every=0",
    "steps=true",
    "steps=\x1b[2J",
    "steps=9223372036854775808",
)


def option_cases() -> Iterator[Case]:
    """Every command with every bad value of an option."""
    for command, options in VALUES.items():
        for option, values in options.items():
            for value in values:
                name = f"{' '.join(command[:2])} {option} {value[:40]!r}"
                yield Case(name, (*command, option, value))
    yield from overrides(ALIGN, *SHARED, "mesh=1", "held_out=1", "optimizer.rate=nan", "tune=x")
    yield from overrides(ALIGN, "model=tinny", "model=/no/such", 'data=["/no/such"]', "data=x")
    yield from overrides(GRPO, *SHARED, "policy.width=0", "policy.a_max=9", "policy.init=/no/such")
    yield from overrides(GRPO, "rate=nan", "rate=-1", "clip=inf", "epsilon=2", "task=x", "mesh=1")
    yield from overrides(GRPO, "group_size=1", "policy.kappa_min=0", "evaluate_problems=0")
    yield from overrides(PRETRAIN, *SHARED, "model.n_layers=100000000", "model.d_model=-1")
    yield from overrides(PRETRAIN, "model.n_heads=3", "rate_points=[]", "tokenizer=/no/such")
    yield from overrides(PRETRAIN, "first_sigma=2", "muon_rate=nan", "export_dtype=int8")
    yield from overrides(SELF, "gen_length=0", "limit=-1", "seed=-1", "prompts=/no/such.jsonl")
    yield from overrides(SELF, "prompts=/dev/zero", "prompts=a b", "model=/no/such", "steps=7")
    yield from overrides(SELF, "temperature=nan", "mesh=1", "dtype=x", "gen_length=99999999")
    for program in ("train.align", "train.grpo", "train.pretrain", "train.self_generate"):
        yield Case(f"{program} without arguments", (program,))
        yield Case(f"{program} --help me", (program, "/no/such.toml"))
    yield Case("from_hf onto a file", ("convert.from_hf", "{model}", "{tmp}"))
    yield Case("from_hf of nothing", ("convert.from_hf", "{tmp}/none", "{out}"))
    for size in ("x", "0", "-1", "1XB", LONG, "nan", ""):
        name = f"to_hf --max-shard-size {size[:9]!r}"
        yield Case(name, ("convert.to_hf", "{model}", "{out}", "--max-shard-size", size))
    yield Case("to_hf of a model", ("convert.to_hf", "{model}", "{out}"))
    yield Case("verify of a model without code", ("convert.verify", "{model}"))
    yield Case("verify of nothing", ("convert.verify", "/no/such"))


# Bad files, for every reader


def text(content: str | bytes) -> Callable[[Path], object]:
    data = content.encode() if isinstance(content, str) else content
    return lambda file: file.write_bytes(data)


def sparse(file: Path) -> None:
    with file.open("wb") as f:
        f.truncate(2**40)


CONTENTS: dict[str, Callable[[Path], object]] = {
    "missing": lambda file: None,
    "folder": Path.mkdir,
    "pipe": os.mkfifo,
    "device": lambda file: file.symlink_to("/dev/zero"),
    "loop": lambda file: file.symlink_to(file.name),
    "sparse": sparse,
    "empty": text(""),
    "blank": text(" \n\n"),
    "NUL": text(b"\0" * 100),
    "noise": text(bytes(range(256)) * 4),
    "not UTF-8": text(b'{"a": "\xff"}'),
    "UTF-16": text('{"a": 1}'.encode("utf-16")),
    "deep": text(DEEP),
    "deep objects": text('{"a":' * 5000 + "1" + "}" * 5000),
    "digits": text(LONG),
    "digits inside": text('{"a": ' + LONG + "}"),
    "cut": text('{"a": [1, '),
    "surrogate": text('{"prompt": "\\ud800", "response": "\\ud800", "task_id": "\\ud800"}'),
    "key twice": text('{"a": 1, "a": 2}'),
    "number": text("3"),
    "list": text("[1, 2]"),
    "text": text('"abc"'),
    "null": text("null"),
    "NaN": text("NaN"),
    "object": text("{}"),
    "wrong types": text(
        '{"task_id": 1, "prompt": [[]], "response": {}, "messages": 3, "prompt_ids": "x", '
        '"response_ids": [1.5], "rows": 3, "weight_map": 3, "completion": null}'
    ),
    "wrong items": text(
        '{"task_id": [], "prompt": [null], "response": [null], "messages": [3], '
        '"prompt_ids": [-1], "response_ids": [1e9], "rows": [3], "weight_map": [], "completion": 1}'
    ),
    "escapes": text('{"\\u001b[2J": "\\u001b[2J", "task_id": "\\u001b[2J", "completion": ""}'),
    "gzip cut": text(gzip.compress(b'{"a": 1}\n' * 99)[:-9]),
    "gzip noise": text(b"\x1f\x8b" + bytes(range(256))),
    "python": text("import os\nos.abort()\n"),
}
READERS: dict[str, tuple[str, ...]] = {
    "humaneval": ("xflow", "evaluate", "--canonical", "--task", "humaneval", "--data", "{bad}"),
    "mbpp": ("xflow", "evaluate", "--canonical", "--task", "mbpp", "--data", "{bad}"),
    "answers": ("xflow", "evaluate", "--task", "microcode", "--answers", "{bad}"),
    "likelihood": (
        *("xflow", "evaluate", "--model", "{model}", "--task", "likelihood", "--data", "{bad}"),
    ),
    "rows of a plan": (*PLAN, "--json", "{bad}"),
    "policy": (*GENERATE, "--rule", "flow:policy={bad}"),
    "prompts": (*SELF, "prompts={bad}"),
    "parquet": (*SELF, "prompts={bad}.parquet"),
    "responses": (*ALIGN, 'data=["{bad}"]'),
    "TOML": ("train.align", "{bad}"),
    "start of a policy": (*GRPO, "policy.init={bad}"),
}
# What a reader takes: an empty plan is begun anew, a device is read by no one.
RIGHT = {("rows of a plan", "missing")}
# Files beside the weights of a model.
PARTS = ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")
PARTS += ("model.safetensors.index.json", "_CHECKPOINT_METADATA")
RIGHT |= {(part, "missing") for part in PARTS[2:]}
# The library of tokenizers takes any object as a configuration.
RIGHT |= {("tokenizer_config.json", name) for name in ("object", "wrong types", "wrong items")}
RIGHT |= {("tokenizer_config.json", name) for name in ("surrogate", "key twice", "escapes")}
RIGHT |= {("tokenizer_config.json", "digits inside")}


def file_cases() -> Iterator[Case]:
    """Every reader with every bad file."""
    for reader, argv in READERS.items():
        for content, make in CONTENTS.items():
            if (reader, content) not in RIGHT:
                suffix = ".parquet" if reader == "parquet" else ""

                def bad(file: Path, make=make, suffix=suffix) -> None:
                    make(file.with_name(file.name + suffix))

                yield Case(f"{reader}: {content}", argv, bad)
    for part in PARTS:
        for content, make in CONTENTS.items():
            if (part, content) not in RIGHT:

                def damage(file: Path, make=make, part=part) -> None:
                    shutil.copytree(file.with_name("model"), file)
                    (file / part).unlink(missing_ok=True)
                    make(file / part)

                argv = ("xflow", "generate", "--model", "{bad}", "--prompt", "Add 1.")
                yield Case(f"{part}: {content}", argv, damage)


OPTIONS, FILES = list(option_cases()), list(file_cases())
STRIDE = 3  # one case of three is in the default run


def spread(cases: list[Case]) -> list[object]:
    """Marks all but every third case as slow."""
    return [
        pytest.param(case, id=case.name, marks=[pytest.mark.slow] if number % STRIDE else [])
        for number, case in enumerate(cases)
    ]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A directory with a random model and microcode's tokenizer."""
    path = tmp_path_factory.mktemp("source") / "random"
    lm = tiny_lm()
    write_hf(path, lm.params, lm.config, tokenizer_dir=TINY)
    return path


def run(argv: list[str]) -> object:
    """Runs a program as its command does, and returns its exit status."""
    program, *rest = argv
    if program == "xflow":
        return main.main(rest)
    before = sys.argv
    sys.argv = [program, *rest]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # that the module is imported already
            runpy.run_module(program, run_name="__main__", alter_sys=True)
    finally:
        sys.argv = before
    return 0


@contextlib.contextmanager
def time_limit() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TimeoutError(f"more than {WAIT} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(WAIT)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def check(case: Case, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Runs a case, and checks its status and its sentence."""
    shutil.copytree(model, tmp_path / "model")
    if case.make is not None:
        case.make(tmp_path / "bad")
    names = {"{model}": "model", "{bad}": "bad", "{out}": "out", "{tmp}": "."}
    argv = list(case.argv)
    for name, place in names.items():
        argv = [word.replace(name, str(tmp_path / place)) for word in argv]
    present = {path.name for path in tmp_path.iterdir()}
    began = time.process_time()
    try:
        with time_limit():
            status = run(argv)
    except SystemExit as leave:
        status = leave.code
    seconds = time.process_time() - began
    printed = capsys.readouterr()
    assert status == 2, (status, printed.out[-500:], printed.err[-500:])
    last = printed.err.rstrip("\n").split("\n")[-1]
    assert "error: " in last or last.startswith("usage: "), printed.err
    assert "Traceback" not in printed.err and last.isprintable() and len(last) < 2500
    assert seconds < SECONDS
    assert {path.name for path in tmp_path.iterdir()} == present, "something was written"


@pytest.mark.parametrize("case", spread(OPTIONS))
def test_bad_options(case, model, tmp_path, capsys):
    check(case, model, tmp_path, capsys)


@pytest.mark.parametrize("case", spread(FILES))
def test_bad_files(case, model, tmp_path, capsys):
    check(case, model, tmp_path, capsys)


def test_there_are_enough_cases():
    names = [case.name for case in OPTIONS + FILES]
    assert len(set(names)) == len(names) >= 300 * STRIDE
