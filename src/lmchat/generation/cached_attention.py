"""Attention over the slots of a KV pool, for chunks of prompts and for one new token per sequence."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
from torch import Tensor

from lmchat.generation.kv_pool import KVPool, round_up
from lmchat.model.attention import attend_banded, attention, window_mask

READ_COLUMNS = 16
"""Attention reads slots in multiples of this many tokens, so that the order of summation is the same in all batches."""


@dataclass(frozen=True)
class Chunk:
    """A part of a prompt that is prefilled at once: ``length`` tokens from position ``start`` on, into a slot.

    Without a pool, keys and values are not stored, and ``start`` is 0.
    """

    pool: KVPool | None
    slot: int
    start: int
    length: int


class PrefillCache:
    """Chunks of several prompts concatenated in one row, each attending to its own slot; see `AttentionCache`."""

    def __init__(self, chunks: Seq[Chunk], device: torch.device) -> None:
        self.chunks = chunks
        positions = [torch.arange(chunk.start, chunk.start + chunk.length) for chunk in chunks]
        self._positions = torch.cat(positions).to(device, non_blocking=True)[None]
        self._end = max(chunk.start + chunk.length for chunk in chunks)

    def context_end(self, length: int) -> int:
        return self._end

    def positions(self, length: int) -> Tensor:
        return self._positions

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
        out, start = [], 0
        for chunk in self.chunks:
            part = slice(start, start + chunk.length)
            out.append(_attend_chunk(chunk, layer, q[:, part], k[:, part], v[:, part], window))
            start += chunk.length
        return torch.cat(out, dim=1) if len(out) > 1 else out[0]

    def advance(self, length: int) -> None:
        """Does nothing: chunks have their positions."""


def _attend_chunk(chunk: Chunk, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Attention of a chunk, (1, length, heads, head_dim), to itself and its slot; then stores its keys and values."""
    if chunk.pool is None:
        return attend_banded(q, k, v, window)
    keys, values = chunk.pool.keys[layer][chunk.slot], chunk.pool.values[layer][chunk.slot]
    columns = keys.size(1)
    if chunk.start == 0:
        out = attend_banded(q, k, v, window)
    else:
        first = max(0, chunk.start - window)
        positions = torch.arange(first, chunk.start + chunk.length, device=q.device)
        held = positions[: chunk.start - first] % columns
        all_k = torch.cat((keys[:, held].transpose(0, 1)[None].to(k.dtype), k), dim=1)
        all_v = torch.cat((values[:, held].transpose(0, 1)[None].to(v.dtype), v), dim=1)
        out = attention(q, all_k, all_v, window_mask(positions[chunk.start - first :], positions, window))
    kept = min(chunk.length, columns)
    end = chunk.start + chunk.length
    written = torch.arange(end - kept, end, device=q.device) % columns
    keys[:, written] = k[0, -kept:].transpose(0, 1).to(keys.dtype)
    values[:, written] = v[0, -kept:].transpose(0, 1).to(values.dtype)
    return out


@dataclass(frozen=True)
class Groups:
    """Which running sequences share a prompt.

    Attributes:
        members: (groups, size) int64 rows of each group, padded by repeating a row. Rows without a shared prompt are in
            an arbitrary group, whose prompt is masked for them.
        places: (rows,) int64, index of each row in the flattened ``members``.
        prompt_tokens: (rows,) int64 tokens of the shared prompt; 0 for rows without one.
        max_prompt: maximum of ``prompt_tokens``, known on the host.
    """

    members: Tensor
    places: Tensor
    prompt_tokens: Tensor
    max_prompt: int


class DecodeCache:
    """One new token for each of the first rows of a pool; see `AttentionCache`.

    Row r uses slot r. The context of a row is the prompt of its group, which is read once for the whole group, followed
    by its own slot. Products run in the dtype of the pool, the softmax in fp32 or higher.

    Args:
        pool: slots of the sequences.
        prompts: slots of the groups' prompts, group g in slot g.
        positions: (rows,) int64 position of each new token.
        own: (rows,) int64 tokens already in the row's own slot.
        max_own: an upper bound of `own` known on the host.
        groups: which rows share a prompt, if any.
    """

    def __init__(
        self, pool: KVPool, prompts: KVPool, positions: Tensor, own: Tensor, max_own: int, groups: Groups | None
    ) -> None:
        self.pool = pool
        self.prompts = prompts
        self.row_positions = positions
        self.own = own
        self.max_own = max_own
        self.groups = groups
        self._rows = torch.arange(len(positions), device=positions.device)
        self._masks: dict[tuple[int, int, int], Tensor] = {}
        self._written: dict[int, Tensor] = {}

    def context_end(self, length: int) -> int:
        """Returns 0: the engine checks lengths, and positions are not known on the host."""
        return 0

    def positions(self, length: int) -> Tensor:
        return self.row_positions[:, None]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
        keys, values = self.pool.keys[layer], self.pool.values[layer]
        columns = keys.size(2)
        if columns not in self._written:
            self._written[columns] = self.own % columns
        written = self._written[columns]
        keys[self._rows, :, written] = k[:, 0].to(keys.dtype)
        values[self._rows, :, written] = v[:, 0].to(values.dtype)

        rows, kv_heads = len(q), keys.size(1)
        q = (q[:, 0] * q.size(-1) ** -0.5).to(keys.dtype).view(rows, kv_heads, -1, q.size(-1))
        used = min(columns, round_up(self.max_own + 1, READ_COLUMNS))
        keys, values = keys[:rows, :, :used], values[:rows, :, :used]
        scores = _product(keys, q.transpose(2, 3)).transpose(2, 3)
        if self.groups is None:
            weights = (scores + self._own_mask(columns, used, window)).softmax(dim=-1)
            out = _product(weights.to(keys.dtype), values)
        else:
            out = self._attend_with_prompts(layer, q, scores, values, columns, window)
        return out.to(k.dtype).view(rows, 1, -1, k.size(-1))

    def advance(self, length: int) -> None:
        """Does nothing: `DecodeState` counts positions."""

    def _attend_with_prompts(
        self, layer: int, q: Tensor, own_scores: Tensor, values: Tensor, columns: int, window: int
    ) -> Tensor:
        """(rows, kv heads, heads per kv head, head_dim) from the rows' own scores and slots, and their prompts."""
        groups = self.groups
        assert groups is not None
        num_groups, size = groups.members.shape
        prompt_keys, prompt_values = self.prompts.keys[layer], self.prompts.values[layer]
        prompt_columns = prompt_keys.size(2)
        used = min(prompt_columns, round_up(groups.max_prompt, READ_COLUMNS))
        prompt_keys, prompt_values = prompt_keys[:num_groups, :, :used], prompt_values[:num_groups, :, :used]
        _, kv_heads, per_head, _ = q.shape

        def to_groups(x: Tensor) -> Tensor:
            """(rows, kv heads, per head, n) to (groups, kv heads, size · per head, n)."""
            return x[groups.members].transpose(1, 2).reshape(num_groups, kv_heads, size * per_head, -1)

        def to_rows(x: Tensor) -> Tensor:
            """Back again."""
            x = x.view(num_groups, kv_heads, size, per_head, -1).transpose(1, 2)
            return x.reshape(num_groups * size, kv_heads, per_head, -1)[groups.places]

        prompt_scores = to_rows(_product(to_groups(q), prompt_keys.transpose(2, 3)))
        scores = torch.cat((prompt_scores, own_scores), dim=-1)
        mask = self._mask_with_prompts(prompt_columns, used, columns, own_scores.size(-1), window)
        weights = (scores + mask).softmax(dim=-1).to(values.dtype)
        prompt_out = to_rows(_product(to_groups(weights[..., :used]), prompt_values))
        return prompt_out + _product(weights[..., used:], values)

    def _own_mask(self, columns: int, used: int, window: int) -> Tensor:
        """(rows, 1, 1, used) to add to scores: 0 where the new token sees a column of its slot, else -inf."""
        key = (columns, used, window)
        if key not in self._masks:
            distance = _ring_distance(self.own, columns, used)
            self._masks[key] = _additive(distance <= self.own.clamp(max=window)[:, None])
        return self._masks[key]

    def _mask_with_prompts(self, prompt_columns: int, prompt_used: int, columns: int, used: int, window: int) -> Tensor:
        """The same for the columns of the prompt, then of the slot."""
        key = (columns, used, -1 - window)
        if key not in self._masks:
            groups = self.groups
            assert groups is not None
            last = groups.prompt_tokens - 1
            distance = _ring_distance(last.clamp(min=0), prompt_columns, prompt_used)
            limit = torch.minimum(last, window - (self.row_positions - last))
            prompt_mask = _additive(distance <= limit[:, None])
            self._masks[key] = torch.cat((prompt_mask, self._own_mask(columns, used, window)), dim=-1)
        return self._masks[key]


def _ring_distance(last: Tensor, columns: int, used: int) -> Tensor:
    """(rows, used): distance of the token in each column from token ``last``, which is in column ``last % columns``."""
    distance = (last % columns)[:, None] - torch.arange(used, device=last.device)
    return torch.where(distance < 0, distance + columns, distance)


def _additive(visible: Tensor) -> Tensor:
    """(rows, n) bool to (rows, 1, 1, n) fp32."""
    return torch.zeros(visible.shape, device=visible.device).masked_fill_(~visible, -torch.inf)[:, None, None]


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Batched matrix product over the first two axes, accumulated and returned in fp32 or better."""
    flat = a.flatten(0, 1), b.flatten(0, 1)
    out = torch.bmm(*flat, out_dtype=torch.float32) if a.dtype.itemsize < 4 else torch.bmm(*flat)
    return out.view(*a.shape[:-1], b.size(-1))
