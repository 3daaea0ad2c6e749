"""An engine that works as on a GPU, with simulated CUDA graphs, on a CPU.

A graph reads and writes the tensors that it was captured with: here a replay runs the captured step again, after it has
checked that these tensors have not moved.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lmchat.generation import runner, weights
from lmchat.generation.cached_attention import Groups
from lmchat.generation.cuda_graphs import GraphedSteps
from lmchat.generation.decode_state import StepOutput
from lmchat.generation.engine import Engine
from lmchat.generation.runner import Runner
from lmchat.model.gpt import GPT
from lmchat.tokenizer.bpe import Tokenizer


class SimulatedGraphs(GraphedSteps):
    def __init__(self, runner: Runner) -> None:
        super().__init__(runner.state.frozen)
        self.runner = runner
        self.captures = 0

    def _tensors(self) -> list[torch.Tensor]:
        pools, state = (self.runner.pool, self.runner.prompts), self.runner.state.fields.values()
        return [*(each for pool in pools for each in (*pool.keys, *pool.values)), *state, *self.runner.net.parameters()]

    def _capture(self, key: Hashable, step: Callable[[], StepOutput], groups: Groups | None) -> None:
        addresses = [each.data_ptr() for each in self._tensors()]
        frozen = self._frozen.clone()
        self._frozen.fill_(True)
        output = step()
        self._frozen.copy_(frozen)

        def replay() -> None:
            assert [each.data_ptr() for each in self._tensors()] == addresses
            for mine, new in zip(output, step(), strict=True):
                mine.copy_(new)

        self.captures += 1
        graph: Any = SimpleNamespace(replay=replay)
        self._graphs[key] = graph, output, groups


class _OnGPU:
    """A runner that says that it is on a GPU; all else is the runner's."""

    device = torch.device("cuda")

    def __init__(self, runner: Runner) -> None:
        self._runner = runner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)


def _read(outputs: list[StepOutput], rows: int) -> StepOutput:
    """The steps' outputs, read together as on a GPU."""
    return StepOutput(*(torch.stack(each)[:, :rows] for each in zip(*outputs, strict=True)))


def gpu_engine(monkeypatch: pytest.MonkeyPatch, net: GPT, tokenizer: Tokenizer, **options: Any) -> Engine:
    """An `Engine` for a network on the CPU that takes the decisions of one on a GPU."""
    monkeypatch.setattr(weights, "can_pack", lambda *_: False)
    monkeypatch.setattr(runner, "_read", _read)
    engine = Engine(net, tokenizer, **options)
    engine.runner.graphs = SimulatedGraphs(engine.runner)
    engine.scheduler.runner = _OnGPU(engine.runner)  # type: ignore[assignment]
    return engine
