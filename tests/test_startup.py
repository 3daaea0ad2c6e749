"""Imports at startup: help without torch, a chat without torch.compile, a run without SciPy."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import warnings
from typing import Any

import pytest

from lmchat import __main__ as entry
from lmchat.cli.short_help import CLASSES, GROUPS, OPTIONS

HELP_THEN_CHAT = """
import contextlib, io, json, sys
from lmchat.__main__ import COMMANDS, TRAINER_COMMANDS, command_module, main

helps = {}
def help_of(*command):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        main([*command, "--help"])
    helps[" ".join(command)] = out.getvalue()

for name in [*TRAINER_COMMANDS, *COMMANDS]:
    help_of(name)
    subcommands = getattr(command_module(name), "COMMANDS", None) if name in COMMANDS else None
    for subcommand in subcommands if isinstance(subcommands, dict) else ():
        help_of(name, subcommand)
after_help = sorted({name.partition(".")[0] for name in sys.modules})

import lmchat.serve.load, lmchat.serve.terminal, torch
from lmchat.generation.engine import Engine
from lmchat.generation.sampling import SamplingParams
from lmchat.model.config import GPTConfig
from lmchat.model.gpt import GPT
from lmchat.tokenizer.bpe import Tokenizer
tokenizer = Tokenizer({bytes([byte]): byte for byte in range(256)})
with torch.device("meta"):
    net = GPT(GPTConfig(16, tokenizer.vocab_size, 1, 1, 1, 32))
net.to_empty(device="cpu")
net.init_weights()
engine = Engine(net.eval(), tokenizer)
lmchat.serve.terminal.TerminalChat(engine, SamplingParams(max_new_tokens=2)).ask("Hi")
after_chat = sorted(sys.modules)

import importlib.abc
from lmchat.cli.lean_imports import import_lightning
class NeedsDynamo(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "torchmetrics.metric":
            import torch._dynamo.utils
sys.meta_path.insert(0, NeedsDynamo())
import_lightning()
after_lightning = sorted(sys.modules)
json.dump(
    {"helps": helps, "after_help": after_help, "after_chat": after_chat, "after_lightning": after_lightning}, sys.stderr
)
"""

FULL_HELP = """
import contextlib, io, json, sys
from lmchat.__main__ import main
with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
    main(["fit", "--help_all"])
modules = sorted(sys.modules)
import lightning
import torch
from lightning.pytorch.utilities.compile import _maybe_unwrap_optimized
module = lightning.LightningModule()
assert _maybe_unwrap_optimized(torch.compile(module)) is module
import importlib.util
if importlib.util.find_spec("scipy"):
    import scipy.signal
    assert scipy.signal.windows.hann(3)[1] == 1
import torchmetrics
mean = torchmetrics.MeanMetric()
mean.update(3.0)
json.dump({"help": out.getvalue(), "modules": modules, "mean": float(mean.compute())}, sys.stderr)
"""


def run(program: str) -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stderr.splitlines()[-1]))


@pytest.fixture(scope="module")
def helped() -> dict[str, Any]:
    return run(HELP_THEN_CHAT)


@pytest.fixture(scope="module")
def full_help() -> dict[str, Any]:
    return run(FULL_HELP)


def test_help_of_every_command_imports_no_large_package(helped: dict[str, Any]) -> None:
    assert {"fit", "validate", "chat", "tokenizer", "tokenizer train", "data import"} <= helped["helps"].keys()
    for command, text in helped["helps"].items():
        assert f"usage: lmchat {command.split()[0]}" in text and len(text.splitlines()) > 8, command
    large = {"torch", "lightning", "transformers", "datasets", "scipy", "pyarrow", "pandas", "matplotlib", "numpy"}
    assert not large & set(helped["after_help"])


def test_a_chat_does_not_import_torch_compile(helped: dict[str, Any]) -> None:
    assert "torch" in helped["after_chat"]
    large = {"torch._dynamo", "torch._inductor", "lightning", "torchmetrics", "transformers", "datasets"}
    assert not large & set(helped["after_chat"])


def test_packages_that_need_torch_compile_can_be_imported_with_lightning(helped: dict[str, Any]) -> None:
    """Torchvision does; the program has a finder that stands in for such a package."""
    assert {"lightning.pytorch", "torchmetrics.metric", "torch._dynamo.utils"} <= set(helped["after_lightning"])


def test_a_run_imports_no_package_that_lightning_hardly_uses(full_help: dict[str, Any]) -> None:
    assert {"lightning", "torchmetrics"} <= set(full_help["modules"])
    assert not {"scipy.signal", "transformers", "matplotlib", "torch._dynamo"} & set(full_help["modules"])
    assert full_help["mean"] == 3.0


def test_the_short_help_names_the_groups_classes_and_options_of_the_parser(full_help: dict[str, Any]) -> None:
    listed = set(re.findall(r"(?<=ARG:)(?: +-\w \w+,)? +--(\w[\w.]*)", full_help["help"]))
    groups = {option.partition(".")[0] for option in listed if "." in option}
    assert set(GROUPS) == groups
    single = {option for option in listed - groups - {"help"} if "." not in option}
    assert {option.split()[0].removeprefix("--") for option in OPTIONS} == single
    for group, names in CLASSES.items():
        for name in names:
            assert f".{name}" in full_help["help"], f"--{group} {name}"
    examples = re.findall(r"--(\w+\.\w+)", " ".join(GROUPS.values()))
    assert len(examples) >= len(GROUPS)
    for option in examples:
        assert option in listed or option.startswith(("model.", "data.")), option


def test_warnings_show_their_message_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """With escaped control characters, and without the location in the code."""
    shown = []

    def warn(args: list[str]) -> int:
        shown.append(warnings.formatwarning("of rows:\n  \x1b[31mred", UserWarning, "rows.py", 7))
        return 0

    usual_format = warnings.formatwarning
    monkeypatch.setattr(entry, "_run", warn)
    assert entry.main([]) == 0
    assert shown == ["lmchat: warning: of rows:\n  \\x1b[31mred\n"]
    assert warnings.formatwarning is usual_format
