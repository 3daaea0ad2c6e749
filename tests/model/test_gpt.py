"""The GPT compared with the reference implementation and with the formulas of the papers, and its properties."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lmchat.model.compile import compile_blocks
from lmchat.model.config import GPTConfig
from lmchat.model.gpt import GPT
from lmchat.types import IGNORE_INDEX, UserError
from random_weights import with_random_weights
from reference_engine import KVCache

SMALL = GPTConfig(sequence_len=16, vocab_size=70, n_layer=5, n_head=4, n_kv_head=2, n_embd=64, window_pattern="SSL")
NATIVE = replace(SMALL, window_pattern="L", value_embeddings=False, residual_mix=False)


def random_model(config: GPTConfig = SMALL, seed: int = 0, **options: Any) -> GPT:
    """A model with random, non-zero weights, so that every part affects the output."""
    return with_random_weights(GPT(config, **options), 0.15, embeddings=1.0, vectors=1.0, seed=seed)


def random_tokens(config: GPTConfig = SMALL, rows: int = 2, length: int = 16, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(config.vocab_size, (rows, length + 1), generator=generator)
    return ids[:, :-1], ids[:, 1:]


# The reference implementation -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["kv2", "l5"])
def recorded(oracles: Path, request: pytest.FixtureRequest) -> dict[str, Any]:
    facts = json.loads((oracles / "c05_gpt.json").read_text())[request.param]
    with np.load(oracles / f"c05_gpt_{request.param}.npz") as arrays:
        return {"name": request.param, **facts, **{key: torch.from_numpy(arrays[key]) for key in arrays}}


def recorded_model(recorded: dict[str, Any], **options: Any) -> GPT:
    model = GPT(GPTConfig(**recorded["config"]), **options)
    model.load_state_dict({key[2:]: value for key, value in recorded.items() if key.startswith("w/")})
    return model


def test_reference_logits(recorded: dict[str, Any]) -> None:
    model, short = recorded_model(recorded), recorded["short_T"]
    ids = recorded["ids"]
    for attention in ("banded", "masked"):
        model = recorded_model(recorded, attention=attention)
        torch.testing.assert_close(model(ids), recorded["logits"], rtol=0, atol=2e-5)
    torch.testing.assert_close(model(ids[:, :short]), recorded["logits_T100"], rtol=0, atol=2e-5)
    exact_tables = recorded_model(recorded, rotary_dtype=torch.float32)
    torch.testing.assert_close(exact_tables(ids), recorded["logits_fp32_rope"], rtol=0, atol=2e-5)


def test_reference_rotary_tables(recorded: dict[str, Any]) -> None:
    model, length = recorded_model(recorded), recorded["ids"].size(1)
    assert model.cos[:length, 0].equal(recorded["cos_bf16_as_f32"])
    assert model.sin[:length, 0].equal(recorded["sin_bf16_as_f32"])
    assert len(model.cos) == 10 * model.config.sequence_len


def test_reference_losses_and_gradients(recorded: dict[str, Any]) -> None:
    model, ids, targets, masked = (
        recorded_model(recorded),
        *(recorded[k] for k in ("ids", "targets", "targets_masked")),
    )
    with torch.no_grad():
        assert model.loss(ids, targets).item() == pytest.approx(recorded["loss_mean"].item(), abs=1e-5)
        assert model.loss(ids, targets, "sum").item() == pytest.approx(recorded["loss_sum"].item(), rel=1e-6)
        losses = model.loss(ids, masked, "none")
    torch.testing.assert_close(losses.flatten(), recorded["loss_none_masked"], rtol=0, atol=1e-5)
    loss = model.loss(ids, masked)
    loss.backward()
    assert loss.item() == pytest.approx(recorded["loss_mean_masked"].item(), abs=1e-5)
    for name, weight in model.named_parameters():
        expected = recorded[f"g/{name}"]
        off = (weight.grad - expected).abs().max() / expected.abs().max().clamp(min=1e-12)
        assert off < 1e-4, (name, off.item())


def test_reference_hidden_states(recorded: dict[str, Any]) -> None:
    model, seen = recorded_model(recorded), {}
    for layer, block in enumerate(model.blocks):
        block.register_forward_hook(
            lambda module, args, out, layer=layer: seen.update({f"block{layer}_in": args[0], f"block{layer}_out": out})
        )
        block.attn.register_forward_hook(
            lambda module, args, out, layer=layer: seen.update({f"block{layer}_attn_out": out})
        )
    with torch.no_grad():
        model(recorded["ids"])
    for name, state in seen.items():
        torch.testing.assert_close(
            state, recorded[f"h/{name}"], rtol=2e-5, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert len(seen) == 3 * model.config.n_layer


@pytest.mark.parametrize(("name", "prompt_length"), [("kv2", 5), ("kv2", 136), ("l5", 5), ("l5", 40)])
def test_reference_decoding(oracles: Path, name: str, prompt_length: int) -> None:
    """Logits after the prompt and each of 8 cached steps, then greedy tokens, also beyond the training length."""
    with np.load(oracles / f"c05_gpt_{name}.npz") as arrays:
        recorded = {key: torch.from_numpy(arrays[key]) for key in arrays if key == "ids" or key.startswith("w/")}
    recorded["config"] = json.loads((oracles / "c05_gpt.json").read_text())[name]["config"]
    greedy = json.loads((oracles / "c11_engine.json").read_text())[f"{name}_prompt{prompt_length}"]["generated"]
    with np.load(oracles / f"c11_logits_{name}_prompt{prompt_length}.npz") as arrays:
        expected = torch.from_numpy(arrays["logits_after_prompt_and_8_decodes"])
    model = recorded_model(recorded)
    cache = KVCache(model.config, 1, prompt_length + len(greedy))
    ids, logits = recorded["ids"][:1, :prompt_length], []
    with torch.inference_mode():
        for token in greedy:
            logits.append(model(ids, cache.expect(ids.size(1)))[0, -1])
            ids = logits[-1].argmax()[None, None]
            assert ids.item() == token
    torch.testing.assert_close(torch.stack(logits[:9]), expected, rtol=0, atol=2e-5)


# A twin, written from the formulas, one token and one head at a time --------------------------------------------------


def rms(x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 2.0**-23).sqrt()


def turn(x: Tensor, position: int) -> Tensor:
    """Rotates each pair of channels (j, j + half) by -position / 10000^(2j / head_dim), as complex numbers."""
    half = x.size(-1) // 2
    pairs = torch.complex(x[..., :half], x[..., half:])
    angles = position / 10000 ** (torch.arange(half, dtype=torch.float64) * 2 / x.size(-1))
    turned = pairs * torch.polar(torch.ones_like(angles), -angles)
    return torch.cat((turned.real, turned.imag), -1)


def twin_logits(weights: dict[str, Tensor], config: GPTConfig, ids: list[int]) -> Tensor:
    """(T, vocab) logits of one row."""
    head_dim, group = config.head_dim, config.n_head // config.n_kv_head
    stream = [rms(weights["transformer.wte.weight"][i]) for i in ids]
    first = list(stream)
    for layer in range(config.n_layer):
        w = {key.split(f"h.{layer}.")[1]: value for key, value in weights.items() if f"transformer.h.{layer}." in key}
        short = config.window_pattern[layer % len(config.window_pattern)] == "S" and layer < config.n_layer - 1
        window = config.sequence_len // 2 if short else config.sequence_len
        keys: list[Tensor] = []
        values: list[Tensor] = []
        for t, token in enumerate(ids):
            x = stream[t]
            if config.residual_mix:
                x = weights["resid_lambdas"][layer] * x + weights["x0_lambdas"][layer] * first[t]
            h = rms(x)
            q = (w["attn.c_q.weight"] @ h).view(-1, head_dim)
            k = (w["attn.c_k.weight"] @ h).view(-1, head_dim)
            v = (w["attn.c_v.weight"] @ h).view(-1, head_dim)
            if config.value_embeddings and (config.n_layer - 1 - layer) % 2 == 0:
                gate = 2 / (1 + torch.exp(-(w["attn.ve_gate.weight"] @ h[:32])))
                v = v + gate[:, None] * weights[f"value_embeds.{layer}.weight"][token].view(-1, head_dim)
            keys.append(rms(turn(k, t)))
            values.append(v)
            q = rms(turn(q, t))
            heads = []
            for head in range(config.n_head):
                seen = range(max(0, t - window), t + 1)
                scores = torch.stack([q[head] @ keys[s][head // group] for s in seen]) / math.sqrt(head_dim)
                shares = torch.exp(scores) / torch.exp(scores).sum()
                heads.append(sum(share * values[s][head // group] for share, s in zip(shares, seen, strict=True)))
            x = x + w["attn.c_proj.weight"] @ torch.cat(heads)
            x = x + w["mlp.c_proj.weight"] @ (w["mlp.c_fc.weight"] @ rms(x)).clamp(min=0) ** 2
            stream[t] = x
    logits = torch.stack([weights["lm_head.weight"] @ rms(x) for x in stream])[:, : config.vocab_size]
    return 15 * torch.tanh(logits / 15)


@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        GPTConfig(sequence_len=6, vocab_size=64, n_layer=2, n_head=2, n_kv_head=1, n_embd=32, window_pattern="S"),
        GPTConfig(sequence_len=9, vocab_size=33, n_layer=4, n_head=2, n_kv_head=2, n_embd=48, window_pattern="SSSL"),
        NATIVE,
        replace(SMALL, value_embeddings=False),
        replace(SMALL, residual_mix=False),
    ],
    ids=["five layers", "one key head", "odd numbers", "native", "no value embeddings", "no residual mix"],
)
def test_against_the_formulas(config: GPTConfig) -> None:
    """Logits, loss and every gradient in float64, on a row beyond the training length."""
    model = random_model(config, compute_dtype=torch.float64, rotary_dtype=torch.float64).double()
    ids, targets = random_tokens(config, rows=1, length=14)
    targets = targets.clone()
    targets[0, 3] = IGNORE_INDEX
    weights = {name: weight.detach().clone().requires_grad_() for name, weight in model.named_parameters()}
    expected = twin_logits(weights, config, ids[0].tolist())
    torch.testing.assert_close(model(ids)[0], expected, rtol=1e-6, atol=1e-6)
    loss = model.loss(ids, targets)
    live = targets[0] != IGNORE_INDEX
    twin_loss = -expected.log_softmax(-1)[live].gather(1, targets[0, live, None]).mean()
    torch.testing.assert_close(loss, twin_loss, rtol=1e-6, atol=1e-6)
    loss.backward()
    twin_loss.backward()
    for name, weight in model.named_parameters():
        torch.testing.assert_close(
            weight.grad, weights[name].grad, rtol=1e-5, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}"
        )


# Habits ---------------------------------------------------------------------------------------------------------------


def test_initial_weights_have_the_references_distribution() -> None:
    config = GPTConfig(sequence_len=64, vocab_size=8192, n_layer=4, n_head=2, n_kv_head=2, n_embd=256)
    model = GPT(config)
    model.init_weights(torch.Generator().manual_seed(42))
    bound = math.sqrt(3 / 256)
    for name, weight in model.named_parameters():
        low, high, std = weight.min().item(), weight.max().item(), weight.std().item()
        if "c_proj" in name or "ve_gate" in name:
            assert low == high == 0, name
        elif name == "resid_lambdas":
            assert low == high == 1
        elif name == "x0_lambdas":
            assert low == high == pytest.approx(0.1)
        elif name in ("transformer.wte.weight", "lm_head.weight"):
            expected = 1 if "wte" in name else 0.001
            assert std == pytest.approx(expected, rel=0.005)
            assert 4.5 * expected < high < 7 * expected, name  # a normal's tail over 2 million draws
        else:
            assert std == pytest.approx(bound / math.sqrt(3), rel=0.01), name
            assert -bound <= low < -0.999 * bound and 0.999 * bound < high <= bound, name
        assert abs(weight.mean().item() - (low if low == high else 0)) < 0.005
    ids = torch.randint(8192, (2, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert model.loss(ids, ids.roll(1, 1)).item() == pytest.approx(math.log(8192), abs=0.005)


def test_a_seed_decides_the_weights() -> None:
    models = [GPT(SMALL) for _ in range(3)]
    state = torch.get_rng_state()
    for model, seed in zip(models, (7, 7, 8), strict=True):
        model.init_weights(torch.Generator().manual_seed(seed))
    assert torch.get_rng_state().equal(state), "a given generator is the only source of random numbers"
    weights = [model.state_dict() for model in models]
    assert all(weights[0][name].equal(weights[1][name]) for name in weights[0])
    assert not weights[0]["lm_head.weight"].equal(weights[2]["lm_head.weight"])
    torch.manual_seed(7)
    models[2].init_weights()
    torch.manual_seed(7)
    models[1].init_weights()
    assert models[1].lm_head.weight.equal(models[2].lm_head.weight)


def test_from_the_meta_device() -> None:
    """Nothing is allocated on the meta device; tables and attention are then as in a model built directly."""
    with torch.device("meta"):
        model = GPT(SMALL)
    assert model.device.type == "meta" and {p.device.type for p in model.parameters()} == {"meta"}
    model.to_empty(device="cpu")
    model.init_weights(torch.Generator().manual_seed(0))
    direct = GPT(SMALL)
    direct.init_weights(torch.Generator().manual_seed(0))
    ids, _ = random_tokens()
    assert model.attention_backend == direct.attention_backend == "banded"
    assert model.cos.equal(direct.cos) and model.sin.equal(direct.sin)
    assert model(ids).equal(direct(ids))


@pytest.mark.parametrize("config", [SMALL, NATIVE], ids=["full", "native"])
def test_only_weights_are_saved(config: GPTConfig) -> None:
    model = GPT(config)
    model.init_weights()
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}


def test_disabled_features_have_no_weights() -> None:
    names = {config: set(GPT(config).state_dict()) for config in (SMALL, NATIVE)}
    assert names[NATIVE] < names[SMALL]
    left_out = {
        name.split(".")[-2] if "ve_gate" in name else name.split(".")[0] for name in names[SMALL] - names[NATIVE]
    }
    assert left_out == {"resid_lambdas", "x0_lambdas", "value_embeds", "ve_gate"}


def test_rotary_tables_are_rounded_as_in_nanochat_or_in_transformers() -> None:
    assert GPT(SMALL).cos.equal(GPT(SMALL).cos.bfloat16().float())
    exact = GPT(NATIVE).cos
    assert not exact.equal(exact.bfloat16().float())
    assert GPT(NATIVE, rotary_dtype=torch.bfloat16).cos.equal(exact.bfloat16().float())


def test_weights_and_gradients_are_fp32_with_bf16_compute() -> None:
    model, exact = random_model(compute_dtype=torch.bfloat16), random_model()
    ids, targets = random_tokens()
    assert model.hidden(ids).dtype == torch.bfloat16
    logits = model(ids)
    assert logits.dtype == torch.float32
    loss = model.loss(ids, targets)
    loss.backward()
    exact_loss = exact.loss(ids, targets)
    exact_loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact_loss.item(), rel=0.02)
    for (name, weight), reference in zip(model.named_parameters(), exact.parameters(), strict=True):
        assert weight.dtype == weight.grad.dtype == torch.float32
        assert (weight.grad - reference.grad).norm() < 0.3 * reference.grad.norm(), name


def test_logits_are_cropped_and_capped() -> None:
    model = random_model()
    with torch.no_grad():
        model.lm_head.weight.mul_(1e4)
    logits = model(random_tokens()[0])
    assert logits.shape == (2, 16, SMALL.vocab_size)
    assert logits.abs().max() == 15


def test_later_tokens_have_no_effect() -> None:
    model = random_model()
    ids, _ = random_tokens()
    changed = ids.clone()
    changed[:, 9:] = (changed[:, 9:] + 1) % SMALL.vocab_size
    before, after = model(ids), model(changed)
    torch.testing.assert_close(before[:, :9], after[:, :9], rtol=0, atol=1e-6)
    assert (before[:, 9:] - after[:, 9:]).abs().amax(-1).min() > 1e-3


def test_tokens_beyond_the_windows_of_all_layers_have_no_effect() -> None:
    config = GPTConfig(sequence_len=8, vocab_size=64, n_layer=3, n_head=2, n_kv_head=2, n_embd=32, window_pattern="S")
    model = random_model(config, compute_dtype=torch.float64).double()
    reach = sum(config.window_sizes)
    ids, _ = random_tokens(config, rows=1, length=reach + 6)
    logits = model(ids)[0, -1]
    for distance, seen in ((reach, True), (reach + 1, False)):
        changed = ids.clone()
        changed[0, -1 - distance] = (changed[0, -1 - distance] + 1) % config.vocab_size
        assert bool((model(changed)[0, -1] - logits).abs().max() > 1e-12) is seen, distance


@pytest.mark.parametrize("prompt_length", [1, 7, 16, 25])
def test_cached_decoding_equals_the_full_pass(prompt_length: int) -> None:
    """Rows of different lengths, in chunks and steps, beyond the training length."""
    model = random_model(compute_dtype=torch.float64).double()
    ids, _ = random_tokens(rows=3, length=prompt_length + 20)
    lengths = torch.tensor([prompt_length, max(1, prompt_length - 3), (prompt_length + 1) // 2])
    cache = KVCache(SMALL, 3, prompt_length + 20, torch.float64)
    with torch.inference_mode():
        full = model(ids)
        prefilled = model(ids[:, :prompt_length], cache.expect(prompt_length))
        torch.testing.assert_close(prefilled, full[:, :prompt_length])
        cache.lengths = lengths
        for length in (1, 1, 4, 1, 5, 1):
            rows = torch.arange(3)[:, None]
            positions = cache.lengths[:, None] + torch.arange(length)
            torch.testing.assert_close(model(ids[rows, positions], cache.expect(length)), full[rows, positions])


def test_a_context_beyond_the_tables_is_refused() -> None:
    model = random_model()
    with torch.inference_mode():
        model(torch.zeros(1, 160, dtype=torch.int64))
        with pytest.raises(UserError, match="161 tokens is longer than this model's limit of 160"):
            model(torch.zeros(1, 161, dtype=torch.int64))


def test_a_named_attention_is_that_of_the_first_device() -> None:
    """Lightning moves the model to the CPU when a run on a GPU ends, where GPU backends do not work."""
    model = GPT(SMALL, attention="masked")
    assert model.to(torch.float32).attention_backend == "masked"
    model.attention, model._first_device = "flash", "cuda"
    assert model.cpu().attention_backend == "banded"
    with pytest.raises(UserError, match="attention 'flash' does not work on cpu"):
        GPT(SMALL, attention="flash")


def test_an_unknown_attention_is_refused() -> None:
    with pytest.raises(UserError, match="attention is 'fast'"):
        GPT(SMALL, attention="fast")


@pytest.mark.slow
def test_compiled_blocks_compute_the_same_without_breaks() -> None:
    model, compiled = random_model(), random_model()
    names = list(compiled.state_dict())
    torch._dynamo.reset()
    compile_blocks(compiled)
    ids, targets = random_tokens()
    counters = torch._dynamo.utils.counters
    counters.clear()
    losses = [net.loss(ids, targets) for net in (model, compiled)]
    assert not counters["graph_break"]
    # Two windows, with and without value embeddings.
    assert counters["stats"]["unique_graphs"] <= 4
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-5)
    for loss in losses:
        loss.backward()
    for (name, a), b in zip(model.named_parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert list(compiled.state_dict()) == names
    graphs = counters["stats"]["unique_graphs"]
    with torch.inference_mode():
        cache = KVCache(SMALL, 2, 24)
        for chunk in (ids, ids[:, :1], ids[:, :3]):
            assert compiled(chunk, cache.expect(chunk.size(1))).isfinite().all()
    assert counters["stats"]["unique_graphs"] == graphs, "decoding compiles nothing"
