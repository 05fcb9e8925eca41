"""The sandbox: what passes, what is wrong and how it is told, and that hostile programs neither pass nor harm."""

import contextlib
import dataclasses
import os
import tempfile
import textwrap
import time
from pathlib import Path

import pytest

from xflow_jax.config import UserError
from xflow_jax.sandbox import Limits, run_many, run_program

CHECKS = "assert add(1, 2) == 3\nassert add(-1, 1) == 0, 'negative numbers'\n"
RIGHT = "def add(a, b):\n    return a + b\n"
WRONG = "def add(a, b):\n    return 7\n"
PATIENT = Limits(seconds=30, memory_mb=128)  # for what ends by itself, on a busy machine too
BRIEF = dataclasses.replace(PATIENT, seconds=1)


@pytest.fixture(autouse=True)
def scratch(tmp_path, monkeypatch):
    """Everything that the sandbox leaves behind would be seen here."""
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
        ("def add(a, b):\n    return add(a, b)\n", "error: RecursionError: maximum recursion depth exceeded"),
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
        import collections, dataclasses, enum, heapq, logging, math, random, re, tempfile, threading, typing, zoneinfo

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
            assert open("notes.txt").read() and Box().n == 0 and Point(1, 2).x == 1 and Pair(3).left == 3
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
    assert run("import os\nassert not {'SECRET', 'PATH', 'HOME'} & set(os.environ), dict(os.environ)", "").passed


def test_own_checks_that_do_not_compile_are_no_wrong_answer():
    assert not run(RIGHT, "assert (").passed


HOSTILE = {
    "exits well": "import sys; sys.exit(0)",
    "exits at once": "import os; os._exit(0)",
    "exits in the function": "import os\ndef add(a, b):\n    os._exit(0)",
    "says that it passed": "print('passed'); print('1 passed')",
    "swallows everything": """
        def add(a, b):
            while True:
                try:
                    while True: pass
                except BaseException: pass
    """,
    "ignores signals": """
        import signal
        for number in range(1, 65):
            try: signal.signal(number, signal.SIG_IGN)
            except BaseException: pass
        while True: pass
    """,
    "fork bomb": """
        import os
        while True:
            try: os.fork()
            except Exception: pass
    """,
    "fork and leave the session": """
        import os
        if os.fork() == 0:
            os.setsid()
            while True: pass
    """,
    "shell": "import os\nos.system('sleep 1000 &')",
    "subprocess": "import subprocess\nsubprocess.Popen(['sleep', '1000'])",
    "raw fork_exec": "import _posixsubprocess",
    "spawn": "import os\nos.posix_spawn('/bin/sleep', ['sleep', '1000'], {})",
    "exec": "import os\nos.execv('/bin/true', ['true'])",
    "kills its parent": "import os\nos.kill(os.getppid(), 9)",
    "kills its parent's group": "import os\nos.killpg(os.getpgid(os.getppid()), 9)",
    "closes everything": "import os\nos.closerange(0, 256)\nwhile True: pass",
    "memory bomb that swallows": """
        x = []
        while True:
            try:
                while True: x.append(bytes(10**5))
            except MemoryError: pass
    """,
    "many threads": """
        import threading, time
        while True: threading.Thread(target=time.sleep, args=(99,)).start()
    """,
    "crashes": "import os\nos.abort()",
    "recurses without end": """
        import sys
        sys.setrecursionlimit(10**9)
        def add(a, b): return add(a, b) + 1
    """,
    "nests without end": "x = " + "(" * 10**5 + ")" * 10**5,
    "huge file": "with open('x', 'wb') as file:\n    file.write(bytes(10**7)); file.flush()",
    "many files": "for i in range(1000): open(str(i), 'w').close()",
    "reads a file of the machine": "open('/etc/passwd').read()",
    "reads above its folder": "open('../x').read()",
    "reads by a path of its own kind": """
        class Path(str):
            def startswith(self, *args): return True
            def split(self, *args): return []
        open(Path('/etc/passwd')).read()
    """,
    "fools the guard's builtins": """
        import builtins
        builtins.isinstance = lambda *args: True
        builtins.all = lambda *args: True
        builtins.PermissionError = None
        open('/etc/passwd').read()
    """,
    "fools the guard's helpers": """
        import os
        os.fspath = os.fsdecode = lambda path: 'x'
        open('/etc/passwd').read()
    """,
    "reads by bytes": "import os\nos.open(b'/etc/passwd', os.O_RDONLY)",
    "reads by an object": "import os, pathlib\nos.open(pathlib.Path('/etc/passwd'), os.O_RDONLY)",
    "reads its own memory": "open('/proc/self/mem', 'rb')",
    "writes elsewhere": "open('/tmp/xflow-hostile', 'w')",
    "removes a tree": "import shutil\nshutil.rmtree('/tmp')",
    "leaves its folder": "import os\nos.chdir('/')",
    "network": "import socket\nsocket.socket()",
    "native code": "import ctypes\nctypes.CDLL(None).getpid()",
    "replaces the checks' builtins": """
        import builtins
        class Same:
            pass
        builtins.AssertionError = KeyError
        __builtins__ = {}
        def add(a, b): return 7
    """,
    "writes into every pipe": """
        import os
        for number in range(3, 64):
            try: os.write(number, b'passed')
            except OSError: pass
        os._exit(0)
    """,
    "looks for the token in frames": """
        import sys
        def add(a, b):
            frame, seen = sys._getframe(), []
            while frame: seen.append(frame.f_locals); frame = frame.f_back
            return a + b
    """,
    "looks for the token through a traceback": """
        def add(a, b):
            try: 1 / 0
            except ZeroDivisionError as error: frame = error.__traceback__.tb_frame
            return a + b
    """,
    "looks for the token through a generator": """
        def add(a, b):
            def look(): yield it.gi_frame.f_back
            it = look()
            next(it)
            return a + b
    """,
    "looks for the token among all objects": "import gc\ngc.get_objects()",
    "skips the checks by tracing": "import sys\nsys.settrace(lambda *args: None)",
    "exception that cannot be shown": """
        class Odd(Exception):
            def __str__(self): raise SystemExit(0)
        raise Odd()
    """,
    "exits when it is shown": """
        import os
        class Odd(Exception):
            def __str__(self): os._exit(0)
        raise Odd()
    """,
}


@pytest.mark.parametrize("program", HOSTILE.values(), ids=HOSTILE)
def test_hostile(program, tmp_path):
    start = time.monotonic()
    result = run(program, limits=BRIEF)
    assert not result.passed and result.reason != "passed"
    assert time.monotonic() - start < BRIEF.seconds + 10
    assert not Path("/tmp/xflow-hostile").exists()
    assert _working_in(tmp_path) == []


def _working_in(folder: Path) -> list[str]:
    """The processes whose working directory is or was in `folder`, whoever their parent is."""
    found = []
    for link in Path("/proc").glob("[0-9]*/cwd"):
        with contextlib.suppress(OSError):  # gone meanwhile, or another user's
            if os.readlink(link).startswith(str(folder)):
                found.append(link.parent.name)
    return found


def test_builtins_are_restored_for_the_checks():
    cheat = "import builtins\nbuiltins.sum = lambda numbers: 3\n"
    assert run(cheat, "assert sum([1, 1]) == 3").reason.startswith("wrong answer")


def test_a_reported_token_stays_out_of_reach():
    """Each way to a frame is refused by name, in a program that would pass without it."""
    for look in ("sys._getframe()", "sys._current_frames()", "gc.get_objects()", "sys.settrace(print)"):
        assert not run(f"import gc, sys\ndef add(a, b):\n    {look}\n    return a + b\n").passed


def test_death_is_told():
    assert run("import os\nos.abort()").reason == "error: the process was killed by SIGABRT before the checks ended"
    assert run("import os\nos._exit(0)").reason == "error: the process exited with 0 before the checks ended"


def test_what_the_program_writes_to_the_verdict_is_no_verdict():
    forge = """
        import os
        for number in range(3, 32):
            try: os.write(number, b'passed \\xff\\x1b[2J')
            except OSError: pass
    """
    result = run(textwrap.dedent(forge) + RIGHT)
    assert not result.passed and result.reason == "error: the program wrote where only the harness may"


def test_run_many_keeps_order_shares_equal_jobs_and_reports():
    seen = []
    jobs = [(RIGHT, CHECKS), (WRONG, CHECKS), (RIGHT, CHECKS), ("raise SystemExit", CHECKS)]
    results = run_many(jobs, PATIENT, workers=2, progress=lambda done, total: seen.append((done, total)))
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
