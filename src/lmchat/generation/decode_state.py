"""State of the running sequences that a decode step reads and writes, as tensors on the device.

A step samples a token per row, replaces it if a token is forced, and tracks stop tokens, token limits and calculator
calls, all without the host. The host reads the tokens every few steps. Rows that need the host (they ended, or their
calculator call must be answered) are frozen until then: they repeat their last step, which changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import NamedTuple

import torch
from torch import Tensor

from lmchat.generation.sampling import RowParams, candidates
from lmchat.generation.sequence import Sequence
from lmchat.tokenizer.bpe import Tokenizer

MAX_STOPS = 8
"""Maximum number of stop tokens known on the device; the host checks all of them when it reads tokens."""

MAX_FORCED = 128
"""Maximum number of tokens of a calculator's output; see the limits in `lmchat.generation.calculator`."""

FROZEN = -2
"""Token id of frozen rows in the output."""


class StepOutput(NamedTuple):
    """Output of a step, (rows,) each: token (FROZEN for frozen rows, -1 if the logits are not finite), whether it was
    forced, and its log-probability."""

    tokens: Tensor
    forced: Tensor
    logprobs: Tensor


class DecodeState:
    """State of every slot; row r of a batch is slot r.

    Attributes:
        token: (slots,) int64 token that the next step reads.
        position: (slots,) int64 position of that token in its context.
        base: (slots,) int64 position of the first token in the slot; earlier positions are in a shared prompt.
        prompt_tokens: (slots,) int64 tokens of the shared prompt, 0 without one.
        frozen: (slots,) bool.
        count, limit: (slots,) int64 number of generated tokens, and its maximum.
        uniform: (slots,) float64 random number of the next token.
    """

    def __init__(self, num_slots: int, tokenizer: Tokenizer, vocab_size: int, device: torch.device) -> None:
        self.num_slots = num_slots
        self.vocab_size = vocab_size
        self.call_start, self.call_end = tokenizer.special("python_start"), tokenizer.special("python_end")

        def integers(*shape: int) -> Tensor:
            return torch.zeros(num_slots, *shape, dtype=torch.int64, device=device)

        def flags() -> Tensor:
            return torch.zeros(num_slots, dtype=torch.bool, device=device)

        def numbers() -> Tensor:
            return torch.ones(num_slots, dtype=torch.float64, device=device)

        self.token, self.position, self.base, self.prompt_tokens = integers(), integers(), integers(), integers()
        self.count, self.limit = integers(), integers()
        self.frozen, self.calculator, self.in_call, self.greedy = flags(), flags(), flags(), flags()
        self.stops, self.forced = integers(MAX_STOPS), integers(MAX_FORCED)
        self.forced_at, self.forced_end = integers(), integers()
        self.temperature, self.top_p, self.top_k = numbers(), numbers(), integers()
        self.uniform = numbers()

    @property
    def fields(self) -> list[Tensor]:
        """All tensors, (slots, ...) each."""
        return [value for value in vars(self).values() if isinstance(value, Tensor)]

    @torch.inference_mode()
    def set(self, slot: int, sequence: Sequence, position: int, base: int, frozen: bool) -> None:
        """Assigns a sequence to a slot. ``position`` is that of the next token to read, ``base`` the slot's first."""
        params = sequence.params
        values = {
            "token": sequence.prompt[position],
            "position": position,
            "base": base,
            "prompt_tokens": base,
            "frozen": frozen,
            "count": len(sequence.completion.ids),
            "limit": params.max_new_tokens,
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
        for field in self.fields:
            field[target] = field[source]

    def _fill(self, target: Tensor, values: Seq[int]) -> None:
        if len(values):
            source = torch.tensor(values)
            target.copy_(source.pin_memory() if target.is_cuda else source, non_blocking=True)

    def row_params(self, rows: int) -> RowParams:
        """Sampling parameters of the first rows."""
        fields = self.temperature, self.top_k, self.top_p, self.greedy, self.uniform
        return RowParams(*(field[:rows] for field in fields))

    def advance(self, chosen: Tensor, logprobs: Tensor) -> StepOutput:
        """Appends the chosen tokens (rows,) of the first rows, or forced ones instead, and updates the state."""
        rows = len(chosen)
        frozen, forced_at = self.frozen[:rows], self.forced_at[:rows]
        live = ~frozen
        is_forced = (forced_at < self.forced_end[:rows]) & live
        from_queue = self.forced[:rows].gather(1, forced_at.clamp(max=MAX_FORCED - 1)[:, None]).squeeze(1)
        token = torch.where(is_forced, from_queue, chosen)
        forced_at += is_forced

        in_call = self.in_call[:rows]
        sampled = live & ~is_forced
        ends_call = sampled & in_call & (token == self.call_end)
        follows = sampled & self.calculator[:rows]
        starts_call = token == self.call_start
        in_call.copy_(torch.where(follows, starts_call | (in_call & (token != self.call_end)), in_call))

        stopped = sampled & (token[:, None] == self.stops[:rows]).any(dim=1)
        self.count[:rows] += live
        self.position[:rows] += live
        failed = live & (token < 0)
        output = StepOutput(torch.where(live, token, FROZEN), is_forced, logprobs)
        self.token[:rows].copy_(torch.where(live, token.clamp(min=0), self.token[:rows]))
        frozen |= stopped | ends_call | failed | (self.count[:rows] >= self.limit[:rows])
        return output
