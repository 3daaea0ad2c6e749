"""docs/own_model.md runs as printed, with additional options that make it small."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import lightning.pytorch  # noqa: F401  (its log handler keeps the stderr of its import: not that of one test)
import pytest

from lmchat.__main__ import main

REPOSITORY = Path(__file__).resolve().parent.parent
SMALLER = {
    "tokenizer": ["--vocab_size", "400"],
    "fit": ["--trainer.max_steps", "2", "--data.eval_tokens", "1024", "--eval.every_n_steps", "0"],
    "chat": ["--max_new_tokens", "4"],
}
SMALL_PRETRAINING = ["--model.depth", "1", "--model.sequence_len", "128", "--model.global_batch_tokens", "1024"]


def test_the_page_runs_as_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from pydoc_data.topics import topics

    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(REPOSITORY / "configs")
    for folder in ("my_text", "my_chats"):
        (tmp_path / folder).mkdir()
    for name, text in sorted(topics.items())[:60]:
        (tmp_path / "my_text" / f"{name}.txt").write_text(text)
    chats = [{"instruction": f"Who are you, {number}?", "output": "A model."} for number in range(40)]
    (tmp_path / "my_chats" / "chats.jsonl").write_text("\n".join(map(json.dumps, chats)))

    blocks = re.findall(r"```(sh|python)\n(.*?)```", (REPOSITORY / "docs" / "own_model.md").read_text(), re.DOTALL)
    assert [language for language, _ in blocks] == ["sh", "sh", "sh", "python"]
    for language, block in blocks:
        if language == "python":
            exec(block, {})
            continue
        for line in block.splitlines():
            program, *arguments = shlex.split(line)
            if program == "export":
                monkeypatch.setenv(*arguments[0].split("="))
                continue
            assert program == "lmchat"
            small = SMALL_PRETRAINING if "configs/cpu.yaml" in arguments else []
            assert main([*arguments, *SMALLER.get(arguments[0], []), *small]) == 0, line
    assert "checked with transformers" in capsys.readouterr().out
    assert (tmp_path / "mine" / "hf" / "model.safetensors").exists()
