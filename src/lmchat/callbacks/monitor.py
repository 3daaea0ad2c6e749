"""Logs loss, speed, utilisation, memory, data position and time left."""

import time
from collections.abc import Iterable
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lmchat.callbacks.step import StepCallback
from lmchat.checkpoint.meta_schema import COUNTER, FINITE, check_state
from lmchat.hardware import peak_flops, peak_memory_bytes
from lmchat.option_checks import check_count
from lmchat.progress import ProgressBar, clock_time, print_line
from lmchat.scaling import flops_per_token
from lmchat.stages.base import StageModule
from lmchat.strategies.zero2_muon import reduce_numbers

EMA_DECAY = 0.9


class LossEMA:
    """Debiased exponential moving average of the loss; a run resumed from `state` continues it bit for bit."""

    def __init__(self) -> None:
        self._mean = torch.zeros((), dtype=torch.float32)
        self._steps = torch.zeros((), dtype=torch.int64)

    def update(self, loss: torch.Tensor) -> None:
        """Adds a loss, a 0-dim fp32 tensor. Non-finite losses are ignored, or the average would stay NaN."""
        is_finite, mean = loss.isfinite(), self._mean.to(loss.device)
        self._mean = torch.where(is_finite, EMA_DECAY * mean + (1 - EMA_DECAY) * loss, mean)
        self._steps = self._steps.to(loss.device) + is_finite

    def value(self) -> torch.Tensor:
        """The average, a 0-dim fp32 tensor; NaN before the first update."""
        return self._mean / (1 - EMA_DECAY**self._steps)

    def state(self) -> dict[str, Any]:
        """State for a checkpoint, as Python numbers, which represent fp32 exactly."""
        return {"loss_ema": float(self._mean), "ema_steps": int(self._steps)}

    def load(self, state: dict[str, Any]) -> None:
        """Restores `state` in the original dtypes: with Python's float64 the next mean would be rounded differently."""
        self._mean = torch.tensor(state["loss_ema"], dtype=torch.float32)
        self._steps = torch.tensor(state["ema_steps"], dtype=torch.int64)


class Monitor(StepCallback):
    """Measures training at step boundaries, with one device sync per logged step and none in between.

    Logged under ``train/``: loss, loss_ema (debiased, decay 0.9), lr_multiplier, step_ms, tokens_per_second, mfu,
    memory_gb, tokens, eta_seconds, and the position and metrics of the data. Speed covers the steps since the last
    record, without evaluation and the callbacks after it; the time left ignores the first steps, which compile and warm
    up. mfu (model FLOPs utilization) is logged on GPUs with a known peak, see `peak_flops`.

    Args:
        every_n_steps: optimizer steps between records; the first and the last step are always recorded.
        warmup_steps: number of first steps that the estimate of the time left ignores.
    """

    def __init__(self, every_n_steps: int = 10, warmup_steps: int = 3) -> None:
        check_count("monitor", 1, every_n_steps=every_n_steps)
        check_count("monitor", 0, warmup_steps=warmup_steps)
        self.every_n_steps = every_n_steps
        self.warmup_steps = warmup_steps
        self.loss_ema = LossEMA()
        self.tokens = 0
        self._bar: ProgressBar | None = None
        self._lap_start = 0.0
        self._pause_start: float | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        super().on_train_start(trainer, pl_module)
        self.first_step = trainer.global_step
        self._peak = peak_flops(pl_module.device)
        if pl_module.device.type == "cuda":  # not that of sizes that were tried before
            torch.cuda.reset_peak_memory_stats(pl_module.device)
        self._lap_steps = self._lap_tokens = 0
        self._warm_seconds, self._warm_steps = 0.0, 0
        if trainer.is_global_zero:
            print(self._description(trainer, pl_module), flush=True)
            self._bar = ProgressBar("Training", trainer.max_steps, unit="steps", done=self.first_step, log=False)
        self._lap_start, self._pause_start = time.perf_counter(), None

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
        if trainer.state.fn == "fit" and self._pause_start is None:
            self._pause_start = time.perf_counter()

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        # Not in on_validation_end: callbacks after this one may still generate samples, which is not training time. The
        # time to get this batch counts, since reinforcement learning samples its batches.
        if self._pause_start is not None:
            self._lap_start += pl_module.evaluated_at - self._pause_start
            self._pause_start = None

    def on_step_end(self, trainer: L.Trainer, pl_module: Any, step: int) -> None:
        loss, metrics = pl_module.pop_step_loss(), pl_module.pop_step_metrics()
        self.loss_ema.update(loss)
        step_tokens = trainer.datamodule.step_tokens(pl_module.plan)  # type: ignore[attr-defined]
        self.tokens += step_tokens
        self._lap_tokens += step_tokens
        self._lap_steps += 1
        if step == self.first_step + 1 or step % self.every_n_steps == 0 or step == trainer.max_steps:
            self._record(trainer, pl_module, {"loss": loss, "loss_ema": self.loss_ema.value(), **metrics})

    def _record(self, trainer: L.Trainer, module: StageModule, tracked: dict[str, torch.Tensor]) -> None:
        means = reduce_numbers(trainer, torch.stack(list(tracked.values())) / trainer.world_size).tolist()
        position = trainer.datamodule.progress()  # type: ignore[attr-defined]
        step, now = trainer.global_step, time.perf_counter()
        seconds, self._lap_start = now - self._lap_start, now
        rate = self._lap_tokens / seconds
        metrics = {
            **dict(zip(tracked, means, strict=True)),
            "lr_multiplier": module.schedule(step - 1).lr_multiplier,
            "step_ms": 1000 * seconds / self._lap_steps,
            "tokens_per_second": rate,
            "memory_gb": peak_memory_bytes(module.device) / 1e9,
            "tokens": self.tokens,
            **position,
        }
        if module.packed_rows and (mfu := self._mfu(rate * flops_per_token(module.config) / trainer.world_size)):
            metrics["mfu"] = mfu
        if step - self.first_step > self.warmup_steps:
            self._warm_seconds += seconds
            self._warm_steps += self._lap_steps
            metrics["eta_seconds"] = (trainer.max_steps - step) * self._warm_seconds / self._warm_steps
        self._lap_steps = self._lap_tokens = 0
        for logger in trainer.loggers:
            logger.log_metrics({f"train/{name}": value for name, value in metrics.items()}, step=step)
        if trainer.is_global_zero:
            self._show(step, trainer.max_steps, metrics, position)

    def _mfu(self, flops: float) -> float | None:
        """``flops`` (FLOP/s of a device) as a share of the peak; None if the peak is unknown or too low."""
        if self._peak is None:
            return None
        if flops > self._peak:
            rank_zero_warn(
                f"MFU is not logged: this device reaches {flops / 1e12:.0f} TFLOP/s, more than the "
                f"{self._peak / 1e12:.0f} that lmchat.hardware.DENSE_BF16_PEAK lists for it"
            )
            self._peak = None
            return None
        return flops / self._peak

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
            *([f"eta {clock_time(metrics['eta_seconds'])}"] if "eta_seconds" in metrics else []),
        ]
        print_line(" | ".join(parts))
        if self._bar is not None:
            self._bar.total = max_steps
            self._bar.set(step)

    def on_train_end(self, *_: Any) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def on_exception(self, *_: Any) -> None:
        self.on_train_end()

    def state_dict(self) -> dict[str, Any]:
        return {**self.loss_ema.state(), "tokens": self.tokens}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        check_state(type(self), state_dict, {"loss_ema": FINITE, "ema_steps": COUNTER, "tokens": COUNTER})
        self.loss_ema.load(state_dict)
        self.tokens = state_dict["tokens"]
