"""Configs and tensor names of the two formats of an lmchat GPT in the transformers library.

native   transformers' own `NanoChatForCausalLM`, for architectures that it supports
lmchat   `LMChatForCausalLM` in the modelling file of the export, for all architectures
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lmchat.losses import LOGIT_SOFTCAP
from lmchat.model.config import GATE_CHANNELS, GPTConfig
from lmchat.model.gpt import EPS, ROTARY_BASE, ROTARY_ROWS
from lmchat.types import UserError

MODEL_FILE = "model.safetensors"
PADDING_FILE = "padding.safetensors"
META_FILE = "lmchat_meta.json"

_NATIVE_PARTS = {
    "attn.c_q": "self_attn.q_proj",
    "attn.c_k": "self_attn.k_proj",
    "attn.c_v": "self_attn.v_proj",
    "attn.c_proj": "self_attn.o_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_TABLES = ("transformer.wte.weight", "lm_head.weight")
"""Tensors of a native model with one row per token."""


def native_names(config: GPTConfig) -> dict[str, str]:
    """Maps lmchat's names of a native model's tensors to transformers' names."""
    names = {"transformer.wte.weight": "model.embed_tokens.weight", "lm_head.weight": "lm_head.weight"}
    for layer in range(config.n_layer):
        for part, native in _NATIVE_PARTS.items():
            names[f"transformer.h.{layer}.{part}.weight"] = f"model.layers.{layer}.{native}.weight"
    return names


def to_native(state: Mapping[str, Tensor], config: GPTConfig) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Converts to a native model's tensors by transformers' names, and the padding rows by lmchat's names.

    Raises:
        UserError: a tensor has no counterpart in `NanoChatForCausalLM`.
    """
    names, tokens = native_names(config), config.vocab_size
    if other := sorted(state.keys() - names.keys()):
        raise UserError(f"NanoChatForCausalLM has no place for {other[0]}; export the checkpoint without --native")
    model = {names[name]: tensor[:tokens] if name in _TABLES else tensor for name, tensor in state.items()}
    padding = {name: state[name][tokens:] for name in _TABLES if tokens < config.padded_vocab_size}
    return model, padding


def from_native(model: Mapping[str, Tensor], padding: Mapping[str, Tensor], config: GPTConfig) -> dict[str, Tensor]:
    """The inverse of `to_native`; padding rows that are not given are zeros."""
    state = {}
    for name, native in native_names(config).items():
        tensor = model[native]
        if name in _TABLES:
            rest = padding.get(name, tensor.new_zeros(config.padded_vocab_size - len(tensor), tensor.size(1)))
            tensor = torch.cat((tensor, rest.to(tensor.dtype)))
        state[name] = tensor
    return state


def context_limit(config: GPTConfig, native: bool) -> int:
    """Maximum context of the export in tokens: the trained context if native, else lmchat's limit."""
    return config.sequence_len if native else ROTARY_ROWS * config.sequence_len


def native_config(config: GPTConfig) -> dict[str, Any]:
    """``config.json`` of `NanoChatForCausalLM`, without the token ids."""
    return {
        "architectures": ["NanoChatForCausalLM"],
        "model_type": "nanochat",
        **_sizes(config),
        "vocab_size": config.vocab_size,
        "max_position_embeddings": context_limit(config, native=True),
        "hidden_act": "relu2",
        "rope_parameters": {"rope_type": "default", "rope_theta": float(ROTARY_BASE)},
        "attention_bias": False,
    }


def lmchat_config(config: GPTConfig) -> dict[str, Any]:
    """``config.json`` of `LMChatForCausalLM`, without the token ids."""
    return {
        "architectures": ["LMChatForCausalLM"],
        "model_type": "lmchat",
        "auto_map": {
            "AutoConfig": "modeling_lmchat.LMChatConfig",
            "AutoModelForCausalLM": "modeling_lmchat.LMChatForCausalLM",
        },
        **_sizes(config),
        "vocab_size": config.vocab_size,
        "padded_vocab_size": config.padded_vocab_size,
        "max_position_embeddings": context_limit(config, native=False),
        "sequence_len": config.sequence_len,
        "window_pattern": config.window_pattern,
        "window_sizes": list(config.window_sizes),
        "value_embedding_layers": list(config.value_embedding_layers),
        "gate_channels": GATE_CHANNELS,
        "residual_mix": config.residual_mix,
        "rope_theta": float(ROTARY_BASE),
        "rotary_dtype": "bfloat16" if config.rounds_rotary_tables else "float32",
    }


def _sizes(config: GPTConfig) -> dict[str, Any]:
    return {
        "hidden_size": config.n_embd,
        "intermediate_size": 4 * config.n_embd,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_kv_head,
        "rms_norm_eps": EPS,
        "final_logit_softcapping": LOGIT_SOFTCAP,
        "tie_word_embeddings": False,
        "use_cache": True,
    }


def from_config(content: Mapping[str, Any]) -> GPTConfig:
    """Hyperparameters from a ``config.json`` of either format.

    Raises:
        UserError: the architecture is another one, or has settings that lmchat does not support.
    """
    kind = content.get("model_type")
    if kind not in ("lmchat", "nanochat"):
        raise UserError(
            f"its model_type is {kind!r}; lmchat reads its own exports (lmchat) and NanoChatForCausalLM (nanochat)"
        )
    heads = content["num_attention_heads"]
    _require("final_logit_softcapping", content.get("final_logit_softcapping", LOGIT_SOFTCAP), LOGIT_SOFTCAP)
    _require("tie_word_embeddings", content.get("tie_word_embeddings", False), False)
    _require("intermediate_size", content["intermediate_size"], 4 * content["hidden_size"])
    own = {
        "vocab_size": content["vocab_size"],
        "n_layer": content["num_hidden_layers"],
        "n_head": heads,
        "n_kv_head": content.get("num_key_value_heads") or heads,
        "n_embd": content["hidden_size"],
    }
    if kind == "lmchat":
        return GPTConfig(
            **own,
            sequence_len=content["sequence_len"],
            window_pattern=content["window_pattern"],
            value_embeddings=bool(content["value_embedding_layers"]),
            residual_mix=content["residual_mix"],
        )
    rope = content.get("rope_parameters") or content.get("rope_scaling") or {}
    _require("hidden_act", content.get("hidden_act", "relu2"), "relu2")
    _require("attention_bias", content.get("attention_bias", False), False)
    _require("rope_type", rope.get("rope_type", "default"), "default")
    _require("rope_theta", rope.get("rope_theta", content.get("rope_theta", ROTARY_BASE)), ROTARY_BASE)
    _require("head_dim", content.get("head_dim") or own["n_embd"] // heads, own["n_embd"] // heads)
    sequence_len = content["max_position_embeddings"]
    return GPTConfig(**own, sequence_len=sequence_len, window_pattern="L", value_embeddings=False, residual_mix=False)


def _require(name: str, value: Any, expected: Any) -> None:
    if value != expected:
        raise UserError(f"its {name} is {value}; lmchat's models have {expected}")
