"""Puts its own process into namespaces and a Landlock domain, and then runs a command in it: launch.py SPEC COMMAND...

A script, and not imported by the library: nothing of this can be undone, and it needs ctypes, which the command's fresh
interpreter then never loads. Two arguments are added to the command: the isolation that is in force, as in
`Result.isolation`, and how many processes of its user there are before it starts any. SPEC is a JSON object:
    way            "unshare": makes namespaces; "inside": is in those of bubblewrap; "plain": goes without
    landlock       whether to use it where the kernel has it
    readable       what may be read: folders and files that exist
    scratch        an empty folder, the working directory, and the only place that may be written
    scratch_bytes  what fits into it; held in namespaces only
    control        the descriptor that the command inherits; what fails is written to it, as a JSON string
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import struct
import sys

NOBODY = 65534


# Of the kernel's headers. The system calls from 424 on have the same number on every architecture.
PR_SET_PDEATHSIG, PR_CAPBSET_DROP, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 24, 36, 38


KEPT_RIGHTS = (1, 2)  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH


NEW_NAMESPACES = (
    0x10000000 | 0x20000 | 0x20000000 | 0x40000000 | 0x8000000 | 0x4000000
)  # user mnt pid net ipc uts


MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE, MNT_DETACH = 2, 4, 4096, 16384, 1 << 18, 2


MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, READ_ONLY_NOSUID = 442, -100, 0x8000, 3


LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446


EXECUTE, WRITE_FILE, READ_FILE, READ_DIR, MAKE_CHAR, MAKE_BLOCK, IOCTL_DEV = (
    1 << n for n in (0, 1, 2, 3, 6, 11, 15)
)


def call(name: str, *args: object) -> int:
    """A function of the C library; OSError where it returns -1."""
    result = getattr(ctypes.CDLL(None, use_errno=True), name)(*args)
    if result == -1:
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")
    return result


def enter_namespaces() -> None:
    """This process in new namespaces; its next child is the first of the new process namespace, which dies with it."""
    ready, go = os.pipe()
    mapper = os.fork()  # stays outside, where it may say which ids there are inside
    if mapper == 0:
        os.close(go)
        if os.read(ready, 1):
            write_maps(os.getppid())
            os._exit(0)
        os._exit(1)
    os.close(ready)
    call("unshare", NEW_NAMESPACES)
    os.write(go, b"!")
    os.close(go)
    if os.waitpid(mapper, 0)[1] != 0:
        raise OSError("the user namespace: its ids cannot be set")
    with contextlib.suppress(OSError):  # a container's /proc may be read-only
        write(
            "/proc/sys/user/max_user_namespaces", "0"
        )  # none in this one: a program would have all rights there


def write_maps(pid: int) -> None:
    """Root keeps all ids, to read what others own and to become nobody then; others have only their own."""
    for kind, own in (("uid", os.geteuid()), ("gid", os.getegid())):
        lines = [f"{NOBODY} {own} 1"]
        if os.geteuid() == 0:
            with open(f"/proc/self/{kind}_map") as file:
                lines = [f"{first} {first} {count}" for first, _, count in map(str.split, file)]
        elif kind == "gid":
            write(f"/proc/{pid}/setgroups", "deny")
        write(f"/proc/{pid}/{kind}_map", "\n".join(lines))


def write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def enter_root(scratch: str, scratch_bytes: int, readable: list[str]) -> None:
    """A new root for this mount namespace: `readable`, none of it writable, an empty scratch, and nothing else."""
    call("mount", None, b"/", None, MS_REC | MS_PRIVATE, None)
    root = scratch  # an empty folder that only we know
    call("mount", b"tmpfs", root.encode(), b"tmpfs", MS_NOSUID | MS_NODEV, b"size=1m,mode=755")
    shown: list[str] = []
    for path in sorted(
        {*readable, *map(os.path.realpath, readable)}
    ):  # a folder before what is in it
        if path.startswith(tuple(f"{folder}/" for folder in shown)):
            continue
        shown.append(path)
        if os.path.isdir(path):
            os.makedirs(root + path)
        else:
            os.makedirs(os.path.dirname(root + path), exist_ok=True)
            write(root + path, "")
        call(
            "mount",
            os.path.realpath(path).encode(),
            (root + path).encode(),
            None,
            MS_BIND | MS_REC,
            None,
        )
    os.makedirs(root + scratch)
    attributes = struct.pack("QQQQ", READ_ONLY_NOSUID, 0, 0, 0)
    call(
        "syscall", MOUNT_SETATTR, AT_FDCWD, root.encode(), AT_RECURSIVE, attributes, len(attributes)
    )
    size = f"size={scratch_bytes},nr_inodes=4096,mode=777".encode()
    call("mount", b"tmpfs", (root + scratch).encode(), b"tmpfs", MS_NOSUID | MS_NODEV, size)
    os.chdir(root)
    call("pivot_root", b".", b".")
    call("umount2", b".", MNT_DETACH)


def become_nobody() -> int:
    """Leaves root, whom limits on processes do not hold; how many processes its user has in the namespace."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        return 1
    return 2  # the one that waits in `keep` is of the same user


def drop_rights() -> None:
    """Leaves root, where it has to stay root, only the rights to read and write what others own; holds from exec on."""
    for right in range(64):
        if right not in KEPT_RIGHTS:
            with contextlib.suppress(OSError):  # there are fewer, or this is not root
                call("prctl", PR_CAPBSET_DROP, right, 0, 0, 0)


def enter_landlock(scratch: str, readable: list[str]) -> bool:
    """False where the kernel has none: then nothing is changed."""
    try:
        abi = call("syscall", LANDLOCK_CREATE, None, 0, 1)
    except OSError:
        return False
    # Each version of the interface handles more: by each, what nothing below allows is forbidden.
    rights = sum(1 << n for n in range(13 + (abi >= 2) + (abi >= 3))) | (
        IOCTL_DEV if abi >= 5 else 0
    )
    network, scope = (
        (3 if abi >= 4 else 0),
        (3 if abi >= 6 else 0),
    )  # TCP; abstract sockets and signals
    attributes = struct.pack("QQQ", rights, network, scope)[: 8 + 8 * (abi >= 4) + 8 * (abi >= 6)]
    rules = call("syscall", LANDLOCK_CREATE, attributes, len(attributes), 0)
    allowed = {
        path: READ_FILE | EXECUTE | (READ_DIR if os.path.isdir(path) else 0) for path in readable
    }
    allowed[os.devnull] = READ_FILE | WRITE_FILE
    allowed[scratch] = rights & ~(EXECUTE | MAKE_CHAR | MAKE_BLOCK | IOCTL_DEV)
    for path, right in allowed.items():
        folder = os.open(path, os.O_PATH)
        call("syscall", LANDLOCK_ADD, rules, 1, struct.pack("=Qi", right, folder), 0)
        os.close(folder)
    call("syscall", LANDLOCK_RESTRICT, rules, 0)
    os.close(rules)
    return True


def keep(child: int) -> int:
    """Waits for the child, and adopts and ends what outlives it; the child's exit status."""
    ended, status = os.waitpid(-1, 0)
    while ended != child:
        ended, status = os.waitpid(-1, 0)
    code = os.waitstatus_to_exitcode(status)
    try:
        while True:
            with open(f"/proc/{os.getpid()}/task/{os.getpid()}/children") as file:
                left = file.read().split()
            for pid in left:
                os.kill(int(pid), signal.SIGKILL)
            os.waitpid(-1, 0 if left else os.WNOHANG)
    except OSError:  # of waitpid: there are none
        return code if code >= 0 else 128 - code


def main() -> None:
    spec, command = json.loads(sys.argv[1]), sys.argv[2:]
    way, scratch, readable = spec["way"], spec["scratch"], spec["readable"]
    parts, others = [], 0
    try:
        if way == "unshare":
            enter_namespaces()
        if way != "inside" and sys.platform == "linux":
            call("prctl", PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
            if child := os.fork():
                os.close(spec["control"])
                os._exit(keep(child))
        if way == "unshare":
            enter_root(scratch, spec["scratch_bytes"], readable)
            others = become_nobody()
            parts.append("namespaces")
        if way == "inside":
            others = 1
            parts.append("namespaces")
        os.chdir(scratch)
        if sys.platform == "linux":
            drop_rights()
            call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
            call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            if spec["landlock"] and enter_landlock(scratch, readable):
                parts.append("landlock")
        os.set_inheritable(spec["control"], True)
        arguments = [*command, "+".join([*parts, "limits"]), str(others)]
        # An empty environment, but not a random hash seed: a verdict must not depend on the order of a set.
        os.execve(command[0], arguments, {"PYTHONHASHSEED": "0"})
    except OSError as error:
        os.write(spec["control"], json.dumps(error.strerror or str(error)).encode())
        os._exit(1)


if __name__ == "__main__":
    main()
