"""Saves the settings of a run beside its logs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from lmchat.paths import log_dir
from lmchat.stage_table import STAGES


class SaveConfig(SaveConfigCallback):
    """Writes all settings of a run to ``config.yaml`` in the logger's folder, or without one in ``logs/<stage>/<tag>``.

    Lightning would then write to the current folder and overwrite the file there.
    """

    def __init__(self, parser: LightningArgumentParser, config: Namespace) -> None:
        super().__init__(parser, config, overwrite=True, save_to_log_dir=False)

    def save_config(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        folder = log_dir(STAGES[pl_module.stage].logs, pl_module.tag)
        if isinstance(trainer.logger, TensorBoardLogger | CSVLogger):
            folder = Path(trainer.logger.log_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self.parser.save(self.config, folder / self.config_filename, skip_none=False, overwrite=self.overwrite)
