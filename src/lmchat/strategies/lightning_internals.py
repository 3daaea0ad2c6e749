"""All uses of Lightning's private attributes, each in a function with a contract test, which fails if it is renamed."""

import subprocess
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import lightning as L
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.overrides.distributed import _sync_module_states
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher, _SubprocessScriptLauncher

OVERRIDDEN_CLI_HOOKS = ("_parse_ckpt_path", "_set_seed", "_run_subcommand")
"""Private methods of `LightningCLI` that lmchat's command line overrides."""


def ends_optimizer_step(trainer: L.Trainer) -> bool:
    """Whether the current micro-batch is the last one of its optimizer step."""
    return not trainer.fit_loop._should_accumulate()


def stop_after_batch(trainer: L.Trainer) -> None:
    """Makes the trainer raise SIGTERMException at the end of the current batch."""
    trainer._signal_connector.received_sigterm = True


def take_over_sigterm(trainer: L.Trainer, handler: Callable[..., None]) -> None:
    """Calls ``handler`` on SIGTERM and disables Lightning's broadcast of it at every micro-batch."""
    trainer._signal_connector._sigterm_notifier_fn = handler  # type: ignore[method-assign]
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]


def keep_other_ranks_alive(launcher: Any) -> None:
    """Keeps Lightning's launcher from killing the other ranks as soon as one of them exits with an error."""
    if isinstance(launcher, _SubprocessScriptLauncher):
        launcher.kept_alive = other_ranks(launcher)  # type: ignore[attr-defined]
        launcher.procs.clear()


def other_ranks(launcher: Any) -> list[subprocess.Popen[bytes]]:
    """Processes of the ranks that Lightning's launcher has started from this one."""
    if not isinstance(launcher, _SubprocessScriptLauncher):
        return []
    return [*getattr(launcher, "kept_alive", []), *launcher.procs]


def process_group_timeout(strategy: DDPStrategy) -> timedelta | None:
    """The ``timeout`` of a strategy's collectives."""
    return strategy._timeout


def copies_processes(launcher: Any) -> bool:
    """Whether Lightning's launcher starts the ranks as copies of this process, by fork or spawn."""
    return isinstance(launcher, _MultiProcessingLauncher)


def broadcast_module_states(module: L.LightningModule) -> None:
    """Broadcasts the parameters and buffers of rank 0."""
    _sync_module_states(module)


def checkpoint_dict(trainer: L.Trainer) -> dict[str, Any]:
    """The trainer's checkpoint, without `Trainer.save_checkpoint`'s barrier, which would wait for failed ranks."""
    return trainer._checkpoint_connector.dump_checkpoint(weights_only=False)


def set_max_steps(trainer: L.Trainer, steps: int) -> None:
    """Sets the number of optimizer steps of the run."""
    trainer.fit_loop.epoch_loop.max_steps = steps


def set_global_step(trainer: L.Trainer, step: int) -> None:
    """Sets the number of optimizer steps taken, which the trainer does not load for an evaluation."""
    trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total.completed = step


def run_validation(trainer: L.Trainer) -> None:
    """Runs the validation loop during training, as the training loop does when validation is due."""
    trainer.validating = True
    trainer.fit_loop.epoch_loop.val_loop.run()
    trainer.training = True


def is_between_batches(trainer: L.Trainer) -> bool:
    """Whether all started micro-batches have been processed."""
    progress = trainer.fit_loop.epoch_loop.batch_progress.total
    return progress.processed == progress.ready  # type: ignore[attr-defined]


def fit_loop_state(trainer: L.Trainer, step: int) -> dict[str, Any]:
    """State of a fit loop at the end of the last micro-batch of an optimizer step, in the first epoch.

    Lightning uses its counters for optimizer steps, for validation, and for the position of loaders with a length. The
    micro-batch and the epoch do not count as completed yet.
    """
    state, batches = trainer.fit_loop.state_dict(), step * trainer.accumulate_grad_batches
    optimizer = state["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]
    # That of a trainer that has run before can have ended its epoch.
    state["epoch_loop.batch_progress"]["is_last_batch"] = False
    for part in ("total", "current"):
        state["epoch_progress"][part].update(ready=1, started=1, processed=0, completed=0)
        state["epoch_loop.scheduler_progress"][part].update(ready=0, completed=0)
        state["epoch_loop.batch_progress"][part].update(
            ready=batches, started=batches, processed=batches, completed=batches - 1
        )
        optimizer["step"][part].update(ready=step, completed=step)
        optimizer["zero_grad"][part].update(ready=step, started=step, completed=step)
    state["epoch_loop.state_dict"]["_batches_that_stepped"] = step - 1
    return state


def set_header_writer(writer: Any, rewrite: Callable[[list[str]], None]) -> None:
    """Makes a CSV logger's writer call ``rewrite(columns)`` for new columns; its own truncates the file first."""
    writer._rewrite_with_new_header = rewrite


def subcommand_parser(cli: LightningCLI) -> Any:
    return cli._subcommand_parsers[str(cli.subcommand)]
