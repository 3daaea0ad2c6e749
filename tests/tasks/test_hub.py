"""Tasks on Hub datasets, loaded by `datasets` over HTTP from a mock Hub."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from subprocess import PIPE
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from hub_server import HubServer

ASK = """
import json, lmchat.tasks as t
for task in ({tasks}):
    print(json.dumps([task.name, [dict(conversation) for conversation in task]]))
"""
TALK = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}]
SUM = "It is 1+1 = <<1+1=2>>2.\n#### 2"
CHECK = "def check(f):\n    assert f() == 1\n"
CHOICES = ["one", "two", "three", "four"]
ROWS: dict[str, tuple[str, str, str, dict[str, Any], str]] = {
    # task: (options, repository, folder of the files, a row as on the Hub, start of the last answer)
    "SmolTalk": ("split='test'", "HuggingFaceTB/smol-smoltalk", "data", {"messages": TALK, "source": "x"}, "Me."),
    "GSM8K": ("split='test'", "openai/gsm8k", "main", {"question": "1 + 1?", "answer": SUM}, "It is"),
    "MMLU": (
        "split='test'",
        "cais/mmlu",
        "all",
        {"question": "1 + 1?", "subject": "arithmetic", "choices": CHOICES, "answer": 1},
        "B",
    ),
    "ARC": (
        "subset='ARC-Easy', split='test'",
        "allenai/ai2_arc",
        "ARC-Easy",
        {"id": "1", "question": "1 + 1?", "choices": {"text": CHOICES, "label": list("ABCD")}, "answerKey": "B"},
        "B",
    ),
    "HumanEval": (
        "",
        "openai/openai_humaneval",
        "data",
        {"prompt": "def f():\n", "canonical_solution": "    return 1\n", "test": CHECK, "entry_point": "f"},
        "def f():",
    ),
}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[list[Any], list[str]]]:
    """Conversations of each task and the files it fetched, all in one process, since importing `datasets` is slow."""
    hubs = {task: HubServer(row[1], repository_files(*row[2:4])) for task, row in ROWS.items()}
    first, *others = hubs.values()
    calls = "".join(f"t.{task}({row[0]}{', ' if row[0] else ''}shuffle_seed=None), " for task, row in ROWS.items())
    with HubServer(first.repo_id, first.files, others) as hub:
        variables = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path_factory.mktemp("hub"))}
        environment = {**os.environ, **variables, "HF_HUB_DISABLE_XET": "1"}
        command = [sys.executable, "-c", ASK.format(tasks=calls)]
        done = subprocess.run(command, env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    hubs[next(iter(hubs))] = hub
    answers = [json.loads(line)[1] for line in done.stdout.splitlines() if line.startswith("[")]
    return {task: (answer, hubs[task].gets) for task, answer in zip(ROWS, answers, strict=True)}


@pytest.mark.parametrize("task", ROWS)
def test_loads_from_a_hub(task: str, loaded: dict[str, tuple[list[Any], list[str]]]) -> None:
    *_, folder, _, answer = ROWS[task]
    (conversation,), fetched = loaded[task]
    content = conversation["messages"][-1]["content"]
    said = content if isinstance(content, str) else content[0]["text"]
    assert said.startswith(answer)
    assert f"{folder}/test-00000-of-00001.parquet" in fetched


UNSOUND = """
import sys, lmchat.hub, lmchat.tasks
from lmchat.types import UserError
for line in sys.stdin:
    lmchat.hub.LISTING_SECONDS, lmchat.hub.STALL_SECONDS = map(float, line.split())
    try:
        print(len(lmchat.tasks.HumanEval()), flush=True)
    except UserError as error:
        print(error, flush=True)
"""


@pytest.fixture(scope="module")
def unsound(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[HubServer, subprocess.Popen[str], Path]]:
    """A hub, a process that loads HumanEval from it for each line with two limits of time, and the process's folder."""
    home = tmp_path_factory.mktemp("unsound")
    *_, folder, row, _ = ROWS["HumanEval"]
    with HubServer(ROWS["HumanEval"][1], repository_files(folder, row)) as hub:
        environment = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
        command = [sys.executable, "-c", UNSOUND]
        with subprocess.Popen(command, env=environment, text=True, stdin=PIPE, stdout=PIPE) as process:
            yield hub, process, home
            process.kill()


@pytest.mark.parametrize(
    ("fault", "seconds", "message"),
    [
        ("list", (1, 60), "the Hub's file list of openai/openai_humaneval (test) does not end: "),
        ("endless", (60, 60), "the Hub sends more than the "),
        ("wait", (60, 1), "openai/openai_humaneval (test): the hub sent nothing for 1 s (the last: HTTP Error 429"),
    ],
)
def test_a_hub_that_does_not_end_is_given_up(
    unsound: tuple[HubServer, subprocess.Popen[str], Path], fault: Any, seconds: tuple[float, float], message: str
) -> None:
    hub, process, home = unsound
    assert process.stdin and process.stdout
    hub.endless = fault == "list"
    hub.faults[f"{ROWS['HumanEval'][2]}/test-00000-of-00001.parquet"] = [fault] * 99 * (fault != "list")
    print(*seconds, file=process.stdin, flush=True)
    assert (answer := process.stdout.readline()).startswith(message), answer
    assert sum(path.stat().st_size for path in home.rglob("*") if path.is_file()) < 1 << 20


def repository_files(folder: str, row: dict[str, Any]) -> dict[str, bytes]:
    """A dataset with one row in its test split, whose card lists its configurations, as on the Hub."""
    file = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist([row]), file)
    path = f"{folder}/test-00000-of-00001.parquet"
    name = "default" if folder == "data" else folder
    card = f"---\nconfigs:\n- config_name: {name}\n  data_files:\n  - split: test\n    path: {folder}/test-*\n---\n"
    return {path: file.getvalue(), "README.md": card.encode()}
