"""Contract tests: each private attribute of Lightning exists and behaves as expected."""

from __future__ import annotations

import ast
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch.distributed as dist
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lmchat.strategies import lightning_internals as internals

SOURCE = Path(internals.__file__).resolve().parent.parent


def trainer(tmp_path: Path, *callbacks: L.Callback, **options: Any) -> L.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return L.Trainer(
        accelerator="cpu",
        callbacks=list(callbacks),
        default_root_dir=tmp_path,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
        **{"max_epochs": 1, "limit_train_batches": 6, "limit_val_batches": 2, **quiet, **options},
    )


class Watch(L.Callback):
    """Calls ``check`` during the backward pass of every micro-batch, and ``after`` at its end."""

    def __init__(self, check: Any = None, after: Any = None) -> None:
        self.check, self.after = check, after

    def on_before_backward(self, trainer: L.Trainer, *_: Any) -> None:
        if self.check:
            self.check(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if self.after:
            self.after(trainer)


def test_the_last_micro_batch_of_a_step_is_known_in_its_backward_pass(tmp_path: Path) -> None:
    seen: list[bool] = []
    watch = Watch(check=lambda trainer: seen.append(internals.ends_optimizer_step(trainer)))
    trainer(tmp_path, watch, accumulate_grad_batches=3).fit(BoringModel())
    assert seen == [False, False, True, False, False, True]


def test_a_requested_stop_comes_at_the_end_of_the_batch(tmp_path: Path) -> None:
    run = trainer(tmp_path, Watch(check=internals.stop_after_batch))
    with pytest.raises(SIGTERMException):
        run.fit(BoringModel())
    assert run.global_step == 1


def test_sigterm_calls_the_given_handler(tmp_path: Path) -> None:
    run, received = trainer(tmp_path), []
    assert callable(run._signal_connector._sigterm_notifier_fn)
    assert callable(run.fit_loop.epoch_loop._broadcast_sigterm_tensor)
    internals.take_over_sigterm(run, lambda *signal: received.append(signal))
    run._signal_connector._sigterm_notifier_fn(15, None)
    assert received == [(15, None)]
    assert run.fit_loop.epoch_loop._broadcast_sigterm_tensor() is None


def test_the_launcher_does_not_kill_other_ranks() -> None:
    launcher = _SubprocessScriptLauncher(LightningEnvironment(), num_processes=2, num_nodes=1)
    first: Any = SimpleNamespace()
    launcher.procs.append(first)
    for _ in range(2):
        internals.keep_other_ranks_alive(launcher)
        assert launcher.procs == [] and internals.other_ranks(launcher) == [first]
    internals.keep_other_ranks_alive(None)
    assert internals.other_ranks(None) == []


def test_the_timeout_of_collectives_is_known() -> None:
    assert internals.process_group_timeout(DDPStrategy(timeout=timedelta(hours=2))) == timedelta(hours=2)


@pytest.mark.parametrize(("strategy", "copies"), [("ddp", False), ("ddp_spawn", True), ("ddp_notebook", True)])
def test_launchers_that_copy_processes_are_known(strategy: str, copies: bool, tmp_path: Path) -> None:
    assert internals.copies_processes(trainer(tmp_path, strategy=strategy, devices=2).strategy.launcher) == copies
    assert not internals.copies_processes(None)


def test_a_checkpoint_is_made_without_a_barrier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[dict[str, Any]] = []

    def save(trainer: L.Trainer) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(type(trainer.strategy), "barrier", lambda *_: pytest.fail("waited for other ranks"))
            saved.append(internals.checkpoint_dict(trainer))

    trainer(tmp_path, Watch(after=save)).fit(BoringModel())
    assert {"state_dict", "optimizer_states", "loops", "global_step"} <= saved[0].keys()
    assert "epoch_loop.batch_progress" in saved[0]["loops"]["fit_loop"]


def test_the_number_of_steps_can_be_set(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    internals.set_max_steps(run, 4)
    run.fit(BoringModel())
    assert run.max_steps == run.global_step == 4


def test_the_step_of_an_evaluation_can_be_set(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    internals.set_global_step(run, 7)
    run.validate(BoringModel(), verbose=False)
    assert run.global_step == 7


def test_validation_runs_within_training(tmp_path: Path) -> None:
    class Count(L.Callback):
        validated = 0

        def on_validation_batch_end(self, *_: Any) -> None:
            self.validated += 1

    class Validate(L.Callback):
        def on_train_start(self, trainer: L.Trainer, *_: Any) -> None:
            internals.run_validation(trainer)
            assert trainer.training

    count = Count()
    trainer(tmp_path, count, Validate(), check_val_every_n_epoch=None, val_check_interval=1000).fit(BoringModel())
    assert count.validated == 2


def test_between_batches(tmp_path: Path) -> None:
    during, after = [], []
    run = trainer(
        tmp_path,
        Watch(
            check=lambda trainer: during.append(internals.is_between_batches(trainer)),
            after=lambda trainer: after.append(internals.is_between_batches(trainer)),
        ),
    )
    run.fit(BoringModel())
    assert not any(during) and all(after)


def test_counters_of_a_step_are_those_of_a_run(tmp_path: Path) -> None:
    states: list[dict[str, Any]] = []
    watch = Watch(after=lambda trainer: states.append(trainer.fit_loop.state_dict()))
    options: Any = {"accumulate_grad_batches": 3, "max_epochs": -1, "max_steps": 3, "limit_train_batches": 12}
    trainer(tmp_path, watch, **options).fit(BoringModel())
    assert len(states) == 9
    used = trainer(tmp_path, max_epochs=2, limit_train_batches=3, limit_val_batches=0)
    used.fit(BoringModel())
    used.accumulate_grad_batches = 3
    for step, state in enumerate(states[2::3], start=1):
        assert internals.fit_loop_state(trainer(tmp_path, **options), step) == state
        assert internals.fit_loop_state(used, step) == state


def test_states_of_rank_0_are_broadcast(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a group of one rank; the sent values are counted."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        sent: list[int] = []
        broadcast = dist._broadcast_coalesced

        def counted(group: Any, tensors: list[Any], *rest: Any) -> None:
            sent.append(sum(tensor.numel() for tensor in tensors))
            broadcast(group, tensors, *rest)

        monkeypatch.setattr(dist, "_broadcast_coalesced", counted)
        module = BoringModel()
        internals.broadcast_module_states(module)
        assert sent == [sum(parameter.numel() for parameter in module.parameters())]
    finally:
        dist.destroy_process_group()


def test_the_hooks_of_the_command_line_exist() -> None:
    for name in internals.OVERRIDDEN_CLI_HOOKS:
        assert callable(getattr(LightningCLI, name)), name
    assert "_subcommand_parsers" in Path(__import__("inspect").getsourcefile(LightningCLI)).read_text()


def test_private_attributes_are_used_in_one_file() -> None:
    """Attributes with a leading underscore, of objects other than self, cls and lmchat's modules."""
    own = {"_version", "_parameters", "_buffers", "_foreach_copy_", "_fields", "_replace"}
    found = []
    for path in SOURCE.rglob("*.py"):
        if "trainer" not in (text := path.read_text()) or path.name == "lightning_internals.py":
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
                holder = ast.unparse(node.value)
                if (
                    any(word in holder for word in ("trainer", "fit_loop", "connector", "launcher"))
                    and node.attr not in own
                ):
                    found.append(f"{path.name}: {holder}.{node.attr}")
    assert found == []
