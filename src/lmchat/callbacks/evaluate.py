"""Runs the evaluators in training and logs their metrics."""

import json
from functools import partial
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn

from lmchat.callbacks.save_config import run_log_dir
from lmchat.checkpoint.rng import capture_rng, restore_rng
from lmchat.evaluation.evaluator import Evaluator
from lmchat.option_checks import check_count
from lmchat.progress import print_line
from lmchat.strategies.lightning_internals import run_validation
from lmchat.strategies.zero2_muon import reduce_numbers

INTERVALS_FILE = "intervals.jsonl"


class Evaluate(Callback):
    """Runs the evaluators of the data at step 0, every ``every_n_steps`` optimizer steps and at the end.

    An evaluator may set its own interval. A run that was killed in an evaluation repeats it when it is resumed.
    ``lmchat validate`` runs all evaluators once. Metrics are logged under ``val/``, their 95 % intervals are written to
    ``intervals.jsonl`` in the folder of the logs.

    Args:
        every_n_steps: optimizer steps between evaluations; 0 evaluates only at the start and at the end.
        at_start: evaluate before the first step of a run that is not resumed.
        at_end: evaluate after the last step.
    """

    def __init__(self, every_n_steps: int = 250, at_start: bool = True, at_end: bool = True) -> None:
        check_count("eval", 0, every_n_steps=every_n_steps)
        self.every_n_steps = every_n_steps
        self.at_start = at_start
        self.at_end = at_end
        self._last_evaluated_step: int | None = None
        self._unfinished = False

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        self._last_evaluated_step = None
        trainer.datamodule.is_due = partial(self.is_due, trainer)  # type: ignore[attr-defined]

    def is_due(self, trainer: L.Trainer, evaluator: Evaluator) -> bool:
        """Whether the validation loop at the current step runs the evaluator."""
        if trainer.state.fn != TrainerFn.FITTING:
            return True
        step, every = trainer.global_step, evaluator.every_n_steps
        every = self.every_n_steps if every is None else every
        return evaluator.at_start if step == 0 else step == trainer.max_steps or (every > 0 and step % every == 0)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        done = self._last_evaluated_step == trainer.global_step
        checkpoint["evaluated"] = done or not self._any_is_due(trainer)

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        self._unfinished = not checkpoint.get("evaluated", True)

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if self.at_start if trainer.global_step == 0 else self._unfinished and self._any_is_due(trainer):
            rng = capture_rng()  # every loader draws a seed; after later steps `StepCheckpoint` restores the RNG state
            run_validation(trainer)
            restore_rng(rng)

    def _any_is_due(self, trainer: L.Trainer) -> bool:
        evaluators = trainer.datamodule.evaluators  # type: ignore[attr-defined]
        return trainer.enable_validation and any(self.is_due(trainer, each) for each in evaluators)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        evaluators = trainer.datamodule.evaluators  # type: ignore[attr-defined]
        due = [evaluator for evaluator in evaluators if self.is_due(trainer, evaluator)]
        if not due:
            return
        failures = reduce_numbers(trainer, torch.tensor([evaluator.failure is not None for evaluator in due]).long())
        intervals: dict[str, tuple[float, float]] = {}
        shown: list[str] = []
        for evaluator, failed in zip(due, failures.tolist(), strict=True):
            metrics = evaluator.compute()  # also after a failure: it reduces over all ranks and resets the metrics
            evaluator.failure = None
            if failed:
                continue
            intervals |= {f"val/{name}": interval for name, interval in evaluator.intervals.items()}
            for name, value in metrics.items():
                # As a float64 tensor: Lightning would round a Python float to float32.
                pl_module.log(f"val/{name}", torch.as_tensor(value, dtype=torch.float64))
                if not name.startswith("core/"):  # CORE's tasks would be 22 more
                    shown.append(f"{name} {float(value):.4f}")
        # Otherwise Lightning logs an evaluation after step n at n − 1, but at n at the start and the end.
        pl_module.log("step", float(trainer.global_step))
        if trainer.is_global_zero and shown and trainer.state.fn == TrainerFn.FITTING:
            print_line(f"step {trainer.global_step}/{trainer.max_steps} | held out: {' | '.join(shown)}")
        if trainer.is_global_zero and intervals:
            with (run_log_dir(trainer, pl_module) / INTERVALS_FILE).open("a") as file:
                file.write(json.dumps({"step": trainer.global_step, "intervals": intervals}) + "\n")

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._last_evaluated_step = trainer.global_step

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        complete = trainer.global_step >= trainer.max_steps
        if self.at_end and complete and self._last_evaluated_step != trainer.global_step:
            run_validation(trainer)

    def on_fit_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        # Nothing was left to train, so that the hooks of training were not called.
        if self._unfinished and self._last_evaluated_step is None:
            pl_module.to(trainer.strategy.root_device)  # Lightning has moved it to the CPU
            self.on_train_end(trainer, pl_module)
            trainer.strategy.checkpoint_io.teardown()  # waits until the checkpoint is marked
