"""What every stage's data module does with a batch."""

from __future__ import annotations

import pytest
import torch

from lmchat.stages.data_module import StageDataModule
from lmchat.types import Batch


def test_a_cpu_takes_batches_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_stream(*_: object) -> None:
        raise AssertionError("a CPU has no streams")

    monkeypatch.setattr(torch.cuda, "stream", no_stream)
    monkeypatch.setattr(torch.cuda, "current_stream", no_stream)
    batch = Batch(inputs=torch.arange(6).view(2, 3), targets=torch.arange(6).view(2, 3))
    moved = StageDataModule(micro_batch_size=2).transfer_batch_to_device(batch, torch.device("cpu"), 0)
    assert moved.keys() == batch.keys()
    assert all(moved[name] is batch[name] for name in ("inputs", "targets"))
