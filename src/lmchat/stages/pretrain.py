"""Pretraining: next-token prediction on packed text, evaluated by bits per byte."""

from dataclasses import asdict
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.utils.data import DataLoader

from lmchat.checkpoint.load import Checkpoint
from lmchat.data.packed_batches import PackedBatches
from lmchat.data.token_shards import TokenShards
from lmchat.data.tokenize import prepare_token_shards
from lmchat.evaluation.bits_per_byte import BitsPerByteEvaluator
from lmchat.model.config import GPTConfig
from lmchat.option_checks import check_count, check_range
from lmchat.paths import base_data_dir, expand_user
from lmchat.scaling import DEFAULT_SEQUENCE_LEN, config_for_depth
from lmchat.schedules import linear_decay, linear_warmdown, muon_momentum
from lmchat.stages.base import Schedule, StageModule
from lmchat.stages.data_module import StageDataModule
from lmchat.types import UserError

MAX_BUFFER_SIZE = 2**20
"""Documents; the buffer is filled before the first batch, with further epochs if need be."""


class PretrainModule(StageModule):
    """Next-token prediction by a GPT; the scaling laws derive all other settings from ``depth``.

    Args:
        depth: number of blocks; width, heads, batch, steps and learning rates follow from it.
        sequence_len: tokens per row.
        aspect_ratio: width per block; the width is rounded up to whole heads.
        head_dim: width of an attention head.
        n_kv_head: number of key and value heads; null is as many as query heads.
        window_pattern: attention windows of the layers, repeated: S (half the sequence) or L (the full sequence).
        value_embeddings: give every other layer a token table that is added to the attention's values.
        residual_mix: mix the residual stream with the normed embedding before each block. Without it, without value
            embeddings and with ``window_pattern`` L, the export is transformers' own `NanoChatForCausalLM`.
        warmup_ratio: fraction of the steps in which the learning rate rises linearly from 0.
        warmdown_ratio: fraction of the steps in which it falls linearly to ``final_lr_fraction``.
        final_lr_fraction: learning-rate multiplier after the last step.
    """

    stage: ClassVar[str] = "pretrain"
    scales_with_depth: ClassVar[bool] = True

    def __init__(
        self,
        depth: int,
        sequence_len: int = DEFAULT_SEQUENCE_LEN,
        aspect_ratio: int = 64,
        head_dim: int = 128,
        n_kv_head: int | None = None,
        window_pattern: str = "SSSL",
        value_embeddings: bool = True,
        residual_mix: bool = True,
        warmup_ratio: float = 0.0,
        warmdown_ratio: float = 0.5,
        final_lr_fraction: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_range(
            "model", 1, warmup_ratio=warmup_ratio, warmdown_ratio=warmdown_ratio, final_lr_fraction=final_lr_fraction
        )
        check_count("model", 1, sequence_len=sequence_len, aspect_ratio=aspect_ratio, head_dim=head_dim)
        self.default_tag = f"d{depth}"
        self.sequence_len = sequence_len
        self.shape: dict[str, Any] = {
            "depth": depth,
            "sequence_len": sequence_len,
            "aspect_ratio": aspect_ratio,
            "head_dim": head_dim,
            "n_kv_head": n_kv_head,
            "window_pattern": window_pattern,
            "value_embeddings": value_embeddings,
            "residual_mix": residual_mix,
        }
        self.warmup_ratio = warmup_ratio
        self.warmdown_ratio = warmdown_ratio
        self.final_lr_fraction = final_lr_fraction

    @cached_property
    def config(self) -> GPTConfig:  # type: ignore[override]
        return config_for_depth(vocab_size=self.tokenizer.vocab_size, **self.shape)

    def load_from(self, checkpoint: Checkpoint) -> None:
        super().load_from(checkpoint)
        for name, value in asdict(GPTConfig(**checkpoint.meta["model"])).items():
            if (mine := getattr(self.config, name)) != value:
                raise UserError(
                    f"{checkpoint.paths.meta} has {name} {value}, this run {mine}; "
                    "resume it with its own options, or start a new run with another --model.tag"
                )

    def schedule(self, step: int) -> Schedule:
        steps = self.trainer.max_steps
        return Schedule(
            lr_multiplier=linear_warmdown(step, steps, self.warmup_ratio, self.warmdown_ratio, self.final_lr_fraction),
            momentum=muon_momentum(step),
            weight_decay=self.plan.weight_decay * linear_decay(step, steps),
        )

    def checkpoint_meta(self) -> dict[str, Any]:
        return {**super().checkpoint_meta(), "mask_documents": self.plan.mask_documents}


MAX_SHARE_UNREAD = 0.05
"""Share of the tokens that cropping may leave unread without a warning."""


class FineWebDataModule(StageDataModule):
    """Any text in parquet shards → token files → best-fit packed rows. The last shard is the validation set.

    The order of rows does not depend on the number of ranks, and the position is part of a checkpoint.

    Args:
        data_dir: folder of the parquet shards; null is ``$LMCHAT_BASE_DIR/base_data``.
        micro_batch_size: rows per micro-batch and rank; "auto" takes the largest that fits the device's memory.
        buffer_size: documents that best-fit packing chooses from.
        long_documents: where a document does not fit into a row, "crop" discards its rest, as nanochat does; "split"
            continues it in the next row. The validation set is always cropped, so that it is the same for both.
        eval_tokens: tokens per evaluation over all ranks, rounded down to a whole number of micro-batches per rank.
        mask_documents: attend within documents only, in training and in validation, instead of to all earlier tokens of
            the packed row.
    """

    def __init__(
        self,
        data_dir: str | None = None,
        micro_batch_size: int | Literal["auto"] = 32,
        buffer_size: int = 1000,
        eval_tokens: int = 40 * 524288,
        long_documents: Literal["crop", "split"] = "crop",
        mask_documents: bool = False,
    ) -> None:
        super().__init__(micro_batch_size)
        check_count("data", 1, eval_tokens=eval_tokens)
        check_count("data", 1, MAX_BUFFER_SIZE, buffer_size=buffer_size)
        self.data_dir = expand_user(data_dir) if data_dir else base_data_dir()
        self.buffer_size = buffer_size
        self.eval_tokens = eval_tokens
        self.long_documents = long_documents
        self.mask_documents = mask_documents

    def prepare_data(self) -> None:
        prepare_token_shards(self.data_dir, self.spec.tokenizer)

    def setup(self, stage: str) -> None:
        self.train_shards, val_shards = TokenShards.open_split(self.data_dir, self.spec.tokenizer)
        if stage == "fit" and self.trainer is not None and self.trainer.local_rank == 0:
            self.train_shards.check_in_background()
        if stage == "fit" and self.long_documents == "crop":
            row_tokens = self.spec.sequence_len + 1
            if (share := self.train_shards.share_beyond(row_tokens)) > MAX_SHARE_UNREAD:
                rank_zero_warn(
                    f"{share:.1%} of the training tokens come after the first {row_tokens:,} tokens of their document "
                    "and are never read; read them with --data.long_documents split, or import with --separator"
                )

        def validation_batches(rank: int, world_size: int) -> PackedBatches:
            return self._batches(val_shards, rank, world_size, num_batches=self._eval_batches(world_size))

        token_bytes = torch.from_numpy(self.spec.tokenizer.token_bytes)
        self.evaluators = [BitsPerByteEvaluator(token_bytes, validation_batches)]

    def _batches(self, shards: TokenShards, rank: int, world_size: int, **kwargs: Any) -> PackedBatches:
        return PackedBatches(
            shards,
            micro_batch_size=self.micro_batch_size,
            sequence_len=self.spec.sequence_len,
            buffer_size=self.buffer_size,
            mask_documents=self.mask_documents,
            rank=rank,
            world_size=world_size,
            **kwargs,
        )

    def train_dataloader(self) -> DataLoader:
        rank, world_size = self.trainer.global_rank, self.trainer.world_size
        return self.loader(
            self._batches(self.train_shards, rank, world_size, state=self.position, long_documents=self.long_documents)
        )

    def val_dataloader(self) -> list[DataLoader]:
        self._eval_batches(self.trainer.world_size)  # a wrong option is reported before training
        return super().val_dataloader()

    def max_micro_batch_size(self, world_size: int) -> int:
        """Rows of which each rank can evaluate at least one micro-batch."""
        return self.eval_tokens // (self.spec.sequence_len * world_size)

    def _eval_batches(self, world_size: int) -> int:
        """Micro-batches per rank in one evaluation."""
        tokens = self.micro_batch_size * self.spec.sequence_len * world_size
        num_batches = self.eval_tokens // tokens
        if num_batches == 0:
            raise UserError(
                f"--data.eval_tokens {self.eval_tokens} is less than one micro-batch per rank ({tokens} tokens); "
                f"use --data.eval_tokens {tokens} or more"
            )
        return num_batches
