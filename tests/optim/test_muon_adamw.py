"""The whole optimizer: groups, schedules, state, and twelve recorded training steps of the reference."""

from __future__ import annotations

import io
import json
import multiprocessing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lmchat.model.config import GPTConfig
from lmchat.model.gpt import GPT
from lmchat.optim.muon_adamw import MuonAdamW, adamw_update, muon_update, second_moment_shape
from lmchat.optim.param_groups import build_param_groups
from lmchat.types import UserError

SHAPES = {
    "transformer.wte.weight": (24, 8),
    "transformer.h.0.attn.c_q.weight": (8, 8),
    "transformer.h.0.mlp.c_fc.weight": (32, 8),
    "transformer.h.0.mlp.c_proj.weight": (8, 32),
    "transformer.h.1.attn.c_q.weight": (8, 8),
    "transformer.h.1.mlp.c_fc.weight": (32, 8),
    "transformer.h.1.mlp.c_proj.weight": (8, 32),
    "value_embeds.1.weight": (24, 8),
    "lm_head.weight": (24, 8),
    "resid_lambdas": (2,),
    "x0_lambdas": (2,),
}


def make_params(dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {name: nn.Parameter(torch.randn(shape, dtype=dtype, generator=generator)) for name, shape in SHAPES.items()}


def set_grads(params: dict[str, nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for param in params.values():
        param.grad = torch.randn(param.shape, dtype=param.dtype, generator=generator)


def make_optimizer(params: dict[str, nn.Parameter], **kwargs: Any) -> MuonAdamW:
    return MuonAdamW(build_param_groups(params.items(), n_embd=8), **kwargs)


def take_steps(optimizer: MuonAdamW, params: dict[str, nn.Parameter], seeds: range) -> None:
    for seed in seeds:
        set_grads(params, seed)
        optimizer.step()


def assert_equal(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=0)


def test_groups_are_ordered_as_in_the_reference() -> None:
    groups = build_param_groups(make_params().items(), n_embd=192, lr_scale=0.5)
    adamw, muon = {"kind": "adamw", "eps": 1e-10, "weight_decay": 0.0}, {"kind": "muon", "beta2": 0.95}
    expected = [
        {"name": "lm_head", "lr": 0.004 * 2 * 0.5, "betas": (0.8, 0.95), **adamw},
        {"name": "wte", "lr": 0.3 * 2 * 0.5, "betas": (0.8, 0.95), **adamw},
        {"name": "value_embeds", "lr": 0.3 * 2 * 0.5, "betas": (0.8, 0.95), **adamw},
        {"name": "resid_lambdas", "lr": 0.005 * 0.5, "betas": (0.8, 0.95), **adamw},
        {"name": "x0_lambdas", "lr": 0.5 * 0.5, "betas": (0.96, 0.95), **adamw},
        {"name": "muon_8x8", "lr": 0.02 * 0.5, "weight_decay": 0.2, **muon},
        {"name": "muon_8x32", "lr": 0.02 * 0.5, "weight_decay": 0.2, **muon},
        {"name": "muon_32x8", "lr": 0.02 * 0.5, "weight_decay": 0.2, **muon},
    ]
    assert [group["name"] for group in groups] == [group["name"] for group in expected]
    for group, wanted in zip(groups, expected, strict=True):
        assert group["initial_lr"] == group["lr"]
        assert group["lr"] == pytest.approx(wanted.pop("lr"))
        assert {key: group[key] for key in wanted} == wanted
    assert sorted(name for group in groups for name in group["param_names"]) == sorted(SHAPES)


def test_groups_of_a_gpt_have_every_parameter_once() -> None:
    with torch.device("meta"):
        net = GPT(GPTConfig(sequence_len=64, vocab_size=96, n_layer=5, n_head=4, n_kv_head=2, n_embd=64))
    groups = build_param_groups(net.named_parameters(), n_embd=64)
    members = [param for group in groups for param in group["params"]]
    assert len(members) == len(set(members)) == len(list(net.parameters()))
    shapes = [tuple(group["params"][0].shape) for group in groups if group["kind"] == "muon"]
    assert shapes == [(2, 32), (32, 64), (64, 64), (64, 256), (256, 64)]


def test_groups_without_disabled_features() -> None:
    with torch.device("meta"):
        shape = {"sequence_len": 64, "vocab_size": 96, "n_layer": 2, "n_head": 4, "n_kv_head": 2, "n_embd": 64}
        net = GPT(GPTConfig(**shape, value_embeddings=False, residual_mix=False))
    groups = build_param_groups(net.named_parameters(), n_embd=64)
    assert [group["name"] for group in groups] == [
        *("lm_head", "wte"),
        *("muon_32x64", "muon_64x64", "muon_64x256", "muon_256x64"),
    ]
    assert sum(len(group["params"]) for group in groups) == len(list(net.parameters()))


@pytest.mark.parametrize(
    ("name", "shape"), [("transformer.h.0.attn.bias", (8,)), ("adapter.weight", (4, 4)), ("head.lm_head", (4, 4))]
)
def test_unknown_parameters_are_refused(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match=f"{name} of shape"):
        build_param_groups([(name, nn.Parameter(torch.zeros(shape)))], n_embd=8)


def test_bad_groups_are_refused() -> None:
    matrix, other = nn.Parameter(torch.zeros(4, 4)), nn.Parameter(torch.zeros(4, 8))
    muon = {"name": "m", "kind": "muon", "lr": 0.1, "momentum": 0.9, "weight_decay": 0.0, "beta2": 0.95}
    with pytest.raises(UserError, match="kind sgd"):
        MuonAdamW([{**muon, "kind": "sgd", "params": [matrix]}])
    with pytest.raises(UserError, match="one shape"):
        MuonAdamW([{**muon, "params": [matrix, other]}])
    with pytest.raises(UserError, match="two param groups"):
        MuonAdamW([{**muon, "params": [matrix]}, {**muon, "params": [other]}])


def test_a_step_equals_the_pure_updates() -> None:
    params = make_params(torch.float64)
    twins = {name: param.detach().clone() for name, param in params.items()}
    optimizer = make_optimizer(params)
    moments: dict[str, list[Tensor]] = {}
    for step in range(3):
        set_grads(params, seed=step)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] / (step + 1)
            if group["kind"] == "muon":
                group["momentum"], group["weight_decay"] = 0.85 + 0.01 * step, 0.2 - 0.05 * step
            for name in group["param_names"]:
                twin, grad = twins[name][None], params[name].grad
                assert grad is not None
                if group["kind"] == "muon":
                    shape = second_moment_shape(*grad.shape)
                    state = moments.setdefault(name, [torch.zeros_like(twin), grad.new_zeros(1, *shape)])
                    settings = {key: group[key] for key in ("lr", "momentum", "weight_decay")}
                    muon_update(twin, grad[None], *state, **settings)
                else:
                    state = moments.setdefault(
                        name, [torch.zeros_like(twin[0]), torch.zeros_like(twin[0]), torch.zeros(())]
                    )
                    named = dict(zip(("exp_avg", "exp_avg_sq", "step"), state, strict=True))
                    adamw_update([twin[0]], [grad], [named], group)
        optimizer.step()
    for name, twin in twins.items():
        torch.testing.assert_close(params[name].detach(), twin, rtol=0, atol=1e-13)


def test_closure_runs_with_gradients_and_its_loss_is_returned() -> None:
    param = nn.Parameter(torch.ones(4, 4))
    group = {"name": "lm_head", "kind": "adamw", "lr": 0.1, "betas": (0.8, 0.95), "eps": 1e-10, "weight_decay": 0.0}
    optimizer = MuonAdamW([{**group, "params": [param]}])

    def closure() -> Tensor:
        loss = param.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 16
    assert (param < 1).all()


@pytest.mark.parametrize("idle", ["transformer.h.0.attn.c_q.weight", "transformer.wte.weight", "x0_lambdas"])
def test_parameters_without_gradients_do_not_change(idle: str) -> None:
    params, complete = make_params(), make_params()
    optimizer, twin = make_optimizer(params), make_optimizer(complete)
    before = params[idle].detach().clone()
    for seed in range(2):
        set_grads(params, seed)
        set_grads(complete, seed)
        params[idle].grad = None
        optimizer.step()
        twin.step()
    torch.testing.assert_close(params[idle].detach(), before, rtol=0, atol=0)
    assert not optimizer.state[params[idle]] or not optimizer.state[params[idle]]["momentum_buffer"].any()
    for name in SHAPES.keys() - {idle}:
        torch.testing.assert_close(params[name], complete[name], rtol=0, atol=1e-6)


def test_state_is_saved_and_loaded_exactly() -> None:
    params = make_params()
    optimizer = make_optimizer(params)
    take_steps(optimizer, params, range(3))
    file = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "params": {k: p.detach() for k, p in params.items()}}, file)

    saved = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    resumed_params = {name: nn.Parameter(value) for name, value in saved["params"].items()}
    resumed = make_optimizer(resumed_params)
    for group in saved["optimizer"]["param_groups"]:  # settings are those of the run that resumes
        group.update(lr=[], eps=None, betas=3, beta2="x", momentum={}, kind="", weight_decay=float("nan"))
    resumed.load_state_dict(saved["optimizer"])
    for name, state in optimizer.state_dict()["state"].items():
        assert_equal(resumed.state_dict()["state"][name], state)

    take_steps(optimizer, params, range(3, 6))
    take_steps(resumed, resumed_params, range(3, 6))
    assert_equal(resumed_params, params)


def test_state_is_named_and_shaped_per_parameter() -> None:
    params = make_params()
    optimizer = make_optimizer(params)
    take_steps(optimizer, params, range(1))
    state = optimizer.state_dict()["state"]
    assert state.keys() == SHAPES.keys()
    matrix, table = state["transformer.h.1.mlp.c_proj.weight"], state["lm_head.weight"]
    assert {key: tuple(matrix[key].shape) for key in matrix.keys() - {"row_start"}} == {
        "momentum_buffer": (8, 32),
        "second_moment": (1, 32),
    }
    assert {key: tuple(table[key].shape) for key in table.keys() - {"row_start"}} == {
        "exp_avg": (24, 8),
        "exp_avg_sq": (24, 8),
        "step": (),
    }


def test_state_moved_by_lightning_stays_in_the_stacks() -> None:
    from lightning.fabric.utilities.optimizer import _optimizers_to_device

    params, twins = make_params(), make_params()
    optimizer, twin = make_optimizer(params), make_optimizer(twins)
    take_steps(optimizer, params, range(2))
    take_steps(twin, twins, range(2))
    optimizer.load_state_dict(optimizer.state_dict())
    _optimizers_to_device([optimizer], torch.device("cpu"))
    take_steps(optimizer, params, range(2, 4))
    take_steps(twin, twins, range(2, 4))
    assert_equal(params, twins)
    assert_equal(optimizer.state_dict()["state"], twin.state_dict()["state"])


def test_state_of_another_model_is_refused() -> None:
    params = make_params()
    optimizer = make_optimizer(params)
    take_steps(optimizer, params, range(1))
    saved = optimizer.state_dict()
    fewer = {name: param for name, param in make_params().items() if "h.1." not in name}
    with pytest.raises(UserError, match=r"transformer\.h\.1\..* saved but not in the model"):
        make_optimizer(fewer).load_state_dict(saved)
    taller = {**make_params(), "transformer.wte.weight": nn.Parameter(torch.zeros(30, 8))}
    with pytest.raises(UserError, match=r"transformer.wte.weight of shape \((24|30), 8\)"):
        make_optimizer(taller).load_state_dict(saved)
    saved["state"]["lm_head.weight"]["step"] = 2**70
    with pytest.raises(UserError, match=r"the saved optimizer state is damaged .*; use an older checkpoint"):
        make_optimizer(params).load_state_dict(saved)
    del saved["state"]["lm_head.weight"]
    with pytest.raises(UserError, match=r"rows 0 to 24 of exp_avg of lm_head\.weight are not in the saved"):
        make_optimizer(params).load_state_dict(saved)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_update_follows_schedules_without_recompiling(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Generating C++ code takes 10 seconds; recompilation does not depend on it."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    shape = "mlp.c_proj"
    params, twins = ({name: p for name, p in make_params().items() if shape in name} for _ in range(2))
    optimizer, twin = make_optimizer(params, compile=True), make_optimizer(twins, compile=False)
    torch._dynamo.reset()
    for step in range(4):
        for group in (*optimizer.param_groups, *twin.param_groups):
            group["lr"] = group["initial_lr"] * (1 - step / 4)
            if group["kind"] == "muon":
                group["momentum"], group["weight_decay"] = 0.85 + step / 100, 0.2 * (1 - step / 4)
        set_grads(params, seed=step)
        set_grads(twins, seed=step)
        twin.step()
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            optimizer.step()
    for name, param in params.items():
        torch.testing.assert_close(param, twins[name], rtol=0, atol=1e-5)


def test_works_with_a_disabled_compiler() -> None:
    """In a separate process, since torch caches which functions it did not compile."""

    def step_without_compiler() -> None:
        torch._dynamo.config.disable = True  # as TORCH_COMPILE_DISABLE=1 sets it
        params = {name: param for name, param in make_params().items() if "c_proj" in name}
        before = {name: param.detach().clone() for name, param in params.items()}
        take_steps(make_optimizer(params, compile=True), params, range(1))
        assert not any(torch.equal(params[name], value) for name, value in before.items())

    process = multiprocessing.get_context("fork").Process(target=step_without_compiler, daemon=True)
    process.start()
    process.join(60)
    assert process.exitcode == 0


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        ("l5", torch.float32),
        ("l5", torch.float64),
        pytest.param("kv2", torch.float32, marks=pytest.mark.slow),
    ],
)
def test_twelve_reference_training_steps(case: str, dtype: torch.dtype, oracles: Path) -> None:
    settings = json.loads((oracles / "c05_gpt.json").read_text())[case]
    initial, trained = np.load(oracles / f"c05_gpt_{case}.npz"), np.load(oracles / f"c05_train_{case}.npz")
    net = GPT(GPTConfig(**settings["config"]), compute_dtype=dtype).to(dtype)
    net.load_state_dict({key[2:]: torch.from_numpy(initial[key]) for key in initial if key.startswith("w/")})
    groups = build_param_groups(net.named_parameters(), n_embd=settings["config"]["n_embd"])
    optimizer = MuonAdamW(groups, polar_dtype=dtype)
    losses = []
    for step, rows in enumerate(torch.from_numpy(trained["batches"])):
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * min(1.0, (12 - step) / 6)
            if group["kind"] == "muon":
                group["momentum"], group["weight_decay"] = 0.85 + 0.1 * step / 300, 0.2 * (1 - step / 12)
        loss = net.loss(rows[:, :-1], rows[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    if dtype == torch.float64:
        np.testing.assert_allclose(losses, settings["train_losses_fp64"], rtol=0, atol=1e-6)
    # In float32, rounding decides some signs for cautious decay, each of which changes a late loss by up to 1e-4.
    np.testing.assert_allclose(losses, trained["losses_fp32polar"], rtol=0, atol=2e-4)
    assert np.median(np.abs(losses - trained["losses_fp32polar"])) < 5e-6
    weights = net.state_dict()
    for key in trained:
        if key.startswith("w_after_fp32polar/"):
            name = key.removeprefix("w_after_fp32polar/")
            difference = np.abs(weights[name].numpy() - trained[key])
            # Adam takes a whole step for a gradient's rounding error if a table row was rarely used.
            assert np.quantile(difference, 0.99) < (1e-3 if ".h." in name else 1e-2), name
            assert difference.mean() < 5e-4, name
