"""Turns errors of classes that the user has named, such as Lightning's callbacks and loggers, into one message."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch.callbacks
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint

import lmchat
from lmchat.types import UserError

_NOT_INSTALLED = re.compile(r"class_path '(?:[\w.]+\.)?(\w+)':\s+Requirement '([^']+)' not met")
_CREATED = re.compile(r"Given value: \[?Namespace\(class_path='(?:[\w.]+\.)?(\w+)'")
_TWICE = re.compile(r"Found more than one stateful callback of type `(\w+)`")
_CALLBACKS = Path(lightning.pytorch.callbacks.__file__).parent
_OWN = Path(lmchat.__file__).parent


def check_callbacks(callbacks: Any, groups: Mapping[str, type]) -> None:
    """Raises UserError for a callback that every run has, and for one that saves checkpoints in Lightning's format.

    ``groups`` are the classes of the callbacks of every run, by option group.
    """
    names = {kind: group for group, kind in groups.items()}
    for callback in callbacks if isinstance(callbacks, list) else [callbacks]:
        if group := names.get(type(callback)):
            raise UserError(
                f"--trainer.callbacks: every run has {type(callback).__name__}; leave it out, and set its options with "
                f"--{group}"
            )
        if isinstance(callback, ModelCheckpoint | OnExceptionCheckpoint):
            name, monitor = type(callback).__name__, getattr(callback, "monitor", None)
            raise UserError(
                f"--trainer.callbacks: {name}{f' of {monitor}' if monitor else ''} is not supported; remove it and "
                "use --checkpoint.every_n_steps and --checkpoint.keep_last (an interrupted run is always saved); "
                "val/bpb of every evaluation is in the logs"
            )


def explain_class_error(error: Exception) -> UserError | None:
    """The message for an error of a class that the user has named; None for other errors."""
    text, chain = str(error), list(_causes(error))
    if isinstance(error, ValueError) and (known := [cause for cause in chain if isinstance(cause, UserError)]):
        return known[0]  # jsonargparse wraps errors of the classes it creates
    if lacking := _NOT_INSTALLED.search(text):
        return UserError(f"{lacking[1]} needs {lacking[2]}; install it: pip install '{lacking[2]}'")
    if twice := _TWICE.match(text):
        return UserError(f"--trainer.callbacks has {twice[1]} twice, with equal options; leave one out")
    if isinstance(error, ValueError) and (created := _CREATED.search(text)):
        return UserError(f"{created[1]} cannot be created: {chain[-1]}; correct its options, or leave it out")
    if (name := _failed_callback(error)) is not None:
        return UserError(f"--trainer.callbacks: {name} failed: {error}; correct its options, or leave it out")
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _failed_callback(error: BaseException) -> str | None:
    """The Lightning callback class in which ``error`` was raised; None if lmchat's code raised it."""
    name, traceback = None, error.__traceback__
    while traceback is not None:
        path, scope = Path(traceback.tb_frame.f_code.co_filename), traceback.tb_frame.f_locals
        if path.parent == _CALLBACKS:
            name = type(scope["self"]).__name__ if "self" in scope else path.stem
        elif path.is_relative_to(_OWN):
            name = None
        traceback = traceback.tb_next
    return name
