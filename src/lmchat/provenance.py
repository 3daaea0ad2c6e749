"""Provenance of a run: command, code, versions and hardware."""

import os
import platform
import shlex
import subprocess
import sys
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("lmchat", "torch", "lightning", "tiktoken", "pyarrow", "torchao")


def provenance() -> dict[str, Any]:
    """JSON values: ``command``, ``commit``, ``dirty`` (both None outside a git checkout), ``versions`` by package,
    ``host`` (processor, cores and memory) and ``started`` (UTC)."""
    commit, dirty = _git_state(Path(__file__).resolve().parent)
    return {
        "command": shlex.join(["lmchat", *sys.argv[1:]]),
        "commit": commit,
        "dirty": dirty,
        "versions": {"python": platform.python_version(), **_versions()},
        "host": _host(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _git_state(folder: Path) -> tuple[str | None, bool | None]:
    """The commit of the checkout that has ``folder``, and whether tracked files differ from it."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        # The package may be installed inside another project's checkout.
        git("ls-files", "--error-unmatch", "__init__.py")
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        return None, None


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _host() -> str:
    """Description of the host, e.g. ``AMD EPYC 7763, 2 cores, 24 GB``."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        processor = next(iter(models), processor)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return f"{processor}, {os.cpu_count()} cores, {memory / 1e9:.0f} GB"
