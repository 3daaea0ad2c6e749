"""When to save, and what makes a resumed run repeat the unbroken one bit for bit.

State is saved as of a step boundary: the end of the micro-batch after which the optimizer has stepped. Weights and
optimizer do not change until the next optimizer step begins, so the boundary can still be saved long after it, as long
as the small things that do move on are kept: loop counters, data position, random numbers. They are copied at every
boundary. That is why Ctrl-C, SIGTERM, an out-of-memory error or a failed evaluation leave a checkpoint of the last
full step, also in the middle of an accumulation.

What this asks of the rest:

- The DataModule's ``state_dict`` gives the position after the last *consumed* batch. Lightning reads one batch ahead,
  so the state travels in the batch and is recorded in ``on_before_batch_transfer`` or ``training_step``. The loader
  object itself must not be the one that Lightning asks for state.
- ``train_dataloader`` starts from what ``load_state_dict`` was given; it is called after it. The loader has no end of
  its own: epochs are part of its state, and Lightning's epoch stays 0 (``max_epochs=-1``).
- Evaluation runs in Lightning's validation loop, after the save of the same step. The RNG state is restored afterwards.
  A run resumed from that save does not repeat the evaluation of the step.
- Nothing is decided from the time of day, and no other state of the module enters the loss.

A run may be resumed with another number of micro-batches per step. Lightning's counters are in micro-batches, so they
are rewritten from the step; the loader's length, where it has one, is that of the whole run in today's micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from lmchat.callbacks.step import StepCallback
from lmchat.checkpoint.attempt import Attempt
from lmchat.checkpoint.layout import CheckpointPaths, checkpoint_dir, committed_steps
from lmchat.checkpoint.load import DamagedCheckpoint, open_checkpoint
from lmchat.checkpoint.rng import capture_rng, restore_rng
from lmchat.checkpoint.writer import INTERRUPTED_PEER_TIMEOUT_SECONDS, RunLock, await_commit, check_writable, snapshot
from lmchat.option_checks import check_count
from lmchat.paths import expand_user
from lmchat.strategies.checkpoint_io import LMChatCheckpointIO
from lmchat.strategies.lightning_internals import checkpoint_dict, is_between_batches, set_batch_progress
from lmchat.strategies.zero2_muon import LeftBeforeStep
from lmchat.types import UserError


@dataclass(frozen=True)
class _Boundary:
    """State that changes between optimizer steps, as it was right after one."""

    step: int
    micro_batches: int
    fit_loop: dict[str, Any]
    data: dict[str, Any]
    rng: dict[str, Any]

    @classmethod
    def now(cls, trainer: L.Trainer) -> _Boundary:
        fit_loop = trainer.fit_loop.state_dict()
        # The loader's own state is one batch ahead; the DataModule's is not.
        fit_loop["state_dict"].pop("combined_loader", None)
        return cls(
            step=trainer.global_step,
            micro_batches=trainer.fit_loop.total_batch_idx,
            fit_loop=fit_loop,
            data=snapshot(_data_state(trainer)),
            rng=capture_rng(),
        )


def _data_state(trainer: L.Trainer) -> dict[str, Any]:
    """By the name under which Lightning keeps the DataModule's state in a checkpoint."""
    data = trainer.datamodule  # type: ignore[attr-defined]
    return {} if data is None else {type(data).__qualname__: data.state_dict()}


class StepCheckpoint(StepCallback, Checkpoint):
    """Saves every ``every_n_steps`` optimizer steps, at the end, and when training is interrupted.

    A step is saved before it is evaluated, and never twice.

    Args:
        dirpath: folder of the checkpoints; null is ``base_checkpoints/<tag>`` under ``$LMCHAT_BASE_DIR`` (or the
            stage's own folder).
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
        self._lock: RunLock | None = None
        self._boundary: _Boundary | None = None
        self._saved_step = 0
        self._stepping = False
        self._rng_to_restore: dict[str, Any] | None = None

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        if not isinstance(trainer.strategy.checkpoint_io, LMChatCheckpointIO):
            trainer.strategy.checkpoint_io = LMChatCheckpointIO()
        self._io: LMChatCheckpointIO = trainer.strategy.checkpoint_io
        self._io.keep_last = self.keep_last
        if stage != "fit":
            return
        meta = pl_module.checkpoint_meta()
        self.directory = expand_user(self.dirpath) if self.dirpath else checkpoint_dir(meta["stage"], meta["tag"])
        _on_rank_zero(trainer, self._claim_directory)
        name = trainer.strategy.broadcast(self._lock.attempt.name if self._lock is not None else "")
        self._io.attempt = Attempt(self.directory, name)
        if self._io.rank > 0:  # fail now, not at the first save
            check_writable(self.directory, self._io.rank)

    def _claim_directory(self) -> None:
        self._lock = RunLock(self.directory)

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        self._rng_to_restore = checkpoint.get("rng")
        if trainer.state.fn == TrainerFn.FITTING and "loops" in checkpoint:
            # Counters of the same step with this run's number of micro-batches.
            micro_batches = checkpoint["global_step"] * trainer.accumulate_grad_batches
            set_batch_progress(checkpoint["loops"]["fit_loop"], micro_batches)

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
        self._io.check()
        super().on_train_batch_end(trainer, pl_module)

    def on_step_end(self, trainer: L.Trainer, pl_module: Any, step: int) -> None:
        self._mark_boundary(trainer)
        due = self.every_n_steps is not None and step % self.every_n_steps == 0
        if due or step == trainer.max_steps or trainer.should_stop:
            self._save(trainer)

    def _mark_boundary(self, trainer: L.Trainer) -> None:
        self._boundary = _Boundary.now(trainer)
        self._stepping = False

    def on_validation_end(self, trainer: L.Trainer, *_: Any) -> None:
        boundary = self._boundary
        if trainer.state.fn == TrainerFn.FITTING and boundary and self._is_current(boundary, trainer):
            restore_rng(boundary.rng)

    @staticmethod
    def _is_current(boundary: _Boundary, trainer: L.Trainer) -> bool:
        return boundary.micro_batches == trainer.fit_loop.total_batch_idx

    def on_train_end(self, trainer: L.Trainer, *_: Any) -> None:
        self._save(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        # Called now, not later by Lightning: ranks that wait for this one have to save too.
        trainer.strategy.on_exception(exception)
        try:
            if self._boundary is not None or self._stepping:
                self._save_interrupted(trainer, exception)
        finally:
            self._release()

    def _save_interrupted(self, trainer: L.Trainer, exception: BaseException) -> None:
        if isinstance(exception, LeftBeforeStep):
            self._stepping = False
        if self._stepping and is_between_batches(trainer):
            self._mark_boundary(trainer)  # a callback before this one has failed, the step has not
        self._io.peer_timeout_seconds = INTERRUPTED_PEER_TIMEOUT_SECONDS
        try:
            if not self._stepping:
                self._save(trainer)
            self._io.wait()  # also for an earlier step that is still being written
            if not trainer.is_global_zero and self._saved_step:
                # A rank that exits with an error makes the launcher kill the others.
                await_commit(CheckpointPaths(self.directory, self._saved_step), INTERRUPTED_PEER_TIMEOUT_SECONDS)
        # Training has failed already; what else fails must not hide why.
        except Exception as error:
            rank_zero_warn(f"could not save step {trainer.global_step}: {error}")
        steps = committed_steps(self.directory)
        if steps:
            latest = CheckpointPaths(self.directory, steps[-1]).meta
            rank_zero_info(f"interrupted at step {trainer.global_step}; resume with --ckpt_path {latest}")
        else:
            rank_zero_info(f"interrupted at step {trainer.global_step}; there is no checkpoint in {self.directory}")

    def teardown(self, *_: Any, **__: Any) -> None:
        self._release()

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _save(self, trainer: L.Trainer) -> None:
        boundary = self._boundary
        if boundary is None or boundary.step == self._saved_step:
            return
        checkpoint = checkpoint_dict(trainer)
        trainer.strategy.save_checkpoint(checkpoint, CheckpointPaths(self.directory, boundary.step).model)
        self._saved_step = boundary.step

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        boundary = self._boundary
        if boundary is None:
            raise UserError("a checkpoint holds the state after an optimizer step, and none has been taken yet")
        checkpoint["global_step"] = boundary.step
        checkpoint["loops"]["fit_loop"] = boundary.fit_loop
        checkpoint |= boundary.data
        checkpoint["rng"] = boundary.rng
        checkpoint["meta"] = pl_module.checkpoint_meta()


def _on_rank_zero(trainer: L.Trainer, check: Callable[[], None]) -> None:
    """Runs ``check`` on rank 0; a `UserError` there is raised on every rank."""
    problem = None
    if trainer.is_global_zero:
        try:
            check()
        except UserError as error:
            problem = str(error)
    problem = trainer.strategy.broadcast(problem)
    if problem is not None:
        raise UserError(problem)


def _refuse_later_checkpoints(directory: Path, step: int) -> None:
    """Steps only grow within a folder, so that its newest checkpoint is always the run's last."""
    later = [other for other in committed_steps(directory) if other > step]
    for other in reversed(later):
        try:
            open_checkpoint(CheckpointPaths(directory, other))
        except DamagedCheckpoint:
            continue  # will be written again
        raise UserError(
            f"{directory} holds a checkpoint of step {other} and this run starts at step {step}; resume it with "
            "--ckpt_path last, or move it away, or choose another folder with --model.tag or --checkpoint.dirpath"
        )
