"""A GPU compared with the CPU: `make test-gpu` on a machine with a card. Never run so far.

Needs only torch, lightning, numpy, pyarrow, tokenizers, tiktoken and pytest, which GPU images include.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lmchat.model.attention import probe
from lmchat.model.compile import compile_blocks
from lmchat.model.config import GPTConfig
from lmchat.model.gpt import GPT
from lmchat.optim.muon_adamw import MuonAdamW
from lmchat.optim.param_groups import build_param_groups
from lmchat.stages.data_module import StageDataModule
from lmchat.types import Batch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

CONFIG = GPTConfig(sequence_len=256, vocab_size=512, n_layer=4, n_head=2, n_kv_head=2, n_embd=128)


def network(device: str, dtype: torch.dtype = torch.float32) -> GPT:
    # flash does not support fp32, and compiling FlexAttention for every shape would take minutes.
    with torch.device("meta"):  # a named backend applies to the first device that the network is on
        net = GPT(CONFIG, compute_dtype=dtype, attention="banded" if dtype == torch.float32 else "auto")
    net.to_empty(device=device).init_weights(torch.Generator().manual_seed(0))
    return net


def batch(device: str) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(512, (4, 257), generator=torch.Generator().manual_seed(1)).to(device)
    return ids[:, :-1], ids[:, 1:]


def train(net: GPT, device: str, steps: int = 5) -> list[float]:
    """The losses of a few optimizer steps on one batch, with Muon in fp32."""
    optimizer = MuonAdamW(build_param_groups(net.named_parameters(), n_embd=128), polar_dtype=torch.float32)
    losses = []
    for _ in range(steps):
        loss = net.loss(*batch(device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", ["flash", "flex", "banded"])
@pytest.mark.parametrize("grouped", [False, True])
def test_attention_backends(name: str, grouped: bool) -> None:
    assert probe(name, torch.device("cuda"), torch.bfloat16, 128, grouped) is None


def test_training_on_a_gpu_matches_the_cpu() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    assert train(network("cuda"), "cuda") == pytest.approx(train(network("cpu"), "cpu"), abs=2e-3)


def test_bf16_stays_near_fp32() -> None:
    inputs, targets = batch("cuda")
    exact = network("cpu").loss(inputs.cpu(), targets.cpu()).item()
    assert network("cuda", torch.bfloat16).loss(inputs, targets).item() == pytest.approx(exact, rel=0.01)


def test_compiled_blocks_give_the_same_losses() -> None:
    compiled = network("cuda", torch.bfloat16)
    compile_blocks(compiled)
    assert train(compiled, "cuda") == pytest.approx(train(network("cuda", torch.bfloat16), "cuda"), rel=0.02)


def test_copies_of_batches_do_not_wait() -> None:
    """The copy is queued while the GPU still has a second of work."""
    ids = torch.arange(1 << 20).view(64, -1)
    batch, device = Batch(inputs=ids.pin_memory(), targets=ids.pin_memory()), torch.device("cuda", 0)
    data = StageDataModule(micro_batch_size=64)
    data.transfer_batch_to_device(batch, device, 0)  # allocates, which may wait for the device
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)
    moved = data.transfer_batch_to_device(batch, device, 0)
    assert not torch.cuda.current_stream().query()
    assert all(moved[name].is_cuda and torch.equal(moved[name].cpu(), ids) for name in ("inputs", "targets"))


def test_a_run_resumes_on_a_gpu(base: Path) -> None:
    """With the masked backend: the backward pass of cuDNN's attention is not deterministic."""
    pytest.importorskip("jsonargparse")
    from lmchat.__main__ import main
    from lmchat.checkpoint.load import find_checkpoint, load_model_state

    config = base / "tiny.yaml"
    config.write_text("""
trainer: {accelerator: gpu, devices: 1, max_steps: 6}
model:
  class_path: PretrainModule
  init_args: {depth: 2, sequence_len: 256, head_dim: 64, global_batch_tokens: 2048, compile: false,
    attention: masked}
data: {class_path: FineWebDataModule, init_args: {micro_batch_size: 4, eval_tokens: 1024}}
samples: {max_new_tokens: 2}
checkpoint: {every_n_steps: 3}
""")
    assert main(["fit", "--config", str(config), "--model.tag", "unbroken"]) == 0
    start = base / "base_checkpoints" / "unbroken" / "meta_000003.json"
    assert main(["fit", "--config", str(config), "--model.tag", "resumed", "--ckpt_path", str(start)]) == 0
    expected, actual = (
        load_model_state(find_checkpoint(base / "base_checkpoints" / tag)) for tag in ("unbroken", "resumed")
    )
    for name, weight in expected.items():
        torch.testing.assert_close(actual[name], weight, rtol=1e-3, atol=1e-4)
