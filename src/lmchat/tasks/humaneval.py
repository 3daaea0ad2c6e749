"""HumanEval: Python functions to complete, checked by unit tests (Chen et al. 2021, arXiv:2107.03374)."""

import re
from typing import Any, cast

from lmchat.tasks.base import CodeCheck, GradedByTests, exchange
from lmchat.tasks.rows import HubDataset, RowTask, field
from lmchat.types import Conversation

_FENCE = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)
_IMPORT = re.compile(r"^(?:import|from)\s.*$", re.MULTILINE)


class CodeConversation(Conversation):
    """A function's head, the whole function, and the data to check a completion."""

    entry_point: str
    test: str


class HumanEval(RowTask, GradedByTests):
    """164 Python functions to complete, graded by their unit tests.

    Args:
        options: see `RowTask`.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(hub=HubDataset("openai/openai_humaneval", None, "test"), **options)

    def conversation(self, row: Any) -> CodeConversation:
        prompt, solution = field(row, "prompt", str), field(row, "canonical_solution", str)
        return {
            "messages": exchange(prompt, f"{prompt}\n{solution}")["messages"],
            "entry_point": field(row, "entry_point", str),
            "test": field(row, "test", str),
        }

    def code_check(self, conversation: Conversation, completion: str) -> CodeCheck:
        """The program in ``completion`` with the prompt's imports before it, and the unit tests.

        The program is the first fenced block of the completion, if it has one. The tests can use the other functions
        of the prompt.
        """
        problem = cast(CodeConversation, conversation)
        prompt = cast(str, problem["messages"][0]["content"])
        program = "\n".join([*_IMPORT.findall(prompt), "", extract_code(completion), ""])
        return CodeCheck(program, problem["entry_point"], problem["test"], setup=prompt)


def extract_code(completion: str) -> str:
    """The first fenced code block, closed or not; without one, the whole completion."""
    block = _FENCE.search(completion)
    return (block.group(1) if block else completion).strip("\n")
