"""The process that `lmchat.evaluation.sandbox` starts for each program. Standard library only, and no import of lmchat.

It isolates itself and forks two processes. The judge runs the tests. The candidate runs the program and executes the
judge's calls of its function; it has access to neither the tests nor the verdict. Arguments and results are passed as
JSON, so the judge never handles an object of the candidate. The judge is process 1 of a PID namespace and the candidate
of a nested one, so neither outlives the driver.

stdin: two messages, each with its length in four bytes: limits and program, then what the judge runs. stdout: the
verdict. stderr: what the program prints.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import importlib
import json
import math
import os
import platform
import resource
import signal
import struct
import sys
from collections.abc import Callable
from typing import Any

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x20000, 0x4000000, 0x8000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT = 1, 2, 4, 8, 32
MS_BIND, MS_REC, MS_PRIVATE = 1 << 12, 1 << 14, 1 << 18
MNT_DETACH = 2
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
SYSTEM_CALLS = {"x86_64": (0xC000003E, 155, 29, 68), "aarch64": (0xC00000B7, 41, 194, 186)}
"""By machine: its number in system-call filters, and the numbers of pivot_root, shmget and msgget."""
CAPABILITIES_V3 = 0x20080522
FIRST_UID = 0x60000000
"""First user id for the programs that root tests: process limits do not apply to root."""
NOBODY = 65534
MAX_MESSAGE_BYTES = 1 << 24

for _module in ("binascii", "_bz2", "_lzma", "zlib"):  # their shared libraries are not in the jail
    with contextlib.suppress(ImportError):
        importlib.import_module(_module)
libc = ctypes.CDLL(None, use_errno=True)


def call(function: str, *args: Any) -> None:
    """Calls a libc function that returns 0 or sets errno; raises OSError for an error."""
    found = getattr(libc, function, None)
    if found is None or found(*args) != 0:
        raise OSError(ctypes.get_errno(), f"{function}: {os.strerror(ctypes.get_errno())}")


def system_calls() -> tuple[int, int, int, int]:
    """This machine's row of `SYSTEM_CALLS`; raises OSError if there is none."""
    if (numbers := SYSTEM_CALLS.get(platform.machine())) is None:
        raise OSError(errno.ENOSYS, f"the numbers of system calls of {platform.machine()} are unknown")
    return numbers


# ---------------------------------------------------------------------------------------------------------------------
# Isolation


def isolate(root: str, tmp_bytes: int) -> list[str]:
    """Enters new namespaces as far as the kernel allows it; returns the names of the protections that it refuses.

    The order matters. As root, the file system is prepared with root's privileges, which are then given up; a user
    namespace without privileges outside of it comes last. Other users need that namespace first.
    """
    missing = [] if in_child(restrict) else ["filter"]
    is_root = os.geteuid() == 0
    if not is_root and not attempt("user", enter_user_namespace, missing):
        return [*missing, "mount", "pid", "net"]
    # As root without a user namespace, the root directory is changed before the privileges are dropped.
    separate_user = not is_root or in_child(enter_user_namespace_as_other)
    mounted = attempt("mount", lambda: mount_root(root, tmp_bytes), missing)
    attempt("pid", lambda: call("unshare", CLONE_NEWPID | CLONE_NEWIPC | CLONE_NEWUTS), missing)
    attempt("net", lambda: call("unshare", CLONE_NEWNET), missing)
    if not separate_user:
        missing.append("user")
        change_root(mounted)
        give_up_root()
    else:
        if is_root:
            enter_user_namespace_as_other()
        change_root(mounted)
    return missing


def change_root(mounted: bool) -> None:
    """Makes /jail the root directory, in which the kernel allows no further user namespace."""
    if mounted:
        os.chroot("/jail")
        os.chdir("/")


def in_child(step: Callable[[], None]) -> bool:
    """Whether a step succeeds in a child process, which then exits."""
    child = os.fork()
    if child == 0:
        try:
            step()
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitpid(child, 0)[1] == 0


def attempt(name: str, step: Callable[[], None], missing: list[str]) -> bool:
    """Runs a step and returns whether it succeeded; if not, adds its name to ``missing``."""
    try:
        step()
    except OSError:
        missing.append(name)
        return False
    return True


def enter_user_namespace() -> None:
    """Enters a user namespace that maps this user to nobody."""
    uid, gid = os.getuid(), os.getgid()
    call("unshare", CLONE_NEWUSER)
    for name, text in (("setgroups", "deny"), ("uid_map", f"{NOBODY} {uid} 1"), ("gid_map", f"{NOBODY} {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:  # noqa: PTH123
            file.write(text)


def enter_user_namespace_as_other() -> None:
    """As root: enters a user namespace of an unused user id, without an id mapping."""
    give_up_root()
    call("unshare", CLONE_NEWUSER)


def give_up_root() -> None:
    """Changes to an unused user id."""
    uid = FIRST_UID + os.getpid()
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


def mount_root(root: str, tmp_bytes: int) -> None:
    """Mounts /jail, with Python's standard library (read-only) and a small /tmp, in an otherwise empty file system."""
    call("unshare", CLONE_NEWNS)
    mount(None, "/", None, MS_PRIVATE | MS_REC)
    mount("tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
    jail = f"{root}/jail"
    for folder in sorted({path for path in sys.path if os.path.isdir(path)}, key=len):  # noqa: PTH112
        if not os.path.isdir(jail + folder):  # noqa: PTH112  (some are within others)
            os.makedirs(jail + folder)  # noqa: PTH103
            mount(folder, jail + folder, None, MS_BIND)
            mount(None, jail + folder, None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV)
            for packages in ("site-packages", "dist-packages"):
                if os.path.isdir(f"{jail}{folder}/{packages}"):  # noqa: PTH112
                    mount("tmpfs", f"{jail}{folder}/{packages}", "tmpfs", MS_RDONLY | MS_NOSUID | MS_NODEV, "size=4k")
    os.makedirs(f"{jail}/tmp", exist_ok=True)  # noqa: PTH103
    options = f"size={tmp_bytes},nr_inodes=1024,mode=1777"
    mount("tmpfs", f"{jail}/tmp", "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, options)
    mount(None, root, None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV)
    os.chdir(root)
    if libc.syscall(system_calls()[1], b".", b".") != 0:
        raise OSError(ctypes.get_errno(), "pivot_root")
    call("umount2", b".", MNT_DETACH)
    os.chdir("/")


def mount(source: str | None, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    texts = [None if text is None else os.fsencode(text) for text in (source, target, kind, options)]
    call("mount", *texts[:3], ctypes.c_ulong(flags), texts[3])


def restrict() -> None:
    """Drops all capabilities for good, and forbids System V shared memory and message queues, which no limit counts.

    The filter of system calls is a BPF program of (operation, jump if true, jump if false, constant), see seccomp(2).
    """
    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    call("capset", struct.pack("Ii", CAPABILITIES_V3, 0), bytes(24))
    machine, _, shmget, msgget = system_calls()
    load, equal, at_least, answer = 0x20, 0x15, 0x35, 0x06
    steps = [
        (load, 0, 0, 4),  # the machine
        (equal, 0, 5, machine),
        (load, 0, 0, 0),  # the system call
        (at_least, 3, 0, 1 << 30),  # 32-bit variants
        (equal, 2, 0, shmget),
        (equal, 1, 0, msgget),
        (answer, 0, 0, 0x7FFF0000),  # allowed
        (answer, 0, 0, 0x50000 | errno.EPERM),
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    call("prctl", PR_SET_SECCOMP, 2, struct.pack("HP", len(steps), ctypes.addressof(code)))


def limit(limits: dict[str, Any]) -> None:
    for name, value in {
        "RLIMIT_CPU": math.ceil(limits["seconds"]),
        "RLIMIT_AS": limits["memory_bytes"],
        "RLIMIT_FSIZE": limits["file_bytes"],
        "RLIMIT_NPROC": limits["processes"],
        "RLIMIT_NOFILE": limits["open_files"],
        "RLIMIT_CORE": 0,
    }.items():
        if hasattr(resource, name):
            with contextlib.suppress(ValueError, OSError):
                resource.setrlimit(getattr(resource, name), (value, value))


# ---------------------------------------------------------------------------------------------------------------------
# Messages


def read_message(descriptor: int) -> Any:
    """The next message; EOFError at the end, ValueError for one that is too long or not JSON."""
    (length,) = struct.unpack("I", _read(descriptor, 4))
    if length > MAX_MESSAGE_BYTES:
        raise ValueError("a result is too large")
    return json.loads(_read(descriptor, length))


def _read(descriptor: int, length: int) -> bytes:
    data = b""
    while len(data) < length:
        chunk = os.read(descriptor, min(length - len(data), 1 << 16))
        if not chunk:
            raise EOFError("the program ended")
        data += chunk
    return data


def write_message(descriptor: int, message: Any) -> None:
    data = json.dumps(message).encode()
    data = struct.pack("I", len(data)) + data
    while data:
        data = data[os.write(descriptor, data) :]


SCALARS: dict[type, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    int: (hex, lambda digits: int(digits, 16)),
    float: (float.hex, float.fromhex),
    complex: (lambda value: [value.real.hex(), value.imag.hex()], lambda parts: complex(*map(float.fromhex, parts))),
    bytes: (bytes.hex, bytes.fromhex),
    bytearray: (bytearray.hex, bytearray.fromhex),
    str: (  # not as it is, since JSON would join two surrogates to one character
        lambda text: str.encode(text, errors="surrogatepass").hex(),
        lambda digits: bytes.fromhex(digits).decode(errors="surrogatepass"),
    ),
}
"""How values are written and read, by type."""
KINDS: dict[str, Any] = {kind.__name__: kind for kind in (*SCALARS, list, tuple, set, frozenset, dict)}


def encoded(value: Any) -> Any:
    """A value as JSON with its type; instances of subclasses become those of the class. TypeError for other values."""
    if value is None or isinstance(value, bool):
        return value
    for name, kind in KINDS.items():
        if isinstance(value, kind):
            if kind in SCALARS:
                return [name, SCALARS[kind][0](value)]
            return [name, [encoded(item) for item in (value.items() if kind is dict else value)]]
    raise TypeError(f"a value of type {type(value).__name__} cannot be passed")


def decoded(value: Any) -> Any:
    """The inverse of `encoded`."""
    if value is None or isinstance(value, bool):
        return value
    name, content = value
    kind = KINDS[name]
    return SCALARS[kind][1](content) if kind in SCALARS else kind(map(decoded, content))


# ---------------------------------------------------------------------------------------------------------------------
# The two processes


def run_candidate(request: dict[str, Any], calls: int, results: int) -> None:
    """Runs the program and answers calls of its function until there are no more."""
    namespace: dict[str, Any] = {"__name__": "program"}
    try:
        exec(compile(request["program"], "program", "exec"), namespace)
        function = namespace[request["entry_point"]]
    except BaseException as error:
        write_message(results, ["error", _description(error)])
        return
    write_message(results, ["ready", None])
    while True:
        args, kwargs = decoded(read_message(calls))
        try:
            answer = ["value", encoded(function(*args, **kwargs))]
        except BaseException as error:
            answer = ["error", _description(error)]
        write_message(results, answer)


def _description(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"[:500]
    except Exception:
        return "an error that cannot be printed"


def judge(calls: int, results: int) -> str:
    """Runs the tests against the candidate; returns why they failed, or nothing if they passed."""
    request = read_message(0)

    def answer() -> Any:
        kind, content = read_message(results)
        if kind == "error":
            raise RuntimeError(f"the program failed: {content}")
        return decoded(content)

    def candidate(*args: Any, **kwargs: Any) -> Any:
        write_message(calls, encoded([args, kwargs]))
        return answer()

    try:
        answer()
        namespace: dict[str, Any] = {"__name__": "tests"}
        exec(compile(request["setup"], "setup", "exec"), namespace)
        namespace[request["entry_point"]] = candidate
        exec(compile(request["tests"], "tests", "exec"), namespace)
        namespace["check"](candidate)
    except BaseException as error:
        return _description(error) or "failed"
    return ""


def fork(function: Callable[[], None]) -> int:
    """Forks a child that runs ``function`` and exits; it is killed when its parent exits."""
    child = os.fork()
    if child:
        return child
    try:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)  # no other process may trace it
        function()
    finally:
        os._exit(0)


def detach(*keep: int) -> list[int]:
    """Starts a session with empty stdin and stdout as stderr; closes all but ``keep``; returns their new numbers."""
    os.setsid()
    os.dup2(os.pipe()[0], 0)
    os.dup2(2, 1)
    kept = [os.dup2(descriptor, 100 + number) for number, descriptor in enumerate(keep)]
    os.closerange(3, 100)
    os.closerange(100 + len(kept), 1 << 12)
    return kept


def reap_orphans() -> None:
    """Reaps orphaned processes, forever."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    detach()
    while True:
        signal.pause()


def judge_candidate(request: dict[str, Any]) -> None:
    """The judge's process: starts the candidate, runs the tests and reports the verdict."""
    with contextlib.suppress(OSError):
        call("unshare", CLONE_NEWPID)
        fork(reap_orphans)  # process 1 of the namespace; the candidate's parent is not in it
    attempt("filter", restrict, [])  # reported by `isolate`
    calls, results = os.pipe(), os.pipe()

    def candidate() -> None:
        keep = detach(calls[0], results[1])
        os.chdir("/tmp" if request["isolated"] else request["root"])
        limit(request["limits"])
        run_candidate(request, *keep)

    fork(candidate)
    os.close(calls[0])
    os.close(results[1])
    reason = judge(calls[1], results[0])
    write_message(1, {"passed": not reason, "reason": reason})


def main() -> None:
    """Isolates the process, runs the judge and waits for it."""
    request = read_message(0)
    missing = isolate(request["root"], request["limits"]["tmp_bytes"])
    if missing and not request["allow_weak"]:
        write_message(1, {"missing": missing})
        return
    request["isolated"] = "mount" not in missing
    os.waitpid(fork(lambda: judge_candidate(request)), 0)


if __name__ == "__main__":
    main()
