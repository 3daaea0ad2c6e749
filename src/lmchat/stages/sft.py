"""Supervised fine-tuning: one epoch over a mixture of conversations, with a loss on what the assistant says."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch.utils.data import DataLoader

import lmchat.tasks  # noqa: F401  (makes every task known by its short class name)
from lmchat.data.conversations import RenderedConversations, render_all
from lmchat.data.fingerprint import fingerprint
from lmchat.data.mixture import Mixture, MixturePart
from lmchat.data.padded import PaddedBatches, PaddedPlan
from lmchat.evaluation.chat_tasks import Questions
from lmchat.option_checks import check_count, check_range
from lmchat.paths import base_dir
from lmchat.schedules import muon_momentum, sft_lr_multiplier
from lmchat.stages.base import Schedule
from lmchat.stages.chat import ChatDataModule, ChatModule, sum_over_step
from lmchat.tasks.base import Task
from lmchat.types import Batch, UserError


class SFTModule(ChatModule):
    """Next-token prediction on conversations; judged by bits per byte of the assistant's text and by tasks.

    Args:
        constant_until: share of the epoch after which the learning rate falls linearly to 0.
    """

    stage: ClassVar[str] = "sft"

    def __init__(self, constant_until: float = 0.8, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_range("model", 1, constant_until=constant_until)
        self.constant_until = constant_until

    def schedule(self, step: int) -> Schedule:
        return Schedule(
            lr_multiplier=sft_lr_multiplier(step / self.total_steps, self.constant_until),
            momentum=muon_momentum(step),
            weight_decay=self.weight_decay,
        )

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        loss_sum = self.net.loss(batch["inputs"], batch["targets"], reduction="sum")
        loss = sum_over_step(loss_sum, batch["loss_tokens"], self)
        self.track_loss(loss)
        return loss

    def validation_step(self, batch: Batch | Questions, batch_idx: int, dataloader_idx: int = 0) -> None:
        if isinstance(batch, Questions):
            self.log_accuracy(batch)
        else:
            self.log_bits_per_byte(batch)


class SFTDataModule(ChatDataModule):
    """A mixture of tasks → rendered conversations → padded rows, planned for the whole epoch.

    The number of steps follows from the plan; a smaller ``trainer.max_steps`` ends the epoch early.

    Args:
        train: the mixture, each task with its number of epochs.
        val: held-out conversations for the bits per byte.
        eval_tasks: tasks whose questions are asked in evaluation; slice them with their ``stop``.
        micro_batch_size: rows per micro-batch and rank; null takes that of the checkpoint the stage starts from.
        eval_tokens: tokens per evaluation of the bits per byte, over all ranks, rounded up to as many micro-batches
            for each, padding included.
        eval_batch_size: questions answered together.
        eval_max_new_tokens: longest answer to them.
        shuffle_seed: seed of the mixture's order.
    """

    def __init__(
        self,
        train: list[MixturePart],
        val: list[MixturePart],
        eval_tasks: list[Task] | None = None,
        micro_batch_size: int | None = None,
        eval_tokens: int = 20 * 524288,
        eval_batch_size: int = 32,
        eval_max_new_tokens: int = 256,
        shuffle_seed: int = 42,
    ) -> None:
        super().__init__(micro_batch_size, eval_tasks, eval_batch_size, eval_max_new_tokens)
        check_count("data", 1, eval_tokens=eval_tokens)
        self.mixtures = {"train": Mixture(train, shuffle_seed), "val": Mixture(val, shuffle_seed)}
        self.eval_tokens = eval_tokens

    def _folder(self, split: str) -> Path:
        return base_dir() / "rendered" / self.module.tag / split

    def prepare_data(self) -> None:
        module = self.module
        splits = self.mixtures if self.run.state.fn == "fit" else ("val",)
        for split in splits:
            mixture = self.mixtures[split]
            folder = self._folder(split)
            report = render_all(mixture, module.tokenizer, module.sequence_len, folder, title=f"Rendering {split}")
            parts = ", ".join(f"{name} {count:,}" for name, count in mixture.counts().items())
            print(f"{split}: {parts}; {report}", flush=True)

    def setup(self, stage: str) -> None:
        self.val_plan = self._plan("val")
        if stage == "fit":
            self.train_plan = self._plan("train")
            loop = self.run.fit_loop.epoch_loop
            loop.max_steps = min(loop.max_steps, self.train_plan.steps) if loop.max_steps > 0 else self.train_plan.steps

    def _plan(self, split: str) -> PaddedPlan:
        module = self.module
        tokens = module.global_batch_tokens
        assert tokens is not None, "a checkpoint names the global batch"
        rows, rest = divmod(tokens, module.sequence_len)
        if rest or not rows:
            raise UserError(
                f"global_batch_tokens {tokens} is not a multiple of sequence_len {module.sequence_len}; "
                f"use --model.global_batch_tokens {max(1, rows) * module.sequence_len}"
            )
        return PaddedPlan(RenderedConversations(self._folder(split)), module.sequence_len, rows)

    def _batches(self, plan: PaddedPlan, **kwargs: Any) -> PaddedBatches:
        return PaddedBatches(
            plan,
            bos_id=self.module.tokenizer.bos_id,
            micro_batch_size=self.micro_batch_size,
            rank=self.run.global_rank,
            world_size=self.run.world_size,
            **kwargs,
        )

    def train_dataloader(self) -> DataLoader:
        plan = self.train_plan
        data = fingerprint(
            self.mixtures["train"], plan.conversations.checksums, **{"rows per step": plan.rows_per_step}
        )
        return self.loader(self._batches(plan, fingerprint=data, state=self.position))

    def val_dataloader(self) -> list[DataLoader]:
        round_rows = self.micro_batch_size * self.run.world_size
        rows = min(len(self.val_plan.rows), self.eval_tokens // self.module.sequence_len)
        return [
            self.loader(self._batches(self.val_plan, rounds=max(1, -(-rows // round_rows)))),
            self.questions(self.eval_tasks),
        ]

    def progress(self) -> dict[str, float]:
        return {"epoch": round(self.position["epoch"], 3)} if self.position else {}
