"""Finds, verifies and reads checkpoints, without Lightning and without unpickling arbitrary objects."""

import hashlib
import logging
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lmchat.checkpoint.layout import CheckpointPaths, committed_steps, files_by_step
from lmchat.checkpoint.meta_schema import check_meta, shown
from lmchat.checkpoint.tensors import check_tensors, empty_state
from lmchat.checkpoint.writer import FORMAT, json_digest
from lmchat.files import json_object
from lmchat.model.config import GPTConfig
from lmchat.model.gpt import GPT, default_compute_dtype
from lmchat.paths import base_dir, expand_user, tokenizer_dir
from lmchat.stage_table import STAGES, current_stage_name
from lmchat.tokenizer.bpe import Tokenizer
from lmchat.types import UserError

logger = logging.getLogger(__name__)

MAX_META_BYTES = 2**26
"""Limit of the size of ``meta``, far above that of a run on 100,000 ranks."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint: its paths, and its ``meta`` (stage, model, tokenizer, step, files, ...)."""

    paths: CheckpointPaths
    meta: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        return self.paths.step

    @property
    def stage(self) -> str:
        """Name of the stage in `lmchat.stage_table`."""
        return current_stage_name(self.meta["stage"])

    @property
    def weights_only(self) -> bool:
        """Whether it has no optimizer state, because it was imported; runs of any stage start from it at step 0."""
        return self.meta.get("weights_only", False)


class DamagedCheckpoint(UserError):
    """A file of a checkpoint is missing, truncated or altered; the message names it."""


def find_checkpoint(
    path: str | Path, *, directory: Path | None = None, warn: Callable[[str], None] = logger.warning
) -> Checkpoint:
    """Finds the checkpoint at ``path`` and verifies all its files.

    Args:
        path: a ``model_*.pt`` or ``meta_*.json`` file, a folder (its newest complete checkpoint), or ``last`` (the
            newest complete checkpoint in ``directory``).
        directory: folder of the run, for ``last``.
        warn: called with a message for each newer checkpoint that is skipped because it is damaged or unfinished.

    Raises:
        DamagedCheckpoint: the given checkpoint, or every one in the folder, has a missing, truncated or altered file.
        UserError: there is no such checkpoint.
    """
    if str(path) == "last":
        if directory is None:
            raise UserError("`last` needs a run; give the folder or a file of a checkpoint")
        path = directory
    path = expand_user(path)
    if path.suffix and (not path.is_dir() or path.suffix in (".json", ".pt")):
        return open_checkpoint(CheckpointPaths.of(path))
    return _newest(path, warn)


def _newest(directory: Path, warn: Callable[[str], None]) -> Checkpoint:
    damage: DamagedCheckpoint | None = None
    steps = sorted(files_by_step(directory), reverse=True)
    for step in steps:
        paths = CheckpointPaths(directory, step)
        if not paths.meta.exists():
            warn(f"skipping the checkpoint of step {step}: it is unfinished ({paths.meta} is missing)")
            continue
        try:
            checkpoint = open_checkpoint(paths)
        except DamagedCheckpoint as error:
            damage = damage or error
            warn(f"skipping the checkpoint of step {step}: {error}")
            continue
        if step != steps[0]:
            warn(f"falling back to the newest complete checkpoint, {checkpoint.paths.meta}")
        return checkpoint
    if damage is not None:
        raise DamagedCheckpoint(f"{directory} has no complete checkpoint: {damage}") from damage
    raise UserError(
        f"there is no checkpoint in {directory}; train one first (lmchat fit), "
        "or give the folder or file of another one"
    )


def find_model(path: Path | None = None) -> Checkpoint:
    """The checkpoint at ``path``; default is the newest one of the last stage that has any.

    Raises:
        UserError: there is no checkpoint, or it is damaged.
    """
    if path is not None:
        return find_checkpoint(path)
    for stage in reversed(STAGES.values()):
        metas = base_dir().glob(f"{stage.checkpoints}/*/meta_*.json")
        if newest := max(metas, key=lambda meta: meta.stat().st_mtime, default=None):
            return find_checkpoint(newest.parent)
    raise UserError(f"there is no model in {base_dir()}; train one with `lmchat fit`, or give one with --checkpoint")


def open_checkpoint(paths: CheckpointPaths, files: Iterable[Path] | None = None) -> Checkpoint:
    """Reads ``meta`` and verifies size and SHA-256 of ``files``; default is all files that it lists.

    Raises:
        DamagedCheckpoint: a file is missing, truncated or altered.
        UserError: the checkpoint does not exist, or is of a newer format.
    """
    if not paths.meta.exists():
        raise UserError(_absent(paths))
    meta = _read_meta(paths)
    records = meta["files"]
    for name in sorted(records) if files is None else sorted(path.name for path in files):
        if name not in records:
            raise DamagedCheckpoint(f"{paths.meta} lists no {name}; {_REMEDY}")
        _verify(paths.directory / name, records[name])
    return Checkpoint(paths, meta)


def _read_meta(paths: CheckpointPaths) -> dict[str, Any]:
    path = paths.meta
    if not path.is_file() or path.stat().st_size > MAX_META_BYTES:
        raise DamagedCheckpoint(f"{path} is not a regular file of at most {MAX_META_BYTES:,} bytes; {_REMEDY}")
    try:
        meta = json_object(path.read_bytes())
        stated = meta.pop("meta_sha256")
        digest = json_digest(meta)
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}); give it read permission, or copy it again") from error
    except (ValueError, KeyError, RecursionError) as error:
        raise DamagedCheckpoint(f"{path} is truncated or altered; {_REMEDY}") from error
    if digest != stated:
        raise DamagedCheckpoint(f"{path} is altered: its content does not match its SHA-256; {_REMEDY}")
    if meta.get("format") != FORMAT:
        raise UserError(
            f"{path} has format {shown(meta.get('format'))}, this lmchat reads {FORMAT}; use the lmchat that wrote it"
        )
    try:
        check_meta(meta, paths)
    except UserError as error:
        raise DamagedCheckpoint(f"{path} does not describe an lmchat checkpoint: {error}; {_REMEDY}") from error
    return meta


_REMEDY = "copy it again, or use an older checkpoint"


def _absent(paths: CheckpointPaths) -> str:
    steps = committed_steps(paths.directory)
    there = "there is none in that folder; train one first (lmchat fit), or give another with --ckpt_path"
    if steps:
        there = f"complete there: steps {', '.join(map(str, steps))}; give one of these with --ckpt_path"
    if paths.model.exists():
        return f"{paths.model} belongs to a checkpoint that was never finished ({paths.meta.name} is missing); {there}"
    return f"there is no checkpoint of step {paths.step} in {paths.directory}; {there}"


def _verify(path: Path, record: dict[str, Any]) -> None:
    if not path.is_file():
        raise DamagedCheckpoint(f"{path} is {'not a regular file' if path.exists() else 'missing'}; {_REMEDY}")
    size = path.stat().st_size
    if size != record["bytes"]:
        how = "truncated" if size < record["bytes"] else "altered"
        raise DamagedCheckpoint(f"{path} is {how}: {size} bytes, expected {record['bytes']}; {_REMEDY}")
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DamagedCheckpoint(f"{path} cannot be read ({error.strerror}); {_REMEDY}") from error
    if found != record["sha256"]:
        raise DamagedCheckpoint(f"{path} is altered: SHA-256 {found}, expected {record['sha256']}; {_REMEDY}")


def load_model_state(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """The GPT's state dict on the CPU, mapped from the file: copied only where it is used. Not checked.

    Raises:
        DamagedCheckpoint: the file is not a dictionary of tensors and plain values.
    """
    return read_tensors(checkpoint.paths.model, mmap=True)


def load_network_state(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """`load_model_state`, checked against the names and shapes required by ``model`` in ``meta``.

    Raises:
        UserError: names or shapes differ.
    """
    state = load_model_state(checkpoint)
    check_tensors(state, empty_state(GPTConfig(**checkpoint.meta["model"])), str(checkpoint.paths.model), _REMEDY)
    return state


def read_tensors(path: Path, *, mmap: bool = False, remedy: str = _REMEDY) -> dict[Any, Any]:
    """Reads the dictionary in a file of `torch.save`, without executing anything in it.

    Args:
        path: the file.
        mmap: map the tensors into memory instead of reading them.
        remedy: what the user can do if it cannot be read.

    Raises:
        DamagedCheckpoint: it is another kind of file, or contains more than tensors and plain values.
    """
    with path.open("rb") as file:
        start = file.read(4)
    if start != b"PK\x03\x04":
        raise DamagedCheckpoint(f"{path} is not a file of torch.save since version 1.6; {remedy}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of TorchScript archives
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except MemoryError:
        raise
    except Exception as error:  # torch raises errors of many types for other files
        lines = str(error).rpartition("WeightsUnpickler error: ")[2].splitlines()
        reasons = [line for line in lines if line.strip() and not line.startswith(_LOADING_ADVICE)]
        reason = shown(reasons[0] if reasons else type(error).__name__)
        raise DamagedCheckpoint(
            f"{path} contains more than tensors and plain values, or is damaged ({reason}); nothing in it was "
            f"executed; {remedy}"
        ) from error
    if not isinstance(content, dict):
        raise DamagedCheckpoint(f"{path} is of type {type(content).__name__}, not named tensors; {remedy}")
    return content


_LOADING_ADVICE = "Weights only load failed"
"""How torch's advice begins to load the file nevertheless."""


def load_tokenizer(checkpoint: Checkpoint, folder: Path | None = None) -> Tokenizer:
    """The tokenizer that the checkpoint's model was trained with.

    Args:
        folder: folder of the tokenizer; default is the ``tokenizer`` folder beside the checkpoint folders, or else
            ``$LMCHAT_BASE_DIR/tokenizer``.

    Raises:
        UserError: the tokenizer is missing, or a different one.
    """
    beside = checkpoint.paths.directory.parent.parent / "tokenizer"
    folder = folder or (beside if beside.is_dir() else tokenizer_dir())
    tokenizer = Tokenizer.load(folder)
    if tokenizer.fingerprint != checkpoint.meta["tokenizer_fingerprint"]:
        raise UserError(
            f"{checkpoint.paths.meta} was trained with a different tokenizer from the one in {folder}; "
            "give its own with --tokenizer"
        )
    return tokenizer


def load_rank_state(checkpoint: Checkpoint, rank: int) -> dict[str, Any]:
    """The state saved by ``rank``: ``optimizer_states``, ``rng``, callbacks and data position, on the CPU.

    Raises:
        DamagedCheckpoint: the file has other contents, or lacks a part.
    """
    path = checkpoint.paths.optimizer(rank)
    state = read_tensors(path)
    for name, kind in _RANK_STATE.items():
        if name not in state:
            raise DamagedCheckpoint(f"{path} lacks {name}; {_REMEDY}")
        if not isinstance(state[name], kind):
            raise DamagedCheckpoint(f"{path} contains {name} of type {type(state[name]).__name__}; {_REMEDY}")
    if not state["optimizer_states"]:
        raise DamagedCheckpoint(f"{path} has no optimizer state; {_REMEDY}")
    return state


_RANK_STATE: dict[str, type] = {"optimizer_states": list, "rng": dict, "callbacks": dict, "lr_schedulers": list}


def check_can_resume(checkpoint: Checkpoint) -> None:
    """Raises DamagedCheckpoint if ``meta`` lacks values that the trainer restores."""
    for name in ("compute_dtype", "total_steps"):
        if name not in checkpoint.meta:
            raise DamagedCheckpoint(
                f"{checkpoint.paths.meta}: {name} is missing, so that no run can be resumed from it; {_REMEDY}"
            )


def load_model(
    checkpoint: Checkpoint, device: torch.device | str = "cpu", compute_dtype: torch.dtype | None = None
) -> GPT:
    """The checkpoint's network in eval mode, with fp32 weights; ``compute_dtype`` None is the default of ``device``.

    Raises:
        UserError: the model file is damaged, or does not fit the model's shape.
    """
    with torch.device("meta"):
        net = GPT(GPTConfig(**checkpoint.meta["model"]), compute_dtype=compute_dtype or default_compute_dtype(device))
    net.to_empty(device=device)
    net.load_state_dict(load_network_state(checkpoint))
    return net.eval()


def load_inference_model(checkpoint: Checkpoint) -> GPT:
    """As `load_model`, on the GPU if there is one, with matrices and token tables in the compute dtype.

    Both are cast to it at each use anyway, so results are the same.
    """
    net = load_model(checkpoint, "cuda" if torch.cuda.is_available() else "cpu")
    for module in net.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            module.weight = nn.Parameter(module.weight.detach().to(net.compute_dtype), requires_grad=False)
    return net
