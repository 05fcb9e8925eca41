"""The whole way on gs://: convert, load, align (killed, resumed), evaluate, shares, export back.

The bucket is a server on loopback. Every result equals that on a disk.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.gcs_helpers import BUCKET, bucket_server, use_server
from tests.hf_helpers import GOLDEN, TOY, random_params
from tests.train.test_align import QUICK, write_responses
from tests.train.test_run import train as count
from train.step_clock import TIME_METRICS
from xflow_jax.checkpoints import CHECKSUM_FILE, find_damage, write_hf
from xflow_jax.errors import UserError
from xflow_jax.input_files import (
    delete_object,
    list_objects,
    object_sizes,
    read_bytes,
    read_jsonl,
    to_path,
    write_object,
)
from xflow_jax.lm import load

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    with bucket_server(tmp_path_factory.mktemp("server")) as variables:
        use_server(variables)
        yield to_path(f"gs://{BUCKET}")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "hf"
    write_hf(folder, random_params(TOY), TOY, GOLDEN)
    return folder


def program(*words: object, check: bool = True) -> subprocess.CompletedProcess:
    """Runs python -m with these words."""
    command = [sys.executable, "-m", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, check=check, capture_output=True, text=True)


def params_of(lm) -> dict[str, np.ndarray]:
    from flax.traverse_util import flatten_dict

    return {name: np.asarray(x) for name, x in flatten_dict(lm.params, sep="/").items()}


def assert_same(one, other) -> None:
    first, second = params_of(one), params_of(other)
    assert first.keys() == second.keys()
    for name, values in first.items():
        np.testing.assert_array_equal(values, second[name], name)


@pytest.fixture(scope="module")
def converted(bucket, model):
    """The model as a converted checkpoint in the bucket."""
    program("convert.from_hf", model, bucket / "converted")
    return bucket / "converted"


def test_a_model_travels_there_and_back(bucket, model, converted, tmp_path):
    assert_same(load(str(converted)), load(model))
    assert_same(load(str(converted), mesh="1,2,1"), load(model))
    again = program("convert.from_hf", model, converted, check=False)
    assert again.returncode == 2 and "the destination exists" in again.stderr
    program("convert.to_hf", converted, bucket / "back")
    program("convert.to_hf", converted, tmp_path / "back")
    for name in object_sizes(bucket / "back"):
        assert read_bytes(bucket / "back" / name) == (tmp_path / "back" / name).read_bytes(), name
    assert_same(load(str(bucket / "back")), load(model))
    program("convert.from_hf", bucket / "back", bucket / "again")
    assert_same(load(str(bucket / "again")), load(model))
    found = program("convert.verify", "--checksums", converted).stdout
    assert "have the sizes and checksums of files.json" in found


def test_damage_is_one_sentence_that_names_the_object(converted):
    """A flipped bit, a truncated chunk, a missing piece, a marker without data."""
    sizes = object_sizes(converted)
    name = max((n for n in sizes if "/d/" in n), key=lambda n: sizes[n])
    states = {
        "flipped": "has another checksum than when it was written",
        "cut": f"has {sizes[name] - 7} bytes, not {sizes[name]}",
        "gone": "is missing",
    }
    for kind in damaged(converted / name):
        with pytest.raises(UserError) as error:
            load(str(converted))
        assert str(error.value).startswith(f"{converted / name}: the file {states[kind]}.")
    load(str(converted))
    marker = read_bytes(converted / CHECKSUM_FILE)
    empty = converted.with_name("marker-alone")
    write_object(empty / CHECKSUM_FILE, marker)
    with pytest.raises(UserError, match="there is no model"):
        load(str(empty))
    delete_object(converted / CHECKSUM_FILE)
    with pytest.raises(UserError, match="an incomplete checkpoint"):
        load(str(converted))
    write_object(converted / CHECKSUM_FILE, marker)


def test_damage_to_an_exported_model_names_the_object(bucket):
    folder = bucket / "exported"
    write_hf(folder, random_params(TOY), TOY, GOLDEN, max_shard_size=40_000)
    file = folder / max(name for name in object_sizes(folder) if name.endswith(".safetensors"))
    for _ in damaged(file):
        with pytest.raises(UserError) as error:
            load(str(folder))
        assert str(error.value).startswith(f"{file}: ") and "\n" not in str(error.value)
    load(str(folder))


def damaged(file: Path) -> Iterator[str]:
    """Yields while an object has a flipped bit, is cut off, and is gone."""
    whole = read_bytes(file)
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 4
    for kind, data in (("flipped", bytes(flipped)), ("cut", whole[:-7]), ("gone", None)):
        if data is None:
            delete_object(file)
        else:
            write_object(file, data)
        yield kind
        write_object(file, whole)


def test_a_run_continues_before_a_damaged_checkpoint(bucket, tmp_path, capsys):
    """Also if the last object of a checkpoint is there alone."""
    expected = count(tmp_path / "run", 6)
    for kind in ("flipped", "cut", "gone", "alone"):
        folder = bucket / "counted" / kind
        count(folder, 4)
        last = folder / "checkpoints" / "4"
        sizes = object_sizes(last)
        if kind == "alone":
            for name in sizes:
                if name != "commit_success.txt":
                    delete_object(last / name)
        else:
            largest = max(sizes, key=lambda name: sizes[name])
            # The iterator is left, so the damage stays.
            next(found for found in damaged(last / largest) if found == kind)
        state = count(folder, 6)
        for name, value in expected.items():
            np.testing.assert_array_equal(state[name], value, f"{kind}: {name}")
        assert f"warning: {last}: " in capsys.readouterr().err
        assert [line["step"] for _, line in read_jsonl(folder / "metrics.jsonl")] == [*range(1, 7)]


def test_a_killed_conversion_continues(bucket, model):
    place = bucket / "killed"
    command = [sys.executable, "-m", "convert.from_hf", str(model), str(place)]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL) as running:
        wait_for(
            lambda: any(
                "commit_success" in n and "." in n.split("/")[0] for n in list_objects(place)
            ),
            running,
        )
        running.send_signal(signal.SIGKILL)
    with pytest.raises(UserError, match="an incomplete checkpoint"):
        load(str(place))
    program("convert.from_hf", model, place)
    assert_same(load(str(place)), load(model))


def wait_for(condition, running: subprocess.Popen, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert running.poll() is None and time.monotonic() < end
        time.sleep(0.05)


def test_a_killed_alignment_equals_one_on_a_disk(bucket, model, converted, tmp_path):
    data = write_responses(tmp_path / "responses.jsonl")
    write_object(bucket / "responses.jsonl", data.read_bytes())
    config = ["train.align", "configs/align_tiny.toml", *QUICK]
    on_disk = [*config, f"model={model}", f'data=["{data}"]', f"out={tmp_path / 'run'}"]
    program(*on_disk)
    out = bucket / "run"
    there = [*config, f"model={converted}", f'data=["{bucket}/resp*.jsonl"]', f"out={out}"]
    command = [sys.executable, "-m", *there]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL) as running:
        wait_for(lambda: "checkpoints/2/commit_success.txt" in object_sizes(out), running)
        running.send_signal(signal.SIGSTOP)  # it is alive, and does not end meanwhile
        second = program(*there, check=False)
        assert second.returncode == 2 and "is writing it" in second.stderr
        running.send_signal(signal.SIGKILL)
    program(*there)
    lines = [value for _, value in read_jsonl(out / "metrics.jsonl")]
    expected = [value for _, value in read_jsonl(tmp_path / "run" / "metrics.jsonl")]
    for line in (*lines, *expected):
        for name in TIME_METRICS:
            line.pop(name, None)
    assert lines == expected
    assert_same(load(str(out / "hf")), load(tmp_path / "run" / "hf"))
    assert find_damage(out / "checkpoints" / "6", CHECKSUM_FILE) is None


def test_sigterm_ends_with_a_status_to_restart_on(bucket, converted):
    out = bucket / "stopped"
    words = ["train.align", "configs/align_tiny.toml", *QUICK, "steps=400", "save_every=200"]
    words += [f"model={converted}", f'data=["{bucket}/responses.jsonl"]', f"out={out}"]
    command = [sys.executable, "-m", *words]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL) as running:
        pieces = re.compile(r"metrics\.jsonl\..*")  # of the steps, behind the line of step 0
        wait_for(lambda: any(map(pieces.fullmatch, object_sizes(out))), running)
        running.send_signal(signal.SIGTERM)
        assert running.wait(300) == 75
    assert "run.lock" not in object_sizes(out)
    assert any(re.fullmatch(r"checkpoints/\d+/commit_success.txt", n) for n in object_sizes(out))


def answers(place) -> list[tuple]:
    keys = ("rule", "budget", "task_id", "seed", "text", "passed", "reason", "forward_passes")
    return sorted(tuple(v[k] for k in keys) for _, v in read_jsonl(place / "answers.jsonl"))


def test_shares_of_an_evaluation_are_merged(bucket, tmp_path):
    words = ["xflow_jax", "evaluate", "--model", "tiny", "--task", "microcode", "--rules"]
    words += ["mask,flow", "--budgets", "1/8", "--limit", "7", "--batch-size", "2", "--out"]
    program(*words, tmp_path / "one")
    out = bucket / "evaluate"
    program(*words, out, "--shard", "0/2")
    environment = os.environ | {"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_COUNT": "2"}
    command = [sys.executable, "-m", *map(str, [*words, out, "--shard", "auto"])]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    program(*words, out, "--shard", "merge")
    assert answers(out) == answers(tmp_path / "one") and len(answers(out)) == 14
    for name in ("table.md", "results.csv", "accuracy-over-budget.png"):
        assert name in object_sizes(out)


def test_shares_of_self_generation_are_merged(bucket, tmp_path):
    words = ["train.self_generate", "configs/self_generate_tiny.toml", "limit=7", "batch_size=2"]
    words += ["steps=8", "gen_length=16"]
    program(*words, f"out={tmp_path / 'one.jsonl'}")
    out = bucket / "generated" / "one.jsonl"
    for share in ("0/2", "1/2", "merge"):
        program(*words, f"out={out}", f"shard={share}")
    assert read_bytes(out) == (tmp_path / "one.jsonl").read_bytes()


def test_a_profile_of_a_command_is_uploaded(bucket):
    words = ["xflow_jax", "generate", "--model", "tiny", "--prompt", "sum of the list"]
    program(*words, "--gen-length", "16", "--profile", f"{bucket}/traces:1")
    assert any(name.endswith(".xplane.pb") for name in object_sizes(bucket / "traces"))


def test_compiled_programs_are_kept_in_a_bucket(bucket):
    words = ["xflow_jax", "generate", "--model", "tiny", "--prompt", "sum", "--gen-length", "16"]
    command = [sys.executable, "-m", *words]
    environment = os.environ | {
        "JAX_ENABLE_COMPILATION_CACHE": "true",
        "JAX_COMPILATION_CACHE_DIR": str(bucket / "programs"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_DEBUG_LOG_MODULES": "jax._src.compiler",
    }
    found = []
    for _ in range(2):
        run = subprocess.run(
            command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True
        )
        found += re.findall("cache (hit|MISS) for 'jit_decode_batch'", run.stderr, re.I)
    assert [word.lower() for word in found] == ["miss", "hit"]
