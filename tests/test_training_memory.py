"""The memory model compared with the tensors that autograd saves and with a step's peak memory."""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lmchat.model.compile import recomputing
from lmchat.model.config import GPTConfig
from lmchat.model.gpt import GPT
from lmchat.optim.muon_adamw import MuonAdamW
from lmchat.optim.param_groups import build_param_groups
from lmchat.scaling import config_for_depth
from lmchat.training_memory import Mode, check_fits, training_memory
from lmchat.types import UserError
from random_weights import with_random_weights

CONFIG = GPTConfig(sequence_len=64, vocab_size=320, n_layer=3, n_head=4, n_kv_head=4, n_embd=128, window_pattern="L")
PARTITION_ONLY = "aot_eager_decomp_partition"
BACKENDS: dict[Mode, Any] = {
    "eager": None,
    "compiled": PARTITION_ONLY,
    "recomputing": lambda *args, **options: recomputing(PARTITION_ONLY)(*args, **options),
}


@pytest.fixture(autouse=True, scope="module")
def reset_compiler() -> Iterator[None]:
    """Once, since compiling takes seconds: tests of one mode, number of heads and number of rows share the code."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):  # otherwise blocks would run eagerly
        yield
    torch._dynamo.reset()


def model(config: GPTConfig, mode: Mode = "eager") -> GPT:
    net = with_random_weights(GPT(config, compute_dtype=torch.bfloat16), 0.1)
    if (backend := BACKENDS[mode]) is not None:
        net.mix_in_blocks = True
        for block in net.blocks:
            block.compile(dynamic=False, backend=backend)
    return net


def saved_bytes(run: Callable[[], Any], tokens: int) -> int:
    """Bytes of the tensors with one row per token that autograd keeps while `run` runs; a storage counts once."""
    kept: dict[int, Tensor] = {}

    def keep(x: Tensor) -> Tensor:
        per_token = x.dim() > 1 and x.numel() % tokens == 0
        if per_token and tokens in (len(x), x.shape[:2].numel(), len(x) * x.size(-2)):
            kept[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        run()
    return sum(x.untyped_storage().nbytes() for x in kept.values() if x.is_floating_point())


@pytest.mark.parametrize(
    ("mode", "n_kv_head", "checkpointed"),
    [
        *[("eager", heads, checkpointed) for heads in (4, 2) for checkpointed in (False, True)],
        *[(mode, 2, checkpointed) for mode in ("compiled", "recomputing") for checkpointed in (False, True)],
    ],
)
def test_saved_activations_of_a_block_match_the_estimate(mode: Mode, n_kv_head: int, checkpointed: bool) -> None:
    """The increase by two layers, one of them with value embeddings, within 2 %."""
    rows, totals = 3, []
    for layers in (1, 3):
        config = replace(CONFIG, n_kv_head=n_kv_head, n_layer=layers)
        net, ids = model(config, mode), torch.zeros(rows, 64, dtype=torch.int64)
        net.checkpoint_blocks = checkpointed
        hidden: list[Tensor] = []
        counted = saved_bytes(lambda net=net, ids=ids, hidden=hidden: hidden.append(net.hidden(ids)), rows * 64)
        memory = training_memory(config, rows, mode=mode, checkpoint_blocks=checkpointed, on_gpu=False)
        totals.append((counted, memory.activations))
    counted, expected = (b - a for a, b in zip(*totals, strict=True))
    cast_weights = 0 if checkpointed else 2 * 2 * (10 * 128**2 + 2 * 128 * n_kv_head * 32)
    assert counted == pytest.approx(expected - cast_weights, rel=0.02)


@pytest.mark.parametrize("mode", ["eager", "compiled"])
def test_checkpointing_gives_the_same_gradients(mode: Mode) -> None:
    ids = torch.randint(320, (3, 64), generator=torch.Generator().manual_seed(1))
    results = []
    for checkpointed in (False, True):
        net = model(replace(CONFIG, n_kv_head=2, n_layer=2), mode)  # one of each kind
        net.checkpoint_blocks = checkpointed
        loss = net.loss(ids, ids)
        loss.backward()
        results.append([loss.detach(), *(weight.grad for weight in net.parameters())])
    assert all(map(torch.equal, *results))


class PeakMemory(TorchDispatchMode):
    """Peak bytes of live storage among the results of operators. Matrix products, slow in bf16, give zeros instead."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_product = func is torch.ops.aten.mm.default
        out = args[0].new_zeros(len(args[0]), args[1].size(1)) if is_product else func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, Tensor):
                self._count(x.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self.alive or not storage.nbytes():
            return
        self.alive[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.now -= self.alive.pop(key)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("rows", [2, 6])
def test_peak_memory_of_a_step_matches_the_estimate(rows: int, checkpointed: bool) -> None:
    """Two micro-batches and the optimizer, weights included, eager on a CPU, within a fifth."""
    config = replace(CONFIG, n_layer=4)
    net = model(config)
    net.checkpoint_blocks = checkpointed
    optimizer = MuonAdamW(build_param_groups(net.named_parameters(), n_embd=128), compile=False)
    ids = torch.randint(320, (rows, 64), generator=torch.Generator().manual_seed(1))
    weights = sum(weight.untyped_storage().nbytes() for weight in net.parameters())
    with PeakMemory() as memory:
        for _ in range(2):
            for _ in range(2):
                net.loss(ids, ids).backward()
            optimizer.step()
            optimizer.zero_grad()
    expected = training_memory(
        config, rows, mode="eager", checkpoint_blocks=checkpointed, chunk_tokens=512, on_gpu=False
    )
    assert memory.peak + weights == pytest.approx(expected.total, rel=0.2)


def test_a_micro_batch_that_fits_only_with_recomputing() -> None:
    config = config_for_depth(26, 32768, 2048)
    assert training_memory(config, 8).total < 80e9 < training_memory(config, 16).total
    assert training_memory(config, 16, mode="recomputing").total < 70e9


@pytest.mark.parametrize("change", [{"mode": "recomputing"}, {"checkpoint_blocks": True}, {"optimizer_shards": 8}])
def test_remedies_for_too_little_memory(change: dict[str, Any]) -> None:
    config = config_for_depth(20, 32768, 2048)
    assert training_memory(config, 16, **change).total < training_memory(config, 16).total


@pytest.mark.parametrize(("depth", "size"), [(1, "million parameters"), (40, "billion parameters")])
def test_the_size_of_a_model_without_room_has_a_unit_that_fits(depth: int, size: str) -> None:
    with pytest.raises(UserError) as raised:
        check_fits(config_for_depth(depth, sequence_len=32, vocab_size=300), "cpu", 2e5, None)
    numbers = re.findall(rf"has about ([\d.,]+) {size} .*\(([\d.,]+) [MG]B of weights, 0\.2 MB of", str(raised.value))
    assert numbers and all(float(number) >= 0.1 for number in numbers[0])
