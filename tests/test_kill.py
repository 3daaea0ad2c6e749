"""Runs of one and two processes that are killed repeatedly have the same losses as an uninterrupted run.

The seed is printed; LMCHAT_KILL_SEED sets it, LMCHAT_KILLS sets the total number of kills.
"""

from __future__ import annotations

import csv
import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from killable_fit import alive, start_fit
from lmchat.checkpoint.layout import committed_steps, files_by_step
from lmchat.checkpoint.load import find_checkpoint, load_model_state, load_rank_state
from lmchat.files import TEMPORARY_SUFFIX
from tiny_fit import config_options, same

STEPS = 12
KEEP_LAST = 2
PATIENCE_SECONDS = 240.0
CONFIG = """
trainer:
  max_steps: {steps}
  callbacks: [{{class_path: killable_fit.LossRecorder, init_args: {{directory: {base}}}}}]
data: {{init_args: {{micro_batch_size: 1}}}}
eval: {{every_n_steps: 6}}
checkpoint: {{every_n_steps: {every_n_steps}, keep_last: 2}}
"""
Records = dict[tuple[int, int], str]


@dataclass
class Run:
    """A run in a separate base folder; each start resumes it."""

    base: Path
    strategy: str
    world_size: int
    every_n_steps: int
    sessions: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        own = CONFIG.format(base=self.base, steps=STEPS, every_n_steps=self.every_n_steps)
        self.config = config_options(self.base, own)
        self.checkpoints = self.base / "base_checkpoints" / "d2"

    def start(self) -> list[BaseProcess]:
        options = ["--trainer.strategy", self.strategy, "--trainer.devices", str(self.world_size)]
        resume = ["--ckpt_path", "last"] if self.newest_step() else []
        ranks = start_fit([*self.config, *options, *resume], self.base, self.world_size)
        self.sessions |= {rank.pid for rank in ranks if rank.pid}
        return ranks

    def newest_step(self) -> int:
        """The last step with a complete checkpoint; 0 if there is none."""
        return (committed_steps(self.checkpoints) or [0])[-1]

    def records(self, rank: int) -> list[tuple[tuple[int, int], str]]:
        """Step and micro-batch, and the loss, of every micro-batch in chronological order."""
        path = self.base / f"losses_rank{rank}.txt"
        lines = path.read_text().splitlines() if path.exists() else []
        fields = [line.split() for line in lines]
        return [((int(step), int(micro_batch)), loss) for step, micro_batch, loss in fields]

    def unfinished_files(self) -> list[Path]:
        """Files of checkpoints that are being written, or whose write was killed."""
        committed = set(committed_steps(self.checkpoints))
        return [
            path
            for step, paths in files_by_step(self.checkpoints).items()
            for path in paths
            if step not in committed or path.suffix == TEMPORARY_SUFFIX or path.name.startswith("receipt")
        ]

    def output(self) -> str:
        paths = [self.base / f"output_rank{rank}.txt" for rank in range(self.world_size)]
        return "\n".join(path.read_text()[-5000:] for path in paths if path.exists())

    def finish(self) -> None:
        ranks = self.start()
        join(ranks)
        assert [rank.exitcode for rank in ranks] == [0] * self.world_size, self.output()


def join(ranks: list[BaseProcess]) -> None:
    """Waits until all ranks have ended; fails if one does not."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    for rank in ranks:
        rank.join(max(0.0, deadline - time.monotonic()))
    hanging = [rank for rank in ranks if rank.is_alive()]
    for rank in hanging:
        rank.kill()
        rank.join()
    assert not hanging, f"{len(hanging)} of {len(ranks)} ranks did not end within {PATIENCE_SECONDS} s"


def wait_until(condition: Callable[[], bool], ranks: list[BaseProcess], interval: float = 0.01) -> None:
    """Waits until the condition, checked at intervals, is true or a rank has ended."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition() and all(rank.is_alive() for rank in ranks):
        assert time.monotonic() < deadline, "the run does not get on"
        time.sleep(interval)


class Killer:
    """Kills runs at random times and checks the files after each kill."""

    def __init__(self, unbroken: Run, seed: int) -> None:
        self.expected = [dict(unbroken.records(rank)) for rank in range(unbroken.world_size)]
        self.random = random.Random(seed)
        self.kills = self.while_saving = self.of_one_rank = 0

    def start_and_kill(self, run: Run) -> bool:
        """Starts or resumes the run and kills it, or one of its ranks; False if the run has ended before."""
        kept, old = committed_steps(run.checkpoints), [len(run.records(rank)) for rank in range(run.world_size)]
        ranks = run.start()
        self._wait_for_the_moment(run, ranks)
        if len(run.records(0)) > old[0]:
            victims = self.random.choice([*[ranks] * 4, *([rank] for rank in ranks)])
        else:
            victims = ranks  # before the ranks are connected, only the launcher can detect that one has exited
        ended = not all(rank.is_alive() for rank in ranks)
        for rank in [] if ended else victims:
            rank.kill()
        join(ranks)
        new = [run.records(rank)[count:] for rank, count in enumerate(old)]
        for rank, records in enumerate(new):
            for place, loss in records:
                assert loss == self.expected[rank][place], f"rank {rank}, step and micro-batch {place}\n{run.output()}"
        if ended:
            assert [rank.exitcode for rank in ranks] == [0] * run.world_size, run.output()
            return False
        assert 0 not in [rank.exitcode for rank in ranks] or run.newest_step() == STEPS, "a lost rank went unnoticed"
        self.kills += 1
        self.while_saving += bool(new[0] and run.unfinished_files())  # those of earlier runs have been deleted
        self.of_one_rank += len(victims) < run.world_size
        if new[0]:
            self._check_steps(run, kept, first=new[0][0][0][0], last=new[0][-1][0][0])
        return True

    def _wait_for_the_moment(self, run: Run, ranks: list[BaseProcess]) -> None:
        """Half of the kills are while a temporary file exists, the others at any time, some before training."""
        begin, micro_batches = len(run.records(0)), self.random.randrange(12)
        moment = self.random.choice(["saving", "saving", "saving", "training", "training", "starting"])
        if moment == "starting":
            time.sleep(self.random.uniform(0, 3))
            return
        wait_until(lambda: len(run.records(0)) >= begin + micro_batches, ranks)
        if moment == "saving":
            wait_until(lambda: any(run.checkpoints.glob(f"*{TEMPORARY_SUFFIX}")), ranks, interval=0.0005)
            time.sleep(self.random.choice([0, 0.001]))
        else:
            time.sleep(self.random.uniform(0, 0.2))

    @staticmethod
    def _check_steps(run: Run, kept: list[int], first: int, last: int) -> None:
        before = (kept or [0])[-1]
        assert first == before, f"the newest checkpoint was of step {before}, the run went on from {first}"
        # The older of two started checkpoints is complete, since the writer writes one at a time.
        assert run.newest_step() >= (last // run.every_n_steps - 1) * run.every_n_steps
        steps = {path: int(path.name.split("_")[1].split(".")[0]) for path in run.unfinished_files()}
        # One of the kept checkpoints may be about to be deleted for a newer one.
        stale = [path for path, step in steps.items() if step <= before and step not in kept]
        assert not stale, "the resumed run did not remove what the killed one had left"

    def check_result(self, run: Run, unbroken: Run) -> None:
        """The finished run has the losses, weights and state of the uninterrupted run, and no other files."""
        for rank in range(run.world_size):
            assert dict(run.records(rank)) == self.expected[rank]
        checkpoints = [find_checkpoint(each.checkpoints) for each in (unbroken, run)]
        assert [checkpoint.step for checkpoint in checkpoints] == [STEPS, STEPS]
        assert same(*map(load_model_state, checkpoints))
        for rank in range(run.world_size):
            states = [load_rank_state(checkpoint, rank) for checkpoint in checkpoints]
            for name in ("optimizer_states", "rng", "FineWebDataModule"):
                assert same(states[0][name], states[1][name]), name
        assert not run.unfinished_files()
        assert len(list(run.checkpoints.iterdir())) == KEEP_LAST * (2 + run.world_size) + len([".lock", ".attempt"])
        assert not alive(run.sessions), "processes remain"


@pytest.fixture
def new_run(new_base: Callable[[], Path]) -> Iterator[Callable[..., Run]]:
    runs: list[Run] = []

    def make(*args: object) -> Run:
        runs.append(Run(new_base(), *args))  # type: ignore[arg-type]
        return runs[-1]

    yield make
    for pid in alive(set().union(*(run.sessions for run in runs))):
        os.kill(pid, 9)


def kill_and_compare(new_run: Callable[..., Run], kills: int, *shape: object) -> None:
    """Kills runs on a number of ranks, starts new ones when they finish, and compares all with an uninterrupted run."""
    seed = int(os.environ.get("LMCHAT_KILL_SEED") or time.time_ns())
    print(f"\nseed {seed}, {shape}:", end=" ")
    begin = time.monotonic()
    unbroken = new_run(*shape)
    unbroken.finish()
    killer = Killer(unbroken, seed)
    run, finished = new_run(*shape), 0
    while killer.kills < kills:
        if not killer.start_and_kill(run):
            killer.check_result(run, unbroken)
            run, finished = new_run(*shape), finished + 1
    run.finish()
    killer.check_result(run, unbroken)
    print(
        f"{killer.kills} kills, {killer.while_saving} of them while files were being written, {killer.of_one_rank} of "
        f"one rank alone, in {finished + 1} runs of {STEPS} steps, {(time.monotonic() - begin) / 60:.1f} minutes"
    )
    assert kills < 30 or killer.while_saving > kills / 10


def test_two_processes_survive_two_kills(new_run: Callable[..., Run]) -> None:
    kill_and_compare(new_run, 2, "zero2_muon", 2, 1)


LOGGED = """
trainer: {{max_steps: 8, callbacks: {callbacks}}}
monitor: {{every_n_steps: 1}}
eval: {{every_n_steps: 3}}
samples: {{max_new_tokens: 2, prompts: [a]}}
checkpoint: {{every_n_steps: {every_n_steps}}}
"""
KILL = "[{{class_path: killable_fit.KillAfterCheckpoint, init_args: {{step: {step}, hook: {hook}}}}}]"
IN_TRAINING, IN_EVALUATION = "on_train_batch_start", "on_validation_batch_start"
TIMES = {"train/step_ms", "train/tokens_per_second", "train/memory_gb", "train/eta_seconds"}


def logged(base: Path) -> tuple[dict[tuple[str, str], str], dict[tuple[str, int], object], dict[int, str]]:
    """What the starts of a run have logged, without times: CSV values, TensorBoard's scalars and texts, and samples."""
    rows: dict[tuple[str, str], str] = {}
    events: dict[tuple[str, int], object] = {}
    samples: dict[int, str] = {}
    for folder in sorted((base / "logs" / "pretrain" / "d2").iterdir()):
        with (folder / "csv" / "metrics.csv").open() as file:
            for row in csv.DictReader(file):
                rows |= {(name, row["step"]): value for name, value in row.items() if value and name not in TIMES}
        written = EventAccumulator(str(folder)).Reload()
        for name in set(written.Tags()["scalars"]) - TIMES:
            events |= {(name, event.step): event.value for event in written.Scalars(name)}
        for name in written.Tags()["tensors"]:
            events |= {(name, event.step): event.tensor_proto.string_val[0] for event in written.Tensors(name)}
        lines = (folder / "samples.jsonl").read_text().splitlines() if (folder / "samples.jsonl").exists() else []
        samples |= {json.loads(line)["step"]: line for line in lines}
    return rows, events, samples


def logged_fit(base: Path, expected_status: int, *resume: str, callbacks: str = "[]", every_n_steps: int = 3) -> str:
    """Output of a run that ends with the expected status."""
    own = LOGGED.format(callbacks=callbacks, every_n_steps=every_n_steps)
    ranks = start_fit([*config_options(base, own), *resume], base, 1)
    join(ranks)
    output = (base / "output_rank0.txt").read_text()
    assert [rank.exitcode for rank in ranks] == [expected_status], output[-5000:]
    return output


@pytest.mark.parametrize("option", ["--trainer.limit_val_batches=0", "--eval.at_end=false"])
def test_a_run_without_a_final_evaluation_is_finished(option: str, new_base: Callable[[], Path]) -> None:
    base = new_base()
    logged_fit(base, 0, option)
    assert "is finished" in logged_fit(base, 0, option, "--ckpt_path", "auto")


@pytest.fixture(scope="module")
def uninterrupted(new_base: Callable[[], Path]) -> Path:
    base = new_base()
    logged_fit(base, 0)
    return base


@pytest.mark.parametrize(
    ("every_n_steps", "step", "hook"),
    [(5, 5, IN_TRAINING), (3, 3, IN_TRAINING), (3, 6, IN_EVALUATION), (3, 8, IN_EVALUATION)],
)
def test_a_killed_and_resumed_run_has_the_log_of_an_uninterrupted_one(
    every_n_steps: int, step: int, hook: str, uninterrupted: Path, new_base: Callable[[], Path]
) -> None:
    killed = new_base()
    logged_fit(killed, -signal.SIGKILL, callbacks=KILL.format(step=step, hook=hook), every_n_steps=every_n_steps)
    logged_fit(killed, 0, "--ckpt_path", "auto")
    expected, found = logged(uninterrupted), logged(killed)
    assert ("train/loss", "2") in expected[0] and ("val/bpb", "3") in expected[0] and ("val/bpb", 3) in expected[1]
    assert list(expected[2]) == [0, 3, 6, 8]
    assert found == expected
    assert "is finished" in logged_fit(killed, 0, "--ckpt_path", "auto")
    evaluations = [json.loads(line)["step"] for path in killed.rglob("samples.jsonl") for line in path.open()]
    assert sorted(evaluations) == [0, 3, 6, 8], "an evaluation that was complete was repeated"


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("strategy", "world_size", "every_n_steps"),
    [("auto", 1, 1), ("zero2_muon", 1, 2), ("zero2_muon", 2, 1), ("zero2_muon", 2, 2)],
)
def test_a_run_survives_a_hundred_kills(
    new_run: Callable[..., Run], strategy: str, world_size: int, every_n_steps: int
) -> None:
    kills = int(os.environ.get("LMCHAT_KILLS", "120")) // 4
    kill_and_compare(new_run, kills, strategy, world_size, every_n_steps)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("trial", range(4))
def test_an_orphan_rank_does_not_damage_the_next_run(trial: int, new_run: Callable[..., Run]) -> None:
    """Rank 1 hangs and rank 0 dies; the run is resumed in the same folder, and then rank 1 wakes up."""
    seed = int(os.environ.get("LMCHAT_KILL_SEED") or time.time_ns()) + trial
    print(f"\nseed {seed}")
    choice = random.Random(seed)
    unbroken, run = new_run("zero2_muon", 2, 1), new_run("zero2_muon", 2, 1)
    unbroken.finish()
    killer = Killer(unbroken, seed)
    first, orphan = run.start()
    assert orphan.pid is not None
    before, after = choice.randrange(4, 12), choice.randrange(1, 8)
    wait_until(lambda: len(run.records(0)) >= before, [first, orphan])
    if trial % 2:
        wait_until(lambda: any(run.checkpoints.glob(f"*rank1*{TEMPORARY_SUFFIX}")), [first, orphan])
    os.kill(orphan.pid, signal.SIGSTOP)
    first.kill()
    first.join()
    begun = len(run.records(0))
    ranks = run.start()
    wait_until(lambda: len(run.records(0)) > begun + after, ranks)
    os.kill(orphan.pid, signal.SIGCONT)
    join([*ranks, orphan])
    assert orphan.exitcode != 0
    assert [rank.exitcode for rank in ranks] == [0, 0], run.output()
    killer.check_result(run, unbroken)
