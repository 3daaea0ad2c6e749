"""Keys and values of many sequences, in slots of fixed size; layers with short windows store fewer tokens."""

import os
from dataclasses import dataclass

import torch
from torch import Tensor

from lmchat.model.config import GPTConfig
from lmchat.types import UserError

COLUMNS = 64
"""Slots grow, and are read by attention, in multiples of this many tokens."""

MEMORY_SHARE = 0.5
"""Share of the free memory that keys and values may take."""


def round_up(number: int, multiple: int = COLUMNS) -> int:
    """Rounds ``number`` up to a multiple of ``multiple``."""
    return -(-number // multiple) * multiple


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on ``device``, including torch's cache on a GPU."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):  # not available on every system
        return 4 << 30


@dataclass(frozen=True)
class SlotLayout:
    """The size of a slot, with keys and values of ``dtype``.

    Layers whose window is shorter than the sequence store only the last tokens: token i of a slot is in column
    i mod `columns` of the layer.
    """

    config: GPTConfig
    dtype: torch.dtype

    def columns(self, layer: int, capacity: int) -> int:
        """Columns of a layer in a slot for ``capacity`` tokens; no more than a token can see, including itself."""
        return round_up(min(capacity, self.config.window_sizes[layer] + 1))

    def slot_bytes(self, capacity: int) -> int:
        """Bytes of a slot for ``capacity`` tokens."""
        columns = sum(self.columns(layer, capacity) for layer in range(self.config.n_layer))
        return 2 * columns * self.config.n_kv_head * self.config.head_dim * self.dtype.itemsize

    def usable_prefix(self, held: int, wanted: int, capacity: int) -> int:
        """Number of the first ``wanted`` tokens that can be reused of a slot with ``held`` tokens.

        All of them, or none if a layer has overwritten tokens that the next token would see.
        """
        for layer, window in enumerate(self.config.window_sizes):
            columns = self.columns(layer, capacity)
            if held > columns and held - wanted > columns - 1 - window:
                return 0
        return wanted


class KVPool:
    """Slots of keys and values, all of one capacity.

    Attributes:
        capacity: tokens that fit into a slot, in layers whose window does not limit them.
        num_slots: number of slots.
        keys, values: per layer (num_slots, kv heads, columns, head_dim).
    """

    def __init__(self, layout: SlotLayout, device: torch.device) -> None:
        self.layout = layout
        self.device = device
        self.capacity = 0
        self.num_slots = 0
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    @torch.inference_mode()
    def resize(self, num_slots: int, capacity: int) -> None:
        """Enlarges slots or changes their number; the first slots keep their contents.

        New columns are zero, since attention reads, and masks, columns before they are written.
        """
        capacity, kept = max(self.capacity, round_up(capacity)), min(num_slots, self.num_slots)
        config, keys, values = self.layout.config, list[Tensor](), list[Tensor]()
        for layer in range(config.n_layer):
            shape = (num_slots, config.n_kv_head, self.layout.columns(layer, capacity), config.head_dim)
            for new, old in ((keys, self.keys), (values, self.values)):
                new.append(torch.zeros(shape, dtype=self.layout.dtype, device=self.device))
                if kept:
                    new[-1][:kept, :, : old[layer].size(2)] = old[layer][:kept]
        self.keys, self.values, self.num_slots, self.capacity = keys, values, num_slots, capacity

    def release(self) -> None:
        """Frees the memory of all slots."""
        self.keys, self.values, self.num_slots, self.capacity = [], [], 0, 0

    @torch.inference_mode()
    def copy(self, source: int, target: int, length: int) -> None:
        """Copies the first ``length`` tokens of a slot to another slot."""
        for held in (*self.keys, *self.values):
            held[target, :, :length] = held[source, :, :length]

    @torch.inference_mode()
    def swap(self, a: int, b: int, length: int) -> None:
        """Exchanges the first ``length`` tokens of two slots."""
        for held in (*self.keys, *self.values):
            kept = held[a, :, :length].clone()
            held[a, :, :length] = held[b, :, :length]
            held[b, :, :length] = kept


class MemoryBudget:
    """Number of slots that fit into ``max_bytes``; None is `MEMORY_SHARE` of the free memory at its first use."""

    def __init__(self, layout: SlotLayout, device: torch.device, max_bytes: int | None = None) -> None:
        self.layout = layout
        self.device = device
        self._given = self._max_bytes = max_bytes

    @property
    def max_bytes(self) -> int:
        """Maximum number of bytes for keys and values."""
        if self._max_bytes is None:
            self._max_bytes = int(MEMORY_SHARE * free_memory(self.device))
        return self._max_bytes

    def measure_again(self) -> None:
        """Measures the free memory again at the next use; call it when there are no slots."""
        self._max_bytes = self._given

    def slots(self, capacity: int) -> int:
        """Number of slots of ``capacity`` tokens that fit; a third of the memory is for shared prompts, or one."""
        return int(self.max_bytes // (1.5 * self.layout.slot_bytes(round_up(capacity))))

    def prompt_slots(self, capacity: int) -> int:
        """Number of slots for shared prompts of ``capacity`` tokens that fit beside those of the sequences."""
        return self.max_bytes // (3 * self.layout.slot_bytes(round_up(capacity)))

    def check(self, tokens: int) -> None:
        """Raises UserError if one sequence of ``tokens`` tokens does not fit."""
        if self.slots(tokens) < 1:
            needed = 1.5 * self.layout.slot_bytes(round_up(tokens))
            raise UserError(
                f"a sequence of {tokens} tokens needs {needed / 1e9:.3g} GB for keys and values, and "
                f"{self.max_bytes / 1e9:.3g} GB are available on {self.device}; shorten the prompt or max_new_tokens"
            )
