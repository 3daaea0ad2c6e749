"""What every training stage shares: the network, the optimizer and its schedules, the loss of a step."""

from __future__ import annotations

import math
import re
import time
from abc import abstractmethod
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import lightning as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.utils.data import DataLoader, IterableDataset

from lmchat.checkpoint.load import Checkpoint
from lmchat.evaluation.bits_per_byte import BitsPerByte
from lmchat.model.allocator import keep_large_blocks
from lmchat.model.compile import compile_blocks
from lmchat.model.config import GPTConfig
from lmchat.model.gpt import GPT, default_compute_dtype
from lmchat.optim.muon_adamw import MuonAdamW, build_param_groups
from lmchat.option_checks import check_count, check_range
from lmchat.paths import tokenizer_dir as default_tokenizer_dir
from lmchat.scaling import flops_per_token, parameter_counts
from lmchat.tokenizer.bpe import Tokenizer
from lmchat.types import Batch, UserError

COMPUTE_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


COMPILE_FLOPS_ON_CPU = 1e13
"""A CPU compiles for a minute or two and is then 1.2 times as fast: minutes of training must follow for that to pay."""


@dataclass(frozen=True)
class Schedule:
    """The optimizer's settings at one step: learning-rate multiplier, Muon's momentum, Muon's weight decay."""

    lr_multiplier: float
    momentum: float
    weight_decay: float


class StageModule(L.LightningModule):
    """One GPT, one MuonAdamW, stateless schedules; a stage adds its loss and its evaluation.

    Args:
        tokenizer_dir: folder of the tokenizer; null is ``$LMCHAT_BASE_DIR/tokenizer``.
        tag: name of the run's folder of checkpoints and logs; null names it by the depth, e.g. ``d26``.
        global_batch_tokens: tokens per optimizer step over all ranks; null lets the scaling laws decide.
        embedding_lr: AdamW learning rate of the token and value embeddings at width 768 and batch 2¹⁹.
        unembedding_lr: AdamW learning rate of the output head, likewise.
        matrix_lr: Muon learning rate of the blocks' matrices.
        scalar_lr: AdamW learning rate of the residual scalars.
        weight_decay: Muon's weight decay before the scaling laws scale it.
        compute_dtype: type of activations and matrix products; "auto" is bf16 where the device multiplies it fast,
            else fp32. Master weights are fp32 always.
        attention: name of the attention backend; "auto" runs the candidates and takes the best that is right.
        compile: use torch.compile, for the blocks and on a GPU for the optimizer. "auto" is yes where it works and
            pays: the blocks on a GPU, and on a CPU for runs of `COMPILE_FLOPS_ON_CPU` or more, never where shapes
            change from batch to batch.
    """

    stage: ClassVar[str]
    scales_with_depth: ClassVar[bool] = False
    packed_rows: ClassVar[bool] = True
    """Every micro-batch has the same shape, and all of its tokens are trained on."""
    net: GPT
    sequence_len: int
    evaluated_at: float = 0.0
    """When the last evaluation ended, by `time.perf_counter`."""

    def __init__(
        self,
        *,
        tokenizer_dir: str | None = None,
        tag: str | None = None,
        global_batch_tokens: int | None = None,
        embedding_lr: float = 0.3,
        unembedding_lr: float = 0.004,
        matrix_lr: float = 0.02,
        scalar_lr: float = 0.5,
        weight_decay: float = 0.2,
        compute_dtype: Literal["auto", "bf16", "fp32"] = "auto",
        attention: str = "auto",
        compile: bool | Literal["auto"] = "auto",
    ) -> None:
        super().__init__()
        if tag and (tag.startswith(".") or re.search(r"[/\\]", tag)):
            raise UserError(f"--model.tag is {tag}; it names a folder: leave out slashes and the dot in front")
        self.tokenizer_dir = tokenizer_dir
        self.global_batch_tokens = global_batch_tokens
        self.learning_rates = {
            "embedding_lr": embedding_lr,
            "unembedding_lr": unembedding_lr,
            "matrix_lr": matrix_lr,
            "scalar_lr": scalar_lr,
        }
        self.weight_decay = weight_decay
        check_range("model", weight_decay=weight_decay, **self.learning_rates)
        if global_batch_tokens is not None:
            check_count("model", 1, global_batch_tokens=global_batch_tokens)
        self.lr_scale = 1.0
        self.compute_dtype = compute_dtype
        self.attention = attention
        self.compile_mode = compile
        self.inherited: dict[str, Any] = {}
        self._tag = tag
        self._loss_sum: torch.Tensor | None = None
        self._loss_count = 0

    @property
    @abstractmethod
    def config(self) -> GPTConfig:
        """The shape of the network."""

    @abstractmethod
    def schedule(self, step: int) -> Schedule:
        """The optimizer's settings for optimizer step ``step``, counted from 0."""

    @property
    @abstractmethod
    def default_tag(self) -> str:
        """Name of the run where the user gives none."""

    @property
    def tag(self) -> str:
        """Name of the run: its folder under the stage's checkpoints and logs."""
        return self._tag or self.default_tag

    @abstractmethod
    def adopt(self, checkpoint: Checkpoint) -> None:
        """Makes ready to continue from ``checkpoint``, before anything is built.

        Raises:
            UserError: this stage, as configured, cannot continue from it.
        """

    def continue_numerics(self, checkpoint: Checkpoint) -> None:
        """Takes the compute dtype of a run of this stage where "auto" leaves it open: found anew, it might differ.

        Raises:
            UserError: the checkpoint was trained with another tokenizer.
        """
        if checkpoint.stage == self.stage and self.compute_dtype == "auto":
            self.compute_dtype = checkpoint.meta["compute_dtype"]
        if checkpoint.meta["tokenizer_fingerprint"] != self.tokenizer.fingerprint:
            raise UserError(
                f"{checkpoint.paths.meta} was trained with another tokenizer than the one in {self.tokenizer_path}; "
                "give its own with --model.tokenizer_dir"
            )

    @property
    def tokenizer_path(self) -> Path:
        return Path(self.tokenizer_dir).expanduser() if self.tokenizer_dir else default_tokenizer_dir()

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.load(self.tokenizer_path)

    @property
    def data(self) -> StageDataModule:
        """The DataModule of the run."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, StageDataModule)
        return data

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.trainer.max_steps

    def setup(self, stage: str) -> None:
        check_precision(self.trainer.precision)
        if stage == "fit" and self.total_steps < 1:
            raise UserError(f"--trainer.max_steps is {self.total_steps}; give a positive number of steps")

    def configure_model(self) -> None:
        if hasattr(self, "net"):
            return
        device = self.trainer.strategy.root_device
        if device.type == "cpu":
            keep_large_blocks()
        dtype = default_compute_dtype(device) if self.compute_dtype == "auto" else COMPUTE_DTYPES[self.compute_dtype]
        try:
            with torch.device("meta"):
                net = GPT(self.config, compute_dtype=dtype, attention=self.attention)
            net.to_empty(device=device)
        except RuntimeError as error:
            billions, config = parameter_counts(self.config).total / 1e9, self.config
            raise UserError(
                f"a model of depth {config.n_layer} for {config.sequence_len} tokens has {billions:,.1f} billion "
                f"parameters and finds no room on {device} ({str(error).splitlines()[0]}); choose a smaller "
                "--model.depth or --model.sequence_len"
            ) from error
        net.init_weights()
        self.net = net
        self.bits_per_byte = BitsPerByte(torch.from_numpy(self.tokenizer.token_bytes))

    def on_fit_start(self) -> None:
        if self._compiles(pays=self._compiling_pays()):
            compile_blocks(self.net)

    def _compiles(self, pays: bool) -> bool:
        """Whether to compile something, which ``pays`` here or not."""
        if self.compile_mode == "auto":
            return pays and compiler_works(self.net.device.type)
        return self.compile_mode

    def _compiling_pays(self) -> bool:
        if not self.packed_rows or self.device.type == "cuda":
            return self.packed_rows
        tokens = self.total_steps * self.data.step_tokens
        return tokens * flops_per_token(self.config) >= COMPILE_FLOPS_ON_CPU

    def configure_optimizers(self) -> MuonAdamW:
        groups = build_param_groups(
            self.net.named_parameters(),
            n_embd=self.config.n_embd,
            lr_scale=self.lr_scale,
            weight_decay=self.weight_decay,
            **self.learning_rates,  # type: ignore[arg-type]
        )
        on_gpu = self.net.device.type == "cuda"  # where it pays; on a CPU Muon's matrix products take the time
        return MuonAdamW(groups, compile=on_gpu and self._compiles(pays=True))

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        now = self.schedule(self.trainer.global_step)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * now.lr_multiplier
            if group["kind"] == "muon":
                group["momentum"], group["weight_decay"] = now.momentum, now.weight_decay
        optimizer.step(closure=optimizer_closure)
        # Lightning zeroes after the next forward, which would keep the gradients alive beside its activations.
        optimizer.zero_grad(set_to_none=True)

    def log_bits_per_byte(self, batch: Batch) -> None:
        """Adds a batch of held-out rows to ``val/bpb``."""
        nats = self.net.loss(batch["inputs"], batch["targets"], reduction="none")
        self.bits_per_byte.update(nats, batch["targets"])
        self.log("val/bpb", self.bits_per_byte, add_dataloader_idx=False)

    def on_validation_epoch_end(self) -> None:
        # Lightning would log an evaluation after step n as of step n − 1, but one at the start or the end as of n.
        self.log("step", float(self.trainer.global_step))

    def on_validation_end(self) -> None:
        # Called after that of every callback: from here on the time is training's again.
        self.evaluated_at = time.perf_counter()

    def track_loss(self, loss: torch.Tensor) -> None:
        """Adds a micro-batch's loss to the step's; no device synchronisation."""
        self._loss_sum = loss.detach() if self._loss_sum is None else self._loss_sum + loss.detach()
        self._loss_count += 1

    def pop_step_loss(self) -> torch.Tensor:
        """Mean loss of the micro-batches since the last call, a 0-dim tensor on the device."""
        assert self._loss_sum is not None, "no micro-batch since the last call"
        mean = self._loss_sum / self._loss_count
        self._loss_sum, self._loss_count = None, 0
        return mean

    def _numerics(self) -> dict[str, str]:
        """The compute dtype and the attention backend in use, by name."""
        names = {dtype: name for name, dtype in COMPUTE_DTYPES.items()}
        return {"compute_dtype": names[self.net.compute_dtype], "attention": self.net.attention_backend}

    def checkpoint_meta(self) -> dict[str, Any]:
        """What a later stage or a reader needs to know of this one, as JSON."""
        return {
            "stage": self.stage,
            "tag": self.tag,
            "model": asdict(self.config),
            **(self._numerics() if hasattr(self, "net") else {}),
            "tokenizer_fingerprint": self.tokenizer.fingerprint,
            "global_batch_tokens": self.global_batch_tokens,
            "micro_batch_size": self.data.micro_batch_size,
            "total_steps": self.total_steps,
            "learning_rates": self.learning_rates,
            "lr_scale": self.lr_scale,
            "weight_decay": self.weight_decay,
        }


def check_precision(precision: str | int | None) -> None:
    """Raises UserError unless the trainer's ``precision`` leaves the fp32 master weights as they are."""
    if precision not in (None, 32, "32", "32-true"):
        raise UserError(
            f"--trainer.precision is {precision}, which would cast or autocast the fp32 master weights; leave it at "
            "32-true and choose the compute type with --model.compute_dtype bf16"
        )


@cache
def compiler_works(device_type: str) -> bool:
    """Whether torch.compile works here, found by using it: it needs a compiler and Python's headers."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=device_type))
    except Exception as error:  # Whatever the tool chain lacks, training goes on without it.
        rank_zero_warn(f"torch.compile does not work here, training without it ({str(error).splitlines()[0]})")
        return False
    return True


class StageDataModule(L.LightningDataModule):
    """Micro-batches whose position is that of the last one consumed.

    Args:
        micro_batch_size: rows per micro-batch and rank; null takes that of the checkpoint the stage starts from.
    """

    def __init__(self, micro_batch_size: int | None) -> None:
        super().__init__()
        if micro_batch_size is not None:
            check_count("data", 1, micro_batch_size=micro_batch_size)
        self._micro_batch_size = micro_batch_size
        self.position: dict[str, Any] | None = None

    @property
    def run(self) -> L.Trainer:
        """The trainer, which is there once a run begins."""
        assert self.trainer is not None
        return self.trainer

    @property
    def module(self) -> StageModule:
        """The stage that is trained."""
        module = self.run.lightning_module
        assert isinstance(module, StageModule)
        return module

    @property
    def micro_batch_size(self) -> int:
        """Rows per micro-batch and rank. Raises UserError if neither the user nor a checkpoint gives it."""
        size = self._micro_batch_size or self.module.inherited.get("micro_batch_size")
        if size is None:
            raise UserError(
                "no micro-batch is set, and no checkpoint to start from names one; give --data.micro_batch_size 16"
            )
        return size

    def accumulation_steps(self, world_size: int) -> int:
        """Micro-batches per rank and optimizer step. Raises UserError if they cannot fill the global batch."""
        tokens = self.module.global_batch_tokens
        if tokens is None:
            raise UserError("no global batch is set; give --model.global_batch_tokens, e.g. 524288")
        return accumulation_steps(tokens, self.micro_batch_size, self.module.sequence_len, world_size)

    def describe_step(self, world_size: int) -> str:
        """What an optimizer step consists of, for a person."""
        micro_batches = self.accumulation_steps(world_size)
        return (
            f"{self.module.global_batch_tokens:,} tokens ({self.micro_batch_size} rows × {self.module.sequence_len} × "
            f"{micro_batches} micro-batches × {world_size} rank(s))"
        )

    @property
    def step_tokens(self) -> int:
        """Tokens of the last optimizer step, over all ranks."""
        assert self.module.global_batch_tokens is not None
        return self.module.global_batch_tokens

    def loader(self, batches: IterableDataset[Batch]) -> DataLoader:
        """Wraps ``batches`` for Lightning; pinned where they go to a GPU, so that the copy does not hold up the CPU."""
        return DataLoader(batches, batch_size=None, pin_memory=self.module.device.type == "cuda")

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        # Called when a batch is consumed: loaders are read ahead, so their own position would be too far.
        if self.run.training:
            self.position = batch.pop("state")
        return batch

    @cached_property
    def copy_stream(self) -> torch.cuda.Stream:
        """The CUDA stream that batches are copied on."""
        return torch.cuda.Stream(self.module.device)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Copies on a stream of its own on a GPU, so that it need not wait for the step before (never run on one)."""
        if device.type != "cuda":
            return super().transfer_batch_to_device(batch, device, dataloader_idx)
        compute = torch.cuda.current_stream(device)
        with torch.cuda.stream(self.copy_stream):
            batch = super().transfer_batch_to_device(batch, device, dataloader_idx)
        compute.wait_stream(self.copy_stream)
        for value in batch.values() if isinstance(batch, dict) else ():
            if isinstance(value, torch.Tensor):
                # Freed in the order of the copies otherwise, while the step still reads it.
                value.record_stream(compute)
        return batch

    def progress(self) -> dict[str, float]:
        """Where the last consumed batch was, for the log: epoch and shard, counted from 0."""
        return {name: self.position[name] for name in ("epoch", "shard")} if self.position else {}

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.position = state_dict["position"]


def accumulation_steps(global_batch_tokens: int, micro_batch_size: int, sequence_len: int, world_size: int) -> int:
    """Micro-batches per rank and optimizer step.

    Args:
        global_batch_tokens: tokens per optimizer step over all ranks.
        micro_batch_size: rows per micro-batch and rank.
        sequence_len: tokens per row.
        world_size: number of ranks.

    Raises:
        UserError: the global batch is not a whole number of rounds of micro-batches; names what would fit.
    """
    round_tokens = micro_batch_size * sequence_len * world_size
    steps, rest = divmod(global_batch_tokens, round_tokens)
    if rest == 0 and steps > 0:
        return steps
    nearest = [n * round_tokens for n in (steps, steps + 1) if n]
    rows, rest = divmod(global_batch_tokens, sequence_len * world_size)
    smaller = [] if rest else [n for n in divisors(rows) if n < micro_batch_size]
    remedies = [f"--data.micro_batch_size {smaller[-1]}"] if smaller else []
    remedies += [f"--model.global_batch_tokens {tokens}" for tokens in nearest]
    micro_batches, rest = divmod(global_batch_tokens, micro_batch_size * sequence_len)
    remedies += [] if rest else [f"{ranks} rank(s)" for ranks in nearest_divisors(micro_batches, world_size)]
    raise UserError(
        f"global_batch_tokens {global_batch_tokens} is not a multiple of micro_batch_size {micro_batch_size} × "
        f"sequence_len {sequence_len} × {world_size} rank(s) = {round_tokens}; use {' or '.join(remedies)}"
    )


def nearest_divisors(number: int, near: int) -> list[int]:
    """The divisors of ``number`` next below and next above ``near``, as far as there are."""
    found = divisors(number)
    return [n for n in found if n < near][-1:] + [n for n in found if n > near][:1]


def divisors(number: int) -> list[int]:
    """The divisors of ``number``, 0 of which has none, in ascending order."""
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})
