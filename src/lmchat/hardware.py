"""Properties of the device: peak FLOP/s (the denominator of MFU) and memory."""

from __future__ import annotations

import os
import re
import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from lmchat.types import UserError

if TYPE_CHECKING:
    import torch

DENSE_BF16_PEAK = {
    "B300": 2.25e15,
    "B200": 2.25e15,
    "GB200": 2.5e15,
    "H200 NVL": 836e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 836e12,
    "H100": 989e12,
    "GH200": 989e12,
    "A100": 312e12,
    "A10G": 70e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX 5090": 209.5e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71e12,
    "MI300X": 1307e12,
    "MI325X": 1307e12,
}
"""Dense bf16 peak in FLOP/s by parts of the device's name, from the vendors' data sheets; more specific names first."""

CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
"""The memory limit of a container on Linux: bytes, or "max"."""

MIN_ADDRESS_SPACE_BYTES = 2**30
_LIBRARIES_BYTES = 600_000_000
"""Resident memory of Python, torch and Lightning in a process that trains a model of some kilobytes."""


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 peak of ``device`` in FLOP/s, by its data sheet; None for an unknown GPU or a CPU.

    A CPU's peak depends on clock and load: with measured peaks the same training speed gave an MFU of 57 %, 99 % or
    168 %.
    """
    import torch

    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for words, peak in DENSE_BF16_PEAK.items() if re.search(rf"\b{words}\b", name)), None)


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory so far, in bytes: of torch's allocator on a GPU, of the process on a CPU."""
    import torch

    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _peak_resident_bytes()


def _peak_resident_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def memory_limit_bytes(device: torch.device) -> int | None:
    """Bytes of memory that this process may use on ``device``; None if unknown."""
    import torch

    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory())  # never run
    return host_memory_bytes() if device.type == "cpu" else None


def host_memory_bytes() -> int:
    """Bytes of main memory that this process may use."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    address_space = resource.getrlimit(resource.RLIMIT_AS)[0]
    if address_space != resource.RLIM_INFINITY:
        mapped, resident = mapped_and_resident_bytes()
        limits.append(max(0, address_space - (mapped - resident) - _LIBRARIES_BYTES))
    if CGROUP_LIMIT.exists() and (text := CGROUP_LIMIT.read_text().strip()).isdigit():
        limits.append(int(text))
    return min(limits)


def check_address_space() -> None:
    """Raises UserError if ``ulimit -v`` is too low to import torch, whose libraries may then crash the process."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY and limit < MIN_ADDRESS_SPACE_BYTES:
        raise UserError(
            f"`ulimit -v` allows {limit // 2**20} MiB, and PyTorch and its libraries take more than "
            f"{MIN_ADDRESS_SPACE_BYTES // 2**20}; raise it, e.g. `ulimit -v 4000000`"
        )


def mapped_and_resident_bytes() -> tuple[int, int]:
    """Bytes of this process's address space, and of those in main memory; without /proc, the latter's peak for both."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return _peak_resident_bytes(), _peak_resident_bytes()
    mapped, resident, *_ = map(int, statm.read_text().split())
    return mapped * resource.getpagesize(), resident * resource.getpagesize()


def may_have_accelerator() -> bool:
    """Whether this machine may have a GPU: not a Linux machine, or one with its device file. Needs no torch."""
    return sys.platform != "linux" or any(Path(f"/dev/{name}").exists() for name in ("nvidiactl", "kfd", "dxg"))


_OUT_OF_MEMORY = re.compile(
    r"out ?of ?memory|can't allocate memory|cannot allocate memory|unable to allocate|not enough memory|bad_alloc"
    r"|unable to mmap|can't start new thread|failed to map segment|could not create a primitive$"
    r"|\[enforce fail at alloc_cpu|STATUS_ALLOC_FAILED",
    re.IGNORECASE,
)
"""Out-of-memory messages of torch, Python and the system's loader."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` means out of memory, on the device or the host."""
    return isinstance(error, MemoryError) or bool(_OUT_OF_MEMORY.search(f"{type(error).__name__} {error}"))
