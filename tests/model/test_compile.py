"""What is compiled, and what its backward pass saves, counted with torch's partitioner and without a compiler."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from lmchat import losses
from lmchat.model import attention, gpt
from lmchat.model.attention_timing import use_backends
from lmchat.model.compile import compile_blocks, recomputing
from lmchat.model.config import GPTConfig
from lmchat.model.gpt import GPT, Block, mix_residual
from reference_engine import KVCache

CONFIG = GPTConfig(sequence_len=16, vocab_size=70, n_layer=2, n_head=2, n_kv_head=2, n_embd=64)
PARTITION_ONLY = "aot_eager_decomp_partition"


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def saved_elements(backend: object) -> int:
    """Elements that an MLP with a squared ReLU saves for the backward pass of 8 tokens, without weights."""
    block = GPT(CONFIG).blocks[0]
    torch.nn.init.normal_(block.mlp.c_fc.weight)
    torch.nn.init.normal_(block.mlp.c_proj.weight)
    weights = {weight.data_ptr() for weight in block.mlp.parameters()}
    saved: dict[int, Tensor] = {}

    def keep(x: Tensor) -> Tensor:
        saved[x.untyped_storage().data_ptr()] = x
        return x

    compiled = torch.compile(block.mlp, backend=backend, dynamic=False)  # type: ignore[arg-type]
    x = torch.randn(8, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out = compiled(x)
    out.sum().backward()
    return sum(x.numel() for pointer, x in saved.items() if pointer not in weights)


def test_recomputing_keeps_fewer_activations() -> None:
    """The ReLU's output and its square, 4 widths each, or only the former."""
    before = torch._functorch.config.ban_recompute_materialized_backward
    kept, recomputed = (saved_elements(backend) for backend in (PARTITION_ONLY, recomputing(PARTITION_ONLY)))
    assert kept == (1 + 4 + 4) * 8 * 64
    assert recomputed == (1 + 4) * 8 * 64
    assert torch._functorch.config.ban_recompute_materialized_backward == before


def test_one_function_per_backend_so_that_blocks_share_their_code() -> None:
    assert recomputing("inductor") is recomputing("inductor")


def test_cudnn_is_excluded_but_in_its_own_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    allowed: list[bool] = []

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        allowed.append(torch.backends.cuda.cudnn_sdp_enabled())
        return q

    monkeypatch.setattr(attention, "attention", attend)
    net, ids = GPT(CONFIG), torch.zeros(1, 8, dtype=torch.int64)
    net.hidden(ids)
    net.hidden(ids, KVCache(CONFIG, 1, 16).expect(8))
    use_backends(net, {8: "banded", 16: "cudnn"})
    net.hidden(ids)
    assert allowed == [False] * 4 + [False, True]
    assert torch.backends.cuda.cudnn_sdp_enabled()


def test_checkpointed_blocks_exclude_cudnn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """They run again in the backward pass, and must save what they saved before."""
    net, ids, allowed = GPT(CONFIG), torch.zeros(1, 8, dtype=torch.int64), list[bool]()
    usual = attention.attention

    def attend(*args: Any) -> Tensor:
        allowed.append(torch.backends.cuda.cudnn_sdp_enabled())
        return usual(*args)

    monkeypatch.setattr(attention, "attention", attend)
    net.checkpoint_blocks = True
    net.init_weights()
    net.loss(ids, ids).backward()
    assert allowed == [False] * 2 * CONFIG.n_layer


def test_the_mix_within_the_blocks_is_the_mix_before_them() -> None:
    net = GPT(CONFIG)
    net.init_weights(torch.Generator().manual_seed(0))
    torch.nn.init.normal_(net.x0_lambdas)
    ids = torch.randint(70, (2, 16), generator=torch.Generator().manual_seed(1))
    results = []
    for net.mix_in_blocks in (False, True):
        net.zero_grad()
        loss = net.loss(ids, ids)
        loss.backward()
        results.append([loss.detach(), *(weight.grad for weight in net.parameters())])
    assert all(map(torch.equal, *results))
    mix = (torch.ones(1, 2), torch.tensor(2.0), torch.tensor(3.0))
    assert mix_residual(torch.full((1, 2), 5.0), mix).tolist() == [[13, 13]]


def test_the_first_block_shares_its_code_with_a_later_one() -> None:
    """Its input is also the embedding that the residual mix adds."""
    net, ids = GPT(replace(CONFIG, n_layer=3, window_pattern="L")), torch.zeros(1, 16, dtype=torch.int64)
    net.init_weights()
    net.mix_in_blocks = True
    graphs = CompileCounter()
    for block in net.blocks:
        block.compile(dynamic=False, backend=graphs)
    net.hidden(ids)
    assert graphs.frame_count == 2, "with and without value embeddings"


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_compilation_by_device(device_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backends = []
    monkeypatch.setattr(Block, "compile", lambda self, **options: backends.append(options["backend"]))
    monkeypatch.setattr(GPT, "device", property(lambda self: torch.device(device_type)))
    net = GPT.__new__(GPT)
    torch.nn.Module.__init__(net)
    net.transformer = torch.nn.Module()
    net.transformer.h = torch.nn.ModuleList(Block(CONFIG, layer) for layer in range(2))
    compile_blocks(net)
    compile_blocks(net, recompute=True)
    assert backends == ["inductor"] * 2 + [recomputing("inductor")] * 2
    assert net.fused_ends == net.mix_in_blocks == (device_type == "cuda")


@pytest.mark.parametrize("backend", [PARTITION_ONLY, pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_look_ups_are_exact(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The losses are equal bit for bit; gradients up to the order of summation in fp32. C++ code takes 10 seconds."""
    monkeypatch.setattr(gpt, "compiled", lambda function: torch.compile(function, backend=backend, dynamic=False))
    monkeypatch.setattr(losses, "compiled", lambda function: function)
    ids = torch.randint(70, (2, 16), generator=torch.Generator().manual_seed(1))
    results = []
    for fused in (False, True):
        net = GPT(CONFIG, compute_dtype=torch.bfloat16)
        net.init_weights(torch.Generator().manual_seed(0))
        net.fused_ends = fused
        tables = [net.transformer.wte.weight, *net.value_embeds.parameters()]
        hidden = net.hidden(ids)
        results.append((hidden, torch.autograd.grad(hidden.float().square().sum() / 100, tables)))
    assert results[0][0].equal(results[1][0])
    torch.testing.assert_close(results[1][1], results[0][1], rtol=1e-5, atol=1e-6)
