"""The isolation, against programs without an audit hook, and the pool of warm workers."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from xflow_jax.errors import UserError
from xflow_jax.sandbox import commands, pool, worker
from xflow_jax.sandbox.limits import FULL_ISOLATION, Limits
from xflow_jax.sandbox.pool import Pool, Result, run_program

PATIENT = Limits(seconds=60, memory_mb=256)
# Runs in the isolation alone and prints name -> result, or None if the attempt was refused.
PROBE = """
import ctypes, json, os, socket, sys
done = {}
def attempt(name, function):
    try: done[name] = repr(function())
    except OSError: done[name] = None
def libc(name, *args):
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*args) == -1:
        raise OSError(ctypes.get_errno(), name)
outside, parent = sys.argv[1:3]
def libc_map():
    import mmap
    with open("code", "wb") as file:
        file.write(bytes(4096))
    with open("code", "rb") as file:
        mmap.mmap(file.fileno(), 4096, prot=mmap.PROT_READ | mmap.PROT_EXEC).close()
    os.unlink("code")
def capabilities():
    header, data = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    libc("capget", header, data)
    return data[0] | data[3] << 32
def session():
    number = {"x86_64": 250, "aarch64": 219}[os.uname().machine]
    return ctypes.CDLL(None, use_errno=True).syscall(number, 0, -3, 0)
attempt("session", session)
attempt("capabilities", capabilities)
attempt("user", os.getuid)
attempt("executable", libc_map)
attempt("writes its folder", lambda: open("x", "w").write("x"))
attempt("writes nowhere", lambda: open("/dev/null", "w").write("x"))
attempt("random bytes", lambda: open("/dev/urandom", "rb").read(1))
attempt("writes the library", lambda: open(os.__file__, "a"))
attempt("writes outside", lambda: open(outside, "w"))
attempt("writes the root", lambda: open("/xflow-hostile", "w"))
attempt("reads outside", lambda: open(outside).read())
attempt("reads the machine", lambda: open("/etc/passwd").read())
attempt("reads processes", lambda: open(f"/proc/{parent}/environ").read())
attempt("runs a shell", lambda: os.execv("/bin/sh", ["sh", "-c", "exit"]))
attempt("mounts", lambda: libc("mount", b"x", b".", b"tmpfs", 0, None))
attempt("device", lambda: os.mknod("device", 0o60600, os.makedev(254, 0)))
attempt("connects", lambda: socket.create_connection(("127.0.0.1", int(sys.argv[3])), 5))
attempt("sends", lambda: socket.socket(type=socket.SOCK_DGRAM).sendto(b"x", ("192.0.2.1", 53)))
attempt("signals", lambda: os.kill(int(parent), 0))
attempt("traces", lambda: libc("ptrace", 16, int(parent), None, None))
attempt("new user", lambda: libc("unshare", 0x10000000))
attempt("root", lambda: os.chroot("."))
attempt("becomes root", lambda: os.setuid(0))
done["isolation"] = sys.argv[-2]
os.write(int(sys.argv[4]), json.dumps(done).encode())
"""
ABOUT = {"session", "capabilities", "user", "isolation"}
ALLOWED = {"writes its folder", "writes nowhere", "random bytes", *ABOUT}
# Attempts that only namespaces refuse, or that only namespaces refuse to root.
NAMESPACES_ONLY = {"sends", "new user", "root", "becomes root", "executable"}


def probe(tmp_path, method: str, landlock: bool) -> dict[str, str | None]:
    (tmp_path / "scratch").mkdir(exist_ok=True)
    (tmp_path / "outside").write_text("secret")
    scratch = os.path.realpath(tmp_path / "scratch")
    ours, theirs = socket.socketpair()
    with ours, socket.create_server(("127.0.0.1", 0)) as server:
        with theirs:
            command = [
                *commands.launch_command(
                    method, scratch, 1 << 20, theirs.fileno(), landlock=landlock
                ),
                *commands.interpreter_command(), "-c", PROBE, str(tmp_path / "outside"),
                str(os.getpid()), str(server.getsockname()[1]), str(theirs.fileno()),
            ]  # fmt: skip
            subprocess.run(
                command,
                pass_fds=[theirs.fileno()],
                env={},
                timeout=300,
                start_new_session=True,
                check=False,
            )
        answer = json.loads(ours.recv(1 << 16) or "null")
    if not isinstance(answer, dict):
        assert method != "plain", "the probe has ended, perhaps as the shell that it may not run"
        pytest.skip(f"{method} does not work here: {answer}")
    return answer


def session_keyring() -> int:
    """Returns the number of this process's session keyring, or -1 if there are no keyrings."""
    number = {"x86_64": 250, "aarch64": 219}[os.uname().machine]
    return ctypes.CDLL(None, use_errno=True).syscall(number, 0, -3, 0)


def assert_no_rights(done: dict[str, str | None], capabilities: int) -> None:
    assert int(done["capabilities"] or "0") == capabilities
    outside = session_keyring()
    assert outside == -1 or int(done["session"] or "0") not in (outside, 0)


linux = pytest.mark.skipif(sys.platform != "linux", reason="namespaces and Landlock are Linux's")


@linux
@pytest.mark.parametrize("method", ["unshare", "bubblewrap"])
@pytest.mark.parametrize("landlock", [True, False])
def test_namespaces_hold_without_any_hook(tmp_path, method, landlock):
    if method == "bubblewrap" and not commands.find_bubblewrap():
        pytest.skip("bubblewrap is not installed")
    done = probe(tmp_path, method, landlock)
    parts = done["isolation"].split("+")
    assert parts[0] == "namespaces" and (landlock or "landlock" not in parts)
    could = {name for name, value in done.items() if value is not None}
    if method == "bubblewrap":
        # An old bubblewrap cannot forbid a new user namespace, which gives no further access there.
        could -= {"new user", "root", "executable"}
    assert could == ALLOWED
    assert done["user"] == "65534"
    assert_no_rights(done, 0)
    assert list((tmp_path / "scratch").iterdir()) == []  # its files are gone with its namespace


CONTAINER = """
from xflow_jax.sandbox.limits import Limits
from xflow_jax.sandbox.pool import Pool
with Pool(Limits(seconds=60), workers=1) as pool:
    result = pool.run("import os\\nf = os.getuid", "assert f() == 65534, f()")
print(result.passed, result.reason, result.isolation)
"""


@linux
def test_root_of_a_container_with_one_id_becomes_nobody_too():
    """A rootless container has no id for nobody, to which root could change."""
    unshare = ["unshare", "--user", "--map-root-user"]
    if not shutil.which("unshare") or subprocess.run([*unshare, "true"], check=False).returncode:
        pytest.skip("no user namespaces here")
    command = [*unshare, sys.executable, "-c", CONTAINER]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout.startswith("True passed namespaces+"), done.stdout
    assert not done.stderr


@linux
def test_landlock_holds_without_namespaces(tmp_path):
    done = probe(tmp_path, "plain", True)
    if ctypes.CDLL(None).syscall(444, None, 0, 1) < 1:  # the version of Landlock
        pytest.skip("the kernel has no Landlock")
    assert done["isolation"] == "landlock+limits"
    could = {name for name, value in done.items() if value is not None}
    # Landlock refuses "connects" and "signals" since Linux 6.7 and 6.12.
    assert could - NAMESPACES_ONLY - {"connects", "signals"} == ALLOWED
    # Root keeps CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH, to read files of other users.
    assert_no_rights(done, 0b110 if os.geteuid() == 0 else 0)
    assert {path.name for path in (tmp_path / "scratch").iterdir()} == {"x"}


@pytest.fixture
def methods(monkeypatch):
    """Sets the isolation methods to try."""
    monkeypatch.setattr(pool, "_methods", pool._methods)
    return lambda *names: monkeypatch.setattr(pool, "_methods", names)


def find_false(monkeypatch, path: str) -> None:
    for module in (commands, worker):
        monkeypatch.setattr(module, "find_bubblewrap", lambda: path)


@linux
def test_with_less_isolation_it_warns_once_and_says_so(methods, monkeypatch):
    find_false(monkeypatch, "/bin/false")
    methods("bubblewrap", "bare")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        results = [
            run_program(program, "", dataclasses.replace(PATIENT, minimum="limits"))
            for program in ("x = 1", "import os; os.kill(os.getppid(), 9)")
        ]
    assert [result.isolation for result in results] == ["seccomp+limits"] * 2
    assert [result.passed for result in results] == [True, False]
    (warning,) = seen
    less = f"the sandbox is not fully isolated: seccomp+limits instead of {FULL_ISOLATION}"
    assert str(warning.message) == f"{less} (bubblewrap: it ended at once)"


@linux
def test_without_isolation_only_by_an_explicit_minimum(methods, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    find_false(monkeypatch, "/bin/false")
    methods("bubblewrap", "bare")
    with pytest.raises(UserError, match="the sandbox cannot start a process: bubblewrap: it ended"):
        run_program("x = 1", "", PATIENT)
    methods("plain")  # a kernel without Landlock
    bare = functools.partial(commands.launch_command, landlock=False)
    monkeypatch.setattr(worker, "launch_command", bare)
    sentence = "only seccomp.limits here, which is below its minimum of namespaces or landlock"
    with pytest.raises(UserError, match=sentence):
        run_program("x = 1", "", PATIENT)
    assert run_program("x = 1", "", dataclasses.replace(PATIENT, minimum="limits")).passed
    # An opt-in by one pool is none for the next.
    methods("bare")
    monkeypatch.undo()
    assert "bare" not in run_program("x = 1", "", PATIENT).isolation
    assert list(tmp_path.iterdir()) == []


def test_below_its_minimum_nothing_runs(methods, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    methods("plain")
    sentence = "has only .*limits here, which is below its minimum of namespaces: allow user names"
    with pytest.raises(UserError, match=sentence):
        run_program("x = 1", "", Limits(minimum="namespaces"))
    assert list(tmp_path.iterdir()) == []
    sentence = "minimum must be some of namespaces.landlock.seccomp.cgroup.limits, not 'all'"
    with pytest.raises(UserError, match=sentence):
        Limits(minimum="all")


def test_the_minimum_may_be_what_there_is():
    isolation = run_program("x = 1", "", PATIENT).isolation
    assert run_program("x = 1", "", Limits(seconds=60, minimum=isolation)).passed


def test_no_way_at_all(methods, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    find_false(monkeypatch, "/no/such/file")
    methods("bubblewrap")
    with pytest.raises(
        UserError,
        match="the sandbox cannot start a process: bubblewrap: .*No such file or directory",
    ):
        run_program("x = 1")
    assert list(tmp_path.iterdir()) == []


def remove_protection(monkeypatch, tmp_path) -> None:
    """Starts programs without audit hook and filter of system calls."""
    folder = tmp_path / "unguarded"
    shutil.copytree(Path(commands.__file__).parent, folder)
    program = (folder / "program.py").read_text()
    for line in ("sys.addaudithook(guard)", "kernel.filter_calls(processes)"):
        assert line in program
        program = program.replace(line, "")
    (folder / "program.py").write_text(program)
    monkeypatch.setattr(commands, "__file__", str(folder / "commands.py"))


def test_what_escapes_from_its_group_is_ended(methods, monkeypatch, tmp_path):
    """Without namespaces, hook or filter, the first process adopts it and is not used again."""
    if not Path(f"/proc/self/task/{os.getpid()}/children").exists():
        pytest.skip("the kernel does not list a process's children")
    methods("plain")
    remove_protection(monkeypatch, tmp_path)
    escape = """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        time.sleep(1000)
    os._exit(0)
os.wait()
"""
    with Pool(Limits(seconds=60, processes=10**5), workers=1) as pool:
        first = pool._idle[0].programs.process
        assert pool.run(escape).passed
        # The worker was given back, found unclean, and ended with all processes below it.
        assert first.poll() is not None
        assert pool.run("x = 1").passed
        assert pool._idle[0].programs.process is not first


def test_what_stays_in_its_group_is_ended_by_the_zygote(methods, monkeypatch, tmp_path):
    """Without the worker's own look at its processes, which not every system has."""
    methods("plain")
    monkeypatch.setattr(worker.Zygote, "is_clean", lambda self: True)
    remove_protection(monkeypatch, tmp_path)
    stay = "import os, time\npid = os.fork()\nif pid == 0: time.sleep(1000)\nprint(pid)"
    with Pool(Limits(seconds=60, processes=10**5), workers=1) as pool:
        result = pool.run(stay)
        assert result.passed
        deadline = time.monotonic() + 60
        while is_alive(int(result.output)) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not is_alive(int(result.output))


def test_pool_closes_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    threads = threading.active_count()
    with Pool(PATIENT, workers=2) as pool:
        results = pool.run_many([(f"print({i})", f"assert {i} % 3") for i in range(12)])
        assert [result.passed for result in results] == [bool(i % 3) for i in range(12)]
        assert [result.output for result in results] == [f"{i}\n" for i in range(12)]
        assert 1 <= len(pool._idle) <= 2
        processes = [z.process for each in pool._idle for z in (each.programs, each.judges)]
    assert all(process.returncode is not None for process in processes)
    assert list(tmp_path.iterdir()) == [] and threading.active_count() == threads
    with pytest.raises(UserError, match="the sandbox's pool is closed"):
        pool.run("x = 1")
    pool.close()


def test_an_interrupted_worker_is_not_used_again(monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt

    with Pool(PATIENT, workers=1) as pool:
        with monkeypatch.context() as patch:
            patch.setattr(worker._Run, "wait", stop)
            with pytest.raises(KeyboardInterrupt):
                pool.run("raise KeyError")
        assert pool._idle == [] and pool.run("x = 1").passed


def test_pool_that_is_closed_while_it_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    pool, results = Pool(Limits(seconds=1), workers=1), []
    runner = threading.Thread(target=lambda: results.append(pool.run("while True: pass")))
    runner.start()
    while pool._idle:
        time.sleep(0.01)
    pool.close()
    runner.join()
    assert results[0].reason == "timeout" and list(tmp_path.iterdir()) == []


def is_alive(pid: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False


def test_a_forgotten_pool_ends_with_the_process(tmp_path):
    """Also if the process is killed, since the workers' other ends are closed then."""
    code = (
        "import os, signal, sys\nfrom xflow_jax.sandbox import Pool\npool = Pool(workers=1)\n"
        "worker = pool._idle[0]\n"
        "print(worker.programs.process.pid, worker.judges.process.pid, flush=True)\n"
        "if len(sys.argv) > 1: os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    for arguments in ([], ["kill"]):
        command = [sys.executable, "-c", code, *arguments]
        environment = {**os.environ, "TMPDIR": str(tmp_path)}
        ended = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=300
        )
        assert ended.returncode == (-9 if arguments else 0), ended.stderr
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            if not any(is_alive(int(pid)) for pid in ended.stdout.split()):
                break
            time.sleep(0.05)
        else:
            pytest.fail("the worker outlives its process")
        if not arguments:
            assert list(tmp_path.iterdir()) == []


def test_a_warm_worker_is_much_quicker_than_a_cold_one():
    """By the shortest wall time of each, which other processes lengthen least. About 20 times."""

    def shortest(run: Callable[..., Result], count: int) -> float:
        times = []
        for i in range(count):
            start = time.monotonic()
            assert run(f"x = {i}", f"assert x == {i}").passed
            times.append(time.monotonic() - start)
        return min(times)

    with Pool(PATIENT, workers=1) as pool:
        warm = shortest(pool.run, 30)
    cold = shortest(functools.partial(run_program, limits=PATIENT), 3)
    assert cold > 3 * warm, (cold, warm)


def test_a_worker_is_renewed_after_some_programs(monkeypatch):
    monkeypatch.setattr(worker, "MAX_RUNS", 3)
    with Pool(PATIENT, workers=1) as pool:
        seen = []
        for _ in range(7):
            assert pool.run("x = 1").passed
            seen += [each.programs.process.pid for each in pool._idle]
    # Runs 3 and 6 are the last of their worker, which is not given back.
    assert [seen.count(pid) for pid in dict.fromkeys(seen)] == [2, 2, 1]


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("import os\nos.write(3, bytes(9))", "no answer to a call"),
        ("import signal\nsignal.raise_signal(signal.SIGSEGV)", "was killed by SIGSEGV"),
    ],
)
def test_a_worker_is_renewed_after_any_doubt(program, reason):
    with Pool(PATIENT, workers=1) as pool:
        first = pool._idle[0]
        assert reason in pool.run(program, "f()").reason
        assert not first.close.alive and pool._idle == []
        assert pool.run("x = 1").passed


def test_a_library_is_found_only_if_it_is_named(monkeypatch):
    program = "import numpy\nx = int(numpy.arange(3).sum())"
    assert run_program(program, "assert x == 3", PATIENT).passed
    for names in ((), ("no_such_package",), ("no.such.package", "json")):
        reason = run_program(program, "", dataclasses.replace(PATIENT, libraries=names)).reason
        assert reason == "error: ModuleNotFoundError: No module named 'numpy'"
    assert run_program("import jax", "", PATIENT).reason.startswith("error: ModuleNotFoundError")


def test_the_rate_of_two_workers():
    """At least 40 programs in a second of processor time on two cores, on a busy machine too."""
    jobs = [(f"def f(x): return x + {i}", f"assert f(1) == {i + 1}") for i in range(100)]
    with Pool(PATIENT, workers=2) as pool:
        before = os.times()
        start = time.monotonic()
        assert all(result.passed for result in pool.run_many(jobs))
        wall = time.monotonic() - start
    after = os.times()
    used = sum(after[:4]) - sum(before[:4])  # of this process and of the ended workers
    assert min(wall, used / 2) < 100 / 40, (wall, used)
