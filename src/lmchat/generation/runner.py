"""Runs the network for the engine, on inference weights of its own."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch
from torch import Tensor, nn

from lmchat.generation.sampling import Sampler
from lmchat.generation.sequence import Sequence
from lmchat.model.gpt import GPT, Linear
from lmchat.model.kv_cache import KVCache
from lmchat.types import UserError


class Runner:
    """The network in evaluation mode, with the matrices cast to the compute dtype once instead of at every use.

    Weights that already have the dtype they are used in are shared with the source, not copied.

    Args:
        source: the network to follow; it is only read.

    Attributes:
        net: the network that runs.
    """

    def __init__(self, source: GPT) -> None:
        self.source = source
        self.net = _inference_copy(source)

    def refresh(self) -> None:
        """Takes over the source's current weights. Copies are refilled in place, so that their addresses stay valid."""
        with torch.no_grad():
            for name, weight in self.source.named_parameters():
                own = self.net.get_parameter(name)
                if own.dtype != weight.dtype:
                    own.copy_(weight)
                elif own.data_ptr() != weight.data_ptr():
                    own.data = weight.detach()

    @torch.inference_mode()
    def prefill(self, prompts: Seq[tuple[int, ...]]) -> tuple[KVCache, Tensor]:
        """Reads prompts.

        Returns:
            A cache of the prompts, and the logits (prompts, vocab) after each.
        """
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        padded = torch.zeros(len(prompts), int(lengths.max()), dtype=torch.int64)
        for ids, prompt in zip(padded, prompts, strict=True):
            ids[: len(prompt)] = torch.tensor(prompt)
        net = self.net
        cache = KVCache(net.config, padded.size(0), padded.size(1), net.compute_dtype, net.device)
        hidden = net.hidden(padded.to(net.device), cache)
        cache.lengths = lengths
        return cache, net.logits(hidden[torch.arange(len(prompts)), lengths - 1])

    @torch.inference_mode()
    def start(self, sequences: Seq[Sequence]) -> tuple[KVCache, Tensor]:
        """A cache of each sequence's prompt, and the logits (sequences, vocab) after it.

        Each distinct prompt is read once.
        """
        index = {prompt: i for i, prompt in enumerate(dict.fromkeys(sequence.prompt for sequence in sequences))}
        cache, logits = self.prefill(list(index))
        selected = torch.tensor([index[sequence.prompt] for sequence in sequences])
        max_len = max(len(sequence.prompt) + sequence.params.max_new_tokens for sequence in sequences)
        return cache.select(selected, max_len), logits[selected]

    @torch.inference_mode()
    def drop(self, cache: KVCache, rows: Seq[int]) -> list[int]:
        """Removes rows from the cache. Returns the old index of each remaining row."""
        return cache.drop(rows)

    @torch.inference_mode()
    def decode(self, cache: KVCache, sequences: Seq[Sequence]) -> Tensor:
        """Logits (sequences, vocab) after each sequence's newest token."""
        tokens = torch.tensor([sequence.completion.ids[-1] for sequence in sequences])
        return self.net(tokens.to(self.net.device, non_blocking=True)[:, None], cache)[:, -1]

    @torch.inference_mode()
    def sample(self, logits: Tensor, sequences: Seq[Sequence]) -> tuple[list[int], Seq[float | None]]:
        """Samples a token for each sequence.

        Returns:
            The token ids, and their log-probabilities where asked for.

        Raises:
            UserError: the logits are not finite.
        """
        uniforms = torch.tensor([sequence.uniform for sequence in sequences], dtype=torch.float64)
        uniforms = uniforms.to(logits.device, non_blocking=True)
        chosen = torch.empty(len(sequences), dtype=torch.int64, device=logits.device)
        rows_by_sampler: dict[Sampler, list[int]] = {}
        for row, sequence in enumerate(sequences):
            sampler = Sampler(sequence.params.temperature, sequence.params.top_k)
            rows_by_sampler.setdefault(sampler, []).append(row)
        for sampler, rows in rows_by_sampler.items():
            if len(rows) == len(sequences):
                chosen = sampler(logits, uniforms)
            else:
                chosen[rows] = sampler(logits[rows], uniforms[rows])
        ids = chosen.tolist()
        if min(ids) < 0:
            raise UserError("the model's logits are not finite; its training diverged or its checkpoint is damaged")
        if not any(sequence.params.logprobs for sequence in sequences):
            return ids, [None] * len(ids)
        logprobs = logits.log_softmax(dim=-1).gather(-1, chosen[:, None]).squeeze(-1).tolist()
        wanted = [sequence.params.logprobs for sequence in sequences]
        return ids, [logprob if asked else None for logprob, asked in zip(logprobs, wanted, strict=True)]


def _inference_copy(source: GPT) -> GPT:
    """A network of the source's shape in evaluation mode, its `Linear` weights in the compute dtype."""
    with torch.device("meta"):
        net = GPT(
            source.config,
            compute_dtype=source.compute_dtype,
            attention=source.attention,
            rotary_dtype=source.rotary_dtype,
        )
    linear_weights = {f"{name}.weight" for name, module in source.named_modules() if isinstance(module, Linear)}
    for name, weight in source.named_parameters():
        owner = net.get_submodule(name.rpartition(".")[0])
        dtype = source.compute_dtype if name in linear_weights else weight.dtype
        own = nn.Parameter(weight.detach().to(dtype), requires_grad=False)
        setattr(owner, name.rpartition(".")[2], own)
    net.cos, net.sin = source.cos, source.sin
    return net.eval()
