"""FP8 layers, emulated by torchao: which are converted, their accuracy, and that nothing else changes."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from lmchat.model.config import GPTConfig
from lmchat.model.fp8 import Recipe, convert_linears, missing_hardware, product_error
from lmchat.model.gpt import GPT, Linear
from random_weights import with_random_weights

if find_spec("torchao") is None:  # its import takes a second
    pytest.skip("torchao is not installed", allow_module_level=True)

CONFIG = GPTConfig(sequence_len=16, vocab_size=70, n_layer=3, n_head=2, n_kv_head=1, n_embd=256)


def model(config: GPTConfig = CONFIG) -> GPT:
    return with_random_weights(GPT(config), 0.1)


def tokens(rows: int = 2, length: int = 16) -> tuple[Tensor, Tensor]:
    ids = torch.randint(70, (rows, length + 1), generator=torch.Generator().manual_seed(1))
    return ids[:, :-1], ids[:, 1:]


def rounded_product(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T of operands rounded to e4m3 after scaling each to its largest value, written from the definition."""
    scales = [torch.finfo(torch.float8_e4m3fn).max / operand.abs().max() for operand in (x, weight)]
    x8, w8 = ((o * s).to(torch.float8_e4m3fn).float() / s for o, s in zip((x, weight), scales, strict=True))
    return x8 @ w8.T


def test_a_layer_multiplies_rounded_operands() -> None:
    net = model()
    convert_linears(net, emulate=True)
    layer = net.blocks[0].mlp.c_fc
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(layer(x), rounded_product(x, layer.weight), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(layer(x), x @ layer.weight.T, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_the_probe_measures_the_error_of_a_product(recipe: Recipe) -> None:
    assert 0.01 < product_error(torch.device("cpu"), recipe, emulate=True) < 0.08


def test_unconverted_layers_have_a_reason() -> None:
    net = model()
    conversion = convert_linears(net, emulate=True)
    converted = {name for name, module in net.named_modules() if isinstance(module, Linear) and module.fp8}
    assert converted == set(conversion.converted)
    names = {name.rpartition(".")[2] for name in converted}
    assert names == {"c_q", "c_k", "c_v", "c_proj", "c_fc"} and len(converted) == 3 * 6
    text = "18 linear layers in FP8; not converted: 2 × ve_gate (a gate), lm_head (--fp8.lm_head false)"
    assert conversion.describe() == text

    narrow = model(GPTConfig(sequence_len=16, vocab_size=64, n_layer=1, n_head=4, n_kv_head=1, n_embd=136 * 2))
    left = convert_linears(narrow, lm_head=True, emulate=True).left
    assert left["transformer.h.0.attn.c_k"] == "68 x 272 is not divisible by 16"
    assert left["lm_head"] == "64 x 272 is narrower than 128"


def test_parameters_keep_their_names_and_identity() -> None:
    net = model()
    before = [(name, id(weight)) for name, weight in net.named_parameters()]
    state = net.state_dict()
    for _ in range(2):
        convert_linears(net, lm_head=True, emulate=True)
    assert [(name, id(weight)) for name, weight in net.named_parameters()] == before
    assert list(net.state_dict()) == list(state)
    net.load_state_dict(state)
    ids, targets = tokens()
    net.loss(ids, targets).backward()
    assert all(weight.grad is not None and weight.grad.dtype == torch.float32 for weight in net.parameters())


def test_evaluation_mode_does_not_round_even_after_an_exception() -> None:
    plain, net = model(), model()
    convert_linears(net, lm_head=True, emulate=True)
    ids, targets = tokens()
    trained = net.loss(ids, targets)
    with pytest.raises(RuntimeError, match="in between"), torch.no_grad():
        net.eval()
        assert net(ids).equal(plain(ids)) and net.loss(ids, targets).equal(plain.loss(ids, targets))
        raise RuntimeError("in between")
    net.train()
    assert net.loss(ids, targets).equal(trained) and not trained.equal(plain.loss(ids, targets))


@pytest.mark.parametrize("lm_head", [False, True])
def test_loss_and_gradients_stay_near_those_of_fp32(lm_head: bool) -> None:
    plain, net = model(), model(CONFIG)
    convert_linears(net, lm_head=lm_head, emulate=True)
    ids, targets = tokens(rows=4)
    losses = [each.loss(ids, targets) for each in (plain, net)]
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=0.01)
    for loss in losses:
        loss.backward()
    gradients = [torch.cat([weight.grad.flatten() for weight in each.parameters()]) for each in (plain, net)]
    assert torch.cosine_similarity(*gradients, dim=0) > 0.95


def test_any_number_of_tokens_with_padding() -> None:
    """The product for weight gradients sums over tokens, and needs a multiple of 16 of them on a GPU."""
    gradients = []
    for pad in (False, True):
        net = model()
        convert_linears(net, pad=pad, emulate=True)
        ids, targets = tokens(rows=3, length=7)
        net.loss(ids, targets).backward()
        gradients.append(net.blocks[0].mlp.c_fc.weight.grad)
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize(("capability", "recipe", "reason"), [
    ((8, 0), "tensorwise", "its compute capability 8.0 is below 8.9"),
    ((8, 9), "rowwise", "its compute capability 8.9 is below 9.0"),
    ((9, 0), "rowwise", "a product is off by 0.5"),
])  # fmt: skip
def test_unsupported_hardware_is_reported(
    capability: tuple[int, int], recipe: Recipe, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing_hardware.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr("lmchat.model.fp8.product_error", lambda device, recipe: 0.5)
    assert missing_hardware(torch.device("cuda"), recipe) == reason
    assert missing_hardware(torch.device("cpu"), recipe) == "cpu has no FP8 products"
    missing_hardware.cache_clear()


def test_compiled_fp8_blocks_have_no_graph_breaks_or_recompilation() -> None:
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    shape = {"n_layer": 3, "n_head": 1, "n_kv_head": 1, "n_embd": 128, "window_pattern": "L"}
    net = model(GPTConfig(sequence_len=16, vocab_size=70, **shape))
    convert_linears(net, emulate=True)
    for block in net.blocks:
        block.compile(dynamic=False, backend="aot_eager")
    ids, targets = tokens()
    graphs = []
    for training in (True, False, True):
        with torch.set_grad_enabled(training):
            net.train(training)
            net.loss(ids, targets)
        graphs.append(counters["stats"]["unique_graphs"])
    torch._dynamo.reset()
    assert not counters["graph_break"]
    kinds = len({hasattr(block.attn, "ve_gate") for block in net.blocks})  # the first and the last share their code
    assert graphs == [kinds, 2 * kinds, 2 * kinds]
