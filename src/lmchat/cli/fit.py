"""``lmchat fit`` and ``lmchat validate``: Lightning's command line with lmchat's stages, callbacks and checkpoints."""

import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
from jsonargparse import Namespace
from lightning.fabric import Fabric
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from lmchat.callbacks.benchmarks import ChatCore, Core
from lmchat.callbacks.checkpoint import StepCheckpoint
from lmchat.callbacks.evaluate import Evaluate
from lmchat.callbacks.fp8 import FP8
from lmchat.callbacks.gc_freeze import GCFreeze
from lmchat.callbacks.monitor import Monitor
from lmchat.callbacks.non_finite_guard import NonFiniteGuard
from lmchat.callbacks.samples import Samples
from lmchat.callbacks.save_config import SaveConfig
from lmchat.callbacks.training_plan import TrainingPlan
from lmchat.checkpoint.layout import checkpoint_dir, committed_steps
from lmchat.checkpoint.load import Checkpoint, find_checkpoint
from lmchat.cli.checks import ENV_PREFIX, check_classes, check_environment, check_groups, check_trainer_options
from lmchat.cli.class_errors import check_callbacks, explain_class_error
from lmchat.cli.early_checks import check_config_files
from lmchat.cli.exit_status import (
    ending_other_ranks,
    exit_with_signal_status,
    translate_out_of_memory,
    translate_peer_failure,
)
from lmchat.cli.former_names import accept_former_names, rename_argument
from lmchat.cli.loggers import RunCSVLogger, RunTensorBoardLogger
from lmchat.paths import expand_user, log_dir
from lmchat.stage_table import STAGES
from lmchat.stages import pretrain, rl, sft  # noqa: F401  (known to jsonargparse by their short class names)
from lmchat.stages.base import StageModule
from lmchat.stages.chat import ChatModule
from lmchat.stages.data_module import StageDataModule
from lmchat.stages.device_memory import check_model_fits
from lmchat.strategies import zero2_muon
from lmchat.strategies.lightning_internals import copies_processes, set_global_step, subcommand_parser
from lmchat.types import UserError

TRAINER_DEFAULTS = {
    "max_epochs": -1,
    "precision": "32-true",
    "num_sanity_val_steps": 0,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "use_distributed_sampler": False,
}

SUPPRESSED_WARNINGS = [
    ".*does not have many workers.*",
    ".*LightningCLI's args parameter.*",
    ".*isinstance.treespec, LeafSpec.*",
    ".*`IterableDataset` has `__len__` defined.*",
    r".*add the following callbacks: \['TimeBudget'\].*",
    ".*your dataloader is not resumable.*",
    ".*smaller than the logging interval.*",
    ".*Total length of `list` across ranks is zero.*",
    r".*It is recommended to use `self.log\('(step|val/[^']*)'.*",
]
"""Lightning's warnings that do not apply: packed batches load fast and know their length; a run with a time budget may
continue without one; the DataModule saves the data position; the monitor logs at its own interval; a run may have no
evaluation; all ranks log the same step, and metrics that the evaluators have reduced over the ranks."""


CALLBACKS: dict[str, type[Callback]] = {
    "core": Core,
    "chat_core": ChatCore,
    "scaling_laws": TrainingPlan,
    "fp8": FP8,
    "monitor": Monitor,
    "samples": Samples,
    "gc_freeze": GCFreeze,
    "non_finite_guard": NonFiniteGuard,
    "eval": Evaluate,
    "checkpoint": StepCheckpoint,
}
"""Callbacks of every run by option group, in the order of setup: first those that add evaluators, then the plan."""


class LMChatCLI(LightningCLI):
    """Adds lmchat's callbacks, TensorBoard and CSV logs by default, ``--ckpt_path last`` and ``--ckpt_path auto``.

    ``last`` is the run's newest checkpoint. ``auto`` is the same, or else the newest checkpoint of the nearest earlier
    stage with the same tag, or else none; finished runs are skipped.
    """

    def __init__(self, *args: Any, command: str, **options: Any) -> None:
        self._command = command
        super().__init__(*args, **options)

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]  # Lightning calls it on the instance
        """Only the command in use, since building a parser is slow."""
        return {self._command: LightningCLI.subcommands()[self._command]}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        for group, callback in CALLBACKS.items():
            parser.add_lightning_class_args(callback, group)

    def _parse_ckpt_path(self) -> None:
        """Disabled: the checkpoint's hyperparameters would override the user's options."""

    @property
    def _options(self) -> Namespace:
        """The options of the command in use."""
        return self.config[self.subcommand]

    def before_instantiate_classes(self) -> None:
        parser = subcommand_parser(self)
        check_groups(self._options, parser)
        check_classes(self._options)
        check_environment(str(self.subcommand), parser)
        if self.subcommand == "validate" and self._options["ckpt_path"] is None:
            raise UserError("lmchat validate evaluates a checkpoint; give one with --ckpt_path, e.g. --ckpt_path last")

    def _set_seed(self) -> None:
        seed = self._options["seed_everything"]
        if seed is None or not 0 <= seed < 2**32:  # torch or NumPy would refuse it
            raise UserError(f"--seed_everything is {seed}; it must be a number from 0 to {2**32 - 1}")
        super()._set_seed()

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        created = self.config_init[self.subcommand]["trainer"]
        check_trainer_options(self._options["trainer"], subcommand_parser(self), str(self.subcommand))
        check_callbacks(created["callbacks"], CALLBACKS)
        start = self._find_start()
        if start is not None:
            self.model.load_from(start)
        elif isinstance(self.model, ChatModule):
            # Before its data sets are downloaded.
            raise self.model.checkpoint_missing()
        # Of a checkpoint of another stage, or an imported one, only the weights are used.
        self.resumed = start if start and start.stage == self.model.stage and not start.weights_only else None
        self.datamodule.spec = self.model.spec()
        if created["logger"] in (None, True):
            folder = log_dir(STAGES[self.model.stage].logs, self.model.tag)
            tensorboard = RunTensorBoardLogger(folder.parent, name=folder.name)
            kwargs["logger"] = [tensorboard, RunCSVLogger(tensorboard.log_dir, "csv", "", flush_logs_every_n_steps=10)]
        if SLURMEnvironment.detect():
            # For requeueing, Lightning would save within a signal handler, and to another folder.
            plugins = created["plugins"] or []
            kwargs["plugins"] = [
                *(plugins if isinstance(plugins, list) else [plugins]),
                SLURMEnvironment(auto_requeue=False),
            ]
        try:
            if created["strategy"] == "auto":
                kwargs["strategy"] = default_strategy(created)
            trainer = super().instantiate_trainer(**kwargs)
        except (ValueError, TypeError, ImportError, MisconfigurationException) as error:
            raise UserError(f"--trainer: {error}") from error
        if copies_processes(trainer.strategy.launcher):
            strategy = self._options["trainer"]["strategy"]
            raise UserError(
                f"--trainer.strategy is {getattr(strategy, 'class_path', strategy)}, whose processes copy a run that "
                "is already set up; use ddp or zero2_muon"
            )
        return trainer

    def _find_start(self) -> Checkpoint | None:
        """The checkpoint of ``--ckpt_path``; None starts from initial weights.

        Raises:
            UserError: the checkpoint does not exist or is damaged.
        """
        path, given = self._options["ckpt_path"], self._options["checkpoint"]["dirpath"]
        stage, tag = self.model.stage, self.model.tag
        own = expand_user(given) if given else checkpoint_dir(stage, tag)
        if path == "auto":
            earlier = [checkpoint_dir(name, tag) for name in STAGES[stage].predecessors]
            path = next((folder for folder in [own, *earlier] if committed_steps(folder)), None)
        if path == "last" and not given and not own.exists():
            raise UserError(
                f"there is no run named {tag} of stage {stage} ({own} is missing); train one first (lmchat fit), name "
                "another with --model.tag, or give the folder of its checkpoints with --ckpt_path"
            )
        return None if path is None else find_checkpoint(path, directory=own, warn=rank_zero_warn)

    def _is_finished(self) -> bool:
        """Whether ``--ckpt_path auto`` has found the run's last step, evaluated, and no further steps are requested."""
        resumed, options = self.resumed, self._options
        if resumed is None or options["ckpt_path"] != "auto":
            return False
        if options["eval"]["at_end"] and not resumed.meta.get("evaluated", True):
            return False
        steps = options["trainer"]["max_steps"]
        if self.model.scales_with_depth:
            steps = self.config_init[self.subcommand]["scaling_laws"].scale(self.model, steps).steps
        return resumed.step >= max(resumed.meta.get("total_steps", 0), steps)

    def fit(self, model: StageModule, ckpt_path: str | None = None, **kwargs: Any) -> None:
        resumed = self.resumed
        path = resumed.paths.meta if resumed else None
        if self._is_finished():
            rank_zero_info(f"{self.model.stage} {self.model.tag} is finished: {path}")
            return
        model.trainer = self.trainer
        fixed_rows = model.packed_rows and not self.datamodule.chooses_micro_batch
        check_model_fits(model, trains=True, rows=self.datamodule.micro_batch_size if fixed_rows else 1)
        with (
            ending_other_ranks(self.trainer),
            exit_with_signal_status(self.trainer),
            translate_peer_failure(self.trainer),
            translate_out_of_memory(model),
        ):
            self.trainer.fit(model, ckpt_path=path, **kwargs)
        if resumed and resumed.step >= self.trainer.max_steps:
            rank_zero_info(
                f"nothing to train: {path} is of step {resumed.step}, the run's last; raise "
                "--trainer.max_steps to train on, or start a new run with another --model.tag"
            )

    def validate(self, model: StageModule, ckpt_path: str | None = None, **kwargs: Any) -> None:
        model.trainer = self.trainer
        check_model_fits(model, trains=False)
        if self.resumed:
            set_global_step(self.trainer, self.resumed.step)
        with ending_other_ranks(self.trainer), translate_peer_failure(self.trainer), translate_out_of_memory(model):
            self.trainer.validate(model, ckpt_path=self.resumed.paths.meta if self.resumed else None, **kwargs)


def default_strategy(trainer: Mapping[str, Any]) -> str:
    """``zero2_muon`` if a trainer with these options has several processes; Lightning would take ``ddp``.

    With ddp, signals handled between the collectives of NCCL can hang a run, and RL is not possible.
    """
    devices = {name: trainer[name] for name in ("accelerator", "devices", "num_nodes")}
    try:
        return "zero2_muon" if Fabric(**devices).world_size > 1 else "auto"
    except Exception:  # the trainer refuses these options too, by their names
        return "auto"


class DataModuleCLI(LMChatCLI):
    """Parses the arguments of a run and instantiates only its DataModule."""

    def _set_seed(self) -> None:
        """Not needed: creating a DataModule uses no random numbers."""

    def instantiate_classes(self) -> None:
        self.datamodule = subcommand_parser(self).instantiate(Namespace(data=self._options["data"])).data

    def _run_subcommand(self, subcommand: str) -> None:
        """Runs nothing."""


def read_data_module(configs: list[Path]) -> L.LightningDataModule:
    """The DataModule that ``lmchat fit`` would create from the configs; later configs override earlier ones.

    Raises:
        UserError, jsonargparse.ArgumentError: a config is wrong.
    """
    layers = [argument for config in configs for argument in ("--config", str(config))]
    # The configs may have settings of the data only.
    return main(["fit", "--model", "SFTModule", *layers], DataModuleCLI).datamodule


def main(args: list[str], cli: type[LMChatCLI] = LMChatCLI) -> LMChatCLI:
    """Runs a trainer command.

    Raises:
        UserError: the arguments or the config are wrong.
    """
    for message in SUPPRESSED_WARNINGS:
        warnings.filterwarnings("ignore", message)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: "Tip:" not in record.getMessage()
    )
    check_config_files(args)
    accept_former_names()
    command = args[0]
    options = {"exit_on_error": False, "allow_abbrev": False}
    try:
        return cli(
            StageModule,
            StageDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            save_config_callback=SaveConfig,
            trainer_defaults=TRAINER_DEFAULTS,
            seed_everything_default=42,
            parser_kwargs={"default_env": True, "env_prefix": ENV_PREFIX, **options, command: dict(options)},
            load_from_checkpoint_support=False,  # dumps the config for it; lmchat's checkpoints have their own format
            command=command,
            args=_with_strategy_class([rename_argument(arg) for arg in args]),
        )
    except MisconfigurationException as error:
        raise explain_class_error(error) or UserError(str(error)) from error
    except (UserError, MemoryError):
        raise
    except Exception as error:
        if (user_error := explain_class_error(error)) is None:
            raise
        raise user_error from None


def _with_strategy_class(args: list[str]) -> list[str]:
    """Replaces ``zero2_muon`` by its class name if options of the strategy follow; the parser requires it."""
    option, name = "--trainer.strategy", zero2_muon.Zero2MuonStrategy.__name__
    if not any(arg.startswith(f"{option}.") for arg in args):
        return args
    joined = [arg.replace(f"{option}=zero2_muon", f"{option}={name}") for arg in args]
    return [name if pair == (option, "zero2_muon") else pair[1] for pair in zip(["", *joined], joined, strict=False)]
