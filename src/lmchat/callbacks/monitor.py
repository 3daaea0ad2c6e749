"""One line and one log record per logging interval: loss, speed, utilisation, memory, position, time left."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from tqdm import tqdm

from lmchat.hardware import peak_flops, peak_memory_bytes
from lmchat.scaling import flops_per_token
from lmchat.stages.base import StageModule

EMA_DECAY = 0.9


class Monitor(Callback):
    """Measures training at step boundaries, with one device synchronisation per logged step and none between.

    Logged under ``train/``: loss, loss_ema (debiased, decay 0.9), lr_multiplier, step_ms, tokens_per_second, mfu,
    memory_gb, tokens, epoch, shard, eta_seconds. The speed is that of the steps since the last record, evaluation and
    checkpoints left out; the first steps, which compile and warm up, do not enter the time left.

    Args:
        every_n_steps: optimizer steps between records; the first and the last step are always recorded.
        warmup_steps: steps at the start that the time left is not estimated from.
    """

    def __init__(self, every_n_steps: int = 10, warmup_steps: int = 3) -> None:
        self.every_n_steps = every_n_steps
        self.warmup_steps = warmup_steps
        self.loss_ema: torch.Tensor | None = None
        self.ema_steps = 0
        self._bar: tqdm | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.total_steps = trainer.max_steps
        self.step_tokens = pl_module.global_batch_tokens
        self.first_step = self._last_step = trainer.global_step
        self._peak = peak_flops(pl_module.device, pl_module.net.compute_dtype)
        self._flops_per_token = flops_per_token(pl_module.config)
        self._paused = self._warm_seconds = 0.0
        self._warm_steps = 0
        if trainer.is_global_zero:
            self._describe(trainer, pl_module)
            self._bar = tqdm(
                total=self.total_steps,
                initial=self.first_step,
                unit="step",
                disable=not sys.stderr.isatty(),
                leave=False,
            )
        self._window_start = time.perf_counter()

    def _describe(self, trainer: L.Trainer, module: StageModule) -> None:
        config, parameters = module.config, sum(p.numel() for p in module.net.parameters())
        data = module.data
        print(
            f"{module.stage} {module.tag}: {config.n_layer} layers × {config.n_embd}, {parameters:,} parameters, "
            f"vocabulary {config.vocab_size:,}, {module.net.compute_dtype} on {module.device}, "
            f"attention {module.net.attention_backend}\n"
            f"{self.total_steps:,} steps × {self.step_tokens:,} tokens ({data.micro_batch_size} rows × "
            f"{module.sequence_len} × {trainer.accumulate_grad_batches} micro-batches × {trainer.world_size} rank(s)) "
            f"= {self.total_steps * self.step_tokens:,} tokens, lr scale {module.lr_scale:.3g}, "
            f"weight decay {module.weight_decay:.3g}",
            flush=True,
        )

    # Time that is not training is taken out of the window.
    def on_validation_start(self, *_: Any) -> None:
        self._pause_start = time.perf_counter()

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._paused += time.perf_counter() - self._pause_start
        if trainer.is_global_zero and "val/bpb" in trainer.callback_metrics:
            _say(f"step {trainer.global_step}/{self.total_steps} | val bpb {trainer.callback_metrics['val/bpb']:.4f}")

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        step = trainer.global_step
        if step == self._last_step:
            return
        loss = pl_module.pop_step_loss()
        self.ema_steps += 1
        self.loss_ema = (1 - EMA_DECAY) * loss + (EMA_DECAY * self.loss_ema if self.loss_ema is not None else 0)
        self._steps_in_window = getattr(self, "_steps_in_window", 0) + 1
        self._last_step = step
        first = step - self.first_step == 1
        if first or step % self.every_n_steps == 0 or step == self.total_steps:
            self._record(trainer, pl_module, loss)

    def _record(self, trainer: L.Trainer, module: StageModule, loss: torch.Tensor) -> None:
        assert self.loss_ema is not None
        loss = trainer.strategy.reduce(loss, reduce_op="mean")
        values = torch.stack([loss, self.loss_ema / (1 - EMA_DECAY**self.ema_steps)]).tolist()
        now = time.perf_counter()
        seconds, steps = now - self._window_start - self._paused, self._steps_in_window
        self._window_start, self._paused, self._steps_in_window = now, 0.0, 0
        step = trainer.global_step
        if step - self.first_step > self.warmup_steps:
            self._warm_seconds += seconds
            self._warm_steps += steps
        rate = self.step_tokens * steps / seconds
        position = module.data.progress()
        metrics = {
            "loss": values[0],
            "loss_ema": values[1],
            "lr_multiplier": module.schedule(step - 1).lr_multiplier,
            "step_ms": 1000 * seconds / steps,
            "tokens_per_second": rate,
            "memory_gb": peak_memory_bytes(module.device) / 1e9,
            "tokens": step * self.step_tokens,
            **position,
        }
        if self._peak:
            metrics["mfu"] = rate * self._flops_per_token / (self._peak * trainer.world_size)
        if self._warm_steps:
            metrics["eta_seconds"] = (self.total_steps - step) * self._warm_seconds / self._warm_steps
        for logger in trainer.loggers:
            logger.log_metrics({f"train/{name}": value for name, value in metrics.items()}, step=step)
        if trainer.is_global_zero:
            self._show(step, metrics, position)

    def _show(self, step: int, metrics: dict[str, float], position: Iterable[str]) -> None:
        parts = [
            f"step {step}/{self.total_steps}",
            f"loss {metrics['loss_ema']:.4f}",
            f"lr × {metrics['lr_multiplier']:.2f}",
            f"{metrics['step_ms']:,.0f} ms",
            f"{metrics['tokens_per_second']:,.0f} tok/s",
            *([f"mfu {100 * metrics['mfu']:.0f} %"] if "mfu" in metrics else []),
            f"{metrics['memory_gb']:.1f} GB",
            " ".join(f"{name} {metrics[name]:g}" for name in position),
            *([f"eta {_clock(metrics['eta_seconds'])}"] if "eta_seconds" in metrics else []),
        ]
        _say(" | ".join(parts))
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def on_train_end(self, *_: Any) -> None:
        self._close()

    def on_exception(self, *_: Any) -> None:
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def state_dict(self) -> dict[str, Any]:
        return {"loss_ema": None if self.loss_ema is None else float(self.loss_ema), "ema_steps": self.ema_steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        value = state_dict["loss_ema"]
        self.loss_ema = None if value is None else torch.tensor(value)
        self.ema_steps = state_dict["ema_steps"]


def _say(line: str) -> None:
    # tqdm.write leaves a live progress bar in one piece.
    tqdm.write(line, file=sys.stdout)
    sys.stdout.flush()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s"
