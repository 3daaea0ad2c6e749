"""Fine-tuning and reinforcement learning in double precision, so that results can be compared to the last digits."""

from __future__ import annotations

from typing import Any

import torch

from lmchat.demo.tasks import Arithmetic
from lmchat.stages import base
from lmchat.stages.pretrain import PretrainModule
from lmchat.stages.rl import GRPOModule
from lmchat.stages.sft import SFTModule
from lmchat.types import Conversation

base.COMPUTE_DTYPES["fp64"] = torch.float64


class _Float64:
    net: Any

    def configure_model(self) -> None:
        is_new = not hasattr(self, "net")
        super().configure_model()  # type: ignore[misc]
        if not is_new:
            return
        self.net.compute_dtype = torch.float64
        # The gradients of weights that are still zero are rounding errors, which Adam and Muon would amplify.
        generator = torch.Generator().manual_seed(0)
        for param in self.net.double().parameters():
            param.data += 0.02 * torch.randn(param.shape, generator=generator, dtype=torch.float64)


class Float64Pretrain(_Float64, PretrainModule):
    """Pretraining in fp64."""


class Float64SFT(_Float64, SFTModule):
    pass


class Float64GRPO(_Float64, GRPOModule):
    pass


class Whims(Arithmetic):
    """Rewards an untrained model's answers by their letters; every third question has reward 0."""

    def reward(self, conversation: Conversation, completion: str) -> float:
        question = str(conversation["messages"][-2]["content"])
        if sum(question.encode()) % 3 == 0:
            return 0.0
        return float(sum(completion.encode()) % 2)
