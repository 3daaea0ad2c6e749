"""The dtype in which a device multiplies matrices fastest."""

import timeit
from functools import cache

import torch
from torch import Tensor

MEASURED_WIDTH = 768
"""Rows and columns of the matrices whose product is measured."""
REQUIRED_SPEEDUP = 1.2
"""Minimum speedup of bf16 over fp32 on a CPU; with bf16 units it is 2 to 20."""


def default_compute_dtype(device: torch.device | str) -> torch.dtype:
    """bf16 on CUDA from sm80 on, and on CPUs whose bf16 matmul is verified correct and faster; else fp32."""
    device = torch.device(device)
    if device.type == "cuda":
        has_units = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        has_units = device.type == "cpu" and cpu_multiplies_bf16()
    return torch.bfloat16 if has_units else torch.float32


@cache
def cpu_multiplies_bf16() -> bool:
    """Whether this CPU reports bf16 matrix units (AMX or AVX512-bf16) and a bf16 product is correct and faster.

    The math library may not use the units, and emulated bf16 is slow. If torch is limited to AVX2 kernels, for example
    by ``ATEN_CPU_CAPABILITY``, nothing is measured.
    """
    if torch.backends.cpu.get_cpu_capability() == "AVX2":
        return False
    if not (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()):
        return False
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, MEASURED_WIDTH, MEASURED_WIDTH, generator=generator, device="cpu")
    exact, rounded = a @ b, (a.bfloat16() @ b.bfloat16()).float()
    if not torch.allclose(rounded, exact, rtol=0.02, atol=0.02 * float(exact.abs().max())):
        return False
    limit = _seconds(a, b, 20) / REQUIRED_SPEEDUP
    half = a.bfloat16(), b.bfloat16()
    # An emulated product takes 0.4 s.
    return _seconds(*half, 3) < 10 * limit and _seconds(*half, 20) < limit


def _seconds(a: Tensor, b: Tensor, repeats: int) -> float:
    """Seconds of the fastest of several products."""
    return min(timeit.repeat(lambda: a @ b, number=1, repeat=repeats))
