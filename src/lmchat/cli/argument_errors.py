"""The commands' argument parser, and its errors as one readable sentence."""

import re
import sys
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from jsonargparse import ArgumentParser

from lmchat.cli.short_help import listing

_KEY = re.compile(r'Parser key "([^"]+)"')
_REJECTED = re.compile(r"Option '([^']+)' is not accepted")
_CLASS = re.compile(r"given class_path '(?:[\w.]+\.)?(\w+)'")
_INCOMPLETE = re.compile(r"class_path '(?:[\w.]+\.)?(\w+)':\s+the following arguments are required: (.*)")
_MISSING_CLASS = re.compile(r"Expected a dot import path string: (\S+)")
_BROKEN_CLASS = re.compile(
    r"(?:class_path '[^']+':\s+|- )(No module named .*|module \S+ has no attribute .*|cannot import name .*"
    r"|Import path \S+ does not .*|.*\(\S+\.py, line \d+\))"
)
_MISFIT = re.compile(r"Expected an? (.+?)\. Got value: (.*)")
_UNION = re.compile(r"Subtypes: \[(.+)\]\n(?:(?!\s*Subtypes: ).*\n)*?.*Given value type: .*\n\s*Given value: (.*)")
_TYPE = re.compile(r"<class '(?:\w+\.)*(\w+)'>|(?:typing\.)?Literal\[([^\]]*)\]|([^,\s](?:[^,\[]|\[[^\]]*\])*)")
_PATH = re.compile(r"(Path is not a file|(?:File|Path) does not exist): '(.*)'")
_STRANGER = re.compile(r"does not accept option '([^']+)'")
_NO_MAPPING = re.compile(r"Unable to load config '([^']*)'")


class CommandParser(ArgumentParser):
    """The parser of all commands but the trainer's: an error of printing its help, as of a full disk, is raised."""

    def _print_message(self, message: str, file: Any = None) -> None:
        (file or sys.stderr).write(message)


def explain(message: str, args: Sequence[str]) -> str:
    """Explains a `jsonargparse.ArgumentError` in one sentence with option, value and remedy; it may have line breaks.

    Args:
        args: command line, starting with the name of the command.
    """
    command = f"lmchat {args[0]}"
    if (rejected := _REJECTED.search(message)) and len(_KEY.findall(before := message[: rejected.start()])) > 1:
        message = before  # the option of another class; it is refused by the base class too
    option = ".".join(_KEY.findall(message))
    if path := _PATH.search(message):
        return unusable_path(f"--{option} {path[2]}", "a folder" if path[1] == "Path is not a file" else "not there")
    if rejected := _REJECTED.search(message):
        owner = match[1] if (match := _CLASS.search(message)) else command
        return (
            f"--{option}.{rejected[1]}: {owner} has no option {rejected[1]!r}; see `{command} --{option}.help {owner}`"
        )
    if stranger := _STRANGER.search(message):
        return f"there is no option --{stranger[1]}; `{listing(args[0])}` lists them"
    if "Unexpected config" in message:
        return f"{_configs(args)} has no options; write them as in trainer: {{max_steps: 100}}"
    if stranger := _NO_MAPPING.search(message):
        group = _KEY.findall(message)[-1]  # it occurs twice
        return f"--{group} is {stranger[1]}; it must be a mapping, as in {group}: {{option: value}}"
    if stranger := _MISSING_CLASS.search(message):
        return f"--{option} is {stranger[1]}, which is not a known class; `{listing(args[0])}` lists them"
    if incomplete := _INCOMPLETE.search(message):
        return (
            f"--{option}: {incomplete[1]} needs {incomplete[2]}, which {command} was not given; see "
            f"`{command} --{option}.help {incomplete[1]}`"
        )
    if broken := _BROKEN_CLASS.search(message):
        return f"--{option}: {broken[1]}; correct the path of the class, or its module"
    if values := _MISFIT.findall(message) or (option and _UNION.findall(message)):
        expected, value = values[-1]
        return f"--{option} is {value or 'empty'}; {_remedy(expected, value)}"
    if unknown := re.search(r"unrecognized arguments: (.*)", message, re.DOTALL):
        return f"unknown option {unknown[1]}; options are written in full, `{listing(args[0])}` lists them"
    if missing := re.search(r"arguments are required: (.*)", message):
        return _missing(missing[1].split(", "), args)
    if key := re.search(r"Key must be a string, got: (.*?)\.?$", message):
        return f"{_configs(args)} has the key {key[1]}, which YAML does not read as text; correct it"
    if key := re.search(r"(?:Empty nested key|Spaces not allowed in keys): (.*?)\.?$", message):
        return f"{_configs(args)} has the key {key[1]}, which is not an option; `{listing(args[0])}` lists them"
    if "Problems parsing config" in message:
        return f"{_configs(args)} is not valid YAML: {message.split(':', 1)[1]}"
    return message


def unusable_path(name: str, problem: str) -> str:
    """Message for a config that is ``problem``."""
    return (
        f"{name} is {problem}; give the path of a YAML file (those of lmchat are in the folder configs of its "
        "repository, and not installed with it)"
    )


def _remedy(types: str, value: str) -> str:
    if "Path" in types and value.startswith("~"):
        return "there is no such home folder: write the path without ~"
    return f"it must be {_readable(types)}"


def _missing(names: Sequence[str], args: Sequence[str]) -> str:
    """Message for missing required arguments, which begin with the name of a subcommand, if there is one."""
    owner = names[0].partition(".")[0] if "." in names[0] else ""
    listed = ", ".join(name.removeprefix(f"{owner}.") for name in names)
    if owner == args[0]:
        return f"lmchat {owner}: {listed} missing; give them in a config, e.g. --config configs/d12_pretrain.yaml"
    command = f"lmchat {args[0]} {owner}".strip()
    return f"{command}: {listed} missing; see `{command} --help`"


def _readable(types: str) -> str:
    """Converts type hints as printed by Python to a list of allowed values: ``auto, bf16 or fp32``."""
    names = []
    for class_name, literals, other in _TYPE.findall(types):
        names += [text.strip("' ") for text in literals.split(",")] if literals else [class_name or other]
    *first, last = dict.fromkeys("null" if name == "NoneType" else name for name in names)
    return f"{', '.join(first)} or {last}" if first else last


def _configs(args: Sequence[str]) -> str:
    return " or ".join(config_paths(args)) or "the config"


def config_paths(args: Sequence[str]) -> list[str]:
    joined = [arg.removeprefix("--config=") for arg in args if arg.startswith("--config=")]
    return [after for flag, after in pairwise(args) if flag in ("--config", "-c")] + joined
