"""Isolates its own process and then runs a command: launch.py SPEC COMMAND...

The isolation is namespaces and a Landlock domain. This is a script that the library does not
import: the isolation cannot be undone, and it needs ctypes, which the command's fresh interpreter
then never loads. Two arguments are added to the command: the isolation in force, as in
`Result.isolation`, and the number of processes of its user before it starts any. SPEC is a JSON
object:
    method         "unshare" makes namespaces, "inside" is in those of bubblewrap, "plain" has none
    landlock       true to use Landlock if the kernel has it
    readable       existing folders and files that may be read
    scratch        an empty folder, the working directory, the only one that may be written
    scratch_bytes  its size, which only namespaces can limit
    control        a descriptor that the command inherits, for an error as a JSON string
    cgroup         folder of a control group to enter, or ""
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

# Constants of the kernel's headers. System calls from 424 on have the same number on every
# architecture.
PR_SET_PDEATHSIG, PR_CAPBSET_DROP, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 24, 36, 38
KEPT_CAPABILITIES = (1, 2)  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
# user, mnt, pid, net, ipc, uts
NEW_NAMESPACES = 0x10000000 | 0x20000 | 0x20000000 | 0x40000000 | 0x8000000 | 0x4000000
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 8, 4096, 16384, 1 << 18
MNT_DETACH = 2
KEYCTL = {"x86_64": 250, "aarch64": 219}  # number of the system call
KEYCTL_JOIN_SESSION_KEYRING = 1
MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, READ_ONLY_NOSUID = 442, -100, 0x8000, 3
LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR, MAKE_CHAR, MAKE_BLOCK, IOCTL_DEV = (
    1 << n for n in (0, 1, 2, 3, 6, 11, 15)
)


def call(name: str, *args: object) -> int:
    """Calls a C library function. Raises OSError on failure."""
    result = getattr(ctypes.CDLL(None, use_errno=True), name)(*args)
    if result == -1:
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")
    return result


def enter_namespaces() -> None:
    """Moves this process into new namespaces.

    Its next child is the first process of the new process namespace, which ends with that child.
    """
    read_end, write_end = os.pipe()
    mapper = os.fork()  # stays outside, since only there the ids of the inside can be set
    if mapper == 0:
        os.close(write_end)
        if os.read(read_end, 1):
            write_id_maps(os.getppid())
            os._exit(0)
        os._exit(1)
    os.close(read_end)
    call("unshare", NEW_NAMESPACES)
    os.write(write_end, b"!")
    os.close(write_end)
    if os.waitpid(mapper, 0)[1] != 0:
        raise OSError("the user namespace: its ids cannot be set")
    # No namespaces inside this one, since a program would have all capabilities there. In a
    # container, /proc may be read-only.
    with contextlib.suppress(OSError):
        write_text("/proc/sys/user/max_user_namespaces", "0")


def write_id_maps(pid: int) -> None:
    """Maps the ids of a process's user namespace.

    Root keeps all ids, to read files of other users and to become nobody later. Others keep only
    their own id, as does the root of a container without an id for nobody.
    """
    ids = {kind: read_id_map(kind) for kind in ("uid", "gid")}
    keep = os.geteuid() == 0 and all(
        any(first <= NOBODY < first + count for first, count in ranges) for ranges in ids.values()
    )
    for kind, own in (("uid", os.geteuid()), ("gid", os.getegid())):
        lines = [f"{NOBODY} {own} 1"]
        if keep:
            lines = [f"{first} {first} {count}" for first, count in ids[kind]]
        elif kind == "gid":
            write_text(f"/proc/{pid}/setgroups", "deny")
        write_text(f"/proc/{pid}/{kind}_map", "\n".join(lines))


def read_id_map(kind: str) -> list[tuple[int, int]]:
    """Returns (first, count) of the ids that this process's user namespace has."""
    with open(f"/proc/self/{kind}_map") as file:
        return [(int(first), int(count)) for first, _, count in map(str.split, file)]


def write_text(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def enter_root(scratch: str, scratch_bytes: int, readable: list[str]) -> None:
    """Makes a new root for this mount namespace.

    It has the readable paths, none of them writable, and an empty scratch folder.
    """
    call("mount", None, b"/", None, MS_REC | MS_PRIVATE, None)
    root = scratch  # an empty folder that no other program uses
    call("mount", b"tmpfs", root.encode(), b"tmpfs", MS_NOSUID | MS_NODEV, b"size=1m,mode=755")
    mounted: list[str] = []
    # Sorted, a folder comes before its contents.
    for path in sorted({*readable, *map(os.path.realpath, readable)}):
        if path.startswith(tuple(f"{folder}/" for folder in mounted)):
            continue
        mounted.append(path)
        if os.path.isdir(path):
            os.makedirs(root + path)
        else:
            os.makedirs(os.path.dirname(root + path), exist_ok=True)
            write_text(root + path, "")
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
    flags = MS_NOSUID | MS_NODEV | MS_NOEXEC
    call("mount", b"tmpfs", (root + scratch).encode(), b"tmpfs", flags, size)
    os.chdir(root)
    call("pivot_root", b".", b".")
    call("umount2", b".", MNT_DETACH)


def become_nobody() -> int:
    """Changes the user from root to nobody.

    Limits on processes do not bind root. Returns the number of processes that the user has in the
    namespace.
    """
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        return 1
    return 2  # the process that waits in `reap` has the same user


def drop_capabilities() -> None:
    """Drops the capabilities of a process that must stay root.

    It keeps those to read and write files of other users. This applies from exec on.
    """
    for capability in range(64):
        if capability not in KEPT_CAPABILITIES:
            with contextlib.suppress(OSError):  # the kernel has fewer, or this is not root
                call("prctl", PR_CAPBSET_DROP, capability, 0, 0, 0)


def enter_keyring() -> None:
    """Replaces the user's session keyring by an empty one."""
    number = KEYCTL.get(os.uname().machine)
    if number is not None:
        with contextlib.suppress(OSError):  # a container may refuse all keyrings, old and new
            call("syscall", number, KEYCTL_JOIN_SESSION_KEYRING, None)


def enter_cgroup(folder: str) -> bool:
    """Moves this process into a control group. Returns False if it cannot."""
    try:
        write_text(f"{folder}/cgroup.procs", "0")
    except OSError:
        return False
    return True


def enter_landlock(scratch: str, readable: list[str]) -> bool:
    """Enters a Landlock domain. Returns False if the kernel has none."""
    try:
        abi = call("syscall", LANDLOCK_CREATE, None, 0, 1)
    except OSError:
        return False
    # Later versions of the interface handle more rights. A right that is handled is forbidden
    # unless a rule below allows it.
    rights = sum(1 << n for n in range(13 + (abi >= 2) + (abi >= 3))) | (
        IOCTL_DEV if abi >= 5 else 0
    )
    network = 3 if abi >= 4 else 0  # TCP
    scope = 3 if abi >= 6 else 0  # abstract sockets and signals
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


def reap(child: int) -> int:
    """Waits for the child and ends the processes that outlive it.

    This process adopts them. Returns the child's exit status.
    """
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
    except OSError:  # waitpid fails once there are no processes
        return code if code >= 0 else 128 - code


def main() -> None:
    spec, command = json.loads(sys.argv[1]), sys.argv[2:]
    method, scratch, readable = spec["method"], spec["scratch"], spec["readable"]
    parts, other_processes = [], 0
    try:
        ending = ["limits"]
        if spec["cgroup"] and enter_cgroup(spec["cgroup"]):
            ending.insert(0, "cgroup")
        if method == "unshare":
            enter_namespaces()
        if method != "inside" and sys.platform == "linux":
            call("prctl", PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
            if child := os.fork():
                os.close(spec["control"])
                os._exit(reap(child))
        if method == "unshare":
            enter_root(scratch, spec["scratch_bytes"], readable)
            other_processes = become_nobody()
            parts.append("namespaces")
        if method == "inside":
            other_processes = 1
            parts.append("namespaces")
        os.chdir(scratch)
        if sys.platform == "linux":
            enter_keyring()
            drop_capabilities()
            call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
            call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            if spec["landlock"] and enter_landlock(scratch, readable):
                parts.append("landlock")
        os.set_inheritable(spec["control"], True)
        arguments = [*command, "+".join([*parts, *ending]), str(other_processes)]
        # A verdict must not depend on the order of a set, and a program has one thread only.
        environment = {"PYTHONHASHSEED": "0", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        os.execve(command[0], arguments, environment)
    except OSError as error:
        with contextlib.suppress(OSError):  # the parent may have seen the end of another process
            os.write(spec["control"], json.dumps(error.strerror or str(error)).encode())
        os._exit(1)


if __name__ == "__main__":
    main()
