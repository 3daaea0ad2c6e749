"""jsonargparse's report of a wrong argument, which shows how it looked for a fit, as one sentence for a person."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise

_KEY = re.compile(r'Parser key "([^"]+)"')
_REJECTED = re.compile(r"Option '([^']+)' is not accepted")
_CLASS = re.compile(r"given class_path '(?:[\w.]+\.)?(\w+)'")
_MISSING_CLASS = re.compile(r"Expected a dot import path string: (\S+)")
_MISFIT = re.compile(r"Expected an? (.+?)\. Got value: (.*)")
_UNION = re.compile(r"Subtypes: \[(.+)\]\n(?:.*\n)*?.*Given value type: .*\n\s*Given value: (.*)")
_TYPE_NAME = re.compile(r"<class '(?:\w+\.)*(\w+)'>")


def explain(message: str, args: Sequence[str]) -> str:
    """What is wrong, with which value, and what to do.

    Args:
        message: of a `jsonargparse.ArgumentError`.
        args: the command line, from the command's name on.
    """
    command = f"lmchat {args[0]}"
    option = ".".join(_KEY.findall(message))
    if rejected := _REJECTED.search(message):
        owner = match[1] if (match := _CLASS.search(message)) else command
        return (
            f"--{option}.{rejected[1]}: {owner} has no option {rejected[1]!r}; see `{command} --{option}.help {owner}`"
        )
    if stranger := _MISSING_CLASS.search(message):
        return f"--{option} is {stranger[1]}, which is no known class; see `{command} --help` for those there are"
    if misfit := _MISFIT.findall(message):
        expected, value = misfit[-1]
        return f"--{option} is {value}; it must be {_readable(expected)}"
    if option and (unions := _UNION.findall(message)):
        choices, value = unions[-1]
        return f"--{option} is {value}; it must be {_readable(choices)}"
    if unknown := re.search(r"unrecognized arguments: (.*)", message, re.DOTALL):
        return f"unknown option {unknown[1]}; options are written in full, `{command} --help` lists them"
    if missing := re.search(r"arguments are required: (.*)", message):
        names = missing[1].replace(f"{args[0]}.", "")
        return f"{command}: {names} missing; give a config that names them, e.g. --config configs/d12_pretrain.yaml"
    if "Problems parsing config" in message:
        return f"{_configs(args)} is no valid YAML: {_one_line(message.split(':', 1)[1])}"
    return _one_line(message)


def _readable(types: str) -> str:
    names = _TYPE_NAME.sub(r"\1", types).replace("typing.", "")
    return " or ".join(re.split(r", (?![^\[]*\])", names))


def _configs(args: Sequence[str]) -> str:
    return (
        " or ".join(after for flag, after in pairwise(args) if flag in ("--config", "-c"))
        or "the config"
    )


def _one_line(text: str) -> str:
    return " ".join(text.split())
