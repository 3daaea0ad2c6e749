"""Hostile programs are contained and fail; honest ones pass."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lmchat.evaluation.sandbox import DRIVER, MISSING, Limits, Sandbox, Verdict
from lmchat.evaluation.sandbox_driver import decoded, encoded
from lmchat.tasks.base import CodeCheck
from lmchat.types import UserError

TESTS = "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(-3) == 9\n"
SOLUTION = "def square(x):\n    return x * x\n"
FAST = Limits(seconds=3.0)


def check(program: str, tests: str = TESTS) -> CodeCheck:
    return CodeCheck(program, "square", tests)


@pytest.fixture(scope="module", autouse=True)
def namespaces() -> None:
    try:
        Sandbox(limits=FAST).run([check(SOLUTION)])
    except UserError as error:
        pytest.skip(str(error))


def run(program: str, tests: str = TESTS) -> Verdict:
    return Sandbox(limits=FAST).run([check(program, tests)])[0]


def descendants_named(marker: str) -> list[str]:
    """Processes whose command line or name contains the marker."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            found += [folder.name] if marker in (folder / "comm").read_text() else []
        except OSError:
            continue
    return found


def test_programs_are_graded() -> None:
    assert run(SOLUTION).passed
    assert run("import base64, collections, hashlib, heapq, lzma, math, re, secrets, typing, zlib\n" + SOLUTION).passed
    for wrong in ("def square(x):\n    return x + x\n", "def other(x):\n    return x * x\n", "I do not know", ""):
        assert not run(wrong).passed
    assert "ZeroDivisionError" in run("def square(x):\n    return 1 / 0\n").reason


HOSTILE = {
    "fork bomb": """
import os
while True:
    os.fork()
""",
    "thread bomb": """
import threading, time
for _ in range(1000):
    threading.Thread(target=time.sleep, args=(9,)).start()
""",
    "memory bomb": """
x = bytearray(1 << 34)
""",
    "growing list": """
x = []
while True:
    x.append(bytes(1 << 20))
""",
    "infinite loop": """
while True:
    pass
""",
    "infinite loop in the function": """
def square(x):
    while True:
        pass
""",
    "sleep": """
import time
time.sleep(1000)
""",
    "write outside of /tmp": """
open('/hello', 'w').write('x')
""",
    "write over the library": """
import os
open(os.__file__, 'a').write('x')
""",
    "large file in /tmp": """
open('/tmp/x', 'wb').write(bytes(1 << 28))
""",
    "many files in /tmp": """
for n in range(10000):
    open(f'/tmp/{n}', 'wb').write(bytes(1 << 22))
""",
    "ssh keys": """
import pathlib
print(list((pathlib.Path(HOME) / '.ssh').iterdir()))
""",
    "the repository": """
open(DRIVER).read()
""",
    "password file": """
open('/etc/passwd').read()
""",
    "processes": """
import os
os.listdir('/proc')
""",
    "environment": """
import os
os.environ['LMCHAT_SECRET']
""",
    "environment of the parent": """
open('/proc/1/environ').read()
""",
    "internet": """
import socket
socket.create_connection(('1.1.1.1', 53), 0.5)
""",
    "loopback": """
import socket
socket.create_connection(('127.0.0.1', PORT), 0.5)
""",
    "abstract socket": """
import socket
socket.socket(socket.AF_UNIX).connect(chr(0) + 'lmchat_test')
""",
    "kill the parent": """
import os, signal
os.kill(os.getppid(), signal.SIGKILL)
""",
    "kill all": """
import os, signal
os.kill(-1, signal.SIGKILL)
os.kill(PID, 9)
""",
    "1 GB of output": """
for _ in range(1 << 10):
    print('x' * (1 << 20))
""",
    "1 GB to the judge": """
import os
for fd in range(200):
    try:
        os.write(fd, b'x' * (1 << 20))
    except OSError:
        pass
""",
    "exit": """
import os
os._exit(0)
""",
    "sys.exit": """
import sys
sys.exit(0)
""",
    "exit in the function": """
import os
def square(x):
    os._exit(0)
""",
    "verdict on stdout": """
import os
os.write(1, b'xxxx{"passed": true}')
os.write(2, b'xxxx{"passed": true}')
os._exit(0)
""",
    "always equal": """
class E:
    def __eq__(self, other):
        return True
def square(x):
    return E()
""",
    "equal number": """
class E(int):
    def __eq__(self, other):
        return True
def square(x):
    return E(7)
""",
    "patched builtins": """
import builtins
builtins.AssertionError = Exception
builtins.all = lambda x: True
def square(x):
    return 0
""",
    "patched tests": """
import sys
sys.modules['__main__'].judge = lambda *a: ''
sys.modules['__main__'].write_message(1, {'passed': True, 'reason': ''})
def square(x):
    return 0
""",
    "reads the tests": """
import gc, os
def square(x):
    found = [o for o in gc.get_objects() if isinstance(o, dict) and 'tests' in o]
    return eval(found[0]['tests'])
""",
    "daemon": """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        import ctypes
        ctypes.CDLL(None).prctl(15, b'lmchat_daemon', 0, 0, 0)
        ctypes.CDLL(None).prctl(1, 0, 0, 0, 0)
        time.sleep(1000)
    os._exit(0)
os._exit(0)
""",
    "new namespace": """
import ctypes
assert ctypes.CDLL(None).unshare(0x10000000) == 0
""",
    "mount": """
import ctypes
assert ctypes.CDLL(None).mount(b'tmpfs', b'/tmp', b'tmpfs', 0, None) == 0
""",
    "chroot": """
import os
os.chroot('/tmp')
""",
    "ignores signals": """
import signal
for n in range(1, 64):
    try:
        signal.signal(n, signal.SIG_IGN)
    except (OSError, ValueError):
        pass
while True:
    pass
""",
    "crash": """
import ctypes
ctypes.string_at(1)
""",
    "deep recursion": """
import sys
sys.setrecursionlimit(1 << 30)
def square(x):
    return square(x)
""",
    "closed streams": """
import os
os.closerange(0, 200)
""",
    "memory outside of the heap": """
import os
for fd in [os.memfd_create('x') for _ in range(60)]:
    for _ in range(100):
        os.write(fd, bytes(1 << 20))
""",
    "shared memory without a process": """
import ctypes
assert ctypes.CDLL(None).shmget(0, 1 << 20, 0o1600) >= 0
""",
    "message queues": """
import ctypes
assert ctypes.CDLL(None).msgget(0, 0o1600) >= 0
""",
    "stops itself": """
import os, signal
os.kill(os.getpid(), signal.SIGSTOP)
""",
    "traces the parent": """
import ctypes, os
assert ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0) == 0
""",
    "trace function": """
import sys
def trace(frame, event, arg):
    if event == 'return':
        frame.f_globals['encoded'] = lambda value: ['int', '0x4']
    return trace
sys.settrace(trace)
def square(x):
    return 0
""",
    "patched answers": """
import os, sys
main = sys.modules['__main__']
main.write_message = lambda fd, message: os._exit(0)
def square(x):
    return 0
""",
    "exits at its end": """
import atexit, os
class Late:
    def __del__(self):
        os._exit(0)
late = Late()
atexit.register(os._exit, 0)
def square(x):
    return 0
""",
    "another program": """
import os, sys
os.execv(sys.executable, [sys.executable, '-c', 'pass'])
""",
    "links": """
import os
os.symlink('/proc/1/root/etc/passwd', '/tmp/link')
open('/tmp/link').read()
""",
}


def test_hostile_programs_are_contained_and_fail(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LMCHAT_SECRET", "secret")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    before = set(Path("/tmp").iterdir())
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket(socket.AF_UNIX) as abstract:
        abstract.bind("\0lmchat_test")
        abstract.listen()
        values = {
            "PORT": listener.getsockname()[1],
            "PID": os.getpid(),
            "DRIVER": str(DRIVER),
            "HOME": str(Path.home()),
        }
        settings = "".join(f"{name} = {value!r}\n" for name, value in values.items())
        started = time.monotonic()
        # Each program also has the correct function, so that it fails because of the attack.
        verdicts = Sandbox(limits=Limits(seconds=1.5), max_parallel=8).run(
            [check(settings + ("" if "def square" in deed else SOLUTION) + deed) for deed in HOSTILE.values()]
        )
        assert time.monotonic() - started < 60
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.accept()
    assert {name: verdict.reason for name, verdict in zip(HOSTILE, verdicts, strict=True) if verdict.passed} == {}
    assert not Path("/hello").exists()
    assert {path for path in set(Path("/tmp").iterdir()) - before if path.name.isdigit() or path.name == "x"} == set()
    assert descendants_named("lmchat_daemon") == []
    assert run(SOLUTION).passed


def test_a_program_may_use_its_tmp() -> None:
    assert run(SOLUTION + "open('/tmp/x', 'w').write('1')\nassert open('/tmp/x').read() == '1'\n").passed
    assert not run(SOLUTION + "open('/tmp/x').read()\n").passed  # not the previous program's


def test_programs_run_at_the_same_time() -> None:
    sleepy = "import time\ntime.sleep(1.0)\n" + SOLUTION
    started = time.monotonic()
    assert all(verdict.passed for verdict in Sandbox(max_parallel=6).run([check(sleepy)] * 6))
    assert time.monotonic() - started < 5


@pytest.mark.skipif(os.getuid() != 0, reason="needs another user")
def test_programs_of_other_users_than_root_are_contained(tmp_path: Path) -> None:
    code = f"""
import os, sys
os.setgid(65534); os.setuid(65534)
sys.path[:0] = {sys.path!r}
import tempfile; tempfile.tempdir = "/tmp"
from lmchat.evaluation.sandbox import Sandbox
from lmchat.tasks.base import CodeCheck
programs = {[SOLUTION, *(SOLUTION + HOSTILE[name] for name in ("write outside of /tmp", "internet", "fork bomb"))]!r}
print([verdict.passed for verdict in Sandbox().run([CodeCheck(each, "square", {TESTS!r}) for each in programs])])
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    if "PermissionError" in result.stderr or "ModuleNotFoundError" in result.stderr:
        pytest.skip("Python or the repository is not readable for other users")
    assert result.stdout == "[True, False, False, False]\n", result.stderr


FLAGS = {
    "user": "CLONE_NEWUSER",
    "mount": "CLONE_NEWNS",
    "pid": "CLONE_NEWPID",
    "net": "CLONE_NEWNET",
    "filter": "PR_SET_SECCOMP",
}


@pytest.mark.parametrize(("name", "flag"), FLAGS.items())
def test_a_refused_protection_is_reported_and_needs_an_option(name: str, flag: str, tmp_path: Path) -> None:
    driver = tmp_path / "driver.py"
    # The kernel refuses an unknown flag.
    driver.write_text(DRIVER.read_text().replace("\nSYSTEM_CALLS", f"\n{flag} = 1 << 20\nSYSTEM_CALLS", 1))
    sandbox = Sandbox(limits=FAST, driver=driver)
    with pytest.raises(UserError, match=rf"refuses .*{re.escape(MISSING[name])}.*--sandbox.allow_weak true"):
        sandbox.run([check(SOLUTION)])
    weak = Sandbox(limits=FAST, driver=driver, allow_weak=True)
    programs = [SOLUTION, "def square(x):\n    return 0\n", HOSTILE["memory bomb"]]
    assert [verdict.passed for verdict in weak.run([check(each) for each in programs])] == [True, False, False]
    weak = Sandbox(limits=Limits(seconds=0.3), driver=driver, allow_weak=True)
    (verdict,) = weak.run([check(HOSTILE["infinite loop"])])
    assert not verdict.passed


def test_values_are_passed_unchanged() -> None:
    values = [
        *(None, True, False, 0, -5, 1 << 5000, 0.1, float("inf"), 1 + 2j, "ä\ud800", b"x", bytearray(b"y")),
        *([1, (2, [3])], {"a": {1: None}}, {1, 2}, frozenset("ab"), {(1, 2): [True]}, ""),
    ]
    for value in values:
        back = decoded(encoded(value))
        assert back == value and type(back) is type(value)
    with pytest.raises(TypeError, match="of type generator"):
        encoded(x for x in [])
