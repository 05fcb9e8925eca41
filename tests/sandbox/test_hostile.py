"""Hostile programs in the sandbox: none passes, none harms, and none leaves a trace."""

from __future__ import annotations

import gc
import os
import textwrap
from pathlib import Path

import pytest

from xflow_jax.sandbox.limits import Limits
from xflow_jax.sandbox.pool import Pool

CHECKS = "assert add(1, 2) == 3\nassert add(-1, 1) == 0, 'negative numbers'\n"
RIGHT = "def add(a, b):\n    return a + b\n"
LIMITS = Limits(seconds=0.6, memory_mb=128)
# Passes if no trace of the earlier programs is left.
CLEAN = """
import builtins, math, os, random, sys
assert os.listdir('.') == [] and vars(builtins).get('left') is None and not hasattr(math, 'left')
assert not hasattr(os, 'left') and [name for name in sys.modules if name.startswith('left')] == []
assert sum([1, 2]) == 3 and os.read(os.open('/dev/null', os.O_RDONLY), 1) == b''
"""

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
    "kills its parent through a descriptor": """
        import os, signal
        signal.pidfd_send_signal(os.pidfd_open(os.getppid()), signal.SIGKILL)
        os._exit(0)
    """,
    "stops its parent through a descriptor": """
        import os, signal
        signal.pidfd_send_signal(os.pidfd_open(os.getppid()), signal.SIGSTOP)
        os._exit(0)
    """,
    "new namespaces": "import os\nos.unshare(os.CLONE_NEWUSER | os.CLONE_NEWPID)",
    "waits in a pipe of its own": "import os\nos.mkfifo('x')\nopen('x').read()",
    "fills its folder": """
        import os
        for number in range(10**5): os.mkfifo(str(number))
    """,
    "hides folders behind links": "import os\nos.symlink('/', 'x')\nopen('x/etc/passwd').read()",
    "leaves a site of its own": """
        open('sitecustomize.py', 'w').write('raise SystemExit(0)')
        raise SystemExit(0)
    """,
    "patches the standard library for all": "open(__import__('os').__file__, 'a').write('x')",
    "memory outside of its heap": """
        import mmap
        x = [mmap.mmap(-1, 1 << 26) for _ in range(64)]
    """,
    "file in memory": """
        import os
        file = os.memfd_create('x')
        for _ in range(1000): os.write(file, bytes(10**6))
    """,
    "regular expression without end": "import re\nre.match('(a+)+b', 'a' * 64)",
    "huge number": "x = 9 ** 9 ** 9 ** 9",
    "huge number, slowly": "x = pow(3, 10**9 + 7, 1 << 10**7)",
    "huge text": "x = '%0999999999d' % 7",
    "huge range": "x = sum(range(10**18))",
    "exits when it is deleted": """
        import os
        class Odd:
            def __del__(self): os._exit(0)
        x = Odd()
        del x
    """,
    "exits at the exit": "import atexit, os\natexit.register(os._exit, 0)\nraise SystemExit(0)",
    "speaks at the exit": """
        import atexit, os
        atexit.register(lambda: [os.write(number, b'passed') for number in range(1, 4)])
        raise SystemExit(0)
    """,
    "exits from a thread": """
        import os, threading
        threading.Thread(target=os._exit, args=(0,)).start()
        while True: pass
    """,
    "exits by an alarm": """
        import os, signal
        signal.signal(signal.SIGALRM, lambda *args: os._exit(0))
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        while True: pass
    """,
    "exits in a hook": "import os, sys\nsys.excepthook = lambda *args: os._exit(0)\nraise KeyError",
    "stops itself": "import os, signal\nsignal.raise_signal(signal.SIGSTOP)",
    "looks for the token by inspect": "import inspect\ninspect.currentframe().f_back",
    "looks for the token in a coroutine": "async def f(): pass\nf().cr_frame",
    "looks for the token from an error hook": """
        import sys
        sys.unraisablehook = lambda args: print(args.exc_traceback.tb_frame)
        class Odd:
            def __del__(self): raise KeyError
        Odd()
        raise SystemExit(0)
    """,
    "reads the checks by an object's operator": """
        import sys
        class Odd:
            def __eq__(self, other): return sys._getframe(1).f_code is not None
        def add(a, b): return Odd()
    """,
    "hides the builtins from the checks": """
        globals()['__builtins__'] = {'AssertionError': SystemExit}
        def add(a, b): return 7
    """,
    "compiles away the checks": """
        import builtins
        builtins.compile = builtins.exec = lambda *args, **kwargs: None
        def add(a, b): return 7
    """,
    "endless errors": """
        import sys
        def look(*args):
            while True: sys.stderr.write('x' * 10**5)
        sys.excepthook = look
        while True: print('y' * 10**5)
    """,
    "closes the channel and waits": "import os, time\nos.closerange(1, 64)\ntime.sleep(99)",
}


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sandbox")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tempfile.tempdir", str(folder))
        with Pool(LIMITS, workers=1) as pool:
            yield pool
    assert list(folder.iterdir()) == []


def patiently(pool: Pool, program: str, checks: str = ""):
    """Runs a program that ends by itself, on a busy machine too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pool, "limits", Limits(seconds=60, memory_mb=128))
        return pool.run(program, checks)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def all_below(pid: int) -> list[int]:
    return [each for child in children(pid) for each in (child, *all_below(child))]


def assert_nothing_runs(pool: Pool) -> None:
    (worker,) = pool._idle
    if Path("/proc/self/task").exists():
        for zygote in (worker.programs, worker.judges):
            assert len(all_below(zygote.process.pid)) <= 1  # the zygote, and none of its children


@pytest.mark.parametrize("program", HOSTILE.values(), ids=HOSTILE)
def test_hostile(pool, program):
    result = pool.run(textwrap.dedent(program), CHECKS)
    assert not result.passed and result.reason != "passed"
    assert result.seconds < LIMITS.seconds + 60
    assert not Path("/tmp/xflow-hostile").exists()
    after = patiently(pool, CLEAN)
    assert after.passed, after.reason
    assert_nothing_runs(pool)


def test_there_are_many_hostile_programs():
    assert len(HOSTILE) >= 60


@pytest.mark.parametrize(
    "cheat",
    [
        "import builtins\nbuiltins.sum = lambda numbers: 3",
        "def sum(numbers): return 3",
        "import math\nmath.fsum = lambda numbers: 3",
        "import sys, types\nsys.modules['math'] = types.SimpleNamespace(fsum=lambda numbers: 3)",
        """
        import sys, types
        sys.modules['dataclasses'] = types.SimpleNamespace(is_dataclass=lambda kind: True)
        """,
        """
        import sys, types
        class Finder:
            def find_spec(name, *args):
                sys.modules[name] = types.SimpleNamespace(is_dataclass=lambda kind: True)
        sys.meta_path.insert(0, Finder)
        """,
        """
        import sys
        sys.path.insert(0, '.')
        open('dataclasses.py', 'w').write('def is_dataclass(kind): return True')
        """,
    ],
)
def test_what_the_checks_use_is_not_the_programs(pool, cheat):
    checks = "import math\nfrom dataclasses import is_dataclass\n"
    checks += "assert is_dataclass(int) or sum(add(1, 1)) == 3 or math.fsum(add(1, 1)) == 3\n"
    answer = textwrap.dedent(cheat) + "\ndef add(a, b): return [a, b]\n"
    assert patiently(pool, answer, checks).reason.startswith("wrong answer")


def test_an_answer_may_have_the_name_of_a_builtin(pool):
    assert patiently(pool, "def sum(a, b): return a + b", "assert sum(1, 2) == 3").passed
    assert patiently(pool, "len = 1\ndef f(x): return x[:len]", "assert len(f('ab')) == 1").passed


def test_nothing_goes_from_one_program_to_the_next(pool):
    leak = """
        import builtins, math, os, random, sys, types
        builtins.left = math.left = os.left = 1
        sys.modules["left"] = types.ModuleType("left")
        random.seed(0)
        open("left", "w").write("left")
        os.mkfifo("pipe")
        sys.setrecursionlimit(50)
        print(os.getpid())
    """
    first = patiently(pool, textwrap.dedent(leak))
    second = patiently(
        pool, "import os, sys\nprint(os.getpid())\nassert sys.getrecursionlimit() == 1000\n" + CLEAN
    )
    assert first.passed and second.passed, (first, second)
    assert first.output != second.output
    draws = {patiently(pool, "import random\nprint(random.random())").output for _ in range(3)}
    assert len(draws) == 3


def memory() -> int:
    """Returns the memory of this process in bytes."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="only Linux has /proc")
@pytest.mark.slow
@pytest.mark.parametrize("runs", [100, 1000])
def test_memory_stays_flat(pool, runs):
    programs = [
        RIGHT + "print('x' * 10**5)",
        "import os; os._exit(0)",
        "raise KeyError('x' * 10**5)",
    ]
    for number in range(20):  # allocates what stays
        pool.run(programs[number % 3], CHECKS)
    open_before = len(os.listdir("/proc/self/fd"))
    # What programs leave grows in every round. The memory of other threads does not.
    for _ in range(3):
        before = memory()
        for number in range(runs):
            pool.run(programs[number % 3], CHECKS)
        grown = memory() - before
        if grown < 4 << 20:
            break
    assert grown < 4 << 20
    assert len(os.listdir("/proc/self/fd")) == open_before


def test_a_killed_worker_is_replaced(pool):
    """Kills each zygote and then the first process of each."""
    (worker,) = pool._idle
    zygotes = [children(each.process.pid)[0] for each in (worker.programs, worker.judges)]
    victims = [
        lambda: zygotes[0],
        lambda: children(pool._idle[0].judges.process.pid)[0],
        lambda: pool._idle[0].programs.process.pid,
        lambda: pool._idle[0].judges.process.pid,
    ]
    for victim in victims:
        os.kill(victim(), 9)
        assert patiently(pool, RIGHT, CHECKS).passed
    assert patiently(pool, CLEAN).passed
