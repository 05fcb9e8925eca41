"""Judge of a program: evaluates its trusted checks in another process.

The judge is a process of its own. A name of the program is a stub here: a call sends its arguments
to the program's process and returns plain values (codec.py). Comparisons happen here, with exact
builtin types. Nothing that the program sends can be a verdict.

This is a script of the sandbox: it imports the standard library only.
"""

from __future__ import annotations

import builtins
import importlib
import marshal
import os
import secrets
import sys
from collections.abc import Sequence
from typing import cast

from xflow_jax.sandbox.check_names import attributes_of, free_names, needs_same_interpreter
from xflow_jax.sandbox.child import Channel, ChannelClosed, enter_child, take_limits
from xflow_jax.sandbox.codec import (
    MAX_BYTES,
    CannotCross,
    DecodeError,
    Decoder,
    Encoder,
    Handle,
)
from xflow_jax.sandbox.seccomp import Kernel

PROGRAM, PARENT = 3, 4  # descriptors of the connections
# The first byte of a verdict. The reason follows FAILED. PASSED_THERE means that the checks ran in
# the program's process.
PASSED, PASSED_THERE, FAILED, ENDED, FORGED = b"P", b"T", b"F", b"E", b"M"
_MODULES = sys.stdlib_module_names - {"antigravity", "this"}


class ProgramEnded(BaseException):
    """The program's process has ended or closed its connection."""


class Forged(BaseException):
    """The program's process has sent bytes that are no reply."""


class Remote:
    """Object in the program's process, such as a function or an instance.

    Operations on it run there. It equals only itself.

    Args:
        link: connection with that process.
        handle: number and type of the object.
        named: True for a name of the program. Only if the checks call one of these with objects of
            their own, they need its interpreter. Other objects are what the program chose to send.
    """

    __slots__ = ("_remote_handle", "_remote_link", "_remote_named")
    _remote_handle: Handle
    _remote_link: Link
    _remote_named: bool

    def __init__(self, link: Link, handle: Handle, named: bool = False) -> None:
        object.__setattr__(self, "_remote_link", link)
        object.__setattr__(self, "_remote_handle", handle)
        object.__setattr__(self, "_remote_named", named)

    def __call__(self, *args: object, **options: object) -> object:
        try:
            return self._remote_link.request("call", self, args, options)
        except CannotCross:
            if self._remote_named:
                raise
            raise TypeError("an argument is no plain value") from None

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._remote_link.request("get", self, (name,))

    def __setattr__(self, name: str, value: object) -> None:
        self._remote_link.request("set", self, (name, value))

    def __iter__(self) -> object:
        return self._remote_link.request("iter", self)

    def __next__(self) -> object:
        return self._remote_link.request("next", self)

    def __len__(self) -> int:
        return cast(int, self._remote_link.request("length", self))

    def __bool__(self) -> bool:
        return True

    def __getitem__(self, key: object) -> object:
        if isinstance(key, slice):
            return self._remote_link.request("slice", self, (key.start, key.stop, key.step))
        return self._remote_link.request("item", self, (key,))

    def __contains__(self, key: object) -> bool:
        return bool(self._remote_link.request("contains", self, (key,)))

    def __str__(self) -> str:
        return cast(str, self._remote_link.request("text", self))

    def __repr__(self) -> str:
        return f"<an object of type {self._remote_handle.name}>"


class Link:
    """The judge's side of the connection with the program's process.

    Args:
        channel: the connection.

    Attributes:
        broken: the error that ended the connection. Checks may have caught it.
    """

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._remotes: dict[int, Remote] = {}
        self.broken: ProgramEnded | Forged | None = None

    def load(self, job: tuple[object, ...]) -> tuple[str, object]:
        """Sends the program and its limits.

        Returns:
            Kind and value of the reply.
        """
        encoder = Encoder(_refuse)
        encoder.encode(job)
        return self._exchange(bytes(encoder.data), [])

    def request(
        self,
        operation: str,
        target: Remote | None,
        args: tuple[object, ...] = (),
        options: dict[str, object] | None = None,
    ) -> object:
        """Runs an operation in the program's process.

        Args:
            operation: a key of `_OPERATIONS` in program.py, or "checks".
            target: the object.
            args: positional arguments. Those that change there change here.
            options: keyword arguments.

        Returns:
            The result, a plain value or a Remote.

        Raises:
            BaseException: the operation raised it there, or the process has ended.
        """
        encoder = Encoder(_handle_of, shared=True)
        number = -1 if target is None else target._remote_handle.number
        try:
            encoder.encode((operation, number, args, options or {}))
        except CannotCross:
            if operation == "call":
                raise
            raise TypeError("an operand is no plain value") from None
        kind, value = self._exchange(bytes(encoder.data), encoder.containers)
        if isinstance(value, StopIteration) and operation != "next":
            # It would end a `map` or `zip` of the checks before its end.
            raise RuntimeError(f"the program raised StopIteration: {value}")
        if isinstance(value, BaseException):
            raise value
        if kind != "value":
            self.broken = Forged(kind)
            raise self.broken
        return value

    def run_checks_there(self, checks: str) -> tuple[bytes, str]:
        """Runs checks in the program's process.

        Returns:
            (verdict, reason).
        """
        encoder, token = Encoder(_refuse), secrets.token_bytes(16)
        encoder.encode(("checks", -1, (checks, token), {}))
        kind, value = self._exchange(bytes(encoder.data), [])
        if kind == "passed" and value == token:
            return PASSED_THERE, ""
        if not isinstance(value, BaseException):
            raise Forged(kind)
        wrong = isinstance(value, AssertionError)
        return FAILED, f"wrong answer: {value}" if wrong else describe_exception(value)

    def _exchange(self, data: bytes, containers: list[object]) -> tuple[str, object]:
        """Sends a message and reads the reply, with the changes of arguments."""
        if self.broken is None:
            try:
                self._channel.send(data)
                return self._read_reply(containers)
            except ChannelClosed as error:
                self.broken = Forged(str(error)) if str(error) else ProgramEnded()
            except DecodeError as error:
                self.broken = Forged(str(error))
        raise self.broken

    def _read_reply(self, containers: list[object]) -> tuple[str, object]:
        data = self._channel.receive(MAX_BYTES + 1024)
        reply = Decoder(data, self._remote, containers).decode()
        if type(reply) is not tuple or len(reply) != 3:
            raise DecodeError("no reply")
        kind, value, changed = reply
        if type(kind) is not str or type(changed) is not dict:
            raise DecodeError("no reply")
        for position, parts in changed.items():
            if type(position) is not int or not 0 <= position < len(containers):
                raise DecodeError("an unknown argument")
            replace_parts(containers[position], parts)
        if kind == "error":
            return kind, make_exception(value)
        return kind, value

    def _remote(self, handle: Handle) -> Remote:
        return self._remotes.setdefault(handle.number, Remote(self, handle))


def _refuse(value: object) -> object:
    raise CannotCross(type(value).__name__)


def _handle_of(value: object) -> object:
    if type(value) is Remote:
        return value._remote_handle
    raise CannotCross(type(value).__name__)


def replace_parts(container: object, parts: object) -> None:
    """Replaces the contents of a list, dict or set.

    Raises:
        DecodeError: the parts are of another kind.
    """
    if isinstance(container, list) and isinstance(parts, tuple):
        container[:] = parts
    elif isinstance(container, dict) and isinstance(parts, dict):
        container.clear()
        container.update(parts)
    elif isinstance(container, set) and isinstance(parts, set):
        container.intersection_update(parts)
        container.update(parts)
    else:
        raise DecodeError("an argument became another type")


def make_exception(about: object) -> BaseException:
    """Builds the exception that a reply describes.

    It has a builtin class, or a subclass of one with the name of the program's own class.

    Args:
        about: (names of its builtin classes, name of its class, text, plain arguments).

    Raises:
        DecodeError: the description has another form.
    """
    if type(about) is not tuple or [type(part) for part in about] != [list, str, str, tuple]:
        raise DecodeError("no exception")
    bases, name, text, arguments = about
    base: type[BaseException] = Exception
    for each in bases:
        kind = vars(builtins).get(each) if type(each) is str else None
        if isinstance(kind, type) and issubclass(kind, BaseException):
            base = kind
            break
    if base.__name__ != name and name.isidentifier():
        base = type(name[:80], (base,), {})
    try:
        error = base(*arguments)
        return error if str(error) == text else base(text)
    except Exception:
        return RuntimeError(text)


def make_scope(
    values: dict[str, object], names: set[str], attributes: dict[str, set[str]]
) -> dict[str, object]:
    """Returns the names of the program for the checks.

    A name of the program hides a builtin only if the checks use no other name of the program, since
    then it must be the answer. A module is this process's own, never the program's.

    Args:
        values: name -> value in the program.
        names: names that the checks use.
        attributes: name -> its attributes, for names of which the checks use nothing else.
    """
    hidden = names & vars(builtins).keys()
    if values.keys() - hidden:
        values = {name: value for name, value in values.items() if name not in hidden}
    scope: dict[str, object] = {}
    for name, value in values.items():
        if name not in names:
            continue
        if type(value) is Remote:
            value = Remote(value._remote_link, value._remote_handle, named=True)
        if name in _MODULES and name in attributes:
            module = importlib.import_module(name)
            if all(hasattr(module, attribute) for attribute in attributes[name]):
                value = module
        scope[name] = value
    return scope | {"__builtins__": builtins, "__name__": "program"}


def describe_exception(error: BaseException) -> str:
    """Returns the reason of a verdict for an exception."""
    if isinstance(error, MemoryError):
        return "memory limit"
    return f"error: {type(error).__name__}: {error}"


def describe_failure(error: BaseException, checks: str) -> str:
    """Returns the reason of a verdict for an exception in the checks."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    if last is None or type(error) is not AssertionError:
        return describe_exception(error)
    if last.tb_frame.f_code.co_filename == "<checks>":
        return f"wrong answer: {str(error) or checks.splitlines()[last.tb_lineno - 1].strip()}"
    return describe_exception(error)


def judge(link: Link, program: str, checks: str, limits: tuple[object, ...]) -> tuple[bytes, str]:
    """Loads a program and evaluates its checks.

    Args:
        link: connection with the program's process.
        program: source of the program.
        checks: source of the checks.
        limits: resource limits, files that may be written, and processes of the program.

    Returns:
        (verdict, reason).
    """
    code = compile(checks, "<checks>", "exec", dont_inherit=True)
    names = free_names(checks)
    kind, value = link.load((program, sorted(names), *limits))
    if isinstance(value, BaseException):
        return FAILED, describe_exception(value)
    if kind == "syntax error" and type(value) is str:
        return FAILED, f"syntax error: {value}"
    if kind != "loaded" or type(value) is not dict:
        raise Forged(kind)
    if needs_same_interpreter(checks, names - vars(builtins).keys()):
        return link.run_checks_there(checks)
    try:
        attributes = attributes_of(checks, names) if names & _MODULES else {}
        exec(code, make_scope(value, names, attributes))
    except CannotCross:
        return link.run_checks_there(checks)
    except (Forged, ProgramEnded):
        raise
    except BaseException as error:
        if link.broken is None:
            return FAILED, describe_failure(error, checks)
    if link.broken is not None:  # the checks have caught it
        raise link.broken
    return PASSED, ""


def warm_up() -> None:
    """Uses the parts of `judge` once.

    Their first use takes time, which each fork would spend again.
    """
    checks = "def check(f):\n    try:\n        assert f(1) == x.y\n    except KeyError: pass\n"
    compile(checks, "<checks>", "exec", dont_inherit=True)
    names = free_names(checks)
    needs_same_interpreter(checks, names)
    attributes_of(checks, names)
    encoder = Encoder(_refuse)
    encoder.encode((checks, [1], {"a": 2.0}))
    Decoder(bytes(encoder.data), lambda handle: None).decode()


def run_judge(descriptors: Sequence[int], kernel: Kernel, other_processes: int) -> None:
    """Judges a program in the forked child, and exits.

    Args:
        descriptors: those of the connections with the program's process and with the parent.
        kernel: protections of the kernel.
        other_processes: processes of this user that count against the limit.
    """
    program, parent = descriptors
    # Errors go where prints of the checks go, to the null device, not to the user's terminal.
    enter_child([(1, 2), (program, PROGRAM), (parent, PARENT)])
    # The parent is trusted, so its message may be of Python's own encoding.
    source, checks, limits, writable, processes = marshal.loads(Channel(PARENT).receive(1 << 32))
    take_limits(limits, other_processes)
    kernel.filter_calls(1)
    link = Link(Channel(PROGRAM))
    try:
        verdict, reason = judge(link, source, checks, (limits, writable, processes))
    except ProgramEnded:
        verdict, reason = ENDED, ""
    except Forged:
        verdict, reason = FORGED, ""
    except BaseException as error:
        verdict, reason = FAILED, describe_exception(error)
    os.write(PARENT, verdict + reason[:500].encode("utf-8", "replace"))
    os._exit(0)
