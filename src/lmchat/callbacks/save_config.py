"""Saves the settings and the origin of a run beside its logs."""

import os
from pathlib import Path
from typing import Any

import lightning as L
import torch
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from lmchat.callbacks.step import StepCallback
from lmchat.files import naming_errors, write_json
from lmchat.paths import log_dir
from lmchat.provenance import provenance
from lmchat.stage_table import STAGES
from lmchat.stages.base import StageModule

RUN_FILE = "run.json"


def run_log_dir(trainer: L.Trainer, module: StageModule) -> Path:
    """The log folder of this start of the run, created if missing: the first logger's, or ``logs/<stage>/<tag>``.

    Without such a logger, Lightning would write to the current folder and overwrite files there.
    """
    folder = log_dir(STAGES[module.stage].logs, module.tag)
    if isinstance(trainer.logger, TensorBoardLogger | CSVLogger):
        folder = Path(trainer.logger.log_dir)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


class SaveConfig(SaveConfigCallback, StepCallback):
    """Writes every setting of a run to ``config.yaml``, and after its first step its `provenance` to ``run.json``."""

    def __init__(self, parser: LightningArgumentParser, config: Namespace) -> None:
        super().__init__(parser, config, overwrite=True, save_to_log_dir=False)

    def save_config(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        path = run_log_dir(trainer, pl_module) / self.config_filename
        with naming_errors(path):
            # The command line has validated it. One file: jsonargparse changes the current folder to write several,
            # while threads of the run open relative paths.
            self.parser.save(
                self.config, path, skip_unset=False, skip_validation=True, overwrite=self.overwrite, multifile=False
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        super().on_train_start(trainer, pl_module)
        self._first_step = trainer.global_step + 1

    def on_step_end(self, trainer: L.Trainer, pl_module: Any, step: int) -> None:
        if step != self._first_step or not trainer.is_global_zero:
            return
        device = pl_module.device
        record = {
            **provenance(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "ranks": trainer.world_size,
            "seed": os.environ.get("PL_GLOBAL_SEED"),
            "data": (trainer.datamodule.position or {}).get("data"),  # type: ignore[attr-defined]
            "first_step": step,
        }
        write_json(run_log_dir(trainer, pl_module) / RUN_FILE, record)
