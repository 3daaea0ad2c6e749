"""Refuses impossible sizes of ``lmchat fit`` and ``lmchat validate`` before torch and Lightning are imported.

This takes one second instead of four. Only options that are certain to take effect are checked; others, such as a
config that cannot be read or a class of the user's, are left to the same checks after parsing, which know the device
and tokenizer.
"""

import os
import stat
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from lmchat.cli.argument_errors import config_paths, unusable_path
from lmchat.hardware import host_memory_bytes, may_have_accelerator
from lmchat.model.config import MAX_SEQUENCE_LEN
from lmchat.option_checks import MAX_COUNT, check_count
from lmchat.scaling import DEFAULT_SEQUENCE_LEN, config_for_depth
from lmchat.training_memory import check_fits, training_memory
from lmchat.types import UserError
from lmchat.yaml_loading import load_yaml

COUNTS = {
    "trainer": ("max_steps", "limit_train_batches", "limit_val_batches"),
    "model": ("depth", "sequence_len", "aspect_ratio", "head_dim", "n_kv_head", "global_batch_tokens"),
    "data": ("micro_batch_size", "buffer_size", "eval_tokens"),
}
"""Options that are refused above `MAX_COUNT`, or ``sequence_len`` above `MAX_SEQUENCE_LEN`."""
SHAPE = (
    "depth", "sequence_len", "aspect_ratio", "head_dim", "n_kv_head", "window_pattern", "value_embeddings",
    "residual_mix",
)  # fmt: skip
LARGEST_DEVICE_BYTES = 10**12
"""More memory than any single accelerator has."""
MOST_RANKS = 2**20
"""More ranks than a run has, to shard the optimizer's state over."""

MAX_CONFIG_BYTES = 10**6

Options = dict[str, dict[str, Any]]


def check_sizes(args: list[str]) -> None:
    """Raises UserError for numbers that no run can have, and for a model that cannot fit this machine.

    Args:
        args: command line, starting with the name of the command.
    """
    check_config_files(args)
    try:
        options = read_options(args)
    except (OSError, ValueError, TypeError, AttributeError, RecursionError, yaml.YAMLError):
        return  # reported by the parser
    for group, names in COUNTS.items():
        for name in names:
            if type(value := options[group].get(name)) is int and value > 0:
                check_count(group, 1, MAX_SEQUENCE_LEN if name == "sequence_len" else MAX_COUNT, **{name: value})
    model, trainer = options["model"], options["trainer"]
    shape = {name: model[name] for name in SHAPE if name in model}
    host, accelerator = host_memory_bytes(), trainer.get("accelerator", "auto")
    plain = all(
        isinstance(value, int | str) or (value is None and name == "n_kv_head") for name, value in shape.items()
    )
    if not plain or "depth" not in shape or not _is_class(model, "PretrainModule"):
        return
    on_cpu = accelerator == "cpu" or (accelerator == "auto" and not may_have_accelerator())
    try:
        config = config_for_depth(**{"sequence_len": DEFAULT_SEQUENCE_LEN, "vocab_size": 1} | shape)
    except (ValueError, TypeError, ArithmeticError):
        return  # reported by the parser
    estimate = partial(
        training_memory,
        config,
        mode="eager" if on_cpu else "recomputing",
        checkpoint_blocks=model.get("checkpoint_blocks") is not False,
        optimizer_shards=MOST_RANKS,
    )
    rows = options["data"].get("micro_batch_size") if _is_class(options["data"], "FineWebDataModule") else 1
    check_fits(
        config,
        "cpu" if on_cpu else "any device",
        host if on_cpu else max(host, LARGEST_DEVICE_BYTES),
        estimate if args[0] == "fit" else None,
        rows if type(rows) is int and rows > 0 else 1,
    )


def check_config_files(args: list[str]) -> None:
    """Raises UserError for a config that is large, is not UTF-8 text, or can be read only once or without end."""
    for path in map(Path, config_paths(args)):
        try:
            found = path.stat()
        except (OSError, ValueError):
            continue  # reported by the parser, or an inline config
        if not stat.S_ISREG(found.st_mode) and not stat.S_ISDIR(found.st_mode):
            raise UserError(unusable_path(f"--config {path}", "a pipe or a device (standard input is --config -)"))
        if found.st_size > MAX_CONFIG_BYTES:
            what = f"a file of {found.st_size:,} bytes, more than any config has"
            raise UserError(unusable_path(f"--config {path}", what))
        try:
            path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"--config {path} is not text in UTF-8 ({error.reason}); save it as UTF-8") from error
        except OSError:
            continue  # reported by the parser


def read_options(args: list[str]) -> Options:
    """The options of the groups model, data and trainer, without ``init_args``; later ones override earlier ones.

    Raises:
        OSError, ValueError, TypeError, AttributeError, RecursionError, yaml.YAMLError: they need the parser.
    """
    options: Options = {group: {} for group in COUNTS}
    prefix = f"LMCHAT_{args[0].upper()}__"
    if any(name.startswith(prefix) for name in os.environ):
        raise ValueError("options by environment variables")
    for name, value in _pairs(args[1:]):
        if name == "config":
            for key, content in load_yaml(Path(value).read_text(encoding="utf-8")).items():
                _update(options, key, content)
        elif name.partition(".")[0] in options:
            _update(options, name, load_yaml(value))
    return options


def _pairs(args: list[str]) -> Iterator[tuple[str, str]]:
    """Names and values of the options in a command line."""
    rest = iter(args)
    for arg in rest:
        name, equals, value = arg.removeprefix("--").partition("=")
        if arg == "-c" or not arg.startswith("--"):
            raise ValueError(f"{arg} is not a long option")
        if name.startswith("print_config") or name.endswith(("help", "help_all")):
            raise ValueError(f"{arg} starts no run")
        yield name, value if equals else next(rest, "")


def _update(options: Options, name: str, given: Any) -> None:
    """Sets ``group`` or ``group.option``. With another class, the options of the previous one are dropped."""
    group, _, option = name.partition(".")
    if group not in options:
        return
    values: dict[str, Any] = {option: given} if option else {"class_path": given}
    if not option and not isinstance(given, str):
        values = dict(given)
    if values.get("class_path", old := options[group].get("class_path")) != old:
        options[group].clear()
    values.update(values.get("init_args") or {})
    options[group] |= {name.removeprefix("init_args."): value for name, value in values.items()}


def _is_class(options: dict[str, Any], name: str) -> bool:
    path = options.get("class_path")
    return isinstance(path, str) and path in (name, f"lmchat.stages.pretrain.{name}")
