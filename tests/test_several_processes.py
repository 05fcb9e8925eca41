"""Several processes on loopback: all programs, one that is killed, and fewer of them after."""

from __future__ import annotations

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import chex
import pytest

from convert.from_hf import convert
from convert.to_hf import convert as convert_back
from tests.gcs_helpers import BUCKET, bucket_server, use_server
from tests.process_helpers import ProcessGroup
from tests.train.test_align import QUICK, write_responses
from tests.train.test_grpo import QUICK as QUICK_GRPO
from tests.train.test_grpo import write_model
from train.step_clock import TIME_METRICS
from xflow_jax.checkpoints import write_atomic
from xflow_jax.decoding import Policy, load_policy
from xflow_jax.input_files import object_sizes, read_bytes, read_jsonl, to_path
from xflow_jax.lm import load

POLICY = "policy.safetensors"
TOO_LATE = 120.0  # seconds in which the other processes end if one is killed
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "hf")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    """Responses to align with."""
    return write_responses(tmp_path_factory.mktemp("data") / "responses.jsonl").read_text()


class Way:
    """All programs with their results in one place, a folder or a bucket.

    Args:
        place: the place.
        logs: folder on the disk for what the programs print.
        count: number of processes.
        devices: number of devices of each.
        mesh: the mesh of all of them.
    """

    def __init__(self, place: Path, logs: Path, count: int, devices: int, mesh: str) -> None:
        self.place, self.logs = place, logs
        self.count, self.devices, self.mesh = count, devices, mesh

    def start(self, *words: object) -> ProcessGroup:
        """Starts a program."""
        name = f"{len(list(self.logs.glob('*')))}-{words[0]}"
        return ProcessGroup(list(words), self.logs / name, self.count, self.devices)

    def run(self, *words: object) -> str:
        """Runs a program to its end. Returns its output."""
        with self.start(*words) as group:
            return group.finish()

    def alignment(self) -> list[object]:
        """Returns the command of an alignment."""
        words: list[object] = ["train.align", "configs/align_tiny.toml", *QUICK, "steps=12"]
        words += ["optimizer.rate=1e-4"]  # a larger one amplifies rounding
        words += [f"model={self.place / 'converted'}", f"mesh={self.mesh}"]
        return [*words, f'data=["{self.place}/responses.jsonl"]', f"out={self.place / 'align'}"]

    def grpo_and_evaluate(self, model: Path) -> None:
        """Trains a policy of a model, and evaluates both."""
        words = [*QUICK_GRPO, "steps=2", f"model={model}", f"mesh={self.mesh}"]
        words += [f"out={self.place / 'grpo'}", f"solved={self.place}/solved"]
        self.run("train.grpo", "configs/grpo_tiny.toml", *words)
        rules = f"mask,flow:policy={self.place / 'grpo' / POLICY}"
        command: list[object] = ["xflow_jax", "evaluate", "--model", model, "--task", "microcode"]
        command += ["--rules", rules, "--limit", "5", "--budgets", "1/16", "--batch-size", "8"]
        self.run(*command, "--mesh", self.mesh, "--out", self.place / "evaluate")

    def go_on(self) -> None:
        """Aligns, trains a policy and evaluates."""
        self.run(*self.alignment())
        self.grpo_and_evaluate(self.place / "align" / "model")

    def decode(self) -> list[str]:
        """Returns the lines of an answer."""
        words = ["xflow_jax", "generate", "--gen-length", "16", "--prompt", "sum", "--mesh"]
        text = self.run(*words, self.mesh, "--model", self.place / "converted")
        return [line for line in text.splitlines() if line[:1] != "["]  # of Gloo and of times

    def policy(self) -> Policy:
        return load_policy(str(self.place / "grpo" / POLICY))

    def metrics(self, name: str) -> list[dict[str, float]]:
        """Returns the metrics of a run, without times."""
        lines = [value for _, value in read_jsonl(self.place / name / "metrics.jsonl")]
        return [{k: v for k, v in line.items() if k not in TIME_METRICS} for line in lines]

    def answers(self) -> list[tuple]:
        """Returns the answers of an evaluation. The label of a rule has the place of its policy."""
        keys = ("task_id", "text", "passed", "forward_passes")
        lines = [value for _, value in read_jsonl(self.place / "evaluate" / "answers.jsonl")]
        return sorted((line["rule"].split(":")[0], *(line[k] for k in keys)) for line in lines)


def kill_one_of(group: ProcessGroup, victim: int) -> None:
    """Kills a process. The others must end in time, each with a sentence.

    If nothing is exchanged at the moment, the sentence is that of JAX's missing sign of life.
    """
    os.kill(group.runs[victim].pid, signal.SIGKILL)
    began = time.monotonic()
    for run in group.runs:
        run.wait(max(1.0, began + TOO_LATE - time.monotonic()))
    print(f"{time.monotonic() - began:.1f} s, status {[run.returncode for run in group.runs]}")
    others = [rank for rank in range(len(group.runs)) if rank != victim]
    assert all(group.runs[rank].returncode not in (0, 2) for rank in others)
    for rank in others:
        text = group.log(rank).read_text()
        assert "another process of this run has ended" in text or "another task died" in text


def saved_steps(out: Path) -> list[int]:
    """Returns the steps of the complete checkpoints of a run."""
    return [step for step in range(13) if (out / "checkpoints" / str(step) / "files.json").exists()]


def test_two_processes_on_a_bucket_equal_those_on_a_disk(model, data, tmp_path):
    """Convert, align (killed, resumed), GRPO, evaluate, and export back."""
    with bucket_server(tmp_path) as variables:
        use_server(variables)
        places = {"disk": tmp_path / "disk", "bucket": to_path(f"gs://{BUCKET}/way")}
        ways = [Way(p, tmp_path / "logs" / name, 2, 4, "2,4,1") for name, p in places.items()]
        disk, there = ways
        for way in ways:
            convert(model, way.place / "converted")
            write_atomic(way.place / "responses.jsonl", data)
        with there.start(*there.alignment()) as group:
            group.wait_until(lambda: bool(saved_steps(there.place / "align")))
            kill_one_of(group, 1)
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(Way.go_on, ways))
        for name in ("align", "grpo"):
            assert there.metrics(name) == disk.metrics(name) != []
        assert there.answers() == disk.answers() and len(disk.answers()) == 10
        for name in ("converted", "align/model"):
            chex.assert_trees_all_equal(*(load(str(way.place / name)).params for way in ways))
        chex.assert_trees_all_equal(*(way.policy().params for way in ways))
        for way in ways:
            convert_back(way.place / "align" / "model", way.place / "back")
        for name in object_sizes(there.place / "back"):
            assert read_bytes(there.place / "back" / name) == read_bytes(disk.place / "back" / name)


def test_eight_processes_and_four_after_one_is_killed(model, data, tmp_path):
    """Decode, align (killed, resumed by four), GRPO and evaluate."""
    eight = Way(tmp_path / "run", tmp_path / "logs" / "eight", 8, 1, "2,4,1")
    four = Way(tmp_path / "run", tmp_path / "logs" / "four", 4, 1, "1,4,1")
    one = Way(tmp_path / "one", tmp_path / "logs" / "one", 1, 1, "1,1,1")
    for way in (eight, one):
        convert(model, way.place / "converted")
        write_atomic(way.place / "responses.jsonl", data)
    with ThreadPoolExecutor(2) as pool:
        ours, theirs = pool.map(Way.decode, (eight, one))
    assert ours == theirs and any(ours)
    with one.start(*one.alignment()) as alone:
        with eight.start(*eight.alignment()) as group:
            group.wait_until(lambda: bool(saved_steps(eight.place / "align")))
            kill_one_of(group, 5)
        assert not (eight.place / "align" / "model").exists()
        four.run(*four.alignment())
        alone.finish()
    for line, other in zip(four.metrics("align"), one.metrics("align"), strict=True):
        # The gradient of a random model amplifies rounding.
        chex.assert_trees_all_close(line | {"grad_norm": 0}, other | {"grad_norm": 0}, rtol=1e-3)
    aligned = eight.place / "align" / "model"
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda way: way.grpo_and_evaluate(aligned), (eight, one)))
    chex.assert_trees_all_close(eight.policy().params, one.policy().params, atol=1e-3)
    assert eight.answers() == one.answers() and len(one.answers()) == 10
