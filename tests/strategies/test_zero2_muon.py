"""`zero2_muon` in Trainer runs of one or more processes: equal results, silent accumulation, preemption."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from lightning.pytorch.utilities.exceptions import SIGTERMException

import zero2_ranks
from forked import exit_statuses, start_ranks
from lmchat.__main__ import main
from lmchat.cli.fit import LMChatCLI
from lmchat.optim.muon_adamw import MuonAdamW
from lmchat.strategies import zero2_muon
from lmchat.strategies.zero2_muon import Zero2MuonStrategy, reduce_numbers
from lmchat.types import UserError
from zero2_ranks import MICRO_BATCHES_PER_STEP, STEPS


def fit(folder: Path, devices: int, sigterm_at: int | None = None) -> tuple[list[int | None], str]:
    """Exit statuses and output of the ranks."""
    ranks = start_ranks(devices, zero2_ranks.fit, folder, devices, sigterm_at, folder=folder)
    statuses = exit_statuses(ranks)
    return statuses, "\n".join(path.read_text() for path in folder.glob("output_rank*.txt"))


def results(folder: Path, devices: int) -> list[dict[str, Any]]:
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(devices)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """Records of every rank in undisturbed runs, by number of processes."""
    seen = {}
    for devices in (1, 3):
        folder = tmp_path_factory.mktemp(f"fit{devices}")
        statuses, output = fit(folder, devices)
        assert statuses == [0] * devices, output
        seen[devices] = results(folder, devices)
    return seen


def test_is_registered() -> None:
    assert StrategyRegistry["zero2_muon"]["strategy"] is Zero2MuonStrategy
    trainer = L.Trainer(accelerator="cpu", devices=1, strategy="zero2_muon", logger=False)
    assert isinstance(trainer.strategy, Zero2MuonStrategy)


def test_overridden_methods_exist_in_lightning() -> None:
    """Setting an attribute that another version has renamed would have no effect."""
    trainer = L.Trainer(accelerator="cpu", devices=1, logger=False)
    assert callable(trainer._signal_connector._sigterm_notifier_fn)
    assert callable(trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor)


def test_three_processes_train_the_same_as_one(runs: dict[int, list[dict[str, Any]]]) -> None:
    (one,) = runs[1]
    # Micro-batch k of the global order is the rank's k mod 3.
    interleaved = [loss for losses in zip(*(rank["losses"] for rank in runs[3]), strict=True) for loss in losses]
    assert len(one["losses"]) == MICRO_BATCHES_PER_STEP * STEPS
    assert interleaved == pytest.approx(one["losses"], abs=1e-10)
    for rank in runs[3]:
        for name, weight in one["weights"].items():
            torch.testing.assert_close(rank["weights"][name], weight, rtol=0, atol=1e-10)


def test_accumulation_does_not_communicate(runs: dict[int, list[dict[str, Any]]]) -> None:
    for rank in runs[3]:
        per_step = MICRO_BATCHES_PER_STEP // 3
        before_step = [rank["collectives"][i : i + per_step] for i in range(0, per_step * STEPS, per_step)]
        assert all(len(set(counts)) == 1 for counts in before_step)
        assert before_step[0][0] < before_step[1][0] < before_step[2][0]


def test_sigterm_on_one_rank_ends_all_after_the_same_step(tmp_path: Path) -> None:
    middle_of_second_step = 6 + 2
    _, output = fit(tmp_path, 2, middle_of_second_step)
    assert "Traceback" not in output
    for rank in results(tmp_path, 2):
        assert rank["exception"] == "SIGTERMException"
        assert rank["step"] == 2
        assert len(rank["losses"]) == 2 * 6


@pytest.mark.parametrize(
    ("optimizer", "clip", "message"),
    [(MuonAdamW, 1.0, "gradient_clip_val is 1.0"), (torch.optim.SGD, None, r"needs one MuonAdamW, not \['SGD'\]")],
)
def test_unsupported_options_are_refused(
    optimizer: Any, clip: float | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = {"name": "wte", "kind": "adamw", "lr": 0.1, "params": [torch.nn.Parameter(torch.zeros(2))]}

    def configure(self: DDPStrategy, trainer: L.Trainer) -> None:
        self.optimizers = [optimizer([group])]

    monkeypatch.setattr(DDPStrategy, "setup_optimizers", configure)
    trainer: Any = SimpleNamespace(gradient_clip_val=clip)
    with pytest.raises(UserError, match=message):
        Zero2MuonStrategy().setup_optimizers(trainer)


CONFIG = """
trainer: {accelerator: cpu, devices: 2, max_steps: 2}
model: {class_path: PretrainModule, init_args: {depth: 1, sequence_len: 32, head_dim: 32, global_batch_tokens: 128}}
data: {class_path: FineWebDataModule, init_args: {micro_batch_size: 2}}
"""
FORMS = {
    "--trainer.strategy zero2_muon": ("auto", 32),
    "--trainer.strategy zero2_muon --trainer.strategy.gather_dtype fp32": ("fp32", 32),
    "--trainer.strategy=zero2_muon --trainer.strategy.init_args.gather_dtype=bf16": ("bf16", 32),
    "--trainer.strategy Zero2MuonStrategy --trainer.strategy.bucket_mebibytes 8": ("auto", 8),
    '--trainer.strategy={"class_path":"Zero2MuonStrategy","init_args":{"gather_dtype":"fp32"}}': ("fp32", 32),
}


@pytest.mark.parametrize("form", FORMS)
def test_its_options_are_taken_from_the_command_line(form: str, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    strategies: list[Any] = []
    monkeypatch.setattr(LMChatCLI, "fit", lambda self, *_, **__: strategies.append(self.trainer.strategy))
    (base / "own.yaml").write_text(CONFIG)
    assert main(["fit", "--config", str(base / "own.yaml"), *form.split()]) == 0
    (strategy,) = strategies
    assert isinstance(strategy, Zero2MuonStrategy) and strategy.num_processes == 2
    assert (strategy._gather_dtype, strategy._bucket_bytes // 2**20) == FORMS[form]


@pytest.mark.parametrize(
    ("gather_dtype", "compute_dtype", "expected"),
    [
        ("auto", torch.bfloat16, torch.bfloat16),
        ("auto", torch.float32, None),
        ("fp32", torch.bfloat16, None),
        ("bf16", torch.float32, torch.bfloat16),
    ],
)
def test_parameters_are_gathered_in_the_compute_dtype_by_default(
    gather_dtype: Any, compute_dtype: torch.dtype, expected: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: dict[str, Any] = {}

    def configure(self: DDPStrategy, trainer: L.Trainer) -> None:
        group = {"name": "wte", "kind": "adamw", "lr": 0.1, "params": [torch.nn.Parameter(torch.zeros(2))]}
        self.optimizers = [MuonAdamW([group])]

    def shard(groups: Any, agree: Any, **options: Any) -> MuonAdamW:
        made.update(options)
        return MuonAdamW(groups)

    monkeypatch.setattr(DDPStrategy, "setup_optimizers", configure)
    monkeypatch.setattr(Zero2MuonStrategy, "_take_over_signals", lambda *_: None)
    monkeypatch.setattr(zero2_muon, "ShardedMuonAdamW", shard)
    strategy = Zero2MuonStrategy(gather_dtype=gather_dtype)
    module: Any = SimpleNamespace(net=SimpleNamespace(compute_dtype=compute_dtype))
    monkeypatch.setattr(Zero2MuonStrategy, "lightning_module", property(lambda _: module))
    trainer: Any = SimpleNamespace(gradient_clip_val=None)
    strategy.setup_optimizers(trainer)
    assert made["gather_dtype"] == expected


@pytest.mark.parametrize(
    ("device", "exception", "expected"),
    [
        # The checkpoint of the exception is saved before the teardown.
        ("cuda", RuntimeError(), ["destroy control", "abort", "teardown"]),
        ("cuda", KeyboardInterrupt(), ["destroy control", "abort", "teardown"]),
        ("cuda", SIGTERMException(), ["teardown"]),
        ("cpu", RuntimeError(), ["destroy control", "destroy default", "teardown"]),
    ],
)
def test_a_failed_run_leaves_no_pending_collective(
    device: str, exception: BaseException, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    strategy = Zero2MuonStrategy()
    monkeypatch.setattr(Zero2MuonStrategy, "root_device", torch.device(device))
    monkeypatch.setattr(zero2_muon, "_abort_process_group", lambda: calls.append("abort"))
    monkeypatch.setattr(dist, "destroy_process_group", lambda group="default": calls.append(f"destroy {group}"))
    monkeypatch.setattr(DDPStrategy, "on_exception", lambda *_: None)
    monkeypatch.setattr(DDPStrategy, "teardown", lambda _: calls.append("teardown"))
    strategy.control_group = "control"  # type: ignore[assignment]
    strategy.on_exception(exception)
    strategy.teardown()
    assert calls == expected


@pytest.mark.parametrize("training", [False, True])
def test_numbers_are_reduced_where_the_group_of_ranks_can(training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL has no tensors on a CPU; the group for these exists in training only."""
    used: list[tuple[str, Any]] = []
    monkeypatch.setattr(dist, "all_reduce", lambda x, op, group: used.append((x.device.type, group)))
    control = object() if training else None
    strategy = SimpleNamespace(control_group=control, root_device=torch.device("meta"))
    trainer: Any = SimpleNamespace(world_size=2, strategy=strategy)
    with nullcontext() if training else pytest.raises(NotImplementedError, match="meta"):
        reduce_numbers(trainer, torch.ones(2))
    assert used == [("cpu" if training else "meta", control)]
