"""State restored from a checkpoint must fit the run; otherwise there is one message."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lmchat.stages.pretrain import FineWebDataModule, PretrainModule
from lmchat.types import UserError

STATES: list[Any] = [None, {}, [1], {"position": None}, {"position": 3}, {"row": -1}]


@pytest.mark.parametrize("state", STATES)
def test_a_damaged_position_does_not_restart_the_data(state: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the data position in the checkpoint is damaged"):
        FineWebDataModule(str(tmp_path)).load_state_dict(state)


def test_weights_of_another_model_are_reported(base: Path) -> None:
    module = PretrainModule(depth=1, head_dim=32)
    wrong = {"net.lm_head.weight": torch.ones(2), "net.x\x1b[2J": torch.ones(2)}
    with pytest.raises(UserError, match=r"the model file of step 3 contains 'x.* not have; use an older checkpoint"):
        module.on_load_checkpoint({"state_dict": wrong, "global_step": 3})
