"""Tasks in a config: short class names, checked options, lazy loading."""

from __future__ import annotations

import inspect
import subprocess
import sys
from typing import Any

import pytest
from jsonargparse import ArgumentError, ArgumentParser

import lmchat.tasks
from lmchat.data.mixture import Mixture
from lmchat.demo.tasks import Arithmetic
from lmchat.tasks import GSM8K, Task

TASKS = [name for name, value in vars(lmchat.tasks).items() if isinstance(value, type)]


def parser() -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--mixture", type=Mixture)
    return parser


def build(*parts: dict[str, Any]) -> Mixture:
    config = {"mixture": {"class_path": "lmchat.data.mixture.Mixture", "init_args": {"parts": list(parts)}}}
    return parser().instantiate(parser().parse_object(config)).mixture


def test_every_task_builds_from_its_short_name_without_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)  # importing it would fail
    names = [name for name in TASKS if name != "Task"]
    options: dict[str, dict[str, Any]] = {
        "Dialogue": {"tasks": [{"class_path": "SmolTalk"}, {"class_path": "Identity"}]},
        "JSONLConversations": {"path": "/nowhere.jsonl"},
    }
    mixture = build(*({"task": {"class_path": name, "init_args": options.get(name, {})}} for name in names))
    assert [type(part.task).__name__ for part in mixture.parts] == names


def test_options_of_the_base_classes_are_accepted() -> None:
    options = {"split": "test", "path": "x", "stop": 420, "step": 2, "skip_malformed": True, "answer_rule": "string"}
    (part,) = build({"task": {"class_path": "GSM8K", "init_args": options}, "epochs": 2}).parts
    assert isinstance(part.task, GSM8K)
    assert part.epochs == 2
    assert part.task.slice == slice(0, 420, 2)
    assert part.task.skip_malformed
    options = {"steps": [2, 3], "families": ["bus", "ages"], "stop": 5}
    (part,) = build({"task": {"class_path": "Arithmetic", "init_args": options}}).parts
    assert isinstance(part.task, Arithmetic)
    assert len(part.task) == 5


@pytest.mark.parametrize("bad", [{"splitt": "test"}, {"split": "dev"}, {"stop": "many"}, {"hub": "other/set"}])
def test_wrong_options_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError):
        build({"task": {"class_path": "GSM8K", "init_args": bad}})


def test_every_option_is_documented() -> None:
    for name in TASKS:
        task: type[Task] = getattr(lmchat.tasks, name)
        owner = next(each for each in task.__mro__ if "__init__" in vars(each))
        documented = inspect.getdoc(owner) or ""
        for parameter in list(inspect.signature(task.__init__).parameters)[1:]:
            assert f"\n    {parameter}: " in documented, f"{name}.{parameter}"


def test_importing_the_tasks_loads_nothing_heavy() -> None:
    code = "import sys, lmchat.data.mixture; print([m for m in ('torch', 'datasets', 'pyarrow') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
