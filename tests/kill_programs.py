"""Kills programs at random moments: `python -m tests.kill_programs [PROGRAM ...] [--kills N]`.

Each program gets SIGKILL after a random time, again and again, and the same command is given until
it ends. It must never be blocked, and its results must be those of a run that nobody killed, bit
for bit. Then the command is given twice at once.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from train.step_clock import TIME_METRICS

ROOT = Path(__file__).parents[1]
TINY = ROOT / "xflow_jax" / "tiny"
LIMIT = 900  # seconds of one call
# Columns and keys of measured times, which differ from run to run.
TIMES = ("seconds", *TIME_METRICS)
LEFT_BEHIND = re.compile(r"\.(partial|replaced|lock|tmp)(/|$)|orbax-checkpoint-tmp")
COMPLETE = "the destination exists"
IN_USE = ("is writing it", COMPLETE)


@dataclass(frozen=True)
class Program:
    """A program, and the results that a killed run must equal.

    Attributes:
        words: the command after `python -m`. Places are relative to the folder of a trial.
        results: patterns of the files that are compared.
    """

    words: Sequence[str]
    results: Sequence[str]


MODEL = "model=../model"
PROGRAMS = {
    "pretrain": Program(
        (
            *("train.pretrain", f"{ROOT}/configs/pretrain_tiny.toml", "out=run"),
            *(f"tokenizer={TINY}", "model.d_model=16", "model.n_layers=1", "model.n_heads=2"),
            *("model.mlp_hidden_size=16", "batch_size=4", "steps=40", "save_every=3"),
            *("log_every=1", "evaluate_every=10", "evaluate_problems=4", "seed=3"),
        ),
        ("run/metrics.jsonl", "run/hf/*"),
    ),
    "gaussian": Program(
        (
            *("train.gaussian", f"{ROOT}/configs/gaussian_tiny.toml", "out=run"),
            *(f"tokenizer={TINY}", "model.d_model=16", "model.n_layers=1", "model.n_heads=2"),
            *("model.mlp_hidden_size=16", "batch_size=4", "steps=40", "save_every=3"),
            *("log_every=1", "evaluate_every=20", "evaluate_problems=4", "answers=4"),
            *("passes=[4,2]", "seed=3"),
        ),
        ("run/metrics.jsonl", "run/answers/*"),
    ),
    "self_generate": Program(
        (
            *("train.self_generate", f"{ROOT}/configs/self_generate_tiny.toml", MODEL),
            *("out=run/responses.jsonl", "limit=96", "steps=12", "batch_size=8", "seed=2"),
            "temperature=0.7",
        ),
        ("run/*",),
    ),
    "align": Program(
        (
            *("train.align", f"{ROOT}/configs/align_tiny.toml", MODEL, "out=run"),
            *('data=["../responses.jsonl"]', "batch_size=8", "held_out=8", "limit=0", "steps=30"),
            *("save_every=3", "log_every=1", "only_passed=false", "chunk=16", "seed=3"),
        ),
        ("run/metrics.jsonl", "run/hf/*", "run/alignment.png"),
    ),
    "sft": Program(
        (
            *("train.sft", f"{ROOT}/configs/sft_tiny.toml", MODEL, "out=run"),
            *('data=["../pairs.jsonl"]', "batch_size=8", "held_out=8", "limit=0", "steps=30"),
            *("lengths=[24,32]", "save_every=3", "log_every=1", "chunk=16", "seed=3"),
        ),
        ("run/metrics.jsonl", "run/hf/*"),
    ),
    "grpo": Program(
        (
            *("train.grpo", f"{ROOT}/configs/grpo_tiny.toml", MODEL, "out=run", "solved=solved"),
            *("problems=8", "solved_only=false", "failed_by=", "prompts_per_step=2"),
            *("group_size=4", "steps=16", "budget=1/16", "policy.init=fresh", "policy.a_max=1"),
            *("switches=", "scale_rewards=group", "save_every=2", "evaluate_every=8"),
            *("evaluate_problems=4", "batch_size=4", "rate=1e-2", "seed=4"),
        ),
        ("run/metrics.jsonl", "run/policy.safetensors", "run/policy.png"),
    ),
    "entry": Program(
        (
            *("train.entry", f"{ROOT}/configs/entry_latin_square.toml", MODEL, "out=run"),
            *("problems=4", "batch_size=4", "budget=1/16", "width=8", "steps=40", "states=12"),
            *("log_every=1", "save_every=2", "seed=4"),
        ),
        ("run/metrics.jsonl", "run/policy.safetensors"),
    ),
    "from_hf": Program(("convert.from_hf", "../model", "run/orbax"), ("run/orbax",)),
    "to_hf": Program(("convert.to_hf", "../orbax", "run/hf"), ("run/hf/*",)),
    "evaluate": Program(
        (
            *("xflow_jax", "evaluate", "--model", "../model", "--task", "microcode", "--out"),
            *("run", "--rules", "mask:order=random,flow", "--budgets", "1/4,1/8", "--limit", "16"),
            *("--batch-size", "4", "--samples", "2", "--seed", "5", "--mesh", "1,1,1"),
        ),
        ("run/answers.jsonl", "run/results.csv", "run/run.json"),
    ),
}


def prepare(work: Path) -> None:
    """Writes a small random model, its converted form and responses into a folder."""
    import jax

    from train.pretrain import make_model_config
    from train.pretrain_config import ModelShape, PretrainConfig
    from xflow_jax.checkpoints import save_params, write_hf
    from xflow_jax.models import build, init_params
    from xflow_jax.tokenizer import load_tokenizer

    shape = ModelShape(d_model=32, n_layers=2, n_heads=2, mlp_hidden_size=48)
    tokenizer = load_tokenizer(TINY)
    assert tokenizer is not None
    config = make_model_config(PretrainConfig(out="", tokenizer="", model=shape), tokenizer)
    params = jax.tree.map(lambda x: 20 * x, init_params(build(config), jax.random.key(0)))
    write_hf(work / "model", params, config, TINY)
    save_params(work / "orbax", params, config, TINY)
    rng = np.random.default_rng(0)
    lines = [
        {name: rng.integers(30, 90, 8).tolist() for name in ("prompt_ids", "response_ids")}
        for _ in range(64)
    ]
    (work / "responses.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    pairs = [{"prompt": "Sum them.", "response": "return sum(xs)"[: 3 + i % 12]} for i in range(64)]
    (work / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in pairs))


def environment_of(work: Path) -> dict[str, str]:
    """Returns the environment of the programs, which share what they have compiled."""
    return os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_COMPILATION_CACHE": "true",
        "JAX_COMPILATION_CACHE_DIR": str(work / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
    }


def start(program: Program, trial: Path) -> subprocess.Popen[str]:
    """Starts a program in the folder of a trial."""
    trial.mkdir(exist_ok=True)
    with (trial / "stderr").open("w") as errors:
        return subprocess.Popen(
            [sys.executable, "-m", *program.words],
            cwd=trial,
            env=environment_of(trial.parent),
            stdout=subprocess.DEVNULL,
            stderr=errors,
            text=True,
        )


def errors_of(trial: Path) -> str:
    """Returns the end of what the last call wrote to stderr."""
    return (trial / "stderr").read_text()[-2000:]


def results(program: Program, trial: Path) -> dict[str, object]:
    """Reads the results of a trial, without times."""
    left = [str(p.relative_to(trial)) for p in trial.rglob("*")]
    found: dict[str, object] = {"left": [name for name in left if LEFT_BEHIND.search(name)]}
    for pattern in program.results:
        files = sorted(trial.glob(pattern))
        assert files, f"{trial} has no {pattern}"
        found |= {str(file.relative_to(trial)): _content(file) for file in files}
    return found


def _content(file: Path) -> object:
    if file.is_dir():  # a converted checkpoint, whose files have random names
        from flax.traverse_util import flatten_dict

        from xflow_jax.checkpoints import load_params

        config, params = load_params(file, "float32")
        leaves = flatten_dict(params, sep="/")
        return config.to_hf(), {name: np.asarray(x).tobytes() for name, x in leaves.items()}
    if file.suffix == ".jsonl":
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]
    if file.suffix == ".csv":
        header, *lines = (line.split(",") for line in file.read_text().splitlines())
        return [[v for k, v in zip(header, row, strict=True) if k not in TIMES] for row in lines]
    return file.read_bytes()


def run_straight(program: Program, work: Path, name: str) -> tuple[dict[str, object], float]:
    """Runs a program twice, and returns the results and the seconds of the second call."""
    seconds = 0.0
    for trial in (work / f"{name}-first", work / f"{name}-straight"):  # the first one compiles
        began = time.monotonic()
        process = start(program, trial)
        assert process.wait(LIMIT) == 0, errors_of(trial)
        seconds = time.monotonic() - began
    wanted = results(program, work / f"{name}-first")
    assert results(program, work / f"{name}-straight") == wanted, f"two runs of {name} differ"
    return wanted, seconds


def kill_often(
    program: Program, work: Path, name: str, kills: int, chance: random.Random
) -> tuple[int, int]:
    """Kills a program at random moments and compares the results.

    Returns:
        Kills, and completed runs that were killed at least once.
    """
    wanted, seconds = run_straight(program, work, name)
    done = resumed = number = 0
    while done < kills:
        trial, own = work / f"{name}-{number}", 0
        number += 1
        while True:
            process, began = start(program, trial), time.monotonic()
            # Programs import and compile at first, so later moments are likelier.
            moment = seconds * chance.uniform(0.6 * chance.random(), 1.1)
            moment = moment if done < kills and own < 6 else LIMIT
            try:
                status = process.wait(moment)
            except subprocess.TimeoutExpired:
                assert moment < LIMIT, f"{name} does not end"
                process.send_signal(signal.SIGKILL)
                process.wait()
                own, done = own + 1, done + 1
                continue
            if own == 0:  # the machine has become faster
                seconds = min(seconds, time.monotonic() - began)
            # A conversion can be killed after its last rename, when all is done.
            over = own > 0 and COMPLETE in errors_of(trial)
            assert status == 0 or over, f"{name} is blocked after {own} kills: {errors_of(trial)}"
            break
        found = results(program, trial)
        assert found.keys() == wanted.keys(), (name, found.keys() ^ wanted.keys())
        differing = [key for key in wanted if found[key] != wanted[key]]
        assert not differing, f"{name} differs after {own} kills in {differing}, see {trial}"
        resumed += own > 0
    return done, resumed


def run_twice_at_once(program: Program, work: Path, name: str) -> str:
    """Gives a command twice at once. Returns the sentence by which one is refused."""
    wanted = results(program, work / f"{name}-straight")
    trial = work / f"{name}-twice"
    both = [start(program, trial)]
    (trial / "stderr").rename(trial / "stderr-first")
    both.append(start(program, trial))
    statuses = [process.wait(LIMIT) for process in both]
    assert sorted(statuses) == [0, 2], (name, statuses, errors_of(trial))
    file = trial / ("stderr-first" if statuses[0] else "stderr")
    sentence = file.read_text().splitlines()[-1]
    assert any(part in sentence for part in IN_USE), sentence
    assert "Traceback" not in file.read_text()
    assert results(program, trial) == wanted, f"{name}, started twice at once, has other results"
    return sentence


SMALL_DISK = """
set -e
mount -t tmpfs -o size=16k tmpfs "$1"
cd "$1"; n=0; shift
for option in $SIZES; do
  mount -o remount,$option tmpfs .
  n=$((n + 1))
  "$@" >/dev/null 2>"$REPORTS/$n" && echo 0 >"$REPORTS/$n.status" || echo $? >"$REPORTS/$n.status"
done
mount -o remount,rw tmpfs .
cp -a . "$REPORTS/trial"
"""


def fill_disk(program: Program, work: Path, name: str) -> list[str]:
    """Runs a program on disks that are too small or read-only, and at last on a large one.

    Returns:
        The sentences by which the program ended.
    """
    straight = work / f"{name}-straight"
    wanted, size = results(program, straight), _disk_usage(straight)
    trial, reports = work / f"{name}-small", work / f"{name}-reports"
    for folder in (trial, reports):
        folder.mkdir()
    shares = (0.02, 0.1, 0.25, 0.4, 0.55, 0.7, 0.85, 1.0)
    options = [f"size={max(int(share * size), 8192)}" for share in shares]
    options = [*options[:3], "ro", "rw", *options[3:], "size=1g"]
    environment = environment_of(work) | {"SIZES": " ".join(options), "REPORTS": str(reports)}
    # As root of the machine no user namespace is needed, in which the sandbox has fewer rights.
    namespaces = "-m" if os.geteuid() == 0 else "-rm"
    command = ["unshare", namespaces, "sh", "-c", SMALL_DISK, "sh", str(trial)]
    command += [sys.executable, "-m", *program.words]
    subprocess.run(command, env=environment, check=True, timeout=3 * LIMIT)
    statuses = [int((reports / f"{n}.status").read_text()) for n in range(1, len(options) + 1)]
    sentences = []
    for number, (option, status) in enumerate(zip(options, statuses, strict=True), start=1):
        text = (reports / str(number)).read_text()
        last = text.rstrip().split("\n")[-1]
        assert "Traceback" not in text, f"{name}, {option}: {text[-3000:]}"
        assert status == 0 or (status == 2 and last.startswith("error: ")), (name, option, text)
        if status:
            sentences.append(f"{option}: {last}")
    assert statuses[0] == 2 and (statuses[-1] == 0 or COMPLETE in sentences[-1]), sentences
    assert results(program, reports / "trial") == wanted, f"{name} differs, see {reports}"
    return sentences


def _disk_usage(folder: Path) -> int:
    return sum(file.stat().st_blocks * 512 for file in folder.rglob("*"))


def main() -> None:
    """Prints the number of kills, of blocked calls and of differing runs of each program."""
    parser = argparse.ArgumentParser(prog="python -m tests.kill_programs", description=__doc__)
    parser.add_argument("programs", nargs="*", help=f"of {', '.join(PROGRAMS)} (default: all)")
    parser.add_argument("--kills", type=int, default=30, help="kills of each (default: 30)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments (default: 0)")
    parser.add_argument("--work", type=Path, help="folder to make, which stays")
    arguments = parser.parse_args()
    work = arguments.work or Path(tempfile.mkdtemp())
    work.mkdir(exist_ok=True)
    prepare(work)
    for name in arguments.programs or PROGRAMS:
        program, chance = PROGRAMS[name], random.Random(arguments.seed)
        kills, resumed = kill_often(program, work, name, arguments.kills, chance)
        print(f"{name}: {kills} kills, {resumed} runs resumed, 0 blocked, 0 differ", flush=True)
        print(f"{name}, twice: {run_twice_at_once(program, work, name)}", flush=True)
        print(f"{name}, too small disks: {fill_disk(program, work, name)}", flush=True)
    if arguments.work is None:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
