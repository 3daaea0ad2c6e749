"""The evaluation that a kill has cut off, where nothing is left to train."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import nn

from lmchat.callbacks import evaluate


def test_the_last_evaluation_runs_on_the_device_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning moves the module to the CPU before `on_fit_end`; the mark of the checkpoint is waited for."""
    module, order = nn.Linear(2, 2), Mock()
    strategy = SimpleNamespace(root_device=torch.device("meta"), checkpoint_io=order.io)
    trainer: Any = SimpleNamespace(strategy=strategy, global_step=3, max_steps=3)
    monkeypatch.setattr(evaluate, "run_validation", lambda _: order.evaluated(module.weight.device.type))
    callback = evaluate.Evaluate(every_n_steps=0, at_start=False, at_end=True)
    callback.on_load_checkpoint(trainer, module, {"evaluated": True})
    callback.on_fit_end(trainer, module)
    assert not order.mock_calls
    callback.on_load_checkpoint(trainer, module, {"evaluated": False})
    callback.on_fit_end(trainer, module)
    assert [(call[0], call.args) for call in order.mock_calls] == [("evaluated", ("meta",)), ("io.teardown", ())]
