"""The tasks of hub data sets, loaded by `datasets` over HTTP from a stand-in for the hub."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from hub_server import HubServer

ASK = "import json, lmchat.tasks as t; print(json.dumps([dict(c) for c in t.{task}({options}, shuffle_seed=None)]))"
TALK = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}]
SUM = "It is 1+1 = <<1+1=2>>2.\n#### 2"
CHECK = "def check(f):\n    assert f() == 1\n"
CHOICES = ["one", "two", "three", "four"]
ROWS: dict[str, tuple[str, str, str, dict[str, Any], str]] = {
    # task: (options, repository, folder of the files, a row as the hub has it, what the last answer begins with)
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


@pytest.mark.parametrize("task", ROWS)
def test_loads_from_a_hub(task: str, tmp_path: Path) -> None:
    options, repository, folder, row, answer = ROWS[task]
    with HubServer(repository, repository_files(folder, row)) as hub:
        environment = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1"}
        code = ASK.format(task=task, options=options).replace("(, ", "(")
        done = subprocess.run([sys.executable, "-c", code], env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    (conversation,) = json.loads(done.stdout.splitlines()[-1])
    content = conversation["messages"][-1]["content"]
    said = content if isinstance(content, str) else content[0]["text"]
    assert said.startswith(answer)
    assert f"{folder}/test-00000-of-00001.parquet" in hub.gets


def repository_files(folder: str, row: dict[str, Any]) -> dict[str, bytes]:
    """A data set of one row in its test split; its card says where its configurations are, as the hub's do."""
    file = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist([row]), file)
    path = f"{folder}/test-00000-of-00001.parquet"
    name = "default" if folder == "data" else folder
    card = f"---\nconfigs:\n- config_name: {name}\n  data_files:\n  - split: test\n    path: {folder}/test-*\n---\n"
    return {path: file.getvalue(), "README.md": card.encode()}
