"""Checks in the judge: values, changed arguments, and objects that stay in the program."""

from __future__ import annotations

import os
import textwrap
from pathlib import Path

import pytest

from tests.sandbox.test_hostile import children
from xflow_jax.sandbox.check_names import free_names, needs_same_interpreter
from xflow_jax.sandbox.judge import make_exception
from xflow_jax.sandbox.limits import Limits
from xflow_jax.sandbox.pool import SAME_INTERPRETER, Pool


@pytest.fixture(scope="module")
def pool():
    with Pool(Limits(seconds=60), workers=1) as pool:
        yield pool


def run(pool: Pool, program: str, checks: str):
    return pool.run(textwrap.dedent(program), textwrap.dedent(checks))


RIGHT = {
    "every type": (
        "def f(x): return x",
        """
        for value in (None, True, 7, 1 << 70, 0.5, 1j, 'a', b'a', [1], (1,), {1: [2]}, {1}, [[]]):
            assert f(value) == value and type(f(value)) is type(value)
        assert type(f(frozenset({1}))) is frozenset
        """,
    ),
    "numbers and views that equal plain values": (
        """
        from decimal import Decimal
        from fractions import Fraction
        def f(kind):
            d = {'b': 1, 'a': 2}
            return {'q': Fraction(1, 2), 'm': Decimal('0.5'), 'k': d.keys(), 'i': d.items(),
                    'y': bytearray(b'ab'), 'r': range(3), 'n': [Fraction(3, 1)]}[kind]
        def g(x): return x + x
        """,
        """
        from decimal import Decimal
        from fractions import Fraction
        assert f('q') == 0.5 == f('m') and f('q') == Fraction(2, 4) and f('q') != 1
        assert f('m') == Decimal('0.50') and f('m') > 0 and round(f('q') + 1, 1) == 1.5
        assert f('k') == {'a', 'b'} and list(f('k')) == ['b', 'a'] and len(f('k')) == 2
        assert f('i') == {('a', 2), ('b', 1)} and dict(f('i')) == {'b': 1, 'a': 2}
        assert f('y') == b'ab' and f('r') == range(3) and f('n') == [3]
        assert g(Fraction(1, 3)) == Fraction(2, 3) and g(Decimal('0.1')) == Decimal('0.2')
        """,
    ),
    "keywords": ("def f(a, *b, c=1, **d): return a, b, c, d", "assert f(1, 2, e=3) == "
                 "(1, (2,), 1, {'e': 3})"),
    "a sorted argument": (
        "def f(x): x.sort()",
        "x = [3, 1, 2]\nassert f(x) is None and x == [1, 2, 3]",
    ),
    "arguments of all kinds": (
        """
        def f(x, y, z, rows):
            x[:] = [0]; y.clear(); y['a'] = x; z.add(9)
            rows[0], rows[1] = rows[1], rows[0]
            rows[0].append(5)
        """,
        """
        x, y, z, first, second = [1, 2], {1: 2}, {3}, [1], [2]
        rows = [first, second]
        f(x, y, z, rows)
        assert x == [0] and y == {'a': [0]} and y['a'] is x and z == {3, 9}
        assert rows == [[2, 5], [1]] and rows[0] is second and rows[1] is first
        """,
    ),
    "an argument that is returned": ("def f(x):\n    x.append(1)\n    return x",
                                     "x = []\nassert f(x) is x == [1]"),
    "an argument that changed before an error": (
        "def f(x):\n    x.append(1)\n    raise ValueError",
        "x = []\ntry: f(x)\nexcept ValueError: pass\nassert x == [1]",
    ),
    "an argument twice": ("def f(a, b): a.append(1); return a is b", "x = []\nassert f(x, x)"),
    "an argument in itself": ("def f(a): return a[0] is a", "x = []\nx.append(x)\nassert f(x)"),
    "exceptions": (
        """
        class Own(ValueError): pass
        def f(kind): raise kind('text')
        def g(): raise Own('mine')
        def h(): return {}['key']
        """.replace("kind('text')", "{'v': ValueError, 'z': ZeroDivisionError}[kind]('text')"),
        """
        for kind, error in (('v', ValueError), ('z', ZeroDivisionError)):
            try: f(kind)
            except error as caught: assert caught.args == ('text',) and type(caught) is error
            else: assert False
        try: g()
        except ValueError as caught: assert str(caught) == 'mine' and type(caught).__name__ == 'Own'
        try: h()
        except KeyError as caught: assert caught.args == ('key',)
        """,
    ),
    "constants": ("N = 7\nTABLE = {'a': 1}", "assert N == 7 and TABLE == {'a': 1}"),
    "subclasses become their base": (
        """
        import collections, enum
        Point = collections.namedtuple('Point', 'x y')
        class Kind(enum.IntEnum): A = 3
        def f():
            return collections.Counter('aab'), Point(1, 2), Kind.A, collections.OrderedDict(a=1)
        """,
        """
        got = f()
        assert got == ({'a': 2, 'b': 1}, (1, 2), 3, {'a': 1})
        assert [type(x) for x in got] == [dict, tuple, int, dict]
        """,
    ),
    "classes": (
        """
        class Node:
            def __init__(self, value, left=None): self.value, self.left = value, left
            def double(self): return self.value * 2
            def __len__(self): return self.value
            def __getitem__(self, i): return i + self.value
            def __contains__(self, i): return i == self.value
            def __str__(self): return f'<{self.value}>'
        def depth(node): return 0 if node is None else 1 + depth(node.left)
        """,
        """
        root = Node(3)
        root.left = Node(4, left=Node(5))
        assert depth(root) == 3 and root.left.value == 4 and root.double() == 6
        assert len(root) == 3 and root[2] == 5 and 3 in root and 4 not in root
        assert str(root) == '<3>' and root.left is root.left and root != root.left
        assert depth(None) == 0 and [node.value for node in (root, root.left)] == [3, 4]
        """,
    ),
    "iterators": (
        """
        def f(n):
            for i in range(n): yield i, str(i)
        """,
        "assert list(f(3)) == [(0, '0'), (1, '1'), (2, '2')] and dict(f(1)) == {0: '0'}\n"
        "it = f(5)\nassert next(it) == (0, '0') and next(it) == (1, '1')\n"
        "assert sum(1 for _ in it) == 3",
    ),
    "an object with the name of a module": (
        "class Box(list): pass\nclass Q:\n    def put(self, x): return [x]\nqueue = Q()",
        "assert queue.put(1) == [1]",
    ),
    "slices": (
        "class A:\n    def __getitem__(self, key): return [key.start, key.stop, key.step]\na = A()",
        "assert a[1:2] == [1, 2, None] and a[::3] == [None, None, 3]",
    ),
    "functions of functions": (
        "def f(n): return lambda x: x + n\ndef twice(g): return lambda x: g(g(x))",
        "assert f(3)(4) == 7 and twice(f(3))(0) == 6",
    ),
    "modules are the judge's": (
        "import math, sys\nmath.fabs = sys.getsizeof = lambda x: 7\ndef f(): return 1",
        "assert math.fabs(-2) == 2 and sys.getsizeof(f()) != 7",
    ),
    "numbers of numpy": (
        "import numpy as np\n"
        "def f(x): return np.mean(x), np.int64(3), np.float32(0.5), np.bool_(1)",
        "got = f([1, 2])\nassert got == (1.5, 3, 0.5, True)\n"
        "assert [type(x) for x in got] == [float, int, float, bool]",
    ),
    "numpy": (
        "import numpy as np\n"
        "def f(m):\n"
        "    return np.linalg.inv(np.array(m)).tolist(), int(np.random.default_rng(0).random())",
        "assert f([[2.0]]) == ([[0.5]], 0)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RIGHT)
def test_right_answers_pass(pool, name):
    result = run(pool, *RIGHT[name])
    assert (result.passed, result.reason, result.same_interpreter) == (True, "passed", False)


SHARED = {
    "a function of the checks": ("def f(g): return g(1) + 1", "assert f(lambda x: x + 1) == 3"),
    "an object of the checks": ("def f(x): return x.n", "class A: n = 3\nassert f(A()) == 3"),
    "an iterator of the checks": ("def f(x): return list(x)", "assert f(iter([1])) == [1]"),
    "an exception of the program": (
        "class Own(Exception): pass\ndef f(): raise Own",
        "try: f()\nexcept Own: pass\nelse: assert False",
    ),
    "an instance of the program": ("class A: pass\ndef f(): return A()",
                                   "assert isinstance(f(), A)"),
    "a base of the program": ("class A:\n    n = 3", "class B(A): pass\nassert B().n == 3"),
    "a context of the program": (
        "import contextlib\n@contextlib.contextmanager\ndef f(): yield 3",
        "with f() as x: assert x == 3",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SHARED)
def test_checks_that_need_the_programs_interpreter_are_marked(pool, name):
    program, checks = SHARED[name]
    result = run(pool, program, checks)
    assert (result.passed, result.reason) == (True, SAME_INTERPRETER) and result.same_interpreter
    wrong = run(pool, program, checks + "\nassert False, 'no'")
    assert (wrong.passed, wrong.same_interpreter) == (False, False)
    assert wrong.reason == "wrong answer: no"


def test_a_program_cannot_choose_its_own_interpreter(pool):
    """Only what the checks do leads there."""
    odd = (
        "class X:\n    __getattr__ = __getitem__ = __call__ = lambda *a, **k: X()\n"
        "    __eq__ = __contains__ = lambda *a: True\n    __setattr__ = lambda *a: None\n"
    )
    for result in ("lambda: 3", "object()", "(i for i in [3])", "X()", "X", "f"):
        program = f"{odd}def f(x=0, **_): return {result}"
        for checks in (
            "assert f(f(1)) == 3",
            "assert f(1)[1:2] == [3]",
            "assert f(1).sort(key=lambda x: x) == 3",
            "assert f(1)(lambda: 3) == 3",
            "assert f(1)[print] == 3",
            "f(1).x = print\nassert f(1) == 3",
            "assert print in f(1) and f(1) == 3",
        ):
            answer = run(pool, program, checks)
            assert not answer.passed and not answer.same_interpreter, (program, checks)


WRONG = {
    "it ends the checks' loop": (
        "def f(x): raise StopIteration",
        "for got, want in zip(map(f, [1, 2]), [1, 2]): assert got == want",
    ),
    "it dies in a check that catches all": (
        "import os\ndef f(x): os._exit(0)",
        "for x in range(3):\n    try: f(x)\n    except: pass",
    ),
    "it breaks the protocol in a check that catches all": (
        "import os\ndef f(x): os.write(3, b'\\1\\0\\0\\0?')",
        "for x in range(3):\n    try: f(x)\n    except: pass",
    ),
    "it replaces a helper of the checks": (
        "def helper(x): return 3\ndef f(): return 7",
        "def helper(x): return x\nassert helper(f()) == 3",
    ),
    "it replaces a builtin": ("def sum(x): return 3\ndef f(): return [1]", "assert sum(f()) == 3"),
    "it hides a module that the checks do not import": (
        "class sys:\n    getsizeof = lambda x: 3\ndef f(): return 3",
        "assert f() == sys.getsizeof(())",
    ),
    "it hides a module": ("class math:\n    fabs = lambda x: 3\ndef f(): return 7",
                          "import math\nassert math.fabs(f()) == 3"),
    "its array is no list": ("import numpy\ndef f(): return numpy.array([1, 2])",
                             "assert f() == [1, 2]"),
    "its true is no number": ("def f(): return True", "assert type(f()) is int and f() == 1"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_answers_fail(pool, name):
    result = run(pool, *WRONG[name])
    assert not result.passed and not result.same_interpreter, result


def test_checks_do_not_leak_into_the_next(pool):
    """Nor does a judge that a check has damaged serve another program."""
    first = "import builtins, math\nbuiltins.left = math.left = 1\nassert f() == 1"
    second = "import builtins, math\nassert not hasattr(builtins, 'left') and f() == 1\n"
    second += "assert not hasattr(math, 'left')"
    assert run(pool, "def f(): return 1", first).passed
    assert run(pool, "def f(): return 1", second).passed


def test_the_judge_is_confined_too(pool):
    """By the same filter of system calls, in a process whose memory others cannot read."""
    checks = """
    import os, socket
    for attempt in (socket.socket, lambda: os.kill(os.getppid(), 0), lambda: os.execv('/', ['/'])):
        try: attempt()
        except PermissionError: pass
        else: assert False, 'allowed'
    assert f() == 1
    """
    assert run(pool, "def f(): return 1", checks).reason == "passed"
    if not Path("/proc/self/mem").exists() or "namespaces" not in pool.isolation:
        return
    (worker,) = pool._idle
    for zygote in (worker.programs, worker.judges):
        for pid in children(zygote.process.pid):
            # Files of a process that cannot be read are root's, whoever its user is.
            assert os.stat(f"/proc/{pid}").st_uid != 0
            assert os.stat(f"/proc/{pid}/mem").st_uid == 0


def test_checks_print_nowhere(capfd):
    checks = (
        "import sys\nprint('a')\nprint('b', file=sys.stderr)\nassert f() is 1"  # a SyntaxWarning
    )
    with Pool(Limits(seconds=60), workers=1) as pool:
        assert pool.run("print('c')\ndef f(): return 1", checks).output == "c\n"
    assert capfd.readouterr() == ("", "")


def test_checks_have_limits_too():
    endless = "def f():\n    while True: yield 1"
    with Pool(Limits(seconds=1, memory_mb=128), workers=1) as pool:
        assert pool.run("def f(): return 1", "while f(): pass").reason == "timeout"
        assert pool.run(endless, "for x in f(): pass").reason == "timeout"
        assert pool.run(endless, "list(f())").reason in ("timeout", "memory limit")
    with Pool(Limits(seconds=60, memory_mb=128), workers=1) as pool:
        assert pool.run("def f(): return 1", "x = [f()] * 10**9").reason == "memory limit"
        died = pool.run("def f(): return 1", "import os\nf()\nos.abort()")
        assert died.reason == "error: the process of the checks was killed by SIGABRT"
        left = pool.run("def f(): return 1", "import os\nf()\nos._exit(0)")
        assert not left.passed


def test_the_program_learns_only_what_the_checks_call(pool):
    """Its messages have no check, no expected value, and no other case."""
    spy = """
    import os
    kept = []
    for kind in object.__subclasses__():
        if kind.__name__ == 'Channel':
            receive = kind.receive
            kind.receive = lambda self, limit: kept.append(receive(self, limit)) or kept[-1]
    def f(x):
        print(kept)
        return x
    """
    result = run(pool, spy, "secret = 'expected'\nassert f('input') == 'input' and f(1) != secret")
    assert result.passed and "input" in result.output
    assert "expected" not in result.output and "assert" not in result.output


@pytest.mark.parametrize(
    ("checks", "names"),
    [
        ("assert add(1) == x", {"add", "x"}),
        ("import math\nassert math.fabs(add(1)) == len([i for i in y])", {"add", "len", "y"}),
        ("def check(candidate):\n    n = 1\n    assert candidate(n) == m\ncheck(f)", {"m", "f"}),
        ("from a import b as c\nfor i in c: d(i)", {"d"}),
        ("class A(B):\n    x = y\nA()", {"B", "y"}),
        ("x = lambda z: z + w", {"w"}),
    ],
)
def test_free_names(checks, names):
    assert free_names(checks) == names


def test_needs_of_checks():
    for checks in (
        "try: f()\nexcept (KeyError, A): pass",
        "isinstance(f(), (int, A))",
        "class B(A): pass",
        "with A() as x: pass",
        "assert issubclass(A, int)",
    ):
        assert needs_same_interpreter(checks, {"A"}), checks
        assert not needs_same_interpreter(checks, {"f"}), checks
    assert not needs_same_interpreter("assert A(1).x == [A]", {"A"})


def test_an_exception_is_made_of_anything():
    for base in ("ValueError", "SystemExit", "UnicodeDecodeError", "ExceptionGroup", "print", 7):
        for name in ("ValueError", "", "a b", "\ud800", "x" * 1000):
            for arguments in ((), (1, 2, 3), ("text",)):
                error = make_exception(([base, "Exception"], name, "text", arguments))
                assert isinstance(error, BaseException) and type(error).__name__.isprintable()
