"""The sandbox's verdicts: programs that pass, and the reasons of those that do not."""

import dataclasses
import os
import resource
import tempfile
import textwrap
from pathlib import Path

import pytest

from xflow_jax.errors import UserError
from xflow_jax.sandbox.limits import Limits
from xflow_jax.sandbox.pool import run_many, run_program

CHECKS = "assert add(1, 2) == 3\nassert add(-1, 1) == 0, 'negative numbers'\n"
RIGHT = "def add(a, b):\n    return a + b\n"
WRONG = "def add(a, b):\n    return 7\n"
PATIENT = Limits(
    seconds=30, memory_mb=128
)  # for programs that end by themselves, on a busy machine too
BRIEF = dataclasses.replace(PATIENT, seconds=1)


@pytest.fixture(autouse=True)
def scratch(tmp_path, monkeypatch):
    """A temporary folder in which the sandbox must leave nothing."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield tmp_path
    assert list(tmp_path.iterdir()) == []


def run(program: str, checks: str = CHECKS, limits: Limits = PATIENT):
    return run_program(textwrap.dedent(program), checks, limits)


def test_right_answer():
    result = run(RIGHT + "print('hello')\n")
    assert result.passed and result.reason == "passed"
    assert result.output == "hello\n"
    assert 0 < result.seconds < PATIENT.seconds


def test_program_without_checks():
    assert run("x = 1", checks="").passed


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        (WRONG, "wrong answer: assert add(1, 2) == 3"),
        ("def add(a, b):\n    return 3\n", "wrong answer: negative numbers"),
        ("def add(a, b):\n    assert False, 'mine'\n", "error: AssertionError: mine"),
        ("x = 1", "error: NameError: name 'add' is not defined"),
        ("def add(a, b):\n    return a +\n", "syntax error: invalid syntax (line 2)"),
        ("x = '\0'", "syntax error: source code string cannot contain null bytes"),
        ("raise KeyError('two\\nlines\\x1b[31m')", "error: KeyError: 'two\\nlines\\x1b[31m'"),
        ("raise ValueError('two\\nlines\\x1b[31m')", "error: ValueError: two lines [31m"),
        (
            "def add(a, b):\n    return add(a, b)\n",
            "error: RecursionError: maximum recursion depth exceeded",
        ),
        ("while True:\n    pass\n", "timeout"),
        ("import time\ntime.sleep(60)\n", "timeout"),
        ("x = [0] * 10**9\n", "memory limit"),
        ("x = []\nwhile True:\n    x = [x, bytes(10000)]\n", "memory limit"),
        ("print('x' * 10**7)\n", "output limit"),
        ("import sys\nwhile True:\n    print('x' * 10**5, file=sys.stderr)\n", "output limit"),
    ],
)
def test_reasons(program, reason):
    result = run(program, limits=BRIEF if reason == "timeout" else PATIENT)
    assert not result.passed
    # Python 3.12 makes the null byte a SyntaxError with a line.
    assert result.reason.startswith(reason)
    assert result.reason.isprintable()
    assert len(result.output) <= PATIENT.output_bytes


def test_standard_library_and_idioms_work():
    program = """
        import collections, dataclasses, enum, heapq, logging, math, random, re, tempfile
        import threading, typing, zoneinfo

        Point = collections.namedtuple("Point", "x y")
        Colour = enum.Enum("Colour", "RED GREEN")

        class Pair(typing.NamedTuple):
            left: int

        @dataclasses.dataclass
        class Box:
            n: int = 0

        def add(a, b):
            with open("notes.txt", "w") as file:
                file.write("kept while it runs")
            with tempfile.TemporaryFile() as file:
                file.write(b"kept while it runs")
            logging.warning("careful")
            assert open("notes.txt").read() and Box().n == 0
            assert Point(1, 2).x == 1 and Pair(3).left == 3
            return a + b

        if __name__ == "__main__":
            add(input(), input())
    """
    assert run(program).reason == "passed"


def test_order_of_sets_is_fixed():
    outputs = {run("print(set('abcdefghij'))", "").output for _ in range(4)}
    assert len(outputs) == 1


def test_environment_is_empty(monkeypatch):
    monkeypatch.setenv("SECRET", "hush")
    assert run(
        "import os\nassert not {'SECRET', 'PATH', 'HOME'} & set(os.environ), dict(os.environ)", ""
    ).passed


def test_own_checks_that_do_not_compile_are_no_wrong_answer():
    assert not run(RIGHT, "assert (").passed


def test_builtins_are_restored_for_the_checks():
    cheat = "import builtins\nbuiltins.sum = lambda numbers: 3\n"
    assert run(cheat, "assert sum([1, 1]) == 3").reason.startswith("wrong answer")


def test_a_reported_token_stays_out_of_reach():
    """Each way to a frame is refused by name, in a program that would pass without it."""
    for look in (
        "sys._getframe()",
        "sys._current_frames()",
        "gc.get_objects()",
        "sys.settrace(print)",
    ):
        assert not run(f"import gc, sys\ndef add(a, b):\n    {look}\n    return a + b\n").passed


def test_death_is_reported():
    assert (
        run("import os\nos.abort()").reason
        == "error: the process was killed by SIGABRT before the checks ended"
    )
    assert (
        run("import os\nos._exit(0)").reason
        == "error: the process exited with 0 before the checks ended"
    )


def test_bytes_to_the_judge_are_no_verdict():
    forge = """
        import os
        for number in range(3, 32):
            try: os.write(number, b'passed \\xff\\x1b[2J')
            except OSError: pass
    """
    result = run(textwrap.dedent(forge) + RIGHT)
    assert not result.passed
    assert result.reason == "error: the program sent bytes that are no answer to a call"


def test_run_many_keeps_order_shares_equal_jobs_and_reports():
    seen = []
    jobs = [(RIGHT, CHECKS), (WRONG, CHECKS), (RIGHT, CHECKS), ("raise SystemExit", CHECKS)]
    results = run_many(
        jobs, PATIENT, workers=2, progress=lambda done, total: seen.append((done, total))
    )
    assert [r.passed for r in results] == [True, False, True, False]
    assert results[0] is results[2]
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert run_many([]) == []


def test_run_many_raises_what_the_callback_raises():
    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_many([(f"x = {i}", "") for i in range(50)], PATIENT, workers=1, progress=stop)


def test_nothing_stays_open():
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
    for program in (RIGHT, WRONG, "while True: pass"):
        run(program, limits=Limits(seconds=0.3))
    assert not before or len(os.listdir("/proc/self/fd")) == before


def test_limits_must_be_positive():
    with pytest.raises(UserError, match="the sandbox limit seconds must be above 0, not 0"):
        Limits(seconds=0)


def test_every_limit_is_in_force():
    """The program reads its own limits, which it cannot change."""
    limits = Limits(seconds=7, memory_mb=200, file_bytes=5000, files=20)
    program = f"""
        import resource
        for number, limit in {limits.resources()!r}.items():
            soft, hard = resource.getrlimit(number)
            if number == resource.RLIMIT_NPROC:
                assert soft == hard and limit <= soft < limit + 10**5, (soft, hard)
            elif number == resource.RLIMIT_CPU:
                assert (soft, hard) == (limit, limit + 1), (soft, hard)
            else:
                assert soft == hard == limit, (number, soft, hard)
            try: resource.setrlimit(number, (soft, hard))
            except (PermissionError, ValueError): continue
            raise SystemExit
    """
    assert run(program, "", limits).reason == "passed"
    assert {"CPU", "FSIZE", "NOFILE", "NPROC", "CORE"} <= {
        name.removeprefix("RLIMIT_")
        for name in dir(resource)
        if name.startswith("RLIMIT_") and getattr(resource, name) in limits.resources()
    }
    # The judge has the same.
    checks = "import resource\nassert resource.getrlimit(resource.RLIMIT_CPU) == (8, 9)\n"
    checks += "assert resource.getrlimit(resource.RLIMIT_FSIZE) == (5000, 5000) and f() == 1"
    assert run("def f(): return 1", checks, limits).reason == "passed"


def test_a_file_ends_at_its_limit():
    program = """
        import errno
        with open("x", "wb", buffering=0) as file:
            try:
                while file.write(bytes(1000)): pass
            except OSError as error:
                assert error.errno == errno.EFBIG, error
        assert len(open("x", "rb").read()) == 5000
    """
    assert run(program, "", dataclasses.replace(PATIENT, file_bytes=5000)).reason == "passed"
