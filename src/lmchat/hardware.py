"""What the machine can do: the peak a model-FLOPs utilisation is measured against."""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING

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
"""Dense bf16 peak in FLOP/s by words of the device's name, from the makers' data sheets; more specific names first."""


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s that count as full utilisation of ``device``.

    A GPU's figure is its data sheet's dense bf16 peak, None for an unknown GPU. A CPU has no such figure that holds
    for every clock and core count: what a large matrix product of ``dtype`` reaches now is taken (about 0.3 s).
    """
    import torch

    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return next((peak for words, peak in DENSE_BF16_PEAK.items() if re.search(rf"\b{words}\b", name)), None)
    if device.type == "cpu":
        return _measured_matmul_flops(dtype)
    return None


def _measured_matmul_flops(dtype: torch.dtype, size: int = 1024, seconds: float = 0.3) -> float:
    import torch

    generator = torch.Generator().manual_seed(0)  # training's own random numbers stay as they are
    a, b = torch.randn(2, size, size, generator=generator).to(dtype)
    torch.mm(a, b)
    best, start = float("inf"), time.perf_counter()
    while time.perf_counter() - start < seconds:
        before = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - before)
    return 2 * size**3 / best


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory held so far: of the device's allocator on a GPU, of the whole process on a CPU."""
    import resource
    import sys

    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
