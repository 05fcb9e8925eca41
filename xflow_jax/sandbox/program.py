"""Process of an untrusted program: answers the calls of the judge.

The process never holds checks or expected results, except if the checks need its interpreter. All
that it can send is the answer to a call. The kernel limits the process. The audit hook is a second
line, and the only one on systems without namespaces, Landlock and filters of system calls.

This is a script of the sandbox: it imports the standard library only.
"""

from __future__ import annotations

import builtins
import contextlib
import copy
import operator
import os
import sys
from collections.abc import Callable, Sequence
from types import ModuleType

from xflow_jax.sandbox.child import Channel, ChannelClosed, enter_child, take_limits
from xflow_jax.sandbox.codec import MAX_BYTES, Decoder, EncodeError, Encoder, Handle
from xflow_jax.sandbox.seccomp import Kernel

# Prefixes of audit events. Audit hooks cannot be removed, and they need no support of the kernel.
FORBIDDEN_EVENTS = (
    "ctypes.", "fcntl.", "gc.", "socket.", "sqlite3.", "subprocess.", "shutil.chown",
    "signal.pthread_kill", "os.chdir", "os.chflags", "os.chmod", "os.chown", "os.exec", "os.fchdir",
    "os.fork", "os.kill", "os.link", "os.mkdir", "os.posix_spawn", "os.removexattr", "os.rmdir",
    "os.setxattr", "os.spawn", "os.symlink", "os.system", "os.truncate", "os.utime",
    "resource.prlimit", "resource.setrlimit", "sys._current", "sys.addaudithook", "sys.monitoring",
    "sys.setprofile", "sys.settrace",
)  # fmt: skip
FORBIDDEN_IMPORTS = (
    "_ctypes",
    "_dbm",
    "_gdbm",
    "_interp",
    "_posixsubprocess",
    "_test",
    "_xx",
    "readline",
)
FRAME_ATTRIBUTES = ("ag_frame", "cr_frame", "gi_frame", "tb_frame")
CHANNEL = 3  # descriptor of the connection with the judge
_OPERATIONS: dict[str, Callable[..., object]] = {
    "call": lambda target, *args, **options: target(*args, **options),
    "get": getattr,
    "set": setattr,
    "iter": iter,
    "next": next,
    "length": len,
    "item": operator.getitem,
    "slice": lambda target, start, stop, step: target[start:stop:step],
    "contains": operator.contains,
    "text": str,
}
# Subclasses become these types. A bytearray becomes bytes, which it equals.
_BASES: dict[type, Callable[..., object]] = {
    int: int.__int__,
    float: float.__float__,
    complex: complex.__complex__,
    str: str.__str__,
    bytes: lambda value: bytes.__getitem__(value, slice(None)),
    list: lambda value: list(list.__iter__(value)),
    tuple: lambda value: tuple(tuple.__iter__(value)),
    dict: lambda value: dict(dict.items(value)),
    set: lambda value: set(set.__iter__(value)),
    frozenset: lambda value: frozenset(frozenset.__iter__(value)),
    bytearray: bytes,
}


def add_guard(readable: tuple[str, ...], scratch: str, writable: int) -> dict[str, object]:
    """Adds the audit hook of this process.

    Args:
        readable: folders and files that may be read.
        scratch: the folder that may be written.
        writable: files that may be opened for writing in all.

    Returns:
        The builtins as they are now.
    """
    # A function keeps the builtins of its creation. The functions below have a copy, so a program
    # that replaces builtins does not affect the guard.
    pristine = globals()["__builtins__"] = dict(vars(builtins))
    frames, forbidden, unimportable = FRAME_ATTRIBUTES, FORBIDDEN_EVENTS, FORBIDDEN_IMPORTS
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    fspath, null = os.fspath, os.devnull  # a program may replace these attributes

    def within(path: object, folders: tuple[str, ...]) -> bool:
        # No function or method is called here that a program can replace or override.
        path = fspath(path)
        if isinstance(path, bytes):
            path = bytes.decode(path, "utf-8", "surrogateescape")
        return ".." not in str.split(path, "/") and (
            str.startswith(path, folders) or not str.startswith(path, "/")
        )

    def guard(event: str, args: tuple[object, ...]) -> None:
        nonlocal writable
        if event == "open":
            path, _, flags = args
            if flags & writing and not isinstance(path, int):
                writable -= 1
                allowed = writable >= 0 and within(path, (scratch, null))
            else:
                allowed = isinstance(path, int) or within(path, readable)
        elif event in ("os.remove", "os.rename"):
            allowed = all(
                arg == -1 if isinstance(arg, int) else within(arg, (scratch,)) for arg in args
            )
        elif event == "import" and args[0].startswith(unimportable):
            raise ImportError(f"{args[0]} is not available here")
        elif event == "sys._getframe":
            # namedtuple, enum and typing handle this error.
            raise ValueError("call stack is not deep enough")
        else:
            allowed = not event.startswith(forbidden)
            if event == "object.__getattr__":
                allowed = args[1] not in frames
        if not allowed:
            raise PermissionError(f"{event} is not allowed here")

    sys.addaudithook(guard)
    return pristine


class Program:
    """The loaded program, and what the judge has received of it.

    Args:
        source: Python source of the program.
        pristine: builtins before the program ran.
    """

    def __init__(self, source: str, pristine: dict[str, object]) -> None:
        self._source, self._pristine = source, pristine
        self._objects: list[object] = []
        self._numbers: dict[int, int] = {}
        self._flush = [sys.stdout.flush, sys.stderr.flush]
        self._module = ModuleType("program")

    def load(self, names: list[str]) -> bytes:
        """Runs the program.

        Args:
            names: names that the checks use.

        Returns:
            The reply: ("loaded", name -> value), or the error.
        """
        sys.modules["program"] = sys.modules["__main__"] = self._module
        try:
            try:
                code = compile(self._source, "<program>", "exec", dont_inherit=True)
            except BaseException as error:
                return self._reply("syntax error", _syntax_error(error))
            exec(code, vars(self._module))
            scope = vars(self._module)
            return self._reply("loaded", {name: scope[name] for name in names if name in scope})
        except BaseException as error:
            return self._failure(error)

    def answer(self, message: bytes) -> bytes:
        """Answers one message of the judge, and returns the reply."""
        decoder = Decoder(message, lambda handle: self._objects[handle.number], shared=True)
        operation, target, args, options = decoder.decode()
        if operation == "checks":
            return self._run_checks(*args)
        held = decoder.containers
        before = [_shallow_copy(container) for container in held]
        try:
            result = _OPERATIONS[operation](self._objects[target], *args, **options)
            return self._reply("value", result, held, before)
        except BaseException as error:
            return self._failure(error, held, before)

    def _reply(
        self, kind: str, value: object, held: Sequence[object] = (), before: Sequence[object] = ()
    ) -> bytes:
        """Encodes a reply with the arguments that were changed in place.

        Args:
            kind: "loaded", "value", "passed", "error" or "syntax error".
            value: its value.
            held: lists, dicts and sets of the arguments.
            before: their parts before the call.
        """
        for flush in self._flush:
            with contextlib.suppress(Exception):  # the program may have closed it
                flush()
        changed = {
            i: _shallow_copy(container)
            for i, container in enumerate(held)
            if not _has_parts(container, before[i])
        }
        encoder = Encoder(self._outside, list(held))
        encoder.encode((kind, value, changed))
        return bytes(encoder.data)

    def _failure(
        self, error: BaseException, held: Sequence[object] = (), before: Sequence[object] = ()
    ) -> bytes:
        """Encodes the reply of an operation that raised an exception."""
        try:
            text = str(error)[:2000]
        except BaseException:
            text = "an exception without a readable text"
        mro = type.mro(type(error))
        bases = [kind.__name__ for kind in mro if kind.__module__ == "builtins"]
        arguments = tuple(a for a in error.args if type(a) in (int, str, bytes, bool, float))
        about = (bases, type(error).__name__, text, arguments[:10])
        try:
            return self._reply("error", about, held, before)
        except (EncodeError, ValueError):
            return self._reply("error", (bases, type(error).__name__, text, ()))

    def _outside(self, value: object) -> object:
        """Returns a plain value in place of an object, or its Handle.

        Instances of subclasses of plain types, and numbers of numpy, have one.
        """
        kind = type(value)
        for base in type.mro(kind):
            if base in _BASES:
                return _BASES[base](value)
        if kind.__module__ == "numpy" and getattr(value, "shape", None) == ():
            return value.item()
        number = self._numbers.setdefault(id(value), len(self._objects))
        if number == len(self._objects):
            self._objects.append(value)
        return Handle(number, "module" if kind is ModuleType else kind.__name__)

    def _run_checks(self, checks: str, token: bytes) -> bytes:
        """Runs checks in this interpreter, where the program can tamper with them."""
        scope = {k: v for k, v in vars(self._module).items() if k not in self._pristine}
        vars(builtins).update(self._pristine)
        scope["__builtins__"] = builtins
        try:
            exec(compile(checks, "<checks>", "exec", dont_inherit=True), scope)
            return self._reply("passed", token)
        except BaseException as error:
            return self._failure(error)


def _shallow_copy(container: object) -> object:
    """Copies a dict or set, and a list as a tuple."""
    return tuple(container) if isinstance(container, list) else copy.copy(container)


def _has_parts(container: object, parts: object) -> bool:
    """Returns True if a container has the objects of its shallow copy."""
    if len(container) != len(parts):
        return False
    if type(container) is dict:
        pairs = zip(container.items(), parts.items(), strict=True)
        return all(a is c and b is d for (a, b), (c, d) in pairs)
    if type(container) is set:
        return {id(part) for part in container} == {id(part) for part in parts}
    return all(a is b for a, b in zip(container, parts, strict=True))


def _syntax_error(error: BaseException) -> str:
    where = f" (line {error.lineno})" if isinstance(error, SyntaxError) else ""
    return f"{error.msg if where else error}{where}"


def run_program(
    descriptors: Sequence[int],
    kernel: Kernel,
    other_processes: int,
    scratch: str,
    libraries: Sequence[str],
) -> None:
    """Runs a program in the forked child until its judge ends.

    Args:
        descriptors: those of the output and of the connection with the judge.
        kernel: protections of the kernel.
        other_processes: processes of this user that count against the limit.
        scratch: the folder that may be written.
        libraries: folders of packages that may be imported.
    """
    output, connection = descriptors
    enter_child([(output, 1), (output, 2), (connection, CHANNEL)])
    channel, leave = Channel(CHANNEL), os._exit
    job = Decoder(channel.receive(MAX_BYTES), lambda handle: None).decode()
    source, names, limits, writable, processes = job
    take_limits(limits, other_processes)
    kernel.filter_calls(processes)
    readable = (
        os.path.dirname(os.__file__) + "/",
        scratch,
        "/usr/share/zoneinfo/",
        os.devnull,
        "/dev/urandom",
        *(f"{folder}/" for folder in libraries),
        *(f"{folder}.libs/" for folder in libraries),
    )
    program = Program(source, add_guard(readable, scratch, writable))
    with contextlib.suppress(ChannelClosed):
        channel.send(program.load(names))
        while True:
            message = channel.receive(2 * MAX_BYTES)
            channel.send(program.answer(message))
    leave(0)
