"""State of the running sequences that a decode step reads and writes, as tensors on the device.

A step samples a token per row, replaces it if a token is forced, and tracks stop tokens, token limits and calculator
calls, all without the host. The host reads the tokens every few steps. Rows that need the host (they ended, or their
calculator call must be answered) are frozen until then: they repeat their last step, which changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from copy import copy
from typing import NamedTuple

import torch
from torch import Tensor

from lmchat.generation.sampling import RowParams, Sampled, candidates
from lmchat.generation.sequence import Sequence
from lmchat.tokenizer.bpe import Tokenizer

MAX_STOPS = 8
"""Maximum number of stop tokens known on the device; the host checks all of them when it reads tokens."""

MAX_FORCED = 128
"""Maximum number of tokens of a calculator's output; see the limits in `lmchat.generation.calculator`."""

FROZEN = -2
"""Token id of frozen rows in the output."""


class StepOutput(NamedTuple):
    """Output of a step.

    Attributes:
        tokens: (rows,) int64 tokens; FROZEN for frozen rows, -1 if the logits are not finite.
        forced: (rows,) bool whether the token was forced.
        logprobs, top_ids, top_logprobs: as in `Sampled`.
    """

    tokens: Tensor
    forced: Tensor
    logprobs: Tensor
    top_ids: Tensor
    top_logprobs: Tensor


class DecodeState:
    """State of every slot; row r of a batch is slot r.

    Attributes:
        token: (slots,) int64 token that the next step reads.
        position: (slots,) int64 position of that token in its context.
        end: (slots,) int64 position of the last token allowed.
        base: (slots,) int64 position of the first token in the slot; earlier positions are in a shared prompt.
        frozen: (slots,) bool.
        uniform: (slots,) float64 random number of the next token.
    """

    def __init__(self, num_slots: int, tokenizer: Tokenizer, vocab_size: int, device: torch.device) -> None:
        self.num_slots = num_slots
        self.vocab_size = vocab_size
        self.call_start, self.call_end = tokenizer.special("python_start"), tokenizer.special("python_end")

        def new(dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.zeros(num_slots, *shape, dtype=dtype, device=device)

        self.token, self.position, self.end, self.base, self.top_k = (new(torch.int64) for _ in range(5))
        self.frozen, self.calculator, self.in_call, self.greedy = (new(torch.bool) for _ in range(4))
        self.temperature, self.top_p, self.uniform = (new(torch.float64).fill_(1) for _ in range(3))
        self.stops = new(torch.int64, MAX_STOPS)
        self.forced = new(torch.int64, MAX_FORCED + 1)  # the last column is read when all are used
        self.forced_at, self.forced_end = new(torch.int64), new(torch.int64)
        self._first: dict[int, DecodeState] = {}

    @property
    def fields(self) -> dict[str, Tensor]:
        """All tensors, (slots, ...) each."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def first(self, rows: int) -> DecodeState:
        """The state of the first rows, in the same memory."""
        if rows not in self._first:
            self._first[rows] = part = copy(self)
            vars(part).update({name: value[:rows] for name, value in self.fields.items()})
        return self._first[rows]

    @torch.inference_mode()
    def set(self, slot: int, sequence: Sequence) -> None:
        """Assigns a sequence to a slot, frozen unless it is prefilled."""
        params, position = sequence.params, sequence.position
        values = {
            "token": sequence.prompt[position],
            "position": position,
            "end": position + params.max_new_tokens,
            "base": sequence.base,
            "frozen": not sequence.is_prefilled,
            "calculator": params.calculator,
            "in_call": False,
            "greedy": params.is_greedy,
            "forced_at": 0,
            "forced_end": 0,
            "temperature": params.temperature or 1.0,
            "top_p": 1.0 if params.top_p is None else params.top_p,
            "top_k": candidates(params, self.vocab_size),
        }
        for name, value in values.items():
            getattr(self, name)[slot].fill_(value)
        stops = sorted(sequence.stop_tokens)[:MAX_STOPS]
        self._fill(self.stops[slot], [*stops, *[-3] * (MAX_STOPS - len(stops))])

    @torch.inference_mode()
    def resume(self, slot: int, forced: Seq[int]) -> None:
        """Unfreezes a row, with tokens to force."""
        self._fill(self.forced[slot, : len(forced)], forced)
        self.forced_at[slot].fill_(0)
        self.forced_end[slot].fill_(len(forced))
        self.frozen[slot].fill_(False)

    @torch.inference_mode()
    def move(self, source: int, target: int) -> None:
        """Copies the state of a slot to another."""
        for field in self.fields.values():
            field[target] = field[source]

    def _fill(self, target: Tensor, values: Seq[int]) -> None:
        if len(values):
            source = torch.tensor(values)
            target.copy_(source.pin_memory() if target.is_cuda else source, non_blocking=True)

    @property
    def row_params(self) -> RowParams:
        """Sampling parameters of the rows."""
        return RowParams(self.temperature, self.top_k, self.top_p, self.greedy, self.uniform)

    def advance(self, sampled: Sampled) -> StepOutput:
        """Appends the sampled tokens, or forced ones instead, and updates the state in place."""
        live = ~self.frozen
        is_forced = live & (self.forced_at < self.forced_end)
        queued = self.forced.gather(1, self.forced_at[:, None]).squeeze(1)
        token = torch.where(is_forced, queued, sampled.tokens)
        self.forced_at += is_forced
        self.position += live

        is_sampled = live ^ is_forced
        is_end = token == self.call_end
        self.frozen |= is_sampled & (self.in_call & is_end | (token[:, None] == self.stops).any(dim=1))
        self.frozen |= (token < 0) | (self.position >= self.end)
        in_call = (token == self.call_start) | (self.in_call & ~is_end)
        self.in_call.copy_(torch.where(is_sampled & self.calculator, in_call, self.in_call))
        self.token.copy_(torch.where(live, token.clamp(min=0), self.token))
        return StepOutput(torch.where(live, token, FROZEN), is_forced, *sampled[1:])
