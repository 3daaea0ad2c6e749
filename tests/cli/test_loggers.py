"""A run whose log folder is removed warns once and continues."""

from __future__ import annotations

import csv
import shutil
import threading
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lmchat.__main__ import main
from tiny_fit import config_options

OWN = """
trainer: {max_steps: 6, callbacks: [{class_path: faults.RemoveLogs}]}
model: {init_args: {tag: tiny}}
monitor: {every_n_steps: 1}
eval: {every_n_steps: 2}
samples: {max_new_tokens: 2, prompts: [a]}
"""


def test_training_continues_if_its_log_folder_is_removed(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    monkeypatch.setenv("LMCHAT_BASE_DIR", str(base))

    class RemoveLogs(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.global_step == 3:
                shutil.rmtree(base / "logs", ignore_errors=True)

    monkeypatch.setattr("faults.RemoveLogs", RemoveLogs, raising=False)
    failed: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", failed.append)
    assert main(["fit", *config_options(base, OWN)]) == 0
    assert not failed
    assert len({str(each.message) for each in recwarn if "was removed" in str(each.message)}) <= 2

    folder = base / "logs" / "pretrain" / "tiny" / "version_0"
    with (folder / "csv" / "metrics.csv").open() as file:
        steps = [int(row["step"]) for row in csv.DictReader(file) if row["train/loss"]]
    assert steps[-3:] == [4, 5, 6]
    events = EventAccumulator(str(folder)).Reload()
    assert [event.step for event in events.Scalars("train/loss")][-3:] == [4, 5, 6]
