"""Classes of a user whose names resemble those that are refused."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.strategies import DDPStrategy

from lmchat.stages.pretrain import PretrainModule


class ChatModule(PretrainModule):
    """Has the name of a base class."""


class NotebookStrategy(DDPStrategy):
    """Starts its ranks as DDP does."""

    def __init__(self, folder: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.folder = folder
