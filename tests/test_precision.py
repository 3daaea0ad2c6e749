"""The compute dtype depends on measured bf16 products, not on the CPU's feature flags alone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from lmchat import precision
from lmchat.precision import cpu_multiplies_bf16, default_compute_dtype


@pytest.fixture(autouse=True)
def fresh_choice() -> Iterator[None]:
    cpu_multiplies_bf16.cache_clear()
    yield
    cpu_multiplies_bf16.cache_clear()


def claim(monkeypatch: pytest.MonkeyPatch, amx: bool = False, avx512: bool = False, speedup: float = 4.0) -> None:
    """Mocks a CPU that reports bf16 units, on which products are ``speedup`` times as fast."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(precision, "MEASURED_WIDTH", 64)  # bf16 is slow with the tests' kernels
    monkeypatch.setattr(precision, "_seconds", lambda a, b, _: 1.0 if a.dtype == torch.float32 else 1 / speedup)


@pytest.mark.parametrize(("speedup", "repeats"), [(0.01, [20, 3]), (0.8, [20, 3, 20])])
def test_an_emulated_product_is_repeated_three_times(
    monkeypatch: pytest.MonkeyPatch, speedup: float, repeats: list[int]
) -> None:
    claim(monkeypatch, amx=True)
    measured = []

    def seconds(a: torch.Tensor, b: torch.Tensor, repeats: int) -> float:
        measured.append(repeats)
        return 1.0 if a.dtype == torch.float32 else 1 / speedup

    monkeypatch.setattr(precision, "_seconds", seconds)
    assert not cpu_multiplies_bf16()
    assert measured == repeats


def test_kernels_limited_to_avx2_have_no_bf16_units(monkeypatch: pytest.MonkeyPatch) -> None:
    claim(monkeypatch, amx=True)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert not cpu_multiplies_bf16()


def test_fp32_without_bf16_units(monkeypatch: pytest.MonkeyPatch) -> None:
    claim(monkeypatch, speedup=100)
    assert default_compute_dtype("cpu") == torch.float32


@pytest.mark.parametrize("unit", ["amx", "avx512"])
def test_bf16_with_fast_units(monkeypatch: pytest.MonkeyPatch, unit: str) -> None:
    claim(monkeypatch, **{unit: True})
    assert default_compute_dtype("cpu") == torch.bfloat16


def test_bf16_units_unused_by_the_library_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    claim(monkeypatch, amx=True, speedup=0.8)
    assert default_compute_dtype("cpu") == torch.float32


def test_incorrect_bf16_units_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    claim(monkeypatch, amx=True)
    exact = torch.Tensor.bfloat16
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda self: exact(self) * 1.1)
    assert default_compute_dtype("cpu") == torch.float32


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), torch.float32), ((8, 0), torch.bfloat16)])
def test_bf16_on_cuda_from_sm80(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], expected: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert default_compute_dtype("cuda") == expected


def test_fp32_on_other_devices() -> None:
    assert default_compute_dtype("meta") == torch.float32
