"""Decode steps on a fake CUDA device: no mixed devices, and no device sync."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial

import pytest
import torch

from fake_cuda import fake_cuda
from lmchat.generation import cuda_graphs
from lmchat.generation.decode_state import StepOutput
from lmchat.generation.runner import Runner, _read
from lmchat.generation.sampling import SamplingMode
from lmchat.generation.sequence import SharedPrompt
from lmchat.model import gpt
from lmchat.model.config import GPTConfig
from lmchat.model.gpt import GPT
from lmchat.tokenizer.bpe import Tokenizer

TOKENIZER = Tokenizer({bytes([byte]): byte for byte in range(256)})
CONFIG = GPTConfig(
    sequence_len=64, vocab_size=TOKENIZER.vocab_size, n_layer=4, n_head=4, n_kv_head=2, n_embd=64, window_pattern="SL"
)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(
    "mode",
    [
        SamplingMode(greedy=True, top_k=0, full=False, logprobs=False),
        SamplingMode(greedy=False, top_k=20, full=False, logprobs=True, mixed=False),
        SamplingMode(greedy=True, top_k=20, full=True, logprobs=True, top_logprobs=5),
    ],
)
def test_a_decode_step_does_not_wait_for_the_device(
    shared: bool, mode: SamplingMode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpt, "choose_backend", lambda *args: "flash")
    with fake_cuda() as waits, torch.inference_mode():
        with torch.device("cuda"):
            net = GPT(CONFIG, compute_dtype=torch.bfloat16)
        runner = Runner(net, TOKENIZER, max_rows=8)
        for pool in (runner.pool, runner.prompts):
            pool.resize(8, 200)
        groups = None
        if shared:
            monkeypatch.setattr(
                Runner, "_to_device", lambda self, values: values.new_zeros(values.shape, device="cuda")
            )
            prompts = [SharedPrompt((1,) * 40, []), SharedPrompt((2,) * 30, [])]
            groups = runner._groups(6, dict(zip(prompts, ([0, 1, 2], [4]), strict=True)), 256)
        step = partial(runner._step, 6, 100, groups, mode)
        waits.count = 0
        for _ in range(2):
            output = step()
        assert waits.count == 0
        assert all(field.is_cuda and field.shape[0] == 6 for field in output)
        assert output.top_ids.shape == output.top_logprobs.shape == (6, mode.top_logprobs)


class FakeGraph:
    """A CUDA graph whose replay does nothing."""

    def pool(self) -> int:
        return 1

    def replay(self) -> None:
        pass


def test_a_server_keeps_a_limited_number_of_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (
        ("CUDAGraph", FakeGraph), ("graph", lambda graph, pool: nullcontext()), ("synchronize", lambda: None)
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(cuda_graphs, "MAX_GRAPHS", 5)
    graphs, captured = cuda_graphs.GraphedSteps(torch.zeros(4, dtype=torch.bool)), list[int]()

    def step(key: int) -> StepOutput:
        captured.append(key)
        return StepOutput(*(torch.full((4,), key) for _ in StepOutput._fields))

    for key in (0, 1, 2, 3, 4, 0, 5, 6, 5, 0):
        assert graphs.run(key, partial(step, key), None).tokens.tolist() == [key] * 4
        assert len(graphs._graphs) <= 5
    assert captured[::2] == [0, 1, 2, 3, 4, 5, 6, 0]  # each is a warmup and a capture


class OnGPU(torch.Tensor):
    """A tensor that says that it is on a GPU."""

    is_cuda = True


@pytest.mark.parametrize("top", [0, 3])
def test_outputs_of_several_steps_are_read_together(top: int) -> None:
    def output(step: int) -> StepOutput:
        draw = partial(torch.rand, generator=torch.Generator().manual_seed(step))
        tokens, ids = ((30_000 * draw(*shape)).long() for shape in ((6,), (6, top)))
        return StepOutput(tokens, draw(6) > 0.5, -draw(6), ids, -draw(6, top))

    outputs = [output(step) for step in range(4)]
    decoded = _read([StepOutput(*(field.as_subclass(OnGPU) for field in each)) for each in outputs], rows=5)
    for name, found in decoded._asdict().items():
        expected = torch.stack([getattr(each, name)[:5] for each in outputs])
        assert found.shape == expected.shape and (found == expected).all(), name
