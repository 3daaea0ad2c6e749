"""The GPT: nanochat's architecture and weight names, with fp32 weights and a separate compute dtype.

Rotary positions, QK norm, squared-ReLU MLP, RMSNorm without weights, no biases, untied head, soft-capped logits,
per-layer attention windows and, optionally, value embeddings on every other layer and a learned mix of the residual
stream with the normed embedding before each block.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lmchat.losses import Reduction, compiled, linear_cross_entropy, softcap
from lmchat.model.attention import BACKENDS, Attend, AttentionCache, attend_banded, choose_backend, exclude_cudnn
from lmchat.model.config import GATE_CHANNELS, GPTConfig
from lmchat.precision import default_compute_dtype as default_compute_dtype
from lmchat.types import UserError

ROTARY_BASE = 10_000
ROTARY_ROWS = 10
"""Length of the rotary tables, and so the maximum context, as a multiple of ``sequence_len``."""

EPS = torch.finfo(torch.float32).eps
"""Epsilon of all norms, for all dtypes."""


def norm(x: Tensor) -> Tensor:
    """RMSNorm over the last axis, without weights (arXiv:1910.07467)."""
    return F.rms_norm(x, (x.size(-1),), eps=EPS)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding (arXiv:2104.09864); rotates the channel pairs (j, j + half) by minus the angle.

    Args:
        x: (B, T, heads, head_dim).
        cos, sin: (T, 1, head_dim / 2), or (B, T, 1, head_dim / 2) for positions that differ between rows.
    """
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin), dim=-1)


class Linear(nn.Linear):
    """A linear map without bias, whose weight is cast to the input's dtype.

    Attributes:
        fp8: a layer on the same weight that computes in FP8, used in training mode; set by `lmchat.model.fp8`.
    """

    fp8: tuple[nn.Module] | None = None

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Maps x (..., in_features) to (..., out_features)."""
        if self.training and self.fp8 is not None:
            return cast(Tensor, self.fp8[0](x))
        return F.linear(x, self.weight.to(x.dtype))

    def reset_parameters(self) -> None:
        """Does nothing: `GPT.init_weights` initializes the weight."""


def token_table(tokens: int, width: int) -> nn.Embedding:
    """A table whose rows `GPT.init_weights` initializes."""
    return nn.Embedding.from_pretrained(torch.empty(tokens, width), freeze=False)


class AttentionInputs(NamedTuple):
    """What the attention of every block takes besides the residual stream.

    Attributes:
        cos, sin: rotary tables of the positions, see `rotate`.
        kv_cache: keys and values of earlier tokens, to which those of new tokens are added.
        starts: ``document_starts`` of a `lmchat.types.Batch`, to attend within documents only.
        only: (M,) int64 positions whose output is needed; None is all.
    """

    cos: Tensor
    sin: Tensor
    kv_cache: AttentionCache | None
    starts: Tensor | None = None
    only: Tensor | None = None


class SelfAttention(nn.Module):
    """Causal attention with rotary positions, normed queries and keys, and gated value embeddings on some layers.

    Attributes:
        attend: the attention backend, set by `GPT`.
        window: tokens attended to before the current one.
    """

    attend: Attend

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.attend = attend_banded
        self.window = config.window_sizes[layer]
        self.head_dim = config.head_dim
        kv_width = config.n_kv_head * config.head_dim
        self.c_q = Linear(config.n_embd, config.n_embd)
        self.c_k = Linear(config.n_embd, kv_width)
        self.c_v = Linear(config.n_embd, kv_width)
        self.c_proj = Linear(config.n_embd, config.n_embd)
        if layer in config.value_embedding_layers:
            self.ve_gate = Linear(GATE_CHANNELS, config.n_kv_head)

    def forward(self, x: Tensor, value_embedding: Tensor | None, inputs: AttentionInputs) -> Tensor:
        """Output for the normed residual stream x, both (B, T, n_embd); with ``inputs.only`` it is (B, M, n_embd).

        ``value_embedding`` (B, T, n_kv_head · head_dim) is added to the values through the gate; None on other layers.
        """
        cos, sin, kv_cache, starts, only = inputs
        q, k, v = (linear(x).unflatten(-1, (-1, self.head_dim)) for linear in (self.c_q, self.c_k, self.c_v))
        if value_embedding is not None:
            gate = 2 * torch.sigmoid(self.ve_gate(x[..., :GATE_CHANNELS]))
            v = v + gate.unsqueeze(-1) * value_embedding.view_as(v)
        q, k = norm(rotate(q, cos, sin)), norm(rotate(k, cos, sin))
        if only is not None:
            q = q[:, only]
        if kv_cache is None:
            out = self.attend(q, k, v, self.window, starts)
        else:
            out = kv_cache.attend(self.layer, q, k, v, self.window)
        return self.c_proj(out.flatten(2))


class MLP(nn.Module):
    """Two linear maps around a squared ReLU (arXiv:2109.08668)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        """Output (B, T, n_embd) for the normed residual stream x (B, T, n_embd)."""
        return self.c_proj(F.relu(self.c_fc(x)).square())


ResidualMix = tuple[Tensor, Tensor, Tensor]
"""Normed embedding x0 (B, T, n_embd), factor of the residual stream, factor of x0."""


def mix_residual(x: Tensor, mix: ResidualMix | None) -> Tensor:
    """The block's input: the sum of residual stream and normed embedding, times their factors; ``x`` without a mix."""
    if mix is None:
        return x
    x0, resid_lambda, x0_lambda = mix
    return resid_lambda * x + x0_lambda * x0


class Block(nn.Module):
    """Attention and MLP, each added to the residual stream."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.attn = SelfAttention(config, layer)
        self.mlp = MLP(config)

    def forward(
        self, x: Tensor, value_embedding: Tensor | None, inputs: AttentionInputs, mix: ResidualMix | None = None
    ) -> Tensor:
        """The residual stream after the block for x (B, T, n_embd) before it; see `SelfAttention.forward`.

        ``mix`` is applied to ``x`` first; None if already applied, or if the model has none.
        """
        x = mix_residual(x, mix)
        attended = self.attn(norm(x), value_embedding, inputs)
        x = (x if inputs.only is None else x[:, inputs.only]) + attended
        return x + self.mlp(norm(x))


def _look_up(ids: Tensor, dtype: torch.dtype, table: Tensor) -> Tensor:
    """Rows of a token table, (..., width). Compiled, rows and their gradients move in ``dtype``; sums stay fp32."""
    return F.embedding(ids, table).to(dtype)


def _same_kernels_again() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Contexts of a checkpointed block's two forward passes; the second one runs after `GPT.hidden` has returned."""
    return nullcontext(), exclude_cudnn()


class GPT(nn.Module):
    """The language model.

    Weights and gradients are fp32; weights are cast to ``compute_dtype`` at each use. This includes token tables, which
    nanochat stores in bf16 on CUDA: looked-up rows are equal, but small updates are not lost.

    Args:
        config: hyperparameters.
        compute_dtype: dtype of the residual stream and of matrix products; see `default_compute_dtype`.
        attention: a name of `BACKENDS`, or "auto".
        rotary_dtype: dtype that the rotary tables are rounded to; None uses `GPTConfig.rounds_rotary_tables`.

    Attributes:
        attention_backend: name of the backend in use, chosen again when the model moves to another device.
        fused_ends: look-ups in the token tables and the head's loss are compiled. Set by
            `lmchat.model.compile.compile_blocks`, like the next.
        mix_in_blocks: the residual mix is part of the (compiled) blocks.
        checkpoint_blocks: keep only each block's input, and run the block again in the backward pass: less memory for
            about a third more time.
    """

    transformer: Any
    cos: Tensor
    sin: Tensor

    def __init__(
        self,
        config: GPTConfig,
        *,
        compute_dtype: torch.dtype = torch.float32,
        attention: str = "auto",
        rotary_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype = compute_dtype
        self.rotary_dtype = rotary_dtype or (torch.bfloat16 if config.rounds_rotary_tables else torch.float32)
        self.attention = attention
        self._first_device: str | None = None
        self.fused_ends = False
        self.mix_in_blocks = False
        self.checkpoint_blocks = False
        vocab = config.padded_vocab_size
        blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.transformer = nn.ModuleDict({"wte": token_table(vocab, config.n_embd), "h": blocks})
        self.lm_head = Linear(config.n_embd, vocab)
        if config.residual_mix:
            self.resid_lambdas = nn.Parameter(torch.ones(config.n_layer))
            self.x0_lambdas = nn.Parameter(torch.full((config.n_layer,), 0.1))
        kv_width = config.n_kv_head * config.head_dim
        self.value_embeds = nn.ModuleDict(
            {str(layer): token_table(vocab, kv_width) for layer in config.value_embedding_layers}
        )
        self._follow_device()

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.lm_head.weight.device

    @property
    def blocks(self) -> list[Block]:
        """The blocks in order."""
        return cast(list[Block], list(self.transformer.h))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves or casts the weights, as `to` and `to_empty` do."""
        super()._apply(fn, recurse)
        self._follow_device()
        return self

    def _follow_device(self) -> None:
        """Builds the rotary tables and chooses the attention backend, except on the meta device.

        A backend given by name applies to the first device only, since Lightning moves the model to the CPU after
        training.
        """
        if self.device.type == "meta":
            self.attention_backend = self.attention
            return
        self._build_rotary_tables()
        config = self.config
        self._first_device = self._first_device or self.device.type
        self.attention_backend = choose_backend(
            self.attention if self.device.type == self._first_device else "auto",
            self.device,
            self.compute_dtype,
            config.head_dim,
            config.n_head != config.n_kv_head,
        )
        for block in self.blocks:
            block.attn.attend = BACKENDS[self.attention_backend]

    def _build_rotary_tables(self) -> None:
        """Registers ``cos`` and ``sin``, (positions, 1, head_dim / 2), computed on the CPU, equal on all devices."""
        config = self.config
        channels = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu")
        frequencies = 1.0 / (ROTARY_BASE ** (channels / config.head_dim))
        positions = torch.arange(ROTARY_ROWS * config.sequence_len, dtype=torch.float32, device="cpu")
        angles = torch.outer(positions, frequencies)[:, None]
        for name, function in (("cos", torch.cos), ("sin", torch.sin)):
            table = function(angles).to(self.rotary_dtype).to(self.device, self.compute_dtype)
            self.register_buffer(name, table, persistent=False)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Initializes the weights.

        wte N(0, 1); lm_head N(0, 0.001); c_q, c_k, c_v, c_fc and value embeddings U(-s, s) with s = √3/√n_embd; both
        c_proj and the gates 0; resid_lambdas 1; x0_lambdas 0.1.

        Args:
            generator: random number generator; numbers are drawn on its device, so that a CPU generator gives the same
                weights on all devices. None is torch's default generator of the weights' device.
        """

        def draw(weight: Tensor, fill: Callable[..., Tensor], *bounds: float) -> None:
            device = weight.device if generator is None else generator.device
            weight.copy_(fill(torch.empty(weight.shape, device=device), *bounds, generator=generator))

        bound = math.sqrt(3 / self.config.n_embd)
        draw(self.transformer.wte.weight, Tensor.normal_, 0.0, 1.0)
        draw(self.lm_head.weight, Tensor.normal_, 0.0, 0.001)
        for block in self.blocks:
            for linear in (block.attn.c_q, block.attn.c_k, block.attn.c_v, block.mlp.c_fc):
                draw(linear.weight, Tensor.uniform_, -bound, bound)
            block.attn.c_proj.weight.zero_()
            block.mlp.c_proj.weight.zero_()
            if hasattr(block.attn, "ve_gate"):
                block.attn.ve_gate.weight.zero_()
        for table in self.value_embeds.parameters():
            draw(table, Tensor.uniform_, -bound, bound)
        if self.config.residual_mix:
            self.resid_lambdas.fill_(1.0)
            self.x0_lambdas.fill_(0.1)

    def forward(self, ids: Tensor, kv_cache: AttentionCache | None = None) -> Tensor:
        """Logits (B, T, vocab_size) in fp32 for ids (B, T), which follow the tokens in the cache if one is given."""
        return self.logits(self.hidden(ids, kv_cache))

    def logits(self, hidden: Tensor) -> Tensor:
        """Soft-capped fp32 logits (..., vocab_size) of final hidden states (..., n_embd)."""
        logits = self.lm_head(hidden)[..., : self.config.vocab_size]
        return softcap(logits.to(torch.promote_types(logits.dtype, torch.float32)))

    def loss(
        self,
        ids: Tensor,
        targets: Tensor,
        reduction: Reduction = "mean",
        weights: Tensor | None = None,
        token_losses: Tensor | None = None,
        kv_cache: AttentionCache | None = None,
        document_starts: Tensor | None = None,
    ) -> Tensor:
        """Cross-entropy in fp32 of targets (B, T) given ids (B, T).

        See `hidden` for ``kv_cache`` and ``document_starts``, and `linear_cross_entropy` for the rest.
        """
        return linear_cross_entropy(
            self.hidden(ids, kv_cache, document_starts=document_starts),
            self.lm_head.weight,
            targets,
            vocab_size=self.config.vocab_size,
            reduction=reduction,
            weights=weights,
            token_losses=token_losses,
            fused=self.fused_ends,
            project=self.lm_head.fp8[0] if self.training and self.lm_head.fp8 else None,
        )

    def hidden(
        self,
        ids: Tensor,
        kv_cache: AttentionCache | None = None,
        only: Tensor | None = None,
        document_starts: Tensor | None = None,
    ) -> Tensor:
        """Normed hidden states (B, T, n_embd) before the head, in the compute dtype.

        Args:
            ids: (B, T), which follow the tokens in ``kv_cache``.
            kv_cache: keys and values of earlier tokens, to which those of ``ids`` are added.
            only: (M,) int64 positions whose states are needed, for a cache whose `attend` in the last layer takes the
                queries of these; the last block computes no others. The result is (B, M, n_embd).
            document_starts: those of a `lmchat.types.Batch`, to attend within documents only; without a cache.

        Raises:
            UserError: ``ids`` are longer than the rotary tables. With a cache, its owner checks lengths.
        """
        inputs = AttentionInputs(*self._rotary_tables(ids.size(1), kv_cache), kv_cache, document_starts)
        fused = self.fused_ends and kv_cache is None
        look_up = partial(compiled(_look_up) if fused else _look_up, ids, self.compute_dtype)
        x = norm(look_up(self.transformer.wte.weight))
        mixes: list[ResidualMix | None] = [None] * self.config.n_layer
        if self.config.residual_mix:
            # A view: if the first block got the same tensor twice, the compiler would make another graph for it.
            x0 = x.view_as(x)
            mixes = [(x0, *factors) for factors in zip(self.resid_lambdas, self.x0_lambdas, strict=True)]
        with exclude_cudnn():
            for layer, (block, mix) in enumerate(zip(self.blocks, mixes, strict=True)):
                # Compiled blocks are for the fixed shapes of training; a growing cache would recompile them.
                run: Callable[..., Tensor] = block if kv_cache is None else block.forward
                if self.checkpoint_blocks and torch.is_grad_enabled():
                    run = partial(
                        checkpoint, block, use_reentrant=False, preserve_rng_state=False, context_fn=_same_kernels_again
                    )
                if layer == len(self.blocks) - 1:
                    inputs = inputs._replace(only=only)
                value_embedding = None
                if str(layer) in self.value_embeds:
                    value_embedding = look_up(cast(nn.Embedding, self.value_embeds[str(layer)]).weight)
                if not self.mix_in_blocks:
                    x, mix = mix_residual(x, mix), None
                x = run(x, value_embedding, inputs, mix)
        return norm(x)

    def _rotary_tables(self, length: int, kv_cache: AttentionCache | None) -> tuple[Tensor, Tensor]:
        if kv_cache is not None:
            return self.cos[kv_cache.positions], self.sin[kv_cache.positions]
        if length > len(self.cos):
            raise UserError(
                f"a context of {length} tokens is longer than this model's limit of {len(self.cos)} "
                f"({ROTARY_ROWS} x sequence_len {self.config.sequence_len}); shorten it"
            )
        return self.cos[:length], self.sin[:length]
