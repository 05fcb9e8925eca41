"""Several processes: what each knows, told to all, and an evaluation that they share."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from xflow_jax.errors import UserError
from xflow_jax.parallel import multihost


def test_one_process_keeps_to_itself():
    assert (
        multihost.is_first_process()
        and multihost.gather_objects({"a": 1}) == [{"a": 1}]
        and multihost.broadcast_from_first(lambda: 3) == 3
    )
    np.testing.assert_array_equal(multihost.fetch_to_host({"x": jnp.arange(3)})["x"], [0, 1, 2])
    with pytest.raises(UserError, match="no"):
        multihost.broadcast_from_first(lambda: (_ for _ in ()).throw(UserError("no")))


PROCESS = """
import sys
import jax

rank, port, out = sys.argv[1:]
jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(rank))
from xflow_jax import hosts
from xflow_jax.strict import UserError

assert hosts.gather({"rank": int(rank), "long": "x" * 100 * int(rank)})[1]["long"] == "x" * 100
assert hosts.of_first(lambda: int(rank)) == 0

def fail():
    raise UserError("only the first one fails")

try:
    hosts.of_first(fail)
    raise SystemExit("no error")
except UserError as error:
    assert str(error) == "only the first one fails"

from xflow_jax.cli import main

common = ["evaluate", "--model", "tiny", "--task", "microcode", "--rules", "mask,flow:power=8", "--budgets", "1/8"]
assert main([*common, "--limit", "6", "--batch-size", "4", "--mesh", "1,2,1", "--out", out]) == 0
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
    said = [run.communicate(timeout=500)[0] for run in [start(0), start(1)]]
    assert all("done" in text.splitlines() for text in said)
    assert (
        "microcode: 0-shot" in said[0] and "microcode: 0-shot" not in said[1]
    )  # one of them prints
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

    def kept(folder: str) -> list[tuple]:
        lines = (tmp_path / folder / "answers.jsonl").read_text().splitlines()
        keys = ("rule", "task_id", "text", "passed", "forward_passes")
        return sorted(tuple(json.loads(line)[key] for key in keys) for line in lines)

    assert kept("two") == kept("one") and len(kept("one")) == 12
