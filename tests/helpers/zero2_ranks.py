"""A short run with `zero2_muon`; each rank writes its records to a folder."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import lmchat.strategies.zero2_muon  # noqa: F401  (registers the strategy)
from lmchat.model.config import GPTConfig
from lmchat.model.gpt import GPT
from lmchat.optim.muon_adamw import MuonAdamW
from lmchat.optim.param_groups import build_param_groups

CONFIG = GPTConfig(sequence_len=16, vocab_size=64, n_layer=3, n_head=2, n_kv_head=2, n_embd=32, window_pattern="SL")
MICRO_BATCHES_PER_STEP = 12
STEPS = 3


class Rows(Dataset):
    """Micro-batch k of the global order; rank r of W reads k = r, r + W, …"""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size

    def __len__(self) -> int:
        return 10_000

    def __getitem__(self, index: int) -> Tensor:
        generator = torch.Generator().manual_seed(index * self.world_size + self.rank)
        return torch.randint(CONFIG.vocab_size, (2, CONFIG.sequence_len + 1), generator=generator)


class Module(L.LightningModule):
    def __init__(self, folder: Path, sigterm_at: int | None) -> None:
        super().__init__()
        self.folder, self.sigterm_at = folder, sigterm_at
        self.losses: list[float] = []
        self.collectives: list[int] = []
        self.calls = 0

    def configure_model(self) -> None:
        self.net = GPT(CONFIG, compute_dtype=torch.float64).double()
        # Each rank has different weights, which the strategy must synchronize. None is zero, as c_proj would be, since
        # Adam takes a whole step for a gradient that is 0 up to rounding.
        generator = torch.Generator().manual_seed(self.global_rank)
        with torch.no_grad():
            for param in self.net.parameters():
                param.normal_(std=0.2, generator=generator)

    def configure_optimizers(self) -> MuonAdamW:
        return MuonAdamW(build_param_groups(self.net.named_parameters(), n_embd=CONFIG.n_embd))

    def train_dataloader(self) -> DataLoader:
        return DataLoader(Rows(self.global_rank, self.trainer.world_size), batch_size=None)

    def training_step(self, rows: Tensor, batch_idx: int) -> Tensor:
        self.collectives.append(self.calls)
        if batch_idx == self.sigterm_at and self.global_rank == self.trainer.world_size - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        loss = self.net.loss(rows[:, :-1], rows[:, 1:])
        self.losses.append(loss.item())
        return loss


class Report(L.Callback):
    def on_fit_end(self, trainer: L.Trainer, pl_module: Any, exception: str | None = None) -> None:
        result = {
            "losses": pl_module.losses,
            "collectives": pl_module.collectives,
            "step": trainer.global_step,
            "weights": pl_module.net.state_dict(),
            "exception": exception,
        }
        torch.save(result, pl_module.folder / f"rank{trainer.global_rank}.pt")

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        self.on_fit_end(trainer, pl_module, type(exception).__name__)


def count_collectives(module: Module) -> None:
    for name in ("all_reduce", "broadcast", "all_to_all_single", "barrier", "all_gather_into_tensor"):
        original = getattr(dist, name)

        def call(*args: Any, _original: Any = original, **kwargs: Any) -> Any:
            module.calls += 1
            return _original(*args, **kwargs)

        setattr(dist, name, call)


def fit(folder: Path, devices: int, sigterm_at: int | None = None) -> None:
    """One rank's run. The last rank sends itself SIGTERM in micro-batch ``sigterm_at``."""
    module = Module(folder, sigterm_at)
    count_collectives(module)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="zero2_muon",
        max_steps=STEPS,
        max_epochs=-1,
        accumulate_grad_batches=MICRO_BATCHES_PER_STEP // devices,
        logger=False,
        enable_checkpointing=False,
        use_distributed_sampler=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Report()],
    )
    trainer.fit(module)
