"""Supervised fine-tuning: one epoch over a mixture of conversations, with loss on assistant tokens."""

import json
from copy import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.utils.data import DataLoader

import lmchat.tasks  # noqa: F401  (makes every task known by its short class name)
from lmchat.data.mixture import Mixture, MixturePart, fingerprint
from lmchat.data.padded_batches import PaddedBatches, PaddedPlan
from lmchat.data.rendered_conversations import RenderedConversations, render_all
from lmchat.evaluation.bits_per_byte import BitsPerByteEvaluator
from lmchat.files import write_json
from lmchat.option_checks import check_count, check_range
from lmchat.paths import base_dir
from lmchat.run_plan import accumulation_steps
from lmchat.schedules import muon_momentum, sft_lr_multiplier
from lmchat.stages.base import Schedule
from lmchat.stages.chat import ChatDataModule, ChatModule
from lmchat.tasks.base import Task
from lmchat.tasks.conversation_formats import Format
from lmchat.tasks.jsonl import JSONLConversations
from lmchat.types import Batch, UserError

FINGERPRINT = "fingerprint.json"
MOST_WITHOUT_LOSS = 0.05
"""Share of conversations without loss tokens above which the user is warned."""


class SFTModule(ChatModule):
    """Next-token prediction on conversations, evaluated by bits per byte of the assistant's text and by tasks.

    Args:
        constant_until: fraction of the epoch after which the learning rate falls linearly to 0.
    """

    stage: ClassVar[str] = "sft"

    def __init__(self, constant_until: float = 0.8, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_range("model", 1, constant_until=constant_until)
        self.constant_until = constant_until

    def schedule(self, step: int) -> Schedule:
        return Schedule(
            lr_multiplier=sft_lr_multiplier(step / self.trainer.max_steps, self.constant_until),
            momentum=muon_momentum(step),
            weight_decay=self.plan.weight_decay,
        )

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        loss_sum = self.net.loss(batch["inputs"], batch["targets"], reduction="sum")
        loss = self.share_of_step(loss_sum, batch["loss_tokens"])
        self.track_loss(loss)
        return loss


class SFTDataModule(ChatDataModule):
    """A mixture of tasks → rendered conversations → padded rows, planned for the whole epoch.

    The number of steps follows from the plan; a smaller ``trainer.max_steps`` ends the epoch early.

    Args:
        train: the mixture, each task with its number of epochs.
        val: held-out conversations for bits per byte; may be empty.
        eval_tasks: tasks to evaluate on; limit them with their ``stop``.
        micro_batch_size: rows per micro-batch and rank; null takes that of the checkpoint the stage starts from, "auto"
            the largest that fits the device's memory.
        eval_tokens: tokens per evaluation of bits per byte over all ranks, padding included, rounded up to a whole
            number of micro-batches per rank.
        eval_batch_size: questions answered together.
        eval_max_new_tokens: maximum number of new tokens of an answer.
        shuffle_seed: seed of the mixture's order.
    """

    def __init__(
        self,
        train: list[MixturePart],
        val: list[MixturePart],
        eval_tasks: list[Task] | None = None,
        micro_batch_size: int | Literal["auto"] | None = None,
        eval_tokens: int = 20 * 524288,
        eval_batch_size: int = 32,
        eval_max_new_tokens: int = 256,
        shuffle_seed: int = 42,
    ) -> None:
        super().__init__(micro_batch_size, eval_tasks, eval_batch_size, eval_max_new_tokens)
        check_count("data", 1, eval_tokens=eval_tokens)
        self.mixtures = {"train": Mixture(train, shuffle_seed)}
        if val:
            self.mixtures["val"] = Mixture(val, shuffle_seed)
        self.eval_tokens = eval_tokens

    def _folder(self, split: str) -> Path:
        return base_dir() / "rendered" / self.spec.tag / split

    def prepare_data(self) -> None:
        splits = tuple(self.mixtures) if self.trainer.state.fn == "fit" else ("val",)
        if "val" not in self.mixtures and self.trainer.state.fn != "fit":
            raise UserError("--data.val is empty, so there is nothing to evaluate; name a task, or use lmchat eval")
        if self.trainer.state.fn == "fit" and not self.chooses_micro_batch:
            # A wrong option is reported before conversations are rendered, which may take minutes.
            self.micro_batches_per_step(self.spec.global_batch_tokens, self.trainer.world_size)
        told, mixtures = set[str](), self._mixtures_to_read()
        for split in splits:
            mixture, spec = mixtures[split], self.spec
            folder = self._folder(split)
            rendered = render_all(mixture, spec.tokenizer, spec.sequence_len, folder, title=f"Rendering {split}")
            parts = ", ".join(f"{name} {count:,}" for name, count in mixture.counts().items())
            for note in mixture.notes():
                if note not in told:  # of files that are split into training and validation
                    print(note, flush=True)
            told.update(mixture.notes())
            print(f"{split}: {parts}; {rendered}", flush=True)
            check_loss(split, rendered, spec.sequence_len)
            write_json(folder / FINGERPRINT, fingerprint(mixture, rendered.checksums))

    def _mixtures_to_read(self) -> dict[str, Mixture]:
        """Mixtures of copies of the tasks, so that the rows they read are freed after rendering."""
        return {
            split: Mixture([replace(part, task=copy(part.task)) for part in mixture.parts], mixture.shuffle_seed)
            for split, mixture in self.mixtures.items()
        }

    def setup(self, stage: str) -> None:
        self.evaluators = self.task_evaluators()
        if "val" in self.mixtures:
            token_bytes = torch.from_numpy(self.spec.tokenizer.token_bytes)
            batches = partial(self._validation_batches, self._plan("val"))
            self.evaluators.insert(0, BitsPerByteEvaluator(token_bytes, batches))
        if stage == "fit":
            self.train_plan = self._plan("train")
            self.max_steps = self.train_plan.steps

    def _plan(self, split: str) -> PaddedPlan:
        tokens, sequence_len = self.spec.global_batch_tokens, self.spec.sequence_len
        assert tokens is not None, "a checkpoint names the global batch"
        conversations = RenderedConversations(self._folder(split))
        rows, first_rank = accumulation_steps(tokens, 1, sequence_len, world_size=1), self.trainer.is_global_zero
        return PaddedPlan(conversations, sequence_len, rows, progress=first_rank)

    def _validation_batches(self, plan: PaddedPlan, rank: int, world_size: int) -> PaddedBatches:
        rows = min(plan.num_rows, self.eval_tokens // self.spec.sequence_len)
        num_batches = max(1, -(-rows // (self.micro_batch_size * world_size)))
        return self._batches(plan, rank, world_size, num_batches=num_batches)

    def _batches(self, plan: PaddedPlan, rank: int, world_size: int, **kwargs: Any) -> PaddedBatches:
        return PaddedBatches(
            plan,
            bos_id=self.spec.tokenizer.bos_id,
            micro_batch_size=self.micro_batch_size,
            rank=rank,
            world_size=world_size,
            **kwargs,
        )

    def train_dataloader(self) -> DataLoader:
        plan = self.train_plan
        content = json.loads((self._folder("train") / FINGERPRINT).read_text())
        data = {"rows per step": str(plan.rows_per_step), **content}
        rank, world_size = self.trainer.global_rank, self.trainer.world_size
        return self.loader(self._batches(plan, rank, world_size, fingerprint=data, state=self.position))

    def progress(self) -> dict[str, float]:
        return {"epoch": round(self.position["epoch"], 3)} if self.position else {}


def check_loss(split: str, rendered: RenderedConversations, sequence_len: int) -> None:
    """Warns if many conversations have no loss tokens.

    Raises:
        UserError: no conversation has loss tokens.
    """
    cut = f"{(rendered.cut_tokens > 0).sum():,} of {len(rendered):,} are cut at {sequence_len:,} tokens"
    if not rendered.loss_tokens.any():
        raise UserError(
            f"{split}: no token of the conversations receives loss ({cut}); give conversations in which the assistant "
            "speaks within that length, with a weight other than 0, or start from a model with a longer "
            "--model.sequence_len"
        )
    share = (rendered.loss_tokens == 0).mean()
    if share > MOST_WITHOUT_LOSS:
        rank_zero_warn(
            f"{share:.0%} of the {split} conversations have no token with loss ({cut}); `lmchat data show` shows them "
            "with --only no_loss_tokens"
        )


class OwnConversationsDataModule(SFTDataModule):
    """Your own conversations, from files in any supported format; a part is held out for validation.

    Args:
        train: a file of JSON lines, a JSON array or parquet (.jsonl, .ndjson, .json, each also .gz or .zst, or
            .parquet), or a folder of such files, in the format of OpenAI (messages), ShareGPT, Alpaca, or prompt and
            completion.
        val: files to validate on; null holds out a part of ``train``.
        val_fraction: share of ``train`` that is held out.
        format: format of the records (messages, sharegpt, alpaca, prompt_completion); null detects it by their fields.
        epochs: how often each conversation is trained on.
        options: see `SFTDataModule`.
    """

    def __init__(
        self,
        train: str,
        val: str | None = None,
        val_fraction: float = 0.05,
        format: Format | None = None,
        epochs: int = 1,
        **options: Any,
    ) -> None:
        split: dict[str, Any] = {"val_fraction": val_fraction, "format": format}
        if val is None:
            train_task = JSONLConversations(train, split="train", **split)
            val_task = JSONLConversations(train, split="val", **split)
        else:
            train_task, val_task = JSONLConversations(train, **split), JSONLConversations(val, **split)
        super().__init__([MixturePart(train_task, epochs)], [MixturePart(val_task)], **options)

    def _mixtures_to_read(self) -> dict[str, Mixture]:
        mixtures = super()._mixtures_to_read()
        train, val = (cast(JSONLConversations, mixture.parts[0].task) for mixture in mixtures.values())
        if val.split is not None:
            val.share_rows(train)
        return mixtures
