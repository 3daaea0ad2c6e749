"""Checks of the command line and the configs before anything is built."""

import os
import re
from pydoc import locate

from jsonargparse import ArgumentParser, Namespace

from lmchat.cli.short_help import CLASSES, listing
from lmchat.option_checks import check_count, check_range
from lmchat.stages.base import StageModule, check_precision
from lmchat.stages.chat import ChatDataModule, ChatModule
from lmchat.stages.data_module import StageDataModule
from lmchat.types import UserError

ENV_PREFIX = "LMCHAT"

DECIDED_BY = {
    "accumulate_grad_batches": "--model.global_batch_tokens and --data.micro_batch_size",
    "val_check_interval": "--eval.every_n_steps",
    "check_val_every_n_epoch": "--eval.every_n_steps",
    "max_epochs": "--trainer.max_steps",
    "log_every_n_steps": "--monitor.every_n_steps",
    "num_sanity_val_steps": "--eval.at_start",
    "enable_checkpointing": "--checkpoint.every_n_steps and --checkpoint.keep_last",
    "barebones": "--trainer.logger false and a large --monitor.every_n_steps",
}
"""Trainer options that the stages replace, and what to use instead."""

BASE_CLASSES = (StageModule, ChatModule, StageDataModule, ChatDataModule)
MAX_NODES = 2**16
_DEVICES = re.compile(r"auto|-?\d{1,3}(,\s*\d{1,3})*")


def check_groups(config: Namespace, parser: ArgumentParser) -> None:
    """Raises UserError for an option group such as ``trainer`` that is not a mapping; jsonargparse accepts it."""
    with_options = {action.dest.partition(".")[0] for action in parser._actions if "." in action.dest}
    for name in with_options.intersection(parser.groups or ()):
        value = config.get(name)
        if not isinstance(value, Namespace):
            shown = "null" if value is None else value
            raise UserError(f"--{name} is {shown}; it must be a mapping, as in {name}: {{option: value}}")


def check_classes(config: Namespace) -> None:
    """Raises UserError for a base class of the stages as model or data; jsonargparse accepts it."""
    for group, names in CLASSES.items():
        path = getattr(config[group], "class_path", "")
        if locate(path) in BASE_CLASSES:
            name = path.rpartition(".")[2]
            raise UserError(f"--{group} is {name}, a base class; use {', '.join(names)} or a subclass of your own")


def check_environment(subcommand: str, parser: ArgumentParser) -> None:
    """Raises UserError for an environment variable that is not an option; jsonargparse ignores it."""
    prefix = f"{ENV_PREFIX}_{subcommand.upper()}__"
    known = {prefix + action.dest.replace(".", "__").upper() for action in parser._actions}
    if unknown := sorted(name for name in os.environ if name.startswith(prefix) and name not in known):
        raise UserError(
            f"the environment variable {unknown[0]} is not an option; unset or correct it "
            f"({prefix}CHECKPOINT__KEEP_LAST sets --checkpoint.keep_last; `{listing(subcommand)}` lists all options)"
        )


def check_trainer_options(trainer: Namespace, parser: ArgumentParser, subcommand: str) -> None:
    """Raises UserError for a trainer option that would have no effect or would change the dtype of the weights."""
    for name, decisive in DECIDED_BY.items():
        if trainer[name] != parser.get_default(f"trainer.{name}"):
            raise UserError(f"--trainer.{name} {trainer[name]} is not supported: leave it out and use {decisive}")
    # Before the trainer is built: on a CPU it would turn 16-mixed into bf16-mixed.
    check_precision(trainer["precision"])
    if trainer["profiler"] == "xla":
        raise UserError("--trainer.profiler is xla, which is for TPUs; use simple, advanced or pytorch")
    devices = trainer["devices"]
    if isinstance(devices, int | str) and not _DEVICES.fullmatch(str(devices)):
        raise UserError(
            f"--trainer.devices is {devices}; it must be auto, a number of devices below 1,000, or a list such as 0,1"
        )
    if trainer["limit_train_batches"] == 0 and subcommand == "fit":
        raise UserError("--trainer.limit_train_batches is 0, which trains nothing; use lmchat validate to evaluate")
    if trainer["max_steps"] == 0 or trainer["max_steps"] < -1:
        raise UserError(
            f"--trainer.max_steps is {trainer['max_steps']}; give 1 step or more, or leave it out: the length of "
            "the run then follows from --scaling_laws.tokens_per_parameter or from the stage's data"
        )
    for name in ("limit_train_batches", "limit_val_batches", "overfit_batches"):
        if isinstance(trainer[name], float) and trainer[name] not in (0.0, 1.0):
            raise UserError(
                f"--trainer.{name} is {trainer[name]:g}, a fraction of an endless stream; give a number of batches, or "
                f"use --{'data.eval_tokens' if name == 'limit_val_batches' else 'trainer.max_steps'}"
            )
    check_range("trainer", gradient_clip_val=trainer["gradient_clip_val"])
    for name, value in vars(trainer).items():
        if isinstance(value, int):
            check_count("trainer", -1, **{name: value})
    check_count("trainer", 1, MAX_NODES, num_nodes=trainer["num_nodes"])
