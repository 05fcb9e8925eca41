"""Mutation check: applies bugs to a copy of the checkout, and runs the tests that must fail."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tests.mutations.table import ROOT, Mutation

COPIED = ("xflow_jax", "train", "convert", "tests", "configs", "pyproject.toml")
SECONDS = 600.0  # for the tests of one mutation
ENVIRONMENT = {  # as conftest.py sets it, which is too late for a process that has loaded JAX
    "JAX_PLATFORMS": "cpu",
    "JAX_ENABLE_COMPILATION_CACHE": "false",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_force_host_platform_device_count=8",
}


@dataclass(frozen=True)
class Outcome:
    """Result of one mutation.

    Attributes:
        name: name of the mutation.
        state: "killed" if a test failed that passes without the bug. "survived" if all passed.
            Otherwise there is no result: "skipped" if all tests were, as on a machine without
            namespaces, or if the bug needs root. "broken" if the tests could not start, "slow"
            after the time limit, or "unreliable" if the test fails without the bug too.
        by: the test that failed.
    """

    name: str
    state: str
    by: str = ""


class Checkout:
    """Temporary copy of the checkout, and a server of its tests."""

    def __init__(self, folder: Path) -> None:
        self.root, self.log = folder / "checkout", folder / "log.txt"
        self.root.mkdir()
        ignored = shutil.ignore_patterns("__pycache__", ".*")
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, self.root / name, ignore=ignored)
            else:
                shutil.copyfile(source, self.root / name)
        self._server = subprocess.Popen(
            [sys.executable, "tests/mutations/server.py"],
            cwd=self.root,
            env=os.environ | ENVIRONMENT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, tests: Sequence[str]) -> dict[str, Any]:
        """Runs tests in the copy as it is now."""
        assert self._server.stdin is not None and self._server.stdout is not None
        request = {"tests": list(tests), "log": str(self.log), "seconds": SECONDS}
        print(json.dumps(request), file=self._server.stdin, flush=True)
        return json.loads(self._server.stdout.readline())

    def run_mutated(self, mutation: Mutation) -> Outcome:
        """Runs the tests of a mutation with its bug."""
        if mutation.as_root and os.geteuid() != 0:
            return Outcome(mutation.name, "skipped")
        file = self.root / mutation.file
        text = file.read_text()
        file.write_text(mutation.apply(text))
        try:
            answer = self.run(mutation.tests)
        finally:
            file.write_text(text)
        if answer["code"] == 0:
            return Outcome(mutation.name, "survived" if answer["passed"] else "skipped")
        if answer["code"] is None:
            return Outcome(mutation.name, "slow")
        if not answer["failed"]:
            return Outcome(mutation.name, "broken", self.log.read_text()[-400:])
        return Outcome(mutation.name, "killed", answer["failed"][0])

    def close(self) -> None:
        """Ends the server."""
        self._server.communicate()


def check_mutations(
    mutations: Sequence[Mutation], report: Callable[[Outcome], None]
) -> list[Outcome]:
    """Checks that each mutation is found.

    Args:
        mutations: the bugs.
        report: called with each outcome as soon as it is known.

    Returns:
        The outcomes. The tests that found bugs have run once more without one.

    Raises:
        StalePatch: if a bug does not apply.
    """
    for mutation in mutations:  # before the first run, which takes long
        mutation.apply((ROOT / mutation.file).read_text())
    outcomes = []
    with tempfile.TemporaryDirectory() as folder:
        checkout = Checkout(Path(folder))
        try:
            for mutation in mutations:
                outcomes.append(checkout.run_mutated(mutation))
                report(outcomes[-1])
            return _confirm(checkout, outcomes)
        finally:
            checkout.close()


def _confirm(checkout: Checkout, outcomes: list[Outcome]) -> list[Outcome]:
    """Marks outcomes whose test fails without the bug too."""
    bad: set[str] = set()
    while tests := sorted({o.by for o in outcomes if o.state == "killed" and o.by not in bad}):
        answer = checkout.run(tests)
        if answer["code"] == 0:
            break
        bad |= set(answer["failed"] or tests)
    return [replace(o, state="unreliable") if o.by in bad else o for o in outcomes]
