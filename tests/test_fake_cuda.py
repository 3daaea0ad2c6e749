"""GPU behaviour on fake CUDA and MPS devices: no mixed devices, and no avoidable device syncs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.utils._python_dispatch import TorchDispatchMode

from fake_cuda import fake_cuda
from lmchat import losses
from lmchat.evaluation.bits_per_byte import BitsPerByteEvaluator
from lmchat.model import gpt
from lmchat.model.attention import attend_banded, choose_backend
from lmchat.model.config import GPTConfig
from lmchat.model.gpt import GPT
from lmchat.optim.muon_adamw import MuonAdamW
from lmchat.optim.param_groups import build_param_groups
from lmchat.precision import default_compute_dtype
from lmchat.stages.base import StageModule
from lmchat.stages.rl import GRPOModule
from lmchat.stages.sft import SFTModule

CONFIG = GPTConfig(sequence_len=64, vocab_size=300, n_layer=2, n_head=4, n_kv_head=2, n_embd=64)


@pytest.fixture(autouse=True)
def flash(monkeypatch: pytest.MonkeyPatch) -> None:
    """The probe compares values, which fake tensors do not have."""
    monkeypatch.setattr(gpt, "choose_backend", lambda *args: "flash")


def network() -> GPT:
    with torch.device("cuda"):
        return GPT(CONFIG, compute_dtype=torch.bfloat16)


def test_the_device_is_seen_and_a_value_cannot_be_read() -> None:
    with fake_cuda() as waits:
        x = torch.ones(4, 6, device="cuda")
        assert x[1:, None, ..., 2:4].shape == (3, 1, 2) and x[x.new_zeros(5, dtype=torch.int64), 1].shape == (5,)
        with pytest.raises(DataDependentOutputException):
            x.sum().item()
        with pytest.raises(RuntimeError, match="device"):
            x + torch.ones(4, 6)
        x.to("cpu", non_blocking=True)
        assert waits.count == 0
        x.cpu()
        assert waits.count == 1


class NoFloat64(TorchDispatchMode):
    """Fails at an operator with a float64 result on a type of device."""

    def __init__(self, device_type: str) -> None:
        super().__init__()
        self.device_type = device_type

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, torch.Tensor) and x.device.type == self.device_type:
                assert x.dtype != torch.float64, func
        return out


def test_a_training_step_needs_no_float64() -> None:
    """Apple's GPUs have no float64."""
    net = GPT(CONFIG)
    for block in net.blocks:
        block.attn.attend = attend_banded
    net.init_weights()
    optimizer = MuonAdamW(build_param_groups(net.named_parameters(), n_embd=64), compile=False)
    ids = torch.zeros(2, 64, dtype=torch.int64)
    with NoFloat64("cpu"):
        for _ in range(2):
            net.loss(ids, ids).backward()
            optimizer.step()
            optimizer.zero_grad()
        net.loss(ids, ids, reduction="none")


@torch.no_grad()
def test_a_step_and_an_evaluation_on_a_mac(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a fake MPS device: no mixed devices, and no fp64, which it lacks; fp32 and masked attention are chosen."""
    monkeypatch.setattr(gpt, "choose_backend", choose_backend)
    with fake_cuda(), NoFloat64("mps"):
        device = torch.device("mps")
        with device:
            net = GPT(CONFIG, compute_dtype=default_compute_dtype(device))
        assert (net.compute_dtype, net.attention_backend) == (torch.float32, "masked")
        optimizer = MuonAdamW(build_param_groups(net.named_parameters(), n_embd=64), compile=False)
        ids = torch.zeros(2, 64, dtype=torch.int64, device=device)
        hidden = net.hidden(ids).flatten(0, 1)
        options = losses._Options(300, 50, False)
        losses._losses_and_gradients(hidden, net.lm_head.weight, ids.flatten(), torch.ones(128, device=device), options)
        for weight in net.parameters():
            weight.grad = torch.empty_like(weight)
        optimizer.step()
        batch = {"inputs": ids, "targets": ids}
        bits = BitsPerByteEvaluator(torch.ones(300, dtype=torch.int64), lambda rank, world_size: [batch])
        bits.update(SimpleNamespace(net=net), batch)
        assert bits._metric.nats.device.type == "cpu"


@pytest.mark.parametrize("fused", [False, True])
@torch.no_grad()
def test_a_training_step_does_not_wait_for_the_device(fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the backward pass of torch's operators, which needs a CUDA build of torch."""
    for module in (losses, gpt):
        monkeypatch.setattr(module, "compiled", lambda function: function)
    with fake_cuda() as waits:
        net = network()
        net.fused_ends = net.mix_in_blocks = fused
        optimizer = MuonAdamW(build_param_groups(net.named_parameters(), n_embd=64), polar_dtype=torch.bfloat16)
        waits.count = 0
        for _ in range(2):
            ids = torch.zeros(2, 64, dtype=torch.int64, device="cuda")
            starts = torch.zeros(33, dtype=torch.int32, device="cuda")
            assert net.hidden(ids, document_starts=starts).shape == (2, 64, 64)
            hidden = net.hidden(ids).flatten(0, 1)
            scale = torch.ones(128, device="cuda")
            _, grad_hidden, grad_weight = losses._losses_and_gradients(
                hidden, net.lm_head.weight, ids.flatten(), scale, losses._Options(300, 50, fused)
            )
            assert grad_hidden.dtype == torch.bfloat16 and grad_weight.dtype == torch.float32
            for weight in net.parameters():
                weight.grad = torch.empty_like(weight)
            optimizer.step()
            optimizer.zero_grad()
        net.loss(ids, ids, reduction="none")
        net.loss(ids, ids)
        assert waits.count == 0


def padded_batch() -> dict[str, Any]:
    ids = torch.zeros(2, 64, dtype=torch.int64, device="cuda")
    return {"inputs": ids, "targets": ids, "loss_tokens": 100}


def samples_behind_a_prompt() -> dict[str, Any]:
    ids = torch.zeros(1, 40, dtype=torch.int64, device="cuda")
    numbers = torch.ones(1, 40, device="cuda")
    prompt = {"prompt_tokens": 10, "sample_tokens": [12, 3, 15], "group_tokens": 30, "loss_tokens": 60}
    return {"inputs": ids, "targets": ids, "advantages": numbers, "logprobs": numbers, **prompt}


@pytest.mark.parametrize(("stage", "make_batch", "options"), [
    (SFTModule, padded_batch, {}),
    (GRPOModule, samples_behind_a_prompt, {"normalization": "step"}),
    (GRPOModule, samples_behind_a_prompt, {"normalization": "group"}),
])  # fmt: skip
@torch.no_grad()
def test_the_losses_of_chat_stages_do_not_wait_for_the_device(
    stage: type[StageModule], make_batch: Any, options: dict[str, str]
) -> None:
    module = stage(**options)
    trainer = SimpleNamespace(accumulate_grad_batches=2, world_size=1)
    module.trainer = trainer
    with fake_cuda() as waits:
        module.net = network()
        waits.count = 0
        for _ in range(2):
            loss = module.training_step(make_batch(), 0)
        assert loss.is_cuda and module.pop_step_loss().is_cuda
        assert all(metric.is_cuda for metric in module.pop_step_metrics().values())
        assert waits.count == 0
