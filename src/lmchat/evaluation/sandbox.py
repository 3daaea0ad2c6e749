"""Tests generated programs in a sandbox.

Each program runs in a separate process in new user, mount, PID and network namespaces, with limits on time, memory,
files and processes, see `lmchat.evaluation.sandbox_driver`. ``docs/evaluation.md`` lists what this does not protect
against.
"""

import json
import os
import signal
import struct
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lmchat.tasks.base import CodeCheck
from lmchat.types import UserError

DRIVER = Path(__file__).with_name("sandbox_driver.py")
MISSING = {
    "user": "a user namespace (programs keep this user's privileges)",
    "mount": "a mount namespace (programs can read and write this user's files)",
    "pid": "a PID namespace (programs can signal other processes and outlive their time limit)",
    "net": "a network namespace (programs can use the network)",
    "filter": "a filter of system calls (programs can leave shared memory behind)",
}


@dataclass(frozen=True)
class Limits:
    """Limits of a program: wall-clock time (and CPU time of a process); memory, file size and open files of a process;
    size of the private /tmp; processes and threads; printed output.
    """

    seconds: float = 5.0
    memory_bytes: int = 1 << 29
    file_bytes: int = 1 << 23
    tmp_bytes: int = 1 << 24
    processes: int = 16
    open_files: int = 64
    output_bytes: int = 1 << 20


@dataclass(frozen=True)
class Verdict:
    """Whether a program passed its tests, and if not, why."""

    passed: bool
    reason: str = ""


@dataclass(frozen=True)
class Sandbox:
    """Tests programs in parallel.

    Args:
        allow_weak: continue if the kernel refuses some of the namespaces. Programs can then do harm.
        limits: limits of each program.
        max_parallel: maximum number of programs that run at the same time.
        option: command-line option of ``allow_weak``, for messages.
    """

    allow_weak: bool = False
    limits: Limits = Limits()
    max_parallel: int = field(default_factory=lambda: max(4, os.cpu_count() or 1))
    driver: Path = DRIVER
    option: str = "--sandbox.allow_weak"

    def require(self) -> None:
        """Raises UserError if the kernel refuses a protection, and ``allow_weak`` is false."""
        self.run(
            [CodeCheck("def same(x):\n    return x\n", "same", "def check(candidate):\n    assert candidate(1)\n")]
        )

    def run(self, checks: Sequence[CodeCheck]) -> list[Verdict]:
        """Tests programs and returns their verdicts.

        Raises:
            UserError: the kernel refuses a protection, and ``allow_weak`` is false.
        """
        with ThreadPoolExecutor(self.max_parallel) as pool:
            return list(pool.map(self._run, checks))

    def _run(self, check: CodeCheck) -> Verdict:
        with (
            tempfile.TemporaryDirectory(prefix="lmchat_sandbox_", ignore_cleanup_errors=True) as root,
            tempfile.TemporaryFile() as printed,
        ):
            Path(root).chmod(0o777 if self.allow_weak else 0o755)
            with subprocess.Popen(
                [sys.executable, "-I", "-S", "-B", str(self.driver)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=printed,  # its size is limited like that of the program's own files
                env={},
                cwd="/",
                start_new_session=True,
            ) as process:
                try:
                    answer, _ = process.communicate(self._messages(check, root), timeout=self.limits.seconds)
                except subprocess.TimeoutExpired:
                    return Verdict(False, f"longer than {self.limits.seconds:g} s")
                finally:
                    if process.returncode is None:
                        os.killpg(process.pid, signal.SIGKILL)
            if os.fstat(printed.fileno()).st_size > self.limits.output_bytes:
                return Verdict(False, f"more than {self.limits.output_bytes} bytes of output")
        message = _parsed(answer)
        if "missing" in message:
            lacking = ", ".join(MISSING[name] for name in message["missing"])
            raise UserError(
                f"generated programs cannot be run safely: this kernel refuses {lacking}; allow it, or "
                f"accept the risk with {self.option} true"
            )
        if not isinstance(message.get("passed"), bool):
            return Verdict(False, "the sandbox ended without a verdict")
        return Verdict(message["passed"], str(message["reason"]))

    def _messages(self, check: CodeCheck, root: str) -> bytes:
        """What the driver reads; see `lmchat.evaluation.sandbox_driver`."""
        program = {
            "root": root,
            "allow_weak": self.allow_weak,
            "limits": asdict(self.limits),
            "program": check.program,
            "entry_point": check.entry_point,
        }
        tests = {"setup": check.setup, "tests": check.tests, "entry_point": check.entry_point}
        encoded = [json.dumps(message).encode() for message in (program, tests)]
        return b"".join(struct.pack("I", len(data)) + data for data in encoded)


def _parsed(message: bytes) -> dict[str, Any]:
    try:
        parsed = json.loads(message[4:])
    except ValueError:
        return {}
    return parsed if isinstance(parsed, dict) else {}
