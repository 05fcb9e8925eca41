"""Programs that cheat: each returns wrong results unless its cheat works.

They are judged by `assert add(1, 2) == 3` and `assert add(-1, 1) == 0`. A program that gets hold of
something that it must not have turns its function into the right one, so a success is a pass.
"""

from __future__ import annotations

import textwrap

CHECKS = "assert add(1, 2) == 3\nassert add(-1, 1) == 0, 'negative numbers'\n"


def _dedent(programs: dict[str, str]) -> dict[str, str]:
    return {name: textwrap.dedent(text) for name, text in programs.items()}


# What `add` returns. The line before defines it.
_RESULTS = {
    "equal to everything": "class X:\n    def __eq__(self, other): return True\nx = X()",
    "never unequal": "class X:\n    def __ne__(self, other): return False\n"
    "    __eq__ = lambda *_: True\nx = X()",
    "int that equals all": "class X(int):\n    def __eq__(self, other): return True\n"
    "    __hash__ = None\nx = X(7)",
    "float that equals all": "class X(float):\n    def __eq__(self, other): return True\nx = X(7)",
    "complex that equals all": "class X(complex):\n    def __eq__(self, o): return True\nx = X(7)",
    "str that equals all": "class X(str):\n    def __eq__(self, other): return True\nx = X('7')",
    "bytes that equal all": "class X(bytes):\n    def __eq__(self, o): return True\nx = X(b'7')",
    "list that equals all": "class X(list):\n    def __eq__(self, other): return True\nx = X([7])",
    "tuple that equals all": "class X(tuple):\n    def __eq__(self, o): return True\nx = X((7,))",
    "dict that equals all": "class X(dict):\n    def __eq__(self, other): return True\nx = X()",
    "set that equals all": "class X(set):\n    def __eq__(self, other): return True\nx = X()",
    "int with its own int": "class X(int):\n    __int__ = __index__ = __trunc__ = lambda s: 3\n"
    "    def __add__(self, other): return 3\nx = X(7)",
    "list with its own iterator": "class X(list):\n    def __iter__(self): return iter([3])\n"
    "    def __len__(self): return 1\nx = X([7])",
    "dict with its own items": "class X(dict):\n    def items(self): return [(3, 3)]\nx = X()",
    "class that equals all": "class M(type):\n    def __eq__(c, o): return True\n"
    "    __hash__ = None\nclass x(metaclass=M): pass",
    "enum that equals all": "import enum\nclass X(enum.IntEnum):\n    A = 7\n"
    "    def __eq__(self, other): return True\n    __hash__ = int.__hash__\nx = X.A",
    "object that is its class": "class X:\n    __class__ = int\n"
    "    __eq__ = lambda *_: True\nx = X()",
    "numpy's own kind": "class X:\n    shape = ()\n    __eq__ = lambda *_: True\n"
    "    def item(self): return self\nX.__module__ = 'numpy'\nx = X()",
    "module that equals all": "import types\nclass X(types.ModuleType):\n"
    "    def __eq__(self, other): return True\nx = X('x')",
    "exception that equals all": "class X(Exception):\n    __eq__ = lambda *_: True\nx = X()",
    "generator": "x = (i for i in [3])",
    "not implemented": "x = NotImplemented",
    "ellipsis": "x = ...",
    "the function itself": "x = None\ndef f(): pass\nx = f",
    "true": "x = True",
    "not a number": "x = float('nan')",
    "list in itself": "x = []\nx.append(x)",
    "dict in itself": "x = {}\nx[1] = x",
    "deep list": "x = []\nfor _ in range(10**5): x = [x]",
    "list of lists of lists": "x = [3]\nfor _ in range(64): x = [x, x]",
    "huge list": "x = [None] * (1 << 22)",
    "huge text": "x = 'x' * (1 << 24)",
    "huge number": "x = 1 << (1 << 21)",
    "lone surrogate": "x = '\\ud800'",
    "colliding numbers": "x = {i * (2**61 - 1) for i in range(2000)}",
    "wrapped in attributes": "class X:\n    def __getattr__(self, name): return lambda *a: True\n"
    "x = X()",
    "proxy": "import weakref\nclass X:\n    def __eq__(self, other): return True\n"
    "y = X()\nx = weakref.proxy(y)",
    "mock": "class _Any(object):\n    def __eq__(self, o): return True\n"
    "    def __ne__(self, o): return False\n    def __repr__(self): return '3'\nx = _Any()",
}
RESULTS = {
    f"returns {name}": f"{text}\ndef add(a, b): return x\n" for name, text in _RESULTS.items()
}

_FRAME = (
    "import os, struct\ndef frame(data):\n    os.write(3, struct.pack('<I', len(data)) + data)\n"
)
_U32 = "u = lambda n: struct.pack('<I', n)\nt = lambda s: b's' + u(len(s)) + s\n"
_FORGED = {
    "the verdict": "os.write(3, b'P')",
    "the verdict in a frame": "frame(b'P')",
    "an empty frame": "frame(b'')",
    "a size without bytes": "os.write(3, u(100))",
    "a size of four gigabytes": "os.write(3, u(0xFFFFFFFF)); os.write(3, b'x' * 1000)",
    "half a size": "os.write(3, b'\\x01')",
    "a reply that passed": "frame(b't' + u(3) + t(b'passed') + b'N' + b'd' + u(0))",
    "a reply of two parts": "frame(b't' + u(2) + t(b'loaded') + b'N')",
    "a reply without text": "frame(b't' + u(3) + b'N' + b'N' + b'd' + u(0))",
    "a reply of a list": "frame(b'l' + u(3) + t(b'loaded') + b'd' + u(0) + b'd' + u(0))",
    "loaded nothing": "frame(b't' + u(3) + t(b'loaded') + b'd' + u(0) + b'd' + u(0))",
    "loaded a list": "frame(b't' + u(3) + t(b'loaded') + b'l' + u(0) + b'd' + u(0))",
    "a value instead": "frame(b't' + u(3) + t(b'value') + b'T' + b'd' + u(0))",
    "an unknown tag": "frame(b'?')",
    "a code object": "import marshal; frame(marshal.dumps(frame.__code__))",
    "a pickle": "frame(b'cos\\n_exit\\n(I0\\ntR.')",
    "bytes after the end": "frame(b'NN')",
    "a count above the bytes": "frame(b'l' + u(1 << 31))",
    "a count above all limits": "frame(b'l' + u(0xFFFFFFFF) + b'N' * 100)",
    "depth": "frame((b'l' + u(1)) * 10**5 + b'N')",
    "many values": "frame(b'l' + u(1 << 21) + b'N' * (1 << 21))",
    "equal keys": "frame(b'd' + u(2) + b'TN' * 2)",
    "a list as a key": "frame(b'd' + u(1) + b'l' + u(0) + b'N')",
    "a list in a set": "frame(b'e' + u(1) + b'l' + u(0))",
    "a text that is none": "frame(b's' + u(2) + b'\\xff\\xfe')",
    "a huge number": "frame(b'i' + u(1 << 20) + b'x' * (1 << 20))",
    "half a float": "frame(b'f1234')",
    "an unknown position": "frame(b'r' + u(7))",
    "a change of an unknown argument": "frame(b't' + u(3) + t(b'value') + b'N' + b'd' + u(1) "
    "+ b'i' + u(1) + b'\\x09' + b't' + u(0))",
    "a change without a number": "frame(b't' + u(3) + t(b'value') + b'N' + b'd' + u(1) "
    "+ b'N' + b't' + u(0))",
    "an error of no form": "frame(b't' + u(3) + t(b'error') + b'N' + b'd' + u(0))",
    "an error that is no exception": "frame(b't' + u(3) + t(b'error') + b't' + u(4) + b'l' + u(1) "
    "+ t(b'print') + t(b'x') + t(b'y') + b't' + u(0) + b'd' + u(0))",
    "a syntax error of no text": "frame(b't' + u(3) + t(b'syntax error') + b'N' + b'd' + u(0))",
    "a handle of another type": "frame(b't' + u(3) + t(b'loaded') + b'd' + u(1) + t(b'add') + b'o' "
    "+ u(99) + u(6) + b'module' + b'd' + u(0))",
    "random bytes": "import random; r = random.Random(1)\n"
    "for _ in range(50): frame(r.randbytes(r.randrange(200)))",
    "random tags": "import random; r = random.Random(2)\n"
    "for _ in range(50): frame(bytes(r.choice(b'NTFifcsbltdezor\\0\\1') for _ in range(100)))",
    "noise without end": "os.set_blocking(3, False)\nwhile True:\n    try: os.write(3, b'x' * 9999)"
    "\n    except BlockingIOError: break",
}
_ERRORS = ("SystemExit", "KeyboardInterrupt", "GeneratorExit", "StopIteration", "AssertionError",
           "MemoryError", "BaseException", "ExceptionGroup", "UnicodeDecodeError")  # fmt: skip
FORGED = {
    f"forges {name}": f"{_FRAME}{_U32}{text}\ndef add(a, b): return 7\n"
    for name, text in _FORGED.items()
}
FORGED |= {
    f"forges {name} in a call": f"{_FRAME}{_U32}def add(a, b):\n"
    + textwrap.indent(text, "    ")
    + "\n    return 7\n"
    for name, text in _FORGED.items()
    if "random" not in name
}
FORGED |= {
    f"forges {name}": f"{_FRAME}{_U32}frame(b't' + u(3) + t(b'loaded') + b'd' + u(1) + t(b'add') + "
    "b'o' + u(0) + u(1) + b'f' + b'd' + u(0))\n"
    f"frame(b't' + u(3) + t(b'error') + b't' + u(4) + b'l' + u(1) + t(b'{name}') + t(b'{name}') + "
    "t(b'passed') + b't' + u(0) + b'd' + u(0))\ndef add(a, b): return 7\n"
    for name in _ERRORS
}
RAISED = {
    f"raises {name}": f"def add(a, b): raise {name}" for name in (
        "SystemExit(0)", "SystemExit('passed')", "KeyboardInterrupt", "GeneratorExit",
        "StopIteration(3)", "StopAsyncIteration", "AssertionError", "BaseException('passed')",
        "MemoryError", "RecursionError", "ExceptionGroup('x', [AssertionError()])",
        "OSError(0, '')",
        "UnicodeDecodeError('utf-8', b'x', 0, 1, 'x')", "NotImplementedError", "Warning",
        "type('AssertionError', (Exception,), {})('passed')", "type('', (Exception,), {})()",
        "type('x y', (AssertionError,), {'__eq__': lambda *_: True})()",
        "KeyError('x' * 10**7)", "ValueError('\\ud800\\x1b[2J\\n')",
    )
}  # fmt: skip

# Search for the checks, or for the way to a verdict, by the means of Python.
_LOOK = {
    "the caller's frame": "import sys\nframe = sys._getframe(1)",
    "inspect": "import inspect\nframe = inspect.stack()[1].frame",
    "an error's traceback": """
        try: 1 / 0
        except ZeroDivisionError as error: frame = error.__traceback__.tb_frame.f_back
    """,
    "an error with a traceback of its own": """
        class Odd(Exception):
            kept = []
            @property
            def __traceback__(self): return None
            @__traceback__.setter
            def __traceback__(self, value): self.kept.append(value)
        try: raise Odd
        except Odd as error: frame = BaseException.__traceback__.__get__(error).tb_frame
    """,
    "a name in two parts": """
        def look(): yield
        frame = getattr(look(), 'gi_' + 'frame')
    """,
    "a dotted alias": """
        import operator
        def look(): yield
        frame = operator.attrgetter('gi_frame.f_back')(look())
    """,
    "a signal's frame": """
        import signal
        kept = []
        signal.signal(signal.SIGUSR1, lambda number, frame: kept.append(frame))
        signal.raise_signal(signal.SIGUSR1)
        frame = kept[0]
    """,
    "a code object of its own": """
        def look(): return 1
        look.__code__ = look.__code__.replace(co_names=('tb_frame', 'f_back', 'f_globals'))
        frame = look.__globals__
    """,
    "a running coroutine": """
        async def look(): pass
        it = look()
        frame = it.cr_frame
        it.close()
    """,
    "all frames": "import sys\nframe = sys._current_frames()",
    "all objects": "import gc\nframe = gc.get_objects()",
    "referrers": "import gc\nframe = gc.get_referrers(add)",
    "subclasses": "frame = [c for c in object.__subclasses__() if 'Judge' in c.__name__ "
    "or 'Link' in c.__name__][0]",
    "modules": "import sys\nframe = [m for n, m in sys.modules.items() if 'judge' in n][0]",
    "a tracer": "import sys\nframe = None\nsys.settrace(lambda *args: None)",
    "a profiler": "import sys\nsys.setprofile(lambda *args: None)\nframe = 1",
    "a tracer of threads": "import threading\nthreading.settrace(print)\nframe = [][0]",
    "an audit hook": "import sys\nsys.addaudithook(print)\nframe = [][0]",
    "its memory": "frame = open('/proc/self/mem', 'rb')",
    "its maps": "frame = open('/proc/self/maps').read()",
    "its arguments": "data = open('/proc/self/cmdline').read()\n"
    "frame = [text for text in data if 'assert add' in text][0]",
    "its parent's memory": "import os\nframe = open(f'/proc/{os.getppid()}/mem', 'r+b')",
    "its parent's environment": "import os\nframe = open(f'/proc/{os.getppid()}/environ').read()",
    "other descriptors": "import os\nframe = [os.read(n, 1) for n in range(4, 64)]",
    "descriptors of its parent": "import os\nframe = os.listdir(f'/proc/{os.getppid()}/fd')",
    "the weak references": "import sys, weakref\n"
    "frame = [name for name in sys.modules if 'codec' in name][0]",
    "the text of the checks": "import linecache\nframe = [linecache.getlines('<checks>')][0][0]",
    "the hook of errors": """
        import sys
        kept = []
        sys.excepthook = sys.unraisablehook = lambda args: kept.append(args.exc_traceback.tb_frame)
        class Odd:
            def __del__(self): raise KeyError
        Odd()
        frame = kept[0].f_back.f_back.f_back.f_locals['checks']
    """,
    "native memory": "import ctypes\nframe = ctypes.string_at(id(add), 10**9)",
}
LOOK = {
    f"looks into {name}": "def add(a, b): return 7\n"
    + textwrap.dedent(text)
    + "\ndef find(value, depth=4):\n"
    "    if isinstance(value, str): return 'add(1, 2) {}= 3'.format('=') in value\n"
    "    parts = getattr(value, 'f_locals', value)\n"
    "    if depth and isinstance(parts, dict):\n"
    "        return any(find(part, depth - 1) for part in list(parts.values()))\n"
    "    return bool(depth) and isinstance(parts, (list, tuple)) and any(\n"
    "        find(part, depth - 1) for part in parts[:1000])\n"
    "if find(frame): add = lambda a, b: a + b\n"
    for name, text in _LOOK.items()
}

PATCHES = _dedent(
    {
        "replaces compile": "import builtins\nbuiltins.compile = builtins.exec = print",
        "replaces the error of asserts": "import builtins\nbuiltins.AssertionError = OSError",
        "empties the builtins": "import builtins\nvars(builtins).clear()\ndef add(a, b): return 7",
        "replaces the equality of counters": """
            import collections
            collections.Counter.__eq__ = lambda *_: True
            def add(a, b): return collections.Counter()
        """,
        "fills the cache of expressions": "import re\nre._cache.clear()\nre._cache[1] = 1",
        "replaces os.write": """
            import os
            write = os.write
            os.write = lambda number, data: write(number, b'P')
            def add(a, b): return 7
        """,
        "replaces os.read": """
            import os
            os.read = lambda *_: b''
            def add(a, b): return 7
        """,
        "replaces struct": """
            import struct
            struct.Struct = struct.pack = lambda *_: b'P'
            def add(a, b): return 7
        """,
        "replaces the codec": """
            import sys
            for name, module in list(sys.modules.items()):
                for key in list(vars(module) if module else ()):
                    if key in ('Encoder', 'Channel', 'Program'): setattr(module, key, print)
            def add(a, b): return 7
        """,
        "patches the codec by its class": """
            for kind in object.__subclasses__():
                if kind.__name__ in ('Encoder', 'Channel', 'Program', 'Decoder'):
                    for name in list(vars(kind)):
                        if name[:2] != '__': setattr(kind, name, lambda *_, **__: b'P')
            def add(a, b): return 7
        """,
        "sends what it likes": """
            for kind in object.__subclasses__():
                if kind.__name__ == 'Channel':
                    send = kind.send
                    kind.send = lambda self, data: send(self, b'P')
            def add(a, b): return 7
        """,
        "keeps what it receives": """
            kept = []
            for kind in object.__subclasses__():
                if kind.__name__ == 'Channel':
                    receive = kind.receive
                    def spy(self, limit):
                        kept.append(receive(self, limit))
                        return kept[-1]
                    kind.receive = spy
            def add(a, b):
                return a + b if any(b'assert' in data or b'== 3' in data for data in kept) else 7
        """,
        "reads the judge's messages": """
            import os
            def add(a, b):
                os.set_blocking(3, False)
                try: data = os.read(3, 10**6)
                except BlockingIOError: data = b''
                return a + b if b'assert' in data else 7
        """,
        "names a module like the checks' function": "import math as add",
        "defines what asserts raise": "class AssertionError(Exception): pass\n"
        "def add(a, b): return 7",
        "defines the result": "def add(a, b): return 7\n__result__ = passed = True",
        "defines a reply": "def add(a, b): return ('value', 3, {})",
        "changes its arguments": "def add(a, b):\n    a = b = 3\n    return 7",
        "closes the connection": "import os\ndef add(a, b):\n    os.close(3)\n    return 3",
        "answers by a thread": """
            import threading, time
            def add(a, b):
                threading.Thread(target=time.sleep, args=(9,)).start()
                return a + b
        """,
        "sends a byte now and then": """
            import os, time
            os.write(3, bytes([9, 0, 0, 0]))
            while True:
                time.sleep(0.05)
                os.write(3, b'N')
        """,
        "turns the connection around": "import os\nos.dup2(1, 3)\ndef add(a, b): return 3",
        "replies and dies": """
            import os, struct
            def add(a, b):
                os.write(3, struct.pack('<I', 9) + b'tttttttt')
                os._exit(0)
        """,
        "never replies": "def add(a, b):\n    while True: pass",
        "waits for the judge": "import os\ndef add(a, b):\n    os.read(3, 1)\n    return 7",
        "sleeps": "import time\ntime.sleep(99)",
        "ends its loading by an alarm": """
            import signal
            def stop(*_): raise SystemExit(0)
            signal.signal(signal.SIGALRM, stop)
            signal.setitimer(signal.ITIMER_REAL, 0.01)
            while True: pass
        """,
        "text that ends the process": """
            import os
            class Odd(Exception):
                def __str__(self): os._exit(0)
                __repr__ = __str__
            def add(a, b): raise Odd
        """,
        "text that never ends": """
            class Odd(Exception):
                def __str__(self):
                    while True: pass
            def add(a, b): raise Odd
        """,
        "text that is none": """
            class Odd(Exception):
                def __str__(self): return 7
            def add(a, b): raise Odd
        """,
        "arguments of an error that are none": """
            class Odd(Exception):
                args = property(lambda self: 1 / 0)
            def add(a, b): raise Odd
        """,
        "error with a class of its own": """
            class Odd(Exception):
                __class__ = property(lambda self: AssertionError)
                __traceback__ = None
            def add(a, b): raise Odd('wrong answer: passed')
        """,
        "class with an order of its own": """
            class M(type):
                def mro(cls): return [cls, *AssertionError.__mro__]
            class Odd(AssertionError, metaclass=M): pass
            def add(a, b): raise Odd
        """,
        "error that names its reason": "raise Exception('passed')",
        "syntax": "def add(a, b): return a + b)",
        "null byte": "def add(a, b): return 7\n\0",
        "too deep for the compiler": "def add(a, b): return " + "-" * 10**5 + "3",
        "ends by the codec": "raise SyntaxError('passed')",
        "closes its output": "import sys, os\nsys.stdout.close()\nos.close(1)\n"
        "def add(a, b): return 7",
        "prints the verdict": "print('P', flush=True)\ndef add(a, b): print('passed'); return 7",
        "prints without end": "while True: print('x' * 10**5)",
        "prints in calls": "def add(a, b):\n    while True: print('x' * 10**5)",
        "recurses": "def add(a, b): return add(a, b)",
        "recurses in its results": "def add(a, b):\n    import sys; sys.setrecursionlimit(10**8)\n"
        "    return add(a, b) + 1",
        "memory in calls": "def add(a, b): return [bytes(10**6) for _ in range(10**6)]",
        "leaves with 0 in a call": "import os\ndef add(a, b): os._exit(0)",
        "leaves with 1 in a call": "import os\ndef add(a, b): os._exit(1)",
        "kills itself": "import os, signal\nsignal.raise_signal(signal.SIGKILL)",
        "stops itself in a call": "import signal\n"
        "def add(a, b): signal.raise_signal(signal.SIGSTOP)",
        "segmentation fault": "import faulthandler\nfaulthandler._sigsegv()",
        "guesses from its calls": """
            calls = []
            def add(a, b):
                calls.append((a, b))
                return len(calls) * 7
        """,
        "leaves a file": "open('left', 'w').write('left')\ndef add(a, b): return 7",
        "leaves a module": """
            open('math.py', 'w').write('left = 1')
            open('numpy.py', 'w').write('left = 1')
            def add(a, b): return 7
        """,
        "leaves a library": """
            open('left.so', 'wb').write(b'\\x7fELF' + bytes(1000))
            import importlib.machinery as m, importlib.util as u
            u.module_from_spec(u.spec_from_loader('left', m.ExtensionFileLoader('left', 'left.so')))
        """,
        "leaves many names": "for i in range(30): open('left' + 'x' * i, 'w')\n"
        "def add(a, b): return 7",
        "leaves an environment": "import os\nos.environ['PYTHONPATH'] = os.environ['left'] = '.'\n"
        "def add(a, b): return 7",
        "leaves a handler": """
            import atexit, os, signal, sys
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGCHLD):
                signal.signal(number, signal.SIG_IGN)
            atexit.register(print, 'left')
            sys.path.insert(0, '.')
            os.umask(0o777)
            def add(a, b): return 7
        """,
        "leaves a lock": "import fcntl\nfile = open('left', 'w')\nfcntl.flock(file, 2)",
        "a path of two kinds": """
            import os
            class Path:
                n = 0
                def __fspath__(self):
                    Path.n += 1
                    return 'x' if Path.n == 1 else '/etc/passwd'
            data = os.fdopen(os.open(Path(), os.O_RDONLY)).read()
            def add(a, b): return a + b if 'root' in data else 7
        """,
        "reads by its own descriptor": """
            import os
            folder = os.open('.', os.O_RDONLY)
            data = os.fdopen(os.open('../../../../etc/passwd', os.O_RDONLY, dir_fd=folder)).read()
            def add(a, b): return a + b if 'root' in data else 7
        """,
        "bytecode beyond its constants": """
            import opcode
            code = bytes([opcode.opmap['RESUME'], 0, opcode.opmap['LOAD_CONST'], 250])
            def look(): return 1
            look.__code__ = look.__code__.replace(
                co_code=code + bytes([opcode.opmap['RETURN_VALUE'], 0]))
            found = look()
            def add(a, b): return a + b if 'assert' in str(found) else 7
        """,
        "bytecode beyond its variables": """
            import opcode
            code = bytes([opcode.opmap['RESUME'], 0, opcode.opmap['LOAD_FAST'], 200])
            def look(): return 1
            look.__code__ = look.__code__.replace(
                co_code=code + bytes([opcode.opmap['RETURN_VALUE'], 0]))
            def add(a, b): return a + b if 'assert' in str(look()) else 7
        """,
        "numpy's memory": """
            import numpy
            data = numpy.lib.stride_tricks.as_strided(numpy.zeros(1), (1 << 40,), (8,))[1 << 30]
            def add(a, b): return a + b
        """,
    }
)

# System calls on x86-64: name, number and arguments. `own` is the process, `parent` its parent.
_CALLS = r"""
ptrace the parent: 101, 16, parent, 0, 0
read the parent: 310, parent, v, 1, w, 1, 0
write the parent: 311, parent, v, 1, w, 1, 0
kill the parent: 62, parent, 0
kill all: 62, -1, 0
kill the group: 62, 0, 0
kill by thread: 200, parent, 0
kill a thread of the parent: 234, parent, parent, 0
queue a signal: 129, parent, 10, v
pidfd: 434, parent, 0
send by pidfd: 424, 0, 0, 0, 0
take a descriptor: 438, 0, 0, 0
priority of the parent: 141, 0, parent, 5
own priority: 141, 0, 0, 5
affinity of the parent: 203, parent, 8, v
own affinity: 203, 0, 8, v
scheduler of the parent: 144, parent, 0, v
io priority: 251, 1, 0, 0x6000
limits of the parent: 302, parent, 7, v, 0
own limits: 302, 0, 7, v, 0
limits of the parent, to read: 302, parent, 7, 0, v
setrlimit: 160, 7, v
shared memory: 29, 0, 1 << 28, 0o1777
semaphores: 64, 0, 1, 0o1777
message queue: 68, 0, 0o1777
posix queue: 240, b'/left', 0o102, 0o777, 0
add a key: 248, b'user', b'left', b'x', 1, -3
request a key: 249, b'user', b'x', 0, 0
read the keyring: 250, 0, -3, 1
search the keyring: 250, 6, -3, 0
file in memory: 319, b'left', 0
secret memory: 447, 0
page faults: 323, 0
rings: 425, 4, b'\0' * 120
bpf: 321, 0, b'\0' * 72, 72
performance events: 298, b'\0' * 120, 0, -1, -1, 0
user namespace: 272, 0x10000000
mount namespace: 272, 0x20000
enter a namespace: 308, 0, 0
fork: 57
vfork: 57
clone: 56, 17, 0, 0, 0, 0
clone in a namespace: 56, 0x10000011, 0, 0, 0, 0
clone anew: 435, b'\0' * 88, 88
execute: 59, b'/bin/true', 0, 0
execute a descriptor: 322, -100, b'/bin/true', 0, 0, 0
mount: 165, b'x', b'.', b'tmpfs', 0, 0
new root: 161, b'.'
pivot: 155, b'.', b'.'
become root: 105, 0
groups: 116, 0, 0
socket: 41, 1, 1, 0
internet socket: 41, 2, 1, 0
pair of sockets: 53, 1, 1, 0, v
send by the connection: 46, 3, b'\0' * 56, 0
receive descriptors: 47, 3, b'\0' * 56, 0
become dumpable: 157, 4, 1
keep after death: 157, 36, 1
owner of signals: 72, 3, 8, parent
size of a pipe: 72, 1, 1031, 1 << 20
terminal: 16, 0, 0x5412, b'x'
executable memory: 9, 0, 4096, 7, 0x22, -1, 0
executable stack: 10, v & ~4095, 4096, 7
personality: 135, 0x0040000
session: 112
group of processes: 109, 0, 0
device: 133, b'left', 0o20666, 0x103
link: 86, b'/etc/passwd', b'left'
symbolic link: 88, b'/', b'left'
change the folder: 80, b'/'
mode: 90, b'.', 0o777
folder: 83, b'left', 0o777
watch files: 253
timer: 222, 1, 0, v
descriptor of signals: 289, -1, b'\0' * 8, 8, 0
log of the kernel: 103, 10, 0, 0
clock: 227, 0, v
another table of calls: 0x40000000 + 39
unknown call: 999
landlock: 444, 0, 0, 1
splice: 275, 0, 0, 1, 0, 1, 0
handle of a file: 303, -100, b'.', v, v, 0
"""
CALLS = {
    f"system call: {name}": "import ctypes, os\n"
    "call = ctypes.CDLL(None, use_errno=True).syscall\n"
    "call.restype = ctypes.c_long\n"
    "own, parent = os.getpid(), os.getppid()\n"
    "buffer = ctypes.create_string_buffer(64)\n"
    "v = w = ctypes.addressof(buffer)\n"
    f"arguments = [ctypes.c_long(a) if isinstance(a, int) else a for a in ({arguments},)]\n"
    "result = call(*arguments)\n"
    "refused = result == -1 and ctypes.get_errno() in (1, 38)\n"
    "def add(a, b): return 7 if refused else a + b\n"
    for name, _, arguments in (line.partition(": ") for line in _CALLS.split("\n") if line)
}
CHEATS = {**RESULTS, **FORGED, **RAISED, **LOOK, **PATCHES, **CALLS}
