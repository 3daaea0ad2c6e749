"""Every path on the command line may start with ``~``."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lmchat.__main__ import COMMANDS, command_module, main

Command = tuple[str, ...]


def functions() -> dict[Command, Callable[..., Any]]:
    found: dict[Command, Callable[..., Any]] = {}
    for name in COMMANDS:
        commands = command_module(name).COMMANDS
        if isinstance(commands, dict):
            found |= {(name, subcommand): function for subcommand, function in commands.items()}
        else:
            found[(name,)] = commands
    return found


PATHS = [
    pytest.param(command, parameter, id=f"{' '.join(command)} {parameter.name}")
    for command, function in functions().items()
    for parameter in inspect.signature(function).parameters.values()
    if "Path" in str(parameter.annotation)
]


def parsed(command: Command, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Arguments that the command's function would be called with."""
    given: dict[str, Any] = {}
    function = functions()[command]

    @functools.wraps(function)
    def record(**options: Any) -> None:
        given.update(options)

    module = command_module(command[0])
    monkeypatch.setattr(module, "COMMANDS", {command[1]: record} if len(command) == 2 else record)
    assert main([*command, *arguments]) == 0
    return given


def arguments(command: Command, parameter: inspect.Parameter, path: str) -> list[str]:
    """The required arguments of a command, and ``path`` for the parameter."""
    given = []
    for name, each in inspect.signature(functions()[command]).parameters.items():
        required = each.default is inspect.Parameter.empty
        if name == parameter.name:
            given.append(path if required else f"--{name}={path}")
        elif required:
            given.append("value")
    return given


@pytest.mark.parametrize(("command", "parameter"), PATHS)
def test_tilde_is_expanded(
    command: Command, parameter: inspect.Parameter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    value = parsed(command, arguments(command, parameter, "~/x"), monkeypatch)[parameter.name]
    assert value in (tmp_path / "x", [tmp_path / "x"])


@pytest.mark.parametrize(("command", "parameter"), PATHS)
def test_an_empty_path_is_not_the_current_folder(
    command: Command, parameter: inspect.Parameter, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, *arguments(command, parameter, "")]) == 2
    errors = capfd.readouterr().err
    assert "a path is empty" in errors or f"--{parameter.name} is empty; it must be" in errors


def test_tilde_is_expanded_in_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    given = parsed(("tokenizer", "train"), ["--data=[~/a.txt, b.txt]"], monkeypatch)
    assert given["data"] == [tmp_path / "a.txt", Path("b.txt")]


def test_an_unknown_home_folder_is_reported(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["tokenizer", "show", "hi", "--tokenizer=~nobody-of-this-name/x"]) == 2
    assert "--tokenizer is ~nobody-of-this-name/x; there is no such home folder" in capfd.readouterr().err
