"""Peak FLOP/s by the name of the device, memory limits, and out-of-memory errors."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from forked import exit_statuses, python, start
from lmchat import hardware
from lmchat.hardware import DENSE_BF16_PEAK, is_out_of_memory, peak_flops


@pytest.mark.parametrize(
    ("name", "entry"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H100 NVL", "H100 NVL"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA GH200 480GB", "GH200"),
        ("NVIDIA B200", "B200"),
        ("NVIDIA GB200", "GB200"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA A10G", "A10G"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40", "L40"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("AMD Instinct MI300X", "MI300X"),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_peak_of_a_gpu(name: str, entry: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    expected = None if entry is None else DENSE_BF16_PEAK[entry]
    assert peak_flops(torch.device("cuda")) == expected


def test_the_peak_of_a_cpu_is_unknown() -> None:
    assert peak_flops(torch.device("cpu")) is None


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("can't start new thread"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (ImportError("libtorch.so: failed to map segment from shared object"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    ],
)
def test_out_of_memory_errors_are_recognized(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) == expected


@pytest.mark.parametrize(("text", "expected"), [("123456789\n", 123456789), ("max\n", None)])
def test_the_memory_limit_of_a_container_is_used(
    text: str, expected: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unlimited = hardware.memory_limit_bytes(torch.device("cpu"))
    (tmp_path / "memory.max").write_text(text)
    monkeypatch.setattr(hardware, "CGROUP_LIMIT", tmp_path / "memory.max")
    assert hardware.memory_limit_bytes(torch.device("cpu")) == (expected or unlimited)


def test_a_limited_address_space_counts_what_is_left(tmp_path: Path) -> None:
    """Not what is mapped already: Python and torch alone have gigabytes, most of them never touched."""
    code = """
import resource, torch
from pathlib import Path
from lmchat.hardware import memory_limit_bytes
mapped, resident = (int(pages) * resource.getpagesize() for pages in Path("/proc/self/statm").read_text().split()[:2])
resource.setrlimit(resource.RLIMIT_AS, (mapped + 10**9,) * 2)
print(memory_limit_bytes(torch.device("cpu")) - resident)
torch.ones(120_000_000)
"""
    if not Path("/proc/self/statm").exists():
        pytest.skip("needs Linux")
    output = tmp_path / "output.txt"
    assert exit_statuses([start(python, code, output=output)]) == [0], output.read_text()
    assert 3e8 < int(output.read_text().splitlines()[-1]) < 5e8  # less 0.6 GB, which a run's libraries still take


@pytest.mark.parametrize("command", ["fit --config configs/sft.yaml", "chat", "export hf"])
def test_an_address_space_too_small_for_torch_is_reported(command: str) -> None:
    """Torch's libraries may crash the process there."""
    limited = ["bash", "-c", 'ulimit -v 460000; exec "$@"', "-", sys.executable, "-m", "lmchat", *command.split()]
    done = subprocess.run(limited, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 2
    assert done.stderr == (
        "lmchat: `ulimit -v` allows 449 MiB, and PyTorch and its libraries take more than 1024; raise it, e.g. "
        "`ulimit -v 4000000`\n"
    )


def test_out_of_memory_is_reported_without_memory() -> None:
    code = """
import resource, sys
from pathlib import Path
from lmchat import __main__ as program
held = []
def exhaust(*_):
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + 2**24,) * 2)
    for size in (2**20, 2**12, 2**9, 2**6):
        try:
            while True:
                held.append(bytearray(size))
        except MemoryError:
            pass
    raise MemoryError
program._run_command = exhaust
sys.exit(program.main(["report"]))
"""
    if not Path("/proc/self/statm").exists():
        pytest.skip("needs Linux")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("lmchat: out of memory (MemoryError); close other programs")
