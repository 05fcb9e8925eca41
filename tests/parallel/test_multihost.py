"""Multi-process broadcast, gather and sharding, and an evaluation in two processes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import eight
from tests.process_helpers import ProcessGroup
from xflow_jax.errors import UserError
from xflow_jax.lm import load
from xflow_jax.parallel import batch_sharding, default_mesh, make_mesh, multihost


def test_a_single_process_needs_no_transfer():
    assert multihost.is_first_process()
    assert multihost.gather_objects({"a": 1}) == [{"a": 1}]
    assert multihost.broadcast_from_first(lambda: 3) == 3
    np.testing.assert_array_equal(multihost.fetch_to_host({"x": jnp.arange(3)})["x"], [0, 1, 2])
    with pytest.raises(UserError, match="no"):
        multihost.broadcast_from_first(lambda: (_ for _ in ()).throw(UserError("no")))


@eight
@pytest.mark.parametrize("spec", ["2,4,1", "1,2,2"])
def test_arrays_and_keys_are_sharded_and_fetched(spec):
    sharding = batch_sharding(make_mesh(spec))
    tree = {"x": np.arange(24).reshape(8, 3), "keys": jax.random.split(jax.random.key(0), 8)}
    sharded = multihost.put_sharded(tree, sharding)
    assert sharded["x"].sharding == sharded["keys"].sharding == sharding
    np.testing.assert_array_equal(multihost.fetch_to_host(sharded["x"]), tree["x"])
    data = jax.random.key_data(sharded["keys"])
    np.testing.assert_array_equal(data, jax.random.key_data(tree["keys"]))


PROCESS = """
import sys
import time
import jax

rank, port, out = sys.argv[1:]
jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(rank))
import numpy as np
from xflow_jax.errors import UserError
from xflow_jax.parallel import batch_sharding, make_mesh, multihost

gathered = multihost.gather_objects({"rank": int(rank), "long": "x" * 100 * int(rank)})
assert gathered[1]["long"] == "x" * 100
assert multihost.broadcast_from_first(lambda: int(rank)) == 0

def fail():
    raise UserError("only the first one fails")

try:
    multihost.broadcast_from_first(fail)
    raise SystemExit("no error")
except UserError as error:
    assert str(error) == "only the first one fails"

sharding = batch_sharding(make_mesh("1,2,1"))
tree = (np.arange(8).reshape(4, 2), jax.random.split(jax.random.key(0), 4))
x, keys = multihost.put_sharded(tree, sharding)
assert x.sharding == keys.sharding == sharding and not x.is_fully_addressable
np.testing.assert_array_equal(multihost.fetch_to_host(x), tree[0])
data = multihost.fetch_to_host(jax.random.key_data(keys))
np.testing.assert_array_equal(data, jax.random.key_data(tree[1]))

from xflow_jax.cli.main import main

common = ["evaluate", "--model", "tiny", "--task", "microcode", "--rules", "mask,flow:power=8"]
common += ["--budgets", "1/8", "--limit", "6"]
assert main([*common, "--batch-size", "4", "--mesh", "1,2,1", "--out", out]) == 0
print("done")
"""


@pytest.mark.slow
def test_two_processes_evaluate_as_one_does(tmp_path):
    def start(rank: int) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(rank), str(port), str(tmp_path / "two")],
            cwd=Path(__file__).parents[2],
            env=os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"},
            stdout=subprocess.PIPE,
            text=True,
        )

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    outputs = [run.communicate(timeout=500)[0] for run in [start(0), start(1)]]
    assert all("done" in text.splitlines() for text in outputs)
    # Only the first process prints.
    assert "microcode: 0-shot" in outputs[0] and "microcode: 0-shot" not in outputs[1]
    from xflow_jax.cli.main import main

    common = [
        "evaluate",
        "--model",
        "tiny",
        "--task",
        "microcode",
        "--rules",
        "mask,flow:power=8",
        "--budgets",
        "1/8",
    ]
    assert main([*common, "--limit", "6", "--mesh", "1,1,1", "--out", str(tmp_path / "one")]) == 0

    def answers(folder: str) -> list[tuple]:
        lines = (tmp_path / folder / "answers.jsonl").read_text().splitlines()
        keys = ("rule", "task_id", "text", "passed", "forward_passes")
        return sorted(tuple(json.loads(line)[key] for key in keys) for line in lines)

    assert answers("two") == answers("one") and len(answers("one")) == 12


@pytest.mark.parametrize(
    ("found", "plugins", "devices", "given", "wanted"),
    [
        (True, [], [], None, "cpu"),
        (True, ["xla_cuda13"], [], None, "cuda,cpu"),
        (True, ["xla_rocm"], [], None, None),
        (True, [], ["/dev/accel0"], None, None),  # a TPU
        (True, [], [], "tpu", None),  # the user's choice
        (False, [], [], None, None),
    ],
)
def test_libtpu_without_a_tpu_is_not_loaded(monkeypatch, found, plugins, devices, given, wanted):
    updates = []
    entries = [types.SimpleNamespace(name=name) for name in plugins]
    monkeypatch.setattr(
        multihost.importlib.util, "find_spec", lambda _: object() if found else None
    )
    monkeypatch.setattr(multihost.importlib.metadata, "entry_points", lambda group: entries)
    monkeypatch.setattr(
        multihost.glob, "glob", lambda pattern: [d for d in devices if d.startswith(pattern[:-1])]
    )
    config = types.SimpleNamespace(
        values={"jax_platforms": given}, update=lambda name, value: updates.append((name, value))
    )
    monkeypatch.setattr(multihost.jax, "config", config)
    multihost.skip_missing_tpu()
    assert updates == ([] if wanted is None else [("jax_platforms", wanted)])


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (AssertionError(), "which JAX_PLATFORMS sets. Leave the variable out"),
        (
            RuntimeError("Backend 'x' is unknown. (set JAX_PLATFORMS='')\nmore"),
            "Backend 'x' is unknown.",
        ),
    ],
)
def test_a_missing_platform_is_one_sentence(monkeypatch, error, reason):
    def fail():
        raise error

    monkeypatch.setattr(jax, "devices", fail)
    for call in (make_mesh, default_mesh, lambda: load("tiny")):
        with pytest.raises(
            UserError, match="^JAX finds no device of the platforms 'cpu'"
        ) as caught:
            call()
        assert reason in str(caught.value) and ".." not in str(caught.value)


GATHER = """
import os, sys, time
os.environ |= {"JAX_COORDINATOR_ADDRESS": "127.0.0.1:" + sys.argv[2], "JAX_NUM_PROCESSES": "2"}
os.environ |= {"JAX_PROCESS_ID": sys.argv[1], "JAX_ENABLE_COMPILATION_CACHE": "false"}
from xflow_jax.cli.process import run_process
from xflow_jax.parallel import multihost

def run():
    multihost.configure_process()
    for step in range(10000):
        multihost.gather_objects([step])
        print("step", step, file=sys.stderr, flush=True)
        time.sleep(0.2)

sys.exit(run_process(run))
"""


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_dies_ends_the_others_in_time(tmp_path, victim):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    logs = [tmp_path / f"{rank}.log" for rank in (0, 1)]
    runs = []
    for rank in (0, 1):
        with logs[rank].open("w") as log:
            command = [sys.executable, "-c", GATHER, str(rank), str(port)]
            environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
            runs.append(
                subprocess.Popen(
                    command, cwd=Path(__file__).parents[2], env=environment, stderr=log
                )
            )
    while not all("step 1\n" in log.read_text() for log in logs):
        assert all(run.poll() is None for run in runs)
        time.sleep(0.2)
    runs[victim].kill()
    began = time.monotonic()
    survivor = runs[1 - victim]
    assert survivor.wait(120) != 0
    text = logs[1 - victim].read_text()
    print(f"{time.monotonic() - began:.0f} s, status {survivor.returncode}", text[-3000:])
    runs[victim].wait()
    assert survivor.returncode == 75 or survivor.returncode < 0
    assert "another process of this run has ended" in text or "coordinat" in text.lower()


LATE = """
import sys, time
from xflow_jax.cli.process import run_process
from xflow_jax.parallel import multihost

multihost.HEARTBEAT_SECONDS = 20

def run():
    multihost.configure_process()
    multihost.gather_objects([0])
    if multihost.is_first_process():
        time.sleep(30)

sys.exit(run_process(run))
"""


@pytest.mark.slow
def test_processes_wait_at_the_end_for_the_first_one(tmp_path):
    """It may write results for longer than a dead process is waited for."""
    with ProcessGroup(["-c", LATE], tmp_path, 2) as group:
        group.finish()
