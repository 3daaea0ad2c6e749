"""Imports at startup: help without torch, a chat without torch.compile, a run without SciPy."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
from lightning.fabric import wrappers
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.compile import _maybe_unwrap_optimized

from lmchat import __main__ as entry
from lmchat.cli import lean_imports
from lmchat.cli.short_help import CLASSES, GROUPS, OPTIONS

PROGRAM = """
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

from lmchat.cli.lean_imports import import_lightning, importing
with importing():
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

import importlib.abc, os
class NeedsDynamo(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "torchmetrics.metric":
            import torch._dynamo.utils
if not os.fork():
    from lightning_utilities.core import imports
    imports.package_available = lambda name: False  # the other packages, which are slow to import
    is_met = imports.RequirementCache.__bool__
    imports.RequirementCache.__bool__ = lambda self: str(self.requirement).startswith("torch>") and is_met(self)
    sys.meta_path.insert(0, NeedsDynamo())
    with importing():
        import_lightning()
    print(json.dumps(sorted(sys.modules)), flush=True)
    os._exit(0)
assert os.wait()[1] == 0

with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
    main(["fit", "--help_all"])
after_full_help = sorted(sys.modules)
import importlib.util
if importlib.util.find_spec("scipy"):
    import scipy.fft
    assert scipy.fft.next_fast_len(7) == 7
import torchmetrics
mean = torchmetrics.MeanMetric()
mean.update(3.0)
print(json.dumps({
    "helps": helps, "after_help": after_help, "after_chat": after_chat,
    "full_help": out.getvalue(), "after_full_help": after_full_help, "mean": float(mean.compute()),
}))
"""


@pytest.fixture(scope="module")
def started() -> dict[str, Any]:
    """What a process prints that shows help, chats, and builds the parser of `fit`, each with more imports."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    fallback, results = map(json.loads, done.stdout.splitlines()[-2:])
    return {"after_lightning": fallback, **results}


def test_help_of_every_command_imports_no_large_package(started: dict[str, Any]) -> None:
    assert {"fit", "validate", "chat", "tokenizer", "tokenizer train", "data import"} <= started["helps"].keys()
    for command, text in started["helps"].items():
        assert f"usage: lmchat {command.split()[0]}" in text and len(text.splitlines()) > 8, command
    large = {"torch", "lightning", "transformers", "datasets", "scipy", "pyarrow", "pandas", "matplotlib", "numpy"}
    assert not large & set(started["after_help"])


def test_a_chat_does_not_import_torch_compile(started: dict[str, Any]) -> None:
    assert "torch" in started["after_chat"]
    large = {"torch._dynamo", "torch._inductor", "lightning", "torchmetrics", "transformers", "datasets"}
    assert not large & set(started["after_chat"])


def test_packages_that_need_torch_compile_can_be_imported_with_lightning(started: dict[str, Any]) -> None:
    """Torchvision does; the program has a finder that stands in for such a package."""
    assert {"lightning.pytorch", "torchmetrics.metric", "torch._dynamo.utils"} <= set(started["after_lightning"])


def test_a_run_imports_no_package_that_lightning_hardly_uses(started: dict[str, Any]) -> None:
    assert {"lightning", "torchmetrics"} <= set(started["after_full_help"])
    assert not {"scipy.signal", "transformers", "matplotlib", "torch._dynamo"} & set(started["after_full_help"])
    assert started["mean"] == 3.0
    assert isinstance(wrappers.OptimizedModule, lean_imports._CompiledModules), (
        "Lightning was imported with torch._dynamo"
    )
    module = LightningModule()
    assert _maybe_unwrap_optimized(torch.compile(module, backend="eager")) is module


def test_the_short_help_names_the_groups_classes_and_options_of_the_parser(started: dict[str, Any]) -> None:
    listed = set(re.findall(r"(?<=ARG:)(?: +-\w \w+,)? +--(\w[\w.]*)", started["full_help"]))
    groups = {option.partition(".")[0] for option in listed if "." in option}
    assert set(GROUPS) == groups
    single = {option for option in listed - groups - {"help"} if "." not in option}
    assert {option.split()[0].removeprefix("--") for option in OPTIONS} == single
    for group, names in CLASSES.items():
        for name in names:
            assert f".{name}" in started["full_help"], f"--{group} {name}"
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
