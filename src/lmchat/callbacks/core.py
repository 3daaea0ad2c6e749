"""CORE during training."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lmchat.callbacks.checkpoint import StepCheckpoint
from lmchat.evaluation.core import read_bundle
from lmchat.evaluation.core_evaluator import CoreEvaluator
from lmchat.evaluation.named import summary
from lmchat.evaluation.results import read_results, results_file, write_results
from lmchat.model.gpt import ROTARY_ROWS
from lmchat.option_checks import check_count
from lmchat.paths import eval_bundle_dir, expand_user
from lmchat.types import UserError


class Core(Callback):
    """Evaluates CORE every ``every_n_steps`` optimizer steps and at the end, after the checkpoint of that step.

    Off unless ``bundle`` or ``every_n_steps`` is given. Logged as ``val/core`` and ``val/core/TASK``, and written to
    ``eval_STEP.json`` in the folder of the checkpoints.

    Args:
        bundle: folder or zip file of the evaluation bundle; null is ``$LMCHAT_BASE_DIR/eval_bundle``, where
            ``lmchat data download --eval_bundle true`` puts it.
        every_n_steps: optimizer steps between evaluations; null is at the end only.
        max_per_task: maximum number of examples of a task; null is all of them.
    """

    def __init__(
        self, bundle: str | None = None, every_n_steps: int | None = None, max_per_task: int | None = 500
    ) -> None:
        check_count("core", 1, every_n_steps=every_n_steps, max_per_task=max_per_task)
        self.enabled = bundle is not None or every_n_steps is not None
        self.bundle = bundle
        self.every_n_steps = every_n_steps
        self.max_per_task = max_per_task
        self._evaluator: CoreEvaluator | None = None

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        if not self.enabled:
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        self._evaluator = CoreEvaluator(
            read_bundle(expand_user(self.bundle) if self.bundle else eval_bundle_dir()),
            data.spec.tokenizer,
            max_tokens=ROTARY_ROWS * data.spec.sequence_len,
            max_per_task=self.max_per_task,
            every_n_steps=self.every_n_steps or 0,
            device=trainer.strategy.root_device,
        )
        data.evaluators.append(self._evaluator)

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        evaluator = self._evaluator
        if evaluator is None or not evaluator.results or trainer.state.fn != TrainerFn.FITTING:
            return
        results, evaluator.results = evaluator.results, {}
        if not trainer.is_global_zero:
            return
        try:
            (checkpoints,) = (each for each in trainer.checkpoint_callbacks if isinstance(each, StepCheckpoint))
            path = results_file(checkpoints.directory, trainer.global_step)
            settings = {task.name: evaluator.settings(number) for number, task in enumerate(evaluator.tasks)}
            mean = summary(results)
            written = {name: settings[name] | results[name] for name in results}
            write_results(path, read_results(path) | written | ({"CORE": mean} if mean else {}))
        except (UserError, OSError) as error:
            rank_zero_warn(f"the results of CORE are in the logs only: {error}")
