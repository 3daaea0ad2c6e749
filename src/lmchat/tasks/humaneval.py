"""HumanEval: Python functions to complete, checked by unit tests (Chen et al. 2021, arXiv:2107.03374)."""

from __future__ import annotations

import re
from typing import Any, cast

from lmchat.tasks.base import exchange
from lmchat.tasks.rows import HubDataset, RowTask, field
from lmchat.types import Conversation

_FENCE = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)
_IMPORT = re.compile(r"^(?:import|from)\s.*$", re.MULTILINE)


class CodeConversation(Conversation):
    """A function's head, the whole function, and what it takes to check another one."""

    entry_point: str
    test: str


class HumanEval(RowTask):
    """164 functions. `program` gives what to run; running it belongs in a sandbox."""

    def __init__(self, path: str | None = None, **options: Any) -> None:
        """Choose the source.

        Args:
            path: a local copy, see `RowTask`.
            options: see `RowTask`.
        """
        super().__init__(hub=HubDataset("openai/openai_humaneval", None, "test"), path=path, **options)

    def conversation(self, row: Any) -> CodeConversation:
        prompt, solution = field(row, "prompt", str), field(row, "canonical_solution", str)
        return {
            "messages": exchange(prompt, f"{prompt}\n{solution}")["messages"],
            "entry_point": field(row, "entry_point", str),
            "test": field(row, "test", str),
        }

    def program(self, conversation: Conversation, completion: str) -> str:
        """The source that exits without an error if, and only if, ``completion`` passes the unit tests.

        It consists of the prompt's imports, the completion's code (its first fenced block, if it has one), and the
        tests. It is a model's output: run it only where it can do no harm.
        """
        problem = cast(CodeConversation, conversation)
        imports = _IMPORT.findall(cast(str, problem["messages"][0]["content"]))
        check = f"check({problem['entry_point']})"
        return "\n".join([*imports, "", extract_code(completion), "", problem["test"], check, ""])


def extract_code(completion: str) -> str:
    """The first fenced code block, closed or not; without one, the whole completion."""
    block = _FENCE.search(completion)
    return (block.group(1) if block else completion).strip("\n")
