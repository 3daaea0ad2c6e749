"""An lmchat GPT for the transformers library, which loads it with ``trust_remote_code=True``.

nanochat's architecture: rotary positions, normed queries and keys, squared-ReLU MLP, norms without weights, untied
head, soft-capped logits, attention windows per layer, value embeddings on some layers, and a learned mix of the
residual stream with the normed embedding before each block.
"""

from __future__ import annotations

from dataclasses import fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

CACHE = "cache" if "cache" in {field.name for field in fields(CausalLMOutputWithPast)} else "past_key_values"
"""Name of the key-value cache: ``cache`` since transformers 5.2x, before that ``past_key_values``."""


class LMChatConfig(PretrainedConfig):
    """Hyperparameters of an lmchat GPT; ``config.json`` has all of them.

    Besides those with the names of other models:
        padded_vocab_size: rows of the token tables, of which the first ``vocab_size`` are tokens.
        window_sizes: per layer, how many tokens back it attends to, the token itself not counted.
        value_embedding_layers: indices of the layers that add a gated token table to the attention's values.
        gate_channels: channels of a layer's input that the gate of its value embedding reads.
        residual_mix: mix the residual stream with the normed embedding before each block.
        rotary_dtype: the rotary tables are rounded to it.
    """

    model_type = "lmchat"
    keys_to_ignore_at_inference = ("past_key_values", "cache")

    def __init__(self, use_cache: bool = True, tie_word_embeddings: bool = False, **kwargs) -> None:
        self.use_cache = use_cache
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)


class Visibility:
    """Which keys each token attends to, the same for all layers of a window.

    Args:
        ids: (B, T), the tokens.
        mask: (B, keys), 0 for padding; or (B, 1, T, keys), True or 0.0 where visible; or None.
        past: tokens in the cache before them.
    """

    def __init__(self, ids: Tensor, mask: Tensor | None, past: int) -> None:
        self.queries = torch.arange(past, past + ids.size(1), device=ids.device)[:, None]
        self.mask = mask
        self.made: dict[tuple[int, int], Tensor] = {}

    def __call__(self, window: int, num_keys: int) -> Tensor:
        """(B or 1, 1, T, num_keys), True where a token attends to a key of its window that is not padding."""
        if (window, num_keys) not in self.made:
            keys = torch.arange(num_keys, device=self.queries.device)
            visible = ((keys <= self.queries) & (keys >= self.queries - window))[None, None]
            if self.mask is not None:
                # Every token sees itself, so that no row of padding is empty.
                visible = (visible & self._not_padding(num_keys)) | (keys == self.queries)
            self.made[window, num_keys] = visible
        return self.made[window, num_keys]

    def _not_padding(self, num_keys: int) -> Tensor:
        mask = self.mask
        if mask.dim() == 2:
            # A static cache has room for keys that the mask does not cover yet.
            return F.pad(mask.bool(), (0, max(0, num_keys - mask.size(1))))[:, None, None, :num_keys]
        return (mask if mask.dtype == torch.bool else mask >= 0)[..., :num_keys]


class Attention(nn.Module):
    """Causal attention within a window, with rotary positions and normed queries and keys."""

    def __init__(self, config: LMChatConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.window = config.window_sizes[layer]
        self.eps = config.rms_norm_eps
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.groups = config.num_attention_heads // config.num_key_value_heads
        self.gate_channels = config.gate_channels
        kv_width = config.num_key_value_heads * self.head_dim
        self.c_q = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.c_k = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.c_v = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.c_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        if layer in config.value_embedding_layers:
            self.ve_gate = nn.Linear(config.gate_channels, config.num_key_value_heads, bias=False)

    def forward(
        self, x: Tensor, value: Tensor | None, cos: Tensor, sin: Tensor, visible: Visibility, cache: Cache | None
    ) -> Tensor:
        """x: (B, T, hidden). value: (B, T, kv heads · head_dim)."""
        batch, length, width = x.shape
        q, k, v = (f(x).view(batch, length, -1, self.head_dim) for f in (self.c_q, self.c_k, self.c_v))
        if value is not None:
            gate = 2 * torch.sigmoid(self.ve_gate(x[..., : self.gate_channels]))
            v = v + gate.unsqueeze(-1) * value.view_as(v)
        q, k = (rms_norm(rotate(heads, cos, sin), self.eps) for heads in (q, k))
        q, k, v = (heads.transpose(1, 2) for heads in (q, k, v))
        if cache is not None:
            # Static caches of transformers before 5.2x need the positions.
            k, v = cache.update(k, v, self.layer, {"cache_position": visible.queries[:, 0]})
        k, v = (heads.repeat_interleave(self.groups, dim=1) for heads in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible(self.window, k.size(2)))
        return self.c_proj(out.transpose(1, 2).reshape(batch, length, width))


class MLP(nn.Module):
    """Two linear maps around a squared ReLU."""

    def __init__(self, config: LMChatConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.c_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.relu(self.c_fc(x)).square())


class Block(nn.Module):
    """Attention and MLP, each added to the residual stream."""

    def __init__(self, config: LMChatConfig, layer: int) -> None:
        super().__init__()
        self.eps = config.rms_norm_eps
        self.attn = Attention(config, layer)
        self.mlp = MLP(config)

    def forward(
        self, x: Tensor, value: Tensor | None, cos: Tensor, sin: Tensor, visible: Visibility, cache: Cache | None
    ) -> Tensor:
        x = x + self.attn(rms_norm(x, self.eps), value, cos, sin, visible, cache)
        return x + self.mlp(rms_norm(x, self.eps))


class Transformer(nn.Module):
    """The token table and the blocks."""

    def __init__(self, config: LMChatConfig) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.padded_vocab_size, config.hidden_size)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))


class LMChatForCausalLM(PreTrainedModel, GenerationMixin):
    """The language model; weights have lmchat's names, which are nanochat's."""

    config_class = LMChatConfig
    base_model_prefix = ""
    _no_split_modules = ["Block"]
    _supports_sdpa = True
    # Factors of whole activations: rounding them to bf16 would change the model.
    _keep_in_fp32_modules_strict = ["resid_lambdas", "x0_lambdas"]

    def __init__(self, config: LMChatConfig) -> None:
        super().__init__(config)
        self.transformer = Transformer(config)
        self.lm_head = nn.Linear(config.hidden_size, config.padded_vocab_size, bias=False)
        if config.residual_mix:
            self.resid_lambdas = nn.Parameter(torch.ones(config.num_hidden_layers))
            self.x0_lambdas = nn.Parameter(torch.full((config.num_hidden_layers,), 0.1))
        kv_width = config.num_key_value_heads * (config.hidden_size // config.num_attention_heads)
        self.value_embeds = nn.ModuleDict(
            {str(layer): nn.Embedding(config.padded_vocab_size, kv_width) for layer in config.value_embedding_layers}
        )
        self._tables: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Weights come from a checkpoint; without one they keep torch's initial values."""

    def get_input_embeddings(self) -> nn.Module:
        return self.transformer.wte

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Soft-capped fp32 logits (B, T, vocab_size) for ids (B, T), after the tokens in the cache.

        attention_mask: (B, cached + T), 0 for padding; or (B, 1, T, keys), True or 0.0 where visible.
        labels: (B, T), -100 where no loss is taken; shifted here.
        """
        config = self.config
        cache = past_key_values if cache is None else cache
        if cache is None and (config.use_cache if use_cache is None else use_cache):
            cache = DynamicCache(config=config)
        past = cache.get_seq_length() if cache is not None else 0
        visible = Visibility(input_ids, attention_mask, past)
        cos, sin = self._rotary(self._positions(input_ids, attention_mask, position_ids, past))
        x = rms_norm(self.transformer.wte(input_ids), config.rms_norm_eps)
        x0 = x
        for layer, block in enumerate(self.transformer.h):
            if config.residual_mix:
                x = self.resid_lambdas[layer] * x + self.x0_lambdas[layer] * x0
            name = str(layer)
            value = self.value_embeds[name](input_ids) if name in self.value_embeds else None
            x = block(x, value, cos, sin, visible, cache)
        x = rms_norm(x, config.rms_norm_eps)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(x[:, keep])[..., : config.vocab_size].float()
        logits = config.final_logit_softcapping * torch.tanh(logits / config.final_logit_softcapping)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: cache})

    def _positions(self, ids: Tensor, mask: Tensor | None, position_ids: Tensor | None, past: int) -> Tensor:
        """(B or 1, T); padding on the left does not count."""
        length = ids.size(1)
        if position_ids is not None:
            return position_ids
        if mask is not None and mask.dim() == 2 and mask.size(1) == past + length:
            return (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
        return torch.arange(past, past + length, device=ids.device)[None]

    def _rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin, each (B or 1, T, 1, head_dim / 2)."""
        if positions.max() >= (limit := self.config.max_position_embeddings):
            raise ValueError(
                f"a context of {int(positions.max()) + 1} tokens is longer than the model's limit of {limit}"
            )
        dtype = self.transformer.wte.weight.dtype
        key = (positions.device, dtype)
        if key not in self._tables:
            self._tables[key] = rotary_tables(self.config, *key)
        cos, sin = self._tables[key]
        return cos[positions], sin[positions]


def rms_norm(x: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last axis, without weights."""
    return F.rms_norm(x, (x.size(-1),), eps=eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding, channels j and j + half together, by minus the angle. x: (B, T, heads, head_dim)."""
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin), dim=-1)


def rotary_tables(config: LMChatConfig, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(positions, 1, head_dim / 2) each, computed on the CPU so that all devices agree."""
    head_dim = config.hidden_size // config.num_attention_heads
    channels = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu")
    frequencies = 1.0 / (config.rope_theta ** (channels / head_dim))
    positions = torch.arange(config.max_position_embeddings, dtype=torch.float32, device="cpu")
    angles = torch.outer(positions, frequencies)[:, None]
    rounded = getattr(torch, config.rotary_dtype)
    return angles.cos().to(rounded).to(device, dtype), angles.sin().to(rounded).to(device, dtype)
