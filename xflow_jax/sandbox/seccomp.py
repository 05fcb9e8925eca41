"""Filter of the system calls that a program may make (seccomp).

It is in the kernel's classic BPF. Every call that is not named here fails with EPERM: processes,
signals to others, sockets, shared memory, keyrings, priorities, namespaces, tracing, and calls that
later kernels add. The numbers are those of the kernel's headers for x86-64 and AArch64. Calls of
x32 have numbers of their own, none of which is here.

This is a script of the sandbox: it imports the standard library only.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys

# name: (number on x86-64, number on AArch64), None if there is no such call.
_ALLOWED: dict[str, tuple[int | None, int | None]] = {
    "read": (0, 63), "write": (1, 64), "open": (2, None), "close": (3, 57), "stat": (4, None),
    "fstat": (5, 80), "lstat": (6, None), "poll": (7, None), "lseek": (8, 62), "munmap": (11, 215),
    "brk": (12, 214), "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139), "pread64": (17, 67), "pwrite64": (18, 68), "readv": (19, 65),
    "writev": (20, 66), "access": (21, None), "pipe": (22, None), "select": (23, None),
    "sched_yield": (24, 124), "mremap": (25, 216), "msync": (26, 227), "mincore": (27, 232),
    "madvise": (28, 233), "dup": (32, 23), "dup2": (33, None), "pause": (34, None),
    "nanosleep": (35, 101), "getitimer": (36, 102), "alarm": (37, None), "setitimer": (38, 103),
    "getpid": (39, 172), "exit": (60, 93), "wait4": (61, 260), "uname": (63, 160),
    "flock": (73, 32), "fsync": (74, 82), "fdatasync": (75, 83), "ftruncate": (77, 46),
    "getdents": (78, None), "getcwd": (79, 17), "rename": (82, None), "creat": (85, None),
    "unlink": (87, None), "readlink": (89, None), "umask": (95, 166), "gettimeofday": (96, 169),
    "getrlimit": (97, 163), "getrusage": (98, 165), "sysinfo": (99, 179), "times": (100, 153),
    "getuid": (102, 174), "getgid": (104, 176), "geteuid": (107, 175), "getegid": (108, 177),
    "getppid": (110, 173), "getpgrp": (111, None), "getpgid": (121, 155), "getsid": (124, 156),
    "rt_sigpending": (127, 136), "rt_sigtimedwait": (128, 137), "rt_sigsuspend": (130, 133),
    "sigaltstack": (131, 132), "statfs": (137, 43), "fstatfs": (138, 44),
    "getpriority": (140, 141), "sched_getparam": (143, 121), "sched_getscheduler": (145, 120),
    "sched_get_priority_max": (146, 125), "sched_get_priority_min": (147, 126),
    "gettid": (186, 178), "time": (201, None), "futex": (202, 98), "sched_getaffinity": (204, 123),
    "getdents64": (217, 61), "set_tid_address": (218, 96), "restart_syscall": (219, 128),
    "fadvise64": (221, 223), "clock_gettime": (228, 113), "clock_getres": (229, 114),
    "clock_nanosleep": (230, 115), "exit_group": (231, 94), "epoll_wait": (232, None),
    "epoll_ctl": (233, 21), "openat": (257, 56), "newfstatat": (262, 79), "unlinkat": (263, 35),
    "renameat": (264, 38), "readlinkat": (267, 78), "faccessat": (269, 48), "pselect6": (270, 72),
    "ppoll": (271, 73), "set_robust_list": (273, 99), "get_robust_list": (274, 100),
    "epoll_pwait": (281, 22), "eventfd2": (290, 19), "epoll_create1": (291, 20), "dup3": (292, 24),
    "pipe2": (293, 59), "getcpu": (309, 168), "renameat2": (316, 276), "getrandom": (318, 278),
    "membarrier": (324, 283), "copy_file_range": (326, 285), "statx": (332, 291),
    "rseq": (334, 293), "close_range": (436, 436), "faccessat2": (439, 439),
    "epoll_pwait2": (441, 441),
}  # fmt: skip
# Calls of which one argument decides: (numbers, position of the argument, allowed values).
_IOCTLS = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)  # TCGETS, sizes, FIONBIO, FIOCLEX
_FCNTLS = (0, 1, 2, 3, 4, 5, 6, 7, 36, 37, 38, 1030, 1032)  # no owners of signals, no leases
_SET_NAME, _GET_NAME = 15, 16
_ONE_OF = {
    "ioctl": ((16, 29), 1, _IOCTLS),
    "fcntl": ((72, 25), 1, _FCNTLS),
    "prctl": ((157, 167), 0, (_SET_NAME, _GET_NAME)),
}
_MMAP, _MPROTECT, _PRLIMIT, _CLONE = (9, 222), (10, 226), (302, 261), (56, 220)
_KILL, _TGKILL, _MKNOD, _MKNODAT, _CLONE3 = (62, 129), (234, 131), (133, None), (259, 33), 435
_PROT_EXEC, _MAP_ANONYMOUS = 4, 0x20
# New namespaces, and tracing that is inherited.
_CLONE_FORBIDDEN = 0x7E020000 | 0x80 | 0x2000

_ARCHITECTURES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}
_LOAD, _JUMP_EQUAL, _JUMP_BITS, _AND, _RETURN = 0x20, 0x15, 0x45, 0x54, 0x06
_ALLOW, _DENY, _KILL_PROCESS, _UNKNOWN = 0x7FFF0000, 0x50001, 0x80000000, 0x50026
_NUMBER_AT, _ARCHITECTURE_AT, _ARGUMENTS_AT = 0, 4, 16
_PR_SET_SECCOMP, _PR_SET_DUMPABLE, _FILTER_MODE, _EFAULT = 22, 4, 2, 14
_ANY_PID = 0x7A5B3C1D  # above all process numbers

Numbers = tuple[int | None, int | None]  # of a call, on x86-64 and AArch64
Instruction = tuple[int, int, int, int]  # code, jump if true, jump if false, operand


def _load(offset: int) -> Instruction:
    return (_LOAD, 0, 0, offset)


def _argument(position: int, high: bool = False) -> Instruction:
    return _load(_ARGUMENTS_AT + 8 * position + 4 * high)  # both architectures are little-endian


def _end(action: int) -> Instruction:
    return (_RETURN, 0, 0, action)


def _allow_values(position: int, values: tuple[int, ...]) -> list[Instruction]:
    block = [_argument(position)]
    for value in values:
        block += [(_JUMP_EQUAL, 0, 1, value), _end(_ALLOW)]
    return [*block, _end(_DENY)]


def _deny_bits(position: int, bits: int) -> list[Instruction]:
    return [_argument(position), (_JUMP_BITS, 0, 1, bits), _end(_DENY), _end(_ALLOW)]


def _special_calls(pid: int, processes: int) -> dict[Numbers, list[Instruction]]:
    """Returns numbers -> the instructions that decide by arguments."""
    own = [_argument(0), (_JUMP_EQUAL, 0, 1, pid), _end(_ALLOW), _end(_DENY)]
    fifo = 0o010000
    table: dict[Numbers, list[Instruction]] = {}
    for one_of, at, values in _ONE_OF.values():
        table[one_of] = _allow_values(at, values)
    table[_KILL] = table[_TGKILL] = own
    # No memory becomes executable unless a file is mapped, as for an extension module.
    table[_MPROTECT] = _deny_bits(2, _PROT_EXEC)
    table[_MMAP] = [
        _argument(2),
        (_JUMP_BITS, 1, 0, _PROT_EXEC),
        _end(_ALLOW),
        *_deny_bits(3, _MAP_ANONYMOUS),
    ]
    for numbers, position in ((_MKNOD, 1), (_MKNODAT, 2)):
        table[numbers] = [
            _argument(position),
            (_AND, 0, 0, 0o170000),
            (_JUMP_EQUAL, 0, 1, fifo),
            _end(_ALLOW),
            _end(_DENY),
        ]
    # A limit may be read, not set: the third argument is a null pointer.
    table[_PRLIMIT] = [
        _argument(0),
        (_JUMP_EQUAL, 0, 4, 0),
        _argument(2),
        (_JUMP_EQUAL, 0, 2, 0),
        _argument(2, high=True),
        (_JUMP_EQUAL, 1, 0, 0),
        _end(_DENY),
        _end(_ALLOW),
    ]
    table[_CLONE] = _deny_bits(0, _CLONE_FORBIDDEN) if processes > 1 else [_end(_DENY)]
    return table


def build_filter(machine: str, pid: int, processes: int) -> bytes | None:
    """Builds the filter.

    Args:
        machine: architecture, as os.uname() has it.
        pid: the process that may be signalled.
        processes: processes and threads allowed. Only if it is above 1, more can be created.

    Returns:
        The instructions, or None if the architecture is not known.
    """
    if machine not in _ARCHITECTURES:
        return None
    architecture, column = _ARCHITECTURES[machine]
    code = [
        _load(_ARCHITECTURE_AT),
        (_JUMP_EQUAL, 1, 0, architecture),
        _end(_KILL_PROCESS),
        _load(_NUMBER_AT),
    ]
    allowed = [numbers[column] for numbers in _ALLOWED.values()]
    if processes > 1 and machine == "x86_64":
        allowed += [57, 58]  # fork, vfork
    for number in allowed:
        if number is not None:
            code += [(_JUMP_EQUAL, 0, 1, number), _end(_ALLOW)]
    for numbers, block in _special_calls(pid, processes).items():
        if (number := numbers[column]) is not None:
            code += [(_JUMP_EQUAL, 0, len(block), number), *block]
    # Unknown to the C library, so that it falls back to clone, whose flags a filter can read.
    code += [(_JUMP_EQUAL, 0, 1, _CLONE3), _end(_UNKNOWN), _end(_DENY)]
    return b"".join(struct.pack("<HBBI", *instruction) for instruction in code)


class Kernel:
    """Protections that this process takes through the C library.

    Attributes:
        has_seccomp: True if the kernel filters system calls on this architecture.
    """

    def __init__(self) -> None:
        self.has_seccomp = False
        if sys.platform != "linux":
            return
        self._prctl = ctypes.CDLL(None, use_errno=True).prctl
        self.machine = os.uname().machine
        # Built once, for a process number that is replaced in each child.
        self._single = build_filter(self.machine, _ANY_PID, 1)
        known = self._single is not None
        # A null filter is a bad address if filters are known, and an invalid argument if not.
        self._prctl(_PR_SET_SECCOMP, _FILTER_MODE, None, None, None)
        self.has_seccomp = known and ctypes.get_errno() == _EFAULT
        self.forbid_dumps()

    def forbid_dumps(self) -> None:
        """Makes the memory of this process unreadable to others of its user."""
        if sys.platform == "linux":
            self._prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)

    def filter_calls(self, processes: int) -> None:
        """Filters the system calls of this process from now on.

        Raises:
            OSError: the kernel refuses the filter.
        """
        if not self.has_seccomp:
            return
        code = self._single if processes == 1 else build_filter(self.machine, _ANY_PID, processes)
        code = (code or b"").replace(struct.pack("<I", _ANY_PID), struct.pack("<I", os.getpid()))
        buffer = ctypes.create_string_buffer(code, len(code))
        program = struct.pack("HxxxxxxQ", len(code) // 8, ctypes.addressof(buffer))
        if self._prctl(_PR_SET_SECCOMP, _FILTER_MODE, program, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "the kernel refuses the filter of system calls")
