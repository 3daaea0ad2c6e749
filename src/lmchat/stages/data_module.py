"""Base class of the stages' DataModules: spec of the stage, data position, evaluators."""

import sys
from collections.abc import Callable, Mapping
from typing import Any, Literal

import lightning as L
import torch
from torch.utils.data import DataLoader, IterableDataset

from lmchat.evaluation.evaluator import EvalBatch, Evaluator, EvaluatorBatches
from lmchat.option_checks import check_count, damaged_position
from lmchat.run_plan import RunPlan, accumulation_steps
from lmchat.stages.spec import StageSpec
from lmchat.types import UserError


class StageDataModule(L.LightningDataModule):
    """Micro-batches for training, and evaluators.

    Args:
        micro_batch_size: rows per micro-batch and rank; null takes that of the checkpoint the stage starts from, "auto"
            the largest that fits the device's memory. The global batch does not depend on it.

    Attributes:
        spec: settings of the stage; must be set before the trainer runs, as ``lmchat fit`` does.
        chooses_micro_batch: whether the run's plan must set `own_micro_batch_size`.
        own_micro_batch_size: ``micro_batch_size`` if it is a number, or the run's choice for "auto".
        evaluators: evaluators of the run, in order; complete after `setup`. Callbacks may add their own.
        position: state of the data after the last micro-batch that was trained on.
        max_steps: optimizer steps that the data lasts; None is unlimited. Known after `setup`.
        is_due: whether the validation loop runs an evaluator now; set by `Evaluate`.
        mask_documents: whether the batches have ``document_starts``.
    """

    spec: StageSpec
    trainer: L.Trainer
    mask_documents: bool = False

    def __init__(self, micro_batch_size: int | Literal["auto"] | None) -> None:
        super().__init__()
        self.chooses_micro_batch = micro_batch_size == "auto"
        self.own_micro_batch_size = None if micro_batch_size == "auto" else micro_batch_size
        check_count("data", 1, micro_batch_size=self.own_micro_batch_size)
        self.evaluators: list[Evaluator] = []
        self.position: dict[str, Any] | None = None
        self.max_steps: int | None = None
        self.is_due: Callable[[Evaluator], bool] = lambda evaluator: True

    @property
    def micro_batch_size(self) -> int:
        """Rows per micro-batch and rank. Raises UserError if neither the user nor a checkpoint gives it."""
        size = self.own_micro_batch_size or self.spec.micro_batch_size
        if size is None:
            raise UserError(
                "the micro-batch size is neither set nor known from a checkpoint; give --data.micro_batch_size 16"
            )
        return size

    def max_micro_batch_size(self, world_size: int) -> int:
        """Maximum rows of an automatic micro-batch, whatever the memory."""
        return sys.maxsize

    def micro_batches_per_step(self, global_batch_tokens: int | None, world_size: int) -> int:
        """Micro-batches per rank and optimizer step. Raises UserError if they cannot fill the global batch."""
        if global_batch_tokens is None:
            raise UserError("no global batch is set; give --model.global_batch_tokens, e.g. 524288")
        return accumulation_steps(global_batch_tokens, self.micro_batch_size, self.spec.sequence_len, world_size)

    def describe_step(self, plan: RunPlan, world_size: int) -> str:
        """Description of an optimizer step, for the log."""
        return (
            f"{plan.global_batch_tokens:,} tokens ({plan.micro_batch_size} rows × {self.spec.sequence_len} × "
            f"{plan.accumulate_grad_batches} micro-batches × {world_size} rank(s))"
        )

    def step_tokens(self, plan: RunPlan) -> int:
        """Tokens of the last optimizer step, over all ranks."""
        assert plan.global_batch_tokens is not None
        return plan.global_batch_tokens

    def progress(self) -> Mapping[str, float]:
        """Position of the last consumed batch, for the log: epoch and shard, counted from 0."""
        return {name: self.position[name] for name in ("epoch", "shard")} if self.position else {}

    def loader(self, batches: IterableDataset[Any]) -> DataLoader:
        """Wraps ``batches`` for Lightning; pinned for a GPU, so that the copy does not block the CPU."""
        on_gpu = self.trainer.strategy.root_device.type == "cuda"
        return DataLoader(batches, batch_size=None, pin_memory=on_gpu)

    def val_dataloader(self) -> list[DataLoader]:
        rank, world_size = self.trainer.global_rank, self.trainer.world_size
        return [self.loader(EvaluatorBatches(each, rank, world_size, self.is_due)) for each in self.evaluators]

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        # Called when a batch is consumed. Loaders prefetch, so their own position is ahead.
        if self.trainer is not None and self.trainer.training:
            self.position = batch.pop("state")
        return batch

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Copies a batch to the device; from pinned memory the CPU does not wait for it."""
        if isinstance(batch, EvalBatch):
            data = self.transfer_batch_to_device(batch.data, device, dataloader_idx)
            return EvalBatch(batch.evaluator, data)
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        position = state_dict.get("position") if isinstance(state_dict, dict) else None
        if not isinstance(position, dict):
            raise damaged_position("it is not a mapping")
        self.position = position
