"""Validates the ``meta`` of checkpoints, which is untrusted input, before it is used.

Its values are used in paths, memory allocations and messages, and a matching checksum does not show who wrote the file.
Therefore file names must be in the folder, sizes must fit the size of the weights file, and text must not have control
characters.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from lmchat.checkpoint.layout import CheckpointPaths
from lmchat.model.config import MAX_SEQUENCE_LEN, VOCAB_MULTIPLE, GPTConfig
from lmchat.optim.param_groups import LEARNING_RATES
from lmchat.option_checks import MAX_COUNT
from lmchat.paths import is_folder_name
from lmchat.stage_table import STAGES
from lmchat.types import UserError

MAX_NESTING = 32
MAX_LAYERS = 10_000
MAX_RANKS = 2**20
MAX_BYTES_PER_PARAMETER = 64
"""Limit for the file of a rank, whose optimizer state takes 8 or 16 bytes and callbacks may add to."""
MAX_OTHER_BYTES = 2**30

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class Check(NamedTuple):
    """A check of a value: whether it is accepted, and a description of valid values."""

    accepts: Callable[[Any], bool]
    valid: str


def integer(low: int, high: int) -> Check:
    """A check for integers from ``low`` to ``high``."""
    return Check(lambda value: type(value) is int and low <= value <= high, f"a whole number from {low} to {high}")


def one_of(*names: str) -> Check:
    """A check for one of the given strings."""
    return Check(lambda value: type(value) is str and value in names, f"one of {', '.join(names)}")


def optional(check: Check) -> Check:
    """A check for null or values that ``check`` accepts."""
    return Check(lambda value: value is None or check.accepts(value), check.valid)


def _string(accepts: Callable[[str], Any], valid: str) -> Check:
    return Check(lambda value: type(value) is str and bool(accepts(value)), valid)


NUMBER = Check(lambda value: type(value) in (int, float) and 0 <= value < math.inf, "a number, 0 or more")
FINITE = Check(lambda value: type(value) in (int, float) and math.isfinite(value), "a finite number")
FLAG = Check(lambda value: type(value) is bool, "true or false")
MAPPING = Check(lambda value: type(value) is dict, "an object")
TEXT = _string(lambda value: len(value) <= 1000, "a string of at most 1000 characters")
FOLDER_NAME = _string(is_folder_name, "the name of a folder, without slashes")
SHA256 = _string(re.compile("[0-9a-f]{64}").fullmatch, "a SHA-256 in hexadecimal")
_COUNT = integer(1, MAX_COUNT)
COUNTER = integer(0, 2**62)
_STAGE_NAMES = tuple(name for stage in STAGES.values() for name in (stage.name, *stage.former_names))

REQUIRED: dict[str, Check] = {
    "stage": one_of(*_STAGE_NAMES),
    "step": integer(0, MAX_COUNT),
    "world_size": integer(1, MAX_RANKS),
    "files": MAPPING,
    "tag": FOLDER_NAME,
    "model": MAPPING,
    "tokenizer_fingerprint": TEXT,
    "learning_rates": MAPPING,
    "global_batch_tokens": optional(_COUNT),
}
OPTIONAL: dict[str, Check] = {
    "lmchat_version": TEXT,
    "saved_at": TEXT,
    "attempt": TEXT,
    "compute_dtype": one_of("bf16", "fp32", "fp64"),
    "polar_dtype": one_of("bf16", "fp32", "fp64"),
    "attention": TEXT,
    "micro_batch_size": optional(_COUNT),
    "total_steps": _COUNT,
    "lr_scale": NUMBER,
    "weight_decay": NUMBER,
    "mask_documents": FLAG,
    "weights_only": FLAG,
    "evaluated": FLAG,
    "imported": MAPPING,
}
MODEL: dict[str, Check] = {
    "sequence_len": integer(1, MAX_SEQUENCE_LEN),
    "vocab_size": integer(1, 2**26),
    "n_layer": integer(1, MAX_LAYERS),
    "n_head": integer(1, 2**16),
    "n_kv_head": integer(1, 2**16),
    "n_embd": integer(1, 2**20),
    "window_pattern": TEXT,
    "value_embeddings": FLAG,
    "residual_mix": FLAG,
}
_MODEL_REQUIRED = ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd")


def check_meta(meta: Any, paths: CheckpointPaths) -> None:
    """Checks the ``meta`` of the checkpoint at ``paths``, as parsed from JSON, without ``meta_sha256``.

    Raises:
        UserError: a value is missing or wrong; the message names it, but not the file.
    """
    _check_plain(meta)
    _check_fields(meta, REQUIRED, OPTIONAL, "")
    if meta["step"] != paths.step:
        raise UserError(f"step is {meta['step']}, and the file's name says {paths.step}")
    _check_files(meta["files"], paths, meta["world_size"])
    _check_fields(meta["learning_rates"], dict.fromkeys(LEARNING_RATES, NUMBER), {}, "learning_rates.")
    _check_model(meta["model"], meta["files"], paths.model.name)


def check_settings(settings: Mapping[str, Any]) -> None:
    """Checks values for a new ``meta`` that were read from imported files.

    Raises:
        UserError: a value is wrong; the message names it.
    """
    _check_plain(settings)
    _check_fields(settings, {}, {**REQUIRED, **OPTIONAL}, "")
    if "learning_rates" in settings:
        _check_fields(settings["learning_rates"], dict.fromkeys(LEARNING_RATES, NUMBER), {}, "learning_rates.")


def check_model_shape(model: Mapping[str, Any]) -> None:
    """Checks the hyperparameters of a model.

    Raises:
        UserError: one is missing, unknown or wrong; the message names it.
    """
    if unknown := sorted(model.keys() - MODEL.keys()):
        raise UserError(f"model.{shown(unknown[0])} is unknown to this version of lmchat")
    required = {name: MODEL[name] for name in _MODEL_REQUIRED}
    _check_fields(model, required, {name: MODEL[name] for name in MODEL.keys() - required.keys()}, "model.")


def check_state(owner: type, state: Any, fields: Mapping[str, Check]) -> None:
    """Checks what a callback restores from a checkpoint.

    Raises:
        UserError: a value is missing or wrong.
    """
    try:
        _check_fields({"state": state}, {"state": MAPPING}, {}, "")
        _check_fields(state, fields, {}, "")
    except UserError as error:
        raise UserError(
            f"the state of {owner.__name__} in the checkpoint is damaged: {error}; use an older checkpoint"
        ) from error


def shown(value: Any) -> str:
    """A value for a message: escaped, and at most 100 characters."""
    try:
        written = ascii(value)
    except ValueError:  # an int of more than 4,300 digits
        return "a number of thousands of digits"
    return written if len(written) <= 100 else f"{written[:100]}…"


def _check_plain(meta: Any) -> None:
    """Refuses deep nesting, numbers that are not finite, and control characters, anywhere in ``meta``."""
    if type(meta) is not dict:
        raise UserError(f"it is of type {type(meta).__name__}, not an object")
    waiting: list[tuple[Any, int, str]] = [(meta, 0, "it")]
    while waiting:
        value, depth, name = waiting.pop()
        if depth > MAX_NESTING:
            raise UserError(f"{shown(name)} is nested more than {MAX_NESTING} deep")
        if isinstance(value, dict):
            waiting += [(key, depth + 1, "a name") for key in value]
            waiting += [(child, depth + 1, key) for key, child in value.items()]
        elif isinstance(value, list):
            waiting += [(child, depth + 1, name) for child in value]
        elif isinstance(value, str) and _CONTROL.search(value):
            raise UserError(f"{shown(name)} contains control characters: {shown(value)}")
        elif isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{shown(name)} is {value}; it must be finite")


def _check_fields(
    fields: Any, required: Mapping[str, Check], optional_fields: Mapping[str, Check], prefix: str
) -> None:
    for name, check in {**required, **optional_fields}.items():
        if name not in fields:
            if name in required:
                raise UserError(f"{prefix + name:.200} is missing")
        elif not check.accepts(fields[name]):
            raise UserError(f"{prefix + name:.200} is {shown(fields[name])}; it must be {check.valid}")


def _check_files(files: Mapping[str, Any], paths: CheckpointPaths, world_size: int) -> None:
    """Checks that ``files`` lists the weights and every rank's state, each with its size and checksum."""
    if len(files) != world_size + 1:
        raise UserError(
            f"files names {len(files)} files, and the weights and {world_size} rank(s) are {world_size + 1}"
        )
    expected = {paths.model.name, *(paths.optimizer(rank).name for rank in range(world_size))}
    if unknown := sorted(files.keys() - expected):
        raise UserError(f"files names {shown(unknown[0])}, which is not a file of this checkpoint")
    for name, record in files.items():
        _check_fields(files, {name: MAPPING}, {}, "files.")
        _check_fields(record, {"bytes": integer(0, 2**63), "sha256": SHA256}, {}, f"files.{name}.")


def _check_model(model: Mapping[str, Any], files: Mapping[str, Any], weights: str) -> None:
    """Checks the model, and that the sizes of the files fit it; reading much larger ones would take hours."""
    check_model_shape(model)
    weights_bytes = files[weights]["bytes"]
    GPTConfig(**model)
    at_least = 10 * model["n_layer"] * model["n_embd"] ** 2 + 2 * model["vocab_size"] * model["n_embd"]
    if at_least > weights_bytes:
        raise UserError(
            f"model (n_layer {model['n_layer']}, n_embd {model['n_embd']}, vocab_size {model['vocab_size']}) has at "
            f"least {at_least:,} parameters, and the weights file has {weights_bytes:,} bytes"
        )
    for name, record in files.items():
        limit = _max_parameters(model) * MAX_BYTES_PER_PARAMETER + MAX_OTHER_BYTES
        if record["bytes"] > limit:
            raise UserError(f"{name} has {record['bytes']:,} bytes, and a model of this shape at most {limit:,}")


def _max_parameters(model: Mapping[str, Any]) -> int:
    """An upper bound of the number of parameters, with a value embedding in every layer."""
    width, vocab = model["n_embd"], model["vocab_size"] + VOCAB_MULTIPLE
    return (model["n_layer"] + 2) * (12 * width**2 + (vocab + 100) * width)
