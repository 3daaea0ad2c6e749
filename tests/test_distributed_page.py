"""The commands of docs/distributed.md at small size: two nodes with torchrun, and a SLURM job with a mock srun."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import lightning as L
import pytest
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.utilities.rank_zero import rank_zero_only

import lmchat.strategies.zero2_muon  # noqa: F401  (registers the strategy)
from forked import free_port
from lmchat.checkpoint.load import find_checkpoint

REPOSITORY = Path(__file__).resolve().parent.parent
PAGE = (REPOSITORY / "docs" / "distributed.md").read_text()
ONE_NODE, TORCHRUN = re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
(SLURM,) = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
TINY = """
trainer: {accelerator: cpu, max_steps: 6}
model:
  class_path: PretrainModule
  init_args:
    {depth: 2, sequence_len: 32, head_dim: 32, window_pattern: SL, global_batch_tokens: 512, tag: tiny, compile: false}
data:
  class_path: FineWebDataModule
  init_args: {micro_batch_size: 2, eval_tokens: 512, buffer_size: 20}
monitor: {every_n_steps: 1}
eval: {every_n_steps: 100}
samples: {max_new_tokens: 0}
checkpoint: {every_n_steps: 3}
"""
HOSTS = ("10.213.77.1", "10.213.77.2")
Nodes = list[tuple[list[str], str]]


def shrunk(command: str, base: Path) -> str:
    """The printed command with the tiny config, and 2 processes per node instead of 8."""
    (base / "tiny.yaml").write_text(TINY)
    assert command.count("devices 8") == 1
    command = re.sub(r"configs/d\d+_pretrain.yaml", str(base / "tiny.yaml"), command)
    return re.sub(r"(devices|nproc_per_node) 8", r"\1 2", command)


def environment(base: Path, **more: str) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "LMCHAT_BASE_DIR": str(base), "OMP_NUM_THREADS": "1", **more}


def losses(base: Path) -> list[float]:
    (path,) = base.rglob("metrics.csv")
    with path.open() as file:
        return [float(row["train/loss"]) for row in csv.DictReader(file) if row.get("train/loss")]


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    """Command prefix and interface of two connected network namespaces; this machine twice if they are not allowed."""
    names = [f"lmchat{os.getpid()}{end}" for end in "ab"]
    commands = [f"netns add {name}" for name in names]
    commands += [f"link add {names[0]} netns {names[0]} type veth peer name {names[1]} netns {names[1]}"]
    for name, host in zip(names, HOSTS, strict=True):
        commands += [f"-n {name} addr add {host}/24 dev {name}"]
        commands += [f"-n {name} link set {device} up" for device in (name, "lo")]
    try:
        for command in commands:
            subprocess.run(["ip", *command.split()], check=True, capture_output=True)
        yield [(["ip", "netns", "exec", name], name) for name in names]
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"without network namespaces: {error}")
        yield [([], "lo")] * 2
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def test_torchrun_is_recognised(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = {"RANK": 3, "LOCAL_RANK": 1, "GROUP_RANK": 1, "WORLD_SIZE": 4, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": 29500}
    for name, value in {**ranks, "MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": "none"}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(rank_zero_only, "rank", 0, raising=False)  # the Trainer sets it, which would affect later tests
    trainer = L.Trainer(accelerator="cpu", strategy="zero2_muon", num_nodes=2, devices=2, logger=False)
    assert isinstance(trainer.strategy.cluster_environment, TorchElasticEnvironment)
    assert (trainer.world_size, trainer.global_rank, trainer.node_rank, trainer.local_rank) == (4, 3, 1, 1)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_two_nodes_of_two_processes(base: Path, tmp_path_factory: pytest.TempPathFactory, nodes: Nodes) -> None:
    command = shrunk(TORCHRUN, base)
    port = "29500"
    if not nodes[0][0]:
        port = str(free_port())
    command = command.replace("29500", port)
    processes = []
    for rank, (prefix, interface) in enumerate(nodes):
        env = environment(
            base,
            NODE_RANK=str(rank),
            MASTER_ADDR=HOSTS[0] if prefix else "127.0.0.1",
            GLOO_SOCKET_IFNAME=interface,
        )
        process = subprocess.Popen(
            [*prefix, "bash", "-c", command], env=env, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True
        )
        processes.append(process)
    errors = [process.communicate(timeout=1000)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)
    checkpoint = find_checkpoint(base / "base_checkpoints" / "tiny")
    assert (checkpoint.step, checkpoint.meta["world_size"]) == (6, 4)

    alone = tmp_path_factory.mktemp("alone")
    for name in ("base_data", "tokenizer"):
        (alone / name).symlink_to((base / name).resolve())
    one = [sys.executable, "-m", "lmchat", "fit", "--config", str(base / "tiny.yaml"), "--trainer.devices", "1"]
    subprocess.run(one, env=environment(alone), check=True)
    assert len(losses(base)) == 6
    assert losses(base) == pytest.approx(losses(alone), rel=1e-5)


SRUN = """#!/bin/bash
# Stands in for srun: two tasks on this machine, with the variables of a job step.
shift
for task in 0 1; do
    SLURM_PROCID=$task SLURM_LOCALID=$task "$@" &
    tasks+=($!)
done
trap 'kill -TERM "${tasks[@]}"' TERM
status=0
for task in "${tasks[@]}"; do
    until wait "$task"; code=$?; ! kill -0 "$task" 2> /dev/null; do :; done
    [ "$code" -gt "$status" ] && status=$code
done
exit "$status"
"""


def test_printed_commands_are_valid_shell() -> None:
    for script in (ONE_NODE, TORCHRUN, SLURM):
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_preempted_slurm_job_is_requeued_and_resumes(base: Path) -> None:
    folder = base / "bin"
    folder.mkdir()
    stand_ins = {"srun": SRUN, "scontrol": f'#!/bin/bash\necho "$@" >> {base}/scontrol.txt\n'}
    for name, text in stand_ins.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    script = base / "job.sh"
    script.write_text(shrunk(SLURM, base))
    text = (base / "tiny.yaml").read_text()
    (base / "tiny.yaml").write_text(text.replace("max_steps: 6", "max_steps: 100000"))
    job = {
        "SLURM_JOB_ID": "77",
        "SLURM_JOB_NAME": "lmchat",
        "SLURM_NNODES": "1",
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_NODEID": "0",
        "SLURM_NODELIST": "localhost",
        "MASTER_ADDR": "127.0.0.1",
    }
    env = environment(base, **job)
    env["PATH"] = f"{folder}:{env['PATH']}"
    pending = subprocess.Popen(["bash", str(script)], env=env, cwd=REPOSITORY)
    checkpoints = base / "base_checkpoints" / "tiny"
    while not list(checkpoints.glob("meta_*.json")):
        assert pending.poll() is None
        time.sleep(0.05)
    # SLURM signals the tasks, not the script.
    subprocess.run(["pkill", "-TERM", "-P", str(pending.pid)], check=True)
    assert pending.wait(600) == 143
    assert (base / "scontrol.txt").read_text() == "requeue 77\n"
    step = find_checkpoint(checkpoints).step

    (base / "tiny.yaml").write_text(text.replace("max_steps: 6", f"max_steps: {step + 2}"))
    subprocess.run(["bash", str(script)], env=env, cwd=REPOSITORY, check=True)
    assert find_checkpoint(checkpoints).step == step + 2
