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
from lmchat.strategies.reduce_numbers import reduce_numbers
from lmchat.types import UserError

EMA_DECAY = 0.9


class Stopwatch:
    """Seconds and steps of training: time that is paused does not count."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._paused = 0.0
        self._pause_start: float | None = None

    def pause(self) -> None:
        """Stops the watch, if it runs."""
        if self._pause_start is None:
            self._pause_start = time.perf_counter()

    def resume(self, since: float) -> None:
        """Lets the watch go on, if it is stopped, as if this were called at ``since`` (`time.perf_counter`)."""
        if self._pause_start is not None:
            self._paused += since - self._pause_start
            self._pause_start = None

    def lap(self) -> float:
        """Seconds since the last lap."""
        now = time.perf_counter()
        seconds = now - self._start - self._paused
        self._start, self._paused = now, 0.0
        return seconds


class Monitor(Callback):
    """Measures training at step boundaries, with one device synchronisation per logged step and none between.

    Logged under ``train/``: loss, loss_ema (debiased, decay 0.9), lr_multiplier, step_ms, tokens_per_second, mfu,
    memory_gb, tokens, eta_seconds, and the data's own position or figures. Speed is that of the steps since the last
    record, without evaluation and what callbacks do after it; the first steps, which compile and warm up, do not enter
    the time left.

    Args:
        every_n_steps: optimizer steps between records; the first and the last step are always recorded.
        warmup_steps: steps at the start that the time left is not estimated from.
    """

    def __init__(self, every_n_steps: int = 10, warmup_steps: int = 3) -> None:
        if every_n_steps < 1:
            raise UserError(f"--monitor.every_n_steps is {every_n_steps}; use 1 or more")
        self.every_n_steps = every_n_steps
        self.warmup_steps = warmup_steps
        self.loss_ema: torch.Tensor | float = 0.0
        self.ema_steps: torch.Tensor | int = 0
        self.tokens = 0
        self._bar: tqdm | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.first_step = self._last_step = trainer.global_step
        self._peak = peak_flops(pl_module.device, pl_module.net.compute_dtype)
        self._lap_steps = self._lap_tokens = 0
        self._warm_seconds, self._warm_steps = 0.0, 0
        if trainer.is_global_zero:
            print(self._description(trainer, pl_module), flush=True)
            terminal = sys.stderr.isatty()
            self._bar = tqdm(
                total=trainer.max_steps, initial=self.first_step, unit="step", disable=not terminal, leave=False
            )
        self._watch = Stopwatch()

    def _description(self, trainer: L.Trainer, module: StageModule) -> str:
        data = trainer.datamodule  # type: ignore[attr-defined]
        config, parameters = module.config, sum(p.numel() for p in module.net.parameters())
        return (
            f"{module.stage} {module.tag}: {config.n_layer} layers × {config.n_embd}, {parameters:,} parameters, "
            f"vocabulary {config.vocab_size:,}, {module.net.compute_dtype} on {module.device}, "
            f"attention {module.net.attention_backend}\n"
            f"{trainer.max_steps:,} steps of {data.describe_step(module.plan, trainer.world_size)}, "
            f"lr scale {module.plan.lr_scale:.3g}, weight decay {module.plan.weight_decay:.3g}"
        )

    def on_validation_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.state.fn == "fit":
            self._watch.pause()

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        # Not in on_validation_end: callbacks after this one still sample, and that is no training. But what was done
        # since to get this batch is: reinforcement learning samples it.
        self._watch.resume(pl_module.evaluated_at)

    def on_validation_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.state.fn != "fit":
            return
        figures = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
        if trainer.is_global_zero and figures:
            shown = " | ".join(f"{name.removeprefix('val/')} {value:.4f}" for name, value in figures.items())
            _say(f"step {trainer.global_step}/{trainer.max_steps} | held out: {shown}")

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        step = trainer.global_step
        if step == self._last_step:
            return
        self._last_step = step
        loss = pl_module.pop_step_loss()
        # One loss that is not finite would stay in the mean for ever.
        self.loss_ema = torch.where(loss.isfinite(), EMA_DECAY * self.loss_ema + (1 - EMA_DECAY) * loss, self.loss_ema)
        self.ema_steps = self.ema_steps + loss.isfinite()
        step_tokens = trainer.datamodule.step_tokens(pl_module.plan)  # type: ignore[attr-defined]
        self.tokens += step_tokens
        self._lap_tokens += step_tokens
        self._lap_steps += 1
        if step == self.first_step + 1 or step % self.every_n_steps == 0 or step == trainer.max_steps:
            self._record(trainer, pl_module, loss)

    def _record(self, trainer: L.Trainer, module: StageModule, loss: torch.Tensor) -> None:
        ema = torch.as_tensor(self.loss_ema) / (1 - EMA_DECAY**self.ema_steps)
        loss_value, ema_value = reduce_numbers(trainer, torch.stack([loss, ema]) / trainer.world_size).tolist()
        position = trainer.datamodule.progress()  # type: ignore[attr-defined]
        step, seconds = trainer.global_step, self._watch.lap()
        rate = self._lap_tokens / seconds
        metrics = {
            "loss": loss_value,
            "loss_ema": ema_value,
            "lr_multiplier": module.schedule(step - 1).lr_multiplier,
            "step_ms": 1000 * seconds / self._lap_steps,
            "tokens_per_second": rate,
            "memory_gb": peak_memory_bytes(module.device) / 1e9,
            "tokens": self.tokens,
            **position,
        }
        if self._peak and module.packed_rows:
            metrics["mfu"] = rate * flops_per_token(module.config) / (self._peak * trainer.world_size)
        if step - self.first_step > self.warmup_steps:
            self._warm_seconds += seconds
            self._warm_steps += self._lap_steps
            metrics["eta_seconds"] = (trainer.max_steps - step) * self._warm_seconds / self._warm_steps
        self._lap_steps = self._lap_tokens = 0
        for logger in trainer.loggers:
            logger.log_metrics({f"train/{name}": value for name, value in metrics.items()}, step=step)
        if trainer.is_global_zero:
            self._show(step, trainer.max_steps, metrics, position)

    def _show(self, step: int, max_steps: int, metrics: dict[str, float], position: Iterable[str]) -> None:
        parts = [
            f"step {step}/{max_steps}",
            f"loss {metrics['loss_ema']:.4f}",
            f"lr × {metrics['lr_multiplier']:.2f}",
            f"{metrics['step_ms']:,.0f} ms",
            f"{metrics['tokens_per_second']:,.0f} tok/s",
            *([f"mfu {100 * metrics['mfu']:.0f} %"] if "mfu" in metrics else []),
            f"{metrics['memory_gb']:.1f} GB",
            " ".join(f"{name} {metrics[name]:.3g}" for name in position),
            *([f"eta {_clock(metrics['eta_seconds'])}"] if "eta_seconds" in metrics else []),
        ]
        _say(" | ".join(parts))
        if self._bar is not None:
            self._bar.total = max_steps
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
        return {"loss_ema": float(self.loss_ema), "ema_steps": int(self.ema_steps), "tokens": self.tokens}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.loss_ema = state_dict["loss_ema"]
        self.ema_steps = state_dict["ema_steps"]
        self.tokens = state_dict["tokens"]


def _say(line: str) -> None:
    # tqdm.write leaves a live progress bar in one piece.
    tqdm.write(line, file=sys.stdout)
    sys.stdout.flush()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s"
