"""Checks of YAML, and former names of classes and option groups, accepted for one release."""

import re
from functools import cache
from typing import Any

import yaml
from jsonargparse import get_loader, set_loader
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lmchat.yaml_loading import SAFE_LOADER

CLASSES = {
    "Arithmetic": "lmchat.demo.tasks.Arithmetic",
    "Dialogue": "lmchat.demo.tasks.Dialogue",
    "lmchat.tasks.Arithmetic": "lmchat.demo.tasks.Arithmetic",
    "lmchat.tasks.Dialogue": "lmchat.demo.tasks.Dialogue",
    "lmchat.tasks.arc.ARC": "ARC",
    "lmchat.tasks.mmlu.MMLU": "MMLU",
    "lmchat.tasks.smoltalk.SmolTalk": "SmolTalk",
    "lmchat.tasks.arithmetic.Arithmetic": "lmchat.demo.tasks.Arithmetic",
    "lmchat.tasks.dialogue.Dialogue": "lmchat.demo.tasks.Dialogue",
    "lmchat.callbacks.time_budget.TimeBudget": "lmchat.demo.time_budget.TimeBudget",
    "lmchat.stages.grpo.GRPOModule": "GRPOModule",
    "lmchat.stages.grpo.RolloutDataModule": "RolloutDataModule",
}
"""Class paths by their former names."""

GROUPS = {"non_finite_loss": "non_finite_guard"}
"""Option groups by their former names."""


_OTHER_BASES = re.compile(r"[-+]?(0[0-7_]+|[1-9][0-9_]*(:[0-5]?[0-9])+|[0-9][0-9_]*(:[0-5]?[0-9])+\.[0-9_]*)")

MAX_VALUES = 1_000_000
"""Values of a config with all its aliases written out."""


@cache  # once a process: each call would wrap the loader of the call before
def accept_former_names() -> None:
    """Makes jsonargparse replace former names in configs, with a warning for each."""
    parser_load = get_loader("yaml")

    def load(text: str) -> Any:
        try:
            _check_nodes(yaml.compose(text, Loader=SAFE_LOADER))
            return _rename(parser_load(text), at_top=True)
        except RecursionError:
            raise yaml.YAMLError("it is nested too deeply") from None
        except ValueError as error:  # a number with thousands of digits
            raise yaml.YAMLError(str(error).partition(";")[0]) from None

    set_loader("yaml", load, exceptions=(yaml.YAMLError,))


def _check_nodes(root: yaml.Node | None) -> None:
    """Raises YAMLError for values that YAML reads in an unexpected way, or that make a config endless."""
    waiting, count = [root], 0
    while waiting:
        node, count = waiting.pop(), count + 1
        if count > MAX_VALUES:
            raise yaml.YAMLError(
                f"its aliases stand for more than {MAX_VALUES:,} values, or an alias refers to the value that contains "
                "it"
            )
        if isinstance(node, yaml.ScalarNode):
            line = node.start_mark.line + 1
            if not node.style and _OTHER_BASES.fullmatch(node.value):
                raise yaml.YAMLError(f"line {line}: {node.value} is a number in base 8 or 60; use base 10, or quotes")
            if "\0" in node.value:
                raise yaml.YAMLError(f"line {line}: a text has a NUL character; leave it out")
        elif isinstance(node, yaml.MappingNode):
            names = set[str]()
            for key, value in node.value:
                if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                    if key.value in names:
                        line = key.start_mark.line + 1
                        raise yaml.YAMLError(f"it sets {key.value} twice, the second time in line {line}; remove one")
                    names.add(key.value)
                waiting += [key, value]
        elif isinstance(node, yaml.SequenceNode):
            waiting += node.value


def rename_argument(argument: str) -> str:
    """Replaces former names in an argument of the command line, with a warning for each."""
    option, equals, value = argument.partition("=")
    if argument in CLASSES:
        return _renamed(argument, CLASSES[argument])
    if option.startswith("--"):
        group, dot, rest = option.removeprefix("--").partition(".")
        if dot and group in GROUPS:
            option = f"--{_renamed(group, GROUPS[group])}.{rest}"
        if value in CLASSES:
            value = _renamed(value, CLASSES[value])
    return option + equals + value


def _rename(value: Any, at_top: bool = False) -> Any:
    if isinstance(value, list):
        return [_rename(item) for item in value]
    if not isinstance(value, dict):
        return value
    renamed = {}
    for key, item in value.items():
        if at_top and key in GROUPS:
            key = _renamed(key, GROUPS[key])
        if key == "class_path" and isinstance(item, str) and item in CLASSES:
            item = _renamed(item, CLASSES[item])
        renamed[key] = _rename(item)
    return renamed


def _renamed(former: str, name: str) -> str:
    rank_zero_warn(f"{former} is now called {name}; the former name will be removed in the next release")
    return name
