"""A resumed run equals an uninterrupted one bit for bit, after any interruption; errors are reported early."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader, IterableDataset

from checkpoint_meta import META
from lmchat.callbacks.checkpoint import StepCheckpoint
from lmchat.checkpoint import writer
from lmchat.checkpoint.layout import CheckpointPaths, committed_steps
from lmchat.checkpoint.load import Checkpoint, find_checkpoint, load_model_state, load_rank_state
from lmchat.types import UserError

ACCUMULATE = 3
STEPS = 12


class Stream(IterableDataset):
    """An endless stream of seeded rows; each batch carries the position after it."""

    def __init__(self, position: int) -> None:
        self.position = position

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while True:
            rows = torch.randn(4, 8, generator=torch.Generator().manual_seed(self.position))
            self.position += 1
            yield {"rows": rows, "state": {"position": self.position}}


class Data(L.LightningDataModule):
    def __init__(self) -> None:
        super().__init__()
        self.state: dict[str, Any] = {"position": 0}

    def train_dataloader(self) -> DataLoader:
        return DataLoader(Stream(self.state["position"]), batch_size=None)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(torch.ones(3, 8), batch_size=1)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        if isinstance(batch, dict):
            self.state = batch.pop("state")
        return batch

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.state = state_dict


class Module(L.LightningModule):
    """A module whose loss has noise from every generator, so a lost RNG state or batch changes it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
        self.losses: list[float] = []
        self.evaluated: list[int] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        noise = torch.rand(()) + random.random() + np.random.rand()  # noqa: NPY002
        loss = (self.net(batch["rows"]) - noise).square().mean()
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        torch.rand(100)

    def on_validation_end(self) -> None:
        if not self.trainer.sanity_checking:
            self.evaluated.append(self.trainer.global_step)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-2)

    stage, tag = META["stage"], META["tag"]

    def checkpoint_meta(self) -> dict[str, Any]:
        """With the loops' counters, but for the validation loop's: a resumed run does not repeat an evaluation."""
        loops = self.trainer.fit_loop.state_dict()
        loops["state_dict"].pop("combined_loader", None)
        return {**META, "loops": {name: state for name, state in loops.items() if "val_loop" not in name}}


class Interrupt(Callback):
    """Raises, or calls ``how``, in ``hook`` after ``micro_batches`` calls of it."""

    def __init__(self, hook: str, count: int, how: Any) -> None:
        self.left = count
        self.how = how
        setattr(self, hook, self._count)

    def _count(self, *_: Any) -> None:
        self.left -= 1
        if self.left == 0:
            self.how()


def raise_error() -> None:
    raise RuntimeError("out of memory")


def raise_interrupt() -> None:
    raise KeyboardInterrupt


def send_sigterm() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


class SizedStream(Stream):
    """A stream with a length: the micro-batches of a whole run, as in reinforcement learning."""

    def __init__(self, position: int, length: int) -> None:
        super().__init__(position)
        self.length = length

    def __len__(self) -> int:
        return self.length


class SizedData(Data):
    def train_dataloader(self) -> DataLoader:
        trainer = self.trainer
        return DataLoader(
            SizedStream(self.state["position"], trainer.max_steps * trainer.accumulate_grad_batches), batch_size=None
        )


def train(
    folder: Path,
    *callbacks: Callback,
    resume: bool = False,
    steps: int = STEPS,
    accumulate: int = ACCUMULATE,
    data: type[Data] = Data,
    **options: Any,
) -> Module:
    """Trains, and returns the module even if the run was interrupted."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    module = Module()
    trainer = L.Trainer(
        max_epochs=-1,
        max_steps=steps,
        accumulate_grad_batches=accumulate,
        num_sanity_val_steps=0,
        val_check_interval=2 * accumulate,
        check_val_every_n_epoch=None,
        callbacks=[*callbacks, StepCheckpoint(str(folder), **options)],
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    ckpt_path = find_checkpoint("last", directory=folder).paths.meta if resume else None
    try:
        trainer.fit(module, datamodule=data(), ckpt_path=ckpt_path)
    except (RuntimeError, SystemExit, KeyboardInterrupt) as error:
        module.interrupted_by = error
    return module


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Module:
    folder = tmp_path_factory.mktemp("unbroken")
    module = train(folder)
    assert len(module.losses) == STEPS * ACCUMULATE
    module.folder = folder
    return module


def tensors_of(tree: Any) -> list[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        return [tree]
    children = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list | tuple) else ()
    return [tensor for child in children for tensor in tensors_of(child)]


def loop_counters(checkpoint: Checkpoint) -> dict[str, Any]:
    loop: dict[str, Any] = checkpoint.meta["loops"]
    assert loop["epoch_loop.batch_progress"]["total"]["ready"] == checkpoint.step * ACCUMULATE
    return loop


def assert_same_end(folder: Path, unbroken: Module) -> None:
    """Weights, optimizer state, RNG states and data position equal those of the uninterrupted run."""
    ours, theirs = find_checkpoint(folder), find_checkpoint(unbroken.folder)
    assert ours.step == theirs.step == STEPS
    assert loop_counters(ours) == loop_counters(theirs)
    for read in (load_model_state, lambda checkpoint: load_rank_state(checkpoint, 0)):
        pairs = list(zip(tensors_of(read(ours)), tensors_of(read(theirs)), strict=True))
        assert pairs
        assert all(torch.equal(a, b) for a, b in pairs)
    assert load_rank_state(ours, 0)["Data"] == load_rank_state(theirs, 0)["Data"] == {"position": STEPS * ACCUMULATE}


# Hook, action, number of calls before it, and last complete step.
INTERRUPTIONS = {
    "error in the forward pass": ("on_train_batch_start", raise_error, 8, 2),
    "Ctrl-C before the backward pass that ends an accumulation": ("on_before_backward", raise_interrupt, 9, 2),
    "SIGTERM in an accumulation": ("on_train_batch_start", send_sigterm, 25, 8),
    "SIGTERM in the last micro-batch of a step": ("on_train_batch_start", send_sigterm, 12, 4),
    "another callback fails after a step": ("on_train_batch_end", raise_error, 9, 3),
    "error in evaluation": ("on_validation_batch_start", raise_error, 4, 4),
    "error before the optimizer steps": ("on_before_optimizer_step", raise_error, 5, 4),
}


@pytest.mark.parametrize("interruption", INTERRUPTIONS)
def test_an_interruption_loses_only_the_partial_step(interruption: str, tmp_path: Path, unbroken: Module) -> None:
    hook, how, count, step = INTERRUPTIONS[interruption]
    broken = train(tmp_path, Interrupt(hook, count, how))
    assert broken.interrupted_by is not None
    assert broken.losses == unbroken.losses[: len(broken.losses)]
    assert find_checkpoint(tmp_path).step == step
    resumed = train(tmp_path, resume=True)
    assert resumed.losses == unbroken.losses[step * ACCUMULATE :]
    assert_same_end(tmp_path, unbroken)


def test_a_partial_step_is_not_saved(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class FailInStep(Callback):
        def on_train_start(self, trainer: L.Trainer, *_: Any) -> None:
            interrupt = Interrupt("step", 6, raise_error)
            trainer.optimizers[0].register_step_post_hook(interrupt.step)

    with caplog.at_level("INFO"):
        broken = train(tmp_path, FailInStep(), every_n_steps=3)
    assert str(broken.interrupted_by) == "out of memory"
    assert committed_steps(tmp_path) == [3]
    assert "interrupted at step 5; resume with --ckpt_path" in caplog.text and "meta_000003.json" in caplog.text


@pytest.mark.parametrize("kill_at", [0, 1])
def test_periodic_checkpoints_resume_within_an_epoch(kill_at: int, tmp_path: Path, unbroken: Module) -> None:
    """The newest checkpoint is deleted, as if the run had been killed before it."""
    train(tmp_path, Interrupt("on_train_batch_start", 20, raise_error), every_n_steps=2)
    assert committed_steps(tmp_path) == [2, 4, 6]
    for step in committed_steps(tmp_path)[1 + kill_at :]:
        CheckpointPaths(tmp_path, step).meta.unlink()
    step = find_checkpoint(tmp_path).step
    assert step == 2 + 2 * kill_at
    resumed = train(tmp_path, resume=True, every_n_steps=2)
    assert resumed.losses == unbroken.losses[step * ACCUMULATE :]
    assert_same_end(tmp_path, unbroken)
    assert resumed.evaluated == list(range(step + 2, STEPS + 1, 2))


class LogLosses(Callback):
    """Writes the position and loss of each micro-batch to a file, unbuffered."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Module, *_: Any) -> None:
        with self.path.open("a") as file:
            file.write(f"{trainer.fit_loop.total_batch_idx} {pl_module.losses[-1]!r}\n")


def test_a_run_killed_at_random_times_resumes_exactly(tmp_path: Path, unbroken: Module) -> None:
    """SIGKILL, also while saving. Every computed loss equals that of the uninterrupted run at the same position."""
    processes = multiprocessing.get_context("fork")
    generator = random.Random(1)
    log = tmp_path / "losses"
    log.touch()
    kills = 0
    while True:
        resume = bool(committed_steps(tmp_path / "run"))
        options = {"resume": resume, "every_n_steps": 1, "keep_last": 2}
        enough = len(log.read_text().splitlines()) + generator.randint(4, 12)
        process = processes.Process(target=train, args=(tmp_path / "run", LogLosses(log)), kwargs=options)
        process.start()
        while process.is_alive() and len(log.read_text().splitlines()) < enough:
            time.sleep(0.001)
        process.join(generator.uniform(0, 0.01))
        process.kill()
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        kills += 1
    assert kills >= 2
    places: set[int] = set()
    for line in log.read_text().splitlines():
        place, loss = line.split()
        assert float(loss) == unbroken.losses[int(place)]
        places.add(int(place))
    assert places == set(range(STEPS * ACCUMULATE))
    assert_same_end(tmp_path / "run", unbroken)


@pytest.mark.parametrize("data", [Data, SizedData])
@pytest.mark.parametrize(("before", "after"), [(1, 4), (4, 1), (3, 2)])
def test_resuming_with_another_accumulation_keeps_steps_and_evaluations(
    before: int, after: int, data: type[Data], tmp_path: Path
) -> None:
    class MicroBatches(Callback):
        def __init__(self) -> None:
            self.of_step: Counter[int] = Counter()

        def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
            self.of_step[trainer.global_step + 1] += 1

    train(tmp_path, accumulate=before, data=data, steps=3)
    counted = MicroBatches()
    resumed = train(tmp_path, counted, resume=True, accumulate=after, data=data, steps=9)
    assert counted.of_step == dict.fromkeys(range(4, 10), after)
    assert resumed.evaluated == [4, 6, 8]
    assert find_checkpoint(tmp_path).step == 9


class CountSaves(Callback):
    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_save_checkpoint(self, trainer: L.Trainer, *_: Any) -> None:
        self.steps.append(trainer.global_step)


def test_each_step_is_saved_once_and_before_it_is_evaluated(tmp_path: Path) -> None:
    class SavedBeforeEvaluation(CountSaves):
        def on_validation_start(self, trainer: L.Trainer, *_: Any) -> None:
            assert trainer.global_step in self.steps

    first = SavedBeforeEvaluation()
    train(tmp_path, first, every_n_steps=2, steps=4)
    assert first.steps == [2, 4]
    second = CountSaves()
    train(tmp_path, second, resume=True, every_n_steps=2, steps=8)
    assert second.steps == [6, 8]
    assert committed_steps(tmp_path) == [2, 4, 6, 8]


def test_a_stop_by_another_callback_saves_a_checkpoint(tmp_path: Path) -> None:
    class Stop(Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            trainer.should_stop = trainer.global_step == 3

    train(tmp_path, Stop())
    assert committed_steps(tmp_path) == [3]


def test_a_finished_run_removes_what_it_was_killed_before_removing(tmp_path: Path) -> None:
    train(tmp_path, every_n_steps=1)
    assert len(committed_steps(tmp_path)) == STEPS
    train(tmp_path, resume=True, every_n_steps=1, keep_last=2)
    assert committed_steps(tmp_path) == [STEPS - 1, STEPS]


def test_old_checkpoints_are_removed_after_newer_ones_are_complete(tmp_path: Path) -> None:
    train(tmp_path, every_n_steps=1, keep_last=2)
    assert committed_steps(tmp_path) == [STEPS - 1, STEPS]
    assert {path.name for path in tmp_path.iterdir() if path.name not in (".lock", ".attempt")} == {
        path.name
        for step in (STEPS - 1, STEPS)
        for path in (
            CheckpointPaths(tmp_path, step).meta,
            CheckpointPaths(tmp_path, step).model,
            CheckpointPaths(tmp_path, step).optimizer(0),
        )
    }


def test_an_error_of_the_writing_thread_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = writer.write_file

    def full_disk(path: Path, *options: Any) -> Any:
        if path.name.startswith("model") and path.name >= "model_000004":
            raise UserError(f"cannot write {path}: No space left on device")
        return write(path, *options)

    monkeypatch.setattr(writer, "write_file", full_disk)
    with pytest.raises(UserError, match=r"model_000004.pt: No space left"):
        train(tmp_path, every_n_steps=2)
    assert find_checkpoint(tmp_path).step == 2


def test_the_folder_is_checked_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write"):
        train(tmp_path / "file")


def test_a_new_run_is_refused_if_later_checkpoints_exist(tmp_path: Path) -> None:
    train(tmp_path, steps=4)
    with pytest.raises(UserError, match="has a checkpoint of step 4, but this run starts at step 0"):
        train(tmp_path, steps=4)


def test_a_damaged_checkpoint_is_skipped_and_overwritten(tmp_path: Path, unbroken: Module) -> None:
    train(tmp_path, every_n_steps=6)
    model = CheckpointPaths(tmp_path, STEPS).model
    model.write_bytes(model.read_bytes()[:-1])
    resumed = train(tmp_path, resume=True)
    assert resumed.losses == unbroken.losses[6 * ACCUMULATE :]
    assert_same_end(tmp_path, unbroken)


def test_the_folder_follows_from_stage_and_tag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMCHAT_BASE_DIR", str(tmp_path))
    callback = StepCheckpoint()
    trainer = L.Trainer(
        max_steps=1,
        callbacks=[callback],
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        limit_val_batches=0,
    )
    trainer.fit(Module(), datamodule=Data())
    assert find_checkpoint(tmp_path / "base_checkpoints" / "tiny").meta["tag"] == "tiny"


@pytest.mark.parametrize("option", ["every_n_steps", "keep_last"])
def test_options_must_be_positive(option: str) -> None:
    with pytest.raises(UserError, match=f"--checkpoint.{option} is 0"):
        StepCheckpoint(**{option: 0})
