"""Program that runs pytest in children, each forked from a process with all libraries loaded.

Loading JAX takes longer than most tests that a mutation needs. Each line of its input is a JSON
object {"tests": [...], "log": file, "seconds": limit}. The answer is one line {"code": exit status
of pytest or null, "failed": names of failed tests, "passed": their number}. The code is null after
the time limit. The program runs from the root of a checkout, whose modules are loaded in the
children alone.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import sys
import time
import traceback
import warnings
from typing import Any

LIBRARIES = (
    *("numpy", "jax", "jax.numpy", "flax.linen", "optax", "orbax.checkpoint", "chex", "beartype"),
    *("safetensors.numpy", "scipy.stats", "transformers", "pytest"),
)


class Recorder:
    """Plugin of pytest that collects failed tests and counts the others."""

    def __init__(self) -> None:
        self.failed: list[str] = []
        self.passed = 0

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Collects a failure of a test or of its fixtures."""
        if report.failed:
            self.failed.append(report.nodeid)
        self.passed += report.passed and report.when == "call"


def run_tests(tests: list[str], log: str) -> dict[str, object]:
    """Runs tests in this process, with their output in a file."""
    import pytest

    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    recorder = Recorder()
    options = ["-x", "-q", "-p", "no:cacheprovider"]
    # Plugins that a library has loaded already are not rewritten, and need not be.
    options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]
    code = pytest.main([*options, *tests], plugins=[recorder])
    return {"code": int(code), "failed": recorder.failed, "passed": recorder.passed}


def fork(tests: list[str], log: str, seconds: float) -> dict[str, object]:
    """Runs tests in a child."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.setsid()
        os.close(read)
        status = 1
        try:
            os.write(write, json.dumps(run_tests(tests, log)).encode())
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(write)
    end, done = time.monotonic() + seconds, 0
    while done == 0 and time.monotonic() < end:
        done, _ = os.waitpid(child, os.WNOHANG)
        time.sleep(0.02)
    with contextlib.suppress(ProcessLookupError):  # what a test left behind, or a test that hangs
        os.killpg(child, signal.SIGKILL)
    if done == 0:
        os.waitpid(child, 0)
    with os.fdopen(read, "rb") as pipe:
        answer = pipe.read()
    if answer:
        return json.loads(answer)
    return {"code": None if done == 0 else -1, "failed": [], "passed": 0}


def main() -> None:
    """Answers requests until the input ends."""
    sys.path[0] = os.getcwd()  # instead of the folder of this file
    sys.dont_write_bytecode = True  # a patch can keep size and time of a file
    warnings.simplefilter("ignore")  # JAX warns of forks, but none of its threads has begun
    for library in LIBRARIES:
        importlib.import_module(library)
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(fork(**request)), file=answers, flush=True)


if __name__ == "__main__":
    main()
