"""Reads models in the format of the transformers library: exports of lmchat, and `NanoChatForCausalLM`."""

from dataclasses import asdict
from pathlib import Path

from torch import Tensor

from lmchat.checkpoint.hf import format as form
from lmchat.checkpoint.hf.export import need
from lmchat.checkpoint.hf.tokenizer import read_tokenizer
from lmchat.checkpoint.imported import ImportedModel, read_json
from lmchat.checkpoint.meta_schema import check_model_shape
from lmchat.checkpoint.tensors import check_tensors, empty_state
from lmchat.model.config import GPTConfig
from lmchat.model.gpt import EPS
from lmchat.stage_table import STAGES
from lmchat.types import UserError, user_errors

_INHERITED = ("learning_rates", "global_batch_tokens", "micro_batch_size", "weight_decay", "lr_scale")
_REMEDY = "copy or download it again"


def read_hf(folder: Path) -> ImportedModel:
    """Reads a model folder; needs safetensors but not transformers.

    Raises:
        UserError: a file is missing or damaged, or the architecture is another one.
    """
    content = read_json(
        folder / "config.json",
        missing=f"there is no config.json in {folder}; give the folder of an export (lmchat export hf), or of a "
        "download (hf download NAME --local-dir FOLDER)",
    )
    try:
        config = form.from_config(content)
        check_model_shape(asdict(config))
        eps = float(content.get("rms_norm_eps", 1e-6))
    except UserError as error:
        raise UserError(f"{folder / 'config.json'}: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise UserError(f"{folder / 'config.json'} has no valid {error}; {_REMEDY}") from error
    state = _read_tensors(folder)
    if content["model_type"] == "nanochat":
        state = _from_native(folder, state, config)
    tokenizer = read_tokenizer(folder)
    path = folder / form.META_FILE  # of exports of lmchat only
    meta = read_json(path, missing="") if path.exists() else {}
    if meta.get("tokenizer_fingerprint", tokenizer.fingerprint) != tokenizer.fingerprint:
        raise UserError(
            f"{folder / 'tokenizer.json'} is not the tokenizer that {form.META_FILE} names; copy the model's own"
        )
    notes = (f"its norms have eps {eps:g}, lmchat's {EPS:.3g}: outputs differ a little",) if eps != EPS else ()
    return ImportedModel(
        source=folder,
        kind="hf",
        config=config,
        state=state,
        tokenizer=tokenizer,
        stage=meta["stage"] if meta.get("stage") in STAGES else None,
        tag=meta.get("tag", folder.absolute().name),
        step=meta.get("step"),
        settings={name: meta[name] for name in _INHERITED if name in meta},
        notes=notes,
    )


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    """Reads all tensors of ``model.safetensors``, or of the files in its index."""
    index = folder / f"{form.MODEL_FILE}.index.json"
    names = [form.MODEL_FILE]
    if index.exists() and not (folder / form.MODEL_FILE).exists():
        places = read_json(index, missing="").get("weight_map")
        if not isinstance(places, dict) or not places:
            raise UserError(f"{index} lists no files; {_REMEDY}")
        names = sorted(set(map(str, places.values())))
        if strange := [name for name in names if Path(name).name != name]:
            raise UserError(f"{index} names {strange[0]}, outside its folder; {_REMEDY}")
    return {key: tensor for name in names for key, tensor in _read_file(folder / name).items()}


def _read_file(path: Path) -> dict[str, Tensor]:
    load_file = need("safetensors.torch", "reading a Hugging Face model").load_file
    if not path.exists():
        raise UserError(f"{path} is missing; weights are read from safetensors files only; {_REMEDY}")
    with user_errors(f"{path} is damaged", _REMEDY, Exception):  # of safetensors, or of torch for wrong sizes
        return load_file(path)


def _from_native(folder: Path, model: dict[str, Tensor], config: GPTConfig) -> dict[str, Tensor]:
    path = folder / form.PADDING_FILE
    padding = _read_file(path) if path.exists() else {}
    expected, expected_padding = form.to_native(empty_state(config), config)
    check_tensors(model, expected, str(folder), _REMEDY)
    if padding:
        check_tensors(padding, expected_padding, str(path), _REMEDY)
    return form.from_native(model, padding, config)
