"""Saves checkpoints from which a resumed run equals an uninterrupted one bit for bit.

Checkpoints are taken at step boundaries: after the micro-batch that completes an optimizer step. Weights and optimizer
do not change until the next step, so a boundary can be saved later, if the small state that does change is copied at
the boundary: data position, RNG state. Ctrl-C, SIGTERM, an out-of-memory error or a failed evaluation therefore leave a
checkpoint of the last complete step, also in the middle of gradient accumulation.

Requirements:

- The DataModule's ``state_dict`` is the position after the last *consumed* batch. Lightning prefetches one batch, so
  the state is part of the batch and is recorded in ``on_before_batch_transfer`` or ``training_step``. The loader must
  not have a ``state_dict`` of its own.
- ``train_dataloader`` is called after ``load_state_dict`` and continues from its state. The loader is endless: epochs
  are part of its state, and Lightning's epoch stays 0 (``max_epochs=-1``).
- Evaluation runs in Lightning's validation loop, after the save of the same step; the RNG state is restored afterwards.
  The loggers are then saved and the checkpoint is marked, so that a resumed run repeats only an incomplete evaluation.
- Nothing depends on the time, and the loss depends on no other state of the module.

A run may be resumed with another number of micro-batches per step. Lightning counts micro-batches, so its counters are
computed from the step; a loader with a length counts the whole run in the new micro-batches.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from lmchat.callbacks.non_finite_guard import Diverged
from lmchat.callbacks.step import StepCallback
from lmchat.checkpoint.attempt import Attempt, watch_attempt
from lmchat.checkpoint.layout import CheckpointPaths, checkpoint_dir, committed_steps
from lmchat.checkpoint.load import DamagedCheckpoint, open_checkpoint
from lmchat.checkpoint.rng import capture_rng, restore_rng
from lmchat.checkpoint.writer import (
    INTERRUPTED_PEER_TIMEOUT_SECONDS,
    await_commit,
    check_writable,
    mark_evaluated,
    prune,
    run_lock,
    snapshot,
)
from lmchat.option_checks import check_count, damaged_position
from lmchat.paths import expand_user
from lmchat.strategies.checkpoint_io import LMChatCheckpointIO
from lmchat.strategies.lightning_internals import checkpoint_dict, fit_loop_state, is_between_batches
from lmchat.strategies.zero2_muon import LeftBeforeStep
from lmchat.types import UserError


@dataclass(frozen=True)
class _Boundary:
    """Copy of the state that changes between optimizer steps, taken right after one."""

    step: int
    micro_batches: int
    state: dict[str, Any]
    """The DataModule's state, by its key in Lightning's checkpoints, and ``rng``."""


class StepCheckpoint(StepCallback, Checkpoint):
    """Saves every ``every_n_steps`` optimizer steps, at the end, and when training is interrupted.

    Each step is saved at most once, before its evaluation.

    Args:
        dirpath: folder of the checkpoints; null is ``<stage's folder>/<tag>`` under ``$LMCHAT_BASE_DIR``, for
            pretraining ``base_checkpoints/<tag>``.
        every_n_steps: optimizer steps between checkpoints; null saves at the end only.
        keep_last: complete checkpoints to keep; null keeps all.
    """

    def __init__(
        self, dirpath: str | None = None, every_n_steps: int | None = None, keep_last: int | None = None
    ) -> None:
        check_count("checkpoint", 1, every_n_steps=every_n_steps, keep_last=keep_last)
        self.dirpath = dirpath
        self.every_n_steps = every_n_steps
        self.keep_last = keep_last
        self._held = ExitStack()  # the lock on the folder, and the watch of the attempt
        self._boundary: _Boundary | None = None
        self._saved_step = 0
        self._stepping = False
        self._rng_to_restore: dict[str, Any] | None = None

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        if not isinstance(trainer.strategy.checkpoint_io, LMChatCheckpointIO):
            trainer.strategy.checkpoint_io = LMChatCheckpointIO()
        self._io: LMChatCheckpointIO = trainer.strategy.checkpoint_io
        if stage != "fit":
            return
        self.directory = expand_user(self.dirpath) if self.dirpath else checkpoint_dir(pl_module.stage, pl_module.tag)
        self._io.attempt = Attempt(self.directory, _on_rank_zero(trainer, self._lock))
        self._held.callback(watch_attempt(self._io.attempt).set)
        if self._io.rank > 0:  # fail now, not at the first save
            check_writable(self.directory, self._io.rank)

    def _lock(self) -> str:
        """Locks the folder; returns the name of the attempt."""
        return self._held.enter_context(run_lock(self.directory)).name

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        self._rng_to_restore = checkpoint.get("rng")
        if trainer.state.fn == TrainerFn.FITTING:
            self._saved_step = checkpoint["global_step"]
            checkpoint["loops"] = {"fit_loop": fit_loop_state(trainer, self._saved_step)}
            if (data := type(trainer.datamodule).__qualname__) not in checkpoint:  # type: ignore[attr-defined]
                raise damaged_position(f"there is none for {data}")

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        super().on_train_start(trainer, pl_module)
        self._saved_step = trainer.global_step
        self._boundary = None
        _on_rank_zero(trainer, lambda: _refuse_later_checkpoints(self.directory, trainer.global_step))

    def on_train_batch_start(self, *_: Any) -> None:
        if self._rng_to_restore is not None:
            restore_rng(self._rng_to_restore)
            self._rng_to_restore = None

    def on_before_optimizer_step(self, *_: Any) -> None:
        self._stepping = True

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        self._io.writer.check()
        super().on_train_batch_end(trainer, pl_module)

    def on_step_end(self, trainer: L.Trainer, pl_module: Any, step: int) -> None:
        self._mark_boundary(trainer)
        due = self.every_n_steps is not None and step % self.every_n_steps == 0
        if due or step == trainer.max_steps or trainer.should_stop:
            _save_loggers(trainer)
            self._save(trainer)

    def _mark_boundary(self, trainer: L.Trainer) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        state = {**snapshot({type(data).__qualname__: data.state_dict()}), "rng": capture_rng()}
        self._boundary = _Boundary(trainer.global_step, trainer.fit_loop.total_batch_idx, state)
        self._stepping = False

    def on_validation_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            return
        if trainer.is_global_zero and self._saved_step == trainer.global_step > 0:
            _save_loggers(trainer)
            paths = CheckpointPaths(self.directory, trainer.global_step)
            self._io.writer.start(mark_evaluated, paths, self._io.attempt)
        boundary = self._boundary
        if boundary is not None and boundary.micro_batches == trainer.fit_loop.total_batch_idx:
            restore_rng(boundary.state["rng"])

    def on_train_end(self, trainer: L.Trainer, *_: Any) -> None:
        self._save(trainer)

    def on_fit_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        # Nothing was left to train; the run may have been killed before it deleted what its last checkpoint replaced.
        if self._boundary is None:
            self._prune(trainer, trainer.global_step)
            self._io.writer.wait()

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        # Called before Lightning does, since ranks that wait for this one have to save too.
        trainer.strategy.on_exception(exception)
        try:
            if self._boundary is not None or self._stepping:
                self._save_interrupted(trainer, exception)
        finally:
            self._held.close()

    def _save_interrupted(self, trainer: L.Trainer, exception: BaseException) -> None:
        if isinstance(exception, LeftBeforeStep):
            self._stepping = False
        if self._stepping and is_between_batches(trainer) and not isinstance(exception, Diverged):
            self._mark_boundary(trainer)  # the step is complete; an earlier callback failed
        self._io.peer_timeout_seconds = INTERRUPTED_PEER_TIMEOUT_SECONDS
        try:
            if not self._stepping:
                self._save(trainer)
            self._io.writer.wait()  # also for an earlier step that is still being written
            if not trainer.is_global_zero and self._saved_step:
                # A rank that exits with an error makes the launcher kill the others.
                await_commit(CheckpointPaths(self.directory, self._saved_step), INTERRUPTED_PEER_TIMEOUT_SECONDS)
        # A second error must not hide the one that ended training.
        except Exception as error:
            rank_zero_warn(f"could not save step {trainer.global_step}: {error}")
        remedy = f"there is no checkpoint in {self.directory}"
        if steps := committed_steps(self.directory):
            remedy = f"resume with --ckpt_path {CheckpointPaths(self.directory, steps[-1]).meta}"
        rank_zero_info(f"interrupted at step {trainer.global_step}; {remedy}")

    def teardown(self, *_: Any, **__: Any) -> None:
        self._held.close()

    def _save(self, trainer: L.Trainer) -> None:
        boundary = self._boundary
        if boundary is None or boundary.step == self._saved_step:
            return
        path = CheckpointPaths(self.directory, boundary.step).model
        trainer.strategy.save_checkpoint(checkpoint_dict(trainer), path)
        self._saved_step = boundary.step
        self._prune(trainer, boundary.step)

    def _prune(self, trainer: L.Trainer, step: int) -> None:
        if self.keep_last is not None and trainer.is_global_zero:
            self._io.writer.start(prune, CheckpointPaths(self.directory, step), self.keep_last, self._io.attempt)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        boundary = self._boundary
        if boundary is None:
            raise UserError("cannot save a checkpoint before the first optimizer step; save after one")
        checkpoint |= boundary.state
        checkpoint["meta"] = {**pl_module.checkpoint_meta(), "evaluated": checkpoint.pop("evaluated", True)}


def _save_loggers(trainer: L.Trainer) -> None:
    """Writes what has been logged; a run that is killed and resumed from a checkpoint does not log it again."""
    for logger in trainer.loggers:
        logger.save()


def _on_rank_zero(trainer: L.Trainer, function: Callable[[], str | None]) -> Any:
    """Runs ``function`` on rank 0 and returns its result on every rank, where its `UserError` is raised too."""
    result, problem = None, None
    if trainer.is_global_zero:
        try:
            result = function()
        except UserError as error:
            problem = str(error)
    result, problem = trainer.strategy.broadcast((result, problem))
    if problem is not None:
        raise UserError(problem)
    return result


def _refuse_later_checkpoints(directory: Path, step: int) -> None:
    """Raises UserError if the folder has checkpoints of later steps: its newest checkpoint must be the run's last."""
    later = [other for other in committed_steps(directory) if other > step]
    for other in reversed(later):
        try:
            open_checkpoint(CheckpointPaths(directory, other))
        except DamagedCheckpoint:
            continue  # will be written again
        raise UserError(
            f"{directory} has a checkpoint of step {other}, but this run starts at step {step}; resume it with "
            "--ckpt_path last, or move it away, or choose another folder with --model.tag or --checkpoint.dirpath"
        )
