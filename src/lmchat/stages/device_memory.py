"""Checks that a stage fits its device, and chooses the micro-batch size."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lmchat.hardware import is_out_of_memory, memory_limit_bytes
from lmchat.model.compile import compile_blocks
from lmchat.model.gpt import GPT
from lmchat.run_plan import accumulation_steps, divisors
from lmchat.scaling import parameter_counts
from lmchat.training_memory import MODEL_ERROR, Mode, TrainingMemory, check_fits, training_memory
from lmchat.types import UserError, reason

if TYPE_CHECKING:
    from lmchat.stages.base import StageModule

CPU_SHARE = 0.7
"""Share of a CPU's memory for an automatic micro-batch; the system and other programs need the rest."""


def estimate(module: StageModule, rows: int, *, recompute: bool = False) -> TrainingMemory:
    """Estimated bytes of training ``module`` with micro-batches of ``rows`` rows on its trainer's device."""
    trainer = module.trainer
    on_gpu = trainer.strategy.root_device.type == "cuda"
    mode: Mode = "eager"
    if on_gpu and module.packed_rows and module.compile_mode is not False:
        mode = "recomputing" if recompute else "compiled"
    sharded = getattr(trainer.strategy, "shards_optimizer", False)
    memory = training_memory(
        module.config,
        rows,
        mode=mode,
        checkpoint_blocks=module.checkpoint_blocks,
        optimizer_shards=trainer.world_size if sharded else 1,
        element_bytes=2 if module.network_dtype(trainer.strategy.root_device) == torch.bfloat16 else 4,
        on_gpu=on_gpu,
    )
    if trainer.world_size > 1 and not sharded:  # DDP reduces gradients in buffers of their size
        memory = replace(memory, states=memory.states + 4 * parameter_counts(module.config).total)
    return memory


def check_model_fits(module: StageModule, trains: bool, rows: int = 1) -> None:
    """Raises UserError if a model cannot fit the device, before it is built.

    If it ``trains``, gradients, optimizer state and activations of ``rows`` rows per micro-batch must fit too.
    """
    device = module.trainer.strategy.root_device
    if (limit := memory_limit_bytes(device)) is not None:
        check_fits(module.config, device, limit, partial(estimate, module, recompute=True) if trains else None, rows)


def needs_recomputing(module: StageModule, rows: int) -> bool:
    """Whether compiled blocks fit the device only if the backward pass recomputes what it can (see `compile_blocks`).

    False on CPUs, where a smaller micro-batch has no cost.
    """
    limit = memory_limit_bytes(module.trainer.strategy.root_device)
    on_gpu = module.trainer.strategy.root_device.type == "cuda"
    return on_gpu and limit is not None and estimate(module, rows).total > limit


def choose_micro_batch(module: StageModule, global_batch_tokens: int, max_rows: int) -> int:
    """Rows of the largest micro-batch that fits and divides the global batch; chosen by rank 0 for all ranks.

    A resumed run keeps the size of its checkpoint if it is still valid, so that it continues bit for bit. On a GPU
    candidates are tried, on a CPU the memory model is used.

    Args:
        module: module of the stage, with its trainer.
        global_batch_tokens: tokens per optimizer step over all ranks.
        max_rows: maximum number of rows, whatever the memory.

    Raises:
        UserError: a single row does not fit.
    """
    trainer, length = module.trainer, module.sequence_len
    rows_per_step = accumulation_steps(global_batch_tokens, 1, length, trainer.world_size)
    if (kept := module.resumed_micro_batch_size) and kept <= max_rows and rows_per_step % kept == 0:
        return kept
    device = trainer.strategy.root_device
    chosen, how = None, "tried" if device.type == "cuda" else "estimated"
    if trainer.global_rank == 0:
        limit = memory_limit_bytes(device) or math.inf
        limit *= {"cuda": MODEL_ERROR, "cpu": CPU_SHARE / trainer.num_devices}.get(device.type, 1.0)

        def fits(rows: int) -> bool:
            needed = estimate(module, rows, recompute=needs_recomputing(module, rows))
            return needed.total <= limit and (device.type != "cuda" or _runs(module, rows))

        sizes = [rows for rows in divisors(rows_per_step) if rows <= max(1, max_rows)]
        sizes.sort(key=lambda rows: (needs_recomputing(module, rows), -rows))  # those without recomputation first
        chosen = next(filter(fits, sizes), None)
    chosen = trainer.strategy.broadcast(chosen)
    if chosen is None:
        raise UserError(f"not one row of {length} tokens fits {device}; {smaller_model(module)}")
    rank_zero_info(
        f"--data.micro_batch_size auto: {chosen} rows, the largest divisor of {rows_per_step} that fits {device}, {how}"
        + (f"; at most {max_rows}, by --data.eval_tokens" if chosen * 2 > max_rows else "")
    )
    return chosen


def _runs(module: StageModule, rows: int) -> bool:
    """Whether two micro-batches fit the GPU beside the optimizer's state (never run on a GPU).

    The network that is built for it is the run's own, so that the random numbers of its initialization stay the same;
    its compiled kernels are found again in the compiler's cache.
    """
    module.configure_model()
    net, config = module.net, module.config
    states = estimate(module, rows).states - 8 * parameter_counts(config).total
    try:
        if module.compiles_blocks():
            compile_blocks(net, recompute=needs_recomputing(module, rows))
        optimizer_state = torch.empty(int(states), dtype=torch.uint8, device=net.device)
        run_micro_batches(net, rows)
        del optimizer_state
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return False
    finally:
        net.zero_grad(set_to_none=True)
        torch._dynamo.reset()
        torch.cuda.empty_cache()
    return True


def run_micro_batches(net: GPT, rows: int) -> None:
    """Two forward and backward passes; the second has gradients beside its activations."""
    ids = torch.zeros(rows, net.config.sequence_len, dtype=torch.int64, device=net.device)
    for _ in range(2):
        net.loss(ids, ids).backward()


def out_of_memory(module: StageModule, error: BaseException) -> UserError:
    """The error for running out of memory in training; its remedy is the largest micro-batch that should fit."""
    trainer = module.trainer
    device, plan = trainer.strategy.root_device, getattr(module, "plan", None)
    limit, step = memory_limit_bytes(device), trainer.global_step + 1
    size = f" ({limit / 1e9:,.1f} GB)" if limit else ""
    when = f"in step {step}" if plan else "before the first step"
    what = f"out of memory on {device}{size} {when}: {reason(error)}"
    if plan is None:
        return UserError(f"{what}; {smaller_model(module)}")
    if plan.global_batch_tokens is None:
        return UserError(f"{what}; use a smaller --data.num_samples or --data.max_new_tokens")
    smaller = [rows for rows in divisors(plan.micro_batch_size) if rows < plan.micro_batch_size]
    if limit is not None:
        smaller = [rows for rows in smaller if estimate(module, rows, recompute=True).total <= limit]
    if not smaller:
        return UserError(f"{what}; {smaller_model(module)}")
    return UserError(
        f"{what}; the largest micro-batch below the current {plan.micro_batch_size} rows that should fit is "
        f"{smaller[-1]}: use --data.micro_batch_size {smaller[-1]}, which leaves the global batch as it is"
    )


def smaller_model(module: StageModule) -> str:
    """The remedy if no micro-batch is small enough."""
    remedies = [] if module.checkpoint_blocks else ["--model.checkpoint_blocks true"]
    if module.scales_with_depth:
        remedies += ["a smaller --model.depth", "a smaller --model.sequence_len"]
    else:
        remedies += ["a smaller model"]
    if module.trainer.world_size > 1 and not getattr(module.trainer.strategy, "shards_optimizer", False):
        remedies += ["--trainer.strategy zero2_muon"]
    return f"use {' or '.join(remedies)}"
