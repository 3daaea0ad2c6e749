"""Where lmchat keeps its files."""

import os
import re
from pathlib import Path

from lmchat.types import UserError

_NOT_IN_NAMES = re.compile(r"[/\\\x00-\x1f\x7f-\x9f\ud800-\udfff]")


def expand_user(path: str | Path) -> Path:
    """A path with ``~`` and ``~name`` replaced by home folders. (A shell does not expand ``--option=~``.)

    Raises:
        UserError: there is no such home folder, or the path is empty, which pathlib takes for the current folder.
    """
    if path == "":
        raise UserError("a path is empty (a shell variable without a value?); write . for the current folder")
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"there is no home folder for {path}; write the path without ~") from error


def is_folder_name(name: str) -> bool:
    """Whether ``name`` can name one visible folder: no slashes, no control characters, no dot in front."""
    return bool(name) and name[0] != "." and len(os.fsencode(name)) <= 200 and not _NOT_IN_NAMES.search(name)


def check_folder_name(option: str, name: str) -> None:
    """Raises UserError unless ``name``, the value of ``option``, can name one visible folder."""
    if not is_folder_name(name):
        raise UserError(
            f"{option} is {name!r:.200}, which is not a folder name; leave out slashes, control characters and the dot "
            "in front"
        )


def base_dir() -> Path:
    """The folder for tokenizer, data and checkpoints: ``$LMCHAT_BASE_DIR``, by default ``~/.cache/lmchat``.

    Raises:
        UserError: it begins with a home folder that does not exist.
    """
    given = os.environ.get("LMCHAT_BASE_DIR") or "~/.cache/lmchat"
    try:
        return expand_user(given)
    except UserError as error:
        raise UserError(f"there is no home folder for {given}; set LMCHAT_BASE_DIR to a folder without ~") from error


def tokenizer_dir() -> Path:
    return base_dir() / "tokenizer"


def base_data_dir() -> Path:
    """The folder of the pretraining shards and their token files."""
    return base_dir() / "base_data"


def eval_bundle_dir() -> Path:
    """The folder of the evaluation bundle of CORE."""
    return base_dir() / "eval_bundle"


def log_dir(stage_folder: str, tag: str) -> Path:
    """The folder of a run's logs, with one version folder per start of the run."""
    assert is_folder_name(tag)
    return base_dir() / "logs" / stage_folder / tag
