"""MMLU: multiple choice questions of 57 subjects (Hendrycks et al. 2020, arXiv:2009.03300)."""

from __future__ import annotations

from string import ascii_uppercase
from typing import Any, Literal

from lmchat.tasks.multiple_choice import MultipleChoiceConversation, MultipleChoiceTask
from lmchat.tasks.row_files import MalformedRow
from lmchat.tasks.rows import HubDataset, field


class MMLU(MultipleChoiceTask):
    """MMLU's questions; ``auxiliary_train`` has 100 K training questions of other datasets.

    Args:
        split: part of the dataset.
        options: see `RowTask`.
    """

    def __init__(
        self,
        split: Literal["auxiliary_train", "dev", "validation", "test"] = "test",
        **options: Any,
    ) -> None:
        super().__init__(hub=HubDataset("cais/mmlu", "all", split), **options)

    def conversation(self, row: Any) -> MultipleChoiceConversation:
        if isinstance(row, dict) and set(row) == {"train"}:  # rows of auxiliary_train are wrapped on the Hub
            row = row["train"]
        question, choices = field(row, "question", str), field(row, "choices", list)
        letters, answer = ascii_uppercase[: len(choices)], field(row, "answer", int)
        if not 0 <= answer < len(letters):
            raise MalformedRow(f"the answer {answer} is not an index into {len(choices)} choices")
        return self.question(question, letters, choices, letters[answer])
