"""``lmchat fit`` and its sisters: Lightning's own command line with lmchat's stages, callbacks and checkpoints."""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
from jsonargparse import Namespace
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from lmchat.argument_errors import config_paths
from lmchat.callbacks.batch_plan import BatchPlan
from lmchat.callbacks.checkpoint import StepCheckpoint
from lmchat.callbacks.eval_schedule import EvalSchedule
from lmchat.callbacks.gc_freeze import GCFreeze
from lmchat.callbacks.monitor import Monitor
from lmchat.callbacks.non_finite_loss import NonFiniteLoss
from lmchat.callbacks.samples import Samples
from lmchat.callbacks.save_config import SaveConfig
from lmchat.callbacks.scaling_laws import ScalingLaws
from lmchat.checkpoint.layout import checkpoint_dir, committed_steps
from lmchat.checkpoint.load import Checkpoint, find_checkpoint
from lmchat.paths import base_dir
from lmchat.stages import grpo, pretrain, sft  # noqa: F401  (known to jsonargparse by their short class names)
from lmchat.stages.base import StageModule, check_precision
from lmchat.stages.chat import ChatModule
from lmchat.strategies import zero2_muon
from lmchat.types import RankFailure, UserError

ENV_PREFIX = "LMCHAT"

TRAINER_DEFAULTS = {
    "max_epochs": -1,
    "precision": "32-true",
    "num_sanity_val_steps": 0,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "use_distributed_sampler": False,
}


UNHELPFUL_WARNINGS = [
    ".*does not have many workers.*",
    ".*LightningCLI's args parameter.*",
    ".*isinstance.treespec, LeafSpec.*",
    ".*`IterableDataset` has `__len__` defined.*",
    r".*add the following callbacks: \['TimeBudget'\].*",
    ".*your dataloader is not resumable.*",
    ".*smaller than the logging interval.*",
    r".*It is recommended to use `self.log\('step'.*",
]
"""Lightning's advice that does not apply here: packed batches cost no time to load, and know their own length; a run
that was short of time may be continued or evaluated without a limit; the position in the data is the DataModule's; the
monitor logs at its own interval, and the step is the same on all ranks."""


DECIDED_BY = {
    "accumulate_grad_batches": "--model.global_batch_tokens and --data.micro_batch_size",
    "val_check_interval": "--eval.every_n_steps",
    "check_val_every_n_epoch": "--eval.every_n_steps",
    "max_epochs": "--trainer.max_steps",
    "log_every_n_steps": "--monitor.every_n_steps",
}
"""Options of the trainer that something else decides, and what that is."""


_CONNECTION_LOST = re.compile(r"gloo/transport/\S+ ([\w ]+\w)|(ncclRemoteError)")
"""What gloo and NCCL say where another process is gone, with the reason as a group."""
_NOT_INSTALLED = re.compile(r"class_path '(?:[\w.]+\.)?(\w+)':\s+Requirement '([^']+)' not met")
_DEVICES = re.compile(r"auto|-?\d+(,\s*\d+)*")


class LMChatCLI(LightningCLI):
    """Adds the callbacks every stage has, TensorBoard and CSV logs by default, ``--ckpt_path last`` and ``auto``.

    ``last`` is the run's newest checkpoint. ``auto`` is that too, or else the newest of the nearest earlier stage with
    the same tag, or else a start from nothing; a run that is finished is left alone.
    """

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Of Lightning's, those that the stages have a loop for."""
        return {name: skipped for name, skipped in LightningCLI.subcommands().items() if name in ("fit", "validate")}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        # The order is that of their set-up: the plan first, then what is derived from it.
        parser.add_lightning_class_args(ScalingLaws, "scaling_laws")
        parser.add_lightning_class_args(BatchPlan, "batch_plan")
        parser.add_lightning_class_args(Monitor, "monitor")
        parser.add_lightning_class_args(Samples, "samples")
        parser.add_lightning_class_args(GCFreeze, "gc_freeze")
        parser.add_lightning_class_args(NonFiniteLoss, "non_finite_loss")
        parser.add_lightning_class_args(EvalSchedule, "eval")
        parser.add_lightning_class_args(StepCheckpoint, "checkpoint")

    def _parse_ckpt_path(self) -> None:
        """Lightning would let the checkpoint's hyperparameters beat the user's; the stage adopts it instead."""

    def before_instantiate_classes(self) -> None:
        self._check_groups()
        self._check_environment()
        if self.subcommand == "validate" and self._get(self.config, "ckpt_path") is None:
            raise UserError("lmchat validate evaluates a checkpoint; give one with --ckpt_path, e.g. --ckpt_path last")

    def _check_groups(self) -> None:
        """Raises UserError for a group like ``trainer`` that is no mapping of options, which jsonargparse lets pass."""
        assert self.subcommand is not None
        parser = self._subcommand_parsers[self.subcommand]
        with_options = {action.dest.partition(".")[0] for action in parser._actions if "." in action.dest}
        for name in with_options.intersection(parser.groups or ()):
            value = self._get(self.config, name)
            if not isinstance(value, Namespace):
                shown = "null" if value is None else value
                raise UserError(f"--{name} is {shown}; it must be a mapping, as in {name}: {{option: value}}")

    def _check_environment(self) -> None:
        """Raises UserError for a variable that names no option, which jsonargparse would ignore."""
        assert self.subcommand is not None
        prefix = f"{ENV_PREFIX}_{self.subcommand.upper()}__"
        actions = self._subcommand_parsers[self.subcommand]._actions
        known = {prefix + action.dest.replace(".", "__").upper() for action in actions}
        if unknown := sorted(name for name in os.environ if name.startswith(prefix) and name not in known):
            raise UserError(
                f"the environment variable {unknown[0]} names no option; unset it, or name one that "
                f"`lmchat {self.subcommand} --help` lists, as {prefix}CHECKPOINT__KEEP_LAST does --checkpoint.keep_last"
            )

    def _set_seed(self) -> None:
        seed = self._get(self.config, "seed_everything")
        if not 0 <= seed < 2**32:
            raise UserError(f"--seed_everything is {seed}; it must be a number from 0 to {2**32 - 1}")
        super()._set_seed()

    def _check_trainer_options(self) -> None:
        """Raises UserError for a trainer option that would have no effect, or would touch the weights' type."""
        assert self.subcommand is not None
        trainer, parser = self._get(self.config, "trainer"), self._subcommand_parsers[self.subcommand]
        for name, decisive in DECIDED_BY.items():
            if trainer[name] != parser.get_default(f"trainer.{name}"):
                raise UserError(f"--trainer.{name} {trainer[name]} has no effect: leave it out and use {decisive}")
        # Here already: on a CPU the trainer would turn 16-mixed into bf16-mixed.
        check_precision(trainer["precision"])
        if isinstance(trainer["devices"], str) and not _DEVICES.fullmatch(trainer["devices"]):
            raise UserError(
                f"--trainer.devices is {trainer['devices']}; it must be auto, a number of devices, or some like 0,1"
            )
        if trainer["limit_train_batches"] == 0 and self.subcommand == "fit":
            raise UserError("--trainer.limit_train_batches is 0, which trains nothing; use lmchat validate to evaluate")
        if trainer["max_steps"] == 0 or trainer["max_steps"] < -1:
            raise UserError(
                f"--trainer.max_steps is {trainer['max_steps']}; give 1 step or more, or leave it out: the length of "
                "the run then follows from --scaling_laws.tokens_per_parameter or from the stage's data"
            )

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        self._check_trainer_options()
        self.checkpoint = self._find_checkpoint()
        if self.checkpoint is not None:
            self.model.adopt(self.checkpoint)
        elif isinstance(self.model, ChatModule):
            # Before its data sets are downloaded.
            raise self.model.checkpoint_missing()
        if self._get(self.config_init, "trainer")["logger"] in (None, True):
            folder, name = base_dir() / "logs" / self.model.stage, self.model.tag
            tensorboard = TensorBoardLogger(folder, name=name)
            kwargs["logger"] = [tensorboard, CSVLogger(tensorboard.log_dir, "csv", "", flush_logs_every_n_steps=10)]
        if SLURMEnvironment.detect():
            # Requeueing, Lightning would save from within a signal handler, and elsewhere.
            plugins = self._get(self.config_init, "trainer")["plugins"] or []
            kwargs["plugins"] = [
                *(plugins if isinstance(plugins, list) else [plugins]),
                SLURMEnvironment(auto_requeue=False),
            ]
        try:
            return super().instantiate_trainer(**kwargs)
        except (ValueError, MisconfigurationException) as error:
            raise UserError(f"--trainer: {error}") from error

    def _find_checkpoint(self) -> Checkpoint | None:
        path = self._get(self.config, "ckpt_path")
        given = self._get(self.config, "checkpoint")["dirpath"]
        own = Path(given).expanduser() if given else checkpoint_dir(self.model.stage, self.model.tag)
        if path == "auto":
            earlier = [checkpoint_dir(stage, self.model.tag) for stage in self.model.earlier_stages]
            path = next((folder for folder in [own, *earlier] if committed_steps(folder)), None)
        return None if path is None else find_checkpoint(path, directory=own, warn=rank_zero_warn)

    def _is_finished(self) -> bool:
        """Whether ``--ckpt_path auto`` has found the end of the run, and the user asks for no more steps."""
        if self._resume_path() is None or self._get(self.config, "ckpt_path") != "auto":
            return False
        assert self.checkpoint is not None
        steps = self._get(self.config, "trainer")["max_steps"]
        if self.model.scales_with_depth:
            steps = self._get(self.config_init, "scaling_laws").plan(self.model, steps).steps
        return self.checkpoint.step >= max(self.checkpoint.meta["total_steps"], steps)

    def _resume_path(self) -> Path | None:
        """What the trainer restores: a checkpoint of the same stage. Another stage's only gives its weights."""
        if self.checkpoint is None or self.checkpoint.stage != self.model.stage:
            return None
        return self.checkpoint.paths.meta

    def fit(self, model: StageModule, ckpt_path: str | None = None, **kwargs: Any) -> None:
        path = self._resume_path()
        if self._is_finished():
            rank_zero_info(f"{self.model.stage} {self.model.tag} is finished: {path}")
            return
        with status_tells_signal(self.trainer), lost_rank_told(self.trainer):
            self.trainer.fit(model, ckpt_path=path, **kwargs)
        if path is not None and self.checkpoint is not None and self.checkpoint.step >= self.trainer.max_steps:
            rank_zero_info(
                f"nothing to train: {path} is of step {self.checkpoint.step}, the run's last; raise "
                "--trainer.max_steps to train on, or start anew with another --model.tag"
            )

    def validate(self, model: StageModule, ckpt_path: str | None = None, **kwargs: Any) -> None:
        with lost_rank_told(self.trainer):
            self.trainer.validate(model, ckpt_path=self._resume_path(), **kwargs)


class DataModuleCLI(LMChatCLI):
    """Reads the arguments of a run, and makes of it nothing but its data module."""

    def _set_seed(self) -> None:
        """A data module draws nothing when it is made."""

    def instantiate_classes(self) -> None:
        assert self.subcommand is not None
        data = Namespace(data=self._get(self.config, "data"))
        self.datamodule = self._subcommand_parsers[self.subcommand].instantiate(data).data

    def _run_subcommand(self, subcommand: str) -> None:
        """Nothing is run."""


def read_data_module(configs: list[Path]) -> L.LightningDataModule:
    """The data module that ``lmchat fit`` makes of these configs, each laid over those before it.

    Raises:
        UserError, jsonargparse.ArgumentError: a config is wrong.
    """
    layers = [argument for config in configs for argument in ("--config", str(config))]
    # A config may be of the data alone.
    return main(["fit", "--model", "SFTModule", *layers], DataModuleCLI).datamodule


def main(args: list[str], cli: type[LMChatCLI] = LMChatCLI) -> LMChatCLI:
    """Runs a trainer command.

    Raises:
        UserError: the arguments or the config are wrong.
    """
    for message in UNHELPFUL_WARNINGS:
        warnings.filterwarnings("ignore", message)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: "Tip:" not in record.getMessage()
    )
    _check_encoding(args)
    options = {"exit_on_error": False, "allow_abbrev": False}
    try:
        return cli(
            StageModule,
            L.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            save_config_callback=SaveConfig,
            trainer_defaults=TRAINER_DEFAULTS,
            seed_everything_default=42,
            parser_kwargs={
                "default_env": True,
                "env_prefix": ENV_PREFIX,
                **options,
                **{name: dict(options) for name in LMChatCLI.subcommands()},
            },
            args=_with_strategy_class(args),
        )
    except MisconfigurationException as error:
        raise UserError(str(error)) from error
    except ValueError as error:
        if lacking := _NOT_INSTALLED.search(str(error)):
            raise UserError(f"{lacking[1]} needs {lacking[2]}; install it: pip install '{lacking[2]}'") from None
        if (mistake := _mistake_behind(error)) is None:
            raise
        raise mistake from None


def _with_strategy_class(args: list[str]) -> list[str]:
    """Names zero2_muon by its class where options of the strategy follow: the parser takes them beside a class only."""
    option, name = "--trainer.strategy", zero2_muon.Zero2MuonStrategy.__name__
    if not any(arg.startswith(f"{option}.") for arg in args):
        return args
    joined = [arg.replace(f"{option}=zero2_muon", f"{option}={name}") for arg in args]
    return [name if pair == (option, "zero2_muon") else pair[1] for pair in zip(["", *joined], joined, strict=False)]


def _check_encoding(args: list[str]) -> None:
    for path in map(Path, config_paths(args)):
        try:
            path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"--config {path} is not text in UTF-8 ({error.reason}); save it as UTF-8") from error
        except OSError:
            continue  # told by the parser


@contextmanager
def status_tells_signal(trainer: L.Trainer) -> Iterator[None]:
    """A run that a signal ends exits with 128 + its number; SIGUSR1, SLURM's warning of the end, acts as SIGTERM."""
    if threading.current_thread() is not threading.main_thread():  # the only one that hears of signals
        yield
        return
    before = signal.signal(signal.SIGUSR1, lambda *_: signal.raise_signal(signal.SIGTERM))
    try:
        yield
    except SIGTERMException:
        # A SystemExit without a status: a scheduler would take the preempted run for a finished one.
        sys.exit(128 + (getattr(trainer.strategy, "agreed_signal", 0) or signal.SIGTERM))
    except SystemExit as status:
        # Lightning gives Ctrl-C the status 1, which is that of an error.
        sys.exit(128 + signal.SIGINT if isinstance(status.__context__, KeyboardInterrupt) else status.code)
    finally:
        signal.signal(signal.SIGUSR1, before)


@contextmanager
def lost_rank_told(trainer: L.Trainer) -> Iterator[None]:
    """Turns the error of a collective whose other end is gone into a `RankFailure`, which needs no traceback."""
    try:
        yield
    except RuntimeError as error:
        cause = error.__cause__ if isinstance(error, RankFailure) else error
        if not (match := _CONNECTION_LOST.search(str(cause))):
            raise
        reason = match[1] or match[2]
        raise RankFailure(
            f"rank {trainer.global_rank} has lost another rank ({reason}); what that one printed says why"
        ) from error


def _mistake_behind(error: BaseException | None) -> UserError | None:
    """The UserError that ``error`` is or comes from: jsonargparse wraps those of a class that it makes."""
    while error is not None and not isinstance(error, UserError):
        error = error.__cause__ or error.__context__
    return error
