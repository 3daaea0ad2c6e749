"""Runs the network for the engine: prefills prompts into the KV pool and decodes rows, with its own weights."""

from collections.abc import Sequence as Seq
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lmchat.generation.cached_attention import Chunk, DecodeCache, Groups, PrefillCache
from lmchat.generation.cuda_graphs import GraphedSteps
from lmchat.generation.decode_state import DecodeState, StepOutput
from lmchat.generation.kv_pool import KVPool, SlotLayout, round_up
from lmchat.generation.sampling import RowParams, Sampled, SamplingMode, sample
from lmchat.generation.sequence import Sequence, SharedPrompt
from lmchat.generation.weights import InferenceWeights
from lmchat.model.gpt import GPT
from lmchat.tokenizer.bpe import Tokenizer
from lmchat.types import UserError

HEAD_LOGITS = 1 << 20
"""Number of logits that a CPU samples from at a time, which bounds the memory of the intermediate results."""

SCORE_TOKENS = 256
"""Tokens scored at a time, which bounds the memory of logits."""

GPU_STEPS_PER_READ = 4
"""Decode steps on a GPU between reads by the host."""

GPU_COLUMNS = 256
"""On a GPU, attention reads slots in multiples of this many tokens, so that few shapes are captured."""


class Runner:
    """The network in evaluation mode with its KV pool and decode state, for at most ``max_rows`` sequences.

    Attributes:
        net: network with inference weights, see `InferenceWeights`.
        pool: slots of the running sequences, and of cached prefixes.
        prompts: slots of shared prompts.
        state: decode state of every slot.
    """

    def __init__(self, source: GPT, tokenizer: Tokenizer, max_rows: int) -> None:
        self.weights = InferenceWeights(source)
        self.net = self.weights.net
        device = source.device
        if device.type == "mps":
            raise UserError(
                "sampling needs float64, which Apple's GPUs lack; use --trainer.accelerator cpu, or train with "
                "--samples.max_new_tokens 0 and without questions in evaluation"
            )
        dtype = source.compute_dtype
        if device.type == "cpu":  # products of few rows are slow in bf16 there
            dtype = torch.promote_types(dtype, torch.float32)
        self.layout = SlotLayout(source.config, dtype)
        self.device = device
        self.pool = KVPool(self.layout, device)
        self.prompts = KVPool(self.layout, device)
        self.state = DecodeState(max_rows, tokenizer, source.config.vocab_size, device)
        self.graphs = GraphedSteps(self.state.frozen) if device.type == "cuda" else None
        self._grouped: tuple[Any, tuple[Tensor, Tensor]] | None = None

    def bucket(self, rows: int) -> int:
        """Number of rows to compute for ``rows`` sequences; on a GPU one of few sizes, each captured once."""
        if self.graphs is None:
            return rows
        bucket = 1 << (rows - 1).bit_length() if rows <= 16 else round_up(rows, 32)
        return min(bucket, self.pool.num_slots)

    def resize(self, pool: KVPool, num_slots: int, capacity: int) -> None:
        """Enlarges the slots of a pool; drops captured graphs, which have the old addresses."""
        pool.resize(num_slots, capacity)
        if self.graphs is not None:
            self.graphs.clear()

    def release(self) -> None:
        """Frees all slots, and on a GPU the memory of the error that made this necessary."""
        self.pool.release()
        self.prompts.release()
        if self.graphs is not None:
            self.graphs.clear()
            torch.cuda.empty_cache()

    @torch.inference_mode()
    def prefill(self, chunks: Seq[Chunk], ids: Seq[int]) -> None:
        """Prefills chunks of prompts, whose ``ids`` are concatenated, into their slots."""
        self._hidden(ids, PrefillCache(chunks, self.device))

    @torch.inference_mode()
    def next_logits(self, prompts: Seq[tuple[int, ...]]) -> Tensor:
        """fp32 logits (prompts, vocab_size) after each prompt."""
        chunks = [Chunk(None, 0, 0, len(prompt)) for prompt in prompts]
        hidden = self._hidden([token for prompt in prompts for token in prompt], PrefillCache(chunks, self.device))
        ends = torch.tensor([len(prompt) for prompt in prompts]).cumsum(0) - 1
        return self.net.logits(hidden[0, ends.to(self.device)])

    @torch.inference_mode()
    def score(self, ids: Seq[int], top: int) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities of all tokens but the first, (n - 1,) fp32, and those of the ``top`` most likely tokens at
        the same positions, (n - 1, top), with their ids."""
        hidden = self._hidden(ids, PrefillCache([Chunk(None, 0, 0, len(ids))], self.device))[0, :-1]
        targets = torch.tensor(ids[1:], dtype=torch.int64, device=self.device)[:, None]
        parts = []
        for part, wanted in zip(hidden.split(SCORE_TOKENS), targets.split(SCORE_TOKENS), strict=True):
            logprobs = self.net.logits(part).log_softmax(dim=-1)
            parts.append((logprobs.gather(1, wanted)[:, 0], *logprobs.topk(min(top, logprobs.size(1)), dim=1)))
        own, values, chosen = zip(*parts, strict=True)
        return torch.cat(own), torch.cat(values), torch.cat(chosen)

    def _hidden(self, ids: Seq[int], cache: PrefillCache) -> Tensor:
        return self.net.hidden(torch.tensor([ids]).to(self.device, non_blocking=True), cache)

    @torch.inference_mode()
    def decode(self, sequences: Seq[Sequence], members: dict[SharedPrompt, list[int]]) -> StepOutput:
        """Decodes the sequences, which are in the first slots of the pool, for a few steps.

        Args:
            sequences: sequences by row.
            members: rows of each shared prompt, in the order of the prompts' slots.

        Returns:
            The outputs of the sequences' rows on the host, with a first dimension of steps.
        """
        rows = self.bucket(len(sequences))
        steps = GPU_STEPS_PER_READ if self.graphs is not None else 1
        multiple = GPU_COLUMNS if self.graphs is not None else 1
        max_own = round_up(max(sequence.num_own for sequence in sequences) + steps, multiple) - 1
        max_own = min(max_own, max(keys.size(2) for keys in self.pool.keys))  # from there on all columns are read
        mode = SamplingMode.of((sequence.params for sequence in sequences), self.state.vocab_size)
        mode = mode if self.graphs is None else mode.rounded(self.state.vocab_size)
        groups = self._groups(rows, members, multiple) if members else None
        uniforms = self._uniforms(sequences, steps, rows)
        outputs = []
        for step in range(steps):
            self.state.first(rows).uniform.copy_(uniforms[step])
            run = partial(self._step, rows, max_own, groups, mode)
            if self.graphs is None:
                outputs.append(run())
            else:
                shape = None if groups is None else (*groups.members.shape, groups.max_prompt)
                outputs.append(self.graphs.run((rows, max_own, shape, mode), run, groups))
        return _read(outputs, len(sequences))

    def _step(self, rows: int, max_own: int, groups: Groups | None, mode: SamplingMode) -> StepOutput:
        """One decode step of the first rows, without host sync and with shapes determined by the arguments."""
        state = self.state.first(rows)
        cache = DecodeCache(self.pool, self.prompts, state.position, state.base, max_own, groups)
        hidden = self.net.hidden(state.token[:, None], cache)[:, 0]
        return state.advance(self._sample(hidden, mode, state.row_params))

    def _sample(self, hidden: Tensor, mode: SamplingMode, params: RowParams) -> Sampled:
        """Samples a token per row of hidden states (rows, n_embd)."""
        vocab_size = self.state.vocab_size
        raw = self.net.lm_head(hidden)
        size = len(raw) if raw.is_cuda else max(1, HEAD_LOGITS // raw.size(1))
        if len(raw) <= size:
            return sample(raw, vocab_size, mode, params)
        columns = (column.split(size) for column in (raw, *params))
        parts = [sample(part, vocab_size, mode, RowParams(*own)) for part, *own in zip(*columns, strict=True)]
        return Sampled(*map(torch.cat, zip(*parts, strict=True)))

    def _groups(self, rows: int, members: dict[SharedPrompt, list[int]], multiple: int) -> Groups:
        by_group = [list(own) for own in members.values()]
        grouped = {row for own in by_group for row in own}
        for row in set(range(rows)) - grouped:
            min(by_group, key=len).append(row)
        groups = by_group, self.prompts.num_slots
        if self._grouped is None or self._grouped[0] != groups:  # Most steps have the groups of the step before them.
            self._grouped = groups, self._group_rows(rows, by_group)
        max_prompt = round_up(max(len(shared.prompt) - 1 for shared in members), multiple)
        return Groups(*self._grouped[1], max_prompt)

    def _group_rows(self, rows: int, by_group: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Members and places; see `Groups`."""
        size, count = max(map(len, by_group)), len(by_group)
        if self.graphs is not None:
            size, count = 1 << (size - 1).bit_length(), min(1 << (count - 1).bit_length(), self.prompts.num_slots)
        heads = np.arange(self.net.config.n_kv_head)
        table = np.zeros((count, len(heads), size), dtype=np.int64)
        places = np.zeros((rows, len(heads)), dtype=np.int64)
        for group, own in enumerate(by_group):
            table[group, :, : len(own)] = np.add.outer(heads, np.array(own) * len(heads))
            places[own] = np.add.outer(np.arange(len(own)), (group * len(heads) + heads) * size)
        return self._to_device(torch.from_numpy(table)), self._to_device(torch.from_numpy(places.ravel()))

    def _uniforms(self, sequences: Seq[Sequence], steps: int, rows: int) -> Tensor:
        """(steps, rows) float64 random numbers of the next tokens."""
        numbers = np.zeros((steps, rows))
        for row, sequence in enumerate(sequences):
            start = len(sequence.completion.ids)
            own = sequence.uniforms[start : start + steps]
            numbers[: len(own), row] = own
        return self._to_device(torch.from_numpy(numbers))

    def _to_device(self, values: Tensor) -> Tensor:
        """Copies asynchronously."""
        if self.device.type != "cuda":
            return values
        return values.pin_memory().to(self.device, non_blocking=True)


def _read(outputs: Seq[StepOutput], rows: int) -> StepOutput:
    """Copies the outputs to the host, the only place where the host waits for the device."""
    if not outputs[0].tokens.is_cuda:
        (output,) = outputs
        return StepOutput(*(field[None] for field in output))
    packed = torch.stack([torch.column_stack([field.double() for field in output]) for output in outputs]).cpu()
    tokens, forced, logprobs, *_ = packed[:, :rows].unbind(2)
    top_ids, top_logprobs = packed[:, :rows, 3:].chunk(2, dim=2)
    return StepOutput(tokens.long(), forced > 0, logprobs, top_ids.long(), top_logprobs)
