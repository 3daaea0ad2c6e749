"""The make targets of the full pipeline at small size: finished stages are skipped, killed ones resume."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from pydoc_data.topics import topics

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hub_server import HubServer

REPOSITORY = Path(__file__).resolve().parent.parent
CONFIGS = {
    "PRETRAIN": """
trainer: {accelerator: cpu, max_steps: 20}
model: {class_path: PretrainModule, init_args: {depth: 9, sequence_len: 64, head_dim: 32, global_batch_tokens: 256}}
data: {class_path: FineWebDataModule, init_args: {micro_batch_size: 4, eval_tokens: 256}}
checkpoint: {every_n_steps: 1}
samples: {max_new_tokens: 0}
""",
    "SFT": """
trainer: {accelerator: cpu, max_steps: 3}
model: {class_path: SFTModule}
data:
  class_path: SFTDataModule
  init_args:
    eval_tokens: 256
    train:
      - task: {class_path: JSONLConversations, init_args: {path: FOLDER/chat.jsonl}}
      - task: {class_path: GSM8K, init_args: {path: FOLDER/problems.jsonl}}
      - task: {class_path: SimpleSpelling, init_args: {size: 10}}
    val: [{task: {class_path: JSONLConversations, init_args: {path: FOLDER/chat.jsonl}}}]
samples: {max_new_tokens: 0}
""",
    "RL": """
trainer: {accelerator: cpu, max_steps: 2}
model: {class_path: GRPOModule}
data:
  class_path: RolloutDataModule
  init_args:
    train: [{task: {class_path: GSM8K, init_args: {path: FOLDER/problems.jsonl}}}]
    eval_task: {class_path: GSM8K, init_args: {path: FOLDER/problems.jsonl, stop: 2}}
    questions_per_step: 2
    num_samples: 2
    eval_num_samples: 2
    max_new_tokens: 4
samples: {max_new_tokens: 0}
""",
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(shutil.which("make") is None, reason="there is no make"),
]


SHARDS = 10
"""Two more than the tokenizer is trained on."""
LAST = "shard_00009.parquet"
"""Of the training shards."""


class Pipeline:
    """A base folder, and small make targets, on a folder of text or on shards from a mock Hub."""

    def __init__(self, folder: Path, hub: HubServer | None = None) -> None:
        self.base = folder / "base"
        self.hub = hub
        chat = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi there."}]
        problem = {"question": "How many are 1 and 1?", "answer": "They are <<1+1=2>>2.\n#### 2"}
        (folder / "chat.jsonl").write_text((json.dumps(chat) + "\n") * 20)
        (folder / "problems.jsonl").write_text((json.dumps(problem) + "\n") * 8)
        for name, text in CONFIGS.items():
            (folder / f"{name}.yaml").write_text(text.replace("FOLDER", str(folder)))
        if hub is None:
            texts = folder / "texts"
            texts.mkdir()
            for name, text in topics.items():
                (texts / f"{name}.txt").write_text(text)
        source = {"SHARDS": SHARDS} if hub else {"TEXT": texts}
        variables = {"DEPTH": 1, "DEVICES": 1, "VOCAB_SIZE": 400, "BASE": self.base, "VENV": sys.prefix, **source}
        configs = {name: folder / f"{name}.yaml" for name in CONFIGS}
        self.variables = [f"{name}={value}" for name, value in {**variables, **configs}.items()]

    def start(self, target: str) -> subprocess.Popen[str]:
        # The test may run under make, whose flags must not be inherited.
        environment = {name: value for name, value in os.environ.items() if "MAKE" not in name and name != "MFLAGS"}
        if self.hub:
            environment |= {"HF_ENDPOINT": self.hub.endpoint, "HF_HUB_DISABLE_XET": "1"}
        return subprocess.Popen(
            ["make", "-o", f"{sys.prefix}/.installed", target, *self.variables],
            cwd=REPOSITORY,
            env={**environment, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def make(self, target: str) -> str:
        status, printed = self.finish(self.start(target))
        assert status == 0, printed
        return printed

    @staticmethod
    def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
        """Exit status, and what was printed."""
        printed, _ = process.communicate(timeout=3000)
        return process.returncode, printed

    def files(self) -> dict[str, int]:
        """Modification time of each file of the stages."""
        folders = ("tokenizer", "base_checkpoints", "chatsft_checkpoints", "chatrl_checkpoints", "evaluations", "logs")
        paths = [path for folder in folders for path in (self.base / folder).rglob("*") if path.is_file()]
        return {str(path): path.stat().st_mtime_ns for path in paths if path.name != ".lock"}


def wait_until(condition: Callable[[], object], process: subprocess.Popen[str], seconds: float = 300) -> None:
    """Waits until ``condition`` is true while ``process`` runs; fails with the process's output."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_killed_speedrun_resumes_and_a_finished_one_is_skipped(tmp_path: Path) -> None:
    pipeline = Pipeline(tmp_path)
    process = pipeline.start("speedrun")
    awaited = pipeline.base / "base_checkpoints" / "d1" / "meta_000002.json"
    wait_until(awaited.exists, process, seconds=1200)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    tokenizer = pipeline.base / "tokenizer" / "tokenizer.json"
    trained = tokenizer.stat().st_mtime_ns
    kept = awaited.stat().st_mtime_ns
    assert not (pipeline.base / "evaluations").exists()

    printed = pipeline.make("speedrun")
    assert "tokenizer: finished" in printed
    assert (tokenizer.stat().st_mtime_ns, awaited.stat().st_mtime_ns) == (trained, kept), "written again"
    for folder, steps in {"base": 20, "chatsft": 3, "chatrl": 2}.items():
        assert (pipeline.base / f"{folder}_checkpoints" / "d1" / f"meta_{steps:06d}.json").exists()
    reports = {path.name: path.read_text() for path in (pipeline.base / "evaluations").iterdir()}
    assert sorted(reports) == ["d1_pretrain.txt", "d1_rl.txt", "d1_sft.txt"]
    assert "val/bpb" in reports["d1_pretrain.txt"]
    assert "val/bpb" in reports["d1_sft.txt"]
    assert "val/pass@1" in reports["d1_rl.txt"]
    assert "make chat" in printed

    before = pipeline.files()
    printed = pipeline.make("speedrun")
    assert pipeline.files() == before
    for stage in ("pretrain", "sft", "rl"):
        assert f"{stage} d1 is finished" in printed


@pytest.fixture
def hub() -> Iterator[HubServer]:
    """The data set that is downloaded by default: shards of some text, and the validation shard."""
    texts = list(topics.values())
    files = {}
    for number in range(SHARDS + 1):
        file = io.BytesIO()
        pq.write_table(pa.table({"text": texts[number :: SHARDS + 1]}), file)
        files[f"shard_{number:05d}.parquet"] = file.getvalue()
    with HubServer("karpathy/fineweb-edu-100b-shuffle", files) as server:
        yield server


def downloading(base: Path) -> int:
    """Id of the process that downloads into ``base``."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_bytes().split(b"\0")
            environment = (entry / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"download" in command and f"LMCHAT_BASE_DIR={base}".encode() in environment:
            return int(entry.name)
    raise AssertionError("nothing is downloaded")


def shards(base: Path) -> set[str]:
    return {path.name for path in (base / "base_data").glob("*.parquet")}


def test_the_tokenizer_is_trained_during_the_download(hub: HubServer, tmp_path: Path) -> None:
    hub.faults[LAST] = ["stall"]
    pipeline = Pipeline(tmp_path, hub)
    process = pipeline.start("tokenizer")
    tokenizer = pipeline.base / "tokenizer" / "tokenizer.json"
    wait_until(tokenizer.exists, process)
    wait_until(lambda: hub.gets.count(LAST) == 1, process)
    assert LAST not in shards(pipeline.base), "it did not stall"
    assert process.poll() is None, "it does not wait for the download"
    hub.released.set()
    status, printed = pipeline.finish(process)
    assert status == 0, printed
    assert "waiting for the download" in printed
    assert shards(pipeline.base) == set(hub.files)

    trained, words = tokenizer.read_bytes(), (pipeline.base / "words.txt").read_bytes()
    tokenizer.unlink()
    (pipeline.base / "words.txt").unlink()
    requests = len(hub.gets)
    pipeline.make("tokenizer")
    assert len(hub.gets) == requests, "downloaded again"
    assert (tokenizer.read_bytes(), (pipeline.base / "words.txt").read_bytes()) == (trained, words), (
        "made from other shards than when the rest was not there"
    )
    before = pipeline.files()
    assert "tokenizer: finished" in pipeline.make("tokenizer")
    assert pipeline.files() == before


@pytest.mark.parametrize("fault", ["error", "kill"])
def test_a_failed_download_ends_the_pipeline_and_resumes(hub: HubServer, tmp_path: Path, fault: str) -> None:
    hub.faults[LAST] = ["error"] * 100 if fault == "error" else ["stall"]
    pipeline = Pipeline(tmp_path, hub)
    process = pipeline.start("pretrain")
    if fault == "kill":
        wait_until(lambda: LAST in hub.gets, process)
        os.kill(downloading(pipeline.base), signal.SIGKILL)
    status, printed = pipeline.finish(process)
    assert status != 0
    assert f"the download of {SHARDS} shards failed" in printed
    assert "run again to resume" in printed
    if fault == "error":
        assert f"cannot download karpathy/fineweb-edu-100b-shuffle/{LAST}" in printed
    assert "Traceback" not in printed
    assert not (pipeline.base / "base_checkpoints").exists(), "trained on a part of the shards"

    hub.faults.clear()
    fetched = shards(pipeline.base)
    assert LAST not in fetched
    hub.gets.clear()
    printed = pipeline.make("tokenizer")
    assert "tokenizer: finished" in printed
    assert set(hub.gets) == set(hub.files) - fetched
    assert shards(pipeline.base) == set(hub.files)
