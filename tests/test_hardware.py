"""The peak that utilisation is measured against belongs to the card at hand, not to one whose name its own contains."""

from __future__ import annotations

import pytest
import torch

from lmchat.hardware import DENSE_BF16_PEAK, peak_flops


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


def test_a_cpu_has_no_peak() -> None:
    assert peak_flops(torch.device("cpu")) is None
