"""CUDA graphs of decode steps, one per shape. Never run on a GPU so far."""

from collections.abc import Callable, Hashable
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from lmchat.generation.cached_attention import Groups
from lmchat.generation.decode_state import StepOutput

MAX_GRAPHS = 256
"""Graphs to keep, as a limit of their memory; a server may meet many shapes."""


class GraphedSteps:
    """Captures a decode step when its shape first occurs, and replays it afterwards.

    Weights, KV pool and decode state keep their addresses, so graphs stay valid when their contents change. The groups
    of rows, which differ between calls, are copied into the captured tensors.

    Args:
        frozen: (slots,) bool, true for rows in which a step changes nothing.
    """

    def __init__(self, frozen: Tensor) -> None:
        self._frozen = frozen
        self._graphs: dict[Hashable, tuple[torch.cuda.CUDAGraph, StepOutput, Groups | None]] = {}
        self._memory_pool: Any = None

    def clear(self) -> None:
        """Drops all graphs; call it when memory that they read has moved."""
        self._graphs.clear()
        self._memory_pool = None

    def run(self, key: Hashable, step: Callable[[], StepOutput], groups: Groups | None) -> StepOutput:
        """Runs ``step``, whose shapes are determined by ``key``, and returns copies of its outputs."""
        if key not in self._graphs:
            if len(self._graphs) == MAX_GRAPHS:
                self.clear()
            self._capture(key, step, groups)
        graph, output, captured = self._graphs[key]
        if captured is not None and groups is not None:
            for field in fields(Groups):
                target, value = getattr(captured, field.name), getattr(groups, field.name)
                if isinstance(target, Tensor) and target is not value:
                    target.copy_(value)
        graph.replay()
        return StepOutput(*(field.clone() for field in output))

    def _capture(self, key: Hashable, step: Callable[[], StepOutput], groups: Groups | None) -> None:
        # Kernels that initialise themselves on first use cannot be captured at that time.
        frozen = self._frozen.clone()
        self._frozen.fill_(True)
        step()
        self._frozen.copy_(frozen)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory_pool):
            output = step()
        self._memory_pool = graph.pool()
        self._graphs[key] = graph, output, groups
